"""Post-training methods: what they serve, against the libraries' own checkpoints, and what QAT starts from."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from datasets import Dataset
from lightning.pytorch import LightningModule, Trainer
from models import channel, edit_tensors, grouped, tiny_llama, tiny_moe, token_ids
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_trainer_callback import tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import lockstep
from lockstep import Scheme, cli, grid, ptq
from lockstep.callbacks import QATCallback, common
from lockstep.export import ExportError, save_pretrained
from lockstep.export.convert import convert
from lockstep.export.directory import replacing
from lockstep.loading import load_scales
from lockstep.ptq import quantize
from lockstep.ptq.command import as_argument, ptq_command
from lockstep.ptq.rounded import Rounded
from lockstep.qat.prepare import quantized_modules

G32 = grouped(32)
LAYER = "model.layers.0.self_attn.q_proj"


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    return [{"input_ids": token_ids(2, 32, seed)} for seed in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# What is served ------------------------------------------------------------------------------------------------------

SERVED = {
    "rtn-FP8": ("rtn", "FP8"),
    "minmax-W8A16": ("minmax", "W8A16"),
    "percentile-channel": ("percentile", channel()),
    "mse-W4A8": ("mse", "W4A8"),
    "gptq-g32": ("gptq", G32),
    "gptq-W4AFP8": ("gptq", "W4AFP8"),
    "awq-g32": ("awq", G32),
    "awq-NVFP4": ("awq", "NVFP4"),
    "awq-asymmetric": ("awq", "W4A16_ASYM"),
    "smoothquant-W8A8": ("smoothquant", "W8A8"),
    "smoothquant-FP8_DYNAMIC": ("smoothquant", "FP8_DYNAMIC"),
}


@pytest.mark.parametrize(("method", "scheme"), SERVED.values(), ids=SERVED)
@torch.no_grad()
def test_what_a_method_yields_is_exported_aligned_and_loaded(tmp_path, method, scheme):
    """The folder computes what the prepared model does, and the model is a plain one in between."""
    model, plain = tiny_llama(), tiny_llama()
    result = quantize(model, method, scheme, batches())
    assert [type(one) for one in model.modules()] == [type(one) for one in plain.modules()]
    assert {key: (one.shape, one.dtype) for key, one in model.state_dict().items()} == {
        key: (one.shape, one.dtype) for key, one in plain.state_dict().items()
    }
    for name, module in model.named_modules():
        other = plain.get_submodule(name)
        assert vars(module).keys() == vars(other).keys(), name
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert model.model.embed_tokens.weight.equal(plain.model.embed_tokens.weight)
    assert all(0 < row.error < 0.3 for row in result.rows)
    assert len(result.rows) == 14

    result.prepare(model)
    out = save_pretrained(model, tmp_path / "out")
    assert lockstep.align.compare(model, out, {"input_ids": token_ids()}).aligned
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    served, trained = loaded(token_ids()).logits, model(token_ids()).logits
    # transformers has another order of operations, and inputs are rounded to other codes after it.
    exact = result.scheme.activations is None
    assert (served - trained).norm() / trained.norm() < (0.03 if exact else 0.2)
    if scheme == G32:
        assert served.equal(trained)
    assert (trained - plain(token_ids()).logits).norm() / trained.norm() < 0.4


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_masters_keep_their_dtype_and_stay_where_training_can_move_them(method, dtype):
    """On ``code * scale``, the middle of its bin, a weight would reach no other code within an ordinary run."""
    model = tiny_llama(dtype)
    before = state(model)
    result = quantize(model, method, G32, batches())
    after = state(model)
    result.prepare(model)
    for name, layer in quantized_modules(model):
        spec, master, quantized = result.scheme.weights, after[f"{name}.weight"], layer.quantize()
        assert master.dtype == dtype
        old, served = before[f"{name}.weight"].bfloat16().float(), grid.dequantize(quantized, spec).float()
        assert (master.float() == served).float().mean() < 0.1, name
        moves, _ = grid.learned_gradients(torch.ones_like(served), master, quantized.scale, spec)
        assert moves.all(), name  # none stands beyond the codes, where no gradient reaches it
        if method == "gptq":  # AWQ's weights were smoothed before
            step, (low, high) = quantized.scale.float().repeat_interleave(32, 1), spec.code_range
            nearer = (master.float() - old).abs() <= (served - old).abs() + step / 8  # served is in bf16
            assert nearer.all(), name
            stays = (
                ((old / step - quantized.codes).abs() < 0.42) & (old / step > low + 0.08) & (old / step < high - 0.08)
            )
            assert 0.5 < stays.float().mean() < 1
            assert master.float()[stays].equal(old[stays]), name
    moved = {key for key in before if not key.endswith("proj.weight") and not before[key].equal(after[key])}
    assert all("layernorm" in key for key in moved)
    assert bool(moved) == (method == "awq")


def test_smoothing_leaves_the_function_as_it_was():
    """In fp32, where only rounding could hide a factor that went into the weight and not into the norm."""
    model = tiny_llama(torch.float32)
    plain = model(token_ids()).logits
    quantize(model, "smoothquant", Scheme.preset("FP8_DYNAMIC", served_dtype=torch.float32), batches())
    assert not model.model.layers[0].input_layernorm.weight.equal(tiny_llama(torch.float32).model.norm.weight)
    assert ((model(token_ids()).logits - plain).norm() / plain.norm()).item() < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scheme", [G32, Scheme.preset("W8A16"), Scheme.preset("W8A8")], ids=str)
@pytest.mark.parametrize("method", ["minmax", "mse", "gptq", "awq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@torch.no_grad()
def test_on_a_gpu_every_code_is_the_librarys_too(method, scheme, dtype):
    """On the last of them, not on the first; where compressed-tensors rounds with a kernel of its own."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    model = tiny_llama(dtype).to(device)
    given = [{"input_ids": batch["input_ids"].to(device)} for batch in batches()]
    result = quantize(model, method, scheme, given)
    assert {parameter.device for parameter in model.parameters()} == {device}
    result.prepare(model)
    with torch.autocast("cuda", torch.bfloat16):
        assert model(given[0]["input_ids"]).logits.isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_hqq_has_less_error_than_minmax_and_is_served_by_nothing(bits):
    scheme = "W8A16" if bits == 8 else "W4A16"
    model, other = tiny_llama(), tiny_llama()
    result, minmax = quantize(model, "hqq", scheme), quantize(other, "minmax", scheme)
    assert sum(row.error for row in result.rows) < sum(row.error for row in minmax.rows)
    assert all(len(group.unique()) <= 2**bits for group in model.get_submodule(LAYER).weight.view(-1, 128)[:64])
    assert not result.scales
    assert "no engine serves it" in str(result)
    with pytest.raises(ValueError, match="real zero points, which no kernel serves"):
        result.prepare(model)


