"""`SharedInput`: q, k and v quantize the input that they share once, to the same bits, and never a stale one."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lockstep
from lockstep import kernels
from lockstep.kernels import reference
from lockstep.qat import QATLinear
from lockstep.qat.linear import SharedInput
from lockstep.qat.prepare import quantized_modules
from tests.models import tiny_llama, token_ids

DYNAMIC = ("W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "W4A8", "W4AFP8", "MXFP4", "MXFP8")
WIDTH = 128


class Projections(nn.Module):
    """The three that engines run as one layer, of an input that anything may happen to in between."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, 128, dtype=dtype) for _ in range(3))

    def forward(self, x: Tensor, between: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_proj(x)
        x = between(x)
        return q, self.k_proj(x), self.v_proj(x)


def projections(scheme: str = "FP8_DYNAMIC", shares: bool = True, dtype: torch.dtype = torch.bfloat16) -> Projections:
    module = Projections(dtype)
    lockstep.prepare(module, scheme)
    assert module.q_proj.shared_input is module.k_proj.shared_input is module.v_proj.shared_input is not None
    return module if shares else apart(module)


def apart(model: nn.Module) -> nn.Module:
    """The model with every layer quantizing for itself."""
    for _, layer in quantized_modules(model):
        layer.shared_input = None
    return model


def some(seed: int = 0, rows: int = 4, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def quantized(monkeypatch) -> list[torch.Size]:
    """The shape of every input that was quantized."""
    seen: list[torch.Size] = []

    class Counting:
        def __init__(self, kernel: object) -> None:
            self.kernel = kernel

        def __getattr__(self, name: str):  # the kernel's own operators
            return getattr(self.kernel, name)

        def quantize_activations(self, x: Tensor, *rest: object):
            seen.append(x.shape)
            return self.kernel.quantize_activations(x, *rest)

    training = kernels.training
    monkeypatch.setattr(kernels, "training", lambda scheme, device: Counting(training(scheme, device)))
    return seen


def alike(one: Iterator[Tensor] | tuple[Tensor, ...], other: Iterator[Tensor] | tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("scheme", DYNAMIC)
@pytest.mark.parametrize("train", [True, False])
def test_a_llama_quantizes_each_input_once_and_computes_the_same_bits(quantized, scheme, train):
    """Two layers: q/k/v and gate/up see one input each, o and down their own."""
    results = []
    for shares in (True, False):
        model = tiny_llama()
        lockstep.prepare(model, scheme)
        if not shares:
            apart(model)
        quantized.clear()
        with torch.set_grad_enabled(train):
            out = model(token_ids(), labels=token_ids())
        assert len(quantized) == 2 * (4 if shares else 7)
        if train:
            out.loss.backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        results.append((out.logits, *grads))
        assert bool(grads) is train
        left = [layer.shared_input._entry for _, layer in quantized_modules(model) if layer.shared_input]
        assert left == [None] * len(left)  # codes are not kept for a layer that does not come
    assert alike(*results)


def changed_in_place(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.mul_(2)


def changed_through_a_view(x: Tensor) -> Tensor:
    x.detach()[0].fill_(3)
    return x


def another_with_the_same_memory(x: Tensor) -> Tensor:
    return x.detach().view_as(x)


def another_that_was_equal(x: Tensor) -> Tensor:
    return x.clone()


def swapped(x: Tensor) -> Tensor:
    return x.flip(0)


@pytest.mark.parametrize(
    "between",
    [changed_in_place, changed_through_a_view, another_with_the_same_memory, another_that_was_equal, swapped],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_an_input_that_changed_between_the_siblings_is_quantized_again(between, mode):
    """Stale codes would train on numbers that no engine computes, in silence."""
    outputs = []
    for shares in (True, False):
        with mode():
            outputs.append(projections(shares=shares)(some(), between))
    assert alike(*outputs)


def test_a_tensor_at_the_place_of_one_that_is_gone_is_another_tensor(quantized):
    """Python and the allocator give addresses away again."""
    module, expected = projections(), projections(shares=False)
    memory, places = bytearray(4 * WIDTH * 2), set()
    for seed in range(6):
        memory[:] = some(seed).view(torch.uint8).numpy().tobytes()
        x = torch.frombuffer(memory, dtype=torch.bfloat16).view(4, WIDTH)
        places.add((id(x), x.data_ptr(), x._version))
        with torch.no_grad():
            assert torch.equal(module.q_proj(x), expected.q_proj(x))  # k and v never come
        del x
    assert len(places) < 6
    assert len(quantized) == 2 * 6


def test_autocast_to_another_dtype_between_the_siblings_is_another_input():
    """fp32 and bf16 have different codes."""
    x = some(dtype=torch.float32)
    outputs = []
    for shares in (True, False):
        module = projections(shares=shares, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            q = module.q_proj(x)
        outputs.append((q, module.k_proj(x), module.v_proj(x)))
    assert [out.dtype for out in outputs[0]] == [torch.bfloat16, torch.float32, torch.float32]
    assert alike(*outputs)


def test_inference_mode_quantizes_for_each_since_its_tensors_have_no_version(quantized):
    module = projections()
    with torch.inference_mode():
        module(some())
    assert len(quantized) == 3
    assert module.q_proj.shared_input._entry is None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rounds", [1, 2])
def test_activation_checkpointing_gives_the_same_gradients(reentrant, rounds):
    results = []
    for shares in (True, False):
        module, x = projections(shares=shares), some().requires_grad_()
        hidden = x
        for _ in range(rounds):
            q, k, v = checkpoint(module, hidden, use_reentrant=reentrant)
            hidden = q * k + v
        hidden.float().square().sum().backward()
        results.append((x.grad, *(parameter.grad for parameter in module.parameters())))
        assert not shares or module.q_proj.shared_input._entry is None
    assert alike(*results)


def test_a_checkpointed_llama_gives_the_same_gradients():
    results = []
    for shares in (True, False):
        model = tiny_llama().train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        lockstep.prepare(model, "W8A8")
        if not shares:
            apart(model)
        model(token_ids(), labels=token_ids()).loss.backward()
        results.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert results[0]
    assert alike(*results)


def test_threads_that_share_a_model_get_their_own_codes():
    """DataParallel replicas and servers in one process."""
    module, expected = projections(), projections(shares=False)
    inputs = [some(seed, rows=64) for seed in range(2)]
    wanted = [expected(x) for x in inputs]
    wrong: list[int] = []
    start = threading.Barrier(2)

    def run(number: int) -> None:
        start.wait()
        for _ in range(30):
            if not alike(module(inputs[number]), wanted[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_among_themselves_and_not_with_the_original(quantized, copied):
    """Made between two siblings, when codes are held. Codes are weakly tied to their input, which no pickle takes."""
    module, x = projections(), some()
    module.q_proj(x)
    again = copied(module)
    assert again.q_proj.shared_input is again.v_proj.shared_input is not module.q_proj.shared_input
    assert again.q_proj.shared_input._entry is None
    assert again.q_proj.shared_input.layers == 3
    quantized.clear()
    assert alike(again(x), projections(shares=False)(x))
    assert len(quantized) == 1 + 3


@pytest.mark.parametrize(("shares", "times"), [(True, 1), (False, 3)])
def test_what_is_saved_for_the_backward_is_counted_once(shares, times):
    """Codes and scales of one input, one byte a number, for three layers."""
    module, x = projections(shares=shares), some(rows=32)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = module(x)
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    codes = [tensor for place, tensor in saved.items() if place not in weights]
    assert sum(tensor.untyped_storage().nbytes() for tensor in codes) == times * (32 * WIDTH + 32 * 4)
    assert all(torch.float8_e4m3fn == tensor.dtype for tensor in codes if tensor.numel() > 32)
    sum(out.float().sum() for out in outputs).backward()


def test_nothing_is_held_after_the_last_sibling():
    """Not the codes, and at no time the input."""
    import weakref

    module, x = projections(), some()
    with torch.no_grad():
        module.q_proj(x)
        codes = weakref.ref(module.q_proj.shared_input._entry[2].codes)
        module.k_proj(x)
        assert codes() is not None
        module.v_proj(x)
    assert codes() is None
    with torch.no_grad():
        module.q_proj(x)
    seen = weakref.ref(x)
    del x
    assert seen() is None


def test_alone_quantized_layers_and_static_ranges_share_nothing():
    """One layer has nobody to share with; static scales are each layer's own."""
    module = Projections()
    lockstep.prepare(module, "W8A8", targets=["q_proj"])
    assert module.q_proj.shared_input is None
    static = projections("FP8")
    for number, layer in enumerate((static.q_proj, static.k_proj, static.v_proj)):
        layer.input_scale.fill_(0.01 * (number + 1))
    scheme, x = static.q_proj.scheme, some()
    with torch.no_grad():
        for layer, out in zip((static.q_proj, static.k_proj, static.v_proj), static(x), strict=True):
            assert isinstance(layer, QATLinear)
            assert torch.equal(out, reference.linear(x, layer.quantize(), scheme, layer.bias, layer.input_scale))


def test_switching_the_scheme_leaves_no_codes_of_the_old_one():
    module, x = projections("W8A8"), some()
    module.q_proj(x)
    lockstep.unprepare(module)
    assert not any(isinstance(value, SharedInput) for layer in module.children() for value in vars(layer).values())
    lockstep.prepare(module, "FP8_DYNAMIC")
    assert alike(module(x), projections(shares=False)(x))
