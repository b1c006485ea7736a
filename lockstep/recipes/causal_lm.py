"""A causal language model as a LightningModule: any transformers folder or config, or a small Llama made here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer


class CausalLM(LightningModule):
    """Next-token training of a transformers model with AdamW and a cosine schedule after a linear warm-up.

    Logs ``train/loss`` and ``val/loss`` in nats, ``val/perplexity``, and the learning rate.

    Args:
        model: a folder or hub name with weights, and the scales that ``lockstep calibrate`` put beside them if it did;
            a folder or file with only a ``config.json``, for random weights; or none, for a Llama of 0.4 million
            parameters with the vocabulary of the datamodule's tokenizer.
        learning_rate: peak.
        weight_decay: of the weight matrices; norms, biases and learned scales have none.
        warmup_steps: optimizer steps until the peak.
        final_share: the learning rate at the last step, as a share of the peak.
        save_dir: write the masters there as an ordinary transformers folder when the fit ends, or with `lora` the
            adapter.
        lora: fields of a ``peft.LoraConfig``, such as ``{r: 16, target_modules: all-linear}``, to train an adapter
            alone; None: all weights.
        lora_mode: what the adapter trains on, see `lockstep.qat.lora`. ``merged``: on the weights that a `QATCallback`
            quantizes and exports. ``frozen-grid``: `model` is a folder that Lockstep exported. ``qlora``: `model` is
            loaded in NF4. In the last two no `QATCallback` belongs to the trainer.
        compile_layers: compile each decoder layer with ``torch.compile``, all of them with one compilation.
    """

    def __init__(
        self,
        model: str | None = None,
        learning_rate: float = 4e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 50,
        final_share: float = 0.01,
        save_dir: str | None = None,
        lora: dict[str, Any] | None = None,
        lora_mode: Literal["merged", "frozen-grid", "qlora"] = "merged",
        compile_layers: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: Any = None

    @property
    def tokenizer(self) -> Any:
        """The datamodule's tokenizer, saved along with the checkpoints."""
        datamodule = getattr(self._trainer, "datamodule", None)  # there is no trainer in load_from_checkpoint
        return getattr(datamodule, "tokenizer", None)

    def configure_model(self) -> None:
        """Build or load the model, with fp32 masters, or the base and its adapter."""
        if self.model is None and self.hparams["lora"] is not None:
            self.model = load_adapted(
                self.hparams["model"], self.tokenizer, self.hparams["lora"], self.hparams["lora_mode"]
            )
        elif self.model is None:
            self.model = load_model(self.hparams["model"], self.tokenizer)
        vocabulary = self.model.config.vocab_size
        if self.tokenizer is not None and len(self.tokenizer) > vocabulary:
            raise ValueError(f"the tokenizer has {len(self.tokenizer)} tokens, the model a vocabulary of {vocabulary}.")
        if self.hparams["compile_layers"]:
            compile_layers(self.model)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the next tokens."""
        loss = self.model(**batch, use_cache=False).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The same on held-out text."""
        loss = self.model(**batch, use_cache=False).loss
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Perplexity from the mean loss."""
        self.log("val/perplexity", self.trainer.callback_metrics["val/loss"].exp())

    def configure_optimizers(self) -> Any:
        """AdamW; linear warm-up, then a cosine down to `final_share`."""
        rate, decay = self.hparams["learning_rate"], self.hparams["weight_decay"]
        named = {name: one for name, one in self.named_parameters() if one.requires_grad}
        # Learned scales of weights are matrices too; they must not decay, and move by their own size (qat/learned.py).
        scales = {name: one for name, one in named.items() if name.endswith(".weight_scale")}
        plain = [one for name, one in named.items() if name not in scales]
        groups: list[dict[str, Any]] = [
            {"params": [one for one in plain if one.ndim >= 2], "weight_decay": decay},
            {"params": [one for one in plain if one.ndim < 2], "weight_decay": 0.0},
        ]
        if scales:
            mean = torch.stack([one.detach().mean() for one in scales.values()]).mean().item()
            groups.append({"params": list(scales.values()), "weight_decay": 0.0, "lr": rate * mean})
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
        steps, warmup = int(self.trainer.estimated_stepping_batches), self.hparams["warmup_steps"]
        final, length = self.hparams["final_share"], max(1, steps - warmup)
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: final + (1 - final) * (1 + math.cos(math.pi * min(step / length, 1))) / 2
        )
        schedule: torch.optim.lr_scheduler.LRScheduler = cosine
        if warmup:
            linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup)
            schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [linear, cosine], [warmup])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_end(self) -> None:
        """Save the masters, under their ordinary names, or the adapter, as peft does."""
        if self.hparams["save_dir"] and self.trainer.is_global_zero:
            self.model.save_pretrained(self.hparams["save_dir"])
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(self.hparams["save_dir"])


def compile_layers(model: Any) -> None:
    """Compile each decoder layer of a transformers model in place; they are alike, so one compilation serves all."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # transformers' base of all decoder layers
            layer.compile()


def load_model(name: str | None, tokenizer: Any = None) -> Any:
    """The model of `CausalLM`'s argument `model`, in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    if name is None:
        if tokenizer is None:
            raise ValueError("model: without one, a datamodule with a tokenizer is needed for the vocabulary.")
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    path = Path(name)
    has_weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
    if path.is_file() or (path.is_dir() and not has_weights):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).train()  # transformers gives it in eval mode


def load_adapted(name: str | None, tokenizer: Any, config: dict[str, Any], mode: str) -> Any:
    """The ``PeftModel`` of `CausalLM`'s arguments `model`, `lora` and `lora_mode`.

    Raises:
        ImportError: peft is not installed.
        ValueError: no such mode; a mode that needs a folder without one; see `lockstep.qat.lora.get_peft_model`.
    """
    import lockstep.qat.lora as lora  # which raises with what to install

    if mode not in lora.MODES:
        raise ValueError(f"lora_mode={mode!r}: choose one of {', '.join(map(repr, lora.MODES))}.")
    adapter = lora.peft.LoraConfig(**{"task_type": "CAUSAL_LM", **config})
    if mode == "merged":  # on plain layers, which a QATCallback prepares before the optimizer exists
        return lora.peft.get_peft_model(load_model(name, tokenizer), lora.register(adapter))
    if name is None:
        raise ValueError(f"lora_mode={mode!r}: give model, the base that stays frozen.")
    if mode == "frozen-grid":
        from lockstep.export.adapter import load_frozen

        return lora.get_peft_model(load_frozen(name), adapter, "frozen-grid")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(name, quantization_config=lora.nf4(), dtype=torch.bfloat16)
    return lora.get_peft_model(base, adapter, "qlora")
