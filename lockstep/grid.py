"""The reference arithmetic of weights: scale, codes, dequantize. Every faster path must be ``torch.equal`` to it.

A weight ``[..., N, K]`` is cut into tiles that share a scale: groups along K, rows, blocks of 128 x 128, or all of it.
In each tile, with ``t`` the scale's stored dtype and ``d`` the served one:

==========  ==========================  =======================================  ======================================
rule        scale                       code                                     whose
==========  ==========================  =======================================  ======================================
amax/7      RN_t(max|w| / 7), fp32      clamp(RNE(w / scale), -7, 7), fp32       Kimi and slime, made exact
amax/7.5    RN_t(max|w| / 7.5) in w's   clamp(RNE(w / scale), -8, 7) in the      compressed-tensors, llm-compressor
            own dtype                   dtype that ``w / scale`` promotes to
max/-8      RN_fp16(m / -8), m the      clamp(floor(w * (1 / scale) + 8.5) - 8,  llama.cpp's Q4_0; re-quantizing what
            first element of largest    -8, 7), fp32                             it yields reproduces scale and code
            magnitude, with its sign
range/15    RN_t((high - low) / 15),    clamp(RNE(w / scale) + z, -8, 7), fp32,  compressed-tensors' range, in fp32
            low and high with 0         z = clamp(RNE(-8 - low / scale), -8, 7)
amax/127    as amax/7                   as amax/7, in [-127, 127]                vLLM and SGLang's int8 kernels
amax/127.5  as amax/7.5                 as amax/7.5, in [-128, 127]              compressed-tensors
amax/448    RN_t(max|w| / 448), fp32    RN_e4m3(clamp(w / scale, +-448)), fp32   compressed-tensors, vLLM
pow2/448    amax/448's, rounded up to   as amax/448                              DeepGEMM
            a power of two
mx/8, mx/2  2**(exponent of max|w|,     RN_e4m3 or RN_e2m1 of (w / scale),       OCP MX; the rounding up is
            one more from 1.75 on,      clamped                                  compressed-tensors'
            minus 8 or 2)
nv/6        RN_e4m3(g * (max|w| / 6)),  RN_e2m1(clamp(w / (scale * (1 / g)),     NVFP4, compressed-tensors; the zero
            0 below 2**-6, g = 2688 *   +-6)), fp32                              is vLLM's Marlin
            (1 / max|W| of all)
==========  ==========================  =======================================  ======================================

Always: the scale is rounded before any code is computed; the weight used and served is ``RN_d((code - z) * scale)``, in
NVFP4 ``RN_d(code * scale * (1 / g))``; a tile of zeros has codes 0, and scale 0 where the format has a zero; no floor
under small scales; a scale too large for ``t`` saturates at its largest finite value; a NaN makes its whole tile NaN.
RN is round to nearest with ties to even, RNE the same to integers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.scheme import BLOCK, DTYPES, FORMATS, RULES, TensorSpec

NVFP4_SMALLEST = 2.0**-6  # the smallest scale that Marlin keeps: it drops e4m3's subnormals


class Quantized(NamedTuple):
    """A weight, or activations, as codes and scales.

    `codes` ``[..., N, K]`` in the spec's code dtype and `scale` ``[..., R, G]`` in its scale dtype; `zero_point` int8
    ``[..., N, G]`` if the grid is asymmetric; `global_scale` fp32 ``[..., 1, 1]`` of NVFP4, which divides.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None


def quantize(w: Tensor, spec: TensorSpec, amax: Tensor | None = None, scale: Tensor | None = None) -> Quantized:
    """Codes and scales of `w` ``[..., N, K]`` (bf16, fp16 or fp32, any device, any strides).

    `amax` fp32 ``[..., 1, 1]`` is the largest magnitude of all weights that share the tensor's scale, `w`'s own without
    it; only specs that are `per_tensor` read it. `scale` ``[..., R, G]`` takes the place of the rule's own scales
    (learned ones, of symmetric integer specs); it is rounded to the spec's scale dtype.

    Raises:
        TypeError: `w` has another dtype.
        ValueError: K does not divide into the spec's groups.
    """
    check(w.dtype, w.shape, spec)
    tiles = _tiles(w, spec)
    global_scale = nvfp4_scale(largest(w) if amax is None else amax) if spec.scale_rule == "nv/6" else None
    if scale is not None:
        scale = scale.detach().to(spec.scale_dtype)
    elif spec.strategy == "tensor" and amax is not None:
        scale = _scale(amax.unsqueeze(-1).unsqueeze(-3), spec, None)
    else:
        scale = _scale(tiles, spec, global_scale)
    zero_point = None if spec.symmetric else _zero_point(tiles, scale)
    codes = _codes(tiles, scale, zero_point, global_scale, spec)
    return Quantized(_untiled(codes, w.shape), scale, zero_point, global_scale)


