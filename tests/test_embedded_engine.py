"""The embedded engine: it answers as transformers does on the served weights, with whole versions alone."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import pytest
import torch
from models import channel, grouped, prepared, tiny_llama, tiny_moe, token_ids
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import lockstep
from lockstep import KVCacheSpec, Scheme, grid, kernels
from lockstep.align.metrics import token_logprobs
from lockstep.export import save_pretrained, stream
from lockstep.export.rollout import RolloutSession
from lockstep.export.rollout import sampling as sampler
from lockstep.export.rollout.embedded import EmbeddedEngine
from lockstep.export.rollout.engine import EngineUnusable, Sampling, checksum
from lockstep.export.served import quantized_layers, unquantized_layers
from lockstep.qat.experts import QATExperts
from lockstep.qat.kv_cache import prepare_kv_cache
from lockstep.qat.prepare import quantized_modules

GREEDY = Sampling(max_tokens=12, temperature=0)
PROMPTS = [[5, 9, 2], [7], [3, 8, 1, 4, 400, 6, 11], [2, 2, 500]]
# Large enough that one wrong token follows from one wrong weight, and that no two logits tie in bf16.
WIDE = {"initializer_range": 0.15}


def updated(engine: EmbeddedEngine, model: nn.Module, version: int = 1, skip: str | None = None) -> EmbeddedEngine:
    """`engine` itself with the weights of `model`, but for the tensors with `skip` in their names."""
    engine.begin_update(version)
    for name, tensor in stream(model, engine.format):
        if skip is None or skip not in name:
            engine.load({name: tensor})
    engine.end_update()
    return engine


def engine_of(model: nn.Module, **options: Any) -> EmbeddedEngine:
    return updated(EmbeddedEngine.from_model(model, **options), model)


def qwen3(dtype: torch.dtype = torch.bfloat16, **config: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 128}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes | config), dtype=dtype)
    return model.eval()


def dequantized(model: Any) -> Any:
    """A plain model of transformers in bf16 with the weights that `model` serves."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, QATExperts):
            for name in (module.layout.first, "down_proj"):
                rows = module.layout.rows(getattr(module, name).data)
                rows.copy_(grid.fake_quantize(rows, module.scheme.weights))
    for _, module in quantized_modules(plain):
        module.weight.data = grid.fake_quantize(module.weight.data, module.scheme.weights)
    lockstep.unprepare(plain)
    for parameter in plain.parameters():  # not .to(bfloat16), which rounds the rotary frequencies
        parameter.data = parameter.data.to(torch.bfloat16)
    return plain


def transformers_greedy(model: Any, prompts: list[list[int]], max_tokens: int = 12) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, longest:].tolist()


def trained_logprobs(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return token_logprobs(model(input_ids=ids, attention_mask=mask).logits[:, :-1], ids[:, 1:])


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny_llama(**WIDE),
        lambda: tiny_llama(**WIDE, tie_word_embeddings=True),
        lambda: tiny_llama(**WIDE, attn_implementation="eager"),
        lambda: tiny_llama(torch.float32, **WIDE),
        lambda: qwen3(**WIDE),
        lambda: tiny_moe("qwen3_moe", **WIDE),
        lambda: tiny_moe("mixtral", **WIDE),
    ],
    ids=["llama", "tied", "eager", "llama fp32 masters", "qwen3", "qwen3_moe", "mixtral"],
)
def test_greedy_answers_are_transformers_own_on_the_served_weights(build):
    """Ragged prompts, token for token, against ``generate(do_sample=False)``."""
    model = prepared(build(), grouped(32))
    expected = transformers_greedy(dequantized(model), PROMPTS)
    engine = engine_of(model)
    assert [answer.tokens for answer in engine.generate(PROMPTS, GREEDY)] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_layers_with_a_sliding_window_see_what_they_see_in_transformers(kind):
    """Prompts and answers are longer than the window; gemma has layers with and without one, and scaled embeddings."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 128}
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if kind == "gemma3_text" else {}
    config = AutoConfig.for_model(kind, **sizes, **layers, sliding_window=4, initializer_range=0.15)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = prepared(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval(), grouped(32))
    engine = engine_of(model)
    assert [one.tokens for one in engine.generate(PROMPTS, GREEDY)] == transformers_greedy(dequantized(model), PROMPTS)


def small(kind: str, **config: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 128}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | config), dtype=torch.bfloat16)
    return model.eval()


STATES = {
    "qwen3_next": {
        "num_hidden_layers": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mistral": {"sliding_window": 4},
}


@pytest.mark.parametrize("kind", STATES)
def test_layers_with_a_state_or_a_window_answer_as_transformers_does_when_most_of_a_batch_has_stopped(kind):
    """Linear attention cannot drop rows from a batch. Ragged prompts."""
    model = small(kind, **STATES[kind], initializer_range=0.15)
    prompts = [[number, 7, 2 * number, 5][: 1 + number % 4] for number in range(1, 13)]
    expected = transformers_greedy(model, prompts, 30)
    stop = {tokens[2] for tokens in expected[:8]}
    answers = engine_of(model, plain=True).generate(prompts, Sampling(max_tokens=30, temperature=0, stop=tuple(stop)))
    lengths = []
    for answer, tokens in zip(answers, expected, strict=True):
        lengths.append(next((place + 1 for place, token in enumerate(tokens) if token in stop), 30))
        assert answer.tokens == tokens[: lengths[-1]]
    assert sorted(lengths)[6] < 8  # half of them are dropped at the first look
    assert max(lengths) > 16


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_model_that_would_drop_the_cache_is_refused_by_name(kind, tmp_path):
    """Mamba's forward takes any keyword and leaves `past_key_values` aside: each token would follow from one alone."""
    shape = {"num_heads": 4, "head_dim": 32, "n_groups": 1} if kind == "mamba2" else {}
    model = small(kind, state_size=16, expand=2, **shape)
    odd = ["lm_head", "re:.*(in|x|dt)_proj"]
    for make in (
        lambda: EmbeddedEngine.from_model(model, plain=True),
        lambda: EmbeddedEngine.from_folder(save_pretrained(prepared(model, grouped(32), ignore=odd), tmp_path / "out")),
    ):
        with pytest.raises(ValueError, match=f"{kind.title()}ForCausalLM takes no past_key_values"):
            make()


