"""Names that the hub and engines know, and experts as they are stored: bit for bit, in folders and in kernel format."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from models import channel, grouped, prepared, tiny_llama, tiny_moe, token_ids
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lockstep
from lockstep import Rule, Scheme, grid
from lockstep.export import Checkpoint, ExportError, formats, hub, save_pretrained, stream
from lockstep.export.checkpoint import bitwise_equal
from lockstep.export.config import quantization_config
from lockstep.export.served import quantized_keys, quantized_layers, served_plain, unquantized_layers
from lockstep.kernels import reference
from lockstep.layouts import marlin
from lockstep.qat.experts import layout_of
from lockstep.qat.prepare import quantized_experts

BF16 = torch.bfloat16
G32 = grouped(32)
EXPERTS = "re:.*\\.experts$"

# What vLLM's loaders look for (docs/experts.md); of Nemotron-H what its own checkpoints hold.
GATED = ("gate_proj", "up_proj", "down_proj")
NAMES = {
    "mixtral": ("model.layers.{}.block_sparse_moe.experts.{}.{}", ("w1", "w3", "w2")),
    "qwen3_moe": ("model.layers.{}.mlp.experts.{}.{}", GATED),
    "qwen2_moe": ("model.layers.{}.mlp.experts.{}.{}", GATED),
    "deepseek_v3": ("model.layers.{}.mlp.experts.{}.{}", GATED),
    "olmoe": ("model.layers.{}.mlp.experts.{}.{}", GATED),
    "granitemoe": ("model.layers.{}.block_sparse_moe.experts.{}.{}", GATED),
    "llama4_text": ("model.layers.{}.feed_forward.experts.{}.{}", GATED),
    "nemotron_h": ("backbone.layers.{}.mixer.experts.{}.{}", ("up_proj", "down_proj")),
}
ROUTERS = {
    "mixtral": "model.layers.{}.block_sparse_moe.gate",
    "granitemoe": "model.layers.{}.block_sparse_moe.router.layer",
    "llama4_text": "model.layers.{}.feed_forward.router",
    "nemotron_h": "backbone.layers.{}.mixer.gate",
}
every_kind = pytest.mark.parametrize("kind", NAMES)


def sparse_layers(kind: str) -> tuple[int, ...]:
    """Which layers of a `tiny_moe` have experts."""
    return (1,) if kind in ("deepseek_v3", "nemotron_h") else (0, 1)


def expected_names(kind: str) -> set[str]:
    pattern, parts = NAMES[kind]
    return {pattern.format(n, e, part) for n in sparse_layers(kind) for e in range(4) for part in parts}


def slices(kind: str, model: nn.Module) -> dict[str, Tensor]:
    """The master ``[N, K]`` of each projection of each expert by the name it is stored under, cut by hand."""
    pattern, parts = NAMES[kind]
    found = {}
    modules = [module for module in model.modules() if layout_of(module)]
    for n, module in zip(sparse_layers(kind), modules, strict=True):
        for e in range(4):
            if kind == "nemotron_h":
                cut = (module.up_proj[e], module.down_proj[e])
            else:
                turned = (
                    one.T if kind == "llama4_text" else one for one in (module.gate_up_proj[e], module.down_proj[e])
                )
                first, down = turned
                cut = (*first.chunk(2), down)
            found |= {pattern.format(n, e, part): one.detach() for part, one in zip(parts, cut, strict=True)}
    return found


def own_save(model: Any, out: Path) -> dict[str, Tensor]:
    """What transformers' own ``save_pretrained`` writes."""
    model.save_pretrained(out)
    return load_file(out / "model.safetensors")


# Names ---------------------------------------------------------------------------------------------------------------


@every_kind
def test_experts_have_the_names_that_engines_load(kind):
    model = prepared(tiny_moe(kind), G32, targets=EXPERTS)
    layers = quantized_layers(model)
    assert set(layers) == expected_names(kind)
    for name, master in slices(kind, model).items():
        assert torch.equal(layers[name].weight, master), name
    keys = quantized_keys(model)
    assert set(keys) <= set(model.state_dict())
    assert {name for stored in keys.values() for name in stored} == set(layers)


