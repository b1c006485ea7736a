"""The command line: a recipe that trains and exports, `align` as a gate, and messages for what cannot be used."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import lockstep.recipes
from lockstep.cli import main
from lockstep.export import Checkpoint
from lockstep.kernels import KERNELS

pytestmark = pytest.mark.filterwarnings("ignore:.*dirpath has changed.*", "ignore:.*LeafSpec")

RECIPE = Path(lockstep.recipes.__file__).with_name("int4_qat.yaml")
LAYER = "model.layers.0.mlp.down_proj"


# A recipe, from the shell ------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What ``lockstep fit`` left behind."""

    code: int
    directory: Path
    warnings: list[str]

    @property
    def masters(self) -> Path:
        return self.directory / "runs/int4_qat/masters"

    @property
    def checkpoint(self) -> Path:
        return self.directory / "runs/int4_qat/checkpoint"

    @property
    def folders(self) -> list[str]:
        return [str(self.masters), str(self.checkpoint)]


SMALL = [
    "--model.init_args.model=config",
    "--model.init_args.warmup_steps=2",
    "--data.init_args.files=[texts]",
    "--data.init_args.vocab_size=300",
    "--data.init_args.block_size=32",
    "--data.init_args.batch_size=4",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=12",
    "--trainer.val_check_interval=6",
    "--trainer.limit_val_batches=2",
    "--trainer.log_every_n_steps=1",
]


def write_inputs(directory: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    ).save_pretrained(directory / "config")
    (directory / "texts").mkdir()
    for number in range(60):
        (directory / "texts" / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 20)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """The recipe as it stands in the package, made small and started as the shell does, in an empty directory."""
    directory = tmp_path_factory.mktemp("run")
    write_inputs(directory)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        patch.chdir(directory)
        patch.setattr(sys, "argv", ["lockstep", "fit", "--config", str(RECIPE), *SMALL])
        warnings.simplefilter("always")
        code = main()
    return Run(code, directory, [str(warning.message) for warning in caught])


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def metrics(run: Run, name: str) -> list[float]:
    (path,) = run.directory.rglob("metrics.csv")
    with path.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_recipe_trains_validates_and_exports(run):
    """The first thing that a newcomer runs. All its files are under ``runs``."""
    assert run.code == 0
    losses = metrics(run, "train/loss")
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert len(metrics(run, "val/perplexity")) >= 2
    assert sorted(path.name for path in run.directory.iterdir()) == ["config", "runs", "texts"]
    assert len(Checkpoint(run.checkpoint).layers) == 7
    for folder in (run.masters, run.checkpoint):
        assert (folder / "tokenizer.json").is_file()
    assert list(run.directory.rglob("*.ckpt"))
    assert list(run.directory.rglob("events.out.tfevents*"))


def test_a_run_from_the_shell_warns_of_nothing_that_the_user_could_not_help(run):
    """LightningCLI suspects a mistake when it is handed the words of the command line twice."""
    assert not [warning for warning in run.warnings if "sys.argv" in warning]


