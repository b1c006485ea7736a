"""One page for a person who decides: what was compared, what won, at what size and cost, and how far to trust it.

>>> write(["runs/int4", "runs/study.json"], "report.html")
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from lockstep.report.html import page
from lockstep.report.sources import read

__all__ = ["parser", "report_command", "write"]


def write(runs: Sequence[str | Path], out: str | Path = "report.html", title: str = "Quantization report") -> Path:
    """Write what is in `runs` as one self-contained HTML page; returns its absolute path.

    Args:
        runs: folders, searched a few levels deep, or files; `lockstep.report.sources.LOOKED_FOR` says for what. What is
            there and cannot be read is named on the page.
        out: where to write.
        title: what stands on top.

    Raises:
        ValueError: a run is not there or holds nothing to report, or `out` is no ``.html``.
    """
    _write(runs, out, title)
    return Path(out).absolute()


def report_command(words: Sequence[str]) -> int:
    """``lockstep report RUNS...``: 1 if a file could not be read. SystemExit for words that are no usage."""
    asked = parser().parse_args(list(words))
    damaged = _write(asked.runs, asked.out, asked.title)
    for one in damaged:
        print(f"damaged: {one}", file=sys.stderr)
    print(f"written: {Path(asked.out).absolute()}")
    return 1 if damaged else 0


def parser() -> ArgumentParser:
    """The words that ``lockstep report`` takes."""
    made = ArgumentParser(
        prog="lockstep report",
        description="Write one self-contained page about runs: what won, at what size and cost. Exits with 1 if a file "
        "could not be read.",
    )
    runs = "folders (searched for logs, exported checkpoints, reports, study records), or such files"
    made.add_argument("runs", nargs="+", type=str, help=runs)
    made.add_argument("--out", default="report.html", type=str, help="the page to write, .html")
    made.add_argument("--title", default="Quantization report", type=str, help="what stands on top of it")
    return made


def _write(runs: Sequence[str | Path], out: str | Path, title: str) -> list[str]:
    """What was damaged."""
    if Path(out).suffix != ".html":
        raise ValueError(f"{out}: a report is written as .html.")
    found = read(list(runs))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(page(found, title), encoding="utf-8")
    return found.damaged