def dequantize(quantized: Quantized, spec: TensorSpec) -> Tensor:
    """The weight in the served dtype, in the shape of the codes: what the serving kernel multiplies with."""
    codes, scale, zero_point, global_scale = quantized
    tiles = _tiles(codes, spec).float()
    if zero_point is not None:
        tiles = tiles - _spread(zero_point.float())
    # A code of 8 bits or less times a 16-bit scale is exact in fp32: this rounds once, as the kernel's multiply does.
    value = tiles * _spread(scale.float())
    if global_scale is not None:
        value = value * _spread(global_scale.reciprocal())
    return _untiled(value.to(spec.served_dtype), codes.shape)


def fake_quantize(w: Tensor, spec: TensorSpec, amax: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """`w` as it will be served: ``dequantize(quantize(w))``, in the served dtype and the shape of `w`."""
    return dequantize(quantize(w, spec, amax, scale), spec)


def learned_gradients(grad: Tensor, w: Tensor, scale: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """The gradients of `w` ``[N, K]`` and of its learned scales ``[N, G]``, in their dtypes (LSQ, arXiv:1902.08153).

    `grad` ``[N, K]`` is the one of ``fake_quantize(w, spec, scale=scale)``. With ``position = w / scale`` in fp32, the
    scale rounded as it is served, and the range of the codes, both ends included:

    * of a weight: `grad` within the range, zero elsewhere;
    * of a scale: the sum over its weights of ``grad * (code - position)`` within the range and of ``grad * code``
      elsewhere, times ``1 / sqrt(weights of the scale * largest code)``.
    """
    low, high = spec.code_range
    per_scale = (*scale.shape, -1)
    step = scale.to(spec.scale_dtype).float().unsqueeze(-1)
    position = w.float().reshape(per_scale) / step.masked_fill(step == 0, 1)
    code = quantize(w, spec, scale=scale).codes.float().reshape(per_scale)
    inside = (position >= low) & (position <= high)
    grads = grad.float().reshape(per_scale)
    grad_scale = (grads * torch.where(inside, code - position, code)).sum(-1) * lsq_balance(position.shape[-1], spec)
    return (grads * inside).view(w.shape).to(w.dtype), grad_scale.to(scale.dtype)


def lsq_balance(weights: int, spec: TensorSpec) -> float:
    """What makes the steps of a scale that so many weights share as large, relative to it, as theirs: LSQ's 2.2."""
    return 1 / math.sqrt(weights * spec.code_range[1])


def largest(w: Tensor) -> Tensor:
    """The largest magnitude of `w` ``[..., N, K]``, fp32 ``[..., 1, 1]``; NaN if it holds one, 0 without rows."""
    w = w.detach()
    return (w.abs().amax((-2, -1), keepdim=True) if w.shape[-2] else w.sum((-2, -1), keepdim=True)).float()


def check(dtype: torch.dtype, shape: torch.Size, spec: TensorSpec) -> None:
    """Refuse a weight that cannot be quantized as `spec` says, with the errors of `quantize`."""
    if dtype not in DTYPES.values():
        raise TypeError(f"weights are {', '.join(DTYPES)}; found {dtype} of shape {tuple(shape)}.")
    try:
        spec.num_groups(shape[-1])
    except ValueError as error:
        raise ValueError(f"tensor of shape {tuple(shape)}: {error}") from None


def round_to(x: Tensor, format: str) -> Tensor:
    """`x` in fp32, rounded to the nearest code of a floating `format`, ties to even, saturating; codes as stored."""
    code = FORMATS[format]
    x = x.clamp(-code.largest, code.largest)
    if format == "fp4_e2m1":  # steps of 0.5 below 2, of 1 below 4, of 2 above; -0 is a code of its own
        magnitude = x.abs()
        step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
        x = (magnitude / step).round().mul(step).copysign(x)
    return x.to(code.codes)


def power_of_two_up(x: Tensor) -> Tensor:
    """fp32 `x` >= 0 rounded up to a power of two, no less than 2**-126; 0 stays 0."""
    mantissa, exponent = torch.frexp(x)
    up = torch.ldexp(torch.ones_like(x), (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(-126, 127))
    return torch.where((x == 0) | ~x.isfinite(), x, up)


def mx_scale(amax: Tensor, offset: int) -> Tensor:
    """The MX scale of tiles with fp32 largest magnitude `amax`, e8m0: see the table above. Its byte is 255 for NaN."""
    exponent = ((amax.view(torch.int32) + (1 << 21)) >> 23) - offset  # a mantissa of 1.75 or more carries
    byte = exponent.clamp(0, 254).masked_fill(amax.isnan(), 255)
    return byte.to(torch.uint8).view(torch.float8_e8m0fnu)


def nvfp4_scale(amax: Tensor) -> Tensor:
    """NVFP4's second scale for a largest magnitude `amax`: with it the largest e4m3 scale is 448.

    1 where fp32 cannot hold it, for zeros and for magnitudes below 8e-36, as in compressed-tensors.
    """
    scale = amax.reciprocal() * (FORMATS["fp8_e4m3"].largest * FORMATS["fp4_e2m1"].largest)
    return scale.masked_fill(scale.isinf(), 1)


def _scale(tiles: Tensor, spec: TensorSpec, global_scale: Tensor | None) -> Tensor:
    rule = RULES[spec.scale_rule]
    if spec.scale_rule == "max/-8":
        flat = tiles.squeeze(-3)
        extreme = flat.gather(-1, flat.abs().argmax(-1, keepdim=True)).squeeze(-1).float()
    elif spec.scale_rule == "range/15":
        extreme = tiles.float().amax((-3, -1)).clamp(min=0) - tiles.float().amin((-3, -1)).clamp(max=0)
    else:
        # A shard of a weight may have no rows, whose largest magnitude torch does not know.
        extreme = tiles.abs().amax((-3, -1)) if tiles.shape[-3] else tiles.sum((-3, -1))
        if spec.scale_rule not in ("amax/7.5", "amax/127.5"):
            extreme = extreme.float()
    if spec.scale_rule.startswith("mx/"):
        return mx_scale(extreme.contiguous(), round(rule.divisor).bit_length() - 1)
    # A divisor on the device: torch on CUDA turns division by a Python number into a multiplication by its reciprocal.
    exact = extreme / extreme.new_full((), rule.divisor)
    if spec.scale_rule == "pow2/448":
        return power_of_two_up(exact)
    if global_scale is not None:
        exact = global_scale * exact
    limit = torch.finfo(spec.scale_dtype).max
    scale = exact.float().clamp(-limit, limit).to(spec.scale_dtype)
    if global_scale is not None:
        return scale.float().masked_fill(scale.float() < NVFP4_SMALLEST, 0).to(spec.scale_dtype)
    return scale + 0.0  # + 0.0 makes -0 a 0


def _zero_point(tiles: Tensor, scale: Tensor) -> Tensor:
    """The code of 0, int8 in [-8, 7]."""
    low = tiles.float().amin((-3, -1)).clamp(max=0)
    return (-8 - low / scale.masked_fill(scale == 0, 1).float()).round().clamp(-8, 7).nan_to_num().to(torch.int8)


def _codes(
    tiles: Tensor, scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None, spec: TensorSpec
) -> Tensor:
    if spec.format in ("fp8_e4m3", "fp4_e2m1"):
        step = scale.float() if global_scale is None else scale.float() * global_scale.reciprocal()
        quotient = tiles.float() / _spread(step.masked_fill(step == 0, 1))
        return round_to(quotient.masked_fill(_spread(step == 0), 0), spec.format)
    divisor = _spread(scale.masked_fill(scale == 0, 1))
    match spec.scale_rule:
        case "amax/7" | "amax/127":
            codes = (tiles.float() / divisor.float()).round()
        case "amax/7.5" | "amax/127.5":
            codes = (tiles / divisor).round()
        case "max/-8":
            codes = (tiles.float() * divisor.float().reciprocal() + 8.5).floor() - 8
        case "range/15":
            assert zero_point is not None
            codes = (tiles.float() / divisor.float()).round() + _spread(zero_point.float())
    return codes.clamp(*spec.code_range).to(torch.int8)


def _tiles(w: Tensor, spec: TensorSpec) -> Tensor:
    """`w` ``[..., N, K]`` as ``[..., R, r, G, g]``: tiles of r x g share a scale; ragged blocks are filled with 0."""
    n, k = w.shape[-2:]
    rows, groups = spec.scale_shape(n, k)
    if spec.strategy == "block":
        w = F.pad(w.float() if w.dtype.itemsize == 1 else w, (0, groups * BLOCK - k, 0, rows * BLOCK - n))
    height, width = {"tensor": (n, k), "channel": (1, k), "block": (BLOCK, BLOCK)}.get(
        spec.strategy, (1, spec.group_size)
    )
    return w.unflatten(-1, (groups, width)).unflatten(-3, (rows, height))


def _untiled(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_tiles`."""
    return tiles.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]]


def _spread(per_tile: Tensor) -> Tensor:
    """``[..., R, G]`` as ``[..., R, 1, G, 1]``, to meet tiles."""
    return per_tile.unsqueeze(-2).unsqueeze(-1)
