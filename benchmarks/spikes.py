"""What each remedy of `LossSpikeCallback` is worth, on runs that go wrong without it.

    python benchmarks/spikes.py --device cpu [--steps 100] [--seeds 3]

The demo's small Llama learns the Python standard library's sources, then trains on as INT4 with groups of 64, from the
same weights on the same batches. What goes wrong is planted: batches of random tokens with 100 times the weight; a
learning rate that is 100 times too high for a while; learned scales whose rate is 1,000 times too high, so that a step
of Adam is as large as a scale. Printed: the perplexity on held-out modules, how many steps the callback took for
spikes, and how many learned scales are negative in the end, which an export refuses.
"""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from harness import Benchmark, arguments, number, parse, text
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lockstep.callbacks import LossSpikeCallback, LossSpikeError, QATCallback
from lockstep.recipes.causal_lm import CausalLM
from lockstep.recipes.demo import SCHEME
from lockstep.recipes.text import TextData

COLUMNS = [
    ("run", text("path")),
    ("held-out perplexity", number("perplexity", 2)),
    ("to the same seed with nothing wrong", number("ratio", 3)),
    ("+- over seeds", number("ratio_spread", 3)),
    ("spikes seen", number("spikes", 1)),
    ("negative scales, %", number("negative", 2)),
]
BASE_RATE, RATE = 4e-3, 1e-3
WEIGHT, TOO_HIGH, SCALES_TOO_HIGH = 100.0, 100.0, 1000.0
LOWER = {"remedy": "lower_rate", "rate_factor": 0.01}
RESTORE = {"remedy": "restore_scales", "rate_factor": 0.01}
# What is planted, the callback's arguments (None: no callback), and the largest gradient norm.
RUNS: dict[str, tuple[str, dict[str, Any] | None, float | None]] = {
    "nothing wrong": ("", None, None),
    "nothing wrong, lockstep skip": ("", {"remedy": "skip"}, None),
    "bad batches": ("batches", None, None),
    "bad batches, lockstep skip": ("batches", {"remedy": "skip"}, None),
    "bad batches, clipped": ("batches", None, 1.0),
    "bad batches, clipped, lockstep skip": ("batches", {"remedy": "skip"}, 1.0),
    "rate too high": ("rate", None, None),
    "rate too high, lockstep lower_rate": ("rate", LOWER, None),
    "rate too high, clipped": ("rate", None, 1.0),
    "learned scales": ("scales", None, None),
    "learned scales, rate too high": ("scales' rate", None, None),
    "learned scales, rate too high, lockstep restore_scales": ("scales' rate", RESTORE, None),
    "learned scales, rate too high, lockstep skip": ("scales' rate", {"remedy": "skip"}, None),
}


