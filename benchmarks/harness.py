"""What the benchmarks share: where they ran, how they are timed, and how they write what they found.

Timing: every case of a comparison lives in one process and takes its turn in each round (A B C A B C ...), so that a
drift of the clocks hits all alike; a ratio is the median of the ratios within a round. On CUDA a sample is the time
between two events around several steps, after others of the same case that are not timed, as in training: launching
runs ahead of the device where it can, a path which launches more slowly than the device works shows it, and the clocks
are those that the case itself leads to (after a case that leaves the device half idle they are higher for a while).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

import lockstep
from lockstep import kernels
from lockstep.recipes.demo import machine

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "compressed-tensors", "torchao", "nvidia-modelopt")
MIB = 2**20


class Skipped(Exception):
    """A row that cannot be measured here; the message is the reason that stands in its place."""


# Where it ran ---------------------------------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit: what a number means nothing without."""
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else machine(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        **{package: version(package) for package in PACKAGES},
        "lockstep": lockstep.__version__,
        **commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quantize kernels": quantize_kernels(device),
    }


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any]:
    """The commit, and whether the code differs from it. ``LOCKSTEP_COMMIT`` says it for a copy of the files alone."""
    if "LOCKSTEP_COMMIT" in os.environ or not (ROOT / ".git").exists():
        return {"commit": os.environ.get("LOCKSTEP_COMMIT", "unknown"), "dirty": "unknown"}
    code = ("lockstep", ":(glob)benchmarks/*.py")  # not the results, which a run of all scripts writes as it goes
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", *code)
    return {"commit": head or "unknown", "dirty": "unknown" if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def quantize_kernels(device: torch.device) -> dict[str, str]:
    """For each kernel with which weights could train: "available", or why it is not."""
    scheme = lockstep.Scheme()
    found = [kernel for kernel in kernels.KERNELS if kernel.operator == "quantize"]
    return {kernel.name: kernel.unavailable(scheme, device) or "available" for kernel in found}


def require(package: str, module: str, tested: str) -> None:
    """Raise `Skipped` with the command that installs a peer that is not there."""
    if importlib.util.find_spec(module) is None:
        raise Skipped(f"not installed: pip install {package}=={tested}")


def quantizer(name: str, spec: lockstep.TensorSpec, device: torch.device) -> kernels.Quantizer:
    """The functions of a ``quantize`` kernel, or `Skipped` with the reason why it cannot run here."""
    try:
        return kernels.find("quantize", name, lockstep.Scheme(spec), device).run
    except kernels.KernelUnavailable as error:
        raise Skipped(str(error)) from None


def first_line(error: BaseException) -> str:
    """The kind and the first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}".rstrip(": ")


# Time and memory ------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One row that is measured: `step` is timed; `before` runs ahead of each, and keeps the device no longer busy.

    `row` starts as what identifies the case and is filled by `interleave`; `seconds` has a sample for each round.
    """

    row: dict[str, Any]
    step: Callable[[], object]
    before: Callable[[], object] = lambda: None
    repeats: int = 1  # how often `step` does the work, for a time of one
    seconds: list[float] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether an exception ended the case; its row says which."""
        return self.row.get("status") == "failed"

    def fail(self, error: BaseException) -> None:
        """Turn the row into one that carries the error."""
        self.row |= {"status": "failed", "reason": first_line(error)}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(cases: Sequence[Case], device: torch.device, rounds: int, warmup: int = 2, settle: float = 0.1) -> None:
    """Time all cases in turn. A case that raises ends there, and its row carries the error's first line.

    On CUDA each sample comes after about `settle` seconds of the case's own steps, and takes half as long.
    """
    gc.collect()
    gc.freeze()  # so that the collections between rounds look at little
    gc.disable()
    try:
        for count in range(warmup + rounds):
            # After the warm-up, what compiles or falls back would be timed as something that it is not.
            torch._dynamo.config.error_on_recompile = count >= warmup
            for case in cases:
                if not case.failed:
                    _turn(case, device, settle if count >= warmup else 0.0, keep=count >= warmup)
            gc.collect()
    finally:
        torch._dynamo.config.error_on_recompile = False
        gc.enable()
        gc.unfreeze()
    for case in cases:
        if not case.failed:
            case.row |= {"status": "ok", **spread(case.seconds)}


def _turn(case: Case, device: torch.device, settle: float, keep: bool) -> None:
    try:
        if device.type == "cuda":
            once = _seconds(case, device, 1)
            _seconds(case, device, int(settle / once))
            seconds = _seconds(case, device, max(1, int(settle / 2 / once)))
        else:
            seconds = _seconds(case, device, 1)
    except Exception as error:  # whatever a peer raises: the other rows are still wanted
        case.fail(error)
        return
    if keep:
        case.seconds.append(seconds / case.repeats)


def _seconds(case: Case, device: torch.device, steps: int) -> float:
    """Seconds of a step of the case, over some of them. On a CPU what runs `before` is not counted."""
    if device.type != "cuda":
        case.before()
        started = time.perf_counter()
        case.step()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(steps):
        case.before()
        case.step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / max(1, steps)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile, in milliseconds."""
    deciles = quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 9
    return {"median_ms": 1e3 * median(seconds), "p10_ms": 1e3 * deciles[0], "p90_ms": 1e3 * deciles[-1]}


def add_ratios(cases: Iterable[Case], base: Case | None) -> None:
    """Give each row its time against the base's: the median over rounds of the ratio within a round."""
    for case in cases:
        if base and base.seconds and case.row.get("status") == "ok":
            pairs = zip(case.seconds, base.seconds, strict=True)
            case.row["ratio"] = median(mine / its for mine, its in pairs)


def allocated(device: torch.device) -> int:
    """Bytes that live on the device now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_mib(case: Case, device: torch.device, floor: int) -> float | None:
    """MiB above `floor`, the bytes before the case was built, at the peak of one step after warm-up. None on a CPU."""
    if device.type != "cuda":
        return None
    case.before()
    gc.collect()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    case.step()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    case.before()
    return (peak - floor) / MIB


def add_extra_memory(rows: Sequence[dict[str, Any]], base: str, key: str, same: Sequence[str]) -> None:
    """Give each row its `key` beyond that of the path `base` with the same `same` fields, as ``extra_<key>``."""
    bases = {tuple(row.get(name) for name in same): row.get(key) for row in rows if row["path"] == base}
    for row in rows:
        floor = bases.get(tuple(row.get(name) for name in same))
        if row.get(key) is not None and floor is not None:
            row[f"extra_{key}"] = row[key] - floor


# torch.compile --------------------------------------------------------------------------------------------------------


def compile_for_real() -> None:
    """Make it an error, or at least visible, that something which is called compiled runs in eager mode."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.utils.counters.clear()


def graphs() -> dict[str, int]:
    """What dynamo has made since `compile_for_real`."""
    counters = torch._dynamo.utils.counters
    return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}


