"""Masters on disk become a served folder without a model in memory: the same bits, after a kill too."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from lightning import LightningModule, Trainer
from models import edit_json, tiny_llama, token_ids
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import checkpoint as distributed
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    Llama4Config,
    Llama4ForConditionalGeneration,
    MixtralConfig,
    Qwen3MoeConfig,
)

import lockstep
from lockstep import Rule, Scheme
from lockstep.callbacks import QATCallback
from lockstep.cli import main
from lockstep.export import Checkpoint, ExportError, pieces, save_pretrained
from lockstep.export import convert as converting
from lockstep.export.checkpoint import bitwise_equal
from lockstep.export.convert import convert
from lockstep.loading import LEARNED, load_scales, stored_scales
from lockstep.qat.kv_cache import prepare_kv_cache

RECIPE = [Rule(["re:.*down_proj"], "W8A8"), Rule(["re:.*self_attn.*"], None), Rule(["Linear"], "W4A16")]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that a tiny weight takes several, the last of them smaller: 128 rows of 512 and of 256 weights."""
    monkeypatch.setattr(pieces, "CHUNK", 128 * 256)


def saved(folder: Path, model: Any = None, **options: Any) -> Path:
    """A transformers folder of masters with a tokenizer's file and what must not be copied."""
    (tiny_llama() if model is None else model).save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "optimizer.bin").write_bytes(b"0")
    return folder


def in_memory(folder: Path, out: Path, scheme: Any, format: str | None = None, **selection: Any) -> Path:
    """The same export, of the loaded model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    learned = any(key.endswith(LEARNED) for key in stored_scales(folder))
    lockstep.prepare(model, scheme, learned_scales=learned, **selection)
    load_scales(model, folder)
    return save_pretrained(model, out, format)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(one: Path, other: Path) -> None:
    """Every tensor and the whole config."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not bitwise_equal(a[name], b[name])] == []
    assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())


# The bits ------------------------------------------------------------------------------------------------------------

