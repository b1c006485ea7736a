"""Observers: the ranges that become stored scales, against other people's arithmetic and brute force."""

from __future__ import annotations

import copy
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given
from hypothesis import strategies as st
from models import TinyMlp, prepared, tiny_llama, token_ids
from strategies import bits, dtypes
from torch.utils._python_dispatch import TorchDispatchMode

import lockstep
from lockstep import ActivationSpec, KVCacheSpec, Scheme, activations
from lockstep.qat import kv_cache, observers
from lockstep.qat.observers import (
    Histogram,
    MeanSquaredError,
    Percentile,
    freeze,
    load_states,
    make,
    measured_range,
    observe,
    states,
)

INT8 = ActivationSpec("int8", "tensor", dynamic=False)
FP8 = ActivationSpec("fp8_e4m3", "tensor", dynamic=False)
NVFP4 = ActivationSpec("fp4_e2m1", "group", 16)
SPECS = [INT8, FP8, NVFP4, KVCacheSpec("fp8_e4m3"), KVCacheSpec("fp8_e5m2"), KVCacheSpec("int8")]
NAMES = ["minmax", "percentile", "moving_average", "mse"]
STATIC_INT8 = Scheme.preset("W8A8", activations={"strategy": "tensor", "dynamic": False})

every_observer = pytest.mark.parametrize("name", NAMES)
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


