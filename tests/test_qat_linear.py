"""`QATLinear`: the served forward, the straight-through backward, and no memory beyond ``nn.Linear``'s.

Gradients are compared bit for bit: small integers times bf16 weights sum to the same number in every order.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import lockstep
from lockstep import Scheme, TensorSpec, activations, grid
from lockstep.kernels import reference
from lockstep.qat import QATLinear
from lockstep.scheme import PRESETS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
K, N = 64, 32
GROUPED = TensorSpec(group_size=32)
CHANNEL = TensorSpec(strategy="channel")

every_spec = pytest.mark.parametrize("spec", [GROUPED, CHANNEL], ids=str)
every_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
every_autocast = pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "fp32"])


def layer(spec: TensorSpec = GROUPED, bias: bool = True, dtype: torch.dtype = FP32) -> QATLinear:
    """A prepared linear layer of K inputs and N outputs."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"proj": nn.Linear(K, N, bias, dtype=dtype)})
    lockstep.prepare(model, Scheme(spec))
    return model["proj"]


def served_twin(module: QATLinear) -> nn.Linear:
    """An ``nn.Linear`` that holds the served weights as its own."""
    twin = nn.Linear(K, N, module.bias is not None, dtype=module.weight.dtype)
    twin.load_state_dict(
        module.state_dict() | {"weight": grid.fake_quantize(module.weight.detach(), module.scheme.weights)}
    )
    return twin


def integers(*shape: int, dtype: torch.dtype = FP32, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype).requires_grad_(requires_grad)


@contextlib.contextmanager
def bf16_autocast(enabled: bool) -> Iterator[None]:
    with torch.autocast("cpu", BF16, enabled=enabled):
        yield


def gradients(module: nn.Module, x: Tensor, call=None) -> dict[str, Tensor | None]:
    """The output of `module`, and the gradients of ``sum(output * integers)``, by name."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x) if call is None else call(x)
    (y * integers(*y.shape, dtype=y.dtype)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: value.grad for name, value in module.named_parameters()}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# Forward -----------------------------------------------------------------------------------------------------------


@every_bias
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (0, K)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_forward_multiplies_with_the_served_weights(dtype, shape, bias):
    """What training sees is what a W4A16 engine computes: the product, rounded, plus the bias."""
    module = layer(bias=bias, dtype=dtype)
    x = torch.randn(shape).to(dtype)
    expected = F.linear(x, grid.fake_quantize(module.weight, GROUPED).to(dtype))
    assert torch.equal(module(x), expected + module.bias if bias else expected)


@every_bias
def test_forward_under_autocast_is_the_16_bit_one(bias):
    """fp32 masters under mixed precision train on the bf16 product of the engine."""
    module = layer(bias=bias)
    x = torch.randn(5, K)
    with bf16_autocast(True):
        y = module(x)
    assert y.dtype == BF16
    expected = F.linear(x.bfloat16(), grid.fake_quantize(module.weight, GROUPED))
    assert torch.equal(y, expected + module.bias.bfloat16() if bias else expected)


@pytest.mark.parametrize("spec", [CHANNEL, TensorSpec(group_size=64)], ids=["channel", "one-group"])
@every_autocast
def test_channel_wise_forward_is_in_the_order_of_the_kernel(spec, autocast):
    """Marlin multiplies with the scale and adds the bias in one instruction, which rounds once."""
    module = layer(spec)
    x = torch.randn(5, K)
    with bf16_autocast(autocast):
        y = module(x)
    codes, scale, *_ = grid.quantize(module.weight.detach(), spec)
    product, bias = F.linear(x.to(y.dtype), codes.to(y.dtype)), module.bias.to(y.dtype)
    assert y.dtype == (BF16 if autocast else FP32)
    assert torch.equal(y, (product.float() * scale.T.float() + bias.float()).to(y.dtype))


def test_weights_are_read_again_at_each_forward():
    """An optimizer step, or a loaded checkpoint, must not train on stale codes."""
    module, x = layer(bias=False), torch.randn(5, K)
    before = module(x)
    with torch.no_grad():
        module.weight.mul_(torch.rand(N, 1))
    after = module(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, served_twin(module)(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_spec
def test_evaluation_computes_what_training_does(spec, mode):
    module, x = layer(spec), torch.randn(5, K)
    trained = module(x)
    with mode():
        y = module(x)
    assert not y.requires_grad
    assert torch.equal(y, trained)


@pytest.mark.parametrize(
    ("input_dtype", "autocast"), [(FP16, False), (FP32, True)], ids=["fp16-input", "fp16-autocast"]
)
def test_forward_in_another_16_bit_dtype_is_refused(input_dtype, autocast):
    """It would round otherwise than the engine; the message says which layer and which two dtypes."""
    message = "proj: the forward computes in torch.float16, the scheme is served in torch.bfloat16"
    with pytest.raises(ValueError, match=message), torch.autocast("cpu", FP16, enabled=autocast):
        layer(dtype=input_dtype)(torch.zeros(1, K, dtype=input_dtype))


# Backward ----------------------------------------------------------------------------------------------------------


@every_bias
@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (0, K)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_gradients_are_those_of_a_layer_with_the_served_weights(dtype, shape, bias):
    """Straight-through: the served weight's gradient is the master's, and the input's flows through the served one."""
    module, x = layer(bias=bias, dtype=dtype), integers(*shape, dtype=dtype)
    expected = gradients(served_twin(module), x)
    del expected["y"]  # nn.Linear may add the bias before it rounds
    assert_same(gradients(module, x), expected)


