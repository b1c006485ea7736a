"""LoRA by peft, in three modes: what an adapter trains on is what is served with it (the extra ``peft``).

===============  ===========================================  ======================================================
mode             the forward multiplies with                  what is served
===============  ===========================================  ======================================================
``merged``       ``FQ(W + s * B @ A)``, in the serving        `merged` and `lockstep.export.save_pretrained`: the
                 kernel's order; W stays as it is             very weights of the forward, no adapter
``frozen-grid``  the packed base, then ``+ x A^T (s B)^T``    the base's folder as it is, and the adapter's
                 (`lockstep.qat.frozen`)
``qlora``        bitsandbytes' NF4, then ``+ s * x A^T B^T``  the adapter; as integers only after `requantize`
===============  ===========================================  ======================================================

The models, adapters and files are peft's own: ``save_pretrained``, ``PeftModel.from_pretrained``, ``modules_to_save``.

Merged mode. The merged weight is peft's, operation for operation: for each active adapter in turn ``W = RN(W + d)``
with ``d = get_delta_weight()``, RN rounding to W's dtype, and never under autocast (peft ``tuners/lora/layer.py``,
``Linear.merge``). So ``merge_and_unload`` gives the bits of the forward, if it runs on the device and with the matmul
precision of the training. The gradient goes straight through the grid, and through the rounding of the sum, to A and B:
with ``G = dL/dW``, ``dA = s * B^T G`` and ``dB = s * G A^T``, of which G itself is never formed. Between forward and
backward neither the merged nor the quantized weight is kept: both are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lockstep.qat.experts import QATExperts
from lockstep.qat.frozen import FrozenLinear
from lockstep.qat.linear import QATLinear
from lockstep.qat.lora_base import AdaptedExperts, disown
from lockstep.qat.lora_config import BaseTunerLayer, peft
from lockstep.qat.lora_frozen import NO_MERGE, FrozenLora
from lockstep.qat.lora_merged import MergedLora, ParamWrapper, check_layer
from lockstep.qat.prepare import PrepareReport
from lockstep.qat.prepare import prepare as prepare_plain
from lockstep.qat.qlora import RequantizeReport, is_4bit, nf4, requantize
from lockstep.qat.without_adapters import as_it_was, base_layers, check_ties
from lockstep.scheme import Rule, Scheme

__all__ = [
    "MODES",
    "RequantizeReport",
    "adapted",
    "adopt",
    "get_peft_model",
    "merged",
    "nf4",
    "prepare",
    "register",
    "requantize",
]

Mode = Literal["merged", "frozen-grid", "qlora"]
MODES: tuple[str, ...] = get_args(Mode)


def get_peft_model(model: nn.Module, config: peft.LoraConfig, mode: Mode = "merged", **options: Any) -> peft.PeftModel:
    """peft's own ``get_peft_model``, for a base that is quantized as `mode` says.

    Args:
        model: ``merged``: prepared by `lockstep.prepare`. ``frozen-grid``: from `lockstep.export.adapter.load_frozen`
            or `lockstep.export.adapter.freeze`. ``qlora``: loaded with `nf4`.
        config: a ``peft.LoraConfig``; its `register` is called here.
        mode: one of `MODES`.
        options: of ``peft.get_peft_model``. ``autocast_adapter_dtype=False`` keeps adapters in the base's own dtype;
            peft's default makes fp32 masters of them.

    Raises:
        ValueError: the model is no base for `mode`; `config` asks for what its arithmetic does not have; in mode
            ``merged``, an adapter on one end of tied weights. The modules of the model are as they were.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(map(repr, MODES))}.")
    check_base(model, mode)
    if mode == "frozen-grid" and config.target_modules == "all-linear":  # for peft these are nn.Linear alone
        frozen = (name for name, one in model.named_modules() if isinstance(one, FrozenLinear))
        config.target_modules = sorted({name.rpartition(".")[2] for name in frozen})
    with as_it_was(model):
        made = peft.get_peft_model(model, register(config), **options)  # type: ignore[arg-type]
        if mode == "merged":
            check_ties(made)
    return made  # type: ignore[return-value]


def register(config: peft.LoraConfig) -> peft.LoraConfig:
    """Tell `config` of the LoRA layers for prepared and frozen bases, by peft's custom modules, and return it.

    Loading needs it too: ``PeftModel.from_pretrained(base, folder, config=register(config))``, with
    ``config = LoraConfig.from_pretrained(folder)``.
    Without it peft puts its own layer around a `QATLinear`, which adds to the grid, ``FQ(W) + s * B @ A``: another
    model than the one that merging gives. It raises when it is to train; `adopt` mends it.
    """
    config._register_custom_module({QATLinear: MergedLora, QATExperts: ParamWrapper, FrozenLinear: FrozenLora})
    return config


