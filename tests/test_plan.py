"""A plan's bytes are those of the real tensors, its arithmetic comes out, and what it cannot count it says."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import prepared, tiny_llama, tiny_moe, token_ids
from safetensors import safe_open
from transformers import (
    DeepseekV3Config,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3MoeConfig,
)

import lockstep
from lockstep import Scheme, grid
from lockstep.plan import GIB, GPUS, Line, Plan, plan, plan_command, tokens
from lockstep.qat.kv_cache import SPECS, prepare_kv_cache, quantize, token_scale
from lockstep.scheme import PRESETS, Rule

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
QUANTIZED = 2 * (256 * 256 * 2 + 128 * 256 * 2 + 3 * 256 * 512)  # weights of q, o, k, v, gate, up, down
OTHERS = 2 * 512 * 256 + 5 * 256  # embedding, head, norms


def llama(**config) -> LlamaConfig:
    return LlamaConfig(**SIZES | config)


def lines(made: Plan, what: str, counts: str = "after", use: str = "serve") -> list[Line]:
    return [line for line in made.lines if (line.what, line.use) == (what, use) and line.counts in (counts, "both")]


def size(made: Plan, what: str, counts: str = "after", use: str = "serve") -> int:
    return sum(line.bytes for line in lines(made, what, counts, use))


# -- against real tensors


def test_weights_are_the_bytes_of_the_model_and_of_its_export(tmp_path):
    model = prepared(tiny_llama(), "W4A16")
    made = plan(model.config, "W4A16")
    assert size(made, "weights", "before") == sum(parameter.nbytes for parameter in model.parameters())
    lockstep.export.save_pretrained(model, tmp_path, format="pack-quantized")
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name).nbytes for name in file.keys() if not name.endswith("_shape")}  # noqa: SIM118
    assert size(made, "codes") == sum(count for name, count in stored.items() if name.endswith("_packed"))
    assert size(made, "scales") == sum(count for name, count in stored.items() if name.endswith("_scale"))
    assert size(made, "codes") + size(made, "scales") + size(made, "other weights") == sum(stored.values())


@pytest.mark.parametrize("name", PRESETS)
def test_a_layer_takes_what_its_codes_and_scales_take(name):
    """Against the tensors of the reference arithmetic, codes packed as their bits allow."""
    spec = PRESETS[name].weights
    quantized = grid.quantize(torch.randn(192, 256).to(torch.bfloat16), spec)
    codes, scales, zero_points = spec.stored_bytes(192, 256, packed=spec.format.startswith("int"))
    assert codes == quantized.codes.numel() * spec.bits // 8
    extra = [tensor.nbytes for tensor in quantized[3:] if tensor is not None]
    assert scales == quantized.scale.nbytes + sum(extra)
    assert zero_points == (0 if quantized[2] is None else quantized[2].numel() * spec.bits // 8)


def test_packed_rows_and_zero_points_fill_words():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    spec = Scheme.preset("W4A16_ASYM", strategy="channel").weights
    codes = pack_to_int32(torch.zeros(12, 36, dtype=torch.int8), 4)
    zero_points = pack_to_int32(torch.zeros(12, 1, dtype=torch.int8), 4, packed_dim=0)
    assert spec.stored_bytes(12, 36, packed=True) == (codes.nbytes, 12 * 2, zero_points.nbytes)


@pytest.mark.parametrize("kv", ["fp8", "int8_per_token_head"])
def test_the_cache_takes_what_a_real_cache_takes(kv):
    model, cache = tiny_llama(), DynamicCache()
    model(token_ids(3, 20), past_key_values=cache)
    states = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    made = plan(model.config, "W4A16", kv, context=20, batch=3)
    assert size(made, "KV cache", "before") == sum(tensor.nbytes for tensor in states)
    spec = SPECS[kv]
    scales = [token_scale(tensor, spec) if spec.dynamic else torch.ones(1) for tensor in states]
    codes = [quantize(tensor, spec, scale) for tensor, scale in zip(states, scales, strict=True)]
    assert size(made, "KV cache") == sum(tensor.nbytes for tensor in codes)
    assert size(made, "KV cache scales") == sum(scale.nbytes for scale in scales)


@pytest.mark.parametrize(
    ("scheme", "kv"), [("W4A16", None), ("W8A8", None), ("FP8_DYNAMIC", "int8_per_token_head"), ("W4A16", "fp8")]
)
def test_saved_activations_are_about_what_autograd_saves(scheme, kv):
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}

    def saved(model) -> int:
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(token_ids(2, 64), labels=token_ids(2, 64))
        return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)

    made = plan(llama(**wide), scheme, kv, train_tokens=128)
    for counts, model in (("before", tiny_llama(**wide)), ("after", prepared(tiny_llama(**wide), scheme))):
        if counts == "after" and kv:
            prepare_kv_cache(model, kv)
            for name, buffer in model.named_buffers():
                if name.endswith("_scale"):
                    buffer.fill_(0.01)
        planned = size(made, "saved activations", counts, "train") + size(made, "logits", counts, "train")
        assert saved(model.train()) == pytest.approx(planned, rel=0.03)


# -- by hand


def test_every_line_by_hand():
    made = plan(llama(), "W4A16", "fp8", context=1000, batch=4, train_tokens=100)
    assert made.parameters == QUANTIZED + OTHERS
    serve = {(line.what, line.counts): line.bytes for line in made.lines if line.use == "serve"}
    assert serve == {
        ("weights", "before"): 2 * (QUANTIZED + OTHERS),
        ("codes", "after"): QUANTIZED // 2,
        ("scales", "after"): QUANTIZED // 128 * 2,
        ("other weights", "after"): 2 * OTHERS,
        ("KV cache", "before"): 2 * 2 * 2 * 64 * 1000 * 4 * 2,  # layers, keys and values, heads, head dim
        ("KV cache", "after"): 2 * 2 * 2 * 64 * 1000 * 4,
        ("KV cache scales", "after"): 2 * 2 * 4,
        ("activations", "both"): 4000 * (2 * 256 + 3 * 512) * 2,
        ("logits", "both"): 4 * 512 * 4,
    }
    train = {(line.what, line.counts): line.bytes for line in made.lines if line.use == "train"}
    activations = 100 * 2 * 2 * (8 * 256 + 2 * 256 + 2 * 128 + 4 * 512)
    assert train == {
        ("masters", "both"): 4 * made.parameters,
        ("gradients", "both"): 4 * made.parameters,
        ("AdamW moments", "both"): 8 * made.parameters,
        ("a fake-quantized weight", "after"): 512 * 256 * 2,
        ("saved activations", "before"): activations,
        ("saved activations", "after"): activations + 100 * 2 * 256,
        ("logits", "both"): 100 * 512 * 10,
    }
    assert made.bytes("serve", "before") == sum(count for (_, when), count in serve.items() if when != "after")
    assert made.bytes("train", "after") == sum(count for (_, when), count in train.items() if when != "before")


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8", "FP8", "FP8_BLOCK", "NVFP4", "MXFP4"])
@pytest.mark.parametrize("kv", [None, "fp8", "int8_per_token_head"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_arithmetic_that_is_shown_comes_out(scheme, kv, checkpointing):
    made = plan(llama(), scheme, kv, context=77, batch=3, gpus=2, checkpointing=checkpointing)
    assert len(made.lines) > 12
    for line in made.lines:
        text = re.sub(r"\d+ layers, (?=\S+ weights)|\([a-z_][^)]*\)|, in 32-bit words|,(?=\d)", "", line.arithmetic)
        formula = re.sub(r"\bx\b", "*", text)
        formula = re.sub(r"[A-Za-z][A-Za-z-]*", "", formula)
        assert eval(formula) == line.bytes, line


def test_tied_embeddings_are_counted_once_and_stay_beside_a_quantized_head():
    tied = plan(llama(tie_word_embeddings=True), "W4A16")
    assert tied.parameters == QUANTIZED + OTHERS - 512 * 256
    assert size(tied, "other weights") == 2 * (OTHERS - 512 * 256)
    head = plan(llama(tie_word_embeddings=True), "W4A16", ignore=[])
    assert size(head, "codes") == (QUANTIZED + 512 * 256) // 2
    assert size(head, "other weights") == size(tied, "other weights")
    untied = plan(llama(), "W4A16", ignore=())
    assert size(untied, "other weights") == 2 * (OTHERS - 512 * 256)


def test_targets_and_ignore_are_those_of_prepare():
    chosen = {"targets": ["re:.*mlp.*_proj"], "ignore": ["re:.*layers.1.*", "lm_head"]}
    made = plan(llama(), "W4A16", **chosen)
    report = lockstep.prepare(tiny_llama(), "W4A16", **chosen)
    assert size(made, "codes") == sum(row.parameters for row in report.quantized) // 2
    assert size(plan(llama(), "W4A16", targets="Linear", ignore="lm_head"), "codes") == QUANTIZED // 2


def test_a_recipe_counts_each_layer_with_the_first_rule_that_matches():
    rules = [Rule(["re:.*down_proj"], "W8A8"), Rule(["re:.*layers.1.*v_proj"], None), Rule(["Linear"], "W4A16")]
    made = plan(llama(), rules)
    down, value = 2 * 512 * 256, 128 * 256
    assert [line.bytes for line in lines(made, "codes")] in (
        [down, (QUANTIZED - down - value) // 2],
        [(QUANTIZED - down - value) // 2, down],
    )
    assert size(made, "other weights") == 2 * (OTHERS + value)
    assert made.scheme in ("W8A8, W4A16", "W4A16, W8A8")


@pytest.mark.parametrize(
    ("config", "counted"),
    [
        (llama(), 2 * 100),
        (MistralConfig(**SIZES, sliding_window=30), 2 * 30),
        (MistralConfig(**SIZES, sliding_window=300), 2 * 100),
        (
            Gemma3TextConfig(
                **SIZES, head_dim=64, sliding_window=30, layer_types=["sliding_attention", "full_attention"]
            ),
            30 + 100,
        ),
    ],
    ids=["full", "window", "wide window", "mixed"],
)
def test_a_sliding_window_ends_the_cache(config, counted):
    made = plan(config, "W4A16", "fp8_per_token_head", context=100)
    assert size(made, "KV cache", "before") == counted * 2 * 2 * 64 * 2
    assert size(made, "KV cache") == counted * 2 * 2 * 64
    assert size(made, "KV cache scales") == counted * 2 * 2 * 4


def test_latent_attention_caches_the_latent():
    config = DeepseekV3Config(**SIZES | {"num_key_value_heads": 4, "kv_lora_rank": 64, "qk_rope_head_dim": 32})
    made = plan(config, "W4A16", targets=["re:.*o_proj"], context=10)
    assert size(made, "KV cache", "before") == 2 * 10 * (64 + 32) * 2
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn is latent attention"):
        plan(config, "W4A16", "fp8", targets=["re:.*o_proj"])


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3", "llama4_text", "nemotron_h"])
@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "NVFP4A16"])
def test_experts_take_the_bytes_of_their_export(kind, scheme):
    if scheme == "W4A16":
        scheme = Scheme.preset("W4A16", group_size=32)
    model = tiny_moe(kind)
    made = plan(model.config, scheme)
    stored = dict(lockstep.export.stream(prepared(model, scheme)))
    layers = {name.rpartition(".")[0] for name in stored if name.endswith(".weight_scale")}
    parts = {layer: {n: t.nbytes for n, t in stored.items() if n.rpartition(".")[0] == layer} for layer in layers}
    codes = {f"{layer}.{leaf}" for layer in layers for leaf in ("weight_packed", "weight")}
    scales = {f"{layer}.{leaf}" for layer in layers for leaf in ("weight_scale", "weight_global_scale")}
    assert sum("experts" in layer for layer in layers) >= 8
    assert size(made, "codes") == sum(n for part in parts.values() for name, n in part.items() if name in codes)
    assert size(made, "scales") == sum(n for part in parts.values() for name, n in part.items() if name in scales)
    others = {n: t for n, t in stored.items() if n not in codes | scales and not n.endswith("weight_shape")}
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}  # which a plan does not count
    counted = [tensor.nbytes for name, tensor in others.items() if name.rpartition(".")[2] not in buffers]
    assert size(made, "other weights") == sum(counted)
    assert not made.notes or "caches keys" in made.notes[0]


def test_experts_by_hand():
    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, head_dim=64)
    experts, attention = 2 * 4 * 3 * 256 * 128, 2 * (2 * 256 * 256 + 2 * 256 * 128)
    made = plan(config, "W4A16")
    assert size(made, "codes") == (experts + attention) // 2
    (codes,) = lines(made, "codes")
    assert codes.arithmetic.startswith(f"{2 * (4 * 3 + 4)} layers, {experts + attention:,} weights")
    assert size(made, "scales") < (experts + attention) // 128 * 2 + 1
    assert size(made, "other weights") == 2 * (2 * 512 * 256 + 5 * 256 + 2 * 2 * 64 + 2 * 4 * 256)  # and the routers
    assert size(made, "activations") == 4096 * (2 * 256 + 3 * 2 * 128) * 2
    assert made.notes == ()
    # In its kernel's order an expert is fake-quantized after another, else the module's are together.
    assert size(plan(config, "W8A8"), "a fake-quantized weight", use="train") == 256 * 256 * 2
    groups = Scheme.preset("W4A16", group_size=32)
    assert size(plan(config, groups), "a fake-quantized weight", use="train") == 4 * 3 * 256 * 128 * 2
    # Inputs of q, k and v, and o; of each of two experts gate's and up's apart, and down's; their 16 bits are not kept.
    made = plan(config, "W8A8", train_tokens=100)
    before, after = (size(made, "saved activations", when, "train") for when in ("before", "after"))
    codes_of_a_layer = 256 + 256 + 2 * (256 + 256 + 128)
    assert after - before == 100 * 2 * (codes_of_a_layer - 2 * 256 - 2 * 256 - 2 * 2 * 128)


def test_experts_that_stay_are_said_so():
    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, head_dim=64)
    experts = 2 * 4 * 3 * 256 * 128
    made = plan(config, "W4A16", ignore=["lm_head", "re:.*experts$"])
    assert size(made, "other weights") > 2 * experts
    (note,) = made.notes
    assert note.startswith(f"{experts:,} parameters are in 4 weights of more than two dimensions (experts)")
    assert note in " ".join(str(made).split())


def test_several_gpus_share_matrices_and_heads():
    one, two, four = (plan(llama(), "W4A16", "fp8", 1000, 4, gpus=count) for count in (1, 2, 4))
    assert size(one, "codes") == size(four, "codes") == 4 * lines(four, "codes")[0].per_gpu
    assert lines(two, "other weights")[0].per_gpu == 2 * (512 * 256 + 5 * 256)  # norms are repeated
    (cache,) = lines(two, "KV cache")
    assert 2 * cache.per_gpu == cache.bytes
    (repeated,) = lines(four, "KV cache")  # four GPUs, two heads
    assert 2 * repeated.per_gpu == repeated.bytes
    assert [line.per_gpu for line in lines(four, "masters", use="train")] == [one.parameters]
    assert size(one, "a gathered layer", use="train") == 0
    assert size(two, "a gathered layer", use="train") == 2 * (QUANTIZED // 2 + 2 * 256)


def test_a_gpu_fits_up_to_nine_tenths():
    usable = int(GPUS["L4 24 GB"] * GIB * 0.9)
    for count, fits in ((usable, True), (usable + 1, False)):
        made = Plan("m", "s", "k", 1, 1, (Line("serve", "all", "", 2 * count, count),), ())
        assert made.fits("L4 24 GB", "serve", "after") is fits
        assert made.json()["fits"]["L4 24 GB"]["serve_before"] is fits


# -- the command


def test_the_command_reads_a_folder_without_weights(tmp_path, capsys):
    llama().save_pretrained(tmp_path / "model")
    written = tmp_path / "plan.json"
    for model in (tmp_path / "model", tmp_path / "model" / "config.json"):
        assert plan_command(str(model), "W4A16", "fp8", context="32k", batch=64, json=str(written)) == 0
    shown = " ".join(re.sub(r"[│┃]", " ", capsys.readouterr().out).split())
    assert "H200 141 GB 140.4" in shown
    data = json.loads(written.read_text())
    made = plan(llama(), "W4A16", "fp8", 32768, 64)
    assert data["totals"]["serve_after"]["bytes"] == made.bytes("serve", "after")
    assert [line["bytes"] for line in data["lines"]] == [line.bytes for line in made.lines]


def test_the_command_is_one_that_jsonargparse_reads(tmp_path, capsys):
    from jsonargparse import auto_cli

    llama().save_pretrained(tmp_path)
    words = [str(tmp_path), "--scheme", "W8A8", "--kv", "fp8", "--context", "32k", "--batch", "64", "--gpus", "2"]
    assert auto_cli(plan_command, args=words, as_positional=True) == 0
    assert "32,768 tokens" in capsys.readouterr().out


@given(st.integers(0, 10**9))
def test_tokens_are_read_with_and_without_units(number):
    assert tokens(str(number)) == number
    assert tokens(f"{number}k") == tokens(f" {number}K ") == 1024 * number
    assert tokens(f"{number}m") == 1024 * 1024 * number


@pytest.mark.parametrize("text", ["", "k", "1.5k", "-1", "32kb", "many"])
def test_what_is_no_number_of_tokens_is_refused(text):
    with pytest.raises(ValueError, match="write 32768 or 32k"):
        tokens(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpus": 3}, "gpus=3: 4 attention heads do not divide"),
        ({"batch": 0}, "batch=0: at least 1"),
        ({"kv": "fp9"}, "no KV cache format 'fp9'"),
        ({"targets": ["Lineer"]}, "target 'Lineer' matches no module"),
        ({"ignore": ["Linear"]}, "nothing to quantize"),
        ({"scheme": [Rule(["Linear"], None)]}, "quantizes nothing"),
        ({"model": "nowhere"}, "nowhere is not there"),
        (
            {"model": llama(hidden_size=96)},
            r"layers\.0\.self_attn\.q_proj, weight of .* 96 input features do not divide into gr.*",
        ),
        ({"model": llama(quantization_config={"quant_method": "gptq"})}, "is quantized already"),
    ],
)
def test_what_cannot_be_planned_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"model": llama(), "scheme": "W4A16"} | arguments)


def test_an_embedding_is_no_linear_layer():
    with pytest.raises(TypeError, match=r"embed_tokens is a .*Embedding"):
        plan(llama(), "W4A16", targets=["Embedding"])
    with pytest.raises(ValueError, match=r"saved as \.json"):
        plan_command("anywhere", json="plan.txt")
