"""The scheme: its fields, its presets, and the JSON that other libraries read."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict, fields
from itertools import product

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

from lockstep import Scheme, TensorSpec

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPINGS = [{"group_size": size} for size in (32, 64, 128)] + [{"strategy": "channel"}]
SPECS = [
    TensorSpec(**grouping, scale_rule=rule, scale_dtype=scale, served_dtype=served)
    for grouping, rule, scale, served in product(GROUPINGS, ("amax/7", "amax/7.5"), DTYPES, DTYPES)
] + [TensorSpec(group_size=32, scale_rule="max/-8", scale_dtype=DTYPES[1], served_dtype=served) for served in DTYPES]


def with_weights(scheme: Scheme, **weights) -> dict:
    """A ``quantization_config`` of `scheme` with keys of its weights replaced."""
    config = scheme.to_compressed_tensors()
    config["config_groups"]["group_0"]["weights"].update(weights)
    return config


def test_field_names_and_defaults_are_public_api():
    """YAML files and stored recipes name these."""
    assert asdict(TensorSpec()) == {
        "format": "int4",
        "strategy": "group",
        "group_size": 128,
        "symmetric": True,
        "scale_rule": "amax/7",
        "scale_dtype": torch.bfloat16,
        "served_dtype": torch.bfloat16,
    }
    assert [field.name for field in fields(Scheme)] == ["weights"]
    assert Scheme() == Scheme(TensorSpec())


def test_a_scheme_cannot_change_under_a_model_that_trains_with_it():
    with pytest.raises(FrozenInstanceError):
        TensorSpec().group_size = 32
    with pytest.raises(FrozenInstanceError):
        Scheme().weights = TensorSpec()
    assert len({Scheme(), Scheme.preset("W4A16")}) == 1


def test_preset_takes_overrides_and_any_case():
    assert Scheme.preset("W4A16") == Scheme.of("w4a16") == Scheme()
    assert Scheme.preset("W4A16", group_size=32, scale_rule="amax/7.5") == Scheme(
        TensorSpec(group_size=32, scale_rule="amax/7.5")
    )
    scheme = Scheme.preset("W4A16", strategy="channel")
    assert Scheme.of(scheme) is scheme


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("W4A61", "no preset 'W4A61': near ones are W4A16"),
        ("zzz", "near ones are none.*trains W4A16"),
        ("NVFP4", "known to compressed-tensors, but not trained.*trains W4A16"),
        ("w8a16", "known to compressed-tensors, but not trained"),
    ],
)
def test_unknown_preset_says_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        Scheme.preset(name)


@pytest.mark.parametrize(
    ("invalid", "message"),
    [
        ({"format": "int8"}, "format='int8': this version takes 'int4'"),
        ({"strategy": "tensor"}, "strategy='tensor': this version takes 'group', 'channel'"),
        ({"group_size": 48}, "group_size=48: this version takes 32, 64, 128"),
        ({"group_size": None}, "group_size=None: this version takes 32, 64, 128"),
        ({"strategy": "channel", "group_size": 32}, "group_size with strategy='channel'=32"),
        ({"symmetric": False}, "symmetric=False: this version takes True"),
        ({"scale_rule": "amax/8"}, "scale_rule='amax/8': this version takes 'amax/7', 'amax/7.5', 'max/-8'"),
        ({"scale_dtype": torch.float64}, "scale_dtype=torch.float64: this version takes torch.bfloat16"),
        ({"served_dtype": "bfloat16"}, "served_dtype='bfloat16': this version takes torch.bfloat16"),
        ({"scale_rule": "max/-8", "scale_dtype": torch.float16}, "Q4_0.*found group_size=128"),
        ({"scale_rule": "max/-8", "group_size": 32}, "Q4_0.*found group_size=32 and scale_dtype=torch.bfloat16"),
        ({"scale_rule": "max/-8", "strategy": "channel", "scale_dtype": torch.float16}, "Q4_0.*group_size=None"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_invalid_field_is_refused_by_name(invalid, message):
    with pytest.raises(ValueError, match=message):
        TensorSpec(**invalid)


def test_channel_has_no_group_size():
    """Two specs that quantize alike compare equal."""
    assert TensorSpec(strategy="channel").group_size is None
    assert TensorSpec(strategy="channel", group_size=128) == TensorSpec(strategy="channel", group_size=None)


@pytest.mark.parametrize(
    ("spec", "k", "groups", "scale_follows"),
    [
        (TensorSpec(), 256, 2, False),
        (TensorSpec(), 128, 1, True),
        (TensorSpec(group_size=32), 128, 4, False),
        (TensorSpec(strategy="channel"), 100, 1, True),
    ],
)
def test_one_group_counts_as_channel_wise(spec, k, groups, scale_follows):
    """Marlin infers the grouping from the number of groups, so the forward must do the same."""
    assert spec.num_groups(k) == groups
    assert spec.scale_follows_gemm(k) is scale_follows


@pytest.mark.parametrize(
    ("k", "message"),
    [(192, "192 input features.*groups of 128: group_size 32 or 64 would fit"), (80, "no supported"), (0, "no supp")],
)
def test_row_that_does_not_divide_names_the_sizes_that_would(k, message):
    with pytest.raises(ValueError, match=message):
        TensorSpec().num_groups(k)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_json_gives_the_same_scheme_back(spec):
    """A checkpoint that is read back trains, or is compared, on the grid that it was written with."""
    scheme = Scheme(spec)
    config = json.loads(json.dumps(scheme.to_compressed_tensors()))
    assert Scheme.from_compressed_tensors(config) == scheme


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_compressed_tensors_reads_the_json_as_the_same_grid(spec):
    """vLLM, SGLang and transformers parse ``quantization_config`` with this class."""
    parsed = QuantizationConfig.model_validate(
        Scheme(spec).to_compressed_tensors(targets=["Linear", "re:.*expert"], ignore=["lm_head"])
    )
    weights = parsed.config_groups["group_0"].weights
    assert (parsed.format, parsed.quantization_status, parsed.ignore) == ("pack-quantized", "compressed", ["lm_head"])
    assert parsed.config_groups["group_0"].targets == ["Linear", "re:.*expert"]
    assert (weights.num_bits, weights.type, weights.symmetric) == (4, "int", True)
    assert (weights.strategy, weights.group_size) == (spec.strategy, spec.group_size or -1)

    # The object has no place for the "lockstep" entry: what it says comes back, the rest is as of a foreign config.
    read = Scheme.from_compressed_tensors(parsed).weights
    assert (read.format, read.strategy, read.group_size) == (spec.format, spec.strategy, spec.group_size)


def test_config_of_llm_compressor_means_its_own_rule():
    """Without our entry the scales were made by compressed-tensors: amax / 7.5."""
    groups = {"group_0": preset_name_to_scheme("W4A16", ["Linear"])}
    foreign = QuantizationConfig(config_groups=groups, format="pack-quantized")
    expected = Scheme(TensorSpec(scale_rule="amax/7.5"))
    assert Scheme.from_compressed_tensors(foreign) == expected
    assert Scheme.from_compressed_tensors(foreign.to_dict()) == expected


OTHER_GRIDS = {
    "two-groups": ({"config_groups": {name: Scheme().to_compressed_tensors() for name in "ab"}}, "one group .* has 2"),
    "no-groups": ({}, "one group of layers, config_groups has 0"),
    "activations": (
        {"config_groups": {"a": preset_name_to_scheme("W8A8", []).model_dump()}},
        "no quantized activations",
    ),
    "float": ({"config_groups": {"a": preset_name_to_scheme("MXFP4A16", []).model_dump()}}, "type='float'"),
    "tensor-wise": (with_weights(Scheme(), strategy="tensor"), "strategy='tensor'"),
    "eight-bits": (with_weights(Scheme(), num_bits=8), "format='int8'"),
    "zero-points": (with_weights(Scheme(), symmetric=False), "symmetric=False"),
    "group-size": (with_weights(Scheme(), group_size=256), "group_size=256"),
    "reordered": (with_weights(Scheme(), actorder="group"), "actorder"),
}


@pytest.mark.parametrize(("config", "message"), OTHER_GRIDS.values(), ids=OTHER_GRIDS)
def test_config_of_another_grid_is_refused(config, message):
    """Reading it as ours would compare a model with numbers that it never had."""
    with pytest.raises(ValueError, match=message):
        Scheme.from_compressed_tensors(config)
