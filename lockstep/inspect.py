"""What a model folder is: of a quantized one its schemes, sizes and traps, of another one what a scheme would do to it.

    >>> print(inspect("out", tp=8))
    >>> print(inspect("meta-llama-folder", scheme="W4A16", tp=8))

Nothing is loaded: names, shapes and sizes come from the headers of the files and from the model on the ``meta`` device.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lockstep.export import card, formats, parallel
from lockstep.export.checkpoint import Checkpoint, CheckpointError
from lockstep.export.directory import ExportError
from lockstep.export.legality import check_exportable
from lockstep.export.masters import INDEX, Stored, check_no_adapter, read_json, stored_tensors
from lockstep.export.parallel import Shard, Weight
from lockstep.export.pieces import other_class, skeleton
from lockstep.export.served import quantized_layers, stored_as
from lockstep.kernels import KERNELS, engines
from lockstep.qat.prepare import PrepareReport, as_text, prepare, run_as_one, show
from lockstep.scheme import Rule, Scheme, dtype_name

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
_IGNORED = ("ignore", "modules_to_not_convert", "ignored_layers")  # as formats call the layers that stay as they are


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. Print it for tables.

    Attributes:
        folder: the folder.
        kind: what it is, in a line.
        schemes: for each scheme and format its layers.
        sizes: bytes by what they are.
        report: what a scheme would do to the modules, for a folder that is not quantized.
        shards: what one GPU gets of each quantized layer.
        kernels: scheme, registered kernel, what that serves, and whether it computes the scheme on this machine.
        problems: what no engine serves as it stands.
        warnings: what an engine may refuse, or serve otherwise than one thinks.
    """

    folder: str
    kind: str
    schemes: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    report: PrepareReport | None = None
    shards: tuple[Shard, ...] = ()
    kernels: tuple[tuple[str, str, str, str], ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __rich__(self):  # type: ignore[no-untyped-def]
        from rich.console import Group
        from rich.table import Column, Table
        from rich.text import Text

        parts: list[Any] = [Text(f"{self.folder}: {self.kind}")]
        for label, messages in (("problem", self.problems), ("warning", self.warnings)):
            parts += [Text(f"{label}: {message}") for message in _numberless(messages)]
        if self.report is not None:
            parts.append(self.report)
        if self.schemes:
            table = Table(
                Column("layers", overflow="fold"), "format", "scheme", title="Quantized layers", title_justify="left"
            )
            for (format, scheme), names in self.schemes.items():
                for pattern, count in _patterns(names).items():
                    table.add_row(f"{pattern}  x{count}" if count > 1 else pattern, format, scheme)
            parts.append(table)
        if self.sizes:
            total = sum(self.sizes.values())
            table = Table("what", "MB", "share", title=f"On disk, {total / 1e6:,.1f} MB", title_justify="left")
            for what, size in self.sizes.items():
                table.add_row(what, f"{size / 1e6:,.1f}", f"{size / max(1, total):.1%}")
            parts.append(table)
        if self.shards:
            sources = ", ".join(dict.fromkeys(one.source for one in self.shards if one.source))
            title = f"One GPU, as {sources} cuts them" if sources else "One GPU"
            layers = Column("layers", overflow="fold")
            table = Table(layers, "cut along", "N x K of a GPU", "", title=title, title_justify="left")
            cut_ones = [one for one in self.shards if one.n]  # of heads and numbers of experts there is a problem alone
            for (pattern, cut, _, n, k, legal), ones in parallel.alike(cut_ones).items():
                shown = f"{pattern}  x{len(ones)}" if len(ones) > 1 else ones[0].name
                along = {"column": "outputs", "row": "inputs", "whole": "not cut"}[cut]
                table.add_row(shown, along, f"{n} x {k}", "fits" if legal else "does not fit")
            parts.append(table)
        if self.kernels:
            here = [cells[:3] for cells in self.kernels if cells[3] == "yes"]
            table = Table("scheme", "kernel", "serves", title="Kernels that run here", title_justify="left")
            for cells in here:
                table.add_row(*cells)
            if here:
                parts.append(table)
            if others := len(self.kernels) - len(here):
                more = "`lockstep kernels` says why, docs/engines.md what engines do by GPU"
                parts.append(Text(f"Registered kernels that do not run here: {others}; {more}."))
        return Group(*parts)

    def __str__(self) -> str:
        return as_text(self, width=160)


def inspect(
    folder: str | Path,
    scheme: str | Scheme | Sequence[Rule] | None = None,
    targets: str | Sequence[str] = ("Linear",),
    ignore: str | Sequence[str] = ("lm_head",),
    format: str | None = None,
    tp: int = 1,
    ep: int = 1,
) -> Inspection:
    """Look at a model folder: a quantized one of any engine's, or masters and what `scheme` would make of them.

    Args:
        folder: a transformers folder. Of masters a ``config.json`` is enough.
        scheme: for masters: a preset's name, a `Scheme` or a recipe. A quantized folder declares its own.
        targets: what would be quantized, as in `lockstep.prepare`.
        ignore: what would be left out.
        format: how it would be stored, as in `lockstep.export.save_pretrained`.
        tp: GPUs that share each layer: is every shard one that the engines' kernels take?
        ep: groups of them that share the experts.

    Raises:
        ValueError: no transformers folder; what `lockstep.prepare` refuses; degrees that make no sense.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        check_no_adapter(folder)
        raise ValueError(f"{folder} has no config.json: give a transformers folder.")
    config = read_json(folder / "config.json")
    if declared := config.get("quantization_config"):
        if not isinstance(declared, dict):
            raise ValueError(f"{folder / 'config.json'}: quantization_config is {declared!r}, and no JSON object.")
        if scheme is not None:
            raise ValueError(f"{folder} is quantized already: inspect it without a scheme.")
        return _quantized(folder, config, tp, ep)
    return _masters(folder, scheme, targets, ignore, format, tp, ep)


def inspect_command(
    model: str,
    scheme: Scheme | str | list[Rule] | None = None,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
    format: str | None = None,
    tp: int = 1,
    ep: int = 1,
) -> int:
    """Show what a folder is: schemes, sizes, what engines do with it; or what a scheme would do to it. 1 for problems.

    Args:
        model: a quantized folder, or a transformers folder of masters, of which config.json is enough.
        scheme: for masters: a preset's name, {weights: {group_size: 64}} or a recipe.
        targets: what would be quantized, as in lockstep.prepare.
        ignore: what would be left out.
        format: how it would be stored; default: each layer in the format of its own scheme.
        tp: over how many GPUs engines would cut each layer.
        ep: over how many groups of them the experts.
    """

    found = inspect(model, scheme, targets, ignore, format, tp, ep)
    show(found)
    return 1 if found.problems else 0


# Masters -------------------------------------------------------------------------------------------------------------


def _masters(
    folder: Path,
    scheme: str | Scheme | Sequence[Rule] | None,
    targets: str | Sequence[str],
    ignore: str | Sequence[str],
    format: str | None,
    tp: int,
    ep: int,
) -> Inspection:
    stored, warnings = {}, []
    if (folder / "model.safetensors").is_file() or (folder / INDEX).is_file():
        stored = stored_tensors(folder)
        warnings += _without_tokenizer(folder)
    sizes = _by_dtype(stored.values())
    if scheme is None:
        if tp > 1 or ep > 1:
            raise ValueError(f"tp={tp}, ep={ep}: what is cut depends on the scheme, which {folder} does not declare.")
        kind = "not quantized; --scheme shows what one would do"
        return Inspection(str(folder), kind, {}, sizes, warnings=tuple(warnings))
    model, _ = skeleton(folder)
    report = prepare(model, scheme, targets, ignore)
    problems = [problem] if (problem := other_class(model, folder)) else []
    try:
        check_exportable(model, format)
    except ExportError as error:
        problems.append(str(error))
    try:
        layers = quantized_layers(model)
        by_layer = stored_as(layers, format)
    except ExportError:  # said above
        return Inspection(str(folder), "not quantized", {}, sizes, report, problems=tuple(problems))
    weights = {
        name: Weight(layer.out_features, layer.in_features, layer.scheme, by_layer[name])
        for name, layer in layers.items()
    }
    shards = _shards(weights, model, tp, ep)
    problems += dict.fromkeys(one.problem for one in shards if one.problem)
    warnings += dict.fromkeys(one.warning for one in shards if one.warning)
    left = 1 - report.quantized_share
    kind = f"not quantized; {left:.1%} of the parameters would stay as they are"
    schemes = dict.fromkeys(layer.scheme for layer in layers.values())
    return Inspection(str(folder), kind, {}, sizes, report, shards, _kernels(schemes), tuple(problems), tuple(warnings))


def _by_dtype(stored: Iterable[Stored]) -> dict[str, int]:
    """Bytes of the tensors of each dtype."""
    sizes: Counter[str] = Counter()
    for one in stored:
        sizes[dtype_name(one.dtype)] += one.bytes
    return dict(sizes)


def _shards(weights: Mapping[str, Weight], model: Any, tp: int, ep: int) -> tuple[Shard, ...]:
    plan = getattr(model, "tp_plan", None) or {}
    text = model.config.get_text_config() if model is not None else None
    heads, kv_heads = (getattr(text, f"num_{one}_heads", None) or 0 for one in ("attention", "key_value"))
    return tuple(parallel.shards(weights, tp, ep, plan, kv_heads, heads))


# Quantized -----------------------------------------------------------------------------------------------------------


def _quantized(folder: Path, config: Mapping[str, Any], tp: int, ep: int) -> Inspection:
    declared = config["quantization_config"]
    method = declared.get("quant_method")
    named = f"quant_method {method}" + (f", format {declared['format']}" if "format" in declared else "")
    warnings = _without_tokenizer(folder)
    try:
        stored = stored_tensors(folder)
        warnings += _size_mismatch(folder, stored)
    except ValueError as error:
        return Inspection(str(folder), named, problems=(str(error),), warnings=tuple(warnings))
    try:
        checkpoint = Checkpoint(folder)
    except CheckpointError as error:
        if "lockstep" in declared:
            problem = f"written by Lockstep, and not as this version writes it: {error}"
            return Inspection(str(folder), named, {}, _by_dtype(stored.values()), problems=(problem,))
        kind = f"{named}, which this version does not read ({error})"
        warnings.append("only sizes are shown, by dtype")
        return Inspection(str(folder), kind, {}, _by_dtype(stored.values()), warnings=tuple(warnings))

    groups: dict[tuple[str, str], list[str]] = {}
    weights = {}
    plain = {*checkpoint.plain_tensors()}
    for name in checkpoint.layers:
        format, scheme = checkpoint.format_of(name), checkpoint.scheme_of(name)
        groups.setdefault((format, str(scheme)), []).append(name)
        codes = stored[f"{name}.{formats.codes_of(format, scheme.weights)}"]
        n, k = _shape(codes.shape, format, scheme)
        weights[name] = Weight(n, k, scheme, format)
    taken = card.sizes(checkpoint, stored)
    sizes = {"codes": taken.codes, "scales, zero points and shapes": taken.scales, "not quantized": taken.plain}

    model = _skeleton_or_none(config, warnings)
    linear = [name.removesuffix(".weight") for name in plain if _is_linear(name, stored)]
    shards = _shards(weights, model, tp, ep)
    problems = [*dict.fromkeys(one.problem for one in shards if one.problem)]
    warnings += dict.fromkeys(one.warning for one in shards if one.warning)
    problems += _unlike_siblings(weights, linear)
    odd = _unusable_patterns(declared)
    problems += [f"{folder / 'config.json'}, quantization_config: {one}" for one in odd]
    if not odd:
        warnings += _ignore_patterns(declared, [*weights], linear, bool(config.get("tie_word_embeddings")))
    if heads := [name for name in weights if name.rpartition(".")[2] == "lm_head"]:
        warnings.append(f"{heads[0]} is quantized: few engines have a kernel for the output layer, and it costs most.")
    schemes = dict.fromkeys(weight.scheme for weight in weights.values())
    kv_cache = f", KV cache {checkpoint.kv_cache}" if checkpoint.kv_cache else ""
    ours = "ours" if "lockstep" in declared else "not written by Lockstep: scale rules are compressed-tensors' own"
    return Inspection(
        str(folder),
        f"{named}{kv_cache}; {ours}",
        {key: tuple(names) for key, names in groups.items()},
        sizes,
        None,
        shards,
        _kernels(schemes),
        tuple(problems),
        tuple(warnings),
    )


def _shape(stored: tuple[int, ...], format: str, scheme: Scheme) -> tuple[int, int]:
    """N and K of a layer, from the shape of its codes."""
    first, second = stored
    bits = scheme.weights.bits
    if format == "gptq":
        return second, first * 32 // bits
    if format == "marlin":
        return second * 32 // bits // 16, first * 16
    if format == "pack-quantized":
        return first, second * 32 // bits
    return first, second * (2 if scheme.weights.format == "fp4_e2m1" else 1)


def _skeleton_or_none(config: Mapping[str, Any], warnings: list[str]) -> Any:
    """The model that a config describes, for its plan; a warning if transformers does not know it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        kind = plain.pop("model_type")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **plain))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).splitlines()[0][:120]
        warnings.append(f"transformers knows no causal language model of this config ({first}): names alone decide.")
        return None


