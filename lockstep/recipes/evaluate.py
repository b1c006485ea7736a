"""What quantization costs a language model: perplexity, next tokens, agreement with a reference, whole lines of code.

`evaluate` runs blocks of held-out tokens through a model, and through a reference beside it, and counts over every
next token. `completions_that_parse` lets it write: the next line of source files, and asks Python's own parser.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lockstep.loading import as_served

SERVED = torch.bfloat16  # of the autocast under which fp32 masters compute
ROWS = 1024  # logits of so many tokens are in fp32 at a time


@dataclass(frozen=True)
class Evaluation:
    """The measures of one model on one text, each a mean over its next tokens, or over its lines.

    Args:
        tokens: how many next tokens were predicted.
        perplexity: exp of the mean cross-entropy in nats.
        accuracy: share of tokens that are the model's most likely one.
        exact_line: share of `lines` that greedy decoding would have written token for token.
        lines: how many lines were asked for: those of more than a token that begin in the second half of a block and
            end within it.
        agreement: share of tokens whose most likely one is also the reference's; None without a reference.
        kl: mean KL(reference || model) in nats; None without a reference.
    """

    tokens: int
    perplexity: float
    accuracy: float
    exact_line: float
    lines: int
    agreement: float | None = None
    kl: float | None = None


@torch.no_grad()
def evaluate(
    model: Any,
    blocks: Tensor,
    line_ends: Tensor,
    reference: Any = None,
    batch_size: int = 8,
) -> Evaluation:
    """Measure `model` on `blocks` int64 ``[N, T]``, all of whose tokens but each first are predicted.

    A line is exact if the most likely token is the right one at each of its tokens, which is when greedy decoding
    writes it; of its last token only what stands up to the line's end counts.

    Args:
        model: a transformers causal language model; its logits are compared in fp32.
        blocks: token ids.
        line_ends: `line_ends_of` the tokenizer, int64 ``[vocabulary]``.
        reference: the model that `agreement` and `kl` are with.
        batch_size: blocks in a forward pass.

    Raises:
        ValueError: there is no next token in `blocks`.
    """
    if not blocks[:, 1:].numel():
        raise ValueError(f"blocks {list(blocks.shape)}: there is no next token to predict.")
    device = next(model.parameters()).device
    line_ends = line_ends.to(device)
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # cross-entropy, hits, agreements, KL
    exact = lines = 0
    for batch in blocks.split(batch_size):
        batch = batch.to(device)
        logits = _logits(model, batch)
        others = None if reference is None else _logits(reference, batch)
        labels = batch[:, 1:].flatten()
        found = []
        for start in range(0, len(labels), ROWS):
            rows = slice(start, start + ROWS)
            log_probs = logits[rows].float().log_softmax(-1)
            found.append(log_probs.argmax(-1))
            sums[0] -= log_probs.gather(-1, labels[rows, None]).double().sum()
            if others is not None:
                expected = others[rows].float().log_softmax(-1)
                sums[2] += (found[-1] == expected.argmax(-1)).sum()
                sums[3] += (expected.exp() * (expected - log_probs)).double().sum()
        best = torch.cat(found)
        sums[1] += (best == labels).sum()
        right, asked = _exact_lines(best.view(len(batch), -1), batch, line_ends)
        exact, lines = exact + right, lines + asked
    tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    loss, hits, agreements, kl = (sums / tokens).tolist()
    shared = (agreements, kl) if reference is not None else (None, None)
    perplexity = float(torch.tensor(loss, dtype=torch.float64).exp())
    return Evaluation(tokens, perplexity, hits, exact / max(1, lines), lines, *shared)


def _logits(model: Any, blocks: Tensor) -> Tensor:
    """For each next token ``[B * (T - 1), vocabulary]``, in the precision of `model` and of no other beside it."""
    with as_served(model, SERVED):
        return model(input_ids=blocks, use_cache=False).logits[:, :-1].flatten(0, 1)


def line_ends_of(tokenizer: Any) -> Tensor:
    """For each token the class in which it counts as written right, int64 ``[vocabulary]``, negative if it ends a line.

    Tokens with a line's end are one class if they are alike up to it; every other token is a class of its own.
    """
    heads: dict[str, int] = {}
    classes = []
    for token in range(len(tokenizer)):
        head, newline, _ = tokenizer.decode([token]).partition("\n")
        classes.append(-1 - heads.setdefault(head, len(heads)) if newline else token)
    return torch.tensor(classes)


def _exact_lines(best: Tensor, blocks: Tensor, line_ends: Tensor) -> tuple[int, int]:
    """How many lines are right, of how many: `best` ``[B, T - 1]`` is what the model would write after each token."""
    classes = line_ends[blocks]
    ends = classes < 0
    wrong = line_ends[best.clamp(max=len(line_ends) - 1)] != classes[:, 1:]
    # The line of a token: how many ended before it. A line that the block cuts off has no end and is not counted.
    line = (ends.cumsum(1) - ends.long())[:, 1:]
    shape, half = (len(blocks), blocks.shape[1] + 1), blocks.shape[1] // 2

    def per_line(values: Tensor) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=blocks.device).scatter_add_(1, line, values.long())

    position = torch.arange(1, blocks.shape[1], device=blocks.device).expand_as(line)
    begins = per_line(position < half) == 0  # no token of it stands in the first half
    asked = (per_line(torch.ones_like(line)) > 1) & (per_line(ends[:, 1:]) == 1) & begins
    return int((asked & (per_line(wrong) == 0)).sum()), int(asked.sum())


@torch.no_grad()
def completions_that_parse(
    model: Any,
    tokenizer: Any,
    prompts: Tensor,
    max_new_tokens: int = 32,
    batch_size: int = 128,
) -> float:
    """Share of `prompts` int64 ``[N, T]``, each cut at a line's end, after which the model writes a line that parses.

    Greedy decoding; a line that has no end after `max_new_tokens` does not parse. See `parses`.
    """
    device, good = next(model.parameters()).device, 0
    with as_served(model, SERVED):
        for batch in prompts.split(batch_size):
            written = model.generate(
                batch.to(device),
                attention_mask=torch.ones_like(batch, device=device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=tokenizer.eos_token_id,
            )
            for text in tokenizer.batch_decode(written[:, batch.shape[1] :]):
                line, newline, _ = text.lstrip().partition("\n")
                good += bool(newline) and parses(line)
    return good / len(prompts)


def line_prompts(blocks: Tensor, tokenizer: Any, line_ends: Tensor, length: int, count: int) -> Tensor:
    """At most `count` prompts int64 ``[N, length]`` from `blocks`, one a block, whose next line is code that parses."""
    prompts: list[Tensor] = []
    for block in blocks:
        for end in (line_ends[block] < 0).nonzero().flatten().tolist():
            if end + 1 < length:
                continue
            line, newline, _ = tokenizer.decode(block[end + 1 : end + 65]).lstrip().partition("\n")
            if newline and line.strip() and not line.startswith("#") and parses(line):
                prompts.append(block[end + 1 - length : end + 1])
                break
        if len(prompts) == count:
            break
    if not prompts:
        raise ValueError(f"no line that parses follows {length} tokens in any of the {len(blocks)} blocks.")
    return torch.stack(prompts)


def parses(line: str) -> bool:
    """Whether Python's parser takes one line of source; the head of a block may stand without its body."""
    line = line.strip()
    return any(_compiles(text) for text in _wrapped(line))


def _wrapped(line: str) -> Iterator[str]:
    yield line
    if line.endswith(":"):
        yield f"{line} pass"
    first = line.partition(" ")[0].rstrip(":")
    before = {"elif": "if 1: pass", "else": "if 1: pass", "except": "try: pass", "finally": "try: pass"}
    if first in before:
        yield f"{before[first]}\n{line} pass"
        yield f"{before[first]}\n{line}"
    if first == "case":
        yield f"match 1:\n {line} pass"
    if line.startswith("@"):
        yield f"{line}\ndef f(): pass"
    if first in ("return", "yield", "await", "async"):
        yield f"async def f():\n {line}"
        yield f"async def f():\n {line} pass"
    if first in ("break", "continue"):
        yield f"while 1:\n {line}"


def _compiles(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
