"""The command line: ``lockstep fit | validate | test | predict | align | kernels``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lockstep.scheme import Scheme

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(args: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 for a gap that `align` found, or 2 for input that cannot be used."""
    from rich.console import Console

    words = list(sys.argv[1:] if args is None else args)
    command = words[0] if words else "--help"
    if command in TRAINER_COMMANDS:
        return _trainer(args)
    functions: dict[str, Callable[..., int]] = {"align": align, "kernels": kernels}
    if command not in functions:
        print(_USAGE, file=sys.stdout if command in ("-h", "--help") else sys.stderr)
        return 0 if command in ("-h", "--help") else 2

    from jsonargparse import auto_cli

    try:
        return auto_cli(functions[command], args=words[1:], as_positional=True, prog=f"lockstep {command}")
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        message = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(f"{type(error).__name__}: {message}", markup=False, highlight=False)
        return 2


def align(
    model: str,
    checkpoint: str,
    scheme: Scheme | str | None = None,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
    kernel: str = "reference",
    device: str | None = None,
    text: str | None = None,
    max_tokens: int = 2048,
    html: str | None = None,
    json: str | None = None,
) -> int:
    """Compare a trained model with its exported checkpoint; exit with 1 if they are not aligned.

    Args:
        model: transformers folder with the trained masters.
        checkpoint: the exported folder.
        scheme: what the model was trained with, a preset's name or {weights: {group_size: 64}}; default: what the
            checkpoint itself declares, which cannot find a checkpoint exported with another scheme.
        targets: what was quantized, as in lockstep.prepare.
        ignore: what was left out.
        kernel: the true kernel to compare with; see lockstep kernels.
        device: a torch device; default: the GPU if there is one.
        text: file to run the model on; default: a module of the Python standard library.
        max_tokens: how many tokens of it.
        html: write the report as a page there.
        json: write the report as JSON there.
    """
    import torch
    from rich.console import Console
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lockstep
    from lockstep.export import Checkpoint

    for path, suffix in ((html, ".html"), (json, ".json")):
        if path and Path(path).suffix != suffix:
            raise ValueError(f"{path}: a report is saved as .html or .json.")
    if not Path(model).is_dir():
        raise ValueError(f"{model} is not a folder: MODEL is the transformers folder with the trained masters.")
    trained_with = Scheme.of(scheme) if scheme else Checkpoint(checkpoint).scheme
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        torch.empty(0, device=where)
    except (AssertionError, ImportError, RuntimeError) as error:  # what torch raises differs by device
        raise ValueError(f"device={device!r} is not there: {error}") from error
    try:
        trained: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot load a model and its tokenizer from {model}: {error}") from error
    trained.to(where)
    lockstep.prepare(trained, trained_with, targets, ignore)
    ids = tokenizer(_text(text), return_tensors="pt", verbose=False)["input_ids"][:, :max_tokens]
    block = min(ids.shape[1], getattr(trained.config, "max_position_embeddings", max_tokens))
    if block < 2:
        raise ValueError(f"the text has {ids.shape[1]} tokens: too few to compare.")
    batch = {"input_ids": ids[0, : ids.shape[1] // block * block].view(-1, block).to(trained.device)}

    report = lockstep.align.compare(trained, checkpoint, batch, kernel)
    Console().print(report)
    for path in (html, json):
        if path:
            print(f"written: {report.save(path)}")
    return 0 if report.aligned else 1


def kernels(scheme: Scheme | str = "W4A16", device: str = "cpu") -> int:
    """Show every registered kernel, and why it can or cannot compute a scheme on a device.

    Args:
        scheme: a preset's name, or fields such as {weights: {strategy: channel}}.
        device: a torch device.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from lockstep.kernels import KERNELS

    spec = Scheme.of(scheme).weights
    table = Table("operator", "kernel", "serves", f"{spec} on {device}", "comes from")
    for kernel in KERNELS:
        reason = kernel.unavailable(spec, torch.device(device))
        answer = f"no: {reason}" if reason else "yes"
        table.add_row(kernel.operator, kernel.name, kernel.serves, answer, kernel.origin() or "not installed")
    Console().print(table)
    return 0


def _trainer(args: Sequence[str] | None) -> int:
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningCLI

    LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        args=None if args is None else list(args),
    )
    return 0


def _text(path: str | None) -> str:
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    import argparse

    return Path(argparse.__file__).read_text(encoding="utf-8")


_USAGE = """usage: lockstep COMMAND ...

  fit | validate | test | predict   a LightningCLI run, e.g. lockstep fit --config lockstep/recipes/int4_qat.yaml
  align MODEL CHECKPOINT            does the checkpoint compute what was trained? exits with 1 if not
  kernels                           every registered kernel, and why it can or cannot run here

lockstep COMMAND --help tells the rest."""


if __name__ == "__main__":
    sys.exit(main())
