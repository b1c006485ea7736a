"""Bytes moved a second by the kernels that quantize, pack and unpack, against a copy on the same device in this run.

    python benchmarks/kernel_bandwidth.py [--device cuda] [--shapes 14336x4096]

A bandwidth counts each operation's own traffic once: its input read, its result written. What a kernel makes is
compared with the reference bit for bit before it is timed. On CUDA the time is that of the kernels, replayed as a graph
over inputs and results that together are far larger than the cache; what is many kernels, or named so, is launched one
by one as a program does it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import (
    Benchmark,
    Case,
    Skipped,
    arguments,
    bars,
    compile_for_real,
    interleave,
    number,
    parse,
    quantizer,
    require,
    significant,
    synchronize,
    text,
)
from paths import TORCHAO
from torch import Tensor

from lockstep import TensorSpec, grid
from lockstep.kernels import reference
from lockstep.scheme import dtype_name

COLUMNS = [
    ("operation", text("operation")),
    ("path", text("path")),
    ("shape", text("shape")),
    ("weight", text("dtype")),
    ("spec", text("spec")),
    ("ms", number("median_ms", 4)),
    ("bytes a weight", number("bytes_per_weight", 2)),
    ("TB/s", significant("terabytes_per_second")),
    ("of a copy", number("of_copy", 2)),
    ("equal to the reference", text("equal")),
]
G128 = TensorSpec()
CHANNEL = TensorSpec(strategy="channel")
BY_GROUP = [G128, TensorSpec(group_size=64), TensorSpec(group_size=32), CHANNEL]
OTHER_RULES = [
    TensorSpec(scale_rule="amax/7.5"),
    TensorSpec(group_size=32, scale_rule="max/-8", scale_dtype=torch.float16),
]
FP16 = TensorSpec(scale_dtype=torch.float16, served_dtype=torch.float16)
REPLAYS = 4  # of a graph in a sample: the first one's start counts for less
PACKING = ("pack_quantized", "pack_marlin", "dequantize_packed")


@dataclass(frozen=True)
class Operation:
    """What is timed. `make` returns the function, or raises `Skipped`; it runs on what `prepare` makes of a weight."""

    name: str
    path: str
    spec: TensorSpec
    make: Callable[[], Callable[[Any], Any]]
    prepare: Callable[[Tensor], Any] = lambda weight: weight
    expected: Callable[[Any], Any] | None = None  # of one input
    graph: bool = True  # False: launch by launch


COPY = Operation("copy", "torch", G128, lambda: torch.clone)


def ours(name: str, kernel: str, spec: TensorSpec, device: torch.device, graph: bool = True) -> Operation:
    """A function of one of Lockstep's ``quantize`` kernels."""
    packed = name == "dequantize_packed"

    def function(module: Any) -> Callable[[Any], Any]:
        run = getattr(module, name)
        return (lambda words: run(*words, spec)) if packed else (lambda weight: run(weight, spec))

    return Operation(
        name,
        f"lockstep {kernel}" + ("" if graph else ", launched one by one"),
        spec,
        make=lambda: function(quantizer(kernel, spec, device)),
        prepare=(lambda weight: reference.pack_quantized(weight, spec)) if packed else (lambda weight: weight),
        expected=None if kernel == "reference" else function(reference),
        graph=graph and kernel != "reference",
    )


def compressed_tensors_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of compressed-tensors' own rule, amax/7.5, in groups of 128."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
    groups = weight.unflatten(-1, (-1, 128))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    return quantize(weight, scale, zero_point, args, dtype=torch.int8), scale


def compressed_tensors_pack(codes: Tensor) -> Tensor:
    """int8 codes to words."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return pack_to_int32(codes, 4)


def compressed_tensors_both(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Words and scales of a weight."""
    codes, scale = compressed_tensors_quantize(weight)
    return compressed_tensors_pack(codes), scale


def torchao_fake_quantizer() -> Callable[[Tensor], Tensor]:
    """torchao's general integer fake quantizer, in groups of 128."""
    require("torchao", "torchao", TORCHAO)
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    return IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, group_size=128, is_symmetric=True))


def fused_by_inductor() -> Callable[[Tensor], Tensor]:
    """The reference as a compiler fuses it."""
    compiled = torch.compile(grid.fake_quantize, fullgraph=True, dynamic=False)
    return lambda weight: compiled(weight, G128)


def peers() -> Iterator[Operation]:
    """What others do for the same, in groups of 128."""
    rule, ct = OTHER_RULES[0], "compressed-tensors"
    fake = partial(Operation, "fake_quantize", spec=G128)
    yield fake("grid, torch.compile", make=fused_by_inductor, expected=lambda w: reference.fake_quantize(w, G128))
    yield fake("torchao Intx", make=torchao_fake_quantizer, graph=False)
    yield Operation(
        "pack_quantized", f"{ct} quantize + pack_to_int32", rule, lambda: compressed_tensors_both, graph=False
    )
    yield Operation(
        *("pack codes", f"{ct} pack_to_int32", rule, lambda: compressed_tensors_pack),
        prepare=lambda weight: compressed_tensors_quantize(weight)[0],
        graph=False,
    )


