"""The reference arithmetic against independent oracles: exact fractions, compressed-tensors, llama.cpp's Q4_0."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle import forward as ct
from compressed_tensors.quantization.utils import calculate_qparams, cast_to_fp4, generate_gparam, generate_mx_scales
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    BF16,
    DTYPES,
    E2M1,
    E4M3,
    EVERY_SPEC,
    FP16,
    FP32,
    Q4_0,
    bits,
    dtypes,
    finite_positive,
    groupings,
    nearest,
    nearest_code,
    specs,
    weights,
)
from torch import Tensor

from lockstep import TensorSpec, grid


def requantize(w: Tensor, spec: TensorSpec) -> tuple[grid.Quantized, Tensor, grid.Quantized]:
    """Codes and scales of `w`, the weights served, and the codes and scales of those."""
    first = grid.quantize(w, spec)
    served = grid.dequantize(first, spec)
    return first, served, grid.quantize(served, spec)


@given(weights(lead=((), (3,), (2, 1)), rows=(0, 1, 5)), specs | st.sampled_from(EVERY_SPEC))
def test_every_spec_yields_what_the_exporters_expect(w, spec):
    codes, scale, *_ = quantized = grid.quantize(w, spec)
    low, high = spec.code_range
    lead = w.shape[:-2]
    assert codes.dtype == spec.code_dtype
    assert codes.shape == w.shape
    assert ((codes.float() >= low) & (codes.float() <= high)).all()
    assert scale.dtype == spec.scale_dtype
    assert scale.shape == (*lead, *spec.scale_shape(*w.shape[-2:]))
    assert scale.float().isfinite().all()
    if not spec.symmetric:
        assert (quantized.zero_point.dtype, quantized.zero_point.shape) == (torch.int8, scale.shape)
        assert ((quantized.zero_point >= low) & (quantized.zero_point <= high)).all()
    if spec.scale_rule == "nv/6":
        assert (quantized.global_scale.dtype, quantized.global_scale.shape) == (FP32, (*lead, 1, 1))
    assert (quantized.zero_point is None, quantized.global_scale is None) == (
        spec.symmetric,
        spec.scale_rule != "nv/6",
    )
    served = grid.dequantize(quantized, spec)
    assert served.dtype == spec.served_dtype
    assert served.shape == w.shape
    assert torch.equal(bits(grid.fake_quantize(w, spec)), bits(served))


@given(weights(lead=((3,),), rows=(4,)), specs | st.sampled_from(EVERY_SPEC))
def test_memory_layout_and_leading_dimensions_do_not_matter(w, spec):
    """A stack of experts, or a transposed view, quantizes as its rows one by one."""
    found = grid.quantize(w, spec)
    served = grid.dequantize(found, spec)
    for expert, part in enumerate(w):
        expected = grid.quantize(part.contiguous(), spec)
        for ours, alone in zip(found, expected, strict=True):
            assert (ours is None) == (alone is None)
            assert ours is None or torch.equal(bits(ours[expert]), bits(alone))
        assert torch.equal(bits(served[expert]), bits(grid.dequantize(expected, spec)))


# Every rule, against arithmetic written tile by tile ----------------------------------------------------------------


def power_of_two(exponent: int) -> np.float32:
    return np.float32(math.ldexp(1.0, exponent))


def mx_exponent(amax: float, largest_exponent: int) -> int:
    """Of the shared scale: amax rounded to a power of two, up from a mantissa of 1.75, is the format's largest."""
    if amax == 0:
        return -127
    mantissa, exponent = math.frexp(amax)  # mantissa in [0.5, 1)
    return max(-127, exponent - 1 + (mantissa >= 0.875) - largest_exponent)


