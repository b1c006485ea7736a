"""What layers keep between passes: never a stale weight, whoever changes the master, and fewer quantizations.

The oracle is the same model without reuse: outputs, gradients and masters must be equal bit for bit.
"""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import ranks
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lockstep
from lockstep import Scheme, TensorSpec, kernels
from lockstep.kernels import reference
from lockstep.qat import QATLinear
from lockstep.qat.prepare import quantized_modules
from lockstep.qat.reuse import drop

K, N = 64, 32
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPECS = {"grouped": TensorSpec(group_size=32), "channel": TensorSpec(strategy="channel")}

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
every_reuse = pytest.mark.parametrize("reuse", ["codes", "weight"])


class Mlp(nn.Module):
    """Two layers, of which the first has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, N)
        self.second = nn.Linear(N, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def model_of(spec: TensorSpec = SPECS["grouped"], reuse: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Mlp:
    """The same weights each time."""
    torch.manual_seed(0)
    model = Mlp().to(dtype)
    lockstep.prepare(model, Scheme(spec), reuse=reuse)
    return model


def batch(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(5, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def passed(model: nn.Module, x: Tensor, call: Callable | None = None) -> dict[str, Tensor]:
    """The output of `model` and all gradients so far, by name."""
    x = x.clone().requires_grad_()
    y = model(x) if call is None else call(x)
    y.float().square().sum().backward()
    found = {"output": y.detach(), "input": x.grad}
    return found | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def assert_follows(model: nn.Module, x: Tensor | None = None) -> None:
    """What `model` computes is what its masters say now, as a copy without reuse has it. Then gradients are dropped."""
    x = batch(dtype=next(model.parameters()).dtype) if x is None else x
    fresh = copy.deepcopy(model)
    for _, layer in quantized_modules(fresh):
        layer.kept = None
    model.zero_grad()
    fresh.zero_grad()
    assert_same(passed(model, x), passed(fresh, x))
    model.zero_grad()


@pytest.fixture
def calls(monkeypatch) -> Iterator[Counter]:
    """How often each function of the quantizer was called."""
    counter: Counter = Counter()

    class Counting:
        def __getattr__(self, name: str):
            function = getattr(reference, name)

            def counted(*args, **options):
                counter[name] += 1
                return function(*args, **options)

            return counted

    monkeypatch.setattr(kernels, "training", lambda spec, device: Counting())
    return counter


def quantizations(calls: Counter) -> int:
    return sum(count for name, count in calls.items() if name != "dequantize_packed")


# The same numbers ----------------------------------------------------------------------------------------------------


def through_data(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer of one's own, that writes where PyTorch counts no version."""

    class ThroughData(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__(parameters, {})

        def step(self) -> None:
            for parameter in parameters:
                parameter.data.add_(parameter.grad, alpha=-0.1)

    return ThroughData()


OPTIMIZERS = {
    "adamw-foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "adamw-loop": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=False),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "through-data": through_data,
}


def assert_trains_alike(plain: nn.Module, reusing: nn.Module, optimizer: Callable, steps: int) -> None:
    """Outputs and gradients of each micro-batch, and the masters after each step."""
    dtype = plain.first.weight.dtype
    before = plain.first.weight.detach().clone()
    steppers = [optimizer(list(model.parameters())) for model in (plain, reusing)]
    for step in range(steps):
        for micro_batch in range(2):
            x = batch(10 * step + micro_batch, dtype)
            assert_same(passed(reusing, x), passed(plain, x))
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        assert_same(reusing.state_dict(), plain.state_dict())
    assert not torch.equal(plain.first.weight, before)


@every_spec
@every_reuse
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_training_gives_the_same_bits_as_without_reuse(spec, reuse, optimizer, dtype):
    """Whatever the optimizer, and however it writes."""
    assert_trains_alike(model_of(spec, None, dtype), model_of(spec, reuse, dtype), optimizer, steps=3)


@every_spec
@every_reuse
@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
def test_training_on_fused_kernels_gives_the_same_bits_as_on_the_reference_without_reuse(monkeypatch, spec, reuse):
    """Pack and unpack instead of quantizing, and no bit of the model changes."""
    plain, reusing = model_of(spec).to(DEVICE), model_of(spec, reuse).to(DEVICE)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (plain, reusing)]
    for step in range(2):
        for micro_batch in range(2):
            x = batch(10 * step + micro_batch).to(DEVICE)
            monkeypatch.setenv("LOCKSTEP_KERNEL", "reference")
            expected = passed(plain, x)
            monkeypatch.setenv("LOCKSTEP_KERNEL", "triton")
            assert_same(passed(reusing, x), expected)
        for optimizer in optimizers:
            optimizer.step()


