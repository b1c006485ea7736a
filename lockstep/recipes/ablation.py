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
import fcntl
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console

import lockstep
from lockstep.callbacks import QATCallback
from lockstep.recipes.ablation_report import collect, controls, controls_in_words, plot, read, read_curve, table, write
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
            ModelCheckpoint(
                last.parent,
                save_last=True,
                every_n_train_steps=size.updates * min(CHECKPOINT_EVERY, max(1, steps // 2)),
            )
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
    with _alone(folder):
        if options.run == "start":
            result = train_start(size, options.seed, options.device, folder)
        else:
            how = (options.device, options.engine, start, folder, options.as_served)
            result = train_arm(options.run, size, options.seed, *how)
        write(folder / "result.json", result)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two processes that do one run would write one curve: the second ends. The lock ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(
                f"{folder}: another process is at this run, perhaps of a command that was killed: end it, or wait."
            )
        yield


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


# All of it ------------------------------------------------------------------------------------------------------------


def report(options: argparse.Namespace, size: Size) -> bool:
    """Print and write what there is; whether the controls found nothing."""
    found, checks = collect(options.out, size.steps), controls(options.out)
    starts = {path.parent.parent.name: read(path) for path in sorted(options.out.glob("seed*/start/result.json"))}
    settings = read(options.out / "settings.json")
    summary = {
        "size": dataclasses.asdict(size),
        **{name: settings.get(name) for name in _how(options)},  # of the runs; --report-only may be given others
        "environment": next((one["environment"] for one in starts.values()), None),
        "starts": starts,
        "arms": found,
        "controls": checks,
    }
    write(options.out / "results.json", summary)
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
    return {"device": options.device, "engine": options.engine, "as_served": options.as_served}


def _check_settings(options: argparse.Namespace, size: Size) -> None:
    """Runs of other settings in the same folder would be averaged with these."""
    path, settings = options.out / "settings.json", {**_how(options), **dataclasses.asdict(size)}
    before = read(path)
    if different := {name: value for name, value in before.items() if settings[name] != value}:
        sys.exit(f"{options.out} holds runs with {different}: choose another --out, or delete it.")
    write(path, settings)


if __name__ == "__main__":
    main()
