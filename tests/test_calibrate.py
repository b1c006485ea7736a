"""Calibration: the scales of a whole model, the report, and the folder that ``lockstep calibrate`` writes."""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jsonargparse import auto_cli
from models import TinyMlp, prepared, tiny_llama, token_ids
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_observers import run_ranks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import lockstep
from lockstep import KVCacheSpec, Scheme
from lockstep.calibrate import SCALES, CalibrationReport, calibrate, calibrate_command
from lockstep.export import ExportError
from lockstep.loading import load_scales
from lockstep.qat import kv_cache
from lockstep.qat.observers import observe

LAYERS = ["first", "second"]
INDEX = "model.safetensors.index.json"


def inputs(batches: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 128, generator=generator).bfloat16() for _ in range(batches)]


def scales(model: nn.Module) -> dict[str, float]:
    return {key: value.item() for key, value in model.state_dict().items() if key.endswith("_scale")}


# A model -------------------------------------------------------------------------------------------------------------


def test_calibrated_model_computes_and_the_report_says_what_was_found():
    model, batches = prepared(TinyMlp(), "FP8"), inputs()
    report = calibrate(model, batches)
    assert (report.observer, report.batches) == ("minmax", 3)
    assert [row.name for row in report.rows] == LAYERS
    first = report.rows[0]
    assert first.range == torch.stack(batches).abs().max().item()
    assert first.scale == model.first.input_scale.item() == (torch.tensor(first.range) / torch.tensor(448.0)).item()
    assert first.clipped == 0
    assert model(batches[0]).isfinite().all()
    assert model.first.observer is None
    for text in (*LAYERS, "minmax", f"{first.range:.4g}", "0.000%"):
        assert text in str(report)


def test_outlier_channels_are_found():
    """Which ones, and how far: what decides between a static and a dynamic scheme."""
    model, batches = prepared(TinyMlp(), "FP8"), [torch.ones(4, 128).bfloat16(), torch.ones(2, 3, 128).bfloat16()]
    batches[0][2, 37] = -300
    batches[1][0, 1, 5] = 40
    batches[1][:, :, 40:] = 0
    batches[0][:, 40:] = 0  # most channels are dead, and say nothing of the others
    row = calibrate(model, batches).rows[0]
    assert [(outlier.channel, outlier.ratio) for outlier in row.outliers[:2]] == [(37, 300), (5, 40)]
    assert [outlier.ratio for outlier in row.outliers[2:]] == [1, 1, 1]