def check_base(model: nn.Module, mode: Mode) -> None:
    """ValueError if no layer of `model` is one on which `mode` trains, or some are of another mode."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, QATLinear | QATExperts):
            found.setdefault("merged", name)
        elif isinstance(module, FrozenLinear):
            found.setdefault("frozen-grid", name)
        elif is_4bit(module):
            if module.weight.quant_type != "nf4" or not module.weight.compress_statistics:
                raise ValueError(
                    f"{name} is 4-bit {module.weight.quant_type}, double quantization "
                    f"{module.weight.compress_statistics}: load the model with quantization_config=lora.nf4()."
                )
            found.setdefault("qlora", name)
    if mode not in found:
        first = {
            "merged": "call lockstep.prepare(model, scheme) first",
            "frozen-grid": "load it with lockstep.export.adapter.load_frozen(folder), or prepare and freeze it",
            "qlora": "load it with AutoModelForCausalLM.from_pretrained(..., quantization_config=lora.nf4())",
        }[mode]
        raise ValueError(f"mode {mode!r}: no layer of this {type(model).__name__} is a base for it: {first}.")
    if others := [other for other in found if other != mode]:
        raise ValueError(f"mode {mode!r}: {found[others[0]]} is a base for mode {others[0]!r}: one mode a model.")


def adapted(model: nn.Module) -> bool:
    """Whether adapters of peft are in `model`."""
    return isinstance(model, peft.PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules())


def prepare(
    model: nn.Module,
    scheme: str | Scheme | Sequence[Rule],
    targets: str | Sequence[str] = ("Linear",),
    ignore: str | Sequence[str] = ("lm_head",),
    **options: Any,
) -> PrepareReport:
    """`lockstep.prepare` for a model that has its adapters already, in mode ``merged``.

    Names are those that the model has without adapters. Adapters themselves are never quantized.

    Raises:
        ValueError, TypeError: see `lockstep.prepare`; `options` or adapters that merged mode does not have.

    Nothing is changed when it raises.
    """
    check_ties(model)
    with as_it_was(model):
        with base_layers(model) as base:
            for module in base.modules():
                disown(module)
            report = prepare_plain(base, scheme, targets, ignore, **options)
        adopt(model)
    return report


def adopt(model: nn.Module) -> None:
    """Make the layers that peft put around a `QATLinear` train on the merged weight.

    Raises:
        ValueError, TypeError: an adapter that merged mode does not have, or one on one end of tied weights.

    Nothing is changed when it raises.
    """
    ours = [
        (name, one) for name, one in _tuner_layers(model) if isinstance(one.get_base_layer(), QATLinear | QATExperts)
    ]
    for name, layer in ours:
        check_layer(name, layer)
    if ours:
        check_ties(model)
    for _, layer in ours:
        layer.__class__ = MergedLora if isinstance(layer.get_base_layer(), QATLinear) else ParamWrapper
        layer._adapt()


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """The model that is served, for the time of a ``with`` block: without adapters, with the names of the hub.

    >>> with merged(peft_model) as served:
    ...     lockstep.export.save_pretrained(served, "out")

    Each quantized layer computes its merged weight when it is asked for it: there is no second copy of them, and the
    model that trains is untouched. Layers with an adapter that are not quantized (a head) are merged as peft does, in a
    copy of their own, and so are ``trainable_token_indices``. ``modules_to_save`` are the trained ones. Without
    adapters: `model` itself.

    Raises:
        TypeError: a prepared layer whose adapter is peft's own layer (see `adopt`); a base that cannot be merged.
        ValueError: an adapter on one end of tied weights.
    """
    theirs = []
    memo: dict[tuple[int, str], Tensor] = {}
    adapted_experts = []
    for name, layer in _tuner_layers(model):
        base = layer.get_base_layer()
        if isinstance(base, FrozenLinear):
            raise TypeError(NO_MERGE.format(name=name))
        if is_4bit(base):
            raise TypeError(f"{name} is NF4: see lockstep.qat.lora.requantize.")
        if isinstance(layer, MergedLora | ParamWrapper):
            layer._adapt()
        elif isinstance(base, QATLinear | QATExperts):
            raise TypeError(
                f"{name} trains FQ(W) + s * B @ A, which no merged weight serves: call lockstep.qat.lora.adopt(model) "
                "before training, or make the model with lockstep.qat.lora.get_peft_model."
            )
        if isinstance(base, AdaptedExperts):
            adapted_experts.append(base)
        elif not isinstance(base, QATLinear) and not layer.merged and not layer.disable_adapters:
            theirs.append(layer)
    check_ties(model)
    before = [(one, one.data) for layer in theirs for one in layer.get_base_layer().parameters(recurse=False)]
    try:
        for parameter, data in before:
            parameter.data = data.clone()
        with torch.no_grad():
            for layer in theirs:
                layer.merge()
        for experts in adapted_experts:
            experts.memo = memo
        with base_layers(model) as base:
            yield base
    finally:
        for experts in adapted_experts:
            experts.memo = None
        for parameter, data in before:
            parameter.data = data
        for layer in theirs:
            layer.merged_adapters.clear()


def _tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, one) for name, one in model.named_modules() if isinstance(one, BaseTunerLayer)]
