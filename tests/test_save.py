"""`save_pretrained` and `stream`: what engines load is bit for bit what trained, or nothing is written."""

from __future__ import annotations

import copy
import json
import re
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TinyMlp, channel, grouped, prepared, tiny_llama, token_ids
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import lockstep
from lockstep import Scheme, grid
from lockstep.align.metrics import relative_error
from lockstep.export import Checkpoint, ExportError, checks, formats, save_pretrained, stream
from lockstep.export.checkpoint import bitwise_equal
from lockstep.layouts import marlin, words
from lockstep.qat.prepare import quantized_modules

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
IN_FP16 = {"scale_dtype": FP16, "served_dtype": FP16}
SCHEMES = {
    "g32": grouped(32),
    "g64": grouped(64),
    "g128": grouped(128),
    "channel": channel(),
    "compressed-tensors": grouped(128, scale_rule="amax/7.5"),
    "fp16": grouped(128, **IN_FP16),
    "fp16-channel": channel(**IN_FP16),
    "q4_0": grouped(32, scale_rule="max/-8", **IN_FP16),
}
every_format = pytest.mark.parametrize("format", formats.PACKED)  # the others: test_formats.py
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def load_all(directory: Path) -> dict[str, Tensor]:
    """Every stored tensor; fails if one is stored twice."""
    shards = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    merged = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert len(merged) == sum(map(len, shards))
    return merged


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(bitwise_equal(tensor, b[name]) for name, tensor in a.items())


def quantization_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


# The bits ----------------------------------------------------------------------------------------------------------


@every_format
@every_scheme
@pytest.mark.parametrize("master", [BF16, FP16, FP32], ids=str)
def test_the_bits_that_trained_are_the_bits_that_ship(tmp_path, format, scheme, master):
    """Read back from the folder: scheme, every quantized weight, every other tensor, and nothing else."""
    model = prepared(tiny_llama(master), scheme)
    checkpoint = Checkpoint(save_pretrained(model, tmp_path / "out", format))
    assert (checkpoint.format, checkpoint.scheme) == (format, scheme)

    layers, state = dict(quantized_modules(model)), model.state_dict()
    assert set(checkpoint.layers) == set(layers)
    for name, layer in layers.items():
        served = grid.dequantize(checkpoint.layer(name), scheme.weights)
        assert bitwise_equal(served, grid.fake_quantize(layer.weight, scheme.weights)), name
        del state[f"{name}.weight"]
    assert set(checkpoint.plain_tensors()) == set(state)
    for name, tensor in state.items():
        assert bitwise_equal(checkpoint.tensor(name), tensor.to(scheme.weights.served_dtype)), name


@every_scheme
@pytest.mark.parametrize("master", [BF16, FP32], ids=str)
def test_transformers_unpacks_the_weights_that_trained(tmp_path, scheme, master):
    """compressed-tensors' own decompression is the second opinion on our layout and on ``code * scale``."""
    model = prepared(tiny_llama(master), scheme)
    loaded = AutoModelForCausalLM.from_pretrained(save_pretrained(model, tmp_path / "out"), dtype="auto")
    loaded(token_ids(1, 2))  # it unpacks at the first call
    for name, layer in quantized_modules(model):
        weight = loaded.get_submodule(name).weight
        assert bitwise_equal(weight, grid.fake_quantize(layer.weight, scheme.weights)), name


# Why it is not 0 everywhere: transformers multiplies by a channel's scale before the GEMM, Marlin and so the prepared
# model after it; autocast keeps norms, embeddings and the residual stream of fp32 masters in fp32; and transformers
# adds a bias before the one rounding, Marlin after a first one. Measured: 0.009, 0.001 in fp16.
LOGITS = {
    "g32": (tiny_llama, grouped(32), 0),
    "g64": (tiny_llama, grouped(64), 0),
    "g128": (tiny_llama, grouped(128), 0),
    "compressed-tensors": (tiny_llama, grouped(128, scale_rule="amax/7.5"), 0),
    "tied": (lambda: tiny_llama(tie_word_embeddings=True), grouped(), 0),
    "fp16": (lambda: tiny_llama(FP16), grouped(**IN_FP16), 0),
    "q4_0": (lambda: tiny_llama(FP16), grouped(32, scale_rule="max/-8", **IN_FP16), 0),
    "bias": (lambda: tiny_llama(attention_bias=True), grouped(), 0.02),
    "channel": (tiny_llama, channel(), 0.02),
    "fp16-channel": (lambda: tiny_llama(FP16), channel(**IN_FP16), 0.002),
    "fp32": (lambda: tiny_llama(FP32), grouped(), 0.02),
    "fp32-channel": (lambda: tiny_llama(FP32), channel(), 0.02),
}


