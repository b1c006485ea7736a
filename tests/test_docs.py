"""The documentation: its code runs, its commands parse, its names exist, and its tables say what the code says."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import datasets
import lightning
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser, auto_parser
from lightning.pytorch import Callback, LightningModule, Trainer
from models import prepared, tiny_llama, token_ids
from test_trainer_callback import tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments

import lockstep
from lockstep import KVCacheSpec, Rule, Scheme, cli
from lockstep.align.report import REACHABLE_EQUAL
from lockstep.calibrate import calibrate_command
from lockstep.callbacks import QATCallback
from lockstep.export import formats, save_pretrained
from lockstep.export.convert import export_command
from lockstep.inspect import inspect_command
from lockstep.kernels import KERNELS
from lockstep.plan import plan_command
from lockstep.ptq.command import ptq_command
from lockstep.qat.kv_cache import SPECS
from lockstep.qat.observers import ObserverName
from lockstep.report import parser as report_parser
from lockstep.scheme import PRESETS
from lockstep.sensitivity import sensitivity_command

ROOT = Path(lockstep.__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
COMMANDS = {
    "align": cli.align,
    "calibrate": calibrate_command,
    "export": export_command,
    "inspect": inspect_command,
    "kernels": cli.kernels,
    "plan": plan_command,
    "ptq": ptq_command,
    "sensitivity": sensitivity_command,
}


def blocks(language: str) -> Iterator[Any]:
    """The fenced blocks in a language, each under its page and number."""
    for page in PAGES:
        for number, (found, source) in enumerate(FENCE.findall(page.read_text(encoding="utf-8"))):
            if found == language:
                yield pytest.param(source, id=f"{page.stem}-{number}")


def table(page: str, header: str) -> list[list[str]]:
    """The rows of the table of a page whose first headers are `header`."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith(f"| {header} |")]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def names(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


# Code ----------------------------------------------------------------------------------------------------------------


class Language(LightningModule):
    """What a reader's own LightningModule would be."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Tokenizer:
    """Saves itself, as tokenizers do."""

    def save_pretrained(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")


QUICK = {
    "accelerator": "cpu",
    "max_steps": 2,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def given(source: str) -> dict[str, Any]:
    """What a block takes for granted, by the names that it uses: a model as it needs it, data, and files."""
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    ids = token_ids()
    found: dict[str, Any] = {
        "lockstep": lockstep,
        "QATCallback": QATCallback,
        "Scheme": Scheme,
        "batch": {"input_ids": ids},
        "batches": [{"input_ids": ids, "labels": ids}],
        "token_ids": ids,
        "dataset": [{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)],
        "texts": datasets.Dataset.from_list([{"text": f"{number} times {number}"} for number in range(8)]),
        "tokenizer": tokenizer() if "processing_class=" in source else Tokenizer(),
        "data": DataLoader(ids.repeat(4, 1), batch_size=2),
        "train": lambda model: None,
        "codes": torch.zeros(64, 128, dtype=torch.int8),
        "scale": torch.ones(64, 2, dtype=torch.bfloat16),
        "fp4_codes": torch.zeros(64, 128).to(torch.float8_e4m3fn),
    }
    if "CALIBRATED" in source:
        calibrated = prepared(tiny_llama(), "FP8")
        lockstep.calibrate(calibrated, found["batches"], progress=False)
        calibrated.save_pretrained("CALIBRATED")
    if "model" in used:
        exported = re.search(r'compare\(|Checkpoint\("out"\)|export\.save_pretrained', source)
        model = tiny_llama()
        if exported and "prepare(" not in source:
            prepared(model)
        if re.search(r'compare\(|Checkpoint\("out"\)', source) and "lockstep.prepare(" not in source:
            save_pretrained(model, "out")
        if ("trainer" in used and "train_dataset=" not in source) or "model.model" in source:
            holder = Language()
            holder.model = model
            model = holder
        found["model"] = model
    elif 'Checkpoint("out")' in source:
        save_pretrained(prepared(tiny_llama()), "out")
    return found


@pytest.mark.parametrize("source", blocks("python"))
def test_code_runs_and_its_callbacks_train_and_export(source, tmp_path, monkeypatch):
    """What a reader copies has to work: also callbacks that are shown without the trainer around them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lightning, "Trainer", functools.partial(Trainer, **QUICK))
    finish = TrainingArguments.__post_init__

    def on_cpu(self: TrainingArguments) -> None:
        self.use_cpu = True
        finish(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_cpu)
    created: list[QATCallback] = []
    initialize = QATCallback.__init__

    @functools.wraps(initialize)
    def note(self: QATCallback, *args: Any, **options: Any) -> None:
        initialize(self, *args, **options)
        self.calibration_steps = min(self.calibration_steps, 1)
        created.append(self)

    monkeypatch.setattr(QATCallback, "__init__", note)
    found = given(source)
    exec(compile(source, "block", "exec"), found)
    for exported in set(re.findall(r'export_dir="(run/out)"', source)):
        assert lockstep.export.Checkpoint(exported).layers
    for callback in created if "trainer" not in found else []:
        assert isinstance(callback.scheme, Scheme)
        callback.export_dir, callback.overwrite = "out", True
        model = Language().to(callback.scheme.weights.served_dtype)
        Trainer(**QUICK, callbacks=[callback]).fit(model, DataLoader(token_ids(8), batch_size=2))
        assert lockstep.export.Checkpoint("out").layers


