"""``make ablation``: what a mismatch between trainer and rollout engine does to reinforcement learning, measured.

    python -m lockstep.recipes.ablation [--size cpu] [--seeds 3] [--jobs 2] [--out runs/ablation]

For each seed a small model learns sums from solved examples, in bf16, until it solves a good part of them. From that
one start, every arm runs GRPO (`lockstep.recipes.grpo`) on the same problems in the same order, with the same settings:

    bf16-bf16   bf16 trainer, bf16 rollouts: the baseline
    qat-bf16    INT4 QAT, bf16 rollouts
    bf16-int4   bf16 trainer, its weights rounded to INT4 for the rollouts
    qat-int4    INT4 QAT, INT4 rollouts: both sides hold the same weights
    qat-fp8, bf16-fp8   the same two in FP8, weights and inputs

and two controls: ``lr0``, qat-int4 with a learning rate of 0, in which nothing may drift; and ``killed``, qat-int4
of the first seed, which gets SIGKILL half-way, is resumed, and must give the curve of the unbroken run.

Every run is a process of its own and writes its curve as it goes. What is there is not run again, and ``--report-only``
makes the table and the plots of whatever is there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table

import lockstep
from lockstep.callbacks import QATCallback
from lockstep.recipes.arithmetic import CHARACTERS, END, IGNORED, Arithmetic, encode, solved
from lockstep.recipes.demo import machine
from lockstep.recipes.grpo import GRPO, accuracy, open_session

INT4, FP8 = "W4A16", "FP8_DYNAMIC"


@dataclass(frozen=True)
class Arm:
    """What the trainer's forward computes with, and what the engine serves: a scheme, or None for bf16."""

    trains: str | None
    serves: str | None


ARMS = {
    "bf16-bf16": Arm(None, None),
    "qat-bf16": Arm(INT4, None),
    "bf16-int4": Arm(None, INT4),
    "qat-int4": Arm(INT4, INT4),
    "qat-fp8": Arm(FP8, FP8),
    "bf16-fp8": Arm(None, FP8),
}
FOUR = ("bf16-bf16", "qat-bf16", "bf16-int4", "qat-int4")
CONTROLS = ("lr0", "killed")


@dataclass(frozen=True)
class Size:
    """The model, the task and the training, the same in all arms."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    digits: int
    batch_size: int  # solved examples of a supervised step
    warmup_rate: float
    warmup_reward: float  # the supervised part ends when the sampled answer is right with this probability,
    warmup_steps: int  # or after so many steps
    prompts: int
    samples: int
    updates: int
    rate: float
    steps: int  # rollouts
    held_out: int
    evaluate_every: int


SIZES = {
    "cpu": Size(
        layers=2,
        hidden=128,
        intermediate=256,
        heads=4,
        digits=2,
        batch_size=128,
        warmup_rate=4e-3,
        warmup_reward=0.4,
        warmup_steps=1000,
        prompts=32,
        samples=8,
        updates=2,
        rate=3e-4,
        steps=200,
        held_out=256,
        evaluate_every=10,
    ),
    "gpu": Size(
        layers=14,
        hidden=768,
        intermediate=3072,
        heads=12,
        digits=3,
        batch_size=512,
        warmup_rate=5e-4,
        warmup_reward=0.4,
        warmup_steps=2000,
        prompts=64,
        samples=8,
        updates=2,
        rate=5e-5,
        steps=100,
        held_out=512,
        evaluate_every=10,
    ),
}
LOOK_EVERY = 10  # supervised steps between two looks at the reward
CONTROL_STEPS = 20  # rollouts of a control
CHECKPOINT_EVERY = 4  # rollouts of the control that is killed
SHARE = 0.1  # of the rollouts, at the end, that a figure of the end is the mean over
SPENT = ("sync/seconds",)  # what no two runs share
# The quantile 0.975 of Student's t for 1, 2, ... degrees of freedom.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


# One run --------------------------------------------------------------------------------------------------------------


class Curve(Callback):
    """Writes what each step logs as a line of JSON, at once; of a resumed run, after the lines that it resumes from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what a killed run wrote after its last checkpoint."""
        kept = [row for row in read_curve(self.path) if row["updates"] <= trainer.global_step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the line of this step."""
        with self.path.open("a") as file:
            file.write(json.dumps({"updates": trainer.global_step, **outputs}) + "\n")