@every_spec
@every_bias
def test_gradients_under_autocast_are_those_of_a_layer_with_the_served_weights(spec, bias):
    module, x = layer(spec, bias), integers(2, 3, K)
    with bf16_autocast(True):
        found, expected = gradients(module, x), gradients(served_twin(module), x)
    del expected["y"]
    assert_same(found, expected)
    assert module.weight.grad.dtype == FP32


def test_channel_wise_gradient_of_the_input_flows_through_the_served_weight():
    module, x = layer(CHANNEL), integers(5, K)
    expected = gradients(served_twin(module), x)
    assert_same(gradients(module, x), {name: expected[name] for name in ("x", "weight", "bias")})


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameter_gets_no_gradient_and_the_input_does(frozen):
    """LoRA, or a frozen backbone, trains through quantized layers."""
    module, x = layer(), integers(5, K)
    module.get_parameter(frozen).requires_grad_(False)
    found, expected = gradients(module, x), gradients(served_twin(module), x)
    assert found[frozen] is None
    for name in {"x", "weight", "bias"} - {frozen}:
        assert torch.equal(found[name], expected[name])


def test_tied_layers_add_their_gradients_in_one_master():
    first, second, x = layer(), layer(), integers(5, K)
    second.weight = first.weight
    expected = gradients(served_twin(first), x)["weight"] + gradients(served_twin(first), 2 * x)["weight"]
    grad = integers(5, N)
    first.zero_grad()
    ((first(x) + second(2 * x)) * grad).sum().backward()
    assert torch.equal(first.weight.grad, expected)


@every_spec
@every_autocast
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_changes_no_bit(spec, autocast, use_reentrant):
    module, x = layer(spec), integers(5, K)
    with bf16_autocast(autocast):
        expected = gradients(module, x)
        found = gradients(module, x, lambda x: checkpoint(module, x, use_reentrant=use_reentrant))
    assert_same(found, expected)


# Memory ------------------------------------------------------------------------------------------------------------


def saved(module: nn.Linear, x: Tensor, autocast: bool) -> list[Tensor]:
    """The tensors that a forward keeps for the backward."""
    kept: list[Tensor] = []
    with (
        saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
        bf16_autocast(autocast),
    ):
        module(x)
    return kept


def new_bytes(kept: list[Tensor], module: nn.Linear, x: Tensor) -> int:
    """Bytes of the tensors `kept` that are neither the input's memory nor a parameter's."""
    known = {tensor.data_ptr() for tensor in (x, *module.parameters())}
    return sum(tensor.nbytes for tensor in kept if tensor.data_ptr() not in known)


