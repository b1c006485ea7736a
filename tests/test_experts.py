"""Mixtures of experts: what trains is what is served, in every implementation of transformers and in kernel order."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import channel, edit_tensors, grouped, prepared, tiny_moe, token_ids
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Llama4ForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import lockstep
from lockstep import Rule, Scheme, grid
from lockstep.align import compare
from lockstep.kernels import reference
from lockstep.qat import experts as qat_experts
from lockstep.qat.experts import Expert, experts, layout_of
from lockstep.qat.kv_cache import prepare_kv_cache
from lockstep.qat.linear import QATLinear
from lockstep.qat.prepare import quantized_experts

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
G32 = grouped(32)
IN_FP16 = grouped(32, scale_dtype=FP16, served_dtype=FP16)
EXPERTS = "re:.*\\.experts$"

# DeepGEMM and SonicMoE, the other two that transformers registers, have kernels for GPUs alone.
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
KINDS = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe", "granitemoe", "nemotron_h")
CASES = [*product(KINDS, IMPLEMENTATIONS), ("llama4_text", "eager")]  # Llama 4 has no other

every_case = pytest.mark.parametrize(("kind", "implementation"), CASES, ids=["-".join(case) for case in CASES])
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def moe(kind: str = "qwen3_moe", implementation: str = "grouped_mm", dtype: torch.dtype = BF16, **config: Any) -> Any:
    model = tiny_moe(kind, dtype, **config)
    if kind != "llama4_text":
        model.set_experts_implementation(implementation)
    return model


def experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if layout_of(module)]


def rounds_router_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast what comes after the hidden states, indices aside, to `dtype`, as engines do."""

    def cast(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *routing = args
        return hidden, *(one.to(dtype) if one.is_floating_point() else one for one in routing)

    module.register_forward_pre_hook(cast)


def as_engines_have_it(plain: Any, scheme: Scheme = G32, dtype: torch.dtype | None = None) -> Any:
    """The oracle: a copy of an unprepared model whose experts are the grid's own, in transformers' own forward.

    `dtype` is what the copied weights are in; the model's by default.
    """
    oracle = copy.deepcopy(plain)
    for module in experts_of(oracle):
        transposed = getattr(module, "is_transposed", "Llama4" in type(module).__name__)
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            if name in module._parameters:
                master = module.get_parameter(name).detach()
                rows = (master.mT if transposed else master).contiguous()
                served = grid.fake_quantize(rows, scheme.weights)
                served = (served.mT if transposed else served).contiguous()
                setattr(module, name, nn.Parameter(served.to(dtype or master.dtype)))
        rounds_router_weights(module, scheme.weights.served_dtype)
    return oracle


def passed(model: nn.Module, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Logits, and the gradients of a loss by name, in fp32."""
    model.zero_grad()
    ids = token_ids(2, 8)
    with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        logits = model(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
    gradients = {name: one.grad.float() for name, one in model.named_parameters() if one.grad is not None}
    return {"logits": logits.detach()} | gradients


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert sum("experts." in name for name in found) >= 2
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def layer(implementation: str = "grouped_mm", kind: str = "mixtral", **options: Any) -> Any:
    """The plain experts of one layer."""
    return experts_of(moe(kind, implementation, **options))[0]


def alone(module: nn.Module, scheme: str | Scheme = G32) -> Any:
    """`module` itself, prepared under the name ``experts``."""
    prepared(nn.ModuleDict({"experts": module}), scheme, targets="experts")
    return module


def routed(
    tokens: int = 16, top_k: int = 2, hidden: int = 64, dtype: torch.dtype = BF16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states ``[T, H]``, for each token `top_k` of 4 experts, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(4, generator=generator)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=generator)
    return torch.randn(tokens, hidden, generator=generator).to(dtype), index, weights


# What reaches the GEMM -----------------------------------------------------------------------------------------------


def test_no_other_implementation_runs_on_a_cpu():
    """A new one in transformers' registry belongs into the tests here."""
    others = {*ALL_EXPERTS_FUNCTIONS.valid_keys()} - {*IMPLEMENTATIONS}
    assert others == {"deepgemm", "sonicmoe"}
    for name in others:
        with pytest.raises((ImportError, RuntimeError)):
            ALL_EXPERTS_FUNCTIONS[name](layer(), *routed())


@every_case
def test_training_is_exactly_quantization(kind, implementation):
    """Logits and every gradient, to the bit: straight-through to the masters, and to the routers as they are."""
    model = moe(kind, implementation)
    before, expected = passed(model), passed(as_engines_have_it(model))
    lockstep.prepare(model, G32, targets=EXPERTS)
    found = passed(model)
    assert not torch.equal(found["logits"], before["logits"])
    assert_same(found, expected)


@every_implementation
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_training_is_exactly_quantization_in_other_dtypes(implementation, dtype):
    """fp16 is served in fp16. fp32 masters without autocast compute in fp32, with weights that fit bf16."""
    scheme = IN_FP16 if dtype == FP16 else G32
    model = moe("mixtral", implementation, dtype)
    expected = passed(as_engines_have_it(model, scheme))
    lockstep.prepare(model, scheme, targets=EXPERTS)
    assert_same(passed(model), expected)


@every_implementation
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_wider_masters_under_autocast_compute_as_they_are_served(kind, implementation):
    model = moe(kind, implementation, FP32)
    expected = passed(as_engines_have_it(model, dtype=BF16), autocast=BF16)
    lockstep.prepare(model, G32, targets=EXPERTS)
    assert_same(passed(model, autocast=BF16), expected)
    assert {parameter.dtype for parameter in model.parameters()} == {FP32}


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "W8A16", "MXFP4A16", "MXFP8A16"])
def test_every_scheme_in_groups_goes_through_transformers_own_forward(scheme):
    """INT8 by channel does not: its scales follow the GEMM."""
    scheme = scheme if scheme.startswith("MX") else Scheme.preset(scheme, strategy="group", group_size=32)
    scheme = Scheme.of(scheme)
    model = moe("qwen3_moe")
    expected = passed(as_engines_have_it(model, scheme))
    lockstep.prepare(model, scheme, targets=EXPERTS)
    assert_same(passed(model), expected)


