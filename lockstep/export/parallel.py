"""Whether quantized layers can be cut over GPUs: tensor parallel over `tp` of them, experts over `ep` groups.

A layer that is cut along its outputs (column parallel: q, k, v, gate, up) gives each GPU N / tp rows of the weight; one
that is cut along its inputs (row parallel: o, down) K / tp columns, which must be whole groups, since a group has one
scale and stands on one GPU. Experts are cut over tp / ep GPUs, and their number over ep.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lockstep.export import formats
from lockstep.layouts import marlin
from lockstep.qat.prepare import run_as_one
from lockstep.scheme import BLOCK, RULES, Scheme

Cut = Literal["column", "row", "whole"]
PLAN, NAMES = "transformers' tp_plan", "the names that engines know"
_DEGREES = (1, 2, 4, 8, 16, 32)
_NAMES: dict[Cut, tuple[str, ...]] = {
    "column": (
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "lm_head"),
        *("q_b_proj", "kv_b_proj", "fc1", "query_key_value", "dense_h_to_4h", "c_attn", "c_fc"),
    ),
    "row": ("o_proj", "down_proj", "w2", "out_proj", "fc2", "dense", "dense_4h_to_h", "c_proj"),
    "whole": ("q_a_proj", "kv_a_proj_with_mqa", "gate", "router", "shared_expert_gate"),
}


class Weight(NamedTuple):
    """A quantized layer: N outputs, K inputs, its scheme and the name of the format that stores it."""

    n: int
    k: int
    scheme: Scheme
    format: str


@dataclass(frozen=True)
class Shard:
    """What one GPU has of a layer: N outputs and K inputs, how it was cut and who says so.

    `problem` is why it cannot be served so, or empty; `warning` what some engines would refuse.
    """

    name: str
    cut: Cut
    source: str
    n: int
    k: int
    problem: str = ""
    warning: str = ""


def shards(
    weights: Mapping[str, Weight], tp: int, ep: int = 1, plan: Mapping[str, str] | None = None, kv_heads: int = 0
) -> list[Shard]:
    """What a GPU has of each of the quantized `weights`, and whether the engines' kernels take it.

    Args:
        weights: by the names that engines know, experts one by one (``...experts.3.down_proj``).
        tp: GPUs that share each layer.
        ep: groups of them that share the experts; 1: each expert is cut over all of them.
        plan: transformers' ``model.tp_plan``; where it has no word for a layer, its name decides.
        kv_heads: key and value heads, which are repeated where there are fewer than GPUs; 0: unknown.

    Raises:
        ValueError: a degree below 1, or an `ep` that does not divide `tp`.
    """
    if tp < 1 or ep < 1 or tp % ep:
        raise ValueError(f"tp={tp}, ep={ep}: degrees are 1 or more, and the groups of experts divide the GPUs.")
    found = []
    for siblings in run_as_one(weights):
        cuts = {name: how_cut(name, plan or {}) for name in siblings}
        degrees = {name: _degree(name, tp, ep, kv_heads) for name in siblings}
        # Engines put the outputs of siblings below one another, each GPU those that it has.
        together = sum(weights[name].n // degrees[name] for name in siblings if cuts[name][0] == "column")
        for name in siblings:
            found.append(_shard(name, weights[name], *cuts[name], degrees[name], together, f"tp={tp}, ep={ep}"))
    return [*found, *_uneven_experts(weights, ep)]


def how_cut(name: str, plan: Mapping[str, str]) -> tuple[Cut | None, str]:
    """How engines cut the layer `name`, and who says so: a ``tp_plan``, or its own name. None: neither."""
    pattern = without_numbers(name)
    generic = pattern.replace(".experts.*.", ".experts.")
    stacked = re.sub(r"(gate|up)_proj$", "gate_up_proj", generic) if ".experts." in generic else generic
    for key in (pattern, generic, stacked):
        style = plan.get(key, "")
        for part, cut in (("colwise", "column"), ("rowwise", "row"), ("replicated", "whole"), ("mla_kv_a", "whole")):
            if part in style:
                return cut, PLAN  # type: ignore[return-value]
    leaf = name.rpartition(".")[2]
    return next(((cut, NAMES) for cut, leaves in _NAMES.items() if leaf in leaves), (None, ""))


def without_numbers(name: str) -> str:
    """A module's name with ``*`` for the numbers of its layer and expert."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _degree(name: str, tp: int, ep: int, kv_heads: int) -> int:
    """Over how many GPUs a layer is cut: keys and values over no more than there are heads of them."""
    if ".experts." in name:
        return tp // ep
    few = kv_heads and tp % kv_heads == 0 and name.rpartition(".")[2] in ("k_proj", "v_proj")
    return min(tp, kv_heads) if few else tp