def test_clipping_rules_are_ordered_as_their_names_say():
    """mse has the least error of the weights; a percentile cuts scales and leaves none above the largest magnitude."""
    results = {method: quantize(tiny_llama(), method, G32) for method in ("minmax", "percentile", "mse")}
    errors = {method: sum(row.error for row in result.rows) for method, result in results.items()}
    assert errors["mse"] < min(errors["minmax"], errors["percentile"])
    for key, scale in results["percentile"].scales.items():
        weight = tiny_llama().get_parameter(key.replace("_scale", ""))
        magnitudes = weight.float().abs().unflatten(-1, (-1, 32))
        expected = torch.quantile(magnitudes, 0.99, dim=-1) / 7.5
        assert torch.allclose(scale, expected, rtol=2**-8)
        assert (scale <= results["minmax"].scales[key] * (1 + 2**-7)).all()


def trained() -> nn.Module:
    """A Llama that has learned a Markov chain of 64 tokens."""
    model = tiny_llama(torch.float32, vocab_size=64, hidden_size=128, intermediate_size=256, head_dim=32)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        ids = chain(16, 32, step)
        with torch.enable_grad():
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.bfloat16().eval()


def chain(rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(4, (rows, length), generator=generator)
    ids = [torch.randint(64, (rows,), generator=generator)]
    for step in steps.T[1:]:
        ids.append((ids[-1] * 5 + 7 * step**2 + 1) % 64)
    return torch.stack(ids, 1)


@torch.no_grad()
def test_methods_that_see_data_beat_minmax_on_a_trained_model():
    """KL divergence from bf16 on held-out text."""
    model, held_out = trained(), chain(32, 32, 1000)
    calibration = [{"input_ids": chain(8, 32, 2000 + number)} for number in range(8)]
    wanted = model(held_out).logits.float().log_softmax(-1)
    found = {}
    for method in ("minmax", "gptq", "awq"):
        quantized = copy.deepcopy(model)
        quantize(quantized, method, G32, calibration).prepare(quantized)
        given = quantized(held_out).logits.float().log_softmax(-1)
        found[method] = (wanted.exp() * (wanted - given)).sum(-1).mean().item()
    assert found["gptq"] < 0.7 * found["minmax"], found
    assert found["awq"] < found["minmax"], found


# The library's own checkpoint ----------------------------------------------------------------------------------------


def their_checkpoint(directory: Path, recipe: list) -> dict[str, Tensor]:
    """What llm-compressor saves by itself, through its own data path."""
    from llmcompressor import oneshot

    tiny_llama().save_pretrained(directory / "masters")
    tokenizer().save_pretrained(directory / "masters")
    ids = torch.cat([batch["input_ids"] for batch in batches()])
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    options = {"batch_size": 2, "shuffle_calibration_samples": False, "num_calibration_samples": len(ids)}
    model = AutoModelForCausalLM.from_pretrained(directory / "masters", dtype="auto")
    model = oneshot(model=model, recipe=recipe, dataset=data, **options)
    model.save_pretrained(directory / "theirs", save_compressed=True)
    return load_file(directory / "theirs" / "model.safetensors")


def recipe_of(method: str) -> list:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    if method == "smoothquant":
        return [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(scheme="W8A8", ignore=["lm_head"])]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
def test_the_export_holds_the_words_that_llm_compressor_saves(tmp_path, monkeypatch, method):
    """Packed words, scales and smoothed norms, bit for bit."""
    if not torch.cuda.is_available():  # llm-compressor 0.14 pins memory, which torch refuses then
        monkeypatch.setattr("llmcompressor.pipelines.cache.IntermediatesCache.pin_memory", lambda *_: None)
    theirs = their_checkpoint(tmp_path, recipe_of(method))
    model = tiny_llama()
    quantize(model, method, "W8A8" if method == "smoothquant" else G32, batches()).prepare(model)
    ours = load_file(save_pretrained(model, tmp_path / "out") / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].to(tensor.dtype).equal(tensor), key
        assert ours[key].double().equal(tensor.double()), key
    words = f"{LAYER}.weight" if method == "smoothquant" else f"{LAYER}.weight_packed"
    assert theirs[words].dtype == (torch.int8 if method == "smoothquant" else torch.int32)


# Training from it ----------------------------------------------------------------------------------------------------


def folder(directory: Path) -> Path:
    tiny_llama().save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    (directory / "modeling_own.py").write_text("")
    (directory / "optimizer.pt").write_text("not a part of the model")
    return directory


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with ``masters``, what the command made of them in ``out``, and ``report.json``."""
    directory = tmp_path_factory.mktemp("ptq")
    source = folder(directory / "masters")
    scheme = '{"weights": {"group_size": 32}}'
    arguments = ["ptq", str(source), str(directory / "out"), "--method=gptq", f"--scheme={scheme}", "--device=cpu"]
    arguments += ["--steps=3", "--max_tokens=48", f"--json={directory / 'report.json'}"]
    assert cli.main(arguments) == 0
    return directory


class Run(LightningModule):
    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
        self.logits: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.model(batch).logits
        self.logits.append(logits.detach())
        return logits.float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def test_training_starts_where_the_method_ended(written):
    """The first forward of a run through the callback is the checkpoint's, bit for bit."""
    scheme = Scheme.preset("W4A16", group_size=32, scale_rule="amax/7.5")
    run = Run(written / "out")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=2, accelerator="cpu", callbacks=[QATCallback(scheme, learned_scales=True)], **quiet)
    trainer.fit(run, DataLoader(token_ids(4), batch_size=2))
    out = written / "served"
    assert cli.main(["export", str(written / "out"), str(out), "--workers=1", f"--scheme={as_argument(scheme)}"]) == 0
    served = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    with torch.no_grad():
        assert run.logits[0].equal(served(token_ids(4)[:2]).logits)
    assert not run.logits[1].equal(served(token_ids(4)[2:]).logits)


