"""LoRA in its three modes: what the adapter trains on is what is served, bit for bit, and what cannot be is refused.

The oracle of merging is peft itself, on a twin of the model that was never prepared.
"""

from __future__ import annotations

import copy
import filecmp
import gc
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import ranks
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from models import TinyMlp, channel, grouped, prepared, tiny_llama, tiny_moe, token_ids
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, MixtralConfig

import lockstep
from lockstep import Scheme, grid
from lockstep.callbacks import QATCallback
from lockstep.export import Checkpoint, CheckpointError, ExportError, adapter
from lockstep.export.checkpoint import bitwise_equal
from lockstep.qat import QATLinear, lora, quantized_modules
from lockstep.qat.frozen import FrozenLinear
from lockstep.qat.lora_base import AdaptedLinear
from lockstep.qat.lora_frozen import FrozenLora
from lockstep.recipes import CausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.*bottleneck.*", "ignore:.*isinstance.treespec.*", "ignore:.*LeafSpec")

BF16, FP32 = torch.bfloat16, torch.float32
SCHEMES = {"W4A16": grouped(), "W4A16-channel": channel()}
SCHEMES |= {name: Scheme.preset(name) for name in ("W8A8", "FP8_DYNAMIC")}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
IDS = token_ids()
SETTINGS = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear"}


def config(**fields: Any) -> LoraConfig:
    """Of rank 4 on every linear layer, with a scaling that is no power of two."""
    return LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | fields)


def trained(model: Any, seed: int = 0) -> Any:
    """`model` with every B filled, as after some training: it starts at zero, where an adapter has no effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def adapted(dtype: torch.dtype = BF16, scheme: Any = "W4A16", bias: bool = False, **fields: Any) -> Any:
    """A prepared Llama with an adapter in mode ``merged``."""
    torch.manual_seed(0)
    return trained(lora.get_peft_model(prepared(tiny_llama(dtype, attention_bias=bias), scheme), config(**fields)))


@torch.no_grad()
def logits(model: nn.Module, autocast: bool = False) -> Tensor:
    with torch.autocast("cpu", BF16) if autocast else nullcontext():
        return model(input_ids=IDS).logits


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    names.remove("README.md")  # the card names its folder
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def plain_twin(model: Any, **fields: Any) -> Any:
    """A model with the base and the adapter of `model`, by peft alone."""
    twin = peft.get_peft_model(copy.deepcopy(model).unload(), config(**fields))
    lockstep.unprepare(twin)
    twin.load_state_dict(model.state_dict())
    return twin


# Merged: the weight ---------------------------------------------------------------------------------------------------


@every_scheme
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("precision", ["bf16", "fp32", "autocast"])
def test_merging_and_exporting_gives_the_bits_of_the_forward(scheme, rslora, precision, tmp_path):
    """Of every weight, and so of every logit: in the model with its adapter, merged, and read back from the folder."""
    dtype, autocast = BF16 if precision == "bf16" else FP32, precision == "autocast"
    model = adapted(dtype, scheme, bias=True, use_rslora=rslora)
    twin = plain_twin(model, use_rslora=rslora)
    expected = logits(model, autocast)
    weights = {name.removesuffix(".base_layer"): layer.weight for name, layer in quantized_modules(model)}
    with lora.merged(model) as served:
        lockstep.export.save_pretrained(served, tmp_path / "in-place")

    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, autocast), expected)
    assert {type(layer) for _, layer in quantized_modules(merged)} == {QATLinear}
    lockstep.export.save_pretrained(merged, tmp_path / "merged")
    assert same_files(tmp_path / "in-place", tmp_path / "merged")
    by_peft = dict(twin.merge_and_unload().named_parameters())
    stored = Checkpoint(tmp_path / "merged")
    for name, layer in quantized_modules(merged):
        assert bitwise_equal(layer.weight.detach(), weights[f"base_model.model.{name}"])
        assert bitwise_equal(layer.weight.detach(), by_peft[f"{name}.weight"].detach())
        served_weight = grid.dequantize(stored.layer(name), layer.scheme.weights)
        assert bitwise_equal(served_weight, grid.dequantize(layer.quantize(), layer.scheme.weights))
    plain_model = prepared(plain_copy(merged), scheme)
    assert torch.equal(logits(plain_model, autocast), expected)


def plain_copy(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    lockstep.unprepare(twin)
    return twin


def test_the_adapter_is_merged_before_the_grid_and_not_after():
    """Peers quantize the base alone and add the adapter to it, or quantize W, A and B apart: other weights."""
    model = adapted()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    base, spec = layer.base_layer, layer.base_layer.scheme.weights
    w, a, b = base._parameters["weight"], layer.lora_A.default.weight, layer.lora_B.default.weight
    with torch.no_grad():
        served = grid.dequantize(base.quantize(), spec)
        assert torch.equal(served, grid.fake_quantize((w + layer.get_delta_weight("default")).to(BF16), spec))
        base_alone = (grid.fake_quantize(w, spec) + layer.get_delta_weight("default")).to(BF16)
        wide = grouped(32).weights
        apart = [grid.fake_quantize(F.pad(one, (0, -one.shape[1] % 32)), wide)[:, : one.shape[1]] for one in (a, b)]
        apart_weight = (grid.fake_quantize(w, spec) + 2.5 * apart[1].float() @ apart[0].float()).to(BF16)
    for other in (base_alone, apart_weight):
        assert (other != served).float().mean() > 0.5


def test_peft_alone_on_a_prepared_model_trains_what_it_does_not_serve():
    """The mistake that `merged` refuses and `adopt` mends: merging moves the logits."""
    model = trained(peft.get_peft_model(prepared(tiny_llama(), "W4A16"), config()))
    before = logits(model)
    assert not torch.equal(before, logits(copy.deepcopy(model).merge_and_unload()))
    refusal = r"q_proj trains FQ\(W\) \+ s \* B @ A.*call lockstep.qat.lora.adopt"
    with pytest.raises(TypeError, match=refusal), lora.merged(model):
        pass
    with pytest.raises(TypeError, match=r"q_proj is within peft's own layer.*call lockstep.qat.lora.adopt"):
        copy.deepcopy(model)(input_ids=IDS)
    lora.adopt(model)
    model(input_ids=IDS)
    mended = logits(model)
    assert torch.equal(mended, logits(model.merge_and_unload()))


def test_a_prepared_layer_that_peft_lets_go_trains_again():
    """Merged without training, taken out, or prepared anew: the layer is no other than before."""
    model = peft.get_peft_model(prepared(tiny_llama(), "W4A16"), config())
    twin = trained(copy.deepcopy(model))
    for freed in (model.unload(), twin.merge_and_unload()):
        assert {type(layer) for _, layer in quantized_modules(freed)} == {QATLinear}
        freed.requires_grad_(True)(input_ids=IDS).logits.sum().backward()
    model = peft.get_peft_model(prepared(tiny_llama(), "W4A16"), config())
    lockstep.prepare(model, "W4A16")
    assert {type(layer) for _, layer in quantized_modules(model)} == {AdaptedLinear}


def test_safe_merge_changes_no_bit_and_finds_nan():
    """In peft it rounds the adapter's product to bf16 before it is added."""
    model = adapted()
    by_peft = plain_twin(model)
    weight = "model.layers.0.mlp.up_proj.weight"
    safe = copy.deepcopy(model).merge_and_unload(safe_merge=True).get_parameter(weight)
    assert torch.equal(safe, copy.deepcopy(model).merge_and_unload().get_parameter(weight))
    assert not torch.equal(safe, by_peft.merge_and_unload(safe_merge=True).get_parameter(weight))
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight")[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True)


