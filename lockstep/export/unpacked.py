"""Codes stored one by one, in their own dtype: what ``int-quantized``, ``float-quantized`` and their like share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lockstep.grid import Quantized
from lockstep.scheme import TensorSpec, dtype_name


def write(quantized: Quantized, spec: TensorSpec, scale: str = "weight_scale") -> dict[str, Tensor]:
    """``weight`` ``[N, K]``, and its scales under the name `scale`: ``[R, G]``, or ``[1]`` if there is but one."""
    scales = quantized.scale.reshape(1) if spec.strategy == "tensor" else quantized.scale
    return {scale: scales.contiguous(), "weight": quantized.codes.contiguous()}


def read(tensors: Mapping[str, Tensor], spec: TensorSpec, scale: str = "weight_scale") -> Quantized:
    """The inverse of `write`. Scales come in the spec's dtype: engines hold them in fp32, in whichever they stand."""
    codes, scales = tensors["weight"], tensors[scale]
    if codes.dtype != spec.code_dtype:
        raise ValueError(f"weight is {dtype_name(codes.dtype)}, codes are {dtype_name(spec.code_dtype)}")
    if spec.strategy == "tensor":
        scales = scales.reshape(1, 1)
    return Quantized(codes, scales.to(spec.scale_dtype))


def multiples(n: int, k: int, of: int, whose: str) -> str | None:
    """Why a kernel does not take N outputs and K inputs, if it needs multiples of `of`."""
    return f"N={n}, K={k}: {whose} need multiples of {of}" if n % of or k % of else None
