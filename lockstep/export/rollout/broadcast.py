"""The trainer's side of engines in other processes or on other machines, over torch.distributed.

The trainer's ranks and the engines' ranks are joined by `lockstep.export.rollout.link.connect`. On each trainer rank a
`BroadcastEngine` stands for all engines; on each engine rank `lockstep.export.rollout.serve.serve` applies what comes
to an engine that lives there. Requests and replies are messages of the link; weights go as flat buckets by broadcast
(`lockstep.export.rollout.wire`). Each tensor's checksum goes along and is compared with what the engine has taken.

No load waits for its own answer. The trainer sends on while the engines take what came before, and an engine receives
the next load while it takes the last one. Answers are read up to `AHEAD` loads later, all of them before the engines
are told to answer with the new version: what is wrong with any load ends the update, in which nothing was published.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lockstep.export.files import parse_bytes
from lockstep.export.rollout import wire
from lockstep.export.rollout.engine import Completion, EngineUnusable, LiveLayer, Sampling
from lockstep.export.rollout.link import KINDS, EngineFailed, Link, Lost, finish_broadcast, listed, start_broadcast

Value = TypeVar("Value")

AHEAD = 2  # loads without an answer: one that an engine takes, and one that it receives
BUCKETS = 4  # in turn on their way, so that the link has work while the next load is announced


@dataclass
class _Asked:
    """A request on its way, on a trainer rank."""

    number: int
    request: str
    speaker: int
    limit: float | None
    keys: list[str] = field(default_factory=list)  # of the request, on the rank that speaks
    sent: dict[str, int] | None = None  # checksums of a load, there
    broken: Lost | None = None  # what befell the bytes of a load, there


class BroadcastEngine:
    """All engines of a `Link`, as one: they get the same weights; prompts are dealt out among them.

    All trainer ranks make one and call the same methods with the same arguments in the same order; all get the result.

    Args:
        link: from `connect`, on a trainer rank.
        bucket_size: of a bucket on its way, of which this rank holds four; bytes, or a string such as ``"64MB"``.

    Attributes:
        acknowledged: checksums, by name, of what all engines have taken in this update, as far as they have answered.

    Raises:
        ValueError: the engines take different formats.
    """

    def __init__(self, link: Link, *, bucket_size: int | str = "64MB") -> None:
        if link.rank >= link.trainers:
            raise ValueError(f"rank {link.rank} is an engine's: call serve(engine, link) there.")
        self.link = link
        self._bucket = max(1, parse_bytes(bucket_size, "bucket_size") // wire.ALIGNMENT) * wire.ALIGNMENT
        self._count = 0  # of requests, the same on all trainer ranks
        self._loads = 0
        self._lost: str | None = None
        self._under_way: deque[_Asked] = deque()  # loads that the engines have not answered
        self._failed: Exception | None = None  # what is wrong with one of this update
        self.acknowledged: dict[str, int] = {}
        self._free: list[Tensor] | None = None  # buckets; None before the first load
        self._sending: deque[tuple[Any, Tensor]] = deque()  # broadcasts, and the buckets that they read
        self._version: int | None = None
        facts = self._ask("facts")
        for number, other in enumerate(facts):
            if other[:2] != facts[0][:2]:
                raise ValueError(
                    f"{self._name(number)} takes format={other[0]!r}, partial={other[1]}, but {self._name(0)} takes "
                    f"format={facts[0][0]!r}, partial={facts[0][1]}: start them alike."
                )
        self.format: str | None = facts[0][0]
        self.partial: bool = facts[0][1]
        self._version = _same([fact[2] for fact in facts])

    @property
    def version(self) -> int | None:
        """Of the weights in all engines; None if they differ, if one is unusable, or if a rank was lost."""
        return self._version

    def begin_update(self, version: int) -> None:
        """See `RolloutEngine`."""
        if self._lost is not None:
            raise EngineUnusable(f"{self._lost} Connect anew and sync everything.")
        self._forget_loads()
        self._loads, self.acknowledged = 0, {}
        self._ask("begin", version=version, limit=self.link.limit)

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """See `RolloutEngine`; but the checksums are those of what was sent: the engines have not answered yet.

        `tensors` may change when this returns: what is on its way is a copy. The engines' answers are compared with
        what was sent later: in one of the next two loads, or in `end_update`, which
        raises what is said here before any engine is told to answer with the new version. An update of which a load
        failed cannot be ended, only aborted.

        Of several trainer ranks one sends, each in its turn. `tensors` are looked at on that rank alone, and on the
        others the result is empty: `acknowledged` is the same on all.

        Raises:
            TransferError: names the tensors that arrived with other bits.
            EngineFailed: names the engine, and the tensors of which it says that it took other bits or none.
            Lost: a rank is gone.
        """
        self._check_not_failed()
        sender = self._loads % self.link.trainers
        self._loads += 1
        mine = self.link.rank == sender
        heads, total = wire.layout(tensors) if mine else ([], 0)
        asked = self._next("load", sender, self.link.limit)
        self._under_way.append(asked)
        if mine:
            asked.sent = {name: sent for name, *_, sent, _ in heads}
            try:
                self._say(asked, heads=heads, total=total, bucket=self._bucket)
                self._send(tensors, heads, total)
            except Lost as error:  # of whom, shows in who still answers
                asked.broken = error
        self._settle(0 if asked.broken else AHEAD)
        return dict(asked.sent or {})

    def end_update(self) -> None:
        """See `RolloutEngine`. Raises first what is wrong with a load: see `load`."""
        self._settle()
        self._check_not_failed()
        try:
            self._version = _same(self._ask("end", limit=self.link.limit))
        except Exception:
            self._version = None  # one may have the new version by now, and another not
            raise

    def abort_update(self) -> None:
        """See `RolloutEngine`. Of a link that was lost nothing is left to abort: the engines do it by themselves."""
        self._forget_loads()
        if self._lost is None:
            self._version = None
            self._version = _same(self._ask("abort", limit=self.link.limit))

    def checksums(self) -> dict[str, int] | None:
        """See `RolloutEngine`. EngineFailed, with the tensors' names, if two engines hold different bits."""
        replies = self._ask("checksums")
        if any(reply is None for reply in replies):
            return None
        self._check_same("holds", replies)
        return replies[0]

    def live_layers(self) -> dict[str, LiveLayer]:
        """See `RolloutEngine`. EngineFailed, with the layers' names, if two engines run them otherwise."""
        replies = self._ask("live_layers")
        self._check_same("runs", replies)
        return {name: LiveLayer(module, tuple(rows), *rest) for name, (module, rows, *rest) in replies[0].items()}

    def probe(self, name: str, x: Tensor) -> Tensor:
        """See `RolloutEngine`. EngineFailed if two engines give different bits."""
        replies = self._ask("probe", name=name, x=x.cpu())
        for number, y in enumerate(replies):
            if not torch.equal(y, replies[0]):
                raise EngineFailed(f"{self._name(number)} computes {name} otherwise than {self._name(0)}.")
        return replies[0].to(x.device)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """See `RolloutEngine`. The first engine takes the seed, each other one a seed made of it and the number.

        Not ``seed + 1``: then one engine would draw what another draws of the next seed.
        """
        self._check_usable()
        seeds = [_seed(sampling.seed, number) for number in range(self.link.engines)]
        fields = [_fields(replace(sampling, seed=seed)) for seed in seeds]
        replies = self._ask("generate", parts=_dealt(prompts, self.link.engines), sampling=fields)
        return [
            Completion(tokens, logprobs, version, stopped)
            for reply in replies
            for tokens, logprobs, version, stopped in reply
        ]

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `RolloutEngine`."""
        self._check_usable()
        return [one for reply in self._ask("logprobs", parts=_dealt(sequences, self.link.engines)) for one in reply]

    def stop(self) -> None:
        """Make `serve` return on all engines, and give up the link."""
        self._forget_loads()
        if self._lost is None:
            self._ask("stop", limit=self.link.limit)
            self._last_one_closes()
            self._lost = "The engines were stopped."
        self._version = None
        self.link.close()

    def _last_one_closes(self) -> None:
        """Wait, on the rank that hosts the store, until the other trainer ranks need it no more."""
        link = self.link
        link.store.add("stopped", 1)
        if link.rank == 0:
            link.until(lambda: link.store.add("stopped", 0) == link.trainers, range(1, link.trainers))

    def _check_usable(self) -> None:
        if self._version is None:
            why = self._lost or "The engines hold different versions, or one holds none."
            raise EngineUnusable(f"{why} Sync everything first.")

    def _name(self, number: int) -> str:
        return self.link.name(self.link.trainers + number)

    def _check_same(self, verb: str, replies: Sequence[Mapping[str, Any]]) -> None:
        for number, reply in enumerate(replies):
            names = sorted({*reply, *replies[0]})
            differing = [name for name in names if reply.get(name) != replies[0].get(name)]
            if differing:
                raise EngineFailed(
                    f"{self._name(number)} {verb} something else than {self._name(0)}: {listed(differing)}."
                )

    def _check_not_failed(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _forget_loads(self) -> None:
        """Wait for the answers that are due; an update that is given up may have failed in any way."""
        with suppress(Exception):
            self._settle()
        self._failed = None

    def _settle(self, most: int = 0) -> None:
        """Wait for the engines' answers until at most `most` loads have none; after an error until none has."""
        while len(self._under_way) > most:
            try:
                for reply in self._answers(self._under_way.popleft()):
                    self.acknowledged |= reply
            except Lost:
                self._under_way.clear()
                raise
            except Exception as error:
                self._failed, most = self._failed or error, 0
        self._check_not_failed()

    def _ask(self, request: str, *, limit: float | None = None, **arguments: Any) -> list[Any]:
        """What each engine answers, when all that was asked before is answered. The first trainer rank speaks."""
        self._settle()
        asked = self._next(request, 0, limit)
        if self.link.rank == asked.speaker:
            try:
                self._say(asked, **arguments)
            except Lost as error:
                asked.broken = error
        return self._answers(asked)

    def _next(self, request: str, speaker: int, limit: float | None) -> _Asked:
        """The next request, to be counted on all trainer ranks."""
        if self._lost is not None:
            raise EngineUnusable(f"{self._lost} Connect anew and sync everything.")
        self._count += 1
        return _Asked(self._count - 1, request, speaker, limit)

    def _say(self, asked: _Asked, **arguments: Any) -> None:
        """Put a request to the engines, on the rank that speaks."""
        said = {"request": asked.request, "speaker": asked.speaker, **arguments}
        asked.keys = self.link.put(f"request/{asked.number}", said)

    def _answers(self, asked: _Asked) -> list[Any]:
        """What each engine answers. The rank that spoke reads it, and tells the other trainer ranks."""
        link, verdict = self.link, f"verdict/{asked.number}"
        try:
            if link.rank == asked.speaker:
                found = self._heard(asked)
                if link.trainers > 1:
                    link.put(verdict, found)
            else:
                limit = None if asked.limit is None else 2 * asked.limit
                found, keys = link.take(verdict, [asked.speaker], limit)
                if link.store.add(f"read/{asked.number}", 1) == link.trainers - 1:  # the last one to read it
                    link.drop([*keys, f"read/{asked.number}"])
        except Lost as error:
            found = {"error": ["Lost", str(error)]}
        if "error" in found:
            kind, text = found["error"]
            if kind == "Lost":
                self._lost, self._version = text, None
                link.close()
                self._sending.clear()  # not before: what is on its way reads them
                self._free = None
                raise Lost(text)
            raise {one.__name__: one for one in KINDS}.get(kind, EngineFailed)(text)
        return found["values"]

    def _heard(self, asked: _Asked) -> dict[str, Any]:
        """The engines' ``values``, or the first ``error``."""
        link, values, errors = self.link, [], []
        try:
            for engine in range(link.engines) if asked.keys else ():
                reply, keys = link.take(f"reply/{asked.number}/{engine}", [link.trainers + engine], asked.limit)
                link.drop(keys)
                if "error" in reply:
                    kind, text = reply["error"]
                    errors.append([kind, f"{self._name(engine)}: {text}"])
                values.append(reply.get("value"))
            if asked.broken is not None and not errors:
                raise asked.broken
            link.drop(asked.keys)
        except Lost as error:
            return {"error": ["Lost", str(error)]}
        if not errors and asked.sent is not None:
            errors = self._other_bits(asked.sent, values)
        return {"error": errors[0]} if errors else {"values": values}

    def _other_bits(self, sent: Mapping[str, int], taken: Sequence[Mapping[str, int]]) -> list[Any]:
        """The errors of engines that took other bits than were sent, or say nothing of a tensor."""
        errors: list[Any] = []
        for engine, reply in enumerate(taken):
            if names := [name for name, total in sent.items() if reply.get(name) != total]:
                text = f"{self._name(engine)} took something else than was sent, or says nothing: {listed(names)}."
                errors.append(["EngineFailed", text])
        return errors

    def _send(self, tensors: Mapping[str, Tensor], heads: Sequence[Any], total: int) -> None:
        """Start to broadcast the bytes of `tensors`, which may change then: what is on its way lies in buckets."""
        if self._free is None:
            make = partial(torch.empty, self._bucket, dtype=torch.uint8, device=self.link.device)
            self._free = [make() for _ in range(BUCKETS)]
        link, free = self.link, self._free
        engines = range(link.trainers, link.trainers + link.engines)

        def bucket() -> Tensor:
            # The host waits, not only the stream: a stream that waits for an engine that is gone would wait forever.
            while self._sending and (not free or self._sending[0][0].is_completed()):
                work, sent = self._sending.popleft()
                finish_broadcast(work, link, engines)
                free.append(sent)
            return free.pop(0)

        offsets = [offset for *_, offset in heads]
        for whole, part in wire.filled([*tensors.values()], offsets, total, self._bucket, bucket):
            self._sending.append((start_broadcast(link.groups[link.rank], part), whole))


def _dealt(items: Sequence[Value], count: int) -> list[list[list[int]]]:
    """`items` in `count` runs of about the same length."""
    step = -(-len(items) // count) or 1
    return [[list(one) for one in items[n * step : (n + 1) * step]] for n in range(count)]  # type: ignore[call-overload]


def _seed(seed: int | None, number: int) -> int | None:
    """That of engine `number`."""
    return seed if seed is None or number == 0 else zlib.crc32(f"{seed} {number}".encode())


def _fields(sampling: Sampling) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__}


def _same(values: Sequence[Value]) -> Value | None:
    return values[0] if all(value == values[0] for value in values) else None
