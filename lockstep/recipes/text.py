"""Text for language models: files, a ``datasets`` name, or the Python standard library of the machine it runs on."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

FEW_UNITS = 20


class TextData(LightningDataModule):
    """Blocks of tokens for a causal language model.

    About one file in ten (of the standard library: one top-level module) is held out for validation; of fewer than
    twenty files, the last tenth of each. Texts that occur twice are used once.

    Batches are ``{"input_ids": int64 [batch_size, block_size], "labels": the same}``.

    Args:
        files: text files or directories (read recursively for ``.py``, ``.txt`` and ``.md``). Without `files` and
            `dataset`: the Python standard library's sources, tests left out.
        dataset: Hugging Face dataset with a ``text`` column, ``"name"`` or ``"name:configuration"``, instead of `files`
            (needs the ``datasets`` package).
        tokenizer: folder or hub name of a tokenizer with an end token. Without one: a byte-level
            BPE trained on the training text.
        vocab_size: of the tokenizer trained here.
        block_size: tokens in a sample.
        batch_size: samples in a batch.
        max_bytes: use no more text than this, nine tenths of it for training; 0 for all.
        num_workers: of the data loaders.

    Raises:
        ValueError: no text found, or too little for one block in either split.
    """

    def __init__(
        self,
        files: list[str] | None = None,
        dataset: str | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 512,
        block_size: int = 128,
        batch_size: int = 16,
        max_bytes: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if files and dataset:
            raise ValueError("give files or dataset, not both.")
        self.files, self.dataset, self.tokenizer_name = files, dataset, tokenizer
        self.vocab_size, self.block_size, self.batch_size = vocab_size, block_size, batch_size
        self.max_bytes, self.num_workers = max_bytes, num_workers
        self.tokenizer: Any = None
        self._splits: dict[str, Blocks] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, split, tokenize; once."""
        if self._splits:
            return
        train, validation = _split(distinct(self._documents()))
        split = {
            "train": _limited(train, self.max_bytes * 9 // 10),
            "validation": _limited(validation, self.max_bytes // 10),
        }
        self.tokenizer = load_tokenizer(self.tokenizer_name, self.vocab_size, split["train"])
        for name, texts in split.items():
            tokens = tokenize(self.tokenizer, texts)
            if len(tokens) < self.block_size:
                raise ValueError(f"{name} text has {len(tokens)} tokens, less than one block of {self.block_size}.")
            self._splits[name] = Blocks(tokens, self.block_size)
        # In a fixed random order, the first validation batches are a fair sample of all.
        held_out = self._splits["validation"].blocks
        order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
        self._splits["validation"].blocks = held_out[order]

    def train_dataloader(self) -> DataLoader:
        """Shuffled by torch's seed; a last incomplete batch is dropped."""
        return self._loader("train", shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Every held-out block, in an order that is always the same."""
        return self._loader("validation")

    def _loader(self, split: str, **options: Any) -> DataLoader:
        return DataLoader(self._splits[split], self.batch_size, num_workers=self.num_workers, **options)

    def _documents(self) -> Iterator[tuple[str, str]]:
        """``(unit, text)``: units stay whole when training and validation are split."""
        if self.dataset is not None:
            from datasets import load_dataset

            for number, row in enumerate(load_dataset(*self.dataset.split(":", 1), split="train")):
                yield str(number), row["text"]
        elif self.files:
            yield from _read(self.files)
        else:
            yield from standard_library()


class Blocks(Dataset):
    """Consecutive blocks of a long run of tokens."""

    def __init__(self, tokens: Tensor, block_size: int) -> None:
        self.blocks = tokens[: len(tokens) // block_size * block_size].view(-1, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[index]
        return {"input_ids": block, "labels": block}


def standard_library() -> Iterator[tuple[str, str]]:
    """``(top-level module, source)`` of this Python's own modules, without tests, tables and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not skipped.intersection(parts):
            yield parts[0].removesuffix(".py"), path.read_text(encoding="utf-8", errors="replace")


def _read(files: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in files:
        path = Path(name)
        if not path.exists():
            raise ValueError(f"files: {path} does not exist.")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in found:
            if file == path or (file.is_file() and file.suffix in (".py", ".txt", ".md")):
                yield str(file), file.read_text(encoding="utf-8", errors="replace")


def distinct(documents: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each distinct text once, in an order that does not depend on names."""
    by_hash = {hashlib.sha256(text.encode()).hexdigest(): (unit, text) for unit, text in documents if text.strip()}
    if not by_hash:
        raise ValueError("no text found.")
    return [document for _, document in sorted(by_hash.items())]


def _split(documents: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Training and held-out texts: about one unit in ten is held out, or, of only a few units, the end of each text."""
    if len({unit for unit, _ in documents}) < FEW_UNITS:
        cuts = [(text, len(text) * 9 // 10) for _, text in documents]
        return [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]
    train = [text for unit, text in documents if not _held_out(unit)]
    return train, [text for unit, text in documents if _held_out(unit)]


def _limited(texts: list[str], max_bytes: int) -> list[str]:
    """The texts that fit into `max_bytes` one after the other, too large ones passed over; all of them for 0."""
    kept, total = [], 0
    for text in texts:
        size = len(text.encode())
        if not max_bytes or total + size <= max_bytes:
            kept.append(text)
            total += size
    return kept


def _held_out(unit: str) -> bool:
    """One unit in ten, by its name alone."""
    return int(hashlib.sha256(unit.encode()).hexdigest(), 16) % 10 == 0


def load_tokenizer(name: str | None, vocab_size: int = 0, texts: Sequence[str] = ()) -> Any:
    """The tokenizer of the folder `name`, or a byte-level BPE of `vocab_size` tokens trained on `texts`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer {name} has no end token, which ends each text.")
        return tokenizer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|end|>", eos_token="<|end|>")


def tokenize(tokenizer: Any, texts: list[str]) -> Tensor:
    """All texts in one run of tokens, each ended by the tokenizer's end token."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return torch.tensor([token for tokens in encoded for token in (*tokens, tokenizer.eos_token_id)])