def test_validate_repeats_the_runs_figures_from_its_checkpoint(run, monkeypatch):
    """The saved ``config.yaml`` and the trainer's checkpoint are enough to evaluate, quantized as in training."""
    monkeypatch.chdir(run.directory)
    monkeypatch.setattr(sys, "argv", ["lockstep"])
    before = metrics(run, "val/loss")[-1]
    (config,) = run.directory.rglob("config.yaml")
    again = run.directory.parent / f"{run.directory.name}-validate"
    logger = json.dumps({"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(again)}})
    (checkpoint,) = run.directory.rglob("*.ckpt")
    assert (
        main(["validate", "--config", str(config), "--ckpt_path", str(checkpoint), f"--trainer.logger={logger}"]) == 0
    )
    assert metrics(run._replace(directory=again), "val/loss") == [pytest.approx(before, rel=1e-6)]


# align -------------------------------------------------------------------------------------------------------------


def test_align_passes_what_was_exported(run, capsys):
    assert main(["align", *run.folders]) == 0
    output = capsys.readouterr().out
    assert "aligned" in output
    assert "NOT ALIGNED" not in output
    assert "end to end" in output


@pytest.fixture
def changed(run, tmp_path) -> Path:
    """The masters with one weight changed."""
    folder = copied(run.masters, tmp_path / "changed")
    weights = load_file(folder / "model.safetensors")
    weights[f"{LAYER}.weight"][5, 7] += 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_align_fails_and_names_the_layer_when_one_weight_has_changed(run, changed, tmp_path, capsys):
    """What CI is there for: exit code 1, and the layer in a line that can be searched for."""
    assert main(["align", str(changed), str(run.checkpoint), "--json", str(tmp_path / "report.json")]) == 1
    output = capsys.readouterr().out
    assert "NOT ALIGNED" in output
    assert f"{LAYER}: " in output
    failures = json.loads((tmp_path / "report.json").read_text())["failures"]
    assert [failure.partition(":")[0] for failure in failures if not failure.startswith("end to end")] == [LAYER]


def test_align_fails_on_a_plain_tensor_that_has_changed(run, tmp_path, capsys):
    """Norms and embeddings are served too."""
    folder = copied(run.checkpoint, tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["align", str(run.masters), str(folder)]) == 1
    assert "model.norm.weight: 1 of 128 values differ" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [False, True])
def test_reports_are_written_whatever_the_verdict(run, changed, tmp_path, changes):
    """The report of a failure is the one that is read."""
    html, report = tmp_path / "report.html", tmp_path / "report.json"
    masters = changed if changes else run.masters
    code = main(["align", str(masters), str(run.checkpoint), "--html", str(html), "--json", str(report)])
    content = json.loads(report.read_text())
    assert content["aligned"] is not changes
    assert code == int(changes)
    assert {layer["name"] for layer in content["layers"]} == set(Checkpoint(run.checkpoint).layers)
    assert LAYER in html.read_text()
    assert ("not aligned" in html.read_text().lower()) is changes


def test_text_and_max_tokens_say_what_the_model_is_run_on(run, tmp_path):
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 100)

    def positions(*options: str) -> int:
        report = tmp_path / "report.json"
        assert main(["align", *run.folders, "--json", str(report), *options]) == 0
        return json.loads(report.read_text())["end_to_end"]["positions"]

    assert positions("--text", str(tmp_path / "text.txt"), "--max_tokens", "40") == 39
    assert positions("--max_tokens", "130") == 2 * 63  # blocks of the model's 64 positions


def test_ignore_and_targets_are_those_of_prepare(run, capsys):
    """A layer that is stored quantized but did not train so is a gap."""
    assert main(["align", *run.folders, "--ignore", f"[lm_head,{LAYER}]"]) == 1
    assert f"{LAYER}.weight: is not in the checkpoint" in capsys.readouterr().out
    assert main(["align", *run.folders, "--targets", "[re:.*proj$]"]) == 0


def test_a_scheme_other_than_the_checkpoints_is_a_gap(run, capsys):
    """Without --scheme the checkpoint's own word is taken for what was trained."""
    declared = Checkpoint(run.checkpoint).scheme
    code = main(["align", *run.folders, "--scheme", "W4A16"])
    assert code == int(declared != lockstep.Scheme.preset("W4A16"))
    assert ("NOT ALIGNED" in capsys.readouterr().out) is bool(code)