@every_spec
@every_reuse
def test_mixed_precision_gives_the_same_bits_as_without_reuse(spec, reuse):
    """fp32 masters under bf16 autocast."""
    plain, reusing = model_of(spec, None, torch.float32), model_of(spec, reuse, torch.float32)
    for seed in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(
                passed(reusing, batch(seed, torch.float32)),
                passed(plain, batch(seed, torch.float32)),
            )


@every_reuse
def test_a_planted_stale_value_is_seen(reuse):
    """Or the tests of this file could not fail."""
    model, other = model_of(reuse=reuse), model_of(reuse=reuse)
    with torch.no_grad():
        other.first.weight.mul_(-1)
    passed(model, batch())
    passed(other, batch())
    model.first.kept._entry = (*model.first.kept._entry[:-1], other.first.kept._entry[-1])
    with pytest.raises(AssertionError, match="output"):
        assert_follows(model)


# Fewer quantizations -------------------------------------------------------------------------------------------------


@every_spec
@pytest.mark.parametrize(("reuse", "expected"), [("codes", 2), ("weight", 2), (None, 16)])
def test_a_layer_quantizes_once_for_all_micro_batches_of_a_step(spec, reuse, expected, calls):
    """What reuse is for: two layers, forward and backward of four micro-batches."""
    model = model_of(spec, reuse)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in (1, 2):
        for micro_batch in range(4):
            passed(model, batch(micro_batch))
        assert quantizations(calls) == step * expected
        optimizer.step()


