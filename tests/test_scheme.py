"""The scheme: its fields and its presets, and that what contradicts itself is refused by name."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict, fields

import pytest
import torch

from lockstep import ActivationSpec, KVCacheSpec, Scheme, TensorSpec
from lockstep.scheme import PRESETS


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
    assert asdict(ActivationSpec()) == {
        "format": "int8",
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "power_of_two": False,
        "engine": "vllm",
    }
    assert asdict(KVCacheSpec()) == {"format": "fp8_e4m3", "strategy": "tensor", "dynamic": False}
    assert [field.name for field in fields(Scheme)] == ["weights", "activations"]
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
        ("W3A16", "known to compressed-tensors, but not trained.*trains W4A16"),
        ("w4a4", "known to compressed-tensors, but not trained"),
    ],
)
def test_unknown_preset_says_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        Scheme.preset(name)


@pytest.mark.parametrize(
    ("invalid", "message"),
    [
        ({"format": "int3"}, "format='int3': this version takes 'int4'"),
        ({"strategy": "row"}, "strategy='row': this version takes 'group', 'channel'"),
        ({"strategy": "tensor"}, r"grouping \(strategy, group_size\) of scale_rule='amax/7'=\('tensor', None\)"),
        ({"group_size": 48}, r"=\('group', 48\): this version takes \('group', 32\)"),
        ({"group_size": None}, r"=\('group', None\): this version takes \('group', 32\)"),
        ({"strategy": "channel", "group_size": 32}, "group_size with strategy='channel'=32"),
        ({"format": "int8", "symmetric": False}, "symmetric=False: int8 weights have no such scale rule"),
        ({"scale_rule": "amax/8"}, "scale_rule of int4 symmetric='amax/8': this version takes 'amax/7', 'amax/7.5'"),
        ({"scale_rule": "amax/127"}, "scale_rule of int4 symmetric='amax/127'"),
        ({"scale_dtype": torch.float64}, "scale_dtype of scale_rule='amax/7'=torch.float64: .*torch.bfloat16"),
        ({"served_dtype": "bfloat16"}, "served_dtype='bfloat16': this version takes torch.bfloat16"),
        ({"scale_rule": "max/-8", "scale_dtype": torch.float16}, r"scale_rule='max/-8'=\('group', 128\)"),
        ({"scale_rule": "max/-8", "group_size": 32}, "scale_dtype of scale_rule='max/-8'=torch.bfloat16"),
        ({"format": "fp8_e4m3", "strategy": "channel"}, "scale_dtype of scale_rule='amax/448'=torch.bfloat16"),
        ({"format": "fp4_e2m1", "group_size": 32}, "scale_rule='mx/2'=torch.bfloat16: .*torch.float8_e8m0fnu"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_invalid_field_is_refused_by_name(invalid, message):
    with pytest.raises(ValueError, match=message):
        TensorSpec(**invalid)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ActivationSpec("int4"), r"activations \(format, strategy, group_size, dynamic\)=\('int4', 'token'"),
        (lambda: ActivationSpec("int8", "token", dynamic=False), "'int8', 'token', None, False"),
        (lambda: ActivationSpec(engine="trt"), "engine='trt': this version takes 'vllm', 'sglang'"),
        (lambda: ActivationSpec(power_of_two=True), "power_of_two=True: only groups of 128"),
        (lambda: KVCacheSpec("int4"), "format='int4': this version takes 'fp8_e4m3'"),
        (lambda: KVCacheSpec(strategy="token"), "dynamic with strategy='token'=False: this version takes True"),
        (lambda: Scheme(PRESETS["W8A8"].weights, PRESETS["FP8"].activations), "no kernel multiplies them.*take .*int8"),
        (lambda: Scheme(PRESETS["FP8"].weights), "fp8_e4m3 tensor .* weights need activations"),
        (lambda: Scheme(TensorSpec(symmetric=False), ActivationSpec()), "asymmetric weights: kernels take them with"),
        (lambda: Scheme.preset("W4A16", activations={"engine": "sglang"}), "'W4A16' leaves its inputs as they are"),
        (lambda: Scheme.preset("FP8_DYNAMIC", symmetric=False), "symmetric=False: fp8_e4m3 weights have no such"),
    ],
    ids=range(11),
)
def test_what_no_kernel_computes_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_knows_its_name_whatever_the_engine(name):
    """Reports and recipes show it."""
    scheme = Scheme.preset(name)
    assert scheme.preset_name == {"INT8": "W8A8"}.get(name, name)
    if scheme.activations is not None:
        sglang = Scheme.preset(name, activations={"engine": "sglang"})
        assert (sglang.engine, sglang.preset_name, sglang == scheme) == ("sglang", scheme.preset_name, False)


def test_a_changed_format_brings_its_own_rule():
    assert Scheme.preset("W4A16", format="int8").weights == TensorSpec("int8")
    assert Scheme.preset("W4A16", symmetric=False) == Scheme.preset("W4A16_ASYM")
    blocks = Scheme.preset("FP8_BLOCK", scale_rule="pow2/448", activations={"power_of_two": True})
    assert (blocks.weights.scale_rule, blocks.preset_name) == ("pow2/448", "FP8_BLOCK")


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
        (TensorSpec("fp8_e4m3", "block", scale_dtype=torch.float32), 300, 3, False),
        (TensorSpec("fp8_e4m3", "tensor", scale_dtype=torch.float32), 300, 1, True),
        (TensorSpec("fp4_e2m1", "group", 16, scale_dtype=torch.float8_e4m3fn), 64, 4, True),
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
