"""``mxfp8-quantized`` of compressed-tensors: FP8 weights in groups of 32 that share a power of two.

For a layer ``m`` with N outputs and K inputs: ``m.weight`` float8_e4m3fn ``[N, K]`` and ``m.weight_scale`` uint8
``[N, K/32]``, the exponent plus 127 (E8M0).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lockstep.export import unpacked
from lockstep.export.compressed_tensors import METHOD, config, groups
from lockstep.grid import Quantized
from lockstep.scheme import Scheme, TensorSpec

__all__ = ["METHOD", "config", "groups", "problem", "read", "refusal", "tensors", "write"]


def refusal(scheme: Scheme) -> str | None:
    """Why the format cannot store `scheme`, or None."""
    if scheme.weights.scale_rule != "mx/8":
        return "it stores fp8 weights in groups of 32 with power-of-two scales"
    return None


def problem(n: int, k: int, scheme: Scheme) -> str | None:
    """Why no engine's kernel takes a layer of N outputs and K inputs, or None."""
    if scheme.weights.served_dtype != torch.bfloat16:
        return "the engines' MX kernels serve bfloat16 alone"
    return unpacked.multiples(n, k, 32, "the engines' MX kernels")


def tensors(spec: TensorSpec) -> tuple[str, ...]:
    """Names of a layer's tensors; the first belongs to quantized layers alone."""
    return ("weight_scale", "weight")


def write(quantized: Quantized, spec: TensorSpec) -> dict[str, Tensor]:
    """The stored tensors of one layer by the names of `tensors`."""
    return unpacked.write(quantized._replace(scale=exponents(quantized.scale)), spec)


def read(tensors: Mapping[str, Tensor], spec: TensorSpec) -> Quantized:
    """The codes and scales of one layer's stored tensors."""
    return unpacked.read({**tensors, "weight_scale": powers(tensors["weight_scale"])}, spec)


def exponents(scale: Tensor) -> Tensor:
    """E8M0 scales as the bytes that stand in a checkpoint."""
    return scale.view(torch.uint8)


def powers(stored: Tensor) -> Tensor:
    """The inverse of `exponents`."""
    if stored.dtype != torch.uint8:
        raise ValueError(f"weight_scale is {stored.dtype}, MX scales are stored as torch.uint8")
    return stored.view(torch.float8_e8m0fnu)