@every_spec
@every_autocast
@pytest.mark.parametrize("weight_grad", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("input_grad", [True, False], ids=["inner", "first"])
def test_nothing_is_kept_for_the_backward_but_references(spec, autocast, weight_grad, input_grad):
    """A quantized copy of each weight would double the model; ``nn.Linear`` in the same place is the yardstick."""
    module, x = layer(spec), integers(5, K, requires_grad=input_grad)
    module.weight.requires_grad_(weight_grad)
    plain = copy.deepcopy(module)
    lockstep.unprepare(nn.ModuleList([plain]))

    kept, plain_kept = saved(module, x, autocast), saved(plain, x, autocast)
    inputs = [tensor for tensor in kept if tensor.data_ptr() != module.weight.data_ptr()]
    assert len(inputs) == weight_grad
    assert len(kept) - len(inputs) == input_grad
    assert all(tensor.shape == x.shape for tensor in inputs)
    if not autocast:
        assert all(tensor.data_ptr() == x.data_ptr() for tensor in inputs)
    assert len(kept) <= len(plain_kept)
    assert new_bytes(kept, module, x) <= new_bytes(plain_kept, plain, x)


# Compilers, copies, files ------------------------------------------------------------------------------------------


@every_spec
@every_autocast
def test_compiled_layer_computes_the_same_bits(spec, autocast):
    """Inductor must not fuse away a rounding: of the scale, of ``code * scale``, of the product before the bias."""
    module = layer(spec)
    compiled = torch.compile(module, fullgraph=True)
    with bf16_autocast(autocast):
        assert_same(gradients(module, torch.eye(K), compiled), gradients(module, torch.eye(K)))


@pytest.mark.parametrize("copied", [copy.deepcopy, "torch.save"], ids=["deepcopy", "torch.save"])
def test_copies_of_a_prepared_layer_train_alike(copied):
    """EMA callbacks and spawned workers copy whole modules."""
    module, x = layer(), integers(5, K)
    if copied == "torch.save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copied(module)
    assert type(twin) is QATLinear
    assert (twin.scheme, twin.qualified_name) == (module.scheme, "proj")
    assert twin.weight.data_ptr() != module.weight.data_ptr()
    assert_same(gradients(twin, x), gradients(module, x))


def test_repr_shows_the_scheme():
    """``print(model)`` is how people check what trains quantized."""
    assert repr(layer()) == f"QATLinear(in_features={K}, out_features={N}, bias=True, scheme={GROUPED})"


# Every preset --------------------------------------------------------------------------------------------------------

WIDTH, OUTPUTS = 256, 48  # groups of 128 and blocks need the width
QUANTIZED = [name for name, scheme in PRESETS.items() if scheme.activations and name != "INT8"]
MEASURED = [name for name in QUANTIZED if PRESETS[name].activations.stores_scale]
every_preset = pytest.mark.parametrize("name", PRESETS)
every_quantized = pytest.mark.parametrize("name", QUANTIZED)
every_measured = pytest.mark.parametrize("name", MEASURED)
every_precision = pytest.mark.parametrize("precision", ["bf16", "fp32", "autocast"])


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def preset_layer(name: str, dtype: torch.dtype = FP32, range: float = 2.0, **options) -> QATLinear:
    """A prepared layer of preset `name`, its inputs' range measured to be `range`."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"proj": nn.Linear(WIDTH, OUTPUTS, dtype=dtype)})
    lockstep.prepare(model, name, **options)
    module = model["proj"]
    inputs = module.scheme.activations
    if inputs is not None and inputs.stores_scale:
        getattr(module, inputs.scale_name).copy_(activations.static_scale(torch.tensor(range), inputs))
    return module


def used_inputs(module: QATLinear, x: Tensor) -> Tensor:
    """The inputs that the GEMM multiplies with, dequantized."""
    if module.scheme.activations is None:
        return x
    return activations.dequantize(activations.quantize(x, module.scheme.activations, module.stored_scale()), x.dtype)


@every_preset
@every_precision
@pytest.mark.parametrize("shape", [(WIDTH,), (2, 3, WIDTH), (0, WIDTH)], ids=str)
def test_forward_of_every_preset_is_the_reference_on_the_served_weight(name, precision, shape):
    """What is exported, `quantize()`, in the serving kernel's order: bit for bit."""
    module = preset_layer(name, BF16 if precision == "bf16" else FP32)
    x = rows(*shape).to(module.weight.dtype)
    with bf16_autocast(precision == "autocast"):
        y = module(x)
    dtype = FP32 if precision == "fp32" else BF16
    expected = reference.linear(
        x.to(dtype), module.quantize(), module.scheme, module.bias.detach().to(dtype), module.stored_scale()
    )
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    with torch.inference_mode(), bf16_autocast(precision == "autocast"):
        assert torch.equal(module(x), expected)


@every_preset
@every_precision
def test_gradients_of_every_preset_are_straight_through(name, precision):
    """Oracle: autograd, in float64, of the plain product of the dequantized operands, with identities through both."""
    module = preset_layer(name, BF16 if precision == "bf16" else FP32, range=100.0)  # nothing is cut off
    x = rows(7, WIDTH).to(module.weight.dtype)
    grad = rows(7, OUTPUTS, seed=1)
    dtype = FP32 if precision == "fp32" else BF16
    leaf = x.clone().requires_grad_()
    with bf16_autocast(precision == "autocast"):
        module(leaf).backward(grad.to(dtype))

    oracle_x, oracle_w = x.double().requires_grad_(), module.weight.detach().double().requires_grad_()
    oracle_b = module.bias.detach().double().requires_grad_()
    served = grid.dequantize(module.quantize(), module.scheme.weights).to(dtype).double()
    used = used_inputs(module, x.to(dtype)).double()
    through_x, through_w = oracle_x + (used - oracle_x).detach(), oracle_w + (served - oracle_w).detach()
    F.linear(through_x, through_w, oracle_b).backward(grad.to(dtype).double())
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if precision == "fp32" else {"rtol": 8e-3, "atol": 1e-2}
    for found, expected in ((leaf, oracle_x), (module.weight, oracle_w), (module.bias, oracle_b)):
        assert found.grad.dtype == found.dtype
        torch.testing.assert_close(found.grad.double(), expected.grad, **tolerance)


@pytest.mark.parametrize("name", ["FP8"])
def test_inputs_that_a_static_range_cuts_off_get_no_gradient_and_the_others_do(name):
    module = preset_layer(name, range=1.0)
    x = rows(5, WIDTH)
    x[0, :4] = torch.tensor([5.0, -5.0, 0.5, -0.5])
    leaf = x.clone().requires_grad_()
    module(leaf).backward(torch.ones(5, OUTPUTS))
    served = grid.dequantize(module.quantize(), module.scheme.weights).float()
    expected = torch.ones(5, OUTPUTS) @ served
    outside, inside = x.abs() > 1.0, x.abs() < 0.96
    assert outside.any()
    assert not leaf.grad[outside].any()
    torch.testing.assert_close(leaf.grad[inside], expected[inside])
    # The weight's gradient takes the inputs as they were cut off.
    used = used_inputs(module, x)
    torch.testing.assert_close(module.weight.grad, torch.ones(OUTPUTS, 5) @ used)


def test_static_int8_inputs_are_cut_off_too():
    scheme = Scheme.preset("W8A8", activations={"strategy": "tensor", "dynamic": False})
    model = nn.ModuleDict({"proj": nn.Linear(WIDTH, OUTPUTS)})
    lockstep.prepare(model, scheme)
    model["proj"].input_scale.fill_(1 / 127)
    x = rows(5, WIDTH).requires_grad_()
    model["proj"](x).sum().backward()
    assert not x.grad[x.abs() > 1].any()
    assert (x.grad[x.abs() < 0.99] != 0).float().mean() > 0.99


@pytest.mark.parametrize("name", [name for name in QUANTIZED if PRESETS[name].activations.dynamic])
def test_dynamic_ranges_cut_nothing_off(name):
    module = preset_layer(name)
    x = rows(5, WIDTH).requires_grad_()
    x.data[0, 0] = 1e3
    module(x).backward(torch.ones(5, OUTPUTS))
    served = grid.dequantize(module.quantize(), module.scheme.weights).float()
    torch.testing.assert_close(x.grad, torch.ones(5, OUTPUTS) @ served)


@every_quantized
@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_every_preset_trains_around_what_is_frozen(name, frozen):
    module, x = preset_layer(name), rows(5, WIDTH).requires_grad_(frozen != "input")
    if frozen != "input":
        module.get_parameter(frozen).requires_grad_(False)
    module(x).sum().backward()
    assert (x.grad is None) == (frozen == "input")
    assert (module.weight.grad is None) == (frozen == "weight")
    assert (module.bias.grad is None) == (frozen == "bias")


@every_quantized
@every_precision
@pytest.mark.parametrize("weight_grad", [True, False], ids=["trained", "frozen"])
def test_codes_are_kept_for_the_backward_and_not_the_input(name, precision, weight_grad):
    """Half the memory of bf16 activations is what quantized inputs give back."""
    module = preset_layer(name, BF16 if precision == "bf16" else FP32)
    module.weight.requires_grad_(weight_grad)
    x = rows(32, WIDTH).to(module.weight.dtype).requires_grad_()
    kept = saved(module, x, precision == "autocast")
    own = [tensor for tensor in kept if tensor.data_ptr() != module.weight.data_ptr()]
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in own)
    assert not [tensor for tensor in own if tensor.numel() >= x.numel() and tensor.element_size() > 1]
    inputs = module.scheme.activations
    codes = x.numel() if weight_grad or not inputs.dynamic else 0
    scales = 32 * 4 * inputs.num_groups(WIDTH) if weight_grad else 0
    assert codes <= sum(tensor.nbytes for tensor in own) <= codes + scales + 64


