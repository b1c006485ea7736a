"""What a rollout engine is to Lockstep: takes weights under a version, generates, and shows what it really runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lockstep import kernels
from lockstep.export.arriving import arriving

# Weight bits hashed at a time: bounds the memory of `checksum` to about six times as many bytes.
CHUNK = 1 << 22
SHORT = 16  # words that Python sums in less time than torch takes to begin
ALL = 2**64 - 1


class EngineUnusable(RuntimeError):
    """The engine holds a mixture of two versions, or none: it answers nothing until a whole sync has succeeded."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. Log-probabilities are those after `temperature` and before the cuts.

    Args:
        max_tokens: at most so many tokens an answer, 1 or more.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the `top_k` likeliest tokens; 0: all.
        top_p: keep the likeliest tokens up to this mass, above 0 and up to 1: all.
        n: answers for each prompt, one after another in the result.
        stop: token ids that end an answer, of which they are a part.
        seed: of the sampling; None: not repeatable.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    n: int = 1
    stop: tuple[int, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Completion:
    """One answer: its `tokens`, the log-probability of each (fp32, on the CPU), and the version that gave it."""

    tokens: list[int]
    logprobs: Tensor
    version: int
    stopped: bool  # by a stop token; else cut off at the length


class LiveLayer(NamedTuple):
    """What an engine runs for one linear layer of the checkpoint."""

    module: str  # the engine's own module, which may hold several layers as one
    rows: tuple[int, int]  # of that module's outputs
    precision: str  # as `str(Scheme)` says it where it is quantized, else the dtype: "bfloat16"
    kernel: str  # the class or function that computes it


class RolloutEngine(Protocol):
    """The adapters' common face. One update at a time: begin, load each bucket, end; or abort after an error."""

    format: str | None  # what `lockstep.export.stream` is asked for; "plain": every weight in the served dtype
    partial: bool  # whether an update may leave out what did not change

    @property
    def version(self) -> int | None:
        """Of the weights that answer now, or None: the engine is unusable."""

    def begin_update(self, version: int) -> None:
        """Announce `version`. From here to `end_update` the engine answers nothing."""

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Take tensors under the names of the checkpoint; what runs as one comes at once. Returns their `checksum`."""

    def end_update(self) -> None:
        """Answer with the new version from now on. Raises if what came is not whole."""

    def abort_update(self) -> None:
        """Give the update up: back to the old version where it is still whole, else unusable."""

    def checksums(self) -> dict[str, int] | None:
        """`checksum` of the stored tensors as they lie in the engine now; None if it keeps them in another layout."""

    def live_layers(self) -> dict[str, LiveLayer]:
        """What runs for each linear layer, by the layer's name in the checkpoint."""

    def probe(self, name: str, x: Tensor) -> Tensor:
        """``y [M, N]`` of the live layer `name` for inputs ``x [M, K]``, without its bias."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """`sampling.n` answers to each prompt, in the prompts' order. Raises EngineUnusable."""

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """fp32 ``[len - 1]`` for each sequence: log-probability of every token but the first. Raises EngineUnusable."""


def checksum(tensor: Tensor) -> int:
    """64 bits that change with any bit, with the order of the values, and with shape and dtype; equal on all devices.

    A sum of mixed words, computed where the tensor lies: against faults, not against an adversary. Reading it waits for
    the device: of many tensors ask `checksums_of`.
    """
    return checksums_of({"": tensor})[""]


def checksums_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """`checksum` of each of `tensors`, waiting once for each device."""
    return checksums_later(tensors)()


def checksums_later(tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, int]]:
    """`checksums_of`, launched now and waited for when the result is called: `tensors` may be changed after this."""
    found: dict[str, int] = {}
    heads: dict[str, int] = {}
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        heads[name] = _head(tensor.dtype, tensor.shape)
        words = _words(tensor)
        if words.device.type == "cpu" and words.numel() <= SHORT:
            found[name] = _sum_of_few(*words.view(-1).tolist())
        else:
            by_device.setdefault(words.device, {})[name] = words
    sums = [(names, arriving(_sums(list(names.values()), device))) for device, names in by_device.items()]

    def read() -> dict[str, int]:
        for names, totals in sums:
            found.update(zip(names, totals(), strict=True))
        return {name: _mixed(found[name] + head) for name, head in heads.items()}

    return read


def _words(tensor: Tensor) -> Tensor:
    """The 32-bit words of a tensor, contiguous int32 of any shape, filled up with zeros."""
    tensor = tensor.detach()
    # Sizes of 1 may have any stride. A view at an odd place, or of an odd length, cannot be one of words.
    plain = tensor.numel() and tensor.ndim and tensor.is_contiguous() and 1 not in tensor.shape
    if plain and not tensor.data_ptr() % 16:
        if tensor.dtype == torch.int32:
            return tensor
        if not (tensor.shape[-1] * tensor.itemsize % 4 or tensor.storage_offset() % 4):
            return tensor.view(torch.int32)
    flat = tensor.contiguous().view(-1)
    flat = flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # one element may have any stride and be contiguous
    pad = -flat.numel() % 4
    if pad or flat.storage_offset() % 4 or flat.data_ptr() % 4:
        flat = torch.nn.functional.pad(flat, (0, pad))  # a copy
    return flat.view(torch.int32)


def _sums(words: list[Tensor], device: torch.device) -> Tensor:
    """For each of `words` the sum of them, each mixed with its place, modulo 2**64: int64 ``[n]`` on their `device`."""
    totals = torch.zeros(len(words), 2, dtype=torch.int64, device=device)  # at multiples of 16 bytes: see `_Launch`
    add = kernels.add_sum_of_words(device) or _add_sum_of_words
    for some, total in zip(words, totals.unbind(), strict=True):
        add(some, total)
    return totals[:, 0]


def _add_sum_of_words(words: Tensor, total: Tensor) -> None:
    """`triton_checksum.add_sum_of_words` in plain torch."""
    words = words.view(-1)
    for start in range(0, words.numel(), CHUNK):
        part = words[start : start + CHUNK].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + part.numel(), device=words.device)
        total[0] += _mix(part + _mix(place)).sum()


@lru_cache
def _sum_of_few(*words: int) -> int:
    return sum(_mixed(word + _mixed(place)) for place, word in enumerate(words, 1))


@lru_cache
def _head(dtype: torch.dtype, shape: torch.Size) -> int:
    """What the sum of words is mixed with at last: of the dtype and the shape."""
    total = 0
    for byte in f"{dtype!s}{list(shape)}".encode():
        total = _mixed(total * 257 + byte)
    return total


def _mixed(x: int) -> int:
    """A bijection of 64 bits that spreads every bit (the finalizer of Stafford's variant 13 of MurmurHash3)."""
    x &= ALL
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & ALL
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & ALL
    return x ^ (x >> 31)


def _mix(x: Tensor) -> Tensor:
    """`_mixed` of int64, whose shifts copy the sign and whose products wrap around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
