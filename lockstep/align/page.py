"""What is measured of the gap during training: a log that survives a kill, and a page that grows with it.

The log has a JSON object a line. A measurement is ``{"step", "version", "gap", "prompt", "tokens", "floor", "limit"}``,
`gap` and `prompt` being `lockstep.align.Gap.values` of the sampled and of the prompt's tokens, `prompt` null if there
are none; an event is ``{"step", "event", "message"}``: ``start``, ``floor`` with its value, and the actions. What a run
finds in the log of the step at which it starts, or later, is superseded: it measures it again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.align.html import document, svg, table

Record = Mapping[str, Any]

SHOWN = 40  # the latest measurements, in the page's table


def append(path: Path, record: Record) -> None:
    """Write one line at the end of the log, on the disk when this returns. What is not finite becomes null.

    Raises:
        OSError: it could not be written whole, as on a full disk. The log ends where it did before.
    """
    line = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
    with path.open("ab", buffering=0) as file:  # a buffer would be written again when the file is closed
        before = file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(before)
            raise OSError(error.errno, error.strerror, str(path)) from error


def mend(path: Path) -> None:
    """Cut off a last line that a kill has left half-written, so that the next one begins a line."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records that hold: without what a later start superseded, and without a half-written last line.

    Raises:
        ValueError: another line is no JSON object: names it.
    """
    records: list[dict[str, Any]] = []
    content = path.read_bytes() if path.exists() else b""
    *lines, _ = content.split(b"\n")  # after the last newline there is nothing, or what was cut off
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no record of alignment: {error}. Move the log away.") from error
        if record.get("event") == "start":
            records = [one for one in records if one["step"] < step]
        records.append(record)
    return records


def write_page(path: Path, records: Sequence[Record]) -> None:
    """Write the page of `records`, all at once: a reader finds the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page(records), encoding="utf-8")
    os.replace(partial, path)


def page(records: Sequence[Record]) -> str:
    """The log as one self-contained HTML page: no script, no font, no image from elsewhere."""
    measured = [one for one in records if "gap" in one]
    events = [one for one in records if "event" in one]
    if not measured:
        return _html('<p class="lead">Nothing is measured yet.</p>' + _events(events))
    last = measured[-1]
    aligned = last["gap"]["mean_abs"] is not None and last["gap"]["mean_abs"] <= last["limit"]
    verdict = f'<span class="verdict {"yes" if aligned else "no"}">{"" if aligned else "not "}aligned</span>'
    floor = last["floor"]
    times = f", {last['gap']['mean_abs'] / floor:.3g} times the floor" if floor and last["gap"]["mean_abs"] else ""
    body = (
        f"<p>At step {last['step']}: {verdict} mean |log-probability difference| {_number(last['gap']['mean_abs'])}"
        f" nats{times}; floor {_number(floor)}, limit {_number(last['limit'])}; {last['tokens']} sampled tokens.</p>"
        f"<h2>Over the steps</h2>{svg(figure(records))}"
        f"<h2>Latest</h2>{_latest(last)}{_events(events)}"
        f"<h2>Measurements</h2>{_measurements(measured)}"
    )
    return _html(body)


