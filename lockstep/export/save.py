"""Write what was trained: stream the tensors that an engine loads, or save a checkpoint folder of them.

Every quantized layer is checked as it leaves (`lockstep.export.checks`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lockstep.export.checks import settling
from lockstep.export.config import quantization_config
from lockstep.export.directory import ExportError, replacing
from lockstep.export.entries import Entry, entries
from lockstep.export.files import Shard, Shards, parse_bytes, write_card, write_folder
from lockstep.export.gather import ranks_of, together, without_wrappers
from lockstep.export.legality import check_exportable, check_measured
from lockstep.export.served import quantized_layers
from lockstep.qat.experts import QATExperts
from lockstep.qat.prepare import unwrapped, with_adapters_merged


def stream(model: nn.Module, format: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, tensor)`` of everything the engine loads, one layer at a time, without a second copy of the model.

    Quantized layers come in the tensors of their format (see `formats.FORMATS`) with their measured input scale,
    everything else in the served dtype under the model's own keys. Tensors are on the model's device; plain ones may
    share its memory. Of a sharded model (`lockstep.export.gather`) all ranks must iterate to the end; each gets every
    tensor whole, under the same names in the same order, and never holds more than one module beside its shards. Of a
    model that is whole, the next module is made on the device while the checks of one are waited for.

    Args:
        model: a prepared model, or its wrapper (DDP, FSDP1, DeepSpeed's engine, ``torch.compile``).
        format: a name in `formats.FORMATS`, or None or ``"auto"``: each layer in the format of its own scheme. Or
            ``"plain"``: all weights unquantized in the served dtype, of any model; of one that is not prepared in its
            own 16-bit dtype, and of one in fp32 in bf16, as vLLM's ``dtype="auto"`` does.

    Raises:
        ExportError: `check_exportable` refuses the model, a range is not measured, a tensor is on ``meta``, a value is
            NaN or infinite, or a layer's words do not give back the weight that it trained with.
        ValueError: an unknown format.
    """
    with with_adapters_merged(model) as served:
        ranks = ranks_of(served)
        all_of_it = entries(served, format, ranks)
        if ranks is None:
            yield from _one_ahead(all_of_it)
            return
        for entry in all_of_it:
            with entry.whole():
                found = dict(entry.tensors())
            yield from found.items()


def _one_ahead(entries: Iterable[Entry]) -> Iterator[tuple[str, Tensor]]:
    """What is stored of `entries`, each handed out after its own checks, when the next is made."""
    last: tuple[dict[str, Tensor], Callable[[], None]] | None = None
    for entry in entries:
        made = entry.made()
        last, following = (made.tensors, settling(made.checks)), last
        del made
        if following is not None:
            tensors, settled = following
            settled()
            yield from tensors.items()
            del following, tensors, settled  # else they were held while the next is made
    if last is not None:
        tensors, settled = last
        settled()
        yield from tensors.items()


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    format: str | None = None,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    trained: str = "",
) -> Path:
    """Save a prepared `model` as a folder for vLLM, SGLang or transformers: weights, configs, tokenizer, model card.

    The folder appears whole or not at all. The model is left as it was. Of a sharded model all ranks must call this:
    layers are gathered one at a time and written by the ranks in turn, each into files of its own, if it sees the
    directory; rank zero adds the rest. An error or a kill on one rank is an error on all, and no folder.

    Args:
        model: a prepared model, or its wrapper. Of a transformers model, ``config.json`` and
            ``generation_config.json`` are written too; of any other module, a ``config.json`` with the dtype and the
            quantization.
        directory: where to write.
        format: a name in `formats.FORMATS`, or None or ``"auto"``: each layer in the format of its own scheme, which
            is one of compressed-tensors'. Several schemes in one model are stored so alone.
        tokenizer: anything with ``save_pretrained``. Engines need it in the folder.
        max_shard_size: bytes, or a string such as ``"500MB"`` (decimal units). The memory used is about one shard.
        overwrite: replace an earlier export. A README.md in it that somebody has written or edited is an error.
        trained: sentences for the model card on how it was trained, see `lockstep.export.card`.

    Returns:
        The directory's absolute path.

    Raises:
        ExportError: see `stream` and `directory.replacing`.
        ValueError: an unknown format or size.
    """
    limit = parse_bytes(max_shard_size, "max_shard_size")
    with with_adapters_merged(model) as served:
        if format == "marlin" and any(isinstance(module, QATExperts) for module in served.modules()):
            raise ExportError(
                'marlin stacks the experts for live updates: use stream(model, "marlin"), no folder holds it.'
            )
        ranks = ranks_of(served)
        if ranks is None:
            _save_whole(served, directory, format, tokenizer, limit, overwrite, trained)
        else:
            _save_sharded(served, directory, format, tokenizer, limit, overwrite, trained, ranks)
    return Path(directory).absolute()


def _save_whole(
    model: nn.Module,
    directory: str | Path,
    format: str | None,
    tokenizer: Any,
    limit: int,
    overwrite: bool,
    trained: str,
) -> None:
    """`save_pretrained` of a model that is whole in this process."""
    check_exportable(model, format)
    check_measured(model)
    with replacing(directory, overwrite) as incomplete:
        shards = Shards(incomplete, limit, "shard")
        for name, tensor in stream(model, format):
            shards.add(name, tensor)
        _finish(model, incomplete, shards.written(), format, tokenizer)
        write_card(model, incomplete, directory, trained)


def _save_sharded(
    model: nn.Module,
    directory: str | Path,
    format: str | None,
    tokenizer: Any,
    limit: int,
    overwrite: bool,
    trained: str,
    ranks: dist.ProcessGroup,
) -> None:
    """`save_pretrained` of a model that is sharded over `ranks`, all of which call this."""
    rank, all_of_it = dist.get_rank(ranks), entries(model, format, ranks)
    with ExitStack() as stack:

        def begin() -> Path | None:
            if rank != 0:
                return None
            token = stack.enter_context(replacing(directory, overwrite)) / uuid.uuid4().hex
            token.touch()
            return token

        token = together(begin, ranks)[0]
        assert token is not None
        # Ranks on another machine need not see the directory: those that do write.
        writers = [one for one, sees in enumerate(together(token.exists, ranks)) if sees]
        shards, problem = Shards(token.parent, limit, f"shard-{rank}"), None
        for number, entry in enumerate(all_of_it):
            with entry.whole():
                if problem is None and writers[number % len(writers)] == rank:
                    try:
                        for name, tensor in entry.tensors():
                            shards.add(name, tensor)
                    except Exception as error:  # the others wait for this rank where the next module is gathered
                        problem = error

        def written() -> list[Shard]:
            if problem is not None:
                raise problem
            return shards.written()

        def finish() -> None:
            if rank == 0:
                token.unlink()
                _finish(model, token.parent, everything, format, tokenizer)
                write_card(model, token.parent, directory, trained)
                stack.close()

        everything = [shard for one in together(written, ranks) for shard in one]
        together(finish, ranks)


def _finish(model: nn.Module, directory: Path, shards: list[Shard], format: str | None, tokenizer: Any) -> None:
    """Give the files their names, and write what else belongs in the folder."""
    model = unwrapped(model)
    with without_wrappers(model):
        served = next(iter(quantized_layers(model).values())).scheme.weights.served_dtype
    write_folder(model, directory, shards, quantization_config(model, format), served, tokenizer)