@every_implementation
def test_router_weights_are_rounded_to_the_served_dtype(implementation):
    """Those of Mixtral are fp32, and an engine's kernel rounds them before it multiplies."""
    module, (x, index, weights) = layer(implementation), routed()
    assert not torch.equal(weights, weights.to(BF16).float())
    alone(module)
    assert torch.equal(module(x, index, weights), module(x, index, weights.to(BF16)))
    lockstep.unprepare(module)
    with torch.no_grad():
        assert not torch.equal(module(x, index, weights), module(x, index, weights.to(BF16)))


def test_an_implementation_of_the_users_own_gets_the_weights_that_are_served():
    def mine(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("th,enh->ten", hidden, self.gate_up_proj).chunk(2, -1)
        every = torch.einsum("tei,ehi->teh", self.act_fn(gate) * up, self.down_proj)
        chosen = every.gather(1, index.unsqueeze(-1).expand(-1, -1, every.shape[-1]))
        return (chosen * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)

    ALL_EXPERTS_FUNCTIONS["mine"] = mine
    try:
        model = moe("mixtral")
        model.set_experts_implementation("mine")
        before, expected = passed(model), passed(as_engines_have_it(model))
        found = passed(prepared(model, G32, targets=EXPERTS))
    finally:
        del ALL_EXPERTS_FUNCTIONS["mine"]
    assert not torch.equal(found["logits"], before["logits"])
    assert_same(found, expected)


def test_an_implementation_that_cuts_the_weights_of_an_expert_gets_the_gradients_of_what_is_served():
    """What its GEMMs save begins in the middle of an expert, and is computed again from there."""

    def in_parts(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        middle, output = self.gate_up_proj.shape[1] // 2, torch.zeros_like(hidden)
        for number in range(self.num_experts):
            token, rank = (index == number).nonzero(as_tuple=True)
            gate, up = (
                F.linear(hidden[token], self.gate_up_proj[number, cut]) for cut in (slice(middle), slice(middle, None))
            )
            inner, half = self.act_fn(gate) * up, middle // 2
            y = F.linear(inner[:, :half], self.down_proj[number, :, :half])
            y = y + F.linear(inner[:, half:], self.down_proj[number, :, half:])
            output = output.index_add(0, token, (y * weights[token, rank].unsqueeze(-1)).to(hidden.dtype))
        return output

    ALL_EXPERTS_FUNCTIONS["in parts"] = in_parts
    try:
        model = moe("mixtral")
        model.set_experts_implementation("in parts")
        expected = passed(as_engines_have_it(model))
        found = passed(prepared(model, G32, targets=EXPERTS))
        module, plain = alone(experts_of(moe("mixtral"))[0]), experts_of(moe("mixtral"))[0]
        for one in (module, plain):
            one.config._experts_implementation = "in parts"
        rounds_router_weights(plain, BF16)
        assert sum(kept(module, autocast=False)) <= sum(kept(plain, autocast=False))
    finally:
        del ALL_EXPERTS_FUNCTIONS["in parts"]
    assert_same(found, expected)


def in_place(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.7)


def by_optimizer(module: nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(*routed()).float().square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def by_state_dict(module: nn.Module) -> None:
    module.load_state_dict({key: one.flip(0) for key, one in module.state_dict().items()})


def by_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.roll(1, 0)


@every_implementation
@pytest.mark.parametrize("change", [in_place, by_optimizer, by_state_dict, by_data])
def test_weights_are_read_again_at_each_forward(implementation, change):
    module, data = alone(layer(implementation)), routed()
    before = module(*data)
    change(module)
    after = module(*data)
    assert not torch.equal(after, before)
    lockstep.unprepare(module)
    (oracle,) = as_engines_have_it(nn.ModuleList([module]))
    assert torch.equal(after, oracle(*data))


@every_implementation
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_what_training_does(implementation, mode):
    model = prepared(moe("mixtral", implementation).train(), G32)
    trained = model(token_ids(2, 8)).logits
    with mode():
        assert torch.equal(model.eval()(token_ids(2, 8)).logits, trained)


def test_forward_in_another_16_bit_dtype_is_refused():
    model = prepared(moe("mixtral", dtype=FP16), grouped(32, scale_dtype=BF16), targets=EXPERTS)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.experts: .*float16.*bfloat16"):
        model(token_ids(1, 4))


# Classes and keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "llama4_text"])
def test_the_model_keeps_its_keys_and_gets_its_classes_back(kind):
    model = tiny_moe(kind)
    twin, logits = copy.deepcopy(model), model(token_ids(1, 4)).logits
    classes = [type(module) for module in model.modules()]
    lockstep.prepare(model, G32)
    assert [*model.state_dict()] == [*twin.state_dict()]
    for (name, one), (other_name, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)
    found = dict(quantized_experts(model))
    assert len(found) == len(experts_of(twin)) >= 1
    for name, module in found.items():
        assert isinstance(module, type(twin.get_submodule(name)))
    assert not torch.equal(model(token_ids(1, 4)).logits, logits)
    lockstep.unprepare(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(model.modules(), twin.modules(), strict=True))
    assert torch.equal(model(token_ids(1, 4)).logits, logits)


def stored(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, stored])
def test_copies_of_a_prepared_model_train_alike_and_apart(copied):
    model = prepared(moe("mixtral"), G32)
    twin = copied(model)
    assert_same(passed(twin), passed(model))
    in_place(experts_of(twin)[0])
    assert not torch.equal(passed(twin)["logits"], passed(model)["logits"])
    lockstep.unprepare(twin)
    assert not [*quantized_experts(twin)]


def test_preparing_twice_changes_nothing_and_another_scheme_is_refused():
    model = prepared(moe("mixtral"), G32)
    before, classes = passed(model), [type(module) for module in model.modules()]
    lockstep.prepare(model, G32)
    assert [type(module) for module in model.modules()] == classes
    assert_same(passed(model), before)
    with pytest.raises(ValueError, match="unprepare"):
        lockstep.prepare(model, "W8A8")
    with pytest.raises(ValueError, match=r"mlp\.experts is prepared with .* not among the modules to quantize now"):
        lockstep.prepare(model, G32, ignore=["lm_head", EXPERTS])


def test_wrappers_within_the_model_are_no_part_of_names():
    """Activation checkpointing wraps blocks after they are prepared."""
    model = prepared(moe("mixtral"), G32)
    names = [name for name, _ in quantized_experts(model)]
    expected = dict(lockstep.export.stream(model))
    model.model.layers[0].mlp = checkpoint_wrapper(model.model.layers[0].mlp)
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    assert [name for name, _ in quantized_experts(model)] == names
    lockstep.prepare(model, G32)
    found = dict(lockstep.export.stream(model))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_layout_without_a_gate_is_taken_as_the_module_says():
    """Its two parameters have each other's shape turned around, so shapes do not tell."""
    (module,) = experts_of(tiny_moe("nemotron_h"))
    assert module.up_proj.shape == (4, 96, 64)
    assert layout_of(module)[:3] == ("up_proj", False, False)
    module.is_transposed = True
    assert layout_of(module)[:3] == ("up_proj", True, False)


# Beside autograd -----------------------------------------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_no_bit(implementation, use_reentrant):
    expected = passed(prepared(moe("mixtral", implementation).train(), G32))
    model = prepared(moe("mixtral", implementation).train(), G32)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    experts_of(model)[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same(passed(model), expected)
    assert len(calls) == 2  # the second for the backward


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="Dynamo cannot trace isinstance of a type argument")
@pytest.mark.parametrize(
    ("implementation", "scheme", "fullgraph"),
    [
        ("grouped_mm", G32, True),
        ("batched_mm", G32, True),
        ("eager", G32, False),  # transformers asks which experts have tokens: no graph holds that
        ("grouped_mm", channel(), False),  # and so does the order of the kernel
    ],
    ids=["grouped_mm", "batched_mm", "eager", "channel"],
)
def test_compiled_experts_compute_the_same_bits(implementation, scheme, fullgraph):
    torch._dynamo.reset()
    module = alone(layer(implementation), scheme)
    x, index, weights = routed()
    x.requires_grad_()

    def run(call: Callable[..., Tensor]) -> list[Tensor]:
        module.zero_grad()
        x.grad = None
        y = call(x, index, weights)
        y.float().square().sum().backward()
        return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]

    compiled = torch.compile(module, fullgraph=fullgraph, backend="aot_eager")
    for found, expected in zip(run(compiled), run(module), strict=True):
        assert torch.equal(found, expected)
    in_place(module)
    assert torch.equal(compiled(x, index, weights), module(x, index, weights))


class Alive(TorchDispatchMode):
    """The bytes of all memory that is allocated under it and not free yet, by weak references to it.

    The parameters of `module` do not count.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._masters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for one in output if isinstance(output, tuple | list) else (output,):
            if isinstance(one, Tensor):
                memory = one.untyped_storage()
                if memory.data_ptr() in self._masters:
                    continue
                reference = StorageWeakRef(memory)
                self._seen[reference.cdata] = (reference, memory.nbytes())
        return output

    def sizes(self) -> list[int]:
        return sorted(size for reference, size in self._seen.values() if not reference.expired())


def kept(module: nn.Module, autocast: bool) -> list[int]:
    """Sizes of what is alive between forward and backward, the output and what autograd saved."""
    x, index, weights = routed(dtype=FP32 if autocast else BF16)
    alive = Alive(module)
    with alive, torch.autocast("cpu", BF16, enabled=autocast):
        output = module(x.requires_grad_(), index, weights)
    sizes = alive.sizes()
    output.float().sum().backward()
    return sizes


@every_implementation
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_nothing_of_the_quantized_weights_is_kept_for_the_backward(monkeypatch, implementation, autocast):
    """No more than transformers' own forward keeps on unprepared weights in the dtype that is computed in."""
    plain, module = layer(implementation), layer(implementation, dtype=FP32 if autocast else BF16)
    rounds_router_weights(plain, BF16)
    whole = [parameter.numel() * 2 for parameter in module.parameters()]
    expected, found = kept(plain, autocast), kept(alone(module), autocast)
    assert sum(found) <= sum(expected)
    assert not {*whole} & {*found}
    # The instrument sees them where they are kept.
    monkeypatch.setattr(qat_experts, "_computed_again", lambda *_: nullcontext())
    unhooked = kept(module, autocast)
    if implementation != "batched_mm":  # which saves its own copy for each token
        assert {*whole} <= {*unhooked}


@every_implementation
@pytest.mark.parametrize("scheme", [G32, channel()], ids=["group", "channel"])
def test_a_master_that_is_changed_before_the_backward_is_an_error(implementation, scheme):
    module = alone(layer(implementation), scheme)
    x, index, weights = routed()
    output = module(x.requires_grad_(), index, weights).float().sum()
    with torch.no_grad():
        module.down_proj.add_(1)
    if implementation == "batched_mm" and scheme == G32:  # its products are of a copy
        output.backward()
        return
    with pytest.raises(RuntimeError, match=r"changed in place|modified (by an )?in-?place"):
        output.backward()


# The order of the kernel ---------------------------------------------------------------------------------------------

FP8_BLOCK = Scheme.preset("FP8_BLOCK")
IN_KERNELS_ORDER = {
    "INT4 channel": channel(),
    "INT8 channel": Scheme.preset("W8A16", strategy="channel"),
    "W8A8": Scheme.preset("W8A8"),
    "FP8_DYNAMIC": Scheme.preset("FP8_DYNAMIC"),
    "FP8_BLOCK": FP8_BLOCK,
    "NVFP4A16": Scheme.preset("NVFP4A16"),
    "one group": grouped(64),  # of the first projections; the second ones have several
    "W4AFP8": Scheme.preset("W4AFP8"),
}
every_order = pytest.mark.parametrize("scheme", IN_KERNELS_ORDER.values(), ids=IN_KERNELS_ORDER)


def sizes_for(scheme: Scheme) -> dict[str, int]:
    wide = scheme.weights.strategy == "block" or scheme.weights.group_size == 128
    if wide:
        return {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    return {"intermediate_size": 128}


def by_hand(module: Any, hidden: Tensor, index: Tensor, weights: Tensor, scheme: Scheme) -> Tensor:
    """RN(y * RN(p)) summed over k in fp32 and rounded once, y from the reference kernel of each projection."""

    def linear(x: Tensor, master: Tensor, sharing: Tensor) -> Tensor:
        amax = grid.largest(sharing) if scheme.weights.per_tensor else None
        return reference.linear(x, grid.quantize(master, scheme.weights, amax), scheme)

    sums = torch.zeros(*hidden.shape)
    slots = torch.zeros(len(hidden), index.shape[1], hidden.shape[1], dtype=hidden.dtype)
    for number in range(len(module.down_proj)):
        first, down = module.gate_up_proj.detach()[number], module.down_proj.detach()[number]
        token, rank = (index == number).nonzero(as_tuple=True)
        if not len(token):
            continue
        gate, up = (linear(hidden[token], part, first) for part in first.chunk(2))
        y = linear(F.silu(gate) * up, down, down)
        slots[token, rank] = y * weights[token, rank].to(y.dtype).unsqueeze(-1)
    for rank in range(index.shape[1]):
        sums += slots[:, rank].float()
    return sums.to(hidden.dtype)


@every_order
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_experts_are_computed_in_the_order_of_the_kernel(scheme, top_k):
    """Also with an expert that has no tokens, and places that are routed nowhere, as expert parallelism marks them."""
    sizes = sizes_for(scheme)
    module = alone(layer(**sizes), scheme)
    x, index, weights = routed(top_k=top_k, hidden=sizes.get("hidden_size", 64))
    for chosen in (index, index.masked_fill(index == 2, 0), index.masked_fill(index == 1, 4)):
        assert torch.equal(module(x, chosen, weights), by_hand(module, x, chosen, weights, scheme))


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_experts_in_groups_are_computed_in_the_same_order(implementation):
    """`batched_mm` and `grouped_mm` add as engines do. `eager` rounds after each addition."""
    module, data = alone(layer(implementation)), routed(tokens=64, top_k=4)
    assert torch.equal(module(*data), by_hand(module, *data, G32))
    eager = alone(layer("eager"))
    share = (eager(*data) == by_hand(eager, *data, G32)).float().mean()
    assert 0.4 < share < 0.9


@every_order
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_gradients_in_the_order_of_the_kernel_are_straight_through(scheme, precision):
    """Against a loop over prepared linear layers, one for each projection of each expert."""
    sizes, autocast = sizes_for(scheme), precision == "autocast"
    dtype = FP32 if autocast else BF16
    module = alone(layer(dtype=dtype, **sizes), scheme)
    hidden = sizes.get("hidden_size", 64)
    x, index, weights = routed(hidden=hidden, dtype=dtype)
    index = index.masked_fill(index == 3, 0)

    layers = nn.ModuleDict()
    for one in experts(module):
        twin = nn.Linear(one.in_features, one.out_features, bias=False, dtype=dtype)
        twin.weight.data = one.weight.detach().clone()
        if str(one.number) not in layers:
            layers[str(one.number)] = nn.ModuleDict()
        layers[str(one.number)][one.part] = twin
    lockstep.prepare(layers, scheme)

    def loop(x: Tensor, weights: Tensor) -> Tensor:
        slots = [[torch.zeros(hidden)] * index.shape[1] for _ in x]
        for number in index.unique().tolist():
            token, rank = (index == number).nonzero(as_tuple=True)
            parts = layers[str(number)]
            y = parts["down_proj"](F.silu(parts["gate_proj"](x[token])) * parts["up_proj"](x[token]))
            y = y * weights[token, rank].to(y.dtype).unsqueeze(-1)
            for row, t, k in zip(y, token.tolist(), rank.tolist(), strict=True):
                slots[t][k] = row
        return torch.stack([torch.stack(row).sum(0) for row in slots])

    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    inputs = [(x.clone().requires_grad_(), weights.clone().requires_grad_()) for _ in range(2)]
    with torch.autocast("cpu", BF16, enabled=autocast):
        found, expected = module(inputs[0][0], index, inputs[0][1]), loop(*inputs[1])
    assert torch.equal(found.float(), expected.to(BF16).float())
    found.backward(grad.to(found.dtype))
    expected.backward(grad.to(expected.dtype))
    for one in experts(module):
        own = module.get_parameter(one.parameter).grad
        part = own[one.number, module.layout.parts()[one.part]]
        twin = layers[str(one.number)][one.part].weight.grad
        torch.testing.assert_close(part, torch.zeros_like(part) if twin is None else twin, rtol=2e-2, atol=2e-3)
        assert bool(part.any()) == (one.number != 3)
    for one, other in zip(*inputs, strict=True):
        assert one.grad.any()
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["gpt_oss", "nemotron_h"])
def test_biases_interleaved_rows_and_experts_without_a_gate_in_the_order_of_the_kernel(kind):
    """By one group in each row the arithmetic is INT4's by channel: both ways through the same model."""
    model = moe(kind)
    lockstep.prepare(model, channel(), targets=EXPERTS)
    (_, module), *_ = quantized_experts(model)
    x, index, weights = routed()
    expected = torch.zeros(16, 2, 64, dtype=BF16)
    for token, rank in product(range(16), range(2)):
        number, row = int(index[token, rank]), x[token : token + 1]

        def linear(name: str, rows: Tensor, number: int = number) -> Tensor:
            weight, bias = module.get_parameter(name)[number], getattr(module, f"{name}_bias", None)
            weight = weight.T if kind == "gpt_oss" else weight
            quantized = grid.quantize(weight.detach().contiguous(), channel().weights)
            return reference.linear(rows, quantized, channel(), None if bias is None else bias[number].detach())

        inner = module._apply_gate(linear("gate_up_proj", row)) if kind == "gpt_oss" else None
        inner = module.act_fn(linear("up_proj", row)) if inner is None else inner
        expected[token, rank] = (linear("down_proj", inner) * weights[token, rank].to(BF16))[0]
    found = module(x, index, weights)
    assert (found == expected.float().sum(1).to(BF16)).float().mean() > 0.99  # rows apart: another order of additions
    torch.testing.assert_close(found, expected.float().sum(1).to(BF16), rtol=2e-2, atol=2e-2)
    found.float().sum().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())


