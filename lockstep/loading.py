"""What running a model needs: a transformers folder, its stored scales, the tokens of a text, served precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lockstep.qat.learned import check_ptq

MEASURED = (".input_scale", ".input_global_scale", ".k_scale", ".v_scale")
LEARNED = ".weight_scale"


def stored_scales(folder: str | Path) -> dict[str, Path]:
    """The files of the scales that a folder of masters stores beside them, by key; none if it is no such folder.

    ``lockstep calibrate`` writes them, and transformers' ``save_pretrained`` of a prepared model does.
    """
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for path in sorted(Path(folder).glob("*.safetensors")) if folder else ():
        with safe_open(path, "pt") as file:
            found |= {key: path for key in [*file.keys()] if key.endswith((*MEASURED, LEARNED))}
    return found


def load_scales(model: nn.Module, folder: str | Path) -> list[str]:
    """Read the scales that `folder` stores into a prepared `model`, as which transformers does not know them.

    Returns:
        Their keys; none if the model has no place for any.

    Raises:
        ValueError: a measured scale that the model has is not there; one is no positive number, or of another shape;
            learned scales are for another scale rule than the model's, or not those that ``lockstep ptq`` wrote.

    Nothing is changed when it raises. Learned scales that are not there stay as they are.
    """
    from safetensors import safe_open

    files = stored_scales(folder)
    places = {key: tensor for key, tensor in model.state_dict().items() if key.endswith((*MEASURED, LEARNED))}
    if missing := [key for key in places if key not in files and not key.endswith(LEARNED)]:
        raise ValueError(
            f"{folder} stores no {missing[0]}: run lockstep calibrate with the scheme, targets, ignore and KV cache of "
            "this model."
        )
    scales = {}
    for key in places:
        if key in files:
            with safe_open(files[key], "pt") as file:
                scales[key] = file.get_tensor(key)
        if key.endswith(LEARNED):
            layer = model.get_submodule(key.removesuffix(LEARNED))
            check_ptq(Path(folder), key, layer.scheme.weights, scales.get(key))  # type: ignore[union-attr, arg-type]
        if key not in files:
            continue
        found = scales[key]
        alike = (found.shape, found.dtype) == (places[key].shape, torch.float32)
        if not alike or not (found.isfinite() & ((found > 0) | key.endswith(LEARNED))).all():
            wanted = f"{'finite' if key.endswith(LEARNED) else 'positive'} float32 of shape {list(places[key].shape)}"
            raise ValueError(f"{files[key]}: {key} is not {wanted}: {found.dtype}, {list(found.shape)}.")
    with torch.no_grad():
        for key, scale in scales.items():
            places[key].copy_(scale)
    return list(scales)


@contextmanager
def as_served(model: nn.Module, served: torch.dtype) -> Iterator[None]:
    """Eval mode, and autocast to the served dtype for wider masters, unless the caller has an autocast of their own."""
    device_type = next(model.parameters()).device.type
    was_training = {module: module.training for module in model.modules()}
    wider = served != torch.float32 and any(one.dtype == torch.float32 for one in model.parameters())
    own = torch.is_autocast_enabled(device_type)
    model.eval()
    try:
        with torch.autocast(device_type, served) if wider and not own else nullcontext():
            yield
    finally:
        for module, training in was_training.items():
            module.training = training


def load_model(folder: str, device: str | None = None) -> tuple[Any, Any]:
    """The transformers model and tokenizer of a folder, on `device`, by default the GPU if there is one."""
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


def calibration_batches(
    model: Any, tokenizer: Any, text: str | None, steps: int, max_tokens: int
) -> list[dict[str, Any]]:
    """At most `steps` batches of `max_tokens` tokens of `text`. Prints how much it is; ValueError for less than one."""
    import argparse

    batches = token_batches(model, tokenizer, text, steps * max_tokens, size=max_tokens)[:steps]
    name = text or argparse.__file__
    blocks, block = sum(len(batch["input_ids"]) for batch in batches), batches[0]["input_ids"].shape[1]
    wanted = min(max_tokens, getattr(model.config, "max_position_embeddings", max_tokens))
    if block < wanted:
        raise ValueError(
            f"{name} has {block} tokens, less than one block of {wanted}: calibrate on more text, or on shorter blocks "
            f"with --max_tokens {block}."
        )
    print(f"calibrating on {blocks} blocks of {block} tokens, {blocks * block:,} in all, of {name}")
    return batches