@pytest.mark.parametrize(("build", "scheme", "tolerance"), LOGITS.values(), ids=LOGITS)
@torch.no_grad()
def test_transformers_computes_the_logits_that_trained(tmp_path, build, scheme, tolerance):
    """Relative error of the logits; 0 means every bit."""
    model = prepared(build(), scheme)
    loaded = AutoModelForCausalLM.from_pretrained(save_pretrained(model, tmp_path / "out"), dtype="auto")
    served = loaded(token_ids()).logits
    assert served.dtype == scheme.weights.served_dtype
    autocast = torch.autocast("cpu", scheme.weights.served_dtype) if model.dtype == FP32 else nullcontext()
    with autocast:
        trained = model(token_ids()).logits
    assert relative_error(served, trained) <= tolerance


# What engines look for ---------------------------------------------------------------------------------------------

LAYER = "model.layers.0.mlp.down_proj"  # 256 outputs, 512 inputs, 4 groups
STORED = {
    "pack-quantized": {
        "weight_packed": (torch.int32, [256, 64]),
        "weight_scale": (BF16, [256, 4]),
        "weight_shape": (torch.int64, [2]),
    },
    "gptq": {
        "qweight": (torch.int32, [64, 256]),
        "qzeros": (torch.int32, [4, 32]),
        "scales": (BF16, [4, 256]),
        "g_idx": (torch.int32, [512]),
    },
    "marlin": {"B": (torch.int32, [32, 512]), "s": (BF16, [4, 256])},
}


@every_format
def test_tensors_have_the_names_and_dtypes_that_engines_load(tmp_path, format):
    model = prepared(tiny_llama(FP32))
    stored = load_all(save_pretrained(model, tmp_path / "out", format))
    of_layer = {name.removeprefix(f"{LAYER}."): tensor for name, tensor in stored.items() if name.startswith(LAYER)}
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in of_layer.items()} == STORED[format]
    owners = {name.rpartition(".")[0] for name in stored}
    assert owners == {name.rpartition(".")[0] for name in model.state_dict()}
    plain = [tensor.dtype for name, tensor in stored.items() if name.endswith(("norm.weight", "lm_head.weight"))]
    assert plain == [BF16] * 6


class Projection(nn.Linear):
    """What a model's own code may call a linear layer."""


BLOCKS = 11
IGNORED = ["blocks.1", "blocks.0", "lm_head"]  # blocks.1 is how blocks.10 begins


def many_blocks() -> nn.Module:
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(128, 128) for _ in range(BLOCKS))})
    model["lm_head"] = nn.Linear(128, 16)
    return prepared(model.to(BF16), ignore=IGNORED)


@pytest.mark.parametrize(("format", "key"), [("pack-quantized", "ignore"), ("marlin", "modules_to_not_convert")])
def test_config_names_every_linear_layer_that_is_left_as_it_is(tmp_path, format, key):
    """An engine allocates packed words for each linear layer that is not named, and finds none to load."""
    config = quantization_config(save_pretrained(many_blocks(), tmp_path / "out", format))
    assert sorted(config[key]) == sorted(IGNORED)


def test_gptq_config_names_the_layers_for_vllm_and_for_sglang(tmp_path):
    """vLLM asks ``modules_in_block_to_quantize``; SGLang quantizes what no ``-:`` regex of ``dynamic`` matches."""
    model = many_blocks()
    config = quantization_config(save_pretrained(model, tmp_path / "out", "gptq"))
    quantized = [name for name, _ in quantized_modules(model)]
    assert config["modules_in_block_to_quantize"] == [quantized]

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    skips = [re.compile(rule.removeprefix("-:")) for rule in config["dynamic"] if rule.startswith("-:")]
    assert len(skips) == len(config["dynamic"])
    assert [name for name in linear if not any(skip.match(name) for skip in skips)] == quantized


