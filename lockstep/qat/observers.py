"""Observers: what measures the range of a layer's inputs before it is frozen into a stored scale.

=================  ===================================================================================================
observer           range
=================  ===================================================================================================
minmax             the largest magnitude
percentile         the smallest magnitude that 99.9 % of the magnitudes do not exceed; what is above it will be clipped
moving_average     the largest magnitude of a batch, averaged: the first as it is, each later one moves it by 1 %
mse                the range with which quantizing and dequantizing the inputs has the smallest squared error
=================  ===================================================================================================

`percentile` and `mse` count magnitudes in a `Histogram` of fixed size, which is exact for bf16 inputs. With NVFP4,
whose stored scale scales the scales of groups, the magnitudes are the largest of each group.

`observe` gives the observers to the prepared layers, `freeze` takes them away and writes the scales. Over several ranks
every one of them must call `freeze`, with the same layers; all get the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, Protocol, Self, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep import activations
from lockstep.qat.linear import QATLinear
from lockstep.qat.prepare import quantized_modules, run_as_one, unwrapped
from lockstep.scheme import FORMATS, ActivationSpec, KVCacheSpec

ObserverName = Literal["minmax", "percentile", "moving_average", "mse"]
AVERAGING = 0.01  # torch.ao.quantization.MovingAverageMinMaxObserver's


class Observer(Protocol):
    """Measures a range: `update` sees every tensor, `range` tells the largest magnitude to represent."""

    def update(self, x: Tensor) -> None:
        """Take `x` into account: any shape, strides and floating dtype, empty too. Does not wait for the device."""

    def range(self) -> Tensor:
        """The range of what this rank saw: fp32 scalar, 0 or more; infinite after a NaN or an infinity, NaN before
        any input."""

    def reduce(self) -> Observer:
        """An observer of what all ranks saw, with the same bits on each of them; this one stays as it is."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on with the same bits. Shares memory with the observer."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a copy of `state`. ValueError if another kind of observer wrote it."""


class _Stateful:
    """Named tensors as an observer's state, which follow the inputs to their device."""

    _names: tuple[str, ...]

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._names}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        shapes = {name: value.shape for name, value in self.state_dict().items()}
        found = {name: value.shape for name, value in state.items()}
        if found != shapes:
            raise ValueError(f"{type(self).__name__} has the state {shapes}, found {found}: another observer's.")
        for name, value in state.items():
            setattr(self, name, value.detach().clone())

    def _follow(self, x: Tensor) -> None:
        for name in self._names:
            setattr(self, name, getattr(self, name).to(x.device))


def _without_tracking(update: Any) -> Any:
    return torch.compiler.disable(torch.no_grad()(update), reason="observers are for a few eager batches")


class MinMax(_Stateful):
    """The largest magnitude of all inputs. See `Observer`."""

    _names = ("largest",)

    def __init__(self) -> None:
        self.largest = torch.full((), -1.0)  # before any input

    @_without_tracking
    def update(self, x: Tensor) -> None:
        if x.numel():
            self._follow(x)
            self.largest = torch.maximum(self.largest, _largest(x))

    def range(self) -> Tensor:
        return torch.where(self.largest < 0, torch.nan, self.largest)

    def reduce(self) -> MinMax:
        reduced = MinMax()
        reduced.largest = over_ranks(self.largest, "max")
        return reduced


class MovingAverage(_Stateful):
    """The average of each batch's largest magnitude: ``average += 0.01 * (largest - average)``, in fp32.

    The arithmetic is that of ``torch.ao.quantization.MovingAverageMinMaxObserver``. Over ranks: the mean of the ranks
    that saw something, in their order. See `Observer`.
    """

    _names = ("average",)

    def __init__(self) -> None:
        self.average = torch.full((), -1.0)  # before any input

    @_without_tracking
    def update(self, x: Tensor) -> None:
        if x.numel():
            self._follow(x)
            largest = _largest(x)
            # After an infinity, infinity - infinity would be NaN, which means no input.
            moved = (self.average + AVERAGING * (largest - self.average)).nan_to_num(torch.inf, torch.inf)
            self.average = torch.where(self.average < 0, largest, moved)

    def range(self) -> Tensor:
        return torch.where(self.average < 0, torch.nan, self.average)

    def reduce(self) -> MovingAverage:
        averages = _gathered(self.average)
        seen = averages >= 0
        mean = torch.where(seen, averages, 0).sum() / seen.sum()
        reduced = MovingAverage()
        reduced.average = torch.where(seen.any(), mean, -1.0)
        return reduced


