"""The arithmetic of activations, engine by engine, against scalars of numpy written from the engines' own sources.

vLLM: ``csrc/quantization/w8a8/int8/scaled_quant.cu``, ``w8a8/fp8/common.cu``, ``w8a8/fp8/per_token_group_quant.cu``;
FlashInfer: ``quantization_utils.cuh`` for MX; SGLang: ``int8_kernel.py``, ``per_token_quant_fp8.cu``,
``per_token_group_quant.cuh``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle import forward as ct
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import BF16, DTYPES, E2M1, E4M3, FP16, FP32, bits, nearest_code, weights
from torch import Tensor

from lockstep import ActivationSpec, activations
from lockstep.grid import Quantized

F32 = np.float32
INT8_TOKEN = ActivationSpec("int8", "token")
INT8_STATIC = ActivationSpec("int8", "tensor", dynamic=False)
FP8_TOKEN = ActivationSpec("fp8_e4m3", "token")
FP8_STATIC = ActivationSpec("fp8_e4m3", "tensor", dynamic=False)
FP8_GROUPS = ActivationSpec("fp8_e4m3", "group", 128)
POW2_GROUPS = replace(FP8_GROUPS, power_of_two=True)
MXFP8 = ActivationSpec("fp8_e4m3", "group", 32)
MXFP4 = ActivationSpec("fp4_e2m1", "group", 32)
NVFP4 = ActivationSpec("fp4_e2m1", "group", 16)
VLLM = [INT8_TOKEN, INT8_STATIC, FP8_TOKEN, FP8_STATIC, FP8_GROUPS, POW2_GROUPS, MXFP8, MXFP4, NVFP4]
# SGLang has no static int8.
EVERY = VLLM + [replace(spec, engine="sglang") for spec in VLLM if spec != INT8_STATIC]
STATIC = [spec for spec in EVERY if not spec.dynamic]

every_activation = pytest.mark.parametrize("spec", EVERY, ids=str)


def sglang(spec: ActivationSpec) -> ActivationSpec:
    return replace(spec, engine="sglang")


def measured(x: Tensor, spec: ActivationSpec) -> Tensor | None:
    """The scale that a calibration on `x` stores."""
    return activations.static_scale(x.abs().amax().clamp(min=1e-6), spec) if spec.stores_scale else None


# The oracle: one group of inputs at a time ---------------------------------------------------------------------------


def half_to_even(x: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x), -128, 127)


def half_away(x: np.ndarray) -> np.ndarray:
    return np.clip([math.copysign(math.floor(abs(float(one)) + 0.5), one) for one in x], -128, 127)


def e4m3(x: np.ndarray) -> np.ndarray:
    return nearest_code(x, E4M3)


def up_to_a_power_of_two(scale: np.float32) -> np.float32:
    """``exp2(ceil(log2(max(scale, 1e-10))))``"""
    mantissa, exponent = math.frexp(float(max(scale, F32(1e-10))))
    return F32(math.ldexp(1, exponent - (mantissa == 0.5)))


def mx(amax: np.float32, largest: np.float32) -> np.float32:
    """``cvt.rp.satfinite.ue8m0``: towards infinity."""
    mantissa, exponent = math.frexp(float(amax * (F32(1) / largest)))
    return F32(math.ldexp(1, exponent - (mantissa == 0.5)) if amax else 2.0**-127)


def oracle(x: np.ndarray, spec: ActivationSpec, stored: np.float32 | None) -> tuple[np.ndarray, np.float32]:
    """Codes and the scale of one group of fp32 inputs."""
    amax = np.abs(x).max()
    match spec.format, spec.strategy, spec.group_size, spec.dynamic, spec.engine:
        case "int8", "token", _, True, "vllm":
            inverse = F32(127) / amax if amax else F32(0)
            return half_to_even(x * inverse), amax / F32(127)
        case "int8", "token", _, True, "sglang":
            amax = max(amax, F32(1e-10))
            return half_away(x * (F32(127) / amax)), amax / F32(127)
        case "int8", "tensor", _, False, _:
            return half_to_even(x / stored), stored
        case "fp8_e4m3", "token", _, True, "vllm":
            scale = max(amax / F32(448), F32(1.0 / (448 * 512)))
            return e4m3(x / scale), scale
        case "fp8_e4m3", "token", _, True, "sglang":
            scale = amax / F32(448)
            return e4m3(x * (F32(1) / scale if scale else F32(0))), scale
        case "fp8_e4m3", "tensor", _, False, _:
            return e4m3(x * (F32(1) / stored)), stored
        case "fp8_e4m3", "group", 128, True, engine:
            amax = max(amax, F32(1e-10))
            scale = amax / F32(448) if engine == "vllm" else amax * (F32(1) / F32(448))
            if spec.power_of_two:
                scale = up_to_a_power_of_two(scale)
                return e4m3(x / scale), scale
            return e4m3(x / scale if engine == "vllm" else x * (F32(448) / amax)), scale
        case format, "group", 32, True, _:
            scale = mx(amax, F32(448) if format == "fp8_e4m3" else F32(6))
            return nearest_code(x / scale, E4M3 if format == "fp8_e4m3" else E2M1), scale
        case "fp4_e2m1", "group", 16, True, _:
            scale = F32(e4m3(stored * (amax * (F32(1) / F32(6)))))
            step = scale * (F32(1) / stored)
            return nearest_code(x * (F32(1) / step if step else F32(0)), E2M1), scale
    raise AssertionError(spec)


def assert_as_the_oracle(x: Tensor, spec: ActivationSpec, stored: Tensor | None) -> None:
    found = activations.quantize(x, spec, stored)
    size = spec.group_size or x.shape[-1]
    codes = found.codes.double().reshape(-1, size).numpy()
    scales = found.scale.float().reshape(-1).expand(len(codes)) if not spec.dynamic else found.scale.float().reshape(-1)
    second = None if stored is None else F32(stored.item())
    for group, ours, scale in zip(x.float().reshape(-1, size).numpy(), codes, scales.tolist(), strict=True):
        expected, expected_scale = oracle(group, spec, second)
        assert scale == expected_scale
        assert np.array_equal(ours, expected)


@every_activation
@settings(max_examples=15)
@given(x=weights(lead=((), (2,)), rows=(1, 3), columns=(128, 256)))
def test_every_row_of_the_table_is_its_engines_arithmetic(spec, x):
    with np.errstate(over="ignore", under="ignore"):
        assert_as_the_oracle(x, spec, measured(x, spec))


@every_activation
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-8, 1e-5, 1e30], ids=str)
def test_floors_and_magnitudes_are_the_engines(spec, size):
    """Each kernel has its own smallest scale, or none."""
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)) * size
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        assert_as_the_oracle(x, spec, None if not spec.stores_scale else torch.ones(1))


@every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(256,), (5, 256), (2, 3, 256), (0, 256), (2, 0, 256)], ids=str)
def test_shapes_and_dtypes(spec, dtype, shape):
    x = torch.randn(shape).to(dtype)
    stored = torch.tensor([0.5]) if spec.stores_scale else None
    codes, scale, zero_point, second = found = activations.quantize(x, spec, stored)
    assert (codes.shape, codes.dtype) == (x.shape, spec.code_dtype)
    if spec.dynamic:
        assert scale.shape == (*shape[:-1], spec.num_groups(256))
        assert scale.dtype == {16: torch.float8_e4m3fn, 32: torch.float8_e8m0fnu}.get(spec.group_size, FP32)
    else:
        assert scale is stored
    assert zero_point is None
    assert second is (stored if spec == NVFP4 or spec == sglang(NVFP4) else None)
    for served in (BF16, FP32):
        used = activations.dequantize(found, served)
        assert (used.shape, used.dtype) == (x.shape, served)


@every_activation
def test_rows_do_not_see_one_another_and_strides_do_not_matter(spec):
    """A token's codes must not depend on the batch that it is in."""
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    stored = torch.tensor([0.5]) if spec.stores_scale else None
    whole = activations.quantize(x, spec, stored)
    for layout in (x.T.contiguous().T, x.repeat_interleave(2, -1)[:, ::2], x.view(2, 3, 256)):
        found = activations.quantize(layout, spec, stored)
        assert torch.equal(bits(found.codes).flatten(), bits(whole.codes).flatten())
        assert torch.equal(bits(found.scale).flatten(), bits(whole.scale).flatten())
    for row in range(6):
        found = activations.quantize(x[row], spec, stored)
        assert torch.equal(bits(found.codes), bits(whole.codes[row]))


