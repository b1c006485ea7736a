"""The reference arithmetic: scale, codes, dequantize. Every faster path must be ``torch.equal`` to this file.

A row of K weights is cut into G groups. In each group, with ``t`` the scale's stored dtype and ``d`` the served one:

==========  ==========================  =======================================  ======================================
rule        scale                       code                                     whose
==========  ==========================  =======================================  ======================================
amax/7      RN_t(max|w| / 7), fp32      clamp(RNE(w / scale), -7, 7), fp32       Kimi and slime, made exact
amax/7.5    RN_t(max|w| / 7.5) in w's   clamp(RNE(w / scale), -8, 7) in the      compressed-tensors, llm-compressor
            own dtype                   dtype that ``w / scale`` promotes to
max/-8      RN_fp16(m / -8), m the      clamp(floor(w * (1 / scale) + 8.5) - 8,  llama.cpp's Q4_0; re-quantizing what
            first element of largest    -8, 7), fp32                             it yields reproduces scale and code
            magnitude, with its sign
==========  ==========================  =======================================  ======================================

Always: the scale is rounded before any code is computed; the weight used and served is ``RN_d(code * scale)``; a group
of zeros has scale 0 and codes 0; no floor under small scales; a scale too large for ``t`` saturates at its largest
finite value; a NaN makes its whole group NaN. RN is round to nearest, RNE the same with ties to even.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lockstep.scheme import DTYPES, RULES, TensorSpec


class Quantized(NamedTuple):
    """``codes`` int8 ``[..., N, K]`` and ``scale`` ``[..., N, G]`` in the spec's scale dtype."""

    codes: Tensor
    scale: Tensor


def quantize(w: Tensor, spec: TensorSpec) -> Quantized:
    """Codes and scales of `w` ``[..., N, K]`` (bf16, fp16 or fp32, any device, any strides).

    Raises:
        TypeError: `w` has another dtype.
        ValueError: K does not divide into the spec's groups.
    """
    check(w.dtype, w.shape, spec)
    groups = w.unflatten(-1, (_num_groups(w.shape, spec), -1))
    scale = _scale(groups, spec)
    return Quantized(_codes(groups, scale.unsqueeze(-1), spec).flatten(-2), scale)


def dequantize(quantized: Quantized, spec: TensorSpec) -> Tensor:
    """``RN(code * scale)`` in the served dtype, in the shape of the codes: what the serving kernel multiplies with."""
    codes, scale = quantized
    groups = codes.unflatten(-1, (_num_groups(codes.shape, spec), -1))
    # A 4-bit code times a 16-bit scale is exact in fp32, so this rounds once, as the kernel's multiply does.
    return (groups.float() * scale.float().unsqueeze(-1)).to(spec.served_dtype).flatten(-2)


def fake_quantize(w: Tensor, spec: TensorSpec) -> Tensor:
    """`w` as it will be served: ``dequantize(quantize(w))``, in the served dtype and the shape of `w`."""
    return dequantize(quantize(w, spec), spec)


def check(dtype: torch.dtype, shape: torch.Size, spec: TensorSpec) -> None:
    """Refuse a weight that cannot be quantized as `spec` says, with the errors of `quantize`."""
    if dtype not in DTYPES.values():
        raise TypeError(f"weights are {', '.join(DTYPES)}; found {dtype} of shape {tuple(shape)}.")
    _num_groups(shape, spec)


def _scale(groups: Tensor, spec: TensorSpec) -> Tensor:
    if spec.scale_rule == "max/-8":
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1).float()
    else:
        extreme = groups.abs().amax(-1)
        if spec.scale_rule == "amax/7":
            extreme = extreme.float()
    # A divisor on the device: torch on CUDA turns division by a Python number into a multiplication by its reciprocal.
    exact = extreme / extreme.new_full((), RULES[spec.scale_rule].divisor)
    limit = torch.finfo(spec.scale_dtype).max
    return exact.float().clamp(-limit, limit).to(spec.scale_dtype) + 0.0  # + 0.0 makes -0 a 0


def _codes(groups: Tensor, scale: Tensor, spec: TensorSpec) -> Tensor:
    divisor = scale.masked_fill(scale == 0, 1)
    match spec.scale_rule:
        case "amax/7":
            codes = (groups.float() / divisor.float()).round()
        case "amax/7.5":
            codes = (groups / divisor).round()
        case "max/-8":
            codes = (groups.float() * divisor.float().reciprocal() + 8.5).floor() - 8
    return codes.clamp(*spec.code_range).to(torch.int8)


def _num_groups(shape: torch.Size, spec: TensorSpec) -> int:
    try:
        return spec.num_groups(shape[-1])
    except ValueError as error:
        raise ValueError(f"tensor of shape {tuple(shape)}: {error}") from None
