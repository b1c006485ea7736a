"""``marlin``: the words and scales as the Marlin kernel reads them (`lockstep.layouts.marlin`).

For a layer ``m``: ``m.B`` int32 ``[K/16, 2N]`` (4 bits; 8 bits: ``[K/16, 4N]``) and ``m.s`` ``[G, N]``. Today's engines
build this in memory from ``pack-quantized`` or ``gptq`` and load no such folder; it serves as kernel input and for live
weight updates in kernel format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lockstep.grid import Quantized
from lockstep.kernels import Quantizer
from lockstep.layouts import marlin as layout
from lockstep.scheme import Scheme, TensorSpec

TENSORS = ("B", "s")

problem = layout.problem


def write(quantized: Quantized, spec: TensorSpec) -> dict[str, Tensor]:
    """The stored tensors of one layer by the names of `TENSORS`."""
    return {"B": layout.pack_weight(quantized.codes, spec.bits), "s": layout.pack_scales(quantized.scale)}


def pack(weight: Tensor, spec: TensorSpec, kernel: Quantizer) -> dict[str, Tensor]:
    """Quantize `weight` and `write` it, in one pass where `kernel` can."""
    return dict(zip(TENSORS, kernel.pack_marlin(weight, spec), strict=True))


def read(tensors: Mapping[str, Tensor], spec: TensorSpec) -> Quantized:
    """The codes and scales of one layer's stored tensors."""
    return Quantized(layout.unpack_weight(tensors["B"], spec.bits), layout.unpack_scales(tensors["s"]))


def config(scheme: Scheme, quantized: Sequence[str], ignored: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` for the layers `quantized`; `ignored` are the linear layers left as they are."""
    return {
        "quant_method": "marlin",
        "bits": scheme.weights.bits,
        "group_size": scheme.weights.group_size or -1,
        "modules_to_not_convert": list(ignored),
        "lockstep": scheme.provenance(),
    }


def scheme(config: Mapping[str, Any]) -> Scheme:
    """The scheme that a ``quantization_config`` of this format declares."""
    return Scheme.from_provenance(
        config.get("lockstep"), bits=config["bits"], symmetric=True, group_size=config["group_size"]
    )
