"""The ranks of a trainer and of its engines, joined by torch.distributed: `connect`, messages, and who is gone.

Small messages (requests, headers, replies, checksums) go through a key-value store that the first trainer rank hosts.
Weights go by broadcast, in a process group for each trainer rank that holds that rank and all engines: NCCL between
GPUs, else gloo.

Who is gone is not waited for. All ranks beat once in a while; who is silent for `timeout` seconds is lost. Steps of an
update have a limit beside that; answers of an engine that lives have none.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.export.rollout import wire
from lockstep.export.rollout.engine import EngineUnusable

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
        data = wire.encoded(value)
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
        return wire.decoded(data), keys

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
            raise Lost(f"{self._what}: {first_line(error)}") from error


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
        raise Lost(f"rank {rank} could not join the others at {address}: {first_line(error)}") from error
    link = Link(store, groups, rank, trainers, engines, device, timeout)
    try:
        for trainer, group in groups.items():  # NCCL connects at the first one, and would wait for the dead later on
            work = start_broadcast(group, torch.zeros(1, device=device))
            finish_broadcast(work, link, [trainer, *range(trainers, size)])
    except Lost:
        link.close()
        raise
    return link


def _group(store: dist.Store, place: int, size: int, device: torch.device, timeout: float) -> Any:
    """A process group of a trainer rank, which is the first in it, and all engines."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        # NCCL's own watchdog takes the process down. `finish_broadcast` gives up earlier, and only the group.
        options._timeout = timedelta(days=1)
        return dist.ProcessGroupNCCL(store, place, size, options)
    return dist.ProcessGroupGloo(store, place, size, timedelta(seconds=PATIENCE * timeout))


def start_broadcast(group: Any, part: Tensor) -> Any:
    """Start to send `part` from the group's first rank to all others."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    try:
        return group.broadcast([part], options)
    except RuntimeError as error:
        raise Lost(f"the weights' way is broken: {first_line(error)}") from error


def finish_broadcast(work: Any, link: Link, ranks: Iterable[int]) -> None:
    """Wait for a broadcast. Lost if it failed, or if one of `ranks` is gone."""
    link.until(work.is_completed, ranks, link.limit)
    try:
        work.wait()
    except RuntimeError as error:
        raise Lost(f"the weights' way is broken: {first_line(error)}") from error


def listed(names: Sequence[str]) -> str:
    """The first five of `names`, for an error, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def first_line(error: BaseException) -> str:
    """What another library's error says, without its traces."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
