"""Weights clipped and rounded to nearest: a scale of each group, or row, from its magnitudes alone.

`minmax` and `mse` are llm-compressor's weight observers: the largest magnitude, and the range of least squared error
among 20 % to 100 % of it. `percentile` is the magnitude below which a share of the group lies, interpolated: 99 % with
4 bits and 99.99 % with 8, which is about where a Gaussian's uniform quantizer has its least squared error (Max, 1960:
2.5 and 3.9 standard deviations).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lockstep.ptq.oneshot import config_groups
from lockstep.ptq.rounded import Batches, Rounded
from lockstep.scheme import RULES, Scheme, TensorSpec

PERCENTILES = {4: 0.99, 8: 0.9999}


def minmax(model: Any, layers: list[str], scheme: Scheme, batches: Batches) -> dict[str, Rounded]:
    """Scales from the largest magnitudes."""
    return _observed(model, layers, scheme, "memoryless_minmax")


def mse(model: Any, layers: list[str], scheme: Scheme, batches: Batches) -> dict[str, Rounded]:
    """Scales of the least squared error."""
    return _observed(model, layers, scheme, "memoryless_mse")


def percentile(model: Any, layers: list[str], scheme: Scheme, batches: Batches) -> dict[str, Rounded]:
    """Scales from a percentile of the magnitudes."""
    weights = {name: model.get_submodule(name).weight.detach() for name in layers}
    return {name: Rounded(weight, weight, _percentile(weight, scheme.weights)) for name, weight in weights.items()}


def _observed(model: Any, layers: list[str], scheme: Scheme, observer: str) -> dict[str, Rounded]:
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.observers import Observer

    args = QuantizationArgs(**config_groups(scheme, layers)["group_0"]["weights"])
    rounded = {}
    for name in layers:
        weight = model.get_submodule(name).weight.detach()
        one = Observer.load_from_registry(observer, base_name="weight", args=args)
        rounded[name] = Rounded(weight, weight, one(weight).get_qparams()["scale"])
    return rounded


def _percentile(weight: Tensor, spec: TensorSpec) -> Tensor:
    groups = weight.float().abs().unflatten(-1, (spec.num_groups(weight.shape[-1]), -1))
    # Not torch.quantile: it refuses more than 16 M elements.
    ordered, place = groups.sort(-1).values, PERCENTILES[spec.bits] * (groups.shape[-1] - 1)
    low = int(place)
    range = torch.lerp(ordered[..., low], ordered[..., min(low + 1, groups.shape[-1] - 1)], place - low)
    range = range.where(range > 0, ordered[..., -1])  # of a group that is nearly all zeros
    scale = (range / RULES[spec.scale_rule].divisor).to(weight.dtype)
    return scale.where(scale > 0, torch.finfo(weight.dtype).eps)  # which llm-compressor has for zeros
