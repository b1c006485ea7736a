"""Prepared models under ``torch.compile``: one graph, the rounding operators opaque in it, and the same bits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from models import channel, grouped, prepared, tiny_llama, token_ids
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import lockstep
from lockstep import Scheme, activations, grid
from lockstep.scheme import PRESETS

SCHEMES = {"grouped": grouped(32), "channel": channel()}

every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def llama(scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """One decoder layer with every kind of projection: 7 layers train quantized."""
    model = tiny_llama(dtype, num_hidden_layers=1, hidden_size=128, intermediate_size=128)
    return prepared(model.train(), scheme)


def passed(model: nn.Module, call=None) -> dict[str, Tensor]:
    """Logits and the gradients of a loss, by name."""
    model.zero_grad()
    ids = token_ids(2, 8)
    logits = (model if call is None else call)(input_ids=ids, use_cache=False).logits
    nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
    return {"logits": logits.detach()} | {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def our_operators(graph: torch.fx.GraphModule) -> Counter:
    """How often each operator of Lockstep's is in a graph and the graphs inside it."""
    parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    targets = [node.target for part in parts for node in part.graph.nodes if node.op == "call_function"]
    names = [str(target).removesuffix(".default") for target in targets]
    return Counter(name.removeprefix("lockstep.") for name in names if name.startswith("lockstep."))


@every_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_compiled_llama_is_one_graph_with_the_bits_of_the_eager_one(scheme, dtype):
    """AOTAutograd's graphs are run as they are: inductor rounds a Llama's norms otherwise, prepared or not.

    The gradients are compared in fp32: in bf16 AOTAutograd adds those of a residual in an order of its own. Each
    projection is quantized in the forward and again in the backward: nothing is kept in between.
    """
    graphs: dict[str, Counter] = {}

    def recorded(when: str):
        def compiler(graph: torch.fx.GraphModule, inputs: list):
            assert when not in graphs, "the graph breaks"
            graphs[when] = our_operators(graph)
            return make_boxed_func(graph.forward)

        return compiler

    model = llama(scheme, dtype)
    backend = aot_autograd(fw_compiler=recorded("forward"), bw_compiler=recorded("backward"))
    found, expected = passed(model, torch.compile(model, backend=backend, fullgraph=True)), passed(model)
    assert torch.equal(found["logits"], expected["logits"])
    if dtype == torch.float32:
        assert_same(found, expected)
    if scheme.weights.group_size:
        assert graphs == {"forward": {"fake_quantize": 7}, "backward": {"fake_quantize_again": 7}}
    else:
        assert graphs == {"forward": {"quantize": 7, "epilogue": 7}, "backward": {"fake_quantize_again": 7}}


@every_scheme
def test_dynamo_finds_no_reason_to_break(scheme):
    model = llama(scheme)
    explained = torch._dynamo.explain(model)(input_ids=token_ids(2, 8), use_cache=False)
    assert explained.break_reasons == []
    assert explained.graph_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_compiled_llama_trains_as_one_that_holds_the_served_weights(dtype, backend):
    """Whatever the compiler does to the rest, it does to both: outputs and gradients are equal, bit for bit."""
    scheme = grouped(32)  # a plain model has no scale after the GEMM
    model, twin = llama(scheme, dtype), llama(scheme, dtype)
    served = {
        f"{name}.weight": grid.fake_quantize(layer.weight.detach(), scheme.weights)
        for name, layer in lockstep.qat.quantized_modules(model)
    }
    assert len(served) == 7
    lockstep.unprepare(twin)
    twin.load_state_dict(model.state_dict() | served)
    found, expected = (passed(each, torch.compile(each, backend=backend, fullgraph=True)) for each in (model, twin))
    assert_same(found, expected)


@every_scheme
def test_a_layer_and_its_epilogue_compile_to_the_same_bits(scheme):
    """Inductor must not fuse away a rounding: of the product before the scale and the bias, of the activation after."""

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu())

    torch.manual_seed(0)
    model = prepared(Mlp().bfloat16(), scheme)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    results = []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        y = call(x)
        y.float().square().sum().backward()
        results.append([y.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert all(map(torch.equal, *results))


# Every preset --------------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """Two layers that engines run as one, and one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(128, 256), nn.Linear(128, 256)
        self.down_proj = nn.Linear(256, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x).relu() * self.up_proj(x))


def fused(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = prepared(Fused().to(dtype), name)
    for module in model.children():
        inputs = module.scheme.activations
        if inputs is not None and inputs.stores_scale:
            getattr(module, inputs.scale_name).copy_(activations.static_scale(torch.tensor(3.0), inputs))
    return model


def trained(model: nn.Module, call, autocast: bool) -> dict[str, Tensor]:
    model.zero_grad()
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(model.down_proj.weight.dtype)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = call(x)
    y.float().square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"y": y.detach(), "x": x.grad} | gradients


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "INT8"])
def test_every_preset_is_one_graph_with_the_bits_of_the_eager_one(name, precision):
    """Also under autocast, whose casts a compiler sees and an opaque operator must not."""
    model = fused(name, torch.bfloat16 if precision == "bf16" else torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = trained(model, model, precision == "autocast")
    for key, value in trained(model, compiled, precision == "autocast").items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", ["W4A16", "W8A8"])
def test_learned_scales_are_in_the_one_graph(name):
    """A graph that broke at each layer cost three times the step."""
    model = fused(name, torch.float32)
    lockstep.unprepare(model)
    lockstep.prepare(model, name, learned_scales=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = trained(model, model, autocast=False)
    assert any(key.endswith("weight_scale") for key in expected)
    for key, value in trained(model, compiled, autocast=False).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", ["W8A8", "NVFP4"])
def test_inductor_computes_the_same_bits(name):
    """One layer: inductor adds the bf16 gradients of several in an order of its own."""
    layer = fused(name, torch.bfloat16).gate_proj
    x, grad = torch.randn(5, 128).bfloat16(), torch.randn(5, 256).bfloat16()
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.backward(grad)
        results.append([y.detach(), leaf.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_quantized_inputs_keep_codes_between_the_compiled_passes(name):
    """A partitioner that kept the bf16 input to quantize it again would undo what the codes save."""
    model, kept = fused(name, torch.bfloat16), []
    compiled = torch.compile(model.down_proj, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 256).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        compiled(x)
    assert [one for one in kept if one.dtype == model.down_proj.scheme.activations.code_dtype]
    assert not [one for one in kept if one.shape == x.shape and one.element_size() > 1]
