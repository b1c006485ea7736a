"""``pack-quantized``, the INT4 format of compressed-tensors: what vLLM, SGLang and transformers load.

For a layer ``m`` with N outputs, K inputs and G groups:

==================  ===============  ======================================================
``m.weight_packed``  int32 [N, K/8]   codes along K, lowest bits first, offset binary (q + 8)
``m.weight_scale``   [N, G]           in the served dtype
``m.weight_shape``   int64 [2]        (N, K)
==================  ===============  ======================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lockstep.grid import Quantized
from lockstep.kernels import Quantizer
from lockstep.layouts import words
from lockstep.scheme import Scheme, TensorSpec

TENSORS = ("weight_packed", "weight_scale", "weight_shape")
TILE = 32


def problem(n: int, k: int, spec: TensorSpec) -> str | None:
    """Why no engine's kernel takes a layer of N outputs and K inputs, or None.

    vLLM's CPU kernel needs multiples of 32, its Marlin pads to whole tiles; SGLang's needs `marlin.problem`'s shapes.
    """
    if n % TILE or k % TILE:
        return f"N={n}, K={k}: the engines' INT4 kernels need multiples of {TILE}"
    return None


def write(quantized: Quantized, spec: TensorSpec) -> dict[str, Tensor]:
    """The stored tensors of one layer by the names of `TENSORS`."""
    return _stored(words.pack(quantized.codes, spec.bits), quantized.scale)


def pack(weight: Tensor, spec: TensorSpec, kernel: Quantizer) -> dict[str, Tensor]:
    """Quantize `weight` and `write` it, in one pass where `kernel` can."""
    return _stored(*kernel.pack_quantized(weight, spec))


def _stored(packed: Tensor, scale: Tensor) -> dict[str, Tensor]:
    shape = (packed.shape[0], packed.shape[1] * 8)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(shape)}


def read(tensors: Mapping[str, Tensor], spec: TensorSpec) -> Quantized:
    """The codes and scales of one layer's stored tensors."""
    return Quantized(words.unpack(tensors["weight_packed"], spec.bits), tensors["weight_scale"])


def config(scheme: Scheme, quantized: Sequence[str], ignored: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` for the layers `quantized`; `ignored` are the linear layers left as they are."""
    return scheme.to_compressed_tensors(ignore=ignored)


def scheme(config: Mapping[str, Any]) -> Scheme:
    """The scheme that a ``quantization_config`` of this format declares."""
    return Scheme.from_compressed_tensors(config)
