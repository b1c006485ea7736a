"""`align.decompose`: each link against forwards made another way, and the sum of the links against the whole gap."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from models import prepared, tiny_llama, tiny_moe, token_ids
from torch import nn

import lockstep
from lockstep import Scheme
from lockstep.align import Rollout, decompose
from lockstep.align.decompose import kernel_floor, measure, trainer_logprobs
from lockstep.export.rollout import RolloutSession, Sampling
from lockstep.export.rollout.embedded import EmbeddedEngine
from lockstep.qat.kv_cache import prepare_kv_cache, unprepare_kv_cache

ROLLOUT = Rollout(token_ids(3, 20).tolist() + token_ids(2, 13, seed=1).tolist(), [5, 1, 7, 4, 2])
ARMS = ("qat", "qat + plain rollout", "no qat", "plain")


def session_of(model, arm, scheme="W4A16"):
    """A session in one of the four arms, synchronized once."""
    if arm.startswith("qat"):
        lockstep.prepare(model, scheme)
    unseen = scheme if arm == "no qat" else None
    engine = EmbeddedEngine.from_model(model, plain="plain" in arm, scheme=unseen)
    session = RolloutSession(model, engine, scheme=unseen)
    session.sync()
    return session


def move(model, size=2e-3, seed=3):
    """What an optimizer step does to the weights, about."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * size)


def by_transformers(model, rollout=ROLLOUT):
    """Log-probabilities of all tokens but the first by another formula, sequences of one length together."""
    found = {}
    for length in {len(ids) for ids in rollout.tokens}:
        numbers = [number for number, ids in enumerate(rollout.tokens) if len(ids) == length]
        ids = torch.tensor([rollout.tokens[number] for number in numbers])
        with torch.no_grad():
            logits = model(ids).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        found |= zip(numbers, -loss, strict=True)
    return [found[number] for number in range(len(found))]


def same(rows, expected, rollout=ROLLOUT):
    """`rows` are those of the sampled tokens in `expected`."""
    for row, one, length in zip(rows, expected, rollout.lengths, strict=True):
        torch.testing.assert_close(row.float(), one[length - 1 :], rtol=0, atol=2e-5)


def distance(rows, expected, rollout=ROLLOUT):
    """Mean absolute difference."""
    sampled = [one[length - 1 :] for one, length in zip(expected, rollout.lengths, strict=True)]
    return (torch.cat(list(rows)) - torch.cat(sampled)).abs().mean().item()


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
@pytest.mark.parametrize("arm", ARMS)
def test_the_links_add_up_to_the_gap_token_by_token(arm, scheme):
    """Exactly: log-probabilities are fp32, their differences in float64 are not rounded."""
    model = tiny_llama()
    session = session_of(model, arm, scheme)
    move(model)
    before = measure(session, ROLLOUT)
    found = decompose(session, ROLLOUT)
    for part in ("sampled", "prompt"):
        total = getattr(found.total, part).differences
        links = [getattr(link, part).differences for link in found.links.values()]
        assert total.abs().max() > 0.01
        assert torch.equal(torch.stack(links).sum(0), total)
        assert torch.equal(total, getattr(before, part).differences)  # it is the gap that measure finds
    both = ["grid"] if scheme == "W4A16" else ["grid", "activations"]
    inner = {"no qat": both, "qat + plain rollout": both[::-1]}.get(arm, [])
    assert list(found.links) == [*inner, "kernel", "stale"]
    assert list(found.removed) == (both if arm == "qat" else [])
    assert "stale" in str(found)


def test_each_link_is_what_it_says():
    """Against models that are unquantized, or quantized with the weights alone, for good."""
    model = tiny_llama()
    session = session_of(model, "no qat", "FP8_DYNAMIC")
    old = by_transformers(prepared(tiny_llama(), "FP8_DYNAMIC"))
    move(model)
    found = decompose(session, ROLLOUT)
    plain = by_transformers(model)
    full = by_transformers(prepared(model, "FP8_DYNAMIC"))
    lockstep.unprepare(model)
    layers = [one for name, one in model.named_modules() if isinstance(one, nn.Linear) and name != "lm_head"]
    for layer in layers:  # the weights alone: put in place of the masters
        spec = Scheme.preset("FP8_DYNAMIC").weights
        codes, scale, *_ = lockstep.grid.quantize(layer.weight.detach(), spec)
        layer.weight.data = (codes.float() * scale.float()).to(layer.weight.dtype)
    weights = by_transformers(model)
    # Not the same: in the served order scales follow the GEMM, here they are in the weight.
    assert distance(found.links["grid"].sampled.rollout, weights) < 0.3 * found.links["grid"].sampled.mean_abs
    same(found.links["grid"].sampled.trainer, plain)
    same(found.links["kernel"].sampled.trainer, full)
    stale = found.links["stale"].sampled
    assert distance(stale.trainer, full) < 0.2 * stale.mean_abs  # the engine pads, which adds in another order
    assert distance(stale.rollout, old) < 0.2 * stale.mean_abs