@pytest.mark.parametrize("source", blocks("yaml"))
def test_yaml_is_what_the_callback_reads(source):
    """In a LightningCLI config the callback stands under its class_path, or the page shows its fields alone."""
    content = yaml.safe_load(source)
    if "trainer" in content:
        callbacks = content["trainer"]["callbacks"]
    else:
        callbacks = [{"class_path": "lockstep.callbacks.QATCallback", "init_args": content}]
    asked = copy.deepcopy(callbacks[0]["init_args"]["scheme"])  # the parser changes what it is given
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    (callback,) = parser.instantiate_classes(parser.parse_object({"callbacks": callbacks})).callbacks
    if isinstance(asked, list):
        assert callback.scheme == [Rule(**rule) for rule in asked]
    else:
        assert callback.scheme == Scheme.of(asked)


def command_lines() -> Iterator[Any]:
    for block in blocks("bash"):
        for number, line in enumerate(block.values[0].splitlines()):
            if words := shlex.split(line, comments=True):
                yield pytest.param(words, id=f"{block.id}-{number}")


@pytest.mark.parametrize("words", command_lines())
def test_commands_parse(words):
    """Options that are shown exist, and make targets and scripts do."""
    match words:
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None
        case ["lockstep", "fit", "--config", path] | ["python", path, *_]:
            assert (ROOT / path).is_file()
        case ["lockstep", "report", *rest]:
            report_parser().parse_args(rest)
        case ["lockstep", command, *rest]:
            auto_parser(COMMANDS[command], as_positional=True, exit_on_error=False).parse_args(rest)
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text()
            assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
        case ["vllm" | "pip" | "source", *_]:
            pass  # not ours
        case _:
            pytest.fail(f"no idea what {words} is: say so here.")


# Names ---------------------------------------------------------------------------------------------------------------


