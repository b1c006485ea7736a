"""Whole weights of models that are sharded over ranks, one module at a time, and what the ranks must agree on.

Known are FSDP2 and tensor parallelism (``DTensor`` parameters), DeepSpeed ZeRO-3 (parameters with a ``ds_id``) and
FSDP1 with ``use_orig_params=True``. Gathering is a collective: all ranks call in the same order, which is the order of
the model's state dict. At no time is more than one module whole on a rank; of FSDP1, one of its units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping  # the only way up
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lockstep.export.directory import ExportError
from lockstep.qat.prepare import inner

Value = TypeVar("Value")
Unit = FullyShardedDataParallel | FSDPModule


@contextmanager
def without_wrappers(model: nn.Module) -> Iterator[None]:
    """Within the block `model` has no wrappers within: its modules and its state dict have the names engines know.

    Wrappers are those of `lockstep.qat.prepare.inner`: FSDP1's, activation checkpointing's, ``torch.compile``'s.
    """
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and inner(child) is not None and inner(parent) is None
    ]
    try:
        for parent, name, child in wrapped:
            bare: nn.Module | None = child
            while bare is not None:
                parent._modules[name], bare = bare, inner(bare)
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


def fsdp_units(model: nn.Module) -> dict[int, Unit]:
    """What gathers each module's parameters for its forward, FSDP1's wrapper or FSDP2's module, by the module's id."""
    # What is exported may be a part of what was sharded, which it does not know of.
    parents = [one for one in list(_module_state_mapping) if any(part is model for part in one.modules())]
    parents = sorted(parents, key=lambda parent: -len(list(parent.modules())))
    units: dict[int, Unit] = {}
    for unit in (*parents, *model.modules()):  # outer ones first
        if isinstance(unit, FullyShardedDataParallel | FSDPModule):
            units |= dict.fromkeys(map(id, cast(nn.Module, unit).modules()), unit)
    return units


@contextmanager
def gathered(modules: Iterable[nn.Module], units: Mapping[int, Unit] | None = None) -> Iterator[None]:
    """Within the block the parameters of `modules` themselves, not of their children, are as their forward sees them.

    That is whole on every rank, and in FSDP's ``param_dtype`` if it casts: the forward quantizes what was cast. Plain
    parameters stay what they are. What the block takes from FSDP1 parameters it must copy. No forward may run in it.

    Args:
        modules: the same on all ranks.
        units: see `fsdp_units`.
    """
    modules = list({id(module): module for module in modules}.values())
    units = units or {}
    around = {id(unit): unit for module in modules if (unit := units.get(id(module))) is not None}
    with ExitStack() as stack:
        own = [one for module in modules for one in module._parameters.values() if one is not None]
        if partitioned := [one for one in own if hasattr(one, "ds_id") and not one.numel()]:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned, modifier_rank=None))
        for unit in around.values():
            if isinstance(unit, FullyShardedDataParallel):
                stack.enter_context(FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False))
        for module in modules:
            _set_as_in_forward(module, _param_dtype(units.get(id(module))), stack)
        yield


def _set_as_in_forward(module: nn.Module, dtype: torch.dtype | None, stack: ExitStack) -> None:
    """Give `module` whole parameters in `dtype` until `stack` closes."""
    for name, one in list(module._parameters.items()):
        if one is None or not (isinstance(one, DTensor) or (dtype and one.is_floating_point() and one.dtype != dtype)):
            continue
        found = whole(one).detach()
        if dtype and found.is_floating_point():
            found = found.to(dtype)
        stack.callback(module._parameters.__setitem__, name, one)
        module._parameters[name] = nn.Parameter(found, requires_grad=one.requires_grad)


def _param_dtype(unit: Unit | None) -> torch.dtype | None:
    """What FSDP casts parameters to for the forward, if it does."""
    if unit is None:
        return None
    if isinstance(unit, FullyShardedDataParallel):
        return unit.mixed_precision.param_dtype
    return unit._get_fsdp_state()._mp_policy.param_dtype  # there is no public way to ask


@contextmanager
def outermost_gathered(model: nn.Module | None) -> Iterator[None]:
    """Within the block what `model`'s own FSDP1 wrapper holds, and no wrapper within it does, is as in the forward.

    For what is exported from inside of that wrapper: Lightning wraps the LightningModule around the model.
    """
    with ExitStack() as stack:
        if isinstance(model, FullyShardedDataParallel):
            units = fsdp_units(model)
            stack.enter_context(FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False))
            for module in model.modules():
                if units.get(id(module)) is model:
                    _set_as_in_forward(module, _param_dtype(model), stack)
        yield


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, whole on every rank. All ranks must call it."""
    if isinstance(tensor, DTensor):
        return cast(DTensor, tensor.detach()).full_tensor()
    if hasattr(tensor, "ds_id") and not tensor.numel():
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=None):
            return tensor.detach().clone()
    return tensor


def ranks_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that `model` is sharded over, or None: it is whole here.

    Raises:
        ExportError: it is sharded over a part of all ranks, in more than one dimension.
    """
    parameters = list(model.parameters())
    for one in parameters:
        if isinstance(one, DTensor) and one.device_mesh.size() != dist.get_world_size():
            if one.device_mesh.ndim == 1:
                return one.device_mesh.get_group()
            raise ExportError(
                f"the model is sharded over {one.device_mesh.size()} of {dist.get_world_size()} ranks in "
                f"{one.device_mesh.ndim} dimensions: export from a mesh of all ranks, or of one dimension."
            )
    sharded = any(isinstance(one, DTensor) or hasattr(one, "ds_id") for one in parameters)
    return dist.group.WORLD if sharded or fsdp_units(model) else None


def together(work: Callable[[], Value], ranks: dist.ProcessGroup) -> list[Value]:
    """What `work` returns on each of `ranks`, in their order. It must have no collectives in it.

    An exception on one of them is one on all: as it is there, elsewhere an ExportError that names the rank.
    """
    value = problem = None
    try:
        value = work()
    except Exception as error:
        problem = error
    found: list[Any] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(found, (value, problem and f"{type(problem).__name__}: {problem}"), group=ranks)
    if problem is not None:
        raise problem
    for rank, (_, text) in enumerate(found):
        if text is not None:
            raise ExportError(f"rank {rank} could not export: {text}")
    return [value for value, _ in found]
