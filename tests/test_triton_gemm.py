"""The Triton GEMM: it multiplies with exactly the served weights, in the reference's order of roundings.

Only the order of its fp32 additions is its own. So where every partial sum is exact it must be equal, bit for bit.
"""

from __future__ import annotations

import pytest
import torch
from strategies import BF16, DTYPES, FP16, FP32, GROUPINGS
from torch import Tensor

from lockstep import Scheme, TensorSpec, grid, kernels
from lockstep.kernels import reference

triton_gemm = pytest.importorskip("lockstep.kernels.triton_gemm", reason="needs Triton", exc_type=ImportError)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_grouping = pytest.mark.parametrize("grouping", GROUPINGS, ids=["g32", "g64", "g128", "channel"])


def spec_of(grouping: dict, dtype: torch.dtype, **fields) -> TensorSpec:
    return TensorSpec(**grouping, scale_dtype=dtype, served_dtype=dtype, **fields)


def integers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Integers from -3 to 3."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randn(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def coarse(n: int, k: int, spec: TensorSpec) -> grid.Quantized:
    """Random codes and scales with which a product with small integers sums without rounding.

    Several scales in a row are powers of two; a single one, which is multiplied with the sum, is any number.
    """
    generator = torch.Generator().manual_seed(n * k)
    codes = torch.randint(-7, 8, (n, k), generator=generator).to(torch.int8)
    groups = spec.num_groups(k)
    scale = torch.rand(n, 1, generator=generator) if groups == 1 else torch.ones(n, 1)
    exponents = torch.randint(-6, -3, (n, groups), generator=generator)
    return grid.Quantized(codes, (scale * exponents.float().exp2()).to(spec.scale_dtype))


def linear(x: Tensor, quantized: grid.Quantized, spec: TensorSpec, bias: Tensor | None = None) -> Tensor:
    """The kernel under test, on the device, and back."""
    codes, scale, *_ = quantized
    on_device = grid.Quantized(codes.to(DEVICE), scale.to(DEVICE))
    return triton_gemm.linear(x.to(DEVICE), on_device, spec, None if bias is None else bias.to(DEVICE)).cpu()


@every_dtype
@every_grouping
@pytest.mark.parametrize("rule", ["amax/7", "amax/7.5"])
def test_identity_gives_back_exactly_the_served_weights(grouping, dtype, rule):
    """One product in each sum: what comes out are the weights that it multiplies with."""
    spec = spec_of(grouping, dtype, scale_rule=rule)
    quantized = grid.quantize(randn(40, 256), spec)
    assert torch.equal(linear(torch.eye(256, dtype=dtype), quantized, spec).T, grid.dequantize(quantized, spec))


def test_identity_gives_back_the_weights_of_gguf():
    """Negative scales, and codes down to -8."""
    spec = TensorSpec(scale_rule="max/-8", group_size=32, scale_dtype=FP16, served_dtype=BF16)
    quantized = grid.quantize(randn(40, 96), spec)
    assert torch.equal(linear(torch.eye(96, dtype=BF16), quantized, spec).T, grid.dequantize(quantized, spec))


@every_dtype
@every_grouping
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("m", "n", "groups"),
    [(1, 1, 1), (3, 40, 1), (70, 64, 3), (64, 65, 2)],
    ids=lambda size: str(size),
)
def test_exact_sums_are_the_references_bit_for_bit(grouping, dtype, has_bias, m, n, groups):
    """Every rounding is where the reference has it: that of the sum, of a single scale, of the bias."""
    spec = spec_of(grouping, dtype)
    k = groups * (spec.group_size or 104)
    x, quantized = integers(m, k, dtype=dtype), coarse(n, k, spec)
    bias = randn(n, dtype=dtype) if has_bias else None
    assert torch.equal(linear(x, quantized, spec, bias), reference.linear(x, quantized, Scheme(spec), bias))


