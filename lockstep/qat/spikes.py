"""Loss spikes: which optimizer steps stand out from those before them, and what clipping the norms seen suggest."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

GAUSSIAN = 1.4826  # standard deviations of a normal distribution in a median absolute deviation
# The least deviation, so that a flat curve does not make everything a spike: of a loss as a share of its median, with
# a bound for medians near zero; of a gradient norm in its logarithm.
LOSS_FLOOR, LEAST_LOSS_FLOOR, NORM_FLOOR = 0.01, 1e-3, 0.15
BINS = 50  # of the histogram of norms, in each factor of e: 2 % wide
NAMED = 3  # layers that a warning names


@dataclass
class SpikeDetector:
    """Judges the loss and the gradient norm of an optimizer step by those of the last `window` that were no spikes.

    A value is a spike if it is more than `threshold` robust standard deviations (1.4826 times the median absolute
    deviation, with a floor) above the median; norms are compared in their logarithm. Low values are never spikes, NaN
    and infinity always are. Until half the window is filled these alone are.

    Args:
        window: steps to compare with, at least 4.
        threshold: in standard deviations, positive.
    """

    window: int
    threshold: float
    losses: deque[float] = field(init=False)
    norms: deque[float] = field(init=False)  # logarithms

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 4:
            raise ValueError(f"window={self.window}: a whole number of optimizer steps, at least 4.")
        if not 0 < self.threshold < math.inf:
            raise ValueError(f"threshold={self.threshold}: robust standard deviations, positive.")
        self.losses, self.norms = deque(maxlen=self.window), deque(maxlen=self.window)

    def judge(self, loss: float | None, norm: float) -> str:
        """Why a step with this loss (None: unknown) and gradient norm is a spike, in words; "" if it is none."""
        found = [f"{name} {value}" for name, value in (("loss", loss), ("gradient norm", norm)) if not _finite(value)]
        if found:
            return " and ".join(found)
        if loss is not None and len(self.losses) >= self.window / 2:
            middle, limit = self._limit(self.losses, max(LOSS_FLOOR * abs(median(self.losses)), LEAST_LOSS_FLOOR))
            if loss > limit:
                found.append(f"loss {loss:.4g} (median {middle:.4g}, limit {limit:.4g})")
        if norm > 0 and len(self.norms) >= self.window / 2:
            middle, limit = self._limit(self.norms, NORM_FLOOR)
            if math.log(norm) > limit:
                found.append(f"gradient norm {norm:.4g} (median {math.exp(middle):.4g}, limit {math.exp(limit):.4g})")
        return " and ".join(found)

    def accept(self, loss: float | None, norm: float) -> None:
        """Let later steps be compared with this one."""
        if loss is not None:
            self.losses.append(loss)
        if norm > 0:
            self.norms.append(math.log(norm))

    def clear(self) -> None:
        """Forget all steps: what comes is a new level."""
        self.losses.clear()
        self.norms.clear()

    def state_dict(self) -> dict[str, list[float]]:
        """The window, in numbers that JSON holds exactly."""
        return {"losses": list(self.losses), "norms": list(self.norms)}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take up the window of `state_dict`."""
        self.clear()
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])

    def _limit(self, values: Iterable[float], floor: float) -> tuple[float, float]:
        """The median, and what is a spike."""
        values = list(values)
        middle = median(values)
        deviation = GAUSSIAN * median(abs(value - middle) for value in values)
        return middle, middle + self.threshold * max(deviation, floor)


def _finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)


# Gradients ------------------------------------------------------------------------------------------------------------