@every_reuse
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@every_spec
def test_activation_checkpointing_recomputes_from_the_kept_value(spec, reuse, use_reentrant, calls):
    model, plain = model_of(spec, reuse), model_of(spec)
    found = passed(model, batch(), lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    # The first pass of the reentrant kind records no gradients, and such a pass keeps nothing.
    assert quantizations(calls) == (4 if use_reentrant else 2)
    assert_same(found, passed(plain, batch()))


@every_reuse
def test_passes_without_gradients_neither_read_nor_keep(reuse, calls):
    """Libraries swap averaged weights in through ``.data`` for a validation, some of them in train mode."""
    model, plain = model_of(reuse=reuse), model_of()
    model(batch()).sum().backward()
    model.zero_grad()
    averaged = {name: parameter * 0.5 for name, parameter in plain.state_dict().items()}
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data.copy_(averaged[name])
    plain.load_state_dict(averaged)
    with torch.no_grad():
        assert torch.equal(model(batch()), plain(batch()))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(own[name])
    plain.load_state_dict(own)
    assert_same(passed(model, batch()), passed(plain, batch()))


@every_reuse
def test_second_forward_of_a_step_sees_what_its_closure_changed(reuse):
    """Sharpness-aware optimizers move the weights, through ``.data``, between two passes of one step."""

    class Moving(torch.optim.SGD):
        def step(self, closure):
            closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(1.5)
            return closure()

    losses = []
    for chosen in (reuse, None):
        model = model_of(reuse=chosen)
        model(batch()).sum().backward()
        losses.append(Moving(model.parameters(), lr=0.1).step(lambda model=model: model(batch()).square().sum()).item())
    assert losses[0] == losses[1]


@every_reuse
def test_drop_follows_a_write_that_pytorch_does_not_count(reuse):
    model, plain = model_of(reuse=reuse), model_of()
    model(batch()).sum().backward()
    model.zero_grad()
    for parameter in (*model.parameters(), *plain.parameters()):
        parameter.data.mul_(2)
    drop(model)
    assert_same(passed(model, batch()), passed(plain, batch()))


@every_reuse
def test_moving_a_layer_or_evaluating_frees_what_it_kept(reuse):
    for leave in (lambda model: model.to(torch.float32), lambda model: model.eval()):
        model = model_of(reuse=reuse)
        model(batch()).sum().backward()
        leave(model)
        assert model.first.kept._entry is None


@every_reuse
def test_frozen_layers_quantize_once_in_all(reuse, calls):
    """LoRA trains adapters around masters that never change... until an optimizer steps, whosoever's it is."""
    model = model_of(reuse=reuse).requires_grad_(False)
    for seed in range(3):
        model(batch(seed).requires_grad_()).sum().backward()
    assert quantizations(calls) == 2


@every_reuse
@every_spec
def test_evaluation_neither_reads_nor_keeps(spec, reuse, calls):
    """Moving averages swap weights in and out through ``.data`` to validate, which no version counts."""
    model, plain = model_of(spec, reuse), model_of(spec)
    model.eval()
    with torch.no_grad():
        expected = plain(batch())
        calls.clear()
        assert torch.equal(model(batch()), expected)
        assert model.first.kept._entry is None
        model(batch())
    assert quantizations(calls) == 4

    model.train()
    trained = model(batch())
    master = model.first.weight.data.clone()
    model.eval()
    model.first.weight.data.copy_(-master)
    plain.first.weight.data.copy_(-master)
    assert torch.equal(model(batch()), plain(batch()))
    model.first.weight.data.copy_(master)
    model.train()
    assert torch.equal(model(batch()), trained)


# When it is dropped --------------------------------------------------------------------------------------------------


def in_place(model: Mlp) -> None:
    with torch.no_grad():
        model.first.weight.copy_(-model.first.weight)


def added(model: Mlp) -> None:
    with torch.no_grad():
        model.first.weight.add_(0.5)


def through_a_view(model: Mlp) -> None:
    with torch.no_grad():
        model.first.weight[3].neg_()


def detached(model: Mlp) -> None:
    model.first.weight.detach().neg_()


def initialised(model: Mlp) -> None:
    nn.init.normal_(model.first.weight)


def loaded(model: Mlp) -> None:
    model.load_state_dict({name: -tensor for name, tensor in model.state_dict().items()})


def loaded_by_assignment(model: Mlp) -> None:
    model.load_state_dict({name: -tensor for name, tensor in model.state_dict().items()}, assign=True)


def set_anew(model: Mlp) -> None:
    model.first.weight = nn.Parameter(-model.first.weight.detach())


def set_in_the_same_memory(model: Mlp) -> None:
    """As FSDP does it: storage and version are what they were."""
    weight = model.first.weight
    weight.data.neg_()
    model.first.weight = weight


def swapped_data(model: Mlp) -> None:
    model.first.weight.data = -model.first.weight.data


def another_dtype(model: Mlp) -> None:
    model.to(torch.float32)
    model.first.weight.data.mul_(1.01)


def half_and_back(model: Mlp) -> None:
    model.to(torch.float32).to(torch.bfloat16)


def moved(model: Mlp) -> None:
    state = {name: -tensor for name, tensor in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu").load_state_dict(state)


def tied(model: Mlp) -> None:
    other = model_of(reuse=model.first.kept.what)
    model.first.weight = other.first.weight
    passed(model, batch())
    with torch.no_grad():
        other.first.weight.neg_()


def stepped(model: Mlp) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    passed(model, batch())
    optimizer.step()


def stepped_in_a_subclass(model: Mlp) -> None:
    passed(model, batch())
    through_data(list(model.parameters())).step()


def told(model: Mlp) -> None:
    model.first.weight.data.neg_()
    model.first.kept.drop()


CHANGES = [
    *(in_place, added, through_a_view, detached, initialised, loaded, loaded_by_assignment, set_anew),
    *(set_in_the_same_memory, swapped_data, another_dtype, half_and_back, moved, tied, stepped),
    *(stepped_in_a_subclass, told),
]


@every_spec
@every_reuse
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_master_is_quantized_anew(spec, reuse, change):
    """A stale weight trains on in silence, and the export is of another model."""
    model = model_of(spec, reuse)
    passed(model, batch())
    assert model.first.kept._entry is not None
    change(model)
    assert_follows(model)


@every_spec
@every_reuse
def test_weights_handed_in_for_one_call_are_quantized_anew(spec, reuse):
    """``functional_call`` with weights of the moment: the next ones may lie where the last ones did."""
    model, plain = model_of(spec, reuse), model_of(spec)

    def output(model: nn.Module, seed: int) -> Tensor:
        noise = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).bfloat16()
        return torch.func.functional_call(model, {"first.weight": model.first.weight + noise}, batch())

    with torch.no_grad():
        found, expected = ([output(each, seed) for seed in range(8)] for each in (model, plain))
    assert all(map(torch.equal, found, expected))
    assert_follows(model)


@every_reuse
def test_a_change_between_forward_and_backward_is_an_error_as_without_reuse(reuse):
    """Autograd guards the master that the backward reads again."""
    model = model_of(reuse=reuse)
    y = model(batch().requires_grad_())
    with torch.no_grad():
        model.second.weight.neg_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_reuse
def test_ddp_gives_the_same_bits_as_without_reuse(reuse, tmp_path):
    """Its gradients are views of buckets, and the optimizer writes the module's own masters."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        models = [nn.parallel.DistributedDataParallel(model_of(reuse=kind)) for kind in (reuse, None)]
        optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
        for step in range(3):
            reusing, plain = models
            with reusing.no_sync(), plain.no_sync():
                assert_same(passed(reusing, batch(step)), passed(plain, batch(step)))
            assert_same(passed(reusing, batch(step + 10)), passed(plain, batch(step + 10)))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    finally:
        torch.distributed.destroy_process_group()


# FSDP2, in two processes ---------------------------------------------------------------------------------------------

RANK = """
import itertools
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import test_reuse as tests

torch.set_num_threads(1)


def sharded(reuse, spec, reshard):
    model = tests.model_of(spec, reuse)
    for part in (model.first, model.second, model):
        fully_shard(part, reshard_after_forward=reshard)
    return model


def passed(model, seed):
    y = model(tests.batch(seed))
    y.float().square().sum().backward()
    grads = (parameter.grad for parameter in model.parameters())
    return [y.detach(), *(grad.to_local().clone() for grad in grads if grad is not None)]


def compare(models, seed, what):
    found, expected = (passed(model, seed) for model in models)
    assert all(map(torch.equal, found, expected)), f"stale {what}"
    return found[0]


def change(models, data):
    with torch.no_grad():
        for parameter in itertools.chain(*(model.parameters() for model in models)):
            local = parameter.to_local()
            (local.data if data else local).mul_(2)


def check(reuse, spec, reshard):
    models = [sharded(reuse, spec, reshard), sharded(None, spec, reshard)]
    outputs = [compare(models, 0, "at first"), compare(models, 0, "in the second pass")]
    assert torch.equal(*outputs)
    for data in (False, True):  # the sharded master changes, without an optimizer
        for gathers in (0, 1, 2):  # and the weight is gathered as often before the next pass
            change(models, data)
            for _ in range(gathers):
                for model in models:
                    for part in (model.first, model.second):
                        part.unshard()
                        part.reshard()
            outputs.append(compare(models, 0, f"after a change of the shards, data={data}, {gathers} gathers"))
            assert not torch.equal(outputs[-1], outputs[-2])
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    for step in range(3):
        for model in models:
            model.set_requires_gradient_sync(False)
        compare(models, step, f"in the first micro-batch of step {step}")
        for model in models:
            model.set_requires_gradient_sync(True)
        compare(models, step + 10, f"in the second micro-batch of step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


dist.init_process_group("gloo")
for reuse, spec, reshard in itertools.product(("codes", "weight"), tests.SPECS.values(), (True, False)):
    try:
        check(reuse, spec, reshard)
    except Exception as error:
        raise RuntimeError(f"{reuse}, {spec}, reshard={reshard}") from error
dist.destroy_process_group()
print("equal")
"""


def test_fsdp_weights_that_are_gathered_anew_are_quantized_anew(tmp_path):
    """Gathering writes where the weight was, with the version it had: nothing but the setting of it can be seen."""
    assert [output.split() for output in ranks.run(RANK, tmp_path)] == [["equal"], ["equal"]]


# Copies, memory ------------------------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_spec
@every_reuse
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_come_empty_and_compute_the_same(spec, reuse, copied):
    """A moving average's copy has masters of its own, and a checkpoint must not hold the codes too."""
    model = model_of(spec, reuse)
    expected = passed(model, batch())
    model.zero_grad()
    twin = copied(model)
    assert (twin.first.kept.what, twin.first.kept._entry) == (reuse, None)
    assert twin.first.kept is not model.first.kept
    assert_same(passed(twin, batch()), expected)
    twin.first.weight.data.neg_()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert_follows(twin)
    assert_follows(model)


def test_nothing_is_added_to_the_state_dict():
    model = model_of(reuse="codes")
    passed(model, batch())
    assert list(model.state_dict()) == list(Mlp().state_dict())
    assert [name for name, _ in model.named_buffers()] == []


@pytest.mark.parametrize(("reuse", "share"), [("codes", 0.5 + 2 / 32), ("weight", 2)])
def test_memory_kept_is_what_the_documentation_says_and_freed_at_the_step(reuse, share):
    """Half a byte a weight and its scales, or two bytes; none of it is there while the optimizer's states grow."""
    model = model_of(reuse=reuse)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    passed(model, batch())
    tensors = [tensor for tensor in model.first.kept._entry[-1] if tensor is not None]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == share * model.first.weight.numel()
    assert not any(tensor.requires_grad for tensor in tensors)
    alive = [weakref.ref(tensor) for tensor in tensors]
    del tensors
    optimizer.step()
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)


@every_reuse
def test_the_old_value_is_freed_before_the_new_one_is_made(reuse, monkeypatch):
    """Else the peak holds two of them."""
    model = model_of(reuse=reuse)
    passed(model, batch())
    alive = weakref.ref(model.first.kept._entry[-1][0])
    seen = []
    with torch.no_grad():
        model.first.weight.neg_()
    model.first.kept.of(model.first.weight, lambda: seen.append(alive()) or ())
    assert seen == [None]


def test_a_dropped_model_is_not_kept_alive():
    """The optimizer hook of the process knows every layer; it must not own them."""
    model = model_of(reuse="codes")
    kept, weight = weakref.ref(model.first.kept), weakref.ref(model.first.weight)
    del model
    gc.collect()
    assert (kept(), weight()) == (None, None)


# Compilers -----------------------------------------------------------------------------------------------------------


@every_reuse
def test_a_whole_graph_with_reuse_is_refused_with_the_reason(reuse):
    """Compiled in, the first batch's codes would be every batch's."""
    model = torch.compile(model_of(reuse=reuse), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="whether the kept weight is still the master's"):
        model(batch())


@every_spec
@every_reuse
def test_a_compiled_model_follows_its_masters(spec, reuse):
    """Reuse breaks the graph; what is left of it computes the same bits, step after step."""
    torch._dynamo.reset()
    model, plain = model_of(spec, reuse), model_of(spec)
    compiled = torch.compile(model)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.1) for each in (model, plain)]
    for step in range(3):
        assert_same(passed(model, batch(step), compiled), passed(plain, batch(step)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


# Asked for, and refused ----------------------------------------------------------------------------------------------


@every_reuse
def test_zero_3_is_refused_with_the_reason(reuse):
    """DeepSpeed gathers weights behind PyTorch's back."""
    model = model_of(reuse=reuse)
    model.first.weight.ds_id = 7
    with pytest.raises(ValueError, match=r"cannot be proved safe under DeepSpeed ZeRO-3.*prepare without reuse"):
        model(batch())
    lockstep.prepare(model, Scheme(SPECS["grouped"]))
    assert torch.equal(model(batch()), model_of()(batch()))


@pytest.mark.parametrize("reuse", ["x", "", True, "Codes"])
def test_unknown_reuse_is_refused_and_changes_nothing(reuse):
    model = Mlp()
    with pytest.raises(ValueError, match=rf"reuse={reuse!r}: choose 'codes' or 'weight', or None"):
        lockstep.prepare(model, Scheme(SPECS["grouped"]), reuse=reuse)
    assert type(model.first) is nn.Linear


def test_codes_that_do_not_fill_a_word_are_refused_by_the_layers_name():
    model = nn.ModuleDict({"even": nn.Linear(64, 8), "odd": nn.Linear(36, 8)})
    scheme = Scheme(SPECS["channel"])
    with pytest.raises(ValueError, match="odd: reuse='codes' packs 8 codes in a word, not 36 inputs in a row"):
        lockstep.prepare(model, scheme, reuse="codes")
    assert type(model["even"]) is nn.Linear
    lockstep.prepare(model, scheme, reuse="weight")
    assert_follows(model["odd"], torch.randn(3, 36))


@every_reuse
def test_unprepare_leaves_nothing_kept(reuse):
    model = model_of(reuse=reuse)
    passed(model, batch())
    kept = weakref.ref(model.first.kept)
    lockstep.unprepare(model)
    gc.collect()
    assert kept() is None
    assert vars(model.first).keys() == vars(nn.Linear(1, 1)).keys()
    model.first.weight = nn.Parameter(torch.zeros(N, K))


def test_preparing_again_switches_what_is_kept():
    """A callback without reuse after a script with it: the last word counts, and the masters are the same."""
    model, scheme = model_of(reuse="codes"), Scheme(SPECS["grouped"])
    for reuse in ("weight", None, "codes", "codes"):
        passed(model, batch())
        lockstep.prepare(model, scheme, reuse=reuse)
        kept = [layer.kept for layer in (model.first, model.second)]
        assert [each and each.what for each in kept] == [reuse, reuse]
        assert all(type(layer) is QATLinear for layer in (model.first, model.second))
        assert_follows(model)