def test_several_active_adapters_are_merged_in_their_order():
    model = adapted()
    model.add_adapter("second", lora.register(config(r=2, target_modules=["q_proj", "up_proj"])))
    model.base_model.set_adapter(["default", "second"])
    trained(model, seed=1)
    expected = logits(model)
    model.set_adapter("second")
    alone = logits(model)
    model.base_model.set_adapter(["default", "second"])
    assert not torch.equal(alone, expected)
    assert torch.equal(logits(model.merge_and_unload()), expected)


def test_adapters_are_switched_off_merged_and_taken_out_as_in_peft():
    model, base = adapted(), prepared(tiny_llama(), "W4A16")
    on, off = logits(model), logits(base)
    with model.disable_adapter():
        assert torch.equal(logits(model), off)
    model.merge_adapter()
    assert torch.equal(logits(model), on)
    model.unmerge_adapter()
    assert not model.base_model.model.model.layers[0].mlp.up_proj.merged
    assert torch.equal(logits(adapted().unload()), off)


def test_scales_of_layers_that_engines_fuse_come_from_the_merged_weights():
    """FP8 by tensor: q, k and v share one, of what is served."""
    scheme = Scheme.preset("FP8_DYNAMIC", strategy="tensor")
    model = adapted(scheme=scheme)
    expected = logits(model)
    layers = dict(quantized_modules(model.base_model.model))
    attention = [layers[f"model.layers.0.self_attn.{name}_proj.base_layer"] for name in "qkv"]
    assert len({layer.quantize().scale.item() for layer in attention}) == 1
    assert attention[0].amax().item() == max(layer.weight.abs().max().item() for layer in attention)
    assert torch.equal(logits(model.merge_and_unload()), expected)


# Merged: training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
@pytest.mark.parametrize("ways", [1, 2], ids=["one", "two"])
def test_gradients_are_those_of_the_straight_through_estimator(scheme, ways):
    """By autograd, of x_hat @ (M + (FQ(M) - M).detach()).T with M the merged weight; in fp32, the base gets none."""
    torch.manual_seed(0)
    model = prepared(TinyMlp(dtype=FP32), scheme)
    names = ["default", "second"][:ways]
    fields = {"task_type": None, "target_modules": ["first", "second"]}
    adapted_model = lora.get_peft_model(model, config(**fields))
    for name in names[1:]:
        adapted_model.add_adapter(name, lora.register(config(**fields)))
    adapted_model.base_model.set_adapter(names)
    layer = trained(adapted_model).base_model.model.first
    x, grad = torch.randn(3, 5, 128, requires_grad=True), torch.randn(3, 5, 256)
    layer(x).backward(grad)

    factors = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for name in names]
    leaves = [(a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()) for a, b in factors]
    base = layer.base_layer._parameters["weight"]
    merged = base + sum(2.5 * b @ a for a, b in leaves)
    spec, inputs = layer.base_layer.scheme.weights, layer.base_layer.scheme.activations
    quantized = merged + (grid.fake_quantize(merged.detach(), spec).float() - merged.detach())
    seen = x.detach().clone().requires_grad_()
    x_hat = seen
    if inputs is not None:
        codes = lockstep.activations.quantize(seen.detach(), inputs, None)
        x_hat = seen + (lockstep.activations.dequantize(codes, FP32) - seen).detach()
    F.linear(x_hat, quantized).backward(grad)
    for (a, b), (want_a, want_b) in zip(factors, leaves, strict=True):
        torch.testing.assert_close(a.grad, want_a.grad, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(b.grad, want_b.grad, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(x.grad, seen.grad, rtol=2e-4, atol=2e-4)
    assert base.grad is None


def backward(model: Any, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, **options).loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def test_only_adapters_have_gradients_and_a_step_moves_what_is_served():
    model = adapted(FP32).train()
    grads = backward(model)
    assert set(grads) == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert all(grad.isfinite().all() for grad in grads.values())
    before = {name: layer.quantize().codes for name, layer in quantized_modules(model)}
    masters = {name: layer._parameters["weight"].clone() for name, layer in quantized_modules(model)}
    torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2).step()
    for name, layer in quantized_modules(model):
        assert not torch.equal(layer.quantize().codes, before[name])
        assert torch.equal(layer._parameters["weight"], masters[name])


def weights_alive() -> set[int]:
    """Where tensors of the shape of a layer's weight are in memory."""
    gc.collect()
    return {
        one.data_ptr()
        for one in gc.get_objects()
        if type(one) in (Tensor, nn.Parameter) and one.shape == (512, 256) and not one.is_meta
    }


@every_scheme
def test_neither_the_merged_nor_the_quantized_weight_is_kept_for_the_backward(scheme):
    """What a layer saves is its input and references to parameters."""
    model = adapted(scheme=scheme)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 256, dtype=BF16, requires_grad=True)
    before = weights_alive()  # other tests' too
    y = layer(x)
    own = {one.data_ptr() for one in [x, *model.parameters()]}
    kept, nodes = [], [y.grad_fn]
    for node in nodes:
        kept += [one for one in getattr(node, "saved_tensors", ()) if one is not None]
        nodes += [following for following, _ in node.next_functions if following is not None]
    # Asking for the merged weight computes it anew: what the other tensors are shows that nothing else is kept.
    weights = [one for one in kept if one.shape == (512, 256)]
    assert len(weights) == 1
    assert {one.data_ptr() for one in kept if one.shape != (512, 256)} <= own
    assert torch.equal(weights[0], layer.base_layer.weight)
    (again,) = [one for one in nodes[1].saved_tensors if one is not None and one.shape == (512, 256)]
    assert again.data_ptr() != weights[0].data_ptr()
    del kept, weights, again, nodes, node
    assert weights_alive() <= own | before


