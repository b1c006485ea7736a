"""The bytes between a trainer and its engines: messages, and tensors as flat buckets."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lockstep.export.rollout.engine import checksums_of

ALIGNMENT = 256  # of each tensor in a bucket, in bytes: any dtype can view it, and copies are aligned


def layout(tensors: Mapping[str, Tensor]) -> tuple[list[tuple[str, list[int], str, int, int]], int]:
    """Name, shape, dtype, checksum and offset of each tensor in a flat bucket, and the bytes of that."""
    heads, total, sums = [], 0, checksums_of(tensors)
    for name, tensor in tensors.items():
        heads.append((name, [*tensor.shape], str(tensor.dtype).removeprefix("torch."), sums[name], total))
        total += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return heads, total


def filled(
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


def received(heads: Sequence[Any], flat: Tensor) -> dict[str, Tensor]:
    """The tensors of a load, as `layout` names them: views of its bytes, `flat`, uint8 ``[total]``."""
    tensors = {}
    for name, shape, dtype, _, offset in heads:
        kind, count = getattr(torch, dtype), torch.Size(shape).numel()
        tensors[name] = flat[offset : offset + count * kind.itemsize].view(kind).view(shape)
    return tensors


def encoded(value: Any) -> bytes:
    """A message: plain values as JSON, which is quick, what holds tensors as torch saves it."""
    try:
        return b"J" + json.dumps(value).encode()
    except TypeError:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return b"T" + buffer.getvalue()


def decoded(data: bytes) -> Any:
    """What was `encoded`."""
    if data[:1] == b"J":
        return json.loads(data[1:])
    return torch.load(io.BytesIO(data[1:]), weights_only=True)