def test_the_folder_of_the_command(written, tmp_path, capsys):
    """Masters, scales, tokenizer and report; export and align take it as they take what was trained."""
    stored = load_file(written / "out" / "model.safetensors")
    scales = {key: value for key, value in stored.items() if key.endswith(".weight_scale")}
    assert len(scales) == 14
    assert all(scale.dtype == torch.float32 for scale in scales.values())
    assert stored.keys() - scales.keys() == load_file(written / "masters" / "model.safetensors").keys()
    kept = {path.name for path in (written / "masters").iterdir()} - {"optimizer.pt"}
    assert {path.name for path in (written / "out").iterdir()} == kept | {"ptq.json"}
    report = json.loads((written / "report.json").read_text())
    assert report == json.loads((written / "out" / "ptq.json").read_text())
    assert (report["method"], report["rule"]["scale_rule"], len(report["rows"])) == ("gptq", "amax/7.5", 14)

    scheme = '--scheme={"weights": {"group_size": 32, "scale_rule": "amax/7.5"}}'
    assert cli.main(["export", str(written / "out"), str(tmp_path / "export"), "--workers=1", scheme]) == 0
    align = ["align", str(written / "out"), str(tmp_path / "export"), "--device=cpu", "--max_tokens=32"]
    assert cli.main(align) == 0
    edit_tensors(tmp_path / "export", lambda tensors: tensors[f"{LAYER}.weight_packed"][0].neg_())
    assert cli.main(align) == 1
    assert LAYER in capsys.readouterr().out


