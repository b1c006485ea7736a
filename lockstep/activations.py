"""The reference arithmetic of activations: what an engine's own kernel makes of a layer's input before its GEMM.

All in fp32 from the input as it is, one rounding to the code (RN, ties to even, saturating; RNE to integers):

=================  =====================================  ============================================================
inputs             vLLM                                   SGLang
=================  =====================================  ============================================================
int8 token         s = amax / 127                         s = max(amax, 1e-10) / 127
                   RNE(x * (127 / amax))                  x * (127 / amax) rounded half away from zero
int8 static        RNE(x / s), in [-128, 127]             the same
fp8 token          s = max(amax / 448, 1 / (448 * 512))   s = amax / 448
                   RN(x / s)                              RN(x * (1 / s))
fp8 static         RN(x * (1 / s))                        the same
fp8 groups of 128  s = max(amax, 1e-10) / 448             s = max(amax, 1e-10) * (1 / 448)
                   RN(x / s)                              RN(x * (448 / max(amax, 1e-10)))
MX groups of 32    s = amax * (1 / largest code), up to   the same
                   a power of two; RN(x / s)
NVFP4              s = RN_e4m3(g * (amax * (1 / 6)))      the same
                   RN(x * (1 / (s * (1 / g))))
=================  =====================================  ============================================================

`power_of_two` rounds the scale of a group of 128, or 1e-10 if that is larger, up to a power of two before it is used
(DeepGEMM). MX inputs are not scaled as compressed-tensors scales MX weights: the engine cuts nothing off. `g` is
NVFP4's stored second scale, ``2688 * (1 / range)``. The GPU computes NVFP4's reciprocals approximately; here they are
exact.

Source: vLLM ``csrc/quantization`` (``w8a8/int8``, ``w8a8/fp8``, ``fp4``), FlashInfer ``quantization_utils.cuh`` (MX),
SGLang ``int8_kernel.py``, ``per_token_quant_fp8.cu``, ``per_token_group_quant.cuh``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep import grid
from lockstep.grid import Quantized
from lockstep.scheme import FORMATS, ActivationSpec

FLOOR = 1e-10
FP8_TOKEN_FLOOR = 1.0 / (448.0 * 512.0)


def quantize(x: Tensor, spec: ActivationSpec, stored: Tensor | None = None) -> Quantized:
    """Codes and scales of `x` ``[..., K]`` (bf16, fp16 or fp32).

    Args:
        x: the input.
        spec: what it becomes.
        stored: the layer's measured scale, fp32 with one element, where ``spec.stores_scale``.

    Returns:
        Codes in the shape of `x` and the spec's code dtype; scales ``[..., 1]`` by token and ``[..., G]`` by group in
        fp32, e4m3 (NVFP4) or e8m0 (MX), or `stored` itself; NVFP4's second scale as `global_scale`.

    Raises:
        ValueError: K does not divide into groups, or a measured scale is needed and not given.
    """
    if spec.stores_scale and stored is None:
        raise ValueError(f"{spec} inputs need a measured {spec.scale_name}: run lockstep calibrate.")
    if not spec.dynamic:
        return Quantized(_static_codes(x.float(), spec, stored), stored)  # type: ignore[arg-type]
    groups = x.float().unflatten(-1, (spec.num_groups(x.shape[-1]), -1))
    amax = groups.abs().amax(-1, keepdim=True)
    if spec.group_size == 32:
        scale = _mx_scale(amax * _number(amax, FORMATS[spec.format].largest).reciprocal())
        codes = grid.round_to(groups / scale.float(), spec.format)
    elif spec.group_size == 16:
        inverse = stored.float().reciprocal()  # type: ignore[union-attr]
        limit = FORMATS["fp8_e4m3"].largest
        scale = (stored * (amax * _number(amax, 6.0).reciprocal())).clamp(max=limit).to(torch.float8_e4m3fn)
        step = scale.float() * inverse
        codes = grid.round_to(groups * _or_zero(step, step.reciprocal()), spec.format)
    elif spec.format == "int8":
        scale, codes = _int8_token(groups, amax, spec)
    else:
        scale, codes = _fp8(groups, amax, spec)
    return Quantized(codes.flatten(-2), scale.squeeze(-1), None, stored if spec.group_size == 16 else None)


def dequantize(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """``RN(code * scale)`` in `dtype`, in the shape of the codes: what the gradient of the weight multiplies with."""
    codes, scale, _, global_scale = quantized
    step = scale.float() if global_scale is None else scale.float() * global_scale.reciprocal()
    groups = codes.unflatten(-1, (step.shape[-1], -1)).float()
    return (groups * step.unsqueeze(-1)).to(dtype).flatten(-2)


def static_scale(range: Tensor, spec: ActivationSpec) -> Tensor:
    """The scale, fp32 ``[1]``, to store for inputs whose magnitudes reach up to `range` (a positive scalar)."""
    range = range.float().reshape(1)
    largest = FORMATS[spec.format].largest
    if spec.group_size == 16:
        return grid.nvfp4_scale(range)
    return range / _number(range, largest)


def clipped(codes: Tensor, spec: ActivationSpec) -> Tensor:
    """Where a static range cut the input off, or nearly: codes at either end."""
    largest = FORMATS[spec.format].largest
    return codes.float().abs() >= largest


def _static_codes(x: Tensor, spec: ActivationSpec, scale: Tensor | None) -> Tensor:
    assert scale is not None
    if spec.format == "int8":
        return (x / scale).round().clamp(-128, 127).to(torch.int8)
    return grid.round_to(x * scale.reciprocal(), spec.format)


def _int8_token(groups: Tensor, amax: Tensor, spec: ActivationSpec) -> tuple[Tensor, Tensor]:
    largest = _number(amax, 127.0)
    if spec.engine == "sglang":
        amax = amax.clamp(min=FLOOR)
        scaled = groups * (largest / amax)
        rounded = scaled.trunc() + (scaled.frac().abs() >= 0.5).float().copysign(scaled)
    else:
        rounded = (groups * _or_zero(amax, largest / amax)).round()
    return amax / largest, rounded.clamp(-128, 127).to(torch.int8)


def _fp8(groups: Tensor, amax: Tensor, spec: ActivationSpec) -> tuple[Tensor, Tensor]:
    largest = _number(amax, 448.0)
    if spec.strategy == "group":
        amax = amax.clamp(min=FLOOR)
    scale = amax / largest
    if spec.engine == "sglang" and spec.strategy == "group":
        scale = amax * largest.reciprocal()
        if not spec.power_of_two:
            return scale, grid.round_to(groups * (largest / amax), spec.format)
    if spec.power_of_two:
        scale = grid.power_of_two_up(scale.clamp(min=FLOOR))
    if spec.engine == "sglang":
        return scale, grid.round_to(groups * _or_zero(scale, scale.reciprocal()), spec.format)
    if spec.strategy == "token":
        scale = scale.clamp(min=FP8_TOKEN_FLOOR)
    return scale, grid.round_to(groups / scale, spec.format)


def _mx_scale(scale: Tensor) -> Tensor:
    """fp32 `scale` >= 0 rounded up to a power of two, e8m0; its byte is 255 for NaN."""
    byte = ((scale.view(torch.int32) + 0x7FFFFF) >> 23).clamp(0, 254).masked_fill(scale.isnan(), 255)
    return byte.to(torch.uint8).view(torch.float8_e8m0fnu)


def _or_zero(x: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, otherwise)


def _number(like: Tensor, value: float) -> Tensor:
    # On the device: torch on CUDA turns division by a Python number into a multiplication by its reciprocal.
    return like.new_full((), value)
