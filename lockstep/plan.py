"""What a model needs of memory, before quantization and after: serving and training, by GPU, arithmetic shown.

The model is built on the ``meta`` device, so weights are counted from the shapes of its own modules, with the targets
and ignore patterns of `lockstep.prepare`. B is bytes, h the hidden size, P all parameters.

Serving, on one GPU or tensor parallel over several:

- codes: weights x bits / 8, rows padded to 32-bit words where the format packs; scales: one for each group, channel,
  block or tensor, in their stored dtype, and the single numbers that a format adds (global scales, input scales); zero
  points: packed 32-bit words; everything else in the served dtype. Matrices are divided over GPUs, vectors repeated.
- KV cache: layers x 2 x KV heads x head dim x tokens x sequences x B, tokens being the context, or the sliding window
  if it is shorter; scales 4 B each. KV heads are divided over GPUs, or repeated if there are fewer. Not rounded up to
  blocks, of which engines keep one partly empty for each sequence.
- activations of one engine step, an estimate: tokens x (2 h + 3 x MLP width) x 2 B, tokens the smaller of 8,192 and
  all; logits: sequences x vocabulary x 4 B.

Training, all parameters, AdamW, sharded over the GPUs (FSDP, ZeRO-3):

- masters P x B, gradients P x B, both moments 2 x P x B, in the masters' dtype; one gathered decoder layer in 16 bits
  with several GPUs; after: the fake-quantized weight of the largest layer, of which there is one at a time: of a
  module of experts all of them, but where their kernel's order asks for one after another.
- saved activations of one GPU: tokens x layers x 2 B x (8 h + 2 x queries + keys + values + 4 x MLP width): of the two
  norms their inputs in fp32 and outputs before the weight (6 h), the inputs of q/k/v and gate/up (2 h), what attention
  keeps, and gate, up, their activation and product. That is what transformers' Llama saves with sdpa; an estimate for
  other layers. Quantized inputs are saved as codes, once for layers that see the same one, and not in 16 bits, but for
  o_proj's, which attention keeps too; each of the experts that a token uses saves its own, gate and up apart. A
  static KV cache adds a byte for each key and value: whether it was clipped.
  With gradient checkpointing: tokens x layers x 2 B x h, and all of one layer.
- logits: tokens x vocabulary x 10 B (16 bits, fp32 and its gradient).

A GPU fits if what it needs is at most 90 % of its memory; the rest is for CUDA, fragmentation and communication.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lockstep.qat.experts import DOWN, Expert, QATExperts, in_kernels_order
from lockstep.qat.prepare import as_text, prepare, quantized_experts, quantized_modules, run_as_one, show
from lockstep.scheme import DTYPES, Rule, Scheme, dtype_name

# GiB that the driver reports, ECC on where the card has it on as delivered.
GPUS = {
    "B200 192 GB": 179.1,
    "H200 141 GB": 140.4,
    "H100 80 GB": 79.6,
    "A100 80 GB": 80.0,
    "A100 40 GB": 40.0,
    "L40S 48 GB": 45.0,
    "RTX 5090 32 GB": 31.8,
    "RTX 4090 24 GB": 24.0,
    "L4 24 GB": 22.5,
}
USABLE = 0.9
STEP_TOKENS = 8192  # vLLM's max_num_batched_tokens on large GPUs
GIB = 2**30

Use = Literal["serve", "train"]


@dataclass(frozen=True)
class Line:
    """One line of the arithmetic: `bytes` of the whole model and of each GPU, `counts` before, after, or both."""

    use: Use
    what: str
    arithmetic: str
    bytes: int
    per_gpu: int
    counts: Literal["before", "after", "both"] = "both"


@dataclass(frozen=True)
class Plan:
    """What `plan` found. Printing it gives tables; `json` gives plain data, sizes in bytes."""

    model: str
    scheme: str
    kv: str
    gpus: int
    parameters: int
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    def bytes(self, use: Use, when: Literal["before", "after"], per_gpu: bool = False) -> int:
        """The sum of the lines for `use`, of the whole model or of each GPU."""
        lines = [line for line in self.lines if line.use == use and line.counts in (when, "both")]
        return sum(line.per_gpu if per_gpu else line.bytes for line in lines)

    def fits(self, gpu: str, use: Use, when: Literal["before", "after"]) -> bool:
        """Whether `gpus` of this GPU (a key of `GPUS`) are enough."""
        return self.bytes(use, when, per_gpu=True) <= USABLE * GPUS[gpu] * GIB

    def json(self) -> dict[str, Any]:
        """All of it as plain data."""
        pairs = [(use, when) for use in ("serve", "train") for when in ("before", "after")]
        totals = {
            f"{use}_{when}": {"bytes": self.bytes(use, when), "per_gpu": self.bytes(use, when, per_gpu=True)}  # type: ignore[arg-type]
            for use, when in pairs
        }
        fits = {gpu: {f"{use}_{when}": self.fits(gpu, use, when) for use, when in pairs} for gpu in GPUS}  # type: ignore[arg-type]
        return asdict(self) | {"totals": totals, "fits": fits}

    def __rich__(self):  # type: ignore[no-untyped-def]
        from rich.console import Group

        return Group(self._arithmetic("serve"), self._arithmetic("train"), self._gpus(), *self.notes)

    def __str__(self) -> str:
        return as_text(self, width=160)

    def _arithmetic(self, use: Use):  # type: ignore[no-untyped-def]
        from rich.table import Table

        quantized = f"{self.scheme}, KV cache {self.kv}"
        title = {"serve": "Serving", "train": "Training"}[use]
        table = Table(title=f"{title} {self.model}: {quantized}", title_justify="left")
        for header in (f"GiB, {self.gpus} GPU(s)", "arithmetic", "before", "after"):
            table.add_column(header, overflow="fold", justify="right" if header in ("before", "after") else "left")
        for line in self.lines:
            if line.use == use:
                shown = [_gib(line.bytes) if line.counts in (when, "both") else "" for when in ("before", "after")]
                table.add_row(line.what, line.arithmetic, *shown)
        table.add_section()
        for label, per_gpu in (("together", False), ("each GPU", True)):
            before, after = (self.bytes(use, when, per_gpu) for when in ("before", "after"))  # type: ignore[arg-type]
            table.add_row(label, f"after / before = {after / before:.1%}", _gib(before), _gib(after))
        return table

    def _gpus(self):  # type: ignore[no-untyped-def]
        from rich.table import Table

        table = Table(title=f"Which GPUs fit, {self.gpus} of them, {USABLE:.0%} of the memory", title_justify="left")
        headers = ("GPU", "GiB", "serve before", "serve after", "train before", "train after")
        for header in headers:
            table.add_column(header, justify="right" if header == "GiB" else "left")
        for gpu, memory in GPUS.items():
            answers = [
                "yes" if self.fits(gpu, use, when) else "no"  # type: ignore[arg-type]
                for use in ("serve", "train")
                for when in ("before", "after")
            ]
            table.add_row(gpu, f"{memory:.1f}", *answers)
        return table


def plan(
    model: Any,
    scheme: Scheme | str | Sequence[Rule],
    kv: str | None = None,
    context: int = 4096,
    batch: int = 1,
    *,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
    gpus: int = 1,
    train_tokens: int = 8192,
    master_dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> Plan:
    """Count what serving and training a causal language model take; the formulas are the module's docstring.

    Args:
        model: a transformers folder, its ``config.json``, or a config. Not one that is quantized already.
        scheme: a preset's name, a `Scheme`, or a recipe of rules, whose own targets hold then.
        kv: how keys and values are cached, a name of `lockstep.qat.kv_cache.SPECS`; None: as they are.
        context: tokens of each sequence in the cache.
        batch: sequences at once.
        targets: what is quantized, as in `lockstep.prepare`.
        ignore: what is left out.
        gpus: how many GPUs share the model.
        train_tokens: tokens of a training step on each GPU.
        master_dtype: dtype of masters, gradients and moments.
        checkpointing: whether layers are computed again in the backward pass.

    Raises:
        ValueError: no transformers model; heads that do not divide over `gpus`; a cache that cannot be quantized; a
            number below 1; what `lockstep.prepare` refuses.
        TypeError: the same, of a matched module that is not ``nn.Linear`` or experts.
    """
    from lockstep.qat import kv_cache

    for name, number in (("context", context), ("batch", batch), ("gpus", gpus), ("train_tokens", train_tokens)):
        if number < 1:
            raise ValueError(f"{name}={number}: at least 1.")
    rules = scheme if isinstance(scheme, Sequence) and not isinstance(scheme, str) else [Rule(targets, scheme)]
    schemes = [Scheme.of(rule.scheme) for rule in rules if rule.scheme is not None]
    if not schemes:
        raise ValueError("the recipe quantizes nothing: none of its rules has a scheme.")
    served = schemes[0].weights.served_dtype
    built = _on_meta(model, served)
    text = built.config.get_text_config()
    if text.num_attention_heads % gpus:
        raise ValueError(f"gpus={gpus}: {text.num_attention_heads} attention heads do not divide over them.")

    chosen = _chosen(built, rules, ignore, getattr(text, "num_experts_per_tok", None) or 1)
    spec = kv_cache.spec_of(kv) if kv is not None else None
    attention = list(kv_cache.caching_attention(built))
    notes = _notes(built, chosen, attention, text)
    lines = [
        *_weights(built, chosen, served, gpus),
        *_cache(attention, text, spec, context, batch, served, gpus),
        *_step(text, context, batch, served, gpus),
        *_states(built, chosen, master_dtype, served, gpus),
        *_saved(chosen, attention, text, spec, train_tokens, checkpointing, gpus),
    ]
    return Plan(
        model=str(model) if isinstance(model, str | Path) else type(model).__name__,
        scheme=", ".join(dict.fromkeys(one.preset_name or str(one) for one in schemes)),
        kv=str(spec) if spec else dtype_name(served),
        gpus=gpus,
        parameters=sum(parameter.numel() for parameter in built.parameters()),
        lines=tuple(lines),
        notes=tuple(notes),
    )


def plan_command(
    model: str,
    scheme: Scheme | str = "W4A16",
    kv: str | None = None,
    context: str = "4k",
    batch: int = 1,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
    gpus: int = 1,
    train_tokens: str = "8k",
    masters: Literal["float32", "bfloat16", "float16"] = "float32",
    checkpointing: bool = False,
    json: str | None = None,
) -> int:
    """Show what serving and training a model take of memory, before quantization and after, and which GPUs fit.

    Args:
        model: a transformers folder or its config.json; weights are not needed.
        scheme: a preset's name, or fields such as {weights: {group_size: 64}}.
        kv: how keys and values are cached: fp8, int8_per_token_head, ...; default: in 16 bits.
        context: tokens of each sequence in the cache, such as 32768 or 32k (1k is 1024).
        batch: sequences at once.
        targets: what is quantized, as in lockstep.prepare.
        ignore: what is left out.
        gpus: how many GPUs share the model: tensor parallel to serve it, sharded to train it.
        train_tokens: tokens of a training step on each GPU.
        masters: dtype of master weights, gradients and optimizer states.
        checkpointing: plan for gradient checkpointing.
        json: write all of it as JSON there, sizes in bytes.
    """
    import json as writer

    if json and Path(json).suffix != ".json":
        raise ValueError(f"{json}: a plan is saved as .json.")
    made = plan(
        model,
        scheme,
        kv,
        tokens(context),
        batch,
        targets=targets,
        ignore=ignore,
        gpus=gpus,
        train_tokens=tokens(train_tokens),
        master_dtype=DTYPES[masters],
        checkpointing=checkpointing,
    )
    show(made)
    if json:
        Path(json).write_text(writer.dumps(made.json(), indent=2) + "\n", encoding="utf-8")
        print(f"written: {json}")
    return 0


def tokens(number: str) -> int:
    """``"32k"`` is 32,768, ``"1m"`` 1,048,576. ValueError for anything but digits with k or m behind them."""
    match = re.fullmatch(r"(\d+)([km]?)", number.strip().lower())
    if match is None:
        raise ValueError(f"{number!r} is no number of tokens: write 32768 or 32k.")
    return int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2]]


def _on_meta(model: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

    config = copy.deepcopy(model)
    if not isinstance(model, PreTrainedConfig):
        if not Path(model).exists():
            raise ValueError(f"{model} is not there: MODEL is a transformers folder or its config.json.")
        try:
            config = AutoConfig.from_pretrained(model)
        except (OSError, KeyError) as error:
            raise ValueError(f"cannot read a transformers config from {model}: {error}") from error
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{model} is quantized already: plan from the model that it was made of.")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


class _Layer(NamedTuple):
    """A linear layer that is quantized, or a projection of all experts of a module.

    `copies` are stored, `uses` of them run for a token; `at_once` weights are fake-quantized together, of `parameter`.
    """

    out_features: int
    in_features: int
    scheme: Scheme
    parameter: Tensor
    at_once: int
    copies: int = 1
    uses: int = 1

    @property
    def weights(self) -> int:
        return self.copies * self.out_features * self.in_features


def _chosen(model: nn.Module, rules: Sequence[Rule], ignore: Sequence[str], top_k: int) -> dict[str, _Layer]:
    """What `prepare` quantizes, which it does here."""
    with warnings.catch_warnings():  # what stays is counted and noted
        warnings.filterwarnings("ignore", message=".* in modules that no rule names")
        prepare(model, rules, ignore=ignore)
    chosen = {
        name: _Layer(layer.out_features, layer.in_features, layer.scheme, layer.weight, layer.weight.numel())
        for name, layer in quantized_modules(model)
    }
    for name, module in quantized_experts(model):
        chosen |= {f"{name}.{part}": _projection(module, part, top_k) for part in module.layout.parts()}
    return chosen


def _projection(module: QATExperts, part: str, top_k: int) -> _Layer:
    one, copies = Expert(module, 0, part), module.layout.experts
    size = one.out_features * one.in_features
    together = sum(module.get_parameter(name).numel() for name in (module.layout.first, DOWN))
    at_once = size if in_kernels_order(module) else together
    parameter = module.get_parameter(one.parameter)
    return _Layer(one.out_features, one.in_features, one.scheme, parameter, at_once, copies, top_k)


def _notes(
    model: nn.Module, chosen: Mapping[str, _Layer], attention: list[tuple[str, Any]], text: Any
) -> Iterator[str]:
    known = {id(layer.parameter) for layer in chosen.values()}
    experts = [parameter for parameter in model.parameters() if parameter.ndim > 2 and id(parameter) not in known]
    if experts:
        yield (
            f"{sum(parameter.numel() for parameter in experts):,} parameters are in {len(experts)} weights of more "
            "than two dimensions (experts) that lockstep.prepare leaves as they are, and so does this plan."
        )
    if len(attention) < text.num_hidden_layers:
        yield (
            f"{text.num_hidden_layers - len(attention)} of {text.num_hidden_layers} layers have no attention that "
            "caches keys and values; what state they keep is not counted."
        )


def _weights(model: nn.Module, chosen: Mapping[str, _Layer], served: torch.dtype, gpus: int) -> Iterator[Line]:
    size = served.itemsize
    parameters = list(model.parameters())  # each once, tied ones too
    yield _stored("weights", parameters, size, gpus, "before", served)
    for scheme in dict.fromkeys(layer.scheme for layer in chosen.values()):
        layers = [layer for layer in chosen.values() if layer.scheme == scheme]
        spec, inputs = scheme.weights, scheme.activations
        packed = spec.format.startswith("int") and not (inputs and spec.format == "int8")
        sizes = [
            [one.copies * part for part in spec.stored_bytes(one.out_features, one.in_features, packed)]
            for one in layers
        ]
        codes, scales, zero_points = map(sum, zip(*sizes, strict=True))
        count, number_of_layers = sum(layer.weights for layer in layers), sum(layer.copies for layer in layers)
        arithmetic = f"{number_of_layers} layers, {count:,} weights x {spec.bits} bits / 8"
        padding = codes - count * spec.bits // 8
        yield _divided("codes", arithmetic + f" + {padding:,} B padding" * (padding > 0), codes, gpus)
        shapes = [(layer.copies, *spec.scale_shape(layer.out_features, layer.in_features)) for layer in layers]
        number = sum(math.prod(shape) for shape in shapes)
        arithmetic = f"{number:,} scales x {spec.scale_dtype.itemsize} B ({dtype_name(spec.scale_dtype)})"
        if spec.scale_rule == "nv/6":
            arithmetic += f" + {number_of_layers} global scales x 4 B"
        yield _divided("scales", arithmetic, scales, gpus)
        if zero_points:
            yield _divided("zero points", f"{number:,} x {spec.bits} bits / 8, in 32-bit words", zero_points, gpus)
        if inputs and inputs.stores_scale:
            stored = 4 * number_of_layers
            yield Line("serve", "input scales", f"{number_of_layers} x 4 B", stored, stored, "after")
    replaced = {id(layer.parameter) for layer in chosen.values()}
    replaced -= {
        id(parameter)  # an embedding tied to a quantized head stays
        for name, module in model.named_modules()
        if name not in chosen and not isinstance(module, QATExperts)
        for parameter in module.parameters(recurse=False)
    }
    rest = [parameter for parameter in parameters if id(parameter) not in replaced]
    yield _stored("other weights", rest, size, gpus, "after", served)


def _stored(
    what: str, parameters: Sequence[Any], size: int, gpus: int, counts: Literal["before", "after"], dtype: torch.dtype
) -> Line:
    matrices = sum(parameter.numel() for parameter in parameters if parameter.ndim > 1)
    vectors = sum(parameter.numel() for parameter in parameters if parameter.ndim <= 1)
    arithmetic = f"{matrices + vectors:,} x {size} B ({dtype_name(dtype)})"
    return Line("serve", what, arithmetic, (matrices + vectors) * size, (-(-matrices // gpus) + vectors) * size, counts)


def _divided(what: str, arithmetic: str, total: int, gpus: int) -> Line:
    return Line("serve", what, arithmetic, total, -(-total // gpus), "after")


def _cache(
    attention: Sequence[tuple[str, Any]], text: Any, spec: Any, context: int, batch: int, served: torch.dtype, gpus: int
) -> Iterator[Line]:
    if not attention:
        raise ValueError(f"{type(text).__name__} makes a model without attention that caches keys and values.")
    groups: dict[tuple[int, int, int], int] = {}
    for index, (name, module) in enumerate(attention):
        if getattr(module, "is_kv_shared_layer", False):
            continue
        if spec is not None and getattr(text, "kv_lora_rank", None):
            raise ValueError(f"{name} is latent attention: engines cache the latent, its quantization is not planned.")
        key = (*_heads_and_width(module, text), min(context, _window(module, text, index) or context))
        groups[key] = groups.get(key, 0) + 1
    for (heads, width, length), layers in groups.items():
        own = -(-heads // gpus)
        where = f"{length:,} tokens x {batch} sequences"
        numbers = layers * width * length * batch
        each = f"2 x {heads} KV heads x {width // (2 * heads)}" if width % (2 * heads) == 0 else f"{width:,} numbers"
        for counts, size in (("before", served.itemsize), ("after", spec.code_dtype.itemsize if spec else None)):
            size = size or served.itemsize
            arithmetic = f"{layers} layers x {each} x {where} x {size} B"
            yield Line("serve", "KV cache", arithmetic, numbers * size, numbers * size // heads * own, counts)  # type: ignore[arg-type]
        if spec is not None:
            scales = 2 * layers * {"tensor": 1, "head": heads, "token": heads * length * batch}[spec.strategy]
            one = {"tensor": "", "head": f" x {heads} KV heads", "token": f" x {heads} KV heads x {where}"}
            arithmetic = f"{layers} layers x 2{one[spec.strategy]} x 4 B"
            per_gpu = scales * 4 if spec.strategy == "tensor" else scales * 4 // heads * own
            yield Line("serve", "KV cache scales", arithmetic, scales * 4, per_gpu, "after")


def _heads_and_width(module: Any, text: Any) -> tuple[int, int]:
    """KV heads, and how many numbers a layer caches for a token."""
    if latent := getattr(text, "kv_lora_rank", None):
        return 1, latent + text.qk_rope_head_dim
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    projections = [getattr(module, name, None) for name in ("k_proj", "v_proj")]
    if all(isinstance(projection, nn.Linear) for projection in projections):
        return heads, sum(projection.out_features for projection in projections)  # type: ignore[union-attr]
    return heads, 2 * heads * _head_dim(text)


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _window(module: Any, text: Any, index: int) -> int | None:
    window = getattr(module, "sliding_window", getattr(text, "sliding_window", None))
    kinds = getattr(text, "layer_types", None)
    kind = kinds[getattr(module, "layer_idx", index)] if kinds else None
    if kind == "chunked_attention":
        return getattr(text, "attention_chunk_size", None)
    return None if kind == "full_attention" or getattr(text, "use_sliding_window", True) is False else window


def _mlp_width(text: Any) -> int:
    """Outputs of the gate projections that one token uses."""
    experts = getattr(text, "num_experts_per_tok", None) or 1
    if experts > 1 and getattr(text, "moe_intermediate_size", None):
        return text.moe_intermediate_size * experts
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return experts * (max(width) if isinstance(width, list | tuple) else width)


def _step(text: Any, context: int, batch: int, served: torch.dtype, gpus: int) -> Iterator[Line]:
    count, size = min(STEP_TOKENS, context * batch), served.itemsize
    hidden, width = 2 * text.hidden_size, 3 * _mlp_width(text)
    arithmetic = f"{count:,} tokens x (2 x {text.hidden_size:,} + 3 x {_mlp_width(text):,}) x {size} B"
    own = count * (hidden + -(-width // gpus)) * size
    yield Line("serve", "activations", arithmetic, count * (hidden + width) * size, own)
    logits = batch * text.vocab_size * 4
    yield Line("serve", "logits", f"{batch} sequences x {text.vocab_size:,} x 4 B", logits, -(-logits // gpus))


def _states(
    model: nn.Module,
    chosen: Mapping[str, _Layer],
    masters: torch.dtype,
    served: torch.dtype,
    gpus: int,
) -> Iterator[Line]:
    parameters, size, name = sum(p.numel() for p in model.parameters()), masters.itemsize, dtype_name(masters)
    for what, times in (("masters", 1), ("gradients", 1), ("AdamW moments", 2)):
        arithmetic = f"{'2 x ' * (times == 2)}{parameters:,} x {size} B ({name})"
        total = times * parameters * size
        yield Line("train", what, arithmetic, total, -(-total // gpus))
    if gpus > 1:
        blocks = [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]
        largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
        gathered = largest * served.itemsize
        yield Line("train", "a gathered layer", f"{largest:,} x {served.itemsize} B", gathered, gathered)
    largest = max(layer.at_once for layer in chosen.values())
    total = largest * served.itemsize
    yield Line("train", "a fake-quantized weight", f"{largest:,} x {served.itemsize} B", total, total, "after")


def _saved(
    chosen: Mapping[str, _Layer],
    attention: Sequence[tuple[str, Any]],
    text: Any,
    spec: Any,
    count: int,
    checkpointing: bool,
    gpus: int,
) -> Iterator[Line]:
    layers, hidden, width = text.num_hidden_layers, text.hidden_size, _mlp_width(text)
    queries = text.num_attention_heads * _head_dim(text)
    cached = sum(_heads_and_width(module, text)[1] for _, module in attention) // max(1, len(attention))
    numbers = 8 * hidden + 2 * queries + cached + 4 * width
    codes, freed = _saved_codes(chosen)
    change = codes - freed + (cached * len(attention) if spec is not None and not spec.dynamic else 0)
    kept = f"(8 x {hidden:,} + 2 x {queries:,} + {cached:,} + 4 x {width:,})"
    whole = f"{count:,} tokens x {layers} layers x 2 B x {kept}"
    before = count * layers * 2 * numbers
    if checkpointing:
        whole = f"{count:,} tokens x ({layers} layers x 2 B x {hidden:,} + 2 B x {kept})"
        before = count * 2 * (layers * hidden + numbers)
        change //= layers
    yield Line("train", "saved activations", whole, before, before, "before" if change else "both")
    if change:
        difference = f"{whole} {'-' if change < 0 else '+'} {count:,} x {abs(change):,} B (codes for inputs; KV clips)"
        after = before + count * change
        yield Line("train", "saved activations", difference, after, after, "after")
    logits = count * text.vocab_size * 10
    yield Line("train", "logits", f"{count:,} tokens x {text.vocab_size:,} x 10 B", logits, logits)


def _saved_codes(chosen: Mapping[str, _Layer]) -> tuple[int, int]:
    """Bytes for each token that layers save as codes of their inputs, and of the 16-bit inputs that they do not."""
    codes, inputs = 0, 0
    for siblings in run_as_one(chosen):
        layer, leaf = chosen[siblings[0]], siblings[0].rpartition(".")[2]
        if layer.scheme.activations is not None:
            # Layers that see one input share its codes, unless each has a measured scale of its own or is an expert.
            apart = layer.scheme.activations.stores_scale or layer.copies > 1
            codes += (len(siblings) if apart else 1) * layer.uses * _code_bytes(layer)
            if leaf not in ("o_proj", "lm_head"):
                inputs += 2 * layer.in_features * (layer.uses if leaf == DOWN else 1)
    return codes, inputs


def _code_bytes(layer: _Layer) -> int:
    assert layer.scheme.activations is not None
    return layer.in_features * layer.scheme.activations.code_dtype.itemsize


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}" if size >= GIB / 100 else f"{size / 2**20:,.3f} MiB"
