"""Every scheme in every format that stores it: the bits that trained, under the names and in the words of others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TinyMlp, edit_quantization, edit_tensors, prepared, tiny_llama, token_ids
from strategies import weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from lockstep import ActivationSpec, KVCacheSpec, Rule, Scheme, TensorSpec, grid, prepare
from lockstep.activations import static_scale
from lockstep.align.metrics import relative_error
from lockstep.export import (
    Checkpoint,
    CheckpointError,
    ExportError,
    check_exportable,
    compressed_tensors,
    formats,
    save_pretrained,
    stream,
)
from lockstep.export.checkpoint import bitwise_equal, same_bits
from lockstep.export.groups import Group
from lockstep.kernels import reference
from lockstep.layouts import fp4, words
from lockstep.qat import kv_cache
from lockstep.qat.observers import make
from lockstep.qat.prepare import quantized_modules, run_as_one
from lockstep.scheme import PRESETS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
SGLANG = {"engine": "sglang"}
FP8_CHANNEL = PRESETS["FP8_DYNAMIC"].weights
SCHEMES = PRESETS | {
    "W4A16 channel": Scheme.preset("W4A16", strategy="channel"),
    "W4A16 amax/7.5": Scheme.preset("W4A16", group_size=32, scale_rule="amax/7.5"),
    "W4A16_ASYM g32": Scheme.preset("W4A16_ASYM", group_size=32),
    "W4A16_ASYM channel fp16": Scheme(TensorSpec("int4", "channel", None, False, "", FP16, FP16)),
    "W8A16 channel": Scheme.preset("W8A16", strategy="channel", scale_rule="amax/127.5"),
    "W8A16 g32 fp16": Scheme.preset("W8A16", group_size=32, scale_dtype=FP16, served_dtype=FP16),
    "W8A8 static": Scheme(PRESETS["W8A8"].weights, ActivationSpec("int8", "tensor", None, False)),
    "W8A8 sglang bf16": Scheme.preset("W8A8", activations=SGLANG, scale_dtype=BF16),
    "W4A8 g32": Scheme.preset("W4A8", group_size=32, activations=SGLANG),
    "FP8 channel static": Scheme(FP8_CHANNEL, PRESETS["FP8"].activations),
    "FP8 tensor dynamic": Scheme(PRESETS["FP8"].weights, PRESETS["FP8_DYNAMIC"].activations),
    "FP8_BLOCK pow2": Scheme.preset("FP8_BLOCK", scale_rule="pow2/448", activations={"power_of_two": True}),
}
PAIRS = [(name, format) for name, scheme in SCHEMES.items() for format in formats.fitting(scheme)]
every_scheme = pytest.mark.parametrize("name", SCHEMES)
every_pair = pytest.mark.parametrize(("name", "format"), PAIRS)
MEASURED = 0.0123456789  # in bf16 it is another number


def calibrated(model: nn.Module, value: float = MEASURED) -> Any:
    """`model` with every input range measured."""
    for _, layer in quantized_modules(model):
        inputs = layer.scheme.activations
        if inputs is not None and inputs.stores_scale:
            getattr(layer, inputs.scale_name).fill_(value if inputs.scale_name == "input_scale" else 10 / value)
    return model


def small_llama(scheme: str | Scheme, **config: Any) -> Any:
    """Masters in the served dtype, and layers that engines fuse."""
    served = Scheme.of(scheme).weights.served_dtype
    return calibrated(prepared(tiny_llama(served, num_hidden_layers=1, **config), scheme))


def wide_mlp(scheme: str | Scheme) -> Any:
    """Masters in fp32."""
    return calibrated(prepared(TinyMlp(dtype=FP32), scheme))


# The bits ----------------------------------------------------------------------------------------------------------


@every_pair
@pytest.mark.parametrize("build", [small_llama, wide_mlp])
def test_the_bits_that_trained_are_the_bits_that_ship(tmp_path, name, format, build):
    """Read back from the folder: schemes, codes, every kind of scale, zero points, and nothing else."""
    scheme = SCHEMES[name]
    model = build(scheme)
    checkpoint = Checkpoint(save_pretrained(model, tmp_path / "out", format))
    layers, plain = dict(quantized_modules(model)), set(model.state_dict())
    assert (checkpoint.format, set(checkpoint.layers), checkpoint.kv_cache) == (format, set(layers), None)
    assert checkpoint.scheme == scheme
    for layer_name, layer in layers.items():
        assert checkpoint.scheme_of(layer_name) == scheme
        found, trained = checkpoint.layer(layer_name), layer.quantize()
        assert same_bits(found, trained), layer_name
        fake = grid.fake_quantize(layer.weight, scheme.weights, layer.amax())
        assert bitwise_equal(grid.dequantize(found, scheme.weights), fake)
        stored, measured = checkpoint.stored_scale(layer_name), layer.stored_scale()
        assert (stored is None and measured is None) or bitwise_equal(stored, measured)
        plain -= {f"{layer_name}.{leaf}" for leaf in ("weight", "input_scale", "input_global_scale")}
    assert set(checkpoint.plain_tensors()) == plain


@every_pair
@settings(max_examples=6)
@given(st.data())
def test_any_weight_comes_back_from_its_words(name, format, data):
    """Groups of zeros and outliers, fp16 and fp32 masters, scales at the ends of their range."""
    scheme, layout = SCHEMES[name], formats.find(format)
    weight = data.draw(weights(lead=((),), rows=(128,), columns=(128, 256)))
    quantized = grid.quantize(weight, scheme.weights)
    if format == "gptq" and quantized.zero_point is not None and (quantized.zero_point == -8).any():
        with pytest.raises(ValueError, match="GPTQ v1 cannot say"):
            layout.write(quantized, scheme.weights)
        return
    tensors = layout.write(quantized, scheme.weights)
    assert set(tensors) == set(layout.tensors(scheme.weights))
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert same_bits(layout.read(tensors, scheme.weights), quantized)


OWN = {
    **dict.fromkeys(["W4A16", "W4A16_ASYM", "W8A16", "W4A8", "W4AFP8"], "pack-quantized"),
    **dict.fromkeys(["W8A8", "INT8"], "int-quantized"),
    **dict.fromkeys(["FP8", "FP8_DYNAMIC", "FP8_BLOCK"], "float-quantized"),
    **dict.fromkeys(["NVFP4A16", "NVFP4"], "nvfp4-pack-quantized"),
    **dict.fromkeys(["MXFP4A16", "MXFP4"], "mxfp4-pack-quantized"),
    **dict.fromkeys(["MXFP8A16", "MXFP8"], "mxfp8-quantized"),
}


@pytest.mark.parametrize("format", [None, "auto"])
@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_has_a_format_of_its_own(preset, format):
    """That which engines and compressed-tensors expect for it."""
    model = calibrated(prepared(TinyMlp(), preset))
    streamed = dict(stream(model, format))
    expected = dict(stream(model, OWN[preset]))
    assert streamed.keys() == expected.keys()
    assert all(bitwise_equal(tensor, expected[name]) for name, tensor in streamed.items())


def test_learned_scales_are_what_is_stored(tmp_path):
    """No rule may look at the weight again on the way out."""
    model = TinyMlp()
    prepare(model, "W4A16", learned_scales=True)
    with torch.no_grad():
        model.first.weight_scale.mul_(1.37)
    checkpoint = Checkpoint(save_pretrained(model, tmp_path / "out"))
    assert same_bits(checkpoint.layer("first"), model.first.quantize())
    assert bitwise_equal(checkpoint.layer("first").scale, model.first.weight_scale.detach().bfloat16())
    assert "first.weight_scale" not in checkpoint.plain_tensors()


# What others make of it --------------------------------------------------------------------------------------------

LAYER = "model.layers.0.mlp.down_proj"  # 256 outputs, 512 inputs
SHAPE = (torch.int64, [2])
STORED = {
    "W4A16_ASYM": {
        "weight_packed": (torch.int32, [256, 64]),
        "weight_scale": (BF16, [256, 4]),
        "weight_shape": SHAPE,
        "weight_zero_point": (torch.int32, [32, 4]),
    },
    "W8A16": {"weight_packed": (torch.int32, [256, 128]), "weight_scale": (BF16, [256, 4]), "weight_shape": SHAPE},
    "W8A8": {"weight": (torch.int8, [256, 512]), "weight_scale": (FP32, [256, 1])},
    "W8A8 static": {
        "weight": (torch.int8, [256, 512]),
        "weight_scale": (FP32, [256, 1]),
        "input_scale": (FP32, [1]),
    },
    "FP8": {"weight": (E4M3, [256, 512]), "weight_scale": (FP32, [1]), "input_scale": (FP32, [1])},
    "FP8_DYNAMIC": {"weight": (E4M3, [256, 512]), "weight_scale": (FP32, [256, 1])},
    "FP8_BLOCK": {"weight": (E4M3, [256, 512]), "weight_scale": (FP32, [2, 4])},
    "NVFP4": {
        "weight_packed": (torch.uint8, [256, 256]),
        "weight_scale": (E4M3, [256, 32]),
        "weight_global_scale": (FP32, [1]),
        "input_global_scale": (FP32, [1]),
    },
    "MXFP4": {"weight_packed": (torch.uint8, [256, 256]), "weight_scale": (torch.uint8, [256, 16])},
    "MXFP8": {"weight": (E4M3, [256, 512]), "weight_scale": (torch.uint8, [256, 16])},
}


@pytest.mark.parametrize("name", STORED)
def test_tensors_have_the_names_dtypes_and_shapes_that_engines_load(name):
    stored = {
        key.removeprefix(f"{LAYER}."): (tensor.dtype, list(tensor.shape))
        for key, tensor in stream(small_llama(SCHEMES[name]))
        if key.startswith(LAYER)
    }
    assert stored == STORED[name]


@pytest.mark.parametrize(
    "name", [name for name, format in PAIRS if formats.find(format).METHOD == "compressed-tensors"]
)
def test_compressed_tensors_unpacks_the_weights_that_trained(name):
    """Its decompression is the second opinion on every layout, and on ``(code - zero) * scale``."""
    scheme = SCHEMES[name]
    model = calibrated(prepared(TinyMlp(dtype=scheme.weights.served_dtype), scheme))
    format = formats.fitting(scheme)[0]
    config = compressed_tensors.config([Group(format, scheme, ("first",))], [])
    theirs = QuantizationConfig.model_validate(json.loads(json.dumps(config))).config_groups["group_0"]
    tensors = {key.removeprefix("first."): tensor for key, tensor in stream(model) if key.startswith("first.w")}
    unpacked = BaseCompressor.get_value_from_registry(format).decompress(tensors, theirs)["weight"]
    # It multiplies in the dtype of the scales, which for 8-bit kernels is fp32: before the rounding to bf16.
    ours = grid.dequantize(model.first.quantize(), replace(scheme.weights, served_dtype=unpacked.dtype))
    assert bitwise_equal(unpacked.detach(), ours)


# Relative error of the logits. transformers rounds fp32 scales to bf16 when it loads, and multiplies weights and inputs
# that it has dequantized; an FP4 code that falls on the other side of a tie is a step of a half.
TOLERANCE = {"int8": 0.04, "fp8_e4m3": 0.12, "fp4_e2m1": 0.35}


def measure(model: Any) -> None:
    """Static ranges from the inputs that `token_ids` brings."""
    scaled = [layer for _, layer in quantized_modules(model) if layer.scheme.activations]
    for layer in (layer for layer in scaled if layer.scheme.activations.stores_scale):
        layer.observer = make("minmax", layer.scheme.activations)
    model(token_ids())
    for layer in (layer for layer in scaled if layer.observer):
        inputs = layer.scheme.activations
        getattr(layer, inputs.scale_name).copy_(static_scale(layer.observer.range(), inputs))
        layer.observer = None


@every_scheme
@torch.no_grad()
def test_transformers_loads_it_and_computes_the_logits(tmp_path, name):
    scheme = SCHEMES[name]
    model = small_llama(scheme)
    measure(model)
    out = save_pretrained(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    error = relative_error(loaded(token_ids()).logits, model(token_ids()).logits)
    inputs, exact = scheme.activations, scheme.weights.strategy == "group" and scheme.weights.group_size != 16
    assert error <= (TOLERANCE[inputs.format] if inputs else 0 if exact else 0.02)
    weight = loaded.get_submodule(LAYER).weight
    if weight.dtype == scheme.weights.scale_dtype or scheme.weights.scale_dtype != FP32:
        layer = model.get_submodule(LAYER)
        assert bitwise_equal(weight, grid.dequantize(layer.quantize(), scheme.weights))


@pytest.mark.parametrize("name", ["FP8_BLOCK", "FP8_BLOCK pow2"])
@torch.no_grad()
def test_transformers_reads_native_fp8(tmp_path, name):
    """``weight_scale_inv`` multiplies, whatever it is called."""
    model = small_llama(SCHEMES[name])
    out = save_pretrained(model, tmp_path / "out", "fp8")
    how = FineGrainedFP8Config(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto", quantization_config=how)
    for layer_name, layer in quantized_modules(model):
        weight = loaded.get_submodule(layer_name).weight
        assert bitwise_equal(weight, grid.dequantize(layer.quantize(), layer.scheme.weights)), layer_name


def arguments(scheme: Any) -> dict[str, Any]:
    """What a group of compressed-tensors says of numbers, without what says how to calibrate them."""
    dumped = scheme.model_dump()
    for part in ("weights", "input_activations"):
        for key in ("observer", "observer_kwargs", "zp_dtype"):
            (dumped[part] or {}).pop(key, None)
        if dumped[part] and dumped[part]["group_size"] == -1:
            dumped[part]["group_size"] = None
    return {part: dumped[part] for part in ("weights", "input_activations", "output_activations")}


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "W4A8"])
def test_presets_are_those_of_compressed_tensors(preset):
    """vLLM chooses its kernel by these arguments."""
    config = compressed_tensors.config([Group(OWN[preset], PRESETS[preset], ())], ["lm_head"])
    parsed = QuantizationConfig.model_validate(json.loads(json.dumps(config)))
    group = parsed.config_groups["group_0"]
    assert arguments(group) == arguments(preset_name_to_scheme(preset, ["Linear"]))
    assert (group.targets, group.format) == (["Linear"], OWN[preset])
    assert (parsed.format, parsed.quantization_status, parsed.ignore) == (OWN[preset], "compressed", ["lm_head"])


@every_pair
def test_json_gives_the_same_scheme_back(name, format):
    """A checkpoint that is read back trains, or is compared, on the grid that it was written with."""
    scheme = SCHEMES[name]
    config = json.loads(json.dumps(formats.find(format).config([Group(format, scheme, ("a", "b"))], ["lm_head"])))
    declared, (group,) = formats.declared(config, BF16)
    assert (declared, group.format, group.scheme) == (format, format, scheme)


@given(
    st.sampled_from([{"group_size": 32}, {"group_size": 64}, {"group_size": 128}, {"strategy": "channel"}]),
    st.sampled_from(["amax/7", "amax/7.5", "amax/127", "amax/127.5", "range/15"]),
    st.sampled_from([BF16, FP16, FP32]),
)
def test_every_integer_grid_survives_the_json(grouping, rule, dtype):
    kind = {"format": "int8" if "127" in rule else "int4", "symmetric": rule != "range/15", "scale_rule": rule}
    scheme = Scheme(TensorSpec(**kind, **grouping, scale_dtype=dtype, served_dtype=dtype))
    for format in formats.fitting(scheme):
        config = json.loads(json.dumps(formats.find(format).config([Group(format, scheme, ())], [])))
        assert formats.declared(config, BF16)[1][0].scheme == scheme


def test_gptq_and_fp8_configs_say_what_their_readers_ask(tmp_path):
    block, static = small_llama(SCHEMES["FP8_BLOCK pow2"]), small_llama("FP8")
    config = json.loads((save_pretrained(block, tmp_path / "block", "fp8") / "config.json").read_text())
    found = config["quantization_config"]
    assert found.pop("lockstep")["scale_rule"] == "pow2/448"
    assert found == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    }
    assert "model.layers.0.mlp.up_proj.weight_scale_inv" in Checkpoint(tmp_path / "block").tensors
    config = json.loads((save_pretrained(static, tmp_path / "static", "fp8") / "config.json").read_text())
    assert config["quantization_config"]["activation_scheme"] == "static"
    assert not {"weight_block_size", "scale_fmt"} & config["quantization_config"].keys()
    asymmetric = save_pretrained(small_llama("W4A16_ASYM"), tmp_path / "gptq", "gptq")
    assert json.loads((asymmetric / "config.json").read_text())["quantization_config"]["sym"] is False


# Several schemes ---------------------------------------------------------------------------------------------------

RECIPE = [
    Rule([r"re:.*down_proj$"], "FP8_DYNAMIC"),
    Rule([r"re:.*layers\.0\.self_attn\.(q|k|v)_proj$"], "W8A8"),
    Rule([r"re:.*layers\.1\.self_attn\.o_proj$"], None),
    Rule([r"re:.*o_proj$"], Scheme.preset("W8A8", scale_dtype=BF16)),
    Rule(["Linear"], "W4A16"),
]


def mixed(**config: Any) -> Any:
    return calibrated(prepared(tiny_llama(**config), RECIPE))


def test_a_recipe_is_stored_in_groups_and_read_back(tmp_path):
    model = mixed()
    checkpoint = Checkpoint(save_pretrained(model, tmp_path / "out"))
    assert checkpoint.format == "mixed-precision"
    layers = dict(quantized_modules(model))
    assert set(checkpoint.layers) == set(layers)
    for name, layer in layers.items():
        assert checkpoint.scheme_of(name) == layer.scheme, name
        assert same_bits(checkpoint.layer(name), layer.quantize()), name
    with pytest.raises(CheckpointError, match=r"holds 4 schemes, .* and .*: ask for a layer's"):
        _ = checkpoint.scheme
    with pytest.raises(CheckpointError, match=r"^lm_head: .* not stored, found a plain weight in bfloat16"):
        checkpoint.scheme_of("lm_head")


def test_compressed_tensors_finds_the_group_of_each_layer(tmp_path):
    """Its own matcher, as in transformers; vLLM asks for the layers that it fuses one by one."""
    model = mixed()
    config = json.loads((save_pretrained(model, tmp_path / "out") / "config.json").read_text())["quantization_config"]
    parsed, bare = QuantizationConfig.model_validate(config), tiny_llama()
    apply_quantization_config(bare, parsed)
    layers = dict(quantized_modules(model))
    for name, module in bare.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        assert (scheme is not None) == (name in layers), name
        if name in layers:
            assert scheme.weights.num_bits == layers[name].scheme.weights.bits
            assert scheme.format == formats.fitting(layers[name].scheme)[0]
    for first, *others in run_as_one(layers):
        groups = {bare.get_submodule(name).quantization_scheme.weights.num_bits for name in (first, *others)}
        assert len(groups) == 1, first
    assert parsed.format == "mixed-precision"
    assert parsed.ignore == ["model.layers.1.self_attn.o_proj", "lm_head"]
    assert len(parsed.config_groups) == 4


@torch.no_grad()
def test_transformers_loads_a_recipe(tmp_path):
    model = mixed()
    loaded = AutoModelForCausalLM.from_pretrained(save_pretrained(model, tmp_path / "out"), dtype="auto")
    assert relative_error(loaded(token_ids()).logits, model(token_ids()).logits) < 0.1


def test_two_schemes_of_one_format_are_declared_as_that_format(tmp_path):
    """Some engines look at the top alone."""
    model = prepared(tiny_llama(), [Rule([r"re:.*down_proj$"], "W8A16"), Rule(["Linear"], "W4A16")])
    checkpoint = Checkpoint(save_pretrained(model, tmp_path / "out"))
    assert checkpoint.format == "pack-quantized"
    assert checkpoint.scheme_of(LAYER) == PRESETS["W8A16"]
    assert checkpoint.scheme_of("model.layers.0.mlp.up_proj") == PRESETS["W4A16"]


@pytest.mark.parametrize("format", ["gptq", "marlin"])
def test_formats_with_one_scheme_refuse_a_recipe(format):
    model = prepared(tiny_llama(), [Rule([r"re:.*down_proj$"], "W8A16"), Rule(["Linear"], "W4A16")])
    message = rf"{format} declares one scheme for all layers, found int4 .*q_proj\) and int8 .*down_proj\): choose"
    with pytest.raises(ExportError, match=message):
        check_exportable(model, format)


def test_fused_layers_with_two_schemes_are_refused():
    """`prepare` refuses them; what is set by hand must not get past the export either."""
    model = small_llama("W4A16")
    model.model.layers[0].self_attn.k_proj.scheme = PRESETS["W8A16"]
    with pytest.raises(
        ExportError, match=r"k_proj is quantized as int8 .*q_proj as int4 .*engines run .* as one layer"
    ):
        check_exportable(model)


GROUPS = {
    "target": (lambda groups: groups["group_1"]["targets"].clear(), "no group of config_groups targets it"),
    "entry": (lambda groups: groups.update(group_9=groups.pop("group_2")), "quantization_config: 'group_9'"),
    "format": (lambda groups: groups["group_0"].update(format="gguf"), "no export format 'gguf'"),
    "other": (
        lambda groups: groups["group_0"].update(format="float-quantized"),
        "int8 .* is declared as float-quantized: it stores fp8 weights",
    ),
}


@pytest.mark.parametrize(("damage", "message"), GROUPS.values(), ids=GROUPS)
def test_groups_that_contradict_the_folder_are_refused(tmp_path, damage, message):
    out = save_pretrained(mixed(), tmp_path / "out")
    edit_quantization(out, lambda config: damage(config["config_groups"]))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(out)


# Checkpoints of others ---------------------------------------------------------------------------------------------

THEIR_RULES = {"W4A16": "amax/7.5", "W8A16": "amax/127.5", "W8A8": "amax/127.5", "W4AFP8": "amax/7.5"}


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("W4A8", "INT8")])
def test_config_of_llm_compressor_means_its_own_rule(preset):
    """Without our entry the scales were made by compressed-tensors, and fp32 means what engines hold."""
    foreign = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(preset, ["Linear"])}, format=OWN[preset]
    )
    weights = replace(PRESETS[preset].weights, scale_rule=THEIR_RULES.get(preset, PRESETS[preset].weights.scale_rule))
    for config in (foreign.model_dump(mode="json"), foreign.to_dict()):
        name, (group,) = formats.declared(config, BF16)
        assert (name, group.scheme) == (OWN[preset], replace(PRESETS[preset], weights=weights))
    assert compressed_tensors.groups(foreign)[0].scheme == replace(PRESETS[preset], weights=weights)


def test_a_config_from_before_there_were_activations_is_read():
    """Folders that earlier versions wrote."""
    old = compressed_tensors.config([Group("pack-quantized", PRESETS["W4A16"], ())], ["lm_head"])
    assert old["lockstep"] == {"scale_rule": "amax/7", "scale_dtype": "bfloat16", "served_dtype": "bfloat16"}
    del old["config_groups"]["group_0"]["format"]
    assert formats.declared(old, BF16)[1][0].scheme == PRESETS["W4A16"]


@pytest.mark.parametrize("preset", ["W8A8", "FP8_DYNAMIC"])
def test_scales_that_others_store_in_bf16_are_read(tmp_path, preset):
    """llm-compressor writes the scales of 8-bit kernels in the model's dtype; the engine holds them in fp32."""
    out = save_pretrained(prepared(TinyMlp(), preset), tmp_path / "out")
    edit_quantization(out, lambda config: config.pop("lockstep"))
    edit_tensors(out, lambda tensors: tensors.update({k: v.bfloat16() for k, v in scales(tensors).items()}))
    scale = Checkpoint(out).layer("first").scale
    assert scale.dtype == FP32
    assert torch.equal(scale.bfloat16().float(), scale)