SCHEMES: list[Any] = [
    *("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "W4AFP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4", "MXFP8"),
    Scheme.preset("W4A16", strategy="channel"),
    RECIPE,
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda one: str(one) if not isinstance(one, list) else "recipe")
def test_the_bits_are_those_of_the_model_in_memory(scheme, dtype, tmp_path):
    """Rows are quantized by themselves, and the engines' layout is that of the whole weight."""
    # A bias on each layer of the attention, and a width that chunks do not divide.
    odd = {} if scheme in ("W4AFP8", "FP8_BLOCK") else {"intermediate_size": 640, "attention_bias": True}
    source = saved(tmp_path / "source", tiny_llama(dtype, **odd))
    convert(source, tmp_path / "out", scheme, workers=1)
    assert_same(tmp_path / "out", in_memory(source, tmp_path / "wanted", scheme))
    assert Checkpoint(tmp_path / "out").layers


@pytest.mark.parametrize(
    ("scheme", "format"), [("W4A16", "gptq"), ("W4A16_ASYM", "gptq"), ("W8A16", "marlin"), ("FP8_BLOCK", "fp8")]
)
def test_formats_that_are_asked_for(scheme, format, tmp_path):
    source = saved(tmp_path / "source")
    if scheme == "W4A16_ASYM":  # GPTQ cannot say some zero points
        state = load_file(source / "model.safetensors")
        save_file(
            {key: one.abs().neg() if "proj" in key else one for key, one in state.items()},
            source / "model.safetensors",
            {"format": "pt"},
        )
    convert(source, tmp_path / "out", scheme, format=format, workers=1)
    assert_same(tmp_path / "out", in_memory(source, tmp_path / "wanted", scheme, format))


@pytest.mark.parametrize("scheme", ["FP8", "NVFP4"])
def test_scales_that_calibrate_stored_are_served(scheme, tmp_path):
    """And what is scaled by the tensor by the largest magnitude of q, k and v together."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[5, 7] = 3.0
    lockstep.prepare(model, scheme)
    lockstep.calibrate(model, {"input_ids": token_ids()}, progress=False)
    source = saved(tmp_path / "source", model)
    convert(source, tmp_path / "out", scheme, workers=1)
    assert_same(tmp_path / "out", in_memory(source, tmp_path / "wanted", scheme))
    attention = "model.layers.0.self_attn"
    name = "weight_scale" if scheme == "FP8" else "weight_global_scale"
    q, k = (tensors(tmp_path / "out")[f"{attention}.{one}_proj.{name}"] for one in "qk")
    assert q == k == (3.0 / 448 if scheme == "FP8" else 6 * 448 / 3.0)


def test_a_calibrated_cache_is_served_with_its_scales(tmp_path):
    model = tiny_llama()
    lockstep.prepare(model, "W4A16")
    prepare_kv_cache(model, "fp8")
    lockstep.calibrate(model, {"input_ids": token_ids()}, progress=False)
    save_pretrained(model, tmp_path / "wanted")
    source = saved(tmp_path / "source", model)
    convert(source, tmp_path / "out", "W4A16", kv_cache="fp8", workers=1)
    assert_same(tmp_path / "out", tmp_path / "wanted")
    assert tensors(tmp_path / "out")["model.layers.1.self_attn.k_scale"].dtype == torch.float32


def test_scales_that_were_learned_are_served(tmp_path):
    model = tiny_llama(torch.float32)
    lockstep.prepare(model, "W4A16", learned_scales=True)
    with torch.no_grad():
        for key, scale in model.named_parameters():
            if key.endswith("weight_scale"):
                scale.mul_(1 + 0.3 * torch.rand(scale.shape, generator=torch.Generator().manual_seed(0)))
    source = saved(tmp_path / "source", model)
    convert(source, tmp_path / "out", "W4A16", workers=1)
    assert_same(tmp_path / "out", in_memory(source, tmp_path / "wanted", "W4A16"))
    with pytest.raises(ExportError, match=r"q_proj.weight_scale is float32 \[256, 2\], .* \[256, 4\]: it was learned"):
        convert(source, tmp_path / "other", Scheme.preset("W4A16", group_size=64), workers=1)


def test_sharded_sources_tied_embeddings_and_several_files(tmp_path):
    source = saved(tmp_path / "source", tiny_llama(tie_word_embeddings=True), max_shard_size="300KB")
    assert len([*source.glob("*.safetensors")]) > 3
    done = convert(
        source, tmp_path / "out", "W4A16", ["Linear"], ["re:.*layers.1.*", "lm_head"], max_shard_size="200KB", workers=1
    )
    wanted = in_memory(source, tmp_path / "wanted", "W4A16", ignore=["re:.*layers.1.*", "lm_head"])
    assert_same(tmp_path / "out", wanted)
    files = [path.name for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert len(files) > 3
    assert all(name.endswith(f"-of-{len(files):05d}.safetensors") for name in files)
    assert max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) < 300_000
    assert set(Checkpoint(tmp_path / "out").layers) == {row.name for row in done.report.quantized}  # the index is right
    loaded = AutoModelForCausalLM.from_pretrained(wanted, dtype="auto")
    assert loaded.config.tie_word_embeddings


def test_a_config_that_says_another_dtype_than_the_files(tmp_path):
    """transformers loads in the config's, so that is what is quantized; a stored buffer of integers stays."""
    source = saved(tmp_path / "source", tiny_llama(torch.float32))
    edit_json(source / "config.json", lambda config: config.update(dtype="bfloat16"))
    convert(source, tmp_path / "out", "W4A16", workers=1)
    assert_same(tmp_path / "out", in_memory(source, tmp_path / "wanted", "W4A16"))


def test_frequencies_of_old_checkpoints_are_left_out_and_said(tmp_path):
    source = saved(tmp_path / "source")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edited(source, lambda state: state.update({name: torch.ones(32)}))
    assert convert(source, tmp_path / "out", workers=1).left_out == (name,)
    assert name not in tensors(tmp_path / "out")


def test_small_files_come_along_and_weights_of_other_kinds_do_not(tmp_path):
    source = saved(tmp_path / "source")
    convert(source, tmp_path / "out", workers=1)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
    }
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_other_tools_left_beside_the_masters_stays_behind(tmp_path):
    """An engine would read another quantization out of them, or an adapter that is not there."""
    source = saved(tmp_path / "source")
    foreign = ("adapter_config", "quantize_config", "quant_config", "hf_quant_config", "trainer_state")
    for name in foreign:
        (source / f"{name}.json").write_text("{}")
    (source / "preprocessor_config.json").write_text("{}")
    convert(source, tmp_path / "out", workers=1)
    names = {path.stem for path in (tmp_path / "out").iterdir()}
    assert not names & {*foreign}
    assert "preprocessor_config" in names


