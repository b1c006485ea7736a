"""What each row of the study does, with the project's own parts: `CausalLM`, `QATCallback`, `lockstep.ptq`, export."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from corpus import Corpus, corpus
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from rows import FORMATS, Row, all_rows, few_rows
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

import lockstep
from lockstep.callbacks import QATCallback
from lockstep.export.rollout.embedded import EmbeddedEngine
from lockstep.export.served import quantized_layers
from lockstep.ptq import quantize
from lockstep.ptq.rounded import with_their_rule
from lockstep.qat.distill import Teacher
from lockstep.qat.prepare import unwrapped, with_adapters_merged
from lockstep.qat.statistics import sqnr_db
from lockstep.recipes.causal_lm import CausalLM, compile_layers
from lockstep.recipes.evaluate import completions_that_parse, evaluate, line_ends_of, line_prompts
from lockstep.recipes.text import Blocks


@dataclass(frozen=True)
class Size:
    """A model, how long it trains, on which rows. Steps are optimizer steps of `batch` blocks of `context` tokens.

    `rates` are the learning rates to choose from for each way to train; a single one is taken as it is.
    """

    model: dict[str, int]
    vocabulary: int
    context: int
    batch: int
    base_steps: int
    base_batch: int
    base_rate: float
    steps: int
    test_blocks: int
    prompts: int
    calibration: int
    rates: dict[str, tuple[float, ...]]
    rows: Callable[[int], list[Row]]
    max_bytes: int = 0


SIZES = {
    # 111 million parameters; 157 million tokens, then 20 million for each row
    "large": Size(
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 64},
        vocabulary=16384, context=1024, batch=64, base_steps=2400, base_batch=64, base_rate=1.5e-3, steps=300,
        test_blocks=768, prompts=512, calibration=128, rows=all_rows,
        rates=dict.fromkeys(("bf16", "qat", "qad"), (6e-5, 2e-4, 6e-4)),
    ),
    # 10 million parameters, for two CPU cores; 5.1 million tokens, then 0.4 million for each row
    "small": Size(
        {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 4, "head_dim": 64},
        vocabulary=1024, context=256, batch=8, base_steps=5000, base_batch=4, base_rate=3e-3, steps=200,
        test_blocks=256, prompts=64, calibration=64, max_bytes=24_000_000, rows=few_rows,
        rates=dict.fromkeys(("bf16", "qat", "qad"), (1e-4, 3e-4, 1e-3)),
    ),
}  # fmt: skip

LORA_RATE = 5e-4
WARMUP_STEPS = 10
CALIBRATION_STEPS = 8
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
CURVE = 10  # steps between two points of a curve
FRESH = 0.25  # of the training text, which the base model never saw: all rows train on it
SETTLED = 12  # steps after which all is compiled


class Study:
    """The corpus, the base model, and the files of one run of the study under `folder`."""

    def __init__(self, folder: Path, size: Size, device: str) -> None:
        self.folder, self.size, self.device = folder, size, torch.device(device)
        self.compiles = self.device.type == "cuda"
        self.text: Corpus = corpus(folder / "corpus", size.vocabulary, size.max_bytes)
        self.base = folder / "base"
        ends = line_ends_of(self.text.tokenizer)
        held_out = self.text.blocks("test", size.context)
        self.test, self.line_ends = held_out[: size.test_blocks], ends
        self.tune = self.text.blocks("tune", size.context)[: math.ceil(size.test_blocks / 4)]
        self.prompts = line_prompts(held_out, self.text.tokenizer, ends, size.context // 4, size.prompts)
        seen = self.text.blocks("train", size.context)
        self.seen, self.fresh = seen.split([len(seen) - int(FRESH * len(seen)), int(FRESH * len(seen))])
        self.calibration = [block[None].to(self.device) for block in self.seen[: size.calibration]]

    # Training --------------------------------------------------------------------------------------------------------

    def train_base(self, devices: int) -> dict[str, Any]:
        """The bf16 model that every row starts from, trained from nothing, saved as a transformers folder."""
        config = transformers.Qwen3Config(
            vocab_size=len(self.text.tokenizer),
            max_position_embeddings=self.size.context,
            tie_word_embeddings=True,
            bos_token_id=self.text.tokenizer.bos_token_id,
            eos_token_id=self.text.tokenizer.eos_token_id,
            **self.size.model,
        )
        config.save_pretrained(self.folder / "config")
        module = CausalLM(
            str(self.folder / "config"), self.size.base_rate, warmup_steps=self.size.base_steps // 20,
            save_dir=str(self.base), compile_layers=self.compiles,
        )  # fmt: skip
        cost = self.fit(module, self.seen, self.size.base_steps, self.size.base_batch, 0, [], devices)
        return {"parameters": sum(one.numel() for one in module.model.parameters()), **cost}

    def train(self, row: Row, seed: int, rate: float, kl_share: float, save_dir: Path | None) -> tuple[Any, dict]:
        """One trained row: its model with the weights that it ended with, and what it cost."""
        start, options, callbacks = self.base, {}, []
        if row.method in ("lora", "frozen-grid", "qlora"):
            options = {"lora": LORA, "lora_mode": "merged" if row.method == "lora" else row.method}
            rate = LORA_RATE
        if row.method == "frozen-grid":
            start = self.exported_base(row.format)
        if row.library:
            start = self.quantized_base(row)
        if row.method in ("qat", "qad", "lora"):
            scheme = with_their_rule(FORMATS[row.format]) if row.library else FORMATS[row.format]
            stores = scheme.activations is not None and scheme.activations.stores_scale
            quantize = QATCallback(
                scheme,
                log_every_n_steps=0,
                learned_scales=row.learned,
                teacher=Teacher(self.teacher(), kl_share) if row.method == "qad" else None,
                calibration_steps=CALIBRATION_STEPS if stores else 0,
            )
            callbacks.append(quantize)
        module = CausalLM(
            str(start),
            rate,
            warmup_steps=WARMUP_STEPS,
            save_dir=None if save_dir is None else str(save_dir),
            compile_layers=self.compiles and row.method != "qlora",
            **options,
        )
        cost = self.fit(module, self.fresh, self.size.steps, self.size.batch, seed, callbacks)
        return module.model, {**cost, "learning_rate": rate}

    def teacher(self) -> Any:
        """The bf16 base model."""
        model = self.load(self.base, torch.bfloat16)
        if self.compiles:
            compile_layers(model)
        return model

    def fit(
        self,
        module: LightningModule,
        blocks: Tensor,
        steps: int,
        batch: int,
        seed: int,
        callbacks: list[Callback],
        devices: int = 1,
    ) -> dict[str, Any]:
        """Train for `steps`; the seconds of training alone, its tokens, its curve and the peak of memory."""
        lightning.seed_everything(seed, verbose=False)
        watch = Watch(self.device)
        trainer = Trainer(
            accelerator=self.device.type if self.device.type == "cpu" else "gpu",
            devices=devices if devices > 1 else [self.device.index or 0] if self.device.type == "cuda" else 1,
            strategy="ddp" if devices > 1 else "auto",
            precision="bf16-mixed",
            max_steps=steps,
            gradient_clip_val=1.0,
            callbacks=[*callbacks, watch],
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        data = Tokens(self.text.tokenizer, blocks, batch // devices, seed)
        trainer.fit(module, data)
        module.to(self.device)
        for layer in module.modules():  # measuring has other shapes, for each of which it would compile again
            layer._compiled_call_impl = None
        return {**watch.cost, "train_tokens": steps * batch * self.size.context}

    # Starting points -------------------------------------------------------------------------------------------------

    def exported_base(self, format: str) -> Path:
        """The base model rounded to nearest and exported, on which an adapter trains."""
        folder = self.folder / f"base {format}"
        if not folder.exists():
            model = self.load(self.base)
            lockstep.prepare(model, FORMATS[format])
            with contextlib.suppress(lockstep.export.ExportError):  # another worker was faster
                lockstep.export.save_pretrained(model, folder)
        return folder

    def quantized_base(self, row: Row) -> Path:
        """The base model quantized by a library, with its scales, from which QAT starts."""
        folder = self.folder / f"base {row.format} {row.library}"
        if not folder.exists():
            model = self.load(self.base)
            quantize(model, row.library, FORMATS[row.format], self.batches()).prepare(model)
            unfinished = folder.with_suffix(f".{os.getpid()}")
            model.save_pretrained(unfinished)  # with the scales beside the weights
            with contextlib.suppress(OSError):  # another worker was faster
                unfinished.rename(folder)
        return folder

    def rounded(self, row: Row, seed: int) -> tuple[Any, dict]:
        """The bf16 row of this seed, quantized by a library."""
        model = self.load(self.continued(seed))
        started = time.perf_counter()
        result = quantize(model, row.library, FORMATS[row.format], self.batches())
        if result.servable:
            result.prepare(model)
        cost: dict[str, Any] = {"quantize_seconds": time.perf_counter() - started}
        # Not `layers`, whose masters a method has moved towards its codes.
        if errors := {one.name: -20 * math.log10(one.error) for one in result.rows if one.error}:
            cost["layers"] = errors
        return model, cost

    def continued(self, seed: int) -> Path:
        """Where the bf16 row of this seed is saved."""
        return self.folder / f"bf16 seed {seed}"

    def batches(self) -> list[dict[str, Tensor]]:
        """Training text for the libraries to look at."""
        return [{"input_ids": block} for block in self.calibration]

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """A transformers folder on the device; fp32 as trained rows are measured, under autocast."""
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(self.device).eval()

    # Measures --------------------------------------------------------------------------------------------------------

    def measure(self, model: Any, reference: Any = None, writes: bool = False) -> dict[str, Any]:
        """All measures on the test packages; `writes` lets the model write lines too, which takes longer."""
        found = asdict(evaluate(model, self.test, self.line_ends, reference))
        parsed = (
            completions_that_parse(model, self.text.tokenizer, self.prompts, batch_size=len(self.prompts))
            if writes
            else None
        )
        return {**found, "parses": parsed}

    def perplexity_to_tune(self, model: Any) -> float:
        """On other packages than the test's, for the choice of learning rates."""
        return evaluate(model, self.tune, self.line_ends).perplexity

    def serve(self, model: Any, name: str) -> dict[str, Any]:
        """Export a prepared model, prove the export, and measure what a true kernel makes of the stored words."""
        folder = self.folder / "exports" / name
        lockstep.export.save_pretrained(model, folder, tokenizer=self.text.tokenizer, overwrite=True)
        report = lockstep.align.compare(model, folder, {"input_ids": self.test[:1].to(self.device)})
        engine = EmbeddedEngine.from_folder(folder, device=self.device, kernel="reference")
        return {"served_perplexity": self.perplexity(engine.model), "aligned": report.aligned}

    def perplexity(self, model: Any) -> float:
        """On the test packages, without the other measures."""
        return evaluate(model, self.test, self.line_ends).perplexity