def test_checkpointing_and_compiling_change_no_bit():
    model = adapted(FP32).train()
    plain = backward(model)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    again = backward(model)
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 256, requires_grad=True)
    want = layer(x)
    assert torch.equal(torch.compile(layer, backend="eager")(x), want)
    assert torch.equal(checkpoint(layer, x, use_reentrant=False), want)


def test_an_adapter_that_changes_before_the_backward_is_found():
    model = adapted()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    y = layer(torch.randn(3, 256, dtype=BF16, requires_grad=True))
    with torch.no_grad():
        layer.lora_A.default.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_base_that_changes_before_the_backward_is_found():
    model = adapted()
    up_proj = model.base_model.model.model.layers[1].mlp.up_proj.base_layer
    loss = model(input_ids=IDS).logits.float().mean()
    with torch.no_grad():
        up_proj._parameters["weight"].mul_(2)
    with pytest.raises(RuntimeError, match=r"layers.1.mlp.up_proj: the base was changed in place"):
        loss.backward()


# Merged: the ways there -----------------------------------------------------------------------------------------------


@every_scheme
def test_adapters_may_come_before_the_quantization(scheme):
    """With the hub's names in the report, and no adapter quantized."""
    torch.manual_seed(0)
    model = trained(peft.get_peft_model(tiny_llama(), config()))
    report = lora.prepare(model, scheme)
    expected = {name for name, _ in quantized_modules(prepared(tiny_llama(), scheme))}
    assert {row.name for row in report.quantized} == expected
    assert {type(layer) for _, layer in quantized_modules(model)} == {AdaptedLinear}
    assert torch.equal(logits(model), logits(adapted(scheme=scheme)))
    again = lora.prepare(model, scheme)
    assert [row.name for row in again.quantized] == [row.name for row in report.quantized]
    assert torch.equal(logits(model), logits(model.merge_and_unload()))


def test_unprepare_gives_back_what_peft_computes_alone():
    model = adapted()
    twin = plain_twin(model)
    lockstep.unprepare(model)
    assert torch.equal(logits(model), logits(twin))
    lora.prepare(model, "W4A16")
    assert torch.equal(logits(model), logits(adapted()))


def test_a_saved_adapter_is_pefts_own_and_loads_on_another_base(tmp_path):
    model = adapted(modules_to_save=["embed_tokens"])
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    twin = peft.get_peft_model(tiny_llama(), config(modules_to_save=["embed_tokens"]))
    assert set(model.state_dict()) == set(twin.state_dict())
    model.save_pretrained(tmp_path)
    twin.save_pretrained(tmp_path / "twin")
    assert (
        load_file(tmp_path / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "twin" / "adapter_model.safetensors").keys()
    )
    loaded = PeftModel.from_pretrained(
        prepared(tiny_llama(), "W4A16"), tmp_path, config=lora.register(LoraConfig.from_pretrained(tmp_path))
    )
    assert torch.equal(logits(loaded), logits(model))
    with lora.merged(loaded) as served:
        assert torch.equal(logits(served), logits(model))
    assert torch.equal(logits(loaded.merge_and_unload()), logits(model))