@pytest.mark.parametrize(("value", "command"), [(torch.nan, "align"), (-1.0, "export"), (torch.inf, "export")])
def test_a_damaged_scale_is_named(written, tmp_path, capsys, value, command):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((written / "out" / name).read_bytes())
    edit_tensors(tmp_path, lambda tensors: tensors[f"{LAYER}.weight_scale"][3].fill_(value))
    scheme = '--scheme={"weights": {"group_size": 32, "scale_rule": "amax/7.5"}}'
    if command == "align":
        whole = tmp_path / "whole"
        assert cli.main(["export", str(written / "out"), str(whole), "--workers=1", scheme]) == 0
        assert cli.main(["align", str(tmp_path), str(whole), "--device=cpu"]) == 2
    else:
        assert cli.main(["export", str(tmp_path), str(tmp_path / "export"), "--workers=1", scheme]) == 2
        assert not (tmp_path / "export").exists()
    assert f"{LAYER}.weight_scale" in capsys.readouterr().err


@pytest.mark.parametrize(
    "scheme",
    ["W4A16", "FP8", Scheme.preset("W8A8", scale_rule="amax/127.5"), grouped(32, scale_rule="amax/7.5")],
    ids=str,
)
def test_the_scheme_that_is_printed_is_read_back(scheme):
    from jsonargparse import auto_cli

    def read(scheme: Scheme | str = "FP8_BLOCK") -> Scheme:
        return Scheme.of(scheme)

    assert auto_cli(read, args=[f"--scheme={as_argument(Scheme.of(scheme))}"]) == Scheme.of(scheme)


# Faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "scheme", "given", "message"),
    [
        ("qptg", "W4A16", {}, "method='qptg': choose rtn, minmax"),
        ("gptq", "W5B16", {}, "no preset 'W5B16'"),
        ("gptq", "FP8_DYNAMIC", {}, "gptq is for symmetric INT4 and INT8, found fp8.*: use rtn or awq, or smoothquant"),
        ("mse", "NVFP4A16", {}, "mse is for symmetric INT4 and INT8, found fp4.*: use rtn or awq"),
        ("gptq", "W4A16_ASYM", {}, "gptq is for symmetric INT4 and INT8, found int4 g128 range/15"),
        ("smoothquant", "W4A16", {}, "smoothquant is for schemes that quantize inputs, found int4.*: use awq"),
        ("hqq", "W8A8", {}, "hqq is for INT4 and INT8 weights with inputs as they are, found int8"),
        ("gptq", "W4A16", {"batches": ()}, "gptq for int4.* runs the model on batches: there is none"),
        ("rtn", "FP8", {"batches": ()}, "rtn for fp8.* runs the model on batches: there is none"),
        ("gptq", "W4A16", {"batches": [token_ids()]}, r"a batch is a mapping \(model\(\*\*batch\)\), found Tensor"),
        ("gptq", "W4A16", {"targets": ["Conv2d"]}, "target 'Conv2d' matches no module"),
        ("awq", "W4A16", {"sizes": {"intermediate_size": 520}}, r"mlp\.down_proj.*520 input features do not divide"),
        ("gptq", "W4A16", {"prepared": "W8A8"}, r"is prepared: call lockstep\.unprepare"),
    ],
)
def test_what_a_method_cannot_do_is_refused_by_name_and_nothing_is_changed(method, scheme, given, message):
    model = tiny_llama(**given.pop("sizes", {}))
    if "prepared" in given:
        lockstep.prepare(model, given.pop("prepared"))
    before = state(model)
    with pytest.raises(ValueError, match=message):
        quantize(model, method, scheme, **{"batches": batches()} | given)
    assert all(tensor.equal(before[name]) for name, tensor in state(model).items())


def test_masters_come_back_when_input_ranges_cannot_be_measured():
    """They are measured last, on the masters that the method has made."""
    model = tiny_llama()
    nn.init.zeros_(model.model.layers[1].self_attn.v_proj.weight)
    before = state(model)
    with pytest.raises(ValueError, match=r"the inputs of model\.layers\.1\.self_attn\.o_proj have the range 0"):
        quantize(model, "smoothquant", "FP8", batches())
    assert all(tensor.equal(before[name]) for name, tensor in state(model).items())
    assert not list(quantized_modules(model))


def test_experts_are_rounded_to_nearest_alone():
    model = tiny_moe()
    with pytest.raises(ValueError, match=r"gptq does not quantize experts.*Use rtn"):
        quantize(model, "gptq", G32, batches())
    result = quantize(model, "rtn", G32)
    assert any(row.name.endswith("experts") for row in result.rows)
    result.prepare(model)
    assert model(token_ids()).logits.isfinite().all()


def test_a_hessian_without_an_inverse_is_an_error_and_no_silent_rounding():
    model = tiny_llama()
    nn.init.constant_(model.model.layers[1].input_layernorm.weight, 3e38)  # inputs overflow
    before = state(model)
    with pytest.raises(ValueError, match=r"cannot invert the Hessian of model\.layers\.1\.self_attn\.\w_proj and"):
        quantize(model, "gptq", G32, batches())
    assert all(tensor.equal(before[name]) for name, tensor in state(model).items())


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "gptq", "rtn"])
def test_weights_that_were_pruned_away_have_finite_scales_and_errors(method):
    """A row of zeros, one with a single weight, a layer of zeros."""
    model = tiny_llama(torch.float32)
    with torch.no_grad():
        model.get_parameter(f"{LAYER}.weight")[3:5] = 0
        model.get_parameter(f"{LAYER}.weight")[4, 7] = 0.5
        model.model.layers[0].mlp.up_proj.weight.zero_()
    result = quantize(model, method, channel(), batches())
    errors = {row.name: row.error for row in result.rows}
    assert errors["model.layers.0.mlp.up_proj"] == 0
    assert all(0 <= error <= 1 for error in errors.values())  # GPTQ drops what meets no inputs
    result.prepare(model)
    served = quantized_modules(model)
    layer = next(layer for name, layer in served if name == LAYER)
    weight = grid.dequantize(layer.quantize(), layer.scheme.weights)
    assert weight[3].count_nonzero() == 0
    assert weight[4].count_nonzero() == 1
    assert abs(weight[4, 7] - 0.5) < 0.05
    assert model(token_ids()).logits.isfinite().all()


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
def test_masters_without_values_are_named(method):
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter(f"{LAYER}.weight")[3, 3] = torch.nan
    with pytest.raises(ValueError, match=rf"{LAYER}\.weight holds NaN or infinity"):
        quantize(model, method, G32, batches())
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is on meta"):
        quantize(tiny_llama().to("meta"), method, G32, batches())


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_adapters_are_refused_before_anything_changes(method):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    before = state(model)
    with pytest.raises(ValueError, match=r"PeftModel has adapters.*merge_and_unload"):
        quantize(model, method, G32, batches())
    assert all(tensor.equal(before[name]) for name, tensor in state(model).items())