def _is_linear(name: str, stored: Mapping[str, Stored]) -> bool:
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    return name.endswith(".weight") and len(stored[name].shape) == 2 and "embed" not in leaf and leaf != "wte"


def _unlike_siblings(weights: Mapping[str, Weight], linear: Iterable[str]) -> list[str]:
    found = []
    for siblings in run_as_one([*weights, *linear]):
        kinds = {name: str(weights[name].scheme) if name in weights else "not quantized" for name in siblings}
        if len(set(kinds.values())) > 1:
            shown = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
            found.append(f"engines run these as one layer, and they are not alike: {shown}.")
    return found


def _unusable_patterns(declared: Mapping[str, Any]) -> list[str]:
    """What the names that a config leaves out hold that is neither a name nor a regex."""
    found = []
    for key in _IGNORED:
        patterns = declared.get(key) or []
        if not isinstance(patterns, list):
            found.append(f"{key} is {patterns!r}, and no list of names.")
            continue
        for pattern in patterns:
            if not isinstance(pattern, str):
                found.append(f"{key} holds {pattern!r}, which is no name.")
            elif pattern.startswith("re:"):
                try:
                    re.compile(pattern.removeprefix("re:"))
                except re.error as error:
                    found.append(f"{key} holds {pattern!r}, which is no regex: {error}.")
    return found


