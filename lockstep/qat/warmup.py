"""Warm-up of quantization: a model that trains in full precision goes over to its grid in steps, not at once.

Three kinds. Of each, ``t / steps`` is done at step t:

* ``"layers"``: layers are quantized one after another, those that engines run as one together. The others are ordinary
  ``nn.Linear``;
* ``"noise"``: Quant-Noise (Fan et al., arXiv:2004.07320): in each forward a random share of the weights is quantized,
  in whole groups (rows, where no group is smaller), and of quantized inputs a random share of the tokens. The share
  rises from 0 to 1; the gradient is straight-through everywhere;
* ``"bits"``: INT4 weights train as INT8 in the same groups until `steps`, and then as they are served.

Evaluation, in eval mode without gradients, runs on what is served. Layers that warm up and are not yet, or not
wholly, on the grid multiply in an ordinary GEMM and keep its operand until the backward: as much as bf16 weights take.
From `steps` on a layer is again what `lockstep.prepare` made of it, bit for bit.

The random groups come from torch's generator of the layer's device, as a dropout's: they follow from
``torch.manual_seed``, an activation checkpoint's recomputation draws the same, and ranks draw alike if their seeds are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lockstep import activations, kernels
from lockstep.qat.linear import QATLinear, Warming
from lockstep.qat.prepare import quantized_experts, quantized_modules, run_as_one
from lockstep.scheme import Scheme, TensorSpec

Kind = Literal["layers", "noise", "bits"]


@dataclass(frozen=True)
class Warmup:
    """How a callback goes over to quantized training, for its argument `warmup`.

    >>> Warmup("noise", steps=200)
    Warmup(kind='noise', steps=200, order='forward', stages=4)

    Args:
        kind: ``"layers"``, ``"noise"`` or ``"bits"``: see this module.
        steps: optimizer steps from the first quantized one until all is as served.
        order: of ``"layers"``: ``"forward"`` from the first layer, ``"backward"`` from the last, or a ``.json`` that
            ``lockstep sensitivity`` wrote, whose least sensitive layers come first.
        stages: of ``"layers"``: in how many equal parts they are switched. A compiled model is compiled once for each,
            and torch gives up beyond ``torch._dynamo.config.recompile_limit`` (8).

    Raises:
        ValueError: a value that is none of these.
    """

    kind: Kind
    steps: int
    order: str = "forward"
    stages: int = 4

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"Warmup(kind={self.kind!r}): choose {', '.join(map(repr, get_args(Kind)))}.")
        if self.steps < 1 or self.stages < 1:
            raise ValueError(f"Warmup(steps={self.steps}, stages={self.stages}): both are 1 or more.")
        if self.order not in ("forward", "backward") and not self.order.endswith(".json"):
            raise ValueError(
                f"Warmup(order={self.order!r}): 'forward', 'backward', or a .json of lockstep sensitivity."
            )


class Schedule:
    """The warm-up of one prepared model.

    Raises:
        ValueError: a layer that cannot warm up so, by its name; or a sensitivity report without one of the layers.
    """

    def __init__(self, model: nn.Module, warmup: Warmup) -> None:
        layers = dict(quantized_modules(model))
        for name, _ in quantized_experts(model):
            raise ValueError(f"{name} holds experts, which do not warm up: ignore them, or train without warmup.")
        for name, layer in layers.items():
            _check(name, layer, warmup)
        self.warmup = warmup
        self._units = [[layers[name] for name in unit] for unit in _ordered(run_as_one(layers), warmup)]
        self._noise = Noise()

    def follow(self, step: int) -> bool:
        """Make the layers compute as they do in optimizer step `step` of it, from 0. Whether they still warm up."""
        if self.warmup.kind == "noise":
            self._noise.share.fill_(min(step / self.warmup.steps, 1))
        kinds: dict[Kind, Warming] = {"layers": plain, "noise": self._noise, "bits": as_int8}
        done = self._done(step)
        for number, unit in enumerate(self._units):
            for layer in unit:
                if number < done:
                    vars(layer).pop("warmup", None)
                else:
                    layer.warmup = kinds[self.warmup.kind]
        return done < len(self._units)

    def _done(self, step: int) -> int:
        """How many units are as served."""
        steps, stages = self.warmup.steps, self.warmup.stages if self.warmup.kind == "layers" else 1
        return len(self._units) * min(step * stages // steps, stages) // stages


def stop(model: nn.Module) -> None:
    """Let every layer of `model` be as it is served."""
    for _, layer in quantized_modules(model):
        vars(layer).pop("warmup", None)


def plain(layer: QATLinear, x: Tensor, bias: Tensor | None) -> Tensor:
    """In full precision."""
    return F.linear(x, layer.weight.to(x.dtype), bias)


class Noise:
    """On a random share of the grid: `share` is a tensor, so that its changes do not make a compiler start anew."""

    def __init__(self) -> None:
        self.share = torch.zeros(())

    def __call__(self, layer: QATLinear, x: Tensor, bias: Tensor | None) -> Tensor:
        served, spec = _served(layer, layer.scheme, layer.amax()).to(x.dtype), layer.scheme.weights
        groups = layer.weight.shape[-1] // spec.group_size if spec.group_size else 1
        master, parts = layer.weight.detach().to(x.dtype), (groups, -1)
        chosen = self._chosen((len(served), groups, 1), x.device)
        mixed = torch.where(chosen, served.unflatten(-1, parts), master.unflatten(-1, parts)).flatten(-2)
        weight = _StraightThrough.apply(layer.weight, mixed, None)
        return F.linear(_input(layer, x, self._chosen((*x.shape[:-1], 1), x.device)), weight, bias)

    def _chosen(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.rand(shape, device=device) < self.share


def as_int8(layer: QATLinear, x: Tensor, bias: Tensor | None) -> Tensor:
    """On INT8 weights in the groups of the INT4 ones, with inputs as the scheme has them."""
    served = _served(layer, Scheme(eight_bits(layer.scheme.weights)), None).to(x.dtype)
    weight = _StraightThrough.apply(layer.weight, served, None)
    return F.linear(_input(layer, x, None), weight, bias)


def eight_bits(spec: TensorSpec) -> TensorSpec:
    """INT8 in the groups, scale dtype and served dtype of an INT4 spec, by the rule of the same kin."""
    rule = "amax/127.5" if spec.scale_rule == "amax/7.5" else "amax/127"
    return replace(spec, format="int8", symmetric=True, scale_rule=rule)


def _served(layer: QATLinear, scheme: Scheme, amax: Tensor | None) -> Tensor:
    weight = layer.weight.detach()
    return kernels.training(scheme, weight.device).fake_quantize(weight, scheme.weights, amax)


def _input(layer: QATLinear, x: Tensor, chosen: Tensor | None) -> Tensor:
    """`x` as it is served, where `chosen`; as it is if the scheme leaves it so or its range is being measured."""
    inputs = layer.scheme.activations
    if inputs is None or layer.observer is not None:
        return x
    kernel = kernels.training(layer.scheme, x.device)
    quantized = kernel.quantize_activations(x.detach(), inputs, layer.stored_scale())
    value = kernel.dequantize_activations(quantized, x.dtype)
    blocked = None if inputs.dynamic else activations.clipped(quantized.codes, inputs)
    if chosen is not None:
        value = torch.where(chosen, value, x.detach())
        blocked = None if blocked is None else blocked & chosen
    return _StraightThrough.apply(x, value, blocked)


class _StraightThrough(torch.autograd.Function):
    """``apply(x, value, blocked)``: `value`, whose gradient is `x`'s, but for 0 where `blocked`."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, blocked: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(blocked)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        (grad,), (blocked,) = grads, ctx.saved_tensors
        return grad if blocked is None else grad.masked_fill(blocked, 0), None, None