def test_without_training_on_the_grid_the_grid_is_the_gap_and_with_it_the_kernel_alone():
    """The floor is honest: it is not the gap of a trainer that does not see the engine's weights."""
    unseen = decompose(session_of(tiny_llama(), "no qat"), ROLLOUT)
    assert unseen.links["grid"].sampled.mean_abs == pytest.approx(unseen.total.sampled.mean_abs, rel=1e-3)
    assert unseen.floor.sampled.mean_abs < 0.05 * unseen.total.sampled.mean_abs
    assert unseen.links["stale"].sampled.max_abs == 0
    seen = decompose(session_of(tiny_llama(), "qat"), ROLLOUT)
    assert seen.total.sampled.mean_abs == seen.floor.sampled.mean_abs
    assert seen.floor.sampled.mean_abs < 0.05 * seen.removed["grid"].sampled.mean_abs


@pytest.mark.parametrize("arm", ARMS)
def test_model_is_left_as_found_and_the_engine_current(arm):
    model = tiny_llama().train()
    session = session_of(model, arm, "FP8_DYNAMIC")
    move(model)
    kinds = [type(one) for one in model.modules()]
    held = [{name: id(value) for name, value in vars(one).items()} for one in model.modules()]
    state = {name: one.clone() for name, one in model.state_dict().items()}
    version = session.version
    decompose(session, ROLLOUT, sync=False)
    assert session.version == version
    decompose(session, ROLLOUT)
    assert session.version == version + 1
    assert session.verify().ok
    assert [type(one) for one in model.modules()] == kinds
    assert all(one.training for one in model.modules())
    now = [
        {name: id(value) for name, value in vars(one).items() if name in old}
        for one, old in zip(model.modules(), held, strict=True)
    ]
    assert now == held
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())


def test_without_a_sync_kernel_and_staleness_are_one_link():
    model = tiny_llama()
    session = session_of(model, "no qat")
    move(model)
    found = decompose(session, ROLLOUT, sync=False)
    assert list(found.links) == ["grid", "engine"]
    assert found.floor is None
    assert torch.equal(sum(link.sampled.differences for link in found.links.values()), found.total.sampled.differences)


class Broken:
    """An engine that answers wrongly for one sequence, and otherwise as `engine`."""

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def logprobs(self, sequences):
        first, *rest = self.engine.logprobs(sequences)
        return [first - 0.25, *rest]


