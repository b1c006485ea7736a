"""How many outputs of a fake-quantized linear are bit-equal to those of the engine's own kernel, and of its weights.

    python benchmarks/kernel_agreement.py [--device cuda] [--kernels vllm-marlin vllm-cutlass vllm-w4a8]

Three ways to train the same layer, each against the kernel on what that way exports:

* lockstep: scales are rounded before the codes are computed, and the forward has the kernel's order; quantized inputs
  have the engine's arithmetic.
* The scale not rounded: codes and forward use the fp32 scale, the export rounds it, as trainers do that round last.
* The dequantized tensors in a plain matmul: what Lockstep does for several groups in a row, and the classic fake
  quantization for everything else. Inputs are quantized in Lockstep's arithmetic there too: only the order differs.

Shares are means over seeds. "Read back" is the least share, over seeds, of weights that come out of a weight-only
kernel, through an identity, bit-equal to ``grid.dequantize``. "Equal codes" is the share of the inputs' codes that the
engine's quantizer and Lockstep's agree on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import Benchmark, arguments, bars, parse, text
from torch import Tensor

from lockstep import Scheme, TensorSpec, activations, grid, kernels
from lockstep.grid import Quantized
from lockstep.kernels import Kernel, KernelUnavailable, reference, vllm
from lockstep.scheme import dtype_name

INT4 = [
    Scheme(TensorSpec(strategy=strategy, group_size=group_size, scale_dtype=dtype, served_dtype=dtype))
    for dtype in (torch.bfloat16, torch.float16)
    for strategy, group_size in (("group", 128), ("group", 32), ("channel", None))
]
WEIGHT_ONLY = [
    Scheme.preset("W8A16"),
    Scheme.preset("W8A16", strategy="channel"),
    Scheme.preset("W4A16_ASYM"),
    Scheme.preset("W4A16_ASYM", strategy="channel"),
    Scheme.preset("NVFP4A16"),
    Scheme.preset("MXFP4A16"),
    Scheme.preset("MXFP8A16"),
]
QUANTIZED_INPUTS = [
    Scheme.preset("W8A8"),
    Scheme.preset("W8A8", {"strategy": "tensor", "dynamic": False}),
    Scheme.preset("FP8_DYNAMIC"),
    Scheme.preset("FP8"),
    Scheme.preset("FP8_BLOCK"),
]
W4AFP8 = Scheme.preset("W4AFP8")
# What each kernel is for; the others are for INT4 weights.
SCHEMES = {
    "reference": [*INT4, *WEIGHT_ONLY, *QUANTIZED_INPUTS, W4AFP8],
    "vllm-marlin": [*INT4, *WEIGHT_ONLY],
    "vllm-cutlass": QUANTIZED_INPUTS,
    "vllm-w4a8": [W4AFP8],
    "vllm-machete": [*INT4, WEIGHT_ONLY[0]],
}
WAYS = ("lockstep", "scale not rounded", "dequantized matmul")


class Trained(NamedTuple):
    """What one way of training computes for an input, and what it exports."""

    y: Tensor
    export: Quantized


def ways(scheme: Scheme) -> tuple[str, ...]:
    """Those of `WAYS` that differ: only 16-bit scales are rounded."""
    rounded = scheme.weights.scale_dtype.itemsize == 2
    return WAYS if rounded else (WAYS[0], WAYS[2])


def train(way: str, weight: Tensor, x: Tensor, scheme: Scheme, stored: Tensor | None) -> Trained:
    """The forward of `way` for a master `weight` ``[N, K]``, and its export."""
    spec, inputs = scheme.weights, scheme.activations
    if way == "scale not rounded":
        exact = replace(spec, scale_dtype=torch.float32)
        quantized = grid.quantize(weight, exact)
        y = F.linear(x, grid.dequantize(quantized, exact))
        return Trained(y, quantized._replace(scale=quantized.scale.to(spec.scale_dtype)))
    quantized = grid.quantize(weight, spec)
    if way == "dequantized matmul":
        if inputs is not None:
            x = activations.dequantize(activations.quantize(x, inputs, stored), x.dtype)
        return Trained(F.linear(x, grid.dequantize(quantized, spec)), quantized)
    return Trained(reference.linear(x, quantized, scheme, None, stored), quantized)


def equal(a: Tensor, b: Tensor) -> float:
    """The share of bit-equal numbers."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return (a.contiguous().view(bits) == b.contiguous().view(bits)).double().mean().item()


