"""What is found in runs: logs of trainers, exported checkpoints, the JSON reports of our commands, study records.

A study record is a JSON file that says ``"kind": "lockstep-study"``, see docs/report.md. What cannot be read is named
in `Found.damaged`, what is not read for want of a library in `Found.skipped`; nothing is passed over in silence.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lockstep.align.page import read_log
from lockstep.export.card import Sizes, sizes
from lockstep.export.checkpoint import Checkpoint
from lockstep.export.masters import stored_tensors

DEPTH = 5  # how many levels of folders below a RUN are searched
LARGEST = 256 * 2**20  # bytes of a JSON file: what is larger is none of these
STUDY = "lockstep-study"
LOOKED_FOR = (
    "metrics.csv (Lightning), events.out.tfevents* (TensorBoard), trainer_state.json (Hugging Face), config.yaml, "
    "exported checkpoints, alignment.jsonl, study records, and JSON reports of lockstep align, calibrate, ptq, "
    "sensitivity and plan"
)
# By what a JSON object is known.
_REPORTS = {
    "alignments": {"aligned", "failures", "checkpoint", "layers"},
    "calibrations": {"observer", "batches", "rows"},
    "ptqs": {"method", "scheme", "seconds", "rows"},
    "sensitivities": {"loss", "costs"},
    "plans": {"lines", "totals", "fits"},
}
# What reading a file of another kind, of another version or cut off may raise.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, csv.Error)
_LOGGERS = re.compile(r"csv|tensorboard|lightning_logs|runs|logs|version_\d+")  # folders that loggers add
_OURS_IN_TRAINER = re.compile(r"^train/(?=qat/|spike/)")  # Hugging Face puts its own prefix before it in TensorBoard
_LAYER = re.compile(r"qat/sqnr_db/(?!mean$)(.+)")


class Curve(NamedTuple):
    """One metric of one run: ``(step, value)``, in the order of the steps."""

    run: str
    metric: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Row:
    """A row of a study record: a method at one seed. What was not measured is None.

    `perplexity` is of held-out text, `accuracy` of next tokens, `agreement` of first choices with the bf16 model's and
    `kl` from it in nats; `exact_line` and `parses` are shares; `layers` are signal-to-noise ratios in dB. `kl_share` is
    the share of the divergence from a teacher in the loss; `aligned` is the verdict on the export.
    """

    label: str
    scheme: str
    method: str
    seed: int = 0
    perplexity: float | None = None
    accuracy: float | None = None
    agreement: float | None = None
    kl: float | None = None
    exact_line: float | None = None
    parses: float | None = None
    weight_bytes: int | None = None
    bits_per_weight: float | None = None
    train_seconds: float | None = None
    train_tokens: int | None = None
    peak_bytes: int | None = None
    learning_rate: float | None = None
    kl_share: float | None = None
    quantize_seconds: float | None = None
    served_perplexity: float | None = None
    aligned: bool | None = None
    curve: tuple[tuple[int, float], ...] = ()
    layers: Mapping[str, float] = field(default_factory=dict)
    baseline: str | None = None
    format: str | None = None
    command: str | None = None


class Study(NamedTuple):
    """A study record."""

    path: str
    environment: Mapping[str, Any]
    model: Mapping[str, Any]
    rows: tuple[Row, ...]
    findings: tuple[str, ...]


class Stored(NamedTuple):
    """An exported checkpoint."""

    path: str
    schemes: tuple[str, ...]
    layers: int
    sizes: Sizes


class Report(NamedTuple):
    """A JSON report of one of our commands."""

    path: str
    content: Mapping[str, Any]


@dataclass
class Found:
    """Everything that was found. `skipped` and `damaged` are sentences."""

    runs: list[str] = field(default_factory=list)
    studies: list[Study] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    checkpoints: list[Stored] = field(default_factory=list)
    alignments: list[Report] = field(default_factory=list)
    calibrations: list[Report] = field(default_factory=list)
    ptqs: list[Report] = field(default_factory=list)
    sensitivities: list[Report] = field(default_factory=list)
    plans: list[Report] = field(default_factory=list)
    gaps: list[tuple[str, list[dict[str, Any]]]] = field(default_factory=list)
    configs: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def layers(self) -> dict[str, dict[str, float]]:
        """Signal-to-quantization-noise ratios in dB by layer, of each run or row that has them: the last measured."""
        found: dict[str, dict[str, float]] = {}
        for curve in self.curves:
            if match := _LAYER.fullmatch(curve.metric):
                found.setdefault(curve.run, {})[match[1]] = curve.points[-1][1]
        for study in self.studies:
            for row in study.rows:
                if row.layers:
                    found.setdefault(row.label, dict(row.layers))
        return found


def read(runs: list[str | Path]) -> Found:
    """What is in `runs`, folders or files.

    Raises:
        ValueError: a run is not there, or holds nothing that a report is made of.
    """
    if not runs:
        raise ValueError("a report is made of at least one run: name a folder or a file.")
    found = Found()
    named = {Path(os.path.abspath(run)): Path(run) for run in runs}  # each once
    for run in named.values():
        if not run.exists():
            raise ValueError(f"{run} is not there: RUN is a folder or a file.")
    called = _called([path if path.is_dir() else path.parent for path in named])
    for path, run in named.items():
        before = _count(found)
        if run.is_dir():
            _read_folder(run, called[path], found)
        else:
            _read_file(run, run.parent, called[path.parent], found)
        if _count(found) == before:
            raise ValueError(f"nothing to report was found in {run}. Looked for: {LOOKED_FOR}.")
        found.runs.append(str(run))
    found.curves = _renamed(found.curves)
    return found


def _count(found: Found) -> int:
    """How many things were found. A config alone is nothing to report."""
    return sum(len(value) for name, value in vars(found).items() if name not in ("runs", "configs"))


def _called(folders: Iterable[Path]) -> dict[Path, str]:
    """What each of the absolute `folders` is called: the shortest end of its path that no other one has."""
    lengths = {folder: range(1, 1 + len(folder.parts)) for folder in folders}
    ends = {folder: ["/".join(folder.parts[-one:]) for one in some] for folder, some in lengths.items()}
    taken = Counter(end for every in ends.values() for end in every)
    return {folder: next((end for end in every if taken[end] == 1), every[-1]) for folder, every in ends.items()}


def _read_folder(run: Path, called: str, found: Found) -> None:
    seen, events = len(found.curves), Found()
    states: dict[Path, list[Path]] = {}
    for folder, names in _walk(run):
        if "config.json" in names and _read_checkpoint(folder, found):
            continue  # its other JSON files are a tokenizer's
        for name in names:
            path = folder / name
            if name == "trainer_state.json":  # each checkpoint of a Trainer has the whole log until then
                of_run = folder.parent if folder.name.startswith("checkpoint-") else folder
                states.setdefault(of_run, []).append(path)
            elif ".tfevents." in name:
                _read_file(path, run, called, events)
            else:
                _read_file(path, run, called, found, asked_for=False)
    for of_run, paths in states.items():
        _read_trainer_state(paths, _name(of_run, run, called), found)
    found.skipped += events.skipped
    found.damaged += events.damaged
    found.curves += _without_copies(events.curves, found.curves[seen:])


def _walk(run: Path) -> Iterator[tuple[Path, list[str]]]:
    """The folders of `run` and their files, sorted, at most `DEPTH` levels deep, without hidden ones."""
    for folder, below, names in os.walk(run):
        depth = len(Path(folder).relative_to(run).parts)
        below[:] = sorted(name for name in below if not name.startswith(".")) if depth < DEPTH else []
        yield Path(folder), sorted(names)


def _read_file(path: Path, run: Path, called: str, found: Found, asked_for: bool = True) -> None:
    """Read one file. Of those that were not `asked_for` by name, unknown kinds are left alone."""
    name = path.name
    where = _name(path.parent, run, called)
    try:
        if name == "metrics.csv":
            found.curves += _csv(path, where)
        elif ".tfevents." in name:
            _read_events(path, where, found)
        elif name == "trainer_state.json":
            _read_trainer_state([path], where, found)
        elif name in ("config.yaml", "hparams.yaml"):
            if text := path.read_text(encoding="utf-8").strip().removeprefix("{}"):
                found.configs.append((str(path), text))
        elif name == "alignment.jsonl":
            found.gaps.append((where, read_log(path)))
        elif path.suffix == ".json" and path.stat().st_size <= LARGEST:
            known = _read_json(path, found)
            if asked_for and not known:
                raise ValueError("a JSON file, but no study record and none of our reports")
    except UNREADABLE as error:
        found.damaged.append(f"{path}: {in_a_line(error)}")


def in_a_line(error: BaseException) -> str:
    said = f"{error!r} is missing" if isinstance(error, KeyError) else str(error)
    return " ".join(said.split()) or type(error).__name__


def _name(folder: Path, run: Path, called: str) -> str:
    """What a folder in a run is called in the report: the run's name, and the way to it."""
    inner = folder.relative_to(run) if folder.is_relative_to(run) else Path()
    return "/".join([called, *inner.parts])


