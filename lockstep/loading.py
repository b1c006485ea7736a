"""What the commands run on: a transformers folder, and the tokens of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_model(folder: str, device: str | None = None) -> tuple[Any, Any]:
    """The transformers model and tokenizer of a folder, on `device`, by default the GPU if there is one."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder: give a transformers folder with a model and its tokenizer.")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        torch.empty(0, device=where)
    except (AssertionError, ImportError, RuntimeError) as error:  # what torch raises differs by device
        raise ValueError(f"device={device!r} is not there: {error}") from error
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot load a model and its tokenizer from {folder}: {error}") from error
    return model.to(where).eval(), tokenizer


def token_batches(
    model: Any, tokenizer: Any, text: str | None, max_tokens: int, size: int = 1024
) -> list[dict[str, Any]]:
    """The first `max_tokens` tokens of the file `text` as batches of about `size` tokens in rows of one length.

    By default a module of the Python standard library.
    """
    import argparse

    path = Path(text or argparse.__file__)
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0, :max_tokens]
    block = min(len(ids), size, getattr(model.config, "max_position_embeddings", size))
    if block < 2:
        raise ValueError(f"{path} has {len(ids)} tokens: too few.")
    rows = ids[: len(ids) // block * block].view(-1, block).to(model.device)
    return [{"input_ids": batch} for batch in rows.split(max(1, size // block))]
