"""What the ablation's runs have written, as figures, a table, sentences and plots: see `lockstep.recipes.ablation`."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.table import Table

# The arms, in the table's order, and their lines in the plots.
STYLES = {
    "bf16-bf16": "C0-",
    "qat-bf16": "C1--",
    "bf16-int4": "C3-.",
    "qat-int4": "C2-",
    "qat-fp8": "C4--",
    "bf16-fp8": "C5-.",
}
SHARE = 0.1  # of the rollouts, at the end, that a figure of the end is the mean over
SPENT = ("sync/seconds",)  # what no two runs share
# The quantile 0.975 of Student's t for 1, 2, ... degrees of freedom.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def read_curve(path: Path) -> list[dict[str, float]]:
    """The lines that are whole; the last one of a killed run may not be."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def figures(curve: Sequence[dict[str, float]], result: dict[str, Any], steps: int) -> dict[str, Any]:
    """What the table shows of one run.

    ``collapsed``: the reward at the end is below half of the best mean over as many consecutive rollouts.
    """
    rewards = [row["rl/reward"] for row in curve]
    gaps = [row["mismatch/mean_abs"] for row in curve]
    looks = [row["held_out/accuracy"] for row in curve if "held_out/accuracy" in row]
    width = max(1, round(SHARE * steps))
    means = [mean(rewards[i : i + width]) for i in range(max(1, len(rewards) - width + 1))]
    return {
        "rollouts": len(curve),
        "first_reward": rewards[0],
        "reward": means[-1],
        "accuracy": result.get("accuracy", looks[-1]),
        "served_accuracy": result.get("served_accuracy"),
        "gap": mean(gaps[-width:]),
        "largest_gap": max(gaps),
        "collapsed": means[-1] < max(means) / 2,
        "complete": bool(result),
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval by Student's t; NaN for a single value."""
    if len(values) < 2:
        return mean(values), math.nan
    t = T975[min(len(values) - 2, len(T975) - 1)]  # beyond the table its last value, which is too wide
    return mean(values), t * stdev(values) / math.sqrt(len(values))


def collect(out: Path, steps: int) -> dict[str, dict[int, dict[str, Any]]]:
    """`figures` of every run of every arm that is there, by arm and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in STYLES:
        for folder in sorted(out.glob(f"seed*/{name}")):
            curve, result = read_curve(folder / "curve.jsonl"), read(folder / "result.json")
            if curve:
                found.setdefault(name, {})[int(folder.parent.name[4:])] = figures(curve, result, steps)
    return found


def table(found: dict[str, dict[int, dict[str, Any]]]) -> Table:
    """Means and 95 % confidence intervals over the seeds; the last column compares seed by seed with the baseline."""
    shown = Table(title="mean and 95 % confidence interval over the seeds", title_justify="left")
    shown.add_column("arm (trainer-rollout)")
    headers = ("seeds", "reward, first", "reward, last", "held-out accuracy", "served quantized")
    for header in (*headers, "gap, last", "gap, largest", "collapsed", "against baseline"):
        shown.add_column(header, justify="right")

    def over(values: Iterable[float | None], form: str) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return "-"
        middle, half = interval(known)
        return format(middle, form) + ("" if math.isnan(half) else f" ± {format(half, form.lstrip('+'))}")

    baseline = found.get("bf16-bf16", {})
    for name, runs in found.items():
        ends = list(runs.values())
        paired = [one["accuracy"] - baseline[seed]["accuracy"] for seed, one in runs.items() if seed in baseline]
        unfinished = [f"seed {seed}: {one['rollouts']}" for seed, one in runs.items() if not one["complete"]]
        shown.add_row(
            name + (f" (rollouts so far: {', '.join(unfinished)})" if unfinished else ""),
            str(len(ends)),
            over([one["first_reward"] for one in ends], ".3f"),
            over([one["reward"] for one in ends], ".3f"),
            over([one["accuracy"] for one in ends], ".3f"),
            over([one["served_accuracy"] for one in ends], ".3f"),
            over([one["gap"] for one in ends], ".2g"),
            over([one["largest_gap"] for one in ends], ".2g"),
            f"{sum(one['collapsed'] for one in ends)} of {len(ends)}",
            "" if name == "bf16-bf16" else over(paired, "+.3f"),
        )
    return shown


def controls(out: Path) -> dict[str, Any]:
    """What the controls found, of those that are there."""
    found: dict[str, Any] = {}
    curve, result = _control(out, "lr0")
    if result:
        fixed = [name for name in curve[0] if name.startswith("held_out/")]
        drifted = sorted(name for name in fixed if len({row[name] for row in curve}) > 1)
        found["lr0"] = {"rollouts": len(curve), "drifted": drifted, "unequal_tensors": result["unequal_tensors"]}
    curve, result = _control(out, "killed")
    unbroken = read_curve(out / "seed0" / "qat-int4" / "curve.jsonl")[: len(curve)]
    if result.get("resumed") and len(unbroken) == len(curve):
        different = sorted(
            {
                name
                for one, other in zip(curve, unbroken, strict=True)
                for name in {*one, *other} - {*SPENT}
                if one.get(name) != other.get(name)
            }
        )
        worst = max(abs(one["rl/reward"] - other["rl/reward"]) for one, other in zip(curve, unbroken, strict=True))
        found["killed"] = {
            "rollouts": len(curve),
            "different": different,
            "largest_reward_difference": worst,
            "gpu": result["environment"]["cuda"] is not None,
        }
    return found


def controls_in_words(found: dict[str, Any]) -> list[str]:
    """A sentence for each control."""
    said = []
    if "lr0" in found:
        one = found["lr0"]
        drift = f"DRIFTED: {', '.join(one['drifted'])}" if one["drifted"] else "not a digit of the gap changed"
        bits = f"UNEQUAL: {', '.join(one['unequal_tensors'])}" if one["unequal_tensors"] else "all tensors are equal"
        said.append(f"learning rate 0, {one['rollouts']} rollouts: {drift}; on the two sides {bits}.")
    if "killed" in found:
        one = found["killed"]
        same = "every number is that of the unbroken run"
        if one["different"]:
            why = "on a GPU sums are not repeatable; " if one["gpu"] else ""
            by = f"{why}reward by up to {one['largest_reward_difference']:.3g}"
            same = f"DIFFERENT: {', '.join(one['different'])} ({by})"
        said.append(f"killed with SIGKILL and resumed, {one['rollouts']} rollouts: {same}.")
    return said


def plot(out: Path, path: Path) -> None:
    """Reward, held-out accuracy and gap over the rollouts: mean over the seeds, and the range that they span."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    panels = figure.subplots(1, 3)
    names = ("rl/reward", "held_out/accuracy", "mismatch/mean_abs")
    titles = (
        "reward of the sampled answers",
        "greedy accuracy on held-out problems",
        "mean |Δ log-prob|, nats",
    )
    for name, style in STYLES.items():
        curves = [read_curve(path) for path in sorted(out.glob(f"seed*/{name}/curve.jsonl"))]
        for axes, metric in zip(panels, names, strict=True):
            lines = [{row["rl/step"]: row[metric] for row in curve if metric in row} for curve in curves]
            steps = sorted(set.intersection(*map(set, lines))) if lines else []
            if not steps:
                continue
            seeds = torch.tensor([[line[step] for step in steps] for line in lines], dtype=torch.float64)
            if metric == "rl/reward":
                seeds = _smooth(seeds)
            axes.plot(steps, seeds.mean(0), style, label=name)
            axes.fill_between(steps, seeds.amin(0), seeds.amax(0), color=style[:2], alpha=0.15, linewidth=0)
    for axes, title in zip(panels, titles, strict=True):
        axes.set(xlabel="rollouts", title=title)
        axes.grid(alpha=0.3)
    panels[2].set_yscale("symlog", linthresh=1e-3)  # shows a gap of 0 too
    if panels[0].lines:
        panels[0].legend()
    figure.suptitle("mean over the seeds, band from the lowest to the highest; reward smoothed over 5 rollouts")
    figure.savefig(path, dpi=130)


def _smooth(values: torch.Tensor, width: int = 5) -> torch.Tensor:
    """The mean over the last `width` steps, or as many as there are: ``[seeds, steps]``."""
    totals = torch.nn.functional.pad(values.cumsum(1), (1, 0))
    ends = torch.arange(1, values.shape[1] + 1)
    starts = (ends - width).clamp(min=0)
    return (totals[:, ends] - totals[:, starts]) / (ends - starts)


def _control(out: Path, name: str) -> tuple[list[dict[str, float]], dict[str, Any]]:
    folder = out / "seed0" / name
    return read_curve(folder / "curve.jsonl"), read(folder / "result.json")


def read(path: Path) -> dict[str, Any]:
    """A JSON file's content; nothing, if it is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, content: Any) -> None:
    """A JSON file, all at once."""
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
