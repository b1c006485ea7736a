"""The study's text: the Python sources that are installed on the machine it runs on, split by package.

No file of a held-out package was seen in training: not itself, not a copy of it under another name, and none that
shares much of its text with the training files.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.recipes.text import distinct, load_tokenizer, standard_library, tokenize

# What is no code that somebody wrote, by the rules of BigCode's datasets (arXiv:2301.03988): tables, data, generated.
LARGEST_FILE = 400_000  # bytes
LONGEST_LINE, MEAN_LINE = 1000, 100  # characters
LETTERS_AND_DIGITS = 0.25  # at least so much of the characters
LARGEST_HELD_OUT = 0.04  # of all bytes: a larger package always trains
LONG_LINE = 40  # characters: shorter ones stand in everybody's files
SHARED_LINES = 0.25  # a held-out file with more of its long lines in the training files is left out
TOKENIZER_BYTES = 48_000_000
SPLITS = ("train", "tune", "test")


@dataclass(frozen=True)
class Corpus:
    """Tokens of each split as one run, each text ended by the end token; the tokenizer; what was counted."""

    tokens: dict[str, Tensor]
    tokenizer: Any
    facts: dict[str, Any]

    def blocks(self, split: str, length: int) -> Tensor:
        """All whole blocks int64 ``[N, length]`` of a split, those held out in a fixed random order."""
        run = self.tokens[split]
        blocks = run[: len(run) // length * length].view(-1, length)
        if split == "train":
            return blocks
        return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]


def corpus(folder: Path, vocabulary: int, max_bytes: int = 0) -> Corpus:
    """The corpus in `folder`, made there if it is not yet; of at most `max_bytes` of training text (0: all)."""
    if not (folder / "facts.json").exists():
        _make(folder, vocabulary, max_bytes)
    tokens = {split: torch.from_numpy(np.load(folder / f"{split}.npy").astype(np.int64)) for split in SPLITS}
    return Corpus(tokens, load_tokenizer(str(folder)), json.loads((folder / "facts.json").read_text()))


def _make(folder: Path, vocabulary: int, max_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    documents = distinct(installed_sources())
    texts, dropped = split_by_package(documents)
    if max_bytes:
        texts["train"] = _first(texts["train"], max_bytes)
        texts |= {split: _first(texts[split], max_bytes // 10) for split in ("tune", "test")}
    sample = [text for _, text in _first(texts["train"], TOKENIZER_BYTES)]
    tokenizer = load_tokenizer(None, vocabulary, sample)
    tokenizer.save_pretrained(folder)
    facts: dict[str, Any] = {"held-out files that shared text with training": dropped}
    for split in SPLITS:
        tokens = tokenize(tokenizer, [text for _, text in texts[split]])
        np.save(folder / f"{split}.npy", tokens.numpy().astype(np.uint16))
        facts[split] = {
            "packages": len({package for package, _ in texts[split]}),
            "files": len(texts[split]),
            "bytes": sum(len(text.encode()) for _, text in texts[split]),
            "tokens": len(tokens),
        }
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


def installed_sources() -> Iterator[tuple[str, str]]:
    """``(package, source)`` of the standard library and of all that pip installed."""
    yield from ((package, text) for package, text in standard_library() if is_written(text))
    for root in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        for path in sorted(Path(root).rglob("*.py")):
            text = path.read_text(encoding="utf-8", errors="replace") if path.stat().st_size <= LARGEST_FILE else ""
            if is_written(text):
                yield path.relative_to(root).parts[0].removesuffix(".py"), text


def is_written(text: str) -> bool:
    """Whether a file reads as if somebody had written it."""
    longest = max(map(len, text.splitlines()), default=0)
    dense = sum(map(str.isalnum, text)) >= LETTERS_AND_DIGITS * len(text)
    return bool(text) and longest <= LONGEST_LINE and len(text) <= MEAN_LINE * text.count("\n") and dense


def split_by_package(documents: list[tuple[str, str]]) -> tuple[dict[str, list[tuple[str, str]]], int]:
    """The documents of each split, by their packages' names, and how many held-out ones were too like training."""
    sizes: Counter[str] = Counter()
    for package, text in documents:
        sizes[package] += len(text)
    splits: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for package, text in documents:
        large = sizes[package] > LARGEST_HELD_OUT * sizes.total()
        splits["train" if large else _split_of(package)].append((package, text))
    seen = {hash(line) for _, text in splits["train"] for line in _long_lines(text)}
    dropped = 0
    for split in ("tune", "test"):
        apart = [one for one in splits[split] if not _shares(one[1], seen)]
        dropped += len(splits[split]) - len(apart)
        splits[split] = apart
    return splits, dropped


def _split_of(package: str) -> str:
    """Of twenty packages about three are for the test and one for the choice of learning rates."""
    place = int(hashlib.sha256(package.encode()).hexdigest(), 16) % 20
    return "test" if place < 3 else "tune" if place == 3 else "train"


def _shares(text: str, seen: set[int]) -> bool:
    lines = _long_lines(text)
    return sum(hash(line) in seen for line in lines) > SHARED_LINES * len(lines)


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE]


def _first(documents: list[tuple[str, str]], max_bytes: int) -> list[tuple[str, str]]:
    kept, total = [], 0
    for package, text in documents:
        total += len(text.encode())
        if total > max_bytes:
            break
        kept.append((package, text))
    return kept