def oracle(w: np.ndarray, spec: TensorSpec) -> tuple[np.ndarray, np.ndarray]:
    """Codes and the fp32 factors of the codes of the fp32 weights ``[N, K]``, one tile at a time, as numpy scalars."""
    f32 = np.float32
    n, k = w.shape
    rows, groups = spec.scale_shape(n, k)
    height, width = {"tensor": (n, k), "channel": (1, k), "block": (128, 128)}.get(spec.strategy, (1, spec.group_size))
    codes, factors = np.zeros((n, k)), np.zeros((n, k), f32)
    largest = np.abs(w).max()
    second = f32(1) if largest == 0 else f32(2688) * (f32(1) / largest)
    for row in range(rows):
        for group in range(groups):
            here = (slice(row * height, (row + 1) * height), slice(group * width, (group + 1) * width))
            tile = w[here]
            amax, zero, values = np.abs(tile).max(), f32(0), None
            match spec.scale_rule:
                case "amax/7" | "amax/7.5" | "amax/127" | "amax/127.5" | "amax/448":
                    scale = amax / f32(spec.scale_rule.removeprefix("amax/"))
                    values = E4M3 if spec.format == "fp8_e4m3" else None
                case "pow2/448":
                    exact = amax / f32(448)
                    mantissa, exponent = math.frexp(float(exact))
                    scale = power_of_two(max(-126, exponent - (mantissa == 0.5))) if exact else f32(0)
                    values = E4M3
                case "mx/8":
                    scale, values = power_of_two(mx_exponent(float(amax), 8)), E4M3
                case "mx/2":
                    scale, values = power_of_two(mx_exponent(float(amax), 2)), E2M1
                case "nv/6":
                    stored = f32(nearest_code(second * (amax / f32(6)), E4M3))
                    stored = stored if stored >= 2.0**-6 else f32(0)
                    scale, values = stored * (f32(1) / second), E2M1
                case "range/15":
                    high, low = max(tile.max(), f32(0)), min(tile.min(), f32(0))
                    scale = (high - low) / f32(15)
                    zero = f32(np.clip(np.rint(f32(-8) - low / scale), -8, 7)) if scale else f32(-8)
            quotient = tile / scale if scale else np.zeros_like(tile)
            if values is None:
                codes[here] = np.clip(np.rint(quotient) + zero, *spec.code_range)
            else:
                codes[here] = nearest_code(np.clip(quotient, *spec.code_range), values)
            if spec.scale_rule == "nv/6":
                factors[here] = (codes[here].astype(f32) * stored) * (f32(1) / second)
            else:
                factors[here] = (codes[here].astype(f32) - zero) * scale
    return codes, factors


TILE_SPECS = [spec for spec in EVERY_SPEC if spec.scale_rule != "max/-8"]


@pytest.mark.parametrize("spec", TILE_SPECS, ids=str)
@settings(max_examples=6)
@given(weights(dtype=st.just(FP32), lead=((),), rows=(1, 3), columns=(128, 256)))
def test_every_rule_is_its_arithmetic_tile_by_tile(spec, w):
    quantized = grid.quantize(w, spec)
    codes, served = oracle(w.numpy(), spec)
    assert np.array_equal(quantized.codes.double().numpy(), codes)
    found = grid.dequantize(quantized, replace(spec, served_dtype=FP32))
    assert np.array_equal(found.numpy(), served)
    assert torch.equal(grid.dequantize(quantized, spec), torch.from_numpy(served).to(BF16))


@pytest.mark.parametrize("spec", [spec for spec in EVERY_SPEC if spec.strategy == "block"], ids=str)
@pytest.mark.parametrize("shape", [(130, 300), (128, 129), (1, 1), (257, 128)], ids=str)
def test_ragged_blocks_are_scaled_by_what_is_in_them(spec, shape):
    """DeepSeek's ``kv_a_proj`` has 576 rows: the last blocks are smaller, and nothing is read from beyond them."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    w *= torch.linspace(0.01, 1, shape[0])[:, None]
    quantized = grid.quantize(w, spec)
    codes, served = oracle(w.numpy(), spec)
    assert quantized.scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    assert np.array_equal(quantized.codes.double().numpy(), codes)
    assert np.array_equal(grid.dequantize(quantized, replace(spec, served_dtype=FP32)).numpy(), served)


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
def test_weights_without_rows_have_scales_where_the_spec_has_them(spec):
    """A rank's shard of a small layer may be empty."""
    w = torch.zeros(2, 0, 128)
    quantized = grid.quantize(w, spec)
    assert quantized.codes.shape == (2, 0, 128)
    assert quantized.scale.shape == (2, *spec.scale_shape(0, 128))
    assert grid.dequantize(quantized, spec).shape == (2, 0, 128)


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
def test_weights_without_columns_are_refused(spec):
    with pytest.raises(ValueError, match=r"shape \(4, 0\): (0|there are no) input features"):
        grid.quantize(torch.zeros(4, 0), spec)