class KillHalfWay(Callback):
    """SIGKILL to this process between two updates of a rollout, half-way; the engine is then behind the trainer."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """When that update is due."""
        if trainer.global_step == self.update:
            os.kill(os.getpid(), signal.SIGKILL)


class StopAtReward(Callback):
    """Ends the supervised part when a sampled answer to a held-out problem is right with probability `reward`."""

    def __init__(self, reward: float) -> None:
        self.reward, self.reached = reward, 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compute the expected reward; nothing is sampled for it."""
        if trainer.global_step % LOOK_EVERY:
            return
        assert isinstance(pl_module, GRPO)
        tokens, labels = (one.to(pl_module.device) for one in solved(pl_module.task.held_out))
        with torch.no_grad(), trainer.strategy.precision_plugin.forward_context():
            logprobs = pl_module.logprobs(tokens)
        self.reached = (logprobs * (labels[:, 1:] != IGNORED)).sum(1).exp().mean().item()
        trainer.should_stop = self.reached >= self.reward


def train_start(size: Size, seed: int, device: str, folder: Path) -> dict[str, Any]:
    """The supervised model that all arms of a seed start from, into ``folder/model``; its figures."""
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=encode(END)[0],
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder / "config")
    seed_everything(seed, verbose=False)
    module = GRPO(
        str(folder / "config"),
        rollout=None,
        warmup_steps=size.warmup_steps,
        warmup_learning_rate=size.warmup_rate,
        save_dir=str(folder / "model"),
    )
    stop = StopAtReward(size.warmup_reward)
    trainer = _trainer(device, size.warmup_steps, [stop, Curve(folder / "curve.jsonl")])
    trainer.fit(module, _data(size, seed))
    return {
        "updates": trainer.global_step,
        "expected_reward": stop.reached,
        "parameters": sum(one.numel() for one in module.model.parameters()),
        "seconds": time.perf_counter() - started,
        "environment": environment(device),
    }


