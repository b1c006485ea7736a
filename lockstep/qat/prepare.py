"""`prepare` and `unprepare`: switch a model's layers to quantization-aware training and back, by class alone (C5)."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from lockstep.qat.linear import QATLinear
from lockstep.qat.reuse import Kept, Reuse
from lockstep.scheme import DTYPES, Scheme


@dataclass(frozen=True)
class ModuleRow:
    """One module that owns parameters: `scheme` if it trains quantized, else the `reason` why it does not."""

    name: str
    kind: str
    parameters: int
    scheme: Scheme | None = None
    reason: str = ""


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did with each module that owns parameters. Printing it gives a table."""

    rows: tuple[ModuleRow, ...]

    @property
    def quantized(self) -> tuple[ModuleRow, ...]:
        """The modules that train quantized."""
        return tuple(row for row in self.rows if row.scheme)

    @property
    def skipped(self) -> tuple[ModuleRow, ...]:
        """The modules that do not, each with its `reason`."""
        return tuple(row for row in self.rows if not row.scheme)

    @property
    def quantized_share(self) -> float:
        """Share of the parameters that are in quantized modules."""
        return sum(row.parameters for row in self.quantized) / max(1, sum(row.parameters for row in self.rows))

    def __rich__(self):  # type: ignore[no-untyped-def]
        from rich.table import Table

        table = Table(
            title=f"{len(self.quantized)} modules train quantized, {self.quantized_share:.1%} of the parameters",
            title_justify="left",
        )
        for header in ("module", "type", "parameters", "trains as", "why not quantized"):
            table.add_column(header, justify="right" if header == "parameters" else "left", overflow="fold")
        for (name, kind, scheme, reason), rows in _alike(self.rows).items():
            shown = f"{name}  x{len(rows)}" if len(rows) > 1 else rows[0].name
            table.add_row(shown, kind, f"{sum(row.parameters for row in rows):,}", scheme, reason)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def prepare(
    model: nn.Module,
    scheme: str | Scheme,
    targets: str | Sequence[str] = ("Linear",),
    ignore: str | Sequence[str] = ("lm_head",),
    reuse: Reuse | None = None,
) -> PrepareReport:
    """Make the matching layers of `model` train on the weights that `scheme` will serve.

    Swaps ``module.__class__`` in place: no parameter, buffer or state-dict key is added, so optimizers, checkpoints and
    sharding see the model that they know. Doing it twice with the same scheme changes nothing but `reuse`, which is as
    the last call says. Works on the ``meta`` device, where only shapes are checked.

    Args:
        model: any module tree with ``nn.Linear`` layers.
        scheme: a preset's name (``"W4A16"``) or a `Scheme`.
        targets: what to quantize: class names, exact module names or ``re:`` regexes, as in compressed-tensors.
        ignore: what to leave out, in the same words.
        reuse: what a layer keeps while its master stays as it is, for the micro-batches of an optimizer step and for
            activation checkpointing: ``"codes"`` (half a byte a weight), ``"weight"`` (the dequantized weight), or
            None: nothing, each pass quantizes again. See `lockstep.qat.reuse`. It breaks a ``torch.compile`` graph.

    Returns:
        A row for every module that owns parameters: what it trains as, or why it is left as it was.

    Raises:
        ValueError: a target that matches nothing; an unknown preset; rows that do not divide into groups; a module
            that is prepared already, with another scheme or though it is left out now; an unknown `reuse`.
        TypeError: a matched module that is not plain ``nn.Linear``, or whose forward would bypass the quantization.

    Nothing is changed when it raises.
    """
    scheme, model = Scheme.of(scheme), unwrapped(model)
    if reuse not in (None, *get_args(Reuse)):
        raise ValueError(f"reuse={reuse!r}: choose {' or '.join(map(repr, get_args(Reuse)))}, or None.")
    targets, ignore = _patterns(targets), _patterns(ignore)
    modules = dict(model.named_modules())
    matched = _matching(modules, targets)
    for target, names in matched.items():
        if not names:
            raise ValueError(_matches_nothing(target, modules))
    ignored = _matching(modules, ignore)
    for pattern, names in ignored.items():
        if not names and pattern != "lm_head":
            warnings.warn(f"ignore={pattern!r} matches no module of {type(model).__name__}.", stacklevel=2)

    reasons = {name: f"ignored by {pattern!r}" for pattern, names in ignored.items() for name in names}
    chosen = {name: modules[name] for names in matched.values() for name in names if name not in reasons}
    if not chosen:
        raise ValueError(f"nothing to quantize: ignore={list(ignore)} covers all that targets={list(targets)} match.")
    heads = [name for name in chosen if name.endswith(".lm_head")]
    if heads and "lm_head" in ignore:
        raise ValueError(
            f"ignore='lm_head' does not cover {heads[0]}: names start at the module that is prepared. Prepare "
            "the language model itself, or name the head as 're:.*lm_head$'."
        )
    for name, module in chosen.items():
        _check(name, module, scheme, parent=modules[name.rpartition(".")[0]])
        if reuse == "codes" and module.in_features % 8:  # type: ignore[operator]
            raise ValueError(
                f"{name}: reuse='codes' packs 8 codes in a word, not {module.in_features} inputs in a row."
            )
    for name, module in quantized_modules(model):
        if module.scheme != scheme or name not in chosen:
            raise ValueError(_prepared_already(name, module.scheme, scheme))

    for name, module in chosen.items():
        module.__class__ = QATLinear
        module.scheme, module.qualified_name = scheme, name  # type: ignore[assignment]
        module.kept = None if reuse is None else Kept(reuse)  # type: ignore[assignment]
    return PrepareReport(tuple(_rows(modules, reasons, targets)))


