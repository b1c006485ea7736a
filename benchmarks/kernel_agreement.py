"""How many outputs of a fake-quantized linear are bit-equal to those of the engine's own kernel, and of its weights.

    python benchmarks/kernel_agreement.py [--device cuda] [--kernels vllm-marlin vllm-machete sgl-marlin triton]

Three ways to train the same W4A16 layer, each against the kernel on what that way exports:

* lockstep: the scale is rounded before the codes are computed, and the forward has the kernel's order.
* The scale not rounded: codes and forward use the fp32 scale, the export rounds it, as trainers do that round last.
* The dequantized weights in a plain matmul, the scale rounded: what Lockstep does for several groups in a row, and the
  classic fake quantization for channel-wise weights, which Marlin scales after the GEMM.

Shares are means over seeds. "Read back" is the share of weights that come out of the kernel, through an identity,
bit-equal to ``grid.dequantize``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import Benchmark, arguments, bars, parse, text
from torch import Tensor

from lockstep import TensorSpec, grid, kernels
from lockstep.grid import Quantized
from lockstep.kernels import Kernel, KernelUnavailable, reference
from lockstep.scheme import dtype_name

SPECS = [
    TensorSpec(strategy=strategy, group_size=group_size, scale_dtype=dtype, served_dtype=dtype)
    for dtype in (torch.bfloat16, torch.float16)
    for strategy, group_size in (("group", 128), ("group", 32), ("channel", None))
]
WAYS = ("lockstep", "scale not rounded", "dequantized matmul")


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


def measure(name: str, spec: TensorSpec, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each way and number of input rows. Raises KernelUnavailable if the kernel cannot run here."""
    kernel = kernels.find("linear", name, spec, options.device)
    exact = read_back(kernel, spec, options.size, options.seeds, options.device)
    version = str(kernel.origin()).split(" at ")[0]
    for rows in options.rows:
        shares = agreement(kernel, spec, options.size, rows, options.seeds, options.device)
        for way, share in shares.items():
            row = {"path": way, "kernel": name, "version": version, "spec": str(spec), "rows": rows, "read_back": exact}
            yield {**row, "dtype": dtype_name(spec.served_dtype), "equal": mean(share), "status": "ok"}


def percent(key: str) -> Any:
    """A table cell for a share."""
    return lambda row: "" if row.get(key) is None else f"{100 * row[key]:.3f} %"


COLUMNS = [
    ("kernel", text("kernel")),
    ("spec", text("spec")),
    ("M", text("rows")),
    ("trained", text("path")),
    ("weights read back", percent("read_back")),
    ("equal outputs", percent("equal")),
]


def main() -> None:
    """Each kernel with each grouping."""
    parser = arguments(__doc__, rounds=1, quick_rounds=1)
    parser.add_argument("--kernels", nargs="+")
    parser.add_argument("--size", type=int, help="inputs and outputs of the layer")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--seeds", type=int)
    options = parse(
        parser,
        kernels=(["reference"], ["vllm-marlin", "vllm-machete", "sgl-marlin", "triton"]),
        size=(256, 4096),
        rows=([16], [1, 16, 512]),
        seeds=(1, 3),
    )
    claim = "bit-equal outputs between a trained layer's forward and a serving kernel on its export"
    benchmark = Benchmark("kernel_agreement", claim, COLUMNS, options)
    for name in options.kernels:
        for spec in SPECS:
            try:
                benchmark.add(measure(name, spec, options))
            except KernelUnavailable as error:
                benchmark.skip(str(error), path="lockstep", kernel=name, spec=str(spec))
    benchmark.finish(
        lambda axes, rows: bars(
            *(axes, rows, lambda row: f"{row['path']}, {row['kernel']}, {row['spec']}, M={row['rows']}"),
            *("equal", "share of bit-equal outputs"),
        )
    )


if __name__ == "__main__":
    main()