@st.composite
def batches(draw, dtype=dtypes) -> list[torch.Tensor]:
    """Inputs ``[..., 32]`` of one dtype, of many magnitudes, with empty ones, outliers, zeros and strides."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    chosen, found = draw(dtype), []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([(0, 32), (1, 32), (3, 7, 32), (200, 32)]))
        x = torch.randn(shape, generator=generator) * 2.0 ** draw(st.integers(-12, 6))
        x[..., 3] *= draw(st.sampled_from([0.0, 1.0, 200.0]))
        x = x.to(chosen)
        match draw(st.sampled_from(["contiguous", "transposed", "strided"])):
            case "transposed":
                x = x.transpose(0, -1).contiguous().transpose(0, -1)
            case "strided":
                x = x.repeat_interleave(2, dim=-1)[..., ::2]
        found.append(x)
    return found


def seen(observer: observers.Observer, inputs: list[torch.Tensor]) -> observers.Observer:
    for x in inputs:
        observer.update(x)
    return observer


def magnitudes(inputs: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.reshape(-1) for x in inputs]).abs().double()


# Ranges --------------------------------------------------------------------------------------------------------------


@given(batches())
def test_minmax_is_the_largest_magnitude(inputs):
    found, all_of_them = seen(make("minmax", INT8), inputs).range(), magnitudes(inputs)
    assert found.dtype == torch.float32
    assert found.shape == ()
    if all_of_them.numel():
        assert found.item() == all_of_them.max().item()
    else:
        assert math.isnan(found)


@given(batches())
def test_percentile_is_torchs_quantile(inputs):
    """Exactly for bf16, within the stated 2**-8 otherwise, in as many batches as it came."""
    found, all_of_them = seen(make("percentile", FP8), inputs).range(), magnitudes(inputs)
    if not all_of_them.numel():
        assert math.isnan(found)
        return
    wanted = torch.quantile(all_of_them, 0.999, interpolation="higher").item()
    if inputs[0].dtype == torch.bfloat16:
        assert found.item() == wanted
    else:
        assert abs(found.item() - wanted) <= wanted * 2**-8


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=3), st.sampled_from([0.0, 0.5, 0.999, 1.0]))
def test_percentile_takes_the_rank_that_quantile_takes(sizes, share):
    """At the ends, and where the rank is a whole number: every magnitude here is another one."""
    values = torch.arange(0x3000, 0x3000 + sum(sizes) + 1, dtype=torch.int16).view(torch.bfloat16)
    observer = Percentile(FP8)
    observer.share = share
    seen(observer, list(values.split([*sizes, 1])))
    assert observer.range().item() == torch.quantile(values.double(), share, interpolation="higher").item()


@given(batches(st.just(torch.float32)))
def test_moving_average_is_that_of_torch_ao(inputs):
    inputs = [x for x in inputs if x.numel()] or [torch.ones(2, 32)]
    oracle = torch.ao.quantization.MovingAverageMinMaxObserver(averaging_constant=0.01)
    for x in inputs:
        oracle(x.abs())
    found = seen(make("moving_average", INT8), [inputs[0], torch.empty(0, 32), *inputs[1:]]).range()
    assert bits(found.reshape(1)).equal(bits(oracle.max_val.reshape(1)))


def error(x: torch.Tensor, range: float, spec: ActivationSpec | KVCacheSpec) -> float:
    """The squared error of `x`, not of a histogram of it, by the arithmetic that serves."""
    range = torch.tensor(range)
    if isinstance(spec, KVCacheSpec):
        scale = range / torch.tensor({"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "int8": 127.0}[spec.format])
        served = kv_cache.dequantize(kv_cache.quantize(x, spec, scale), scale, torch.float32)
    else:
        codes = activations.quantize(x, spec, activations.static_scale(range, spec))
        served = activations.dequantize(codes, torch.float32)
    return (x.double() - served.double()).square().sum().item()


@every_spec
@given(inputs=batches(st.just(torch.bfloat16)))
def test_mse_is_the_best_of_the_documented_candidates(spec, inputs):
    """By brute force on the magnitudes themselves; a tie may go either way in the last bit of two sums."""
    x = magnitudes(inputs).float().reshape(-1, 32)
    if spec is NVFP4:  # each group's largest magnitude for a group of its own
        x = x.unflatten(-1, (2, 16)).amax(-1).reshape(-1, 1).expand(-1, 16)
    if not x.numel() or not x.any():
        return
    found = seen(make("mse", spec), inputs).range().item()
    exponents = [i / 64 for i in range(64)] + [1 + i / 16 for i in range(177)]
    candidates = [(x.max().double() * 2.0**-exponent).float().item() for exponent in exponents]
    errors = [error(x, one, spec) for one in candidates if one / 127 > 0]
    assert found in candidates
    assert error(x, found, spec) <= min(errors) * (1 + 1e-9)


@pytest.mark.parametrize("spec", [INT8, FP8, KVCacheSpec("fp8_e5m2")], ids=str)
@pytest.mark.parametrize("tails", [2.0, 4.0, 50.0])
def test_mse_misses_little_between_its_candidates(spec, tails):
    """Against 3,000 ranges, for inputs from nearly normal ones to ones that are mostly outliers."""
    torch.manual_seed(0)
    x = torch.distributions.StudentT(tails).sample((4000,)).bfloat16()
    best = min(error(x.float().abs(), x.abs().max().item() * 2.0 ** (-i / 300), spec) for i in range(3000))
    assert error(x.float().abs(), seen(make("mse", spec), [x]).range().item(), spec) <= 1.05 * best


def test_mse_clips_what_minmax_does_not():
    """One outlier in 100,000 inputs costs int8 all of its resolution: what the observer is for."""
    torch.manual_seed(0)
    x = torch.randn(100_000).bfloat16()
    x[17] = 12
    widest, found = (seen(make(name, INT8), [x]).range().item() for name in ("minmax", "mse"))
    assert found < 8 < widest
    assert error(x.float(), found, INT8) < 0.7 * error(x.float(), widest, INT8)


@pytest.mark.parametrize("tails", [2.0, 4.0, 50.0])
def test_mse_does_not_clip_nvfp4_as_it_would_clip_fp4_alone(tails):
    """Groups have scales of their own: on real groups it is as good as the largest magnitude, outliers or not."""
    torch.manual_seed(0)
    x = torch.distributions.StudentT(tails).sample((1024, 16)).bfloat16()
    widest, found = (seen(make(name, NVFP4), [x]).range().item() for name in ("minmax", "mse"))
    assert error(x.float(), found, NVFP4) <= 1.05 * error(x.float(), widest, NVFP4)


@given(batches())
def test_histogram_counts_every_input_once_and_within_its_bound(inputs):
    histogram = seen(Histogram(), inputs)
    all_of_them = magnitudes(inputs)
    assert histogram.counts.shape == (32768,)
    assert histogram.counts.sum() == all_of_them.numel()
    found = histogram.magnitudes().double().repeat_interleave(histogram.counts)
    assert (found - all_of_them.sort().values).abs().le(all_of_them.sort().values * 2**-8 + 2**-133).all()


def test_large_inputs_are_counted_in_parts(monkeypatch):
    monkeypatch.setattr(Histogram, "_chunk", 7)
    x = torch.arange(100.0)
    assert seen(Histogram(), [x]).counts.nonzero().numel() == x.bfloat16().unique().numel()


@pytest.mark.parametrize("range", [0.5, 2.0, 3.0, 100.0])
def test_share_above_counts_what_a_range_clips(range):
    x = torch.tensor([-4.0, 4.0, 1.0, -2.0, 0.0, 3.0, 2.0, -0.25]).bfloat16()
    assert seen(Histogram(), [x]).share_above(torch.tensor(range)).item() == (x.abs() > range).double().mean().item()


@every_observer
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_not_finite_is_seen_to_the_end(name, bad, dtype):
    """Finite batches after it must not hide it."""
    x = torch.ones(4, 32, dtype=dtype)
    x[1, 2] = bad
    observer = seen(make(name, FP8), [torch.ones(4, 32), x, torch.ones(4, 32), torch.zeros(4, 32)])
    assert observer.range().item() == math.inf
    with pytest.raises(ValueError, match=r"the inputs of down held NaN or infinite values"):
        measured_range(observer, "the inputs of down")


@every_observer
def test_no_input_and_only_zeros_are_told_apart(name):
    observer = make(name, INT8)
    assert math.isnan(observer.range())
    with pytest.raises(ValueError, match="the inputs of down were never seen"):
        measured_range(observer, "the inputs of down")
    observer.update(torch.empty(0, 32))
    assert math.isnan(observer.range())
    observer.update(torch.zeros(2, 32))
    assert observer.range().item() == 0
    with pytest.raises(ValueError, match="the inputs of down have the range 0"):
        measured_range(observer, "the inputs of down")


class NoLooks(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: to read a number, or to allocate by what a tensor holds."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "bincount", "histc", "unique", "masked_select", "is_nonzero")
        assert not any(name in str(func) for name in waits), f"{func} waits for the device"
        return func(*args, **kwargs or {})


@every_observer
@every_spec
def test_updates_do_not_wait_for_the_device(name, spec):
    observer = make(name, spec)
    with NoLooks():
        seen(observer, [torch.randn(4, 32), torch.randn(4, 32).bfloat16()])
    with pytest.raises(AssertionError, match="waits for the device"), NoLooks():
        observer.range().item()


@every_observer
def test_modes_of_autograd_may_change_between_batches(name):
    """Lightning validates in inference mode, a training step does not."""
    torch.manual_seed(0)
    inputs = torch.randn(3, 8, 32)
    with torch.inference_mode():
        observer = make(name, FP8)
        observer.update(inputs[0] * 1)
    observer.update(inputs[1].requires_grad_() * 1)
    with torch.inference_mode():
        observer.update(inputs[2] * 1)
    assert not observer.range().requires_grad
    assert not any(value.requires_grad for value in observer.state_dict().values())
    assert observer.range().equal(seen(make(name, FP8), list(inputs.detach())).range())


# Resuming ------------------------------------------------------------------------------------------------------------


@every_observer
@given(inputs=batches(), cut=st.integers(0, 4))
def test_resumed_observer_goes_on_with_the_same_bits(name, inputs, cut):
    whole, first, second = (make(name, FP8) for _ in range(3))
    seen(whole, inputs)
    seen(first, inputs[:cut])
    state = copy.deepcopy(first.state_dict())
    second.load_state_dict(state)
    seen(second, inputs[cut:])
    for key, value in whole.state_dict().items():
        assert value.equal(second.state_dict()[key]), key
        assert state[key].equal(first.state_dict()[key]), "the state that was loaded from must not change"
    assert torch.equal(bits(whole.range().reshape(1)), bits(second.range().reshape(1)))


@pytest.mark.parametrize(("mine", "other"), [("minmax", "moving_average"), ("percentile", "minmax")])
def test_another_observers_state_is_refused(mine, other):
    with pytest.raises(ValueError, match="another observer's"):
        make(mine, FP8).load_state_dict(make(other, FP8).state_dict())


def observed(name: str, inputs: list[torch.Tensor]) -> TinyMlp:
    model = prepared(TinyMlp(), "FP8")
    observe(model, name)
    for x in inputs:
        model(x)
    return model


def watching(model: TinyMlp) -> dict[str, observers.Observer]:
    return {"first": model.first.observer, "second": model.second.observer}


@every_observer
def test_resumed_model_is_frozen_with_the_same_bits(name, tmp_path):
    """Through a checkpoint file, as a trainer that is stopped before the freeze."""
    inputs = list((torch.randn(6, 9, 128) * 3).bfloat16())
    whole = freeze(observed(name, inputs))
    torch.save(states(watching(observed(name, inputs[:2]))), tmp_path / "states.pt")
    resumed = observed(name, [])
    load_states(watching(resumed), torch.load(tmp_path / "states.pt"))
    for x in inputs[2:]:
        resumed(x)
    assert freeze(resumed) == whole


def test_states_of_other_layers_are_refused():
    stored = states(watching(observed("minmax", [])))
    with pytest.raises(ValueError, match="first is stored but not observed"):
        load_states({}, stored)
    del stored["second"]
    with pytest.raises(ValueError, match="second is observed but not in the stored states"):
        load_states(watching(observed("minmax", [])), stored)


@every_observer
def test_observed_models_are_copied_and_pickled(name, tmp_path):
    """A moving average of the weights copies whole modules, and spawned workers pickle them."""
    model, x = observed(name, []), torch.randn(4, 128).bfloat16()
    model(x)
    torch.save(model, tmp_path / "model.pt")
    twin, read = copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)
    model(x * 8)
    for other in (twin, read):
        other(x * 8)
        assert freeze(other)["first"] == model.first.observer.range()


# Models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["FP8", "NVFP4", STATIC_INT8], ids=str)
def test_freeze_writes_the_scale_of_what_each_layer_saw(scheme):
    """The documented key, compressed-tensors' own scale for the range, and nothing else in the state dict."""
    model, x = prepared(TinyMlp(), scheme), torch.randn(6, 128).bfloat16()
    key = "input_global_scale" if scheme == "NVFP4" else "input_scale"
    keys = set(model.state_dict())
    assert observe(model) == ["first", "second"]
    inputs = {}
    for name in ("first", "second"):
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    model(x)
    ranges = freeze(model)
    for name in ("first", "second"):
        layer, largest = model.get_submodule(name), inputs[name].detach().abs().max().float().reshape(1)
        found = getattr(layer, key)
        assert (found.shape, found.dtype) == ((1,), torch.float32)
        assert ranges[name] == largest
        if scheme == "NVFP4":
            torch.testing.assert_close(found, generate_gparam(-largest, largest).reshape(1), rtol=2**-23, atol=0)
        elif scheme == "FP8":
            arguments = preset_name_to_scheme("FP8", ["Linear"]).input_activations
            assert found.equal(calculate_qparams(-largest, largest, arguments)[0])
        else:
            assert found.equal(largest / torch.tensor(127.0))
        assert layer.observer is None
    assert set(model.state_dict()) == keys
    assert model(x).isfinite().all()