@pytest.mark.parametrize("spec", [spec for spec in EVERY_SPEC if spec.per_tensor], ids=str)
def test_a_shared_largest_magnitude_takes_the_place_of_the_tensors_own(spec):
    """Fused q/k/v: a smaller sibling is quantized as the rows that it is of the stacked weight."""
    small, large = torch.randn(4, 128) / 8, torch.randn(4, 128)
    stacked = grid.quantize(torch.cat([small, large]), spec)
    shared = grid.largest(torch.cat([small, large]))
    found = grid.quantize(small, spec, shared)
    assert torch.equal(bits(found.codes), bits(stacked.codes[:4]))
    served = grid.fake_quantize(torch.cat([small, large]), spec)
    assert torch.equal(grid.fake_quantize(small, spec, shared), served[:4])
    assert not torch.equal(grid.fake_quantize(small, spec), served[:4])
    if spec.strategy == "tensor":
        assert torch.equal(found.scale, stacked.scale)
        assert found.scale.shape == (1, 1)
    else:
        assert torch.equal(found.global_scale, stacked.global_scale)


# The codes of floating formats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "values"), [("fp8_e4m3", E4M3), ("fp4_e2m1", E2M1)])
def test_rounding_to_a_floating_code_is_to_the_nearest_with_ties_to_the_even_mantissa(format, values):
    """Every code, every middle between two, a unit in the last place beside each, and what is beyond the largest."""
    middles = (values[1:] + values[:-1]) / 2
    exact = np.concatenate([values, middles, [1e-30, 2.0**-149, values[-1] * 1.01, 1e30]]).astype(np.float32)
    around = [exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf))]
    x = np.concatenate([*around, *(-one for one in around)])
    codes = grid.round_to(torch.from_numpy(x), format)
    assert codes.dtype == torch.float8_e4m3fn
    expected = nearest_code(x, values)
    assert np.array_equal(codes.double().numpy(), expected)
    assert np.array_equal(np.signbit(codes.double().numpy()), np.signbit(expected))
    special = grid.round_to(torch.tensor([torch.inf, -torch.inf, torch.nan]), format).float()
    assert special[:2].tolist() == [values[-1], -values[-1]]
    assert special[2].isnan()


def test_e2m1_codes_are_compressed_tensors_and_pack_to_its_nibbles():
    x = torch.linspace(-7, 7, 281)[:280]
    codes = grid.round_to(x, "fp4_e2m1").float()
    assert torch.equal(codes, cast_to_fp4(x.clone()))
    packed = pack_fp4_to_uint8(codes[None].bfloat16())
    assert torch.equal(unpack_fp4_from_uint8(packed, 1, 280).float(), codes[None])


@given(st.floats(0, 2.0**127, width=32))
def test_power_of_two_up_is_the_ceiling_of_the_logarithm(x):
    found = grid.power_of_two_up(torch.tensor([x])).double().item()
    mantissa, exponent = math.frexp(x)
    assert found == (math.ldexp(1, max(-126, exponent - (mantissa == 0.5))) if x else 0)


@given(st.floats(0, width=32, allow_infinity=False) | st.integers(-149, 127).map(lambda e: 1.75 * 2.0**e))
@pytest.mark.parametrize("offset", [2, 8])
def test_mx_scale_is_the_exponent_of_the_amax(offset, amax):
    found = grid.mx_scale(torch.tensor([amax]), offset)
    assert found.dtype == torch.float8_e8m0fnu
    assert found.view(torch.uint8).item() - 127 == mx_exponent(torch.tensor(amax).item(), offset)


