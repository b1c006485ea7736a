"""The GEMMs on codes: exact integers, the order of the epilogues, and float64 for everything else."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BF16, E4M3, FP16, FP32, nearest, nearest_code
from torch import Tensor

from lockstep import Scheme, activations, grid
from lockstep.grid import Quantized
from lockstep.kernels import scaled_mm
from lockstep.scheme import PRESETS

CPU = torch.device("cpu")
QUANTIZED_INPUTS = [name for name, scheme in PRESETS.items() if scheme.activations and name != "INT8"]
every_scheme = pytest.mark.parametrize("name", QUANTIZED_INPUTS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def case(name: str, m: int, n: int = 48, k: int = 256) -> tuple[Scheme, Quantized, Quantized]:
    """A scheme, quantized inputs ``[m, k]`` and a quantized weight ``[n, k]``."""
    scheme = Scheme.preset(name)
    x, w = randn(m, k), randn(n, k, seed=1)
    inputs = scheme.activations
    stored = activations.static_scale(torch.tensor(4.0), inputs) if inputs.stores_scale else None
    return scheme, activations.quantize(x, inputs, stored), grid.quantize(w, scheme.weights)


def wide(quantized: Quantized, rows: int) -> Tensor:
    """Codes times scales in float64: `rows` rows share a scale."""
    scale = quantized.scale.double()
    if quantized.global_scale is not None:
        scale = scale * quantized.global_scale.reciprocal().double().flatten()
    n, k = quantized.codes.shape
    scale = scale.view(-1, scale.shape[-1]).repeat_interleave(rows, 0)
    scale = scale.expand(n, -1) if len(scale) == 1 else scale[:n]
    width = 128 if rows > 1 else k // scale.shape[1]
    return quantized.codes.double() * scale.repeat_interleave(width, 1)[:, :k]


# Everything, against float64 -----------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("m", [1, 17], ids="M{}".format)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_the_gemm_is_the_product_of_the_dequantized_operands(name, dtype, m, bias):
    """To the rounding of the output, twice with a bias that is added after, and of fp32 sums."""
    scheme, x, w = case(name, m)
    operand = w
    if scheme.weights.bits == 4 and scheme.activations.format == "fp8_e4m3":
        operand = scaled_mm.fp8_from_int4(w)
    b = randn(48, seed=2).to(dtype) if bias else None
    left, right = wide(x, 1), wide(operand, 128 if scheme.weights.strategy == "block" else 1)
    exact = left @ right.T
    expected = exact if b is None else exact + b.double()
    y = scaled_mm.linear(x, w, scheme, b, dtype)
    assert (y.shape, y.dtype) == ((m, 48), dtype)
    rounding = torch.finfo(dtype).eps / 2 * (exact.abs() + expected.abs())
    accumulation = 2.0**-19 * (left.abs() @ right.abs().T)
    assert ((y.double() - expected).abs() <= rounding + accumulation).all()


@every_scheme
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_leading_dimensions_and_empty_batches(name, lead, bias):
    scheme = Scheme.preset(name)
    inputs = scheme.activations
    stored = torch.tensor([0.25]) if inputs.stores_scale else None
    x = activations.quantize(randn(*lead, 256), inputs, stored)
    w = grid.quantize(randn(48, 256), scheme.weights)
    b = randn(48).to(BF16) if bias else None
    y = scaled_mm.linear(x, w, scheme, b)
    assert (y.shape, y.dtype) == ((*lead, 48), BF16)
    rows = x.codes.view(-1, 256)
    scale = x.scale if not inputs.dynamic else x.scale.view(len(rows), inputs.num_groups(256))
    flat = scaled_mm.linear(Quantized(rows, scale, None, x.global_scale), w, scheme, b)
    assert torch.equal(y.view(-1, 48), flat)


@pytest.mark.parametrize("name", ["W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 5, 7), (17, 33, 129), (2, 130, 131)])
def test_odd_sizes_on_the_cpu(name, m, n, k):
    """Small layers and tests have them; GPU kernels say that they do not take them."""
    if name == "FP8_BLOCK":
        k = 256
    scheme, x, w = case(name, m, n, k)
    y = scaled_mm.linear(x, w, scheme, dtype=FP32)
    exact = wide(x, 1) @ wide(w, 128 if name == "FP8_BLOCK" else 1).T
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


@every_scheme
def test_a_row_does_not_depend_on_the_rows_beside_it(name):
    scheme, x, w = case(name, 17)
    whole = scaled_mm.linear(x, w, scheme, dtype=FP32)
    row = Quantized(x.codes[3:4], x.scale[3:4] if scheme.activations.dynamic else x.scale, None, x.global_scale)
    torch.testing.assert_close(scaled_mm.linear(row, w, scheme, dtype=FP32)[0], whole[3], rtol=1e-5, atol=1e-5)


# INT8 ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.sampled_from([1, 2, 16, 17, 64]), st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**20))
def test_native_int8_sums_are_the_emulated_ones_and_exact(m, n, k, seed):
    x, w = codes(-128, 127, m, k, seed=seed), codes(-128, 127, n, k, seed=seed + 1)
    assert scaled_mm.has_native("int8", CPU)
    expected = (x.long() @ w.long().T).to(torch.int32)
    assert torch.equal(scaled_mm.sums(x, w), expected)
    assert torch.equal(scaled_mm.emulated_sums(x, w), expected)


def test_int8_sums_at_the_largest_magnitude_do_not_saturate():
    """Some CPU instructions add pairs in 16 bits."""
    x, w = torch.full((17, 4096), -128, dtype=torch.int8), torch.full((8, 4096), -128, dtype=torch.int8)
    for found in (scaled_mm.sums(x, w), scaled_mm.emulated_sums(x, w)):
        assert (found == 128 * 128 * 4096).all()
    w = -w - 1
    for found in (scaled_mm.sums(x, w), scaled_mm.emulated_sums(x, w)):
        assert (found == -128 * 127 * 4096).all()


def epilogue(acc: int, x_scale: float, w_scale: float, engine: str, bias: float | None, dtype: torch.dtype) -> float:
    """Exact fractions, each step rounded where the kernel rounds it."""
    acc_, s_x, s_w = nearest(Fraction(acc), FP32), Fraction(x_scale), Fraction(w_scale)
    if engine == "sglang":
        left, right = acc_, nearest(s_w * s_x, FP32)
    else:
        left, right = nearest(s_w * acc_, FP32), s_x
    product = left * right if bias is None else left * right + Fraction(bias)
    return float(nearest(nearest(product, FP32), dtype))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_int8_epilogue_rounds_where_the_engines_kernel_does(dtype, bias, engine):
    """One rounding to the output's dtype, with the bias inside it; sums beyond 2**24 are rounded to fp32 first."""
    acc = torch.randint(-(2**27), 2**27, (16, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    x_scale, w_scale = randn(16, 1).abs() * 1e-3, randn(8, 1, seed=1).abs() * 1e-3
    b = randn(8, seed=2).to(dtype) if bias else None
    y = scaled_mm.int8_epilogue(acc, x_scale, w_scale, engine, b, dtype)
    expected = [
        [
            epilogue(
                acc[i, j].item(), x_scale[i].item(), w_scale[j].item(), engine, b[j].item() if bias else None, dtype
            )
            for j in range(8)
        ]
        for i in range(16)
    ]
    assert y.tolist() == expected


def test_a_wrong_order_of_the_epilogue_would_show():
    """Planted: the engines' orders differ from one another, and a second rounding before the bias from both."""
    acc = codes(-127, 127, 256, 64).int() * 977
    x_scale, w_scale, b = randn(256, 1).abs(), randn(64, 1, seed=1).abs(), randn(64, seed=2)
    orders = [scaled_mm.int8_epilogue(acc, x_scale, w_scale, engine, None, FP32) for engine in ("vllm", "sglang")]
    assert not torch.equal(*orders)
    assert torch.allclose(*orders, rtol=1e-6)
    bias = (b * 1e3).to(BF16)
    once = scaled_mm.int8_epilogue(acc, x_scale * 1e-2, w_scale, "vllm", bias, BF16)
    twice = scaled_mm.int8_epilogue(acc, x_scale * 1e-2, w_scale, "vllm", None, BF16) + bias
    assert (once != twice).float().mean() > 0.05


def test_the_engine_of_the_scheme_chooses_the_order():
    scheme, x, w = case("W8A8", 64, 64)
    acc = scaled_mm.emulated_sums(x.codes, w.codes)
    for engine in ("vllm", "sglang"):
        chosen = Scheme(scheme.weights, replace(scheme.activations, engine=engine))
        expected = scaled_mm.int8_epilogue(acc, x.scale, w.scale, engine, None, FP32)
        assert torch.equal(scaled_mm.linear(x, w, chosen, dtype=FP32), expected)


# FP8 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FP8", "FP8_DYNAMIC"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 32), (17, 48, 256), (64, 32, 1024)])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_native_fp8_is_the_emulated_one_within_its_accumulation(name, m, n, k, bias, dtype):
    """The products are exact in fp32; the order of the sums, and so a rounding at a tie, is the backend's."""
    if not scaled_mm.has_native("fp8_e4m3", CPU):
        pytest.skip("this torch has no fp8 GEMM with a scale for each row on the CPU")
    _, x, w = case(name, m, n, k)
    b = randn(n, seed=2).to(dtype) if bias else None
    native, emulated = (gemm(x, w, b, dtype) for gemm in (scaled_mm.fp8, scaled_mm.emulated_fp8))
    assert native.dtype == emulated.dtype == dtype
    left, right = wide(x, 1), wide(w, 1)
    slack = 2.0**-20 * (left.abs() @ right.abs().T) + torch.finfo(dtype).eps * emulated.double().abs()
    assert ((native.double() - emulated.double()).abs() <= slack).all()
    assert (native == emulated).float().mean() > 0.9


def test_native_fp8_is_the_emulated_one_exactly_where_every_order_gives_the_same_sum():
    """Small integers as codes and powers of two as scales: also the bias is inside the one rounding."""
    x = Quantized(codes(-8, 8, 17, 64).float().to(torch.float8_e4m3fn), torch.full((17, 1), 0.5))
    w = Quantized(codes(-8, 8, 32, 64, seed=1).float().to(torch.float8_e4m3fn), torch.full((32, 1), 2.0**-6))
    b = randn(32, seed=2).to(BF16)
    for bias in (None, b):
        native, emulated = (gemm(x, w, bias, BF16) for gemm in (scaled_mm.fp8, scaled_mm.emulated_fp8))
        assert torch.equal(native, emulated)
        exact = (x.codes.double() @ w.codes.double().T) * 2.0**-7
        assert torch.equal(native, (exact if bias is None else exact + bias.double()).to(BF16))
    assert not torch.equal(emulated, scaled_mm.emulated_fp8(x, w, None, BF16) + b)


def test_fp8_in_fp32_is_emulated_and_not_rounded_to_16_bits():
    """fp32 masters without autocast: torch's own GEMM has no fp32 output with row scales everywhere."""
    _, x, w = case("FP8_DYNAMIC", 17)
    y = scaled_mm.fp8(x, w, None, FP32)
    assert torch.equal(y, scaled_mm.emulated_fp8(x, w, None, FP32))
    assert not torch.equal(y, y.bfloat16().float())


# Groups and blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FP8_BLOCK", "W4A8"])
def test_a_group_is_scaled_before_it_is_added(name):
    """Two groups of unlike size: with one scale for both the small one would be lost, or the large one off."""
    scheme = Scheme.preset(name)
    x, w = randn(8, 256), randn(128, 256, seed=1)
    x[:, 128:] *= 1e-3
    w[:, 128:] *= 1e3
    found = activations.quantize(x, scheme.activations)
    quantized = grid.quantize(w, scheme.weights)
    y = scaled_mm.linear(found, quantized, scheme, dtype=FP32)
    exact = wide(found, 1) @ wide(quantized, 128 if name == "FP8_BLOCK" else 1).T
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["FP8_BLOCK", "W4A8", "NVFP4", "MXFP4", "MXFP8", "W4AFP8"])
def test_bias_is_added_after_the_rounding_where_the_kernel_has_none(name):
    scheme, x, w = case(name, 17)
    b = randn(48, seed=2).to(BF16)
    assert torch.equal(scaled_mm.linear(x, w, scheme, b), scaled_mm.linear(x, w, scheme) + b)


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4", "MXFP8"])
def test_microscaled_operands_are_exact_in_bf16(name):
    """So that a bf16 GEMM multiplies what an FP4 or FP8 tensor core would."""
    _, x, w = case(name, 17)
    for one in (x, w):
        products = one.codes.double().unflatten(-1, (one.scale.shape[-1], -1)) * one.scale.double().unsqueeze(-1)
        assert torch.equal(products, products.to(BF16).double())


def test_w4afp8_rounds_each_product_of_code_and_group_scale_to_e4m3():
    """What Hopper's kernel multiplies with is not ``code * scale``: scales and products have four bits."""
    _, _, w = case("W4AFP8", 1)
    found = scaled_mm.fp8_from_int4(w)
    assert found.codes.dtype == torch.float8_e4m3fn
    assert found.scale.shape == (48, 1)
    scale = w.scale.float().numpy()
    row = np.maximum(np.abs(scale).max(-1, keepdims=True) / np.float32(448), np.float32(1 / 229376))
    group = nearest_code(nearest_code(scale / row, E4M3) / 8, E4M3)
    products = nearest_code(w.codes.double().numpy() * group.repeat(128, -1), E4M3)
    assert np.array_equal(found.codes.double().numpy(), products)
    assert np.array_equal(found.scale.numpy(), 8 * row)
    plain = wide(w, 1)
    assert 0.005 < ((wide(found, 1) - plain).norm() / plain.norm()).item() < 0.05
