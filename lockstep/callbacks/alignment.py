"""`AlignmentCallback` and `AlignmentTrainerCallback`: the gap between trainer and engine, watched while training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lockstep.align import page
from lockstep.align.decompose import Rollout, kernel_floor, measure
from lockstep.align.mismatch import Mismatch, MismatchError, Names, as_mask, truncated_importance_weights
from lockstep.callbacks.common import rank
from lockstep.export.gather import ranks_of, together
from lockstep.export.rollout.session import RolloutSession

Action = Literal["warn", "resync", "tis", "stop"]
Sequences = Rollout | Sequence[Sequence[int]]
Value = TypeVar("Value")

LOG, PAGE = "alignment.jsonl", "alignment.html"


class _Alignment:
    """What both callbacks do. Attributes: see `AlignmentCallback`."""

    def __init__(
        self,
        session: RolloutSession | Callable[[], RolloutSession | None] | None,
        sequences: Sequences | Callable[[], Sequences | None],
        every_n_steps: int = 50,
        action: Action = "warn",
        factor: float = 1.1,
        tolerance: float = 1e-3,
        floor: float | None = None,
        directory: str = "alignment",
        names: Names = "lockstep",
    ) -> None:
        if action not in get_args(Action):
            raise ValueError(f"action={action!r}: choose {', '.join(map(repr, get_args(Action)))}.")
        if names not in get_args(Names):
            raise ValueError(f"names={names!r}: choose {', '.join(map(repr, get_args(Names)))}.")
        if sequences is None:
            raise ValueError("sequences=None: give token ids, a Rollout, or a function that returns one or None.")
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: a whole number, at least 1.")
        if not (1 <= factor < math.inf and 0 <= tolerance < math.inf):  # NaN is neither
            raise ValueError(
                f"factor={factor}, tolerance={tolerance}: the limit, factor * floor + tolerance, is finite, and the "
                "floor at least."
            )
        if floor is not None and not 0 <= floor < math.inf:
            raise ValueError(f"floor={floor}: a mean |log-probability difference| in nats, or None to measure it.")
        self.session = session
        self.sequences = sequences
        self.every_n_steps = every_n_steps
        self.action = action
        self.factor = factor
        self.tolerance = tolerance
        self.floor = floor
        self.directory = directory
        self.names: Names = names
        self.correcting = False
        self.mismatch: Mismatch | None = None
        self._given_floor = floor
        self._measured_step: int | None = None
        self._records: list[page.Record] = []

    def weights(self, trainer: Tensor, rollout: Tensor, mask: Tensor | None = None) -> Tensor:
        """What to multiply the loss of each token with, fp32 ``[B, T]``; 0 for tokens that `mask` leaves out.

        While `correcting`, which needs ``action="tis"``, these are `lockstep.align.truncated_importance_weights` of
        `trainer` and `rollout`, log-probabilities ``[B, T]``; else 1.
        """
        if self.correcting:
            return truncated_importance_weights(trainer, rollout, mask)
        kept = torch.ones_like(trainer, dtype=torch.bool) if mask is None else as_mask("mask", mask)
        return kept.float()

    def _begin(self, step: int) -> None:
        """Take up the log of a run that is resumed at `step`: its floor, and, with "tis", whether it was correcting."""
        self._measured_step, self.mismatch = None, None

        def read() -> tuple[float | None, bool]:
            folder = Path(self.directory)
            folder.mkdir(parents=True, exist_ok=True)
            page.mend(folder / LOG)
            page.append(folder / LOG, {"step": step, "event": "start", "message": f"training starts at step {step}"})
            self._records = list(page.read_log(folder / LOG))
            self._page()
            floors = [one["floor"] for one in self._records if one.get("event") == "floor"]
            switched = [one["event"] for one in self._records if str(one.get("event")).startswith("tis ")]
            return (floors or [None])[-1], bool(switched) and switched[-1] == "tis on"

        found, correcting = _on_rank_zero(read)
        self.correcting = correcting and self.action == "tis"  # no other action would ever switch it off
        self.floor = found if self._given_floor is None else self._given_floor

    def _due(self, step: int) -> bool:
        """Whether to measure before the optimizer step that follows `step` of them."""
        return step % self.every_n_steps == 0 and step != self._measured_step

    @torch.no_grad()
    def _check(self, step: int) -> tuple[dict[str, float], str]:
        """Measure, log and act. Returns metrics, empty if there is no rollout yet, and why to stop, if so."""
        session: RolloutSession | None = self.session() if callable(self.session) else self.session
        sharded = session is not None and ranks_of(session.model) is not None
        rollout = _on_rank_zero(self._rollout)
        if rollout is None:
            return {}, ""
        self._measured_step = step

        self.mismatch = found = _measured(measure, session, rollout, sharded)
        if self.floor is None:
            _sync(session, sharded)
            self.floor = _measured(kernel_floor, session, rollout, sharded).sampled.mean_abs
            message = f"the same weights on both sides are {self.floor:.4g} nats apart on average"
            self._event(step, "floor", message, floor=self.floor)
        self._measurement(step, session, found)
        over = self._over(found)
        own = {"mismatch/floor": self.floor, "mismatch/limit": self.limit, "mismatch/over": float(over)}
        try:
            stop = self._act(step, over, found, session, rollout, sharded)
        finally:
            if not rank():
                self._page()
        return found.metrics(self.names) | own, stop

    def _act(
        self,
        step: int,
        over: bool,
        found: Mismatch,
        session: RolloutSession | None,
        rollout: Rollout,
        sharded: bool,
    ) -> str:
        """What `action` says. Returns why to stop, if so."""
        words = f"{_gap(found)}, the limit is {self.limit:.4g} (floor {self.floor:.4g})"
        if self.action == "tis":
            if over != self.correcting:
                self.correcting = over
                self._event(step, "tis on" if over else "tis off", words)
        elif over and self.action == "resync":
            _sync(session, sharded)
            self.mismatch = after = _measured(measure, session, rollout.asked(), sharded)
            self._measurement(step, session, after)
            self._event(step, "resync", f"{words}; after it {_gap(after)}")
            if self._over(after):
                message = f"a sync did not close the gap: {words}, after it {_gap(after)}"
                self._event(step, "stop", message)
                raise MismatchError(
                    f"step {step}: {message}. So it is not old weights: lockstep.align.decompose(session, sequences) "
                    "measures what it is made of, session.audit() names layers that the engine runs otherwise. A floor "
                    "that has grown with a sharper policy is measured anew after callback.floor = None."
                )
        elif over:
            self._event(step, self.action, words)
            if self.action == "stop":
                return f"step {step}: trainer and engine differ by {words}."
            if not rank():
                warnings.warn(
                    f"step {step}: trainer and engine differ by {words}. Old weights, or a floor that has grown with a "
                    "sharper policy: lockstep.align.decompose tells, and callback.floor = None measures it anew.",
                    stacklevel=4,
                )
        return ""

    @property
    def limit(self) -> float:
        """The largest mean |log-probability difference| that is aligned, nats; NaN before the floor is known."""
        return float("nan") if self.floor is None else self.factor * self.floor + self.tolerance

    def _over(self, mismatch: Mismatch) -> bool:
        """Rank zero's answer, so that all do the same."""
        return _on_rank_zero(lambda: not mismatch.sampled.mean_abs <= self.limit)

    def _rollout(self) -> Rollout | None:
        given = self.sequences() if callable(self.sequences) else self.sequences
        return given if given is None or isinstance(given, Rollout) else Rollout(given)

    def _measurement(self, step: int, session: RolloutSession | None, mismatch: Mismatch) -> None:
        prompt = mismatch.prompt
        self._record(
            {
                "step": step,
                "version": None if session is None else session.version,
                "gap": mismatch.sampled.values(),
                "prompt": None if prompt is None else prompt.values(),
                "tokens": mismatch.sampled.tokens,
                "floor": self.floor,
                "limit": self.limit,
            }
        )

    def _event(self, step: int, event: str, message: str, **more: float) -> None:
        self._record({"step": step, "event": event, "message": message, **more})

    def _record(self, record: page.Record) -> None:
        def work() -> None:
            page.append(Path(self.directory) / LOG, record)
            self._records.append(record)

        _on_rank_zero(work)  # if the log cannot be written, all ranks end

    def _page(self) -> None:
        path = Path(self.directory) / PAGE
        try:
            page.write_page(path, self._records)
        except OSError as error:
            warnings.warn(
                f"{path} could not be written ({error}). {LOG} beside it holds everything, and the next measurement "
                "writes the page anew.",
                stacklevel=4,
            )