def _ignore_patterns(
    declared: Mapping[str, Any], quantized: Sequence[str], linear: Sequence[str], tied: bool
) -> list[str]:
    """What is odd about the names that a config leaves out.

    vLLM matches whole names, or regexes, of compressed-tensors and FP8 checkpoints, and parts of names of AWQ ones
    (``is_layer_skipped``, vLLM 0.22); transformers matches parts of them.
    """
    found = []
    every = [*quantized, *linear]
    for pattern in (pattern for key in _IGNORED for pattern in declared.get(key) or ()):
        regex = pattern.removeprefix("re:") if pattern.startswith("re:") else None
        named = [one for one in every if (re.match(regex, one) if regex else f"{one}.".startswith(f"{pattern}."))]
        part_of = [one for one in every if not regex and pattern in one]
        if held := [one for one in named if one in quantized]:
            found.append(f"ignore names {pattern!r}, but {held[0]} is stored quantized.")
        elif not named and part_of:
            swallowed = [one for one in part_of if one in quantized]
            load = "load them as not quantized" if swallowed else "leave them alone"
            names = f"{(swallowed or part_of)[0]} and {len(swallowed or part_of) - 1} more"
            found.append(
                f"ignore names {pattern!r}, which is no layer's name but part of that of {names}: engines that match "
                f"parts of names (vLLM's AWQ, transformers) {load}, others do not."
            )
        elif not named and not (tied and pattern == "lm_head"):
            found.append(f"ignore names {pattern!r}, which matches no linear layer that is stored.")
    return found


