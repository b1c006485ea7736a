"""Bases for adapters that train in mode ``frozen-grid``: made of a prepared model or of an exported folder, and saved.

What is served is the folder of the base, as it is, and the adapter that peft saves beside it: see `lockstep.qat.lora`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.export import formats, hub
from lockstep.export.checkpoint import Checkpoint, CheckpointError
from lockstep.export.checks import checked
from lockstep.export.config import quantization_entry
from lockstep.export.directory import ExportError, replacing
from lockstep.export.files import Shards, parse_bytes, write_card, write_folder
from lockstep.export.legality import check_exportable, check_measured
from lockstep.export.served import (
    kv_cache_scheme,
    quantized_layers,
    served_state,
    served_tensor,
    stored_as,
    unquantized_layers,
)
from lockstep.qat.frozen import FrozenLinear
from lockstep.qat.prepare import quantized_experts, unwrapped
from lockstep.scheme import Scheme


def freeze(model: nn.Module, format: str | None = None) -> nn.Module:
    """Give each prepared layer of `model` its packed weight in the place of its master, for good, and return `model`.

    Each layer becomes a `FrozenLinear` as it leaves (C3: the words are read back and compared with what it trained
    with), one at a time; the other parameters are rounded to the served dtype, as an export does. Nothing of the base
    trains from now on.

    Args:
        model: a prepared model, without adapters: of one with them, `lockstep.qat.lora.merged` gives the model to save,
            and `load_frozen` the folder back.
        format: as in `lockstep.export.save_pretrained`.

    Raises:
        ExportError: what an export would be refused for; experts, which are not frozen here.
        ValueError: an unknown format.
    """
    model = unwrapped(model)
    if experts := [name for name, _ in quantized_experts(model)]:
        raise ExportError(f"{experts[0]}: experts are not trained frozen by this version: name them in ignore.")
    check_exportable(model, format)
    check_measured(model)
    layers: dict[str, Any] = quantized_layers(model)
    by_layer = stored_as(layers, format)
    scheme = next(iter(layers.values())).scheme
    state = served_state(model)
    # All words before any layer changes: layers that engines fuse share a scale.
    frozen = {}
    for name, layer in layers.items():
        stored = checked(name, layer, by_layer[name])
        frozen[name] = _frozen(name, layer.scheme, by_layer[name], stored, layer.bias, layer)
    for name, one in frozen.items():
        model.set_submodule(name, one)
    for key, parameter in model.named_parameters():
        if key in state:
            parameter.data = served_tensor(model, key, parameter.data, scheme)
    return model.requires_grad_(False)


def load_frozen(directory: str | Path, model: nn.Module | None = None, device: str = "cpu") -> Any:
    """An exported folder as a base for adapters: its words and scales as they are stored, nothing dequantized.

    The model is built on the ``meta`` device and filled a layer at a time, of which each is unpacked once to check it.

    Args:
        directory: a folder of `lockstep.export.save_pretrained`, or another one that `Checkpoint` reads.
        model: the module tree, on the ``meta`` device; by default ``AutoModelForCausalLM`` of the folder's config.
        device: where the tensors go.

    Returns:
        The model, in eval mode; no parameter of it trains.

    Raises:
        CheckpointError: see `Checkpoint`; a tensor that the model has no place for, or one that it lacks.
    """
    stored = Checkpoint(directory)
    if stored.kv_cache is not None:
        raise CheckpointError(f"{directory} declares a quantized KV cache, which no frozen base trains with.")
    model = _from_config(directory) if model is None else model
    modules = dict(model.named_modules())
    for name in stored.layers:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(f"{directory} stores {name}, where {type(model).__name__} has no nn.Linear.")
        model.set_submodule(name, _frozen_of(stored, name, linear, device))
    quantized = tuple(f"{name}." for name in stored.layers)
    places = model.state_dict(keep_vars=True)
    for key in stored.plain_tensors():
        if key.startswith(quantized):
            continue  # biases
        if key not in places:
            raise CheckpointError(f"{directory} stores {key}, for which {type(model).__name__} has no place.")
        tensor, owner = stored.tensor(key), model.get_submodule(key.rpartition(".")[0])
        leaf = key.rpartition(".")[2]
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor.to(device), requires_grad=False)
        else:
            owner._buffers[leaf] = tensor.to(device)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise CheckpointError(f"{directory} has no tensor {name}.")
    if hasattr(model, "name_or_path"):
        model.name_or_path = str(directory)  # type: ignore[assignment]  # what peft writes beside an adapter
    return model.to(device).requires_grad_(False).eval()


def save_frozen(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Save the frozen base of `model`: the folder that `lockstep.export.save_pretrained` had written, byte for byte.

    Args:
        model: a model with `FrozenLinear` layers, without adapters (``peft_model.unload()``).
        directory: where to write.
        tokenizer: saved along.
        max_shard_size: see `lockstep.export.save_pretrained`.
        overwrite: replace an earlier export.

    Raises:
        ExportError: there is no frozen layer, or an adapter is around one; see `directory.replacing`.
    """
    layers = {name: one for name, one in model.named_modules() if isinstance(one, FrozenLinear)}
    if not layers:
        raise ExportError(f"no layer of this {type(model).__name__} is frozen: see load_frozen and freeze.")
    if wrapped := [name for name in layers if name.endswith(".base_layer")]:
        raise ExportError(f"{wrapped[0]} has an adapter around it: save it with peft, and the base without adapters.")
    limit = parse_bytes(max_shard_size, "max_shard_size")
    with replacing(directory, overwrite) as incomplete:
        shards = Shards(incomplete, limit, "shard")
        for name, tensor in _tensors(model, layers):
            shards.add(name, tensor)
        served = next(iter(layers.values())).scheme.weights.served_dtype
        write_folder(model, incomplete, shards.written(), _quantization_config(model, layers), served, tokenizer)
        write_card(model, incomplete, directory)
    return Path(directory).absolute()