def resolve(name: str) -> object:
    """A dotted name: the longest part that is a module, then attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        return functools.reduce(getattr, parts[length:], found)
    raise ImportError(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_and_files_that_are_named_exist(page):
    """After a rename somebody would look for them in vain."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    spans = set(re.findall(r"`([^`\n]+)`", text)) | set(re.findall(r"^::: (\S+)$", text, re.M))
    for span in spans:
        if re.fullmatch(r"lockstep(\.\w+)+", span):
            resolve(span)
        elif re.fullmatch(r"(lockstep|tests|benchmarks|docs)/[\w/.-]+\.\w+", span):
            assert (ROOT / span).is_file(), span


def test_the_reference_lists_every_public_name():
    shown = set(re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.M))
    objects = [resolve(name) for name in shown]
    for name in lockstep.__all__:
        public = getattr(lockstep, name)
        modules = {info.name for info in pkgutil.iter_modules(public.__path__)} if hasattr(public, "__path__") else ()
        inside = any(name_shown.startswith(f"lockstep.{name}.") for name_shown in shown) and modules
        assert inside or any(public is one for one in objects), f"lockstep.{name} is not in docs/api.md"


# Tables --------------------------------------------------------------------------------------------------------------


def test_every_preset_stands_in_the_table_with_the_formats_that_store_it():
    listed = {name: names(row[-1]) for row in table("docs/schemes.md", "preset") for name in names(row[0])}
    assert listed == {name: [*formats.fitting(scheme)] for name, scheme in PRESETS.items()}


def test_every_format_and_its_tensors_stand_in_the_tables():
    assert [names(row[0])[0] for row in table("docs/formats.md", "`format` | stores")] == [*formats.FORMATS]
    listed: dict[str, set[str]] = {}
    format = ""
    for row in table("docs/formats.md", "`format` | tensor"):
        format = (names(row[0]) or [format])[0]
        listed.setdefault(format, set()).update(name.removeprefix("m.") for name in names(row[1]))
    for name, writer in formats.FORMATS.items():
        schemes = [scheme for scheme in PRESETS.values() if writer.refusal(scheme) is None]
        stored = {tensor for scheme in schemes for tensor in writer.tensors(scheme.weights)}
        measured = [scheme.activations for scheme in schemes if scheme.activations and scheme.activations.stores_scale]
        static = {"input_scale"} if name == "int-quantized" else {one.scale_name for one in measured}
        assert listed[name] == stored | static, name


def test_the_callback_is_shown_with_all_of_its_arguments_and_their_defaults():
    (block,) = [block for block in blocks("python") if block.id == "callback-0"]
    (call,) = [node for node in ast.walk(ast.parse(block.values[0])) if isinstance(node, ast.Call)]
    shown = {one.arg: ast.literal_eval(one.value) for one in call.keywords}
    signature = inspect.signature(QATCallback)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in shown.items()} == defaults


def test_every_linear_kernel_stands_in_the_table():
    listed = [names(row[0])[0] for row in table("docs/alignment.md", "kernel | what it computes")]
    assert sorted(listed) == sorted(kernel.name for kernel in KERNELS if kernel.operator == "linear")


def test_the_thresholds_are_those_that_hold():
    kinds = ("grouped", "channel", "microscaled", "int8 inputs", "fp8 inputs")
    rows = dict(zip(kinds, table("docs/alignment.md", "scheme | bf16"), strict=True))
    listed = {
        (kind, dtype): float(cell.rstrip(" %")) / 100
        for kind, row in rows.items()
        for dtype, cell in zip((torch.bfloat16, torch.float16), row[1:], strict=True)
        if cell
    }
    assert listed == pytest.approx(REACHABLE_EQUAL)


def test_every_observer_and_cache_stands_in_its_table():
    assert {names(row[0])[0] for row in table("docs/ranges.md", "observer")} == {*get_args(ObserverName)}
    listed = {name for row in table("docs/ranges.md", "name") for name in names(row[0])}
    assert {name for name in listed if "(" not in name} == {*SPECS}
    for call in (name for name in listed if "(" in name):
        assert isinstance(eval(call, {"KVCacheSpec": KVCacheSpec}), KVCacheSpec)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(f": {page.name}" in navigation for page in PAGES if page.parent.name == "docs")


def test_every_test_that_the_table_names_is_there():
    """A yes in docs/support.md is a test or a recorded run of a benchmark; a renamed test is no yes."""
    page = (ROOT / "docs" / "support.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page)
    assert len(named) > 40
    missing = [
        (file, name)
        for file, name in named
        if not re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M)
    ]
    assert not missing
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[-1] != "tested by" and set(cells[0]) != {"-"}:
            recorded = re.findall(r"^recorded: `benchmarks/(\w+)(?:/\w+)?\.py`", cells[-1])
            assert "::test_" in cells[-1] or recorded, line
            assert all((ROOT / "benchmarks/results" / f"{name}_gpu.json").exists() for name in recorded), line
