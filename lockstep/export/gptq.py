"""GPTQ v1 (``checkpoint_format: "gptq"``, ``desc_act: false``): the format with the widest support.

For a layer ``m`` with N outputs, K inputs, G groups and b bits:

=============  =======================  =================================================================
``m.qweight``  int32 [K * b / 32, N]    codes along K, lowest bits first, offset binary
``m.qzeros``   int32 [G, N * b / 32]    zero points minus one, along N (v1 readers add 1)
``m.scales``   [G, N]                   in the served dtype, since an engine would round other values again
``m.g_idx``    int32 [K]                the group of each input, ``k // group_size``
=============  =======================  =================================================================

vLLM and SGLang serve symmetric grids alone; asymmetric ones are for the other readers of the format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lockstep.export import pack_quantized
from lockstep.export.groups import Group, provenance, scheme_of
from lockstep.grid import Quantized
from lockstep.kernels import Quantizer
from lockstep.layouts import words
from lockstep.scheme import Scheme, TensorSpec

METHOD = "gptq"

problem = pack_quantized.problem


def refusal(scheme: Scheme) -> str | None:
    """Why the format cannot store `scheme`, or None."""
    if scheme.activations is not None:
        return "it has no word for quantized inputs"
    return pack_quantized.refusal(scheme)


def tensors(spec: TensorSpec) -> tuple[str, ...]:
    """Names of a layer's tensors; the first belongs to quantized layers alone."""
    return ("qweight", "qzeros", "scales", "g_idx")


def write(quantized: Quantized, spec: TensorSpec) -> dict[str, Tensor]:
    """The stored tensors of one layer by the names of `tensors`.

    Raises:
        ValueError: a group's zero point is the smallest code. One less is no code, and readers differ in what they
            make of it.
    """
    zeros = quantized.zero_point
    if zeros is not None and (zeros == spec.code_range[0]).any():
        raise ValueError(
            f"{int((zeros == spec.code_range[0]).sum())} groups have no negative weight, so their zero point is 0, "
            "which GPTQ v1 cannot say: store it as pack-quantized"
        )
    return _stored(words.pack(quantized.codes, spec.bits), quantized.scale, spec, zeros)


def pack(weight: Tensor, spec: TensorSpec, kernel: Quantizer) -> dict[str, Tensor]:
    """Quantize `weight` on a symmetric grid and `write` it, in one pass and a transposition."""
    return _stored(*kernel.pack_quantized(weight, spec), spec)


def _stored(packed: Tensor, scale: Tensor, spec: TensorSpec, zeros: Tensor | None = None) -> dict[str, Tensor]:
    (_, groups), k = scale.shape, packed.shape[1] * 32 // spec.bits
    if zeros is None:
        zeros = torch.zeros_like(scale, dtype=torch.int8)
    return {
        "qweight": packed.T.contiguous(),
        "qzeros": words.pack(zeros.T - 1, spec.bits),
        "scales": scale.T.contiguous(),
        "g_idx": torch.arange(k, dtype=torch.int32, device=packed.device) // (k // groups),
    }


def read(tensors: Mapping[str, Tensor], spec: TensorSpec) -> Quantized:
    """The codes, scales and zero points of one layer's stored tensors.

    Raises:
        ValueError: zero points of a symmetric grid that are not its own, or inputs in another order.
    """
    codes = words.unpack(tensors["qweight"].T, spec.bits)
    scale = tensors["scales"].T.contiguous()
    minus_one = words.unpack(tensors["qzeros"], spec.bits)
    if spec.symmetric and not (minus_one == -1).all():
        raise ValueError(f"qzeros are not those of a symmetric GPTQ v1 grid (every field {2 ** (spec.bits - 1) - 1})")
    group_size = codes.shape[-1] // scale.shape[-1]
    if not torch.equal(
        tensors["g_idx"].long(), torch.arange(codes.shape[-1]).to(tensors["g_idx"].device) // group_size
    ):
        raise ValueError(f"g_idx is not k // {group_size}: the inputs are in another order")
    return Quantized(codes, scale, None if spec.symmetric else (minus_one + 1).T.contiguous())


def config(
    groups: Sequence[Group], ignored: Sequence[str], kv_cache: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The ``quantization_config`` of the one group; `ignored` are the linear layers left as they are.

    The layers are named twice, because vLLM asks ``modules_in_block_to_quantize`` and SGLang ``dynamic``.
    """
    ((_, scheme, layers),) = groups
    return {
        "quant_method": METHOD,
        "bits": scheme.weights.bits,
        "group_size": scheme.weights.group_size or -1,
        "sym": scheme.weights.symmetric,
        "desc_act": False,
        "lm_head": any(name.endswith("lm_head") for name in layers),
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "true_sequential": True,
        "static_groups": False,
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in ignored},
        "modules_in_block_to_quantize": [list(layers)],
        "lockstep": provenance(scheme),
    }


def groups(config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> list[Group]:
    """The one group that a ``quantization_config`` of this format declares."""
    if config.get("checkpoint_format", "gptq") != "gptq":
        raise ValueError(f"checkpoint_format={config['checkpoint_format']!r}: this version reads 'gptq'")
    if config.get("desc_act"):
        raise ValueError("desc_act=true: the inputs are in another order than the model's")
    return [Group("gptq", integers(config, config["sym"], dtype), ())]


def integers(config: Mapping[str, Any], symmetric: bool, dtype: torch.dtype) -> Scheme:
    """The scheme of a config that has ``bits`` and ``group_size`` (-1: by channel)."""
    size = config["group_size"]
    weights = {
        "format": f"int{config['bits']}",
        "strategy": "group" if size > 0 else "channel",
        "group_size": size if size > 0 else None,
        "symmetric": symmetric,
    }
    return scheme_of(weights, None, config.get("lockstep"), dtype)