@pytest.mark.parametrize("observer", ["minmax", "percentile", "moving_average", "mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_share_of_clipped_inputs(observer, dtype):
    """Counted on the inputs themselves, whatever the observer keeps; in bf16, as the report says."""
    model = prepared(TinyMlp(dtype=dtype), Scheme.preset("FP8", served_dtype=dtype))
    batches = [x.to(dtype) * 1.5**number for number, x in enumerate(inputs(6))]
    row = calibrate(model, batches, observer).rows[0]
    beyond = torch.stack(batches).abs().bfloat16() > torch.tensor(row.range).bfloat16()
    assert row.clipped == beyond.double().mean().item()
    assert (row.clipped == 0) == (observer == "minmax")


def test_second_calibration_gives_the_same_as_the_first():
    """The inputs of the second layer are not those behind a quantized first one."""
    model = prepared(TinyMlp(), "NVFP4")
    first, second = calibrate(model, inputs(), "mse"), calibrate(model, inputs(), "mse")
    assert first == second


def test_layers_that_engines_fuse_have_one_range_in_the_report():
    model = prepared(tiny_llama(), "FP8")
    rows = {row.name: row for row in calibrate(model, [{"input_ids": token_ids()}], "mse").rows}
    assert len(rows) == 14
    for block in ("model.layers.0.", "model.layers.1."):
        assert len({rows[f"{block}self_attn.{part}_proj"].scale for part in "qkv"}) == 1
        assert rows[f"{block}mlp.gate_proj"].scale == rows[f"{block}mlp.up_proj"].scale
    assert model(token_ids()).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["list", "one", "mapping", "generator", "loader"])
def test_batches_of_every_kind(kind):
    x = token_ids(4)
    given = {
        "list": [x[:2], x[2:]],
        "one": x,
        "mapping": {"input_ids": x, "attention_mask": torch.ones_like(x), "use_cache": False},
        "generator": ({"input_ids": one} for one in x.split(1)),
        "loader": DataLoader([{"input_ids": one} for one in x], batch_size=2),
    }[kind]
    model, other = prepared(tiny_llama(), "FP8"), prepared(tiny_llama(), "FP8")
    calibrate(model, given)
    calibrate(other, [x])
    assert scales(model) == pytest.approx(scales(other), rel=0.02)  # batches of other sizes round otherwise


def test_steps_takes_no_batch_too_many():
    """From a stream that has no end, and leaves the next batch in it."""
    stream = iter(inputs(9))
    assert calibrate(prepared(TinyMlp(), "FP8"), stream, steps=4).batches == 4
    assert len(list(stream)) == 5
    assert calibrate(prepared(TinyMlp(), "FP8"), inputs(2), steps=4).batches == 2


def test_modes_are_restored_module_by_module():
    model = prepared(TinyMlp(), "FP8")
    model.train()
    model.norm.eval()
    seen = []
    handle = model.norm.register_forward_hook(
        lambda module, *_: seen.append((module.training, model.training, torch.is_grad_enabled()))
    )
    calibrate(model, inputs(1))
    handle.remove()
    assert seen == [(False, False, False)]
    assert (model.training, model.norm.training, model.first.training) == (True, False, True)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fp32_masters_are_measured_as_they_train():
    """Under autocast to the served dtype; the scales themselves stay in fp32."""
    model, x = prepared(TinyMlp(dtype=torch.float32), "FP8"), inputs()[0].float()
    row = calibrate(model, [x]).rows[1]
    seen = []
    model.second.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    observe(model)
    with torch.no_grad():
        model(x)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    alone, under_autocast = (one.abs().max().item() for one in seen)
    assert row.range == under_autocast != alone
    assert model.second.input_scale.dtype == torch.float32


class Stop(Exception):
    """Raised by a data loader that fails."""


def failing(fault: str):
    yield inputs()[0]
    match fault:
        case "loader":
            raise Stop("the data loader failed")
        case "kind":
            yield [inputs()[0]]
        case "NaN":
            yield inputs()[0] * math.nan
        case "interrupt":
            raise KeyboardInterrupt


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("loader", Stop, "the data loader failed"),
        ("kind", TypeError, r"a batch is a mapping \(model\(\*\*batch\)\) or a tensor, found list"),
        ("NaN", ValueError, "the inputs of first held NaN or infinite"),
        ("interrupt", KeyboardInterrupt, None),
    ],
)
def test_nothing_is_half_calibrated(fault, error, message, calibrated):
    """The scales are the old ones, or none; the layers quantize again, in the mode that they were in."""
    model = prepared(TinyMlp(), "FP8")
    if calibrated:
        calibrate(model, inputs(seed=1))
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        calibrate(model, failing(fault))
    assert model.training
    assert [model.get_submodule(name).observer for name in LAYERS] == [None, None]
    for key, value in model.state_dict().items():
        assert value.equal(before[key]) or (value.isnan().all() and before[key].isnan().all()), key
    if calibrated:
        assert model(inputs()[0]).isfinite().all()
    else:
        with pytest.raises(ValueError, match=r"first\.input_scale is not measured"):
            model(inputs()[0])


def test_no_batches_is_an_error_that_names_a_layer():
    with pytest.raises(ValueError, match="the inputs of first were never seen: no batch got there"):
        calibrate(prepared(TinyMlp(), "FP8"), [])