def _tensors(model: nn.Module, layers: Mapping[str, FrozenLinear]) -> Iterator[tuple[str, Tensor]]:
    """What is stored, by the names that engines know."""
    for key, tensor in served_state(model).items():
        owner, _, leaf = key.rpartition(".")
        if owner in layers:
            yield f"{hub.layer_name(model, owner)}.{leaf}", tensor
        else:
            yield from hub.stored_tensors(model, key, tensor).items()


def _frozen(
    name: str, scheme: Scheme, format: str, stored: dict[str, Tensor], bias: Tensor | None, linear: nn.Linear
) -> FrozenLinear:
    inputs = scheme.activations
    input_scale = stored.pop(inputs.scale_name, None) if inputs is not None and inputs.stores_scale else None
    served = None if bias is None else bias.detach().to(scheme.weights.served_dtype)
    return FrozenLinear(
        {suffix: tensor.contiguous() for suffix, tensor in stored.items()},
        formats.find(format).read,
        scheme,
        (linear.out_features, linear.in_features),
        served,
        input_scale,
        name,
        format,
    ).train(linear.training)


def _frozen_of(stored: Checkpoint, name: str, linear: nn.Linear, device: str) -> FrozenLinear:
    """The layer `name` of a folder, checked."""
    shape = tuple(stored.layer(name).codes.shape)
    if shape != (linear.out_features, linear.in_features):
        found = (linear.out_features, linear.in_features)
        raise CheckpointError(f"{name} is stored with N, K = {shape}, the model has {found}.")
    scheme, format = stored.scheme_of(name), stored.format_of(name)
    tensors = {key: stored.tensor(f"{name}.{key}").to(device) for key in formats.find(format).tensors(scheme.weights)}
    if (scale := stored.stored_scale(name)) is not None:
        tensors[scheme.activations.scale_name] = scale.to(device)  # type: ignore[union-attr]
    bias = None if linear.bias is None else stored.tensor(f"{name}.bias").to(device)
    return _frozen(name, scheme, format, tensors, bias, linear)


def _from_config(directory: str | Path) -> Any:
    """The model of a folder's config with parameters on ``meta``, and real buffers: they are computed, not stored."""
    from accelerate import init_empty_weights  # which peft brings along
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    del config.quantization_config
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _quantization_config(model: nn.Module, layers: Mapping[str, FrozenLinear]) -> dict[str, Any]:
    named = {hub.layer_name(model, name): layer for name, layer in layers.items()}
    by_layer = {name: layer.format for name, layer in named.items()}
    schemes = {name: layer.scheme for name, layer in named.items()}
    return quantization_entry(by_layer, schemes, unquantized_layers(model), kv_cache_scheme(model, by_layer))