def test_what_is_not_quantized_is_merged_too_and_put_back():
    """An adapter on the head, and a module that peft trains whole."""
    model = adapted(target_modules=["up_proj", "lm_head"], modules_to_save=["model.norm"])
    state = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model).merge_and_unload()
    with lora.merged(model) as served:
        names = set(served.state_dict())
        merged = {name: value.clone() for name, value in served.state_dict().items()}
        assert torch.equal(logits(served), logits(expected))
    assert names == set(tiny_llama().state_dict())
    assert torch.equal(merged["lm_head.weight"], expected.lm_head.weight)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(
        logits(model), logits(adapted(target_modules=["up_proj", "lm_head"], modules_to_save=["model.norm"]))
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_trained_tokens_are_merged_into_the_embedding(tied, tmp_path):
    """``trainable_token_indices``: rows of the embedding, and by peft of a tied head too."""
    base = prepared(tiny_llama(tie_word_embeddings=tied), "W4A16")
    model = trained(lora.get_peft_model(base, config(trainable_token_indices=[1, int(IDS[0, 0])])))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    expected = logits(model)
    lockstep.export.save_pretrained(model, tmp_path / "in-place")
    assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), expected)
    lockstep.export.save_pretrained(merged, tmp_path / "merged")
    assert same_files(tmp_path / "in-place", tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(stored["model.embed_tokens.weight"], merged.model.embed_tokens.weight)
    assert not torch.equal(stored["model.embed_tokens.weight"], tiny_llama().model.embed_tokens.weight)
    assert ("lm_head.weight" in stored) is not tied


def test_a_model_is_copied_with_its_adapters():
    model = adapted()
    twin = copy.deepcopy(model)
    expected = logits(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert torch.equal(logits(twin), expected)
    assert not torch.equal(logits(model), expected)


# Merged: refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_dropout": 0.1}, "q_proj: lora_dropout=0.1 drops inputs of the adapter alone"),
        ({"lora_bias": True}, "q_proj: lora_bias=True"),
        ({"use_dora": True}, "q_proj: use_dora: only plain LoRA and rsLoRA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
    ],
    ids=["dropout", "bias", "dora", "fan_in_fan_out"],
)
@pytest.mark.parametrize("first", ["prepare", "adapters"])
def test_what_has_no_exact_merged_weight_is_refused_by_name(fields, message, first):
    if first == "prepare":
        with pytest.raises(ValueError, match=message):
            lora.get_peft_model(prepared(tiny_llama(), "W4A16"), config(target_modules=["q_proj"], **fields))
        return
    if "fan_in_fan_out" in fields:
        pytest.skip("peft itself sets it False on an nn.Linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_llama(attention_bias=True), config(target_modules=["q_proj"], **fields))
    with pytest.raises(ValueError, match=r"q_proj: (adapter 'default' has lora_dropout|lora_bias, DoRA)"):
        lora.prepare(model, "W4A16")


def state_of(model: nn.Module) -> Any:
    """What a refused call must leave as it was: modules, their classes and attributes, parameters and their flags."""
    modules = [(name, id(one), type(one), sorted(vars(one))) for name, one in model.named_modules()]
    parameters = [
        (name, id(one), one.requires_grad, one.data_ptr())
        for name, one in model.named_parameters(remove_duplicate=False)
    ]
    return modules, parameters, [name for name, _ in model.named_buffers()]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"modules_to_save": ["embed_tokens"]}, "model.embed_tokens"),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, "model.embed_tokens"),
    ],
    ids=["lora-head", "lora-embedding", "whole-head", "whole-embedding", "both-apart"],
)
@pytest.mark.filterwarnings("ignore:Model has .tie_word", "ignore:Model with .tie_word", "ignore:.*ensure_weight_tying")
def test_one_end_of_a_tie_does_not_train_by_itself(fields, name):
    """Merged, both ends of the tie would have the adapter, or neither; the model is as it was."""
    message = rf"^{name} is trained by itself, but its weight is tied to .*tie_word_embeddings = False"
    model = prepared(tiny_llama(tie_word_embeddings=True), "W4A16")
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        lora.get_peft_model(model, config(**fields))
    assert state_of(model) == before

    by_peft = peft.get_peft_model(tiny_llama(tie_word_embeddings=True), config(**fields))
    before = state_of(by_peft)
    with pytest.raises(ValueError, match=message):
        lockstep.prepare(by_peft, "W4A16")
    assert state_of(by_peft) == before
    on_prepared = peft.get_peft_model(model, config(**fields))
    before = state_of(on_prepared)
    with pytest.raises(ValueError, match=message):
        lora.adopt(on_prepared)
    assert state_of(on_prepared) == before


def test_a_tie_that_both_ends_keep_is_served_and_so_is_a_head_of_its_own(tmp_path):
    base = prepared(tiny_llama(tie_word_embeddings=True), "W4A16")
    both = config(modules_to_save=["lm_head", "embed_tokens"], ensure_weight_tying=True)
    model = trained(lora.get_peft_model(base, both))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save.default.weight += 1
    with lora.merged(model) as served:
        assert served.lm_head.weight is served.model.embed_tokens.weight
        assert torch.equal(logits(served), logits(model))

    untied = tiny_llama(tie_word_embeddings=True)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    untied.config.tie_word_embeddings = False
    model = trained(lora.get_peft_model(prepared(untied, "W4A16"), config(target_modules=["q_proj", "lm_head"])))
    lockstep.export.save_pretrained(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["model.embed_tokens.weight"], untied.model.embed_tokens.weight)
    assert torch.equal(stored["lm_head.weight"], model.merge_and_unload().lm_head.weight)


@pytest.mark.parametrize("refused", ["dropout", "learned_scales", "reuse", "another_kind"])
def test_a_refused_preparation_leaves_the_adapted_model_as_it_was(refused):
    settings = config(lora_dropout=0.1 if refused == "dropout" else 0.0)
    if refused == "another_kind":
        settings = peft.LoHaConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_llama(), settings)
    before = state_of(model)
    options = {"learned_scales": {"learned_scales": True}, "reuse": {"reuse": "codes"}}.get(refused, {})
    with pytest.raises((ValueError, TypeError)):
        lockstep.prepare(model, "W4A16", **options)
    assert state_of(model) == before
    if refused not in ("dropout", "another_kind"):  # nor does a second call that fails undo the first
        lockstep.prepare(model, "W4A16")
        expected = logits(model)
        before = state_of(model)
        with pytest.raises(ValueError, match="q_proj"):
            lockstep.prepare(model, "W4A16", **options)
        assert state_of(model) == before
        assert torch.equal(logits(model), expected)


def test_layers_that_share_a_master_are_merged_into_none(tmp_path):
    """``layer_replication``: peft would add the adapters of both layers to the one weight that they share."""
    model = trained(lora.get_peft_model(prepared(tiny_llama(), "W4A16"), config(layer_replication=[(0, 2), (0, 1)])))
    with pytest.raises(ValueError, match=r"q_proj: layer_replication: layers share this weight"):
        model.merge_and_unload()
    with lora.merged(model) as served:
        assert torch.equal(logits(served), logits(model))


def test_bases_whose_weight_is_not_theirs_alone_are_refused():
    with pytest.raises(ValueError, match="q_proj: reuse='codes' keeps the quantized weight"):
        lora.get_peft_model(prepared(tiny_llama(), "W4A16", reuse="codes"), config())
    with pytest.raises(ValueError, match="q_proj: learned scales belong to one weight"):
        lora.get_peft_model(prepared(tiny_llama(), "W4A16", learned_scales=True), config())
    model = adapted()
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer._parameters["weight"].requires_grad_()
    with pytest.raises(ValueError, match=r"q_proj: the base under an adapter is frozen"):
        model(input_ids=IDS)