class Histogram(_Stateful):
    """How often each magnitude was seen, a bin for each value of bf16: 256 KiB, log-spaced with 128 bins an octave.

    Inputs are rounded to bf16, so a bf16 input is counted exactly; an fp16 or fp32 one under a magnitude that differs
    by at most 2**-8 of it (subnormals of bf16 aside). Magnitudes beyond bf16's range count as infinite.
    """

    _names = ("counts",)
    _bins, _infinity, _chunk = 1 << 15, 0x7F80, 1 << 22

    def __init__(self) -> None:
        self.counts = torch.zeros(self._bins, dtype=torch.int64)

    @_without_tracking
    def update(self, x: Tensor) -> None:
        """Count the magnitudes of `x`."""
        self._follow(x)
        one = self.counts.new_ones(())
        for part in x.detach().reshape(-1).split(self._chunk):  # bounds the memory that indices take
            # The sign is cut off, so that a bf16's bits are its place among the magnitudes.
            indices = part.to(torch.bfloat16).view(torch.int16).bitwise_and(0x7FFF).long()
            # Not in place: counts that were made in inference mode may not be changed outside of it.
            self.counts = self.counts.scatter_add(0, indices, one.expand_as(indices))

    def reduce(self) -> Histogram:
        """The sum over the ranks."""
        reduced = Histogram()
        reduced.counts = over_ranks(self.counts, "sum")
        return reduced

    def magnitudes(self) -> Tensor:
        """The magnitude of each bin, fp32 ``[32768]``; those from 0x7F80 on are infinity and NaN."""
        return torch.arange(self._bins, device=self.counts.device).to(torch.int16).view(torch.bfloat16).float()

    def share_above(self, range: Tensor) -> Tensor:
        """Share of the inputs, fp64 scalar, whose magnitude rounded to bf16 is above `range` rounded so."""
        above = self.magnitudes() > range.to(self.counts.device, torch.bfloat16).float()
        return (self.counts * above).sum().double() / self.counts.sum()

    def checked(self, range: Tensor) -> Tensor:
        """`range`, or infinity after a NaN or an infinity, or NaN before any input."""
        range = torch.where(self.counts[self._infinity :].sum() > 0, torch.inf, range)
        return torch.where(self.counts.sum() == 0, torch.nan, range)


class _Counting(_Stateful):
    """An observer whose state is a histogram of what the stored scale has to reach."""

    _names = ("counts",)

    def __init__(self, spec: ActivationSpec | KVCacheSpec) -> None:
        self.spec, self.histogram = spec, Histogram()

    @property
    def counts(self) -> Tensor:
        return self.histogram.counts

    @counts.setter
    def counts(self, counts: Tensor) -> None:
        self.histogram.counts = counts

    def update(self, x: Tensor) -> None:
        self.histogram.update(_scaled_magnitudes(x, self.spec))

    def reduce(self) -> Self:
        reduced = copy.copy(self)
        reduced.histogram = self.histogram.reduce()
        return reduced


class Percentile(_Counting):
    """The smallest magnitude that 99.9 % of the magnitudes do not exceed: ``torch.quantile(..., "higher")``.

    Equal to it for bf16 inputs, else within 2**-8 of it: see `Histogram`. See `Observer`.
    """

    share = 0.999

    def range(self) -> Tensor:
        cumulative = self.counts.cumsum(0)
        rank = ((cumulative[-1] - 1).double() * self.share).ceil().clamp(min=0)
        place = torch.searchsorted(cumulative, rank.long(), right=True)
        magnitudes = self.histogram.magnitudes()
        return self.histogram.checked(magnitudes[place.clamp(max=len(magnitudes) - 1)])


class MeanSquaredError(_Counting):
    """The range with the smallest sum of ``(x - dequantize(quantize(x)))**2``, computed in fp64 from a `Histogram`.

    Tried are the largest magnitude, as `Histogram` has it, and smaller ones down to ``2**-12`` of it, 64 an octave in
    the first octave and 16 below it, where less depends on them; of equals the largest wins. Quantized is as the spec's
    engine does (`lockstep.activations`), keys and values as `lockstep.qat.kv_cache` does, magnitudes in place of the
    signed values. With NVFP4 each magnitude, the largest of its group, stands for a group of its own: what a range
    decides there is which groups' scales overflow or underflow e4m3, and how they round. See `Observer`.
    """

    exponents = (*(i / 64 for i in range(64)), *(1 + i / 16 for i in range(11 * 16 + 1)))

    def range(self) -> Tensor:
        seen = self.counts.nonzero().squeeze(-1)
        seen = seen[seen < Histogram._infinity]
        counts, magnitudes = self.counts[seen].double(), self.histogram.magnitudes()[seen]
        largest = magnitudes[-1:].sum()  # 0 if nothing was seen
        fractions = torch.tensor(self.exponents, dtype=torch.float64, device=largest.device).neg().exp2()
        candidates = (largest.double() * fractions).float()
        errors = torch.stack([(counts * _error(magnitudes, one, self.spec)).sum() for one in candidates])
        # A candidate so small that its scale is not finite has no error at all.
        best = errors.nan_to_num(torch.inf, torch.inf).argmin()
        return self.histogram.checked(candidates[best])