class Weights:
    """Weights of one shape and dtype, together far larger than the cache, and cases over them."""

    def __init__(self, options: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.device, self.shape, self.dtype = options.device, shape, dtype
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        count = max(2, min(32, 2**29 // nbytes)) if self.device.type == "cuda" else 1
        generator = torch.Generator(self.device).manual_seed(0)
        draw = {"device": self.device, "dtype": dtype, "generator": generator}
        self.weights = [torch.randn(shape, **draw) for _ in range(count)]

    def case(self, operation: Operation) -> Case:
        """The case of an operation, checked and warm; one that cannot run says why in its row."""
        row = {
            "operation": operation.name,
            "path": operation.path,
            "shape": "x".join(map(str, self.shape)),
            "dtype": dtype_name(self.dtype),
            "spec": "" if operation is COPY else str(operation.spec),
        }
        case = Case(row, step=lambda: None)
        try:
            run = operation.make()
            inputs = [operation.prepare(weight) for weight in self.weights]
            row |= self._checked(operation, run, inputs[0])
            case.step = self._replay(run, inputs) if operation.graph else partial(_run_all, run, inputs)
            replays = REPLAYS if operation.graph and self.device.type == "cuda" else 1
            case.repeats = replays * len(inputs)
        except Skipped as reason:
            row |= {"status": "skipped", "reason": str(reason)}
        except Exception as error:  # whatever a peer raises: the other rows are still wanted
            case.fail(error)
        return case

    def _checked(self, operation: Operation, run: Callable[[Any], Any], first: Any) -> dict[str, Any]:
        result = run(first)
        moved = _nbytes(first) + _nbytes(result)
        return {
            "bytes": moved,
            "bytes_per_weight": moved / self.weights[0].numel(),
            "equal": None if operation.expected is None else _equal(result, operation.expected(first)),
        }

    def _replay(self, run: Callable[[Any], Any], inputs: list[Any]) -> Callable[[], object]:
        """A launch for each input, `REPLAYS` times over, without the time that launching takes."""
        if self.device.type != "cuda":
            return partial(_run_all, run, inputs)
        synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [run(one) for one in inputs]  # all kept, so that no result is written over another

        def replay(keep: object = (inputs, results)) -> None:  # the graph itself keeps no memory alive
            for _ in range(REPLAYS):
                graph.replay()

        return replay


def _run_all(run: Callable[[Any], Any], inputs: list[Any]) -> None:
    for one in inputs:
        run(one)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _nbytes(value: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(value))


def _equal(mine: Any, theirs: Any) -> bool:
    return all(torch.equal(one, other) for one, other in zip(_tensors(mine), _tensors(theirs), strict=True))


def measure(weights: Weights, operations: Iterable[Operation], rounds: int) -> list[dict[str, Any]]:
    """A row for the copy and one for each operation, with its bandwidth and that against the copy's."""
    cases = [weights.case(operation) for operation in (COPY, *operations)]
    interleave([case for case in cases if "status" not in case.row], weights.device, rounds, settle=0.0)
    copy, rows = cases[0].row, [case.row for case in cases]
    for row in rows:
        if row["status"] == "ok":
            row["terabytes_per_second"] = row["bytes"] / row["median_ms"] / 1e9
            row["of_copy"] = row["terabytes_per_second"] / copy["terabytes_per_second"]
    return rows


def first_shape(kernel: str, device: torch.device) -> dict[torch.dtype, list[Operation]]:
    """What is measured on the first shape, by the weight's dtype: `kernel` with all specs, the reference, the peers."""
    mine = partial(ours, kernel=kernel, device=device)
    plain = [ours(name, "reference", G128, device) for name in ("fake_quantize", *PACKING)]
    return {
        torch.bfloat16: [
            *(mine("fake_quantize", spec=spec) for spec in (*BY_GROUP, *OTHER_RULES)),
            *(mine(name, spec=spec) for name in PACKING for spec in BY_GROUP),
            *([mine("fake_quantize", spec=G128, graph=False), *plain] if kernel != "reference" else []),
            *peers(),
        ],
        torch.float16: [mine("fake_quantize", spec=FP16)],
        torch.float32: [mine("fake_quantize", spec=G128)],
    }


def shape(text: str) -> tuple[int, ...]:
    """``"14336x4096"`` as a tuple."""
    return tuple(map(int, text.split("x")))


def main() -> None:
    """Everything on the first shape, groups of 128 on the others."""
    parser = arguments(__doc__, rounds=30)
    parser.add_argument("--shapes", type=shape, nargs="+", help="N x K, or experts x N x K")
    parser.add_argument("--paths", nargs="+", default=[""], help="only those whose name contains one of these")
    full = ["14336x4096", "4096x14336", "4096x4096", "1024x4096", "16x4096x2048"]
    options = parse(parser, shapes=([(1024, 512), (256, 1024)], list(map(shape, full))))
    claim = "bytes read and written a second, against a copy of the same weights in this run"
    benchmark = Benchmark("kernel_bandwidth", claim, COLUMNS, options)
    device, kernel = options.device, "triton"
    try:
        quantizer(kernel, G128, device)
    except Skipped as reason:
        benchmark.skip(str(reason), operation="all", path="lockstep triton")
        kernel = "reference"
    compile_for_real()
    others = {torch.bfloat16: [ours(name, kernel, G128, device) for name in ("fake_quantize", *PACKING)]}
    for size in options.shapes:
        plan = first_shape(kernel, device) if size == options.shapes[0] else others
        for dtype, operations in plan.items():
            chosen = [one for one in operations if any(part in one.path for part in options.paths)]
            benchmark.add(measure(Weights(options, size, dtype), chosen, options.rounds))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    benchmark.finish(
        lambda axes, rows: bars(
            axes,
            rows,
            lambda row: f"{row['operation']}, {row['path']}, {row['shape']} {row['dtype']}, {row['spec']}",
            "terabytes_per_second",
            "TB/s",
        )
    )


if __name__ == "__main__":
    main()