def sizes(model: Any) -> dict[str, Any]:
    """Bytes of everything an export of a prepared model stores, and bits a weight of its quantized layers."""
    with with_adapters_merged(model) as served:
        quantized = quantized_layers(unwrapped(served))
        stored = {name: tensor.nbytes for name, tensor in lockstep.export.stream(served)}
        weights = sum(layer.weight.numel() for layer in quantized.values())
    of_them = sum(size for name, size in stored.items() if name.rpartition(".")[0] in quantized)
    return {"weight_bytes": sum(stored.values()), "bits_per_weight": 8 * of_them / weights}


def unquantized_size(model: Any) -> dict[str, Any]:
    """The same of a model as it is, served in bf16."""
    stored = lockstep.export.stream(model, "plain")
    return {"weight_bytes": sum(tensor.nbytes for _, tensor in stored), "bits_per_weight": 16.0}


def layers(model: Any) -> dict[str, float]:
    """Signal-to-quantization-noise ratio of each quantized weight, in dB."""
    with with_adapters_merged(model) as served:
        named = quantized_layers(unwrapped(served)).items()
        return {name: sqnr_db(one.weight, one.quantize(), one.scheme.weights) for name, one in named}


class Watch(Callback):
    """The seconds of training, the curve of the loss, and the peak of memory.

    The first steps compile: their share of the time is taken to be that of the others.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cost = device, {}
        self._losses: list[tuple[int, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is set up."""
        self._first, self._started = 0, self._now(reset=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Keep the loss on the device, where reading it would wait for the step."""
        if trainer.global_step == SETTLED:
            self._first, self._started = SETTLED, self._now()
        if trainer.global_step % CURVE == 0:
            self._losses.append((trainer.global_step, outputs["loss"].detach()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the clock and the losses."""
        a_step = (self._now() - self._started) / max(1, trainer.global_step - self._first)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        curve = [(step, loss.item()) for step, loss in self._losses]
        self.cost = {"train_seconds": a_step * trainer.global_step, "peak_bytes": peak, "curve": curve}

    def _now(self, reset: bool = False) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            if reset:
                torch.cuda.reset_peak_memory_stats(self.device)
        return time.perf_counter()


class Tokens(LightningDataModule):
    """Blocks in an order that the seed decides."""

    def __init__(self, tokenizer: Any, blocks: Tensor, batch: int, seed: int) -> None:
        super().__init__()
        self.tokenizer, self.batch, self.seed = tokenizer, batch, seed
        self.blocks = Blocks(blocks.flatten(), blocks.shape[1])

    def train_dataloader(self) -> DataLoader:
        """Shuffled by the seed alone."""
        order = RandomSampler(self.blocks, generator=torch.Generator().manual_seed(self.seed))
        return DataLoader(self.blocks, self.batch, sampler=order, drop_last=True, pin_memory=torch.cuda.is_available())