def test_small_sizes_are_not_shown_as_nothing(tmp_path, capsys):
    source = saved(tmp_path / "source")
    assert main(["export", str(source), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert re.search(r"written: \S+out, 1\.1\d MB from 2\.89 MB", capsys.readouterr().out)


def test_several_workers_write_the_same_bits(tmp_path):
    source = saved(tmp_path / "source")
    convert(source, tmp_path / "out", "NVFP4A16", workers=2)
    assert_same(tmp_path / "out", in_memory(source, tmp_path / "wanted", "NVFP4A16"))


PEAK = """
import resource, sys
from lockstep.export.convert import convert
for name in ("small", "large"):
    convert(f"{sys.argv[1]}/{name}", f"{sys.argv[1]}/{name}_out", "W4A16", workers=1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    """Weights of 16 MiB, of which one as a whole would take some 400 MiB to quantize."""
    for name, width in (("small", 256), ("large", 8192)):
        saved(tmp_path / name, tiny_llama(hidden_size=1024, intermediate_size=width, num_hidden_layers=1))
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    small, large = map(int, result.stdout.splitlines()[-2:])
    assert large - small < 150e6


# Mixture of experts --------------------------------------------------------------------------------------------------

EXPERTS = {"num_hidden_layers": 1, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES = EXPERTS | {"hidden_size": 128, "head_dim": 64, "vocab_size": 256, "num_experts_per_tok": 2}
MODELS: dict[str, Any] = {
    "qwen3_moe": Qwen3MoeConfig(num_experts=4, moe_intermediate_size=64, **SIZES),
    "mixtral": MixtralConfig(num_local_experts=4, **SIZES),
    "gpt_oss": GptOssConfig(num_local_experts=4, **SIZES),
}


def mixture(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[kind], dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # of which some are made empty
            parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("scheme", [Scheme.preset("W4A16", group_size=32), "NVFP4A16"], ids=str)
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_each_expert_under_its_own_name(kind, scheme, tmp_path):
    """Files of the hub have a matrix for each projection of each expert; gate and up share what is by the tensor."""
    source = saved(tmp_path / "source", mixture(kind))
    assert any("experts.3." in name for name in tensors(source))
    done = convert(source, tmp_path / "out", scheme, workers=1)
    assert_same(tmp_path / "out", in_memory(source, tmp_path / "wanted", scheme))
    assert sum(".experts." in name for name in Checkpoint(tmp_path / "out").layers) == 12
    assert not done.left_out


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_stacked_experts_are_read_expert_by_expert(kind, tmp_path):
    """As a training checkpoint has them: one tensor for all of a layer, under the name that it has in the model."""
    model = mixture(kind)
    described = saved(tmp_path / "described", model)
    torch.save({"state_dict": Lightning(model).state_dict()}, tmp_path / "last.ckpt")
    scheme = Scheme.preset("W4A16", group_size=32)
    convert(tmp_path / "last.ckpt", tmp_path / "out", scheme, config_from=described, workers=1)
    lockstep.prepare(model, scheme)
    assert_same(tmp_path / "out", save_pretrained(model, tmp_path / "wanted"))


def test_experts_that_no_engine_serves_are_named(tmp_path):
    """gpt-oss: stacked in its files too, with biases."""
    source = saved(tmp_path / "source", mixture("gpt_oss"))
    with pytest.raises(ExportError, match=r"mlp.experts.0.gate_proj is an expert of GptOssExperts"):
        convert(source, tmp_path / "out", Scheme.preset("W4A16", group_size=32), workers=1)
    assert not (tmp_path / "out").exists()


# Training checkpoints ------------------------------------------------------------------------------------------------


class Lightning(nn.Module):
    """Names as a LightningModule that holds the model gives them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(3, 3)  # something else of the training


def test_a_lightning_checkpoint_is_served_in_the_dtype_that_it_trained_in(tmp_path):
    """fp32 masters of a model whose config says bf16: their codes are those of training, not of rounded weights."""
    trained = tiny_llama(torch.float32)
    described = saved(tmp_path / "described", tiny_llama(torch.bfloat16))
    state = Lightning(trained).state_dict()
    optimizer = [{"state": {0: {"exp_avg": torch.zeros(10)}}}]
    torch.save({"epoch": 1, "state_dict": state, "optimizer_states": optimizer}, tmp_path / "last.ckpt")
    done = convert(tmp_path / "last.ckpt", tmp_path / "out", "W4A16", config_from=described, workers=1)
    lockstep.prepare(trained, "W4A16")
    assert_same(tmp_path / "out", save_pretrained(trained, tmp_path / "wanted"))
    assert set(done.left_out) == {"head.weight", "head.bias"}
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        convert(tmp_path / "last.ckpt", tmp_path / "other", "W4A16", workers=1)


class Training(LightningModule):
    """With hyperparameters in its checkpoint, as many have."""

    def __init__(self, rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = tiny_llama(torch.float32)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["rate"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["W4A16", "FP8"])
def test_what_lightning_saved_gives_what_the_callback_exported(scheme, tmp_path):
    """Measured input scales come along in the state dict, below the same prefix."""
    callback = QATCallback(scheme, export_dir=str(tmp_path / "wanted"), calibration_steps=int(scheme == "FP8"))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=2, accelerator="cpu", enable_model_summary=False, callbacks=[callback], **quiet)
    trainer.fit(Training(), DataLoader(token_ids(8), batch_size=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    described = saved(tmp_path / "described", tiny_llama(torch.float32))
    convert(tmp_path / "last.ckpt", tmp_path / "out", scheme, config_from=described, workers=1)
    assert_same(tmp_path / "out", tmp_path / "wanted")


def two_models(folder: Path, *prefixes: str) -> tuple[Path, dict[str, Any]]:
    """A checkpoint that holds a model under each of the prefixes, each with weights of its own."""
    models = {prefix: tiny_llama(seed=seed) for seed, prefix in enumerate(prefixes)}
    state = {f"{prefix}{key}": one for prefix, model in models.items() for key, one in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "two.ckpt")
    return folder / "two.ckpt", models


@pytest.mark.parametrize(
    "prefixes", [("teacher.", "student."), ("ema_model.", "model."), ("", "ema."), ("m.", "m.ema.")]
)
def test_of_two_models_in_a_checkpoint_one_must_be_named(prefixes, tmp_path):
    """A teacher or an average of the weights has the same names and shapes, and would be served unnoticed."""
    checkpoint, models = two_models(tmp_path, *prefixes)
    described = saved(tmp_path / "described")
    shown = " or ".join(f"--prefix {one or repr(one)}" for one in prefixes)
    with pytest.raises(ExportError, match=rf"the model is stored 2 times, .* with prefix \({re.escape(shown)}\)"):
        convert(checkpoint, tmp_path / "out", config_from=described, workers=1)
    for number, (prefix, model) in enumerate(models.items()):
        out = tmp_path / f"out{number}"
        done = convert(checkpoint, out, config_from=described, prefix=prefix, workers=1)
        lockstep.prepare(model, "W4A16")
        assert_same(out, save_pretrained(model, tmp_path / f"wanted{number}"))
        other = prefixes[1 - number]
        assert len(done.left_out) == 21
        assert all(name.startswith(other) for name in done.left_out)


def test_a_prefix_without_its_dot_and_one_that_is_not_there(tmp_path):
    checkpoint, models = two_models(tmp_path, "teacher.", "student.")
    described = str(saved(tmp_path / "described"))
    command = ["export", str(checkpoint), str(tmp_path / "out"), "--config_from", described, "--workers", "1"]
    assert main([*command, "--prefix", "student"]) == 0
    plain = tensors(tmp_path / "out")["model.embed_tokens.weight"]
    assert torch.equal(plain, models["student."].model.embed_tokens.weight)
    (tmp_path / "plain").mkdir()
    checkpoint_of_two, _ = two_models(tmp_path / "plain", "ema.", "")
    command[1:3] = [str(checkpoint_of_two), str(tmp_path / "third")]
    assert main([*command, "--prefix", ""]) == 0
    with pytest.raises(ExportError, match=r"prefix 'ema\.': .* not stored under it, but under teacher\. and student\."):
        convert(checkpoint, tmp_path / "other", config_from=described, prefix="ema.", workers=1)


def test_an_unfinished_conversion_of_the_other_model_is_not_gone_on_with(tmp_path, monkeypatch):
    checkpoint, _ = two_models(tmp_path, "teacher.", "student.")
    described = saved(tmp_path / "described")

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(converting, "_to_disk", full)
    with pytest.raises(ExportError, match="What is done stands in"):
        convert(checkpoint, tmp_path / "out", config_from=described, prefix="teacher", workers=1)
    monkeypatch.undo()
    with pytest.raises(ExportError, match=r"prefix: teacher\. before, student\. now"):
        convert(checkpoint, tmp_path / "out", config_from=described, prefix="student", workers=1)


SHARDED = """
import torch
import torch.distributed as dist
from models import tiny_llama, token_ids
from torch import nn
from torch.utils.data import DataLoader
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = tiny_llama(torch.float32)

    def forward(self, ids):
        return self.model(input_ids=ids, labels=ids).loss

dist.init_process_group("gloo")
holder = Holder()
mesh = init_device_mesh("cpu", (2,))
for layer in holder.model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(holder, mesh=mesh)
optimizer = torch.optim.AdamW(holder.parameters(), lr=1e-3)
holder(token_ids()).backward()
optimizer.step()
content = {"state_dict": holder.state_dict(), "optimizer_0": optimizer.state_dict()}  # as Lightning saves them
checkpoint.save(content, checkpoint_id="SHARDED")
whole = {key: value.full_tensor() for key, value in holder.model.state_dict().items()}
if dist.get_rank() == 0:
    torch.save(whole, "SHARDED/whole.pt")
"""


def test_a_sharded_checkpoint_is_read_without_a_process_group(tmp_path):
    """Of two ranks that trained under FSDP2, with the optimizer's states beside the masters."""
    ranks.run(SHARDED.replace("SHARDED", str(tmp_path / "sharded")), tmp_path / "run")
    assert len([*(tmp_path / "sharded").glob("*.distcp")]) == 2
    model = tiny_llama(torch.float32)
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    model.load_state_dict(torch.load(tmp_path / "sharded" / "whole.pt"))
    assert not torch.equal(before, model.model.layers[0].mlp.down_proj.weight)  # it trained
    described = saved(tmp_path / "described", model)
    done = convert(tmp_path / "sharded", tmp_path / "out", "W8A8", config_from=described, workers=1)
    lockstep.prepare(model, "W8A8")
    assert_same(tmp_path / "out", save_pretrained(model, tmp_path / "wanted"))
    assert all(name.startswith("optimizer_0.") for name in done.left_out)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_damaged_distributed_checkpoint_is_named(tmp_path):
    described = saved(tmp_path / "described")
    folder = tmp_path / "dcp"
    distributed.save(tiny_llama().state_dict(), checkpoint_id=folder, no_dist=True)
    (data,) = folder.glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{data.name} has [\d,]+ bytes, .metadata knows of [\d,]+"):
        convert(folder, tmp_path / "out", config_from=described, workers=1)
    data.write_bytes(bytes(len(whole)))
    with pytest.raises(ExportError, match=r"cannot read model\.\S+ of \S+dcp"):
        convert(folder, tmp_path / "out", config_from=described, workers=1)
    (folder / ".metadata").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"cannot read \S+dcp/\.metadata"):
        convert(folder, tmp_path / "out", config_from=described, workers=1)


# Killed and started again --------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from lockstep.export import convert as converting
original = converting._convert
def slow(task, amax):
    time.sleep(0.05)
    return original(task, amax)
converting._convert = slow
converting.convert(sys.argv[1], sys.argv[2], "W4A16", workers=1)
"""


def killed(source: Path, out: Path) -> Path:
    """The folder that an export leaves when it is killed in the middle."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(source), str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    journal = out.with_name(f".{out.name}.resumable") / "done.jsonl"
    until = time.monotonic() + 50
    while time.monotonic() < until and (not journal.exists() or len(journal.read_text().splitlines()) < 8):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    return journal.parent


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> tuple[Path, Path]:
    """A source, and what a killed export of it to ``out`` beside it left."""
    folder = tmp_path_factory.mktemp("killed")
    source = saved(folder / "source")
    return source, killed(source, folder / "out")


@pytest.fixture
def again(interrupted, tmp_path, monkeypatch) -> tuple[Path, Path, Path]:
    """Source, partial folder and target of an export that was killed, as new."""
    source, partial = interrupted
    shutil.copytree(partial, tmp_path / partial.name)
    return source, tmp_path / partial.name, tmp_path / "out"


def test_a_killed_export_goes_on_from_what_is_done(again, tmp_path):
    source, partial, out = again
    finished = len([line for line in (partial / "done.jsonl").read_text().splitlines() if line])
    done = convert(source, out, "W4A16", workers=1)
    assert finished - 1 <= done.kept <= finished
    assert_same(out, in_memory(source, tmp_path / "wanted", "W4A16"))
    assert not partial.exists()


def test_what_was_finished_is_converted_again_if_its_bytes_are_others(again, tmp_path):
    """A disk that lost what was written, and a line of the journal that is cut off."""
    source, partial, out = again
    journal = partial / "done.jsonl"
    entries = [json.loads(line) for line in journal.read_text().splitlines() if line]
    with journal.open("a") as file:
        file.write('\n{"key": "model.nor')
    shard = partial / "model.safetensors"
    with shard.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        end = file.tell()
        file.seek(int.from_bytes(shard.read_bytes()[:8], "little") + 8)
        file.write(b"\xff" * (end - file.tell()))
    done = convert(source, out, "W4A16", workers=1)
    assert done.kept < len(entries)
    assert_same(out, in_memory(source, tmp_path / "wanted", "W4A16"))


def test_other_arguments_and_changed_sources_are_refused(again, tmp_path):
    source, partial, out = again
    with pytest.raises(ExportError, match=r"config_groups.*group_size: 128 before, 64 now"):
        convert(source, out, Scheme.preset("W4A16", group_size=64), workers=1)
    with pytest.raises(ExportError, match=r"max_shard_size: 5000000000 before, 100000 now"):
        convert(source, out, "W4A16", max_shard_size="100KB", workers=1)
    before = (source / "model.safetensors").stat()
    try:
        os.utime(source / "model.safetensors")
        with pytest.raises(ExportError, match=r"sources.*model.safetensors: \d+ bytes of \d+ before") as caught:
            convert(source, out, "W4A16", workers=1)
    finally:
        os.utime(source / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert str(partial) in str(caught.value)
    assert convert(source, out, "W4A16", workers=1).kept


LAST = """
import os, signal, sys
from lockstep.export import convert as converting, directory
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "before":
    directory._sync = kill
else:
    converting.shutil.rmtree = lambda path, **_: kill() if os.path.exists(sys.argv[2]) else None
converting.convert(sys.argv[1], sys.argv[2], "W4A16", workers=1, overwrite=True)
"""


def killed_at_the_end(source: Path, out: Path, when: str) -> Path:
    """What a kill leaves that comes ``before`` the folder takes its place, or ``after``."""
    command = [sys.executable, "-c", LAST, str(source), str(out), when]
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    return out.with_name(f".{out.name}.resumable")


def test_a_kill_in_the_last_step_loses_nothing(tmp_path):
    """The files stand in the new folder, which does not survive it, and must stand where they were too."""
    source, out = saved(tmp_path / "source"), tmp_path / "out"
    partial = killed_at_the_end(source, out, "before")
    assert not out.exists()
    done = convert(source, out, "W4A16", workers=1)
    assert done.kept == 21
    assert_same(out, in_memory(source, tmp_path / "wanted", "W4A16"))
    assert not partial.exists()


def test_a_kill_after_the_folder_took_its_place_leaves_it_alone(tmp_path):
    """What stands beside it is the same file: nobody may write to that, with the same arguments or with others."""
    source, out = saved(tmp_path / "source"), tmp_path / "out"
    partial = killed_at_the_end(source, out, "after")
    assert partial.exists()
    before = (out / "model.safetensors").read_bytes()
    out.rename(tmp_path / "served")
    edited(source, lambda state: state[LAYER].mul_(2))
    assert convert(source, out, "W8A16", workers=1).kept == 0
    assert (tmp_path / "served" / "model.safetensors").read_bytes() == before
    assert_same(out, in_memory(source, tmp_path / "wanted", "W8A16"))
    assert not partial.exists()


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    source = saved(tmp_path / "source")
    convert(source, tmp_path / "out", "W4A16", workers=1)
    assert_same(tmp_path / "out", in_memory(source, tmp_path / "wanted", "W4A16"))


@pytest.mark.parametrize("line", [b"7", b'{"key": "model.norm.weight"}', b'{"key": 1, "checksums": {}}', b"[1]"])
def test_a_damaged_journal_is_named(line, again):
    source, partial, out = again
    with (partial / "done.jsonl").open("ab") as file:
        file.write(b"\n" + line + b"\n\xff\xfe")
    with pytest.raises(ExportError, match=r"done\.jsonl is damaged, it holds .*: remove \S+\.resumable to start"):
        convert(source, out, "W4A16", workers=1)


def test_a_worker_that_is_killed_leaves_what_is_done(tmp_path, monkeypatch):
    source = saved(tmp_path / "source")
    monkeypatch.setattr(converting, "convert_pieces", _killing)
    with pytest.raises(ExportError, match="a worker process ended"):
        convert(source, tmp_path / "out", workers=2)
    monkeypatch.undo()
    convert(source, tmp_path / "out", workers=1)
    assert_same(tmp_path / "out", in_memory(source, tmp_path / "wanted", "W4A16"))


def _killing(tasks: Any, done: Any) -> Any:
    if "down_proj" in tasks[0].piece.key:
        os.kill(os.getpid(), signal.SIGKILL)
    return converting.convert_pieces(tasks, done)


# Refusals ------------------------------------------------------------------------------------------------------------


def edited(source: Path, change: Any) -> Path:
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    return source


LAYER = "model.layers.1.mlp.down_proj.weight"
REFUSED = {
    "a NaN": (lambda state: state[LAYER].view(-1)[-1:].fill_(torch.nan), rf"{LAYER}: 1 of \d+ values are NaN"),
    "a missing tensor": (
        lambda state: state.pop("model.layers.1.mlp.up_proj.weight"),
        r"up_proj\.weight is not stored, LlamaForCausalLM has one of \[512, 256\]",
    ),
    "an unknown tensor": (lambda state: state.update(extra=torch.ones(2)), "extra and 0 more are stored"),
    "another shape": (
        lambda state: state.update({LAYER: torch.ones(4, 4)}),
        r"is stored as \[4, 4\], the config .* \[256, 512\]",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_with_a_source_is_named_and_leaves_nothing(what, tmp_path):
    change, message = REFUSED[what]
    source = edited(saved(tmp_path / "source"), change)
    with pytest.raises(ExportError, match=message):
        convert(source, tmp_path / "out", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_words_that_do_not_give_back_the_weight_are_not_written(tmp_path, monkeypatch):
    """C3, with a planted fault: a packer that moves one code."""
    from lockstep.export import formats, pack_quantized

    def faulty(weight, spec, kernel):
        packed = pack_quantized.pack(weight, spec, kernel)
        packed["weight_packed"][-1, -1] ^= 1
        return packed

    monkeypatch.setitem(formats.PACKED, "pack-quantized", faulty)
    source = saved(tmp_path / "source")
    with pytest.raises(ExportError, match="the packed words do not give back the weight"):
        convert(source, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_ranges_that_are_not_measured_are_refused(tmp_path):
    source = saved(tmp_path / "source")
    with pytest.raises(ExportError, match=r"q_proj: the range of its inputs is not measured .*lockstep calibrate"):
        convert(source, tmp_path / "out", "FP8", workers=1)


def test_tied_tensors_that_differ_are_refused(tmp_path):
    source = saved(tmp_path / "source", tiny_llama(tie_word_embeddings=True))
    edited(source, lambda state: state.update({"lm_head.weight": torch.ones(512, 256).bfloat16()}))
    with pytest.raises(ExportError, match=r"lm_head.weight and model.embed_tokens.weight are stored with different"):
        convert(source, tmp_path / "out", workers=1)


def test_truncated_files_and_folders_of_something_else(tmp_path):
    source = saved(tmp_path / "source")
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        convert(source, tmp_path / "out", workers=1)
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        convert(source, tmp_path / "out", workers=1)
    with pytest.raises(ValueError, match="is not there"):
        convert(tmp_path / "nothing", tmp_path / "out", workers=1)
    (tmp_path / "last.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="cannot read"):
        convert(tmp_path / "last.ckpt", tmp_path / "out", config_from=source, workers=1)


def test_a_cache_that_is_not_measured_is_refused(tmp_path):
    """A prepared model stores NaN until it is calibrated; and of a model that never was prepared there is nothing."""
    model = tiny_llama()
    plain = saved(tmp_path / "plain", model)
    lockstep.prepare(model, "W4A16")
    prepare_kv_cache(model, "fp8")
    for source in (plain, saved(tmp_path / "source", model)):
        with pytest.raises(ExportError, match=r"self_attn: the range of its keys and values is not measured"):
            convert(source, tmp_path / "out", "W4A16", kv_cache="fp8", workers=1)


def llama4(folder: Path) -> Path:
    """Text and images: transformers' causal language model of it is the text's alone."""
    text = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 256, "intermediate_size_mlp": 512}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 64}
    vision |= {"projector_input_dim": 64, "projector_output_dim": 64}
    config = Llama4Config(text_config=text | {"num_local_experts": 2}, vision_config=vision)
    Llama4ForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    return folder


def test_parts_of_a_multimodal_model_are_not_dropped(tmp_path, capsys):
    """Neither if the config says of what they are a part, nor if it does not."""
    source = llama4(tmp_path / "source")
    message = "architectures names Llama4ForConditionalGeneration, .* is a Llama4ForCausalLM: parts of the model"
    with pytest.raises(ExportError, match=message):
        convert(source, tmp_path / "out", workers=1)
    assert main(["inspect", str(source), "--scheme", "W4A16"]) == 1
    assert "architectures names" in capsys.readouterr().out
    edit_json(source / "config.json", lambda config: config.pop("architectures"))
    with pytest.raises(ExportError, match=r"stores (multi_modal|vision)\S+ and 25 more that Llama4ForCausalLM has"):
        convert(source, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_a_class_that_is_no_language_model_is_refused(tmp_path):
    """A reward model's head, for one, is no part of what transformers makes here."""
    source = saved(tmp_path / "source")
    edit_json(source / "config.json", lambda config: config.update(architectures=["LlamaForSequenceClassification"]))
    with pytest.raises(ExportError, match=r"architectures names LlamaForSequenceClassification, .* LlamaForCausalLM"):
        convert(source, tmp_path / "out", workers=1)


INDEX = "model.safetensors.index.json"
DAMAGED = {
    "an index without a map": (INDEX, "{}", "index.json has no weight_map"),
    "an index that is a list": (INDEX, "[]", r"index.json holds no JSON object, but \[\]"),
    "a map that is a list": (INDEX, '{"weight_map": ["a"]}', r'index.json has a weight_map of \["a"\]'),
    "a file that is a number": (INDEX, '{"weight_map": {"a": 7}}', "weight_map has 7 for a"),
    "an index that is no text": (INDEX, "\udcff\udcfe", "index.json is no JSON"),
    "a config that is a list": ("config.json", "[]", r"config.json holds no JSON object, but \[\]"),
    "a config that is null": ("config.json", "null", "config.json holds no JSON object, but null"),
    "a config that is a string": ("config.json", '"a"', 'config.json holds no JSON object, but "a"'),
    "an empty config": ("config.json", "", "config.json is no JSON"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_json_is_named_by_both_commands(what, tmp_path, capsys):
    """With exit code 2, and not with a traceback."""
    name, text, message = DAMAGED[what]
    source = saved(tmp_path / "source", max_shard_size="500KB")
    (source / name).write_text(text, errors="surrogateescape")
    for command in (["export", str(source), str(tmp_path / "out")], ["inspect", str(source)]):
        assert main(command) == 2
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", "abc", "Field 'hidden_size' expected int"),
        ("num_attention_heads", 0, "ZeroDivisionError"),
        ("dtype", "foo", "'foo'"),
        ("hidden_act", "zzz", "KeyError: 'zzz'"),
        ("model_type", "nonesuch", "nonesuch"),
        ("hidden_size", None, "Field 'hidden_size' expected int"),
        ("model_type", "llava", "Unrecognized configuration class .* with lockstep.export.save_pretrained"),
    ],
)
def test_configs_that_transformers_rejects(field, value, message, tmp_path, capsys):
    source = saved(tmp_path / "source")
    edit_json(source / "config.json", lambda config: config.update({field: value}))
    for command in (["export", str(source), str(tmp_path / "out")], ["inspect", str(source), "--scheme", "W4A16"]):
        assert main(command) == 2
        assert re.search(rf"config.json: transformers makes no causal .*{message}", capsys.readouterr().err)


def test_a_damaged_generation_config_is_named(tmp_path):
    source = saved(tmp_path / "source")
    (source / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config\.json holds no JSON object"):
        convert(source, tmp_path / "out", workers=1)


def test_an_adapter_is_no_model(tmp_path, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    described = str(saved(tmp_path / "described"))
    for command in (
        ["inspect", str(folder)],
        ["export", str(folder), str(tmp_path / "out"), "--config_from", described],
    ):
        assert main(command) == 2
        assert "is an adapter of peft, for some/base, and no model: merge it" in capsys.readouterr().err