@every_kind
def test_unquantized_tensors_are_those_that_transformers_itself_saves(tmp_path, kind):
    """Experts too: stacked, split or transposed as the hub has them."""
    model = tiny_moe(kind)
    expected = own_save(model, tmp_path)
    attention = "mixer\\.[qkvo]_proj" if kind == "nemotron_h" else "self_attn\\..*_proj.*"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the experts, which no rule names
        lockstep.prepare(model, G32, targets=f"re:.*{attention}")
    layers, found = quantized_layers(model), dict(stream(model))
    plain = {name for name in expected if name.removesuffix(".weight") not in layers}
    assert plain == {name for name in found if not any(name.startswith(f"{layer}.weight_") for layer in layers)}
    assert any("expert" in name or "_linear" in name for name in plain)
    for name in plain:
        assert bitwise_equal(found[name], expected[name]), name
    assert {name: one.shape for name, one in served_plain(model, G32)} == {n: expected[n].shape for n in plain}


@pytest.mark.parametrize("build", [tiny_llama, lambda: tiny_moe("qwen3_moe"), lambda: nn.Sequential(nn.Linear(8, 8))])
def test_other_tensors_keep_their_names(build):
    model = build()
    for key, tensor in model.state_dict().items():
        if "experts" not in key:
            assert hub.pieces(model, key, tensor.shape) == {key: hub.Piece(key)}
            assert [*hub.stored_tensors(model, key, tensor)] == [key]


def test_a_piece_says_where_in_the_parameter_it_is():
    model = tiny_moe("mixtral")
    key = "model.layers.0.mlp.experts.gate_up_proj"
    parameter = model.get_parameter(key)
    found = hub.pieces(model, key, parameter.shape)
    assert len(found) == 8
    for name, tensor in hub.stored_tensors(model, key, parameter).items():
        assert found[name].key == key
        assert torch.equal(parameter[found[name].where], tensor)
    assert found["model.layers.0.block_sparse_moe.experts.2.w3.weight"].where == (2, slice(96, 192, 1))