def unprepare(model: nn.Module) -> None:
    """Give every prepared layer of `model` its ``nn.Linear`` class back; its master weights stay as trained."""
    for _, module in list(quantized_modules(model)):
        del module.scheme, module.qualified_name, module.kept
        module.__class__ = nn.Linear  # type: ignore[assignment]


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QATLinear]]:
    """Names and modules of the layers that `prepare` switched, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, QATLinear):
            yield name, module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s or data parallelism's wrapper, with the names that engines know."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while (inner := getattr(model, "_orig_mod", model.module if isinstance(model, parallel) else None)) is not None:
        model = inner
    return model


def _check(name: str, module: nn.Module, scheme: Scheme, parent: nn.Module) -> None:
    if type(module) not in (nn.Linear, QATLinear):
        raise TypeError(
            f"{name} is a {type(module).__module__}.{type(module).__name__}: this version quantizes torch.nn.Linear "
            "itself, a subclass or another type has a forward of its own. Name it in ignore, or narrow targets."
        )
    if "weight" not in module._parameters or module.weight.dtype not in DTYPES.values():
        found = module.weight.dtype if "weight" in module._parameters else "one computed from other parameters"
        raise TypeError(f"{name} needs a weight of its own in {', '.join(DTYPES)}, found {found}.")
    if "forward" in vars(module):
        raise TypeError(
            f"{name} has a forward of its own set on the instance (an accelerate hook, for one), which would bypass "
            "the quantization. Remove the hook, prepare, and add it again."
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise TypeError(
            f"{name} is in an nn.TransformerEncoderLayer, whose fast path for inference reads the weight itself and "
            "would bypass the quantization. Call torch.backends.mha.set_fastpath_enabled(False) first."
        )
    try:
        scheme.weights.num_groups(module.in_features)  # type: ignore[arg-type]
    except ValueError as error:
        shape = (module.out_features, module.in_features)
        raise ValueError(f"{name}, weight of shape {shape}: {error} Or name the module in ignore.") from None


def _patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matching(modules: dict[str, nn.Module], patterns: Iterable[str]) -> dict[str, list[str]]:
    # compressed-tensors' own matcher, so that a pattern means here what it means to the engines.
    from compressed_tensors.utils import is_match

    return {
        pattern: [name for name, module in modules.items() if name and is_match(name, module, pattern)]
        for pattern in patterns
    }


def _matches_nothing(target: str, modules: dict[str, nn.Module]) -> str:
    if len(modules) == 1:
        return (
            f"target {target!r}: the model is a bare {type(modules['']).__name__}, wrap it in a module that names it."
        )
    kinds = {type(module).__name__ for module in modules.values() if not list(module.children())}
    names = [*kinds, *modules, *{name.rpartition(".")[2] for name in modules}]
    near = difflib.get_close_matches(target, names, n=3)
    advice = f"near ones are {', '.join(near)}" if near else f"its leaf modules are {', '.join(sorted(kinds))}"
    return f"target {target!r} matches no module: {advice}. Targets are class names, exact names or 're:' regexes."


def _prepared_already(name: str, old: Scheme, new: Scheme) -> str:
    wanted = f"it cannot train as {new} too" if old != new else "it is not among the modules to quantize now"
    return f"{name} is prepared with {old}; {wanted}. Call lockstep.unprepare(model) first."


def _rows(modules: dict[str, nn.Module], reasons: dict[str, str], targets: Sequence[str]) -> Iterator[ModuleRow]:
    owners: dict[int, str] = {}  # a parameter under two names is counted under the first
    for name, module in modules.items():
        own = list(module.parameters(recurse=False))
        shared = {owners[id(parameter)] for parameter in own if id(parameter) in owners}
        parameters = sum(parameter.numel() for parameter in own if id(parameter) not in owners)
        owners |= {id(parameter): name for parameter in own if id(parameter) not in owners}
        if isinstance(module, QATLinear):
            yield ModuleRow(name, "Linear", parameters, module.scheme)
        elif own:
            reason = reasons.get(name, f"not a target ({', '.join(targets)})")
            tied = f", tied to {', '.join(sorted(shared))}" if shared else ""
            yield ModuleRow(name, type(module).__name__, parameters, None, reason + tied)


def _alike(rows: Iterable[ModuleRow]) -> dict[tuple[str, str, str, str], list[ModuleRow]]:
    """Rows that differ in layer numbers alone, together."""
    alike: dict[tuple[str, str, str, str], list[ModuleRow]] = {}
    for row in rows:
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.name), row.kind, str(row.scheme or "-"), row.reason)
        alike.setdefault(key, []).append(row)
    return alike
