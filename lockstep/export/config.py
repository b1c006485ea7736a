"""``config.json`` of an export: what it says of the quantization, and the file."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from lockstep.export import formats
from lockstep.export.gather import without_wrappers
from lockstep.export.groups import Group
from lockstep.export.served import kv_cache_scheme, quantized_layers, stored_as, unquantized_layers
from lockstep.qat.prepare import unwrapped
from lockstep.scheme import Scheme


def quantization_config(model: nn.Module, format: str | None = None) -> dict[str, Any]:
    """What ``config.json`` says of the quantization of a prepared `model`, in the words of `format`."""
    model = unwrapped(model)
    with without_wrappers(model):
        layers = quantized_layers(model)
        by_layer = stored_as(layers, format)
        ignored = unquantized_layers(model)
    schemes = {name: layer.scheme for name, layer in layers.items()}
    return quantization_entry(by_layer, schemes, ignored, kv_cache_scheme(model, by_layer))


def quantization_entry(
    by_layer: Mapping[str, str],
    schemes: Mapping[str, Scheme],
    ignored: Sequence[str],
    kv_cache: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The ``quantization_config`` of layers by their formats and schemes, see `Format.config`."""
    groups: dict[tuple[str, Scheme], list[str]] = {}
    for name, format in by_layer.items():
        groups.setdefault((format, schemes[name]), []).append(name)
    writer = formats.find(next(iter(by_layer.values())))
    return writer.config([Group(*key, tuple(names)) for key, names in groups.items()], ignored, kv_cache)


def write_config(model: Any, directory: Path, quantization: Mapping[str, Any], served: str) -> None:
    """Write ``config.json``, and of a transformers model ``generation_config.json``; `served` is the dtype's name."""
    if hasattr(model, "config") and hasattr(model.config, "save_pretrained"):
        config: Any = copy.deepcopy(model.config)
        config.dtype = served
        # fully_shard has put a class of its own before the model's.
        config.architectures = [next(kind.__name__ for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))]
        config.quantization_config = quantization
        config.save_pretrained(directory)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(directory)
    else:
        content = {"dtype": served, "quantization_config": quantization}
        (directory / "config.json").write_text(json.dumps(content, indent=2))
