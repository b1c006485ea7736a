"""What an export goes through, module by module: each `Entry` makes what is stored of its module."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lockstep.export import hub
from lockstep.export.checks import Check, check_finite, checked_master
from lockstep.export.config import quantization_config
from lockstep.export.directory import ExportError
from lockstep.export.gather import fsdp_units, gathered, together, without_wrappers
from lockstep.export.legality import check_exportable, check_measured
from lockstep.export.served import Layer, quantized_keys, served_state, served_tensor, stored_as
from lockstep.qat.prepare import unwrapped
from lockstep.scheme import Scheme, TensorSpec

PLAIN = "plain"  # of `stream`: no quantization


class Made(NamedTuple):
    """What is stored of a module: of use to nobody before its checks are settled."""

    tensors: dict[str, Tensor]
    checks: list[Check]


class Entry(NamedTuple):
    """A module that has something to store.

    Within the block of `whole` its parameters are whole; there `parts` makes what is stored of it, and appends to a
    list the checks that it has launched and not settled; without a list it settles each before it goes on. They too
    are settled in the block, if the model is sharded.
    """

    name: str  # in the state dict
    whole: Callable[[], AbstractContextManager[None]]
    parts: Callable[[list[Check] | None], Iterable[tuple[str, Tensor]]]

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """What is stored, each tensor checked."""
        return self.parts(None)

    def made(self) -> Made:
        """What is stored, whose checks are to be settled."""
        checks: list[Check] = []
        return Made(dict(self.parts(checks)), checks)


def entries(model: nn.Module, format: str | None, ranks: dist.ProcessGroup | None) -> list[Entry]:
    """What `stream` goes through, in the order of the state dict. All of `ranks` (`ranks_of`) must call it.

    Any order is right, if it is that of all ranks. `model` is within `with_adapters_merged`.
    """
    return _entries(model, format, sharded=False) if ranks is None else _agreed(model, format, ranks)


def _entries(model: nn.Module, format: str | None, sharded: bool) -> list[Entry]:
    units, model = fsdp_units(model), unwrapped(model)
    keys: dict[str, dict[str, Layer]] = {}
    by_layer: dict[str, str] = {}
    if format != PLAIN:
        check_exportable(model, format)
        check_measured(model)
    with without_wrappers(model):
        found = quantized_keys(model)
        layers = {name: layer for of_key in found.values() for name, layer in of_key.items()}
        scheme = _served_as(model, layers)
        if format != PLAIN:
            keys, by_layer = found, stored_as(layers, format)
        state, owners = served_state(model), dict(model.named_modules(remove_duplicate=False))

    def entry(name: str, own: list[str]) -> Entry:
        module = owners[name]

        def parts(later: list[Check] | None) -> Iterator[tuple[str, Tensor]]:
            for key in own:
                parameter = module._parameters.get(key.rpartition(".")[2])
                tensor = state[key] if parameter is None else parameter.detach()
                quantized = keys.get(key, {})
                _check_whole(key, tensor, quantized, parameter is not None)
                if quantized:
                    yield from checked_master(key, quantized, by_layer, later)
                    continue
                served = served_tensor(model, key, tensor, scheme)
                if parameter is not None:  # buffers may hold an infinity on purpose, as masks do
                    check_finite(key, served, later)
                # FSDP1 takes the memory back.
                yield from hub.stored_tensors(model, key, served.clone() if units else served).items()

        if not sharded:
            return Entry(name, nullcontext, parts)
        return Entry(name, partial(gathered, getattr(module, "fused", ()) or (module,), units), parts)

    return [entry(name, list(own)) for name, own in groupby(state, _owner)]


def _served_as(model: nn.Module, layers: Mapping[str, Layer]) -> Scheme:
    """A scheme with the served dtype of `model`, of which `layers` are prepared."""
    if layers:
        return next(iter(layers.values())).scheme
    own = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.bfloat16)
    return Scheme(TensorSpec(served_dtype=torch.float16 if own == torch.float16 else torch.bfloat16))


def _agreed(model: nn.Module, format: str | None, ranks: dist.ProcessGroup) -> list[Entry]:
    """`_entries` of a sharded model. ExportError on all ranks if one has prepared it otherwise."""
    entries: list[Entry] = []

    def plan() -> str:
        entries.extend(_entries(model, format, sharded=True))
        with without_wrappers(unwrapped(model)):
            names = [*served_state(unwrapped(model))]
        return json.dumps([None if format == PLAIN else quantization_config(model, format), names])

    first, *others = together(plan, ranks)
    for rank, other in enumerate(others, 1):
        if other != first:
            raise ExportError(f"rank {rank} has prepared its model otherwise than rank 0: prepare alike on all ranks.")
    return entries


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


def _check_whole(key: str, tensor: Tensor, quantized: Mapping[str, Layer], is_parameter: bool) -> None:
    if tensor.is_meta:
        raise ExportError(f"{key} is on the meta device: load weights into the model first.")
    lost = not tensor.numel()
    for layer in quantized.values():
        lost |= layer.weight.shape != (layer.out_features, layer.in_features)
    if isinstance(tensor, DTensor) or (is_parameter and lost):
        raise ExportError(
            f"{key} is sharded over ranks in a way that is not known here ({type(tensor).__name__} of shape "
            f"{list(tensor.shape)}): export FSDP1's outermost wrapper, or shard by FSDP2, ZeRO-3 or DTensor."
        )