def train_arm(
    name: str, size: Size, seed: int, device: str, engine: str, start: Path, folder: Path, as_served: bool = False
) -> dict[str, Any]:
    """One arm or control; its figures at the end. Its curve is in ``folder/curve.jsonl``."""
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    arm = ARMS.get(name, ARMS["qat-int4"])
    seed_everything(seed, verbose=False)
    module = GRPO(
        str(start / "model"),
        rollout=arm.serves,
        engine=engine,  # type: ignore[arg-type]
        learning_rate=0.0 if name == "lr0" else size.rate,
        samples=size.samples,
        updates=size.updates,
        evaluate_every=1 if name == "lr0" else size.evaluate_every,
        as_served=as_served,
    )
    steps = min(size.steps, CONTROL_STEPS) if name in CONTROLS else size.steps
    final = Final(arm.trains or arm.serves or INT4)
    callbacks: list[Callback] = [Curve(folder / "curve.jsonl"), final]
    if arm.trains is not None:
        callbacks.insert(0, QATCallback(arm.trains, log_every_n_steps=0))
    last = folder / "checkpoints" / "last.ckpt"
    resumed = last.exists()
    if name == "killed":
        callbacks.append(
            ModelCheckpoint(last.parent, save_last=True, every_n_train_steps=size.updates * CHECKPOINT_EVERY)
        )
        if not resumed:
            callbacks.append(KillHalfWay(steps // 2 * size.updates + size.updates - 1))
    trainer = _trainer(device, size.updates * steps, callbacks)
    trainer.fit(module, _data(size, seed), ckpt_path=str(last) if resumed else None)
    spent = time.perf_counter() - started
    return {**final.figures, "resumed": resumed, "seconds": spent, "environment": environment(device)}


class Final(Callback):
    """What is known when the last update is done: accuracy through the arm's engine, and as it would be served."""

    def __init__(self, served: str) -> None:
        self.served = served
        self.figures: dict[str, Any] = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the accuracies, and whether both sides hold the same bits."""
        assert isinstance(pl_module, GRPO)
        assert pl_module.session is not None
        session = open_session(pl_module.model, lockstep.Scheme.of(self.served))
        session.sync()
        self.figures = {
            "accuracy": trainer.callback_metrics["held_out/accuracy"].item(),
            "served_accuracy": accuracy(session, pl_module.task.held_out),
            "served": self.served,
            "unequal_tensors": sorted(pl_module.session.verify().problems),
        }


def _data(size: Size, seed: int) -> Arithmetic:
    return Arithmetic(size.digits, size.batch_size, size.prompts, size.held_out, seed)


def _trainer(device: str, max_steps: int, callbacks: list[Callback]) -> Trainer:
    return Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=max_steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def environment(device: str) -> dict[str, Any]:
    """Hardware and versions: what a number means nothing without."""
    return {
        "hardware": machine() if device == "cpu" else torch.cuda.get_device_name(),
        "cuda": None if device == "cpu" else torch.version.cuda,
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (lockstep, torch, transformers, lightning)},
    }


def run_one(options: argparse.Namespace, size: Size) -> None:
    """The run that ``--run`` and ``--seed`` name; writes ``result.json`` when it is done."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    seed_folder = options.out / f"seed{options.seed}"
    folder, start = seed_folder / options.run, seed_folder / "start"
    if options.run == "start":
        result = train_start(size, options.seed, options.device, folder)
    else:
        how = (options.device, options.engine, start, folder, options.as_served)
        result = train_arm(options.run, size, options.seed, *how)
    _write(folder / "result.json", result)


# All runs -------------------------------------------------------------------------------------------------------------


def run_all(options: argparse.Namespace) -> list[str]:
    """Every run that is not there yet, `options.jobs` at a time, arms after their start. Returns those that failed."""
    waiting = [(seed, run) for run in ("start", *options.arms) for seed in range(options.seeds)]
    waiting += [(0, control) for control in CONTROLS if options.controls]
    waiting = [(seed, run) for seed, run in waiting if not (_folder(options, seed, run) / "result.json").exists()]
    running: dict[int, tuple[int, str, subprocess.Popen]] = {}  # by slot
    failed: list[str] = []
    again = False  # whether the control that kills itself runs for the second time
    try:
        while waiting or running:
            for slot, (seed, run, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                if run == "killed" and process.returncode == -signal.SIGKILL and not again:
                    again = True
                    waiting.append((seed, run))
                else:
                    _say(options, seed, run, process.returncode)
                    if process.returncode:
                        failed.append(f"seed{seed}/{run}")
                        if run == "start":
                            waiting = [(other, one) for other, one in waiting if other != seed]
            ready = [one for one in waiting if one[1] == "start" or _started(options, one[0])]
            for slot in [slot for slot in range(options.jobs) if slot not in running][: len(ready)]:
                seed, run = ready.pop(0)
                waiting.remove((seed, run))
                running[slot] = (seed, run, _spawn(options, seed, run, slot))
            time.sleep(0.2)
    finally:
        for _, _, process in running.values():
            process.kill()
            process.wait()
    return failed


def _spawn(options: argparse.Namespace, seed: int, run: str, slot: int) -> subprocess.Popen:
    folder = _folder(options, seed, run)
    folder.mkdir(parents=True, exist_ok=True)
    environ = dict(os.environ)
    if options.device == "cuda":
        visible = environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(options.devices)))
        environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % options.devices]
    environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
    words = [*sys.argv[1:], "--run", run, "--seed", str(seed)]
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "lockstep.recipes.ablation", *words], env=environ, stdout=log, stderr=log
        )


def _folder(options: argparse.Namespace, seed: int, run: str) -> Path:
    return options.out / f"seed{seed}" / run


def _started(options: argparse.Namespace, seed: int) -> bool:
    return (_folder(options, seed, "start") / "result.json").exists()


def _say(options: argparse.Namespace, seed: int, run: str, status: int) -> None:
    folder = _folder(options, seed, run)
    if status:
        tail = "\n".join((folder / "log.txt").read_text(errors="replace").splitlines()[-15:])
        print(f"seed {seed} {run}: FAILED with status {status}; the end of {folder / 'log.txt'}:\n{tail}", flush=True)
    else:
        result = json.loads((folder / "result.json").read_text())
        figures = {name: value for name, value in result.items() if isinstance(value, float)}
        shown = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        print(f"seed {seed} {run}: {shown}", flush=True)