def own_code(module: nn.Module) -> nn.Module:
    """`module`, its class made anew with a copy of `forward`'s code.

    Dynamo keeps its cache on the code object. With one of its own no other case's graphs are in the way: neither their
    guards, which are tried one by one at each call, nor their count, of which there is a limit.
    """
    kind = type(module)
    code = kind.forward.__code__.replace(co_name=f"forward_{id(module)}")
    forward = type(kind.forward)(code, kind.forward.__globals__, "forward", None, kind.forward.__closure__)
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return module


# What it found --------------------------------------------------------------------------------------------------------

Column = tuple[str, Callable[[dict[str, Any]], str]]


def number(key: str, digits: int = 2, sign: bool = False) -> Callable[[dict[str, Any]], str]:
    """A table cell for a number that may be missing."""
    return lambda row: "" if row.get(key) is None else f"{row[key]:{'+' if sign else ''},.{digits}f}"


def significant(key: str, digits: int = 3) -> Callable[[dict[str, Any]], str]:
    """A table cell for a number that may be missing and of any size."""
    return lambda row: "" if row.get(key) is None else f"{row[key]:.{digits}g}"


def text(key: str) -> Callable[[dict[str, Any]], str]:
    """A table cell for anything else."""
    return lambda row: "" if row.get(key) is None else str(row[key])


