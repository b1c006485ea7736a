"""An engine in other processes or on other machines, reached by torch.distributed: NCCL between GPUs, else gloo.

The trainer's ranks and the engines' ranks are joined by `connect`. On each trainer rank a `BroadcastEngine` stands for
all engines; on each engine rank `serve` applies what comes to an engine that lives there. Small messages (requests,
headers, replies, checksums) go through a key-value store that the first trainer rank hosts. Weights go as flat buckets
by broadcast, in a group for each trainer rank that holds that rank and all engines: of a sharded model every trainer
rank has every module whole for a moment (`lockstep.export.gather`), so the ranks take turns in sending, and no rank
gathers or sends for the others. Each tensor's checksum goes along and is compared with what the engine has taken.

No load waits for its own answer. The trainer sends on while the engines take what came before, and an engine receives
the next load while it takes the last one. Answers are read up to `AHEAD` loads later, all of them before the engines
are told to answer with the new version: what is wrong with any load ends the update, in which nothing was published.

Who is gone is not waited for. All ranks beat once in a while; who is silent for `timeout` seconds is lost. Steps of an
update have a limit beside that; answers of an engine that lives have none. An engine that loses its trainer gives up
the update that was under way and leaves `serve`; it can be connected to the next trainer.
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.export.gather import ranks_of, together
from lockstep.export.rollout.engine import Completion, EngineUnusable, LiveLayer, RolloutEngine, Sampling, checksums_of
from lockstep.export.save import Entry, entries, parse_bytes
from lockstep.qat.prepare import with_adapters_merged

Value = TypeVar("Value")

_BLOCK = re.compile(r".*?\.\d+(?=\.|$)")

ALIGNMENT = 256  # of each tensor in a bucket, in bytes: any dtype can view it, and copies are aligned
AHEAD = 2  # loads without an answer: one that an engine takes, and one that it receives
BUCKETS = 4  # in turn on their way, so that the link has work while the next load is announced
PIECE = 4 << 20  # of a message: the store takes values of up to 8 MiB
BEAT = 1.0  # seconds between signs of life, at most
PATIENCE = 5  # times the timeout: the most that a step of an update may take of an engine that gives signs of life


class EngineFailed(RuntimeError):
    """An engine answered with an error. It is alive, and the update that it belongs to must be given up."""


class TransferError(EngineFailed):
    """A tensor arrived with other bits than it was sent with."""


class Lost(ConnectionError):
    """A rank is gone, or has been silent for too long. What was connected must be connected anew."""


# What an engine may raise that its callers tell apart. Everything else arrives as EngineFailed.
KINDS: tuple[type[Exception], ...] = (EngineUnusable, TransferError, Lost, NotImplementedError, KeyError, ValueError)


class Link:
    """The ranks that `connect` has joined: trainers first, then engines. Keeps this rank's sign of life going."""

    def __init__(
        self,
        store: dist.TCPStore,
        groups: Mapping[int, Any],
        rank: int,
        trainers: int,
        engines: int,
        device: torch.device,
        timeout: float,
    ) -> None:
        self.store, self.groups, self.rank = store, groups, rank
        self.trainers, self.engines, self.device, self.timeout = trainers, engines, device, timeout
        self.limit, self._interval = PATIENCE * timeout, min(BEAT, timeout / 5)
        self._names = [store.get(f"who/{one}").decode() for one in range(trainers + engines)]
        self._closed = threading.Event()
        # A client of its own: one that waits for a key lets nobody else through.
        clone = store.clone()  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._beat, args=(clone,), daemon=True)
        self._thread.start()

    def _beat(self, store: dist.Store) -> None:
        while not self._closed.wait(self._interval):
            try:
                store.add(f"alive/{self.rank}", 1)
            except RuntimeError:  # the store is gone, which the other thread finds out by itself
                return

    def put(self, key: str, value: Any) -> list[str]:
        """Leave a message of plain values and tensors. Returns the keys that it takes. Lost if the store is gone."""
        data = _encoded(value)
        pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]
        keys = [key, *(f"{key}/{number}" for number in range(1, len(pieces)))]
        head = len(pieces).to_bytes(4, "little")
        with self._reaching_the_store():
            for name, piece in zip(keys[1:], pieces[1:], strict=True):
                self.store.set(name, piece)  # type: ignore[arg-type]
            self.store.set(key, head + pieces[0])  # type: ignore[arg-type]
        return keys

    def there(self, key: str) -> bool:
        """Whether the message `key` is there. Lost if the store is gone."""
        with self._reaching_the_store():
            return self.store.check([key])

    def take(self, key: str, from_ranks: Iterable[int], limit: float | None = None) -> tuple[Any, list[str]]:
        """The message `key`, when it is there, and the keys that it takes. See `until`."""
        with self._reaching_the_store():
            self.until(lambda: self.store.check([key]), from_ranks, limit)
            first = self.store.get(key)
            keys = [key, *(f"{key}/{number}" for number in range(1, int.from_bytes(first[:4], "little")))]
            data = b"".join([first[4:], *map(self.store.get, keys[1:])])
        return _decoded(data), keys

    def until(self, done: Callable[[], bool], ranks: Iterable[int], limit: float | None = None) -> None:
        """Wait.

        Raises:
            Lost: one of `ranks`, on which it depends, was silent for too long, or `limit` seconds are over.
        """
        ranks, start = list(ranks), time.monotonic()
        seen: dict[int, tuple[int, float]] = {}
        checked = start
        while not done():
            now = time.monotonic()
            if now - checked > self._interval:
                checked = now
                self._check_alive(ranks, seen, now)
            if limit is not None and now - start > limit:
                names = ", ".join(map(self.name, ranks))
                raise Lost(f"no answer from {names} within {limit:g} s: connect anew, or with a longer timeout.")
            time.sleep(min(0.1, max(1e-4, (now - start) / 20)))  # late by a twentieth; the store serves many

    def drop(self, keys: Iterable[str]) -> None:
        """Forget a message. Lost if the store is gone."""
        with self._reaching_the_store():
            for key in keys:
                self.store.delete_key(key)

    def _check_alive(self, ranks: Iterable[int], seen: dict[int, tuple[int, float]], now: float) -> None:
        with self._reaching_the_store():
            for rank in ranks:
                beats = self.store.add(f"alive/{rank}", 0)
                before, since = seen.get(rank, (None, now))
                if beats != before:
                    seen[rank] = (beats, now)
                elif now - since > self.timeout:
                    raise Lost(f"{self.name(rank)} has given no sign of life for {self.timeout:g} s.")

    def _reaching_the_store(self) -> _LostInstead:
        return _LostInstead("the first trainer rank, which hosts the store, is gone")

    def name(self, rank: int) -> str:
        """What errors call a rank: its role and number, host and process."""
        role = f"trainer rank {rank}" if rank < self.trainers else f"engine {rank - self.trainers}"
        return f"{role} ({self._names[rank]})"

    def close(self) -> None:
        """Give up the connection; the first trainer rank frees the address."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        for group in self.groups.values():
            group.abort()
        self.groups = {}
        del self.store


class _LostInstead:
    """Raises Lost for the network's errors."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, dist.DistNetworkError):
            raise Lost(f"{self._what}: {_first_line(error)}") from error