def test_tokens_that_are_all_routed_nowhere_give_zeros():
    module = alone(layer(), channel())
    x, index, weights = routed()
    assert not module(x, torch.full_like(index, 4), weights).any()
    assert module(x[:0], index[:0], weights[:0]).shape == (0, 64)


@every_order
def test_llama_4_weighs_inputs_and_gives_each_expert_rows_of_its_own(scheme):
    sizes = {"intermediate_size_mlp": 128, **sizes_for(scheme)}
    module = alone(layer("eager", "llama4_text", **sizes), scheme)
    rows = torch.randn(4 * 5, sizes.get("hidden_size", 64), generator=torch.Generator().manual_seed(0)).to(BF16)

    def linear(x: Tensor, weight: Tensor, sharing: Tensor) -> Tensor:
        amax = grid.largest(sharing) if scheme.weights.per_tensor else None
        return reference.linear(x, grid.quantize(weight.T.contiguous(), scheme.weights, amax), scheme)

    for number, x in enumerate(rows.chunk(4)):
        first, down = module.gate_up_proj.detach()[number], module.down_proj.detach()[number]
        gate, up = (linear(x, part, first) for part in first.chunk(2, -1))
        assert torch.equal(module(rows).chunk(4)[number], linear(F.silu(gate) * up, down, down))
    module(rows.requires_grad_()).float().square().sum().backward()
    assert all(one.grad.any() for one in (rows, *module.parameters()))


