"""`LossSpikeCallback` and `LossSpikeTrainerCallback`: a bad optimizer step is seen before it is taken."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lockstep.callbacks.common import rank
from lockstep.qat import learned
from lockstep.qat.prepare import WRAPPED
from lockstep.qat.spikes import NormHistogram, SpikeDetector, clipping_advice, squared_norms, worst_layers

Remedy = Literal["skip", "lower_rate", "restore_scales"]
Saved = dict[str, tuple[Tensor, dict[str, Any]]]  # of each learned scale: its value, and its state in the optimizer

STATE = "lockstep.spikes"  # the key in ``trainer_state.json``
SCALES = "lockstep_scales.pt"  # in a checkpoint of the Hugging Face trainer


class LossSpikeError(RuntimeError):
    """One step after another had to be held back: the remedy does not help."""


class _LossSpikes:
    """What both callbacks do. Arguments: see `LossSpikeCallback`."""

    def __init__(
        self,
        remedy: Remedy | None = None,
        window: int = 50,
        threshold: float = 8.0,
        rate_factor: float = 0.1,
        rate_steps: int = 20,
        patience: int = 10,
    ) -> None:
        if remedy not in (None, *get_args(Remedy)):
            raise ValueError(f"remedy={remedy!r}: choose None, {', '.join(map(repr, get_args(Remedy)))}.")
        if not 0 < rate_factor < 1:
            raise ValueError(f"rate_factor={rate_factor}: between 0 and 1.")
        for name, value in (("rate_steps", rate_steps), ("patience", patience)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value}: a whole number of optimizer steps, at least 1.")
        self.remedy = remedy
        self.rate_factor = rate_factor
        self.rate_steps = rate_steps
        self.patience = patience
        self.detector = SpikeDetector(window, threshold)
        self.norms = NormHistogram()
        self.count = 0
        self._in_a_row = 0  # spikes without a good step between
        self._held = 0  # of them, steps that were not taken
        self._lowered = 0  # steps for which the rate is still to be lowered
        self._saved: Saved = {}
        self._losses: list[Tensor] = []  # of the micro-batches of this step
        self._rates: list[Any] = []  # while they are lowered, those of the schedule

    # What a trainer's hooks call --------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, optimizer: Any) -> None:
        """Note what trains, and refuse what cannot be held back or restored."""
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS takes several gradients in a step: loss spikes are not looked for. Use another one."
            )
        self._losses, self._rates = [], []
        trained = list(_trained(model))
        if not trained:
            raise ValueError(f"no parameter of {type(model).__name__} trains: there are no gradients to look at.")
        self._names, self._parameters = zip(*trained, strict=True)
        self._sharded = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
        self._scales = {}
        if self.remedy != "restore_scales":
            return
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        named = zip(self._names, self._parameters, strict=True)
        self._scales = {name: one for name, one in named if name.endswith(f".{learned.KEY}") and id(one) in held}
        if not self._scales:
            raise ValueError(
                "remedy='restore_scales', but the optimizer trains no learned scales (*.weight_scale). Train with "
                "learned_scales=True, or choose another remedy."
            )
        if self._sharded or any(isinstance(one, DTensor) for one in self._scales.values()):
            raise ValueError(
                "remedy='restore_scales' needs the scales whole on every rank, and they are sharded. Use DDP, or "
                "remedy='skip'."
            )

    def _squares(self) -> Tensor:
        return squared_norms(self._parameters, self._sharded)

    def _before_step(
        self, step: int, optimizer: Any, loss: Tensor | None, squares: Tensor, scaler: Any
    ) -> dict[str, float]:
        """Judge the step that is about to be taken, and act. Returns metrics, empty if it is no spike.

        Args:
            step: optimizer steps before this one.
            optimizer: holds the unscaled gradients.
            loss: mean over the micro-batches of this rank, or None if it is unknown, on all ranks alike.
            squares: of `squared_norms`.
            scaler: the GradScaler or None.
        """
        mean, parts = _agreed(loss, squares)
        norm = math.sqrt(sum(parts))
        overflow = scaler is not None and not math.isfinite(norm) and (mean is None or math.isfinite(mean))
        if overflow and scaler.get_scale() > 1:
            return {}  # the scaler holds this step back by itself, and tries a smaller scale
        reason = " and ".join(filter(None, (self.detector.judge(mean, norm), self._negative_scales())))
        if not reason:
            self.detector.accept(mean, norm)
            self.norms.add(norm)
            self._in_a_row = self._held = 0
            self._saved = {name: _copy(one, optimizer) for name, one in self._scales.items()}
            self._lower(optimizer)
            return {}
        self.count += 1
        self._in_a_row += 1
        finite = math.isfinite(norm) and (mean is None or math.isfinite(mean))
        held = self.remedy is not None and not (self.remedy == "lower_rate" and finite)
        what = f"step {step}: {reason}; {worst_layers(self._names, parts)}"
        done = self._hold(optimizer) if held else self._take(optimizer, finite)
        if self._in_a_row <= self.patience and not rank():
            warnings.warn(f"{what}. {done}", stacklevel=3)
        if self._held >= self.patience:
            raise LossSpikeError(
                f"{what}. {self._held} steps without a good one between were held back (remedy={self.remedy!r}, "
                f"patience={self.patience}), so it is not a bad batch. Look at the layers and at the data from step "
                f"{step - self._in_a_row + 1} on, go back to a checkpoint before it, and lower the learning rate; if "
                "the new level is what you expect, raise patience or threshold."
            )
        return {
            "spike/count": float(self.count),
            "spike/loss": math.nan if mean is None else mean,
            "spike/gradient_norm": norm,
            "spike/rate_factor": 0.0 if held else self.rate_factor if self._rates else 1.0,
        }

    def _negative_scales(self) -> str:
        """Learned scales that have crossed zero, in words: no loss needs to show it, and no export takes them."""
        if not self._scales:
            return ""
        least = torch.stack([one.detach().min() for one in self._scales.values()]).tolist()
        bad = [name for name, value in zip(self._scales, least, strict=True) if value < 0]
        return f"negative scales in {len(bad)} of {len(least)} layers, the first is {bad[0]}" if bad else ""

    def _take(self, optimizer: Any, finite: bool) -> str:
        """Let the step be taken, at a lower rate if that is the remedy. Returns what was done."""
        done = "The step is taken: remedy=None."
        if self.remedy == "lower_rate":
            self._lowered = self.rate_steps
            self._lower(optimizer)
            done = f"The learning rate is {self.rate_factor:g} of the schedule's for {self.rate_steps} steps."
        if finite and self._in_a_row >= self.patience:
            self.detector.clear()
            return f"{done} After {self._in_a_row} in a row this is the new level."
        return done if self._in_a_row != self.patience else f"{done} No more warnings until a step is none."

    def _hold(self, optimizer: Any) -> str:
        """Leave the optimizer without gradients, and put learned scales back if that is the remedy."""
        self._held += 1
        for group in optimizer.param_groups:
            for one in group["params"]:
                one.grad = None
        if self.remedy != "restore_scales":
            return "The step is not taken."
        if not self._saved:
            return "The step is not taken; there was no good one yet to take the scales of."
        self._restore_scales(optimizer)
        self._lowered = self.rate_steps
        return (
            f"The step is not taken, the scales of {len(self._scales)} layers are those of the last good step, and "
            f"their learning rate is {self.rate_factor:g} of the schedule's for {self.rate_steps} steps."
        )

    def _restore_scales(self, optimizer: Any) -> None:
        for name, one in self._scales.items():
            _restore(one, optimizer, *self._saved[name])

    def _lower(self, optimizer: Any) -> None:
        """Lower the rate of the step that is about to be taken, if it is due.

        For this step alone, because chainable schedulers compute the next rate from the one in the optimizer.
        """
        if not self._lowered:
            return
        self._lowered -= 1
        self._rates = [group["lr"] for group in optimizer.param_groups]
        scales = {id(one) for one in self._scales.values()}
        for group in optimizer.param_groups:
            if not scales or any(id(one) in scales for one in group["params"]):
                group["lr"] = group["lr"] * self.rate_factor

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        """Give the schedule its rates back."""
        for group, rate in zip(optimizer.param_groups, self._rates, strict=False):  # none, if none was lowered
            group["lr"] = rate
        self._rates = []

    def _end(self, optimizer: Any) -> None:
        """No step follows the last one to show what it did to learned scales."""
        if self._saved and (found := self._negative_scales()):
            self._restore_scales(optimizer)
            if not rank():
                warnings.warn(f"the last step: {found}. The scales are those before it.", stacklevel=3)

    # What a checkpoint holds ------------------------------------------------------------------------------------------

    def _numbers(self) -> dict[str, Any]:
        """The state but for the saved scales, as JSON holds it."""
        return {
            "window": self.detector.state_dict(),
            "norms": self.norms.state(),
            "count": self.count,
            "in_a_row": self._in_a_row,
            "held": self._held,
            "lowered": self._lowered,
        }

    def _load_numbers(self, state: dict[str, Any]) -> None:
        self.detector.load_state_dict(state["window"])
        self.norms = NormHistogram(state["norms"])
        self.count, self._in_a_row = state["count"], state["in_a_row"]
        self._held, self._lowered = state["held"], state["lowered"]


class LossSpikeCallback(_LossSpikes, Callback):
    """Look at loss and gradients before each optimizer step, say which step is a spike, and hold it back if asked to.

    >>> from lightning import Trainer
    >>> trainer = Trainer(callbacks=[QATCallback("W4A16"), LossSpikeCallback("skip")], gradient_clip_val=1.0)

    A spike is a step whose loss (mean over its micro-batches and ranks) or gradient norm (before clipping) is far above
    the median of the last `window` steps that were none, see `lockstep.qat.spikes.SpikeDetector`; or NaN or infinite. A
    warning names the step, the values and the layers with the largest or non-finite gradients, and the loggers get
    ``spike/count``, ``spike/loss``, ``spike/gradient_norm`` and ``spike/rate_factor`` at that step. All ranks act
    alike. It costs the norms of all gradients, one all-reduce of a number for each parameter, and one wait for the
    device in an optimizer step. Under a GradScaler a gradient that overflows is the scaler's to handle, until its scale
    is 1.

    When the fit ends, a sentence tells what clipping the norms suggest.

    Args:
        remedy: None: warn alone. ``"skip"``: the step is not taken; weights and the optimizer's moments stay, the
            learning rate schedule goes on. ``"lower_rate"``: this and the following steps, `rate_steps` in all, are
            taken with the schedule's rate times `rate_factor`; each further spike begins anew. The schedule itself is
            as without. ``"restore_scales"``: the step is not taken, and learned scales, with their state in the
            optimizer, are again what they were in the last step that was none, and the rate of their parameter groups
            is lowered for the next `rate_steps`; a negative scale is a spike too. With each of the three a step with
            NaN or infinity is not taken.
        window: optimizer steps to compare with; until half of them are seen, NaN and infinity alone are spikes.
        threshold: robust standard deviations above the median that are a spike.
        rate_factor: of ``"lower_rate"`` and ``"restore_scales"``, between 0 and 1.
        rate_steps: of the same.
        patience: after so many spikes in a row: if they were not taken, LossSpikeError; if they were, and are finite,
            they are the new level, with which later steps are compared.

    Attributes:
        count: spikes so far.

    Raises:
        ValueError: arguments that are no such thing; manual optimization, DeepSpeed, LBFGS, or a GradScaler with an
            optimizer that unscales by itself (``fused=True``), whose gradients cannot be held back; ``restore_scales``
            without learned scales, or with sharded ones.
        LossSpikeError: see `patience`.
    """

    _hook: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what takes its steps out of reach."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} sets automatic_optimization=False: its steps are its own, and "
                "LossSpikeCallback cannot hold them back. Use automatic optimization, or take the callback out."
            )
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "the strategy is DeepSpeed, whose engine keeps the gradients and takes the steps: LossSpikeCallback "
                "cannot hold them back. Use DDP or FSDP2, or take the callback out."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what trains."""
        (optimizer,) = trainer.optimizers
        if getattr(trainer.precision_plugin, "scaler", None) and getattr(
            optimizer, "_step_supports_amp_scaling", False
        ):
            raise ValueError(
                f"{type(optimizer).__name__} with fused=True unscales the gradients within its step: LossSpikeCallback "
                "could not see them. Use fused=False with 16-mixed, or bf16-mixed."
            )
        self._begin(trainer.strategy.model or pl_module, optimizer)
        # A Lightning callback is called again only after the scheduler.
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss of a micro-batch: scaled, and a share of the accumulated ones."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Judge the step, and act."""
        if not self._losses:
            return  # training_step returned None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        share = trainer.accumulate_grad_batches / (scaler.get_scale() if scaler else 1)
        loss = torch.stack(self._losses).float().mean() * share
        self._losses = []
        metrics = self._before_step(trainer.global_step, optimizer, loss, self._squares(), scaler)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the scales once more, and say what clipping the norms suggest."""
        self._unhook()
        self._end(trainer.optimizers[0])
        by_norm = trainer.gradient_clip_algorithm in (None, "norm")
        if advice := clipping_advice(self.norms, trainer.gradient_clip_val if by_norm else None, "gradient_clip_val"):
            rank_zero_info(advice)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the optimizer go."""
        self._unhook()

    def state_dict(self) -> dict[str, Any]:
        """The window, what is going on, and the saved scales."""
        return {**self._numbers(), "saved": self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as an unbroken run would."""
        self._load_numbers(state_dict)
        self._saved = state_dict["saved"]

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


class LossSpikeTrainerCallback(_LossSpikes, TrainerCallback):
    """`LossSpikeCallback` for a Hugging Face ``Trainer`` and its descendants.

    >>> trainer = Trainer(model, args, callbacks=[LossSpikeTrainerCallback("skip"), QATTrainerCallback("W4A16")])

    Arguments, attributes and errors are the same. The metrics stand in ``trainer.state.log_history``, at the step that
    follows. The trainer clips before its callbacks see the gradients, and tells them no loss: the norms are taken at
    the end of the backward pass, the loss from what the model returns. Where the loss is computed outside of the model
    (``compute_loss_func``, label smoothing, most of TRL's trainers) the norms alone are judged, which a warning says,
    unless the trainer's ``compute_loss`` calls `note_loss`.
    """

    def note_loss(self, loss: Tensor) -> None:
        """Take `loss`, a scalar, as one micro-batch's mean, for trainers that compute it outside of the model."""
        self._losses.append(loss.detach())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what takes its steps out of reach, note what trains, and take up a run that is resumed."""
        model, self._optimizer = kwargs["model"], kwargs["optimizer"]
        if self._optimizer.accelerator_state.distributed_type == "DEEPSPEED":
            raise ValueError(
                "the trainer runs DeepSpeed, whose engine keeps the gradients and takes the steps: "
                "LossSpikeTrainerCallback cannot hold them back. Use DDP or FSDP2, or take the callback out."
            )
        self._begin(model, self._optimizer)
        for handle in getattr(self, "_handles", ()):  # of a run that ended in an exception
            handle.remove()
        self._handles = [model.register_forward_hook(self._note_output, with_kwargs=True)]
        self._handles += [one.register_post_accumulate_grad_hook(self._queue) for one in self._parameters]
        self._summed, self._queued, self._told, self._metrics = False, False, False, dict[str, float]()
        self._found: Tensor | None = None
        self._tokens_of_all = args.average_tokens_across_devices
        stored = _kept(state).pop(STATE, None)
        if stored is not None:
            self._load_numbers(stored["numbers"])
            self._saved = _load_scales(args, state, self._parameters[0].device) if stored["saved"] else {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a new step: what an evaluation or an interrupted one has left does not count."""
        self._losses, self._found, self._queued = [], None, False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the step, and act."""
        scaler, loss = self._optimizer.scaler, None
        if self._losses:
            losses = torch.stack(self._losses).float()
            loss = losses.sum() if self._summed else losses.mean()
        if self._found is None:
            squares = self._squares()
            self._tell_once("the gradient norms are seen after clipping: this model's parameters run no hooks (FSDP1).")
        else:
            squares = self._found / (scaler.get_scale() if scaler else 1) ** 2
        if loss is None:
            self._tell_once("the model returns no loss: gradient norms alone are judged, see LossSpikeTrainerCallback.")
        self._metrics |= self._before_step(state.global_step, self._optimizer, loss, squares, scaler)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the schedule its rates back."""
        self._after_step(self._optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note what a checkpoint of this step needs, and have a spike logged."""
        _kept(state)[STATE] = {"numbers": self._numbers(), "saved": bool(self._saved)}
        control.should_log = control.should_log or bool(self._metrics)  # on all ranks: the trainer gathers the loss

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the metrics into the trainer's own record of this step, and before later callbacks."""
        if self._metrics:
            state.log_history[-1].update(self._metrics)
            kwargs["logs"].update(self._metrics)
            self._metrics = {}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the saved scales into the checkpoint."""
        if self._saved and state.is_world_process_zero:
            torch.save(self._saved, _scales_file(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the scales once more, and say what clipping the norms suggest."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._end(self._optimizer)
        advice = clipping_advice(self.norms, args.max_grad_norm, "max_grad_norm")
        if advice and state.is_world_process_zero:
            print(advice)

    def _note_output(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """The loss of a micro-batch, as the trainer will take it."""
        if not (model.training and torch.is_grad_enabled()):
            return
        loss = output.get("loss") if isinstance(output, dict) else output[0] if isinstance(output, tuple) else None
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        # With this argument the losses are shares of a sum over the step, else each is a mean.
        items = kwargs.get("num_items_in_batch")
        self._summed = items is not None
        shared = self._summed and self._tokens_of_all and dist.is_initialized()
        self._losses.append(loss.detach().reshape(()) * (dist.get_world_size() if shared else 1))

    def _queue(self, parameter: nn.Parameter) -> None:
        """At the first gradient of the last micro-batch's backward: have the norms taken at its end."""
        if not self._queued and self._optimizer.gradient_state.sync_gradients:
            self._queued = True
            _at_end_of_backward(lambda: _at_end_of_backward(self._measure))  # the second after DDP's own

    def _measure(self) -> None:
        self._found, self._queued = self._squares(), False

    def _tell_once(self, what: str) -> None:
        if not self._told and not rank():
            warnings.warn(what, stacklevel=3)
        self._told = True


def _at_end_of_backward(work: Any) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(work)  # as torch's own FSDP does it


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that train, under the names that they have without wrappers."""
    for name, one in model.named_parameters():
        if one.requires_grad:
            yield ".".join(part for part in name.split(".") if part not in WRAPPED), one


def _agreed(loss: Tensor | None, squares: Tensor) -> tuple[float | None, list[float]]:
    """The mean of the losses and the whole squared norms, the same on all ranks."""
    first = squares.new_zeros(1) if loss is None else loss.to(squares).reshape(1)
    numbers = torch.cat([first, squares])
    if dist.is_available() and dist.is_initialized():
        numbers[0] /= dist.get_world_size()
        dist.all_reduce(numbers)
    mean, *parts = numbers.tolist()
    return None if loss is None else mean, parts


def _copy(one: nn.Parameter, optimizer: Any) -> tuple[Tensor, dict[str, Any]]:
    state = optimizer.state.get(one, {})
    kept = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    return one.detach().clone(), kept


@torch.no_grad()
def _restore(one: nn.Parameter, optimizer: Any, value: Tensor, state: dict[str, Any]) -> None:
    one.copy_(value)
    there = optimizer.state.pop(one, {})
    if state:  # from a checkpoint it may be on another device
        places = {key: getattr(there.get(key, one), "device", one.device) for key in state}
        optimizer.state[one] = {
            key: kept.to(places[key], copy=True) if isinstance(kept, Tensor) else kept for key, kept in state.items()
        }


def _kept(state: TrainerState) -> dict[str, Any]:
    return cast("dict[str, Any]", state.stateful_callbacks)


def _scales_file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / SCALES


def _load_scales(args: TrainingArguments, state: TrainerState, device: torch.device) -> Saved:
    path = _scales_file(args, state)
    if not path.exists():
        raise ValueError(
            f"{path} is missing: the checkpoint was written with it, for remedy='restore_scales'. Resume with the "
            "output_dir that the run had."
        )
    return cast(Saved, torch.load(path, map_location=device, weights_only=True))
