"""Whether an engine runs what is trained: its scope, layer by layer, and its weights.

Three say how each linear layer is quantized, and must agree: the trainer's modules, the checkpoint's config, and the
engine's live modules. Each live layer is given known inputs (`lockstep.export.rollout.probes`), and where the engine
can tell, the checksums of what lies in it are compared with those of what was sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lockstep.export import compressed_tensors, formats
from lockstep.export.checkpoint import Checkpoint, CheckpointError
from lockstep.export.entries import Entry
from lockstep.export.rollout import probes
from lockstep.export.rollout.engine import LiveLayer, RolloutEngine
from lockstep.export.rollout.probes import Evidence, Trained
from lockstep.export.served import Layer
from lockstep.qat.prepare import FUSED, run_as_one
from lockstep.scheme import Scheme

# Of a config: what decides how the layers are put together, where no weight shows it.
ARCHITECTURE = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
    "rms_norm_eps",
    "hidden_act",
    "sliding_window",
)
EXPLAINED = 32  # wrong layers that are looked into: their outputs are kept for that


class AuditError(RuntimeError):
    """The engine does not run what is trained. `problems` says for each layer or tensor what was found."""

    def __init__(self, message: str, problems: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.problems = dict(problems or {})


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    `problems` says for each guilty layer or tensor, by the name that engines know, what was found; `checked` counts the
    layers or tensors that were compared; `skipped` are those that could not be, each with the reason.
    """

    problems: dict[str, str]
    checked: int
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def assert_ok(self) -> None:
        """Raises AuditError, naming every guilty layer, if there are problems."""
        if self.problems:
            raise AuditError(str(self), self.problems)

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} could not be" if self.skipped else ""
        head = f"{self.checked} compared{skipped}, {len(self.problems)} not as they are trained"
        return "\n".join([head + (":" if self.problems else "."), *(f"  {k}: {v}" for k, v in self.problems.items())])


def trained_layers(entry: Entry, layers: Mapping[str, Layer], plain: bool) -> list[Trained]:
    """The linear layers of the module `entry`, within its `whole` block.

    `layers` are the quantized ones of it; with `plain`, or without any, what is stored of it is served as it is.
    """
    if layers and not plain:
        return [_trained(name, layer) for name, layer in layers.items()]
    weights = ((name, tensor) for name, tensor in entry.tensors() if name.endswith(".weight") and tensor.ndim == 2)
    return [Trained(name.removesuffix(".weight"), None, tensor, tensor) for name, tensor in weights]


def _trained(name: str, layer: Layer) -> Trained:
    served = layer.scheme.weights.served_dtype
    return Trained(name, layer.scheme, layer.quantize(), layer.weight.detach().to(served), layer.stored_scale())


# The scope -----------------------------------------------------------------------------------------------------------


def declared(config: Mapping[str, Any], names: Sequence[str], dtype: torch.dtype) -> dict[str, Scheme | None]:
    """The scheme that a ``quantization_config`` declares for each of the linear layers `names`; None: as it is.

    Raises:
        ValueError, KeyError, TypeError: it cannot be read.
    """
    from compressed_tensors.utils.match import match_targets

    _, groups = formats.declared(config, dtype)
    linear = nn.Linear(1, 1, device="meta")
    ignored = list(config.get("ignore") or config.get("modules_to_not_convert") or ())
    ignored += [pattern.replace("-:", "re:", 1) for pattern in config.get("dynamic") or () if pattern[:2] == "-:"]
    kept = [name for name in names if not match_targets(name, linear, ignored)]
    found = compressed_tensors.layers_of(groups, kept)
    return {name: found[name].scheme if name in found else None for name in names}


def stored(folder: str | Path, names: Sequence[str]) -> dict[str, Scheme | None]:
    """The scheme of each of the layers `names`, and of what else is quantized, in a checkpoint folder."""
    path = Path(folder)
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path / 'config.json'}: {error}") from error
    if not config.get("quantization_config"):
        return dict.fromkeys(names)
    checkpoint = Checkpoint(path)
    return dict.fromkeys(names) | {name: checkpoint.scheme_of(name) for name in checkpoint.layers}


def config_problems(
    trained: Mapping[str, Scheme | None], config: Mapping[str, Scheme | None], where: str
) -> dict[str, str]:
    """Where the trainer and a checkpoint's config say two things of a layer."""
    problems = {}
    for name in {**trained, **config}:
        ours, theirs = trained.get(name), config.get(name)
        if ours != theirs:
            problems[name] = f"trains as {ours or 'it is'}, {where} declares {theirs or 'it as it is'}"
    return problems


