"""A full weight sync between two GPUs: one trains, the other holds the engine. Packed INT4 against bf16.

    python benchmarks/rollout_two_gpus.py                         # two GPUs, NCCL, an 8B-class model
    python benchmarks/rollout_two_gpus.py --device cpu --quick    # two processes, gloo

The trainer has bf16 masters in the shapes of Llama 3 8B and sends all of them by `lockstep.export.rollout.broadcast`:
``sync`` is `RolloutSession.sync`, which quantizes and packs on the way (bf16 needs no packing), and ``by blocks`` what
the ranks of a sharded model call, here with one rank. Of ``link only`` everything lies there as it is sent.
The engine's side is memory in which every tensor ends; what an engine does with tensors then is not in these times.
Checksums of both sides are compared for every tensor, which is. ``device copy`` is the limit: one copy of as many bytes
as the bf16 model's largest bucket from GPU to GPU, on a CPU from memory to memory.
"""

from __future__ import annotations

import argparse
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from harness import Benchmark, Case, add_ratios, arguments, bars, interleave, number, parse, text
from torch import Tensor

import lockstep
from lockstep.export import stream
from lockstep.export.rollout import AuditReport, RolloutSession
from lockstep.export.rollout.broadcast import BroadcastEngine
from lockstep.export.rollout.broadcast_sync import sync as send_blocks
from lockstep.export.rollout.buckets import Buckets
from lockstep.export.rollout.engine import checksums_of
from lockstep.export.rollout.link import connect
from lockstep.export.rollout.serve import serve

COLUMNS = [
    ("path", text("path")),
    ("format", text("format")),
    ("GB sent", number("gigabytes", 2)),
    ("ms", number("median_ms", 1)),
    ("p10", number("p10_ms", 1)),
    ("p90", number("p90_ms", 1)),
    ("GB/s", number("gigabytes_per_second", 1)),
    ("against bf16 sync", number("ratio", 2)),
]
SIZES = {"layers": (2, 32), "hidden": (128, 4096), "intermediate": (256, 14336), "vocabulary": (512, 128256)}


VERSIONS = itertools.count(1)


class Memory:
    """The engine's side: each tensor is copied to where the last one of that name lies."""

    format, partial = "pack-quantized", False
    version: int | None = 0

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._next = 0

    def begin_update(self, version: int) -> None:
        self._next = version

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        for name, tensor in tensors.items():
            if name in self._held:
                self._held[name].copy_(tensor)
            else:
                self._held[name] = tensor.clone()
        return checksums_of({name: self._held[name] for name in tensors})

    def end_update(self) -> None:
        self.version = self._next

    def abort_update(self) -> None:
        self.version = None


class Session(RolloutSession):
    """Of an engine that is memory: nothing computes there that could be audited."""

    def _audit(self, *_: object) -> AuditReport:
        return AuditReport({}, 0)


def hold(options: argparse.Namespace) -> None:
    """The engine's rank, until the trainer has had enough."""
    device = torch.device("cuda", 1) if options.device.type == "cuda" else options.device
    serve(Memory(), connect(options.hold, 1, device=device))  # type: ignore[arg-type]
    sys.stdout.flush()
    os._exit(0)  # a process group that is still up may abort a process that ends


def model_of(options: argparse.Namespace) -> Any:
    """Masters of a Llama in bf16, of random weights, prepared in INT4."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 128),
        num_key_value_heads=max(1, options.hidden // 512),
        vocab_size=options.vocabulary,
    )
    with options.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lockstep.prepare(model, "W4A16")
    return model


def send_ready(engine: BroadcastEngine, tensors: Mapping[str, Tensor], version: int) -> None:
    """Tensors that lie there, in buckets of 256 MB."""
    engine.begin_update(version)
    buckets = Buckets(256 * 10**6, lambda bucket: engine.load(bucket))  # type: ignore[arg-type, return-value]
    for name, tensor in tensors.items():
        buckets.add({name: tensor})
    buckets.flush()
    engine.end_update()


def cases(engine: BroadcastEngine, model: Any, format: str) -> list[Case]:
    """What is timed in one format."""
    tensors = {name: tensor.detach() for name, tensor in stream(model, format)}
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    called = "bf16" if format == "plain" else "INT4 g128, packed"

    session = Session(model, engine)

    def sync() -> None:
        engine.format = format  # the memory takes anything
        report = session.sync()
        assert (report.sent, report.skipped) == (len(tensors), 0)

    def by_blocks() -> None:
        engine.format = format
        send_blocks(model, engine, next(VERSIONS))

    steps: dict[str, Callable[[], object]] = {"lockstep, sync": sync, "lockstep, by blocks": by_blocks}
    steps["lockstep, link only"] = lambda: send_ready(engine, tensors, next(VERSIONS))
    return [Case({"path": path, "format": called, "gigabytes": size}, step) for path, step in steps.items()]


def copy_case(device: torch.device, bytes: int) -> Case:
    """From one device to the other, within this process."""
    here = torch.zeros(bytes, dtype=torch.uint8, device=device)
    there = torch.zeros(bytes, dtype=torch.uint8, device="cuda:1" if device.type == "cuda" else device)
    return Case({"path": "device copy", "format": "bytes", "gigabytes": bytes / 1e9}, lambda: there.copy_(here))


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def main() -> None:
    """Both formats; with ``--hold`` the engine's side."""
    parser = arguments(__doc__, rounds=5, quick_rounds=2)
    for size in SIZES:
        parser.add_argument(f"--{size}", type=int)
    parser.add_argument("--hold", help=argparse.SUPPRESS)
    options = parse(parser, **SIZES)
    if options.hold:
        hold(options)
    cuda = options.device.type == "cuda"
    if cuda and torch.cuda.device_count() < 2:
        parser.error("this machine has one GPU: two are needed, or --device cpu --quick.")
    claim = f"A full sync of {'an 8B-class' if not options.quick else 'a tiny'} model between two "
    claim += "GPUs (NCCL)" if cuda else "processes (gloo)"
    benchmark = Benchmark("rollout_two_gpus", claim, COLUMNS, options)
    address = free_address()
    holder = subprocess.Popen([sys.executable, __file__, "--device", options.device.type, "--hold", address])
    try:
        engine = BroadcastEngine(connect(address, 0, device=options.device))
        model = model_of(options)
        bf16, int4 = (cases(engine, model, format) for format in ("plain", "pack-quantized"))
        every = [*bf16, *int4, copy_case(options.device, 10**6 if options.quick else 10**9)]
        interleave(every, options.device, options.rounds, warmup=1, settle=0)
        engine.stop()
    finally:
        holder.kill()
    add_ratios(every[:-1], bf16[0])
    for case in every:
        if case.row["status"] == "ok":
            case.row["gigabytes_per_second"] = 1e3 * case.row["gigabytes"] / case.row["median_ms"]
    benchmark.add(case.row for case in every)

    def label(row: dict[str, Any]) -> str:
        return f"{row['path']}, {row['format']}"

    benchmark.finish(lambda axes, rows: bars(axes, rows[:-1], label, "median_ms", "ms a sync"))


if __name__ == "__main__":
    main()