# Our own files -------------------------------------------------------------------------------------------------------


def _read_json(path: Path, found: Found) -> bool:
    """Whether it is a report of ours."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return False
    if content.get("kind") == STUDY:
        found.studies.append(_study(path, content))
        if unknown := set().union(*content["rows"]) - Row.__dataclass_fields__.keys():
            found.skipped.append(f"{path}: the report has no place for {', '.join(sorted(unknown))} of its rows.")
        return True
    for kind, keys in _REPORTS.items():
        if keys <= content.keys():
            getattr(found, kind).append(Report(str(path), content))
            return True
    return False


def _study(path: Path, content: Mapping[str, Any]) -> Study:
    rows = content["rows"]
    if not isinstance(rows, list) or not rows:
        raise ValueError("a study record without rows")
    environment, model = (content.get(name) or {} for name in ("environment", "model"))
    if not (isinstance(environment, Mapping) and isinstance(model, Mapping)):
        raise ValueError("environment and model of a study record are objects")
    findings = tuple(map(str, content.get("findings") or ()))
    return Study(str(path), environment, model, tuple(_row(number, row) for number, row in enumerate(rows)), findings)


def _row(number: int, content: Mapping[str, Any]) -> Row:
    """ValueError that names the row and the field."""
    if not isinstance(content, Mapping) or not content.get("label"):
        raise ValueError(f"row {number} of the study has no label")
    known = {name: value for name, value in content.items() if name in Row.__dataclass_fields__}
    where = f"row {number} of the study, {content['label']}"
    for name in ("scheme", "method"):
        known[name] = known.get(name) or ""
    for name in ("label", "scheme", "method", "format", "command"):
        if not isinstance(known.get(name, ""), str | None):
            raise ValueError(f"{where}: {name} is {known[name]!r}, and no text")
    for name, value in known.items():
        numeric = Row.__dataclass_fields__[name].type in ("float | None", "int | None", "int")
        if numeric and value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"{where}: {name} is {value!r}, and no finite number")
    if known.get("baseline") not in (None, "bf16", "rtn"):
        raise ValueError(f"{where}: baseline is {known['baseline']!r}, and neither bf16 nor rtn nor null")
    known["curve"] = tuple((int(step), float(loss)) for step, loss in known.get("curve") or ())
    known["layers"] = {name: float(value) for name, value in (known.get("layers") or {}).items()}
    return Row(**known)


def _read_checkpoint(folder: Path, found: Found) -> bool:
    """Whether `folder` is an exported checkpoint, or a damaged one."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not config.get("quantization_config"):
            return False
        checkpoint = Checkpoint(folder)
        schemes = tuple(dict.fromkeys(str(checkpoint.scheme_of(name)) for name in checkpoint.layers))
        taken = sizes(checkpoint, stored_tensors(folder))
    except UNREADABLE as error:
        found.damaged.append(f"{folder}: {in_a_line(error)}")
        return True
    found.checkpoints.append(Stored(str(folder), schemes, len(checkpoint.layers), taken))
    return True


