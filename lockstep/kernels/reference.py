"""The reference kernels: `grid` as operators that a compiler sees as one node, and the GEMM in the kernel's order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep import activations, grid
from lockstep.grid import Quantized
from lockstep.kernels import operators, scaled_mm
from lockstep.layouts import marlin, words
from lockstep.scheme import ActivationSpec, Scheme, TensorSpec


def pack_quantized(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Words int32 ``[..., N, K * bits / 32]`` (`layouts.words`), scales ``[..., N, G]`` of `weight` ``[..., N, K]``."""
    codes, scale, *_ = grid.quantize(weight, spec)
    return words.pack(codes, spec.bits), scale


def pack_marlin(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Words int32 ``[..., K/16, N * bits / 2]`` and scales ``[..., G, N]`` in the order of `layouts.marlin`."""
    codes, scale, *_ = grid.quantize(weight, spec)
    return marlin.pack_weight(codes, spec.bits), marlin.pack_scales(scale)


def dequantize_packed(packed: Tensor, scale: Tensor | None, spec: TensorSpec) -> Tensor:
    """``RN(code * scale)`` of `pack_quantized`'s words and scales; without `scale` the codes, in the served dtype."""
    codes = words.unpack(packed, spec.bits)
    return codes.to(spec.served_dtype) if scale is None else grid.dequantize(Quantized(codes, scale), spec)


def check_packed(weight: Tensor, words: Tensor, scale: Tensor, spec: TensorSpec, order: str) -> None:
    """None: reading back is the reference."""


def linear(
    x: Tensor, weight: Quantized, scheme: Scheme, bias: Tensor | None = None, stored: Tensor | None = None
) -> Tensor:
    """``x @ W.T + bias`` in the order of the serving kernel, in `x`'s dtype.

    Inputs as they are, several groups: ``RN(x @ RN(code * scale))``, and then ``RN(. + bias)``. One group, 4 bits:
    ``RN(RN(x @ code) * scale)``, or with a bias ``RN(RN(x @ code) * scale + bias)``: there the kernel multiplies and
    adds in one instruction. One group, 8 bits, and NVFP4's second scale: ``RN(x @ code * scale)``, and then the bias.
    Quantized inputs: `activations.quantize` and `scaled_mm.linear`.

    `x` is ``[..., K]``, the result ``[..., N]``; `stored` is the inputs' measured scale where the scheme has one;
    accumulation is the backend's (fp32 for 16-bit inputs).
    """
    if scheme.activations is None:
        return gemm(x, *operand(weight, scheme.weights), bias, scheme.weights)
    inputs = activations.quantize(x, scheme.activations, stored)
    return scaled_mm.linear(inputs, weight, scheme, bias, x.dtype)


def operand(weight: Quantized, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    """What a weight-only GEMM multiplies with, and the scale that follows it if one does."""
    codes, scale, zero_point, global_scale = weight
    if not spec.scale_follows_gemm(codes.shape[-1]):
        return grid.dequantize(weight, spec), None
    if global_scale is not None:  # code times e4m3 scale is exact in 16 bits
        groups = codes.unflatten(-1, (scale.shape[-1], -1)).to(spec.served_dtype)
        return (groups * scale.to(spec.served_dtype).unsqueeze(-1)).flatten(-2), global_scale.reciprocal()
    return codes if zero_point is None else codes - zero_point, scale


def gemm(x: Tensor, operand: Tensor, scale: Tensor | None, bias: Tensor | None, spec: TensorSpec) -> Tensor:
    """``x @ operand.T``, then times `scale` ``[N, 1]`` or ``[1, 1]`` and plus `bias` ``[N]``: see `linear`."""
    if scale is not None and spec.scales_accumulator:
        y = _epilogue(_sums(x, operand.to(x.dtype)), scale, None, x.dtype)
        return y if bias is None else _epilogue(y, None, bias, x.dtype)
    y = F.linear(x, operand.to(x.dtype))
    return y if scale is None and bias is None else _epilogue(y, scale, bias, x.dtype)


def _sums(x: Tensor, operand: Tensor) -> Tensor:
    """``x @ operand.T`` before its rounding to 16 bits, fp32."""
    if x.dtype.itemsize > 2:
        return F.linear(x, operand)
    if x.device.type != "cuda":
        with scaled_mm.without_autocast(x.device):
            return F.linear(x.float(), operand.float())
    return torch.mm(x.reshape(-1, x.shape[-1]), operand.T, out_dtype=torch.float32).view(*x.shape[:-1], -1)


def _fake_quantize(weight: Tensor, spec: TensorSpec, amax: Tensor | None, scale: Tensor | None) -> Tensor:
    return grid.fake_quantize(weight.contiguous(), spec, amax, scale).contiguous()  # as the operator promises


def _quantize(
    weight: Tensor, spec: TensorSpec, dtype: torch.dtype, amax: Tensor | None, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes in `dtype`, counted from the zero point if there is one, and scales, which are no input of it."""
    codes, scale, zero_point, _ = grid.quantize(weight.contiguous(), spec, amax, given)
    if given is not None and scale.data_ptr() == given.data_ptr():  # they had the scale dtype
        scale = scale.clone()
    if zero_point is not None:
        codes = (codes.unflatten(-1, (scale.shape[-1], -1)) - zero_point.unsqueeze(-1)).flatten(-2)
    return codes.to(dtype).contiguous(), scale


def _quantize_activations(x: Tensor, spec: ActivationSpec, stored: Tensor | None) -> tuple[Tensor, Tensor]:
    codes, scale, *_ = activations.quantize(x.contiguous(), spec, stored)
    return codes, scale


def _fp8_input_gradient(grad: Tensor, weight: Tensor, spec: TensorSpec, amax: Tensor | None) -> Tensor:
    """``grad @ W`` in fp8: the weight's own codes, and `grad` ``[M, N]`` times its scales as e4m3 codes by token."""
    codes, scale, *_ = grid.quantize(weight, spec, amax)
    rows = activations.quantize((grad.float() * scale.T), ActivationSpec("fp8_e4m3", "token", engine="sglang"))
    one = scale.new_ones(1, 1)
    return scaled_mm.fp8(rows, Quantized(codes.T.contiguous(), one), None, grad.dtype)


def _run_epilogue(y: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        assert bias is not None
        return y + bias
    wide = torch.promote_types(y.dtype, torch.float32)
    product = y.to(wide) * scale.squeeze(-1).to(wide)
    return (product if bias is None else product + bias.to(wide)).to(dtype)


def _learned_gradients(grad: Tensor, weight: Tensor, scale: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    return grid.learned_gradients(grad.contiguous(), weight.contiguous(), scale.contiguous(), spec)


fake_quantize = operators.fake_quantize("lockstep::fake_quantize", _fake_quantize)
quantize = operators.quantize("lockstep::quantize", _quantize)
quantize_activations = operators.quantize_activations("lockstep::quantize_activations", _quantize_activations)
dequantize_activations = operators.dequantize_activations("lockstep::dequantize_activations", activations.dequantize)
scaled_linear = operators.scaled_linear("lockstep::scaled_linear", scaled_mm.linear)
fp8_input_gradient = operators.input_gradient("lockstep::fp8_input_gradient", _fp8_input_gradient)
learned_gradients = operators.learned_gradients("lockstep::learned_gradients", _learned_gradients)
_epilogue = operators.epilogue("lockstep::epilogue", _run_epilogue)
