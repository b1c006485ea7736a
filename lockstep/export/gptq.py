"""GPTQ v1 (``checkpoint_format: "gptq"``, ``desc_act: false``, symmetric): the format with the widest support.

For a layer ``m`` with N outputs, K inputs and G groups:

=============  ================  =====================================================================
``m.qweight``  int32 [K/8, N]    codes along K, lowest bits first, offset binary (q + 8)
``m.qzeros``   int32 [G, N/8]    zero points minus one, along N: every field 7 (v1 readers add 1)
``m.scales``   [G, N]            in the served dtype, since an engine would round other values again
``m.g_idx``    int32 [K]         the group of each input, ``k // group_size``
=============  ================  =====================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lockstep.export import pack_quantized
from lockstep.grid import Quantized
from lockstep.kernels import Quantizer
from lockstep.layouts import words
from lockstep.scheme import Scheme, TensorSpec

TENSORS = ("qweight", "qzeros", "scales", "g_idx")


def problem(n: int, k: int, spec: TensorSpec) -> str | None:
    """Why no engine's kernel takes a layer of N outputs and K inputs, or None: the same kernels as `pack_quantized`."""
    return pack_quantized.problem(n, k, spec)


def write(quantized: Quantized, spec: TensorSpec) -> dict[str, Tensor]:
    """The stored tensors of one layer by the names of `TENSORS`."""
    return _stored(words.pack(quantized.codes, spec.bits), quantized.scale, spec)


def pack(weight: Tensor, spec: TensorSpec, kernel: Quantizer) -> dict[str, Tensor]:
    """Quantize `weight` and `write` it, in one pass and a transposition where `kernel` can."""
    return _stored(*kernel.pack_quantized(weight, spec), spec)


def _stored(packed: Tensor, scale: Tensor, spec: TensorSpec) -> dict[str, Tensor]:
    (n, groups), k = scale.shape, packed.shape[1] * 8
    minus_one = torch.full((groups, n), -1, dtype=torch.int8, device=packed.device)
    return {
        "qweight": packed.T.contiguous(),
        "qzeros": words.pack(minus_one, spec.bits),
        "scales": scale.T.contiguous(),
        "g_idx": torch.arange(k, dtype=torch.int32, device=packed.device) // (k // groups),
    }


def read(tensors: Mapping[str, Tensor], spec: TensorSpec) -> Quantized:
    """The codes and scales of one layer's stored tensors.

    Raises:
        ValueError: zero points or an input order that this symmetric, unordered grid does not have.
    """
    codes = words.unpack(tensors["qweight"].T, spec.bits)
    scale = tensors["scales"].T.contiguous()
    if not (words.unpack(tensors["qzeros"], spec.bits) == -1).all():
        raise ValueError("qzeros are not those of a symmetric GPTQ v1 grid (every field 7)")
    group_size = codes.shape[-1] // scale.shape[-1]
    if not torch.equal(
        tensors["g_idx"].long(), torch.arange(codes.shape[-1]).to(tensors["g_idx"].device) // group_size
    ):
        raise ValueError(f"g_idx is not k // {group_size}: the inputs are in another order")
    return Quantized(codes, scale)


def config(scheme: Scheme, quantized: Sequence[str], ignored: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` for the layers `quantized`; `ignored` are the linear layers left as they are.

    The layers are named twice, because vLLM asks ``modules_in_block_to_quantize`` and SGLang ``dynamic``.
    """
    return {
        "quant_method": "gptq",
        "bits": scheme.weights.bits,
        "group_size": scheme.weights.group_size or -1,
        "sym": scheme.weights.symmetric,
        "desc_act": False,
        "lm_head": any(name.endswith("lm_head") for name in quantized),
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "true_sequential": True,
        "static_groups": False,
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in ignored},
        "modules_in_block_to_quantize": [list(quantized)],
        "lockstep": scheme.provenance(),
    }


def scheme(config: Mapping[str, Any]) -> Scheme:
    """The scheme that a ``quantization_config`` of this format declares."""
    if config.get("desc_act"):
        raise ValueError("desc_act=true: the inputs are in another order than the model's")
    return Scheme.from_provenance(
        config.get("lockstep"), bits=config["bits"], symmetric=config["sym"], group_size=config["group_size"]
    )
