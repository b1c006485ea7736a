"""What exporting a large checkpoint takes: memory of all processes together, and time.

    python benchmarks/streaming_export.py --device cpu [--gib 1 16] [--workers 1 2] [--folder /large/disk]

A checkpoint of random bf16 weights in the shapes of Llama 3 8B is made (of a small model at quick sizes), and exported
as W4A16 in a process of its own, from the start of Python on. Ten times a second the memory of that process and of all
that it starts is read from Linux: RSS counts pages that several processes share once for each, PSS once. Seconds are
those of a clock, in which other work on the machine shows; CPU seconds are those of the processes themselves. The peer
loads the model in memory with transformers, quantizes it with compressed-tensors and saves it: at sizes up to 2 GiB.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import Benchmark, Skipped, arguments, bars, first_line, number, parse, text

COLUMNS = [
    ("path", text("path")),
    ("source GiB", number("source_gib", 2)),
    ("largest tensor GiB", number("largest_gib", 2)),
    ("written GiB", number("written_gib", 2)),
    ("seconds", number("seconds", 1)),
    ("MB/s", number("mb_per_second", 0)),
    ("MB/s a worker", number("mb_per_second_per_worker", 0)),
    ("MB per CPU second", number("mb_per_cpu_second", 0)),
    ("peak RSS GiB", number("peak_rss_gib", 2)),
    ("peak PSS GiB", number("peak_pss_gib", 2)),
]
GIB = 2**30
LARGEST_PEER = 2
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


def make(folder: Path, gib: float) -> None:
    """Write a checkpoint of about `gib` GiB in files of 5 GB."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    def skeleton(layers: int) -> Any:
        large = LARGE | {"vocab_size": 128256 if gib >= 4 else 32768}
        sizes = large if gib >= 1 else SMALL | {"vocab_size": 2048}
        config = LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=False, dtype="bfloat16", **sizes)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    one, two = (sum(parameter.nbytes for parameter in skeleton(count).parameters()) for count in (1, 2))
    model = skeleton(max(1, round((gib * GIB - one) / (two - one)) + 1))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    random = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for place, (name, parameter) in enumerate(model.named_parameters()):
        if sum(tensor.nbytes for tensor in shard.values()) + parameter.nbytes > 5e9:
            flush()
        repeated = random.roll(997 * place).repeat(-(-parameter.numel() // random.numel()))
        shard[name] = repeated[: parameter.numel()].view(parameter.shape).contiguous()
    flush()
    index = {"metadata": {"total_size": sum(parameter.nbytes for parameter in model.parameters())}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": weight_map}))


def export(source: Path, out: Path, workers: int) -> None:
    """Ours: what ``lockstep export`` does."""
    torch.set_num_threads(1)
    from lockstep.export.convert import convert

    convert(source, out, "W4A16", workers=workers, progress=False)


def load_and_save(source: Path, out: Path, workers: int) -> None:
    """The peer's: W4A16 scales by compressed-tensors' own functions, compressed by its own compressor."""
    torch.set_num_threads(workers)
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.detach().unflatten(-1, (-1, 128))
            scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
            module.weight_scale.data.copy_(scale)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero_point)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)


def descendants(root: int) -> Iterator[int]:
    """A process and all that it started, directly or not."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
    found = [root]
    while found:
        yield (process := found.pop())
        found += [child for child, parent in parents.items() if parent == process]


def memory(process: int) -> dict[str, int]:
    """Bytes of RSS and PSS of a process; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines[1:])
    return {name.rstrip(":"): int(size) * 1024 for name, size, *_ in words if name in ("Rss:", "Pss:")}


