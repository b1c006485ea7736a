"""What of a prepared model is served, and as what: its quantized layers, its other tensors, its KV cache."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lockstep.export import compressed_tensors, formats, hub
from lockstep.export.checkpoint import bitwise_equal
from lockstep.export.directory import ExportError
from lockstep.qat import learned
from lockstep.qat.experts import Expert, QATExperts, layout_of
from lockstep.qat.linear import QATLinear
from lockstep.qat.prepare import routers
from lockstep.scheme import Scheme

Layer = QATLinear | Expert


def quantized_layers(model: nn.Module) -> dict[str, Layer]:
    """What of `model` is prepared, by the names that engines know: linear layers under all of theirs, and each
    projection of each expert. ExportError if there is nothing."""
    layers = {name: layer for stored in quantized_keys(model).values() for name, layer in stored.items()}
    if not layers:
        raise ExportError(f"no layer of this {type(model).__name__} is prepared: call lockstep.prepare first.")
    return layers


def quantized_keys(model: nn.Module) -> dict[str, dict[str, Layer]]:
    """For the state-dict key of each quantized master the layers that are stored of it, by the names engines know."""
    keys: dict[str, dict[str, Layer]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QATLinear):
            keys[f"{name}.weight"] = {hub.layer_name(model, name): module}
        elif isinstance(module, QATExperts):
            for stored, place in hub.expert_names(model, name, module.layout).items():
                expert = Expert(module, *place)
                keys.setdefault(f"{name}.{expert.parameter}", {})[stored] = expert
    return keys


def unquantized_layers(model: nn.Module) -> list[str]:
    """What engines take for a linear layer and `model` leaves as it is, by the names that engines know.

    Linear layers, routers that are modules of their own, and experts.
    """
    found, beside_experts = [], routers(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QATLinear | QATExperts):
            continue
        if isinstance(module, nn.Linear) or name in beside_experts:
            found.append(hub.layer_name(model, name))
        elif layout := layout_of(module):  # engines look for the projections of the first
            found += hub.expert_names(model, name, layout)
    return found


def stored_as(layers: Mapping[str, Layer], format: str | None) -> dict[str, str]:
    """The format of each layer: `format`, or its scheme's own.

    Raises:
        ExportError: `format` cannot store a layer's scheme.
        ValueError: there is no such format.
    """
    if format not in formats.AUTO:
        formats.find(str(format))
    chosen = {}
    for name, layer in layers.items():
        fitting = formats.fitting(layer.scheme)
        chosen[name] = fitting[0] if format in formats.AUTO else str(format)
        if reason := formats.find(chosen[name]).refusal(layer.scheme):
            raise ExportError(
                f"{name} cannot be stored as {format}: {layer.scheme}: {reason}. "
                f"Formats that can: {', '.join(fitting)}."
            )
    return chosen


def served_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the keys that transformers ties to others when it loads, and without the scales of
    quantized layers, which are stored with their weights.

    Raises:
        ExportError: what the config ties together has become two weights, of which an engine would serve one.
    """
    left_out = set(_tied(model))
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QATLinear):
            left_out |= {f"{name}.{scale}" for scale in (learned.KEY, "input_scale", "input_global_scale")}
    return {key: tensor for key, tensor in model.state_dict().items() if key not in left_out}


def _tied(model: Any) -> list[str]:
    """The keys that are stored under another one."""
    parameters, found = dict(model.named_parameters(remove_duplicate=False)), []
    for key, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        one, two = parameters.get(key), parameters.get(other)
        if one is two or one is None or two is None or _same(one, two):
            found.append(key)
        elif getattr(model.config.get_text_config(), "tie_word_embeddings", True):
            raise ExportError(
                f"{key} has become another weight than {other}, to which the config ties it: an engine would serve the "
                "latter for both. Set tie_word_embeddings=False in the model's config, or tie them again."
            )
    return found


def _same(one: Tensor, two: Tensor) -> bool:
    plain = not (one.is_meta or two.is_meta or isinstance(one, DTensor) or isinstance(two, DTensor))
    return plain and one.numel() > 0 and bitwise_equal(one.detach(), two.detach())


def served_plain(model: nn.Module, scheme: Scheme) -> Iterator[tuple[str, Tensor]]:
    """What is served unquantized, by the names that engines know."""
    quantized = quantized_keys(model)
    for key, tensor in served_state(model).items():
        if key not in quantized:
            yield from hub.stored_tensors(model, key, served_tensor(model, key, tensor, scheme)).items()


def served_tensor(model: nn.Module, key: str, tensor: Tensor, scheme: Scheme) -> Tensor:
    """An unquantized tensor as it is served: floats in the served dtype, but for those that the model keeps in fp32.

    The scales of a quantized KV cache stay in fp32 too.
    """
    owner, _, leaf = key.rpartition(".")
    keep = (*(getattr(model, "_keep_in_fp32_modules", None) or ()),)
    keep += (*(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),)
    if not tensor.is_floating_point() or any(re.search(rf"(^|\.){part}(\.|$)", key) for part in keep):
        return tensor.detach()
    if leaf in ("k_scale", "v_scale") and prepared_cache(model.get_submodule(owner)):
        return tensor.detach()
    return tensor.detach().to(scheme.weights.served_dtype)


def prepared_cache(module: nn.Module) -> Any:
    """What `lockstep.qat.kv_cache.prepare_kv_cache` hung on an attention `module`, or None."""
    cache = vars(module).get("kv_cache")
    if cache is None:
        return None
    from lockstep.qat.kv_cache import KVCache  # which loads transformers

    return cache if isinstance(cache, KVCache) else None


def kv_cache_scheme(model: nn.Module, by_layer: Mapping[str, str]) -> dict[str, Any] | None:
    """The ``kv_cache_scheme`` of a model that was prepared for one. ExportError if it cannot be declared."""
    if not any(map(prepared_cache, model.modules())):
        return None
    from lockstep.qat import kv_cache

    spec = kv_cache.kv_cache_spec(model)
    assert spec is not None
    format = next(iter(by_layer.values()))
    if formats.find(format).METHOD != compressed_tensors.METHOD:
        raise ExportError(
            f"{format} has no word for a quantized KV cache ({spec}): choose a format of compressed-tensors, or call "
            "unprepare_kv_cache first."
        )
    try:
        return kv_cache.config(spec)
    except ValueError as error:
        raise ExportError(f"{error} To do so call unprepare_kv_cache first.") from error
