"""What a warm-up of quantization and dampening do to runs of quantization-aware training that fail, or nearly.

    python benchmarks/warmup.py [--seeds 3] [--out benchmarks/results]

A small Llama is trained on characters of the Python standard library in full precision. From there, or from random
weights, each run trains quantized from its first step, or goes over to it, or in full precision, on the same batches;
the loss on held-out text, as served, is the mean over the seeds, which draw the batches. It runs on a CPU in minutes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import torch
from harness import Benchmark, arguments, number, parse, text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import lockstep
from lockstep import Scheme
from lockstep.qat import oscillation, quantized_modules
from lockstep.qat.warmup import Kind, Schedule, Warmup
from lockstep.recipes.text import distinct, standard_library

VOCABULARY, LENGTH, BATCH, WATCHED = 64, 32, 16, 20
COLUMNS = [
    ("run", text("setting")),
    ("path", text("path")),
    ("held-out loss (nats)", number("loss", 4)),
    ("standard deviation", number("deviation", 4)),
    ("against at once", number("difference", 4, sign=True)),
    ("codes that change back, last steps", number("oscillation", 4)),
]
CHANNEL = Scheme.preset("W4A16", strategy="channel")


@dataclass(frozen=True)
class Setting:
    """A run: from which weights, to which scheme, for how long, and at which rate (AdamW); constant, or a cosine."""

    name: str
    start: str
    scheme: Scheme
    steps: int
    rate: float
    warmups: tuple[Kind, ...] = ("layers", "noise", "bits")
    dampening: tuple[float, ...] = (0.1,)
    constant: bool = False


SETTINGS = (
    Setting("INT4 by channel, constant rate 1e-3", "trained", CHANNEL, 150, 1e-3, constant=True, warmups=()),
    Setting("INT4 by channel, constant rate 5e-3", "trained", CHANNEL, 150, 5e-3, constant=True, warmups=()),
    Setting("INT4 by channel, outliers, 100 steps at 1e-3", "outliers", CHANNEL, 100, 1e-3, dampening=()),
    Setting("INT4 by channel, 60 steps at 2e-2", "trained", CHANNEL, 60, 2e-2, dampening=()),
    Setting("INT4 by channel from random weights, 300 steps at 2e-2", "random", CHANNEL, 300, 2e-2, dampening=()),
)


def characters() -> tuple[Tensor, Tensor]:
    """Rows of characters, int64 ``[rows, LENGTH]``, to train on and held out; the last tenth of the text is."""
    joined = "".join(text for _, text in distinct(standard_library()))[: 1 << 21]
    codes = torch.tensor(bytearray(joined.encode("ascii", "replace")), dtype=torch.int64)
    rows = (codes - 32).clamp(0, VOCABULARY + 31).remainder(VOCABULARY)
    rows = rows[: len(rows) // LENGTH * LENGTH].view(-1, LENGTH)
    cut = len(rows) * 9 // 10
    held_out = rows[cut:][torch.randperm(len(rows) - cut, generator=torch.Generator().manual_seed(0))]
    return rows[:cut], held_out[:512]


def random_model(layers: int) -> Any:
    """A Llama of 64 wide layers, fp32."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
    }
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def with_outliers(model: Any, factor: float = 16.0, share: float = 0.05) -> Any:
    """The same function with columns of the weights `factor` times as large, as large models have them.

    What feeds these columns (a norm, the rows of ``up_proj``) is as much smaller.
    """
    generator = torch.Generator().manual_seed(0)

    def scale(smaller: Tensor, *larger: Tensor) -> None:
        chosen = torch.randperm(len(smaller), generator=generator)[: max(1, int(share * len(smaller)))]
        smaller.data[chosen] /= factor
        for one in larger:
            one.data[:, chosen] *= factor

    model = copy.deepcopy(model)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        scale(
            layer.input_layernorm.weight,
            *(one.weight for one in (attention.q_proj, attention.k_proj, attention.v_proj)),
        )
        scale(layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight)
        scale(mlp.up_proj.weight, mlp.down_proj.weight)
    return model


