"""A model with peft's layers, seen without them: what is prepared, exported and requantized of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lockstep.qat.linear import QATLinear
from lockstep.qat.lora_config import BaseTunerLayer, ModulesToSaveWrapper, TrainableTokensWrapper
from lockstep.qat.prepare import unwrapped


@contextmanager
def base_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The model within peft's, its base layers and trained modules in the place of peft's wrappers around them."""
    undo = replace(model, plain)
    try:
        yield unwrapped(model)
    finally:
        restore(undo)


def plain(module: nn.Module) -> nn.Module:
    """What peft has put a layer of its own around: the base layer, or the module that trains; others themselves."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    if isinstance(module, ModulesToSaveWrapper):
        active = [] if module.disable_adapters else module.active_adapters
        return module.modules_to_save[active[0]] if active else module.original_module
    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter.get_base_layer()
    return module


def check_ties(model: nn.Module) -> None:
    """ValueError if adapters train one of two layers that share a weight, and so cannot be merged into it."""
    ends: dict[int, list[tuple[str, nn.Module, Hashable]]] = {}
    for name, base, trains in _trained(unwrapped(model), ""):
        if (weight := base._parameters.get("weight")) is not None:
            ends.setdefault(id(weight), []).append((name, base, trains))
    for tied, group in ends.items():
        # Quantized layers compute merged weights of their own, of one master too.
        if len({trains for *_, trains in group}) > 1 and not all(isinstance(base, QATLinear) for _, base, _ in group):
            name = next(name for name, _, trains in group if trains != tied)
            other = next(other for other, *_ in group if other != name)
            raise ValueError(
                f"{name} is trained by itself, but its weight is tied to {other}: merged, both or neither would have "
                f"it. Leave {name} out of target_modules and modules_to_save, or before training give it a weight of "
                "its own, model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone()) for a head, and "
                "set model.config.tie_word_embeddings = False."
            )


def _trained(parent: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, Hashable]]:
    """Names and modules of the model without adapters, and an identity of the weight that each multiplies with."""
    for leaf, child in parent._modules.items():
        name = f"{prefix}{leaf}"
        if isinstance(child, ModulesToSaveWrapper):
            trains = dict(plain(child).named_modules())
            for inner, one in child.original_module.named_modules():
                yield f"{name}.{inner}".rstrip("."), one, id(trains[inner]._parameters.get("weight"))
        elif isinstance(child, BaseTunerLayer | TrainableTokensWrapper):
            layer: Any = child.token_adapter if isinstance(child, TrainableTokensWrapper) else child
            base = layer.get_base_layer()
            active = not layer.disable_adapters and {*layer.active_adapters} & layer._get_available_adapters()
            # peft ties adapters of tokens too
            own = id(getattr(layer, "tied_adapter", None) or layer)
            yield name, base, own if active else id(base._parameters.get("weight"))
        elif child is not None:
            yield name, child, id(child._parameters.get("weight"))
            yield from _trained(child, f"{name}.")


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """If the block raises, give every module of `model` back its class, attributes and submodules, and every parameter
    its tensor; what was changed within tensors stays."""
    modules = [
        (one, type(one), {**vars(one)}, {**one._parameters}, {**one._buffers}, {**one._modules})
        for one in model.modules()
    ]
    parameters = [(one, one.data, one.requires_grad) for one in model.parameters()]
    try:
        yield
    except BaseException:
        for module, kind, attributes, *own in modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            now: Any
            for now, then in zip((module._parameters, module._buffers, module._modules), own, strict=True):
                now.clear()
                now.update(then)
        for parameter, data, trains in parameters:
            parameter.data = data
            parameter.requires_grad_(trains)
        raise


def replace(model: nn.Module, stand_in: Callable[[nn.Module], nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put `stand_in` of each module in its place, from above; where one is replaced, what is in it is left alone.

    Returns:
        What was there, for `restore`: parent, name, module.
    """
    undo = []
    pending = [unwrapped(model)]
    while pending:
        parent = pending.pop()
        for name, child in [*parent._modules.items()]:
            if child is None:
                continue
            new = stand_in(child)
            if new is child:
                pending.append(child)
            else:
                undo.append((parent, name, child))
                parent._modules[name] = new
    return undo


def restore(undo: Sequence[tuple[nn.Module, str, nn.Module]]) -> None:
    """Undo `replace`."""
    for parent, name, module in undo:
        parent._modules[name] = module