def connect(
    address: str,
    rank: int,
    *,
    trainers: int = 1,
    engines: int = 1,
    device: torch.device | str = "cpu",
    timeout: float = 60.0,
    wait: float = 600.0,
) -> Link:
    """Join the ranks of a trainer and its engines. Uses nothing of ``torch.distributed``'s default group.

    Args:
        address: ``"host:port"`` of the first trainer rank, which hosts the store there.
        rank: trainers have ``0 .. trainers - 1``, engines the next ones.
        trainers: ranks over which the trainer's model is sharded, which all call the same in the same order.
        engines: engine ranks, each with a whole model.
        device: of the buckets: ``"cuda"`` takes NCCL, ``"cpu"`` gloo. The same kind on all ranks.
        timeout: seconds of silence after which a rank is taken for lost. A step of an update may take five times that.
        wait: seconds to wait for the other ranks to come.

    Raises:
        Lost: not all came, or the rank has been taken already.
        ValueError: a rank or a device that cannot be.
    """
    device = torch.device(device)
    if device.type == "cuda" and not dist.is_nccl_available():
        raise ValueError("device='cuda' takes NCCL, which this build of torch does not have.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    size = trainers + engines
    if not 0 <= rank < size or trainers < 1 or engines < 1:
        raise ValueError(f"rank {rank} of {trainers} trainers and {engines} engines: ranks are 0 to {size - 1}.")
    host, _, port = address.rpartition(":")
    patience = timedelta(seconds=wait)
    try:
        store = dist.TCPStore(host, int(port), is_master=rank == 0, timeout=patience, wait_for_workers=False)
        who = f"{socket.gethostname()}, process {os.getpid()}"
        if store.compare_set(f"who/{rank}", "", who).decode() != who:
            raise Lost(f"rank {rank} at {address} is taken by {store.get(f'who/{rank}').decode()}.")
        store.wait([f"who/{one}" for one in range(size)], patience)
        groups = {}
        for trainer in range(trainers):
            if rank == trainer or rank >= trainers:
                place, data = max(0, rank - trainers + 1), dist.PrefixStore(f"data/{trainer}", store)
                groups[trainer] = _group(data, place, 1 + engines, device, timeout)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise Lost(f"rank {rank} could not join the others at {address}: {_first_line(error)}") from error
    link = Link(store, groups, rank, trainers, engines, device, timeout)
    try:
        for trainer, group in groups.items():  # NCCL connects at the first one, and would wait for the dead later on
            _finish(_broadcast(group, torch.zeros(1, device=device)), link, [trainer, *range(trainers, size)])
    except Lost:
        link.close()
        raise
    return link


def _group(store: dist.Store, place: int, size: int, device: torch.device, timeout: float) -> Any:
    """A process group of a trainer rank, which is the first in it, and all engines."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        # NCCL's own watchdog takes the process down. `_finish` gives up earlier, and only the group.
        options._timeout = timedelta(days=1)
        return dist.ProcessGroupNCCL(store, place, size, options)
    return dist.ProcessGroupGloo(store, place, size, timedelta(seconds=PATIENCE * timeout))


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
        self._bucket = max(1, parse_bytes(bucket_size, "bucket_size") // ALIGNMENT) * ALIGNMENT
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
        heads, total = _layout(tensors) if mine else ([], 0)
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
                    f"{self._name(number)} {verb} something else than {self._name(0)}: {_listed(differing)}."
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
                text = f"{self._name(engine)} took something else than was sent, or says nothing: {_listed(names)}."
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
                _finish(work, link, engines)
                free.append(sent)
            return free.pop(0)

        offsets = [offset for *_, offset in heads]
        for whole, part in _filled([*tensors.values()], offsets, total, self._bucket, bucket):
            self._sending.append((_broadcast(link.groups[link.rank], part), whole))


def sync(model: nn.Module, engine: BroadcastEngine, version: int) -> dict[str, int]:
    """Bring all engines to the weights of `model`, block by block, its ranks taking turns in sending.

    All trainer ranks call it. Each block (a decoder layer) is gathered on all of them, packed on the one whose turn it
    is, and sent from there, so that the link of no rank carries more than its share of the model. Beside its shards a
    rank holds one packed block and one whole module. Everything is sent; what has not changed, too.

    Returns:
        The checksums of all tensors, by name, the same on all ranks.

    Raises:
        ExportError: one rank could not export: on all ranks. The update has been aborted.
        EngineFailed, Lost: see `BroadcastEngine.load`. Likewise.
        ValueError: the link is of another number of ranks than the model.
    """
    ranks, link = ranks_of(model), engine.link
    count = 1 if ranks is None else dist.get_world_size(ranks)
    if count != link.trainers:
        raise ValueError(
            f"the model is sharded over {count} ranks: connect with trainers={count}, not {link.trainers}."
        )
    with torch.no_grad(), with_adapters_merged(model) as served:
        blocks: dict[str, list[Entry]] = {}
        for entry in entries(served, engine.format, ranks):
            found = _BLOCK.match(entry.name)
            blocks.setdefault(found[0] if found else entry.name, []).append(entry)
        engine.begin_update(version)
        try:
            for turn, block in enumerate(blocks.values()):
                tensors = _packed(block, turn % link.trainers == link.rank, ranks)
                engine.load(tensors)
            engine.end_update()
        except Exception:
            engine.abort_update()
            raise
    return dict(engine.acknowledged)


def _packed(block: Iterable[Entry], mine: bool, ranks: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """The tensors of a block, where they are `mine`; all ranks gather. An error on one is one on all."""
    tensors: dict[str, Tensor] = {}
    problem: Exception | None = None
    for entry in block:
        with entry.whole():
            if mine and problem is None:
                try:
                    tensors.update(entry.tensors())
                except Exception as error:  # the others wait where the next module is gathered
                    problem = error

    def check() -> None:
        if problem is not None:
            raise problem

    if ranks is None:
        check()
    else:
        together(check, ranks)
    return tensors


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
                self._works.append(_broadcast(link.groups[speaker], self._flat[start : start + bucket]))
        except Lost as error:  # is the answer to this load, not to the one before
            self._broken = error
        except RuntimeError as error:  # no memory; the sender cannot be told in time to keep its bytes
            self._broken = Lost(f"{total} bytes of a load could not be received: {_first_line(error)}")

    def finish(self) -> Tensor:
        """The bytes, when they are there. Lost if they do not come."""
        if self._broken is not None:
            raise self._broken
        for work in self._works:
            _finish(work, self._link, [self._speaker])
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
        tensors = _received(heads, arriving)
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


def _layout(tensors: Mapping[str, Tensor]) -> tuple[list[tuple[str, list[int], str, int, int]], int]:
    """Name, shape, dtype, checksum and offset of each tensor in a flat bucket, and the bytes of that."""
    heads, total, sums = [], 0, checksums_of(tensors)
    for name, tensor in tensors.items():
        heads.append((name, [*tensor.shape], str(tensor.dtype).removeprefix("torch."), sums[name], total))
        total += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return heads, total


def _filled(
    tensors: Sequence[Tensor], offsets: Sequence[int], total: int, size: int, bucket: Callable[[], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The flat bytes of `tensors`, cut every `size` bytes: each in a free `bucket`, and the part of it that is filled.

    Tensor by tensor: a copy of bytes is as fast as the memory, which torch's fused copies of many tensors are not.
    """
    whole, number = bucket() if total else torch.empty(0), 0
    for tensor, offset in zip(tensors, offsets, strict=True):
        flat, done = tensor.detach().contiguous().view(-1).view(torch.uint8), 0
        while done < flat.numel():
            owner, start = divmod(offset + done, size)
            while number < owner:
                yield whole, whole
                whole, number = bucket(), number + 1
            count = min(size - start, flat.numel() - done)
            # Of pinned memory the copy would be read later, when it may have changed.
            whole[start : start + count].copy_(flat[done : done + count], non_blocking=not flat.is_pinned())
            done += count
    if total:
        yield whole, whole[: total - number * size]


def _received(heads: Sequence[Any], arriving: _Arriving) -> dict[str, Tensor]:
    """The tensors of a load, when they are there: views of one flat buffer. Lost if they do not come."""
    flat, tensors = arriving.finish(), {}
    for name, shape, dtype, _, offset in heads:
        kind, count = getattr(torch, dtype), torch.Size(shape).numel()
        tensors[name] = flat[offset : offset + count * kind.itemsize].view(kind).view(shape)
    return tensors


def _check_arrived(heads: Sequence[Any], tensors: Mapping[str, Tensor]) -> None:
    """TransferError, with their names, if tensors lie here with other bits than sent."""
    found = checksums_of(tensors)
    if wrong := [name for name, *_, sent, _ in heads if found[name] != sent]:
        raise TransferError(f"{_listed(wrong)} arrived with other bits than sent.")


def _encoded(value: Any) -> bytes:
    """A message: plain values as JSON, which is quick, what holds tensors as torch saves it."""
    try:
        return b"J" + json.dumps(value).encode()
    except TypeError:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return b"T" + buffer.getvalue()


def _decoded(data: bytes) -> Any:
    if data[:1] == b"J":
        return json.loads(data[1:])
    return torch.load(io.BytesIO(data[1:]), weights_only=True)


def _broadcast(group: Any, part: Tensor) -> Any:
    """Start to send `part` from the group's first rank to all others."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    try:
        return group.broadcast([part], options)
    except RuntimeError as error:
        raise Lost(f"the weights' way is broken: {_first_line(error)}") from error


def _finish(work: Any, link: Link, ranks: Iterable[int]) -> None:
    """Wait for a broadcast. Lost if it failed, or if one of `ranks` is gone."""
    link.until(work.is_completed, ranks, link.limit)
    try:
        work.wait()
    except RuntimeError as error:
        raise Lost(f"the weights' way is broken: {_first_line(error)}") from error


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


def _kind(error: Exception) -> str:
    """The name under which the trainer raises an engine's error."""
    return next((kind.__name__ for kind in KINDS if isinstance(error, kind)), "EngineFailed")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
