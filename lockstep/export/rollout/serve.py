"""The engine's side of a `lockstep.export.rollout.link`: `serve` answers the trainer out of an engine that lives here.

An engine receives the next load while it takes the last one. An engine that loses its trainer gives up the update that
was under way and leaves `serve`; it can be connected to the next trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lockstep.export.rollout import wire
from lockstep.export.rollout.engine import RolloutEngine, Sampling, checksums_of
from lockstep.export.rollout.link import (
    KINDS,
    Link,
    Lost,
    TransferError,
    finish_broadcast,
    first_line,
    listed,
    start_broadcast,
)


def serve(engine: RolloutEngine, link: Link) -> None:
    """Answer the trainer out of `engine`, on an engine rank, until the trainer says stop.

    An error of the engine goes to the trainer and ends nothing.

    Raises:
        Lost: the trainer is gone. An update that was under way has been aborted: the engine has its old version, or
            says that it is unusable. Connect to the next trainer and serve again; its first whole sync heals it.
    """
    answer = _Answer(engine, link)
    number, me = 0, link.rank - link.trainers
    if me < 0:
        raise ValueError(f"rank {link.rank} is a trainer's: make a BroadcastEngine(link) there.")
    ahead: dict[str, Any] | None = None
    try:
        while True:
            request = ahead or _asked(link, number)
            # What comes next is received while this is taken. Not more: it takes memory.
            loading = request["request"] == "load"
            ahead = _asked(link, number + 1) if loading and link.there(f"request/{number + 1}") else None
            kind = request.pop("request")
            lost = None
            try:
                reply = {"value": getattr(answer, kind)(**request)}
            except Exception as error:  # the trainer's to judge
                lost = error if isinstance(error, Lost) else None
                reply = {"error": [_kind(error), f"{type(error).__name__}: {error}"]}
            link.put(f"reply/{number}/{me}", reply)
            if lost is not None:
                raise lost
            if kind == "stop":
                return
            number += 1
    except Lost:
        if answer.updating:
            engine.abort_update()
        raise
    finally:
        link.close()


def _asked(link: Link, number: int) -> dict[str, Any]:
    """A request, when it is there; what a load brings is on its way from then on."""
    request, _ = link.take(f"request/{number}", range(link.trainers))
    if request["request"] == "load":
        request["arriving"] = _Arriving(link, request["speaker"], request.pop("total"), request.pop("bucket"))
    return request


class _Arriving:
    """The bytes of a load on their way to this rank: `total`, in pieces of `bucket`.

    A piece lies in memory that this rank's stream has made free before it was asked for, and is read by the stream
    after it has come: `finish` waits for it.
    """

    def __init__(self, link: Link, speaker: int, total: int, bucket: int) -> None:
        self._link, self._speaker, self._works = link, speaker, list[Any]()
        self._broken: Lost | None = None
        try:
            self._flat = torch.empty(total, dtype=torch.uint8, device=link.device)
            for start in range(0, total, bucket):
                self._works.append(start_broadcast(link.groups[speaker], self._flat[start : start + bucket]))
        except Lost as error:  # is the answer to this load, not to the one before
            self._broken = error
        except RuntimeError as error:  # no memory; the sender cannot be told in time to keep its bytes
            self._broken = Lost(f"{total} bytes of a load could not be received: {first_line(error)}")

    def finish(self) -> Tensor:
        """The bytes, when they are there. Lost if they do not come."""
        if self._broken is not None:
            raise self._broken
        for work in self._works:
            finish_broadcast(work, self._link, [self._speaker])
        return self._flat


class _Answer:
    """What an engine rank does for each request; a method for each, by its name."""

    def __init__(self, engine: RolloutEngine, link: Link) -> None:
        self._engine, self._link, self.updating = engine, link, False

    def facts(self, speaker: int) -> tuple[str | None, bool, int | None]:
        return self._engine.format, self._engine.partial, self._engine.version

    def begin(self, speaker: int, version: int) -> None:
        if self.updating:  # by a trainer rank that gave up without a word
            self.abort(speaker)
        self.updating = True
        self._engine.begin_update(version)

    def load(self, speaker: int, heads: list[Any], arriving: _Arriving) -> dict[str, int]:
        tensors = wire.received(heads, arriving.finish())
        try:
            taken = self._engine.load(tensors)
        except Exception:
            _check_arrived(heads, tensors)  # before the engine is blamed
            raise
        if any(taken.get(name) != sent for name, *_, sent, _ in heads):
            _check_arrived(heads, tensors)
        return {name: taken[name] for name, *_ in heads if name in taken}

    def end(self, speaker: int) -> int | None:
        self._engine.end_update()
        self.updating = False
        return self._engine.version

    def abort(self, speaker: int) -> int | None:
        if self.updating:
            self._engine.abort_update()
            self.updating = False
        return self._engine.version

    def checksums(self, speaker: int) -> dict[str, int] | None:
        return self._engine.checksums()

    def live_layers(self, speaker: int) -> dict[str, Any]:
        return {name: tuple(layer) for name, layer in self._engine.live_layers().items()}

    def probe(self, speaker: int, name: str, x: Tensor) -> Tensor:
        return self._engine.probe(name, x.to(self._link.device)).cpu()

    def generate(self, speaker: int, parts: list[Any], sampling: list[Any]) -> list[Any]:
        me = self._link.rank - self._link.trainers
        fields = sampling[me] | {"stop": tuple(sampling[me]["stop"])}
        completions = self._engine.generate(parts[me], Sampling(**fields)) if parts[me] else []
        return [(one.tokens, one.logprobs, one.version, one.stopped) for one in completions]

    def logprobs(self, speaker: int, parts: list[Any]) -> list[Tensor]:
        part = parts[self._link.rank - self._link.trainers]
        return [one.cpu() for one in self._engine.logprobs(part)] if part else []

    def stop(self, speaker: int) -> None:
        pass


def _check_arrived(heads: Sequence[Any], tensors: Mapping[str, Tensor]) -> None:
    """TransferError, with their names, if tensors lie here with other bits than sent."""
    found = checksums_of(tensors)
    if wrong := [name for name, *_, sent, _ in heads if found[name] != sent]:
        raise TransferError(f"{listed(wrong)} arrived with other bits than sent.")


def _kind(error: Exception) -> str:
    """The name under which the trainer raises an engine's error."""
    return next((kind.__name__ for kind in KINDS if isinstance(error, kind)), "EngineFailed")
