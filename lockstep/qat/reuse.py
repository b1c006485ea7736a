"""Keep a layer's quantized weight between passes, for as long as its master stays as it is.

Within an optimizer step the master does not change, yet every micro-batch, and every recomputation of an activation
checkpoint, would quantize it again. A kept value is dropped when

* the master changes in place: PyTorch counts that in ``weight._version`` (``copy_``, ``load_state_dict``, optimizers);
* the master is another tensor, or lies elsewhere or otherwise in memory;
* any optimizer of this process steps, whatever way it writes; within a step (closures) nothing is kept or used;
* ``layer.weight`` is set, which is how FSDP hands over a weight that it has gathered anew;
* the layer is moved, or put in eval mode.

Only passes of a layer in train mode that record gradients use or keep anything, so validation and moving averages that
swap weights through ``.data`` around it are safe.

Invisible to PyTorch, and so to this file, are writes outside an optimizer's step that do not count as a change:
``weight.data``, a raw pointer, a numpy or shared-memory alias, and collectives straight into the master, such as
``torch.distributed.broadcast(weight, 0)``. After one, call `drop`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lockstep.kernels import operators

Reuse = Literal["codes", "weight"]
Value = TypeVar("Value")


class Kept:
    """What one layer keeps: its packed codes or its dequantized weight. Copies and pickles come empty."""

    def __init__(self, what: Reuse) -> None:
        self.what = what
        # The master as it was: an alias, so that its memory cannot become another tensor's; its state; the value.
        self._entry: tuple[Tensor, tuple, Any] | None = None
        _watch_optimizers()
        with _LOCK:
            _ALL.add(self)

    def of(self, weight: Tensor, compute: Callable[[], Value]) -> Value:
        """The kept value of `weight`, or ``compute()``, kept from now on.

        Raises:
            ValueError: under DeepSpeed ZeRO-3, in a CUDA graph or under a tracer, where a change cannot be seen.
        """
        _check(weight)
        state = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype)
        entry = self._entry
        if entry is None or entry[1] != state:
            entry = self._entry = None  # before the new value takes memory
            entry = (weight.detach(), state, compute())
            self._entry = None if _STEPPING else entry
        return entry[2]

    def drop(self) -> None:
        """Keep nothing, and free its memory."""
        self._entry = None

    def __reduce__(self) -> tuple[type[Kept], tuple[Reuse]]:
        return Kept, (self.what,)


def drop(model: nn.Module) -> None:
    """Let every layer of `model` quantize its weight anew, after a write to it that PyTorch does not count."""
    for module in model.modules():
        if (kept := getattr(module, "kept", None)) is not None:
            kept.drop()


_ALL: weakref.WeakSet[Kept] = weakref.WeakSet()
_LOCK = threading.Lock()
_STEPPING: set[str] = set()  # not empty within an optimizer's step; one that raises leaves it so until the next step


@cache
def _watch_optimizers() -> None:
    def drop_all() -> None:
        with _LOCK:
            everything = list(_ALL)
        for kept in everything:
            kept.drop()

    def begin(*_: Any) -> None:
        _STEPPING.add("step")
        drop_all()

    def end(*_: Any) -> None:
        _STEPPING.clear()
        drop_all()

    register_optimizer_step_pre_hook(begin)
    register_optimizer_step_post_hook(end)


def _check(weight: Tensor) -> None:
    if hasattr(weight, "ds_id"):
        raise ValueError(
            "reuse cannot be proved safe under DeepSpeed ZeRO-3, which gathers weights where PyTorch does not see it: "
            "prepare without reuse."
        )
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "reuse inside a CUDA graph would replay what was kept when the graph was captured: prepare without reuse."
        )
    if operators.traced(weight) or torch.jit.is_tracing():
        raise ValueError(
            "reuse under a tracer would bake in what was kept: prepare without reuse, or trace in eval mode."
        )