def test_other_adapters_and_mixed_batches_are_refused():
    model = peft.get_peft_model(tiny_llama(), peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="q_proj is a Linear: around prepared layers only LoRA"):
        lora.prepare(model, "W4A16")
    with pytest.raises(ValueError, match="adapter_names: several adapters in one batch"):
        adapted().eval()(input_ids=IDS, adapter_names=["default", "__base__"])


def test_a_mode_is_asked_for_by_name_and_on_its_own_base(tmp_path):
    with pytest.raises(ValueError, match="mode='dora': choose one of 'merged', 'frozen-grid', 'qlora'"):
        lora.get_peft_model(tiny_llama(), config(), "dora")
    for mode, advice in (
        ("merged", "call lockstep.prepare"),
        ("frozen-grid", "load_frozen"),
        ("qlora", r"quantization_config=lora.nf4\(\)"),
    ):
        with pytest.raises(ValueError, match=f"mode {mode!r}: no layer of this LlamaForCausalLM.*{advice}"):
            lora.get_peft_model(tiny_llama(), config(), mode)
    with pytest.raises(ValueError, match="mode 'frozen-grid': no layer"):
        lora.get_peft_model(prepared(tiny_llama(), "W4A16"), config(), "frozen-grid")


RANKS = """
import copy
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from test_lora import FP32, IDS, adapted, quantized_modules
from lockstep.qat import lora

torch.set_num_threads(1)
dist.init_process_group("gloo")

def step(model, inner):
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD([one for one in inner.parameters() if one.requires_grad], lr=0.1).step()
    full = {name: one.detach() for name, one in inner.named_parameters() if "lora_" in name}
    return {name: one.full_tensor() if hasattr(one, "full_tensor") else one for name, one in full.items()}

for scheme in ("W4A16", "W8A8"):
    whole = adapted(FP32, scheme).train()
    before = {name: one.detach().clone() for name, one in whole.named_parameters()}
    ddp, sharded = copy.deepcopy(whole), copy.deepcopy(whole)
    expected = step(whole, whole)
    assert any(not torch.equal(before[name], one) for name, one in expected.items())
    for block in sharded.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(sharded)
    for got in (step(DistributedDataParallel(ddp), ddp), step(sharded, sharded)):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], one) for name, one in expected.items()), scheme
    try:
        [layer.quantize() for _, layer in quantized_modules(sharded)]
    except ValueError as error:
        print(error)
"""


def test_ranks_train_the_adapters_that_one_process_trains(tmp_path):
    """DDP and FSDP2, the same batch on both: the same bits. Outside of the forward shards are refused, not merged."""
    for output in ranks.run(RANKS, tmp_path):
        lines = output.splitlines()
        assert len(lines) == 2
        assert all("its weight or its adapter's is sharded over ranks here" in line for line in lines)


def test_without_peft_it_says_what_to_install_and_the_rest_works():
    script = """
import sys
sys.modules["peft"] = None
import lockstep
from lockstep.export import adapter
import lockstep.recipes
try:
    import lockstep.qat.lora
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "LoRA needs peft" in done.stdout
    assert "pip install peft" in done.stdout


# Experts --------------------------------------------------------------------------------------------------------------


def mixtral(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=512, num_local_experts=4)
    return AutoModelForCausalLM.from_config(model, dtype=dtype).eval()


def experts_config(**fields: Any) -> LoraConfig:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return config(target_modules=["q_proj"], target_parameters=parameters, **fields)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@every_scheme
def test_experts_train_on_the_merged_weights_that_are_exported(scheme, dtype, tmp_path):
    """Through peft's ``target_parameters``; its own forward adds otherwise than its merge."""
    model = trained(lora.get_peft_model(prepared(mixtral(dtype), scheme), experts_config()))
    twin = trained(peft.get_peft_model(mixtral(dtype), experts_config()))
    assert set(model.state_dict()) == set(twin.state_dict())
    grads = backward(model)
    assert set(grads) == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert all(grad.abs().sum() > 0 for name, grad in grads.items())
    expected = logits(model)
    assert not torch.equal(expected, logits(prepared(mixtral(dtype), scheme)))
    with lora.merged(model) as served:
        assert torch.equal(logits(served), expected)
        lockstep.export.save_pretrained(served, tmp_path / "in-place")
    merged, by_peft = model.merge_and_unload(), dict(twin.merge_and_unload().named_parameters())
    for name, parameter in merged.named_parameters():
        assert bitwise_equal(parameter.detach(), by_peft[name].detach())
    assert torch.equal(logits(merged), expected)
    lockstep.export.save_pretrained(merged, tmp_path / "merged")
    assert same_files(tmp_path / "in-place", tmp_path / "merged")


def test_experts_of_which_the_adapters_came_first_are_adopted():
    torch.manual_seed(0)
    model = trained(peft.get_peft_model(mixtral(FP32), experts_config()))
    lora.prepare(model, "W4A16")
    expected = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), expected)


def test_peft_alone_on_prepared_experts_does_not_train():
    """Its forward adds the adapter in one operation, its merge in two: in bf16 other weights."""
    settings = experts_config()
    settings.target_modules = set()
    model = trained(peft.get_peft_model(prepared(mixtral(BF16), "W4A16"), settings))
    logits(model)
    with pytest.raises(TypeError, match=r"experts is within peft's own layer.*call lockstep.qat.lora.adopt"):
        model(input_ids=IDS)
    twin = copy.deepcopy(model).merge_and_unload()
    twin.requires_grad_(True)(input_ids=IDS).logits.sum().backward()
    lora.adopt(model)
    model(input_ids=IDS).logits.sum().backward()
    expected = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), expected)