def make(name: ObserverName, spec: ActivationSpec | KVCacheSpec) -> Observer:
    """A new observer for inputs, keys or values that become what `spec` says. ValueError with the names there are."""
    match name:
        case "minmax":
            return MinMax()
        case "moving_average":
            return MovingAverage()
        case "percentile":
            return Percentile(spec)
        case "mse":
            return MeanSquaredError(spec)
    raise ValueError(f"observer={name!r}: choose {', '.join(get_args(ObserverName))}.")


def observe(model: nn.Module, observer: ObserverName = "minmax") -> list[str]:
    """Begin to calibrate: let every prepared layer with a stored input scale measure its inputs, from nothing.

    While they do, the layers compute with quantized weights and inputs as they are.

    Args:
        model: a model that `lockstep.prepare` has prepared with measured input ranges.
        observer: what becomes the range, see `lockstep.qat.observers`.

    Returns:
        The names of these layers.

    Raises:
        ValueError: no layer stores an input scale; an unknown `observer`.
    """
    layers = storing_layers(model)
    if not layers:
        raise ValueError(_none_stores(model))
    observers = [make(observer, _inputs(layer)) for layer in layers.values()]
    for layer, one in zip(layers.values(), observers, strict=True):
        layer.observer = one
    return list(layers)


def freeze(model: nn.Module) -> dict[str, Tensor]:
    """End what `observe` began: write each layer's scale and take the observers away.

    Layers that engines run as one (q/k/v, gate/up) get one scale, from the largest of their ranges. Over several ranks
    the ranges are those of all inputs. All ranks must call it.

    Returns:
        The range of each layer, fp32 scalar.

    Raises:
        ValueError: nothing is observed; a layer saw no input, only zeros, or a NaN or infinity. The message names it.

    Nothing is changed when it raises: the layers go on observing.
    """
    layers = {name: layer for name, layer in storing_layers(model).items() if layer.observer is not None}
    if not layers:
        raise ValueError(f"no layer of this {type(model).__name__} is observed: call observe(model) first.")
    observers = {name: cast(Observer, layer.observer) for name, layer in layers.items()}
    ranges = {name: measured_range(observer, f"the inputs of {name}") for name, observer in observers.items()}
    for siblings in run_as_one(layers):
        shared = torch.stack([ranges[name].to(ranges[siblings[0]].device) for name in siblings]).amax()
        ranges |= dict.fromkeys(siblings, shared)
    scales = {name: activations.static_scale(ranges[name], _inputs(layer)) for name, layer in layers.items()}
    for name, scale in scales.items():
        if not 0 < scale.item() < torch.inf:
            raise ValueError(
                f"the inputs of {name} have the range {ranges[name].item()}, too small for a scale in fp32: "
                f"{scale.item()}. Name the layer in ignore."
            )
    for name, layer in layers.items():
        with torch.no_grad():
            layer.get_buffer(_inputs(layer).scale_name).copy_(scales[name])
        layer.observer = None
    return ranges


def unobserve(model: nn.Module) -> None:
    """Take the observers of `observe` away and leave the scales as they were."""
    for _, layer in quantized_modules(unwrapped(model)):
        layer.observer = None


def states(observers: Mapping[str, Observer]) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint needs to go on observing, by name: of all ranks, the same on each. All must call it."""
    return {name: observer.reduce().state_dict() for name, observer in observers.items()}


def load_states(observers: Mapping[str, Observer], states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Let new observers go on from what `states` gave, on any number of ranks.

    The range in the end is bit for bit that of a run that was not interrupted. Only `moving_average` over several ranks
    differs: each goes on from the average of all, which is the same up to rounding if all run as many batches.

    Raises:
        ValueError: the states are under other names, or those of another kind of observer.
    """
    if observers.keys() != states.keys():
        odd = min(observers.keys() ^ states.keys())
        where = "is observed but not in the stored states" if odd in observers else "is stored but not observed"
        raise ValueError(f"{odd} {where}: the model must be prepared and observed as it was then.")
    for name, observer in observers.items():
        # Counts are summed over the ranks: one of them goes on with those of all, the others begin from nothing.
        if _rank() == 0 or not isinstance(observer, _Counting):
            observer.load_state_dict(states[name])


