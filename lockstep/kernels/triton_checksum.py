"""The sum of mixed words that `lockstep.export.rollout.engine.checksum` is made of, in one pass (Triton).

Each word is read once. Sums of integers modulo 2**64 do not depend on their order, so programs may add theirs in any.
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels.triton_arithmetic import _Launch

BLOCK = 2048  # words of a program


@triton.jit
def _mix(x):
    """The finalizer of Stafford's variant 13 of MurmurHash3, of uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _sum_kernel(words, total, count, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < count
    word = tl.load(words + place, mask=inside, other=0).to(tl.int64).to(tl.uint64, bitcast=True)
    mixed = _mix(word + _mix((place + 1).to(tl.uint64, bitcast=True))).to(tl.int64, bitcast=True)
    tl.atomic_add(total, tl.sum(tl.where(inside, mixed, 0), 0))


def add_sum_of_words(words: Tensor, total: Tensor) -> None:
    """Add the sum of contiguous int32 `words`, each mixed with its place from 1 on, to the first element of `total`.

    That is int64, and wraps around.
    """
    _launch(words.numel())(words, total)


@lru_cache
def _launch(count: int) -> _Launch:
    return _Launch(_sum_kernel, (triton.cdiv(count, BLOCK), 1, 1), (count, BLOCK))