# Where engines differ ------------------------------------------------------------------------------------------------


def test_int8_ties_are_where_the_engines_differ():
    """vLLM's ``cvt.rni`` rounds half to even, SGLang's ``round`` half away from zero."""
    x = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    assert activations.quantize(x, INT8_TOKEN).codes.tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
    assert activations.quantize(x, sglang(INT8_TOKEN)).codes.tolist() == [127, 1, 2, 3, -1, -2, -3, 127]
    static = torch.ones(1)
    for spec in (INT8_STATIC,):
        assert activations.quantize(x, spec, static).codes.tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


@pytest.mark.parametrize("spec", [FP8_TOKEN, FP8_GROUPS], ids=str)
def test_the_engines_differ_in_some_fp8_codes_of_bf16_inputs_and_agree_in_most(spec):
    """So naming the wrong engine shows in the tests, and is a matter of last bits."""
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).to(BF16)
    ours, theirs = activations.quantize(x, spec), activations.quantize(x, sglang(spec))
    assert torch.equal(ours.scale, theirs.scale) is (spec == FP8_TOKEN)
    different = (ours.codes.float() != theirs.codes.float()).float().mean().item()
    assert 0 < different < 0.01


def test_int8_token_multiplies_by_127_over_amax_not_by_the_reciprocal_of_the_stored_scale():
    """A last bit, which is a code at a tie."""
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).to(BF16)
    codes, scale, *_ = activations.quantize(x, INT8_TOKEN)
    naive = (x.float() * scale.reciprocal()).round().to(torch.int8)
    assert 0 < (codes != naive).float().mean() < 1e-3