def _without_tokenizer(folder: Path) -> list[str]:
    if any((folder / name).is_file() for name in _TOKENIZERS):
        return []
    return [f"{folder} has no tokenizer ({', '.join(_TOKENIZERS[:3])}, ...): engines need one."]


def _size_mismatch(folder: Path, stored: Mapping[str, Stored]) -> list[str]:
    if not (folder / INDEX).is_file():
        return []
    index = read_json(folder / INDEX)
    metadata, found = index.get("metadata"), sum(one.bytes for one in stored.values())
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    odd = [f"{INDEX} says {said} bytes, the files hold {found:,}."] if said is not None and said != found else []
    if lost := sorted({*stored} - {*(index.get("weight_map") or {})}):
        odd.append(f"{lost[0]} and {len(lost) - 1} more are stored, and {INDEX} does not name them.")
    return odd


def _kernels(schemes: Iterable[Scheme]) -> tuple[tuple[str, str, str, str], ...]:
    """The kernels that compute the schemes here, and those that would on a GPU if there is none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    elsewhere = engines.wrong_device(device, lambda _: True, "")
    rows = []
    for scheme in schemes:
        for kernel in (kernel for kernel in KERNELS if kernel.operator == "linear"):
            reason = kernel.unavailable(scheme, device)
            if reason in (None, elsewhere) or device.type == "cuda":
                rows.append((str(scheme), kernel.name, kernel.serves, f"no: {reason}" if reason else "yes"))
    return tuple(rows)


def _patterns(names: Iterable[str]) -> dict[str, int]:
    """Names with their numbers as ``*``, and how many there are of each; a name alone as it is."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(parallel.without_numbers(name), []).append(name)
    return {pattern if len(same) > 1 else same[0]: len(same) for pattern, same in groups.items()}


def _numberless(messages: Iterable[str]) -> list[str]:
    """The first of messages that differ in layer numbers alone, and how many there are."""
    groups: dict[str, list[str]] = {}
    for message in messages:
        groups.setdefault(re.sub(r"\.\d+(?=\.)", ".*", message), []).append(message)
    return [one if not more else f"{one} ({len(more)} more like this)" for one, *more in groups.values()]