def test_what_transformers_stores_as_no_rows_is_refused(monkeypatch):
    import transformers.core_model_loading as loading

    def halves(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        ((key, tensor),) = tensors.items()
        return {f"{key}.mixed": tensor.flip(0)}

    monkeypatch.setattr(loading, "revert_weight_conversion", halves)
    with pytest.raises(ExportError, match=r"stores .*gate_up_proj as .*mixed, which is no range of its rows"):
        quantized_layers(prepared(tiny_moe("mixtral"), G32, targets=EXPERTS))


# The bits ------------------------------------------------------------------------------------------------------------


SCHEMES = {
    "group": G32,
    "channel": channel(),
    "asymmetric": Scheme.preset("W4A16_ASYM", group_size=32),
    "W8A8": Scheme.preset("W8A8"),
    "FP8_DYNAMIC": Scheme.preset("FP8_DYNAMIC"),
    "MXFP4A16": Scheme.preset("MXFP4A16"),
}


@every_kind
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_bits_of_each_expert_are_those_that_trained(tmp_path, kind, scheme):
    model = prepared(tiny_moe(kind), scheme, targets=EXPERTS)
    stored = Checkpoint(save_pretrained(model, tmp_path / "out"))
    assert set(stored.layers) == expected_names(kind)
    for name, master in slices(kind, model).items():
        served = grid.dequantize(stored.layer(name), scheme.weights)
        assert bitwise_equal(served, grid.fake_quantize(master.contiguous(), scheme.weights)), name


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text"])
@pytest.mark.parametrize(("preset", "format"), [("W4A16", "gptq"), ("W8A16", "gptq"), ("FP8_BLOCK", "fp8")])
def test_other_formats_hold_the_same_bits_under_the_same_names(tmp_path, kind, preset, format):
    wide = {"hidden_size": 128, "intermediate_size": 128, "intermediate_size_mlp": 128, "num_attention_heads": 4}
    scheme = Scheme.preset(preset) if format == "fp8" else Scheme.preset(preset, group_size=32)
    model = prepared(tiny_moe(kind, **wide), scheme, targets=EXPERTS)
    stored = Checkpoint(save_pretrained(model, tmp_path / "out", format))
    assert set(stored.layers) == expected_names(kind)
    for name, master in slices(kind, model).items():
        served = grid.dequantize(stored.layer(name), scheme.weights)
        assert bitwise_equal(served, grid.fake_quantize(master.contiguous(), scheme.weights)), name


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text"])
def test_gate_and_up_of_an_expert_share_the_second_scale_of_nvfp4(kind):
    """Engines run them as one layer, with one."""
    model = prepared(tiny_moe(kind), "NVFP4A16", targets=EXPERTS)
    stored, masters = dict(stream(model)), slices(kind, model)
    pattern, (gate, up, down) = NAMES[kind]
    for e in range(4):
        names = [pattern.format(0, e, part) for part in (gate, up, down)]
        scales = [stored[f"{name}.weight_global_scale"] for name in names]
        largest = max(masters[names[0]].abs().max(), masters[names[1]].abs().max())
        expected = grid.nvfp4_scale(largest.float().reshape(1))
        assert torch.equal(scales[0], scales[1])
        assert torch.equal(scales[0].reshape(1), expected.reshape(1))
        assert not torch.equal(scales[0], scales[2])


def flipped(tensor: Tensor) -> Tensor:
    raw = tensor.clone().contiguous()
    raw.view(torch.uint8).flatten()[0] ^= 1
    return raw


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale"])
def test_one_wrong_bit_in_an_expert_stops_the_export(tmp_path, monkeypatch, suffix):
    model = prepared(tiny_moe("mixtral"), G32)
    (_, module), *_ = quantized_experts(model)
    guilty, pack = module.gate_up_proj.detach()[2, 96:], formats.PACKED["pack-quantized"]

    def faulty(weight: Tensor, *args: Any) -> dict[str, Tensor]:
        stored = pack(weight, *args)
        wrong = weight.shape == guilty.shape and torch.equal(weight, guilty)
        return stored | {suffix: flipped(stored[suffix])} if wrong else stored

    monkeypatch.setitem(formats.PACKED, "pack-quantized", faulty)
    name = r"model\.layers\.0\.block_sparse_moe\.experts\.2\.w3"
    with pytest.raises(ExportError, match=f"^{name}: the packed words do not give back the weight"):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_forward_that_multiplies_something_else_stops_the_export(monkeypatch):
    fake_quantize = reference.fake_quantize
    monkeypatch.setattr(reference, "fake_quantize", lambda *a, **k: flipped(fake_quantize(*a, **k)))
    with pytest.raises(ExportError, match=r"experts\.0\.gate_proj: the packed words do not give back the weight"):
        list(stream(prepared(tiny_moe("qwen3_moe"), G32, targets=EXPERTS)))
    with pytest.raises(ExportError, match=r"q_proj: the packed words do not give back the weight"):
        list(stream(prepared(tiny_llama(), G32, learned_scales=True)))


# What the config says ------------------------------------------------------------------------------------------------


@every_kind
def test_routers_are_declared_as_they_are_and_experts_by_class(kind):
    model = prepared(tiny_moe(kind), G32)
    config = quantization_config(model)
    routers = {ROUTERS.get(kind, "model.layers.{}.mlp.gate").format(n) for n in sparse_layers(kind)}
    assert routers <= set(config["ignore"])
    assert "lm_head" in config["ignore"]
    assert not any(".experts." in name for name in config["ignore"])
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert all(f"{name}.weight" in dict(stream(model)) for name in config["ignore"])


def group_by_matcher(config: dict[str, Any], name: str) -> str | None:
    """The group in which compressed-tensors' own matcher puts a linear layer, as vLLM does an expert's projection."""
    linear = nn.Linear(1, 1, device="meta")
    if match_targets(name, linear, config["ignore"]):
        return None
    of_target = {target: group for group, entry in config["config_groups"].items() for target in entry["targets"]}
    return of_target[match_targets(name, linear, of_target)[0]]


RECIPES = {
    "experts first": [Rule([EXPERTS], G32), Rule(["Linear"], "W8A8")],
    "experts last": [Rule(["re:.*self_attn.*_proj"], "W8A8"), Rule(["Linear"], G32)],
    "shared experts apart": [
        Rule(["re:.*shared_expert\\..*_proj"], "FP8_DYNAMIC"),
        Rule([EXPERTS], G32),
        Rule(["re:.*self_attn.*_proj"], channel()),
    ],
    "experts as they are": [Rule([EXPERTS], None), Rule(["Linear"], "W8A8")],
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_is_declared_so_that_engines_find_the_scheme_of_each_layer(tmp_path, recipe):
    """Experts under ``Linear``, where SGLang looks for them, and the rest by name."""
    model = prepared(tiny_moe("qwen2_moe"), recipe, ignore=["lm_head"])
    path = save_pretrained(model, tmp_path / "out")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "lockstep"})
    layers = quantized_layers(model)
    schemes: dict[str, Scheme] = {}
    for name, layer in layers.items():
        group = group_by_matcher(config, name)
        assert group is not None, name
        assert schemes.setdefault(group, layer.scheme) == layer.scheme, name
    assert len(set(schemes.values())) == len(schemes) == len(config["config_groups"])
    for name in unquantized_layers(model):
        assert group_by_matcher(config, name) is None, name
    quantized = any(".experts." in name for name in layers)
    targets = [entry["targets"] for entry in config["config_groups"].values()]
    if quantized:
        assert targets.count(["Linear"]) == 1
        assert group_by_matcher(config, "model.layers.0.mlp.experts.0.up_proj") == next(
            name for name, entry in config["config_groups"].items() if entry["targets"] == ["Linear"]
        )
    else:
        assert {name for name in config["ignore"] if ".experts." in name} == expected_names("qwen2_moe")
    stored = Checkpoint(path)
    assert {name: stored.scheme_of(name) for name in stored.layers} == {n: one.scheme for n, one in layers.items()}


