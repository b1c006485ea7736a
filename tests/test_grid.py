"""The reference arithmetic against independent oracles: exact fractions, compressed-tensors, llama.cpp's Q4_0."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import forward as ct
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BF16, DTYPES, FP16, FP32, Q4_0, bits, dtypes, finite_positive, groupings, specs, weights
from torch import Tensor

from lockstep import TensorSpec, grid


def requantize(w: Tensor, spec: TensorSpec) -> tuple[grid.Quantized, Tensor, grid.Quantized]:
    """Codes and scales of `w`, the weights served, and the codes and scales of those."""
    first = grid.quantize(w, spec)
    served = grid.dequantize(first, spec)
    return first, served, grid.quantize(served, spec)


@given(weights(lead=((), (3,), (2, 1)), rows=(0, 1, 5)), specs)
def test_every_spec_yields_what_the_exporters_expect(w, spec):
    codes, scale = quantized = grid.quantize(w, spec)
    low, high = spec.code_range
    assert codes.dtype == torch.int8
    assert codes.shape == w.shape
    assert ((codes >= low) & (codes <= high)).all()
    assert scale.dtype == spec.scale_dtype
    assert scale.shape == (*w.shape[:-1], spec.num_groups(w.shape[-1]))
    assert scale.isfinite().all()
    served = grid.dequantize(quantized, spec)
    assert served.dtype == spec.served_dtype
    assert served.shape == w.shape
    assert torch.equal(bits(grid.fake_quantize(w, spec)), bits(served))


@given(weights(lead=((3,),), rows=(4,)), specs)
def test_memory_layout_and_leading_dimensions_do_not_matter(w, spec):
    """A stack of experts, or a transposed view, quantizes as its rows one by one."""
    codes, scale = grid.quantize(w, spec)
    for expert, (expected_codes, expected_scale) in enumerate(grid.quantize(part.contiguous(), spec) for part in w):
        assert torch.equal(codes[expert], expected_codes)
        assert torch.equal(bits(scale[expert]), bits(expected_scale))


# amax/7, against exact rational arithmetic -------------------------------------------------------------------------


def nearest(x: Fraction, dtype: torch.dtype) -> Fraction:
    """`x` rounded to the nearest value of `dtype`, ties to even (overflow left aside)."""
    info = torch.finfo(dtype)
    binade = max(math.frexp(x)[1] - 1, math.frexp(info.smallest_normal)[1] - 1)
    quantum = Fraction(2) ** binade * Fraction(info.eps)
    return round(x / quantum) * quantum  # Python rounds fractions half to even


def exact_amax_7(group: list[float], spec: TensorSpec) -> tuple[Fraction, list[int], list[Fraction]]:
    """Scale, codes and served weights of one group, each operation exact and then rounded once."""
    exact = [Fraction(w) for w in group]
    scale = nearest(nearest(max(map(abs, exact)) / 7, FP32), spec.scale_dtype)
    codes = [max(-7, min(7, round(nearest(w / scale, FP32)))) if scale else 0 for w in exact]
    return scale, codes, [nearest(nearest(code * scale, FP32), spec.served_dtype) for code in codes]


@settings(max_examples=25)
@given(weights(lead=((),), rows=(2,), columns=(128,)), groupings, dtypes, dtypes)
def test_amax_7_is_exact_division_rounded_half_to_even(w, grouping, scale_dtype, served_dtype):
    spec = TensorSpec(**grouping, scale_dtype=scale_dtype, served_dtype=served_dtype)
    codes, scale = quantized = grid.quantize(w, spec)
    served = grid.dequantize(quantized, spec)
    size = spec.group_size or w.shape[-1]
    for row in range(w.shape[0]):
        for group in range(scale.shape[-1]):
            here = (row, slice(group * size, (group + 1) * size))
            expected = exact_amax_7(w[here].tolist(), spec)
            assert (scale[row, group].item(), codes[here].tolist(), served[here].tolist()) == expected


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_amax_7_is_idempotent_for_every_16_bit_amax(dtype):
    """Re-exporting a served checkpoint ships the same bits: proved over all finite values that a group's amax can have.

    Excepted are four values near the smallest subnormal, where the amax gets code 6, and the largest finite value of
    the dtype, where 7 * scale overflows.
    """
    amax = finite_positive(dtype)
    w = torch.zeros(len(amax), 32, dtype=dtype)
    w[:, 3] = amax
    spec = TensorSpec(group_size=32, scale_dtype=dtype, served_dtype=dtype)
    first, served, again = requantize(w, spec)
    changed = (first.scale != again.scale).any(-1) | (first.codes != again.codes).any(-1)
    smallest, largest = amax[0].item(), amax[-1].item()
    assert amax[changed].tolist() == [25 * smallest, 26 * smallest, 32 * smallest, 39 * smallest, largest]
    assert served[-1, 3].isinf()
    assert first.codes[changed, 3].tolist() == [6, 6, 6, 6, 7]


@given(weights(dtype=st.sampled_from([BF16, FP16])), groupings)
def test_amax_7_is_idempotent_on_whole_groups(w, grouping):
    """As above, for the codes of the other elements too. (Scales of 8 smallest subnormals and more.)"""
    spec = TensorSpec(**grouping, scale_dtype=w.dtype, served_dtype=w.dtype)
    first, served, again = requantize(w, spec)
    stable = (first.scale == 0) | (first.scale >= 8 * finite_positive(w.dtype)[0])
    assert torch.equal(again.scale[stable], first.scale[stable])
    where = stable.repeat_interleave(w.shape[-1] // stable.shape[-1], dim=-1)
    assert torch.equal(again.codes[where], first.codes[where])
    assert torch.equal(grid.dequantize(again, spec)[where], served[where])


@pytest.mark.parametrize(
    ("spec", "amax"),
    [
        # The scale's mantissa is 148 of 128..255: 7 * 148 = 1036 is no bf16 number, 1040 is, and 1040 / 7 gives 149.
        (TensorSpec(group_size=32), 1036 / 1024),
        # llama.cpp takes the scale from the bf16 weight, which has fewer bits than the fp16 scale it was made with.
        (TensorSpec(**Q4_0, served_dtype=BF16), 1 + 1 / 1024),
    ],
    ids=str,
)
def test_an_fp32_master_served_in_bf16_is_not_idempotent(spec, amax):
    """Documented, not wanted: export from the master, never from the dequantized weights."""
    w = torch.zeros(1, 32)
    w[0, 0] = amax
    first, _, again = requantize(w, spec)
    assert torch.equal(again.codes, first.codes)
    assert not torch.equal(again.scale, first.scale)
    # Unless the master is rounded to the served dtype first.
    first, _, again = requantize(w.bfloat16(), spec)
    assert torch.equal(again.scale, first.scale)


# amax/7.5, against compressed-tensors ------------------------------------------------------------------------------


@given(weights(lead=((),)), groupings)
def test_amax_7_5_is_compressed_tensors_own_arithmetic(w, grouping):
    """llm-compressor quantizes the same weights to the same bits, division in the weight's own dtype included."""
    spec = TensorSpec(**grouping, scale_rule="amax/7.5", scale_dtype=w.dtype, served_dtype=w.dtype)
    codes, scale = quantized = grid.quantize(w, spec)

    args = QuantizationArgs(num_bits=4, symmetric=True, strategy=spec.strategy, group_size=spec.group_size)
    groups = w.unflatten(-1, (scale.shape[-1], -1))
    theirs, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    their_codes = ct.quantize(w, theirs, zero_point, args, dtype=torch.int8)

    assert torch.equal(codes, their_codes)
    assert torch.equal(bits(grid.dequantize(quantized, spec)), bits(ct.dequantize(their_codes, theirs, args=args)))
    # They store an epsilon where the scale is zero, and all codes of the group with it.
    assert torch.equal(bits(scale[scale != 0]), bits(theirs[scale != 0]))
    assert (theirs[scale == 0] == torch.finfo(w.dtype).eps).all()