def train(
    model: Any,
    rows: Tensor,
    steps: int,
    rate: float,
    constant: bool = False,
    seed: int = 0,
    warmup: Warmup | None = None,
    dampening: float = 0.0,
) -> float | None:
    """Train in place, as the callbacks would. The share of codes that change back in a step, over the last ones."""
    model.train()
    torch.manual_seed(seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = None if warmup is None else Schedule(model, warmup)
    tracks: dict[str, oscillation.Track] = {}
    changed: list[float] = []
    for step in range(steps):
        if schedule is not None:
            schedule.follow(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 if constant else 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        batch = rows[torch.randint(len(rows), (BATCH,))]
        model(input_ids=batch, labels=batch).loss.backward()
        if dampening:
            oscillation.dampen(model, oscillation.risen(dampening, step, steps), parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= steps - WATCHED:
            changed += follow(model, tracks)
    if schedule is not None:
        schedule.follow(steps)
    return mean(changed) if changed else None


def follow(model: nn.Module, tracks: dict[str, oscillation.Track]) -> list[float]:
    """What oscillates in each layer since the step before."""
    found = []
    for name, layer in quantized_modules(model):
        codes, before = layer.quantize().codes, tracks.get(name)
        tracks[name] = oscillation.follow(codes, before)
        if before is not None and before.direction is not None:
            found.append(oscillation.oscillation(tracks[name], before, codes.dtype))
    return found


@torch.no_grad()
def held_out_loss(model: Any, rows: Tensor) -> float:
    """Mean loss as served, in nats a character."""
    return model.eval()(input_ids=rows, labels=rows).loss.item()


def measure(setting: Setting, starts: dict[str, Any], data: tuple[Tensor, Tensor], seeds: int) -> list[dict[str, Any]]:
    """A row for each way to train. Controls: all layers in one stage, as ``start_step``; a cosine for the rate."""
    half = setting.steps // 2
    controls: dict[str, dict[str, Any]] = {}
    if setting.warmups:
        controls["lockstep start_step"] = {"warmup": Warmup("layers", half, stages=1)}
    if setting.constant:
        controls["lockstep rate decays"] = {"constant": False}
    ways: dict[str, dict[str, Any]] = {
        "full precision": {},
        "lockstep at once": {},
        **controls,
        **{f"lockstep {kind}": {"warmup": Warmup(kind, half)} for kind in setting.warmups},
        **{f"lockstep dampening {strength:g}": {"dampening": strength} for strength in setting.dampening},
    }
    losses: dict[str, list[float]] = {}
    rows = []
    for path, options in ways.items():
        losses[path], changed = [], []
        for seed in range(1, seeds + 1):
            model = copy.deepcopy(starts[setting.start])
            if path != "full precision":
                lockstep.prepare(model, setting.scheme)
            how = {"constant": setting.constant, "seed": seed, **options}
            oscillating = train(model, data[0], setting.steps, setting.rate, **how)
            losses[path].append(held_out_loss(model, data[1]))
            changed += [] if oscillating is None else [oscillating]
        first = losses.get("lockstep at once")
        differences = [] if first is None else [a - b for a, b in zip(losses[path], first, strict=True)]
        rows.append(
            {
                "setting": setting.name,
                "path": path,
                "status": "ok",
                "losses": losses[path],
                "loss": mean(losses[path]),
                "deviation": stdev(losses[path]) if seeds > 1 else None,
                "difference": mean(differences) if differences and path != "lockstep at once" else None,
                "differences": differences,
                "oscillation": mean(changed) if changed else None,
            }
        )
    return rows


def plot(axes: Any, rows: list[dict[str, Any]]) -> None:
    """The difference to quantizing at once, a point for each seed and a bar for the mean, run by run."""
    shown = [row for row in rows if row["difference"] is not None]
    colours = {
        "start_step": "#868e96",
        "rate": "#868e96",
        "layers": "#1971c2",
        "noise": "#2f9e44",
        "bits": "#9c36b5",
        "dampening": "#d9480f",
    }
    for place, row in enumerate(shown):
        colour = colours[row["path"].split()[1]]
        axes.barh(place, row["difference"], color=colour, alpha=0.35)
        axes.plot(row["differences"], [place] * len(row["differences"]), "o", color=colour, markersize=4)
    names = [f"{row['setting']}: {row['path'].removeprefix('lockstep ')}" for row in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("held-out loss against at once (nats a character)\nbars: mean, dots: seeds; left of 0 is better")


def main() -> None:
    """Train the start, and from there every run."""
    parser = arguments(__doc__, rounds=1, quick_rounds=1)
    parser.add_argument("--seeds", type=int, help="runs of each kind")
    parser.add_argument("--layers", type=int, help="of the model")
    parser.add_argument("--start-steps", type=int, help="in full precision, of the start")
    parser.add_argument("--settings", type=int, help="how many of the settings")
    options = parse(parser, seeds=(1, 3), layers=(1, 2), start_steps=(2, 1500), settings=(1, len(SETTINGS)))
    data = characters()
    fresh: Callable[[], Any] = lambda: random_model(options.layers)  # noqa: E731
    trained = fresh()
    train(trained, data[0], options.start_steps, 5e-3)
    starts = {"random": fresh(), "trained": trained, "outliers": with_outliers(trained)}
    claim = (
        f"held-out loss after quantization-aware training, mean of {options.seeds} seeds; warm-ups take the first half "
        f"of a run. The start in full precision has {held_out_loss(trained, data[1]):.4f}"
    )
    benchmark = Benchmark("warmup", claim, COLUMNS, options)
    for setting in SETTINGS[: options.settings]:
        model = copy.deepcopy(starts[setting.start])
        lockstep.prepare(model, setting.scheme)
        rounded: dict[str, Any] = {"setting": setting.name, "path": "rounded, not trained", "status": "ok"}
        rounded["difference"] = None
        rounded["loss"] = held_out_loss(model, data[1])
        benchmark.add([rounded, *measure(setting, starts, data, options.seeds)])
    benchmark.finish(plot)


if __name__ == "__main__":
    main()
