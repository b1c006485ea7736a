"""`QATTrainerCallback`: quantization-aware training and export for a Hugging Face ``Trainer`` and its descendants."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lockstep.callbacks import common
from lockstep.export.directory import ExportError, check_destination
from lockstep.export.gather import ranks_of
from lockstep.export.legality import check_exportable
from lockstep.export.save import save_pretrained
from lockstep.qat import learned, observers, oscillation
from lockstep.qat.distill import METRICS, Distillation, Teacher
from lockstep.qat.kv_cache import kv_cache_spec, prepare_kv_cache, spec_of, unprepare_kv_cache
from lockstep.qat.linear import QATLinear
from lockstep.qat.observers import ObserverName
from lockstep.qat.oscillation import Track
from lockstep.qat.prepare import prepare, quantized_modules, unprepare, unwrapped
from lockstep.qat.reuse import Reuse
from lockstep.qat.warmup import Schedule, Warmup
from lockstep.scheme import KVCacheSpec, Rule, Scheme

STATE = "lockstep"  # the key in ``trainer_state.json``


class QATTrainerCallback(TrainerCallback):
    """Train a model on the weights that it will be served with, and export them when ``train`` ends.

    >>> trainer = Trainer(model=model, callbacks=[QATTrainerCallback("W4A16", ignore=["lm_head"], export_dir="out")])

    The layers are switched when the trainer is made, before the optimizer is, so training, evaluation and prediction
    are quantized alike. Checkpoints and ``save_model`` keep the model's own keys, with the measured or learned scales
    where the scheme has such, and resume as usual. A callback that is added later, a trainer with ``model_init`` and a
    ready optimizer work as long as the scheme adds nothing to the model; where it does, they are refused before the
    first step.

    Every `log_every_n_steps` optimizer steps the trainer logs, for each layer and as ``mean`` over them:
    ``qat/sqnr_db/NAME``, ``qat/saturation/NAME``, from the second time on ``qat/code_flips/NAME`` and from the third on
    ``qat/oscillation/NAME``, as `lockstep.callbacks.QATCallback` does. All of them stand in
    ``trainer.state.log_history``; callbacks after this one see the means.

    Args:
        scheme: a preset's name, a `Scheme`, or a recipe: a list of `lockstep.Rule`.
        targets: class names, exact module names or ``re:`` regexes, as in compressed-tensors.
        ignore: what to leave out, in the same words.
        start_step: optimizer step from which training is quantized; before it, in full precision.
        export_dir: where to write the checkpoint of the final weights (the best ones, with ``load_best_model_at_end``)
            when ``train`` ends without an exception, with the trainer's ``processing_class``. Checked before training
            starts. On rank zero; of a sharded model on all, one module whole at a time.
        export_format: see `lockstep.export.save_pretrained`; by default each layer in the format of its own scheme.
        log_every_n_steps: 0 for never.
        overwrite: let the export replace an earlier one.
        reuse: what the layers keep over the micro-batches of an optimizer step, see `lockstep.prepare`.
        fp8_input_gradient: see `lockstep.prepare`.
        learned_scales: see `lockstep.prepare`. They need an optimizer with a group of their own.
        kv_cache: what keys and values train as, ``"fp8"``, ``"int8"`` or a `lockstep.KVCacheSpec`; None: as they are.
        calibration_steps: for schemes with measured ranges (``FP8``, ``NVFP4``, a static KV cache): optimizer steps
            over which they are measured, on training batches, with inputs, keys and values as they are. Then they are
            frozen, the same on all ranks. 0: they are in the model's folder or in the checkpoint that is resumed. A run
            that resumes within these steps goes on measuring.
        observer: what becomes the range: see `lockstep.qat.observers`.
        teacher: the model before quantization, or its folder, to learn from: see `lockstep.qat.distill.Teacher`. The
            loss that the model trains on is then a mixture of its divergence from the teacher and of cross-entropy, and
            ``qat/kl`` and ``qat/cross_entropy`` are logged too, in nats per token. None: cross-entropy alone. The
            tokenizer in its folder is compared with ``processing_class``. If ``train`` raises, of which the trainer
            tells no callback, the teacher stays in memory, and on the job whenever the model is called with autograd
            on, until the next ``train``.
        warmup: how training goes over to the grid, from `start_step` on: see `lockstep.qat.warmup`. None: at once.
        dampening: strength of a pull of each weight to the middle of its bin, see `lockstep.qat.oscillation`; it rises
            to this by half a cosine over the run. Added to the gradients after they are clipped.

    Raises:
        ValueError, TypeError: see `lockstep.prepare`, when the trainer is made; what the docs page says, before the
            first step.
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
        if start_step and (learned_scales or calibration_steps or common.stores_scales(self.scheme, self.kv_cache)):
            raise ValueError(common.LATE_START.format(start_step=start_step))
        self._acted = False
        self._quantized = False
        self._head: tuple[str, list[bool], Any] | None = None
        self._measured: dict[str, dict[str, Tensor]] = {}  # by the observers, up to the last optimizer step
        self._codes: dict[str, Track] = {}
        self._statistics: dict[str, float] = {}

    # Before the first step --------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Switch the layers: the model is on its device, and no optimizer, wrapper or compiler has seen it."""
        model = unwrapped(kwargs["model"])
        self._acted = False
        self._prepare(model, args, state)
        if kwargs["optimizer"] is not None:
            _check_trained(model, kwargs["optimizer"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See that it is this model that is switched, that all of it trains, and begin or go on measuring ranges."""
        model = unwrapped(kwargs["model"])
        before, prepared = _keys(model), bool(common.prepared_modules(model))
        self._prepare(model, args, state)
        if added := _keys(model) - before:
            if not prepared:
                unprepare(model)
                unprepare_kv_cache(model)
            raise ValueError(
                f"QATTrainerCallback came to this model too late: the scheme adds {min(added)} to it, which the "
                "optimizer and checkpoints must know. Make the trainer with Trainer(model=..., callbacks=[...]), "
                "not with add_callback afterwards, and not with model_init."
            )
        _check_trained(model, kwargs["optimizer"])
        kv_cache_spec(model)  # refuses attention that was switched since
        common.check_steps(self.calibration_steps, state.max_steps, self.export_dir)
        if self.export_dir is not None:
            _check_apart(self.export_dir, args.output_dir)
            check_destination(self.export_dir, self.overwrite)
            check_exportable(kwargs["model"], self.export_format)
        self._codes, self._statistics = {}, {}
        limits = (self.start_step, state.max_steps, self.export_dir)
        self._warming = common.begin_warmup(model, self.warmup, *limits)
        if self.dampening:
            _check_gradients(args, kwargs["optimizer"])
            oscillation.check_dampening(model)
        self._calibrate_from(model, state)
        if state.global_step < self.start_step:
            unprepare(model)
            unprepare_kv_cache(model)
            self._quantized = False
        self._dismiss_teacher()  # of an interrupted run, of whose end the trainer tells no callback
        if self.teacher is not None:
            dtype, tokenizer = common.served_dtype(self.scheme), kwargs.get("processing_class")
            self._distillation = Distillation(self.teacher, model, args.device, dtype, tokenizer)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See that the loss came from the teacher and the quantized head, and add the dampening to the gradients."""
        if self._distillation is not None:
            self._distillation.check_backward()
        self._check_head()
        if self.dampening and self._quantized:
            step, steps = state.global_step - self.start_step, state.max_steps - self.start_step
            common.dampen(unwrapped(kwargs["model"]), self.dampening, step, steps, kwargs["optimizer"])

    # At each step -----------------------------------------------------------------------------------------------------

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what observers saw of evaluations, which a resumed run may repeat, and let the layers warm up."""
        for name, observer in common.observing(unwrapped(kwargs["model"])).items():
            observer.load_state_dict(self._measured[name])
        if self._quantized and self._warming and not self._warming.follow(state.global_step - self.start_step):
            self._warming = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Switch the layers at `start_step`, freeze ranges that are measured, and have the statistics logged."""
        model = unwrapped(kwargs["model"])
        if not self._quantized and state.global_step >= self.start_step:
            self._prepare(model, args, state)
        self._calibrate(model, state)
        self._note_observers(model, args, state, control)
        if not self.log_every_n_steps or state.global_step % self.log_every_n_steps:
            return
        if self._quantized:
            if state.is_world_process_zero or ranks_of(kwargs["model"]) is not None:
                found = common.layer_statistics(kwargs["model"], self._codes, state.is_world_process_zero)
                self._statistics, self._codes = found
            control.should_log = True  # on all ranks: the trainer gathers the loss
        if self._distillation is not None:
            self._statistics |= self._distillation.metrics()
            control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As in `on_step_end`, for checkpoints by the epoch."""
        self._note_observers(unwrapped(kwargs["model"]), args, state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the statistics into the trainer's own record of this step, and their means before later callbacks."""
        if self._statistics:
            state.log_history[-1].update(self._statistics)
            means = {name: value for name, value in self._statistics.items() if name.endswith(("/mean", *METRICS))}
            kwargs["logs"].update(means)
            self._statistics = {}

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse an evaluation of a model that the callback has never seen, or around a quantized head."""
        waiting = self._acted and state.global_step < self.start_step
        if not waiting and not common.prepared_modules(unwrapped(kwargs["model"])):
            raise RuntimeError(
                "this evaluation is not quantized: QATTrainerCallback was added after the trainer was made. Pass it as "
                "Trainer(callbacks=[...])."
            )
        self._check_head()

    # At the end -------------------------------------------------------------------------------------------------------

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Export, after the trainer has written its own checkpoints and loaded the best if it was asked to."""
        self._dismiss_teacher()
        model = unwrapped(kwargs["model"])
        if self.export_dir is None:
            return
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        step = (state.best_global_step or 0) if best else state.global_step
        if self.start_step and step <= self.start_step:
            raise ExportError(
                f"nothing trained quantized: {'the best model is of' if best else 'training ended at'} step {step}, "
                f"with start_step={self.start_step}."
            )
        if common.observing(model):
            raise ExportError(
                f"the ranges of inputs, keys and values are still being measured: training ended at step {step}, with "
                f"calibration_steps={self.calibration_steps}."
            )
        common.check_warm(self.warmup, self.start_step, step)
        if state.is_world_process_zero or ranks_of(kwargs["model"]) is not None:
            save_pretrained(
                kwargs["model"],
                self.export_dir,
                self.export_format,
                tokenizer=kwargs.get("processing_class"),
                overwrite=self.overwrite,
                trained=common.how_trained(step, self),
            )
        if state.is_world_process_zero:
            as_what = f" as {self.export_format}" if self.export_format else ""
            print(f"exported to {self.export_dir}{as_what}, every layer checked bit for bit")
        if dist.is_available() and dist.is_initialized():
            dist.barrier()

    # What the hooks do ------------------------------------------------------------------------------------------------

    def _prepare(self, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: the trainer would copy the model for each by nn.DataParallel, "
                "whose copies have no parameters of their own. Start a process for each GPU with torchrun or "
                "accelerate launch, or set CUDA_VISIBLE_DEVICES."
            )
        first = not common.prepared_modules(model)
        options = (self.reuse, self.fp8_input_gradient, self.learned_scales)
        report = prepare(model, self.scheme, self.targets, self.ignore, *options)
        if self.kv_cache is not None:
            prepare_kv_cache(model, self.kv_cache)
        common.unobserve(model)  # an interrupted run may have left observers, with which layers do not quantize
        if first and not self._acted and state.is_world_process_zero:
            print(report)
        if not first and not self._acted and state.is_world_process_zero:
            common.warn_of_unread_scales(model)
        if first and not self.calibration_steps:
            found = common.read_scales(model)
            if found and state.is_world_process_zero:
                print(found)
        self._watch_head(model)
        self._acted = self._quantized = True

    def _calibrate_from(self, model: nn.Module, state: TrainerState) -> None:
        """Observe from the start, or from where the run that is resumed stood."""
        self._measured = {}
        stored = _kept(state).pop(STATE, None)
        measuring = stored is not None or state.global_step < self.calibration_steps
        if not (self.calibration_steps and measuring):
            return
        if state.global_step and (stored is None or stored["step"] != state.global_step):
            raise ValueError(
                f"the checkpoint of step {state.global_step} does not hold what calibration_steps="
                f"{self.calibration_steps} has measured until then: it was written by another run, or by something "
                "else than the trainer's save_strategy. Resume from another one, or start anew."
            )
        common.observe(model, self.observer, self.calibration_steps)
        if stored is not None:
            observers.load_states(common.observing(model), _unpacked(stored["observers"]))
        self._calibrate(model, state)

    def _calibrate(self, model: nn.Module, state: TrainerState) -> None:
        """Measure ranges until `calibration_steps`, then freeze them."""
        if common.observing(model) and state.global_step >= self.calibration_steps:
            common.freeze(model)
            if state.is_world_process_zero:
                print(f"ranges of inputs, keys and values frozen at step {state.global_step}")
        self._measured = common.snapshot(model)

    def _note_observers(
        self, model: nn.Module, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """Let a checkpoint of this step hold, in its trainer_state.json, what the observers have seen until now."""
        _kept(state).pop(STATE, None)
        saves = control.should_save or (args.save_strategy == "best" and control.should_evaluate)
        if saves and (watching := common.observing(model)):
            packed = _packed(observers.states(watching))
            _kept(state)[STATE] = {"step": state.global_step, "observers": packed}

    def _dismiss_teacher(self) -> None:
        if self._distillation is not None:
            self._distillation.remove()
            self._distillation = None

    def _watch_head(self, model: Any) -> None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if self._head is not None:
            self._head[2].remove()
            self._head = None
        if isinstance(head, QATLinear):
            calls: list[bool] = []
            self._head = head.qualified_name, calls, head.register_forward_hook(lambda *_: calls.append(True))

    def _check_head(self) -> None:
        if self._head is None:
            return
        name, calls, handle = self._head
        if not calls:
            raise RuntimeError(
                f"{name} is quantized, but the loss was computed from {name}.weight without calling it, as TRL's "
                "trainers and Liger's fused cross-entropy do: it would train, and be evaluated, in full precision. "
                f"Name {name} in ignore."
            )
        handle.remove()
        self._head = None


def _kept(state: TrainerState) -> dict[str, Any]:
    """What goes into ``trainer_state.json`` and comes back from it when a run is resumed."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def _keys(model: nn.Module) -> set[str]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name for name, _ in tensors}


def _check_trained(model: nn.Module, optimizer: Any) -> None:
    """ValueError if learned scales are not in the optimizer, or not in a group that fits them."""
    scales = {
        id(layer._parameters[learned.KEY]): f"{name}.{learned.KEY}"
        for name, layer in quantized_modules(model)
        if learned.KEY in layer._parameters
    }
    if not scales:
        return
    groups = [([id(one) for one in group["params"]], group.get("weight_decay", 0)) for group in optimizer.param_groups]
    trained = {one for ids, _ in groups for one in ids}
    problems = [f"{name} is not in the optimizer" for one, name in scales.items() if one not in trained]
    for ids, decay in groups:
        held = [scales[one] for one in ids if one in scales]
        if held and (len(held) < len(ids) or decay):
            problems.append(f"{held[0]} is in a parameter group with {'weight decay' if decay else 'other parameters'}")
    if problems:
        raise ValueError(
            f"{problems[0]}. Learned scales need a group of their own, without weight decay and with a learning rate "
            "in proportion to them, which the trainer's own optimizer has not. Call lockstep.prepare(model, ..., "
            "learned_scales=True), make the optimizer then, and pass Trainer(optimizers=(optimizer, None))."
        )


def _check_gradients(args: TrainingArguments, optimizer: Any) -> None:
    accelerated = getattr(optimizer, "accelerator_state", None)
    if accelerated is not None and accelerated.distributed_type == "DEEPSPEED":
        raise ValueError(
            "dampening: the trainer runs DeepSpeed, whose engine keeps the gradients and takes the steps, so that "
            "nothing can be added to them. Use DDP or FSDP2, or leave it 0."
        )
    if args.fp16 and not args.max_grad_norm:
        raise ValueError(
            "dampening with fp16 and max_grad_norm=0: the trainer would hand over gradients that are still scaled. Set "
            "max_grad_norm, which has them unscaled first."
        )


def _check_apart(export_dir: str, output_dir: str | None) -> None:
    export, output = Path(export_dir).absolute(), Path(output_dir or ".").absolute()
    if export == output or export in output.parents:
        raise ExportError(
            f"export_dir {export} is or holds the trainer's output_dir, whose checkpoints would be in the way of the "
            "export. Name another one, such as a folder in output_dir."
        )


def _packed(states: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The observers' states as text, for JSON: histograms are mostly zeros, hence zlib."""
    flat = {f"{name}/{key}": value.cpu() for name, state in states.items() for key, value in state.items()}
    return base64.b64encode(zlib.compress(safetensors.torch.save(flat))).decode()


def _unpacked(text: str) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in safetensors.torch.load(zlib.decompress(base64.b64decode(text))).items():
        owner, _, key = name.rpartition("/")
        states.setdefault(owner, {})[key] = value
    return states
