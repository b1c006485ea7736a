"""Operators that a compiler sees as one node, and how a spec crosses into them.

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
from lockstep.scheme import ActivationSpec, Scheme, TensorSpec

# The fields of a spec as an operator's schema has them; a field of another type is an error here, at import.
_TYPES = {"str": "str", "int | None": "int?", "bool": "bool", "torch.dtype": "ScalarType"}


def _schema(spec: type) -> str:
    kind = spec.__name__.lower()
    return ", ".join(f"{_TYPES[str(field.type)]} {kind}_{field.name}" for field in dataclasses.fields(spec))


_NAMES = {spec: tuple(field.name for field in dataclasses.fields(spec)) for spec in (TensorSpec, ActivationSpec)}
_WEIGHTS, _INPUTS = _schema(TensorSpec), _schema(ActivationSpec)
_weights, _inputs = lru_cache(TensorSpec), lru_cache(ActivationSpec)


def fields(spec: TensorSpec | ActivationSpec) -> tuple[Any, ...]:
    """The fields of a spec in their order. Not ``dataclasses.astuple``: dynamo cannot trace its deepcopy."""
    return tuple([getattr(spec, name) for name in _NAMES[type(spec)]])


def traced(tensor: Tensor) -> bool:
    """Whether the operator must be called: something traces, or `tensor` is no plain tensor.

    Elsewhere its function is called directly: the dispatcher takes as much time as a small layer's kernel.
    """
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter)


def fake_quantize(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run` of ``(weight, spec, amax, scale)`` as `Quantizer.fake_quantize`: through the operator `name` where
    something traces."""

    def real(weight: Tensor, amax: Tensor | None, scale: Tensor | None, *fields: Any) -> Tensor:
        return run(weight, _weights(*fields), amax, scale)

    def fake(weight: Tensor, amax: Tensor | None, scale: Tensor | None, *fields: Any) -> Tensor:
        return weight.new_empty(weight.shape, dtype=_weights(*fields).served_dtype)

    schema = f"(Tensor weight, Tensor? amax, Tensor? scale, {_WEIGHTS}) -> Tensor"
    once, later = (_define(each, schema, real, fake) for each in (name, f"{name}_again"))

    def call(
        weight: Tensor, spec: TensorSpec, amax: Tensor | None = None, scale: Tensor | None = None, again: bool = False
    ) -> Tensor:
        if traced(weight):
            return (later if again else once)(weight, amax, scale, *fields(spec))
        return run(weight, spec, amax, scale)

    return call


