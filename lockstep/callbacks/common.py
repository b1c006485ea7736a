"""What the callbacks of both trainers do with a prepared model: stored scales, ranges that are measured, statistics."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.export.directory import ExportError
from lockstep.export.gather import Unit, fsdp_units, gathered
from lockstep.loading import LEARNED, load_scales, stored_scales
from lockstep.qat import kv_cache, observers, oscillation, statistics, warmup
from lockstep.qat.experts import QATExperts, experts
from lockstep.qat.linear import QATLinear
from lockstep.qat.observers import Observer, ObserverName
from lockstep.qat.oscillation import Track
from lockstep.qat.prepare import quantized_experts, quantized_modules
from lockstep.qat.warmup import Schedule, Warmup
from lockstep.scheme import KVCacheSpec, Rule, Scheme

# Why a callback refuses start_step.
LATE_START = (
    "start_step={start_step} adds to the model what the optimizer and checkpoints must know from the first step: leave "
    "it 0 with learned_scales, calibration_steps, or a scheme or KV cache with measured ranges."
)


def rank() -> int:
    """This process's, 0 where there is no process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def stores_scales(scheme: Scheme | Sequence[Rule], cache: KVCacheSpec | None) -> bool:
    """Whether a model prepared so has measured ranges, of a layer's inputs or of its KV cache."""
    static_cache = cache is not None and not cache.dynamic
    return static_cache or any(one.activations and one.activations.stores_scale for one in _schemes(scheme))


def served_dtype(scheme: Scheme | Sequence[Rule]) -> torch.dtype:
    """What a model prepared so computes in when it is served, as far as its first quantized layer says."""
    return next((one.weights.served_dtype for one in _schemes(scheme)), torch.bfloat16)


def _schemes(scheme: Scheme | Sequence[Rule]) -> list[Scheme]:
    rules = [Rule((), scheme)] if isinstance(scheme, Scheme) else scheme
    return [Scheme.of(rule.scheme) for rule in rules if rule.scheme is not None]


def read_scales(model: nn.Module) -> str:
    """Read the scales that the folder of a transformers model stores; a sentence about it, or nothing if it has none.

    Warns of weight scales there that the model has no place for.

    Raises:
        ValueError: see `lockstep.loading.load_scales`.
    """
    folder = str(getattr(model, "name_or_path", ""))
    stored = stored_scales(folder)
    keys = load_scales(model, folder) if stored else []
    if unused := [key for key in stored if key.endswith(LEARNED) and key not in keys]:
        warnings.warn(
            f"{folder} stores {len(unused)} weight scales, such as {unused[0]}, which are not used: the weights there "
            "are rounded again by the scheme's rule. learned_scales=True starts from them.",
            stacklevel=2,
        )
    return f"{len(keys)} scales read from {folder}, the first is {keys[0]}" if keys else ""


def warn_of_unread_scales(model: nn.Module) -> None:
    """Warn if a model that somebody prepared has other learned scales than its folder stores."""
    folder = str(getattr(model, "name_or_path", ""))
    own = {key: scale for key, scale in model.state_dict().items() if key.endswith(LEARNED)}
    for key, path in stored_scales(folder).items() if own else ():
        with safetensors.safe_open(path, "pt") as file:
            if key in own and not torch.equal(file.get_tensor(key), own[key].detach().cpu()):
                warnings.warn(
                    f"{key} is not what {folder} stores. To start from the scales there, call "
                    "lockstep.loading.load_scales(model, folder) after lockstep.prepare.",
                    stacklevel=2,
                )
                return


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


def how_trained(step: int, callback: Any) -> str:
    """What a model card says of a run of one of the QAT callbacks that ended at optimizer step `step`."""
    said = [f"{step:,} optimizer steps in all with {type(callback).__name__}"]
    if callback.start_step:
        said.append(f"quantized from step {callback.start_step:,} on")
    if callback.teacher is not None:
        name = callback.teacher.model if isinstance(callback.teacher.model, str) else "the model before quantization"
        said.append(f"{callback.teacher.kl_share:.0%} of the loss from its teacher {Path(name).name}")
    if callback.learned_scales:
        said.append("with learned scales")
    if callback.warmup is not None:
        said.append(f"over a warm-up of {callback.warmup.steps:,} steps ({callback.warmup.kind})")
    if callback.dampening:
        said.append(f"dampened by {callback.dampening:g}")
    return ", ".join(said) + "."


