"""QLoRA: adapters on bitsandbytes' NF4, and what it costs to serve such a model on an integer grid instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lockstep import grid
from lockstep.kernels.scaled_mm import without_autocast
from lockstep.qat.linear import QATLinear
from lockstep.qat.lora_config import BaseTunerLayer
from lockstep.qat.prepare import as_text, prepare, quantized_modules, unwrapped
from lockstep.qat.without_adapters import plain, replace, restore
from lockstep.scheme import Rule, Scheme


def nf4(compute_dtype: torch.dtype = torch.bfloat16) -> Any:
    """The ``BitsAndBytesConfig`` of QLoRA: NF4, double quantization (Dettmers et al., arXiv:2305.14314)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def is_4bit(module: nn.Module) -> bool:
    """Whether `module` is bitsandbytes' ``Linear4bit``."""
    # By name: bitsandbytes need not be there.
    return ("bitsandbytes.nn.modules", "Linear4bit") in ((one.__module__, one.__name__) for one in type(module).__mro__)


@dataclass(frozen=True)
class RequantizeReport:
    """What it costs to serve an NF4 base and its adapter on another grid. Printing it gives a table.

    Attributes:
        model: the prepared model, with the merged weights as masters: what is exported, or trained further.
        errors: of each layer ``|FQ(W) - W| / |W|`` (Frobenius norms), W the merged weight.
        kl: mean over tokens of ``KL(NF4 base and adapter || requantized)``, in nats.
    """

    model: nn.Module
    errors: Mapping[str, float]
    kl: float

    def __rich__(self):  # type: ignore[no-untyped-def]
        from rich.table import Table

        table = Table(title=f"NF4 and adapter to the serving grid: KL {self.kl:.3g} nats a token", title_justify="left")
        for header in ("layer", "relative error of the weight"):
            table.add_column(header, overflow="fold")
        for name, error in self.errors.items():
            table.add_row(name, f"{error:.4f}")
        return table

    def __str__(self) -> str:
        return as_text(self)


def requantize(
    model: nn.Module,
    scheme: str | Scheme | Sequence[Rule],
    batch: Mapping[str, Any],
    *,
    max_kl: float | None = None,
    targets: str | Sequence[str] = ("Linear",),
    ignore: str | Sequence[str] = ("lm_head",),
) -> RequantizeReport:
    """Merge a QLoRA model's adapter into its NF4 base and prepare the result for `scheme`, if the gap is accepted.

    The adapter was trained on NF4 weights; on another grid it meets other ones. The merged weight is
    ``RN(dequantize(W) + s * B @ A)``, the sum in fp32, in the dtype in which NF4 is computed. What an engine serves
    after that was not trained: better, train on in mode ``merged``, or with `lockstep.prepare` alone.

    Args:
        model: a ``PeftModel`` on bitsandbytes' ``Linear4bit``, or such a base alone.
        scheme: see `lockstep.prepare`.
        batch: keyword arguments of the model, whose logits are compared.
        max_kl: the largest mean KL, in nats a token, that you accept.
        targets: see `lockstep.prepare`.
        ignore: see `lockstep.prepare`.

    Returns:
        The gap, with the prepared model in `RequantizeReport.model`: `model` itself without its adapters.

    Raises:
        ValueError: the measured gap is larger than `max_kl`, or `max_kl` is not given; no layer is NF4; a failure of
            `lockstep.prepare`. The model is as it was.
    """
    four_bit = {name: one for name, one in model.named_modules() if is_4bit(one)}
    if not four_bit:
        raise ValueError(f"no layer of this {type(model).__name__} is bitsandbytes' Linear4bit.")
    _check_adapters(model)
    teacher = _log_probs(model, batch)
    base = unwrapped(model)
    undo = replace(model, _dequantized)
    try:
        report = prepare(base, scheme, targets, ignore)
        errors = {name: _relative_error(layer) for name, layer in quantized_modules(base)}
        kl = (teacher.exp() * (teacher - _log_probs(base, batch))).sum(-1).mean().item()
        if max_kl is None or not kl <= max_kl:
            worst = max(errors, key=errors.__getitem__)
            asked = "max_kl is not given" if max_kl is None else f"more than max_kl={max_kl:g}"
            raise ValueError(
                f"serving this model as {scheme} moves its logits by a KL of {kl:.3g} nats a token ({asked}), and the "
                f"weights of {len(report.quantized)} layers by up to {errors[worst]:.1%} ({worst}). Pass max_kl to "
                "accept that, or train in mode 'merged'."
            )
    except BaseException:
        restore(undo)
        raise
    _forget_4bit(base)
    return RequantizeReport(base, errors, kl)


def _dequantized(layer: Any) -> nn.Module:
    """What stands in for a layer of a QLoRA model: an ``nn.Linear`` with the merged weight for one in NF4."""
    has_adapter = isinstance(layer, BaseTunerLayer)
    base = layer.get_base_layer() if has_adapter else layer
    if not is_4bit(base):
        return plain(layer)
    from bitsandbytes.functional import dequantize_4bit

    state = base.weight.quant_state
    weight = dequantize_4bit(base.weight.data, state).float()
    if has_adapter and not layer.merged and not layer.disable_adapters:
        with torch.no_grad(), without_autocast(weight.device):
            for name in (name for name in layer.active_adapters if name in layer.lora_A):
                weight += layer.get_delta_weight(name).float()
    linear = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(state.dtype))
    if base.bias is not None:
        linear.bias = nn.Parameter(base.bias.detach())
    return linear.train(base.training)


def _check_adapters(model: nn.Module) -> None:
    layers: list[tuple[str, Any]] = [it for it in model.named_modules() if isinstance(it[1], BaseTunerLayer)]
    for name, layer in layers:
        if not is_4bit(layer.get_base_layer()):
            raise ValueError(
                f"{name} has an adapter and is not NF4: its adapter is not merged here. Merge with peft, then prepare."
            )
        if type(layer).__name__ != "Linear4bit" or layer.lora_variant or any(layer.lora_bias.values()):
            raise ValueError(
                f"{name}: lora_bias, DoRA and other variants or adapters are not merged here: merge with peft, then "
                "prepare."
            )


def _forget_4bit(model: Any) -> None:
    """What transformers and peft noted of the quantization and the adapter that are gone."""
    for name in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method", "peft_config"):
        vars(model).pop(name, None)
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        del model.config.quantization_config


def _relative_error(layer: QATLinear) -> float:
    served = grid.dequantize(layer.quantize(), layer.scheme.weights).float()
    weight = layer.weight.detach().float()
    return ((served - weight).norm() / weight.norm()).item()


@torch.no_grad()
def _log_probs(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    training = model.training
    model.eval()
    try:
        return model(**batch).logits.float().log_softmax(-1)
    finally:
        model.train(training)
