"""The reference kernels: `grid` as operators that a compiler sees as one node, and the GEMM in the kernel's order.

The operators are opaque on purpose: where inductor fuses, it drops the rounding to 16 bits between two operations, of
the scale before the division as of the product before the bias, and those roundings are what C2 and C4 are about.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep import grid
from lockstep.grid import Quantized
from lockstep.scheme import TensorSpec


def fake_quantize(weight: Tensor, spec: TensorSpec) -> Tensor:
    """`grid.fake_quantize`, opaque to ``torch.compile``."""
    return _fake_quantize(weight, *_fields(spec))


def quantize(weight: Tensor, spec: TensorSpec) -> Quantized:
    """`grid.quantize`, opaque to ``torch.compile``."""
    return Quantized(*_quantize(weight, *_fields(spec)))


def linear(x: Tensor, quantized: Quantized, spec: TensorSpec, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` in the order of Marlin's W4A16 kernel, in `x`'s dtype.

    Several groups: ``RN(x @ RN(code * scale))``. One group: ``RN(RN(x @ code) * scale)``. The bias is added after the
    rounding. `x` is ``[..., K]``, the result ``[..., N]``; accumulation is the backend's (fp32 for 16-bit inputs).
    """
    if spec.scale_follows_gemm(x.shape[-1]):
        return gemm(x, quantized.codes, quantized.scale, bias)
    return gemm(x, grid.dequantize(quantized, spec), None, bias)


def gemm(x: Tensor, operand: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """``RN(x @ operand.T)``, then times `scale` ``[N, 1]``, then plus `bias`, with a rounding after each."""
    y = F.linear(x, operand.to(x.dtype))
    return y if scale is None and bias is None else _epilogue(y, scale, bias)


def _fields(spec: TensorSpec) -> tuple[Any, ...]:
    """The fields of a spec in the order of `_SPEC`. Not ``dataclasses.astuple``: dynamo cannot trace its deepcopy."""
    grouping = (spec.format, spec.strategy, spec.group_size, spec.symmetric)
    return (*grouping, spec.scale_rule, spec.scale_dtype, spec.served_dtype)


_SPEC = (
    "str format, str strategy, int? group_size, bool symmetric, str scale_rule, ScalarType scale_dtype, "
    "ScalarType served_dtype"
)  # the fields of TensorSpec, in their order


@torch.library.custom_op("lockstep::fake_quantize", mutates_args=(), schema=f"(Tensor weight, {_SPEC}) -> Tensor")
def _fake_quantize(weight: Tensor, *spec: Any) -> Tensor:
    return grid.fake_quantize(weight.contiguous(), TensorSpec(*spec))


@torch.library.custom_op("lockstep::quantize", mutates_args=(), schema=f"(Tensor weight, {_SPEC}) -> (Tensor, Tensor)")
def _quantize(weight: Tensor, *spec: Any) -> tuple[Tensor, ...]:
    return tuple(grid.quantize(weight.contiguous(), TensorSpec(*spec)))


@torch.library.custom_op("lockstep::epilogue", mutates_args=())
def _epilogue(y: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    if scale is not None:
        y = y * scale.squeeze(-1).to(y.dtype)
    return y if bias is None else y + bias


@_fake_quantize.register_fake
def _(weight: Tensor, *spec: Any) -> Tensor:
    return weight.new_empty(weight.shape, dtype=TensorSpec(*spec).served_dtype)


@_quantize.register_fake
def _(weight: Tensor, *fields: Any) -> tuple[Tensor, Tensor]:
    spec = TensorSpec(*fields)
    scale = weight.new_empty((*weight.shape[:-1], spec.num_groups(weight.shape[-1])), dtype=spec.scale_dtype)
    return weight.new_empty(weight.shape, dtype=torch.int8), scale


@_epilogue.register_fake
def _(y: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return torch.empty_like(y)