@every_quantized
def test_activation_checkpointing_changes_no_bit_of_any_preset(name):
    module, x = preset_layer(name), integers(5, WIDTH)
    expected = gradients(module, x)
    assert_same(gradients(module, x, lambda x: checkpoint(module, x, use_reentrant=False)), expected)


# Measured scales -----------------------------------------------------------------------------------------------------


@every_measured
def test_an_unmeasured_scale_is_an_error_that_names_the_layer(name):
    model = nn.ModuleDict({"proj": nn.Linear(WIDTH, OUTPUTS)})
    lockstep.prepare(model, name)
    key = PRESETS[name].activations.scale_name
    assert list(model.state_dict()) == ["proj.weight", "proj.bias", f"proj.{key}"]
    with pytest.raises(ValueError, match=rf"proj.{key} is not measured: run lockstep.calibrate"):
        model["proj"](torch.zeros(1, WIDTH))
    getattr(model["proj"], key).fill_(1.0)
    assert model["proj"](torch.zeros(1, WIDTH)).isfinite().all()
    getattr(model["proj"], key).fill_(torch.nan)
    with pytest.raises(ValueError, match="not measured"):
        model["proj"](torch.zeros(1, WIDTH))


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self.seen.append(x)


@every_quantized
def test_an_observer_sees_inputs_that_are_not_quantized(name):
    """Ranges are measured on what the layers would see without quantized inputs, also before any is measured."""
    model = nn.ModuleDict({"proj": nn.Linear(WIDTH, OUTPUTS)})
    lockstep.prepare(model, name)
    module, watcher, x = model["proj"], Recorder(), rows(5, WIDTH).requires_grad_()
    module.observer = watcher
    y = module(x)
    (seen,) = watcher.seen
    assert torch.equal(seen, x)
    assert not seen.requires_grad
    spec = module.scheme.weights
    expected = reference.gemm(x, *reference.operand(module.quantize(), spec), module.bias, spec)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    module.observer = None
    if name in MEASURED:
        with pytest.raises(ValueError, match="not measured"):
            module(x)
    else:
        assert not torch.equal(module(x), y)