def quantize(name: str, run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Quantized]:
    """`run` of ``(weight, spec, dtype, amax, scale)`` as `Quantizer.quantize`: through the operator `name` where
    something traces."""

    def real(
        weight: Tensor, dtype: torch.dtype, amax: Tensor | None, scale: Tensor | None, *fields: Any
    ) -> tuple[Tensor, Tensor]:
        return run(weight, _weights(*fields), dtype, amax, scale)

    def fake(
        weight: Tensor, dtype: torch.dtype, amax: Tensor | None, scale: Tensor | None, *fields: Any
    ) -> tuple[Tensor, Tensor]:
        spec = _weights(*fields)
        rounded = weight.new_empty((*weight.shape[:-2], *spec.scale_shape(*weight.shape[-2:])), dtype=spec.scale_dtype)
        return weight.new_empty(weight.shape, dtype=dtype), rounded

    schema = f"(Tensor weight, ScalarType dtype, Tensor? amax, Tensor? scale, {_WEIGHTS}) -> (Tensor, Tensor)"
    operator = _define(name, schema, real, fake)

    def call(
        weight: Tensor,
        spec: TensorSpec,
        dtype: torch.dtype | None = None,
        amax: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Quantized:
        dtype = dtype or spec.code_dtype
        if traced(weight):
            return Quantized(*operator(weight, dtype, amax, scale, *fields(spec)))
        return Quantized(*run(weight, spec, dtype, amax, scale))

    return call


def learned_gradients(name: str, run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`run` of ``(grad, weight, scale, spec)`` as `Quantizer.learned_gradients`: through the operator `name` where
    something traces."""

    def real(grad: Tensor, weight: Tensor, scale: Tensor, *fields: Any) -> tuple[Tensor, Tensor]:
        return run(grad, weight, scale, _weights(*fields))

    def fake(grad: Tensor, weight: Tensor, scale: Tensor, *fields: Any) -> tuple[Tensor, Tensor]:
        return weight.new_empty(weight.shape), scale.new_empty(scale.shape)

    operator = _define(name, f"(Tensor grad, Tensor weight, Tensor scale, {_WEIGHTS}) -> (Tensor, Tensor)", real, fake)

    def call(grad: Tensor, weight: Tensor, scale: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        return operator(grad, weight, scale, *fields(spec)) if traced(weight) else run(grad, weight, scale, spec)

    return call


def quantize_activations(
    name: str, run: Callable[[Tensor, ActivationSpec, Tensor | None], tuple[Tensor, Tensor]]
) -> Callable[..., Quantized]:
    """`run` as `Quantizer.quantize_activations`: through the operator `name` where something traces."""

    def real(x: Tensor, stored: Tensor | None, *fields: Any) -> tuple[Tensor, Tensor]:
        codes, scale = run(x, _inputs(*fields), stored)
        return codes, scale.clone() if scale is stored else scale  # an operator's result is no input of it

    def fake(x: Tensor, stored: Tensor | None, *fields: Any) -> tuple[Tensor, Tensor]:
        spec = _inputs(*fields)
        dtype = {16: torch.float8_e4m3fn, 32: torch.float8_e8m0fnu}.get(spec.group_size or 0, torch.float32)
        shape = (*x.shape[:-1], spec.num_groups(x.shape[-1])) if spec.dynamic else (1,)
        return x.new_empty(x.shape, dtype=spec.code_dtype), x.new_empty(shape, dtype=dtype)

    operator = _define(name, f"(Tensor x, Tensor? stored, {_INPUTS}) -> (Tensor, Tensor)", real, fake)

    def call(x: Tensor, spec: ActivationSpec, stored: Tensor | None = None) -> Quantized:
        codes, scale = operator(x, stored, *fields(spec)) if traced(x) else run(x, spec, stored)
        return Quantized(codes, scale, None, stored if spec.group_size == 16 else None)

    return call


def dequantize_activations(name: str, run: Callable[[Quantized, torch.dtype], Tensor]) -> Callable[..., Tensor]:
    """`run` as `Quantizer.dequantize_activations`: through the operator `name` where something traces."""

    def real(codes: Tensor, scale: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        return run(Quantized(codes, scale, None, global_scale), dtype)

    def fake(codes: Tensor, scale: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        return codes.new_empty(codes.shape, dtype=dtype)

    operator = _define(
        name, "(Tensor codes, Tensor scale, Tensor? global_scale, ScalarType dtype) -> Tensor", real, fake
    )

    def call(quantized: Quantized, dtype: torch.dtype) -> Tensor:
        codes, scale, _, global_scale = quantized
        return operator(codes, scale, global_scale, dtype) if traced(codes) else run(quantized, dtype)

    return call


def scaled_linear(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run` of ``(x, weight, scheme, bias, dtype)``: through the operator `name` where something traces."""

    def real(
        x: Tensor, x_scale: Tensor, x_global: Tensor | None, w: Tensor, w_scale: Tensor, w_global: Tensor | None,
        bias: Tensor | None, dtype: torch.dtype, *fields: Any,
    ) -> Tensor:  # fmt: skip
        count = len(_NAMES[TensorSpec])
        scheme = Scheme(_weights(*fields[:count]), _inputs(*fields[count:]))
        x_codes, w_codes = Quantized(x, x_scale, None, x_global), Quantized(w, w_scale, None, w_global)
        return run(x_codes, w_codes, scheme, bias, dtype)

    def fake(
        x: Tensor, x_scale: Tensor, x_global: Tensor | None, w: Tensor, w_scale: Tensor, w_global: Tensor | None,
        bias: Tensor | None, dtype: torch.dtype, *fields: Any,
    ) -> Tensor:  # fmt: skip
        return x.new_empty((*x.shape[:-1], w.shape[-2]), dtype=dtype)

    tensors = "Tensor x, Tensor x_scale, Tensor? x_global, Tensor w, Tensor w_scale, Tensor? w_global, Tensor? bias"
    operator = _define(name, f"({tensors}, ScalarType dtype, {_WEIGHTS}, {_INPUTS}) -> Tensor", real, fake)

    def call(x: Quantized, weight: Quantized, scheme: Scheme, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if not traced(x.codes):
            return run(x, weight, scheme, bias, dtype)
        assert scheme.activations is not None
        tensors = (x.codes, x.scale, x.global_scale, weight.codes, weight.scale, weight.global_scale)
        return operator(*tensors, bias, dtype, *fields(scheme.weights), *fields(scheme.activations))

    return call


def input_gradient(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run` of ``(grad, weight, spec, amax)`` to ``[M, K]``: through the operator `name` where something traces."""

    def real(grad: Tensor, weight: Tensor, amax: Tensor | None, *fields: Any) -> Tensor:
        return run(grad, weight, _weights(*fields), amax)

    def fake(grad: Tensor, weight: Tensor, amax: Tensor | None, *fields: Any) -> Tensor:
        return grad.new_empty((grad.shape[0], weight.shape[-1]))

    operator = _define(name, f"(Tensor grad, Tensor weight, Tensor? amax, {_WEIGHTS}) -> Tensor", real, fake)

    def call(grad: Tensor, weight: Tensor, spec: TensorSpec, amax: Tensor | None) -> Tensor:
        return operator(grad, weight, amax, *fields(spec)) if traced(weight) else run(grad, weight, spec, amax)

    return call


def epilogue(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run` of ``(y, scale, bias, dtype)`` to a tensor like ``y`` in `dtype`: through the operator `name` where
    something traces."""
    schema = "(Tensor y, Tensor? scale, Tensor? bias, ScalarType dtype) -> Tensor"

    def fake(y: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(y, dtype=dtype)

    operator = _define(name, schema, run, fake)

    def call(y: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return operator(y, scale, bias, dtype) if traced(y) else run(y, scale, bias, dtype)

    return call


def _define(name: str, schema: str, real: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    # Not torch.library.custom_op, whose wrappers cost as much again.
    torch.library.define(name, schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    torch.library.impl(name, "CompositeExplicitAutograd")(real)
    torch.library.register_fake(name)(fake)
    return getattr(torch.ops.lockstep, name.removeprefix("lockstep::")).default