def test_quantized_lm_head_is_declared_where_engines_ask_for_it(tmp_path):
    model = prepared(tiny_llama(), ignore=())
    assert quantization_config(save_pretrained(model, tmp_path / "a"))["ignore"] == []
    assert quantization_config(save_pretrained(model, tmp_path / "b", "gptq"))["lm_head"] is True


def test_config_names_unquantized_subclasses_of_linear_too(tmp_path):
    """To an engine they are linear layers like any other."""
    model = tiny_llama()
    model.get_submodule(LAYER).__class__ = Projection
    config = quantization_config(save_pretrained(prepared(model, ignore=["lm_head", LAYER]), tmp_path / "out"))
    assert sorted(config["ignore"]) == ["lm_head", LAYER]


# The folder --------------------------------------------------------------------------------------------------------


def test_folder_holds_config_generation_config_and_tokenizer(tmp_path):
    """Without them engines do not know the model, stop at the wrong token, or cannot read a prompt."""
    model = prepared(tiny_llama(FP32))
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=3)
    words_of = {"<unk>": 0, "to": 1, "be": 2}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words_of, "<unk>")), unk_token="<unk>")
    out = save_pretrained(model, tmp_path / "deep" / "out", tokenizer=tokenizer)
    assert out == tmp_path / "deep" / "out"
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    loaded = GenerationConfig.from_pretrained(out)
    assert (loaded.max_new_tokens, loaded.eos_token_id) == (7, 3)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == words_of


def test_relative_directory_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert save_pretrained(prepared(TinyMlp()), "out") == tmp_path / "out"


@pytest.mark.parametrize("scheme", [grouped(), grouped(**IN_FP16)], ids=str)
@every_format
def test_any_module_exports_with_its_buffers(tmp_path, format, scheme):
    """Floats are served in one dtype, counters and masks keep their values, scratch memory is not stored."""
    model = prepared(TinyMlp(dtype=FP32), scheme)
    out = save_pretrained(model, tmp_path / "out", format)
    checkpoint, served = Checkpoint(out), scheme.weights.served_dtype
    assert checkpoint.layers == ("first", "second")
    assert json.loads((out / "config.json").read_text())["dtype"] == str(served).removeprefix("torch.")
    plain = {name: checkpoint.tensor(name) for name in checkpoint.plain_tensors()}
    kept = ("first.bias", "norm.weight", "norm.bias", "second.bias", "mask", "temperature")
    expected = {name: model.state_dict()[name].to(served) for name in kept} | {"steps": torch.tensor(7)}
    assert same_tensors(plain, expected)


def test_what_the_model_keeps_in_fp32_is_stored_in_fp32(tmp_path):
    """A router or a norm that its authors keep wide must not lose bits on the way out."""
    model = prepared(TinyMlp(dtype=FP32))
    model._keep_in_fp32_modules = ["norm"]
    stored = load_all(save_pretrained(model, tmp_path / "out"))
    assert bitwise_equal(stored["norm.weight"], model.norm.weight.detach())
    assert stored["first.bias"].dtype == BF16