def test_scales_that_the_scheme_cannot_store_are_refused_with_the_layer(monkeypatch):
    """The codes would be others once the scale is rounded to bf16."""

    def between(model, layers, scheme, batches):
        weights = {name: model.get_parameter(f"{name}.weight") for name in layers}
        return {
            name: Rounded(one, one, one.float().abs().view(-1, 8, 32).amax(-1) / 7.3) for name, one in weights.items()
        }

    monkeypatch.setitem(ptq.quantize.__globals__["_ADAPTERS"], "minmax", between)
    model = tiny_llama(intermediate_size=256)
    before = state(model)
    with pytest.raises(ValueError, match=rf"{LAYER}: \d+ of 65536 codes would not be the library's.*torch\.float32"):
        quantize(model, "minmax", G32)
    assert all(tensor.equal(before[name]) for name, tensor in state(model).items())


def test_a_result_of_another_model_or_with_a_damaged_scale_is_refused_with_its_key():
    result = quantize(tiny_llama(), "minmax", G32)
    other = tiny_llama(intermediate_size=256)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight_scale is \[512, 8\], the model has \[256, 8\]"):
        result.prepare(other)
    assert not list(quantized_modules(other))
    result.scales[f"{LAYER}.weight_scale"][5] = torch.nan
    with pytest.raises(ValueError, match=rf"{LAYER}\.weight_scale holds scales that are not finite"):
        result.prepare(tiny_llama())


@pytest.mark.parametrize(("method", "missing"), [("gptq", "llmcompressor"), ("mse", "llmcompressor"), ("hqq", "hqq")])
def test_a_missing_library_says_what_to_install(monkeypatch, method, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{method} needs {missing}: pip install 'lockstep-qat\[ptq\]'"):
        quantize(tiny_llama(), method, G32, batches())


TWO_AT_ONCE = """
from models import grouped, tiny_llama, token_ids
from lockstep.ptq import quantize

model = tiny_llama()
batches = [{"input_ids": token_ids(2, 32, seed)} for seed in range(2)]
quantize(model, "gptq", grouped(32), batches)
import torch
torch.save(model.state_dict(), __import__("sys").argv[1])
"""


def test_two_processes_at_once_print_nothing_and_write_nothing(tmp_path):
    """In one working directory; both have the same numbers."""
    here = tmp_path / "here"
    here.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTHONWARNINGS": "ignore"}
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-c", TWO_AT_ONCE]
    files = [tmp_path / f"{number}.pt" for number in range(2)]
    processes = [subprocess.Popen([*command, str(one)], cwd=here, env=environment, **outputs) for one in files]
    for process in processes:
        printed, _ = process.communicate(timeout=120)
        assert (process.returncode, printed) == (0, "")
    assert not list(here.iterdir())
    first, second = map(torch.load, files)
    assert all(first[name].equal(second[name]) for name in first)


KILLED = """
import time
from lockstep.ptq import command

def stop(*args):
    print("stopped", flush=True)
    time.sleep(600)

command._copy_others = stop
command.ptq_command({source!r}, {out!r}, "percentile", device="cpu", steps=1, max_tokens=16)
"""


def test_killed_midway_leaves_nothing_half_written(tmp_path):
    """The masters are written by then, the tokenizer is not."""
    source, out = folder(tmp_path / "masters"), tmp_path / "out"
    script = KILLED.format(source=str(source), out=str(out))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert "stopped\n" in iter(process.stdout.readline, "")
            assert any((tmp_path / ".out.incomplete").iterdir())
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert ptq_command(str(source), str(out), "percentile", device="cpu", steps=1, max_tokens=16) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"masters", "out"}


