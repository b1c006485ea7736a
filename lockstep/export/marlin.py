"""``marlin``: the words and scales as the Marlin kernel reads them (`lockstep.layouts.marlin`).

For a layer ``m`` with N outputs, K inputs, G groups and b bits: ``m.B`` int32 ``[K/16, N * b / 2]``, ``m.s``
``[G, N]``, and ``m.z`` int32 ``[G, N * b / 32]``, the zero points of an asymmetric grid. Today's engines build this in
memory from ``pack-quantized`` or ``gptq`` and load no such folder; it serves as kernel input and for live weight
updates in kernel format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lockstep.export import gptq, pack_quantized
from lockstep.export.groups import Group, provenance
from lockstep.grid import Quantized
from lockstep.kernels import Quantizer
from lockstep.layouts import marlin as layout
from lockstep.scheme import Scheme, TensorSpec

METHOD = "marlin"

refusal = gptq.refusal


def problem(n: int, k: int, scheme: Scheme) -> str | None:
    """Why the kernel cannot run a layer of N outputs and K inputs, or None."""
    return pack_quantized.rounded(scheme.weights) or layout.problem(n, k, scheme.weights)


def tensors(spec: TensorSpec) -> tuple[str, ...]:
    """Names of a layer's tensors; the first belongs to quantized layers alone."""
    return ("B", "s") if spec.symmetric else ("B", "s", "z")


def write(quantized: Quantized, spec: TensorSpec) -> dict[str, Tensor]:
    """The stored tensors of one layer by the names of `tensors`."""
    stored = {"B": layout.pack_weight(quantized.codes, spec.bits), "s": layout.pack_scales(quantized.scale)}
    if quantized.zero_point is not None:
        stored["z"] = layout.pack_zero_points(quantized.zero_point, spec.bits)
    return stored


def pack(weight: Tensor, spec: TensorSpec, kernel: Quantizer) -> dict[str, Tensor]:
    """Quantize `weight` on a symmetric grid and `write` it, in one pass."""
    return dict(zip(tensors(spec), kernel.pack_marlin(weight, spec), strict=True))


def read(tensors: Mapping[str, Tensor], spec: TensorSpec) -> Quantized:
    """The codes, scales and zero points of one layer's stored tensors."""
    zeros = None if spec.symmetric else layout.unpack_zero_points(tensors["z"], spec.bits)
    return Quantized(layout.unpack_weight(tensors["B"], spec.bits), layout.unpack_scales(tensors["s"]), zeros)


def config(
    groups: Sequence[Group], ignored: Sequence[str], kv_cache: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The ``quantization_config`` of the one group; `ignored` are the linear layers left as they are."""
    ((_, scheme, _),) = groups
    return {
        "quant_method": METHOD,
        "bits": scheme.weights.bits,
        "group_size": scheme.weights.group_size or -1,
        "sym": scheme.weights.symmetric,
        "modules_to_not_convert": list(ignored),
        "lockstep": provenance(scheme),
    }


def groups(config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> list[Group]:
    """The one group that a ``quantization_config`` of this format declares."""
    return [Group("marlin", gptq.integers(config, config.get("sym", True), dtype), ())]
