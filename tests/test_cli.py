"""The command line: a recipe that trains and exports, `align` as a gate, and messages for what cannot be used."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import lockstep.recipes
from lockstep import Scheme
from lockstep.callbacks import QATCallback
from lockstep.cli import main
from lockstep.export import Checkpoint
from lockstep.kernels import KERNELS
from lockstep.loading import load_scales

pytestmark = pytest.mark.filterwarnings("ignore:.*dirpath has changed.*", "ignore:.*LeafSpec")

RECIPE, FP8_RECIPE = (Path(lockstep.recipes.__file__).with_name(f"{name}_qat.yaml") for name in ("int4", "fp8"))
LAYER = "model.layers.0.mlp.down_proj"
COMMANDS = (
    *("fit", "validate", "test", "predict", "align", "calibrate", "export", "inspect", "sensitivity", "plan"),
    *("kernels", "ptq", "report"),
)


# A recipe, from the shell ------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What ``lockstep fit`` left behind."""

    code: int
    directory: Path
    warnings: list[str]
    name: str = "int4_qat"

    @property
    def masters(self) -> Path:
        return self.directory / "runs" / self.name / "masters"

    @property
    def checkpoint(self) -> Path:
        return self.directory / "runs" / self.name / "checkpoint"

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


def fitted(directory: Path, config: Path, *options: str) -> Run:
    """A recipe made small and started as the shell does, in an empty directory."""
    directory.mkdir(exist_ok=True)
    write_inputs(directory)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        patch.chdir(directory)
        patch.setattr(sys, "argv", ["lockstep", "fit", "--config", str(config), *SMALL, *options])
        warnings.simplefilter("always")
        code = main()
    return Run(code, directory, [str(warning.message) for warning in caught], config.stem)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """The recipe as it stands in the package."""
    return fitted(tmp_path_factory.mktemp("run"), RECIPE)


def variant(directory: Path, **fields: Any) -> Path:
    """The FP8 recipe with other fields of its `QATCallback`."""
    content = yaml.safe_load(FP8_RECIPE.read_text())
    content["trainer"]["callbacks"][0]["init_args"] |= fields
    path = directory / FP8_RECIPE.name
    path.write_text(yaml.safe_dump(content))
    return path


STATIC = {"scheme": "FP8", "kv_cache": "fp8", "calibration_steps": 4}  # what the recipe's comment says


@pytest.fixture(scope="module")
def static(tmp_path_factory) -> Run:
    """The FP8 recipe with measured ranges and a quantized cache."""
    config = variant(tmp_path_factory.mktemp("config"), **STATIC)
    return fitted(tmp_path_factory.mktemp("static"), config)


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


def test_the_recipe_that_starts_from_gptq_trains_and_exports_its_scales(run, tmp_path, capsys):
    recipe = RECIPE.with_name("int4_qad_from_gptq.yaml")
    masters, start = str(run.masters), tmp_path / "gptq"
    (command,) = re.findall(r"lockstep ptq runs/bf16 runs/gptq (.*)", recipe.read_text())
    options = [*shlex.split(command), "--device=cpu", "--max_tokens=64", f"--text={run.directory / 'texts' / '0.py'}"]
    assert main(["ptq", masters, str(start), *options]) == 0
    content = yaml.safe_load(recipe.read_text())
    content["trainer"]["callbacks"][0]["init_args"]["teacher"]["model"] = masters
    (tmp_path / recipe.name).write_text(yaml.safe_dump(content))
    places = (f"--model.init_args.model={start}", f"--data.init_args.tokenizer={masters}")
    found = fitted(tmp_path / "run", tmp_path / recipe.name, *places)
    assert found.code == 0
    trained = Checkpoint(found.checkpoint)
    assert len(trained.layers) == 7
    began = load_file(start / "model.safetensors")
    scale, before = trained.layer(LAYER).scale, began[f"{LAYER}.weight_scale"].bfloat16()
    assert not scale.equal(before)
    assert torch.allclose(scale.float(), before.float(), rtol=0.05)


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


def test_the_fp8_recipe_trains_exports_and_aligns_as_it_stands(tmp_path, capsys):
    run = fitted(tmp_path, FP8_RECIPE)
    assert run.code == 0
    losses = metrics(run, "train/loss")
    assert losses[-1] < losses[0]
    checkpoint = Checkpoint(run.checkpoint)
    assert checkpoint.scheme == Scheme.preset("FP8_DYNAMIC")
    assert len(checkpoint.layers) == 7
    assert main(["align", *run.folders]) == 0
    assert "NOT ALIGNED" not in capsys.readouterr().out