@pytest.mark.parametrize("grouping", [{"group_size": 32}, {"strategy": "channel"}], ids=["grouped", "channel"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(96,), (0, 96), (5, 96), (2, 3, 96), (2, 0, 96), (2, 1, 3, 96)], ids=str)
def test_leading_dimensions_are_rows(grouping, has_bias, shape):
    spec = spec_of(grouping, BF16)
    x, quantized = integers(*shape, dtype=BF16), coarse(40, 96, spec)
    bias = randn(40, dtype=BF16) if has_bias else None
    y = linear(x, quantized, spec, bias)
    assert y.shape == (*shape[:-1], 40)
    assert torch.equal(y, reference.linear(x, quantized, Scheme(spec), bias))


@pytest.mark.parametrize("k", [8, 56, 64, 72, 200])
def test_rows_that_do_not_fill_a_block_are_summed_to_their_end(k):
    spec = spec_of({"strategy": "channel"}, BF16)
    x, quantized = integers(5, k, dtype=BF16), coarse(40, k, spec)
    assert torch.equal(linear(x, quantized, spec), reference.linear(x, quantized, Scheme(spec)))


def test_operands_may_be_views():
    """Activations come transposed out of attention, and scales out of a file."""
    spec = spec_of({"group_size": 32}, BF16)
    quantized = coarse(40, 96, spec)
    x = integers(96, 5, dtype=BF16).T
    views = grid.Quantized(quantized.codes.T.contiguous().T, quantized.scale.T.contiguous().T)
    bias = randn(80, dtype=BF16)[::2]
    expected = reference.linear(x, quantized, Scheme(spec), bias.contiguous())
    assert torch.equal(linear(x, views, spec, bias), expected)


def test_mixed_precision_is_that_of_the_input():
    """fp32 activations through weights that are served in bf16: the weight is rounded to bf16, the sum is not."""
    spec = spec_of({"group_size": 32}, BF16)
    quantized = grid.quantize(randn(40, 96), spec)
    y = linear(torch.eye(96), quantized, spec)
    assert y.dtype == FP32
    assert torch.equal(y.T, grid.dequantize(quantized, spec).float())


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("grouping", [{"group_size": 64}, {"strategy": "channel"}], ids=["grouped", "channel"])
def test_random_sums_are_as_close_to_the_truth_as_the_references(grouping, dtype):
    """An alignment report holds every kernel to the same tolerance."""
    spec = spec_of(grouping, dtype)
    quantized = grid.quantize(randn(72, 512), spec)
    x = randn(72, 512, dtype=dtype, seed=1)
    if spec.scale_follows_gemm(512):
        exact = (x.double() @ quantized.codes.double().T) * quantized.scale.double().T
    else:
        exact = x.double() @ grid.dequantize(quantized, spec).double().T
    error, expected = (
        (y.double() - exact).square().mean().sqrt()
        for y in (linear(x, quantized, spec), reference.linear(x, quantized, Scheme(spec)))
    )
    assert error <= expected * (1.02 if dtype != FP32 else 3)  # in fp32 nothing but the order of additions rounds


@pytest.mark.parametrize("k", [37, 100])
def test_rows_that_do_not_fill_a_word_are_refused(k):
    spec = TensorSpec(strategy="channel")
    with pytest.raises(ValueError, match=rf"\[64, {k}\] served in .* it needs a multiple of 8 inputs"):
        linear(torch.zeros(2, k, dtype=BF16), coarse(64, k, spec), spec)


def test_it_is_the_kernel_that_the_registry_calls_triton():
    """``lockstep align --kernel triton`` measures this function."""
    spec = spec_of({"group_size": 32}, BF16)
    x, quantized = integers(3, 64, dtype=BF16).to(DEVICE), coarse(8, 64, spec)
    on_device = grid.Quantized(quantized.codes.to(DEVICE), quantized.scale.to(DEVICE))
    y = kernels.find("linear", "triton", Scheme(spec), DEVICE).run(x, on_device, Scheme(spec))
    assert torch.equal(y, triton_gemm.linear(x, on_device, spec))
