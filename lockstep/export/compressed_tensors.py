"""``quant_method: "compressed-tensors"``: the ``quantization_config`` that its formats share, written and read.

Its ``config_groups`` name for each group of layers what their weights and inputs become and the format that stores
them. Readable by ``compressed_tensors.QuantizationConfig``, and so by vLLM, SGLang and transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lockstep.export.groups import Group, provenance, scheme_of
from lockstep.scheme import BLOCK, ActivationSpec, KVCacheSpec, TensorSpec, dtype_name

METHOD = "compressed-tensors"
MIXED = "mixed-precision"

_TYPES = {"int4": ("int", 4), "int8": ("int", 8), "fp8_e4m3": ("float", 8), "fp4_e2m1": ("float", 4)}
_EXPERT = re.compile(r"\.experts\.\d+\.")
_NAMES = {kind: name for name, kind in _TYPES.items()}


def config(
    groups: Sequence[Group], ignored: Sequence[str], kv_cache: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The ``quantization_config`` of a model.

    What compressed-tensors has no word for (scale rules, dtypes, the engine) stands under the key ``"lockstep"``: of
    the one group, or of each by its name.

    Args:
        groups: a single one is declared for all linear layers; of several the first that has experts, since SGLang
            looks for theirs under no other target, and the others for their layers by name.
        ignored: the linear layers that are left as they are.
        kv_cache: the ``kv_cache_scheme``, if keys and values are quantized.
    """
    named = {f"group_{number}": group for number, group in enumerate(groups)}
    formats = {group.format for group in groups}
    of_experts = [name for name, group in named.items() if any(map(_EXPERT.search, group.layers))]
    of_class = [*of_experts, *named][0] if of_experts or len(groups) == 1 else None
    entries = {name: provenance(group.scheme) for name, group in named.items()}
    return {
        "quant_method": METHOD,
        "format": MIXED if len(formats) > 1 else formats.pop(),
        "quantization_status": "compressed",
        "kv_cache_scheme": kv_cache and dict(kv_cache),
        "ignore": list(ignored),
        "config_groups": {
            name: {
                # Names and not patterns: engines that rename a model's parts rename these too.
                "targets": ["Linear"] if name == of_class else list(group.layers),
                "format": group.format,
                "input_activations": group.scheme.activations and _inputs(group.scheme.activations),
                "output_activations": None,
                "weights": _weights(group.scheme.weights),
            }
            for name, group in named.items()
        },
        "lockstep": entries if len(groups) > 1 else entries["group_0"],
    }


def groups(config: Mapping[str, Any] | Any, dtype: torch.dtype = torch.bfloat16) -> list[Group]:
    """The groups that a ``quantization_config`` declares, their targets in place of their layers.

    Args:
        config: the dict that stands on disk, or a ``compressed_tensors.QuantizationConfig``, which has no place for
            our entry.
        dtype: the model's, for configs without our entry.

    Raises:
        ValueError, KeyError, TypeError: weights or activations of a kind not trained here; the message names it.
    """
    if not isinstance(config, Mapping):
        config = config.model_dump()
    declared = config.get("config_groups") or {}
    if not declared:
        raise ValueError("config_groups has 0 groups of layers.")
    known = config.get("lockstep") or {}
    known = dict.fromkeys(declared, known) if "scale_rule" in known or not known else known
    return [_group(group, config.get("format"), known[name], dtype) for name, group in declared.items()]


def kv_cache(config: Mapping[str, Any]) -> KVCacheSpec | None:
    """How a ``quantization_config`` says that keys and values are stored. ValueError if it is none that we train."""
    scheme = config.get("kv_cache_scheme")
    if not scheme:
        return None
    strategy = {"tensor": "tensor", "attn_head": "head"}.get(scheme.get("strategy"))
    if (scheme.get("type"), scheme.get("num_bits")) != ("float", 8) or scheme.get("dynamic") or not strategy:
        raise ValueError(f"kv_cache_scheme is {dict(scheme)}: this version reads static fp8 by tensor or attn_head.")
    return KVCacheSpec("fp8_e4m3", strategy)


