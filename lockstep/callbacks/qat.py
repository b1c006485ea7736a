"""`QATCallback`: quantization-aware training and export for a Lightning ``Trainer``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lockstep.callbacks import common
from lockstep.export.directory import ExportError, check_destination
from lockstep.export.gather import fsdp_units, outermost_gathered, ranks_of
from lockstep.export.legality import check_exportable
from lockstep.export.save import save_pretrained
from lockstep.qat import kv_cache, observers, oscillation
from lockstep.qat.distill import Distillation, Teacher
from lockstep.qat.kv_cache import prepare_kv_cache, spec_of, unprepare_kv_cache
from lockstep.qat.observers import ObserverName
from lockstep.qat.oscillation import Track
from lockstep.qat.prepare import PrepareReport, prepare, unprepare, unwrapped
from lockstep.qat.reuse import Reuse
from lockstep.qat.warmup import Schedule, Warmup
from lockstep.scheme import KVCacheSpec, Rule, Scheme


class QATCallback(Callback):
    """Train a model on the weights that it will be served with, and export them when the fit ends.

    >>> from lightning import Trainer
    >>> trainer = Trainer(callbacks=[QATCallback("W4A16", ignore=["lm_head"], export_dir="out")])

    The layers are switched before the optimizer exists, whether the model was built in ``__init__``, ``setup`` or
    ``configure_model``, and in ``fit``, ``validate``, ``test`` and ``predict`` alike. Checkpoints keep the model's own
    keys: they load with and without the callback, and nothing is converted inside ``fit``.

    What is prepared and exported is the transformers model that the LightningModule holds; without one, its only
    child module; else the LightningModule itself. `targets` and `ignore` are names in that module. Scales that the
    folder of a transformers model stores beside its weights, as ``lockstep calibrate`` writes them, are read from it.

    Every `log_every_n_steps` optimizer steps it logs, for each layer and as ``mean`` over them:
    ``qat/sqnr_db/NAME`` (signal-to-quantization-noise ratio of the weight), ``qat/saturation/NAME`` (share of codes at
    the ends of the range), from the second time on ``qat/code_flips/NAME`` (share of codes that changed since), and
    from the third on ``qat/oscillation/NAME`` (share that changed back: see `lockstep.qat.oscillation`). The codes of
    the last time and the direction of their last change are kept on the host, two bytes for each weight.

    Args:
        scheme: a preset's name, a `Scheme`, or a recipe: a list of `lockstep.Rule`.
        targets: class names, exact module names or ``re:`` regexes, as in compressed-tensors.
        ignore: what to leave out, in the same words.
        start_step: optimizer step from which ``fit`` trains quantized; before it, in full precision.
        export_dir: where to write the checkpoint of the final weights when ``fit`` ends without an exception: by rank
            zero, or by all ranks in turn if the model is sharded over them. Checked before training starts. A
            ``tokenizer`` attribute of the LightningModule or of the datamodule is saved along.
        export_format: see `lockstep.export.save_pretrained`; by default each layer in the format of its own scheme.
        log_every_n_steps: 0 for never.
        overwrite: let the export replace an earlier one.
        reuse: what the layers keep over the micro-batches of an optimizer step, see `lockstep.prepare`.
        fp8_input_gradient: see `lockstep.prepare`.
        learned_scales: see `lockstep.prepare`.
        kv_cache: what keys and values train as, ``"fp8"``, ``"int8"`` or a `lockstep.KVCacheSpec`; None: as they are.
        calibration_steps: for schemes with measured ranges (``FP8``, ``NVFP4``, a static KV cache): optimizer steps
            over which they are measured, on training batches, with inputs, keys and values as they are. Then they are
            frozen, the same on all ranks. 0: they are in the model's folder or in the checkpoint that is resumed. A run
            that resumes within these steps goes on measuring.
        observer: what becomes the range: see `lockstep.qat.observers`.
        teacher: the model before quantization, or its folder, to learn from: see `lockstep.qat.distill.Teacher`. The
            loss that the model trains on is then a mixture of its divergence from the teacher and of cross-entropy, and
            ``qat/kl`` and ``qat/cross_entropy`` are logged too, in nats per token. None: cross-entropy alone.
        warmup: how training goes over to the grid, from `start_step` on: see `lockstep.qat.warmup`. None: at once.
        dampening: strength of a pull of each weight to the middle of its bin, see `lockstep.qat.oscillation`; it rises
            to this by half a cosine over the run. Added to the gradients before they are clipped.

    Raises:
        ValueError, TypeError: see `lockstep.prepare`, at the start of the run.
        ExportError: see `lockstep.export.save_pretrained`; what can be known is raised before training.
    """

    def __init__(
        self,
        scheme: str | Scheme | list[Rule] = "W4A16",
        targets: Sequence[str] = ("Linear",),
        ignore: Sequence[str] = ("lm_head",),
        start_step: int = 0,
        export_dir: str | None = None,
        export_format: str | None = None,
        log_every_n_steps: int = 100,
        overwrite: bool = False,
        reuse: Reuse | None = None,
        fp8_input_gradient: bool = False,
        learned_scales: bool = False,
        kv_cache: str | KVCacheSpec | None = None,
        calibration_steps: int = 0,
        observer: ObserverName = "minmax",
        teacher: Teacher | None = None,
        warmup: Warmup | None = None,
        dampening: float = 0.0,
    ) -> None:
        self.scheme = scheme if isinstance(scheme, list) else Scheme.of(scheme)
        self.targets = targets
        self.ignore = ignore
        self.start_step = start_step
        self.export_dir = export_dir
        self.export_format = export_format
        self.log_every_n_steps = log_every_n_steps
        self.overwrite = overwrite
        self.reuse = reuse
        self.fp8_input_gradient = fp8_input_gradient
        self.learned_scales = learned_scales
        self.kv_cache = None if kv_cache is None else spec_of(kv_cache)
        self.calibration_steps = calibration_steps
        self.observer: ObserverName = observer
        self.teacher = teacher
        self._distillation: Distillation | None = None
        self.warmup = warmup
        self.dampening = dampening
        common.check_stability(warmup, dampening, learned_scales)
        self._warming: Schedule | None = None
        self._resumed: dict[str, dict[str, Tensor]] | None = None
        self._before_validation: dict[str, dict[str, Tensor]] = {}
        if start_step and (learned_scales or calibration_steps or common.stores_scales(self.scheme, self.kv_cache)):
            raise ValueError(common.LATE_START.format(start_step=start_step))
        self._quantized = False
        self._logged_step = 0
        self._logged_codes: dict[str, Track] = {}
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
        """Take the arrangement of `setup` back if the run ended before it was used, and the teacher away."""
        vars(pl_module).pop("configure_model", None)
        self._dismiss_teacher()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Undo what ``bf16-true`` did to the rotary frequencies."""
        self._restore_rotary(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run does not log the step that it resumes from, and goes on measuring or has its ranges."""
        self._logged_step = trainer.global_step
        kv_cache.kv_cache_spec(served_model(pl_module))  # refuses attention that was switched since
        self._calibrate(trainer, served_model(pl_module))
        if self.dampening and trainer.estimated_stepping_batches == float("inf"):
            raise ValueError("dampening rises over the run, and this one has no end: give max_steps or max_epochs.")
        if self.teacher is not None:
            where, dtype = trainer.strategy.root_device, common.served_dtype(self.scheme)
            tokenizer = _tokenizer(trainer, pl_module)
            self._distillation = Distillation(self.teacher, served_model(pl_module), where, dtype, tokenizer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """See that the teacher has a part in the first step, and dampen: whole gradients, unscaled, not clipped yet."""
        if self._distillation is not None:
            self._distillation.check_backward()
        if not self.dampening or not self._quantized:
            return
        if getattr(optimizer, "_step_supports_amp_scaling", False) and getattr(trainer.precision_plugin, "scaler", 0):
            raise ValueError(
                f"dampening: {type(optimizer).__name__} with fused=True unscales the gradients of 16-mixed in its own "
                "step, which is after this. Leave fused out."
            )
        step, steps = trainer.global_step - self.start_step, trainer.estimated_stepping_batches - self.start_step
        common.dampen(served_model(pl_module), self.dampening, step, steps, optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the teacher away."""
        self._dismiss_teacher()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch the layers when training reaches `start_step`, and let them warm up."""
        self._follow_schedule(trainer, pl_module)
        if self._quantized and self._warming and not self._warming.follow(trainer.global_step - self.start_step):
            self._warming = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate with the layers as they train, in the sanity check of a resumed run too."""
        self._restore_rotary(pl_module)
        self._follow_schedule(trainer, pl_module)
        self._calibrate(trainer, served_model(pl_module))
        self._before_validation = common.snapshot(served_model(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what observers saw of it: which validations a resumed run repeats must not show in its ranges."""
        for name, observer in common.observing(served_model(pl_module)).items():
            observer.load_state_dict(self._before_validation[name])

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in `on_fit_start`."""
        self._restore_rotary(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in `on_fit_start`."""
        self._restore_rotary(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Freeze ranges that are measured, and log the statistics every `log_every_n_steps` optimizer steps."""
        self._calibrate(trainer, served_model(pl_module))
        step = trainer.global_step
        if not self.log_every_n_steps or step % self.log_every_n_steps or step == self._logged_step:
            return
        self._logged_step = step
        metrics: dict[str, float] = {}
        if self._quantized:
            model, units = served_model(pl_module), fsdp_units(trainer.strategy.model or pl_module)
            own, self._logged_codes = common.layer_statistics(model, self._logged_codes, trainer.is_global_zero, units)
            metrics = trainer.strategy.broadcast(own)
        if self._distillation is not None:
            metrics |= self._distillation.metrics()
        if metrics:
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note what the observers have seen so far, so that a resumed run measures what an unbroken one would."""
        checkpoint["lockstep"] = {"observers": observers.states(common.observing(served_model(pl_module)))}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up the observers of the run that is resumed."""
        self._resumed = checkpoint.get("lockstep", {"observers": {}})["observers"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, after the trainer has written its own checkpoints."""
        if self.export_dir is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.start_step and trainer.global_step <= self.start_step:
            raise ExportError(
                f"nothing trained quantized: training ended at step {trainer.global_step}, with "
                f"start_step={self.start_step}."
            )
        if common.observing(served_model(pl_module)):
            raise ExportError(
                f"the ranges of inputs, keys and values are still being measured: training ended at step "
                f"{trainer.global_step}, with calibration_steps={self.calibration_steps}."
            )
        common.check_warm(self.warmup, self.start_step, trainer.global_step)
        with outermost_gathered(trainer.strategy.model):
            self._export(trainer, pl_module)
        trainer.strategy.barrier("lockstep.export")

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """On rank zero, or on all ranks if the model is sharded over them."""
        assert self.export_dir is not None
        model = served_model(pl_module)
        if trainer.is_global_zero or ranks_of(model) is not None:
            save_pretrained(
                model,
                self.export_dir,
                self.export_format,
                tokenizer=_tokenizer(trainer, pl_module),
                overwrite=self.overwrite,
                trained=common.how_trained(trainer.global_step, self),
            )
            as_what = f" as {self.export_format}" if self.export_format else ""
            rank_zero_info(f"exported to {self.export_dir}{as_what}, every layer checked bit for bit")

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = served_model(pl_module)
        self._rotary = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
        first = not common.prepared_modules(model)
        report = self._prepare(model)
        if first:
            rank_zero_info(str(report))
            if not self.calibration_steps and (read := common.read_scales(model)):
                rank_zero_info(read)
        # An interrupted fit may have left observers, with which layers do not quantize.
        common.unobserve(model)
        if trainer.state.fn == TrainerFn.FITTING:
            self._logged_codes, self._resumed = {}, None
            if self.calibration_steps:
                common.observe(model, self.observer, self.calibration_steps)
            common.check_steps(self.calibration_steps, trainer.max_steps, self.export_dir)
            limits = (self.start_step, trainer.max_steps, self.export_dir)
            self._warming = common.begin_warmup(model, self.warmup, *limits)
            if self.dampening:
                oscillation.check_dampening(model)
            if self.export_dir is not None:
                check_destination(self.export_dir, self.overwrite)
                check_exportable(model, self.export_format)
        self._quantized = True

    def _dismiss_teacher(self) -> None:
        if self._distillation is not None:
            self._distillation.remove()
            self._distillation = None

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
            self._prepare(served_model(pl_module))
        elif self._quantized and not due:
            unprepare(served_model(pl_module))
            unprepare_kv_cache(served_model(pl_module))
        self._quantized = due

    def _prepare(self, model: nn.Module) -> PrepareReport:
        options = (self.reuse, self.fp8_input_gradient, self.learned_scales)
        report = prepare(model, self.scheme, self.targets, self.ignore, *options)
        if self.kv_cache is not None:
            prepare_kv_cache(model, self.kv_cache)
        return report

    def _calibrate(self, trainer: Trainer, model: nn.Module) -> None:
        """Measure ranges until `calibration_steps`, then freeze them; a run resumed later has them in its model."""
        watching = common.observing(model)
        if trainer.state.fn != TrainerFn.FITTING or not watching:
            return
        resumed, self._resumed = self._resumed, None
        if resumed:
            observers.load_states(watching, resumed)
        if trainer.global_step < self.calibration_steps:
            return
        if resumed is not None and not resumed:  # the checkpoint was written after they were frozen
            common.unobserve(model)
        else:
            common.freeze(model)
            rank_zero_info(f"ranges of inputs, keys and values frozen at step {trainer.global_step}")


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


def _tokenizer(trainer: Trainer, pl_module: LightningModule) -> Any:
    return getattr(pl_module, "tokenizer", None) or getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
