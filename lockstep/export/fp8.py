"""Native FP8 (``quant_method: "fp8"``), the format of DeepSeek-V3: weights by tensor, or in blocks of 128 x 128.

For a layer ``m`` with N outputs and K inputs:

======================  ===============================  ==========================================================
``m.weight``            float8_e4m3fn [N, K]             the codes
``m.weight_scale``      fp32 [1]                         by tensor
``m.input_scale``       fp32 [1]                         by tensor
``m.weight_scale_inv``  fp32 [ceil(N/128), ceil(K/128)]  of blocks; despite its name it multiplies
======================  ===============================  ==========================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lockstep.export import float_quantized, unpacked
from lockstep.export.groups import Group, provenance, scheme_of
from lockstep.grid import Quantized
from lockstep.scheme import BLOCK, Scheme, TensorSpec

METHOD = "fp8"

problem = float_quantized.problem


def refusal(scheme: Scheme) -> str | None:
    """Why the format cannot store `scheme`, or None."""
    weights, inputs = scheme.weights, scheme.activations
    if weights.format != "fp8_e4m3" or weights.strategy not in ("tensor", "block"):
        return "it stores fp8 weights by tensor or in blocks; by channel, float-quantized does"
    if weights.strategy == "tensor" and inputs is not None and inputs.dynamic:
        return "of weights by tensor it does not say whether dynamic inputs are scaled by token; float-quantized does"
    return None


def tensors(spec: TensorSpec) -> tuple[str, ...]:
    """Names of a layer's tensors; the first belongs to quantized layers alone."""
    return (_scale_name(spec), "weight")


def write(quantized: Quantized, spec: TensorSpec) -> dict[str, Tensor]:
    """The stored tensors of one layer by the names of `tensors`."""
    return unpacked.write(quantized, spec, _scale_name(spec))


def read(tensors: Mapping[str, Tensor], spec: TensorSpec) -> Quantized:
    """The codes and scales of one layer's stored tensors."""
    return unpacked.read(tensors, spec, _scale_name(spec))


def _scale_name(spec: TensorSpec) -> str:
    return "weight_scale_inv" if spec.strategy == "block" else "weight_scale"


def config(
    groups: Sequence[Group], ignored: Sequence[str], kv_cache: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The ``quantization_config`` of the one group; `ignored` are the linear layers left as they are."""
    (group,) = groups
    blocks = group.scheme.weights.strategy == "block"
    entry: dict[str, Any] = {
        "quant_method": METHOD,
        "fmt": "e4m3",
        "activation_scheme": "dynamic" if blocks else "static",
        "modules_to_not_convert": list(ignored),
        "lockstep": provenance(group.scheme),
    }
    if blocks:
        entry["weight_block_size"] = [BLOCK, BLOCK]
    if group.scheme.weights.scale_rule == "pow2/448":
        entry["scale_fmt"] = "ue8m0"
    return entry


def groups(config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> list[Group]:
    """The one group that a ``quantization_config`` of this format declares. ValueError if it is not `config`'s."""
    block, inputs = config.get("weight_block_size"), config.get("activation_scheme")
    if block not in (None, [BLOCK, BLOCK]) or inputs != ("dynamic" if block else "static"):
        raise ValueError(
            f"weight_block_size={block}, activation_scheme={inputs!r}: this version reads blocks of {BLOCK} x {BLOCK} "
            "with dynamic inputs, and weights by tensor with static ones"
        )
    fields = {"format": "fp8_e4m3", "group_size": None, "symmetric": True}
    if block:
        of_inputs = {"format": "fp8_e4m3", "strategy": "group", "group_size": BLOCK, "dynamic": True}
    else:
        of_inputs = {"format": "fp8_e4m3", "strategy": "tensor", "dynamic": False}
    weights = fields | {"strategy": "block" if block else "tensor"}
    scheme = scheme_of(weights, of_inputs, config.get("lockstep"), dtype)
    if (config.get("scale_fmt") == "ue8m0") != (scheme.weights.scale_rule == "pow2/448"):
        if "lockstep" in config:
            raise ValueError(f"scale_fmt={config.get('scale_fmt')!r} contradicts {scheme.weights.scale_rule}")
        scheme = replace(scheme, weights=replace(scheme.weights, scale_rule="pow2/448"))
    return [Group("fp8", scheme, ())]