def scope_problems(trained: Mapping[str, tuple[str, int]], live: Mapping[str, LiveLayer]) -> dict[str, str]:
    """Where the engine's live modules are others than the trainer's, which are precisions and numbers of outputs."""
    problems: dict[str, list[str]] = {}
    for name, (precision, outputs) in trained.items():
        if name not in live:
            continue
        one = live[name]
        if one.precision != precision:
            found = f"trains as {precision}, the engine runs it as {one.precision} ({one.module}, {one.kernel})"
            problems.setdefault(name, []).append(found)
        if one.rows[1] - one.rows[0] != outputs:
            found = f"has {outputs} outputs, the engine gives it rows {one.rows[0]} to {one.rows[1]} of {one.module}"
            problems.setdefault(name, []).append(found)
    for name in live.keys() - trained.keys():
        problems[name] = [f"the engine runs it as {live[name].precision}, the trainer has no such linear layer"]
    order = {leaf: place for parts in FUSED for place, leaf in enumerate(parts)}
    for siblings in run_as_one(name for name in trained if name in live):
        together = [name for name in siblings if live[name].module == live[siblings[0]].module]
        together.sort(key=lambda name: order.get(name.rpartition(".")[2], 0))
        for first, second in pairwise(together):
            if live[first].rows[1] != live[second].rows[0]:
                found = (
                    f"is rows {live[second].rows[0]} to {live[second].rows[1]} of {live[second].module}, but {first} "
                    f"ends at {live[first].rows[1]}: rows of a fused module are swapped"
                )
                problems.setdefault(second, []).append(found)
    return {name: "; ".join(found) for name, found in problems.items()}


def architecture_problems(model: nn.Module, engine: RolloutEngine) -> dict[str, str]:
    """Where the configs of the trainer's and of the engine's model differ, under ``config``, if the engine shows its.

    Two models with the same tensors may compute differently with them: by other heads, positions or windows. Compared
    are `ARCHITECTURE`, as far as both configs have it: engines add entries of their own.
    """
    ours, theirs = _text_config(model), _text_config(engine)
    if ours is None or theirs is None:
        return {}
    found = [
        f"{name} is {getattr(ours, name)} in training and {getattr(theirs, name)} in the engine"
        for name in ARCHITECTURE
        if hasattr(ours, name) and hasattr(theirs, name) and _differ(getattr(ours, name), getattr(theirs, name))
    ]
    return {"config": "; ".join(found)} if found else {}


def _text_config(owner: Any) -> Any:
    text = getattr(getattr(owner, "config", None), "get_text_config", None)
    return text() if callable(text) else None