def check_stability(planned: Warmup | None, dampening: float, learned_scales: bool) -> None:
    """ValueError for what a callback cannot do with its arguments `warmup` and `dampening`."""
    if planned is not None and learned_scales:
        raise ValueError(
            "warmup with learned_scales: the scales would start to learn before the forward uses them. Warm up without "
            "them, or train them from the first step."
        )
    if not 0 <= dampening < float("inf"):
        raise ValueError(f"dampening={dampening}: a strength of 0 or more.")


def begin_warmup(
    model: nn.Module, planned: Warmup | None, start_step: int, max_steps: int, export_dir: str | None
) -> Schedule | None:
    """The warm-up of a run of at most `max_steps` optimizer steps (negative: unknown), before its first step.

    Raises:
        ValueError: see `lockstep.qat.warmup.Schedule`.
        ExportError: the run ends within it, and is to be exported.
    """
    warmup.stop(model)  # what an interrupted run has left
    if export_dir is not None and max_steps >= 0:
        check_warm(planned, start_step, max_steps)
    return None if planned is None else Schedule(model, planned)


def check_warm(planned: Warmup | None, start_step: int, step: int) -> None:
    """ExportError if a run that ends at `step` has had no step after its warm-up."""
    if planned is not None and step <= start_step + planned.steps:
        raise ExportError(
            f"nothing trained as it is served: training ends at step {step}, within warmup.steps={planned.steps}"
            f"{f' from start_step={start_step}' if start_step else ''}."
        )


def dampen(model: nn.Module, strength: float, step: int, steps: float, optimizer: Any) -> None:
    """Add the dampening of `step` of `steps` to the gradients of the weights that `optimizer` trains."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    oscillation.dampen(model, oscillation.risen(strength, step, steps), parameters)


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
    model: nn.Module, earlier: Mapping[str, Track], compute: bool = True, units: Mapping[int, Unit] | None = None
) -> tuple[dict[str, float], dict[str, Track]]:
    """How well each quantized layer sits on its grid, and the codes to compare with the next time.

    Of a sharded model all ranks must call this; one module is whole at a time.

    Args:
        model: a prepared model, or its wrapper.
        earlier: what it returned the last time, by layer, or nothing.
        compute: False on ranks that only take part.
        units: see `lockstep.export.gather.fsdp_units`; by default those within `model`.

    Returns:
        ``qat/sqnr_db/NAME``, ``qat/saturation/NAME``, where there are `earlier` codes ``qat/code_flips/NAME``, and from
        the third time on ``qat/oscillation/NAME``, with the mean over the modules as NAME ``mean``; and the codes, on
        the host. Of experts, a module's are averaged.
    """
    found: dict[str, dict[str, list[float]]] = {}
    tracks: dict[str, Track] = {}
    units = fsdp_units(model) if units is None else units
    for name, module in prepared_modules(model).items():
        with gathered(getattr(module, "fused", ()) or (module,), units):
            if not compute:
                continue
            for layer in experts(module) if isinstance(module, QATExperts) else (module,):
                spec, quantized, key = layer.scheme.weights, layer.quantize(), layer.qualified_name
                before = earlier.get(key)
                now = tracks[key] = oscillation.follow(quantized.codes, before)
                values = {
                    "sqnr_db": statistics.sqnr_db(layer.weight, quantized, spec),
                    "saturation": statistics.saturation(quantized, spec),
                }
                if before is not None:
                    values["code_flips"] = statistics.code_flips(now.codes, before.codes)
                if before is not None and before.direction is not None:
                    values["oscillation"] = oscillation.oscillation(now, before, spec.code_dtype)
                for kind, value in values.items():
                    found.setdefault(kind, {}).setdefault(name, []).append(value)
    metrics: dict[str, float] = {}
    for kind, by_module in found.items():
        means = {name: sum(values) / len(values) for name, values in by_module.items()}
        metrics |= {f"qat/{kind}/{name}": value for name, value in means.items()}
        metrics[f"qat/{kind}/mean"] = sum(means.values()) / len(means)
    return metrics, tracks