def figure(records: Sequence[Record]) -> Any:
    """A matplotlib figure of a log: the gap with floor and limit, k3, and effective sample sizes, over the steps."""
    from matplotlib.figure import Figure

    measured = [one for one in records if "gap" in one]
    steps = [one["step"] for one in measured]

    def series(name: str) -> list[float]:
        return [math.nan if one["gap"][name] is None else one["gap"][name] for one in measured]

    drawing = Figure(figsize=(10, 9))  # laid out by hand: a solver's time would be most of what a page takes
    gap, k3, ess = drawing.subplots(
        3,
        1,
        sharex=True,
        height_ratios=(2, 1, 1),
        gridspec_kw={"left": 0.09, "right": 0.82, "top": 0.96, "bottom": 0.06},
    )
    gap.plot(steps, series("mean_abs"), "o-", color="#0969da", markersize=4, label="mean |difference|")
    gap.plot(steps, series("p99_abs"), "-", color="#8ab4e8", linewidth=1, label="99th percentile")
    gap.plot(steps, [one["limit"] for one in measured], "--", color="#b42318", linewidth=1, label="limit")
    gap.plot(steps, [one["floor"] for one in measured], "-", color="#1a7f37", linewidth=1, label="floor")
    gap.set(ylabel="nats", title="Trainer against engine, log-probabilities of the same tokens")
    k3.plot(steps, series("k3"), "o-", color="#0969da", markersize=4)
    k3.set(ylabel="k3, nats")
    ess.plot(steps, series("ess"), "o-", color="#0969da", markersize=4, label="tokens")
    ess.plot(steps, series("ess_sequence"), "s-", color="#bc4c00", markersize=4, label="sequences")
    ess.set(ylabel="effective sample size", xlabel="optimizer step", ylim=(-0.03, 1.05))
    for axes, names in ((gap, ("mean_abs", "p99_abs")), (k3, ("k3",))):
        values = [value for name in names for value in series(name) if not math.isnan(value)]
        if values and min(values) > 0:
            axes.set_yscale("log")
    marked: set[str] = set()
    for event in (one for one in records if one.get("event") in _COLOURS):
        kind = event["event"]
        for axes in (gap, k3, ess):
            label = kind if axes is gap and kind not in marked else None
            axes.axvline(event["step"], color=_COLOURS[kind], linewidth=1.6, linestyle=":", label=label)
        marked.add(kind)
    for axes in (gap, ess):
        axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.005, 1), borderaxespad=0)
    for axes in (gap, k3, ess):
        axes.grid(alpha=0.25)
    return drawing


_COLOURS = {
    "start": "#888888",
    "warn": "#bc4c00",
    "resync": "#8250df",
    "tis on": "#bf3989",
    "tis off": "#0a8a8a",
    "stop": "#b42318",
}


_STYLE = """
th:first-child, td:first-child { min-width: 0 }
.events th, .events td { text-align: left; white-space: nowrap }
.events td:last-child { white-space: normal; width: 80% }
"""


def _html(body: str) -> str:
    return document("Trainer and engine", f"<h1>Does the engine sample from what is trained?</h1>\n{body}\n", _STYLE)


_WORDS = {
    "mean_abs": "mean |difference|, nats",
    "p99_abs": "99th percentile of |difference|, nats",
    "max_abs": "largest |difference|, nats",
    "k1": "k1 estimate of KL(rollout || trainer), nats",
    "k3": "k3 estimate of the same, nats",
    "perplexity_ratio": "perplexity, trainer / rollout",
    "ratio_mean": "importance ratio, mean",
    "ratio_max": "importance ratio, largest",
    "ess": "effective sample size, tokens",
    "ess_sequence": "effective sample size, sequences",
    "pearson": "correlation of probabilities",
}


def _latest(record: Record) -> str:
    prompt = record.get("prompt")
    header = ("measure", "sampled tokens", *(["prompt tokens"] if prompt else []))
    rows = (
        (False, (words, _number(record["gap"][name]), *([_number(prompt[name])] if prompt else [])))
        for name, words in _WORDS.items()
    )
    return table(header, rows)


def _measurements(measured: Sequence[Record]) -> str:
    names = ("mean_abs", "p99_abs", "max_abs", "k3", "ratio_max", "ess", "ess_sequence", "pearson")
    header = ("step", "version", "floor", "limit", *(name.replace("_", " ") for name in names))
    rows = []
    for one in reversed(measured[-SHOWN:]):
        gap = one["gap"]
        over = gap["mean_abs"] is None or not gap["mean_abs"] <= one["limit"]
        first = (str(one["step"]), str(one["version"]), _number(one["floor"]), _number(one["limit"]))
        rows.append((over, (*first, *(_number(gap[name]) for name in names))))
    omitted = len(measured) - SHOWN
    note = f"<p>The {omitted} before these are in the log.</p>" if omitted > 0 else ""
    return table(header, rows) + note


def _events(events: Sequence[Record]) -> str:
    if not events:
        return ""
    rows = ((one["event"] == "stop", (str(one["step"]), one["event"], one.get("message", ""))) for one in events)
    return f'<h2>Events</h2><div class="events">{table(("step", "event", "what happened"), rows)}</div>'


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
