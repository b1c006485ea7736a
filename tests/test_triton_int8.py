"""The fused int8 GEMM: bit-equal to the reference, whose sums are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.kernels import scaled_mm

triton_int8 = pytest.importorskip("lockstep.kernels.triton_int8")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def codes(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8).to(DEVICE)


def check(m: int, n: int, k: int, dtype: torch.dtype, engine: str, with_bias: bool, by_token: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = codes(generator, m, k), codes(generator, n, k)
    x_scale = torch.rand(m if by_token else 1, 1, generator=generator).to(DEVICE) * 1e-2
    w_scale = torch.rand(n, 1, generator=generator).to(DEVICE) * 1e-2
    bias = torch.randn(n, generator=generator).to(DEVICE, dtype) if with_bias else None
    ours = triton_int8.gemm(x, weight, x_scale, w_scale, engine, bias, dtype)
    sums = scaled_mm.emulated_sums(x, weight)
    expected = scaled_mm.int8_epilogue(sums, x_scale, w_scale, engine, bias, dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equal_for_each_engine_dtype_and_bias(dtype, engine, with_bias):
    check(37, 72, 192, dtype, engine, with_bias, by_token=True, seed=1)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 300), st.booleans(), st.integers(0, 99))
def test_equal_for_any_shape_and_scale(m, n, k, by_token, seed):
    check(m, n, k, torch.bfloat16, "vllm", True, by_token, seed)


def test_the_longest_sums_do_not_overflow():
    """16,384 products of -128 with -128: 2**28, far beyond what 16 bits or an fp32 significand hold exactly."""
    x = torch.full((2, 16384), -128, dtype=torch.int8, device=DEVICE)
    one = torch.ones(2, 1, device=DEVICE)
    y = triton_int8.gemm(x, x, one, one, "vllm", None, torch.float32)
    assert (y == 2.0**28).all()


def test_the_order_of_the_scales_is_the_engines():
    """A planted swap of the engines must show: they round differently somewhere in a few thousand outputs."""
    generator = torch.Generator().manual_seed(0)
    x, weight = codes(generator, 64, 256), codes(generator, 64, 256)
    x_scale, w_scale = (torch.rand(64, 1, generator=generator).to(DEVICE) for _ in range(2))
    ours = [triton_int8.gemm(x, weight, x_scale, w_scale, engine, None, torch.float32) for engine in ("vllm", "sglang")]
    assert not torch.equal(*ours)