def test_gradients_of_experts_are_those_of_the_merged_parameter():
    """Straight-through: B's and A's follow from the gradient that the whole merged parameter would have."""
    model = trained(lora.get_peft_model(prepared(mixtral(FP32), "W4A16"), experts_config()))
    grads = backward(model)
    layer = model.base_model.model.model.layers[0].mlp.experts
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    whole = prepared(plain_copy(copy.deepcopy(model).merge_and_unload()), "W4A16").requires_grad_(True)
    whole(input_ids=IDS, labels=IDS).loss.backward()
    grad = whole.model.layers[0].mlp.experts.down_proj.grad
    own_a, own_b = a.view(4, 4, 128), b.view(128, 4, 4).permute(2, 0, 1)
    want_a = 2.5 * torch.bmm(own_b.transpose(1, 2), grad).reshape(16, 128)
    want_b = 2.5 * torch.bmm(grad, own_a.transpose(1, 2)).permute(1, 2, 0).reshape(128, 16)
    prefix = "base_model.model.model.layers.0.mlp.experts"
    torch.testing.assert_close(grads[f"{prefix}.lora_A.default.weight"], want_a, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(grads[f"{prefix}.lora_B.default.weight"], want_b, rtol=1e-3, atol=1e-6)


# Frozen grid ----------------------------------------------------------------------------------------------------------

FROZEN = SCHEMES | {name: Scheme.preset(name) for name in ("W4A16_ASYM", "W8A16", "NVFP4A16")}
every_frozen = pytest.mark.parametrize("scheme", FROZEN.values(), ids=FROZEN.keys())


def exported(folder: Path, scheme: Any = "W4A16", **model: Any) -> nn.Module:
    """A prepared model, of which `folder` holds the export."""
    whole = prepared(tiny_llama(**model), scheme)
    lockstep.export.save_pretrained(whole, folder)
    return whole


@every_frozen
def test_a_frozen_base_computes_and_saves_what_was_exported(scheme, tmp_path):
    """From the folder and from the model in memory: the same logits, and the same files byte for byte."""
    model = exported(tmp_path / "base", scheme, attention_bias=True)
    loaded, frozen = adapter.load_frozen(tmp_path / "base"), adapter.freeze(copy.deepcopy(model))
    for number, base in enumerate((loaded, frozen)):
        assert torch.equal(logits(base), logits(model))
        assert not any(parameter.requires_grad for parameter in base.parameters())
        adapter.save_frozen(base, tmp_path / f"{number}")
        assert same_files(tmp_path / f"{number}", tmp_path / "base")
    assert not any(isinstance(module, QATLinear) for module in [*loaded.modules(), *frozen.modules()])


@every_frozen
def test_training_memory_is_what_engines_store(scheme, tmp_path):
    """Words, scales and zero points; 16 bytes more a layer where the format stores a shape."""
    exported(tmp_path / "base", scheme)
    base = adapter.load_frozen(tmp_path / "base")
    layers = [one for one in base.modules() if isinstance(one, FrozenLinear)]
    assert len(layers) == 14
    for layer in layers:
        tensors = {**layer._parameters, **layer._buffers}
        tensors.pop("weight_shape", None)
        packed = scheme.activations is None
        stored = scheme.weights.stored_bytes(layer.out_features, layer.in_features, packed)
        assert sum(one.nbytes for one in tensors.values() if one is not None) == sum(stored)


@every_frozen
def test_a_frozen_base_passes_gradients_on_and_keeps_nothing_dequantized(scheme, tmp_path):
    """The input's gradient is that of the layer with masters, from which nothing but the packed tensors is needed."""
    model = exported(tmp_path / "base", scheme)
    base = adapter.load_frozen(tmp_path / "base")
    want, layer = model.model.layers[0].mlp.up_proj, base.model.layers[0].mlp.up_proj
    x = torch.randn(3, 256, dtype=BF16, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        y = layer(x)
    assert kept == []
    grad = torch.randn_like(y)
    y.backward(grad)
    want(other).backward(grad)
    assert torch.equal(x.grad, other.grad)


@every_scheme
def test_compiling_a_frozen_layer_changes_no_bit(scheme):
    model = lora.get_peft_model(adapter.freeze(prepared(tiny_llama(), scheme)), config(), "frozen-grid")
    layer = trained(model).base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 256, dtype=BF16, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    y, compiled = layer(x), torch.compile(layer, backend="aot_eager")(other)
    assert torch.equal(y, compiled)
    y.sum().backward()
    compiled.sum().backward()
    assert torch.equal(x.grad, other.grad)


def test_a_static_range_passes_no_gradient_where_it_clips(tmp_path):
    model = prepared(tiny_llama(), Scheme.preset("W8A8", activations={"strategy": "tensor", "dynamic": False}))
    for _, layer in quantized_modules(model):
        layer.input_scale.fill_(0.01)
    lockstep.export.save_pretrained(model, tmp_path / "base")
    base = adapter.load_frozen(tmp_path / "base")
    assert torch.equal(logits(base), logits(model))
    x = torch.linspace(-4, 4, 256, dtype=BF16).expand(2, 256).clone().requires_grad_()
    other = x.detach().clone().requires_grad_()
    base.model.layers[0].mlp.up_proj(x).sum().backward()
    model.model.layers[0].mlp.up_proj(other).sum().backward()
    assert torch.equal(x.grad, other.grad)
    assert (x.grad == 0).any()
    adapter.save_frozen(base, tmp_path / "again")
    assert same_files(tmp_path / "again", tmp_path / "base")


def frozen(folder: Path, **fields: Any) -> Any:
    torch.manual_seed(0)
    return trained(lora.get_peft_model(adapter.load_frozen(folder), config(**fields), "frozen-grid"))


def test_the_branch_is_computed_as_vllm_computes_it(tmp_path):
    """Its own kernels for the CPU, written out: x @ A^T in an fp32 buffer, rounded, then times the scaled B."""
    exported(tmp_path / "base")
    model = frozen(tmp_path / "base", use_rslora=True)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, FrozenLora)
    x = torch.randn(5, 256, dtype=BF16)
    a, b = (one.default.weight.detach().to(BF16) for one in (layer.lora_A, layer.lora_B))
    b *= layer.scaling["default"]  # LoRALayerWeights.optimize
    shrunk = torch.einsum("bi,oi->bo", x.float(), a.float())  # bgmv_shrink
    y = layer.base_layer(x)
    y += torch.einsum("bi,oi->bo", shrunk.to(BF16), b)  # bgmv_expand_slice
    with torch.no_grad():
        assert torch.equal(layer(x), y)
        pefts = (
            layer.base_layer(x)
            + F.linear(F.linear(x, a), layer.lora_B.default.weight.to(BF16)) * layer.scaling["default"]
        )
    assert not torch.equal(pefts, y)


def test_an_adapter_on_a_frozen_base_trains_alone_and_leaves_the_folder_as_it_was(tmp_path):
    """Saved and loaded again it answers the same; the base, saved from under it, is the folder."""
    exported(tmp_path / "base")
    model = frozen(tmp_path / "base", lora_dropout=0.1).train()
    grads = backward(model)
    assert set(grads) == {name for name, _ in model.named_parameters() if "lora_" in name}
    torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2).step()
    model.eval().save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    settings = LoraConfig.from_pretrained(tmp_path / "adapter")
    assert settings.base_model_name_or_path == str(tmp_path / "base")
    loaded = PeftModel.from_pretrained(
        adapter.load_frozen(tmp_path / "base"), tmp_path / "adapter", config=lora.register(settings)
    )
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ExportError, match=r"q_proj.base_layer has an adapter around it"):
        adapter.save_frozen(model.get_base_model(), tmp_path / "again")
    adapter.save_frozen(model.unload(), tmp_path / "again")
    assert same_files(tmp_path / "again", tmp_path / "base")


