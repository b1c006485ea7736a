"""What ``fp8_input_gradient`` costs in accuracy: the gradients of a language model, and its loss after training.

    python benchmarks/fp8_gradient.py [--device cuda] [--steps 300] [--seeds 3]

A small Llama learns the Python standard library's sources byte by byte, in bf16 first and then as FP8_DYNAMIC with the
input gradients in bf16 or in fp8, from the same weights on the same batches. Printed: how far the gradients of the
weights move, in norm and in angle, from those with bf16 input gradients; and the loss at the end.
"""

from __future__ import annotations

import copy
from statistics import mean, stdev
from typing import Any

import torch
from harness import Benchmark, arguments, bars, number, parse, significant, text
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lockstep
from lockstep.recipes.text import standard_library

COLUMNS = [
    ("path", text("path")),
    ("weight gradients, relative distance", significant("distance")),
    ("weight gradients, cosine", number("cosine", 5)),
    ("loss after training", number("loss", 4)),
    ("+- over seeds", number("loss_spread", 4)),
]
PATHS = {"lockstep FP8": False, "lockstep FP8, fp8 input gradient": True}


def source(device: torch.device) -> Tensor:
    """The bytes of the standard library's first modules."""
    content = "".join(document for _, (_, document) in zip(range(400), standard_library(), strict=False))
    return torch.tensor(list(content.encode()), dtype=torch.uint8, device=device)


def batch(data: Tensor, step: int, options: Any) -> Tensor:
    """The batch of a step, ``[rows, length]``: the same for every path and seed."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(data) - options.length, (options.rows,), generator=generator)
    return torch.stack([data[start : start + options.length] for start in starts.tolist()]).long()


def train(model: nn.Module, data: Tensor, first: int, steps: int, rate: float, options: Any) -> float:
    """AdamW over `steps` batches from batch `first` on; the mean loss of the last tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for step in range(first, first + steps):
        ids = batch(data, step, options)
        optimizer.zero_grad()
        with torch.autocast(options.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses[-max(1, steps // 10) :]).mean().item()


def gradients(model: nn.Module, data: Tensor, options: Any) -> Tensor:
    """The gradients of all quantized weights on one batch, in one row."""
    ids = batch(data, 10**6, options)
    model.zero_grad()
    with torch.autocast(options.device.type, torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.double().flatten() for n, p in model.named_parameters() if n.endswith("proj.weight")])


def measure(seed: int, data: Tensor, options: Any) -> dict[str, dict[str, float]]:
    """Distance, cosine and final loss of each path for one seed."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": options.hidden, "intermediate_size": 2 * options.hidden, "vocab_size": 256}
    heads = {"num_hidden_layers": options.layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    start = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(options.device)
    train(start, data, 0, options.steps, 2e-3, options)
    models = {}
    for path, fp8 in PATHS.items():
        models[path] = copy.deepcopy(start)
        lockstep.prepare(models[path], "FP8_DYNAMIC", fp8_input_gradient=fp8)
    exact = gradients(models["lockstep FP8"], data, options)
    found = {}
    for path, model in models.items():
        ours = gradients(model, data, options)
        found[path] = {
            "distance": ((ours - exact).norm() / exact.norm()).item(),
            "cosine": (torch.dot(ours, exact) / (ours.norm() * exact.norm())).item(),
            "loss": train(model, data, options.steps, options.steps, 1e-3, options),
        }
    return found


def main() -> None:
    """Every seed, then a row for each path."""
    parser = arguments(__doc__, rounds=1)
    for name in ("steps", "seeds", "hidden", "layers", "rows", "length"):
        parser.add_argument(f"--{name}", type=int)
    sizes = {"steps": (100, 300), "seeds": (2, 3), "hidden": (128, 512), "layers": (2, 8)}
    options = parse(parser, **sizes, rows=(8, 32), length=(128, 512))
    claim = "FP8_DYNAMIC training of a small Llama with the input gradients in bf16 and in fp8, means over the seeds"
    benchmark = Benchmark("fp8_gradient", claim, COLUMNS, options)
    data = source(options.device)
    seeds = [measure(seed, data, options) for seed in range(options.seeds)]
    rows = []
    for path in PATHS:
        values = {key: [seed[path][key] for seed in seeds] for key in seeds[0][path]}
        spread = {"loss_spread": stdev(values["loss"]), "losses": values["loss"]} if len(seeds) > 1 else {}
        rows.append({"path": path, "status": "ok"} | {key: mean(one) for key, one in values.items()} | spread)
    benchmark.add(rows)
    benchmark.finish(lambda axes, found: bars(axes, found, lambda row: row["path"], "loss", "loss after training"))


if __name__ == "__main__":
    main()
