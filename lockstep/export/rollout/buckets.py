"""Tensors on their way to an engine: in buckets of bounded size, with what the engine runs as one in one piece."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from lockstep.qat.prepare import run_as_one

_EXPERTS = re.compile(r"(.*\bexperts)\.\d+\..*")


def indivisible(modules: Iterable[str]) -> list[list[str]]:
    """The names `modules` in the groups that an engine can only load as one, in the order of their first ones.

    These are the projections that engines fuse (`run_as_one`) and all experts of a block, which fused kernels hold in
    one tensor.
    """
    units: dict[str, list[str]] = {}
    for names in run_as_one(modules):
        expert = _EXPERTS.fullmatch(names[0])
        units.setdefault(expert[1] if expert else names[0], []).extend(names)
    return list(units.values())


class Buckets:
    """Fills buckets of at most `limit` bytes with whole units, and hands each to `send` when the next does not fit.

    A unit that is larger than `limit` makes a bucket by itself. What is held is one bucket, and while `add` runs one
    unit beside it.
    """

    def __init__(self, limit: int, send: Callable[[dict[str, Tensor]], None]) -> None:
        self._limit, self._send = limit, send
        self._bucket: dict[str, Tensor] = {}
        self._bytes = 0

    def add(self, unit: Mapping[str, Tensor]) -> None:
        """Take the tensors of a unit, which stay in one bucket."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in unit.values())
        if self._bytes + size > self._limit:
            self.flush()
        self._bucket.update(unit)
        self._bytes += size

    def flush(self) -> None:
        """Send what is held, if anything is."""
        bucket, self._bucket, self._bytes = self._bucket, {}, 0
        if bucket:
            self._send(bucket)
