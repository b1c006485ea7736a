"""``pack-quantized`` of compressed-tensors, INT4 and INT8 weights: what vLLM, SGLang and transformers load.

For a layer ``m`` with N outputs, K inputs, G groups and b bits:

=======================  ======================  =======================================================
``m.weight_packed``      int32 [N, K * b / 32]   codes along K, lowest bits first, offset binary
``m.weight_scale``       [N, G]                  in the served dtype
``m.weight_shape``       int64 [2]               (N, K)
``m.weight_zero_point``  int32 [N * b / 32, G]   asymmetric grids: along N, in the same words
=======================  ======================  =======================================================
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lockstep.export import unpacked
from lockstep.export.compressed_tensors import METHOD, config, groups
from lockstep.grid import Quantized
from lockstep.kernels import Quantizer
from lockstep.layouts import words
from lockstep.scheme import Scheme, TensorSpec, dtype_name

__all__ = ["METHOD", "config", "groups", "pack", "problem", "read", "refusal", "rounded", "tensors", "write"]


def refusal(scheme: Scheme) -> str | None:
    """Why the format cannot store `scheme`, or None."""
    if scheme.weights.format == "int8" and scheme.activations is not None:
        return "it stores int8 weights for inputs as they are; for int8 inputs, int-quantized does"
    return None if scheme.weights.format in ("int4", "int8") else "it stores int4 and int8 weights"


def problem(n: int, k: int, scheme: Scheme) -> str | None:
    """Why no engine's kernel takes a layer of N outputs and K inputs, or None.

    vLLM's CPU kernel needs multiples of 32; Marlin, in SGLang and in vLLM up to 0.22, needs `marlin.problem`'s shapes.
    With FP8 inputs: vLLM's CUTLASS kernel of Hopper needs multiples of 128. INT8 inputs: vLLM 0.22
    reads such a folder on Hopper as one with FP8 inputs, and refuses it elsewhere; later ones quantize the inputs with
    ``--linear-backend humming`` alone.
    """
    if reason := rounded(scheme.weights):
        return reason
    if scheme.activations is None or scheme.activations.format != "fp8_e4m3":
        return unpacked.multiples(n, k, 32, f"the engines' INT{scheme.weights.bits} kernels")
    if scheme.weights.served_dtype != torch.bfloat16:
        return "the engines' kernel of INT4 weights and FP8 inputs serves bfloat16 alone"
    return unpacked.multiples(n, k, 128, "the engines' kernels of INT4 weights and FP8 inputs")


def rounded(spec: TensorSpec) -> str | None:
    """Why an engine would serve packed integers with other scales than those that trained, or None."""
    if spec.scale_dtype == spec.served_dtype:
        return None
    return (
        f"the engine holds scales in the served dtype {dtype_name(spec.served_dtype)} and would round the "
        f"{dtype_name(spec.scale_dtype)} ones that were trained with, so choose the same dtype for both"
    )


def tensors(spec: TensorSpec) -> tuple[str, ...]:
    """Names of a layer's tensors; the first belongs to quantized layers alone."""
    symmetric = ("weight_packed", "weight_scale", "weight_shape")
    return symmetric if spec.symmetric else (*symmetric, "weight_zero_point")


def write(quantized: Quantized, spec: TensorSpec) -> dict[str, Tensor]:
    """The stored tensors of one layer by the names of `tensors`."""
    stored = _stored(words.pack(quantized.codes, spec.bits), quantized.scale, spec)
    if quantized.zero_point is not None:
        stored["weight_zero_point"] = words.pack(quantized.zero_point.T, spec.bits).T.contiguous()
    return stored


def pack(weight: Tensor, spec: TensorSpec, kernel: Quantizer) -> dict[str, Tensor]:
    """Quantize `weight` on a symmetric grid and `write` it, in one pass."""
    return _stored(*kernel.pack_quantized(weight, spec), spec)


def _stored(packed: Tensor, scale: Tensor, spec: TensorSpec) -> dict[str, Tensor]:
    shape = (packed.shape[0], packed.shape[1] * 32 // spec.bits)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(shape)}


def read(tensors: Mapping[str, Tensor], spec: TensorSpec) -> Quantized:
    """The codes, scales and zero points of one layer's stored tensors."""
    codes, scale = words.unpack(tensors["weight_packed"], spec.bits), tensors["weight_scale"]
    if spec.symmetric:
        return Quantized(codes, scale)
    return Quantized(codes, scale, words.unpack(tensors["weight_zero_point"].T, spec.bits).T.contiguous())