def scales(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.endswith("weight_scale")}


def config_of(preset: str, **weights: Any) -> dict[str, Any]:
    config = compressed_tensors.config([Group(OWN[preset], PRESETS[preset], ())], [])
    config["config_groups"]["group_0"]["weights"].update(weights)
    return config


OTHERS = {
    "no groups": (config_of("W4A16") | {"config_groups": {}}, "config_groups has 0 groups"),
    "preset": (config_of("W4A16") | {"config_groups": {"W4A16": ["Linear"]}}, "spell out their weights"),
    "outputs": (
        config_of("W8A8") | {"config_groups": {"a": {"weights": {"num_bits": 8}, "output_activations": {"a": 1}}}},
        "no quantized outputs",
    ),
    "three bits": (config_of("W4A16", num_bits=3), r"type and num_bits \('int', 3\)"),
    "group size": (config_of("W4A16", group_size=256), r"\('group', 256\)"),
    "zero points": (config_of("W8A16", symmetric=False), "symmetric=False: int8 weights have no such"),
    "reordered": (config_of("W4A16", actorder="group"), "actorder='group'"),
    "dynamic": (config_of("FP8", dynamic=True), "dynamic=True"),
    "blocks": (config_of("FP8_BLOCK", block_structure=[64, 64]), "reads blocks of 128 x 128"),
    "int8 alone": (config_of("W8A16") | {"format": "naive-quantized"}, "format='naive-quantized': this version reads"),
    "kv": (config_of("W4A16") | {"kv_cache_scheme": {"num_bits": 4}}, None),
}


