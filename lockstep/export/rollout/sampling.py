"""Batched generation with a KV cache on a transformers model: sampling on the device, no wait for it at each token."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lockstep.export.rollout.engine import Sampling

# Tokens between two looks at which answers have stopped: each makes the host wait for the device.
LOOK_EVERY = 8
# Logits that are held at a time in the served dtype, and, of whole sequences, the part that is widened to fp32.
LOGITS, PART = 1 << 29, 1 << 27
# The lowest temperature but 0: fp32 logits divided by a smaller one are infinite.
COLDEST = torch.finfo(torch.float32).tiny


def check(sampling: Sampling) -> None:
    """ValueError if a field of `sampling` is of another type or out of its range."""
    fields: dict[str, tuple[Callable[[Any], bool], str]] = {
        "max_tokens": (lambda x: _whole(x) and x > 0, "a whole number of at least 1"),
        "temperature": (
            lambda x: _real(x) and (x == 0 or COLDEST <= x < float("inf")),
            f"0 or a number of at least {COLDEST:.3g}",
        ),
        "top_k": (lambda x: _whole(x) and x >= 0, "0 (all tokens) or a positive whole number"),
        "top_p": (lambda x: _real(x) and 0 < x <= 1, "a number above 0 and at most 1"),
        "n": (lambda x: _whole(x) and x > 0, "a whole number of at least 1"),
        "stop": (lambda x: isinstance(x, tuple | list) and all(map(_whole, x)), "a tuple of token ids"),
        "seed": (lambda x: x is None or (_whole(x) and -(2**63) <= x < 2**64), "None or a whole number of 64 bits"),
    }
    for name, (fine, allowed) in fields.items():
        if not fine(getattr(sampling, name)):
            raise ValueError(f"Sampling.{name}={getattr(sampling, name)!r}: it must be {allowed}.")


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def uniforms(rows: int, sampling: Sampling) -> Tensor:
    """One number in [0, 1) for each token of each answer, fp64 ``[rows, max_tokens]``, on the CPU.

    Drawn for all answers at once, so that an answer does not depend on those that it is batched with, nor on the
    device.
    """
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return torch.rand(rows, sampling.max_tokens, generator=generator, dtype=torch.float64)


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of each row, int64 ``[B]``, and its log-probability, fp32 ``[B]``.

    `logits` are ``[B, V]``, `uniform` numbers in [0, 1) ``[B]``.

    Logits are widened to fp32 and divided by the temperature; the log-probability is of what comes out. Then the cuts,
    top-k before top-p as in transformers, and the token at which the cumulated probability passes `uniform`.
    """
    scores = logits.float()
    if sampling.temperature not in (0, 1):
        scores = scores / sampling.temperature
    logprobs = scores.log_softmax(-1)
    if sampling.temperature == 0:
        tokens = scores.argmax(-1)
    else:
        # In fp64: of a large vocabulary, the sum in fp32 is off by more than the probability of its rare tokens.
        mass = kept(scores, sampling).softmax(-1).cumsum(-1, dtype=torch.float64)
        point = (uniform.unsqueeze(-1) * mass[:, -1:]).contiguous()
        tokens = torch.searchsorted(mass, point, right=True).squeeze(-1).clamp(max=mass.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def kept(scores: Tensor, sampling: Sampling) -> Tensor:
    """`scores` ``[B, V]``, minus infinity where `top_k` and `top_p` leave a token out; at least one stays."""
    if 0 < sampling.top_k < scores.shape[-1]:
        lowest = scores.topk(sampling.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
    if sampling.top_p < 1:
        ranked, order = scores.sort(-1, descending=True)
        mass = ranked.softmax(-1)
        out = mass.cumsum(-1) - mass >= sampling.top_p  # what is likelier is that much; before the first there is none
        scores = scores.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
    return scores


def generate(
    model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, uniform: Tensor
) -> list[tuple[list[int], Tensor, bool]]:
    """One answer to each of `prompts`, all in one batch: its tokens, their log-probabilities, whether it was stopped.

    Args:
        model: of transformers, on its device.
        prompts: token ids, none of them empty.
        sampling: its `n` is not looked at.
        uniform: `uniforms`' rows of these prompts.
    """
    device, longest = model.device, max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * pad + [*prompt] for pad, prompt in zip(padding, prompts, strict=True)]
    ids, pads = torch.tensor(rows).to(device), torch.tensor(padding).to(device)
    tokens, logprobs = _decode(model, ids, pads if any(padding) else None, sampling, uniform.to(device))
    answers = []
    for answer, own in zip(tokens.tolist(), logprobs.cpu().unbind(), strict=True):
        ends = [place for place, token in enumerate(answer) if token in sampling.stop]
        length = ends[0] + 1 if ends else len(answer)
        answers.append((answer[:length], own[:length].clone(), bool(ends)))
    return answers


def _decode(model: Any, ids: Tensor, pads: Tensor | None, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, T]`` and log-probabilities for left-padded `ids` ``[B, L]``; what follows a stop token is noise."""
    (batch, length), device, most = ids.shape, ids.device, sampling.max_tokens
    cache = growing_cache(model, length + most)
    stop = torch.tensor(sampling.stop, dtype=torch.long, device=device)
    tokens = torch.zeros(batch, most, dtype=torch.long, device=device)
    logprobs = torch.zeros(batch, most, dtype=torch.float32, device=device)
    alive, stopped = torch.arange(batch, device=device), torch.zeros(batch, dtype=torch.bool, device=device)
    places = torch.arange(length + most, device=device).expand(batch, -1)
    seen = None if pads is None else places >= pads.unsqueeze(-1)
    positions = places if pads is None else (places - pads.unsqueeze(-1)).clamp(min=0)

    seen_now = None if seen is None else seen[:, :length].long()
    logits = _next(model, cache, ids, positions[:, :length], seen_now)
    for step in range(most):
        token, logprob = choose(logits, sampling, uniform[:, step])
        tokens[alive, step], logprobs[alive, step] = token, logprob
        if step == most - 1:
            break
        if sampling.stop:
            stopped |= (token.unsqueeze(-1) == stop).any(-1)
            if step % LOOK_EVERY == LOOK_EVERY - 1:
                left = (~stopped).nonzero().squeeze(-1)
                if not len(left):
                    break
                if len(left) <= len(alive) // 2 and all(type(layer) in DROP_ROWS for layer in cache.layers):
                    cache.batch_select_indices(left)
                    alive, stopped, token = alive[left], stopped[left], token[left]
                    uniform, positions = uniform[left], positions[left]
                    seen = None if seen is None else seen[left]
        now = length + step
        seen_now = None if seen is None else _mask(model, cache, seen[:, : now + 1])
        logits = _next(model, cache, token.unsqueeze(-1), positions[:, now : now + 1], seen_now)
    return tokens, logprobs


def _next(model: Any, cache: Any, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
    """The logits ``[B, V]`` that follow the last of `ids`."""
    last = {"logits_to_keep": 1} if _keeps_logits(cast(Hashable, type(model))) else {}
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **last
    )
    return output.logits[:, -1]


@functools.cache
def _keeps_logits(kind: Any) -> bool:
    """Whether a class of models computes the logits of the last tokens alone when it is told to."""
    return "logits_to_keep" in inspect.signature(kind.forward).parameters


def _mask(model: Any, cache: Any, seen: Tensor) -> Tensor:
    """What a model is told of the padding for one more token.

    Of a mask ``[B, L]`` transformers asks the device whether it masks anything; one of attention's own shape it takes
    as it is, which is right where every layer sees all that is cached.
    """
    implementation = str(model.config.get_text_config()._attn_implementation).removeprefix("lockstep_")
    if implementation == "sdpa" and all(isinstance(layer, GrowingLayer) for layer in cache.layers):
        return seen[:, None, None, :]
    return seen.long()


class GrowingLayer(DynamicLayer):
    """A layer of transformers' DynamicCache that writes into memory of its final size, and never joins."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values ``[B, heads, new, head_dim]`` and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._all = [one.new_empty(*one.shape[:2], self.size, one.shape[-1]) for one in (key_states, value_states)]
            self._used = 0
        first, self._used = self._used, self._used + key_states.shape[-2]
        for whole, new in zip(self._all, (key_states, value_states), strict=True):
            whole[:, :, first : self._used] = new
        self.keys, self.values = (whole[:, :, : self._used] for whole in self._all)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows alone."""
        self._all = [whole[indices] for whole in self._all]
        self.keys, self.values = (whole[:, :, : self._used] for whole in self._all)


# Cache layers that can drop rows. Those of linear attention cannot, or drop the keys' and keep their states'.
DROP_ROWS = (GrowingLayer, DynamicSlidingWindowLayer)


def growing_cache(model: Any, size: int) -> DynamicCache:
    """The cache of `model` for sequences of `size` tokens; layers with a sliding window keep transformers' own."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer(size) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def sequence_logprobs(model: Any, sequences: Sequence[Sequence[int]], most: int) -> list[Tensor]:
    """fp32 ``[len - 1]`` for each of `sequences`, on the CPU, from right-padded forwards of at most `most` tokens."""
    width = model.config.get_text_config().vocab_size
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    for batch in by_length(sequences, min(most, widest(model)), 0, len(sequences)):
        rows = [sequences[number] for number in batch]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row] + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        padded = not bool(mask.all())
        ids = ids.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask.to(model.device) if padded else None, use_cache=False).logits
        size = max(1, PART // (len(rows) * width))
        parts = zip(logits[:, :-1].split(size, 1), ids[:, 1:].split(size, 1), strict=True)
        chosen = [part.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)) for part, tokens in parts]
        each = torch.cat(chosen, 1).squeeze(-1).cpu()
        for number, row, own in zip(batch, rows, each, strict=True):
            found[number] = own[: len(row) - 1].clone()
    return found


def by_length(rows: Sequence[Sequence[int]], most: int, more: int, most_rows: int) -> Iterator[list[int]]:
    """Numbers of `rows` in batches of like lengths, each of at most `most_rows` rows.

    They have at most `most` tokens when every row has `more` besides; a row that is longer is a batch of its own.
    """
    batch: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number])):
        if batch and ((len(batch) + 1) * (len(rows[number]) + more) > most or len(batch) >= most_rows):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def widest(model: Any) -> int:
    """Rows of logits that are held at a time."""
    return max(1, LOGITS // model.config.get_text_config().vocab_size)
