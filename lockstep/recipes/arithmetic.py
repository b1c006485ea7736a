"""Sums, made on the fly: a task whose answers can be checked, for supervised steps and for rollouts with a reward.

A problem is ``07+25=``, its answer ``032;``, a token for each character. Numbers are filled up with zeros, so that all
prompts are of one length, and each digit of a sum has its place. What a step trains on follows from the seed and the
number of the step alone, so that a run that is killed and resumed sees what an unbroken one would have seen.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

END = ";"
CHARACTERS = f"0123456789+={END}"
IGNORED = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True)
class Problem:
    """What is asked, as tokens, and the tokens of the only right answer, its end included."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Arithmetic(LightningDataModule):
    """Sums of two numbers of `digits` digits; one pair in ten is held out, and never trained on in any phase.

    Its training batches are empty: a LightningModule asks for `examples` or `problems` of the step that it is at.

    Args:
        digits: of each of the two numbers.
        batch_size: solved examples of a supervised step.
        prompts: problems of a rollout.
        held_out: problems that accuracy is measured on, the same in every run.
        seed: of the problems.
    """

    def __init__(
        self, digits: int = 2, batch_size: int = 128, prompts: int = 32, held_out: int = 256, seed: int = 0
    ) -> None:
        super().__init__()
        self.digits = digits
        self.batch_size = batch_size
        self.prompts = prompts
        self.seed = seed
        self.tokenizer = tokenizer()
        pairs = itertools.islice(_pairs(digits, "held out", held_out=True), held_out)
        self.held_out = [problem(a, b, digits) for a, b in pairs]

    @property
    def max_tokens(self) -> int:
        """Tokens of a right answer: the digits of the sum and the end."""
        return self.digits + 2

    def examples(self, step: int) -> tuple[Tensor, Tensor]:
        """Solved problems of a supervised step: tokens and labels, int64 ``[batch_size, T]``; see `solved`."""
        pairs = itertools.islice(_pairs(self.digits, ("supervised", self.seed, step)), self.batch_size)
        return solved([problem(a, b, self.digits) for a, b in pairs])

    def problems(self, step: int) -> list[Problem]:
        """The problems of a rollout."""
        pairs = itertools.islice(_pairs(self.digits, ("rollout", self.seed, step)), self.prompts)
        return [problem(a, b, self.digits) for a, b in pairs]

    def train_dataloader(self) -> Steps:
        """A batch for each step, without end."""
        return Steps()


class Steps:
    """Counts. What belongs to a step is not here, since loaders do not resume in the middle of an epoch."""

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


def problem(a: int, b: int, digits: int) -> Problem:
    """``a + b``."""
    return Problem(tuple(encode(f"{a:0{digits}}+{b:0{digits}}=")), tuple(encode(f"{a + b:0{digits + 1}}{END}")))


def reward(problem: Problem, tokens: Sequence[int]) -> float:
    """1 for the right answer, ended where it ends; else 0."""
    return float(tuple(tokens) == problem.answer)


def solved(problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
    """Prompts with their answers, int64 ``[N, T]``, filled up with the end token; and labels, which cover the answers.

    Labels stand where their tokens do (transformers shifts them).
    """
    return padded([(one.prompt, one.answer) for one in problems])


def padded(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """Prompts and what follows them as rows of one length, int64 ``[N, T]``, and labels that leave out the prompts.

    Filled up on the right with the end token, which causal attention never lets the tokens before it see.
    """
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    tokens = torch.full((len(pairs), length), encode(END)[0])
    labels = torch.full_like(tokens, IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : end] = tokens[row, len(prompt) : end]
    return tokens, labels


def encode(text: str) -> list[int]:
    """A token for each character. Raises ValueError for a character that sums do not have."""
    return [CHARACTERS.index(character) for character in text]


def decode(tokens: Sequence[int]) -> str:
    """The characters."""
    return "".join(CHARACTERS[token] for token in tokens)


def tokenizer() -> Any:
    """`encode` as a transformers tokenizer, to be saved with a model."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({character: token for token, character in enumerate(CHARACTERS)}, END))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END)


def stream_seed(*key: object) -> int:
    """A seed of 31 bits for what `key` names; unlike consecutive integers, of no kinship with that of another key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big") >> 1


def _pairs(digits: int, key: object, held_out: bool = False) -> Iterator[tuple[int, int]]:
    """The stream of pairs that `key` names, of one of the two splits."""
    generator = torch.Generator().manual_seed(stream_seed(key))
    while True:
        for a, b in torch.randint(10**digits, (256, 2), generator=generator).tolist():
            if _is_held_out(a, b) == held_out:
                yield a, b


def _is_held_out(a: int, b: int) -> bool:
    """One pair in ten, by the numbers alone."""
    return stream_seed(a, b) % 10 == 0