@pytest.mark.parametrize(("scheme", "strategy"), [("FP8", "tensor"), ("FP8_DYNAMIC", "head"), ("W4A16", "tensor")])
def test_static_kv_cache_is_calibrated_along(scheme, strategy):
    """Neither could be measured alone: each needs forwards, and those need the other's scales."""
    model, ids = prepared(tiny_llama(), scheme), token_ids()
    kv_cache.prepare_kv_cache(model, KVCacheSpec("fp8_e4m3", strategy))
    report = calibrate(model, [ids], "percentile")
    assert len(report.rows) == (14 if scheme == "FP8" else 0)
    assert len(report.kv_scales) == 4
    attention = model.model.layers[1].self_attn
    assert report.kv_scales["model.layers.1.self_attn.v_scale"] == attention.v_scale.flatten().tolist()
    assert attention.v_scale.numel() == (2 if strategy == "head" else 1)
    assert "model.layers.1.self_attn.v_scale" in str(report)
    assert model(ids).logits.isfinite().all()


def test_scales_of_inputs_are_not_written_without_those_of_keys_and_values():
    """Values of zero are found last, when the inputs are frozen already."""
    model = prepared(tiny_llama(), "FP8")
    kv_cache.prepare_kv_cache(model, "fp8")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.v_proj.weight)
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: (torch.ones_like(args[0]),))
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: (torch.ones_like(args[0]),))
    with pytest.raises(ValueError, match=r"the values of model\.layers\.0\.self_attn have the range 0"):
        calibrate(model, [token_ids()])
    assert all(math.isnan(scale) for scale in scales(model).values())
    assert model.model.layers[0].self_attn.kv_cache.observer is None


def test_models_without_scales_are_refused():
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrate(prepared(TinyMlp(), "W4A16"), inputs())


@pytest.mark.parametrize(
    ("terminal", "progress", "shown"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_progress_is_shown_on_terminals_alone(monkeypatch, capsys, terminal, progress, shown):
    """A log file full of bars helps nobody."""
    monkeypatch.setattr(Console, "is_terminal", terminal)
    calibrate(prepared(TinyMlp(), "FP8"), inputs(), progress=progress)
    output = capsys.readouterr()
    assert output.out == ""
    assert ("3/3" in output.err) == shown


def test_report_is_saved_as_json(tmp_path):
    report = calibrate(prepared(TinyMlp(), "FP8"), inputs(), "percentile")
    path = report.save(tmp_path / "reports" / "ranges.json")
    read = json.loads(path.read_text())
    assert (read["observer"], read["batches"]) == ("percentile", 3)
    for row, stored in zip(report.rows, read["rows"], strict=True):
        assert (stored["name"], stored["range"], stored["scale"]) == (row.name, row.range, row.scale)
        assert stored["outliers"][0] == {"channel": row.outliers[0].channel, "ratio": row.outliers[0].ratio}
    with pytest.raises(ValueError, match=r"saved as \.json"):
        CalibrationReport("minmax", 0, ()).save(tmp_path / "ranges.txt")


RANK = """
import json, torch, torch.distributed as dist
from pathlib import Path
from lockstep.calibrate import calibrate
from models import TinyMlp, prepared

dist.init_process_group("gloo")
here, rank = Path(__file__).parent, dist.get_rank()
batches = torch.load(here / "batches.pt")
for observer in ("minmax", "percentile"):
    report = calibrate(prepared(TinyMlp(), "FP8"), batches[4:] if rank else batches[:4], observer)
    assert report.batches == (1 if rank else 4)
    found = json.loads(report.save(here / f"{observer}-{rank}.json").read_text())["rows"]
    expected = json.loads((here / f"{observer}.json").read_text())["rows"]
    assert found == expected, (found, expected)
dist.destroy_process_group()
print("equal")
"""


def test_two_ranks_report_and_store_what_one_would_of_all_batches(tmp_path):
    torch.save(inputs(5), tmp_path / "batches.pt")
    for observer in ("minmax", "percentile"):
        calibrate(prepared(TinyMlp(), "FP8"), inputs(5), observer).save(tmp_path / f"{observer}.json")
    run_ranks(RANK, tmp_path)


# A folder ------------------------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE({one: number for number, one in enumerate(alphabet)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_alone)


def masters(directory: Path, max_shard_size: str = "5GB") -> Path:
    """A transformers folder with a template and its own code beside the weights."""
    tiny_llama().save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer().save_pretrained(directory)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "modeling_own.py").write_text("")
    (directory / "optimizer.pt").write_text("not a part of the model")
    return directory


@pytest.fixture(scope="module", params=["5GB", "500KB"], ids=["one-file", "shards"])
def folders(request, tmp_path_factory) -> tuple[Path, Path, Path]:
    """Masters, the folder that the command has written of them, and the report."""
    directory = tmp_path_factory.mktemp("calibrate")
    source = masters(directory / "masters", request.param)
    arguments = [str(source), str(directory / "out"), "--scheme=FP8", "--observer=percentile"]
    arguments += ["--steps=3", "--max_tokens=48", f"--json={directory / 'ranges.json'}"]
    assert auto_cli(calibrate_command, args=arguments, as_positional=True) == 0
    return source, directory / "out", directory / "ranges.json"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = [load_file(path) for path in directory.glob("*.safetensors")]
    merged = {key: value for part in found for key, value in part.items()}
    assert len(merged) == sum(map(len, found)), "a tensor is stored twice"
    return merged


def test_folder_holds_the_same_masters_and_the_scales(folders):
    source, out, _ = folders
    before, after = tensors(source), tensors(out)
    added = after.keys() - before.keys()
    assert len(added) == 14
    assert all(key.endswith("_proj.input_scale") for key in added)
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert value.equal(after[key]), key
    kept = {path.name for path in source.iterdir() if path.suffix not in (".safetensors", ".pt")} - {INDEX}
    assert {path.name for path in out.iterdir() if path.suffix != ".safetensors"} == kept | {INDEX}
    assert all((source / name).read_bytes() == (out / name).read_bytes() for name in kept)
    index = json.loads((out / INDEX).read_text())
    for key, file_name in index["weight_map"].items():
        with safe_open(out / file_name, "pt") as file:
            assert key in file.keys()  # noqa: SIM118
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in after.values())


