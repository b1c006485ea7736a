"""From bf16 masters of an 8B model to packed INT4 tensors in the engine's hands: time, bandwidth and extra memory.

    python benchmarks/weight_sync.py [--device cuda] [--layers 32] [--rounds 5]

Masters and engine are on one device, so the engine's hands are tensors that lie there already, and sending is a copy.
Every path ends with all tensors of the model in them, but for the first rows, which time the kernels alone. A bandwidth
counts each quantized weight's own traffic once: 2 bytes read, half a byte and its share of a scale written. On CUDA
kernels alone are replayed as a graph; everything else is launched as a program does it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from harness import (
    Benchmark,
    Case,
    add_ratios,
    allocated,
    arguments,
    bars,
    interleave,
    number,
    parse,
    peak_mib,
    significant,
    synchronize,
    text,
)
from kernel_bandwidth import compressed_tensors_both
from torch import Tensor, nn

import lockstep
from lockstep import kernels
from lockstep.export import stream
from lockstep.export.rollout.buckets import Buckets
from lockstep.export.rollout.embedded import EmbeddedEngine
from lockstep.export.rollout.engine import checksums_of
from lockstep.export.rollout.session import RolloutSession

COLUMNS = [
    ("path", text("path")),
    ("what", text("what")),
    ("format", text("format")),
    ("ms", number("median_ms", 2)),
    ("p10", number("p10_ms", 2)),
    ("p90", number("p90_ms", 2)),
    ("TB/s of quantized weights", significant("terabytes_per_second")),
    ("against sending bf16", number("ratio", 2)),
    ("GB sent", number("gigabytes_sent", 2)),
    ("extra peak MiB", number("extra_peak_mib", 0)),
]
SCHEME = lockstep.Scheme.preset("W4A16")
BUCKET = 256 * 10**6
# The function of a `Quantizer`, and the order of its words.
PACKERS: dict[str, tuple[str, Literal["rows", "marlin"]]] = {
    "pack-quantized": ("pack_quantized", "rows"),
    "marlin": ("pack_marlin", "marlin"),
}


def masters(options: Any) -> Any:
    """A Llama of random bf16 weights on the device, prepared as W4A16 but for its ``lm_head``."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // options.head,
        num_key_value_heads=max(1, options.hidden // options.head // 4),
        vocab_size=options.vocabulary,
        tie_word_embeddings=False,
    )
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lockstep.prepare(model, SCHEME)
    return model