def test_experts_that_are_called_otherwise_are_refused_in_the_order_of_the_kernel():
    module, (x, index, weights) = alone(layer(), channel()), routed()
    for call in ((x[:15],), (x, index), (x, index, weights[0])):
        with pytest.raises(TypeError, match="experts: MixtralExperts is not called with the experts of each token"):
            module(*call)


def test_each_expert_is_a_linear_layer_to_those_who_ask():
    model = prepared(moe("gpt_oss"), G32)
    name, module = next(iter(quantized_experts(model)))
    found = list(experts(module))
    assert [one.leaf for one in found[:4]] == ["0.gate_proj", "0.up_proj", "0.down_proj", "1.gate_proj"]
    gate, up, down = found[3:6]
    assert gate.qualified_name == f"{name}.1.gate_proj"
    assert (gate.out_features, gate.in_features, down.out_features, down.in_features) == (96, 64, 64, 96)
    assert torch.equal(gate.weight, module.gate_up_proj[1, :, 0::2].T)
    assert torch.equal(up.weight, module.gate_up_proj[1, :, 1::2].T)
    assert torch.equal(up.bias, module.gate_up_proj_bias[1, 1::2])
    assert torch.equal(down.weight, module.down_proj[1].T)
    x = torch.randn(3, 64).to(BF16)
    assert torch.equal(gate(x), reference.linear(x, gate.quantize(), G32, gate.bias.detach()))
    assert gate == Expert(module, 1, "gate_proj")
    assert gate != up