def test_a_kernel_that_computes_otherwise_is_in_the_kernel_link_alone():
    model = tiny_llama()
    session = session_of(model, "qat")
    session._engine = Broken(session.engine)
    move(model)
    found = decompose(session, ROLLOUT)
    assert found.floor.sampled.max_abs == pytest.approx(0.25, abs=0.01)
    # The fault is on both sides of the stale link, which therefore is what it is without it.
    old = EmbeddedEngine.from_model(model)
    session._engine = session.engine.engine
    again = session_of(tiny_llama(), "qat")
    move(again.model)
    assert old.format is None
    expected = decompose(again, ROLLOUT).links["stale"].sampled.differences
    torch.testing.assert_close(found.links["stale"].sampled.differences, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_have_both_links(kind):
    model = tiny_moe(kind)
    scheme = Scheme.preset("FP8_DYNAMIC")
    session = session_of(model, "qat", scheme)
    found = decompose(session, ROLLOUT)
    lockstep.unprepare(model)
    plain = by_transformers(model)
    same(found.removed["grid"].sampled.trainer, plain)
    assert found.removed["grid"].sampled.mean_abs > 1e-3
    assert found.removed["activations"].sampled.mean_abs > 1e-3


def test_a_quantized_cache_counts_to_the_activations():
    """Keys and values are inputs of attention: with W4A16 weights they are all there is in that link."""
    model = prepared(tiny_llama(), "W4A16")
    prepare_kv_cache(model, "int8_per_token_head")
    session = RolloutSession(model, Answers(model))
    found = decompose(session, ROLLOUT, sync=False)
    quantized = by_transformers(model)
    unprepare_kv_cache(model)
    same(found.removed["activations"].sampled.trainer, by_transformers(model))
    same(found.removed["activations"].sampled.rollout, quantized)
    assert found.removed["activations"].sampled.mean_abs > 0
    lockstep.unprepare(model)
    same(found.removed["grid"].sampled.trainer, by_transformers(model))


class Answers:
    """An engine that answers what a model does."""

    format, partial = None, True

    def __init__(self, model):
        self.model, self.version = model, 1

    def never(self, *_):
        raise AssertionError("only asked, never synchronized")

    begin_update = load = end_update = abort_update = generate = checksums = never

    def logprobs(self, sequences):
        return trainer_logprobs(self.model, Rollout(sequences))


def test_wide_masters_run_as_they_train():
    model = tiny_llama(torch.float32)
    session = session_of(model, "qat")
    found = decompose(session, ROLLOUT)
    assert found.total.sampled.mean_abs < 0.02  # under autocast to bf16, as the engine serves
    with torch.autocast("cpu", torch.bfloat16):
        assert measure(session, ROLLOUT).sampled.mean_abs == found.total.sampled.mean_abs
    assert measure(session, ROLLOUT).sampled.mean_abs > 0  # as the caller has it: in fp32


def test_adapters_are_merged_for_the_points_before_the_trainers():
    peft = pytest.importorskip("peft")
    from lockstep.qat import lora

    model = tiny_llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = lora.get_peft_model(prepared(model), config)
    session = RolloutSession(adapted, EmbeddedEngine.from_model(adapted))
    session.sync()
    found = decompose(session, ROLLOUT)
    assert found.total.sampled.mean_abs < 1e-3
    merged = adapted.merge_and_unload()  # peft's own
    lockstep.unprepare(merged)
    expected = by_transformers(merged)
    same(found.removed["grid"].sampled.trainer, expected)


# Rollouts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probabilities_of_the_sampling_are_compared_at_its_temperature(temperature):
    session = session_of(tiny_llama(), "qat")
    prompts = [ids[:6] for ids in ROLLOUT.tokens[:3]]
    completions = session.engine.generate(prompts, Sampling(max_tokens=9, n=2, temperature=temperature, seed=1))
    rollout = Rollout.of(prompts, completions, temperature)
    assert [list(ids[:6]) for ids in rollout.tokens] == [prompts[number // 2] for number in range(6)]
    found = measure(session, rollout)
    assert found.prompt is None
    assert found.sampled.tokens == sum(len(one.tokens) for one in completions)
    assert found.sampled.mean_abs < 0.02
    if temperature == 0.7:
        assert measure(session, replace(rollout, temperature=1.0)).sampled.mean_abs > 0.05


def test_the_floor_of_sampling_is_measured_by_sampling():
    """Token by token the engine adds in another order than over whole sequences: that belongs to the floor."""
    session = session_of(tiny_llama(), "qat")
    prompts = [ids[:6] for ids in ROLLOUT.tokens[:4]]
    completions = session.engine.generate(prompts, Sampling(max_tokens=12, n=4, seed=1))
    rollout = Rollout.of(prompts, completions)
    own = measure(session, rollout).sampled.mean_abs
    floor = kernel_floor(session, rollout).sampled.mean_abs
    assert own > 0
    assert 0.5 * own < floor < 2 * own
    # Old log-probabilities are no part of it.
    wrong = replace(rollout, logprobs=[row - 1 for row in rollout.logprobs])
    assert kernel_floor(session, wrong).sampled.mean_abs == floor


def test_rollouts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="sequence 1 has 1 tokens, 1 of the prompt"):
        Rollout([[1, 2], [3]])
    with pytest.raises(ValueError, match="2 sequences and 1 prompt lengths"):
        Rollout([[1, 2], [3, 4]], [1])
    with pytest.raises(ValueError, match=r"logprobs has \[3\] tokens by sequence, sampled are \[2\]"):
        Rollout([[1, 2, 3]], [1], [torch.zeros(3)])
    with pytest.raises(ValueError, match=r"logprobs of sequence 0 are list: they must be an fp32 tensor \[tokens\]"):
        Rollout([[1, 2, 3]], [1], [[-1.0, -2.0]])
    with pytest.raises(ValueError, match=r"logprobs of sequence 0 are torch.bfloat16 \[2\]"):
        Rollout([[1, 2, 3]], [1], [torch.zeros(2, dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match="asked again at temperature 1"):
        Rollout([[1, 2, 3]], [1], temperature=0.5)
    with pytest.raises(ValueError, match="3 completions of 2 prompts"):
        Rollout.of([[1], [2]], [None] * 3)


def test_a_batch_of_token_ids_is_a_rollout():
    """As a data loader gives it; engines get lists of numbers all the same."""
    ids = token_ids(3, 6)
    assert Rollout(ids) == Rollout([*ids]) == Rollout(ids.tolist())
    with pytest.raises(ValueError, match="0 sequences"):
        Rollout(ids[:0])
    session = session_of(tiny_llama(), "qat")
    assert decompose(session, ids).total.sampled.mean_abs == decompose(session, ids.tolist()).total.sampled.mean_abs


def test_many_tokens_run_in_several_forwards(monkeypatch):
    model = tiny_llama()
    whole = trainer_logprobs(model, ROLLOUT)
    monkeypatch.setattr(sys.modules[trainer_logprobs.__module__], "TOKENS", 25)
    sizes = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    parts = trainer_logprobs(model, ROLLOUT)
    handle.remove()
    assert sizes == [(1, 20)] * 3 + [(1, 13)] * 2
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.05)