def graphed(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`step` without the time that launching takes: on CUDA, a graph of it."""
    step()
    if device.type != "cuda":
        return step
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay(keep: object = kept) -> None:  # the graph itself keeps no memory alive
        graph.replay()

    return replay


class Paths:
    """The paths of a prepared model's weights, each a `Case`."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.layers = [one for one in model.modules() if isinstance(one, nn.Linear) and hasattr(one, "scheme")]
        self.weights = [layer.weight.detach() for layer in self.layers]
        self.kernel = kernels.training(SCHEME, device)
        groups = sum(weight.numel() // 128 for weight in self.weights)
        self.packed_bytes = sum(weight.numel() // 2 for weight in self.weights) + 2 * groups
        self.moved = sum(weight.nbytes for weight in self.weights) + self.packed_bytes
        quantized = {id(layer.weight) for layer in self.layers}
        self.others = [one.detach() for one in model.parameters() if id(one) not in quantized]
        self.other_bytes = sum(one.nbytes for one in self.others)

    def kernels_alone(self, format: str) -> Iterator[Case]:
        """Quantize and pack, and the check of what was packed if the kernel has one."""
        name, order = PACKERS[format]
        pack, spec = getattr(self.kernel, name), SCHEME.weights
        row = {"path": "lockstep, kernels", "format": format, "bytes": self.moved}
        step = graphed(lambda: [pack(weight, spec) for weight in self.weights], self.device)
        yield Case({**row, "what": "quantize + pack alone"}, step)
        stored = [(weight, *pack(weight, spec)) for weight in self.weights]

        def check() -> list[Any]:
            return [self.kernel.check_packed(weight, words, scale, spec, order) for weight, words, scale in stored]

        if check()[0] is not None:
            yield Case({**row, "what": "check alone"}, graphed(check, self.device))

    def streamed(self, format: str) -> Iterator[Case]:
        """`lockstep.export.stream`, every layer checked: drained; hashed too; and written into storage."""
        row = {"path": "lockstep", "format": format, "gigabytes_sent": (self.packed_bytes + self.other_bytes) / 1e9}
        places = {name: torch.empty_like(tensor) for name, tensor in stream(self.model, format)}

        def drain() -> None:
            for _ in stream(self.model, format):
                pass

        def hash_one(bucket: Mapping[str, Tensor]) -> None:
            checksums_of(bucket)

        def hash_all() -> None:
            buckets = Buckets(BUCKET, hash_one)
            for name, tensor in stream(self.model, format):
                buckets.add({name: tensor})
            buckets.flush()

        def write() -> None:
            for name, tensor in stream(self.model, format):
                places[name].copy_(tensor)

        yield Case({**row, "what": "stream, drained"}, drain)
        yield Case({**row, "what": "stream and checksums"}, hash_all)
        yield Case({**row, "what": "stream into storage"}, write)

    def session(self) -> Case:
        """A whole sync into the embedded engine, with checksums of both sides; the first one audits it."""
        engine = EmbeddedEngine.from_model(self.model)
        session = RolloutSession(self.model, engine, only_changed=False)
        session.sync()
        sent = (self.packed_bytes + self.other_bytes) / 1e9
        row = {"path": "lockstep", "what": "RolloutSession.sync", "format": "pack-quantized", "gigabytes_sent": sent}
        return Case(row, session.sync)

    def bf16(self) -> Case:
        """Sending everything as it is."""
        pairs = [(torch.empty_like(one), one) for one in (*self.weights, *self.others)]
        sent = sum(one.nbytes for _, one in pairs) / 1e9

        def copy() -> None:
            for place, one in pairs:
                place.copy_(one)

        return Case({"path": "bf16", "what": "copy into storage", "format": "bf16", "gigabytes_sent": sent}, copy)

    def compressed_tensors(self) -> Case:
        """Scales, codes and words by compressed-tensors' own functions, unchecked, layer by layer into storage."""
        places = [tuple(map(torch.empty_like, compressed_tensors_both(weight))) for weight in self.weights]
        others = [(torch.empty_like(one), one) for one in self.others]
        sent = (sum(one.nbytes for pair in places for one in pair) + self.other_bytes) / 1e9

        def run() -> None:
            for weight, stored in zip(self.weights, places, strict=True):
                for place, made in zip(stored, compressed_tensors_both(weight), strict=True):
                    place.copy_(made)
            for place, one in others:
                place.copy_(one)

        what = "quantize + pack_to_int32 into storage"
        row = {"path": "compressed-tensors", "what": what, "format": "pack-quantized", "gigabytes_sent": sent}
        return Case({**row, "bytes": self.moved}, run)


def measure(paths: Paths, rounds: int) -> list[dict[str, Any]]:
    """A row for each path, all of them in turn."""
    cases: list[Case] = []

    def add(path: str, make: Callable[[], Iterator[Case] | Case]) -> None:
        try:
            made = make()
            cases.extend([made] if isinstance(made, Case) else made)
        except Exception as error:  # whatever a peer raises: the other rows are still wanted
            cases.append(Case({"path": path, "what": "", "format": ""}, lambda: None))
            cases[-1].fail(error)

    add("bf16", paths.bf16)
    for format in PACKERS:
        add("lockstep", lambda format=format: paths.kernels_alone(format))  # type: ignore[misc]
        add("lockstep", lambda format=format: paths.streamed(format))  # type: ignore[misc]
    add("lockstep", paths.session)
    add("compressed-tensors", paths.compressed_tensors)
    with torch.no_grad():
        interleave(cases, paths.device, rounds)
        for case in cases:
            if not case.failed:
                case.row["extra_peak_mib"] = peak_mib(case, paths.device, allocated(paths.device))
    add_ratios(cases, cases[0])
    for row in (case.row for case in cases if not case.failed):
        if "bytes" in row:
            row["terabytes_per_second"] = row["bytes"] / row["median_ms"] / 1e9
    return [case.row for case in cases]


def main() -> None:
    """One model, all paths."""
    parser = arguments(__doc__, rounds=5, quick_rounds=2)
    for name in ("layers", "hidden", "intermediate", "vocabulary", "head"):
        parser.add_argument(f"--{name}", type=int)
    options = parse(
        parser,
        layers=(2, 32),
        hidden=(256, 4096),
        intermediate=(512, 14336),
        vocabulary=(512, 128256),
        head=(64, 128),
    )
    claim = "bf16 masters to packed INT4 tensors in an engine's storage on the same device, against a copy of the bf16"
    benchmark = Benchmark("weight_sync", claim, COLUMNS, options)
    model = masters(options)
    gc.collect()
    benchmark.add(measure(Paths(model, options.device), options.rounds))
    benchmark.finish(
        lambda axes, rows: bars(axes, rows, lambda row: f"{row['path']}, {row['what']}, {row['format']}", "ratio", "x")
    )


if __name__ == "__main__":
    main()
