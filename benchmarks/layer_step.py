"""Forward and backward of one transformer layer's linears: plain bf16, a plain straight-through INT4, and Lockstep.

    python benchmarks/layer_step.py [--hidden 512] [--intermediate 1408] [--tokens 256 1024] [--device cpu]

Prints, from one run, the time of a step against plain bf16 and what stays alive between forward and backward beyond it.
The plain straight-through estimator is what one writes first: ``w + (fake_quantize(w) - w)`` with the bracket detached.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lockstep
from lockstep import grid
from lockstep.recipes.demo import machine

REPEATS = 12


class StraightThroughLinear(nn.Linear):
    """The eager way: autograd keeps the quantized weight for the backward."""

    def forward(self, input: Tensor) -> Tensor:
        """``x @ (w + noise).T``."""
        with torch.no_grad():
            noise = grid.fake_quantize(self.weight, lockstep.TensorSpec()) - self.weight
        return F.linear(input, self.weight + noise, self.bias)


def linears(hidden: int, intermediate: int, device: str) -> nn.ModuleList:
    """The seven linears of a Llama layer, key and value heads at a quarter of the width."""
    shapes = [(hidden, hidden), (hidden, hidden // 4), (hidden, hidden // 4), (hidden, hidden)]
    shapes += [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    return nn.ModuleList(nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16) for k, n in shapes)


def plain(layers: nn.ModuleList) -> None:
    """Leave the layers as they are."""


def straight_through(layers: nn.ModuleList) -> None:
    """Switch them to the eager straight-through estimator."""
    for layer in layers:
        layer.__class__ = StraightThroughLinear


def prepared(layers: nn.ModuleList) -> None:
    """Switch them to Lockstep."""
    lockstep.prepare(layers, "W4A16")


def measure(prepare: Callable[[nn.ModuleList], None], sizes: tuple[int, int], tokens: int, device: str) -> dict:
    """Median seconds of a step, and bytes saved for the backward, each storage once and parameters not counted."""
    torch.manual_seed(0)
    layers = linears(*sizes, device)
    prepare(layers)
    inputs = [torch.randn(tokens, layer.in_features, device=device, dtype=torch.bfloat16) for layer in layers]
    for x in inputs:
        x.requires_grad_()
    own = {parameter.untyped_storage().data_ptr() for parameter in layers.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step(hook: bool = False) -> float:
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor) if hook else torch.enable_grad():
            outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - started

    step(hook=True)
    return {"seconds": median(step() for _ in range(REPEATS)), "saved_bytes": sum(saved.values())}


def main() -> None:
    """Measure every path at every size and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1408)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    sizes = (options.hidden, options.intermediate)
    paths = {"plain bf16": plain, "plain straight-through INT4": straight_through, "Lockstep W4A16": prepared}
    rows = []
    print("| path | tokens | time to bf16 | kept for backward beyond bf16 |\n|---|---|---|---|")
    for tokens in options.tokens:
        results = {name: measure(prepare, sizes, tokens, options.device) for name, prepare in paths.items()}
        base = results["plain bf16"]
        for name, result in results.items():
            ratio = result["seconds"] / base["seconds"]
            extra = (result["saved_bytes"] - base["saved_bytes"]) / 2**20
            rows.append({"path": name, "tokens": tokens, **result})
            print(f"| {name} | {tokens} | {ratio:.2f} | {extra:+.2f} MiB |")
    environment = {
        "machine": torch.cuda.get_device_name() if options.device.startswith("cuda") else machine(),
        "torch": torch.__version__,
        "lockstep": lockstep.__version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    if options.json:
        options.json.write_text(json.dumps({"environment": environment, "sizes": sizes, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