def test_static_range_saturates_at_both_ends():
    x = torch.tensor([1000.0, -1000.0, 127.4, -127.6, -128.4])
    assert activations.quantize(x, INT8_STATIC, torch.ones(1)).codes.tolist() == [127, -128, 127, -128, -128]
    for spec in (FP8_STATIC, sglang(FP8_STATIC)):
        codes = activations.quantize(x, spec, torch.tensor([0.5])).codes
        assert codes.float().tolist() == [448, -448, 256, -256, -256]


def test_sglang_has_no_static_int8():
    with pytest.raises(ValueError, match="SGLang ignores the stored scale"):
        sglang(INT8_STATIC)


@every_activation
def test_a_row_of_zeros_stays_zero(spec):
    x = torch.randn(3, 128)
    x[1] = 0
    found = activations.quantize(x, spec, measured(x, spec))
    used = activations.dequantize(found, FP32)
    assert used.isfinite().all()
    assert not used[1].any()
    assert used[0].any()


@pytest.mark.parametrize("spec", [spec for spec in EVERY if spec.dynamic], ids=str)
def test_nan_spoils_its_row_and_no_other(spec):
    """It must reach the loss; the engines' kernels make a number of it."""
    x = torch.randn(3, 128)
    x[1, 5] = torch.nan
    used = activations.dequantize(activations.quantize(x, spec, measured(torch.ones(1), spec)), FP32)
    assert used[1, :16].isnan().any()
    assert used[[0, 2]].isfinite().all()


