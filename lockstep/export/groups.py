"""Layers that are stored alike, and what of their scheme other people's formats have no word for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from lockstep.scheme import DTYPES, RULES, ActivationSpec, Scheme, TensorSpec, dtype_name

# The rule after which checkpoints without our entry are read: compressed-tensors' own for each kind of weights.
_THEIRS = ("amax/7.5", "range/15", "amax/127.5", "amax/448", "mx/8", "mx/2", "nv/6")
_SCALE_DTYPES = DTYPES | {dtype_name(dtype): dtype for rule in RULES.values() for dtype in rule.scale_dtypes}


class Group(NamedTuple):
    """A scheme, the name of the format that stores it, and its layers: names, or the targets that a config has."""

    format: str
    scheme: Scheme
    layers: tuple[str, ...]


def provenance(scheme: Scheme) -> dict[str, Any]:
    """The ``"lockstep"`` entry of a ``quantization_config``, as JSON."""
    weights, inputs = scheme.weights, scheme.activations
    entry: dict[str, Any] = {
        "scale_rule": weights.scale_rule,
        "scale_dtype": dtype_name(weights.scale_dtype),
        "served_dtype": dtype_name(weights.served_dtype),
    }
    return entry if inputs is None else entry | {"engine": inputs.engine, "power_of_two": inputs.power_of_two}


def scheme_of(
    weights: Mapping[str, Any],
    inputs: Mapping[str, Any] | None,
    known: Mapping[str, Any] | None,
    dtype: torch.dtype = torch.bfloat16,
) -> Scheme:
    """The scheme of stored layers.

    Args:
        weights: the fields of the `TensorSpec` that the format itself names.
        inputs: the same of the `ActivationSpec`, or None.
        known: the `provenance` that stands beside them. Without it somebody else wrote the checkpoint:
            compressed-tensors' rule is assumed.
        dtype: the model's, in which a checkpoint of somebody else is served.

    Raises:
        ValueError, KeyError, TypeError: these are no scheme that we train, or `known` is no provenance.
    """
    known = dict(known or _theirs(weights, inputs, dtype))
    spec = TensorSpec(
        **weights,
        scale_rule=known["scale_rule"],
        scale_dtype=_SCALE_DTYPES[known["scale_dtype"]],
        served_dtype=DTYPES[known["served_dtype"]],
    )
    if inputs is None:
        return Scheme(spec)
    options = {name: known[name] for name in ("engine", "power_of_two") if name in known}
    return Scheme(spec, ActivationSpec(**inputs, **options))


def _theirs(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, dtype: torch.dtype) -> dict[str, str]:
    grouping = (weights["strategy"], weights["group_size"])
    kind = (weights["format"], weights["symmetric"])
    fitting = [name for name in _THEIRS if (RULES[name].format, RULES[name].symmetric) == kind]
    rule = next((name for name in fitting if grouping in RULES[name].groupings), next(iter(fitting), ""))
    dtypes = RULES[rule].scale_dtypes if rule else (dtype,)
    # Engines hold the scales of weights that meet quantized inputs in fp32, whatever is stored, others in the model's.
    in_fp32 = inputs is not None and weights["format"] == "int8"
    scale_dtype = torch.float32 if in_fp32 else dtype if dtype in dtypes else dtypes[0]
    return {"scale_rule": rule, "scale_dtype": dtype_name(scale_dtype), "served_dtype": dtype_name(dtype)}