def test_what_the_command_cannot_use_is_an_error_before_anything_is_written(written, tmp_path):
    source, out = written / "masters", tmp_path / "out"
    (tmp_path / "nothing.txt").write_text("")
    for arguments, message in [
        ({"model": str(tmp_path / "no")}, "no is not a folder"),
        ({"model": str(written / "out")}, r"weight_scale among its masters: quantize the folder without scales"),
        ({"method": "median"}, "method='median': choose rtn"),
        ({"scheme": "FP9"}, "no preset 'FP9'"),
        ({"steps": 0}, "steps=0, max_tokens=512"),
        ({"text": str(tmp_path / "nothing.txt")}, "too few"),
        ({"device": "cuda:99"}, "device='cuda:99' is not there"),
        ({"json": "report.txt"}, r"saved as \.json"),
    ]:
        with pytest.raises(ValueError, match=message):
            ptq_command(**({"model": str(source), "out": str(out), "device": "cpu"} | arguments))
    (out / "mine").mkdir(parents=True)
    with pytest.raises(ExportError, match="out is not empty"):
        ptq_command(str(source), str(out))
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "nothing.txt"}


def no_work(*_, **__):
    raise AssertionError("the work has begun")


def test_a_folder_that_is_not_new_is_refused_before_the_work_in_words_of_the_command(
    written, tmp_path, monkeypatch, capsys
):
    """Which has no option to overwrite."""
    for name in ("load_model", "quantize"):
        monkeypatch.setattr(f"lockstep.ptq.command.{name}", no_work)
    taken = tmp_path / "taken"
    shutil.copytree(written / "out", taken)
    assert cli.main(["ptq", str(written / "masters"), str(taken)]) == 2
    said = capsys.readouterr().err
    assert "taken is not empty: name a new folder as OUT, or empty this one." in said
    assert "overwrite" not in said


def test_a_folder_that_another_process_writes_is_refused_before_the_work(written, tmp_path, monkeypatch):
    monkeypatch.setattr("lockstep.ptq.command.quantize", no_work)
    out = tmp_path / "out"
    with replacing(out), pytest.raises(ExportError, match=rf"another process is exporting to {out}"):
        ptq_command(str(written / "masters"), str(out), device="cpu", steps=1, max_tokens=16)