# max/-8, against llama.cpp -----------------------------------------------------------------------------------------


def llama_cpp_q4_0(block: np.ndarray, round_scale_first: bool) -> tuple[np.float16, list[int]]:
    """The scale and the codes of 32 fp32 weights, after ``quantize_row_q4_0_ref`` in llama.cpp's ggml-quants.c.

    llama.cpp divides by the unrounded fp32 scale and stores it in fp16; we, training, round it first.
    """
    extreme = np.float32(0)
    for x in block:
        if abs(x) > abs(extreme):
            extreme = x
    scale = extreme / np.float32(-8)
    if round_scale_first:
        scale = np.float32(np.float16(scale))
    inverse = np.float32(1) / scale if scale else np.float32(0)
    codes = [min(15, max(0, math.floor(x * inverse + np.float32(8.5)))) - 8 for x in block]
    return np.float16(scale), codes


def assert_q4_0(w: Tensor, quantized: grid.Quantized, round_scale_first: bool, where: Tensor | None = None) -> None:
    """llama.cpp's own recipe makes `quantized` of `w`, but for the groups not in `where`."""
    blocks = w.float().unflatten(-1, (-1, 32)).flatten(0, -2).numpy()
    codes = quantized.codes.unflatten(-1, (-1, 32)).flatten(0, -2).tolist()
    scales = quantized.scale.flatten().tolist()
    for block, expected_scale, expected_codes, checked in zip(
        blocks, scales, codes, [True] * len(codes) if where is None else where.flatten().tolist(), strict=True
    ):
        if checked:
            assert llama_cpp_q4_0(block, round_scale_first) == (expected_scale, expected_codes)


