"""The checkpoint formats by name. A format is a module with the functions of `Format`: adding one is adding a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from lockstep.export import gptq, marlin, pack_quantized
from lockstep.grid import Quantized
from lockstep.kernels import Quantizer
from lockstep.scheme import Scheme, TensorSpec


class Format(Protocol):
    """How one layer is stored, and how ``config.json`` says so."""

    @property
    def TENSORS(self) -> tuple[str, ...]: ...

    def problem(self, n: int, k: int, spec: TensorSpec) -> str | None: ...

    def write(self, quantized: Quantized, spec: TensorSpec) -> dict[str, Tensor]: ...

    def pack(self, weight: Tensor, spec: TensorSpec, kernel: Quantizer) -> dict[str, Tensor]: ...

    def read(self, tensors: Mapping[str, Tensor], spec: TensorSpec) -> Quantized: ...

    def config(self, scheme: Scheme, quantized: Sequence[str], ignored: Sequence[str]) -> dict[str, Any]: ...

    def scheme(self, config: Mapping[str, Any]) -> Scheme: ...


FORMATS: dict[str, Format] = {"pack-quantized": pack_quantized, "gptq": gptq, "marlin": marlin}


def find(name: str) -> Format:
    """The format called `name`. Raises ValueError if there is none."""
    if name not in FORMATS:
        raise ValueError(f"no export format {name!r}: there are {', '.join(FORMATS)}.")
    return FORMATS[name]


def declared(config: Mapping[str, Any]) -> str:
    """The name of the format that a ``quantization_config`` declares. Raises ValueError if it is none of ours."""
    method = config.get("quant_method")
    name = config.get("format") if method == "compressed-tensors" else method
    if name not in FORMATS or (method == "gptq" and config.get("checkpoint_format", "gptq") != "gptq"):
        raise ValueError(
            f"quant_method={method!r}, format={config.get('format') or config.get('checkpoint_format')!r}: "
            f"this version reads {', '.join(FORMATS)}."
        )
    return name
