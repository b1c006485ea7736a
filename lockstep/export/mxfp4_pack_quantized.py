"""``mxfp4-pack-quantized`` of compressed-tensors: FP4 weights in groups of 32 that share a power of two.

For a layer ``m`` with N outputs and K inputs: ``m.weight_packed`` uint8 ``[N, K/2]``, two codes a byte
(`layouts.fp4`), and ``m.weight_scale`` uint8 ``[N, K/32]``, the exponent plus 127 (E8M0).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lockstep.export.compressed_tensors import METHOD, config, groups
from lockstep.export.mxfp8_quantized import exponents, powers, problem
from lockstep.grid import Quantized
from lockstep.layouts import fp4
from lockstep.scheme import Scheme, TensorSpec

__all__ = ["METHOD", "config", "groups", "problem", "read", "refusal", "tensors", "write"]


def refusal(scheme: Scheme) -> str | None:
    """Why the format cannot store `scheme`, or None."""
    if scheme.weights.scale_rule != "mx/2":
        return "it stores fp4 weights in groups of 32 with power-of-two scales"
    return None


def tensors(spec: TensorSpec) -> tuple[str, ...]:
    """Names of a layer's tensors; the first belongs to quantized layers alone."""
    return ("weight_packed", "weight_scale")


def write(quantized: Quantized, spec: TensorSpec) -> dict[str, Tensor]:
    """The stored tensors of one layer by the names of `tensors`."""
    return {"weight_packed": fp4.pack(quantized.codes), "weight_scale": exponents(quantized.scale)}


def read(tensors: Mapping[str, Tensor], spec: TensorSpec) -> Quantized:
    """The codes and scales of one layer's stored tensors."""
    return Quantized(fp4.unpack(tensors["weight_packed"]), powers(tensors["weight_scale"]))