class AlignmentCallback(_Alignment, Callback):
    """Measure the gap between trainer and rollout engine every `every_n_steps`, and act when it is too wide.

    >>> session = RolloutSession(model, engine)
    >>> trainer = Trainer(callbacks=[QATCallback("W4A16"), AlignmentCallback(session, prompts, action="resync")])

    It measures just before an optimizer step: the trainer still has the weights with which it took the loss, and the
    engine those that sampled the batch, if the loop synchronizes before it samples. The limit of the mean
    |log-probability difference| of the sampled tokens is ``factor * floor + tolerance``. The floor is measured once,
    after a sync: the engine against a forward of the trainer with the weights that the engine serves. So where the
    trainer is not quantized and the engine is, the weight grid is part of the gap, not of the floor.

    ``directory/alignment.jsonl`` gets a line for each measurement and event, on the disk at once;
    ``directory/alignment.html`` shows them. A run that is resumed goes on with both, and with the floor in them. The
    trainer's loggers get `Mismatch.metrics` and ``mismatch/floor``, ``mismatch/limit`` and ``mismatch/over`` (0 or 1).

    With several processes, rank zero measures with its engine, and what follows is done on all: each syncs the engine
    it has. Of a sharded model all take part in the forward.

    Args:
        session: of the model that trains and its engine, or a function that returns it, called at each measurement.
            None on ranks without an engine whose model is whole.
        sequences: token ids, or a `lockstep.align.Rollout`, or a function that returns one at each measurement: the
            last rollout, with the log-probabilities that the engine gave when it sampled. It may return None: nothing
            to measure yet. Rank zero's count.
        every_n_steps: optimizer steps between measurements; the first is before the first step.
        action: over the limit, ``"warn"``; ``"resync"``: synchronize, measure again with the engine's answer, and raise
            MismatchError if it is still over; ``"tis"``: `weights` gives truncated importance weights until a
            measurement is below the limit; ``"stop"``: end the training after this step, or, in Lightning, as soon as
            ``min_steps`` and ``min_epochs`` allow.
        factor: of the floor, at least 1.
        tolerance: nats that are added, so that a floor of zero is no demand for zero.
        floor: a floor that is known; None: measure it.
        directory: for the log and the page; it is made.
        names: of the metrics: ``"lockstep"``, ``"verl"`` or ``"trl"``, see `lockstep.align.Mismatch.metrics`.

    Attributes:
        floor: mean |log-probability difference| that the same weights on both sides have, nats; None before.
        limit: what counts as aligned, NaN before the floor is known.
        mismatch: the last measurement, after an action that measured again that one.
        correcting: whether `weights` corrects now: with ``action="tis"``, from a measurement over the limit to the next
            one that is not.

    Raises:
        ValueError: arguments that contradict each other; a log that cannot be read; see `lockstep.align.mismatch`.
        OSError: the log cannot be written. Of a page that cannot be written there is a warning.
        MismatchError: see `action`.
        SyncError, EngineUnusable: of the engine.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the log, or take it up."""
        self._begin(trainer.global_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Measure, and act."""
        if not self._due(trainer.global_step):
            return
        with trainer.precision_plugin.forward_context():
            metrics, stop = self._check(trainer.global_step)
        if stop:
            trainer.should_stop = True
            if trainer.is_global_zero:
                waits = trainer.min_steps or trainer.min_epochs
                when = "as soon as min_steps and min_epochs allow" if waits else "with this step"
                warnings.warn(f"{stop} Training ends {when}.", stacklevel=2)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


class AlignmentTrainerCallback(_Alignment, TrainerCallback):
    """`AlignmentCallback` for a Hugging Face ``Trainer`` and its descendants, TRL's among them.

    >>> session = RolloutSession(model, engine)
    >>> trainer = GRPOTrainer(model, rewards, callbacks=[AlignmentTrainerCallback(session, prompts, action="resync")])

    Arguments, attributes and errors are the same. The metrics stand in ``trainer.state.log_history``, at the step that
    follows, and callbacks after this one see them. The forward is in the precision that accelerate gave the model.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the log, or take it up."""
        self._metrics: dict[str, float] = {}
        self._begin(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, and act."""
        if not self._due(state.global_step):
            return
        self._metrics, stop = self._check(state.global_step)
        if stop:
            control.should_training_stop = True
            if state.is_world_process_zero:
                warnings.warn(f"{stop} Training ends with this step.", stacklevel=2)
        control.should_log = control.should_log or bool(self._metrics)  # on all ranks: the trainer gathers the loss

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the metrics into the trainer's own record of this step, and before later callbacks."""
        if self._metrics:
            state.log_history[-1].update(self._metrics)
            kwargs["logs"].update(self._metrics)
            self._metrics = {}


def _gap(mismatch: Mismatch) -> str:
    return f"{mismatch.sampled.mean_abs:.4g} nats on average"


def _on_rank_zero(work: Callable[[], Value]) -> Value:
    """What `work` returns on rank zero, on all ranks; they all must call this. Its exception there is one on all."""
    if not (dist.is_available() and dist.is_initialized()):
        return work()
    value = problem = None
    if not rank():
        try:
            value = work()
        except Exception as error:
            problem = error
    box = [value, problem and f"{type(problem).__name__}: {problem}"]
    dist.broadcast_object_list(box, src=0)
    if problem is not None:
        raise problem
    if box[1]:
        raise RuntimeError(f"rank 0: {box[1]}")
    return box[0]  # type: ignore[return-value]


def _measured(
    work: Callable[[RolloutSession, Rollout], Mismatch], session: RolloutSession | None, rollout: Rollout, sharded: bool
) -> Mismatch:
    """`work` on all ranks of a sharded model; of a whole one on rank zero, for all."""

    def run() -> Mismatch:
        if session is None:
            raise ValueError("the alignment callback has no session: make one before the first optimizer step.")
        return work(session, rollout)

    return run() if sharded else _on_rank_zero(run)


def _sync(session: RolloutSession | None, sharded: bool) -> None:
    """All ranks of a sharded model together; else each with the engine that it has."""

    def own() -> None:
        if session is not None and session.engine is not None:
            session.sync()

    everyone = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if sharded and session is not None:
        session.sync()
    elif everyone is None:
        own()
    else:
        together(own, everyone)