def measured(work: Callable[[Path, Path, int], None], *given: Any) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory of `work` in a process of its own. Raises RuntimeError if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = multiprocessing.get_context("spawn").Process(target=work, args=given)
    started = time.perf_counter()
    process.start()
    peaks = {"Rss": 0, "Pss": 0}
    assert process.pid is not None
    while process.is_alive():
        found = [memory(one) for one in descendants(process.pid)]
        peaks = {name: max(peak, sum(one.get(name, 0) for one in found)) for name, peak in peaks.items()}
        process.join(0.1)
    seconds = time.perf_counter() - started
    if process.exitcode:
        raise RuntimeError(f"{work.__name__} ended with exit code {process.exitcode}, its error is above")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peaks_gib = {"peak_rss_gib": peaks["Rss"] / GIB, "peak_pss_gib": peaks["Pss"] / GIB}
    return {"seconds": seconds, "cpu_seconds": cpu, **peaks_gib}


def row(
    path: str, work: Callable[[Path, Path, int], None], source: Path, out: Path, workers: int, facts: dict[str, float]
) -> dict[str, Any]:
    """The row of one export; what it wrote is removed again."""
    found: dict[str, Any] = {"path": path, "workers": workers, **facts}
    try:
        if work is load_and_save and facts["source_gib"] > LARGEST_PEER:
            raise Skipped(f"the whole model in memory: measured at sizes up to {LARGEST_PEER} GiB")
        found |= measured(work, source, out, workers)
        found["written_gib"] = sum(path.stat().st_size for path in out.glob("*.safetensors")) / GIB
        found["mb_per_second"] = facts["source_gib"] * GIB / 1e6 / found["seconds"]
        found["mb_per_second_per_worker"] = found["mb_per_second"] / workers
        found["mb_per_cpu_second"] = facts["source_gib"] * GIB / 1e6 / found["cpu_seconds"]
        return found | {"status": "ok"}
    except Skipped as reason:
        return found | {"status": "skipped", "reason": str(reason)}
    except RuntimeError as error:
        return found | {"status": "failed", "reason": first_line(error)}
    finally:
        shutil.rmtree(out, ignore_errors=True)


def main() -> None:
    """Make the checkpoint, export it, and remove it."""
    parser = arguments(__doc__, rounds=1, quick_rounds=1)
    parser.add_argument("--gib", type=float, nargs="+", help="sizes of the checkpoint")
    parser.add_argument("--workers", type=int, nargs="+", help="numbers of processes")
    parser.add_argument("--folder", type=Path, help="where there is place for the checkpoint and its export")
    cores = len(os.sched_getaffinity(0))
    options = parse(parser, gib=([0.02], [1.0, 16.0]), workers=([1], sorted({1, min(4, cores)})), folder=(None, None))
    claim = "exporting random bf16 weights on disk as W4A16: memory of all processes together, and time"
    disk = options.folder
    del options.folder, options.command  # where disks are mounted is nobody's business
    benchmark = Benchmark("streaming_export", claim, COLUMNS, options)
    for gib in options.gib:
        with tempfile.TemporaryDirectory(dir=disk) as temporary:
            source, out = Path(temporary) / "source", Path(temporary) / "out"
            source.mkdir()
            measured(make, source, gib)  # type: ignore[arg-type]
            sizes = tensor_sizes(source)
            facts = {"source_gib": sum(sizes) / GIB, "largest_gib": max(sizes) / GIB}
            for workers in options.workers:
                name = f"lockstep, {workers} worker" + "s" * (workers > 1)
                benchmark.add([row(name, export, source, out, workers, facts)])
            benchmark.add([row("compressed-tensors, in memory", load_and_save, source, out, 1, facts)])
    benchmark.finish(lambda axes, rows: bars(axes, rows, label, "peak_rss_gib", "peak RSS of all processes, GiB"))


def label(one: dict[str, Any]) -> str:
    """Of a bar."""
    return f"{one['path']}, {one['source_gib']:.2g} GiB"


def tensor_sizes(folder: Path) -> list[int]:
    """Bytes of each tensor of a folder, from the headers of its files."""
    sizes = []
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        sizes += [end - begin for begin, end in spans]
    return sizes


if __name__ == "__main__":
    main()