@every_observer
def test_projections_that_engines_fuse_share_the_widest_range(name, monkeypatch):
    """An engine runs q, k and v with one scale; here each of them sees something else."""
    model = prepared(tiny_llama(), "FP8")
    observe(model, name)
    model(token_ids())
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for layer, factor in ((attention.q_proj, 1), (attention.k_proj, 9), (attention.v_proj, 4), (mlp.up_proj, 3)):
        for _ in range(300):
            layer.observer.update(10.0 * factor * torch.ones(8, 256))
    alone = {name: layer.observer.range() for name, layer in observers.storing_layers(model).items()}
    freeze(model)
    assert attention.q_proj.input_scale == attention.k_proj.input_scale == attention.v_proj.input_scale
    assert attention.k_proj.input_scale == alone["model.layers.0.self_attn.k_proj"] / torch.tensor(448.0)
    assert mlp.gate_proj.input_scale == mlp.up_proj.input_scale == alone["model.layers.0.mlp.up_proj"] / 448
    assert attention.o_proj.input_scale != attention.q_proj.input_scale
    assert model.model.layers[1].self_attn.k_proj.input_scale < attention.k_proj.input_scale


def faulty(fault: str) -> TinyMlp:
    """An observed model whose `second` is at fault, and whose scales are 1."""
    model = prepared(TinyMlp(), "FP8")
    observe(model)
    model(torch.randn(4, 128).bfloat16())
    for layer in (model.first, model.second):
        layer.input_scale.fill_(1)
    second = model.second.observer = make("minmax", FP8)
    match fault:
        case "zeros":
            second.update(torch.zeros(1, 256))
        case "NaN":
            second.update(torch.full((1, 256), torch.nan))
        case "tiny":
            second.update(torch.full((1, 256), 1e-45))
    return model


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unseen", "the inputs of second were never seen"),
        ("zeros", "the inputs of second have the range 0 by MinMax"),
        ("NaN", "the inputs of second held NaN or infinite"),
        ("tiny", "the inputs of second have the range 1.*too small"),
    ],
)
def test_freeze_names_the_layer_at_fault_and_changes_nothing(fault, message):
    model = faulty(fault)
    watchers = (model.first.observer, model.second.observer)
    with pytest.raises(ValueError, match=message):
        freeze(model)
    assert (model.first.observer, model.second.observer) == watchers
    assert (model.first.input_scale.item(), model.second.input_scale.item()) == (1, 1)
    if fault in ("unseen", "zeros", "tiny"):  # and more batches mend it
        model(torch.randn(4, 128).bfloat16())
        assert freeze(model)["second"] > 0


