"""Read a quantized checkpoint back: its scheme, and the codes and scales of each layer, from the stored words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lockstep.export import compressed_tensors, formats
from lockstep.export.groups import Group
from lockstep.grid import Quantized
from lockstep.scheme import DTYPES, KVCacheSpec, Scheme, TensorSpec, dtype_name


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or contradicts itself; the message names the file or the tensor."""


class Checkpoint:
    """A quantized model folder, read lazily: tensors are loaded when asked for.

    Attributes:
        format: the name that ``config.json`` declares: one in `formats.FORMATS`, or ``"mixed-precision"``.
        layers: names of the modules that are stored quantized.
        kv_cache: how keys and values are stored in the engine's cache, or None: as they are.

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
        self._files = tensor_files(self.directory)
        try:
            dtype = DTYPES[self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"]
            self.format, groups = formats.declared(quantization, dtype)
            self.kv_cache: KVCacheSpec | None = compressed_tensors.kv_cache(quantization)
            markers = {"." + _tensors(group)[0] for group in groups}
            names = {
                name.removesuffix(marker): None for name in self._files for marker in markers if name.endswith(marker)
            }
            self._groups = compressed_tensors.layers_of(groups, [*names])
            self._declared = groups
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.directory}/config.json, quantization_config: {error}") from error
        self.layers = tuple(self._groups)
        if not self.layers:
            raise CheckpointError(
                f"{self.directory}/config.json declares {self.format}, but no tensor is called "
                f"*{' or *'.join(sorted(markers))}."
            )

    @property
    def scheme(self) -> Scheme:
        """The scheme of all layers. CheckpointError if they have several: see `scheme_of`."""
        schemes = tuple(dict.fromkeys(group.scheme for group in self._declared))
        if len(schemes) > 1:
            raise CheckpointError(
                f"{self.directory} holds {len(schemes)} schemes, {' and '.join(map(str, schemes))}: ask for a layer's."
            )
        return schemes[0]

    def scheme_of(self, name: str) -> Scheme:
        """The scheme of the layer `name`. CheckpointError if it is not stored quantized."""
        return self._group(name).scheme

    def format_of(self, name: str) -> str:
        """The name of the format that stores the layer `name`. CheckpointError if it is not stored quantized."""
        return self._group(name).format

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
        """Names of the stored tensors that are neither a quantized layer's weight nor its input scale."""
        packed = {f"{layer}.{suffix}" for layer, group in self._groups.items() for suffix in _tensors(group)}
        packed |= {
            f"{layer}.{group.scheme.activations.scale_name}"
            for layer, group in self._groups.items()
            if group.scheme.activations is not None and group.scheme.activations.stores_scale
        }
        return tuple(name for name in self._files if name not in packed)

    def stored_scale(self, name: str) -> Tensor | None:
        """The measured scale of the inputs of the layer `name`, fp32 ``[1]``, or None if its scheme has none.

        Raises:
            CheckpointError: it is not stored, or is no positive number.
        """
        inputs = self.scheme_of(name).activations
        if inputs is None or not inputs.stores_scale:
            return None
        if f"{name}.{inputs.scale_name}" not in self._files:
            raise CheckpointError(f"{name}: {inputs.scale_name} not stored, but the config declares {inputs} inputs.")
        scale = self.tensor(f"{name}.{inputs.scale_name}")
        if scale.numel() != 1 or not (scale.isfinite() & (scale > 0)).all():
            raise CheckpointError(f"{name}: {inputs.scale_name} is {scale.tolist()}, not one positive number.")
        if self._ours and scale.dtype != torch.float32:
            raise CheckpointError(f"{name}: {inputs.scale_name} is {dtype_name(scale.dtype)}, stored are float32 ones.")
        return scale.float().reshape(1)

    def layer(self, name: str) -> Quantized:
        """The layer `name`, unpacked from its words: codes ``[N, K]``, scales ``[R, G]``, and what else its grid has.

        Raises:
            CheckpointError: the layer is not stored quantized, or its tensors contradict each other or the config.
        """
        group = self._group(name)
        layout, spec = formats.find(group.format), group.scheme.weights
        stored = {suffix: self.tensor(f"{name}.{suffix}") for suffix in layout.tensors(spec)}
        try:
            quantized = layout.read(stored, spec)
            problem = _contradiction(quantized, stored, spec)
        except (ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
            shapes = ", ".join(f"{suffix} {list(tensor.shape)}" for suffix, tensor in stored.items())
            raise CheckpointError(f"{name}: {shapes} do not unpack as {group.format}: {error}") from error
        if problem:
            raise CheckpointError(f"{name}: {problem}.")
        if self._ours:  # others write some of these in dtypes of their own
            for suffix, tensor in layout.write(quantized, spec).items():
                if not bitwise_equal(tensor, stored[suffix]):
                    found = f"{list(stored[suffix].shape)} {dtype_name(stored[suffix].dtype)}"
                    raise CheckpointError(
                        f"{name}: {suffix} is {found}, and not what {group.format} holds for these codes."
                    )
        return quantized

    @property
    def _ours(self) -> bool:
        return "lockstep" in self.config["quantization_config"]

    def _group(self, name: str) -> Group:
        """The group of a layer all of whose tensors are stored."""
        group = self._groups.get(name, self._declared[0])
        missing = [suffix for suffix in _tensors(group) if f"{name}.{suffix}" not in self._files]
        if missing:
            plain = f"{name}.weight" in self._files
            found = f"a plain weight in {dtype_name(self.tensor(f'{name}.weight').dtype)}" if plain else "no weight"
            raise CheckpointError(f"{name}: {', '.join(missing)} not stored, found {found}.")
        return group


def _tensors(group: Group) -> tuple[str, ...]:
    return formats.find(group.format).tensors(group.scheme.weights)


def _contradiction(quantized: Quantized, stored: Mapping[str, Tensor], spec: TensorSpec) -> str | None:
    (n, k), scale = quantized.codes.shape, quantized.scale
    if "weight_shape" in stored and stored["weight_shape"].tolist() != [n, k]:
        return f"weight_shape says {stored['weight_shape'].tolist()}, the words hold {[n, k]}"
    shape = spec.scale_shape(n, k)
    zeros = quantized.zero_point
    if zeros is not None and tuple(zeros.shape) != shape:
        return f"zero points are {list(zeros.shape)}, scales {list(shape)}"
    if tuple(scale.shape) == shape:
        if scale.dtype == spec.scale_dtype:
            return None
        return f"scales are stored in {dtype_name(scale.dtype)}, the config declares {dtype_name(spec.scale_dtype)}"
    if tuple(scale.shape) == shape[::-1]:
        return f"scales are transposed: {list(scale.shape)} instead of {list(shape)}"
    found = f"groups of {k // scale.shape[1]}" if scale.shape[0] == n and k % scale.shape[1] == 0 else "neither"
    declared = f"groups of {spec.group_size}" if spec.group_size else f"one scale a {spec.strategy}"
    return f"config.json declares {declared} (scales {list(shape)}), stored are {list(scale.shape)}, {found}"


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bits: unlike ``torch.equal``, tells -0 from 0 and finds a NaN equal to itself."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    as_integers = (tensor.contiguous().view(integers[tensor.element_size()]) for tensor in (a, b))
    return torch.equal(*as_integers)


def same_bits(a: Quantized, b: Quantized) -> bool:
    """`bitwise_equal` of all that two quantized weights have."""
    pairs = zip(a, b, strict=True)
    return all(x is y if x is None or y is None else bitwise_equal(x, y) for x, y in pairs)


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


def tensor_files(directory: Path) -> dict[str, Path]:
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
    if strays := sorted({*directory.glob("*.safetensors")} - {*paths}):
        raise CheckpointError(f"{strays[0]} is not in the index: a reader may take it for the model. Move it away.")
    return files
