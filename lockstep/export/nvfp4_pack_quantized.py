"""``nvfp4-pack-quantized`` of compressed-tensors: FP4 weights in groups of 16 with FP8 scales below one of the tensor.

For a layer ``m`` with N outputs and K inputs:

===========================  =======================  ================================================================
``m.weight_packed``          uint8 [N, K/2]           two codes a byte (`layouts.fp4`)
``m.weight_scale``           float8_e4m3fn [N, K/16]  the groups' scales
``m.weight_global_scale``    fp32 [1]                 a divisor; the same in layers that engines run as one
``m.input_global_scale``     fp32 [1]                 the same of the inputs, if they are FP4 too
===========================  =======================  ================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lockstep.export import unpacked
from lockstep.export.compressed_tensors import METHOD, config, groups
from lockstep.grid import Quantized
from lockstep.layouts import fp4
from lockstep.scheme import Scheme, TensorSpec

__all__ = ["METHOD", "config", "groups", "problem", "read", "refusal", "tensors", "write"]


def refusal(scheme: Scheme) -> str | None:
    """Why the format cannot store `scheme`, or None."""
    return None if scheme.weights.scale_rule == "nv/6" else "it stores fp4 weights in groups of 16"


def problem(n: int, k: int, scheme: Scheme) -> str | None:
    """Why no engine's kernel takes a layer of N outputs and K inputs, or None."""
    return unpacked.multiples(n, k, 32, "the engines' FP4 kernels")


def tensors(spec: TensorSpec) -> tuple[str, ...]:
    """Names of a layer's tensors; the first belongs to quantized layers alone."""
    return ("weight_packed", "weight_scale", "weight_global_scale")


def write(quantized: Quantized, spec: TensorSpec) -> dict[str, Tensor]:
    """The stored tensors of one layer by the names of `tensors`."""
    assert quantized.global_scale is not None
    stored = (fp4.pack(quantized.codes), quantized.scale, quantized.global_scale.reshape(1))
    return dict(zip(tensors(spec), stored, strict=True))


def read(tensors: Mapping[str, Tensor], spec: TensorSpec) -> Quantized:
    """The codes and scales of one layer's stored tensors."""
    second = tensors["weight_global_scale"].reshape(1, 1).float()
    return Quantized(fp4.unpack(tensors["weight_packed"]), tensors["weight_scale"], None, second)