SCHEMES = {
    "g32": grouped(32),
    "channel": channel(),
    "asym": Scheme.preset("W4A16_ASYM"),
    "W8A16": Scheme.preset("W8A16"),
    "W8A8": Scheme.preset("W8A8"),
    "W4A8": Scheme.preset("W4A8"),
    "FP8_DYNAMIC": Scheme.preset("FP8_DYNAMIC"),
    "FP8_BLOCK": Scheme.preset("FP8_BLOCK"),
    "NVFP4A16": Scheme.preset("NVFP4A16"),
    "MXFP4": Scheme.preset("MXFP4"),
}


@pytest.mark.filterwarnings("ignore:.*vLLM")
@pytest.mark.parametrize("keep", [None, False], ids=["unpacked once", "words alone"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_logprobs_are_the_trainers_own_bit_for_bit(scheme, keep):
    """The prepared model's forward and the engine's on stored words, biases included, on a batch of the same shape."""
    model = prepared(tiny_llama(**WIDE, attention_bias=True), scheme)
    ids = token_ids(3, 10)
    found = torch.stack(engine_of(model, cache=keep).logprobs(ids.tolist()))
    assert torch.equal(found, trained_logprobs(model, ids))
    assert found.std() > 1  # a model whose tokens are all alike would hide any error


@pytest.mark.parametrize("scheme", ["g32", "channel", "W8A8"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3", "llama4_text"])
def test_experts_too(kind, scheme):
    model = prepared(tiny_moe(kind, **WIDE), SCHEMES[scheme])
    ids = token_ids(3, 10)
    assert torch.equal(torch.stack(engine_of(model).logprobs(ids.tolist())), trained_logprobs(model, ids))


def test_ragged_sequences_are_padded_as_a_trainer_pads_them():
    model, ids = prepared(tiny_llama(**WIDE), grouped(32)), token_ids(3, 10)
    mask = torch.ones_like(ids)
    mask[1, 6:], ids[1, 6:] = 0, 0
    found = engine_of(model).logprobs([ids[0].tolist(), ids[1, :6].tolist(), ids[2].tolist(), [4]])
    expected = trained_logprobs(model, ids[[1, 0, 2]], mask[[1, 0, 2]])  # shorter ones first
    assert torch.equal(found[0], expected[1])
    assert (found[1] - expected[0, :5]).abs().max() < 0.1  # [4] is in the batch too
    assert found[3].shape == (0,)


@pytest.mark.parametrize("build", [tiny_llama, qwen3, tiny_moe], ids=["llama", "qwen3", "moe"])
def test_logprobs_of_decoding_are_those_of_the_whole_sequence(build):
    """With a cache and left padding, token by token, against one forward of all."""
    engine = engine_of(prepared(build(**WIDE), grouped(32)))
    answers = engine.generate(PROMPTS, Sampling(max_tokens=12, seed=0))
    whole = engine.logprobs([prompt + answer.tokens for prompt, answer in zip(PROMPTS, answers, strict=True)])
    for prompt, answer, logprobs in zip(PROMPTS, answers, whole, strict=True):
        assert answer.logprobs.dtype == torch.float32
        assert (logprobs[len(prompt) - 1 :] - answer.logprobs).abs().max() < 0.15


def test_a_plain_engine_runs_the_weights_unquantized():
    model = prepared(tiny_llama(torch.float32, **WIDE), grouped(32))
    engine = engine_of(model, plain=True)
    plain = copy.deepcopy(model)
    lockstep.unprepare(plain)
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    ids = token_ids(3, 10)
    assert torch.equal(torch.stack(engine.logprobs(ids.tolist())), trained_logprobs(plain, ids))
    assert {layer.precision for layer in engine.live_layers().values()} == {"bfloat16"}


def test_a_plain_engine_of_a_mixture_that_nothing_quantizes():
    model, ids = tiny_moe(**WIDE), token_ids(3, 10)
    engine = engine_of(model, plain=True)
    assert torch.equal(torch.stack(engine.logprobs(ids.tolist())), trained_logprobs(model, ids))
    assert set(engine.live_layers()) == set(unquantized_layers(model))


def test_a_model_that_trains_unquantized_is_quantized_in_the_engine_alone():
    model = tiny_llama(**WIDE)
    engine = EmbeddedEngine.from_model(model, scheme=grouped(32), ignore=["lm_head", "re:.*down_proj"])
    quantized = prepared(copy.deepcopy(model), grouped(32), ignore=["lm_head", "re:.*down_proj"])
    updated(engine, quantized)
    ids = token_ids(3, 10)
    found = torch.stack(engine.logprobs(ids.tolist()))
    assert torch.equal(found, trained_logprobs(quantized, ids))
    assert not torch.equal(found, trained_logprobs(model, ids))


def test_the_model_is_left_as_it_was():
    model = prepared(tiny_llama(), grouped(32))
    before = {name: checksum(tensor) for name, tensor in model.state_dict().items()}
    config, classes = model.config.to_dict(), [type(module) for module in model.modules()]
    engine = engine_of(model)
    engine.generate(PROMPTS, GREEDY)
    assert engine.config is engine.model.config is not model.config
    assert engine.config.hidden_size == model.config.hidden_size
    assert {name: checksum(tensor) for name, tensor in model.state_dict().items()} == before
    assert (model.config.to_dict(), [type(module) for module in model.modules()]) == (config, classes)


def test_rotary_frequencies_are_in_fp32_even_where_the_trainer_has_rounded_its_own():
    """Lightning's bf16-true and ``.to(bfloat16)`` round them; engines compute them."""
    model = prepared(tiny_llama(**WIDE), grouped(32))
    ids = token_ids(3, 40)
    exact = trained_logprobs(model, ids)
    model.to(torch.bfloat16)
    assert not torch.equal(trained_logprobs(model, ids), exact)
    assert torch.equal(torch.stack(engine_of(model).logprobs(ids.tolist())), exact)


@pytest.mark.parametrize(
    ("spec", "plain"),
    [("fp8", False), (KVCacheSpec("fp8_e4m3", "head"), False), ("fp8", True), ("int8_per_token_head", True)],
    ids=["fp8", "fp8 by head", "fp8, plain weights", "int8 by token, plain weights"],
)
def test_keys_and_values_are_quantized_where_they_are_in_training(spec, plain, tmp_path):
    model, ids = tiny_llama(**WIDE), token_ids(3, 10)
    if not plain:
        lockstep.prepare(model, grouped(32))
    unquantized = trained_logprobs(model, ids)
    prepare_kv_cache(model, spec)
    for name, buffer in model.named_buffers():
        if name.endswith(("k_scale", "v_scale")):
            buffer.fill_(0.01)
    trained = trained_logprobs(model, ids)
    assert not torch.equal(trained, unquantized)
    engine = engine_of(model, plain=plain)
    assert torch.equal(torch.stack(engine.logprobs(ids.tolist())), trained)
    answers = engine.generate(PROMPTS, GREEDY)
    whole = engine.logprobs([prompt + one.tokens for prompt, one in zip(PROMPTS, answers, strict=True)])
    for prompt, answer, logprobs in zip(PROMPTS, answers, whole, strict=True):
        assert (logprobs[len(prompt) - 1 :] - answer.logprobs).abs().max() < 0.15
    if not plain:
        folder = EmbeddedEngine.from_folder(save_pretrained(model, tmp_path / "out"), device="cpu")
        assert torch.equal(torch.stack(folder.logprobs(ids.tolist())), trained)


def test_an_adapter_is_merged_as_it_is_exported():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(**WIDE), peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    lockstep.prepare(model, grouped(32))
    engine, ids = engine_of(model), token_ids(3, 10)
    trained = trained_logprobs(model.eval(), ids)
    assert torch.equal(torch.stack(engine.logprobs(ids.tolist())), trained)
    with model.disable_adapter():
        assert (trained_logprobs(model, ids) - trained).abs().max() > 0.5


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [None, "gptq"])
def test_a_folder_answers_as_the_model_that_it_was_exported_of(format, tmp_path):
    model = prepared(tiny_llama(**WIDE), grouped(32))
    folder = EmbeddedEngine.from_folder(save_pretrained(model, tmp_path / "out", format), device="cpu")
    assert (folder.version, folder.format) == (0, format)
    ids = token_ids(3, 10)
    assert torch.equal(torch.stack(folder.logprobs(ids.tolist())), trained_logprobs(model, ids))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    updated(folder, model, 1)
    assert torch.equal(torch.stack(folder.logprobs(ids.tolist())), trained_logprobs(model, ids))


def test_a_folder_of_a_mixture(tmp_path):
    model, ids = prepared(tiny_moe(**WIDE), SCHEMES["FP8_DYNAMIC"]), token_ids(3, 10)
    folder = EmbeddedEngine.from_folder(save_pretrained(model, tmp_path / "out"), device="cpu")
    assert torch.equal(torch.stack(folder.logprobs(ids.tolist())), trained_logprobs(model, ids))


# Sampling -------------------------------------------------------------------------------------------------------------

CUTS = {
    "all": Sampling(),
    "hot": Sampling(temperature=1.7),
    "cold": Sampling(temperature=0.4),
    "top_k": Sampling(temperature=0.8, top_k=5),
    "top_p": Sampling(temperature=1.3, top_p=0.7),
    "both": Sampling(temperature=1.2, top_k=12, top_p=0.8),
    "nearly none": Sampling(top_p=1e-6),
}


@pytest.mark.parametrize("sampling", CUTS.values(), ids=CUTS)
def test_tokens_are_drawn_from_the_distribution_that_transformers_warpers_leave(sampling):
    """Chi-square of 40000 draws with a fixed seed, and no draw outside; the log-probability is before the cuts."""
    draws = 40000
    logits = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), logits.clone()).softmax(-1)[0].double()
    uniform = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = sampler.choose(logits.expand(draws, -1), sampling, uniform)
    counts = torch.bincount(tokens, minlength=50).double()
    assert not counts[expected == 0].any()
    likely = expected * draws >= 5
    found = torch.cat([counts[likely], counts[~likely].sum().view(1)])
    wanted = torch.cat([expected[likely], expected[~likely].sum().view(1)]) * draws
    statistic = ((found - wanted) ** 2 / wanted.clamp(min=1e-9)).sum().item()
    freedom = max(1, int(likely.sum()))
    # Wilson and Hilferty's approximation of the quantile at 4 sigma.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
    assert torch.equal(logprobs, (logits / sampling.temperature).log_softmax(-1)[0][tokens])


def test_of_a_large_vocabulary_no_rare_token_is_passed_over():
    """In fp32 the cumulated probability of 200000 tokens stands still at a third of those that weigh 2e-8 each."""
    logits = torch.full((1, 200000), -12.0)
    logits[0, 0] = 5.0
    step = logits.double().softmax(-1)[0, 1].item() / 2
    uniform = 0.995 + step * torch.arange(100, dtype=torch.float64)
    tokens, _ = sampler.choose(logits.expand(100, -1), Sampling(), uniform)
    assert tokens.diff().max() == 1
    assert 49 <= len(tokens.unique()) <= 51


IN_FP32 = grouped(32, scale_dtype=torch.float32, served_dtype=torch.float32)


def test_a_seed_gives_the_same_answers_however_they_are_batched():
    """Served in fp32, where the rounding that differs with the batch flips no token."""
    engine = engine_of(prepared(tiny_llama(torch.float32), IN_FP32))
    sampling = Sampling(max_tokens=10, n=3, seed=5)
    together = engine.generate(PROMPTS, sampling)
    again = engine.generate(PROMPTS, sampling)
    assert all(torch.equal(one.logprobs, two.logprobs) for one, two in zip(together, again, strict=True))
    assert [one.tokens for one in again] == [one.tokens for one in together]
    engine.max_batch_tokens = 40
    apart = engine.generate(PROMPTS, sampling)
    assert [one.tokens for one in apart] == [one.tokens for one in together]
    other = engine.generate(PROMPTS, Sampling(max_tokens=10, n=3, seed=6))
    unseeded = [engine.generate(PROMPTS, Sampling(max_tokens=10, n=3)) for _ in range(2)]
    assert len({str([one.tokens for one in answers]) for answers in (together, other, *unseeded)}) == 4
    assert len({tuple(one.tokens) for one in together}) == 12


def test_a_trainer_that_makes_bf16_the_default_dtype_gets_the_same_answers():
    """Lightning's bf16-true does so, and log-probabilities in bf16 would be no log-probabilities."""
    model = prepared(tiny_llama(torch.bfloat16), grouped(32))
    sampling = Sampling(max_tokens=6, n=2, seed=0)
    expected = engine_of(model).generate([[1, 2, 3], [4, 5]], sampling)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = engine_of(model).generate([[1, 2, 3], [4, 5]], sampling)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs.dtype == torch.float32
        assert torch.equal(one.logprobs, other.logprobs)


def test_an_answer_ends_with_its_stop_token_and_others_go_on():
    """Rows that have stopped are dropped from the batch on the way: what is left is as it was without them."""
    engine = engine_of(prepared(tiny_llama(torch.float32), IN_FP32))
    prompts = [[number, 7, 2 * number][: 1 + number % 3] for number in range(1, 25)]
    free = engine.generate(prompts, Sampling(max_tokens=60, seed=0))
    stop = tuple(range(30, 60))  # one token in 17
    answers = engine.generate(prompts, Sampling(max_tokens=60, seed=0, stop=stop))
    lengths = []
    for one, whole in zip(answers, free, strict=True):
        ends = [place for place, token in enumerate(whole.tokens) if token in stop]
        length = ends[0] + 1 if ends else 60
        assert (one.tokens, one.stopped) == (whole.tokens[:length], bool(ends))
        assert (one.logprobs - whole.logprobs[:length]).abs().max() < 1e-4
        lengths.append(length)
    assert min(lengths) < 8
    assert max(lengths) > 40


@pytest.mark.parametrize(
    ("prompts", "sampling", "found"),
    [
        ([[1], []], Sampling(), "prompt 1 is empty"),
        ([[1, 512]], Sampling(), "prompt 0 has a token outside the vocabulary of 512"),
        ([[1, -1]], Sampling(), "prompt 0 has a token outside the vocabulary of 512"),
        ([[1] * 100], Sampling(max_tokens=29), "100 tokens and 29 to come, the model takes 128"),
        ([[1]], Sampling(max_tokens=0), "Sampling.max_tokens=0"),
        ([[1]], Sampling(temperature=-1.0), "Sampling.temperature=-1.0"),
        ([[1]], Sampling(top_p=0.0), "Sampling.top_p=0.0"),
        ([[1]], Sampling(n=0), "Sampling.n=0"),
        ([[1]], Sampling(max_tokens=1.5), "Sampling.max_tokens=1.5"),
        ([[1]], Sampling(max_tokens="3"), "Sampling.max_tokens='3'"),
        ([[1]], Sampling(top_k=None), "Sampling.top_k=None"),
        ([[1]], Sampling(n=True), "Sampling.n=True"),
        ([[1]], Sampling(temperature=1e-40), "temperature=1e-40: it must be 0 or a number of at least 1.18e-38"),
        ([[1]], Sampling(temperature=math.nan), "Sampling.temperature=nan"),
        ([[1]], Sampling(top_p="1"), "Sampling.top_p='1'"),
        ([[1]], Sampling(stop=3), "Sampling.stop=3"),
        ([[1]], Sampling(stop=("a",)), r"Sampling.stop=\('a',\)"),
        ([[1]], Sampling(seed="a"), "Sampling.seed='a'"),
        ([[1]], Sampling(seed=2**64), "Sampling.seed=18446744073709551616"),
    ],
)
def test_what_cannot_be_generated_is_said(prompts, sampling, found):
    with pytest.raises(ValueError, match=found):
        engine_of(prepared(tiny_llama(), grouped(32))).generate(prompts, sampling)


@pytest.mark.parametrize(
    ("rows", "found"),
    [([1, 2, 3], "int"), ([[1], "abc"], "str"), (["abc"], "str"), ([[1.5]], "float"), ([[1, True]], "bool, int")],
)
def test_what_is_no_token_id_is_said(rows, found):
    engine = engine_of(prepared(tiny_llama(), grouped(32)))
    with pytest.raises(TypeError, match=f"prompt . must be a sequence of token ids.* found {found}"):
        engine.generate(rows, GREEDY)
    with pytest.raises(TypeError, match=f"sequence . must be a sequence of token ids.* found {found}"):
        engine.logprobs(rows)


def test_rows_of_a_tensor_are_prompts():
    engine, ids = engine_of(prepared(tiny_llama(), grouped(32))), token_ids(2, 3)
    found = [[one.tokens for one in engine.generate(rows, GREEDY)] for rows in (ids, [*ids], ids.numpy(), ids.tolist())]
    assert found[:3] == found[3:] * 3


def test_a_policy_that_has_become_nan_is_said():
    model = prepared(tiny_llama(), grouped(32))
    engine = engine_of(model)
    engine.begin_update(2)
    engine.load({"model.norm.weight": torch.full((256,), torch.nan, dtype=torch.bfloat16)})
    engine.end_update()
    with pytest.raises(ValueError, match=r"version 2: logits after prompt . are NaN"):
        engine.generate([[2, 3], [1]], Sampling(max_tokens=2))


def test_answers_inside_a_training_step_are_those_outside_and_go_into_a_loss():
    engine = engine_of(prepared(tiny_llama(**WIDE), grouped(32)))
    outside = engine.generate(PROMPTS, Sampling(max_tokens=8, seed=1))
    with torch.autocast("cpu", torch.float16):
        inside = engine.generate(PROMPTS, Sampling(max_tokens=8, seed=1))
    ratio = nn.Parameter(torch.ones(8))
    for one, two in zip(outside, inside, strict=True):
        assert torch.equal(one.logprobs, two.logprobs)
        (ratio * two.logprobs).exp().sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.isfinite().all()
    assert not any(parameter.requires_grad for parameter in engine.model.parameters())


# Updates --------------------------------------------------------------------------------------------------------------


def changed(model: Any, factor: float = 1.25) -> Any:
    """Another version of `model`."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "down_proj" in name:
                parameter.mul_(factor)
    return other


def test_before_the_first_update_it_answers_nothing():
    engine = EmbeddedEngine.from_model(prepared(tiny_llama(), grouped(32)))
    assert engine.version is None
    for ask in (
        lambda: engine.generate([[1]], GREEDY),
        lambda: engine.logprobs([[1, 2]]),
        lambda: engine.probe("lm_head", torch.ones(1, 256)),
    ):
        with pytest.raises(EngineUnusable, match="holds no weights yet"):
            ask()


def test_the_first_update_must_be_whole_and_says_what_is_missing():
    model = prepared(tiny_llama(), grouped(32))
    engine = EmbeddedEngine.from_model(model)
    with pytest.raises(EngineUnusable, match=r"1 of .* have not come, the first is model.norm.weight"):
        updated(engine, model, skip="model.norm")
    with pytest.raises(EngineUnusable, match="version 1 is being loaded"):
        engine.generate([[1]], GREEDY)
    engine.load({"model.norm.weight": model.model.norm.weight.data})
    engine.end_update()
    assert engine.version == 1


def test_answers_are_of_one_version_or_none():
    """In the middle of an update; after one that is given up before a tensor came, and after one that came in part."""
    model = prepared(tiny_llama(**WIDE), grouped(32))
    other = changed(model)
    engine = engine_of(model)
    old = engine.logprobs(PROMPTS)
    engine.begin_update(2)
    assert engine.version is None
    with pytest.raises(EngineUnusable, match="version 2 is being loaded, 0 of"):
        engine.logprobs(PROMPTS)
    engine.abort_update()
    assert engine.version == 1
    assert all(torch.equal(one, two) for one, two in zip(engine.logprobs(PROMPTS), old, strict=True))

    engine.begin_update(2)
    first = list(stream(other))[-2]
    engine.load(dict([first]))
    engine.abort_update()
    assert engine.version is None
    with pytest.raises(EngineUnusable, match="version 2 was given up when 1 tensors of it had come"):
        engine.logprobs(PROMPTS)
    engine.begin_update(3)  # the rest of it, as if the first tensor were still good
    engine.load({name: tensor for name, tensor in stream(other) if name != first[0]})
    with pytest.raises(EngineUnusable, match=f"version 3 is not whole: 1 of .*{first[0]}.*version 2 was given up"):
        engine.end_update()
    engine.abort_update()
    updated(engine, other, 4)
    assert engine.version == 4
    fresh = engine_of(other).logprobs(PROMPTS)
    assert all(torch.equal(one, two) for one, two in zip(engine.logprobs(PROMPTS), fresh, strict=True))


def test_a_copy_that_fails_in_the_middle_of_a_bucket_leaves_it_unusable():
    model = prepared(tiny_llama(), grouped(32))
    engine = engine_of(model)
    engine.begin_update(2)
    norm = model.model.norm.weight.data
    with pytest.raises(NotImplementedError):  # which copying from meta raises
        engine.load({"model.norm.weight": 2 * norm, "model.layers.0.input_layernorm.weight": norm.to("meta")})
    engine.abort_update()
    with pytest.raises(EngineUnusable):
        engine.generate([[1]], GREEDY)


def test_a_part_that_changed_is_enough_if_what_runs_as_one_comes_together():
    model = prepared(tiny_llama(**WIDE), grouped(32))
    other = changed(model)
    engine = engine_of(model)
    engine.begin_update(2)
    engine.load({name: tensor for name, tensor in stream(other) if "down_proj" in name})
    engine.end_update()
    fresh = engine_of(other).logprobs(PROMPTS)
    assert all(torch.equal(one, two) for one, two in zip(engine.logprobs(PROMPTS), fresh, strict=True))

    engine.begin_update(3)
    engine.load({name: tensor for name, tensor in stream(other) if "layers.1.self_attn.k_proj" in name})
    with pytest.raises(EngineUnusable, match=r"layers.1.self_attn.q_proj.* runs as one with what came"):
        engine.end_update()
    engine.load({name: tensor for name, tensor in stream(other) if "layers.1.self_attn." in name})
    engine.end_update()
    engine.begin_update(4)  # nothing has changed
    engine.end_update()
    assert engine.version == 4


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("model.layers.9.mlp.up_proj.weight_packed", lambda tensor: tensor, "has no such tensor"),
        (
            "model.layers.1.mlp.up_proj.weight_packed",
            lambda tensor: tensor.T,
            r"is \[32, 512\] int32, .* \[512, 32\] int32",
        ),
        ("model.layers.1.mlp.up_proj.weight_scale", lambda tensor: tensor[:, ::2], r"is \[512, 4\] .*holds \[512, 8\]"),
        ("model.layers.1.mlp.up_proj.weight_scale", lambda tensor: tensor.float(), "float32, .* bfloat16"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_before_anything_is_written(name, change, found):
    model = prepared(tiny_llama(), grouped(32))
    engine = engine_of(model)
    before, tensors = engine.checksums(), dict(stream(model))
    engine.begin_update(2)
    bucket = {"model.norm.weight": 2 * tensors["model.norm.weight"]}
    with pytest.raises(ValueError, match=f"{name}.*{found}"):
        engine.load(bucket | {name: change(tensors[name.replace("9", "1")])})
    assert engine.checksums() == before
    engine.abort_update()
    assert engine.version == 1


def test_updates_out_of_turn():
    engine = engine_of(prepared(tiny_llama(), grouped(32)))
    for call in (lambda: engine.load({}), engine.end_update, engine.abort_update):
        with pytest.raises(RuntimeError, match="begin_update first"):
            call()
    engine.begin_update(2)
    with pytest.raises(RuntimeError, match="version 2 is being loaded"):
        engine.begin_update(3)


def moved(model: Any) -> None:
    model._apply(torch.clone)


def replaced(model: Any) -> None:
    model.lm_head = nn.Linear(256, 512, bias=False).bfloat16()


@pytest.mark.parametrize(
    ("change", "name"), [(moved, "model.embed_tokens.weight"), (replaced, "lm_head.weight")], ids=["moved", "replaced"]
)
def test_a_model_that_was_moved_is_not_asked_and_not_updated(change, name):
    """As offloading it to the host and back does: updates would be written where nothing reads."""
    model = prepared(tiny_llama(), grouped(32))
    engine = engine_of(model)
    engine.model.to("cpu")  # where it is
    engine.generate([[1]], GREEDY)
    change(engine.model)
    for ask in (
        lambda: engine.generate([[1]], GREEDY),
        lambda: engine.logprobs([[1, 2]]),
        lambda: engine.probe("lm_head", torch.ones(1, 256)),
        lambda: engine.begin_update(2),
        engine.checksums,
    ):
        with pytest.raises(EngineUnusable, match=f"^{name}: the model's tensors were moved or replaced"):
            ask()


def test_an_update_waits_for_what_another_thread_has_asked():
    """The answer is of the old version whole; what is asked for while the update runs is refused at once."""
    model = prepared(tiny_llama(**WIDE), grouped(32))
    engine, other = engine_of(model), changed(model, 3.0)
    sampling = Sampling(max_tokens=20, temperature=0)
    old = engine.generate(PROMPTS, sampling)
    halfway, ended = threading.Event(), threading.Event()
    forwards, answers, refusals = [], [], []

    def wait(*_: Any) -> None:
        forwards.append(None)
        if len(forwards) == 10:
            halfway.set()
            ended.wait(2)  # of an update that does not wait for this answer

    hook = engine.model.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: answers.extend(engine.generate(PROMPTS, sampling)))
    thread.start()
    assert halfway.wait(60)
    engine.begin_update(2)
    engine.load(dict(stream(other)))
    engine.end_update()
    ended.set()
    thread.join(60)
    hook.remove()
    assert [(one.version, one.tokens) for one in answers] == [(1, one.tokens) for one in old]
    assert [one.tokens for one in engine.generate(PROMPTS, sampling)] != [one.tokens for one in old]

    def ask() -> None:
        try:
            engine.generate([[1]], GREEDY)
        except EngineUnusable as refusal:
            refusals.append(str(refusal))

    engine.begin_update(3)
    during = threading.Thread(target=ask)
    during.start()
    during.join(60)
    engine.abort_update()
    assert len(refusals) == 1
    assert "version 3 is being loaded" in refusals[0]


@pytest.mark.parametrize("build", [tiny_llama, tiny_moe], ids=["llama", "moe"])
def test_an_engine_made_and_filled_under_inference_mode_can_be_updated_after_it(build):
    """Lightning validates under it before the first step."""
    model = prepared(build(**WIDE), grouped(32))
    with torch.inference_mode():
        engine = engine_of(model)
        engine.generate([[1]], GREEDY)
    other = changed(model)
    updated(engine, other, 2)
    ids = token_ids(3, 10)
    assert torch.equal(torch.stack(engine.logprobs(ids.tolist())), trained_logprobs(other, ids))
    assert not any(tensor.is_inference() for tensor in (*engine.model.parameters(), *engine.model.buffers()))


@pytest.mark.parametrize("build", [tiny_llama, tiny_moe], ids=["llama", "moe"])
def test_tensors_are_written_in_place_and_hold_the_packed_size(build):
    model = prepared(build(), grouped(32))
    engine = engine_of(model)
    held = {**dict(engine.model.named_parameters()), **dict(engine.model.named_buffers())}
    where = {name: tensor.data_ptr() for name, tensor in held.items()}
    computed = {name for name in held if "inv_freq" in name}
    size = sum(tensor.numel() * tensor.element_size() for name, tensor in held.items() if name not in computed)
    assert size == sum(tensor.numel() * tensor.element_size() for _, tensor in stream(model))
    updated(engine, changed(model), 2)
    held = {**dict(engine.model.named_parameters()), **dict(engine.model.named_buffers())}
    assert {name: tensor.data_ptr() for name, tensor in held.items()} == where


@pytest.mark.parametrize("build", [tiny_llama, tiny_moe], ids=["llama", "moe"])
def test_what_is_kept_beside_the_words_is_what_was_asked_for(build):
    """Two bytes a quantized weight, or nothing."""
    model = prepared(build(), grouped(32))
    weights = sum(layer.weight.numel() for layer in quantized_layers(model).values())

    def beside(engine: EmbeddedEngine) -> int:
        kept = [value for module in engine.model.modules() for value in vars(module).values()]
        tensors = [one for value in kept if isinstance(value, tuple) for one in value if isinstance(one, Tensor)]
        tensors += [
            one for value in kept if isinstance(value, dict) for one in value.values() if isinstance(one, Tensor)
        ]
        stored = {tensor.data_ptr() for tensor in (*engine.model.parameters(), *engine.model.buffers())}
        others = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
        return sum(size for where, size in others.items() if where not in stored)

    assert beside(engine_of(model)) == 2 * weights
    assert beside(engine_of(model, cache=False)) == 0


@pytest.mark.parametrize(
    ("build", "scheme"), [(tiny_llama, "g32"), (tiny_llama, "W8A8"), (tiny_moe, "g32")], ids=["g32", "W8A8", "moe"]
)
def test_a_session_keeps_it_on_the_trainers_bits(build, scheme):
    """Steps that change a part of the weights, and the session sending that part alone."""
    model = prepared(build(**WIDE), SCHEMES[scheme])
    engine, ids = EmbeddedEngine.from_model(model), token_ids(3, 10)
    session = RolloutSession(model, engine)
    session.sync()
    for step in range(3):
        with torch.no_grad():
            model.model.layers[step % 2].self_attn.k_proj.weight.mul_(1.3)
        report = session.sync()
        assert (report.version, engine.version) == (step + 2, step + 2)
        assert report.skipped > report.sent > 0
        assert torch.equal(torch.stack(engine.logprobs(ids.tolist())), trained_logprobs(model, ids))
    session.audit().assert_ok()


# What lies there ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["g32", "W8A8", "FP8_DYNAMIC", "NVFP4A16"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_moe], ids=["llama", "moe"])
def test_checksums_are_those_of_the_trainers_stream(build, scheme):
    model = prepared(build(), SCHEMES[scheme])
    expected = {name: checksum(tensor) for name, tensor in stream(model)}
    engine = EmbeddedEngine.from_model(model)
    engine.begin_update(1)
    assert engine.load(dict(stream(model))) == expected
    engine.end_update()
    assert engine.checksums() == expected


def test_a_flipped_nibble_is_found_and_named():
    engine = engine_of(prepared(tiny_llama(), grouped(32)))
    before = engine.checksums()
    engine.model.get_submodule("model.layers.1.mlp.up_proj").weight_packed[3, 2] ^= 1 << 8
    after = engine.checksums()
    assert {name for name in before if before[name] != after[name]} == {"model.layers.1.mlp.up_proj.weight_packed"}


@pytest.mark.parametrize(
    ("build", "scheme"),
    [(tiny_llama, "g32"), (tiny_llama, "channel"), (tiny_llama, "W8A8"), (tiny_moe, "g32"), (tiny_moe, "W8A8")],
    ids=["llama g32", "llama channel", "llama W8A8", "moe g32", "moe W8A8"],
)
@pytest.mark.parametrize("keep", [None, False], ids=["unpacked once", "words alone"])
def test_a_probe_is_what_the_reference_kernel_computes_of_the_words(build, scheme, keep):
    """What is kept unpacked is bit for bit what the kernel multiplies with, for every layer."""
    model = prepared(build(), SCHEMES[scheme])
    engine, layers = engine_of(model, cache=keep), quantized_layers(model)
    for name, layer in layers.items():
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        kernel = kernels.find("linear", "reference", layer.scheme, x.device)
        assert torch.equal(engine.probe(name, x), kernel.run(x, layer.quantize(), layer.scheme, None, None)), name


def test_a_layer_that_holds_anothers_words_shows_in_its_probe():
    model = prepared(tiny_moe(), grouped(32))
    engine = engine_of(model)
    tensors = dict(stream(model))
    one, two = "model.layers.1.mlp.experts.0.up_proj", "model.layers.1.mlp.experts.2.up_proj"
    engine.begin_update(2)
    engine.load({name.replace(one, two): tensor for name, tensor in tensors.items() if name.startswith(one)})
    engine.load({name: tensor for name, tensor in tensors.items() if "1.mlp.experts.2.gate_proj" in name})
    engine.end_update()
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(engine.probe(two, x), engine.probe(one, x))
    assert not torch.equal(engine.probe(two, x), engine_of(model).probe(two, x))


@pytest.mark.parametrize("build", [tiny_llama, tiny_moe], ids=["llama", "moe"])
def test_live_layers_are_those_of_the_checkpoint(build):
    model = prepared(build(), grouped(32))
    live = engine_of(model).live_layers()
    quantized = quantized_layers(model)
    assert set(live) == {*quantized, *unquantized_layers(model)}
    for name, layer in live.items():
        wanted = str(quantized[name].scheme) if name in quantized else "bfloat16"
        assert layer.precision == wanted
        assert layer.kernel == ("reference" if name in quantized else layer.kernel)
        rows = layer.rows[1] - layer.rows[0]
        assert rows == (
            quantized[name].out_features if name in quantized else model.get_submodule(name).weight.shape[0]
        )


def test_a_probe_of_what_is_not_there():
    with pytest.raises(ValueError, match=r"model.layers.7.mlp.up_proj: the engine has no such layer"):
        engine_of(prepared(tiny_llama(), grouped(32))).probe("model.layers.7.mlp.up_proj", torch.ones(1, 256))


# Kernels --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(kernels.TRITON_PROBLEM), reason="no Triton")
@pytest.mark.parametrize("scheme", [grouped(32), channel()], ids=["g32", "channel"])
def test_the_triton_kernel_reads_the_words_themselves(scheme):
    """Under the interpreter here: the same operands as the reference's, sums in another order."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    model = prepared(tiny_llama(**small, **WIDE).to(device), scheme)
    engine, ids = engine_of(model, kernel="triton"), token_ids(2, 5)
    assert {layer.kernel for name, layer in engine.live_layers().items() if name != "lm_head"} == {"triton"}
    name, x = "model.layers.0.mlp.up_proj", torch.randn(5, 64, dtype=torch.bfloat16, device=device)
    layer = quantized_layers(model)[name]
    kernel = kernels.find("linear", "triton", scheme, torch.device(device))
    assert torch.equal(engine.probe(name, x), kernel.run(x, layer.quantize(), scheme, None, None))
    reference = torch.stack(engine_of(model, kernel="reference").logprobs(ids.tolist()))
    assert (torch.stack(engine.logprobs(ids.tolist())) - reference).abs().max() < 0.2


@pytest.mark.parametrize(
    ("make", "error", "found"),
    [
        (lambda: EmbeddedEngine.from_model(nn.Linear(4, 4)), TypeError, "runs transformers models, found Linear"),
        (lambda: EmbeddedEngine.from_model("a-model"), TypeError, "runs transformers models, found str"),
        (lambda: EmbeddedEngine.from_model(tiny_llama()), ValueError, "the model is not prepared"),
        (
            lambda: EmbeddedEngine.from_model(prepared(tiny_llama(), grouped(32)), scheme="W8A8"),
            ValueError,
            "is prepared with int4 g32",
        ),
        (
            lambda: EmbeddedEngine.from_model(prepared(tiny_llama(), "W8A8"), kernel="torch-int4"),
            kernels.KernelUnavailable,
            "'torch-int4' cannot compute int8",
        ),
        (
            lambda: EmbeddedEngine.from_model(prepared(tiny_llama(), "W8A8"), kernel="marlin"),
            kernels.KernelUnavailable,
            "no linear kernel 'marlin'",
        ),
    ],
)
def test_what_it_cannot_run_is_refused(make, error, found):
    with pytest.raises(error, match=found):
        make()


def test_a_buffer_that_only_the_constructor_computes_is_refused_by_name():
    """On meta it has no value, and what memory held would be served."""
    model = tiny_llama()
    kind = type("Odd", (type(model),), {})

    def init(self: Any, config: Any) -> None:
        type(model).__init__(self, config)
        self.model.register_buffer("slopes", torch.arange(4.0), persistent=False)

    kind.__init__ = init
    odd = kind(model.config)
    with pytest.raises(ValueError, match=r"model.slopes is stored in no checkpoint"):
        EmbeddedEngine.from_model(prepared(odd, grouped(32)))