# Refusals ------------------------------------------------------------------------------------------------------------


def test_gpt_oss_is_refused_and_without_its_experts_stored_as_transformers_does(tmp_path):
    model = tiny_moe("gpt_oss")
    expected = own_save(model, tmp_path)
    lockstep.prepare(model, G32)
    with pytest.raises(
        ExportError, match=r"experts\.0\.gate_proj is an expert of GptOssExperts, .* bias or interleaved"
    ):
        list(stream(model))
    lockstep.unprepare(model)
    lockstep.prepare(model, G32, ignore=["lm_head", EXPERTS])
    found = dict(stream(model))
    experts = {name for name in expected if ".experts." in name}
    assert len(experts) == 8
    assert all(bitwise_equal(found[name], expected[name]) for name in experts)


def test_experts_with_a_scale_for_a_tensor_are_refused():
    scheme = Scheme.preset("FP8_DYNAMIC", strategy="tensor")
    model = prepared(tiny_moe("qwen3_moe"), scheme)
    with pytest.raises(
        ExportError, match=r"experts\.0\.gate_proj: engines have no kernel for experts of .*FP8_DYNAMIC"
    ):
        list(stream(model))


def test_a_down_projection_of_one_group_is_warned_of():
    """vLLM then takes the scales of the layer's first projections for those of one group too."""
    model = tiny_moe("qwen3_moe", hidden_size=128, moe_intermediate_size=64)
    with pytest.warns(UserWarning, match=r"down_proj has 64 inputs, one group: vLLM 0\.32 then orders"):
        list(stream(prepared(model, grouped(64))))


# Live updates in the format of the kernel ----------------------------------------------------------------------------

MARLIN = {
    "mixtral": {"hidden_size": 128, "intermediate_size": 192},
    "qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 64},
    "llama4_text": {"hidden_size": 128, "intermediate_size": 64, "intermediate_size_mlp": 64},
    "nemotron_h": {"hidden_size": 128, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64},
}