def test_models_without_a_scale_to_measure_are_refused():
    with pytest.raises(ValueError, match=r"no layer of this TinyMlp is prepared: call lockstep\.prepare"):
        observe(TinyMlp())
    with pytest.raises(ValueError, match=r"nothing to calibrate: they train as fp8_e4m3 channel.*dynamic token"):
        observe(prepared(TinyMlp(), "FP8_DYNAMIC"))
    with pytest.raises(ValueError, match=r"nothing to calibrate: they train as int4 g128"):
        observe(prepared(TinyMlp(), "W4A16"))
    with pytest.raises(ValueError, match="no layer of this TinyMlp is observed: call observe"):
        freeze(prepared(TinyMlp(), "FP8"))
    model = prepared(TinyMlp(), "FP8")
    with pytest.raises(ValueError, match="observer='median': choose minmax, percentile, moving_average, mse"):
        observe(model, "median")
    assert model.first.observer is None


def test_only_the_layers_of_a_recipe_that_store_a_scale_are_observed():
    model = TinyMlp()
    lockstep.prepare(model, [lockstep.Rule(["first"], "W4A16"), lockstep.Rule(["Linear"], "FP8")])
    assert observe(model) == ["second"]
    assert model.first.observer is None
    model(torch.randn(4, 128).bfloat16())
    assert list(freeze(model)) == ["second"]


