"""The masters on disk, tensor by tensor: of a transformers folder, of ``torch.save``, of a distributed checkpoint.

Files are read and not mapped, so that none of their pages count as this process's memory.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class Stored:
    """A tensor on disk. `path` is the file that changes when it does."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> Tensor:
        """Its rows from `start` to `stop` along the first dimension, on the CPU; of a scalar it is the one row."""
        raise NotImplementedError


@dataclass(frozen=True)
class Span(Stored):
    """A tensor whose bytes stand one after another in a file, from `offset`: of safetensors, or of ``torch.save``."""

    offset: int

    def rows(self, start: int, stop: int) -> Tensor:
        width = math.prod(self.shape[1:])
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        size = (stop - start) * width * self.dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=self.dtype)
        found = bytearray(size)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * width * self.dtype.itemsize)
            view = memoryview(found)
            while view:
                count = file.readinto(view)
                if not count:
                    raise OSError(f"{self.path} ends within a tensor: it was truncated while it was read")
                view = view[count:]
        return torch.frombuffer(found, dtype=self.dtype).view(shape)


@dataclass(frozen=True)
class Distributed(Stored):
    """The tensor `key` of a ``torch.distributed.checkpoint`` folder, of whose shards `path` knows. It is read whole."""

    key: str

    def rows(self, start: int, stop: int) -> Tensor:
        whole = _distributed(self)
        return whole[start:stop].clone() if self.shape else whole.clone()


@dataclass(frozen=True)
class Part(Stored):
    """Some rows of one matrix of a stacked tensor ``[E, N, K]``, or ``[E, K, N]`` if it is `transposed`."""

    stacked: Stored
    number: int
    cut: slice = field(hash=False)
    transposed: bool

    def rows(self, start: int, stop: int) -> Tensor:
        matrix = self.stacked.rows(self.number, self.number + 1)[0]
        return (matrix.mT if self.transposed else matrix)[self.cut][start:stop].contiguous()


@functools.lru_cache(maxsize=1)
def _distributed(stored: Distributed) -> Tensor:
    """The tensor read last, so that its rows are asked for at no cost."""
    from torch.distributed import checkpoint

    found = torch.empty(stored.shape, dtype=stored.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is asked for
        try:
            reader = checkpoint.FileSystemReader(stored.path.parent)
            checkpoint.load({stored.key: found}, storage_reader=reader, no_dist=True)
        except (Exception, checkpoint.CheckpointException) as error:  # the latter, of several ranks, is none
            failures = getattr(error, "failures", None) or {0: (error, None)}
            first = _first_line(next(iter(failures.values()))[0])
            raise OSError(f"cannot read {stored.key} of {stored.path.parent}: {first}") from error
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def release() -> None:
    """Let go of what is kept of a distributed checkpoint: the tensor read last."""
    _distributed.cache_clear()


def stored_tensors(source: Path) -> dict[str, Stored]:
    """The tensors that a folder or a file of masters stores, by name; none of them is read.

    Raises:
        ValueError: it is no folder of safetensors files or of ``torch.distributed.checkpoint``, and no file of
            ``torch.save``; a file of it is missing, truncated or of another kind; its index maps no tensors to files.
    """
    if source.is_file():
        return _of_torch_save(source)
    if (source / ".metadata").is_file():
        return _of_distributed(source)
    if not source.is_dir():
        raise ValueError(
            f"{source} is not there: give a transformers folder, a .ckpt file or a distributed checkpoint."
        )
    if (source / "model.safetensors").is_file():  # which transformers reads even where there is an index too
        paths, weight_map = [source / "model.safetensors"], {}
    elif (source / INDEX).is_file():
        weight_map = read_weight_map(source / INDEX)
        paths = sorted({source / name for name in weight_map.values()})
    else:
        check_no_adapter(source)
        held = ", ".join(sorted(path.name for path in source.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"{source} has no model.safetensors and no {INDEX} (it holds {held}): save the model with "
            "save_pretrained, or give a .ckpt file."
        )
    found: dict[str, Stored] = {}
    for path in paths:
        found |= _of_safetensors(path)
    if lost := [name for name in weight_map if name not in found]:
        raise ValueError(f"{source / INDEX} lists {lost[0]}, which no file holds.")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. ValueError if it cannot be read or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object, but {json.dumps(content)[:40]}.")
    return content


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says. ValueError if it says none."""
    content = read_json(index)
    found = content.get("weight_map")
    if not isinstance(found, dict) or not found:
        said = "has no weight_map" if found is None else f"has a weight_map of {json.dumps(found)[:40]}"
        raise ValueError(f"{index} {said}, which names the file of each tensor: it is damaged, or another file's.")
    if odd := [name for name, file in found.items() if not isinstance(file, str)]:
        raise ValueError(f"{index}: weight_map has {json.dumps(found[odd[0]])[:40]} for {odd[0]}, which is no file.")
    return found


def check_no_adapter(folder: Path) -> None:
    """ValueError if `folder` has no model, but an adapter of peft."""
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(
            f"{folder} is an adapter of peft, for {base or 'a model that it does not name'}, and no model: merge it "
            "(merge_and_unload) and save that, or give the folder of the base model."
        )


def _of_safetensors(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, "pt"):  # which compares the header with the file's size
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing, truncated or no safetensors file: {error}.") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    if odd := [name for name, entry in header.items() if entry["dtype"] not in TYPES]:
        raise ValueError(f"{path}: {odd[0]} is {header[odd[0]]['dtype']}: masters are {', '.join(TYPES)}.")
    return {
        name: Span(path, TYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _of_torch_save(path: Path) -> dict[str, Stored]:
    """The tensors of the ``state_dict`` of a Lightning checkpoint, or of a file that is a state dict itself."""
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # what torch raises differs by what the file is
        what = "a file of torch.save with tensors and plain data"
        raise ValueError(f"cannot read {path} as {what}: {_first_line(error)}") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no state_dict with tensors.")
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if start is None or not tensor.is_contiguous():
            how = "not contiguous" if start is not None else "in the format of torch before 1.6"
            raise ValueError(f"{path}: {name} is stored {how}: save it again, as a contiguous tensor.")
        offset = start + tensor.storage_offset() * tensor.element_size()
        found[name] = Span(path, tensor.dtype, tuple(tensor.shape), offset)
    return found


def _of_distributed(folder: Path) -> dict[str, Stored]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    path = folder / ".metadata"
    try:
        metadata = FileSystemReader(folder).read_metadata()
        entries = metadata.state_dict_metadata
        ends: dict[str, int] = {}
        for place in (metadata.storage_data or {}).values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    except Exception as error:  # it is unpickled: what that raises differs by what the file is
        raise ValueError(f"cannot read {path} as that of torch.distributed.checkpoint: {_first_line(error)}") from error
    for name, end in sorted(ends.items()):
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size is None or size < end:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise ValueError(f"{folder / name} {found}, {path.name} knows of {end:,} in it: it was not saved whole.")
    return {
        name: Distributed(path, entry.properties.dtype, tuple(entry.size), name)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