@pytest.mark.parametrize(("config", "message"), OTHERS.values(), ids=OTHERS)
def test_config_of_another_grid_is_refused(config, message):
    """Reading it as ours would compare a model with numbers that it never had."""
    if message is None:
        with pytest.raises(ValueError, match="reads static fp8 by tensor or attn_head"):
            compressed_tensors.kv_cache(config)
        return
    with pytest.raises(ValueError, match=message):
        formats.declared(config, BF16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\]"),
        ({"activation_scheme": "static"}, "activation_scheme='static': this version reads"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt='ue8m0' contradicts amax/448"),
    ],
    ids=["block", "activations", "scales"],
)
def test_native_fp8_of_another_kind_is_refused(change, message):
    config = formats.find("fp8").config([Group("fp8", PRESETS["FP8_BLOCK"], ())], [])
    with pytest.raises(ValueError, match=message):
        formats.declared(config | change, BF16)


def test_native_fp8_of_deepseek_is_read():
    """V3's config; V3.1 says that its scales are powers of two."""
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    assert formats.declared(config, BF16)[1][0].scheme == PRESETS["FP8_BLOCK"]
    rule = formats.declared(config | {"scale_fmt": "ue8m0"}, BF16)[1][0].scheme.weights.scale_rule
    assert rule == "pow2/448"