def _differ(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return any(_differ(ours[key], theirs[key]) for key in ours.keys() & theirs.keys())
    return bool(ours != theirs)


# The audit -----------------------------------------------------------------------------------------------------------


class Inspection:
    """An audit of `engine`: `look` at each trained layer, then, if there are `suspects`, `explain` with each again.

    In the second pass each trained layer is compared with every suspect, which may hold its weight.

    Args:
        engine: what is audited.
        scope: the scheme of each linear layer of the trainer; None: not quantized.
        seen: fingerprints of the layers in earlier audits, by version, to tell stale weights.
    """

    def __init__(
        self, engine: RolloutEngine, scope: Mapping[str, Scheme | None], seen: Mapping[int, Mapping[str, int]]
    ) -> None:
        self._engine, self._scope, self._seen = engine, scope, seen
        self._trained: dict[str, tuple[str, int]] = {}
        self._explained: dict[str, list[str]] = {}
        self._checked, self._skipped = 0, dict[str, str]()
        self.suspects: dict[str, Evidence] = {}
        self.moved: set[str] = set()  # suspects that the trainer has changed since they were sent
        self.fingerprints: dict[str, int] = {}
        try:
            self._live: Mapping[str, LiveLayer] | None = engine.live_layers()
        except NotImplementedError as error:
            self._live = None
            self._skipped["live modules"] = str(error) or f"{type(engine).__name__} does not show them"

    def look(self, layer: Trained) -> None:
        """Give the live layer known inputs."""
        if layer.name not in self._scope:  # an embedding
            return
        self._trained[layer.name] = (layer.precision, layer.master.shape[0])
        if self._live is not None and layer.name not in self._live:
            return
        try:
            evidence, mark = probes.look(self._engine, layer)
        except NotImplementedError as error:
            self._skipped[layer.name] = str(error) or f"{type(self._engine).__name__} does not run single layers"
            return
        self._checked += 1
        if mark is not None:
            self.fingerprints[layer.name] = mark
        if evidence is not None:
            few = len(self.suspects) < EXPLAINED
            self.suspects[layer.name] = evidence if few else evidence._replace(hot=None, dense=torch.empty(0))

    def explain(self, layer: Trained) -> None:
        """Find out whether a suspect holds the weight of `layer`, or is `layer` itself with a known fault."""
        for name, evidence in [*self.suspects.items()][:EXPLAINED]:
            ask = probes.explain if name == layer.name else probes.explain_by
            what = ask(evidence, layer)
            if what is not None:
                self._explained.setdefault(name, []).append(what)

    def report(
        self,
        configs: Mapping[str, Mapping[str, Any]],
        checkpoint: str | Path | None,
        stored_tensors: Mapping[str, str],
        architecture: Mapping[str, str],
    ) -> AuditReport:
        """What was found.

        Args:
            configs: each a ``quantization_config``, by the words to call it.
            checkpoint: a folder to compare, or None.
            stored_tensors: what lies wrong in the engine, by tensor.
            architecture: see `architecture_problems`.
        """
        found: list[Iterable[tuple[str, str]]] = []
        served = [layer.weights.served_dtype for layer in self._scope.values() if layer is not None]
        dtype = served[0] if served else torch.bfloat16
        for where, config in configs.items():
            of_config = declared(config, [*self._scope], dtype)
            found.append(config_problems(self._scope, of_config, where).items())
        if checkpoint is not None:
            found.append(config_problems(self._scope, stored(checkpoint, [*self._scope]), str(checkpoint)).items())
        if self._live is not None:
            found.append(self._missing(self._live).items())
            live = {
                name: layer for name, layer in self._live.items() if name in self._trained or name not in self._scope
            }
            found.append(scope_problems(self._trained, live).items())
        found.append((name, self._words(name, evidence)) for name, evidence in self.suspects.items())
        linear = {**self._scope, **(self._live or {})}
        found.append(
            (layer_of(tensor), f"{tensor.rpartition('.')[2]}: {what}") if layer_of(tensor) in linear else (tensor, what)
            for tensor, what in stored_tensors.items()
        )
        found.append(architecture.items())
        return AuditReport(merged(*found), self._checked, self._skipped)

    def _missing(self, live: Mapping[str, LiveLayer]) -> dict[str, str]:
        problems = {}
        for name, scheme in self._scope.items():
            if name in live and name not in self._trained:
                self._skipped[name] = "its weight is stored under another name, to which it is tied"
            elif name not in live and scheme is None:
                self._skipped[name] = "not quantized, and the engine names no such layer"
            elif name not in live:
                problems[name] = f"trains as {scheme}, the engine runs no such layer"
        return problems

    def _words(self, name: str, evidence: Evidence) -> str:
        if name in self.moved:
            return f"the trainer has changed it since the last sync: sync, then audit ({evidence.found})"
        mark = evidence.mark
        stale = [version for version, of in sorted(self._seen.items()) if mark is not None and of.get(name) == mark]
        if stale:
            return f"stale: it holds the weight of version {stale[-1]} ({evidence.found})"
        why = self._explained.get(name, [])
        return f"{'; '.join(dict.fromkeys(why))} ({evidence.found})" if why else evidence.found


# Checksums -----------------------------------------------------------------------------------------------------------


def compare_checksums(
    expected: Mapping[str, int],
    lying: Mapping[str, int],
    history: Mapping[int, Mapping[str, int]],
    version: int | None,
) -> dict[str, str]:
    """For each tensor that lies in the engine otherwise than expected, what lies there.

    Args:
        expected: checksums of the trainer's tensors.
        lying: those of the engine's.
        history: those of earlier syncs, by version.
        version: of the engine now.
    """
    owners: dict[int, list[str]] = {}
    for name, total in expected.items():
        owners.setdefault(total, []).append(name)
    problems = {}
    for name, total in expected.items():
        if name not in lying:
            problems[name] = "the engine has no such tensor"
        elif lying[name] != total:
            problems[name] = _lies(name, lying[name], owners, history, version)
    for name in lying.keys() - expected.keys():
        problems[name] = "the trainer has no such tensor"
    return problems


def _lies(
    name: str,
    total: int,
    owners: Mapping[int, Sequence[str]],
    history: Mapping[int, Mapping[str, int]],
    version: int | None,
) -> str:
    since = [number for number, sums in sorted(history.items()) if sums.get(name) == total]
    if since and since[-1] == version:
        return f"the engine holds it as of version {version}, the trainer has changed it since: sync"
    if since:
        return f"stale: the engine still holds that of version {since[-1]}"
    if len(others := owners.get(total, ())) == 1:
        return f"the engine holds {others[0]} in its place"
    for number, sums in sorted(history.items(), reverse=True):
        others = [other for other, of_other in sums.items() if of_other == total]
        if len(others) == 1:
            return f"the engine holds {others[0]} of version {number} in its place"
    return "the engine holds other bits"


def layer_of(tensor: str) -> str:
    """The name of the layer that a stored tensor is of."""
    return tensor.rpartition(".")[0]


def merged(*findings: Iterable[tuple[str, str]]) -> dict[str, str]:
    """All that was found of each name."""
    found: dict[str, list[str]] = {}
    for name, what in (item for one in findings for item in one):
        found.setdefault(name, []).append(what)
    return {name: "; ".join(dict.fromkeys(whats)) for name, whats in found.items()}