def test_a_frozen_base_stays_on_its_grid(tmp_path):
    """Neither a merge nor a cast moves it, nor an adapter that starts from it; and no adapter that is not served."""
    exported(tmp_path / "base", "W8A8")
    model = frozen(tmp_path / "base")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="merging would move the base off its grid"):
            merge()
    with pytest.raises(TypeError, match="merging would move the base off its grid"), lora.merged(model):
        pass
    state = {name: one.clone() for name, one in model.state_dict().items() if "base_layer" in name}
    assert all(
        torch.equal(one, state[name]) for name, one in model.float().to(BF16).state_dict().items() if name in state
    )
    for fields, message in (
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
        ({"lora_bias": True}, "lora_bias and fan_in_fan_out are not served"),
        ({"use_dora": True}, "use_dora"),
    ):
        with pytest.raises(ValueError, match=message):
            frozen(tmp_path / "base", **fields)
    model = frozen(tmp_path / "base")
    model.add_adapter("second", lora.register(config(target_modules=["q_proj"])))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="engines serve one adapter a request"):
        model(input_ids=IDS)
    with pytest.raises(
        ValueError, match=r"the forward computes in torch.float16, the base is served in torch.bfloat16"
    ):
        model.base_model.model.model.layers[0].mlp.up_proj(torch.randn(2, 256, dtype=torch.float16))


def test_a_folder_is_never_dequantized_as_a_whole(tmp_path, monkeypatch):
    """While it loads, one layer at a time is unpacked; the model is built without memory for its weights."""
    exported(tmp_path / "base")
    largest = 0
    read = lockstep.export.pack_quantized.read

    def watched(tensors, spec):
        nonlocal largest
        largest = max(largest, sum(one.numel() for one in tensors.values()))
        return read(tensors, spec)

    monkeypatch.setattr(lockstep.export.pack_quantized, "read", watched)
    model = adapter.load_frozen(tmp_path / "base")
    assert 0 < largest < 512 * 256
    assert not [one for one in model.modules() if type(one) is nn.Linear and one is not model.lm_head]
    assert not any(one.is_meta for one in [*model.parameters(), *model.buffers()])


def test_a_folder_that_is_not_the_models_is_refused(tmp_path):
    exported(tmp_path / "base")
    with torch.device("meta"):
        small = tiny_llama(num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"stores model.layers.1.\S+, where LlamaForCausalLM has no"):
        adapter.load_frozen(tmp_path / "base", small)
    with pytest.raises(ExportError, match="no layer of this LlamaForCausalLM is frozen"):
        adapter.save_frozen(tiny_llama(), tmp_path / "other")


# QLoRA ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masters(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("masters")
    tiny_llama().save_pretrained(folder)
    return folder


def four_bit(masters: Path, **fields: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(masters, quantization_config=lora.nf4(), dtype=BF16)
    return trained(lora.get_peft_model(base, config(**fields), "qlora"))


def test_qlora_trains_the_adapter_alone_on_nf4_and_saves_it(masters, tmp_path):
    import bitsandbytes

    model = four_bit(masters, lora_dropout=0.05).train()
    layers = [one for one in model.modules() if isinstance(one, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    assert all(one.weight.quant_state.nested and one.weight.quant_type == "nf4" for one in layers)
    assert set(backward(model)) == {name for name, _ in model.named_parameters() if "lora_" in name}
    model.eval().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(masters, quantization_config=lora.nf4(), dtype=BF16)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model))


def test_nf4_is_served_on_another_grid_only_by_who_accepts_the_gap(masters, tmp_path):
    """The error says how large it is; what is exported afterwards is the requantized model, checked bit for bit."""
    model = four_bit(masters)
    with pytest.raises(TypeError, match=r"q_proj is .*Linear4bit"):
        lora.prepare(model, "W4A16")
    with pytest.raises((ExportError, TypeError), match=r"no layer of this|requantize"):
        next(lockstep.export.stream(model))
    with pytest.raises(TypeError, match=r"is NF4: see lockstep.qat.lora.requantize"), lora.merged(model):
        pass
    before, batch = logits(model), {"input_ids": IDS}
    for options, asked in (({}, "max_kl is not given"), ({"max_kl": 1e-6}, "more than max_kl=1e-06")):
        with pytest.raises(ValueError, match=rf"a KL of [\d.]+ nats a token \({asked}\).*up to [\d.]+%.*Pass max_kl"):
            lora.requantize(model, "W4A16", batch, **options)
        assert torch.equal(logits(model), before)

    layer = model.base_model.model.model.layers[0].mlp.up_proj
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state).float()
    weight = (weight + layer.get_delta_weight("default").float()).detach().to(BF16)
    report = lora.requantize(model, "W4A16", batch, max_kl=10.0)
    up = report.model.model.layers[0].mlp.up_proj
    assert torch.equal(up.weight, weight)
    fake = grid.fake_quantize(weight, up.scheme.weights).float()
    want = ((fake - weight.float()).norm() / weight.float().norm()).item()
    assert report.errors["model.layers.0.mlp.up_proj"] == pytest.approx(want)
    p, q = before.float().log_softmax(-1), logits(report.model).float().log_softmax(-1)
    assert report.kl == pytest.approx(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item(), rel=1e-3)
    assert "model.layers.1.mlp.down_proj" in str(report)
    lockstep.export.save_pretrained(report.model, tmp_path / "int4")
    assert lockstep.align.compare(report.model, tmp_path / "int4", batch).aligned