@every_activation
def test_dequantized_inputs_are_near_the_inputs(spec):
    """Within half a step of the format, of the largest of the group: a planted factor of two would not be."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    used = activations.dequantize(activations.quantize(x, spec, measured(x, spec)), FP32)
    error = ((used - x).norm() / x.norm()).item()
    assert error < {"int8": 0.02, "fp8_e4m3": 0.04, "fp4_e2m1": 0.15}[spec.format]
    rounded = activations.dequantize(activations.quantize(x, spec, measured(x, spec)), BF16)
    assert torch.equal(rounded, used.to(BF16)) or spec.group_size == 16


# compressed-tensors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "spec"), [("FP8_DYNAMIC", FP8_TOKEN), ("FP8_BLOCK", FP8_GROUPS)], ids=["token", "group"]
)
def test_dynamic_float_inputs_are_compressed_tensors(preset, spec):
    """Where neither has a floor: theirs is what llm-compressor evaluates with."""
    args = preset_name_to_scheme(preset, ["Linear"]).input_activations
    x = torch.randn(1, 4, 256, generator=torch.Generator().manual_seed(0))
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, None)
    found = activations.quantize(x, spec)
    assert torch.equal(found.scale.float(), scale)
    expected = ct.quantize(x, scale, zero_point, args)
    assert torch.equal(found.codes.float(), expected)


def test_nvfp4_second_scale_is_compressed_tensors():
    for range in (0.3, 1.0, 7.7, 123.0):
        stored = activations.static_scale(torch.tensor(range), NVFP4)
        assert torch.equal(stored, generate_gparam(torch.tensor(-range), torch.tensor(range / 2)))


# Static scales -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [INT8_STATIC, FP8_STATIC, NVFP4], ids=str)
@given(st.floats(2.0**-60, 2.0**60, width=32))
def test_static_scale_maps_the_range_to_the_largest_code(spec, range):
    stored = activations.static_scale(torch.tensor(range, dtype=torch.float64), spec)
    assert (stored.shape, stored.dtype) == ((1,), FP32)
    x = torch.full((16,), range)
    x[0] *= -1
    found = activations.quantize(x, spec, stored)
    largest = {"int8": 127, "fp8_e4m3": 448, "fp4_e2m1": 6}[spec.format]
    assert found.codes.float().tolist() == [-largest] + [largest] * 15
    assert activations.clipped(found.codes, spec).all()
    assert not activations.clipped(activations.quantize(x / 2, spec, stored).codes, spec)[0] or spec == NVFP4
    torch.testing.assert_close(activations.dequantize(found, FP32), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", [INT8_STATIC, FP8_STATIC, NVFP4], ids=str)
def test_a_missing_measured_scale_is_an_error_that_says_what_to_run(spec):
    with pytest.raises(ValueError, match=rf"need a measured {spec.scale_name}: run lockstep calibrate"):
        activations.quantize(torch.zeros(2, 128), spec)


@pytest.mark.parametrize("spec", [FP8_GROUPS, MXFP8, NVFP4], ids=str)
@pytest.mark.parametrize("k", [0, 200], ids=str)
def test_inputs_that_do_not_divide_into_groups_are_refused(spec, k):
    with pytest.raises(ValueError, match=rf"{k} input features do not divide into activation groups"):
        activations.quantize(torch.zeros(2, k), spec, torch.ones(1))


# Fixtures by hand ----------------------------------------------------------------------------------------------------


FIXTURES = {
    # The floor 1 / (448 * 512) of vLLM; SGLang has none.
    "fp8-floor": (FP8_TOKEN, [2**-10, 2**-20], [1 / 229376], [0x76, 0x26]),
    "fp8-no-floor": (sglang(FP8_TOKEN), [448 * 2.0**-40, 2.0**-40], [2.0**-40], [0x7E, 0x38]),
    "int8-floor": (sglang(INT8_TOKEN), [1e-12], [float(F32(1e-10) / F32(127))], [1]),
    "int8-no-floor": (INT8_TOKEN, [127e-30, -1e-30], [1e-30], [127, -1]),
    # 7.0 / 448 is 2**-6 already; a little more takes the next power.
    "power-of-two": (POW2_GROUPS, [7.0, *[0.0] * 127], [2.0**-6], [0x7E]),
    "power-of-two-up": (POW2_GROUPS, [7.0625, *[0.0] * 127], [2.0**-5], [0x76]),
    # 6 / 6 and 448 / 448 are powers of two; a little more takes the next one, and nothing is cut off.
    "mxfp4": (MXFP4, [6, -5, 0.25, *[0.0] * 29], [1.0], [0x4C, 0xC8, 0x00]),
    "mxfp4-up": (MXFP4, [6.5, -5, 0.25, *[0.0] * 29], [2.0], [0x44, 0xC0, 0x00]),
    "mxfp8": (MXFP8, [448, 17, *[0.0] * 30], [1.0], [0x7E, 0x58]),
    "mxfp8-up": (MXFP8, [449, 34, *[0.0] * 30], [2.0], [0x76, 0x58]),
    # 6 * 448 / 2688 = 1: scale 1 has the code 6 for an amax of 6.
    "nvfp4": (NVFP4, [6, -0.25, 0.75, 5, *[0.0] * 12], [1.0], [0x4C, 0x80, 0x38, 0x48]),
}


@pytest.mark.parametrize(("spec", "x", "scale", "codes"), FIXTURES.values(), ids=FIXTURES)
def test_fixture_by_hand(spec, x, scale, codes):
    found = activations.quantize(torch.tensor(x), spec, torch.ones(1) if spec.stores_scale else None)
    assert torch.equal(found.scale.float().flatten(), torch.tensor(scale))
    dtype = torch.int8 if spec.format == "int8" else torch.uint8
    assert found.codes.view(dtype).tolist()[: len(codes)] == codes


def test_dequantize_rounds_once():
    """``code * scale`` is exact in fp32 for scales of 16 bits, and rounded to the input's dtype."""
    codes = torch.tensor([[7, -127]], dtype=torch.int8)
    scale = torch.tensor([[1 + 2**-8]])
    found = activations.dequantize(Quantized(codes, scale), FP16)
    assert torch.equal(found, (codes.double() * scale.double()).to(FP16))