def test_observed_layers_do_not_quantize_their_inputs():
    """A range measured behind quantized inputs would depend on the scales that are not there yet."""
    model, x = prepared(TinyMlp(), "FP8"), torch.randn(4, 128).bfloat16()
    with pytest.raises(ValueError, match=r"first\.input_scale is not measured"):
        model(x)
    observe(model)
    before = model(x)
    freeze(model)
    quantized = model(x)
    observe(model)
    assert model(x).equal(before)
    observers.unobserve(model)
    assert model(x).equal(quantized)
    assert not quantized.equal(before)


# Ranks ---------------------------------------------------------------------------------------------------------------

RANK = """
import torch, torch.distributed as dist
import test_observers as tests
from lockstep.qat import observers
from models import TinyMlp, prepared

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
inputs = [torch.randn(40 + 9 * number, 128).bfloat16() * 3**number for number in range(5)]
share = [inputs[:2], inputs[2:]][rank]


def on_all_ranks(value):
    values = [None, None]
    dist.all_gather_object(values, value)
    return values


for name in tests.NAMES:
    for spec in (tests.FP8, tests.NVFP4):
        own = tests.seen(observers.make(name, spec), share)
        before = own.range()
        both = own.reduce()
        mine, other = on_all_ranks(both.range().item())
        assert mine == other, (name, spec, mine, other)
        assert own.range() == before and own.reduce().range() == both.range(), "reducing must not change the observer"
        if name == "moving_average":
            parts = [tests.seen(observers.make(name, spec), part) for part in (inputs[:2], inputs[2:])]
            assert both.range() == torch.stack([part.range() for part in parts]).mean()
        else:
            alone = tests.seen(observers.make(name, spec), inputs)
            assert both.range() == alone.range(), (name, spec)
        # A rank whose share of the data is empty.
        lonely = tests.seen(observers.make(name, spec), inputs if rank else [])
        assert lonely.reduce().range() == tests.seen(observers.make(name, spec), inputs).range(), (name, spec)
        assert observers.make(name, spec).reduce().range().isnan()

for name in tests.NAMES:
    model = prepared(TinyMlp(), "FP8")
    observers.observe(model, name)
    for x in share:
        model(x)
    observers.freeze(model)
    mine, other = on_all_ranks([model.first.input_scale.item(), model.second.input_scale.item()])
    assert mine == other, (name, mine, other)

    # Stopped after a batch and resumed from what rank zero has written.
    uninterrupted = observers.freeze(tests.observed(name, share[:2]))
    stopped = tests.observed(name, share[:1])
    states = on_all_ranks(observers.states(tests.watching(stopped)))[0]
    resumed = tests.observed(name, [])
    observers.load_states(tests.watching(resumed), states)
    resumed(share[1])
    for key, found in observers.freeze(resumed).items():
        assert abs(found / uninterrupted[key] - 1) <= (1e-6 if name == "moving_average" else 0), (name, key)

    # What one rank alone saw must stop both, or the other would wait for it for ever.
    observers.observe(model, name)
    model(share[0])
    if rank:
        model.second.observer.update(torch.full((1, 256), torch.nan))
    try:
        observers.freeze(model)
    except ValueError as error:
        assert "the inputs of second held NaN" in str(error)
    else:
        raise AssertionError("a NaN on the other rank went unnoticed")
dist.destroy_process_group()
print("equal")
"""


def run_ranks(script: str, directory: Path) -> None:
    """Run `script` as two ranks, each of which prints ``equal`` when it is content."""
    (directory / "rank.py").write_text(script)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, str(directory / "rank.py")]
    ranks = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}, **pipes) for rank in range(2)]
    try:
        for rank in ranks:
            output, errors = rank.communicate(timeout=240)
            assert rank.returncode == 0, errors[-4000:]
            assert output.split() == ["equal"]
    finally:
        for rank in ranks:
            rank.kill()


def test_two_ranks_get_the_same_bits_and_those_of_all_data(tmp_path):
    run_ranks(RANK, tmp_path)


def test_documented_constants_are_those_that_compute():
    assert (Percentile.share, observers.AVERAGING, MeanSquaredError.exponents[-1]) == (0.999, 0.01, 12)
