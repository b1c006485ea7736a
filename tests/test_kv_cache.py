"""Keys and values in training are those of the engine's cache: exactly quantized, everywhere, and nothing else."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_llama, token_ids
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    DeepseekV3Config,
    Gemma3nTextConfig,
    MistralConfig,
    Qwen3Config,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lockstep.qat import kv_cache
from lockstep.qat.kv_cache import (
    SPECS,
    dequantize,
    freeze,
    kv_cache_spec,
    observe,
    prepare_kv_cache,
    quantize,
    token_scale,
    unprepare_kv_cache,
)
from lockstep.scheme import KVCacheSpec

STATIC = [KVCacheSpec(f, s) for f in ("fp8_e4m3", "fp8_e5m2", "int8") for s in ("tensor", "head")]
DYNAMIC = [KVCacheSpec(f, "token", dynamic=True) for f in ("fp8_e4m3", "fp8_e5m2", "int8")]
LARGEST = {"fp8_e4m3": 448, "fp8_e5m2": 57344, "int8": 127}
NAMES = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}

every_spec = pytest.mark.parametrize("spec", [*STATIC, *DYNAMIC], ids=str)
both = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def build(kind: str = "llama", implementation: str = "sdpa", dtype=torch.bfloat16, **config):
    if kind == "llama":
        model = tiny_llama(dtype, **SIZES | config)
    else:
        head = {"head_dim": 32} if kind == "qwen3" else {}
        made = {"qwen3": Qwen3Config, "mistral": MistralConfig}[kind](**SIZES | head | config)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(made, dtype=dtype).eval()
    model.set_attn_implementation(implementation)
    return model


def calibrated(model, spec: KVCacheSpec, batch: Tensor | None = None):
    prepare_kv_cache(model, spec)
    observe(model)
    with torch.no_grad():
        model(token_ids() if batch is None else batch)
    freeze(model)
    return model


def attention_inputs(model, ids: Tensor) -> list[dict]:
    """What each attention function was called with, and what it gave, seen from outside."""
    calls = []
    modules = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    originals = [module.kv_cache.attend for module in modules]

    def recording(original):
        def attend(module, query, key, value, mask, **kwargs):
            out = original(module, query, key, value, mask, **kwargs)
            calls.append({"module": module, "query": query, "key": key, "value": value, "mask": mask, "out": out[0]})
            return out

        return attend

    for module, original in zip(modules, originals, strict=True):
        module.kv_cache.attend = recording(original)
    with torch.no_grad():
        model(ids)
    for module, original in zip(modules, originals, strict=True):
        module.kv_cache.attend = original
    return calls


# -- the arithmetic


def by_hand(x: float, scale: float, spec: KVCacheSpec) -> float:
    """The code nearest to a number, from the list of all codes."""
    codes = torch.arange(-128, 128).to(torch.int8)
    if spec.format != "int8":
        codes = codes.view(spec.code_dtype)
    values = codes.float()
    values = values[values.isfinite()].unique().double()
    quotient = x * torch.tensor(1 / scale).float().item() if spec.format == "int8" else x / scale
    distance = (values - torch.tensor(quotient).float().double()).abs()
    return values[distance == distance.min()].tolist()


@every_spec
@given(seed=st.integers(0, 2**32), magnitude=st.integers(-20, 12))
def test_codes_are_the_nearest_ones_and_saturate(spec, seed, magnitude):
    """A cast of torch's own would turn what is too large into NaN or infinity."""
    x = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(seed)) * 2.0**magnitude
    scale = token_scale(x, spec) if spec.dynamic else torch.full((2, 1, 1), 2.0 / LARGEST[spec.format])
    codes = quantize(x, spec, scale)
    assert codes.dtype == spec.code_dtype
    assert codes.shape == x.shape
    for number, divisor, code in zip(
        x.flatten().tolist()[:12],
        scale.expand_as(x).flatten().tolist()[:12],
        codes.float().flatten().tolist()[:12],
        strict=True,
    ):
        assert code in by_hand(number, divisor, spec)


def test_ties_go_where_each_kernel_sends_them():
    ties = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 127.0]])
    token = KVCacheSpec("int8", "token", True)
    assert quantize(ties, KVCacheSpec("int8"), torch.ones(1)).tolist() == [[0, 2, 2, 0, -2, 127]]  # half to even
    assert token_scale(ties, token).tolist() == [[1.0]]
    assert quantize(ties, token, torch.ones(1, 1)).tolist() == [[1, 2, 3, -1, -2, 127]]  # half away from zero
    fp8 = quantize(torch.tensor([17.0, 19.0, 1e9, -torch.inf]), KVCacheSpec(), torch.ones(1))
    assert fp8.float().tolist() == [16, 20, 448, -448]
    assert quantize(torch.tensor([torch.inf]), SPECS["fp8_e5m2"], torch.ones(1)).float().item() == 57344
    assert quantize(torch.tensor([torch.nan]), KVCacheSpec(), torch.ones(1)).float().isnan().all()


