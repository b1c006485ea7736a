"""How the cost of quantizing and packing grows with a weight's outputs N and inputs K.

    python benchmarks/growth.py [--device cuda] [--sizes 512 4096 32768]

N grows at fixed K, then K at fixed N, with the kernel that trains on the device. One that only moves memory takes twice
as long for twice the weight: an exponent of 1 of time over size, fitted to the larger half of the sizes, where the time
of a launch no longer counts.
"""

from __future__ import annotations

import gc
from math import log
from statistics import linear_regression
from typing import Any

import torch
from harness import Benchmark, arguments, number, parse, significant, text
from kernel_bandwidth import G128, Weights, measure, ours

COLUMNS = [
    ("operation", text("operation")),
    ("path", text("path")),
    ("grows", text("grows")),
    ("shape", text("shape")),
    ("us", number("microseconds", 2)),
    ("ps a weight", number("picoseconds_per_weight", 3)),
    ("TB/s", significant("terabytes_per_second")),
    ("of a copy", number("of_copy", 2)),
    ("exponent", number("exponent", 2)),
]
OPERATIONS = ("fake_quantize", "pack_quantized", "pack_marlin")


def series(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The measured rows by operation and by what grows."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok":
            found.setdefault((row["operation"], row["grows"]), []).append(row)
    return found


def add_exponents(rows: list[dict[str, Any]]) -> None:
    """Give the last row of each series the exponent of its time over its size."""
    for members in series(rows).values():
        upper = members[(len(members) - 1) // 2 :]
        if len(upper) > 1:
            sizes, times = ([log(row[key]) for row in upper] for key in ("size", "microseconds"))
            members[-1]["exponent"] = linear_regression(sizes, times).slope


def plot(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Time over size, a line for each series."""
    for (name, grows), members in series(rows).items():
        sizes, times = ([row[key] for row in members] for key in ("size", "microseconds"))
        axes.plot(sizes, times, "o-" if grows == "N" else "s--", label=f"{name}, {grows} grows")
    axes.set(xscale="log", yscale="log", xlabel="N or K", ylabel="microseconds")
    axes.legend(fontsize=7)


def main() -> None:
    """Measure both series."""
    parser = arguments(__doc__, rounds=30)
    parser.add_argument("--sizes", type=int, nargs="+", help="what N and K grow through")
    parser.add_argument("--fixed", type=int, help="the other one")
    options = parse(parser, sizes=([256, 512, 1024], [2**power for power in range(9, 16)]), fixed=(512, 4096))
    kernel = "triton" if options.device.type == "cuda" else "reference"
    claim = (
        f"time of quantizing and packing bf16 weights in groups of 128 as N or K grows, the other at {options.fixed}"
    )
    benchmark = Benchmark("growth", claim, COLUMNS, options)
    rows: list[dict[str, Any]] = []
    for grows in ("N", "K"):
        for size in options.sizes:
            shape = (size, options.fixed) if grows == "N" else (options.fixed, size)
            weights = Weights(options, shape, torch.bfloat16)
            found = measure(weights, [ours(name, kernel, G128, options.device) for name in OPERATIONS], options.rounds)
            for row in found:
                row |= {"grows": grows, "size": size}
                if row["status"] == "ok":
                    row["microseconds"] = 1e3 * row["median_ms"]
                    row["picoseconds_per_weight"] = 1e9 * row["median_ms"] / (shape[0] * shape[1])
            rows += found
            gc.collect()
    add_exponents(rows)
    benchmark.add(rows)
    benchmark.finish(plot)


if __name__ == "__main__":
    main()