@every_measured
def test_casting_the_model_keeps_measured_scales_in_fp32_and_to_the_bit(name):
    """``model.to(torch.bfloat16)`` and ``model.half()`` cast buffers too."""
    module = preset_layer(name, range=1.2345)
    key = module.scheme.activations.scale_name
    before = getattr(module, key).clone()
    for cast in (lambda: module.to(BF16), module.half, module.float, module.double):
        cast()
        assert getattr(module, key).dtype == FP32
        assert torch.equal(getattr(module, key), before)
    assert getattr(module.to("meta"), key).is_meta


@every_measured
@pytest.mark.parametrize("copied", ["deepcopy", "torch.save", "state_dict"])
def test_measured_scales_are_copied_and_stored(name, copied):
    module, x = preset_layer(name, range=1.2345), rows(5, WIDTH)
    if copied == "deepcopy":
        twin = copy.deepcopy(module)
    else:
        file = io.BytesIO()
        torch.save(module if copied == "torch.save" else module.state_dict(), file)
        file.seek(0)
        twin = torch.load(file, weights_only=copied == "state_dict")
    if copied == "state_dict":
        state, twin = twin, preset_layer(name, range=7.0)
        with torch.no_grad():
            twin.weight.zero_()
        twin.load_state_dict(state)
    assert torch.equal(twin(x), module(x))
    getattr(twin, module.scheme.activations.scale_name).mul_(2)
    assert not torch.equal(twin(x), module(x))


