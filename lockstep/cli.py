"""The command line.

``lockstep fit | validate | test | predict | align | calibrate | export | inspect | sensitivity | plan | report |
kernels``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.scheme import Rule, Scheme

if TYPE_CHECKING:
    from lockstep.export import Checkpoint

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(args: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 for what `align` or `inspect` found, or 2 for input that cannot be used."""
    from rich.console import Console

    words = list(sys.argv[1:] if args is None else args)
    command = words[0] if words else "--help"
    if command in TRAINER_COMMANDS:
        return _trainer(args)
    from lockstep.calibrate import calibrate_command
    from lockstep.export.convert import export_command
    from lockstep.inspect import inspect_command
    from lockstep.plan import plan_command
    from lockstep.ptq.command import ptq_command
    from lockstep.report import report_command
    from lockstep.sensitivity import sensitivity_command

    functions: dict[str, Callable[..., int]] = {
        "align": align,
        "calibrate": calibrate_command,
        "export": export_command,
        "inspect": inspect_command,
        "kernels": kernels,
        "plan": plan_command,
        "ptq": ptq_command,
        "report": report_command,
        "sensitivity": sensitivity_command,
    }
    if command not in functions:
        print(_USAGE, file=sys.stdout if command in ("-h", "--help") else sys.stderr)
        return 0 if command in ("-h", "--help") else 2

    from jsonargparse import auto_cli

    try:
        if command == "report":  # of several RUNS, which auto_cli would take as one word
            return report_command(words[1:])
        return auto_cli(functions[command], args=words[1:], as_positional=True, prog=f"lockstep {command}")
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        message = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(f"{type(error).__name__}: {message}", markup=False, highlight=False)
        return 2


def align(
    model: str,
    checkpoint: str,
    scheme: Scheme | str | list[Rule] | None = None,
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
        model: transformers folder with the trained masters, and the scales that were measured or learned for them.
        checkpoint: the exported folder.
        scheme: what the model was trained with, a preset's name, {weights: {group_size: 64}} or a recipe; default: what
            the checkpoint itself declares, which cannot find a checkpoint exported with another scheme.
        targets: what was quantized, as in lockstep.prepare; recipes and checkpoints of several schemes have their own.
        ignore: what was left out.
        kernel: the true kernel to compare with; see lockstep kernels.
        device: a torch device; default: the GPU if there is one.
        text: file to run the model on; default: a module of the Python standard library.
        max_tokens: how many tokens of it.
        html: write the report as a page there.
        json: write the report as JSON there.
    """

    import lockstep
    from lockstep.export import Checkpoint
    from lockstep.loading import LEARNED, load_model, load_scales, stored_scales, token_batches
    from lockstep.qat.prepare import show

    for path, suffix in ((html, ".html"), (json, ".json")):
        if path and Path(path).suffix != suffix:
            raise ValueError(f"{path}: a report is saved as .html or .json.")
    if not Path(model).is_dir():
        raise ValueError(f"{model} is not a folder: MODEL is the transformers folder with the trained masters.")
    stored = Checkpoint(checkpoint)
    rules = (scheme if isinstance(scheme, list) else [Rule(targets, scheme)]) if scheme else _rules_of(stored, targets)
    trained, tokenizer = load_model(model, device)
    learned = any(key.endswith(LEARNED) for key in stored_scales(model))
    lockstep.prepare(trained, rules, ignore=ignore, learned_scales=learned)
    if stored.kv_cache is not None:
        from lockstep.qat.kv_cache import prepare_kv_cache

        prepare_kv_cache(trained, stored.kv_cache)
    load_scales(trained, model)
    (batch,) = token_batches(trained, tokenizer, text, max_tokens, size=max_tokens)

    report = lockstep.align.compare(trained, checkpoint, batch, kernel)
    show(report)
    for path in (html, json):
        if path:
            print(f"written: {report.save(path)}")
    return 0 if report.aligned else 1


def _rules_of(stored: Checkpoint, targets: Sequence[str]) -> list[Rule]:
    """What a checkpoint declares: its scheme for `targets`, or each of several schemes for the layers stored so."""
    schemes: dict[Scheme, list[str]] = {}
    for name in stored.layers:
        schemes.setdefault(stored.scheme_of(name), []).append(name)
    if len(schemes) == 1:
        return [Rule(targets, stored.scheme)]
    return [Rule(names, scheme) for scheme, names in schemes.items()]


def kernels(scheme: Scheme | str = "W4A16", device: str = "cpu") -> int:
    """Show every registered kernel, and why it can or cannot compute a scheme on a device.

    Args:
        scheme: a preset's name, or fields such as {weights: {strategy: channel}}.
        device: a torch device.
    """
    import torch
    from rich.table import Table

    from lockstep.kernels import KERNELS
    from lockstep.qat.prepare import show

    asked = Scheme.of(scheme)
    table = Table("operator", "kernel", "serves", f"{asked} on {device}", "comes from")
    for kernel in KERNELS:
        reason = kernel.unavailable(asked, torch.device(device))
        answer = f"no: {reason}" if reason else "yes"
        table.add_row(kernel.operator, kernel.name, kernel.serves, answer, kernel.origin() or "not installed")
    show(table)
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


_USAGE = """usage: lockstep COMMAND ...

  fit | validate | test | predict   a LightningCLI run, e.g. lockstep fit --config lockstep/recipes/int4_qat.yaml
  align MODEL CHECKPOINT            does the checkpoint compute what was trained? exits with 1 if not
  calibrate MODEL OUT               measure the input ranges of a model, for schemes that store them
  export MODEL OUT                  masters on disk to a served folder, without the model in memory
  inspect MODEL                     what a folder is, what engines do with it; exits with 1 for problems
  ptq MODEL OUT                     quantize after training: gptq, awq, smoothquant, hqq, mse and others
  sensitivity MODEL                 what each scheme costs each layer, and a recipe for a budget of bytes
  plan MODEL                        what serving and training take of memory, and which GPUs fit
  report RUNS...                    one page about runs: what won, at what size and cost; 1 for damaged files
  kernels                           every registered kernel, and why it can or cannot run here

lockstep COMMAND --help tells the rest."""


if __name__ == "__main__":
    sys.exit(main())
