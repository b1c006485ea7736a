"""Keep a layer's quantized weight between passes, for as long as its master stays as it is.

Within an optimizer step the master does not change, yet every micro-batch, and every recomputation of an activation
checkpoint, would quantize it again. A kept value is dropped when

* the master changes in place: PyTorch counts that in ``weight._version`` (``copy_``, ``load_state_dict``, optimizers);
* the master is another tensor or lies elsewhere in memory;
* any optimizer of this process steps, whatever way it writes;
* ``layer.weight`` is set, which is how FSDP hands over a weight that it has gathered anew.

Invisible to PyTorch itself, and so to this file: writes through ``weight.data`` or a raw pointer outside an optimizer's
step. After one, set ``layer.weight = layer.weight`` or call ``layer.kept.drop()``. Weights that swap themselves through
``.data`` for validation (moving averages) are safe: a layer in eval mode neither reads nor keeps anything.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

Reuse = Literal["codes", "weight"]
Value = TypeVar("Value")


class Kept:
    """What one layer keeps: its packed codes or its dequantized weight. Copies and pickles come empty."""

    def __init__(self, what: Reuse) -> None:
        self.what = what
        # The master as it was: an alias, so that its memory cannot become another tensor's; its version; the value.
        self._entry: tuple[Tensor, int, Any] | None = None
        _drop_at_every_optimizer_step()
        _ALL.add(self)

    def of(self, weight: Tensor, compute: Callable[[], Value]) -> Value:
        """The kept value of `weight`, or ``compute()``, kept from now on.

        Raises:
            ValueError: the weight's owner changes it where this cannot be seen.
        """
        _check(weight)
        entry = self._entry
        if entry is None or (entry[0].data_ptr(), entry[1]) != (weight.data_ptr(), weight._version):
            entry = self._entry = None  # before the new value takes memory
            entry = self._entry = (weight.detach(), weight._version, compute())
        return entry[2]

    def drop(self) -> None:
        """Keep nothing, and free its memory."""
        self._entry = None

    def __reduce__(self) -> tuple[type[Kept], tuple[Reuse]]:
        return Kept, (self.what,)


_ALL: weakref.WeakSet[Kept] = weakref.WeakSet()


@cache
def _drop_at_every_optimizer_step() -> None:
    def drop_all(*_: Any) -> None:
        for kept in list(_ALL):
            kept.drop()

    register_optimizer_step_post_hook(drop_all)


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
