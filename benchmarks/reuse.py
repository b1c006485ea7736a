"""Micro-batches of one optimizer step: what quantizing a weight once instead of at each pass is worth.

    python benchmarks/reuse.py [--device cuda] [--tokens 2048] [--micro-batches 4]

A step is the forward and backward of each micro-batch, eager, over the layer of `layer_step`, its gradients
accumulated. The masters change ahead of each step, outside the timed region, so that nothing is kept beyond a step.
"""

from __future__ import annotations

import torch
from harness import (
    Benchmark,
    Case,
    add_extra_memory,
    add_ratios,
    arguments,
    bars,
    interleave,
    number,
    parse,
    text,
)
from layer_step import Work, built
from paths import KEPT, PATHS
from torch import nn

COLUMNS = [
    ("path", text("path")),
    ("micro-batches", text("micro_batches")),
    ("tokens each", number("tokens", 0)),
    ("ms a micro-batch", number("median_ms", 3)),
    ("p10", number("p10_ms", 3)),
    ("p90", number("p90_ms", 3)),
    ("time to bf16 eager", number("ratio", 3)),
    ("peak beyond bf16, MiB", number("extra_peak_mib", 0, sign=True)),
]


class MicroBatches(Work):
    """Several forwards and backwards, over masters that have changed since the last step."""

    def __init__(self, options: object, tokens: int, micro_batches: int) -> None:
        super().__init__(options, tokens)
        self.micro_batches = micro_batches

    def step(self, layer: nn.Module) -> None:
        """All micro-batches."""
        for _ in range(self.micro_batches):
            self.x.grad = None  # each micro-batch has its own input
            super().step(layer)

    def forget(self, layer: nn.Module) -> None:
        """Set all gradients to None, and change the masters as an optimizer would: in place."""
        super().forget(layer)
        with torch.no_grad():
            torch._foreach_mul_(list(layer.parameters()), 1.0)

    def case(self, layer: nn.Module, **row: object) -> Case:
        """A case whose time is that of one micro-batch."""
        case = super().case(layer, **row, micro_batches=self.micro_batches)
        case.repeats = self.micro_batches
        return case


def main() -> None:
    """Measure each path with each number of micro-batches."""
    parser = arguments(__doc__, rounds=12)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--intermediate", type=int)
    parser.add_argument("--tokens", type=int, nargs="+", help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4])
    options = parse(parser, hidden=(512, 4096), intermediate=(1408, 14336), tokens=([256], [512, 2048, 8192]))
    claim = "forward + backward of a layer's linears in micro-batches, eager; ratios to plain bf16 eager in this run"
    benchmark = Benchmark("reuse", claim, COLUMNS, options)
    paths = [PATHS["bf16"], PATHS["plain STE"], PATHS["lockstep"], *KEPT]
    for tokens in options.tokens:
        for count in options.micro_batches:
            work = MicroBatches(options, tokens, count)
            work.step(warm := work.layer(PATHS["bf16"]))
            work.forget(warm)
            del warm
            cases = [built(work, path, "eager") for path in paths]
            interleave([case for case in cases if "status" not in case.row], options.device, options.rounds)
            add_ratios(cases, cases[0])
            add_extra_memory([case.row for case in cases], "bf16", "peak_mib", same=())
            benchmark.add(case.row for case in cases)
            del cases
    benchmark.finish(
        lambda axes, rows: bars(
            axes, rows, lambda row: f"{row['path']}, {row['tokens']:,}", "ratio", "time / bf16 eager"
        )
    )


if __name__ == "__main__":
    main()
