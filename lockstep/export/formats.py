"""The checkpoint formats by name. A format is a module with the functions of `Format`: adding one is adding a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lockstep.export import (
    compressed_tensors,
    float_quantized,
    fp8,
    gptq,
    int_quantized,
    marlin,
    mxfp4_pack_quantized,
    mxfp8_quantized,
    nvfp4_pack_quantized,
    pack_quantized,
)
from lockstep.export.groups import Group
from lockstep.grid import Quantized
from lockstep.kernels import Quantizer
from lockstep.scheme import Scheme, TensorSpec


class Format(Protocol):
    """How one layer is stored, and how ``config.json`` says so."""

    @property
    def METHOD(self) -> str: ...

    def refusal(self, scheme: Scheme) -> str | None: ...

    def problem(self, n: int, k: int, scheme: Scheme) -> str | None: ...

    def tensors(self, spec: TensorSpec) -> tuple[str, ...]: ...

    def write(self, quantized: Quantized, spec: TensorSpec) -> dict[str, Tensor]: ...

    def read(self, tensors: Mapping[str, Tensor], spec: TensorSpec) -> Quantized: ...

    def config(
        self, groups: Sequence[Group], ignored: Sequence[str], kv_cache: Mapping[str, Any] | None = None
    ) -> dict[str, Any]: ...

    def groups(self, config: Mapping[str, Any], dtype: torch.dtype = ...) -> list[Group]: ...


# Of the formats that can store a scheme, the first is its own.
FORMATS: dict[str, Format] = {
    "pack-quantized": pack_quantized,
    "int-quantized": int_quantized,
    "float-quantized": float_quantized,
    "nvfp4-pack-quantized": nvfp4_pack_quantized,
    "mxfp4-pack-quantized": mxfp4_pack_quantized,
    "mxfp8-quantized": mxfp8_quantized,
    "gptq": gptq,
    "marlin": marlin,
    "fp8": fp8,
}
# What kernels quantize and pack in one pass: symmetric INT4 weights.
PACKED: dict[str, Callable[[Tensor, TensorSpec, Quantizer], dict[str, Tensor]]] = {
    "pack-quantized": pack_quantized.pack,
    "gptq": gptq.pack,
    "marlin": marlin.pack,
}
# Of the tensors of a quantized layer, those that hold its codes.
_CODES = ("weight_packed", "qweight", "B", "weight")
# Names for "each layer in the format of its own scheme".
AUTO = (None, "auto", compressed_tensors.MIXED)


def find(name: str) -> Format:
    """The format called `name`. Raises ValueError if there is none."""
    if name not in FORMATS:
        raise ValueError(f"no export format {name!r}: there are {', '.join(FORMATS)}.")
    return FORMATS[name]


def codes_of(format: str, spec: TensorSpec) -> str:
    """What the tensor is called that holds the codes of a layer stored as `format`."""
    leaves = find(format).tensors(spec)
    return next(one for one in _CODES if one in leaves)


def fitting(scheme: Scheme) -> tuple[str, ...]:
    """Names of the formats that can store `scheme`, its own first."""
    return tuple(name for name, format in FORMATS.items() if format.refusal(scheme) is None)


def declared(config: Mapping[str, Any], dtype: torch.dtype) -> tuple[str, list[Group]]:
    """The name of the format that a ``quantization_config`` declares, and its groups.

    Raises:
        ValueError, KeyError, TypeError: it is none of ours, or says what we cannot read.
    """
    method = config.get("quant_method")
    name = config.get("format") if method == compressed_tensors.METHOD else method
    ours = compressed_tensors if name == compressed_tensors.MIXED else FORMATS.get(name) if name else None
    if ours is None or method != ours.METHOD:
        raise ValueError(
            f"quant_method={method!r}, format={config.get('format')!r}: this version reads {', '.join(FORMATS)}."
        )
    groups = ours.groups(config, dtype)
    for group in groups:
        problem = find(group.format).refusal(group.scheme)
        if group.format in PACKED:
            problem = problem or pack_quantized.rounded(group.scheme.weights)
        if problem:
            raise ValueError(f"{group.scheme} is declared as {group.format}: {problem}.")
    return str(name), groups
