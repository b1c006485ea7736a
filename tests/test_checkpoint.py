"""`Checkpoint`: what is read is what is stored, and a folder that is damaged or lies says so by file or by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from models import TinyMlp, channel, edit_json, edit_quantization, edit_tensors, grouped, prepared, tiny_llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lockstep import Scheme, grid
from lockstep.export import Checkpoint, CheckpointError, compressed_tensors, formats, save_pretrained
from lockstep.export.checkpoint import bitwise_equal, same_bits
from lockstep.export.groups import Group
from lockstep.qat.prepare import quantized_modules

every_format = pytest.mark.parametrize("format", formats.PACKED)  # the others: test_formats.py


def export(directory: Path, format: str = "pack-quantized", scheme: Scheme = grouped(32), **options: Any) -> Path:  # noqa: B008
    return save_pretrained(prepared(TinyMlp(), scheme), directory / "out", format, **options)


def read_all(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    for name in checkpoint.layers:
        checkpoint.layer(name)
    for name in checkpoint.plain_tensors():
        checkpoint.tensor(name)


def weights(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]["weights"]


# What is read ------------------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("options", [{}, {"max_shard_size": 1}], ids=["whole", "sharded"])
def test_every_tensor_is_read_as_it_was_stored(tmp_path, format, options):
    out = export(tmp_path, format, **options)
    checkpoint, stored = Checkpoint(str(out)), {}
    for path in out.glob("*.safetensors"):
        stored |= load_file(path)
    assert (checkpoint.format, checkpoint.scheme, checkpoint.directory) == (format, grouped(32), out)
    assert set(checkpoint.tensors) == set(stored)
    assert all(bitwise_equal(checkpoint.tensor(name), tensor) for name, tensor in stored.items())
    packed = {
        f"{layer}.{suffix}" for layer in checkpoint.layers for suffix in formats.find(format).tensors(grouped().weights)
    }
    assert set(checkpoint.plain_tensors()) == set(stored) - packed


def of_compressed_tensors(directory: Path, scheme: Scheme) -> nn.Module:
    """A checkpoint as llm-compressor writes one: rounded to nearest by compressed-tensors' own code."""
    model, spec = tiny_llama(), scheme.weights
    arguments = preset_name_to_scheme("W4A16", ["Linear"])
    arguments.weights.strategy, arguments.weights.group_size = spec.strategy, spec.group_size
    config = QuantizationConfig(
        config_groups={"group_0": arguments}, ignore=["lm_head"], format="pack-quantized", quantization_status="frozen"
    )
    layers = {name: module.weight.clone() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    del layers["lm_head"]
    apply_quantization_config(model, config)
    for name, weight in layers.items():
        groups = weight.unflatten(-1, (spec.num_groups(weight.shape[1]), -1))
        module = model.get_submodule(name)
        module.weight_scale.data = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments.weights)[0]
        compress_module(module)
    directory.mkdir()
    save_file(model.state_dict(), directory / "model.safetensors", {"format": "pt"})
    quantization = config.model_dump(mode="json") | {"quantization_status": "compressed"}
    (directory / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return layers


@pytest.mark.parametrize("scheme", [grouped(128), grouped(32), channel()], ids=str)
def test_checkpoint_of_llm_compressor_is_read(tmp_path, scheme):
    """Somebody else's checkpoint has no ``"lockstep"`` entry: their rule and bf16 are assumed."""
    layers = of_compressed_tensors(tmp_path / "out", scheme)
    checkpoint = Checkpoint(tmp_path / "out")
    spec = checkpoint.scheme.weights
    assert spec.scale_rule == "amax/7.5"
    assert (spec.strategy, spec.group_size) == (scheme.weights.strategy, scheme.weights.group_size)
    assert set(checkpoint.layers) == set(layers)
    for name, weight in layers.items():
        assert same_bits(checkpoint.layer(name), grid.quantize(weight, spec)), name


@pytest.mark.parametrize("format", ["gptq", "marlin"])
def test_checkpoint_without_our_entry_is_read(tmp_path, format):
    out = export(tmp_path, format)
    before = {name: Checkpoint(out).layer(name) for name in Checkpoint(out).layers}
    edit_quantization(out, lambda config: config.pop("lockstep"))
    assert Checkpoint(out).scheme == grouped(32, scale_rule="amax/7.5")
    for name, quantized in before.items():
        assert same_bits(quantized, Checkpoint(out).layer(name))


# Files -------------------------------------------------------------------------------------------------------------


@every_format
def test_truncated_file_is_found_wherever_it_is_cut(tmp_path, format):
    """A copy that was interrupted must not be served, or compared, as far as it goes."""
    out = export(tmp_path, format)
    path = out / "model.safetensors"
    data = path.read_bytes()
    for size in (*range(0, 1000, 7), *range(1000, len(data), 997), len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=f"^{path} is missing, truncated or no safetensors file"):
            Checkpoint(out)


@every_format
def test_damaged_header_is_an_error_or_changes_nothing_but_names(tmp_path, format):
    """One wrong byte in a header: an error of ours, never another exception and never other weights."""
    out = export(tmp_path, format)
    path = out / "model.safetensors"
    data = path.read_bytes()
    before = {name: Checkpoint(out).layer(name) for name in Checkpoint(out).layers}
    for position in range(8 + int.from_bytes(data[:8], "little")):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        try:
            checkpoint = Checkpoint(out)
            for name in set(checkpoint.layers) & set(before):
                assert same_bits(checkpoint.layer(name), before[name])
        except CheckpointError:
            pass


def empty_folder(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def shard(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[1]


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def list_tensor(directory: Path, name: str, file: str) -> None:
    edit_json(directory / "model.safetensors.index.json", lambda index: index["weight_map"].update({name: file}))


FILES = {
    "no folder": (
        lambda out: (empty_folder(out), out.rmdir()),
        "cannot read .*config.json: No such file or directory",
    ),
    "no config": (empty_folder, "cannot read .*config.json: No such file or directory"),
    "config is a folder": (
        lambda out: put_folder(out / "config.json"),
        "cannot read .*config.json: Is a directory",
    ),
    "config cut": (lambda out: (out / "config.json").write_text('{"quant'), "config.json is not JSON"),
    "config empty": (lambda out: (out / "config.json").write_text(""), "config.json is not JSON"),
    "config binary": (lambda out: (out / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not JSON"),
    "config a list": (lambda out: (out / "config.json").write_text("[1]"), "config.json holds no JSON object"),
    "index cut": (lambda out: (out / "model.safetensors.index.json").write_text("{"), "index.json is not JSON"),
    "no tensors": (
        lambda out: [path.unlink() for path in out.glob("model*")],
        "model.safetensors is missing, truncated or no safetensors file",
    ),
    "no shard": (lambda out: shard(out).unlink(), r"model-00002-of-\d+.safetensors is missing"),
    "shard is a folder": (
        lambda out: put_folder(shard(out)),
        r"model-00002-of-\d+.safetensors is missing, truncated or no safetensors file",
    ),
    "shard of zeros": (
        lambda out: shard(out).write_bytes(bytes(shard(out).stat().st_size)),
        r"model-00002-of-\d+.safetensors is missing, truncated or no safetensors file",
    ),
    "lost tensor": (
        lambda out: list_tensor(out, "third.weight_packed", shard(out).name),
        "index.json lists third.weight_packed and 0 more, which no file holds",
    ),
    "unknown shard": (
        lambda out: list_tensor(out, "first.bias", "model-99999.safetensors"),
        "model-99999.safetensors is missing",
    ),
}


@pytest.mark.parametrize(("damage", "message"), FILES.values(), ids=FILES)
def test_missing_or_damaged_file_is_named(tmp_path, damage, message):
    out = export(tmp_path, max_shard_size=1)
    damage(out)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(out)


# Configs -----------------------------------------------------------------------------------------------------------


def update(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(fields)


CONFIGS = {
    "none": ("pack-quantized", lambda config: config.clear(), "has no quantization_config: not a quantized checkpoint"),
    "awq": ("gptq", update(quant_method="awq"), "quant_method='awq', format=None: this version reads pack-quantized"),
    "naive": (
        "pack-quantized",
        update(format="naive-quantized"),
        "quant_method='compressed-tensors', format='naive-quantized'",
    ),
    "method of a format": ("pack-quantized", update(quant_method="gptq"), "quantization_config: 'sym'"),
    "no method": ("pack-quantized", lambda config: config.pop("quant_method"), "quant_method=None"),
    "gptq v2": ("gptq", update(checkpoint_format="gptq_v2"), "checkpoint_format='gptq_v2': this version reads 'gptq'"),
    "act order": ("gptq", update(desc_act=True), "desc_act=true: the inputs are in another order"),
    "gptq bits": ("gptq", update(bits=8), "scale_rule of int8 symmetric='amax/7'"),
    "gptq asymmetric": ("gptq", update(sym=False), "scale_rule of int4 asymmetric='amax/7'"),
    "gptq group": ("gptq", update(group_size=48), r"=\('group', 48\): this version takes \('group', 32\)"),
    "gptq no bits": ("gptq", lambda config: config.pop("bits"), "quantization_config: 'bits'"),
    "marlin bits": ("marlin", update(bits=3), "format='int3': this version takes 'int4'"),
    "bits": (
        "pack-quantized",
        lambda config: weights(config).update(num_bits=8),
        "scale_rule of int8 symmetric='amax/7'",
    ),
    "asymmetric": (
        "pack-quantized",
        lambda config: weights(config).update(symmetric=False),
        "of int4 asymmetric='amax/7'",
    ),
    "no groups": ("pack-quantized", lambda config: config.pop("config_groups"), "config_groups has 0"),
    "rule": (
        "pack-quantized",
        lambda config: config["lockstep"].update(scale_rule="amax/9"),
        "scale_rule of int4 symmetric='amax/9': this version takes 'amax/7'",
    ),
    "dtype": ("marlin", lambda config: config["lockstep"].update(scale_dtype="float8"), "'float8'"),
    "rounded": (
        "gptq",
        lambda config: config["lockstep"].update(scale_dtype="float32"),
        "the engine holds scales in the served dtype bfloat16 and would round the float32 ones",
    ),
    "other format": (
        "gptq",
        lambda config: (
            config.clear(),
            config.update(compressed_tensors.config([Group("pack-quantized", grouped(32), ())], [])),
        ),
        r"declares pack-quantized, but no tensor is called \*\.weight_packed",
    ),
}


@pytest.mark.parametrize(("format", "change", "message"), CONFIGS.values(), ids=CONFIGS)
def test_config_that_is_none_of_ours_is_refused_by_name(tmp_path, format, change, message):
    """Reading it as something near would give other weights."""
    out = export(tmp_path, format)
    edit_quantization(out, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(out)


WRONG_TYPES = {
    "config": ("pack-quantized", (), "int4"),
    "groups": ("pack-quantized", ("config_groups",), None),
    "weights": ("pack-quantized", ("config_groups", "group_0", "weights"), "int4"),
    "group size": ("gptq", ("group_size",), "128"),
    "method": ("gptq", ("quant_method",), ["gptq"]),
    "lockstep": ("marlin", ("lockstep",), 1),
}


@pytest.mark.parametrize(("format", "path", "value"), WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_config_whose_entries_are_of_another_kind_is_refused(tmp_path, format, path, value):
    """A hand-edited config.json is reported as what it is, not by a traceback from inside."""
    out = export(tmp_path, format)

    def change(config: dict[str, Any]) -> None:
        *parents, last = ("quantization_config", *path)
        for key in parents:
            config = config[key]
        config[last] = value

    edit_json(out / "config.json", change)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(out)


# Tensors that contradict the config or each other ------------------------------------------------------------------


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def change(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: function(tensors[name])})


def left_plain(tensors: dict[str, Tensor]) -> None:
    for suffix in ("packed", "scale", "shape"):
        del tensors[f"first.weight_{suffix}"]
    tensors["first.weight"] = torch.zeros(256, 128, dtype=torch.bfloat16)


# `first` has 256 outputs, 128 inputs and 4 groups.
TENSORS = {
    "packed missing": (
        "pack-quantized",
        lambda tensors: tensors.pop("first.weight_packed"),
        "first: weight_packed not stored, found no weight",
    ),
    "scale missing": ("pack-quantized", lambda tensors: tensors.pop("first.weight_scale"), "weight_scale not stored"),
    "plain": (
        "pack-quantized",
        left_plain,
        "first: weight_packed, weight_scale, weight_shape not stored, found a plain weight in bfloat16",
    ),
    "g_idx missing": ("gptq", lambda tensors: tensors.pop("first.g_idx"), "first: g_idx not stored"),
    "transposed": (
        "pack-quantized",
        change("first.weight_scale", lambda scale: scale.T),
        r"first: scales are transposed: \[4, 256\] instead of \[256, 4\]",
    ),
    "gptq transposed": (
        "gptq",
        change("first.scales", lambda scale: scale.T),
        r"first: qweight \[16, 256\], .* do not unpack as gptq",
    ),
    "scale dtype": (
        "pack-quantized",
        change("first.weight_scale", Tensor.float),
        "first: scales are stored in float32, the config declares bfloat16",
    ),
    "marlin scale dtype": (
        "marlin",
        change("first.s", Tensor.half),
        "first: scales are stored in float16, the config declares bfloat16",
    ),
    "coarser": (
        "pack-quantized",
        change("first.weight_scale", lambda scale: scale[:, :2]),
        r"first: config.json declares groups of 32 \(scales \[256, 4\]\), stored are \[256, 2\], groups of 64",
    ),
    "marlin coarser": ("marlin", change("first.s", lambda scale: scale[:2]), r"stored are \[256, 2\], groups of 64"),
    "gptq coarser": ("gptq", change("first.scales", lambda scale: scale[:2]), "first: .*g_idx is not k // 64"),
    "cut scales": (
        "pack-quantized",
        change("first.weight_scale", lambda scale: scale[:100]),
        r"first: config.json declares groups of 32 \(scales \[256, 4\]\), stored are \[100, 4\], neither",
    ),
    "shape": (
        "pack-quantized",
        change("first.weight_shape", lambda shape: shape.flip(0)),
        r"first: weight_shape says \[128, 256\], the words hold \[256, 128\]",
    ),
    "cut words": (
        "pack-quantized",
        change("first.weight_packed", lambda words: words[:, :8]),
        r"first: weight_shape says \[256, 128\], the words hold \[256, 64\]",
    ),
    "cut tiles": ("marlin", change("first.B", lambda words: words[:, :100]), "first: .*do not unpack as marlin: N=50"),
    "zeros": ("gptq", change("first.qzeros", torch.zeros_like), "first: .*qzeros are not those of a symmetric GPTQ v1"),
    "order": ("gptq", change("first.g_idx", lambda index: index.flip(0)), "first: .*the inputs are in another order"),
    "other layer": (
        "pack-quantized",
        rename("second.weight_packed", "first.weight_packed"),
        r"first: weight_shape says \[256, 128\], the words hold \[128, 256\]",
    ),
    "flat words": pytest.param(*("pack-quantized", change("first.weight_packed", torch.flatten), "first: ")),
    "flat scales": pytest.param(
        *("pack-quantized", change("first.weight_scale", lambda scale: scale[:, 0]), "first: ")
    ),
    "no scales": pytest.param(*("pack-quantized", change("first.weight_scale", lambda scale: scale[:, :0]), "first: ")),
    "gptq no scales": pytest.param(*("gptq", change("first.scales", lambda scale: scale[:0]), "first: ")),
    "words of another dtype": pytest.param(
        *("pack-quantized", change("first.weight_packed", Tensor.float), "first: "),
    ),
}


@pytest.mark.parametrize(("format", "damage", "message"), TENSORS.values(), ids=TENSORS)
def test_layer_that_contradicts_itself_is_named(tmp_path, format, damage, message):
    """Read anyhow, it would be another weight; without its name, nobody finds it among hundreds."""
    out = export(tmp_path, format)
    edit_tensors(out, damage)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(out).layer("first")


DECLARATIONS = {
    "g64": (lambda config: weights(config).update(group_size=64), "declares groups of 64 .*, groups of 32"),
    "channel": (
        lambda config: weights(config).update(strategy="channel", group_size=-1),
        r"declares one scale a channel \(scales \[256, 1\]\), stored are \[256, 4\], groups of 32",
    ),
    "fp16": (
        lambda config: config["lockstep"].update(scale_dtype="float16", served_dtype="float16"),
        "in bfloat16, the config declares float16",
    ),
}


@pytest.mark.parametrize(("declare", "message"), DECLARATIONS.values(), ids=DECLARATIONS)
def test_config_that_does_not_fit_the_tensors_is_told_by_the_first_layer(tmp_path, declare, message):
    out = export(tmp_path)
    edit_quantization(out, declare)
    with pytest.raises(CheckpointError, match=f"^first: .*{message}"):
        read_all(out)


def test_declared_groups_that_do_not_divide_the_row_name_the_layer(tmp_path):
    """96 inputs in groups of 32 are stored, the config says 64."""
    model = prepared(nn.ModuleDict({"odd": nn.Linear(96, 64, dtype=torch.bfloat16)}), grouped(32))
    out = save_pretrained(model, tmp_path / "out")
    edit_quantization(out, lambda config: weights(config).update(group_size=64))
    with pytest.raises(CheckpointError, match=r"^odd: "):
        Checkpoint(out).layer("odd")


@pytest.mark.parametrize("name", ["third", "norm", ""])
def test_layer_that_is_not_stored_is_an_error(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"^{name}: weight_packed, weight_scale, weight_shape not stored, found"):
        Checkpoint(export(tmp_path)).layer(name)


def test_tensor_that_is_not_stored_is_an_error(tmp_path):
    out = export(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tensor first\.weight\."):
        Checkpoint(out).tensor("first.weight")


def test_reading_loads_only_what_is_asked_for(tmp_path):
    """The layers of a large checkpoint are compared one by one; a damaged one does not hide the others."""
    model = prepared(TinyMlp())
    out = save_pretrained(model, tmp_path / "out")
    edit_tensors(out, left_plain)
    checkpoint = Checkpoint(out)
    assert checkpoint.layers == ("second",)
    second = dict(quantized_modules(model))["second"]
    assert same_bits(checkpoint.layer("second"), grid.quantize(second.weight, grouped().weights))


# bitwise_equal -----------------------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_bitwise_equal_compares_bits_and_not_values(dtype):
    """-0 and 0 serve other NaNs and infinities; a NaN that came back as it was is no fault of the export."""
    x = torch.tensor([0.0, -1.0, NAN, float("inf")], dtype=dtype)
    assert bitwise_equal(x, x.clone())
    assert not bitwise_equal(x, torch.tensor([-0.0, -1.0, NAN, float("inf")], dtype=dtype))
    assert not bitwise_equal(x, torch.tensor([0.0, -1.0, 1.0, float("inf")], dtype=dtype))


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32), False),
        (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16), False),
        (torch.zeros(2, 3), torch.zeros(3, 2), False),
        (torch.zeros(0, 3), torch.zeros(0, 3), True),
        (torch.tensor(7), torch.tensor(7), True),
        (torch.tensor([True, False]), torch.tensor([True, False]), True),
        (torch.tensor([True, False]), torch.tensor([True, True]), False),
        (torch.arange(6.0).view(2, 3).T, torch.arange(6.0).view(2, 3).T.contiguous(), True),
    ],
    ids=["kind", "dtype", "shape", "empty", "scalar", "bool", "other-bool", "strides"],
)
def test_bitwise_equal_of_other_tensors(a, b, equal):
    assert bitwise_equal(a, b) is equal
    assert bitwise_equal(b, a) is equal
