"""Write what was trained: stream the tensors that an engine loads, or save a checkpoint folder of them.

Every quantized layer is checked as it leaves (C3): the words, unpacked and dequantized, must be bit for bit the weight
that the training forward used.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lockstep import grid, kernels
from lockstep.export import formats
from lockstep.export.checkpoint import bitwise_equal, same_bits
from lockstep.export.directory import ExportError, replacing
from lockstep.export.groups import Group
from lockstep.export.legality import check_exportable, check_measured
from lockstep.export.served import kv_cache_scheme, quantized_layers, served_state, served_tensor, stored_as
from lockstep.grid import Quantized
from lockstep.kernels import Quantizer
from lockstep.qat import learned
from lockstep.qat.linear import QATLinear
from lockstep.qat.prepare import unwrapped
from lockstep.scheme import Scheme, dtype_name


def stream(model: nn.Module, format: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, tensor)`` of everything the engine loads, one layer at a time, without a second copy of the model.

    Quantized layers come in the tensors of their format (see `formats.FORMATS`) with their measured input scale,
    everything else in the served dtype under the model's own keys. Tensors are on the model's device; plain ones may
    share its memory.

    Args:
        model: a prepared model.
        format: a name in `formats.FORMATS`, or None or ``"auto"``: each layer in the format of its own scheme.

    Raises:
        ExportError: `check_exportable` refuses the model, a range is not measured, a tensor is on ``meta``, a value is
            NaN or infinite, or a layer's words do not give back the weight that it trained with.
        ValueError: an unknown format.
    """
    model = unwrapped(model)
    check_exportable(model, format)
    check_measured(model)
    layers = quantized_layers(model)
    by_layer = stored_as(layers, format)
    scheme = next(iter(layers.values())).scheme
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    for key, tensor in served_state(model).items():
        if tensor.is_meta:
            raise ExportError(f"{key} is on the meta device: load weights into the model first.")
        if isinstance(tensor, DTensor) or (key in parameters and not tensor.numel()):
            raise ExportError(f"{key} is sharded over ranks: this version exports whole models only.")
        owner, _, leaf = key.rpartition(".")
        if leaf == "weight" and owner in layers:
            _check_finite(key, tensor)
            for suffix, stored in _stored(owner, layers[owner], by_layer[owner]).items():
                yield f"{owner}.{suffix}", stored
        else:
            served = served_tensor(model, key, tensor, scheme)
            if key in parameters:  # buffers may hold an infinity on purpose, as masks do
                _check_finite(key, served)
            yield key, served


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    format: str | None = None,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Save a prepared `model` as a folder for vLLM, SGLang or transformers: weights, configs and tokenizer.

    The folder appears whole or not at all. The model is left as it was.

    Args:
        model: a prepared model. Of a transformers model, ``config.json`` and ``generation_config.json`` are written
            too; of any other module, a ``config.json`` with the dtype and the quantization.
        directory: where to write.
        format: a name in `formats.FORMATS`, or None or ``"auto"``: each layer in the format of its own scheme, which
            is one of compressed-tensors'. Several schemes in one model are stored so alone.
        tokenizer: anything with ``save_pretrained``. Engines need it in the folder.
        max_shard_size: bytes, or a string such as ``"500MB"`` (decimal units). The memory used is about one shard.
        overwrite: replace an earlier export.

    Returns:
        The directory's absolute path.

    Raises:
        ExportError: see `stream` and `directory.replacing`.
        ValueError: an unknown format or size.
    """
    model = unwrapped(model)
    check_exportable(model, format)
    check_measured(model)
    limit = parse_bytes(max_shard_size, "max_shard_size")
    with replacing(directory, overwrite) as incomplete:
        try:
            _write_shards(stream(model, format), incomplete, limit)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        _write_config(model, incomplete, format)
        if tokenizer is not None:
            tokenizer.save_pretrained(incomplete)
    return Path(directory).absolute()


def quantization_config(model: nn.Module, format: str | None = None) -> dict[str, Any]:
    """What ``config.json`` says of the quantization of a prepared `model`, in the words of `format`."""
    layers = quantized_layers(model)
    by_layer = stored_as(layers, format)
    modules = model.named_modules(remove_duplicate=False)
    ignored = [name for name, module in modules if isinstance(module, nn.Linear) and name not in layers]
    groups: dict[tuple[str, Scheme], list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault((by_layer[name], layer.scheme), []).append(name)
    writer = formats.find(next(iter(by_layer.values())))
    alike = [Group(*key, tuple(names)) for key, names in groups.items()]
    return writer.config(alike, ignored, kv_cache_scheme(model, by_layer))


def _stored(name: str, layer: QATLinear, format: str) -> dict[str, Tensor]:
    """The tensors of one layer, of which its weight was read back."""
    layout, scheme, spec = formats.find(format), layer.scheme, layer.scheme.weights
    weight = layer.weight.detach()
    kernel = kernels.training(scheme, weight.device)
    in_one_pass = spec.format == "int4" and spec.symmetric and learned.KEY not in layer._parameters
    quantized = None if in_one_pass else layer.quantize()
    try:
        if quantized is None:
            tensors = formats.PACKED[format](weight, spec, kernel)
        else:
            tensors = layout.write(quantized, spec)
        read = layout.read(tensors, spec)
    except ValueError as error:
        raise ExportError(f"{name} cannot be stored as {format}: {error}.") from error
    _check_finite(f"{name}.weight, as it is served", grid.dequantize(read, spec))
    if not (_is_trained(read, layer, kernel) and (quantized is None or same_bits(read, quantized))):
        raise ExportError(
            f"{name}: the packed words do not give back the weight that it trained with. Nothing is written."
        )
    scale = layer.stored_scale()
    if scale is not None and scheme.activations is not None:
        tensors[scheme.activations.scale_name] = scale.detach()
    return tensors


def _is_trained(read: Quantized, layer: QATLinear, kernel: Quantizer) -> bool:
    """Whether `read` is bit for bit what the layer's forward multiplies with."""
    spec, weight, amax = layer.scheme.weights, layer.weight.detach(), layer.amax()
    if learned.KEY in layer._parameters:
        return same_bits(read, layer.quantize())
    if layer.scheme.activations is None:
        return bitwise_equal(grid.dequantize(read, spec), kernel.fake_quantize(weight, spec, amax))
    codes, scale, *_ = kernel.quantize(weight, spec, None, amax)
    return same_bits(read, Quantized(codes, scale, read.zero_point, read.global_scale))


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ExportError(
            f"{name}: {bad} of {tensor.numel()} values are NaN or infinite in {dtype_name(tensor.dtype)}."
        )


