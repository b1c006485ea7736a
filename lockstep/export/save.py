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
from lockstep.export.checkpoint import bitwise_equal
from lockstep.export.directory import ExportError, replacing
from lockstep.qat.linear import QATLinear
from lockstep.qat.prepare import unwrapped
from lockstep.scheme import Scheme, dtype_name

# Engines run these as one layer, so they must be quantized alike.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def stream(model: nn.Module, format: str = "pack-quantized") -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, tensor)`` of everything the engine loads, one layer at a time, without a second copy of the model.

    Quantized layers come in the format's tensors (see `pack_quantized`, `gptq`, `marlin`), everything else in the
    served dtype under the model's own keys. Tensors are on the model's device; plain ones may share its memory.

    Raises:
        ExportError: `check_exportable` refuses the model, a tensor is on ``meta``, a value is NaN or infinite, or a
            layer's words do not give back the weight that it trained with.
    """
    model = unwrapped(model)
    check_exportable(model, format)
    scheme, layers = _layers(model)
    layout = formats.find(format)
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    for key, tensor in served_state(model).items():
        if tensor.is_meta:
            raise ExportError(f"{key} is on the meta device: load weights into the model first.")
        if isinstance(tensor, DTensor) or (key in parameters and not tensor.numel()):
            raise ExportError(f"{key} is sharded over ranks: this version exports whole models only.")
        owner, _, leaf = key.rpartition(".")
        if leaf == "weight" and owner in layers:
            _check_finite(key, tensor)
            for suffix, packed in _pack(owner, tensor, layout, scheme).items():
                yield f"{owner}.{suffix}", packed
        else:
            served = served_tensor(model, key, tensor, scheme)
            if key in parameters:  # buffers may hold an infinity on purpose, as masks do
                _check_finite(key, served)
            yield key, served


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    format: str = "pack-quantized",
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Save a prepared model as the checkpoint folder that vLLM, SGLang and transformers load.

    Writes ``config.json`` with its ``quantization_config``, the generation config, the tokenizer if one is given, and
    safetensors shards. The folder appears whole or not at all, and replaces an earlier export in one step.

    Args:
        model: a model that `lockstep.prepare` has prepared; transformers models bring their config.
        directory: a new or empty directory, or an earlier export with `overwrite`.
        format: ``"pack-quantized"``, ``"gptq"`` or ``"marlin"``.
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
    limit = _bytes(max_shard_size)
    with replacing(directory, overwrite) as incomplete:
        try:
            _write_shards(stream(model, format), incomplete, limit)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        _write_config(model, incomplete, format)
        if tokenizer is not None:
            tokenizer.save_pretrained(incomplete)
    return Path(directory).absolute()


def check_exportable(model: nn.Module, format: str) -> None:
    """Refuse what could not be written or served, before anything is written.

    Raises:
        ExportError: nothing is prepared; the engine would round the scales again; a layer does not fit the format or
            the kernel; projections that engines fuse are not quantized alike; a quantized layer shares its weight with
            one that is not.
        ValueError: an unknown format.
    """
    layout = formats.find(format)
    scheme, layers = _layers(model)
    spec = scheme.weights
    if spec.scale_dtype != spec.served_dtype:
        raise ExportError(
            f"the engine holds scales in the served dtype {spec.served_dtype} and would round the "
            f"{spec.scale_dtype} ones that were trained with: choose the same dtype for both."
        )
    state = served_state(model)
    if odd := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise ExportError(f"{odd[0]} is a {type(state[odd[0]]).__name__}: a checkpoint holds tensors only.")
    if experts := [key for key, value in state.items() if "experts" in key and value.ndim == 3]:
        raise ExportError(f"{experts[0]}: this version does not store fused experts under the names that engines load.")
    _check_tied(model, layers)
    if lost := [name for name in layers if f"{name}.weight" not in state]:
        raise ExportError(f"{lost[0]} has no {lost[0]}.weight in the state dict (pruned, or parametrized?).")
    for name, layer in layers.items():
        if problem := layout.problem(layer.out_features, layer.in_features, spec):
            raise ExportError(f"{name} cannot be stored as {format}: {problem}. Name it in ignore, or choose a format.")
    _check_fused(model, layers)


def served_tensor(model: nn.Module, key: str, tensor: Tensor, scheme: Scheme) -> Tensor:
    """An unquantized tensor as it is served: floats in the served dtype, but for those that the model keeps in fp32."""
    keep = (*(getattr(model, "_keep_in_fp32_modules", None) or ()),)
    keep += (*(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),)
    if not tensor.is_floating_point() or any(re.search(rf"(^|\.){part}(\.|$)", key) for part in keep):
        return tensor.detach()
    return tensor.detach().to(scheme.weights.served_dtype)


def _layers(model: nn.Module) -> tuple[Scheme, dict[str, QATLinear]]:
    named = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in named if isinstance(module, QATLinear)}
    if not layers:
        raise ExportError(f"no layer of this {type(model).__name__} is prepared: call lockstep.prepare first.")
    (scheme,) = {layer.scheme for layer in layers.values()}
    return scheme, layers


def served_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the keys that transformers ties to others when it loads."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {key: tensor for key, tensor in model.state_dict().items() if key not in tied}


def _pack(name: str, weight: Tensor, layout: formats.Format, scheme: Scheme) -> dict[str, Tensor]:
    spec = scheme.weights
    weight = weight.detach()
    kernel = kernels.training(spec, weight.device)
    tensors = layout.pack(weight, spec, kernel)
    served = grid.dequantize(layout.read(tensors, spec), spec)
    _check_finite(f"{name}.weight, as it is served", served)
    if not bitwise_equal(served, kernel.fake_quantize(weight, spec)):
        raise ExportError(
            f"{name}: the packed words do not give back the weight that it trained with. Nothing is written."
        )
    return tensors


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ExportError(
            f"{name}: {bad} of {tensor.numel()} values are NaN or infinite in {dtype_name(tensor.dtype)}."
        )


def _check_fused(model: nn.Module, layers: dict[str, QATLinear]) -> None:
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in linear:
        leaf = name.rpartition(".")[2]
        parent = name.removesuffix(leaf)
        for parts in FUSED:
            siblings = [parent + part for part in parts if leaf in parts and parent + part in linear]
            plain = [sibling for sibling in siblings if sibling not in layers]
            if plain and len(plain) < len(siblings):
                raise ExportError(
                    f"{plain[0]} is not quantized, but engines run {', '.join(siblings)} as one layer: "
                    "ignore all or none."
                )


def _check_tied(model: nn.Module, layers: dict[str, QATLinear]) -> None:
    weights = {id(layer.weight): name for name, layer in layers.items()}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        owner = key.rpartition(".")[0]
        if owner not in layers and (name := weights.get(id(parameter))):
            raise ExportError(
                f"{name} trains quantized but shares its weight with {owner}, which does not: an engine would tie the "
                f"two and serve one of them otherwise than it trained. Name {name} in ignore, or untie them."
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


def quantization_config(model: nn.Module, format: str) -> dict[str, Any]:
    """What ``config.json`` says of the quantization of a prepared `model`, in the words of `format`."""
    scheme, layers = _layers(model)
    modules = model.named_modules(remove_duplicate=False)
    ignored = [name for name, module in modules if isinstance(module, nn.Linear) and name not in layers]
    return formats.find(format).config(scheme, list(layers), ignored)


def _write_config(model: Any, directory: Path, format: str) -> None:
    scheme, _ = _layers(model)
    quantization = quantization_config(model, format)
    if hasattr(model, "config") and hasattr(model.config, "save_pretrained"):
        config: Any = copy.deepcopy(model.config)
        config.dtype = dtype_name(scheme.weights.served_dtype)
        config.architectures = [type(model).__name__]
        config.quantization_config = quantization
        config.save_pretrained(directory)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(directory)
    else:
        content = {"dtype": dtype_name(scheme.weights.served_dtype), "quantization_config": quantization}
        (directory / "config.json").write_text(json.dumps(content, indent=2))


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", str(size).upper()) or re.fullmatch(r"(\d+)()", str(size))
    if match is None or float(match[1]) == 0:
        raise ValueError(f"max_shard_size={size!r}: give bytes, or a string such as '500MB' or '5GB'.")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))
