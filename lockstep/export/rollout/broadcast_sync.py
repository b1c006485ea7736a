"""`sync`: bring all engines of a `BroadcastEngine` to the weights of a model; the trainer's ranks send in turns.

Of a sharded model every trainer rank has every module whole for a moment (`lockstep.export.gather`), so no rank gathers
or sends for the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.export.entries import Entry, entries
from lockstep.export.gather import ranks_of, together
from lockstep.export.rollout.broadcast import BroadcastEngine
from lockstep.qat.prepare import with_adapters_merged

_BLOCK = re.compile(r".*?\.\d+(?=\.|$)")


def sync(model: nn.Module, engine: BroadcastEngine, version: int) -> dict[str, int]:
    """Bring all engines to the weights of `model`, block by block, its ranks taking turns in sending.

    All trainer ranks call it. Each block (a decoder layer) is gathered on all of them, packed on the one whose turn it
    is, and sent from there, so that the link of no rank carries more than its share of the model. Beside its shards a
    rank holds one packed block and one whole module. Everything is sent; what has not changed, too.

    Returns:
        The checksums of all tensors, by name, the same on all ranks.

    Raises:
        ExportError: one rank could not export: on all ranks. The update has been aborted.
        EngineFailed, Lost: see `BroadcastEngine.load`. Likewise.
        ValueError: the link is of another number of ranks than the model.
    """
    ranks, link = ranks_of(model), engine.link
    count = 1 if ranks is None else dist.get_world_size(ranks)
    if count != link.trainers:
        raise ValueError(
            f"the model is sharded over {count} ranks: connect with trainers={count}, not {link.trainers}."
        )
    with torch.no_grad(), with_adapters_merged(model) as served:
        blocks: dict[str, list[Entry]] = {}
        for entry in entries(served, engine.format, ranks):
            found = _BLOCK.match(entry.name)
            blocks.setdefault(found[0] if found else entry.name, []).append(entry)
        engine.begin_update(version)
        try:
            for turn, block in enumerate(blocks.values()):
                tensors = _packed(block, turn % link.trainers == link.rank, ranks)
                engine.load(tensors)
            engine.end_update()
        except Exception:
            engine.abort_update()
            raise
    return dict(engine.acknowledged)


def _packed(block: Iterable[Entry], mine: bool, ranks: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """The tensors of a block, where they are `mine`; all ranks gather. An error on one is one on all."""
    tensors: dict[str, Tensor] = {}
    problem: Exception | None = None
    for entry in block:
        with entry.whole():
            if mine and problem is None:
                try:
                    tensors.update(entry.tensors())
                except Exception as error:  # the others wait where the next module is gathered
                    problem = error

    def check() -> None:
        if problem is not None:
            raise problem

    if ranks is None:
        check()
    else:
        together(check, ranks)
    return tensors
