"""The reference kernels: `grid` as operators that a compiler sees as one node, and the GEMM in the kernel's order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep import grid
from lockstep.grid import Quantized
from lockstep.kernels import operators
from lockstep.layouts import marlin, words
from lockstep.scheme import TensorSpec


def pack_quantized(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Words int32 ``[..., N, K/8]`` (`layouts.words`) and scales ``[..., N, G]`` of `weight` ``[..., N, K]``."""
    codes, scale = grid.quantize(weight, spec)
    return words.pack(codes, spec.bits), scale


def pack_marlin(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Words int32 ``[..., K/16, 2N]`` and scales ``[..., G, N]`` in the order of `layouts.marlin`."""
    codes, scale = grid.quantize(weight, spec)
    return marlin.pack_weight(codes, spec.bits), marlin.pack_scales(scale)


def dequantize_packed(packed: Tensor, scale: Tensor | None, spec: TensorSpec) -> Tensor:
    """``RN(code * scale)`` of `pack_quantized`'s words and scales; without `scale` the codes, in the served dtype."""
    codes = words.unpack(packed, spec.bits)
    return codes.to(spec.served_dtype) if scale is None else grid.dequantize(Quantized(codes, scale), spec)


def linear(x: Tensor, quantized: Quantized, spec: TensorSpec, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` in the order of Marlin's W4A16 kernel, in `x`'s dtype.

    Several groups: ``RN(x @ RN(code * scale))``, and then ``RN(. + bias)``. One group: ``RN(RN(x @ code) * scale)``, or
    with a bias ``RN(RN(x @ code) * scale + bias)``: there the kernel multiplies and adds in one instruction. `x` is
    ``[..., K]``, the result ``[..., N]``; accumulation is the backend's (fp32 for 16-bit inputs).
    """
    if spec.scale_follows_gemm(x.shape[-1]):
        return gemm(x, quantized.codes, quantized.scale, bias)
    return gemm(x, grid.dequantize(quantized, spec), None, bias)


def gemm(x: Tensor, operand: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """``RN(x @ operand.T)``, then times `scale` ``[N, 1]`` and plus `bias` ``[N]``, with one more rounding."""
    y = F.linear(x, operand.to(x.dtype))
    return y if scale is None and bias is None else _epilogue(y, scale, bias)


def _fake_quantize(weight: Tensor, spec: TensorSpec) -> Tensor:
    return grid.fake_quantize(weight.contiguous(), spec)  # the operator promises a contiguous result


def _quantize(weight: Tensor, spec: TensorSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes, scale = grid.quantize(weight.contiguous(), spec)
    return codes.to(dtype), scale


fake_quantize = operators.fake_quantize("lockstep::fake_quantize", _fake_quantize)
quantize = operators.quantize("lockstep::quantize", _quantize)


def _run_epilogue(y: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    if scale is None:
        assert bias is not None
        return y + bias
    scale = scale.squeeze(-1).to(y.dtype)
    if bias is None:
        return y * scale
    wide = torch.promote_types(y.dtype, torch.float32)
    return (y.to(wide) * scale.to(wide) + bias.to(wide)).to(y.dtype)


_epilogue = operators.epilogue("lockstep::epilogue", _run_epilogue)