# Contradictions ----------------------------------------------------------------------------------------------------


def change(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: function(tensors[name])})


DAMAGE = {
    "plain weight": ("W8A8", change("first.weight", Tensor.bfloat16), "weight is bfloat16, codes are int8"),
    "scale dtype": ("W8A8", change("first.weight_scale", Tensor.bfloat16), "weight_scale is .* bfloat16, and not what"),
    "one scale": ("W8A8", change("first.weight_scale", lambda s: s[:1]), r"one scale a channel \(scales \[256, 1\]"),
    "blocks": ("FP8_BLOCK", change("first.weight_scale", lambda s: s.T), "scales are transposed"),
    "no tensor's": ("FP8", change("first.weight_scale", lambda s: s.repeat(2)), "do not unpack as float-quantized"),
    "e5m2": ("FP8_DYNAMIC", change("first.weight", lambda w: w.to(torch.float8_e5m2)), "weight is float8_e5m2, codes"),
    "mx scale": ("MXFP8", change("first.weight_scale", Tensor.int), r"weight_scale is torch\.int32, MX scales"),
    "fp4 words": ("MXFP4", change("first.weight_packed", Tensor.int), r"packed FP4 codes are torch\.uint8"),
    "no second": ("NVFP4", lambda tensors: tensors.pop("first.weight_global_scale"), "weight_global_scale not stored"),
    "second": ("NVFP4", change("first.weight_global_scale", Tensor.bfloat16), "weight_global_scale is .* bfloat16"),
    "nv scale": ("NVFP4", change("first.weight_scale", Tensor.bfloat16), "stored in bfloat16, the config declares fl"),
    "no zeros": ("W4A16_ASYM", lambda tensors: tensors.pop("first.weight_zero_point"), "weight_zero_point not stored"),
    "zeros": ("W4A16_ASYM", change("first.weight_zero_point", lambda z: z[:8]), r"zero points are \[64, 1\], scales"),
}