def test_transformers_loads_the_folder_and_a_prepared_model_its_scales(folders):
    """The masters for training to start from, and then the scales; the numbers are those of the report."""
    source, out, report = folders
    ids = token_ids()
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model(ids).logits.equal(AutoModelForCausalLM.from_pretrained(source, dtype="auto")(ids).logits)
    lockstep.prepare(model, "FP8")
    assert set(load_scales(model, out)) == tensors(out).keys() - tensors(source).keys()
    assert model(ids).logits.isfinite().all()
    rows = json.loads(report.read_text())["rows"]
    assert scales(model) == {f"{row['name']}.input_scale": row["scale"] for row in rows}

    again = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    lockstep.prepare(again, "FP8")
    text = Path(argparse.__file__).read_text()
    batches = tokenizer()(text, return_tensors="pt")["input_ids"][:, : 3 * 48].view(3, 1, 48)
    calibrate(again, list(batches), "percentile")
    assert scales(again) == scales(model)


def test_calibrated_folder_can_be_calibrated_again(folders, tmp_path):
    """With other text, another scheme; the old scales are gone."""
    _, out, _ = folders
    (tmp_path / "text").write_text("a b c d e f g " * 40)
    arguments = {"text": str(tmp_path / "text"), "kv_cache": "fp8", "device": "cpu"}
    assert calibrate_command(str(out), str(tmp_path / "b"), "NVFP4", **arguments) == 0
    stored = load_file(tmp_path / "b" / SCALES)
    assert {key.rpartition(".")[2] for key in stored} == {"input_global_scale", "k_scale", "v_scale"}
    assert tensors(tmp_path / "b").keys() - tensors(out).keys() == stored.keys()
    index = json.loads((tmp_path / "b" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors(tmp_path / "b").values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto")
    lockstep.prepare(model, "NVFP4")
    kv_cache.prepare_kv_cache(model, "fp8")
    load_scales(model, tmp_path / "b")
    assert model(token_ids()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda scales: scales.pop("model.layers.1.mlp.up_proj.input_scale"), "stores no model.layers.1.mlp.up_proj"),
        (lambda scales: scales["model.layers.1.mlp.up_proj.input_scale"].fill_(math.nan), "not positive float32"),
        (lambda scales: scales["model.layers.1.mlp.up_proj.input_scale"].neg_(), "not positive float32"),
        (
            lambda scales: scales.update({"model.layers.1.mlp.up_proj.input_scale": torch.ones(2)}),
            "not positive float32",
        ),
    ],
)
def test_damaged_scales_are_refused_and_none_is_read(folders, tmp_path, damage, message):
    stored = load_file(folders[1] / SCALES)
    damage(stored)
    save_file(stored, tmp_path / SCALES)
    model = prepared(tiny_llama(), "FP8")
    with pytest.raises(ValueError, match=message):
        load_scales(model, tmp_path)
    assert all(math.isnan(scale) for scale in scales(model).values())
    with pytest.raises(ValueError, match=r"stores no .*input_scale: run lockstep calibrate"):
        load_scales(model, folders[0])


