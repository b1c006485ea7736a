"""``make demo``: train a small language model, quantize it two ways, prove the export, and print one honest table.

    python -m lockstep.recipes.demo [--seeds 3] [--output runs/demo]

For each seed: a bf16 model is trained on the Python standard library's sources. From it two continuations see the same
further tokens in the same order, one in bf16 and one with INT4 QAT, so that QAT is not credited for training longer.
The bf16 one, rounded to nearest (the simplest post-training quantization), is what QAT is compared with. All
perplexities are on held-out modules.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table

import lockstep
from lockstep.align import AlignmentReport
from lockstep.callbacks import QATCallback
from lockstep.recipes.causal_lm import CausalLM
from lockstep.recipes.text import TextData

# Groups of 64, since the small Llama is only 128 wide: groups of 128 would be its channels.
SCHEME = lockstep.Scheme.preset("W4A16", group_size=64)
BASE_STEPS, EXTRA_STEPS = 1400, 350
LEARNING_RATE, EXTRA_LEARNING_RATE = 4e-3, 1e-3
VALIDATION_BATCHES = 60
CURVE_POINTS = 5


@dataclass
class Result:
    """One seed's figures: perplexities on held-out text, bytes of weights on disk, is the export aligned."""

    seed: int
    bf16: float
    rounded: float
    qat: float
    served: float
    bf16_bytes: int
    int4_bytes: int
    aligned: bool
    mean_logprob_difference: float
    seconds: float

    @property
    def won_back(self) -> float:
        """Share of what rounding to nearest loses that QAT wins back."""
        return (self.rounded - self.qat) / (self.rounded - self.bf16)


def run(seed: int, directory: Path) -> tuple[Result, dict[str, list[tuple[int, float]]]]:
    """The whole story for one seed, with its files under `directory`; returns its figures and validation curves."""
    started = time.perf_counter()
    seed_everything(seed, verbose=False)
    data = TextData()
    data.setup()

    _say(f"seed {seed}: training in bf16, {BASE_STEPS} steps")
    _fit(CausalLM(learning_rate=LEARNING_RATE, save_dir=str(directory / "base")), data, BASE_STEPS)

    _say(f"seed {seed}: {EXTRA_STEPS} more steps in bf16")
    plain_curve, qat_curve = Curve(), Curve()
    plain = _continue(seed, directory, data, "bf16", [plain_curve])

    _say(f"seed {seed}: the same {EXTRA_STEPS} steps with QAT ({SCHEME}), then export")
    export_dir = directory / "int4"
    quantize = QATCallback(SCHEME, export_dir=str(export_dir), overwrite=True, log_every_n_steps=25)
    qat = _continue(seed, directory, data, "qat", [quantize, qat_curve])

    _say(f"seed {seed}: evaluating and aligning")
    rounded = copy.deepcopy(plain.model)
    lockstep.prepare(rounded, SCHEME)
    bf16_dir = directory / "bf16-served"
    copy.deepcopy(plain.model).to(torch.bfloat16).save_pretrained(bf16_dir)
    served = transformers.AutoModelForCausalLM.from_pretrained(export_dir, dtype=torch.bfloat16)
    report = _align(qat.model, export_dir, data)
    result = Result(
        seed=seed,
        bf16=_perplexity(plain.model, data),
        rounded=_perplexity(rounded, data),
        qat=_perplexity(qat.model, data),
        served=_perplexity(served, data),
        bf16_bytes=_weight_bytes(bf16_dir),
        int4_bytes=_weight_bytes(export_dir),
        aligned=report.aligned,
        mean_logprob_difference=report.end_to_end.mean_logprob_difference if report.end_to_end else float("nan"),
        seconds=time.perf_counter() - started,
    )
    report.save(directory / "alignment.html")
    return result, {"bf16": plain_curve.points, "INT4 QAT": qat_curve.points}


class Curve(Callback):
    """Remembers the validation perplexity over the steps."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the perplexity of this validation."""
        if not trainer.sanity_checking:
            self.points.append((trainer.global_step, trainer.callback_metrics["val/perplexity"].item()))


