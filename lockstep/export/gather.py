"""Whole weights of models that are sharded over ranks, one module at a time, and what the ranks must agree on.

Known are FSDP2 and tensor parallelism (``DTensor`` parameters), DeepSpeed ZeRO-3 (parameters with a ``ds_id``) and
FSDP1 with ``use_orig_params=True``. Gathering is a collective: all ranks call in the same order, which is the order of
the model's state dict. At no time is more than one module whole on a rank; of FSDP1, one of its units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lockstep.export.directory import ExportError
from lockstep.qat.prepare import inner

Value = TypeVar("Value")
Units = Mapping[int, FullyShardedDataParallel]


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


def fsdp_units(model: nn.Module) -> dict[int, FullyShardedDataParallel]:
    """The FSDP1 wrapper that gathers each module's parameters, by the module's ``id``."""
    units: dict[int, FullyShardedDataParallel] = {}
    for unit in FullyShardedDataParallel.fsdp_modules(model):  # outer ones first
        units |= dict.fromkeys(map(id, unit.modules()), unit)
    return units


@contextmanager
def gathered(modules: Iterable[nn.Module], units: Units | None = None) -> Iterator[None]:
    """Within the block the parameters of `modules` themselves, not of their children, are whole on every rank.

    Plain parameters stay what they are. What the block takes from FSDP1 parameters it must copy.
    No forward may run in it.

    Args:
        modules: the same on all ranks.
        units: see `fsdp_units`.
    """
    modules = list({id(module): module for module in modules}.values())
    own = [(module, name, one) for module in modules for name, one in module._parameters.items() if one is not None]
    with ExitStack() as stack:
        if partitioned := [one for _, _, one in own if hasattr(one, "ds_id") and not one.numel()]:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned, modifier_rank=None))
        around = {id(unit): unit for module in modules if (unit := (units or {}).get(id(module))) is not None}
        for unit in around.values():
            stack.enter_context(FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False))
        for module, name, one in own:
            if isinstance(one, DTensor):
                stack.callback(module._parameters.__setitem__, name, one)
                module._parameters[name] = nn.Parameter(whole(one), requires_grad=one.requires_grad)
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