# Trainers' logs ------------------------------------------------------------------------------------------------------


def _csv(path: Path, run: str) -> list[Curve]:
    """Lightning's CSVLogger: a row for each call of its logger, empty where a metric was not logged."""
    points: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            raise ValueError("no column is called step")
        for number, row in enumerate(reader, 2):
            if None in row or None in row.values():
                raise ValueError(f"line {number} has another number of cells than the first: cut off?")
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    points.setdefault(name, []).append((int(row["step"]), float(value)))
    return _curves(run, points)


def _curves(run: str, points: Mapping[str, list[tuple[int, float]]]) -> list[Curve]:
    return [Curve(run, name, tuple(sorted(values, key=lambda one: one[0]))) for name, values in points.items()]


def _read_trainer_state(paths: list[Path], run: str, found: Found) -> None:
    """The longest of the logs that the checkpoints of one run hold."""
    longest: tuple[int, list[Curve]] = (0, [])
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            curves = _logged(content["log_history"], run)
            if int(content.get("global_step", 0)) >= longest[0]:
                longest = int(content.get("global_step", 0)), curves
        except UNREADABLE as error:
            found.damaged.append(f"{path}: {in_a_line(error)}")
    found.curves += longest[1]


def _logged(log_history: Any, run: str) -> list[Curve]:
    if not isinstance(log_history, list):
        raise TypeError("log_history is no list")
    points: dict[str, list[tuple[int, float]]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                points.setdefault(name, []).append((int(entry["step"]), float(value)))
    return _curves(run, points)


def _read_events(path: Path, run: str, found: Found) -> None:
    """TensorBoard's scalars, old and new style."""
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        found.skipped.append(f"{path}: TensorBoard's files are read with tensorboard, which is not installed.")
        return
    points: dict[str, list[tuple[int, float]]] = {}
    events = 0
    for event in EventFileLoader(str(path)).Load():
        events += 1
        for value in event.summary.value:
            if value.HasField("simple_value"):
                number = value.simple_value
            elif value.HasField("tensor") and value.tensor.dtype == 1 and not value.tensor.tensor_shape.dim:
                number = float(make_ndarray(value.tensor))
            else:
                continue
            tag = _OURS_IN_TRAINER.sub("", value.tag)
            if tag not in ("epoch", "hp_metric"):
                points.setdefault(tag, []).append((event.step, number))
    if not events:
        raise ValueError("no event can be read: empty or truncated")
    found.curves += _curves(run, points)


def _without_copies(curves: list[Curve], others: list[Curve]) -> list[Curve]:
    """Without the runs that `others` hold too: a second logger of the same run, perhaps in fp32, or cut off earlier."""
    of_run, theirs = _by_run(curves), list(_by_run(others).values())
    copies = {run for run, own in of_run.items() if any(_same(own, other) for other in theirs)}
    return [curve for curve in curves if curve.run not in copies]


Logged = Mapping[str, Mapping[int, float]]  # by metric and step


def _by_run(curves: list[Curve]) -> dict[str, Logged]:
    found: dict[str, dict[str, dict[int, float]]] = {}
    for curve in curves:
        found.setdefault(curve.run, {})[curve.metric] = dict(curve.points)
    return {**found}


def _same(one: Logged, other: Logged) -> bool:
    """Whether two logs agree in every metric at every step that both have, and have such."""
    shared = [
        (one[name][step], other[name][step])
        for name in one
        if name in other
        for step in one[name].keys() & other[name].keys()
    ]
    return bool(shared) and all(math.isclose(a, b, rel_tol=1e-5) or (a != a and b != b) for a, b in shared)


def _renamed(curves: list[Curve]) -> list[Curve]:
    """The curves with the names of their runs without what loggers add, where that leaves them apart."""
    short: dict[str, list[str]] = {}
    for run in dict.fromkeys(curve.run for curve in curves):
        parts = run.split("/")
        while len(parts) > 1 and _LOGGERS.fullmatch(parts[-1]):
            parts.pop()
        short.setdefault("/".join(parts), []).append(run)
    names = {run: name for name, runs in short.items() for run in runs if len(runs) == 1}
    return [curve._replace(run=names.get(curve.run, curve.run)) for curve in curves]
