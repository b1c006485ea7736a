"""Operators that a compiler sees as one node, and how a `TensorSpec` crosses into them.

They are opaque on purpose: where inductor fuses, it drops the rounding to 16 bits between two operations, of the scale
before the division as of the product before the bias, and those roundings are what C2 and C4 are about.

The backward's fake quantization has a name of its own: two calls of one operator on one weight are one to the compiler,
which would then keep the quantized weight from the forward to the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.scheme import TensorSpec

_SPEC = (
    "str format, str strategy, int? group_size, bool symmetric, str scale_rule, ScalarType scale_dtype, "
    "ScalarType served_dtype"
)  # the fields of TensorSpec, in their order

_spec = lru_cache(TensorSpec)


def fields(spec: TensorSpec) -> tuple[Any, ...]:
    """The fields of a spec in their order. Not ``dataclasses.astuple``: dynamo cannot trace its deepcopy."""
    grouping = (spec.format, spec.strategy, spec.group_size, spec.symmetric)
    return (*grouping, spec.scale_rule, spec.scale_dtype, spec.served_dtype)


def traced(weight: Tensor) -> bool:
    """Whether the operator must be called: something traces, or `weight` is no plain tensor.

    Elsewhere its function is called directly: the dispatcher takes as much time as a small layer's kernel.
    """
    return torch.compiler.is_compiling() or type(weight) not in (Tensor, nn.Parameter)


def define_fake_quantize(name: str, run: Callable[[Tensor, TensorSpec], Tensor]) -> None:
    """Define an operator ``(weight, *fields) -> Tensor`` of the weight's shape, in the served dtype."""

    def real(weight: Tensor, *fields: Any) -> Tensor:
        return run(weight, _spec(*fields))

    def fake(weight: Tensor, *fields: Any) -> Tensor:
        return weight.new_empty(weight.shape, dtype=_spec(*fields).served_dtype)

    _define(name, f"(Tensor weight, {_SPEC}) -> Tensor", real, fake)


def define_quantize(name: str, run: Callable[[Tensor, TensorSpec, torch.dtype], tuple[Tensor, Tensor]]) -> None:
    """Define an operator ``(weight, dtype, *fields) -> (codes, scale)``, the codes in `dtype`."""

    def real(weight: Tensor, dtype: torch.dtype, *fields: Any) -> tuple[Tensor, Tensor]:
        return run(weight, _spec(*fields), dtype)

    def fake(weight: Tensor, dtype: torch.dtype, *fields: Any) -> tuple[Tensor, Tensor]:
        groups = _spec(*fields).num_groups(weight.shape[-1])
        scale = weight.new_empty((*weight.shape[:-1], groups), dtype=_spec(*fields).scale_dtype)
        return weight.new_empty(weight.shape, dtype=dtype), scale

    _define(name, f"(Tensor weight, ScalarType dtype, {_SPEC}) -> (Tensor, Tensor)", real, fake)


def _define(name: str, schema: str, real: Callable[..., Any], fake: Callable[..., Any]) -> None:
    # Not torch.library.custom_op, whose wrappers cost as much again.
    torch.library.define(name, schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    torch.library.impl(name, "CompositeExplicitAutograd")(real)
    torch.library.register_fake(name)(fake)