class Wrong(CausalLM):
    """`CausalLM` in which `wrong` goes wrong, from the third tenth of `steps` on."""

    def __init__(self, model: str, wrong: str, steps: int) -> None:
        super().__init__(model, RATE, warmup_steps=0)
        self.wrong, self.steps = wrong, steps

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Two of twenty batches are random tokens with a large weight, if that is what goes wrong."""
        if self.wrong != "batches" or batch_idx < 0.3 * self.steps or batch_idx % 20 > 1:
            return self.model(**batch).loss
        ids = torch.randint_like(batch["input_ids"], self.model.config.vocab_size)
        return WEIGHT * self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> Any:
        """A constant rate, too high for a fifth of the steps or for the scales, if that is what goes wrong."""
        optimizer = super().configure_optimizers()["optimizer"]
        if self.wrong == "scales' rate":
            optimizer.param_groups[-1]["initial_lr"] *= SCALES_TOO_HIGH
        wrong = range(int(0.4 * self.steps), int(0.6 * self.steps)) if self.wrong == "rate" else range(0)
        schedule = LambdaLR(optimizer, lambda step: TOO_HIGH if step in wrong else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(module: CausalLM, data: TextData, steps: int, clip: float | None, callbacks: list[Any], options: Any) -> None:
    """`steps` optimizer steps in mixed bf16."""
    trainer = Trainer(
        accelerator="cpu" if options.device.type == "cpu" else "gpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=steps,
        gradient_clip_val=clip,
        callbacks=callbacks,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, data)


@torch.no_grad()
def perplexity(model: Any, data: TextData, options: Any) -> float:
    """On the first held-out batches, as the model trains."""
    model.to(options.device).eval()
    losses = []
    with torch.autocast(options.device.type, torch.bfloat16):
        for _, batch in zip(range(options.held_out), data.val_dataloader(), strict=False):
            losses.append(model(**{key: value.to(options.device) for key, value in batch.items()}).loss.item())
    return math.exp(mean(losses))


def measure(seed: int, data: TextData, folder: Path, options: Any) -> dict[str, dict[str, Any]]:
    """Perplexity, spikes seen, and the error that ended it, if one did, of each run of one seed."""
    seed_everything(seed, verbose=False)
    base = str(folder / str(seed))
    fit(CausalLM(learning_rate=BASE_RATE, save_dir=base), data, options.base_steps, 1.0, [], options)
    found = {}
    for path, (wrong, remedy, clip) in RUNS.items():
        seed_everything(seed + 1000, verbose=False)
        module = Wrong(base, wrong, options.steps)
        watching = [LossSpikeCallback(window=20, **remedy)] if remedy else []
        qat = QATCallback(SCHEME, log_every_n_steps=0, learned_scales=wrong.startswith("scales"))
        ended = ""
        try:
            fit(module, data, options.steps, clip, [qat, *watching], options)
        except LossSpikeError as error:
            ended = f"ended by LossSpikeError in {str(error).split(':')[0]}"
        spikes = watching[0].count if watching else None
        found[path] = {"perplexity": perplexity(module.model, data, options), "spikes": spikes, "ended": ended}
        scales = [one.detach().flatten() for name, one in module.named_parameters() if name.endswith(".weight_scale")]
        found[path]["negative"] = 100 * (torch.cat(scales) < 0).float().mean().item() if scales else None
        print(f"seed {seed}, {path}: {found[path]}", flush=True)
    return found


def row(path: str, runs: list[dict[str, Any]], undisturbed: list[dict[str, Any]]) -> dict[str, Any]:
    """The means over the seeds of one run, and of its ratio to the one in which nothing goes wrong."""
    values = [run["perplexity"] for run in runs]
    found: dict[str, Any] = {"path": path, "perplexities": values, "status": "ok"}
    if not all(map(math.isfinite, values)):
        return found | {"status": "failed", "reason": f"the weights are not finite in the end: {values}"}
    ratios = [value / base["perplexity"] for value, base in zip(values, undisturbed, strict=True)]
    found |= {"perplexity": mean(values), "ratios": ratios, "ratio": mean(ratios)}
    found["note"] = "; ".join({run["ended"] for run in runs if run["ended"]})
    if len(values) > 1:
        found["ratio_spread"] = stdev(ratios)
    known = [key for key in ("spikes", "negative") if runs[0][key] is not None]
    return found | {key: mean(run[key] for run in runs) for key in known}


def plot(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A bar for each run, its seeds as dots."""
    colours = ["#d9480f" if "lockstep" in one["path"] else "#868e96" for one in rows]
    axes.barh(range(len(rows)), [one["ratio"] for one in rows], color=colours)
    for place, one in enumerate(rows):
        axes.plot(one["ratios"], [place] * len(one["ratios"]), ".", color="black", markersize=4)
        axes.annotate(f"  {one['ratio']:.3f}", (max(one["ratios"]), place), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [one["path"] for one in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.1)
    axes.set_xlabel(
        "held-out perplexity / that of the same seed with nothing wrong\norange: with a remedy; dots: seeds"
    )


def main() -> None:
    """Every seed, then a row for each run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    parser = arguments(__doc__, rounds=1)
    for name in ("steps", "base_steps", "seeds", "held_out"):
        parser.add_argument(f"--{name}", type=int)
    options = parse(parser, steps=(24, 100), base_steps=(20, 400), seeds=(1, 3), held_out=(2, 30))
    claim = "INT4 QAT of a small Llama in which something planted goes wrong, with and without a remedy"
    benchmark = Benchmark("spikes", claim, COLUMNS, options)
    data = TextData(batch_size=8, max_bytes=3_000_000)
    data.setup()
    with tempfile.TemporaryDirectory() as folder:
        seeds = [measure(seed, data, Path(folder), options) for seed in range(options.seeds)]
    benchmark.add(
        [row(path, [seed[path] for seed in seeds], [seed["nothing wrong"] for seed in seeds]) for path in RUNS]
    )
    benchmark.finish(plot)


if __name__ == "__main__":
    main()