@given(weights(dtype=dtypes, lead=((),)))
@pytest.mark.parametrize("bits_", [4, 8])
def test_mx_codes_and_scales_are_compressed_tensors(bits_, w):
    spec = TensorSpec("fp4_e2m1" if bits_ == 4 else "fp8_e4m3", "group", 32, scale_dtype=torch.float8_e8m0fnu)
    groups = w.float().unflatten(-1, (-1, 32))
    theirs = generate_mx_scales(groups.abs().amax(-1), num_bits=bits_).clamp(0, 255).to(torch.uint8)
    codes, scale, *_ = grid.quantize(w, spec)
    assert torch.equal(scale.view(torch.uint8), theirs)
    args = QuantizationArgs(num_bits=bits_, type="float", strategy="group", group_size=32, symmetric=True)
    expected = ct.quantize(w.float(), scale.float(), None, args)
    assert torch.equal(codes.float(), expected)


@given(weights(dtype=st.just(FP32), lead=((),)), st.sampled_from(["channel", "tensor", "block"]))
def test_fp8_is_compressed_tensors_own_arithmetic_on_fp32_weights(w, strategy):
    """On bf16 weights theirs divides in bf16; engines take the scales that are stored, in fp32."""
    spec = TensorSpec("fp8_e4m3", strategy, scale_dtype=FP32)
    structure = {"block_structure": [128, 128]} if strategy == "block" else {}
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy, **structure)
    codes, scale, *_ = grid.quantize(w, spec)
    amax = w.abs().unflatten(-1, (scale.shape[-1], -1)).amax(-1)
    amax = amax if strategy == "channel" else amax.amax(0, keepdim=True)
    theirs, zero_point = calculate_qparams(-amax, amax, args)
    assert torch.equal(scale[scale != 0], theirs[scale != 0])
    expected = ct.quantize(w, theirs if strategy != "tensor" else theirs.flatten(), zero_point, args)
    assert torch.equal(codes.float(), expected)


@given(weights(dtype=st.just(FP32), lead=((),)), groupings)
def test_int8_is_compressed_tensors_own_arithmetic(w, grouping):
    spec = TensorSpec("int8", **grouping, scale_rule="amax/127.5", scale_dtype=FP32)
    args = QuantizationArgs(num_bits=8, symmetric=True, strategy=spec.strategy, group_size=spec.group_size)
    codes, scale, *_ = grid.quantize(w, spec)
    groups = w.unflatten(-1, (scale.shape[-1], -1))
    theirs, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    assert torch.equal(scale[scale != 0], theirs[scale != 0])
    assert torch.equal(codes, ct.quantize(w, theirs, zero_point, args, dtype=torch.int8))


@given(weights(dtype=st.just(FP32), lead=((),)))
def test_nvfp4_is_compressed_tensors_but_for_ties(w):
    """They divide by the second scale where engines multiply by its reciprocal: a last bit, seen at ties alone."""
    spec = TensorSpec("fp4_e2m1", "group", 16, scale_dtype=torch.float8_e4m3fn)
    args = preset_name_to_scheme("NVFP4", ["Linear"]).weights
    codes, scale, _, second = grid.quantize(w, spec)
    assert torch.equal(second.flatten(), generate_gparam(w.amin(), w.amax())) or not w.any()
    groups = w.unflatten(-1, (-1, 16))
    theirs, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=second.flatten())
    used = scale.float() != 0
    assert torch.equal(scale.float()[used], theirs[used].float())
    subnormal = (theirs[~used].float() < 2**-6) | (theirs[~used].float() == 0.125)  # 0.125 is what they make of 0
    assert subnormal.all()
    expected = ct.quantize(w, theirs, None, args, global_scale=second.flatten())
    quotient = (groups * (second.double().flatten() / theirs.double()).unsqueeze(-1)).abs().flatten(-2)
    middles = torch.from_numpy((E2M1[1:] + E2M1[:-1]) / 2)
    tie = ((quotient.unsqueeze(-1) / middles - 1).abs() < 1e-6).any(-1)
    same = (codes.float() == expected) | tie | ~used.repeat_interleave(16, -1)
    assert same.all()
    assert not codes.float()[~used.repeat_interleave(16, -1)].any()


