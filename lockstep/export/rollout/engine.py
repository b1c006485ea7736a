"""What a rollout engine is to Lockstep: takes weights under a version, generates, and shows what it really runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lockstep import kernels

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
    sums = {name: _sum_of_words(tensor) for name, tensor in tensors.items()}
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    found: dict[str, int] = {}
    for name, total in sums.items():
        if isinstance(total, int):
            found[name] = total
        else:
            by_device.setdefault(total.device, {})[name] = total
    for totals in by_device.values():
        found |= zip(totals, torch.stack([*totals.values()]).tolist(), strict=True)
    return {name: _with_head(found[name], tensor) for name, tensor in tensors.items()}


def _sum_of_words(tensor: Tensor) -> Tensor | int:
    """The sum of the 32-bit words of a tensor, each mixed with its place, modulo 2**64: int64 ``[]`` where it lies."""
    flat = tensor.detach().contiguous().view(-1)
    flat = flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # one element may have any stride and be contiguous
    pad = -flat.numel() % 4
    if pad or flat.storage_offset() % 4 or flat.data_ptr() % 4:
        flat = torch.nn.functional.pad(flat, (0, pad))  # a copy
    words = flat.view(torch.int32)
    if words.device.type == "cpu" and words.numel() <= SHORT:
        return sum(_mixed(word + _mixed(place)) for place, word in enumerate(words.tolist(), 1))
    if fast := kernels.sum_of_words(words.device):
        return fast(words)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), CHUNK):
        part = words[start : start + CHUNK].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + part.numel(), device=tensor.device)
        total += _mix(part + _mix(place)).sum()
    return total


def _with_head(total: int, tensor: Tensor) -> int:
    """The checksum of `tensor`, of which `total` is the sum of words: with its dtype and shape."""
    for byte in f"{tensor.dtype!s}{list(tensor.shape)}".encode():
        total = _mixed(total * 257 + byte)
    return total & ALL


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