def test_the_command_says_how_much_text_it_runs_on(written, tmp_path, capsys):
    """One token a byte; the batches are what it says."""
    text = tmp_path / "text.txt"
    text.write_text("0123456789" * 10)
    seen = []

    def watched(model, method, scheme, batches, *rest):
        seen.append([tuple(batch["input_ids"].shape) for batch in batches])
        return quantize(model, method, scheme, batches, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lockstep.ptq.command.quantize", watched)
        arguments = {"device": "cpu", "text": str(text), "max_tokens": 32}
        assert ptq_command(str(written / "masters"), str(tmp_path / "a"), "awq", **arguments) == 0
        assert ptq_command(str(written / "masters"), str(tmp_path / "b"), "mse", **arguments) == 0
    printed = capsys.readouterr().out
    assert f"calibrating on 3 blocks of 32 tokens, 96 in all, of {text}" in printed
    assert f"does not run the model: {text} is not read" in printed
    assert seen == [[(1, 32)] * 3, []]


def test_a_text_of_less_than_one_block_is_refused(written, tmp_path, monkeypatch):
    """Thirty tokens would quantize a model without a word."""
    monkeypatch.setattr("lockstep.ptq.command.quantize", no_work)
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("0123456789" * 3)
    source = str(written / "masters")
    with pytest.raises(ValueError, match=r"text.txt has 30 tokens, less than one block of 128: .*--max_tokens 30"):
        ptq_command(source, str(out), device="cpu", text=str(text))
    with pytest.raises(AssertionError, match="the work has begun"):
        ptq_command(source, str(out), device="cpu", text=str(text), max_tokens=30)
    text.write_text("0123456789" * 13)
    with pytest.raises(AssertionError, match="the work has begun"):  # blocks are no longer than the model's context
        ptq_command(source, str(out), device="cpu", text=str(text))


@pytest.mark.parametrize("method", ["gptq", "mse", "hqq", "rtn"])
def test_one_end_of_a_tie_is_refused_before_the_work(monkeypatch, method):
    """Else the embedding would be quantized along, and the export would refuse what took minutes."""
    monkeypatch.setitem(ptq.quantize.__globals__, "_run", no_work)
    model = tiny_llama(tie_word_embeddings=True)
    before = state(model)
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model\.embed_tokens.*Name lm_head in ignore"):
        quantize(model, method, G32, batches(), ignore=())
    assert all(tensor.equal(before[name]) for name, tensor in state(model).items())
    assert not list(quantized_modules(model))


def test_scales_of_another_rule_are_refused_in_training_and_in_export(written):
    folder = written / "out"
    model = AutoModelForCausalLM.from_pretrained(folder)
    lockstep.prepare(model, G32, learned_scales=True)  # whose codes end at -7
    with pytest.raises(ValueError, match=r"weight_scale: the scales in .* are for scale_rule 'amax/7.5', asked is"):
        load_scales(model, folder)
    with pytest.raises(ExportError, match=r"are for scale_rule 'amax/7.5', asked is 'amax/7'"):
        convert(folder, written / "wrong", G32)
    assert not (written / "wrong").exists()


def test_scales_that_a_run_does_not_use_are_a_warning(written, tmp_path):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=1, accelerator="cpu", callbacks=[QATCallback(G32)], **quiet)
    with pytest.warns(UserWarning, match="weight scales, such as .* which are not used"):
        trainer.fit(Run(written / "out"), DataLoader(token_ids(4), batch_size=2))
    model = AutoModelForCausalLM.from_pretrained(written / "out")
    scheme = Scheme.preset("W4A16", group_size=32, scale_rule="amax/7.5")
    lockstep.prepare(model, scheme, learned_scales=True)
    with pytest.warns(UserWarning, match=r"weight_scale is not what .* stores.*load_scales\(model, folder\)"):
        common.warn_of_unread_scales(model)
    load_scales(model, written / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        common.warn_of_unread_scales(model)


def test_the_card_says_that_it_was_not_trained(written, tmp_path):
    scheme = as_argument(Scheme.preset("W4A16", group_size=32, scale_rule="amax/7.5"))
    assert cli.main(["export", str(written / "out"), str(tmp_path / "x"), "--workers=1", f"--scheme={scheme}"]) == 0
    assert "Not trained: quantized afterwards by lockstep ptq --method gptq." in (tmp_path / "x/README.md").read_text()


@pytest.mark.parametrize("damage", ["deleted", "swapped", "report"])
def test_scales_that_are_not_those_of_the_method_are_named(written, tmp_path, damage):
    shutil.copytree(written / "out", tmp_path / "out")
    q, k = (f"model.layers.{number}.mlp.down_proj.weight_scale" for number in (0, 1))

    def change(tensors):
        if damage == "deleted":
            del tensors[q]
        else:
            tensors[q], tensors[k] = tensors[k], tensors[q]

    if damage == "report":
        (tmp_path / "out" / "ptq.json").write_text('{"method": "gptq"}')
    else:
        edit_tensors(tmp_path / "out", change)
    said = {
        "deleted": f"{q}, .* is not there",
        "swapped": f"{q}, .* is not what it was",
        "report": "ptq.json is no report",
    }
    scheme = Scheme.preset("W4A16", group_size=32, scale_rule="amax/7.5")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    lockstep.prepare(model, scheme, learned_scales=True)
    with pytest.raises(ValueError, match=said[damage]):
        load_scales(model, tmp_path / "out")
    with pytest.raises((ExportError, ValueError), match=said[damage]):
        convert(tmp_path / "out", tmp_path / "served", scheme)


def test_what_hqq_makes_is_not_exported_as_something_else(tmp_path):
    source = folder(tmp_path / "masters")
    assert cli.main(["ptq", str(source), str(tmp_path / "out"), "--method=hqq", "--device=cpu", "--steps=1"]) == 0
    with pytest.raises(ExportError, match="real zero points no format stores"):
        convert(tmp_path / "out", tmp_path / "served", "W4A16")
