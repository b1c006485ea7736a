"""The files of an exported folder: shards of tensors, their index, configs, tokenizer and model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lockstep.export import card
from lockstep.export.config import write_config
from lockstep.export.masters import INDEX
from lockstep.qat.prepare import unwrapped
from lockstep.scheme import dtype_name

Shard = tuple[str, list[str], int]  # the file, the tensors in it, their bytes


class Shards:
    """Tensors on their way into files of at most `limit` bytes, which are called ``LABEL-0`` and so on."""

    def __init__(self, directory: Path, limit: int, label: str) -> None:
        self._directory, self._limit, self._label = directory, limit, label
        self._files: list[Shard] = []
        self._tensors: dict[str, Tensor] = {}
        self._memory: set[int] = set()  # where they are
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor. OSError if a file that is full now cannot be written."""
        tensor = tensor.cpu()
        size = tensor.numel() * tensor.element_size()
        if self._tensors and self._bytes + size > self._limit:
            self._flush()
        # A copy of its own where two names share memory, which safetensors does not store.
        shared = tensor.untyped_storage().data_ptr() in self._memory
        tensor = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        self._tensors[name] = tensor
        self._memory.add(tensor.untyped_storage().data_ptr())
        self._bytes += size

    def written(self) -> list[Shard]:
        """All files, when all tensors are added. OSError if one could not be written."""
        if self._tensors:
            self._flush()
        return self._files

    def _flush(self) -> None:
        file = f"{self._label}-{len(self._files)}"
        try:
            save_file(self._tensors, self._directory / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        self._files.append((file, list(self._tensors), self._bytes))
        self._tensors, self._memory, self._bytes = {}, set(), 0


def write_folder(
    model: Any,
    directory: Path,
    shards: Sequence[Shard],
    quantization: Mapping[str, Any],
    served: torch.dtype,
    tokenizer: Any = None,
) -> None:
    """Give the files of `shards` their names, and write what else belongs in the folder of a model: index and configs.

    Args:
        model: without wrappers.
        directory: where the files are.
        shards: in the order of the tensors.
        quantization: see `quantization_config`.
        served: the dtype that the engine computes in.
        tokenizer: saved along.
    """
    weight_map: dict[str, str] = {}
    for (written, names, _), file in zip(shards, file_names(len(shards)), strict=True):
        if written != file:
            (directory / written).rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size for *_, size in shards)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2))
    write_config(model, directory, quantization, dtype_name(served))
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def file_names(count: int) -> list[str]:
    """What transformers calls the `count` files of a model's tensors."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_card(
    model: nn.Module,
    written: Path,
    directory: str | Path,
    trained: str = "",
    reasons: Mapping[str, str] | None = None,
) -> None:
    """The card of the export in `written`, which is to be called `directory`."""
    base = str(getattr(unwrapped(model), "name_or_path", ""))
    card.write(written, name=Path(directory).absolute().name, base_model=base, trained=trained, reasons=reasons)


def parse_bytes(size: int | str, what: str) -> int:
    """Bytes, or a string such as ``"500MB"`` (decimal units). ValueError, with the name `what`, for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", str(size).upper()) or re.fullmatch(r"(\d+)()", str(size))
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{what}={size!r}: give bytes, or a string such as '500MB' or '5GB'.")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))
