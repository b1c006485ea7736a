"""Whether quantized layers can be cut over GPUs: tensor parallel over `tp` of them, experts over `ep` groups.

A layer that is cut along its outputs (column parallel: q, k, v, gate, up) gives each GPU N / tp rows of the weight; one
that is cut along its inputs (row parallel: o, down) K / tp columns, which must be whole groups, since a group has one
scale and stands on one GPU. Experts are cut over tp / ep GPUs, and their number over ep.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from lockstep.export import formats
from lockstep.layouts import marlin
from lockstep.qat.prepare import run_as_one
from lockstep.scheme import BLOCK, RULES, Scheme

Cut = Literal["column", "row", "whole"]
PLAN, NAMES = "transformers' tp_plan", "the names that engines know"
_DEGREES = (64, 32, 16, 8, 4, 2, 1)  # that are proposed, the most GPUs first
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


class Degrees(NamedTuple):
    """Over how many GPUs what is cut: `tp` share each layer, in `ep` groups that share the experts.

    `plan` is transformers', `heads` and `kv_heads` are the model's; 0: unknown. `eps` are the numbers of groups over
    which the experts can be dealt out.
    """

    tp: int
    ep: int = 1
    plan: Mapping[str, str] = {}
    heads: int = 0
    kv_heads: int = 0
    eps: tuple[int, ...] = ()


def shards(
    weights: Mapping[str, Weight],
    tp: int,
    ep: int = 1,
    plan: Mapping[str, str] | None = None,
    kv_heads: int = 0,
    heads: int = 0,
) -> list[Shard]:
    """What a GPU has of each of the quantized `weights`, and whether the engines' kernels take it.

    What a problem proposes instead was cut by the same function, and fits.

    Args:
        weights: by the names that engines know, experts one by one (``...experts.3.down_proj``).
        tp: GPUs that share each layer.
        ep: groups of them that share the experts; 1: each expert is cut over all of them.
        plan: transformers' ``model.tp_plan``; where it has no word for a layer, its name decides.
        kv_heads: key and value heads, which are repeated where there are fewer than GPUs; 0: unknown.
        heads: attention heads, of which each GPU gets whole ones; 0: unknown.

    Raises:
        ValueError: a degree below 1, or an `ep` that does not divide `tp`.
    """
    if tp < 1 or ep < 1 or tp % ep:
        raise ValueError(f"tp={tp}, ep={ep}: degrees are 1 or more, and the groups of experts divide the GPUs.")
    eps = tuple(one for one in range(1, tp + 1) if tp % one == 0 and not _uneven_experts(weights, one))
    degrees = Degrees(tp, ep, plan or {}, heads, kv_heads, eps)
    found = _uneven_heads(degrees)
    for siblings in run_as_one(weights):
        found += _as_one({name: weights[name] for name in siblings}, degrees)
    return [*found, *_uneven_experts(weights, ep)]


def _as_one(weights: Mapping[str, Weight], degrees: Degrees) -> list[Shard]:
    """The shards of layers that engines run as one, with what would fit instead of one that does not."""
    found = []
    for one in _cut(weights, degrees):
        if one.problem and one.source:  # of one that nobody knows how to cut there is nothing to propose
            fits = " or ".join(_remedies(one.name, weights, degrees))
            one = replace(one, problem=f"{one.problem}{f': {fits} would fit' * bool(fits)}.")
        found.append(one)
    return found


def _remedies(name: str, weights: Mapping[str, Weight], degrees: Degrees) -> list[str]:
    """The group sizes, the most GPUs and the fewest groups of experts with which all of `weights` can be cut."""

    def fits(others: Mapping[str, Weight], degrees: Degrees) -> bool:
        heads = [] if ".experts." in name else _uneven_heads(degrees)
        return not any(one.problem for one in (*_cut(others, degrees), *heads))

    scheme = weights[name].scheme
    spec, found = scheme.weights, []
    for strategy, size in RULES[spec.scale_rule].groupings if scheme.activations is None else ():
        if (strategy, size) == (spec.strategy, spec.group_size):
            continue
        other = replace(scheme, weights=replace(spec, strategy=strategy, group_size=size))
        changed = {one: each._replace(scheme=other) if each.scheme == scheme else each for one, each in weights.items()}
        if fits(changed, degrees):
            found.append(f"group_size={size}" if size else f"strategy={strategy!r}")
    experts = ".experts." in name
    groups = (ep for ep in degrees.eps if experts and ep > degrees.ep and fits(weights, degrees._replace(ep=ep)))
    if (ep := next(groups, None)) is not None:
        return [*found, f"ep={ep}"]
    ep = degrees.ep if experts else 1  # of which the other layers know nothing
    fewer = (one for one in _DEGREES if one < degrees.tp and one % ep == 0)
    legal = (one for one in fewer if fits(weights, degrees._replace(tp=one, ep=ep)))
    return [*found, *(f"tp={one}" for one in legal)][: len(found) + 1]


def _cut(weights: Mapping[str, Weight], degrees: Degrees) -> list[Shard]:
    """The shards of layers that engines run as one, each with its problem, of which the last words are missing."""
    cuts = {name: how_cut(name, degrees.plan) for name in weights}
    over = {name: _degree(name, degrees) for name in weights}
    # Engines put the outputs of siblings below one another, each GPU those that it has.
    rows = {name: weight.n // over[name] for name, weight in weights.items() if cuts[name][0] == "column"}
    return [_shard(name, weights, *cuts[name], over[name], rows, degrees) for name in weights]


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


def _degree(name: str, degrees: Degrees) -> int:
    """Over how many GPUs a layer is cut: keys and values over no more than there are heads of them."""
    if ".experts." in name:
        return degrees.tp // degrees.ep
    kv_heads = degrees.kv_heads
    few = kv_heads and degrees.tp % kv_heads == 0 and name.rpartition(".")[2] in ("k_proj", "v_proj")
    return min(degrees.tp, kv_heads) if few else degrees.tp


def _shard(
    name: str,
    weights: Mapping[str, Weight],
    cut: Cut | None,
    source: str,
    degree: int,
    rows: Mapping[str, int],
    degrees: Degrees,
) -> Shard:
    weight = weights[name]
    n, k, scheme = weight.n, weight.k, weight.scheme
    if cut is None:
        problem = (
            f"{name}: neither the model's tp_plan nor its name says how engines cut it: name it in ignore, or serve "
            "it on one GPU."
        )
        return Shard(name, "whole", "", n, k, problem if degree > 1 else "")
    where = f"{name} ({n} x {k}, tp={degrees.tp}, ep={degrees.ep}), {scheme}"
    if cut == "row":
        k, problem = k // degree, _row_problem(weight, degree)
    elif cut == "column":
        n, problem = n // degree, _column_problem(weight, degree)
    else:
        problem = ""
    if problem:
        return Shard(name, cut, source, n, k, f"{where}: {problem}")
    together, gets = n, "each GPU gets"
    alike = {one.scheme for one in weights.values()} == {scheme}
    if cut == "column" and len(rows) > 1 and alike:  # one message for all of them: it is the same of each
        together = sum(rows.values())
        where = f"{_joined(list(rows))} as one, tp={degrees.tp}, ep={degrees.ep}, {scheme}"
        gets = f"each GPU gets {' + '.join(map(str, rows.values()))} = {together} rows:"
    if reason := formats.find(weight.format).problem(together, k, scheme):
        return Shard(name, cut, source, n, k, f"{where}: {gets} {reason}")
    packed = scheme.weights.format in ("int4", "int8") and scheme.activations is None
    tile = marlin.problem(together, k, scheme.weights) if packed else None
    refused = f"{where}: {gets} {tile}; SGLang and vLLM up to 0.22 refuse that, later ones fill it up."
    return Shard(name, cut, source, n, k, "", refused if tile else "")


def _joined(names: Sequence[str]) -> str:
    """Siblings, of which the first has its whole name: ``model.layers.0.self_attn.q_proj, k_proj and v_proj``."""
    *most, last = (names[0], *(name.rpartition(".")[2] for name in names[1:]))
    return f"{', '.join(most)} and {last}"


def _row_problem(weight: Weight, degree: int) -> str:
    """Why a weight cannot be cut over `degree` GPUs along K; empty if it can."""
    spec, inputs = weight.scheme.weights, weight.scheme.activations
    size = BLOCK if spec.strategy == "block" else spec.group_size or 1
    if inputs is not None:
        size = max(size, inputs.group_size or 1)  # powers of two: the larger one holds the smaller
    whole, rest = divmod(weight.k, degree)
    if rest:
        return f"{weight.k} inputs do not divide over {degree} GPUs"
    return "" if whole % size == 0 else f"{whole} inputs on each of {degree} GPUs do not divide into groups of {size}"


def _column_problem(weight: Weight, degree: int) -> str:
    """The same along N, where only blocks and the weight's own rows must not be cut."""
    size = BLOCK if weight.scheme.weights.strategy == "block" and degree > 1 else 1
    whole, rest = divmod(weight.n, degree)
    if rest:
        return f"{weight.n} outputs do not divide over {degree} GPUs"
    return "" if whole % size == 0 else f"{whole} outputs on each of {degree} GPUs are no whole blocks of {size}"


def _uneven_heads(degrees: Degrees) -> list[Shard]:
    """A problem if the GPUs do not get whole heads each, or an equal number of GPUs each of the heads to repeat."""

    def fits(tp: int) -> bool:
        kv_heads = degrees.kv_heads or degrees.heads
        return degrees.heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)

    if not degrees.heads or fits(degrees.tp):
        return []
    legal = [str(one) for one in range(1, min(degrees.heads, _DEGREES[0]) + 1) if fits(one)]
    heads = f"{degrees.heads} attention heads"
    if degrees.kv_heads not in (0, degrees.heads):
        heads += f" and {degrees.kv_heads} of keys and values"
    problem = f"{heads} do not divide over tp={degrees.tp}: tp={' or '.join(legal)} would fit."
    return [Shard("attention heads", "whole", NAMES, 0, 0, problem)]


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