@given(weights(dtype=st.just(FP32), lead=((),)), groupings)
def test_asymmetric_range_and_zero_point_are_compressed_tensors(w, grouping):
    """Theirs rounds ``w / scale + z`` and ours, as GPTQ does, ``w / scale``: an odd zero point sends ties elsewhere."""
    spec = TensorSpec(**grouping, symmetric=False, scale_dtype=FP32)
    args = QuantizationArgs(num_bits=4, symmetric=False, strategy=spec.strategy, group_size=spec.group_size)
    codes, scale, zero_point, _ = grid.quantize(w, spec)
    groups = w.unflatten(-1, (scale.shape[-1], -1))
    theirs, their_zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    used = (scale != 0) & (groups.amax(-1) > groups.amin(-1))
    assert torch.equal(scale[used], theirs[used])
    assert torch.equal(zero_point[used], their_zero[used].to(torch.int8))
    expected = ct.quantize(w, theirs, their_zero, args, dtype=torch.int8)
    fraction = (groups.double() / theirs.double().unsqueeze(-1)).frac().abs().flatten(-2)
    same = (codes == expected) | ((fraction - 0.5).abs() < 1e-5)
    assert same.unflatten(-1, (scale.shape[-1], -1))[used].all()


# Fixtures by hand ----------------------------------------------------------------------------------------------------


def tile(values: list[float], size: int) -> Tensor:
    return torch.tensor(values + [0.0] * (size - len(values)))[None]


FIXTURES = {
    # amax 448 gives scale 1; ties at 17 and 19 go to 16 and 20; half and 1.5 of the smallest subnormal 2**-9.
    "fp8": (
        TensorSpec("fp8_e4m3", "channel", scale_dtype=FP32),
        tile([448, 17, 19, -17, 2**-10, 3 * 2**-10, -0.0, 1e-9], 8),
        [0x7E, 0x58, 0x5A, 0xD8, 0x00, 0x02, 0x80, 0x00],
        [1.0],
    ),
    # 300 / 448 is rounded up to 1.
    "fp8-pow2": (
        TensorSpec("fp8_e4m3", "block", scale_rule="pow2/448", scale_dtype=FP32),
        tile([300, 17, 19, -448 / 512], 8),
        [0x79, 0x58, 0x5A, 0xB6, 0, 0, 0, 0],
        [1.0],
    ),
    # A mantissa just below 1.75 keeps its exponent, and what is beyond 6 is cut off; 1.75 and 0.75 are ties.
    "mxfp4": (
        TensorSpec("fp4_e2m1", "group", 32, scale_dtype=torch.float8_e8m0fnu),
        tile([6.99, -5, 2.5, 3.5, 1.75, 1.25, 0.75, 0.25], 32),
        [0x4C, 0xC8, 0x40, 0x48, 0x40, 0x38, 0x38, 0x00],
        [1.0],
    ),
    # From 1.75 on the exponent is one more.
    "mxfp4-up": (
        TensorSpec("fp4_e2m1", "group", 32, scale_dtype=torch.float8_e8m0fnu),
        tile([7, -5, 2.5], 32),
        [0x48, 0xC0, 0x38],
        [2.0],
    ),
    # The largest code of e4m3 has mantissa 1.75: 448 itself rounds up to 2**9.
    "mxfp8": (
        TensorSpec("fp8_e4m3", "group", 32, scale_dtype=torch.float8_e8m0fnu),
        tile([448, -0.5, 34], 32),
        [0x76, 0xA8, 0x58],
        [2.0],
    ),
    # 2688 / 12 = 224; the largest group's scale is 224 * 2 = 448, the other's 224 * (0.75 / 6) = 28.
    "nvfp4": (
        TensorSpec("fp4_e2m1", "group", 16, scale_dtype=torch.float8_e4m3fn),
        torch.cat([tile([12, -5, 1.5], 16), tile([0.75, 0.0625], 16)], 1),
        [0x4C, 0xC0, 0x38, *[0] * 13, 0x4C, 0x30],
        [448.0, 28.0],
    ),
    # 127 gives scale 1: ties to even.
    "int8": (
        TensorSpec("int8", "channel", scale_dtype=FP32),
        tile([127, 0.5, 1.5, -2.5, -127], 8),
        [127, 0, 2, -2, -127],
        [1.0],
    ),
    # Codes -8..7 from -8 * 0.5 on: the zero point is 0, and with 0..7.5 it is -8.
    "asymmetric": (
        TensorSpec(group_size=32, symmetric=False, scale_dtype=FP32),
        torch.cat([tile([-4, 3.5, 0.25, 0.75], 32), tile([7.5, 0.25, 0.75], 32)], 1),
        [-8, 7, 0, 2, *[0] * 28, 7, -8, -6, -8],
        [0.5, 0.5],
    ),
}