# What is quantized ---------------------------------------------------------------------------------------------------


def rows_of(report: lockstep.PrepareReport) -> dict[str, Any]:
    return {row.name: row for row in report.rows}


class OldMoe(nn.Module):
    """As models were before transformers 5: a linear gate, experts in a list, and one for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4, bias=False)
        self.experts = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(4)])
        self.shared_expert = nn.Linear(64, 64, bias=False)
        self.shared_expert_gate = nn.Linear(64, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        routed = sum(weights[..., [n]] * expert(x) for n, expert in enumerate(self.experts))
        return routed + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)


ROUTERS = {
    "list of experts": (lambda: nn.ModuleDict({"moe": OldMoe()}), ["moe.gate", "moe.shared_expert_gate"]),
    "qwen2_moe": (lambda: tiny_moe("qwen2_moe"), [f"model.layers.{n}.mlp.shared_expert_gate" for n in (0, 1)]),
    "llama4_text": (lambda: tiny_moe("llama4_text"), [f"model.layers.{n}.feed_forward.router" for n in (0, 1)]),
}


@pytest.mark.parametrize(("build", "routers"), ROUTERS.values(), ids=ROUTERS)
def test_routers_are_quantized_only_by_name_or_regex(build, routers):
    model = build()
    report = lockstep.prepare(model, G32)
    for name in routers:
        assert rows_of(report)[name].scheme is None
        assert "a router" in rows_of(report)[name].reason
        assert type(model.get_submodule(name)) is not QATLinear
    lockstep.unprepare(model)
    asked = "re:" + "|".join(map(re.escape, routers))
    if isinstance(model, Llama4ForCausalLM):  # a router of a class of its own, with a forward of its own
        with pytest.raises(TypeError, match=r"Llama4Router"):
            lockstep.prepare(model, G32, targets=["Linear", *routers])
        return
    eight = Scheme.preset("W8A16", strategy="channel")
    for scheme, options, wanted in (
        (G32, {"targets": ["Linear", *routers]}, G32),
        (G32, {"targets": ["Linear", asked]}, G32),
        ([Rule("Linear", G32), Rule(routers, eight)], {}, eight),
        ([Rule(routers, None), Rule(["Linear", asked], G32)], {}, None),
    ):
        found = rows_of(lockstep.prepare(model, scheme, **options))
        assert {found[name].scheme for name in routers} == {wanted}
        lockstep.unprepare(model)


@pytest.mark.parametrize("kind", KINDS)
def test_routers_of_their_own_class_are_never_a_target(kind):
    """They hold a matrix and are no ``nn.Linear``, nor does a rule for all of those reach them."""
    model = tiny_moe(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = rows_of(lockstep.prepare(model, G32))
    routers = [row for name, row in rows.items() if re.search(r"\.(gate|router)(\.layer)?$", name)]
    assert routers
    assert not any(row.scheme for row in routers)
    assert all(row.overlooked for row in routers if row.kind != "Linear")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_recipe_gives_experts_shared_experts_and_dense_layers_a_scheme_each():
    model = tiny_moe("deepseek_v3")
    wide = Scheme.preset("W8A16", strategy="channel")
    recipe = [
        Rule([EXPERTS], G32),
        Rule(["re:.*shared_experts\\..*_proj"], wide),
        Rule(["re:.*layers\\.0\\.mlp\\..*"], None),
        Rule(["Linear"], "W8A8"),
    ]
    rows = rows_of(lockstep.prepare(model, recipe, ignore=["lm_head", "re:.*self_attn.*"]))
    assert rows["model.layers.1.mlp.experts"].scheme == G32
    assert rows["model.layers.1.mlp.experts"].kind == "DeepseekV3Experts"
    assert rows["model.layers.1.mlp.shared_experts.down_proj"].scheme == wide
    assert rows["model.layers.0.mlp.down_proj"].scheme is None
    assert "left as it is by the rule" in rows["model.layers.0.mlp.down_proj"].reason
    assert "ignored" in rows["model.layers.1.self_attn.o_proj"].reason
    lockstep.unprepare(model)
    recipe[-1] = Rule(["re:.*self_attn.*_proj"], wide)
    assert rows_of(lockstep.prepare(model, recipe))["model.layers.1.self_attn.o_proj"].scheme == wide


@pytest.mark.parametrize("targets", ["MixtralExperts", EXPERTS, "Linear"])
def test_experts_are_named_by_their_class_by_a_regex_or_as_linear_layers(targets):
    report = lockstep.prepare(tiny_moe("mixtral"), G32, targets=targets)
    named = {row.name for row in report.quantized if "experts" in row.name}
    assert named == {f"model.layers.{n}.mlp.experts" for n in (0, 1)}
    assert (len(report.quantized) > 2) == (targets == "Linear")


def test_experts_that_no_rule_names_are_warned_of_and_those_ignored_are_not():
    model = tiny_moe("mixtral")
    with pytest.warns(UserWarning, match=r"3\d% of the parameters stay as they are in modules that no rule names"):
        report = lockstep.prepare(model, G32, targets="model.layers.1.mlp.experts")
    assert [row.name for row in report.quantized] == ["model.layers.1.mlp.experts"]
    assert rows_of(report)["model.layers.0.mlp.experts"].overlooked
    lockstep.unprepare(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = lockstep.prepare(model, G32, ignore=["lm_head", EXPERTS])
    assert not [*quantized_experts(model)]
    assert rows_of(report)["model.layers.0.mlp.experts"].reason == f"ignored by {EXPERTS!r}"
    assert not rows_of(report)["model.layers.0.mlp.experts"].overlooked


class DbrxLike(nn.Module):
    """Experts that `prepare` does not know: their weights are read by another module."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(4, 64, 96))
        self.w2 = nn.Parameter(torch.randn(4, 96, 64))