def test_tied_embeddings_are_stored_once(tmp_path):
    """Engines tie them again; a second tensor would be loaded over the first."""
    model = prepared(tiny_llama(tie_word_embeddings=True))
    out = save_pretrained(model, tmp_path / "out")
    assert "lm_head.weight" not in load_all(out)
    assert quantization_config(out)["ignore"] == ["lm_head"]
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert bitwise_equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_tie_that_training_has_broken_is_not_tied_again(tmp_path):
    """The engine would serve the embedding for the head that was trained; without the tie both are stored."""
    model = prepared(tiny_llama(tie_word_embeddings=True))
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    with pytest.raises(ExportError, match=r"lm_head.weight has become another weight than model.embed_tokens.weight"):
        save_pretrained(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    model.config.tie_word_embeddings = False
    out = save_pretrained(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert bitwise_equal(loaded.lm_head.weight, model.lm_head.weight)
    assert bitwise_equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert lockstep.align.compare(model, out, {"input_ids": token_ids()}).aligned


SHARED = {
    "whole": lambda x: x,
    "head": lambda x: x[:2],
    "column": lambda x: x[:, 1:2],
    "transposed": lambda x: x.T,
    "tail": lambda x: x[2:],
}


@pytest.mark.parametrize("view", SHARED.values(), ids=SHARED)
def test_tensors_that_share_memory_are_each_stored(tmp_path, view):
    """safetensors refuses shared memory; the user must not hear of it when training has ended."""
    model = prepared(TinyMlp())
    model.register_buffer("base", torch.arange(16.0, dtype=BF16).view(4, 4))
    model.register_buffer("view", view(model.base))
    stored = load_all(save_pretrained(model, tmp_path / "out"))
    assert bitwise_equal(stored["base"], model.base)
    assert bitwise_equal(stored["view"], model.view)


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    """An export in the middle of training must not show in the training."""
    model = prepared(tiny_llama(FP32)).train()
    model.model.layers[0].eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [(module, type(module), module.training, sorted(vars(module))) for module in model.modules()]
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    config, generation = copy.deepcopy(model.config.to_dict()), model.generation_config.to_dict()
    save_pretrained(model, tmp_path / "out")
    dict(stream(model, "gptq"))
    assert same_tensors(model.state_dict(), state)
    assert [(module, type(module), module.training, sorted(vars(module))) for module in model.modules()] == modules
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_model_exports_under_the_names_of_the_model(wrap):
    """``_orig_mod.model.layers.0...`` is a tensor that no engine looks for."""
    model = prepared(TinyMlp())
    assert [name for name, _ in stream(wrap(model))] == [name for name, _ in stream(model)]


# Shards ------------------------------------------------------------------------------------------------------------


def test_shards_hold_every_tensor_once_and_agree_with_their_index(tmp_path):
    """A tensor that the index does not list is one that engines leave uninitialized."""
    model, limit = prepared(tiny_llama()), 150_000
    whole, out = load_all(save_pretrained(model, tmp_path / "whole")), tmp_path / "sharded"
    save_pretrained(model, out, max_shard_size=limit)
    assert same_tensors(load_all(out), whole)

    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in sorted(out.glob("*.safetensors"))}
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    sizes = {file: sum(tensor.nbytes for tensor in tensors.values()) for file, tensors in shards.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert list(shards) == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 3
    assert all(size <= limit or len(shards[file]) == 1 for file, size in sizes.items())

    assert {path.name for path in out.iterdir()} - shards.keys() == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    }
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("size", [20_000, "20000", "20000B", "20KB", "20 kb", "0.02MB"])
def test_shard_sizes_are_bytes_or_decimal_units(tmp_path, size):
    """As transformers reads them."""
    out = save_pretrained(prepared(TinyMlp()), tmp_path / "out", max_shard_size=size)
    assert len(list(out.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("size", ["0", 0, "0GB", -1, "", "5 parsecs", "5GiB", "GB", 1.5, None])
def test_size_that_cannot_be_read_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=f"max_shard_size={re.escape(repr(size))}: give bytes, or a string"):
        save_pretrained(prepared(TinyMlp()), tmp_path / "out", max_shard_size=size)
    assert not list(tmp_path.iterdir())


# Streams -----------------------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("build", [tiny_llama, lambda: tiny_llama(FP32, tie_word_embeddings=True), TinyMlp])
def test_stream_yields_what_the_folder_holds(tmp_path, format, build):
    """A live engine gets the weights that a restarted one would load."""
    model = prepared(build())
    streamed = list(stream(model, format))
    assert len(dict(streamed)) == len(streamed)
    assert not any(tensor.requires_grad for _, tensor in streamed)
    assert same_tensors(dict(streamed), load_all(save_pretrained(model, tmp_path / "out", format)))


@every_format
def test_stream_holds_two_packed_layers_at_a_time(format, monkeypatch):
    """Syncing a model that fills the memory must not need a second copy of it: what is handed out, and the next."""
    model, checked = prepared(tiny_llama()), checks.checked
    marker, packed, most = formats.find(format).tensors(grouped().weights)[0], [], 0

    def watched(*arguments: Any) -> dict[str, Tensor]:
        tensors = checked(*arguments)
        packed.append(weakref.ref(tensors[marker]))
        return tensors

    monkeypatch.setattr(checks, "checked", watched)
    for _ in stream(model, format):
        most = max(most, sum(reference() is not None for reference in packed))
    assert (len(packed), most) == (14, 2)


def test_stream_of_a_model_in_the_served_dtype_copies_no_plain_tensor():
    model = prepared(tiny_llama())
    state = model.state_dict()
    plain = {name: tensor for name, tensor in stream(model) if name in state}
    assert len(plain) == 7
    assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in plain.items())


def test_stream_reads_the_weights_as_they_are_at_each_call():
    """After an optimizer step the engine must get the new ones."""
    model = prepared(TinyMlp())
    before = dict(stream(model))
    with torch.no_grad():
        model.first.weight.mul_(-1)
    changed = {name for name, tensor in stream(model) if not bitwise_equal(tensor, before[name])}
    assert changed == {"first.weight_packed"}


# C3: a mismatch raises and names the layer -------------------------------------------------------------------------

GUILTY = "model.layers.1.mlp.up_proj"


def flips_a_code(pack: Callable[..., Tensor], guilty: Tensor) -> Callable[..., Tensor]:
    """`pack` with one bit of one field turned when it packs the codes `guilty`."""

    def faulty(codes: Tensor, *args: Any) -> Tensor:
        if torch.equal(codes, guilty):
            codes = codes.clone()
            codes[3, 5] ^= 1
        return pack(codes, *args)

    return faulty


@pytest.mark.parametrize(
    ("format", "module", "function"),
    [("pack-quantized", words, "pack"), ("gptq", words, "pack"), ("marlin", marlin, "pack_weight")],
    ids=formats.PACKED,
)
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "earlier-export"])
def test_one_wrong_bit_stops_the_export(tmp_path, monkeypatch, format, module, function, earlier):
    """The engine would serve a model that never trained; what it serves today stays where it is."""
    model, out = prepared(tiny_llama()), tmp_path / "out"
    if earlier:
        save_pretrained(model, out, format)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    guilty = grid.quantize(model.get_submodule(GUILTY).weight, grouped().weights).codes
    monkeypatch.setattr(module, function, flips_a_code(getattr(module, function), guilty))
    message = f"^{GUILTY}: the packed words do not give back the weight that it trained with"
    with pytest.raises(ExportError, match=message):
        save_pretrained(model, out, format, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == ([out] if earlier else [])
    with pytest.raises(ExportError, match=message):
        dict(stream(model, format))


def test_scales_in_the_wrong_order_stop_the_export(tmp_path, monkeypatch):
    pack_scales = marlin.pack_scales
    monkeypatch.setattr(marlin, "pack_scales", lambda scale: pack_scales(scale.flip(0)))
    with pytest.raises(ExportError, match=r"^model\.layers\.0\.self_attn\.q_proj: the packed words"):
        save_pretrained(prepared(tiny_llama()), tmp_path / "out", "marlin")


# Refusals ----------------------------------------------------------------------------------------------------------


def with_value(name: str, value: float, scheme: Scheme = grouped(), dtype: torch.dtype = FP32) -> nn.Module:  # noqa: B008
    """A model with one value of one parameter replaced."""
    model = prepared(TinyMlp(dtype=dtype), scheme)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return prepared(TinyMlp())


def single(in_features: int, out_features: int) -> nn.Module:
    return prepared(nn.ModuleDict({"odd": nn.Linear(in_features, out_features, dtype=BF16)}), channel())


def unlike(name: str) -> nn.Module:
    """One of the projections that engines fuse is left in full precision."""
    return prepared(tiny_llama(), ignore=["lm_head", f"model.layers.1.{name}"])


REFUSALS = {
    "not prepared": (tiny_llama, {}, "no layer of this LlamaForCausalLM is prepared: call lockstep.prepare first"),
    "meta": (on_meta, {}, "is on the meta device: load weights into the model first"),
    "nan": (
        lambda: with_value("second.weight", float("nan"), dtype=BF16),
        {},
        r"second\.weight: 1 of 32768 values are NaN or infinite in bfloat16",
    ),
    "inf": (
        lambda: with_value("first.weight", float("inf")),
        {},
        r"first\.weight: 1 of 32768 values are NaN or infinite in float32",
    ),
    "plain nan": (
        lambda: with_value("norm.weight", float("nan")),
        {},
        r"norm\.weight: 1 of 256 values are NaN or infinite in bfloat16",
    ),
    "plain inf": (lambda: with_value("first.bias", float("-inf")), {}, r"first\.bias: 1 of 256 values"),
    "plain overflow": (
        lambda: with_value("norm.bias", 1e5, grouped(**IN_FP16)),
        {},
        r"norm\.bias: 1 of 256 values are NaN or infinite in float16",
    ),
    "overflow": (
        lambda: with_value("first.weight", 1e6, grouped(**IN_FP16)),
        {},
        r"first\.weight, as it is served: \d+ of 32768 values are NaN or infinite in float16",
    ),
    "scale dtype": (
        lambda: prepared(TinyMlp(), grouped(scale_dtype=FP32)),
        {},
        r"first .* holds scales in the served dtype bfloat16 and would round the float32 ones",
    ),
    "word": (lambda: single(100, 64), {}, "odd cannot be stored as pack-quantized: N=64, K=100.*Name it in ignore"),
    "gptq": (
        lambda: single(128, 20),
        {"format": "gptq"},
        "odd cannot be stored as gptq: N=20, K=128: .* multiples of 32",
    ),
    "marlin": (lambda: single(128, 96), {"format": "marlin"}, "odd cannot be stored as marlin: N=96, K=128: Marlin"),
    "marlin fp32": (
        lambda: prepared(TinyMlp(dtype=FP32), grouped(scale_dtype=FP32, served_dtype=FP32)),
        {"format": "marlin"},
        "first cannot be stored as marlin: .*served in float32",
    ),
    "q alone": (
        lambda: unlike("self_attn.q_proj"),
        {},
        r"layers\.1\.self_attn\.q_proj is not quantized, but engines run .*k_proj, .*v_proj as one layer: ignore all",
    ),
    "up alone": (
        lambda: unlike("mlp.up_proj"),
        {},
        r"layers\.1\.mlp\.up_proj is not quantized, but engines run .*gate_proj, .*up_proj as one layer",
    ),
    "tied head": (
        lambda: prepared(tiny_llama(tie_word_embeddings=True), ignore=()),
        {},
        r"lm_head trains quantized but shares its weight with model\.embed_tokens.*Name lm_head in ignore, or untie",
    ),
    "format": (
        lambda: prepared(TinyMlp()),
        {"format": "ggml"},
        "no export format 'ggml': there are pack-quantized, int-quantized",
    ),
}


@pytest.mark.parametrize(("build", "arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusal_says_why_and_writes_nothing(tmp_path, build, arguments, message):
    """What an engine would refuse, or serve as another model, is refused here; a half-written folder is worse."""
    model, error = build(), ValueError if "ggml" in message else ExportError
    with pytest.raises(error, match=message):
        save_pretrained(model, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        list(stream(model, **arguments))


@every_format
def test_projections_left_out_together_are_served_together(tmp_path, format):
    """Ignoring all of a fused layer is the way to keep it in full precision."""
    together = ["lm_head", r"re:.*layers\.1\.self_attn\.[qkv]_proj"]
    model = prepared(tiny_llama(), ignore=together)
    checkpoint = Checkpoint(save_pretrained(model, tmp_path / "out", format))
    assert not any(re.search(r"layers\.1\.self_attn\.[qkv]_proj", name) for name in checkpoint.layers)
    assert len(checkpoint.layers) == 11


def test_unprepared_again_is_refused(tmp_path):
    model = prepared(TinyMlp())
    lockstep.unprepare(model)
    with pytest.raises(ExportError, match="no layer of this TinyMlp is prepared"):
        save_pretrained(model, tmp_path / "out")