@given(weights(lead=((),), rows=(2,)))
def test_max_8_is_llama_cpps_quantizer_with_its_scale_rounded_first(w):
    assert_q4_0(w, grid.quantize(w, TensorSpec(**Q4_0)), round_scale_first=True)


@given(weights(lead=((),), rows=(2,)), dtypes)
def test_llama_cpp_requantizes_what_max_8_serves_to_the_same_bits(w, served_dtype):
    """``llama-quantize`` of a dequantized checkpoint loses nothing.

    It needs masters that are no finer than the served dtype, and scales of 9 smallest fp16 subnormals or more.
    """
    if served_dtype == BF16:
        w = w.to(BF16)
    spec = TensorSpec(**Q4_0, served_dtype=served_dtype)
    quantized = grid.quantize(w, spec)
    stable = (quantized.scale == 0) | (quantized.scale.abs() >= 9 * 2.0**-24)
    assert_q4_0(grid.dequantize(quantized, spec), quantized, round_scale_first=False, where=stable)


def test_max_8_takes_the_first_of_two_extremes():
    """A tie between +m and -m decides the sign of the scale, and so which of the two is clipped."""
    w = torch.zeros(2, 32)
    w[0, [3, 9]] = torch.tensor([-8.0, 8.0])
    w[1, [3, 9]] = torch.tensor([8.0, -8.0])
    codes, scale = grid.quantize(w, TensorSpec(**Q4_0))
    assert scale.flatten().tolist() == [1, -1]
    assert codes[:, [3, 9]].tolist() == [[-8, 7], [-8, 7]]


# Degenerate groups -------------------------------------------------------------------------------------------------