@pytest.mark.parametrize(("spec", "w", "codes", "scale"), FIXTURES.values(), ids=FIXTURES)
def test_fixture_by_hand(spec, w, codes, scale):
    quantized = grid.quantize(w, spec)
    dtype = torch.int8 if spec.format.startswith("int") else torch.uint8
    assert quantized.codes.view(dtype).flatten().tolist()[: len(codes)] == codes
    assert quantized.scale.float().flatten().tolist() == scale


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
def test_zero_tiles_serve_plus_zero_in_every_format(spec):
    for zero in (0.0, -0.0):
        quantized = grid.quantize(torch.full((2, 128), zero), spec)
        served = grid.dequantize(quantized, spec)
        assert not served.any()
        assert quantized.scale.float().isfinite().all()
    mixed = torch.zeros(2, 256)
    mixed[1, 200] = 3.0
    served = grid.fake_quantize(mixed, spec)
    assert served.isfinite().all()
    assert not served[:, :200].any()
    assert served[1, 200].item() == pytest.approx(3.0, rel=0.15)


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
def test_nan_reaches_the_served_weight_of_its_tile_and_no_finite_weight_becomes_nan(spec):
    w = torch.ones(256, 256)
    w[0, 0] = torch.nan
    served = grid.fake_quantize(w, spec)
    height, width = {"tensor": (256, 256), "channel": (1, 256), "block": (128, 128)}.get(
        spec.strategy, (1, spec.group_size)
    )
    if spec.scale_rule == "nv/6":
        height, width = 256, 256  # through the second scale
    assert served[:height, :width].isnan().all()
    assert served.isnan().sum() == height * width


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=str)
@pytest.mark.parametrize("size", [3e38, 1e-38, 2.0**-149], ids=str)
def test_weights_at_the_ends_of_fp32_stay_finite(spec, size):
    """The middle of the codes is near what it should be, or, below what the format's scales can say, zero."""
    w = torch.linspace(-1, 1, 256).repeat(2, 1) * size
    spec = replace(spec, served_dtype=FP32)
    served = grid.fake_quantize(w, spec)
    assert not served.isnan().any()
    assert (served.abs() <= 1.2 * w.abs().max() + 2.0**-127).all()


# amax/7, against exact rational arithmetic -------------------------------------------------------------------------


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
    codes, scale, *_ = quantized = grid.quantize(w, spec)
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
    codes, scale, *_ = quantized = grid.quantize(w, spec)

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
    codes, scale, *_ = grid.quantize(w, TensorSpec(**Q4_0))
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
    codes, scale, *_ = grid.quantize(torch.full((2, 32), zero, dtype=dtype), spec)
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
    codes, scale, *_ = quantized = grid.quantize(w, spec)
    assert scale.item() == smallest
    assert torch.equal(codes[0], expected.to(torch.int8))
    assert torch.equal(grid.dequantize(quantized, spec).float(), w.float())


@every_rule
@every_dtype
def test_huge_outlier_costs_its_own_group_alone(spec, dtype):
    w = torch.full((1, 64), 0.01, dtype=dtype)
    w[0, 40] = 1e4
    codes, scale, *_ = grid.quantize(w, spec)
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
    codes, scale, *_ = quantized = grid.quantize(w, spec)
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
