"""Lightning's distributed strategies against one process: losses, exported bits, time and memory.

    python benchmarks/two_gpus.py                         # two GPUs, NCCL
    python benchmarks/two_gpus.py --device cpu --quick    # what Lightning allows there, gloo

Every strategy trains the same model on the same samples: each of two ranks has its own sample of a step, one process
accumulates both. So the sums are those of one process up to the order in which a strategy adds; in 16 bits DeepSpeed
also keeps fp32 masters, which the others do not with ``bf16-true``, and FSDP1 casts weights in ``bf16-mixed``. Each
run is a process group of its own. A row a strategy: the largest relative difference of a step's loss from one
process's, the share of the exported codes and scales that differ, the files that the ranks wrote, milliseconds a step,
and rank zero's peak memory. One process does the work of two in a step, so its time is no peer's.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from harness import Benchmark, arguments, bars, number, parse, significant, text
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import MixedPrecision, fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lockstep import Scheme
from lockstep.callbacks import QATCallback

PRECISIONS = ("bf16-mixed", "32-true", "bf16-true", "16-mixed")
SIZES = {"hidden": (128, 1024), "layers": (2, 8), "vocabulary": (512, 8192), "length": (64, 512), "steps": (6, 20)}
STRATEGIES = ("ddp", "fsdp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
ON_CPU = ("ddp", "fsdp2")  # Lightning refuses the others without CUDA


class Module(lightning.LightningModule):
    """A Llama that is trained on random tokens."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=options.hidden,
            intermediate_size=options.hidden * 3,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=max(1, options.hidden // 256),
            vocab_size=options.vocabulary,
        )
        dtype = torch.bfloat16 if options.precision == "bf16-true" else torch.float32
        self.model = AutoModelForCausalLM.from_config(config, dtype=dtype)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        shape = (2 * self.options.steps, self.options.length)
        tokens: Any = torch.randint(self.options.vocabulary, shape, generator=generator)
        return torch.utils.data.DataLoader(tokens[self.trainer.global_rank :: self.trainer.world_size])


class Measure(Callback):
    """The mean loss of each optimizer step over all samples, and the time it takes."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._micro: list[Tensor] = []
        self._start = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self._micro:
            self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Lightning has divided it by the number of micro-batches.
        self._micro.append(outputs["loss"].detach().float() * trainer.accumulate_grad_batches)
        if len(self._micro) * trainer.world_size == 2:
            mean = torch.stack(self._micro).mean()
            self.losses.append(trainer.strategy.reduce(mean, reduce_op="mean").item())  # waits for the device
            self.seconds.append(time.perf_counter() - self._start)
            self._micro = []


def strategy_of(name: str, world: int, precision: str) -> Any:
    match name:
        case "fsdp2":
            return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
        case "fsdp":
            # Lightning's own 16-bit setting rounds the rotary frequencies along with the weights.
            low = torch.float16 if precision == "16-mixed" else torch.bfloat16
            kept = MixedPrecision(low, low, torch.float32) if precision in ("bf16-true", "16-mixed") else None
            return FSDPStrategy(auto_wrap_policy={LlamaDecoderLayer}, mixed_precision=kept)
        case "deepspeed_stage_1" | "deepspeed_stage_2" | "deepspeed_stage_3":
            zero = {"stage": int(name[-1]), "stage3_param_persistence_threshold": 0}
            config = {
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "train_micro_batch_size_per_gpu": 1,
            }
            return DeepSpeedStrategy(config=config)
    return name


def train(strategy: str, world: int, out: Path, options: argparse.Namespace) -> None:
    """One run, in this process as one rank of it: an export, a checkpoint and ``rank0.json`` in `out`."""
    cuda = options.device.type == "cuda"
    torch.use_deterministic_algorithms(cuda, warn_only=True)
    measure, served = Measure(), torch.float16 if options.precision == "16-mixed" else torch.bfloat16
    scheme = Scheme.preset(options.scheme, scale_dtype=served, served_dtype=served)
    callback = QATCallback(scheme, export_dir=str(out / "export"), log_every_n_steps=0)
    trainer = lightning.Trainer(
        strategy=strategy_of(strategy, world, options.precision),
        accelerator=options.device.type,
        devices=world,
        precision=options.precision,
        max_epochs=1,
        accumulate_grad_batches=2 // world,
        gradient_clip_val=None,
        use_distributed_sampler=False,
        callbacks=[callback, measure],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(options))
    result = {
        "losses": measure.losses,
        "ms": 1e3 * sorted(measure.seconds[2:])[len(measure.seconds[2:]) // 2],
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
    }
    if trainer.is_global_zero:
        (out / "rank0.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # a process group that is still up may abort a process that ends


def start(strategy: str, world: int, out: Path, arguments: list[str]) -> dict[str, Any]:
    """Run `train` in `world` processes, and what it measured; or the ``error`` of the first that failed."""
    out.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(world):
        environment = os.environ | {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(world),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }
        command = [sys.executable, __file__, *arguments, "--run", strategy, "--world", str(world), "--out", str(out)]
        with (out / f"rank{rank}.log").open("w") as log:
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for rank, process in enumerate(ranks):
            if process.wait(timeout=600):
                return {"error": (out / f"rank{rank}.log").read_text()[-1500:]}
    except subprocess.TimeoutExpired:
        return {"error": "no end after 600 s"}
    finally:
        for process in ranks:
            process.kill()
    return json.loads((out / "rank0.json").read_text())


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The share of the stored values that differ, packed words counted by their 4-bit codes."""
    assert found.keys() == expected.keys()
    different = total = 0
    for name, tensor in expected.items():
        a, b = found[name], tensor
        if name.endswith("weight_packed"):
            a, b = (one.view(torch.uint8) for one in (a, b))
            different += int((((a ^ b) & 15) > 0).sum() + (((a ^ b) >> 4) > 0).sum())
            total += 2 * a.numel()
        else:
            different += int((a.double() != b.double()).sum())
            total += a.numel()
    return different / total