def _shard(name: str, weight: Weight, cut: Cut | None, source: str, degree: int, together: int, degrees: str) -> Shard:
    if cut is None:
        problem = (
            f"{name}: neither the model's tp_plan nor its name says how engines cut it: name it in ignore, or serve "
            "it on one GPU."
        )
        return Shard(name, "whole", "", weight.n, weight.k, problem if degree > 1 else "")
    n, k = weight.n, weight.k
    by = "tp / ep" if ".experts." in name else "tp"
    if cut == "row":
        k, problem = k // degree, _row_problem(weight, degree, by)
    elif cut == "column":
        n, problem = n // degree, _column_problem(weight, degree, by)
    else:
        problem = ""
    rows = together if cut == "column" else n
    if not problem and (reason := formats.find(weight.format).problem(rows, k, weight.scheme)):
        problem = f"each GPU gets {reason}"
    where = f"{name} ({weight.n} x {weight.k}, {degrees}), {weight.scheme}"
    if problem:
        return Shard(name, cut, source, n, k, f"{where}: {problem}.")
    packed = weight.scheme.weights.format in ("int4", "int8") and weight.scheme.activations is None
    tile = marlin.problem(rows, k, weight.scheme.weights) if packed else None
    refused = f"{where}: each GPU gets {tile}; SGLang and vLLM up to 0.22 refuse that, later ones fill it up."
    return Shard(name, cut, source, n, k, "", refused if tile else "")


def _row_problem(weight: Weight, degree: int, by: str) -> str:
    """Why a weight cannot be cut over `degree` GPUs along K, with what would fit; empty if it can.

    `by` is what the degree is called.
    """
    spec, inputs = weight.scheme.weights, weight.scheme.activations
    size = BLOCK if spec.strategy == "block" else spec.group_size or 1
    if inputs is not None:
        size = max(size, inputs.group_size or 1)  # powers of two: the larger one holds the smaller
    whole, rest = divmod(weight.k, degree)
    if not rest and whole % size == 0:
        return ""
    groupings = RULES[spec.scale_rule].groupings if inputs is None and not rest else ()
    fits = [f"group_size={one}" for _, one in groupings if one and whole % one == 0]
    fits += ["strategy='channel'"] * (("channel", None) in groupings)
    fits += [f"{by}={_fewer(weight.k, size, degree)}"]
    what = f"{weight.k} inputs do not divide over {degree} GPUs"
    if not rest:
        what = f"{whole} inputs on each of {degree} GPUs do not divide into groups of {size}"
    return f"{what}: {' or '.join(fits)} would fit"


def _column_problem(weight: Weight, degree: int, by: str) -> str:
    """The same along N, where only blocks and the weight's own rows must not be cut."""
    size = BLOCK if weight.scheme.weights.strategy == "block" and degree > 1 else 1
    whole, rest = divmod(weight.n, degree)
    if not rest and whole % size == 0:
        return ""
    what = f"{weight.n} outputs do not divide over {degree} GPUs"
    if not rest:
        what = f"{whole} outputs on each of {degree} GPUs are no whole blocks of {size}"
    return f"{what}: {by}={_fewer(weight.n, size, degree)} would fit"


def _fewer(length: int, size: int, degree: int) -> int:
    """The most GPUs, but fewer than `degree`, of which each gets whole groups or blocks of `size`."""
    return max((one for one in _DEGREES if one < degree and length % (one * size) == 0), default=1)


def _uneven_experts(weights: Mapping[str, Weight], ep: int) -> list[Shard]:
    """A problem for each layer whose experts do not divide over `ep` groups."""
    experts: dict[str, set[int]] = {}
    for name in weights:
        if match := re.search(r"^(.*\.experts)\.(\d+)\.", name):
            experts.setdefault(match[1], set()).add(int(match[2]))
    return [
        Shard(name, "whole", NAMES, 0, 0, f"{name}: {len(numbers)} experts do not divide over ep={ep}.")
        for name, numbers in experts.items()
        if len(numbers) % ep
    ]


def alike(found: Sequence[Shard]) -> dict[tuple[Any, ...], list[Shard]]:
    """Shards that differ in layer and expert numbers alone, together."""
    groups: dict[tuple[Any, ...], list[Shard]] = {}
    for one in found:
        key = (without_numbers(one.name), one.cut, one.source, one.n, one.k, not one.problem)
        groups.setdefault(key, []).append(one)
    return groups