def test_requantizing_names_the_adapter_that_it_does_not_merge(masters):
    for fields, message in (
        ({"use_dora": True}, r"layers.0.self_attn.q_proj: lora_bias, DoRA"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"lm_head has an adapter and is not NF4"),
    ):
        model = four_bit(masters, **fields)
        before = logits(model)
        with pytest.raises(ValueError, match=message):
            lora.requantize(model, "W4A16", {"input_ids": IDS}, max_kl=10.0)
        assert torch.equal(logits(model), before)


def test_four_bits_of_another_kind_are_refused(masters):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    base = AutoModelForCausalLM.from_pretrained(
        masters, quantization_config=BitsAndBytesConfig(load_in_4bit=True), dtype=BF16
    )
    with pytest.raises(ValueError, match=r"q_proj is 4-bit fp4, double quantization False.*lora.nf4"):
        lora.get_peft_model(base, config(), "qlora")


# Recipes --------------------------------------------------------------------------------------------------------------


def fit(module: LightningModule, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    seed_everything(0)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 16, seed=3)]
    trainer.fit(module, DataLoader(rows, batch_size=4))
    return trainer


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_the_merged_recipe_ends_with_the_weights_that_it_trained(masters, tmp_path, precision):
    module = CausalLM(str(masters), 1e-2, warmup_steps=0, lora=SETTINGS, save_dir=str(tmp_path / "adapter"))
    fit(module, tmp_path, QATCallback("W4A16", export_dir=str(tmp_path / "out")), precision=precision)
    model = module.model.eval()
    expected = logits(model, autocast=precision != "bf16-true")
    assert {type(layer) for _, layer in quantized_modules(model)} == {AdaptedLinear}
    stored = Checkpoint(tmp_path / "out")
    assert len(stored.layers) == 14
    with lora.merged(model) as served:
        for name, layer in quantized_modules(served):
            assert torch.equal(stored.layer(name).codes, layer.quantize().codes)
        assert lockstep.align.compare(served, tmp_path / "out", {"input_ids": IDS}).aligned
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert torch.equal(logits(model.merge_and_unload(), autocast=precision != "bf16-true"), expected)


def test_the_frozen_recipe_ends_with_an_adapter_for_the_folder(tmp_path):
    exported(tmp_path / "base")
    module = CausalLM(
        str(tmp_path / "base"),
        1e-2,
        warmup_steps=0,
        lora=SETTINGS,
        lora_mode="frozen-grid",
        save_dir=str(tmp_path / "a"),
    )
    fit(module, tmp_path)
    settings = lora.register(LoraConfig.from_pretrained(tmp_path / "a"))
    loaded = PeftModel.from_pretrained(adapter.load_frozen(tmp_path / "base"), tmp_path / "a", config=settings)
    assert torch.equal(logits(loaded.eval()), logits(module.model.eval()))
    assert not torch.equal(logits(loaded), logits(adapter.load_frozen(tmp_path / "base")))


def test_the_qlora_recipe_ends_with_an_adapter(masters, tmp_path):
    pytest.importorskip("bitsandbytes")
    module = CausalLM(
        str(masters), 1e-2, warmup_steps=0, lora=SETTINGS, lora_mode="qlora", save_dir=str(tmp_path / "a")
    )
    fit(module, tmp_path)
    moved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert any(value.abs().sum() > 0 for name, value in moved.items() if "lora_B" in name)


def test_a_recipe_says_what_its_mode_needs():
    for options, message in (
        ({"lora_mode": "frozen-grid"}, "lora_mode='frozen-grid': give model, the base that stays frozen"),
        ({"lora_mode": "dora"}, "lora_mode='dora': choose one of 'merged'"),
    ):
        module = CausalLM(lora=SETTINGS, **options)
        with pytest.raises(ValueError, match=message):
            module.configure_model()


def test_prepare_and_the_export_take_a_peft_model_as_it_is(tmp_path):
    """In either order, and under a wrapper; the folder is that of the merged model."""
    torch.manual_seed(0)
    model = trained(peft.get_peft_model(tiny_llama(), config()))
    report = lockstep.prepare(model, "W4A16")
    assert "model.layers.0.mlp.up_proj" in {row.name for row in report.quantized}
    expected = logits(model)
    wrapped = nn.DataParallel(model)
    lockstep.export.check_exportable(wrapped)
    lockstep.export.save_pretrained(wrapped, tmp_path / "out")
    streamed = dict(lockstep.export.stream(model))
    assert torch.equal(logits(model), expected)
    lockstep.export.save_pretrained(model.merge_and_unload(), tmp_path / "merged")
    assert same_files(tmp_path / "out", tmp_path / "merged")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert streamed.keys() == stored.keys()
    assert all(torch.equal(streamed[name], one) for name, one in stored.items())


def test_a_frozen_mixture_is_saved_under_the_names_that_engines_know(tmp_path):
    # o_proj has num_attention_heads * head_dim inputs, which groups of 128 must divide.
    model = tiny_moe(hidden_size=128, moe_intermediate_size=128, num_attention_heads=4, num_hidden_layers=1)
    lockstep.prepare(model, "W4A16", ignore=["lm_head", "re:.*experts$"])
    lockstep.export.save_pretrained(model, tmp_path / "base")
    adapter.save_frozen(adapter.freeze(model), tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
