"""The gap between trainer and engine taken apart: a chain of forwards of the same tokens, each link measured.

From the trainer to the engine, one thing changes at each step:

- ``grid``: the weights as they are -> quantized weights;
- ``activations``: quantized weights -> inputs, keys and values quantized too, where the scheme has them so;
- ``kernel``: the trainer's forward of what the engine serves -> the engine, holding these very weights. The floor:
  two programs, the same numbers, another order of additions;
- ``stale``: the engine with these weights -> the engine as it was found.

A chain begins with what the trainer computes. So with a prepared model and an engine of the same scheme it has the last
two links only, and the others are measured as `Decomposition.removed`: what quantization-aware training took out of the
gap. The differences of a chain's links add up to the whole gap, token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from lockstep.align.metrics import token_logprobs
from lockstep.align.mismatch import Mismatch, mismatch
from lockstep.align.views import is_quantized, served_dtype, views
from lockstep.export.gather import ranks_of, together
from lockstep.export.rollout.engine import Completion, RolloutEngine, Sampling
from lockstep.loading import as_served
from lockstep.qat.prepare import unwrapped

if TYPE_CHECKING:
    from lockstep.export.rollout.session import RolloutSession

Value = TypeVar("Value")

TOKENS = 8192  # of one forward, which holds their logits in fp32
# What changes between two neighbours of the chain. Without quantized inputs "weights" is "full", and is left out.
_LINKS = {
    frozenset(("plain", "weights")): "grid",
    frozenset(("plain", "full")): "grid",
    frozenset(("weights", "full")): "activations",
    frozenset(("plain", "synced")): "kernel",
    frozenset(("full", "synced")): "kernel",
    frozenset(("synced", "found")): "stale",
    frozenset(("plain", "found")): "engine",
    frozenset(("full", "found")): "engine",
}


@dataclass(frozen=True)
class Rollout:
    """Sequences that both sides are asked about.

    Args:
        tokens: the ids of each sequence, prompt and answer; two at least.
        prompt_lengths: how many of each are the prompt's, one at least; default: one.
        logprobs: what the engine said of each sampled token when it sampled it, fp32 ``[len - prompt_length]``; None:
            it is asked again when it is compared.
        temperature: that the engine sampled with, where `logprobs` are given: the trainer's logits are divided by it.
            At 0 engines answer with the log-probabilities of temperature 1.

    Raises:
        ValueError: lengths do not fit; `logprobs` are no fp32 tensors.
    """

    tokens: Sequence[Sequence[int]]
    prompt_lengths: Sequence[int] | None = None
    logprobs: Sequence[Tensor] | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if any(isinstance(ids, Tensor) for ids in self.tokens):  # engines take lists of numbers
            numbers = [ids.tolist() if isinstance(ids, Tensor) else ids for ids in self.tokens]
            object.__setattr__(self, "tokens", numbers)
        lengths = self.lengths
        if not len(self.tokens) or len(lengths) != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} sequences and {len(lengths)} prompt lengths: give one for each.")
        for number, (ids, length) in enumerate(zip(self.tokens, lengths, strict=True)):
            if not 1 <= length <= len(ids) or len(ids) < 2:
                raise ValueError(
                    f"sequence {number} has {len(ids)} tokens, {length} of the prompt: at least one must be the "
                    "prompt's, and a sequence has two."
                )
        if self.logprobs is not None:
            for number, row in enumerate(self.logprobs):
                if not isinstance(row, Tensor) or row.ndim != 1 or row.dtype not in (torch.float32, torch.float64):
                    what = f"{row.dtype} {list(row.shape)}" if isinstance(row, Tensor) else type(row).__name__
                    raise ValueError(f"logprobs of sequence {number} are {what}: they must be an fp32 tensor [tokens].")
            found = [len(row) for row in self.logprobs]
            wanted = [len(ids) - length for ids, length in zip(self.tokens, lengths, strict=True)]
            if found != wanted:
                raise ValueError(f"logprobs has {found} tokens by sequence, sampled are {wanted}.")
        elif self.temperature != 1:
            raise ValueError("temperature is that of the logprobs given: engines are asked again at temperature 1.")

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], completions: Sequence[Completion], temperature: float = 1.0
    ) -> Rollout:
        """Of what `RolloutEngine.generate` answered: as many completions in a row for each prompt."""
        if not prompts or len(completions) % len(prompts):
            raise ValueError(f"{len(completions)} completions of {len(prompts)} prompts: give as many for each.")
        each = len(completions) // len(prompts)
        begun = [list(prompt) for prompt in prompts for _ in range(each)]
        return cls(
            [prompt + list(one.tokens) for prompt, one in zip(begun, completions, strict=True)],
            [len(prompt) for prompt in begun],
            [one.logprobs for one in completions],
            temperature,
        )

    @property
    def lengths(self) -> Sequence[int]:
        """`prompt_lengths`, or one for each."""
        return [1] * len(self.tokens) if self.prompt_lengths is None else self.prompt_lengths

    def asked(self) -> Rollout:
        """The same without what the engine said: it is asked again."""
        return Rollout(self.tokens, self.prompt_lengths)


@dataclass(frozen=True)
class Decomposition:
    """What `decompose` found.

    Attributes:
        total: the trainer against the engine as it was found.
        links: the parts of it, in order: those of the four that apply. Without a sync ``kernel`` and ``stale`` are one
            link, ``engine``.
        removed: the links that quantization-aware training took out of the gap: what they would add without it.
    """

    total: Mismatch
    links: Mapping[str, Mismatch]
    removed: Mapping[str, Mismatch]

    @property
    def floor(self) -> Mismatch | None:
        """The link ``kernel``: the least gap that there can be."""
        return self.links.get("kernel")

    def __str__(self) -> str:
        rows = [("total", self.total), *self.links.items()]
        rows += [(f"({name}, removed by training)", one) for name, one in self.removed.items()]
        lines = [
            f"{name:<36} {one.sampled.mean_abs:>10.3e} {one.sampled.max_abs:>10.3e} {one.sampled.k3:>10.3e}"
            for name, one in rows
        ]
        return "\n".join([f"{'nats':<36} {'mean |d|':>10} {'max |d|':>10} {'k3':>10}", *lines])


@torch.no_grad()
def decompose(session: RolloutSession, rollout: Rollout | Sequence[Sequence[int]], sync: bool = True) -> Decomposition:
    """Measure what causes the gap between a session's model and its engine, on `rollout`'s tokens.

    The model is left as it was found. It runs in eval mode; masters wider than the served dtype run under autocast to
    it, as they train, unless the caller has an autocast of their own. The engine is asked for its log-probabilities
    once as it is and, with `sync`, once with the trainer's weights, which it holds from then on under a new version:
    without that, old weights cannot be told from the kernel.

    Args:
        session: of the trainer's model, prepared or not, and the engine. `session.scheme` says as what the engine
            serves a model that is not prepared.
        rollout: sequences. Log-probabilities in it are not used: all are asked for here.
        sync: False leaves the engine alone; the links ``kernel`` and ``stale`` are then one, ``engine``.

    Raises:
        EngineUnusable: see `RolloutEngine.logprobs`.
        ValueError: see `mismatch`.
    """
    rollout = (rollout if isinstance(rollout, Rollout) else Rollout(rollout)).asked()
    trains_quantized = is_quantized(session.model)
    with session.quantized():
        forwards = views(session.model)
        inner = [*forwards]
        points = {"found": engine_logprobs(session, rollout)}
        for name, view in forwards.items():
            with view(session.model) as model, as_served(model, served_dtype(model)):
                points[name] = trainer_logprobs(model, rollout)
    outer = ["found"]
    if sync:
        session.sync()
        points["synced"] = engine_logprobs(session, rollout)
        outer = ["synced", "found"]

    begin = inner.index("full" if trains_quantized else "plain")
    end = inner.index(_served_as(session, inner))
    path = (inner[begin : end + 1] if begin <= end else inner[end : begin + 1][::-1]) + outer

    def link(one: str, other: str) -> Mismatch:
        return mismatch(points[one], points[other], *_masks(rollout))

    def links(path: Sequence[str]) -> dict[str, Mismatch]:
        return {_LINKS[frozenset(pair)]: link(*pair) for pair in pairwise(path)}

    removed = links(inner) if trains_quantized and begin == end else {}
    return Decomposition(link(path[0], path[-1]), links(path), removed)


@torch.no_grad()
def measure(session: RolloutSession, rollout: Rollout) -> Mismatch:
    """The gap as it is: the trainer's own forward against what `rollout` holds, or what the engine says now.

    The model runs in eval mode and in the caller's precision. Of a sharded model all ranks must call this, with one
    `rollout`; `session.engine` is then asked on each.

    Raises:
        EngineUnusable: see `RolloutEngine.logprobs`.
        ValueError: see `mismatch`.
    """
    return _against(session, trainer_logprobs(session.model, rollout), rollout)


@torch.no_grad()
def kernel_floor(session: RolloutSession, rollout: Rollout) -> Mismatch:
    """The least gap that there can be: the engine against a forward of the trainer with what the engine serves.

    Of an engine that has just been synchronized. Where `rollout` has log-probabilities, they are of earlier weights:
    the engine answers the same prompts anew, so that the floor has in it by how much sampling token by token differs
    from reading a whole sequence. The model runs in eval mode, in the caller's precision, and is left as it was. Of a
    sharded model all ranks must call this, with one `rollout`.

    Raises:
        EngineUnusable: see `RolloutEngine.logprobs`.
        ValueError: see `mismatch`.
    """
    if rollout.logprobs is not None:
        rollout = _sampled_anew(session, rollout)
    with session.quantized():
        forwards = views(session.model)
        with forwards[_served_as(session, forwards)](session.model) as model:
            return _against(session, trainer_logprobs(model, rollout), rollout)


@torch.no_grad()
def trainer_logprobs(model: nn.Module, rollout: Rollout) -> list[Tensor]:
    """fp32 ``[len - 1]`` for each sequence: log-probability of every token but the first, in eval mode.

    Sequences of one length run together and none is padded: a mask may choose another attention kernel than the
    trainer's or the engine's.

    Raises:
        ValueError: the model returns no logits.
    """
    model = unwrapped(model)
    device = next(model.parameters()).device
    found: dict[int, Tensor] = {}
    with as_served(model, torch.float32):  # eval mode alone
        for numbers in _of_one_length(rollout.tokens):
            ids = torch.tensor([list(rollout.tokens[number]) for number in numbers], device=device)
            output = model(input_ids=ids, use_cache=False)
            logits = getattr(output, "logits", None)
            if logits is None:
                raise ValueError(f"{type(model).__name__} returned {type(output).__name__} without logits.")
            rows = token_logprobs(logits[:, :-1].float() / (rollout.temperature or 1.0), ids[:, 1:])
            found |= zip(numbers, rows.cpu(), strict=True)
    return [found[number] for number in range(len(rollout.tokens))]


def engine_logprobs(session: RolloutSession, rollout: Rollout) -> list[Tensor]:
    """What the engine says of every token but the first of each sequence, fp32 ``[len - 1]`` each, at temperature 1.

    Of a sharded model all ranks must call this, and all get what the engine of the one that has it says.

    Raises:
        EngineUnusable: see `RolloutEngine.logprobs`.
        ValueError: no rank has an engine.
    """

    def ask(engine: RolloutEngine) -> list[Tensor]:
        return [row.float().cpu() for row in engine.logprobs([list(ids) for ids in rollout.tokens])]

    return _of_engine(session, ask)


def _of_engine(session: RolloutSession, ask: Callable[[RolloutEngine], Value]) -> Value:
    """What `ask` finds out of the engine, on all ranks of a sharded model."""

    def work() -> Value | None:
        return None if session.engine is None else ask(session.engine)

    ranks = ranks_of(session.model)
    found = [work()] if ranks is None else together(work, ranks)
    if answers := [one for one in found if one is not None]:
        return answers[0]
    raise ValueError("this session has no engine here: measure on the rank that has one.")


def _of_one_length(sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The numbers of the sequences, those of one length together, at most `TOKENS` tokens at a time."""
    lengths: dict[int, list[int]] = {}
    for number, ids in enumerate(sequences):
        lengths.setdefault(len(ids), []).append(number)
    for length, numbers in lengths.items():
        count = max(1, TOKENS // length)
        yield from (numbers[start : start + count] for start in range(0, len(numbers), count))


def _sampled_anew(session: RolloutSession, rollout: Rollout) -> Rollout:
    """The engine's answers now to the prompts of `rollout`, as long as its longest."""
    prompts = [list(ids[:length]) for ids, length in zip(rollout.tokens, rollout.lengths, strict=True)]
    longest = max(len(ids) - len(prompt) for ids, prompt in zip(rollout.tokens, prompts, strict=True))
    sampling = Sampling(max_tokens=longest, temperature=rollout.temperature, seed=0)
    completions = _of_engine(session, lambda engine: engine.generate(prompts, sampling))
    return Rollout.of(prompts, completions, rollout.temperature)


def _against(session: RolloutSession, own: Sequence[Tensor], rollout: Rollout) -> Mismatch:
    """The trainer's log-probabilities against those in `rollout`, or what the engine says now."""
    sampled, prompt = _masks(rollout)
    if rollout.logprobs is None:
        return mismatch(own, engine_logprobs(session, rollout), sampled, prompt)
    own = [row[keep] for row, keep in zip(own, sampled, strict=True)]
    return mismatch(own, [row.float().cpu() for row in rollout.logprobs])


def _masks(rollout: Rollout) -> tuple[list[Tensor], list[Tensor]]:
    """Which of all tokens but the first are sampled, and which the prompt's."""
    places = [torch.arange(1, len(ids)) for ids in rollout.tokens]
    sampled = [place >= length for place, length in zip(places, rollout.lengths, strict=True)]
    return sampled, [~row for row in sampled]


def _served_as(session: RolloutSession, forwards: Iterable[str]) -> str:
    """Which of the trainer's `forwards` computes with what the engine serves."""
    plain = _of_engine(session, lambda engine: engine.format == "plain")
    return "plain" if plain or "full" not in forwards else "full"
