"""Oscillation of codes, measured and dampened (Nagel et al., arXiv:2203.11086).

With a straight-through gradient a weight near the border of two codes is pushed across it, and back, again and again:
its code then tells nothing, and the loss that is evaluated depends on the moment at which training stops.

Measured: a code oscillates at time t if it changed, in the direction opposite to that of its last change. Here the
times are those of the callback's logs, so what lies between two logs is not seen: a code that went there and back
within them counts as still, one that flips at every step as a coin that is tossed. A weight that merely travels,
however fast, never counts. Two bytes a weight are kept on the host.

Dampened: the gradient of ``strength / 2 * ||w - stop_gradient(fq(w))||^2`` is added to each quantized weight's, where w
is within the range of its codes: a pull to the middle of the bin. Added to the gradient, it follows neither the scale
of the loss nor the precision of the forward. `strength` rises by half a cosine from 0, as theirs does: weights must be
free to find their bin first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lockstep import grid
from lockstep.grid import Quantized
from lockstep.qat.experts import Expert, experts
from lockstep.qat.linear import QATLinear
from lockstep.qat.prepare import quantized_experts, quantized_modules
from lockstep.scheme import TensorSpec


class Track(NamedTuple):
    """A layer's codes at one log, as bytes, and the sign of each code's last change: int8 ``[N, K]``; 0: none seen."""

    codes: Tensor
    direction: Tensor | None = None


def follow(codes: Tensor, earlier: Track | None) -> Track:
    """The track with the `codes` ``[N, K]`` of now, on the host, after that of the log before."""
    held = codes.view(torch.int8).cpu()
    if earlier is None:
        return Track(held)
    moved = _moved(held, earlier.codes, codes.dtype)
    return Track(held, moved if earlier.direction is None else torch.where(moved != 0, moved, earlier.direction))


def oscillation(now: Track, earlier: Track, dtype: torch.dtype) -> float:
    """Share of the codes, stored in `dtype`, that changed since `earlier` against their last change, from 0 to 1."""
    assert earlier.direction is not None
    return (_moved(now.codes, earlier.codes, dtype) * earlier.direction < 0).float().mean().item()


def _moved(codes: Tensor, earlier: Tensor, dtype: torch.dtype) -> Tensor:
    """The sign of the change between two codes held as bytes, int8."""
    now, before = (_rank(one) if dtype.is_floating_point else one for one in (codes, earlier))
    return (now > before).to(torch.int8) - (now < before).to(torch.int8)


def _rank(codes: Tensor) -> Tensor:
    """The bytes of an 8-bit float in the order of their values: a sign and a magnitude. -0 is 0."""
    return torch.where(codes < 0, -(codes & 127), codes)


def risen(strength: float, step: int, steps: float) -> float:
    """`strength` at `step` of a run of `steps`: half a cosine up, from 0 to all of it."""
    return strength * (1 - math.cos(math.pi * min(max(step / steps, 0), 1))) / 2


def check_dampening(model: nn.Module) -> None:
    """ValueError if a layer of the prepared `model` trains something else than its own weight."""
    for name, layer in quantized_modules(model):
        if type(layer).forward is not QATLinear.forward:
            raise ValueError(f"{name} trains an adapter, not its weight: dampening has nothing to pull. Leave it 0.")


@torch.no_grad()
def dampen(model: nn.Module, strength: float, parameters: Collection[Tensor]) -> None:
    """Add the dampening to the gradients of those weights of the prepared `model` that are among `parameters`.

    The gradient must be whole and unscaled: call it right before the optimizer's step. Sharded by ``fully_shard``, each
    rank dampens its rows.

    Raises:
        ValueError: no quantized weight has a gradient (DeepSpeed keeps them to itself), or a weight is cut so that a
            scale lies on several ranks.
    """
    wanted = {id(one) for one in parameters}
    trained = [one for one in _trained(model) if id(one[0]) in wanted]
    if trained and all(one.grad is None for one in parameters):
        return  # the step is held back, as `lockstep.callbacks.LossSpikeCallback` does it
    found = [one for one in trained if one[0].grad is not None]
    if not found:
        raise ValueError(
            "dampening: no quantized weight has a gradient at the optimizer's step. DeepSpeed and FSDP1 keep gradients "
            "in buffers of their own, and frozen weights have none: train with DDP or fully_shard, or leave it 0."
        )
    for parameter, layer in found:
        weight, grad, quantized = _whole(parameter, layer)
        grad.add_((strength * pull(weight, quantized, layer.scheme.weights)).to(grad.dtype))


def pull(weight: Tensor, quantized: Quantized, spec: TensorSpec) -> Tensor:
    """``w - fq(w)`` ``[N, K]``, fp32, and 0 beyond the range of the codes."""
    low, high = spec.code_range
    codes, served = quantized.codes.float(), grid.dequantize(quantized, spec).float()
    beyond = ((codes == low) | (codes == high)) & (weight.abs() > served.abs())
    return (weight.float() - served).masked_fill(beyond, 0)


def _trained(model: nn.Module) -> Iterator[tuple[Tensor, QATLinear | Expert]]:
    """The parameters that are quantized, each with the layers that it holds."""
    for _, layer in quantized_modules(model):
        yield layer.weight, layer
    for _, module in quantized_experts(model):
        for expert in experts(module):
            yield getattr(module, expert.parameter), expert


def _whole(parameter: Tensor, layer: QATLinear | Expert) -> tuple[Tensor, Tensor, Quantized]:
    """The weight ``[N, K]`` of `layer`, its gradient, and its codes and scales; of a sharded one, this rank's rows."""
    grad, spec = parameter.grad, layer.scheme.weights
    assert grad is not None
    if isinstance(layer, Expert) and not isinstance(parameter, DTensor):
        layout = layer.module.layout
        return layer.weight, layout.rows(grad)[layer.number, layout.parts()[layer.part]], layer.quantize()
    if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and isinstance(layer, QATLinear):
        by_rows = all(place == Shard(0) or place.is_replicate() for place in parameter.placements)
        apart = spec.strategy in ("group", "channel") and not spec.per_tensor  # rows share no scale
        if by_rows and apart and grad.placements == parameter.placements:
            weight, scale = parameter.to_local(), layer.learned_scale
            own = scale.to_local() if isinstance(scale, DTensor) else scale
            return weight, grad.to_local(), grid.quantize(weight, spec, scale=own)
    elif isinstance(layer, QATLinear) and parameter.ndim == 2 and parameter.shape == grad.shape:
        return parameter, grad, layer.quantize()
    raise ValueError(
        f"{layer.qualified_name}: its weight is cut so that a rank cannot tell the scales of its own part ({spec}): "
        "train with DDP, or leave dampening 0."
    )