def test_experts_of_another_kind_are_reported_with_their_share():
    model = nn.ModuleDict({"attention": nn.Linear(64, 64), "ffn": DbrxLike(), "norm": nn.LayerNorm(64)})
    total = sum(parameter.numel() for parameter in model.parameters())
    with pytest.warns(UserWarning, match=r"9\d% of the parameters stay as they are .*ffn \(DbrxLike\)"):
        report = lockstep.prepare(model, G32)
    assert [row.name for row in report.overlooked] == ["ffn"]
    assert report.share(report.overlooked) == pytest.approx(2 * 4 * 64 * 96 / total)
    assert f"1 DbrxLike ({2 * 4 * 64 * 96 / total:.1%} of the parameters)" in str(report)
    lockstep.unprepare(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not lockstep.prepare(model, G32, ignore=["ffn"]).overlooked


REFUSED = {
    "static inputs": ("FP8", {}, ValueError, r"mlp\.experts holds fused experts, .* measured range.*FP8_DYNAMIC"),
    "NVFP4": ("NVFP4", {}, ValueError, r"mlp\.experts holds fused experts, .* measured range"),
    "learned scales": (G32, {"learned_scales": True}, ValueError, r"mlp\.experts holds fused experts, whose scales"),
    "groups": (
        grouped(64),
        {},
        ValueError,
        r"^model\.layers\.0\.mlp\.experts\.down_proj of shape \(4, 64, 96\): 96 .*64.* Or name the module in ignore",
    ),
    "forward": (G32, {}, TypeError, r"experts has a forward of its own set on the instance"),
    "dtype": (G32, {}, TypeError, r"experts\.gate_up_proj needs weights in .*, found torch\.float64"),
}


@pytest.mark.parametrize(("scheme", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_experts_cannot_train_as_is_refused_by_name_and_nothing_is_changed(
    request, scheme, options, error, message
):
    model = tiny_moe("mixtral")
    case = request.node.callspec.id
    if case == "forward":
        experts_of(model)[0].forward = lambda *_: None
    if case == "dtype":
        experts_of(model)[0].double()
    with pytest.raises(error, match=message):
        lockstep.prepare(model, scheme, targets=EXPERTS, **options)
    assert not [*quantized_experts(model)]


def test_shards_of_experts_are_refused_in_the_forward():
    """Tensor and expert parallelism shard them so; FSDP2 gathers them before."""
    from torch.distributed.tensor import DTensor

    module = alone(layer())

    class Sharded(DTensor):
        pass

    fake = torch.Tensor._make_subclass(Sharded, module.down_proj.detach())
    vars(module)["_parameters"] = {**module._parameters, "down_proj": fake}
    with pytest.raises(ValueError, match=r"experts\.down_proj is sharded in its forward"):
        module(*routed())


# Aligned with what was exported --------------------------------------------------------------------------------------

BATCH = {"input_ids": token_ids(2, 8)}
ALIGNED = {
    **{kind: (kind, "grouped_mm", G32) for kind in KINDS if kind != "gpt_oss"},
    "llama4_text": ("llama4_text", "eager", G32),
    "eager": ("mixtral", "eager", G32),
    "batched_mm": ("qwen3_moe", "batched_mm", G32),
    **{f"mixtral {name}": ("mixtral", "grouped_mm", name) for name in ("W8A8", "FP8_DYNAMIC", "NVFP4A16", "MXFP4A16")},
    "llama4_text channel": ("llama4_text", "eager", channel()),
    "qwen2_moe recipe": ("qwen2_moe", "grouped_mm", [Rule([EXPERTS], G32), Rule(["Linear"], "W8A8")]),
}


@pytest.mark.parametrize(("kind", "implementation", "scheme"), ALIGNED.values(), ids=ALIGNED)
def test_what_was_exported_is_aligned_to_the_bit(tmp_path, kind, implementation, scheme):
    """Each projection of each expert on its own tokens, and the logits, in whichever implementation trained.

    `eager` too, since the sum of two has no other rounding than the last.
    """
    model = prepared(moe(kind, implementation), scheme)
    report = compare(model, lockstep.export.save_pretrained(model, tmp_path / "out"), BATCH)
    report.assert_aligned(min_equal=1.0, max_difference=0.0, max_mean_logprob_difference=0.0)
    assert report.end_to_end.max_logit_difference == 0
    rows = [row for row in report.layers if ".experts." in row.name]
    assert len(rows) == 4 * len([*quantized_experts(model)]) * (2 if kind == "nemotron_h" else 3)
    tokens = sum(row.outputs // row.shape[0] for row in rows if row.name.endswith(("down_proj", "w2")))
    top_k = 4 if kind == "llama4_text" else 2  # which gives every expert a row for every token
    assert tokens == 16 * top_k * len([*quantized_experts(model)])


def test_the_sum_of_eager_is_told_from_the_engines(tmp_path):
    """Its experts are aligned, its sum of more than two rounds after each addition."""
    gaps = {}
    for implementation in ("eager", "grouped_mm"):
        model = prepared(moe("mixtral", implementation, num_experts_per_tok=4), G32)
        path = lockstep.export.save_pretrained(model, tmp_path / implementation)
        report = compare(model, path, BATCH)
        report.assert_aligned(min_equal=1.0, max_difference=0.0)
        gaps[implementation] = report.end_to_end.max_logit_difference
    assert gaps["grouped_mm"] == 0 < gaps["eager"] < 0.05


def swap(one: str, other: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for suffix in ("weight_packed", "weight_scale", "weight_shape"):
            a, b = f"{one}.{suffix}", f"{other}.{suffix}"
            tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


def flip(tensors: dict[str, Tensor]) -> None:
    tensors[f"{W1}.weight_packed"][3, 4] ^= 1


def transpose(tensors: dict[str, Tensor]) -> None:
    tensors[f"{W2}.weight_scale"] = tensors[f"{W2}.weight_scale"].T


def forget(tensors: dict[str, Tensor]) -> None:
    for suffix in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[f"{W2}.{suffix}"]


def reroute(tensors: dict[str, Tensor]) -> None:
    tensors[ROUTER][[0, 1]] = tensors[ROUTER][[1, 0]]


BLOCK = "model.layers.1.block_sparse_moe"
ROUTER = f"{BLOCK}.gate.weight"
W1, W3, W2 = (f"{BLOCK}.experts.2.{part}" for part in ("w1", "w3", "w2"))
FAULTS = {
    "one bit": (flip, {W1: r"^1 of 6144 codes differ, first at \[3, 32\]"}),
    "swapped experts": (
        swap(W2, f"{BLOCK}.experts.0.w2"),
        {W2: r"^holds the weight of .*experts\.0\.w2$", f"{BLOCK}.experts.0.w2": r"^holds the weight of .*\.2\.w2$"},
    ),
    "gate and up": (swap(W1, W3), {W1: rf"^holds the weight of {W3}$", W3: rf"^holds the weight of {W1}$"}),
    "transposed scales": (transpose, {W2: r"scales are transposed: \[3, 64\] instead of \[64, 3\]"}),
    "missing": (forget, {W2: "weight_packed|no tensor"}),
    "router": (reroute, {ROUTER: r"values differ from the trained ones"}),
}


@pytest.mark.parametrize(("damage", "guilty"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found_in_the_expert_that_has_it(tmp_path, damage, guilty):
    model = prepared(moe("mixtral"), G32)
    path = lockstep.export.save_pretrained(model, tmp_path / "out")
    edit_tensors(path, damage)
    report = compare(model, path, BATCH)
    assert not report.aligned
    problems = {row.name: row.problem for row in report.layers if row.problem} | report.plain_problems
    assert problems.keys() == guilty.keys()
    for name, message in guilty.items():
        assert re.search(message, problems[name]), problems[name]


def test_a_fault_without_its_words_wrong_shows_in_the_outputs(tmp_path):
    """Weights that moved on after the export: every layer names itself, and the outputs of experts differ."""
    model = prepared(moe("mixtral"), G32)
    path = lockstep.export.save_pretrained(model, tmp_path / "out")
    with torch.no_grad():
        experts_of(model)[1].down_proj[2] *= 1.5
    report = compare(model, path, BATCH)
    (wrong,) = [row for row in report.layers if row.problem]
    assert wrong.name == W2
    assert wrong.equal < 0.5
    assert all(row.equal == 1 for row in report.layers if row is not wrong)
    assert report.end_to_end.max_logit_difference > 0
    printed = re.findall(r"experts\.(\S+?)\.(w\d)(?:  (x\d))? +│", str(report))
    assert [row for row in printed if row[1] == "w2"] == [("*", "w2", "x4"), ("*", "w2", "x3"), ("2", "w2", "")]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_layers_around_experts_are_calibrated(tmp_path, dtype):
    """Static FP8 in attention, dynamic in experts: the one measured, the other as it trains."""
    model = moe("mixtral", dtype=dtype)
    recipe = [Rule(["re:.*self_attn.*_proj"], "FP8"), Rule([EXPERTS], "FP8_DYNAMIC")]
    lockstep.prepare(model, recipe)
    report = lockstep.calibrate(model, BATCH, progress=False)
    assert {row.name.rpartition(".")[2] for row in report.rows} == {f"{one}_proj" for one in "qkvo"}
    path = lockstep.export.save_pretrained(model, tmp_path / "out")
    compare(model, path, BATCH).assert_aligned(min_equal=1.0, max_difference=0.0)


def test_a_cache_is_calibrated_where_experts_alone_are_prepared():
    """fp32 masters under autocast to what is served, as they train."""
    model = prepared(moe("mixtral", dtype=FP32), G32, targets=EXPERTS)
    seen = []
    experts_of(model)[0].register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    prepare_kv_cache(model, "fp8")
    assert len(lockstep.calibrate(model, BATCH, progress=False).kv_scales) == 4
    assert seen == [True]