def _fit(module: CausalLM, data: TextData, steps: int, callbacks: list[Callback] | None = None) -> CausalLM:
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        val_check_interval=max(1, steps // CURVE_POINTS),
        check_val_every_n_epoch=None,
        limit_val_batches=VALIDATION_BATCHES if callbacks else 0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module


def _continue(seed: int, directory: Path, data: TextData, name: str, callbacks: list[Callback]) -> CausalLM:
    """Train on from the base model, on the same tokens whatever the callbacks."""
    seed_everything(seed + 1000, verbose=False)
    module = CausalLM(
        str(directory / "base"), EXTRA_LEARNING_RATE, warmup_steps=10, save_dir=str(directory / f"{name}-masters")
    )
    return _fit(module, data, EXTRA_STEPS, callbacks)


@torch.no_grad()
def _perplexity(model: Any, data: TextData) -> float:
    """On the first validation batches, in the served dtype as in training (autocast)."""
    model.eval()
    losses = []
    with torch.autocast("cpu", torch.bfloat16):
        for number, batch in enumerate(data.val_dataloader()):
            if number == VALIDATION_BATCHES:
                break
            losses.append(model(**batch).loss.item())
    return float(torch.tensor(losses).mean().exp())


def _align(model: Any, checkpoint: Path, data: TextData) -> AlignmentReport:
    batch = next(iter(data.val_dataloader()))
    report = lockstep.align.compare(model, checkpoint, {"input_ids": batch["input_ids"]})
    Console(width=max(100, Console().width)).print(report)
    return report


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _say(text: str) -> None:
    Console().rule(text, align="left")


def table(results: list[Result]) -> Table:
    """The result: perplexities, sizes and the verdict; mean and standard deviation over several seeds."""

    def over_seeds(values: list[float], form: str) -> str:
        spread = f" ± {format(stdev(values), form.lstrip('+'))}" if len(values) > 1 else ""
        return format(mean(values), form) + spread

    def increase(name: str) -> str:
        return over_seeds([100 * (getattr(result, name) / result.bf16 - 1) for result in results], "+.2f") + " %"

    seeds = ", ".join(str(result.seed) for result in results)
    shown = Table(
        title=f"{SCHEME} on held-out Python modules, seed{'s' * (len(results) > 1)} {seeds}", title_justify="left"
    )
    shown.add_column("model")
    for header in ("perplexity", "against bf16", "loss won back", "weights"):
        shown.add_column(header, justify="right")
    kib = {
        name: f"{mean(getattr(result, name) for result in results) / 1024:,.0f} KiB"
        for name in ("bf16_bytes", "int4_bytes")
    }
    rows = [
        ("bf16, same tokens", "bf16", "", "", kib["bf16_bytes"]),
        ("INT4, rounded to nearest", "rounded", increase("rounded"), "0 %", kib["int4_bytes"]),
        (
            "INT4 QAT",
            "qat",
            increase("qat"),
            over_seeds([100 * result.won_back for result in results], ".0f") + " %",
            kib["int4_bytes"],
        ),
        ("INT4 QAT, exported, in transformers", "served", increase("served"), "", kib["int4_bytes"]),
    ]
    for label, name, against, back, size in rows:
        shown.add_row(label, over_seeds([getattr(result, name) for result in results], ".3f"), against, back, size)
    worst = max(result.mean_logprob_difference for result in results)
    shown.caption = "The export is NOT ALIGNED: see alignment.html."
    if all(result.aligned for result in results):
        shown.caption = (
            "The export is aligned: every stored weight is bit for bit the trained one, the reference kernel's outputs "
            "are those of training; mean |log-probability difference| end to end "
            f"{worst:.1e}, from rounding the fp32 embeddings and norms to bf16."
        )
    return shown


def plot(results: list[Result], curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Validation perplexity over the continuation of the last seed, with rounding to nearest beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, points), style in zip(curves.items(), ("o-", "s-"), strict=True):
        axes.plot(*zip(*points, strict=True), style, label=name)
    axes.axhline(results[-1].rounded, color="#b42318", linestyle="--", label="bf16 rounded to nearest INT4, at the end")
    axes.set(
        xlabel="optimizer steps after the bf16 base model",
        ylabel="perplexity on held-out modules",
        title=f"The same tokens in bf16 and with INT4 QAT (seed {results[-1].seed})",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def machine() -> str:
    """The processor and the threads that PyTorch uses."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    """Run the demo and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to run, from 0")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    results = []
    for seed in range(options.seeds):
        directory = options.output / f"seed{seed}"
        directory.mkdir(parents=True, exist_ok=True)
        result, curves = run(seed, directory)
        results.append(result)
    plot(results, curves, options.output / "perplexity.png")
    environment = {
        "machine": machine(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (lockstep, torch, transformers, lightning)},
    }
    summary = {"environment": environment, "results": [asdict(result) for result in results]}
    (options.output / "results.json").write_text(json.dumps(summary, indent=2) + "\n")

    console = Console(width=max(100, Console().width))
    console.print(table(results))
    last = options.output / f"seed{options.seeds - 1}"
    for what, path in (
        ("checkpoint for vLLM, SGLang, transformers", last / "int4"),
        ("alignment report", last / "alignment.html"),
        ("plot", options.output / "perplexity.png"),
        ("figures", options.output / "results.json"),
    ):
        console.print(f"{what}: {path}", highlight=False)
    sys.exit(not all(result.aligned for result in results))


if __name__ == "__main__":
    main()