def measured_range(observer: Observer, what: str) -> Tensor:
    """The range of what all ranks saw: fp32 scalar, above 0, with the same bits on every rank. All must call it.

    Args:
        observer: any.
        what: the plural that errors begin with, such as ``"the inputs of model.layers.0.mlp.down_proj"``.

    Raises:
        ValueError: nothing was seen, only zeros, or a NaN or infinity.
    """
    reduced = observer.reduce()
    range = reduced.range().float()
    value = range.item()
    if value != value:
        raise ValueError(f"{what} were never seen: no batch got there. Run more batches, or name the module in ignore.")
    if value == float("inf"):
        raise ValueError(f"{what} held NaN or infinite values: look for the first module that makes them.")
    if value <= 0:
        raise ValueError(
            f"{what} have the range 0 by {type(reduced).__name__}: all of them, or all but a few, were zeros. Run "
            "other batches, choose the observer minmax, or name the module in ignore."
        )
    return range


def storing_layers(model: nn.Module) -> dict[str, QATLinear]:
    """The prepared layers of `model` that have a measured input scale, by name."""
    layers = {name: layer for name, layer in quantized_modules(unwrapped(model)) if layer.scheme.activations}
    return {name: layer for name, layer in layers.items() if _inputs(layer).stores_scale}


def _none_stores(model: nn.Module) -> str:
    schemes = {str(layer.scheme) for _, layer in quantized_modules(unwrapped(model))}
    if not schemes:
        return f"no layer of this {type(model).__name__} is prepared: call lockstep.prepare first."
    return f"no layer stores an input scale, there is nothing to calibrate: they train as {'; '.join(sorted(schemes))}."


def _inputs(layer: QATLinear) -> ActivationSpec:
    assert layer.scheme.activations is not None
    return layer.scheme.activations


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude, fp32 scalar; infinity in place of NaN, which collectives treat in ways of their own."""
    low, high = x.detach().aminmax()
    return torch.maximum(-low, high).float().nan_to_num(torch.inf, torch.inf)


def _scaled_magnitudes(x: Tensor, spec: ActivationSpec | KVCacheSpec) -> Tensor:
    """What the stored scale has to reach: every value, or with NVFP4 the largest magnitude of each group."""
    if isinstance(spec, ActivationSpec) and spec.group_size is not None:
        return x.detach().unflatten(-1, (spec.num_groups(x.shape[-1]), -1)).abs().amax(-1)
    return x


def _error(magnitudes: Tensor, range: Tensor, spec: ActivationSpec | KVCacheSpec) -> Tensor:
    """The squared error of each of `magnitudes` ``[n]``, fp64, when the stored scale is that of `range`."""
    if isinstance(spec, KVCacheSpec):
        from lockstep.qat import kv_cache  # which imports transformers

        scale = range / range.new_full((), FORMATS[spec.format].largest)
        held = kv_cache.dequantize(kv_cache.quantize(magnitudes, spec, scale), scale, torch.float32)
        return (magnitudes.double() - held.double()).square()
    rows = magnitudes.unsqueeze(-1).expand(-1, spec.group_size or 1)
    codes = activations.quantize(rows, spec, activations.static_scale(range, spec))
    return (rows[:, 0].double() - activations.dequantize(codes, torch.float32)[:, 0].double()).square()


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _device_of_collectives() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def over_ranks(x: Tensor, what: Literal["max", "sum"]) -> Tensor:
    """The maximum or the sum of `x` over all ranks, exact and thus in any order the same; a copy."""
    if not (dist.is_available() and dist.is_initialized()):
        return x.clone()
    reduced = x.detach().to(_device_of_collectives(), copy=True)
    dist.all_reduce(reduced, dist.ReduceOp.MAX if what == "max" else dist.ReduceOp.SUM)
    return reduced


def _gathered(x: Tensor) -> Tensor:
    """The scalars of all ranks, in their order ``[ranks]``."""
    if not (dist.is_available() and dist.is_initialized()):
        return x.reshape(1)
    own = x.detach().to(_device_of_collectives())
    scalars = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(scalars, own)
    return torch.stack(scalars)
