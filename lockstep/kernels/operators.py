"""Operators that a compiler sees as one node, and how a `TensorSpec` crosses into them.

They are opaque on purpose: where inductor fuses, it drops the rounding to 16 bits between two operations, of the scale
before the division as of the product before the bias, and the bits are in those roundings.

The backward's fake quantization has a name of its own: two calls of one operator on one weight are one to the compiler,
which would then keep the quantized weight from the forward to the backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.grid import Quantized
from lockstep.scheme import TensorSpec

# The fields of TensorSpec as an operator's schema has them; a field of another type is an error here, at import.
_TYPES = {"str": "str", "int | None": "int?", "bool": "bool", "torch.dtype": "ScalarType"}
_NAMES = tuple(field.name for field in dataclasses.fields(TensorSpec))
_SPEC = ", ".join(f"{_TYPES[str(field.type)]} {field.name}" for field in dataclasses.fields(TensorSpec))

_spec = lru_cache(TensorSpec)


def fields(spec: TensorSpec) -> tuple[Any, ...]:
    """The fields of a spec in their order. Not ``dataclasses.astuple``: dynamo cannot trace its deepcopy."""
    return tuple([getattr(spec, name) for name in _NAMES])


def traced(weight: Tensor) -> bool:
    """Whether the operator must be called: something traces, or `weight` is no plain tensor.

    Elsewhere its function is called directly: the dispatcher takes as much time as a small layer's kernel.
    """
    return torch.compiler.is_compiling() or type(weight) not in (Tensor, nn.Parameter)


def fake_quantize(name: str, run: Callable[[Tensor, TensorSpec], Tensor]) -> Callable[..., Tensor]:
    """`run` as `Quantizer.fake_quantize`: through the operator `name` where something traces."""

    def real(weight: Tensor, *fields: Any) -> Tensor:
        return run(weight, _spec(*fields))

    def fake(weight: Tensor, *fields: Any) -> Tensor:
        return weight.new_empty(weight.shape, dtype=_spec(*fields).served_dtype)

    once = _define(name, f"(Tensor weight, {_SPEC}) -> Tensor", real, fake)
    later = _define(f"{name}_again", f"(Tensor weight, {_SPEC}) -> Tensor", real, fake)

    def call(weight: Tensor, spec: TensorSpec, again: bool = False) -> Tensor:
        if traced(weight):
            return (later if again else once)(weight, *fields(spec))
        return run(weight, spec)

    return call


def quantize(
    name: str, run: Callable[[Tensor, TensorSpec, torch.dtype], tuple[Tensor, Tensor]]
) -> Callable[..., Quantized]:
    """`run` as `Quantizer.quantize`: through the operator `name` where something traces."""

    def real(weight: Tensor, dtype: torch.dtype, *fields: Any) -> tuple[Tensor, Tensor]:
        return run(weight, _spec(*fields), dtype)

    def fake(weight: Tensor, dtype: torch.dtype, *fields: Any) -> tuple[Tensor, Tensor]:
        groups = _spec(*fields).num_groups(weight.shape[-1])
        scale = weight.new_empty((*weight.shape[:-1], groups), dtype=_spec(*fields).scale_dtype)
        return weight.new_empty(weight.shape, dtype=dtype), scale

    operator = _define(name, f"(Tensor weight, ScalarType dtype, {_SPEC}) -> (Tensor, Tensor)", real, fake)

    def call(weight: Tensor, spec: TensorSpec, dtype: torch.dtype = torch.int8) -> Quantized:
        if traced(weight):
            return Quantized(*operator(weight, dtype, *fields(spec)))
        return Quantized(*run(weight, spec, dtype))

    return call


def epilogue(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run` of ``(y, scale, bias)`` to a tensor like ``y``: through the operator `name` where something traces."""
    schema = "(Tensor y, Tensor? scale, Tensor? bias) -> Tensor"
    operator = _define(name, schema, run, lambda y, scale, bias: torch.empty_like(y))

    def call(y: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        return operator(y, scale, bias) if traced(y) else run(y, scale, bias)

    return call


def _define(name: str, schema: str, real: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    # Not torch.library.custom_op, whose wrappers cost as much again.
    torch.library.define(name, schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    torch.library.impl(name, "CompositeExplicitAutograd")(real)
    torch.library.register_fake(name)(fake)
    return getattr(torch.ops.lockstep, name.removeprefix("lockstep::")).default
