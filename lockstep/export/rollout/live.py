"""What runs in the embedded engine: its linear layers by their names in the checkpoint, as they are now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lockstep.export import hub
from lockstep.export.rollout.engine import LiveLayer
from lockstep.export.rollout.skeleton import PackedExperts, PackedLinear, Skeleton
from lockstep.qat.experts import DOWN, Layout, layout_of
from lockstep.qat.prepare import routers
from lockstep.scheme import dtype_name

# What a layer is, and the function of ``x [M, K]`` that it computes, without its bias.
Live = tuple[LiveLayer, Callable[[Tensor], Tensor]]


def layers(skeleton: Skeleton) -> dict[str, Live]:
    """Every linear layer, router and projection of an expert, by its name in the checkpoint."""
    found: dict[str, Live] = {}
    model, stored = skeleton.model, {layer: name for name, layer in skeleton.layers.items()}
    beside_experts = routers(model)
    within = {part for experts in skeleton.experts for part in experts.modules() if part is not experts}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in within:
            continue
        if isinstance(module, PackedExperts):
            found |= _experts(name, module, stored)
        elif isinstance(module, PackedLinear):
            found[hub.layer_name(model, name)] = (_packed(name, module), module.multiply)
        elif isinstance(module, nn.Linear) or name in beside_experts:
            weight: Any = module.weight
            layer = LiveLayer(name, (0, len(weight)), dtype_name(weight.dtype), f"{type(module).__name__}.forward")
            found[hub.layer_name(model, name)] = (layer, partial(_multiply, weight))
        elif layout := layout_of(module):
            found |= _plain_experts(model, name, module, layout)
    return found


def _packed(name: str, layer: PackedLinear) -> LiveLayer:
    return LiveLayer(name, (0, layer.out_features), str(layer.scheme), layer.kernel.name)


def _experts(name: str, module: PackedExperts, stored: Mapping[PackedLinear, str]) -> dict[str, Live]:
    return {
        stored[one]: (_packed(f"{name}.{leaf}", one), partial(module.multiply, leaf))
        for leaf, one in module.each.items()
    }


def _plain_experts(model: Any, name: str, module: nn.Module, layout: Layout) -> dict[str, Live]:
    found: dict[str, Live] = {}
    for stored, (number, part) in hub.expert_names(model, name, layout).items():
        parameter, cut = DOWN if part == DOWN else layout.first, layout.parts()[part]
        weight = layout.rows(getattr(module, parameter))[number, cut]
        kernel = f"{type(module).__name__}.forward"
        layer = LiveLayer(f"{name}.{parameter}", (cut.start, cut.stop), dtype_name(weight.dtype), kernel)
        found[stored] = (layer, partial(_multiply, weight))
    return found


def _multiply(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x.to(weight.dtype), weight)