def kernel_words(codes: Tensor) -> Tensor:
    """Marlin's words ``[K/16, 2N]`` of INT4 codes ``[N, K]`` by the places that the kernel reads, one after another."""
    n, k = codes.shape
    fields = (codes.T.long() + 8).tolist()
    words = torch.empty(k // 16, 2 * n, dtype=torch.int64)
    for tile_k, tile_n, thread, block in itertools.product(range(k // 16), range(n // 64), range(32), range(4)):
        word = 0
        for place, v in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            row = 16 * tile_k + 2 * (thread % 4) + (0, 1, 8, 9)[v % 4]
            word |= fields[row][64 * tile_n + 16 * block + thread // 4 + 8 * (v // 4)] << 4 * place
        words[tile_k, 128 * tile_n + 4 * thread + block] = word
    return words.to(torch.int32)


@pytest.mark.parametrize("kind", MARLIN)
@pytest.mark.parametrize("scheme", [G32, channel()], ids=["group", "channel"])
def test_stacked_experts_are_what_the_fused_kernel_reads(kind, scheme):
    """Gate rows above up rows, words ``[E, K/16, 2N]``, scales ``[E, G, N]``; and the masters' weights come back."""
    model = prepared(tiny_moe(kind, **MARLIN[kind]), scheme, targets=EXPERTS)
    stored, masters = dict(stream(model, format="marlin")), slices(kind, model)
    pattern, parts = NAMES[kind]
    for n in sparse_layers(kind):
        module = pattern.format(n, 0, "").rsplit(".", 2)[0]
        for which, of in (("w13", parts[:-1]), ("w2", parts[-1:])):
            weight = torch.stack([torch.cat([masters[pattern.format(n, e, part)] for part in of]) for e in range(4)])
            words, scales = (stored[f"{module}.{which}_weight_{what}"] for what in ("packed", "scale"))
            quantized = grid.quantize(weight, scheme.weights)
            (_, rows, k), groups = weight.shape, quantized.scale.shape[-1]
            assert words.shape == (4, k // 16, 2 * rows)
            assert scales.shape == (4, groups, rows)
            assert torch.equal(words[1], kernel_words(quantized.codes[1]))
            for e in range(4):
                assert torch.equal(marlin.unpack_weight(words[e], 4), quantized.codes[e])
                assert torch.equal(marlin.unpack_scales(scales[e]), quantized.scale[e])
    assert not any(re.search(r"experts\.\d", name) or "gate_up" in name for name in stored)


def test_stacked_experts_are_read_back_before_they_leave(monkeypatch):
    model = prepared(tiny_moe("mixtral", **MARLIN["mixtral"]), G32, targets=EXPERTS)
    pack = reference.pack_marlin

    def faulty(weight: Tensor, spec: Any) -> tuple[Tensor, Tensor]:
        words, scales = pack(weight, spec)
        return flipped(words), scales

    monkeypatch.setattr(reference, "pack_marlin", faulty)
    module = r"model\.layers\.0\.block_sparse_moe\.experts"
    with pytest.raises(ExportError, match=f"^{module}: the packed words do not give back the weights"):
        list(stream(model, format="marlin"))


def test_no_folder_holds_the_format_of_the_fused_kernel(tmp_path):
    model = prepared(tiny_moe("mixtral", **MARLIN["mixtral"]), G32)
    with pytest.raises(ExportError, match="marlin stacks the experts for live updates"):
        save_pretrained(model, tmp_path / "out", "marlin")
    assert not (tmp_path / "out").exists()


# transformers reads it -----------------------------------------------------------------------------------------------


def round_router_weights(model: nn.Module) -> None:
    for module in model.modules():
        if layout_of(module):
            module.register_forward_pre_hook(
                lambda _, args: tuple(one.to(BF16) if one.is_floating_point() else one for one in args)
            )


LOADED = [kind for kind in NAMES if kind != "granitemoe"]


@pytest.mark.parametrize("kind", LOADED)
@torch.no_grad()
def test_transformers_loads_packed_experts_and_computes_the_logits_that_trained(tmp_path, kind):
    """It dequantizes what it does not run packed; router weights, which some models keep in fp32, are rounded here.

    Nemotron-H's linear layers have other names in transformers than in its checkpoints, which hold for ``ignore`` too
    and transformers does not rename there: all are quantized here.
    """
    model = prepared(tiny_moe(kind), G32, targets="Linear" if kind == "nemotron_h" else EXPERTS)
    path = save_pretrained(model, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    round_router_weights(loaded)
    assert torch.equal(loaded(token_ids(2, 8)).logits, model(token_ids(2, 8)).logits)


def test_packed_experts_of_granite_are_not_read_by_transformers(tmp_path):
    """vLLM reads these names alone, transformers stacked ones alone, and it says what it made up."""
    path = save_pretrained(prepared(tiny_moe("granitemoe"), G32), tmp_path / "out")
    _, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    assert any("experts.down_proj" in key for key in info["missing_keys"])


@pytest.mark.parametrize("kind", [*NAMES, "gpt_oss"])
@torch.no_grad()
def test_a_folder_of_dequantized_masters_is_loaded(tmp_path, kind):
    """Where no engine has a kernel: the same weights in 16 bits."""
    model = prepared(tiny_moe(kind), G32, targets=EXPERTS)
    expected = model(token_ids(2, 8)).logits
    for _, module in quantized_experts(model):
        for name in (module.layout.first, "down_proj"):
            rows = module.layout.rows(module.get_parameter(name))
            rows.copy_(grid.fake_quantize(rows.contiguous(), G32.weights))
    lockstep.unprepare(model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    round_router_weights(loaded)
    assert torch.equal(loaded(token_ids(2, 8)).logits, expected)