def compare(benchmark: Benchmark, options: argparse.Namespace, precision: str, directory: Path) -> None:
    """A row for one process and for each strategy at one precision."""
    passed_on = ["--device", options.device.type, "--precision", precision, "--scheme", options.scheme]
    for size in SIZES:
        passed_on += [f"--{size}", str(getattr(options, size))]
    alone: dict[str, Any] = {}
    expected: dict[str, Tensor] = {}
    for name in ("auto", *options.strategies):
        out = directory / precision / name
        found = start(name, 1 if name == "auto" else 2, out, passed_on)
        row = {"path": f"lockstep, {name}", "strategy": name, "precision": precision, "scheme": options.scheme}
        if "error" in found:
            benchmark.add([row | {"status": "failed", "reason": found["error"].strip().splitlines()[-1][:200]}])
            if name == "auto":
                return
            continue
        weights = stored(out / "export")
        alone, expected = alone or found, expected or weights
        pairs = zip(found["losses"], alone["losses"], strict=True)
        row |= {
            "status": "ok",
            "loss": max(abs(a - b) / b for a, b in pairs),
            "first_loss_equal": found["losses"][0] == alone["losses"][0],
            "codes": differing(weights, expected),
            "files": len([*(out / "export").glob("*.safetensors")]),
            "median_ms": found["ms"],
            "peak_mib": found["peak_mib"],
        }
        benchmark.add([row])


COLUMNS = [
    ("path", text("path")),
    ("precision", text("precision")),
    ("loss differs by", significant("loss")),
    ("first loss equal", text("first_loss_equal")),
    ("codes and scales that differ", significant("codes")),
    ("files", text("files")),
    ("ms/step", number("median_ms", 1)),
    ("peak MiB, rank 0", number("peak_mib", 0)),
]


def main() -> None:
    """Every precision and strategy; with ``--run`` one rank of one run."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES)
    for size in SIZES:
        parser.add_argument(f"--{size}", type=int)
    for hidden in ("--precision", "--run"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)
    options = parse(parser, **SIZES)
    if options.run:
        train(options.run, options.world, options.out, options)
    cuda = options.device.type == "cuda"
    options.strategies = options.strategies or (STRATEGIES if cuda else ON_CPU)
    options.precisions = [one for one in options.precisions if cuda or one != "16-mixed"]
    claim = f"Lightning's strategies on two {'GPUs (NCCL)' if cuda else 'processes (gloo)'} against one process"
    benchmark = Benchmark("two_gpus", claim, COLUMNS, options)
    with tempfile.TemporaryDirectory() as directory:
        for precision in options.precisions:
            compare(benchmark, options, precision, Path(directory))

    def label(row: dict[str, Any]) -> str:
        return f"{row['strategy']}, {row['precision']}"

    benchmark.finish(lambda axes, rows: bars(axes, rows, label, "median_ms", "ms a step"))


if __name__ == "__main__":
    main()