@lru_cache(maxsize=8)
def randn(seed: int, *shape: int, device: torch.device) -> Tensor:
    """Numbers of a seed, fp32, the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def master(seed: int, n: int, k: int, scheme: Scheme, device: torch.device) -> Tensor:
    """A weight ``[N, K]`` in the served dtype."""
    return 0.02 * randn(seed, n, k, device=device).to(scheme.weights.served_dtype)


def read_back(kernel: Kernel, scheme: Scheme, shape: tuple[int, int], seeds: int, device: torch.device) -> float | None:
    """The least share of weights that the kernel gives back exactly; None where it quantizes the identity too."""
    if scheme.activations is not None:
        return None
    n, k = shape
    spec = scheme.weights
    identity = torch.eye(k, dtype=spec.served_dtype, device=device)
    exports = (grid.quantize(master(seed, n, k, scheme, device), spec) for seed in range(seeds))
    # + 0.0: the sums around the one product turn its -0 into 0.
    return min(
        equal(kernel.run(identity, one, scheme, None, None).T + 0.0, grid.dequantize(one, spec) + 0.0)
        for one in exports
    )


def equal_codes(kernel: Kernel, x: Tensor, scheme: Scheme, stored: Tensor | None) -> float | None:
    """The share of the inputs' codes on which the engine's quantizer and Lockstep's agree."""
    if scheme.activations is None:
        return None
    ours = activations.quantize(x, scheme.activations, stored).codes
    theirs = (
        vllm.quantize_inputs(x, scheme.activations, stored).codes
        if kernel.name in ("vllm-cutlass", "vllm-w4a8")
        else ours
    )
    return equal(theirs, ours)


def agreement(
    kernel: Kernel, scheme: Scheme, shape: tuple[int, int], rows: int, seeds: int, device: torch.device
) -> tuple[dict[str, list[float]], list[float | None]]:
    """For each way, the share of equal outputs for each seed; and the shares of equal codes of the inputs."""
    n, k = shape
    shares: dict[str, list[float]] = {way: [] for way in ways(scheme)}
    codes = []
    for seed in range(seeds):
        weight = master(seed, n, k, scheme, device)
        x = randn(seed + 1000, rows, k, device=device).to(scheme.weights.served_dtype)
        inputs, stored = scheme.activations, None
        if inputs is not None and inputs.stores_scale:
            stored = activations.static_scale(x.abs().amax(), inputs)
        for way in shares:
            y, export = train(way, weight, x, scheme, stored)
            shares[way].append(equal(y, kernel.run(x, export, scheme, None, stored)))
        codes.append(equal_codes(kernel, x, scheme, stored))
    return shares, codes


def measure(name: str, scheme: Scheme, shape: tuple[int, int], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each way and number of input rows. Raises KernelUnavailable if the kernel cannot run here."""
    kernel = kernels.find("linear", name, scheme, options.device)
    exact = read_back(kernel, scheme, shape, options.seeds, options.device)
    version = str(kernel.origin()).split(" at ")[0]
    for rows in options.rows:
        shares, codes = agreement(kernel, scheme, shape, rows, options.seeds, options.device)
        for way, share in shares.items():
            row = {
                "path": way,
                "kernel": name,
                "version": version,
                "spec": str(scheme),
                "shape": f"{shape[0]}x{shape[1]}",
            }
            row |= {"rows": rows, "read_back": exact, "equal_codes": None if None in codes else mean(codes)}
            yield {**row, "dtype": dtype_name(scheme.weights.served_dtype), "equal": mean(share), "status": "ok"}


def percent(key: str) -> Any:
    """A table cell for a share."""
    return lambda row: "" if row.get(key) is None else f"{100 * row[key]:.3f} %"


def shape_of(words: str) -> tuple[int, int]:
    """``"4096x14336"`` as N and K."""
    n, k = words.split("x")
    return int(n), int(k)


COLUMNS = [
    ("kernel", text("kernel")),
    ("spec", text("spec")),
    ("NxK", text("shape")),
    ("M", text("rows")),
    ("trained", text("path")),
    ("weights read back", percent("read_back")),
    ("equal codes", percent("equal_codes")),
    ("equal outputs", percent("equal")),
]


def main() -> None:
    """Each kernel with each scheme that it is for."""
    parser = arguments(__doc__, rounds=1, quick_rounds=1)
    parser.add_argument("--kernels", nargs="+")
    parser.add_argument("--shapes", nargs="+", type=shape_of, help="outputs x inputs of the layers")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--seeds", type=int)
    options = parse(
        parser,
        kernels=(["reference"], ["vllm-marlin", "vllm-cutlass", "vllm-w4a8", "vllm-machete", "sgl-marlin", "triton"]),
        shapes=([(128, 256)], [(4096, 4096), (11008, 4096)]),
        rows=([16], [1, 16, 512, 4096]),
        seeds=(1, 3),
    )
    claim = "bit-equal outputs between a trained layer's forward and a serving kernel on its export"
    benchmark = Benchmark("kernel_agreement", claim, COLUMNS, options)
    for name in options.kernels:
        for scheme in SCHEMES.get(name, INT4):
            try:
                for shape in options.shapes:
                    benchmark.add(measure(name, scheme, shape, options))
            except KernelUnavailable as error:
                benchmark.skip(str(error), path="lockstep", kernel=name, spec=str(scheme))
    # The plot has one size of each.
    some = {"shape": "x".join(map(str, options.shapes[0])), "rows": options.rows[len(options.rows) // 2]}
    benchmark.finish(
        lambda axes, rows: bars(
            axes,
            [row for row in rows if some.items() <= row.items()],
            lambda row: f"{row['path']}, {row['kernel']}, {row['spec']}, {row['shape']}, M={row['rows']}",
            *("equal", "share of bit-equal outputs"),
        )
    )


if __name__ == "__main__":
    main()