def test_align_runs_on_the_device_that_it_is_told(run, tmp_path):
    """A CI machine with a busy GPU, or a report for the CPU's kernel."""
    report = tmp_path / "report.json"
    assert main(["align", *run.folders, "--device", "cpu", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["environment"]["device"].startswith("cpu")


# What cannot be used -----------------------------------------------------------------------------------------------


def truncated(run: Run, folder: Path, tmp_path: Path) -> str:
    broken = copied(folder, tmp_path / "broken")
    os.truncate(broken / "model.safetensors", 1000)
    return str(broken)


def without_tokenizer(run: Run, tmp_path: Path) -> str:
    folder = copied(run.masters, tmp_path / "no-tokenizer")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return str(folder)


def short(tmp_path: Path) -> str:
    (tmp_path / "short.txt").write_text("x")
    return str(tmp_path / "short.txt")


BAD = {
    "model-missing": (lambda run, tmp: ["nowhere", str(run.checkpoint)], "nowhere"),
    "checkpoint-missing": (lambda run, tmp: [str(run.masters), "nowhere"], "nowhere/config.json: No such file"),
    "not-quantized": (lambda run, tmp: [str(run.masters)] * 2, "masters/config.json has no quantization_config"),
    "checkpoint-truncated": (
        lambda run, tmp: [str(run.masters), truncated(run, run.checkpoint, tmp)],
        "broken/model.safetensors is missing, truncated",
    ),
    "model-truncated": (lambda run, tmp: [truncated(run, run.masters, tmp), str(run.checkpoint)], "broken"),
    "no-tokenizer": (lambda run, tmp: [without_tokenizer(run, tmp), str(run.checkpoint)], "tokenizer"),
    "kernel": (lambda run, tmp: [*run.folders, "--kernel", "fast"], "kernel 'fast': there are reference"),
    "kernel-in-brackets": (lambda run, tmp: [*run.folders, "--kernel", "[fast]"], "kernel '[fast]'"),
    "kernel-in-markup": (lambda run, tmp: [*run.folders, "--kernel", "[/fast]"], "kernel '[/fast]'"),
    "kernel-elsewhere": (lambda run, tmp: [*run.folders, "--kernel", "torch-int4"], "'torch-int4' cannot compute"),
    "scheme": (lambda run, tmp: [*run.folders, "--scheme", "W4A61"], "no preset 'W4A61': near ones are W4A16"),
    "targets": (lambda run, tmp: [*run.folders, "--targets", "[Linera]"], "'Linera' matches no module: near ones"),
    "text-missing": (lambda run, tmp: [*run.folders, "--text", "nowhere.txt"], "nowhere.txt"),
    "text-short": (lambda run, tmp: [*run.folders, "--text", short(tmp)], "too few"),
    "device": (lambda run, tmp: [*run.folders, "--device", "toaster"], "toaster"),
    "report": (lambda run, tmp: [*run.folders, "--html", str(tmp / "report.pdf")], "a report is saved as"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_input_that_cannot_be_used_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, capsys, arguments, message):
    """Not 1, which says that the checkpoint has a gap, and no traceback, in which nobody finds the reason."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["align", *arguments(run, tmp_path)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "Loading weights" not in line]
    assert message in lines[-1]
    assert len(lines) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_align_on_a_gpu_that_is_not_there_is_one_line_and_exit_code_2(run, capsys):
    assert main(["align", *run.folders, "--device", "cuda"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "Loading weights" not in line]
    assert len(lines) == 1
    assert "CUDA" in lines[0]


@pytest.mark.parametrize("arguments", [["align"], ["align", "model"], ["align", "a", "b", "--kernels", "x"]])
def test_words_that_do_not_parse_are_a_usage_error(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: lockstep align" in capsys.readouterr().err


# kernels, usage, the console script --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels_shows_every_kernel_and_why_it_cannot_run(monkeypatch, capsys, device):
    """Also for a device that this machine does not have."""
    monkeypatch.setenv("COLUMNS", "400")  # no cell of the table is folded
    assert main(["kernels", "--device", device]) == 0
    output = capsys.readouterr().out
    spec = lockstep.Scheme().weights
    header = next(line for line in output.splitlines() if "operator" in line)
    cells = [cell.strip() for cell in re.split("[┃│]", header) if cell.strip()]
    assert cells == ["operator", "kernel", "serves", f"{spec} on {device}", "comes from"]
    for kernel in KERNELS:
        (line,) = [
            line for line in output.splitlines() if f" {kernel.operator} " in line and f" {kernel.name} " in line
        ]
        reason = kernel.unavailable(spec, torch.device(device))
        assert (f"no: {reason}" if reason else "yes") in line
        assert kernel.serves in line
        assert line.rstrip(" │┃").endswith(kernel.origin() or "not installed")


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--scheme", "W8A8"], "not trained by Lockstep yet"), (["--device", "toaster"], "toaster")],
)
def test_kernels_refuses_what_does_not_exist(capsys, options, message):
    assert main(["kernels", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"), [([], 0), (["--help"], 0), (["-h"], 0), (["train"], 2), (["--verbose"], 2)]
)
def test_usage_lists_every_command(capsys, arguments, code):
    """On stdout when it was asked for, on stderr when it was not."""
    assert main(arguments) == code
    output = capsys.readouterr()
    assert all(command in (output.err if code else output.out) for command in ("fit", "validate", "align", "kernels"))
    assert not (output.out if code else output.err)


@pytest.mark.parametrize(("command", "word"), [("align", "checkpoint"), ("kernels", "device"), ("fit", "--config")])
def test_each_command_explains_itself(monkeypatch, capsys, command, word):
    monkeypatch.setattr(sys, "argv", ["lockstep"])
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert word in capsys.readouterr().out


def test_console_script_hands_its_exit_code_to_the_shell(run, changed):
    """A gate whose code is lost in the script passes everything."""
    script = Path(sys.executable).with_name("lockstep")
    if not script.exists():
        pytest.skip("the package is not installed here")
    result = subprocess.run(
        [script, "align", str(changed), str(run.checkpoint)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stderr
    assert f"{LAYER}: " in result.stdout