def _check(name: str, layer: QATLinear, warmup: Warmup) -> None:
    if type(layer).forward is not QATLinear.forward:
        raise ValueError(f"{name} trains with an adapter, whose merged weight does not warm up: leave warmup out.")
    if layer.learned_scale is not None:
        raise ValueError(f"{name} has learned scales, which start where the weights are now: leave warmup out.")
    if warmup.kind == "bits" and layer.scheme.weights.format != "int4":
        raise ValueError(
            f"{name} trains as {layer.scheme}: Warmup(kind='bits') goes from INT8 to INT4 weights, 'noise' and "
            "'layers' take every format."
        )


def _ordered(units: list[list[str]], warmup: Warmup) -> list[list[str]]:
    if not warmup.order.endswith(".json"):
        return units if warmup.order == "forward" else units[::-1]
    worst: dict[str, float] = {}
    for cost in json.loads(Path(warmup.order).read_text())["costs"]:
        for name in cost["layers"] if cost["scheme"] != "-" else ():
            worst[name] = max(worst.get(name, cost["increase"]), cost["increase"])
    if missing := [name for unit in units for name in unit if name not in worst]:
        raise ValueError(
            f"Warmup(order={warmup.order!r}): the report has no {missing[0]}. Write it with lockstep sensitivity for "
            "the same targets and ignore."
        )
    return sorted(units, key=lambda unit: max(worst[name] for name in unit))