KILLED = """
import sys, time
import safetensors.torch
from lockstep.calibrate import calibrate_command

def stop(*args, **kwargs):
    print("stopped", flush=True)
    time.sleep(600)

safetensors.torch.save_file = stop
calibrate_command({source!r}, {out!r}, steps=1, max_tokens=16)
"""


def test_killed_midway_leaves_nothing_half_written(tmp_path):
    """All masters are copied by then, and the scales are not: a folder that loads and trains on nothing measured."""
    source, out = masters(tmp_path / "masters"), tmp_path / "out"
    script = KILLED.format(source=str(source), out=str(out))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert "stopped\n" in iter(process.stdout.readline, "")
            assert any((tmp_path / ".out.incomplete").iterdir())
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert calibrate_command(str(source), str(out), steps=1, max_tokens=16, device="cpu") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"masters", "out"}
    assert len(load_file(out / SCALES)) == 14


def test_the_command_says_how_much_text_it_runs_on_and_refuses_less_than_a_block(tmp_path, capsys):
    source, text = masters(tmp_path / "masters"), tmp_path / "text.txt"
    text.write_text("0123456789" * 10)
    arguments = {"text": str(text), "device": "cpu"}
    assert calibrate_command(str(source), str(tmp_path / "a"), max_tokens=32, **arguments) == 0
    assert f"calibrating on 3 blocks of 32 tokens, 96 in all, of {text}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"text.txt has 100 tokens, less than one block of 128: .*--max_tokens 100"):
        calibrate_command(str(source), str(tmp_path / "b"), **arguments)
    with pytest.raises(ExportError, match="a is not empty: name a new folder as OUT, or empty this one"):
        calibrate_command(str(source), str(tmp_path / "a"), **arguments)


def test_what_the_command_cannot_use_is_an_error_before_anything_is_written(tmp_path):
    source, out = masters(tmp_path / "masters"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").write_text("")
    for arguments, message in [
        ({"model": str(tmp_path / "no")}, "no is not a folder: MODEL is"),
        ({"model": str(tmp_path / "empty")}, r"empty has no model\.safetensors and no model\.safetensors\.index"),
        ({"scheme": "FP8_DYNAMIC"}, "nothing to calibrate"),
        ({"scheme": "FP9"}, "no preset 'FP9'"),
        ({"observer": "median"}, "observer='median': choose minmax"),
        ({"targets": ["Conv2d"]}, "target 'Conv2d' matches no module"),
        ({"steps": 0}, "steps=0, max_tokens=512"),
        ({"text": str(tmp_path / "nothing.txt")}, "too few"),
        ({"device": "cuda:99"}, "device='cuda:99' is not there"),
        ({"json": "ranges.txt"}, r"saved as \.json"),
    ]:
        with pytest.raises(ValueError, match=message):
            calibrate_command(**({"model": str(source), "out": str(out), "device": "cpu"} | arguments))
    (out / "mine").mkdir(parents=True)
    with pytest.raises(ExportError, match="out is not empty"):
        calibrate_command(str(source), str(out))
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert {path.name for path in tmp_path.iterdir()} == {"masters", "out", "empty", "nothing.txt"}