def test_the_comment_in_the_fp8_recipe_says_what_static_takes():
    """Taken out of its comment and put in the place of the dynamic scheme, it is a run that works: `static`."""
    lines = [line.strip().removeprefix("#").strip() for line in FP8_RECIPE.read_text().splitlines() if "#   " in line]
    said = yaml.safe_load("\n".join(line for line in lines if re.match(r"\w+: ", line)))
    assert said.keys() == STATIC.keys()
    assert {**said, "calibration_steps": 4} == STATIC


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
    assert code == int(declared != Scheme.preset("W4A16"))
    assert ("NOT ALIGNED" in capsys.readouterr().out) is bool(code)


def test_align_runs_on_the_device_that_it_is_told(run, tmp_path):
    """A CI machine with a busy GPU, or a report for the CPU's kernel."""
    report = tmp_path / "report.json"
    assert main(["align", *run.folders, "--device", "cpu", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["environment"]["device"].startswith("cpu")


def test_align_knows_the_scales_that_were_measured_in_training(static, tmp_path, capsys):
    """They are in the masters' folder, under keys that transformers leaves out; the checkpoint's cache counts too."""
    assert static.code == 0
    assert Checkpoint(static.checkpoint).kv_cache is not None
    assert main(["align", *static.folders]) == 0
    assert main(["align", *static.folders, "--scheme", "FP8"]) == 0
    assert "NOT ALIGNED" not in capsys.readouterr().out
    folder = copied(static.masters, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.input_scale"] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["align", str(folder), str(static.checkpoint)]) == 1
    assert f"{LAYER}: input_scale is [" in capsys.readouterr().out


def without(folder: Path, to: Path, key: str) -> Path:
    """A copy of the masters without a tensor."""
    folder = copied(folder, to)
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("key", [f"{LAYER}.input_scale", "model.layers.0.self_attn.v_scale"])
def test_align_without_the_scales_says_which_and_how_to_get_them(static, tmp_path, capsys, key):
    folder = without(static.masters, tmp_path / "masters", key)
    assert main(["align", str(folder), str(static.checkpoint)]) == 2
    assert f"masters stores no {key}: run lockstep calibrate" in last_line(capsys)


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0])
def test_align_refuses_scales_that_are_none(static, tmp_path, capsys, value):
    folder = copied(static.masters, tmp_path / "masters")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.input_scale"].fill_(value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["align", str(folder), str(static.checkpoint)]) == 2
    assert f"{LAYER}.input_scale is not positive float32" in last_line(capsys)


def test_align_of_a_recipe_takes_each_layers_scheme_from_the_checkpoint(tmp_path, capsys):
    """And finds a layer that trained as something else, if it is told what they trained as."""
    recipe = [{"targets": ["re:.*down_proj"], "scheme": "W8A8"}, {"targets": ["Linear"], "scheme": "FP8_DYNAMIC"}]
    run = fitted(tmp_path / "run", variant(made(tmp_path / "config"), scheme=recipe))
    assert Checkpoint(run.checkpoint).scheme_of(LAYER) == Scheme.preset("W8A8")
    assert main(["align", *run.folders]) == 0
    assert main(["align", *run.folders, "--scheme", json.dumps(recipe)]) == 0
    assert "NOT ALIGNED" not in capsys.readouterr().out
    assert main(["align", *run.folders, "--scheme", "FP8_DYNAMIC"]) == 1
    assert f"{LAYER}: " in capsys.readouterr().out


def test_align_knows_scales_that_were_learned(tmp_path, capsys):
    run = fitted(tmp_path / "run", variant(made(tmp_path / "config"), scheme="W4A16", learned_scales=True))
    assert f"{LAYER}.weight_scale" in load_file(run.masters / "model.safetensors")
    assert main(["align", *run.folders]) == 0
    assert "NOT ALIGNED" not in capsys.readouterr().out


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def last_line(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "Loading weights" not in line]
    return lines[-1]


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


# calibrate ---------------------------------------------------------------------------------------------------------


def test_calibrate_writes_a_folder_to_train_and_align_from(run, tmp_path, capsys, monkeypatch):
    """The way of a user who has a model and wants FP8: calibrate, fit from the folder, align what comes of it."""
    out, report = tmp_path / "calibrated", tmp_path / "ranges.json"
    options = ["--kv_cache", "fp8", "--steps", "2", "--max_tokens", "64", "--json", str(report)]
    assert main(["calibrate", str(run.masters), str(out), *options]) == 0
    output = capsys.readouterr().out
    assert f"written: {out}" in output
    assert f"written: {report}" in output
    rows = json.loads(report.read_text())["rows"]
    assert {row["name"] for row in rows} == set(Checkpoint(run.checkpoint).layers)
    assert (out / "tokenizer.json").is_file()
    masters = load_file(run.masters / "model.safetensors")
    assert {key: masters[key].shape for key in masters} == {
        key: tensor.shape for path in out.glob("model-0*.safetensors") for key, tensor in load_file(path).items()
    }

    config = variant(made(tmp_path / "config"), scheme="FP8", kv_cache="fp8")
    trained = fitted(made(tmp_path / "run"), config, f"--model.init_args.model={out}")
    assert trained.code == 0
    stored = load_file(trained.checkpoint / "model.safetensors")
    measured = load_file(out / "model-input-scales.safetensors")
    assert len(measured) == 7 + 2
    assert all(torch.equal(stored[key].flatten(), scale.flatten()) for key, scale in measured.items())
    assert main(["align", *trained.folders]) == 0
    assert main(["align", str(out), str(trained.checkpoint)]) == 1  # it was trained since
    exported(out, tmp_path / "export")
    assert main(["align", str(out), str(tmp_path / "export")]) == 0


def exported(folder: Path, to: Path) -> None:
    """An export of a calibrated folder as it is."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    lockstep.prepare(model, "FP8")
    keys = load_scales(model, folder)
    assert len(keys) == 7
    lockstep.export.save_pretrained(model, to)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "W4A16"], "no layer stores an input scale"),
        (["--scheme", "FP9"], "no preset 'FP9'"),
        (["--observer", "max"], None),
        (["--kv_cache", "fp4"], "no KV cache format 'fp4'"),
        (["--steps", "0"], "needs at least one of each"),
        (["--json", "report.txt"], "a calibration report is saved as .json"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--targets", "[Linera]"], "'Linera' matches no module"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_calibrate_refuses_in_one_line_and_writes_nothing(run, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    arguments = ["calibrate", str(run.masters), "out", *options]
    if message is None:  # a choice of words, which the parser refuses with the words that there are
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert "percentile" in capsys.readouterr().err
    else:
        assert main(arguments) == 2
        assert message in last_line(capsys)
    assert not list(tmp_path.iterdir())


def test_calibrate_leaves_what_is_there_alone(run, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["calibrate", str(run.masters), str(tmp_path)]) == 2
    assert "not empty" in last_line(capsys)
    assert main(["calibrate", "nowhere", str(tmp_path / "out")]) == 2
    assert "nowhere is not a folder" in last_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# sensitivity -------------------------------------------------------------------------------------------------------


def test_sensitivity_writes_its_report_its_plot_and_a_recipe_that_trains(run, tmp_path, capsys):
    """The recipe goes into a config as it is, and the model that it makes fits the budget."""
    report, plot, recipe = (tmp_path / name for name in ("report.json", "plot.png", "recipe.yaml"))
    options = ["--schemes", "[W4A16,W8A8]", "--budget", "60kB", "--max_tokens", "256"]
    written = ["--json", str(report), "--plot", str(plot), "--recipe", str(recipe)]
    assert main(["sensitivity", str(run.masters), *options, *written]) == 0
    output = capsys.readouterr().out
    assert all(f"written: {path}" in output for path in (report, plot, recipe))
    assert plot.read_bytes().startswith(b"\x89PNG")
    costs = json.loads(report.read_text())["costs"]
    assert {cost["scheme"] for cost in costs} == {"-", "W4A16", "W8A8"}
    assert len({cost["unit"] for cost in costs}) == 4

    rules = yaml.safe_load(recipe.read_text())
    assert {layer for rule in rules for layer in rule["targets"]} == set(Checkpoint(run.checkpoint).layers)
    chosen = {(layer, rule["scheme"] or "-") for rule in rules for layer in rule["targets"]}
    sizes = [cost["bytes"] for cost in costs if (cost["layers"][0], cost["scheme"]) in chosen]
    assert len(sizes) == 4
    assert sum(sizes) <= 60_000
    assert None not in {rule["scheme"] for rule in rules}  # the smallest unit in bf16 would not fit
    trained = fitted(made(tmp_path / "run"), variant(made(tmp_path / "config"), scheme=rules))
    assert trained.code == 0
    assert {(name, Checkpoint(trained.checkpoint).scheme_of(name)) for name, _ in chosen} == {
        (name, Scheme.preset(scheme)) for name, scheme in chosen
    }


def test_a_recipe_that_leaves_layers_as_they_are_is_read_back(run, tmp_path):
    """With room enough the best is to quantize only what gains by it, or nothing."""
    from jsonargparse import ArgumentParser

    recipe = tmp_path / "recipe.yaml"
    options = ["--schemes", "[W4A16]", "--budget", "1MB", "--max_tokens", "256", "--recipe", str(recipe)]
    assert main(["sensitivity", str(run.masters), *options]) == 0
    rules = yaml.safe_load(recipe.read_text())
    assert None in {rule["scheme"] for rule in rules}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(QATCallback, "callback")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"callback": {"scheme": rules}}))
    callback = parser.instantiate(parser.parse_path(tmp_path / "config.yaml")).callback
    assert [(list(rule.targets), rule.scheme) for rule in callback.scheme] == [
        (rule["targets"], rule["scheme"]) for rule in rules
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "recipe.yaml"], "--recipe recipe.yaml needs --budget"),
        (["--budget", "1kB", "--recipe", "recipe.yaml"], "no assignment takes 1,000 bytes or less: the smallest takes"),
        (["--budget", "much"], "budget"),
        (["--schemes", "[FP8]"], "FP8 has measured input ranges"),
        (["--schemes", "[W4A61]"], "no preset 'W4A61'"),
        (["--json", "report.txt"], "a sensitivity report is saved as"),
        (["--ignore", "[re:.*]"], "nothing to quantize"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_sensitivity_refuses_in_one_line_and_writes_nothing(run, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["sensitivity", str(run.masters), "--max_tokens", "64", *options]) == 2
    assert message in last_line(capsys)
    assert not list(tmp_path.iterdir())


# plan --------------------------------------------------------------------------------------------------------------


def test_plan_reads_a_folder_or_a_config_and_shows_its_arithmetic(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    outputs = []
    for model in (run.masters, run.masters / "config.json"):
        assert main(["plan", str(model), "--scheme", "FP8_DYNAMIC", "--kv", "fp8", "--context", "64"]) == 0
        outputs.append([line for line in capsys.readouterr().out.splitlines() if "│" in line])
    assert outputs[0] == outputs[1]
    assert all(any(word in line for line in outputs[0]) for word in ("codes", "KV cache", "saved activations", "H200"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["MASTERS", "--scheme", "FP9"], "no preset 'FP9'"),
        (["MASTERS", "--kv", "fp4"], "fp4"),
        (["MASTERS", "--context", "long"], "'long' is no number of tokens"),
        (["MASTERS", "--targets", "[Linera]"], "'Linera' matches no module"),
        (["CHECKPOINT"], "is quantized already"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_plan_refuses_in_one_line(run, monkeypatch, capsys, arguments, message):
    places = {"MASTERS": str(run.masters), "CHECKPOINT": str(run.checkpoint)}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["plan", *(places.get(word, word) for word in arguments)]) == 2
    assert message in last_line(capsys)


# kernels, usage, the console script --------------------------------------------------------------------------------


def test_export_gives_the_bits_of_the_recipe_and_inspect_reads_them(run, tmp_path, capsys):
    """From the masters that the run saved, to the tensors and the scheme that it exported itself."""
    masters, checkpoint = run.folders
    how = ["--scheme", "{weights: {group_size: 64}}", "--workers", "1"]
    assert main(["export", masters, str(tmp_path / "out"), *how]) == 0
    printed = capsys.readouterr().out
    assert f"written: {tmp_path / 'out'}" in printed
    ours, wanted = (load_file(Path(folder) / "model.safetensors") for folder in (tmp_path / "out", checkpoint))
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in ours)
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "int4 g64 amax/7 bfloat16" in capsys.readouterr().out
    assert main(["export", masters, str(tmp_path / "out"), *how]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert "is quantized already" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels_shows_every_kernel_and_why_it_cannot_run(monkeypatch, capsys, device):
    """Also for a device that this machine does not have."""
    monkeypatch.setenv("COLUMNS", "400")  # no cell of the table is folded
    assert main(["kernels", "--device", device]) == 0
    output = capsys.readouterr().out
    scheme = Scheme()
    header = next(line for line in output.splitlines() if "operator" in line)
    cells = [cell.strip() for cell in re.split("[┃│]", header) if cell.strip()]
    assert cells == ["operator", "kernel", "serves", f"{scheme} on {device}", "comes from"]
    for kernel in KERNELS:
        (line,) = [
            line for line in output.splitlines() if f" {kernel.operator} " in line and f" {kernel.name} " in line
        ]
        reason = kernel.unavailable(scheme, torch.device(device))
        assert (f"no: {reason}" if reason else "yes") in line
        assert kernel.serves in line
        assert line.rstrip(" │┃").endswith(kernel.origin() or "not installed")


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--scheme", "W2A16"], "not trained by Lockstep yet"), (["--device", "toaster"], "toaster")],
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
    assert all(command in (output.err if code else output.out) for command in COMMANDS)
    assert not (output.out if code else output.err)


EXPLAINED = {
    "align": "checkpoint",
    "calibrate": "observer",
    "export": "max_shard_size",
    "inspect": "over how many GPUs",
    "sensitivity": "budget",
    "plan": "context",
    "kernels": "device",
    "ptq": "smoothquant",
    "report": "runs",
    "fit": "--config",
}


@pytest.mark.parametrize(("command", "word"), EXPLAINED.items())
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
