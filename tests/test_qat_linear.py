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
from lockstep import Scheme, TensorSpec, grid
from lockstep.qat import QATLinear

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
    codes, scale = grid.quantize(module.weight.detach(), spec)
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