@pytest.mark.parametrize(("preset", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_layer_that_contradicts_itself_is_named(tmp_path, preset, damage, message):
    out = save_pretrained(calibrated(prepared(TinyMlp(), preset)), tmp_path / "out")
    edit_tensors(out, damage)
    with pytest.raises(CheckpointError, match=f"^first: .*{message}"):
        Checkpoint(out).layer("first")


RANGES = {
    "missing": (lambda tensors: tensors.pop("first.input_scale"), "not stored, but the config declares .* static"),
    "nan": (change("first.input_scale", lambda s: s * float("nan")), r"is \[nan\], not one positive number"),
    "negative": (change("first.input_scale", torch.neg), r"is \[-0\.0.*\], not one positive number"),
    "two": (change("first.input_scale", lambda s: s.repeat(2)), r"is \[.*, .*\], not one positive number"),
    "rounded": (change("first.input_scale", Tensor.bfloat16), "is bfloat16, stored are float32 ones"),
}


@pytest.mark.parametrize(("damage", "message"), RANGES.values(), ids=RANGES)
def test_input_scale_that_cannot_be_is_named(tmp_path, damage, message):
    out = save_pretrained(calibrated(prepared(TinyMlp(), "FP8")), tmp_path / "out")
    edit_tensors(out, damage)
    with pytest.raises(CheckpointError, match=f"^first: input_scale {message}"):
        Checkpoint(out).stored_scale("first")


# C3 ----------------------------------------------------------------------------------------------------------------


def bit_flipped(tensor: Tensor) -> Tensor:
    """`tensor` with the lowest bit of its first element's lowest byte turned."""
    raw = tensor.clone().contiguous().flatten().view(torch.uint8)
    raw[0] ^= 1
    return raw.view(tensor.dtype).view(tensor.shape)


@every_pair
def test_one_wrong_bit_in_any_tensor_stops_the_export(monkeypatch, name, format):
    """The engine would serve a model that never trained."""
    scheme, layout = SCHEMES[name], formats.find(format)
    model = calibrated(prepared(TinyMlp(dtype=scheme.weights.served_dtype), scheme))

    def flips(write: Callable[..., dict[str, Tensor]], tensor: str) -> Callable[..., dict[str, Tensor]]:
        def faulty(*args: Any) -> dict[str, Tensor]:
            stored = write(*args)
            return stored | {tensor: bit_flipped(stored[tensor])}

        return faulty

    for tensor in set(layout.tensors(scheme.weights)) - {"weight_shape"}:
        with monkeypatch.context() as patch:
            patch.setattr(layout, "write", flips(layout.write, tensor))
            if format in formats.PACKED:
                patch.setitem(formats.PACKED, format, flips(formats.PACKED[format], tensor))
            with pytest.raises(
                ExportError, match=r"^first(: the packed words do not give back|\.weight, as| cannot be)"
            ):
                list(stream(model, format))


@pytest.mark.parametrize("name", ["W8A8", "FP8", "NVFP4", "W4A8", "FP8_BLOCK"])
def test_a_forward_that_multiplies_something_else_stops_the_export(monkeypatch, name):
    """Layers with quantized inputs multiply codes and scales: a kernel that makes others trained another model."""
    quantize = reference.quantize

    def faulty(*args: Any) -> grid.Quantized:
        codes, scale, *rest = quantize(*args)
        return grid.Quantized(codes, bit_flipped(scale), *rest)

    monkeypatch.setattr(reference, "quantize", faulty)
    with pytest.raises(ExportError, match=r"^first: the packed words do not give back the weight that it trained with"):
        list(stream(calibrated(prepared(TinyMlp(), name))))


@pytest.mark.parametrize("preset", ["MXFP4A16", "NVFP4"])
def test_nibbles_in_the_wrong_order_stop_the_export(monkeypatch, preset):
    pack = fp4.pack
    monkeypatch.setattr(fp4, "pack", lambda codes: pack(codes.view(torch.uint8).flip(-1).view(E4M3)))
    with pytest.raises(ExportError, match=r"^first: the packed words do not give back the weight that it trained with"):
        list(stream(calibrated(prepared(TinyMlp(), preset))))


def test_zero_points_along_the_wrong_side_stop_the_export(monkeypatch):
    pack = words.pack
    monkeypatch.setattr(
        words, "pack", lambda codes, bits: pack(codes.roll(1, -1), bits) if len(codes) < 5 else pack(codes, bits)
    )
    with pytest.raises(ExportError, match=r"^first: the packed words do not give back the weight that it trained with"):
        list(stream(prepared(TinyMlp(), "W4A16_ASYM")))


# Refusals ----------------------------------------------------------------------------------------------------------


def single(n: int, k: int, scheme: str | Scheme) -> nn.Module:
    return prepared(nn.ModuleDict({"odd": nn.Linear(k, n, dtype=BF16)}), scheme)


def in_fp16(preset: str) -> nn.Module:
    return prepared(TinyMlp(dtype=FP16), Scheme.preset(preset, served_dtype=FP16))


UNFIT = {
    "int8 as packed": (lambda: prepared(TinyMlp(), "W8A8"), "pack-quantized", "Formats that can: int-quantized"),
    "int4 as int8": (lambda: prepared(TinyMlp()), "int-quantized", "can: pack-quantized, gptq, marlin"),
    "gptq inputs": (lambda: prepared(TinyMlp(), "W4A8"), "gptq", "first .*no word for quantized inputs.*: pack-quan"),
    "marlin fp8": (lambda: prepared(TinyMlp(), "FP8"), "marlin", "Formats that can: float-quantized, fp8"),
    "native channel": (
        lambda: prepared(TinyMlp(), "FP8_DYNAMIC"),
        "fp8",
        "by channel, float-quantized does.*can: float",
    ),
    "native dynamic": (
        lambda: prepared(TinyMlp(), SCHEMES["FP8 tensor dynamic"]),
        "fp8",
        "does not say whether dynamic inputs are scaled by token",
    ),
    "fp8 as mx": (lambda: prepared(TinyMlp(), "FP8_DYNAMIC"), "mxfp8-quantized", "groups of 32 with power-of-two"),
    "mx as nv": (lambda: prepared(TinyMlp(), "MXFP4"), "nvfp4-pack-quantized", "can: mxfp4-pack-quantized"),
    "nv as mx": (lambda: prepared(TinyMlp(), "NVFP4"), "mxfp4-pack-quantized", "can: nvfp4-pack-quantized"),
    "mx as fp8": (lambda: prepared(TinyMlp(), "MXFP8"), "float-quantized", "fp8 weights by tensor, channel or block"),
    "mx fp16": (lambda: in_fp16("MXFP4A16"), None, "first .*: the engines' MX kernels serve bfloat16 alone"),
    "mx8 fp16": (lambda: in_fp16("MXFP8"), "mxfp8-quantized", "MX kernels serve bfloat16 alone"),
    "w4afp8 fp16": (
        lambda: prepared(TinyMlp(dtype=FP16), Scheme.preset("W4AFP8", scale_dtype=FP16, served_dtype=FP16)),
        None,
        "INT4 weights and FP8 inputs serves bfloat16 alone",
    ),
    "int8 shape": (lambda: single(24, 128, "W8A8"), None, "odd .*N=24, K=128: the engines' INT8 kernels .* of 16"),
    "fp8 shape": (lambda: single(128, 40, "FP8_DYNAMIC"), None, "N=128, K=40: the engines' FP8 kernels .* of 16"),
    "block shape": (lambda: single(96, 128, "FP8_BLOCK"), None, "need N % 64 == 0 and K % 128 == 0"),
    "native shape": (lambda: single(96, 128, "FP8_BLOCK"), "fp8", "odd cannot be stored as fp8: N=96"),
    "w4afp8 shape": (lambda: single(64, 128, "W4AFP8"), None, "N=64, K=128: .*FP8 inputs need multiples of 128"),
    "nvfp4 shape": (lambda: single(32, 48, "NVFP4A16"), None, "N=32, K=48: the engines' FP4 kernels .* of 32"),
    "mx shape": (lambda: single(16, 64, "MXFP8"), None, "N=16, K=64: the engines' MX kernels need multiples of 32"),
    "w8 shape": (lambda: single(16, 128, "W8A16"), None, "N=16, K=128: the engines' INT8 kernels need multiples of 32"),
    "w8 marlin": (lambda: single(96, 128, "W8A16"), "marlin", "N=96, K=128: Marlin needs"),
    "fused blocks": (
        lambda: prepared(tiny_llama(num_key_value_heads=1), "FP8_BLOCK"),
        None,
        r"self_attn\.k_proj has 64 outputs, but engines put .*each but the last needs a multiple of 128",
    ),
}


@pytest.mark.parametrize(("build", "format", "message"), UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_stored_or_served_is_refused_by_layer(tmp_path, build, format, message):
    """Before training, with what would do."""
    model = build()
    with pytest.raises(ExportError, match=message):
        check_exportable(model, format)
    with pytest.raises(ExportError, match=message):
        save_pretrained(calibrated(model), tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_gptq_names_the_layer_whose_zero_point_it_cannot_say():
    model = prepared(TinyMlp(), "W4A16_ASYM")
    model.second.weight.abs_()
    with pytest.raises(ExportError, match=r"^second cannot be stored as gptq: 256 groups have no negative weight"):
        list(stream(model, "gptq"))
    assert "second.weight_zero_point" in dict(stream(model))


def test_measured_ranges_are_asked_for_at_the_export_and_not_before(tmp_path):
    """The callback checks the format before training, and calibrates after it."""
    model = prepared(TinyMlp(), "FP8")
    check_exportable(model)
    with pytest.raises(ExportError, match=r"^first: the range of its inputs is not measured: run `lockstep calibrate`"):
        save_pretrained(model, tmp_path / "out")
    calibrated(model).second.observer = make("minmax", model.second.scheme.activations)
    with pytest.raises(ExportError, match=r"^second is being calibrated"):
        next(stream(model))
    assert not list(tmp_path.iterdir())


def test_fused_layers_must_share_the_input_scale():
    """The engine quantizes their input once."""
    model = small_llama("FP8")
    model.model.layers[0].self_attn.v_proj.input_scale.mul_(2)
    message = r"v_proj has input scale 0\.0246914 and .*q_proj 0\.0123457, but engines run them as one layer"
    with pytest.raises(ExportError, match=message):
        next(stream(model))


@torch.no_grad()
def test_fused_layers_share_the_scale_of_the_tensor():
    """vLLM would quantize the weights of the smaller ones again."""
    model = small_llama("FP8")
    model.model.layers[0].mlp.up_proj.weight.mul_(3)
    stored = dict(stream(model))
    gate, up = (stored[f"model.layers.0.mlp.{name}_proj.weight_scale"] for name in ("gate", "up"))
    assert bitwise_equal(gate, up)


# KV cache ----------------------------------------------------------------------------------------------------------


def with_cache(scheme: str = "W8A8", spec: KVCacheSpec | str = "fp8") -> Any:
    model = small_llama(scheme)
    kv_cache.prepare_kv_cache(model, spec)
    for _, module in model.named_modules():
        for name in ("k_scale", "v_scale"):
            if name in module._buffers:
                module._buffers[name].copy_(torch.rand_like(module._buffers[name]) / 7)
    return model


@pytest.mark.parametrize("strategy", ["tensor", "head"])
@torch.no_grad()
def test_scales_of_the_kv_cache_are_stored_unrounded_and_declared(tmp_path, strategy):
    spec = KVCacheSpec("fp8_e4m3", strategy)
    model = with_cache(spec=spec)
    checkpoint = Checkpoint(save_pretrained(model, tmp_path / "out"))
    assert checkpoint.kv_cache == spec
    assert checkpoint.config["quantization_config"]["kv_cache_scheme"] == kv_cache.config(spec)
    attention = "model.layers.0.self_attn"
    for name in ("k_scale", "v_scale"):
        own = getattr(model.get_submodule(attention), name)
        assert bitwise_equal(checkpoint.tensor(f"{attention}.{name}"), own)
        assert f"{attention}.{name}" in checkpoint.plain_tensors()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert relative_error(loaded(token_ids()).logits, model(token_ids()).logits) < 0.1


def test_what_no_config_says_of_a_kv_cache_is_refused():
    with pytest.raises(ExportError, match=r"gptq has no word for a quantized KV cache .*unprepare_kv_cache"):
        check_exportable(with_cache("W4A16"), "gptq")
    with pytest.raises(ExportError, match=r"--kv-cache-dtype int8_per_token_head.*To do so call unprepare_kv_cache"):
        check_exportable(with_cache(spec="int8_per_token_head"))
    model = with_cache()
    model.model.layers[0].self_attn.v_scale.fill_(float("nan"))
    check_exportable(model)
    with pytest.raises(
        ExportError, match=r"self_attn: the range of its keys and values is not measured: run `lockstep"
    ):
        next(stream(model))


def test_a_cache_of_the_models_own_is_none_of_ours(tmp_path):
    """Models with an attribute of that name exist."""
    model = prepared(TinyMlp())
    model.kv_cache = "paged"
    model.k_scale = nn.Parameter(torch.ones(1, dtype=FP32))
    checkpoint = Checkpoint(save_pretrained(model, tmp_path / "out"))
    assert checkpoint.kv_cache is None
    assert checkpoint.tensor("k_scale").dtype == BF16