# Scales that fused layers share --------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, 64, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.k_proj(x) + self.v_proj(x) + self.o_proj(x)


SHARING = [name for name, scheme in PRESETS.items() if scheme.weights.per_tensor]


def shared_scale(module: QATLinear) -> Tensor:
    quantized = module.quantize()
    return quantized.scale if quantized.global_scale is None else quantized.global_scale


@pytest.mark.parametrize("name", SHARING)
def test_fused_layers_share_the_scale_of_the_largest(name):
    """Engines run q, k and v as one weight with one scale; they would requantize, or be wrong, otherwise."""
    torch.manual_seed(0)
    model = Attention()
    lockstep.prepare(model, name)
    for module in model.children():
        inputs = module.scheme.activations
        if inputs is not None:
            getattr(module, inputs.scale_name).fill_(1.0)
    stacked = torch.cat([module.weight for module in (model.q_proj, model.k_proj, model.v_proj)]).detach()
    whole = grid.quantize(stacked, model.q_proj.scheme.weights)
    parts = [module.quantize() for module in (model.q_proj, model.k_proj, model.v_proj)]
    assert torch.equal(torch.cat([part.codes for part in parts]).float(), whole.codes.float())
    alone = grid.quantize(model.o_proj.weight.detach(), model.o_proj.scheme.weights)
    assert torch.equal(model.o_proj.quantize().codes.float(), alone.codes.float())

    x, before = rows(3, WIDTH), shared_scale(model.q_proj)
    y, other = model.q_proj(x), model.o_proj(x)
    with torch.no_grad():
        model.v_proj.weight[0, 0] = 3.0
    assert not torch.equal(shared_scale(model.q_proj), before)
    assert torch.equal(shared_scale(model.q_proj), shared_scale(model.v_proj))
    assert not torch.equal(model.q_proj(x), y)
    assert torch.equal(model.o_proj(x), other)
    expected = reference.linear(x, model.q_proj.quantize(), model.q_proj.scheme, None, model.q_proj.stored_scale())
    assert torch.equal(model.q_proj(x), expected)
    twin = copy.deepcopy(model)
    assert twin.q_proj.fused == (twin.q_proj, twin.k_proj, twin.v_proj)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert len(list(twin.modules())) == 5


# The gradient of the input in fp8 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FP8", "FP8_DYNAMIC"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_fp8_input_gradient_is_near_the_exact_one_and_changes_nothing_else(name, dtype):
    """e4m3 has four significant bits: 2.5 % of a row's norm, measured; the weights' codes are exact."""
    found, expected = preset_layer(name, dtype, 100.0, fp8_input_gradient=True), preset_layer(name, dtype, 100.0)
    x, grad = rows(64, WIDTH).to(dtype), rows(64, OUTPUTS, seed=1).to(dtype)
    grad *= torch.logspace(-6, 2, 64)[:, None]  # rows of every magnitude
    results = []
    for module in (found, expected):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(grad)
        results.append((y.detach(), module.weight.grad, module.bias.grad, leaf.grad))
    for ours, exact in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.equal(ours, exact)
    error = (results[0][3] - results[1][3]).float().norm(dim=1) / results[1][3].float().norm(dim=1)
    assert error.min() > 0
    assert error.max() < 0.05
    assert error.mean() < 0.03


@pytest.mark.parametrize("name", ["FP8", "FP8_DYNAMIC"])
def test_fp8_input_gradient_is_not_used_unless_asked_for(name, monkeypatch):
    called = []
    run = reference.fp8_input_gradient
    monkeypatch.setattr(reference, "fp8_input_gradient", lambda *given: called.append(1) or run(*given))
    for asked in (False, True):
        preset_layer(name, fp8_input_gradient=asked)(rows(4, WIDTH).requires_grad_()).sum().backward()
        assert len(called) == asked


@pytest.mark.parametrize("name", ["W4A16", "W8A8", "FP8_BLOCK", "MXFP8"])
def test_fp8_input_gradient_is_refused_where_there_are_no_fp8_codes_to_multiply_with(name):
    with pytest.raises(ValueError, match="fp8_input_gradient needs fp8 weights scaled by channel or tensor"):
        preset_layer(name, fp8_input_gradient=True)