def _write_shards(tensors: Iterable[tuple[str, Tensor]], directory: Path, limit: int) -> None:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(shard, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    filled = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and filled + size > limit:
            flush()
            filled = 0
        # A copy of its own where two names share memory, which safetensors does not store.
        memory = tensor.untyped_storage().data_ptr()
        shared = any(memory == other.untyped_storage().data_ptr() for other in shard.values())
        shard[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        filled += size
        total += size
    flush()

    if len(shards) == 1:
        (directory / "shard-0").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number}").rename(directory / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_config(model: Any, directory: Path, format: str | None) -> None:
    served = dtype_name(next(iter(quantized_layers(model).values())).scheme.weights.served_dtype)
    quantization = quantization_config(model, format)
    if hasattr(model, "config") and hasattr(model.config, "save_pretrained"):
        config: Any = copy.deepcopy(model.config)
        config.dtype = served
        config.architectures = [type(model).__name__]
        config.quantization_config = quantization
        config.save_pretrained(directory)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(directory)
    else:
        content = {"dtype": served, "quantization_config": quantization}
        (directory / "config.json").write_text(json.dumps(content, indent=2))


def parse_bytes(size: int | str, what: str) -> int:
    """Bytes, or a string such as ``"500MB"`` (decimal units). ValueError, with the name `what`, for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", str(size).upper()) or re.fullmatch(r"(\d+)()", str(size))
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{what}={size!r}: give bytes, or a string such as '500MB' or '5GB'.")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))