# The report -----------------------------------------------------------------------------------------------------------


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
    for name in ARMS:
        for folder in sorted(out.glob(f"seed*/{name}")):
            curve, result = read_curve(folder / "curve.jsonl"), _read(folder / "result.json")
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
        found["killed"] = {"rollouts": len(curve), "different": different, "largest_reward_difference": worst}
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
            same = f"DIFFERENT: {', '.join(one['different'])} (reward by up to {one['largest_reward_difference']:.3g})"
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
    styles = dict(zip(ARMS, ("C0-", "C1--", "C3-.", "C2-", "C4--", "C5-."), strict=True))
    for name, style in styles.items():
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


def report(options: argparse.Namespace, size: Size) -> bool:
    """Print and write what there is; whether the controls found nothing."""
    found, checks = collect(options.out, size.steps), controls(options.out)
    starts = {path.parent.parent.name: _read(path) for path in sorted(options.out.glob("seed*/start/result.json"))}
    summary = {
        "size": dataclasses.asdict(size),
        **_how(options),
        "environment": next((one["environment"] for one in starts.values()), None),
        "starts": starts,
        "arms": found,
        "controls": checks,
    }
    _write(options.out / "results.json", summary)
    plot(options.out, options.out / "curves.png")
    console = Console(width=max(200, Console().width))
    console.print(table(found))
    for sentence in controls_in_words(checks):
        console.print(sentence, highlight=False)
    with (options.out / "table.txt").open("w") as file:
        text = Console(file=file, width=200)
        text.print(table(found))
        for sentence in controls_in_words(checks):
            text.print(sentence, highlight=False, soft_wrap=True)
    for what, path in (("figures", "results.json"), ("plots", "curves.png"), ("table", "table.txt")):
        console.print(f"{what}: {options.out / path}", highlight=False)
    return not any(one.get("drifted") or one.get("unequal_tensors") for one in checks.values())


def _control(out: Path, name: str) -> tuple[list[dict[str, float]], dict[str, Any]]:
    folder = out / "seed0" / name
    return read_curve(folder / "curve.jsonl"), _read(folder / "result.json")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, content: Any) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def parse(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, Size]:
    """The options, and the size with what they change in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu", help="cpu: 0.3 million parameters; gpu: 132 million")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=FOUR)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--controls", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--devices", type=int, default=1, help="GPUs that the jobs are spread over")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--engine", choices=("embedded", "vllm"), default="embedded")
    parser.add_argument("--as-served", action="store_true", help="the trainer rounds as the engine does: see GRPO")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--report-only", action="store_true", help="table and plots of what is in --out")
    parser.add_argument("--run", choices=("start", *ARMS, *CONTROLS), help="this run alone, in this process")
    parser.add_argument("--seed", type=int, default=0, help="of --run")
    changes = parser.add_argument_group("changes to the size")
    for field in dataclasses.fields(Size):
        kind = float if field.type == "float" else int
        changes.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=None)
    options = parser.parse_args(words)
    changed = {field.name: getattr(options, field.name) for field in dataclasses.fields(Size)}
    known = {name: value for name, value in changed.items() if value is not None}
    return options, dataclasses.replace(SIZES[options.size], **known)


def main() -> None:
    """Run what is missing and report."""
    options, size = parse()
    if options.run:
        run_one(options, size)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the runs end as well
    failed: list[str] = []
    if not options.report_only:
        options.out.mkdir(parents=True, exist_ok=True)
        _check_settings(options, size)
        failed = run_all(options)
    fine = report(options, size)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    sys.exit(0 if fine else 1)


def _how(options: argparse.Namespace) -> dict[str, Any]:
    return {"engine": options.engine, "as_served": options.as_served}


def _check_settings(options: argparse.Namespace, size: Size) -> None:
    """Runs of other settings in the same folder would be averaged with these."""
    path, settings = options.out / "settings.json", {**_how(options), **dataclasses.asdict(size)}
    before = _read(path)
    if different := {name: value for name, value in before.items() if settings[name] != value}:
        sys.exit(f"{options.out} holds runs with {different}: choose another --out, or delete it.")
    _write(path, settings)


if __name__ == "__main__":
    main()