def layers_of(groups: Sequence[Group], names: Sequence[str]) -> dict[str, Group]:
    """The group of each of the linear layers `names`, by compressed-tensors' own matcher.

    ValueError if one has none.
    """
    from compressed_tensors.utils.match import match_targets

    if len(groups) == 1:  # with targets that are class names of the model's own
        return dict.fromkeys(names, groups[0])
    linear = torch.nn.Linear(1, 1, device="meta")
    of_target = {target: group for group in groups for target in group.layers}
    found = {name: match_targets(name, linear, of_target) for name in names}
    if lost := [name for name, targets in found.items() if not targets]:
        raise ValueError(f"{lost[0]} is stored quantized, and no group of config_groups targets it.")
    return {name: of_target[targets[0]] for name, targets in found.items()}


def _weights(spec: TensorSpec) -> dict[str, Any]:
    """A ``QuantizationArgs``."""
    kind, bits = _TYPES[spec.format]
    args: dict[str, Any] = {
        "num_bits": bits,
        "type": kind,
        "symmetric": spec.symmetric,
        "strategy": "tensor_group" if spec.group_size == 16 else spec.strategy,
        "group_size": spec.group_size,
        "dynamic": False,
        "actorder": None,
    }
    if spec.format in ("int4", "int8"):
        return args | {"group_size": spec.group_size or -1}  # -1 and not null: vLLM compares it with integers
    if spec.strategy == "block":
        return args | {"block_structure": [BLOCK, BLOCK]}
    return args | _scale_dtype(spec.group_size)


def _inputs(spec: ActivationSpec) -> dict[str, Any]:
    kind, bits = _TYPES[spec.format]
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": "tensor_group" if spec.group_size == 16 else spec.strategy,
        "group_size": spec.group_size,
        "dynamic": "local" if spec.group_size == 16 else spec.dynamic,
        **_scale_dtype(spec.group_size),
    }


def _scale_dtype(group_size: int | None) -> dict[str, str]:
    """NVFP4's and MX's scales are 8 bits wide; compressed-tensors tells MXFP8 from other fp8 by this alone."""
    stored = {16: torch.float8_e4m3fn, 32: torch.uint8}.get(group_size or 0)
    return {"scale_dtype": f"torch.{dtype_name(stored)}"} if stored else {}


def _group(group: Any, format: Any, known: Mapping[str, Any], dtype: torch.dtype) -> Group:
    if not isinstance(group, Mapping) or not group.get("weights"):
        raise ValueError(f"this version reads groups that spell out their weights, config_groups has {group!r}.")
    if group.get("output_activations"):
        raise ValueError("this version trains no quantized outputs, config_groups has output_activations.")
    weights, inputs = group["weights"], group.get("input_activations")
    if weights.get("dynamic") or weights.get("actorder") in (True, "group"):
        raise ValueError(
            "this version reads static weights in the model's own order, config_groups has "
            f"dynamic={weights.get('dynamic')!r}, actorder={weights.get('actorder')!r}."
        )
    if weights.get("block_structure") not in (None, [BLOCK, BLOCK]):
        raise ValueError(f"this version reads blocks of {BLOCK} x {BLOCK}, config_groups has {weights}.")
    fields = _read(weights) | {"symmetric": weights.get("symmetric", True)}
    if inputs and not inputs.get("symmetric", True):
        raise ValueError("this version trains symmetric activations, config_groups has asymmetric ones.")
    of_inputs = _read(inputs) | {"dynamic": bool(inputs.get("dynamic"))} if inputs else None
    scheme = scheme_of(fields, of_inputs, known, dtype)
    return Group(group.get("format") or format, scheme, tuple(group["targets"]))


def _read(args: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ``QuantizationArgs`` that weights and activations share, in our words."""
    kind = (args.get("type", "int"), args.get("num_bits"))
    if kind not in _NAMES:
        raise ValueError(f"this version reads {', '.join(_TYPES)}, config_groups has type and num_bits {kind}.")
    size, strategy = args.get("group_size"), args.get("strategy")
    return {
        "format": _NAMES[kind],
        "strategy": "group" if strategy == "tensor_group" else strategy,
        "group_size": size if size and size > 0 else None,
    }
