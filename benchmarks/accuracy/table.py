"""The rows of a study as a Markdown table: ``python benchmarks/accuracy/table.py study.json``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from lockstep.report import compare
from lockstep.report.sources import read

# Heading, value of a line of the report, how it is scaled and shown.
COLUMNS: tuple[tuple[str, str, Callable[[float], float], str], ...] = (
    ("bits", "bits_per_weight", float, ".2f"),
    ("perplexity", "perplexity", float, ".4f"),
    ("over bf16, %", "increase", float, "+.2f"),
    ("won back, %", "won_back", float, ".0f"),
    ("next token, %", "accuracy", lambda value: 100 * value, ".2f"),
    ("agrees, %", "agreement", lambda value: 100 * value, ".2f"),
    ("KL", "kl", float, ".4f"),
    ("exact line, %", "exact_line", lambda value: 100 * value, ".2f"),
    ("parses, %", "parses", lambda value: 100 * value, ".1f"),
    ("time a token", "cost", float, ".2f"),
)


def table(path: Path) -> str:
    """Mean over the seeds, with the sample's standard deviation where there are several."""
    (study,) = read([path]).studies
    rows = [["", "seeds", *(heading for heading, *_ in COLUMNS)], ["---"] * (2 + len(COLUMNS))]
    for line in sorted(compare.lines(study), key=lambda line: (line.format != "bf16", line.format)):
        rows.append([line.label, str(len(line.seeds)), *(_shown(line, *column[1:]) for column in COLUMNS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _shown(line: compare.Line, name: str, scaled: Callable[[float], float], form: str) -> str:
    spread = line.values.get(name)
    if spread is None:
        return ""
    around = f" ± {format(scaled(spread.deviation), form.lstrip('+'))}" if spread.deviation is not None else ""
    return format(scaled(spread.mean), form) + around


if __name__ == "__main__":
    print(table(Path(sys.argv[1])), end="")
