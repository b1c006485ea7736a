"""Read a quantized checkpoint back: its scheme, and the codes and scales of each layer, from the stored words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lockstep.export import formats
from lockstep.grid import Quantized
from lockstep.scheme import DTYPES, Scheme, dtype_name


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or contradicts itself; the message names the file or the tensor."""


class Checkpoint:
    """A quantized model folder, read lazily: tensors are loaded when asked for.

    Attributes:
        scheme: what ``config.json`` declares.
        format: its name in `formats.FORMATS`.
        layers: names of the modules that are stored quantized.

    Raises:
        CheckpointError: a missing, truncated or unreadable file; a config that declares no format or scheme we know.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config = _read_json(self.directory / "config.json")
        quantization = self.config.get("quantization_config")
        if not quantization:
            raise CheckpointError(
                f"{self.directory}/config.json has no quantization_config: not a quantized checkpoint."
            )
        try:
            self.format = formats.declared(quantization)
            self._layout = formats.find(self.format)
            self.scheme: Scheme = self._layout.scheme(quantization)
            if "lockstep" not in quantization:  # somebody else's: the model's dtype is the scales' and the served one
                dtype = DTYPES[self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"]
                self.scheme = Scheme(replace(self.scheme.weights, scale_dtype=dtype, served_dtype=dtype))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.directory}/config.json, quantization_config: {error}") from error
        self._files = _tensor_files(self.directory)
        marker = "." + self._layout.TENSORS[0]
        self.layers = tuple(name.removesuffix(marker) for name in self._files if name.endswith(marker))
        if not self.layers:
            raise CheckpointError(
                f"{self.directory}/config.json declares {self.format}, but no tensor is called *{marker}."
            )

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all stored tensors."""
        return tuple(self._files)

    def tensor(self, name: str) -> Tensor:
        """The stored tensor `name`, on the CPU."""
        if name not in self._files:
            raise CheckpointError(f"{self.directory} has no tensor {name}.")
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)

    def plain_tensors(self) -> tuple[str, ...]:
        """Names of the stored tensors that belong to no quantized layer's weight."""
        packed = {f"{layer}.{suffix}" for layer in self.layers for suffix in self._layout.TENSORS}
        return tuple(name for name in self._files if name not in packed)

    def layer(self, name: str) -> Quantized:
        """Codes ``[N, K]`` and scales ``[N, G]`` of the layer `name`, unpacked from its words.

        Raises:
            CheckpointError: the layer is not stored quantized, or its tensors contradict each other or the config.
        """
        missing = [suffix for suffix in self._layout.TENSORS if f"{name}.{suffix}" not in self._files]
        if missing:
            plain = self._files.get(f"{name}.weight")
            found = f"a plain weight in {dtype_name(self.tensor(f'{name}.weight').dtype)}" if plain else "no weight"
            raise CheckpointError(f"{name}: {', '.join(missing)} not stored, found {found}.")
        spec = self.scheme.weights
        stored = {suffix: self.tensor(f"{name}.{suffix}") for suffix in self._layout.TENSORS}
        try:
            quantized = self._layout.read(stored, spec)
            problem = self._contradiction(quantized, stored)
        except (ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
            shapes = ", ".join(f"{suffix} {list(tensor.shape)}" for suffix, tensor in stored.items())
            raise CheckpointError(f"{name}: {shapes} do not unpack as {self.format}: {error}") from error
        if problem:
            raise CheckpointError(f"{name}: {problem}.")
        if "lockstep" in self.config["quantization_config"]:  # others write some of these in dtypes of their own
            for suffix, tensor in self._layout.write(quantized, spec).items():
                if not bitwise_equal(tensor, stored[suffix]):
                    found = f"{list(stored[suffix].shape)} {dtype_name(stored[suffix].dtype)}"
                    raise CheckpointError(
                        f"{name}: {suffix} is {found}, and not what {self.format} holds for these codes."
                    )
        return quantized

    def _contradiction(self, quantized: Quantized, stored: dict[str, Tensor]) -> str | None:
        spec = self.scheme.weights
        (n, k), scale = quantized.codes.shape, quantized.scale
        if "weight_shape" in stored and stored["weight_shape"].tolist() != [n, k]:
            return f"weight_shape says {stored['weight_shape'].tolist()}, the words hold {[n, k]}"
        groups = spec.num_groups(k)
        if tuple(scale.shape) == (n, groups):
            if scale.dtype == spec.scale_dtype:
                return None
            return f"scales are stored in {dtype_name(scale.dtype)}, the config declares {dtype_name(spec.scale_dtype)}"
        if tuple(scale.shape) == (groups, n):
            return f"scales are transposed: {list(scale.shape)} instead of {[n, groups]}"
        found = f"groups of {k // scale.shape[1]}" if scale.shape[0] == n and k % scale.shape[1] == 0 else "neither"
        declared = f"groups of {spec.group_size}" if spec.group_size else "one scale a channel"
        return f"config.json declares {declared} (scales {[n, groups]}), stored are {list(scale.shape)}, {found}"


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bits: unlike ``torch.equal``, tells -0 from 0 and finds a NaN equal to itself."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    as_integers = (tensor.contiguous().view(integers[tensor.element_size()]) for tensor in (a, b))
    return torch.equal(*as_integers)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return content


def _tensor_files(directory: Path) -> dict[str, Path]:
    """The file of each tensor. Every file is opened once, which finds truncated ones."""
    index_path = directory / "model.safetensors.index.json"
    weight_map = _read_json(index_path).get("weight_map", {}) if index_path.exists() else {}
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index_path}: weight_map does not map tensors to files.")
    paths = sorted({directory / name for name in weight_map.values()}) or [directory / "model.safetensors"]
    files: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is missing, truncated or no safetensors file: {error}.") from error
        for name in names:
            if weight_map and weight_map.get(name) != path.name:
                where = weight_map.get(name, "nothing of it")
                raise CheckpointError(f"{path} holds {name}, of which {index_path.name} says {where}.")
        files.update(dict.fromkeys(names, path))
    if lost := [name for name in weight_map if name not in files]:
        raise CheckpointError(f"{index_path} lists {lost[0]} and {len(lost) - 1} more, which no file holds.")
    return files