def squared_norms(parameters: Sequence[nn.Parameter], sharded: bool = False) -> Tensor:
    """This rank's part of the squared norms of the gradients, fp32 ``[P]``; summed over all ranks they are whole.

    Without a process group, or of plain gradients that every rank holds whole, a part is a share of ``1 / ranks``.

    Args:
        parameters: the same on all ranks; one without a gradient counts as zero.
        sharded: plain gradients are shards, as FSDP1's.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    found = torch.zeros(len(parameters), device=parameters[0].device)
    having = [place for place, one in enumerate(parameters) if one.grad is not None]
    if not having:
        return found
    gradients, shares = [], []
    for place in having:
        grad = parameters[place].grad
        assert grad is not None
        pieces = 1 if not sharded else ranks
        if isinstance(grad, DTensor):
            placed = zip(grad.device_mesh.shape, grad.placements, strict=True)
            pieces = math.prod(size for size, how in placed if isinstance(how, Shard))
            grad = grad.to_local()
        gradients.append(grad.detach().float() if grad.dtype != torch.float32 else grad.detach())
        shares.append(pieces / ranks)
    norms = torch.stack([norm.to(found.device) for norm in torch._foreach_norm(gradients)])
    found[having] = norms.square() * torch.tensor(shares, device=found.device)
    return found


def worst_layers(names: Sequence[str], squares: Sequence[float]) -> str:
    """The layers whose parameters `names` have non-finite or the largest squared gradient norms, in words."""
    layers: dict[str, float] = {}
    for name, square in zip(names, squares, strict=True):
        layer = name.rpartition(".")[0] or name
        layers[layer] = layers.get(layer, 0.0) + square
    bad = [layer for layer, square in layers.items() if not math.isfinite(square)]
    if bad:
        others = f" and {len(bad) - NAMED} more of {len(layers)}" if len(bad) > NAMED else f" of {len(layers)}"
        return f"layers with non-finite gradients: {', '.join(bad[:NAMED])}{others}"
    largest = sorted(layers.items(), key=lambda item: -item[1])[:NAMED]
    return f"largest gradient norms: {', '.join(f'{layer} ({math.sqrt(square):.4g})' for layer, square in largest)}"


# Clipping -------------------------------------------------------------------------------------------------------------


class NormHistogram:
    """How often which gradient norm was seen, in bins of 2 %."""

    def __init__(self, counts: Iterable[Sequence[int]] = ()) -> None:
        self.counts: Counter[int] = Counter({item[0]: item[1] for item in counts})

    def add(self, norm: float) -> None:
        """Count a norm; zero and non-finite ones are left out."""
        if 0 < norm < math.inf:
            self.counts[round(BINS * math.log(norm))] += 1

    def state(self) -> list[list[int]]:
        """The bins and their counts, for the constructor."""
        return [list(item) for item in sorted(self.counts.items())]

    def percentile(self, percent: float) -> float:
        """The norm that `percent` % of those seen do not exceed, to 1 %. ValueError of none."""
        wanted, seen = percent / 100 * self.counts.total(), 0
        for place, count in sorted(self.counts.items()):
            seen += count
            if seen >= wanted:
                return math.exp(place / BINS)
        raise ValueError("no norm was seen.")

    def share_above(self, norm: float) -> float:
        """The share of norms above `norm`."""
        above = sum(count for place, count in self.counts.items() if place > BINS * math.log(norm))
        return above / self.counts.total()


def clipping_advice(norms: NormHistogram, clip: float | None, argument: str) -> str:
    """A sentence with the percentiles of the norms seen, before clipping, and what they say of `clip`; "" of none.

    Args:
        norms: of the steps that were no spikes.
        clip: the largest norm that is let through; None or 0: any.
        argument: of the trainer, that sets it.
    """
    if not norms.counts:
        return ""
    half, most, nearly, all_ = (norms.percentile(percent) for percent in (50, 95, 99, 100))
    seen = (
        f"gradient norms of {norms.counts.total()} steps without spikes: median {half:.3g}, 95 % below {most:.3g}, 99 "
        f"% below {nearly:.3g}, largest {all_:.3g}"
    )
    if not clip:
        return f"{seen}. Nothing is clipped: {argument}={nearly:.2g} would clip 1 % of them."
    share = norms.share_above(clip)
    clipped = f"{seen}. {argument}={clip:g} clipped {100 * share:.3g} % of them"
    if share > 0.5:
        return f"{clipped}: it rescales most steps instead of outliers. {nearly:.2g} would clip 1 % of them."
    if share < 0.001 and clip > 2 * nearly:
        return f"{clipped}: it lets through {clip / half:.3g} times the median. {nearly:.2g} would bound outliers."
    return f"{clipped}."
