"""``lockstep ptq``: a transformers folder in, the masters of a post-training method and their scales out."""

from __future__ import annotations

import json as json_module
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lockstep.export.directory import EXPORTED, check_new, replacing
from lockstep.loading import calibration_batches, load_model, stored_scales
from lockstep.ptq.quantize import Method, needs_batches, quantize
from lockstep.qat.learned import PTQ_REPORT
from lockstep.qat.prepare import show
from lockstep.scheme import Scheme

_SMALL = EXPORTED - {".safetensors"} | {".py"}


def ptq_command(
    model: str,
    out: str,
    method: Method = "gptq",
    scheme: Scheme | str = "W4A16",
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
    device: str | None = None,
    text: str | None = None,
    steps: int = 32,
    max_tokens: int = 512,
    json: str | None = None,
) -> int:
    """Quantize a model after training; write a new folder to export, to align, or to start training from.

    Args:
        model: transformers folder with the masters.
        out: where to write what the method makes of them, and the scales; a new or empty folder.
        method: rtn, minmax, percentile, mse, gptq, awq, smoothquant or hqq.
        scheme: what will be served, a preset's name such as W4A16, or its fields.
        targets: what will be quantized, as in lockstep.prepare.
        ignore: what will be left out.
        device: a torch device; default: the GPU if there is one.
        text: file to calibrate on, of at least one batch; default: a module of the Python standard library.
        steps: how many batches of it at most.
        max_tokens: how many tokens in a batch.
        json: write the report as JSON there.
    """
    if json and Path(json).suffix != ".json":
        raise ValueError(f"{json}: a post-training report is saved as .json.")
    if steps < 1 or max_tokens < 1:
        raise ValueError(f"steps={steps}, max_tokens={max_tokens}: calibration needs at least one of each.")
    wanted = Scheme.of(scheme)
    check_new(out)
    if stored := stored_scales(model):
        raise ValueError(f"{model} holds {min(stored)} among its masters: quantize the folder without scales.")
    loaded, tokenizer = load_model(model, device)
    batches: list[dict[str, Any]] = []
    if needs_batches(method, wanted):
        batches = calibration_batches(loaded, tokenizer, text, steps, max_tokens)
    elif text:
        print(f"{method} for {wanted} does not run the model: {text} is not read")

    with replacing(out) as incomplete:  # before the work: another process may be writing there
        result = quantize(loaded, method, wanted, batches, targets, ignore)
        if result.servable:
            result.prepare(loaded)  # which save_pretrained writes with its scales
        loaded.save_pretrained(incomplete)
        _copy_others(Path(model), incomplete)
        result.save(incomplete / PTQ_REPORT)
    show(result)
    print(f"written: {Path(out).absolute()}")
    if json:
        print(f"written: {result.save(json)}")
    if result.learned_scales:
        print(f"its scales are for --scheme '{as_argument(result.scheme)}'")
    return 0


def as_argument(scheme: Scheme) -> str:
    """`scheme` as ``--scheme`` takes it: a preset's name, or JSON of the fields that differ from the defaults."""
    if (name := scheme.preset_name) and Scheme.preset(name) == scheme:
        return name
    parts = {"weights": _changed(scheme.weights)}
    if scheme.activations is not None:
        parts["activations"] = _changed(scheme.activations) or {"format": scheme.activations.format}
    return json_module.dumps(parts)


def _changed(spec: Any) -> dict[str, Any]:
    plain = {one.name: (getattr(spec, one.name), one.default) for one in fields(spec)}
    changed = {name: value for name, (value, default) in plain.items() if value != default}
    return {name: str(value) if isinstance(value, torch.dtype) else value for name, value in changed.items()}


def _copy_others(source: Path, target: Path) -> None:
    """Copy the tokenizer, the code and other small files that stand beside the masters in `source`."""
    for path in source.iterdir():
        small = path.is_file() and path.suffix in _SMALL and not path.name.endswith(".index.json")
        if small and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
