"""The names under which the hub and engines know a model's tensors, where transformers 5 keeps them otherwise.

transformers renames some parts of a model as it loads it and stacks the experts of a layer in one tensor; its own
``save_pretrained`` undoes both. What stands here asks transformers which part of which parameter each stored tensor is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lockstep.export.directory import ExportError
from lockstep.qat.experts import DOWN, Layout


class Piece(NamedTuple):
    """A stored tensor: the state-dict key of the parameter that it is of, and where in it, ``()`` for all of it.

    Of a stacked parameter ``[E, N, K]`` that is ``(expert, rows)``.
    """

    key: str
    where: tuple[int | slice, ...] = ()


def pieces(model: nn.Module, key: str, shape: Sequence[int]) -> dict[str, Piece]:
    """What is stored of the state-dict entry `key` of that shape: stored names, in transformers' order.

    Raises:
        ExportError: transformers stores it as something that is no range of its rows.
    """
    if not _converts(model):
        return {key: Piece(key)}
    from transformers.core_model_loading import revert_weight_conversion

    # Its rows, numbered: what comes back says where they went.
    rows = torch.Size(shape[:-1] if len(shape) > 1 else shape)
    numbers = torch.arange(rows.numel()).view(rows)
    numbers = numbers if len(shape) < 2 else numbers.unsqueeze(-1).expand(*rows, 2)
    found: dict[str, Tensor] = revert_weight_conversion(model, {key: numbers})  # type: ignore[arg-type]
    return {name: Piece(key, _where(key, name, numbers, part)) for name, part in found.items()}


def expert_names(model: nn.Module, name: str, layout: Layout) -> dict[str, tuple[int, str]]:
    """The projections of a module of experts, called `name` in the state dict, by the names that engines know: number
    of the expert, and ``"gate_proj"``, ``"up_proj"`` or ``"down_proj"``.

    Where transformers stores the experts stacked, each is named below the module:
    ``model.layers.0.mlp.experts.3.gate_proj``.

    Raises:
        ExportError: transformers stores them otherwise than by expert and projection.
    """
    found: dict[str, tuple[int, str]] = {}
    for parameter in (layout.first, DOWN):
        (n, k), experts = layout.shape(parameter), range(layout.experts)
        cuts = {part: cut for part, cut in layout.parts().items() if (part == DOWN) == (parameter == DOWN)}
        shape = (len(experts), *((k, n) if layout.transposed else (n, k)))
        stored = pieces(model, f"{name}.{parameter}", shape)
        if all(not piece.where for piece in stored.values()):
            found |= {f"{name}.{number}.{part}": (number, part) for number in experts for part in cuts}
            continue
        parts = {cut.indices(n): part for part, cut in cuts.items()}
        for stored_name, piece in stored.items():
            number, rows = piece.where
            part = parts.get(rows.indices(n)) if isinstance(rows, slice) else None
            if part is None or layout.transposed or not stored_name.endswith(".weight"):
                raise ExportError(f"{name}.{parameter}: transformers stores a part of it as {stored_name}.")
            found[stored_name.removesuffix(".weight")] = (cast(int, number), part)
    return found


def stored_tensors(model: nn.Module, key: str, tensor: Tensor) -> dict[str, Tensor]:
    """What transformers' own ``save_pretrained`` stores of the state-dict entry `key`, an unquantized `tensor`."""
    if not _converts(model):
        return {key: tensor}
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, {key: tensor})  # type: ignore[arg-type]


def layer_name(model: nn.Module, name: str) -> str:
    """The name that engines know of the linear layer `name`."""
    (stored,) = pieces(model, f"{name}.weight", (1, 1))
    return stored.removesuffix(".weight")


def _converts(model: Any) -> bool:
    # transformers looks through the whole model for it, which here would be once for each of its layers.
    if model not in _CONVERTS:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping

        theirs = isinstance(model, PreTrainedModel)
        _CONVERTS[model] = theirs and bool(get_model_conversion_mapping(model, add_legacy=False))  # type: ignore[arg-type]
    return _CONVERTS[model] or bool(getattr(model, "_weight_conversions", None))


_CONVERTS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # by model: the kinds of its parts do not change


def _where(key: str, name: str, numbers: Tensor, part: Tensor) -> tuple[int | slice, ...]:
    """Where the rows `part` of the numbered rows `numbers` are in the parameter."""
    if torch.equal(part, numbers):
        return ()
    found = part[:, 0] if part.ndim == 2 else part
    if numbers.ndim == 3 and part.shape == (len(found), 2) and len(found):
        expert, first = divmod(int(found[0]), numbers.shape[1])
        step = int(found[1] - found[0]) if len(found) > 1 else 1
        stop = first + (len(found) - 1) * step + 1
        where = (expert, slice(first, stop, step))
        if step > 0 and stop <= numbers.shape[1] and torch.equal(numbers[where], part):
            return where
    raise ExportError(f"transformers stores {key} as {name}, which is no range of its rows.")