RULES = [TensorSpec(group_size=32), TensorSpec(group_size=32, scale_rule="amax/7.5"), TensorSpec(**Q4_0)]
every_rule = pytest.mark.parametrize("spec", RULES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_rule
@every_dtype
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_group_of_zeros_serves_plus_zero(spec, dtype, zero):
    """No NaN of 0 / 0, and no sign bit that a packed code could not carry."""
    codes, scale = grid.quantize(torch.full((2, 32), zero, dtype=dtype), spec)
    assert not codes.any()
    assert not bits(scale).any()
    assert not bits(grid.dequantize(grid.Quantized(codes, scale), spec)).any()


@every_rule
@every_dtype
def test_near_denormal_group_keeps_its_codes(spec, dtype):
    """A floor under the scale (1e-5 is common) would turn the group to zeros."""
    stored = FP16 if spec.scale_rule == "max/-8" else dtype
    spec = replace(spec, scale_dtype=stored, served_dtype=stored)
    smallest = torch.finfo(stored).smallest_normal * torch.finfo(stored).eps
    low, high = spec.code_range
    expected = torch.arange(low, high + 1).repeat(3)[:32]
    w = (expected * smallest).to(dtype)[None]
    codes, scale = quantized = grid.quantize(w, spec)
    assert scale.item() == smallest
    assert torch.equal(codes[0], expected.to(torch.int8))
    assert torch.equal(grid.dequantize(quantized, spec).float(), w.float())


@every_rule
@every_dtype
def test_huge_outlier_costs_its_own_group_alone(spec, dtype):
    w = torch.full((1, 64), 0.01, dtype=dtype)
    w[0, 40] = 1e4
    codes, scale = grid.quantize(w, spec)
    assert codes[0, :32].abs().min() >= 7
    assert codes[0, 32:].nonzero().tolist() == [[8]]
    assert codes[0, 40] in spec.code_range
    assert scale[0, 0].abs() < 0.01 < 1000 < scale[0, 1].abs()


@every_dtype
def test_negative_groups_use_the_code_that_their_rule_has_for_them(dtype):
    w = torch.full((1, 32), -7.5, dtype=dtype)
    codes = [grid.quantize(w, spec).codes.unique().tolist() for spec in RULES]
    assert codes == [[-7], [-8], [-8]]


@every_rule
def test_scale_beyond_fp16_saturates(spec):
    """An infinite scale would make NaN of the group's zeros."""
    spec = replace(spec, scale_dtype=FP16, served_dtype=FP32)
    w = torch.zeros(2, 32)
    w[:, 0] = torch.tensor([1e6, -1e6])
    codes, scale = quantized = grid.quantize(w, spec)
    assert scale.abs().flatten().tolist() == [65504, 65504]
    assert grid.dequantize(quantized, spec).isfinite().all()
    assert not codes[:, 1:].any()


@every_rule
@every_dtype
def test_nan_spoils_its_group_alone(spec, dtype):
    """It must reach the loss and the exporter's check, and not become a plausible number."""
    w = torch.ones(2, 64, dtype=dtype)
    w[1, 40] = torch.nan
    served = grid.fake_quantize(w, spec)
    assert served[1, 32:].isnan().all()
    assert served[0].isfinite().all()
    assert served[1, :32].isfinite().all()


def test_rows_that_do_not_divide_are_refused_with_their_shape():
    message = r"shape \(4, 96\): 96 input features do not divide into groups of 128: group_size 32 would fit"
    with pytest.raises(ValueError, match=message):
        grid.quantize(torch.zeros(4, 96), TensorSpec())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_weights_of_another_dtype_are_refused_by_name(dtype):
    with pytest.raises(TypeError, match=rf"weights are bfloat16, float16, float32; found {dtype} of shape \(4, 128\)"):
        grid.quantize(torch.zeros(4, 128, dtype=dtype), TensorSpec())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the CPU with a GPU")
@every_rule
@every_dtype
def test_a_gpu_computes_the_same_bits_as_the_cpu(spec, dtype):
    """The trainer quantizes on a GPU, the exporter may on a CPU: PyTorch's own ``x / 7`` differs between the two."""
    w = torch.cat([torch.randn(64, 1024) * size for size in (0.02, 1e-38, 100.0, 0.0)]).to(dtype)
    here, there = grid.quantize(w, spec), grid.quantize(w.cuda(), spec)
    for ours, theirs in zip(here, there, strict=True):
        assert torch.equal(ours, theirs.cpu())
    assert torch.equal(grid.dequantize(here, spec), grid.dequantize(there, spec).cpu())
