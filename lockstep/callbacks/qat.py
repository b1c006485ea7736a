"""`QATCallback`: quantization-aware training and export for a Lightning ``Trainer``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lockstep import grid
from lockstep.export.directory import ExportError, check_destination
from lockstep.export.save import check_exportable, save_pretrained
from lockstep.qat import statistics
from lockstep.qat.prepare import prepare, quantized_modules, unprepare, unwrapped
from lockstep.qat.reuse import Reuse
from lockstep.scheme import Scheme


class QATCallback(Callback):
    """Train a model on the weights that it will be served with, and export them when the fit ends.

    >>> from lightning import Trainer
    >>> trainer = Trainer(callbacks=[QATCallback("W4A16", ignore=["lm_head"], export_dir="out")])

    The layers are switched before the optimizer exists, whether the model was built in ``__init__``, ``setup`` or
    ``configure_model``, and in ``fit``, ``validate``, ``test`` and ``predict`` alike. Checkpoints keep the model's own
    keys: they load with and without the callback, and nothing is converted inside ``fit``.

    What is prepared and exported is the transformers model that the LightningModule holds; without one, its only
    child module; else the LightningModule itself. `targets` and `ignore` are names in that module.

    Every `log_every_n_steps` optimizer steps it logs, for each layer and as ``mean`` over them:
    ``qat/sqnr_db/NAME`` (signal-to-quantization-noise ratio of the weight), ``qat/saturation/NAME`` (share of codes at
    the ends of the range) and, from the second time on, ``qat/code_flips/NAME`` (share of codes that changed since).
    The codes of the last time are kept on the host, a byte for each weight.

    Args:
        scheme: a preset's name or a `Scheme`.
        targets: class names, exact module names or ``re:`` regexes, as in compressed-tensors.
        ignore: what to leave out, in the same words.
        start_step: optimizer step from which ``fit`` trains quantized; before it, in full precision.
        export_dir: where to write the checkpoint of the final weights when ``fit`` ends without an exception, on rank
            zero. Checked before training starts. A ``tokenizer`` attribute of the LightningModule or of the datamodule
            is saved along.
        export_format: ``"pack-quantized"``, ``"gptq"`` or ``"marlin"``.
        log_every_n_steps: 0 for never.
        overwrite: let the export replace an earlier one.
        reuse: what the layers keep over the micro-batches of an optimizer step, see `lockstep.prepare`.

    Raises:
        ValueError, TypeError: see `lockstep.prepare`, at the start of the run.
        ExportError: see `lockstep.export.save_pretrained`; what can be known is raised before training.
    """

    def __init__(
        self,
        scheme: str | Scheme = "W4A16",
        targets: Sequence[str] = ("Linear",),
        ignore: Sequence[str] = ("lm_head",),
        start_step: int = 0,
        export_dir: str | None = None,
        export_format: str = "pack-quantized",
        log_every_n_steps: int = 100,
        overwrite: bool = False,
        reuse: Reuse | None = None,
    ) -> None:
        self.scheme = Scheme.of(scheme)
        self.targets = targets
        self.ignore = ignore
        self.start_step = start_step
        self.export_dir = export_dir
        self.export_format = export_format
        self.log_every_n_steps = log_every_n_steps
        self.overwrite = overwrite
        self.reuse = reuse
        self._quantized = False
        self._logged_step = 0
        self._logged_codes: dict[str, Tensor] = {}
        self._rotary: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Arrange for the layers to be switched as soon as the model is there, before the optimizer."""
        # Lightning has no callback hook between configure_model and the optimizer, hence this wrapper for one call.
        configure_model = pl_module.configure_model

        def configure_and_prepare() -> None:
            vars(pl_module).pop("configure_model", None)
            configure_model()
            self._start(trainer, pl_module)

        pl_module.configure_model = configure_and_prepare  # type: ignore[method-assign]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the arrangement of `setup` back if the run ended before it was used."""
        vars(pl_module).pop("configure_model", None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo what ``bf16-true`` did to the rotary frequencies."""
        self._restore_rotary(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run does not log the step that it resumes from."""
        self._logged_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch the layers when training reaches `start_step`."""
        self._follow_schedule(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate with the layers as they train, in the sanity check of a resumed run too."""
        self._restore_rotary(pl_module)
        self._follow_schedule(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in `on_fit_start`."""
        self._restore_rotary(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in `on_fit_start`."""
        self._restore_rotary(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the weight statistics every `log_every_n_steps` optimizer steps."""
        step = trainer.global_step
        if not self.log_every_n_steps or step % self.log_every_n_steps or step == self._logged_step:
            return
        self._logged_step = step
        if self._quantized:
            own = self._statistics(served_model(pl_module)) if trainer.is_global_zero else {}
            metrics = trainer.strategy.broadcast(own)
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, after the trainer has written its own checkpoints."""
        if self.export_dir is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.start_step and trainer.global_step <= self.start_step:
            raise ExportError(
                f"nothing trained quantized: training ended at step {trainer.global_step}, with "
                f"start_step={self.start_step}."
            )
        if trainer.is_global_zero:
            tokenizer = getattr(pl_module, "tokenizer", None) or getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
            save_pretrained(
                served_model(pl_module),
                self.export_dir,
                self.export_format,
                tokenizer=tokenizer,
                overwrite=self.overwrite,
            )
            rank_zero_info(f"exported to {self.export_dir} as {self.export_format}, every layer checked bit for bit")
        trainer.strategy.barrier("lockstep.export")

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = served_model(pl_module)
        self._rotary = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
        first = not any(quantized_modules(model))
        report = prepare(model, self.scheme, self.targets, self.ignore, self.reuse)
        if first:
            rank_zero_info(str(report))
        if trainer.state.fn == TrainerFn.FITTING:
            self._logged_codes = {}
            if self.export_dir is not None:
                check_destination(self.export_dir, self.overwrite)
                check_exportable(model, self.export_format)
        self._quantized = True

    def _restore_rotary(self, pl_module: LightningModule) -> None:
        """Engines compute rotary frequencies in fp32; Lightning's ``bf16-true`` rounds every buffer of the model."""
        model = served_model(pl_module)
        for name, exact in self._rotary.items():
            owner, _, leaf = name.rpartition(".")
            rounded = model.get_buffer(name)
            if rounded.dtype != exact.dtype:
                setattr(model.get_submodule(owner), leaf, exact.to(rounded.device))

    def _follow_schedule(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = trainer.state.fn != TrainerFn.FITTING or trainer.global_step >= self.start_step
        if due and not self._quantized:
            prepare(served_model(pl_module), self.scheme, self.targets, self.ignore, self.reuse)
        elif self._quantized and not due:
            unprepare(served_model(pl_module))
        self._quantized = due

    def _statistics(self, model: nn.Module) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, layer in quantized_modules(model):
            spec = layer.scheme.weights
            quantized = grid.quantize(layer.weight.detach(), spec)
            codes = quantized.codes.cpu()
            metrics[f"qat/sqnr_db/{name}"] = statistics.sqnr_db(layer.weight, quantized, spec)
            metrics[f"qat/saturation/{name}"] = statistics.saturation(quantized, spec)
            if name in self._logged_codes:
                metrics[f"qat/code_flips/{name}"] = statistics.code_flips(codes, self._logged_codes[name])
            self._logged_codes[name] = codes
        for kind in ("sqnr_db", "saturation", "code_flips"):
            values = [value for name, value in metrics.items() if name.startswith(f"qat/{kind}/")]
            if values:
                metrics[f"qat/{kind}/mean"] = sum(values) / len(values)
        return metrics


def served_model(pl_module: LightningModule) -> nn.Module:
    """The module that is prepared and exported: the transformers model, the only child, or the LightningModule."""
    children = [unwrapped(child) for child in pl_module.children()]
    children = [child for child in children if any(True for _ in child.parameters())]
    transformers_models = [
        model for model in children if hasattr(model, "save_pretrained") and hasattr(model, "config")
    ]
    if len(transformers_models) == 1:
        return transformers_models[0]
    alone = len(children) == 1 and not list(pl_module.parameters(recurse=False))
    # A bare layer has no names in it.
    return children[0] if alone and list(children[0].children()) else pl_module
