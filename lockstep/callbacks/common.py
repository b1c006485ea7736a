"""What the callbacks of both trainers do with a prepared model: stored scales, ranges that are measured, statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lockstep.export.directory import ExportError
from lockstep.export.gather import Unit, fsdp_units, gathered
from lockstep.loading import load_scales, stored_scales
from lockstep.qat import kv_cache, observers, statistics
from lockstep.qat.experts import QATExperts, experts
from lockstep.qat.linear import QATLinear
from lockstep.qat.observers import Observer, ObserverName
from lockstep.qat.prepare import quantized_experts, quantized_modules
from lockstep.scheme import KVCacheSpec, Rule, Scheme

# Why a callback refuses start_step.
LATE_START = (
    "start_step={start_step} adds to the model what the optimizer and checkpoints must know from the first step: leave "
    "it 0 with learned_scales, calibration_steps, or a scheme or KV cache with measured ranges."
)


def stores_scales(scheme: Scheme | Sequence[Rule], cache: KVCacheSpec | None) -> bool:
    """Whether a model prepared so has measured ranges, of a layer's inputs or of its KV cache."""
    rules = [Rule((), scheme)] if isinstance(scheme, Scheme) else scheme
    schemes = [Scheme.of(rule.scheme) for rule in rules if rule.scheme is not None]
    static_cache = cache is not None and not cache.dynamic
    return static_cache or any(one.activations is not None and one.activations.stores_scale for one in schemes)


def read_scales(model: nn.Module) -> str:
    """Read the scales that the folder of a transformers model stores; a sentence about it, or nothing if it has none.

    Raises:
        ValueError: see `lockstep.loading.load_scales`.
    """
    folder = str(getattr(model, "name_or_path", ""))
    keys = load_scales(model, folder) if stored_scales(folder) else []
    return f"{len(keys)} scales read from {folder}, the first is {keys[0]}" if keys else ""


def observe(model: nn.Module, observer: ObserverName, calibration_steps: int) -> None:
    """Begin to measure inputs, keys and values. ValueError if neither a layer nor a KV cache has measured ranges."""
    watched = observers.observe(model, observer) if observers.storing_layers(model) else []
    watched += kv_cache.observe(model, observer)
    if not watched:
        raise ValueError(
            f"calibration_steps={calibration_steps}, but no layer's inputs and no KV cache have measured ranges: "
            "leave it 0."
        )


def check_steps(calibration_steps: int, max_steps: int, export_dir: str | None) -> None:
    """ExportError for a run of at most `max_steps` optimizer steps (negative: unknown) that ends before its ranges."""
    if export_dir is not None and 0 <= max_steps < calibration_steps:
        raise ExportError(
            f"nothing could be exported: training ends at step {max_steps}, within calibration_steps="
            f"{calibration_steps}."
        )


def observing(model: nn.Module) -> dict[str, Observer]:
    """All that measure now, by names that a resumed run has too."""
    layers = {f"{name}.input": layer.observer for name, layer in quantized_modules(model) if layer.observer}
    return cast("dict[str, Observer]", layers) | kv_cache.observers_of(model)


def snapshot(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What each observer has seen so far, in tensors of its own."""
    found = observing(model).items()
    return {name: {key: value.clone() for key, value in one.state_dict().items()} for name, one in found}


def freeze(model: nn.Module) -> None:
    """Write the scales of all that measure. All ranks must call it."""
    if any(layer.observer for _, layer in quantized_modules(model)):
        observers.freeze(model)
    kv_cache.freeze(model)


def unobserve(model: nn.Module) -> None:
    """Take all observers away and leave the scales as they were."""
    observers.unobserve(model)
    kv_cache.unobserve(model)


def prepared_modules(model: nn.Module) -> dict[str, QATLinear | QATExperts]:
    """All modules that `lockstep.prepare` has switched, linear layers first."""
    return {**dict(quantized_modules(model)), **dict(quantized_experts(model))}


def layer_statistics(
    model: nn.Module, earlier: Mapping[str, Tensor], compute: bool = True, units: Mapping[int, Unit] | None = None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """How well each quantized layer sits on its grid, and the codes to compare with the next time.

    Of a sharded model all ranks must call this; one module is whole at a time.

    Args:
        model: a prepared model, or its wrapper.
        earlier: the codes of the last time, by layer, or nothing.
        compute: False on ranks that only take part.
        units: see `lockstep.export.gather.fsdp_units`; by default those within `model`.

    Returns:
        ``qat/sqnr_db/NAME``, ``qat/saturation/NAME`` and, where there are `earlier` codes, ``qat/code_flips/NAME``,
        with the mean over the modules as NAME ``mean``; and the codes, int8 on the host. Of experts, a module's are
        averaged.
    """
    found: dict[str, dict[str, list[float]]] = {}
    codes: dict[str, Tensor] = {}
    units = fsdp_units(model) if units is None else units
    for name, module in prepared_modules(model).items():
        with gathered(getattr(module, "fused", ()) or (module,), units):
            if not compute:
                continue
            for layer in experts(module) if isinstance(module, QATExperts) else (module,):
                spec, quantized, key = layer.scheme.weights, layer.quantize(), layer.qualified_name
                codes[key] = quantized.codes.view(torch.int8).cpu()
                values = {
                    "sqnr_db": statistics.sqnr_db(layer.weight, quantized, spec),
                    "saturation": statistics.saturation(quantized, spec),
                }
                if key in earlier:
                    values["code_flips"] = statistics.code_flips(codes[key], earlier[key])
                for kind, value in values.items():
                    found.setdefault(kind, {}).setdefault(name, []).append(value)
    metrics: dict[str, float] = {}
    for kind, by_module in found.items():
        means = {name: sum(values) / len(values) for name, values in by_module.items()}
        metrics |= {f"qat/{kind}/{name}": value for name, value in means.items()}
        metrics[f"qat/{kind}/mean"] = sum(means.values()) / len(means)
    return metrics, codes