def test_static_fp8_divides():
    """Multiplying by the reciprocal, as an engine's linear layers do, gives other codes."""
    x, scale = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 4, torch.tensor([0.0071])
    codes = quantize(x, KVCacheSpec(), scale)
    assert torch.equal(codes.float(), (x / scale).to(torch.float8_e4m3fn).float())
    ties = torch.tensor([17.0, 19.0, 21.0, 23.0]) * torch.tensor([0.3, 0.7, 0.011, 0.9])
    for tie, divisor in zip(ties, (0.3, 0.7, 0.011, 0.9), strict=True):
        expected = (tie / torch.tensor(divisor)).to(torch.float8_e4m3fn)
        assert quantize(tie, KVCacheSpec(), torch.tensor(divisor)).float() == expected.float()


@pytest.mark.parametrize("spec", [KVCacheSpec("int8"), *DYNAMIC], ids=str)
def test_the_others_multiply_by_the_reciprocal(spec):
    """Against numpy; a division gives other codes."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(4096, 1, generator=generator) * 0.1 + 1e-3
    x = (torch.randint(-96, 96, (4096, 64), generator=generator) + 0.5) * scale
    quotient = x.numpy() * (np.float32(1) / scale.numpy())
    divided = x.numpy() / scale.numpy()
    if spec.format == "int8":
        away = lambda y: np.trunc(y + np.copysign(np.float32(0.5), y))  # noqa: E731
        rounded, other = (away(y) if spec.dynamic else np.rint(y) for y in (quotient, divided))
        assert (rounded != other).any()
    else:
        rounded = torch.from_numpy(quotient).to(spec.code_dtype).float().numpy()
    assert np.array_equal(quantize(x, spec, scale).float().numpy(), rounded)


@pytest.mark.parametrize("spec", DYNAMIC, ids=str)
def test_a_token_of_zeros_is_zero(spec):
    x = torch.zeros(1, 2, 3, 8)
    assert torch.equal(token_scale(x, spec), torch.full((1, 2, 3, 1), 1e-6))
    assert not dequantize(quantize(x, spec, token_scale(x, spec)), token_scale(x, spec), torch.bfloat16).any()


def test_dequantizing_rounds_once():
    codes, scale = torch.tensor([3, 127], dtype=torch.int8), torch.tensor([0.0123456789])
    assert torch.equal(dequantize(codes, scale, torch.bfloat16), (codes.double() * scale.double()).to(torch.bfloat16))


# -- in a model


@both
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@every_spec
def test_attention_computes_on_quantized_keys_and_values(kind, implementation, spec):
    """Against attention written out: softmax(q k^T) v with keys and values quantized by hand."""
    model = calibrated(build(kind, implementation, torch.float32), spec)
    raw = build(kind, implementation, torch.float32)
    with torch.no_grad():
        hidden = raw.model.layers[0].input_layernorm(raw.model.embed_tokens(token_ids()))
        attention = raw.model.layers[0].self_attn
        states = attention.k_proj(hidden).view(2, 16, 2, -1)
        states = attention.k_norm(states) if kind == "qwen3" else states
        cos, sin = raw.model.rotary_emb(hidden, torch.arange(16)[None])
        first = states.transpose(1, 2)
        half = first.shape[-1] // 2
        turned = torch.cat((-first[..., half:], first[..., :half]), dim=-1)
        first = first * cos[:, None] + turned * sin[:, None]
    calls = attention_inputs(model, token_ids())
    assert len(calls) == 2
    key_scale = token_scale(first, spec) if spec.dynamic else calls[0]["module"].k_scale
    assert torch.equal(calls[0]["key"], dequantize(quantize(first, spec, key_scale), key_scale, torch.float32))
    assert not torch.equal(calls[0]["key"], first)
    for call in calls:
        key, value = (call[name].repeat_interleave(2, dim=1) for name in ("key", "value"))
        scores = call["query"] @ key.mT * call["module"].scaling
        scores = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(call["out"], (scores.softmax(-1) @ value).transpose(1, 2), rtol=1e-5, atol=1e-5)


@both
@every_spec
def test_the_effect_is_exactly_quantization(implementation, spec):
    """The same attention function on keys and values quantized by hand gives the same bits; without, others."""
    model = calibrated(build(implementation=implementation), spec)
    plain = build(implementation=implementation)
    ids = token_ids()
    quantized = model(ids).logits
    assert not torch.equal(quantized, plain(ids).logits)

    originals = {}
    for index, layer in enumerate(plain.model.layers):
        scales = {} if spec.dynamic else dict(model.model.layers[index].self_attn.named_buffers())
        originals[layer.self_attn] = scales
    function = kv_cache._original(type(plain.model.layers[0].self_attn), implementation)

    def by_hand(module, query, key, value, *args, **kwargs):
        states = []
        for name, x in (("k_scale", key), ("v_scale", value)):
            scale = token_scale(x, spec) if spec.dynamic else originals[module][name]
            states.append(dequantize(quantize(x, spec, scale), scale, x.dtype))
        return function(module, query, *states, *args, **kwargs)

    AttentionInterface.register("by_hand", by_hand)
    AttentionMaskInterface.register("by_hand", ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    plain.set_attn_implementation("by_hand")
    assert torch.equal(plain(ids).logits, quantized)


@both
@pytest.mark.parametrize("spec", [KVCacheSpec(), KVCacheSpec("int8", "head"), DYNAMIC[2]], ids=str)
def test_generation_computes_what_teacher_forcing_does(implementation, spec):
    """A cache that was quantized twice, or a token that its own step sees unquantized, would show here."""
    model = calibrated(build("qwen3", implementation, torch.float32), spec)
    prompt = token_ids(2, 5)
    out = model.generate(
        prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0
    )
    with torch.no_grad():
        forced = model(out.sequences).logits[:, 4:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), forced, rtol=1e-4, atol=1e-5)
    assert torch.equal(forced.argmax(-1), out.sequences[:, 5:])


@both
def test_a_sliding_window_slides(implementation):
    spec = SPECS["int8_per_token_head"]
    model = build("mistral", implementation, torch.float32, sliding_window=4)
    prepare_kv_cache(model, spec)
    calls = attention_inputs(model, token_ids())
    key, value = (calls[0][name].repeat_interleave(2, dim=1) for name in ("key", "value"))
    ones = torch.ones(16, 16).bool()
    scores = (calls[0]["query"] @ key.mT * calls[0]["module"].scaling).masked_fill(
        ones.triu(1) | ones.tril(-4), -torch.inf
    )
    torch.testing.assert_close(calls[0]["out"], (scores.softmax(-1) @ value).transpose(1, 2), rtol=1e-5, atol=1e-5)
    prompt = token_ids(1, 7)
    out = model.generate(prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        forced = model(out.sequences).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), forced, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("spec", [KVCacheSpec(strategy="head"), DYNAMIC[2]], ids=str)
def test_gradient_checkpointing_changes_nothing(implementation, spec):
    def gradients(checkpointing: bool):
        model = calibrated(build(implementation=implementation), spec).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(token_ids(), labels=token_ids()).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    once, again = gradients(False), gradients(True)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert once["model.layers.0.self_attn.k_proj.weight"].any()


@pytest.mark.parametrize("spec", [*STATIC, *DYNAMIC], ids=str)
def test_gradients_pass_straight_through_what_is_not_clipped(spec):
    x = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    largest = LARGEST[spec.format]
    scale = token_scale(x, spec) if spec.dynamic else torch.tensor([1.0 / largest])
    quantized = kv_cache._FakeQuantize.apply(x, scale, spec)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    quantized.backward(upstream)
    low = -128 / 127 if spec.format == "int8" else -1.0
    inside = torch.ones(()) if spec.dynamic else ((x >= low) & (x <= 1)).float()
    assert torch.equal(x.grad, upstream * inside)
    assert spec.dynamic or not inside.all()


# -- what prepare changes, and what not


@every_spec
def test_nothing_but_the_documented_keys_changes(spec, tmp_path):
    model = build("qwen3")
    keys, classes = set(model.state_dict()), [type(module) for module in model.modules()]
    config = model.config.to_json_string()
    assert prepare_kv_cache(model, spec) == NAMES
    added = set() if spec.dynamic else {f"{name}.{key}" for name in NAMES for key in ("k_scale", "v_scale")}
    assert set(model.state_dict()) == keys | added
    for key in added:
        scale = model.state_dict()[key]
        assert scale.dtype == torch.float32
        assert scale.shape == ((2, 1, 1) if spec.strategy == "head" else (1,))
        assert scale.isnan().all()
    assert [type(module) for module in model.modules()] == classes
    assert model.config.to_json_string() == config
    assert kv_cache_spec(model) == spec
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path)._attn_implementation in (None, "sdpa")

    assert prepare_kv_cache(model, spec) == NAMES  # twice changes nothing
    unprepare_kv_cache(model)
    assert set(model.state_dict()) == keys
    assert model.config._attn_implementation == "sdpa"
    assert kv_cache_spec(model) is None
    assert torch.equal(model(token_ids()).logits, build("qwen3")(token_ids()).logits)


@both
def test_attention_weights_are_still_there(implementation):
    model = build(implementation=implementation)
    prepare_kv_cache(model, "int8_per_token_head")
    if implementation == "eager":
        weights = model(token_ids(), output_attentions=True).attentions
        assert weights[0].shape == (2, 4, 16, 16)
    padded = torch.ones(2, 16, dtype=torch.long)
    padded[0, :6] = 0
    assert model(token_ids(), attention_mask=padded).logits[0, 8:].isfinite().all()


def test_uncalibrated_scales_are_an_error_that_names_the_module():
    model = build()
    prepare_kv_cache(model, "fp8")
    for mode in (True, False):
        with pytest.raises(RuntimeError, match=r"model\.layers\.0\.self_attn\.k_scale is \[nan\].*lockstep calibrate"):
            model.train(mode)(token_ids())
    model = calibrated(model, SPECS["fp8"])
    model(token_ids())
    model.model.layers[1].self_attn.v_scale.fill_(0)
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.self_attn\.v_scale is \[0\.0\]"):
        model(token_ids())


@pytest.mark.parametrize("spec", STATIC, ids=str)
def test_calibration_passes_everything_and_freezes_ranges(spec):
    model, plain = build(), build()
    prepare_kv_cache(model, spec)
    assert observe(model) == NAMES
    assert torch.equal(model(token_ids()).logits, plain(token_ids()).logits)
    freeze(model)
    prepare_kv_cache(plain, SPECS["int8_per_token_head"])
    raw = []
    for module in (layer.self_attn for layer in plain.model.layers):
        module.kv_cache.observer = ([type("Keep", (), {"update": lambda _, x: raw.append(x)})()],) * 2
    plain(token_ids())
    for index, layer in enumerate(model.model.layers):
        for name, x in zip(("k_scale", "v_scale"), raw[2 * index :], strict=False):
            amax = x.float().abs().amax(dim=(0, 2, 3)).view(2, 1, 1)
            amax = amax if spec.strategy == "head" else amax.amax().view(1)
            assert torch.equal(getattr(layer.self_attn, name), amax / LARGEST[spec.format])
    assert not torch.equal(model(token_ids()).logits, build()(token_ids()).logits)


def test_observers_that_saw_nothing_are_an_error_and_change_nothing():
    model = build()
    prepare_kv_cache(model, "fp8")
    observe(model)
    with pytest.raises(ValueError, match=r"the keys of model\.layers\.0\.self_attn were never seen"):
        freeze(model)
    assert model.model.layers[0].self_attn.k_scale.isnan().all()
    assert model.model.layers[0].self_attn.kv_cache.observer is not None


def test_dynamic_scales_need_no_calibration():
    model = build()
    prepare_kv_cache(model, "fp8_per_token_head")
    assert observe(model) == []
    before = model(token_ids()).logits
    freeze(model)
    assert torch.equal(model(token_ids()).logits, before)


def test_scales_are_never_rounded_and_travel_in_a_checkpoint():
    model = calibrated(build(dtype=torch.float32), KVCacheSpec(strategy="head"))
    scales = {name: scale.clone() for name, scale in model.state_dict().items() if name.endswith("_scale")}
    model.to(torch.bfloat16)
    assert all(torch.equal(model.state_dict()[name], scale) for name, scale in scales.items())
    assert model.model.layers[0].self_attn.k_proj.weight.dtype == torch.bfloat16

    fresh = build()
    prepare_kv_cache(fresh, KVCacheSpec(strategy="head"))
    fresh.to(torch.bfloat16)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(token_ids()).logits, model(token_ids()).logits)


def test_copies_and_pickles_quantize_with_scales_of_their_own():
    model = calibrated(build(), KVCacheSpec())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(token_ids()).logits, model(token_ids()).logits)
        other.to(torch.float32)
        other.model.layers[0].self_attn.k_scale.fill_(1)
        assert model.model.layers[0].self_attn.k_scale != 1
        assert model.model.layers[0].self_attn.k_proj.weight.dtype == torch.bfloat16


def test_prepares_on_the_meta_device():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES))
    assert prepare_kv_cache(model, KVCacheSpec(strategy="head")) == NAMES
    assert model(token_ids().to("meta")).logits.shape == (2, 16, 512)
    model.to_empty(device="cpu")
    assert model.model.layers[0].self_attn.k_scale.isnan().all()
    assert model.model.layers[0].self_attn.k_scale.shape == (2, 1, 1)


def test_a_model_inside_a_module_is_found():
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = build()

        def forward(self, ids):
            return self.net(ids)

    assert prepare_kv_cache(Task(), "int8_per_token_head") == [f"net.{name}" for name in NAMES]


def test_another_model_of_the_same_config_stays_as_it_is():
    model = build()
    other = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).eval()
    expected = other(token_ids()).logits
    prepare_kv_cache(model, "int8_per_token_head")
    assert torch.equal(other(token_ids()).logits, expected)


# -- what cannot be done says so


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", "paged|sdpa"])
def test_other_attention_is_refused_by_name(implementation):
    model = build()
    model.config._attn_implementation_internal = implementation
    with pytest.raises(ValueError, match=r"self_attn: .*found '" + implementation.replace("|", r"\|") + "'.*sdpa"):
        prepare_kv_cache(model, "fp8")
    assert "model.layers.0.self_attn.k_scale" not in model.state_dict()


def test_switching_the_attention_afterwards_is_noticed():
    model = build()
    prepare_kv_cache(model, "int8_per_token_head")
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn: the attention implementation was set to 'eager'"):
        kv_cache_spec(model)


def test_models_whose_cache_is_something_else_are_refused():
    shared = Gemma3nTextConfig(**SIZES, num_kv_shared_layers=1, layer_types=["full_attention"] * 2, head_dim=16)
    with torch.device("meta"):
        latent = AutoModelForCausalLM.from_config(DeepseekV3Config(**SIZES | {"num_hidden_layers": 1}))
        crossing = AutoModelForSeq2SeqLM.from_config(BartConfig(encoder_layers=1, decoder_layers=1, d_model=64))
        sharing = AutoModelForCausalLM.from_config(shared)
        recurrent = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="latent attention"):
        prepare_kv_cache(latent, "fp8")
    with pytest.raises(TypeError, match="Sequential has no attention that a KV cache can be quantized in"):
        prepare_kv_cache(recurrent, "fp8")
    with pytest.raises(TypeError, match="encoder-decoder"):
        prepare_kv_cache(crossing, "fp8")
    with pytest.raises(TypeError, match=r"layers\.1\.self_attn: Gemma3nTextAttention reads another layer's"):
        prepare_kv_cache(sharing, "fp8")
    assert not any(name.endswith("k_scale") for name in sharing.state_dict())


def test_another_spec_needs_unprepare_first():
    model = build()
    prepare_kv_cache(model, "fp8")
    with pytest.raises(ValueError, match=r"prepared with a fp8_e4m3 static tensor KV cache: call unprepare_kv_cache"):
        prepare_kv_cache(model, "int8")
    with pytest.raises(ValueError, match="no KV cache format 'fp9': choose fp8"):
        prepare_kv_cache(model, "fp9")


@pytest.mark.parametrize("strategy", ["tensor", "head"])
def test_the_config_is_one_that_compressed_tensors_reads(strategy):
    spec = KVCacheSpec(strategy=strategy)
    written = {"config_groups": {"W4A16": ["Linear"]}, "kv_cache_scheme": kv_cache.config(spec)}
    read = QuantizationConfig.model_validate(written).kv_cache_scheme
    assert (read.num_bits, read.type, read.symmetric, read.dynamic) == (8, "float", True, False)
    assert read.strategy == ("attn_head" if strategy == "head" else "tensor")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("int8", "TensorRT-LLM"),
        ("fp8_e5m2", "--kv-cache-dtype fp8_e5m2"),
        ("int8_per_token_head", "--kv-cache-dtype int8_per_token_head"),
        ("fp8_per_token_head", "--kv-cache-dtype fp8_per_token_head"),
        (KVCacheSpec("fp8_e5m2", "token", True), "no engine serves it by token"),
    ],
)
def test_what_a_kv_cache_scheme_cannot_say_names_who_serves_it(spec, reason):
    with pytest.raises(ValueError, match=reason):
        kv_cache.config(spec)
