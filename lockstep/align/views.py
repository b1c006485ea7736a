"""The forward of a prepared model with nothing quantized, or the weights alone: what `decompose` compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lockstep import grid
from lockstep.qat.experts import Expert, QATExperts, by_expert
from lockstep.qat.kv_cache import KVCache
from lockstep.qat.prepare import quantized_experts, quantized_modules, with_adapters_merged

View = Callable[[nn.Module], AbstractContextManager[nn.Module]]


def is_quantized(model: nn.Module) -> bool:
    """Whether the forward of `model` quantizes anything: a layer, experts, or its KV cache."""
    return bool(_layers(model) or _caches(model))


def _layers(model: nn.Module) -> list[Any]:
    return [layer for _, layer in (*quantized_modules(model), *quantized_experts(model))]


def views(model: nn.Module) -> dict[str, View]:
    """The forwards of `model` that there are: ``"plain"``, ``"weights"`` and ``"full"``, which is its own.

    Each is a context manager, which gives the model to call. A model that is not prepared has ``"plain"`` alone;
    ``"weights"`` is there where inputs, keys or values are quantized too.
    """
    if not is_quantized(model):
        return {"plain": nullcontext}
    inputs = _caches(model) or any(layer.scheme.activations for layer in _layers(model))
    weights: dict[str, View] = {"weights": _weights_alone} if inputs else {}
    return {"plain": _unquantized, **weights, "full": nullcontext}


@contextmanager
def _unquantized(model: nn.Module) -> Iterator[nn.Module]:
    """`model` without any quantization, its adapters merged."""
    with with_adapters_merged(model) as served, ExitStack() as stack:
        for _, layer in quantized_modules(served):
            stack.enter_context(_forward(layer, partial(nn.Linear.forward, layer)))
        for _, experts in quantized_experts(served):
            stack.enter_context(_forward(experts, partial(experts.plain_class.forward, experts)))
        stack.enter_context(_plain_cache(served))
        yield served


@contextmanager
def _weights_alone(model: nn.Module) -> Iterator[nn.Module]:
    """`model` with quantized weights, and inputs, keys and values as they are; its adapters merged."""
    with with_adapters_merged(model) as served, ExitStack() as stack:
        for _, layer in quantized_modules(served):
            if layer.scheme.activations is not None:
                stack.enter_context(_observed(layer))
        for _, experts in quantized_experts(served):
            if experts.scheme.activations is not None:
                stack.enter_context(_forward(experts, partial(_experts_of_plain_inputs, experts)))
        stack.enter_context(_plain_cache(served))
        yield served


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """`module` with another forward, for a time."""
    own = vars(module).get("forward")  # as accelerate's hooks set it
    setattr(module, "forward", forward)  # noqa: B010
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            setattr(module, "forward", own)  # noqa: B010


class _Passing:
    """While a layer has an observer, its inputs are not quantized: this one observes nothing."""

    def update(self, x: Tensor) -> None:
        """Nothing."""


@contextmanager
def _observed(layer: Any) -> Iterator[None]:
    if layer.observer is not None:
        raise ValueError(f"{layer.qualified_name} is being calibrated, and leaves its inputs as they are: wait.")
    layer.observer = _Passing()
    try:
        yield
    finally:
        del layer.observer


def _experts_of_plain_inputs(module: QATExperts, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    dtype = module.scheme.weights.served_dtype
    routing = [one.to(dtype) if one.is_floating_point() else one for one in (*args, *kwargs.values())]
    return by_expert(module, hidden, *routing, linear=_with_plain_inputs)


def _with_plain_inputs(expert: Expert, x: Tensor) -> Tensor:
    bias = None if expert.bias is None else expert.bias.to(x.dtype)
    return F.linear(x, grid.dequantize(expert.quantize(), expert.scheme.weights).to(x.dtype), bias)


def _caches(model: nn.Module) -> list[Any]:
    """The attention modules whose keys and values are quantized."""
    return [module for module in model.modules() if isinstance(getattr(module, "kv_cache", None), KVCache)]


@contextmanager
def _plain_cache(model: nn.Module) -> Iterator[None]:
    """Keys and values as they are: attention calls what it called before `prepare_kv_cache`."""
    configs = {id(module.config): module.config for module in _caches(model)}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config, implementation in before:
            config._attn_implementation = implementation.removeprefix("lockstep_")
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def served_dtype(model: nn.Module) -> torch.dtype:
    """That of the first layer's scheme; of a model that is not quantized, fp32: no autocast but the caller's."""
    return next((layer.scheme.weights.served_dtype for layer in _layers(model)), torch.float32)