class Benchmark:
    """The rows of one claim, printed as they come and written as JSON, a markdown table and a plot.

    Args:
        name: of the files: ``<name>_<cpu|gpu>.json``, ``.md`` and ``.png``.
        claim: one sentence on what the numbers are.
        columns: header and cell of each column of the table.
        options: of the command line (`arguments`); they are written into the JSON.
    """

    def __init__(self, name: str, claim: str, columns: Sequence[Column], options: argparse.Namespace) -> None:
        self.name, self.claim, self.columns, self.options = name, claim, list(columns), options
        self.rows: list[dict[str, Any]] = []
        self.environment = environment(options.device)
        print(f"# {name}: {claim}\n{self.where}\n\n{self._head}", flush=True)

    @property
    def where(self) -> str:
        """The environment in a line."""
        shown = {key: value for key, value in self.environment.items() if value is not None}
        states = "; ".join(f"{name}: {state}" for name, state in shown.pop("quantize kernels").items())
        versions = ", ".join(f"{key} {value}" for key, value in shown.items() if key != "hardware")
        return f"{shown['hardware']}, {versions}. Kernels: {states}"

    @property
    def _head(self) -> str:
        headers = [header for header, _ in self.columns] + ["note"]
        return f"| {' | '.join(headers)} |\n|{'---|' * len(headers)}"

    def _line(self, row: dict[str, Any]) -> str:
        note = f"{row['status']}: {row['reason']}" if row.get("status") != "ok" else row.get("note", "")
        cells = [cell(row) for _, cell in self.columns] + [note]
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Print rows, keep them, and write the JSON, so that a crash later on takes nothing along."""
        for row in rows:
            self.rows.append(row)
            print(self._line(row), flush=True)
        self._write_json()

    def skip(self, reason: str, **row: Any) -> None:
        """A row that is not measured, with the reason."""
        self.add([{**row, "status": "skipped", "reason": reason}])

    @property
    def _stem(self) -> Path:
        folder = self.options.out or Path()
        return folder / f"{self.name}_{'gpu' if self.options.device.type == 'cuda' else 'cpu'}"

    def _write_json(self) -> None:
        if self.options.out is None:
            return
        self.options.out.mkdir(parents=True, exist_ok=True)
        options = {key: value for key, value in vars(self.options).items() if key != "out"}
        content = {
            "name": self.name,
            "claim": self.claim,
            "environment": self.environment,
            "options": options,
            "rows": self.rows,
        }
        self._stem.with_suffix(".json").write_text(json.dumps(content, indent=2, default=str) + "\n")

    def finish(self, plot: Callable[[Any, list[dict[str, Any]]], None]) -> None:
        """Write the table, and what `plot` draws on matplotlib axes of the rows that were measured."""
        if self.options.out is None:
            return
        self._write_json()
        lines = [f"# {self.name}", "", self.claim, "", self._head, *map(self._line, self.rows), "", self.where]
        chosen = {row["path"]: row["config"] for row in self.rows if "config" in row}
        lines += ["", *(f"- {path}: {config}" for path, config in chosen.items())] if chosen else []
        self._stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
        if measured := [row for row in self.rows if row.get("status") == "ok"]:
            self._plot(plot, measured)
        print(f"written: {self._stem}.json, .md, .png", flush=True)

    def _plot(self, plot: Callable[[Any, list[dict[str, Any]]], None], rows: list[dict[str, Any]]) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(9, max(3.0, min(12.0, 1.5 + 0.3 * len(rows)))), layout="constrained")
        plot(axes, rows)
        axes.set_title(f"{self.name}, {self.environment['hardware']}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(self._stem.with_suffix(".png"), dpi=120)
        plt.close(figure)


def bars(axes: Any, rows: list[dict[str, Any]], label: Callable[[dict[str, Any]], str], key: str, what: str) -> None:
    """Horizontal bars in the rows' order, ours in a colour of their own; ratios on a logarithmic axis."""
    values = [row[key] for row in rows]
    colours = ["#d9480f" if "lockstep" in row["path"] else "#868e96" for row in rows]
    axes.barh(range(len(rows)), values, color=colours)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(what)
    if key == "ratio":
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=0.8)
    for place, value in enumerate(values):
        axes.annotate(f" {value:.3g}", (value, place), va="center", fontsize=7)


def arguments(description: str | None, rounds: int, quick_rounds: int = 5) -> argparse.ArgumentParser:
    """The options that every script takes; `parse` reads them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=None, help="cuda where there is one, else cpu")
    parser.add_argument("--quick", action="store_true", help="sizes for a CPU, so that the scripts cannot rot")
    parser.add_argument("--out", type=Path, help="folder for <name>_<cpu|gpu>.json, .md and .png; without it none")
    parser.add_argument("--rounds", type=int, default=None, help=f"samples a case ({rounds}, quick {quick_rounds})")
    parser.set_defaults(_rounds=(quick_rounds, rounds))
    return parser


def parse(parser: argparse.ArgumentParser, **sizes: tuple[Any, Any]) -> argparse.Namespace:
    """The options, with what was not given taken from ``sizes[option] = (quick, full)``."""
    options = parser.parse_args()
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device: --device cpu --quick runs the small sizes")
    rounds = options._rounds
    del options._rounds
    for name, (quick, full) in {**sizes, "rounds": rounds}.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    options.command = " ".join(["python", *sys.argv])
    return options
