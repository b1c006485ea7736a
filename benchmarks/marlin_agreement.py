"""How many outputs of a fake-quantized linear are bit-equal to those of the engine's own kernel, and of its weights.

    python benchmarks/marlin_agreement.py [--kernels vllm-marlin vllm-machete sgl-marlin] [--json FILE]

Three ways to train the same W4A16 layer, each against the kernel on what that way exports:

* Lockstep: the scale is rounded before the codes are computed, and the forward has the kernel's order.
* The scale not rounded: codes and forward use the fp32 scale, the export rounds it, as trainers do that round last.
* The dequantized weights in a plain matmul, the scale rounded: what Lockstep does for several groups in a row, and the
  classic fake quantization for channel-wise weights, which Marlin scales after the GEMM.

Shares are means over seeds; the least over seeds is in the JSON. "Read back" is the share of weights that come out of
the kernel, through an identity, bit-equal to ``grid.dequantize``. The first kernel must be able to run here.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import lockstep
from lockstep import TensorSpec, grid, kernels
from lockstep.grid import Quantized
from lockstep.kernels import Kernel, KernelUnavailable, reference
from lockstep.recipes.demo import machine
from lockstep.scheme import dtype_name

SPECS = [
    TensorSpec(strategy=strategy, group_size=group_size, scale_dtype=dtype, served_dtype=dtype)
    for dtype in (torch.bfloat16, torch.float16)
    for strategy, group_size in (("group", 128), ("group", 32), ("channel", None))
]
WAYS = ("Lockstep", "scale not rounded", "dequantized matmul")


class Trained(NamedTuple):
    """What one way of training computes for an input, and what it exports."""

    y: Tensor
    export: Quantized


def train(way: str, weight: Tensor, x: Tensor, spec: TensorSpec) -> Trained:
    """The forward of `way` for a master `weight` ``[N, K]``, and its export."""
    if way == "scale not rounded":
        exact = replace(spec, scale_dtype=torch.float32)
        codes, scale = grid.quantize(weight, exact)
        y = F.linear(x, grid.dequantize(Quantized(codes, scale), exact))
        return Trained(y, Quantized(codes, scale.to(spec.scale_dtype)))
    quantized = grid.quantize(weight, spec)
    if way == "dequantized matmul":
        return Trained(F.linear(x, grid.dequantize(quantized, spec)), quantized)
    return Trained(reference.linear(x, quantized, spec), quantized)


def equal(a: Tensor, b: Tensor) -> float:
    """The share of bit-equal numbers."""
    bits = torch.int32 if a.element_size() == 4 else torch.int16
    return (a.contiguous().view(bits) == b.contiguous().view(bits)).double().mean().item()


def randn(seed: int, *shape: int, like: TensorSpec, device: torch.device) -> Tensor:
    """Numbers of a seed, the same on every machine, in the served dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, like.served_dtype)


def read_back(kernel: Kernel, spec: TensorSpec, size: int, seeds: int, device: torch.device) -> float:
    """The least share, over seeds, of weights that the kernel gives back exactly."""
    identity = torch.eye(size, dtype=spec.served_dtype, device=device)
    masters = (0.02 * randn(seed, size, size, like=spec, device=device) for seed in range(seeds))
    exports = (grid.quantize(master, spec) for master in masters)
    # + 0.0: the sums around the one product turn its -0 into 0.
    return min(equal(kernel.run(identity, one, spec).T + 0.0, grid.dequantize(one, spec) + 0.0) for one in exports)


def agreement(
    kernel: Kernel, spec: TensorSpec, size: int, rows: int, seeds: int, device: torch.device
) -> dict[str, list[float]]:
    """For each way, the share of equal outputs for each seed."""
    shares: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        weight = 0.02 * randn(seed, size, size, like=spec, device=device)
        x = randn(seed + 1000, rows, size, like=spec, device=device)
        for way in WAYS:
            y, export = train(way, weight, x, spec)
            shares[way].append(equal(y, kernel.run(x, export, spec)))
    return shares


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each kernel, spec and number of rows; a kernel or spec that cannot run here is said so instead."""
    for name in options.kernels:
        for spec in SPECS:
            try:
                kernel = kernels.find("linear", name, spec, options.device)
            except KernelUnavailable as error:
                if name == options.kernels[0]:
                    raise
                print(f"left out: {error}", file=sys.stderr)
                continue
            exact = read_back(kernel, spec, options.size, options.seeds, options.device)
            for rows in options.rows:
                shares = agreement(kernel, spec, options.size, rows, options.seeds, options.device)
                yield {
                    "kernel": name,
                    "grouping": f"g{spec.group_size}" if spec.group_size else "channel",
                    "dtype": dtype_name(spec.served_dtype),
                    "rows": rows,
                    "read_back": exact,
                    "equal": {way: mean(share) for way, share in shares.items()},
                    "least_equal": {way: min(share) for way, share in shares.items()},
                }


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What the shares depend on."""
    origins = {kernel.name: kernel.origin() for kernel in kernels.KERNELS if kernel.name in options.kernels}
    return {
        "machine": torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else machine(),
        "torch": torch.__version__,
        "lockstep": lockstep.__version__,
        "python": platform.python_version(),
        **{name: origin for name, origin in origins.items() if origin},
    }


def main() -> None:
    """Measure, print one table, write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=["vllm-marlin", "vllm-machete", "sgl-marlin"])
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of the layer")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 512])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    measured: list[dict[str, Any]] = []
    try:
        for row in measure(options):
            if not measured:
                print(
                    f"| kernel | grouping | dtype | M | read back | {' | '.join(WAYS)} |\n|{'---|' * (5 + len(WAYS))}"
                )
            measured.append(row)
            shares = [row["read_back"], *row["equal"].values()]
            cells = [
                row["kernel"],
                row["grouping"],
                row["dtype"],
                str(row["rows"]),
                *(f"{100 * s:.3f} %" for s in shares),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
    except KernelUnavailable as error:
        sys.exit(str(error))
    where = environment(options)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    if options.json:
        content = {"environment": where, "size": options.size, "seeds": options.seeds, "rows": measured}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
