"""`convert`: masters on disk to a served folder, tensor by tensor, without the model in memory.

What is quantized, and as what, is decided by `lockstep.prepare` on the model's skeleton on the ``meta`` device; each
layer is then read a few rows at a time, quantized, read back from its words and compared with what training multiplies
with (C3), and written to its place in a file whose size was known beforehand. The bits are those of
`lockstep.export.save_pretrained` of the loaded model, since both go through the same functions.

Memory: a process holds about `pieces.CHUNK` weights at a time, or 128 rows if that is more, with some 50 bytes for
each, whatever the model's, the shard's or the tensor's size. Formats that do not store a weight row by row (``gptq``,
``marlin``) need that for a whole tensor; of a distributed checkpoint a whole tensor is held as it is stored.

A kill loses the tensors that were under way. What is done stands beside the folder (``.NAME.resumable``) with a
checksum of each tensor; the same call goes on from there, and converts again what does not match its checksum.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lockstep import grid
from lockstep.export.checks import check_finite, checked
from lockstep.export.config import quantization_config
from lockstep.export.directory import EXPORTED, ExportError, check_destination, replacing
from lockstep.export.files import parse_bytes, write_card, write_folder
from lockstep.export.legality import check_exportable
from lockstep.export.masters import Stored, read_json, release, stored_tensors
from lockstep.export.pieces import (
    Piece,
    Place,
    as_one,
    by_rows,
    check_left_out,
    chunks,
    file_header,
    named_as,
    other_class,
    pieces_of,
    shards_of,
    skeleton,
    wanted,
)
from lockstep.export.served import (
    quantized_layers,
)
from lockstep.qat import learned
from lockstep.qat.linear import QATLinear
from lockstep.qat.prepare import PrepareReport, prepare, show
from lockstep.scheme import Rule, Scheme, dtype_name

WORKERS = 2  # at most, if nobody asks for another number: with them all processes together stay below 2 GiB
_STATE, _DONE = "arguments.json", "done.jsonl"
# Small files beside masters that would tell engines another quantization, or a peft model; and what a trainer noted.
_FOREIGN = (
    *("adapter_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"),
    "trainer_state.json",
)


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        directory: the written folder.
        report: a row for every module: what it is served as, or why it is left as it was.
        read, written: bytes of tensors.
        kept: how many tensors an earlier, killed run had finished.
        left_out: stored names that the served model has no place for.
    """

    directory: Path
    report: PrepareReport
    read: int
    written: int
    kept: int
    left_out: tuple[str, ...]


def convert(
    source: str | Path,
    directory: str | Path,
    scheme: str | Scheme | Sequence[Rule] = "W4A16",
    targets: str | Sequence[str] = ("Linear",),
    ignore: str | Sequence[str] = ("lm_head",),
    format: str | None = None,
    *,
    config_from: str | Path | None = None,
    kv_cache: str | None = None,
    prefix: str | None = None,
    max_shard_size: int | str = "5GB",
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Conversion:
    """Write the masters in `source` as a folder for vLLM, SGLang or transformers, without loading the model.

    Measured and learned scales that `source` stores beside the masters (``lockstep calibrate``, a prepared model's
    ``save_pretrained``, a training checkpoint) are served as they are. Tokenizer files and other small ones are copied.

    Args:
        source: a transformers folder with safetensors files, read in the dtype in which transformers would load it; a
            Lightning ``.ckpt`` or another file of ``torch.save``; or a folder of ``torch.distributed.checkpoint``. The
            masters of the latter two are taken in the dtype in which they trained.
        directory: where to write. It appears whole or not at all.
        scheme: a preset's name, a `Scheme`, or a recipe of rules, as in `lockstep.prepare`.
        targets: what to quantize, as there.
        ignore: what to leave out, as there.
        format: a name in `formats.FORMATS`, or None or ``"auto"``: each layer in the format of its own scheme.
        config_from: the transformers folder with the config and the tokenizer, for a checkpoint that has none.
        kv_cache: what keys and values are served as, a name in `lockstep.qat.kv_cache.SPECS`; None: as they are.
        prefix: of a checkpoint that holds the model more than once, such as a teacher and a student: what stands
            before the names of the one to export, such as ``"student."``. Default: it is found if there is but one.
        max_shard_size: bytes of a file, or a string such as ``"500MB"`` (decimal units). It does not change the memory.
        workers: how many processes, each with one torch thread; 1: this one. Default: as many as there are cores, at
            most `WORKERS`. A script that asks for several needs ``if __name__ == "__main__":``.
        overwrite: replace an earlier export.
        progress: show a progress bar on a terminal.

    Raises:
        ExportError: what `lockstep.export.save_pretrained` refuses; a tensor that the model needs is not stored, or
            one stored that it does not know; the config names another class than that of the causal language model;
            a checkpoint with several models, or none, under that `prefix`; an unfinished conversion there that had
            other arguments or sources.
        ValueError, TypeError: no such source, config, scheme or format; what `lockstep.prepare` refuses.
    """
    check_destination(directory, overwrite)
    limit = parse_bytes(max_shard_size, "max_shard_size")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: at least 1.")
    source = Path(source)
    described = Path(config_from) if config_from is not None else source
    if (quantized := learned.ptq_report(source)) is not None and not quantized["servable"]:
        raise ExportError(
            f"{source} holds what {quantized['method']} makes, whose real zero points no format stores: evaluate the "
            "folder as it is, or train from it."
        )
    stored, trained = stored_tensors(source), _how_trained(source)
    model, loaded = skeleton(described, stored if source.is_dir() and described == source else None)
    if problem := other_class(model, described):
        raise ExportError(problem)
    report = prepare(model, scheme, targets, ignore)
    if kv_cache is not None:
        from lockstep.qat.kv_cache import prepare_kv_cache

        prepare_kv_cache(model, kv_cache)
    check_exportable(model, format)
    wants = wanted(model)
    stored, left_out, found = named_as(wants, stored, prefix)
    if source.is_dir() and not (source / ".metadata").is_file():
        check_left_out(model, source, left_out)
    pieces, more = pieces_of(model, wants, stored, loaded, format)
    left_out = (*left_out, *more)
    shards = shards_of(pieces, limit)
    arguments = _arguments(model, stored, loaded, format, limit) | {"prefix": found}

    target = Path(directory).expanduser().absolute()
    partial = target.with_name(f".{target.name}.resumable")
    with replacing(target, overwrite) as incomplete:
        try:
            done = _begin(partial, arguments)
            _create(partial, shards)
            places = {place.name: place for shard in shards.values() for place in shard}
            tasks = [[_Task(piece, piece.placed(places, partial)) for piece in task] for task in as_one(pieces)]
            kept = _run(tasks, done, partial, workers or min(WORKERS, len(os.sched_getaffinity(0))), progress)
            _to_disk(partial, shards)
        except ExportError as error:
            # Started again it would end here again.
            if not isinstance(error, _Resumable):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        except OSError as error:
            raise OSError(f"{error}. What is done stands in {partial}: the same command goes on from there") from error
        finally:
            release()
        _copy_small_files(described, incomplete)
        files = [(name, [one.name for one in held], sum(one.bytes for one in held)) for name, held in shards.items()]
        served = next(iter(quantized_layers(model).values())).scheme.weights.served_dtype
        write_folder(model, incomplete, files, quantization_config(model, format), served)
        for name in shards:
            _link(partial / name, incomplete / name)
        reasons = {row.name: row.reason for row in report.skipped}
        write_card(model, incomplete, target, trained, reasons)
    # Not before the folder took its place: what stands in `incomplete` does not survive a kill.
    shutil.rmtree(partial, ignore_errors=True)
    read = sum(piece.source.bytes for piece in pieces)
    written = sum(size for _, _, size in files)
    return Conversion(target, report, read, written, kept, tuple(left_out))


def export_command(
    model: str,
    out: str,
    scheme: Scheme | str | list[Rule] = "W4A16",
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
    format: str | None = None,
    config_from: str | None = None,
    kv_cache: str | None = None,
    prefix: str | None = None,
    max_shard_size: str = "5GB",
    workers: int | None = None,
    overwrite: bool = False,
) -> int:
    """Export masters on disk without loading the model; after a kill the same command goes on from what is done.

    Args:
        model: transformers folder with the masters and the scales that were measured or learned for them, a Lightning
            .ckpt, or a folder of torch.distributed.checkpoint.
        out: the folder to write.
        scheme: a preset's name, {weights: {group_size: 64}} or a recipe.
        targets: what to quantize, as in lockstep.prepare.
        ignore: what to leave out.
        format: how to store it; default: each layer in the format of its own scheme.
        config_from: the transformers folder with config and tokenizer, for a checkpoint that has none.
        kv_cache: what keys and values are served as, such as fp8; their scales stand in the folder.
        prefix: what stands before the model's names in a checkpoint that holds several, such as student.
        max_shard_size: of a file, such as 500MB.
        workers: how many processes, each of some 0.5 GiB; default: 2, or 1 if there is but one core.
        overwrite: replace an earlier export.
    """

    done = convert(
        *(model, out, scheme, targets, ignore, format),
        config_from=config_from,
        kv_cache=kv_cache,
        prefix=prefix,
        max_shard_size=max_shard_size,
        workers=workers,
        overwrite=overwrite,
    )
    show(done.report)
    if done.left_out:
        print(f"left out, the model has no place for them: {len(done.left_out)} tensors, {done.left_out[0]} for one")
    if done.kept:
        print(f"kept of an earlier run: {done.kept} tensors")
    print(f"written: {done.directory}, {_size(done.written)} from {_size(done.read)}")
    return 0


def _how_trained(source: Path) -> str:
    """What the masters tell of their training."""
    quantized, state = learned.ptq_report(source), source / "trainer_state.json"
    if quantized is not None:
        return f"Not trained: quantized afterwards by lockstep ptq --method {quantized['method']}."
    steps = read_json(state).get("global_step") if state.is_file() else None
    return f"The masters are those of step {steps} of a Hugging Face Trainer." if steps else ""


def _size(bytes: int) -> str:
    return f"{bytes / 1e9:,.2f} GB" if bytes >= 1e9 else f"{bytes / 1e6:,.2f} MB"


# The folder under way ------------------------------------------------------------------------------------------------


class _Resumable(ExportError):
    """The folder beside is left as it is."""


def _arguments(
    model: nn.Module, stored: Mapping[str, Stored], loaded: torch.dtype | None, format: str | None, limit: int
) -> dict[str, Any]:
    """Everything that the written bits depend on, as JSON."""
    import lockstep

    stats = {str(path.absolute()): path.stat() for path in sorted({one.path for one in stored.values()})}
    found: dict[str, Any] = {
        "lockstep": lockstep.__version__,
        "quantization": quantization_config(model, format),
        "max_shard_size": limit,
        "loaded as": None if loaded is None else dtype_name(loaded),
        "sources": {path: f"{one.st_size} bytes of {one.st_mtime_ns}" for path, one in stats.items()},
    }
    return json.loads(json.dumps(found))


def _begin(partial: Path, arguments: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The tensors that an earlier run with the same arguments finished in `partial`, by key, and their checksums."""
    path = partial / _STATE
    if not path.is_file() or _is_finished(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        beside = partial / f"{_STATE}.new"
        beside.write_text(json.dumps(arguments))
        beside.rename(path)
        return {}
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise _Resumable(f"{path} is not readable: remove {partial} to start from the beginning.") from error
    if differs := list(_differences(before, arguments)):
        raise _Resumable(
            f"an unfinished conversion stands in {partial}, which differs in {'; '.join(differs[:3])}. Start it with "
            "the same arguments to go on, or remove that folder to start from the beginning."
        )
    return _journal(partial / _DONE)


def _is_finished(partial: Path) -> bool:
    """Whether a kill came after the folder took its place: its files are those here, and must not be written to."""
    return any(path.stat().st_nlink > 1 for path in partial.glob("*.safetensors"))


def _journal(path: Path) -> dict[str, dict[str, int]]:
    """The checksums of what was finished. ExportError if a line is none that was written here."""
    done: dict[str, dict[str, int]] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # the kill came while it was written
            continue
        try:
            key, checksums = entry["key"], entry["checksums"]
            if not isinstance(key, str) or not isinstance(checksums, dict):
                raise TypeError(f"no name or no checksums in {entry}")
        except (TypeError, KeyError) as error:
            raise _Resumable(
                f"{path} is damaged, it holds {line[:60].decode(errors='replace')!r}: remove {path.parent} to start "
                "from the beginning."
            ) from error
        done[key] = checksums
    return done


def _differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{where}.{key}".lstrip("."))
    elif before != now:
        shown = [text if len(text := str(one)) <= 80 else f"{text[:77]}..." for one in (before, now)]
        yield f"{where}: {shown[0]} before, {shown[1]} now"


def _create(partial: Path, shards: Mapping[str, Sequence[Place]]) -> None:
    """Give every file its header and its size, unless it has them."""
    for name, places in shards.items():
        path, header = partial / name, file_header(places)
        size = places[-1].offset + places[-1].bytes
        if path.is_file() and path.stat().st_size == size:
            with path.open("rb") as file:
                if file.read(len(header)) == header:
                    continue
        with path.open("wb") as file:
            file.write(header)
            file.truncate(size)


def _to_disk(partial: Path, shards: Iterable[str]) -> None:
    """Wait until the files are on the disk, so that no more than their names is left to be written."""
    for path in (*(partial / name for name in shards), partial):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _link(file: Path, name: Path) -> None:
    """Give a file a second name. A file system without such gives it another one: then a kill loses it from here on."""
    try:
        os.link(file, name)
    except OSError:
        file.rename(name)


def _copy_small_files(source: Path, target: Path) -> None:
    """Tokenizer, chat template and the like; not what is written here, nothing `_FOREIGN`, no weights of any kind."""
    for path in source.iterdir():
        ours = path.name == "config.json" or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in EXPORTED - {".safetensors"} and not ours and path.name not in _FOREIGN:
            shutil.copyfile(path, target / path.name)


# The work ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A piece, and the file and place of each tensor that it becomes."""

    piece: Piece
    places: Mapping[str, tuple[Path, Place]] = field(hash=False)


def _run(
    tasks: Sequence[Sequence[_Task]], done: Mapping[str, Mapping[str, int]], partial: Path, workers: int, progress: bool
) -> int:
    """Do `tasks` in `workers` processes, noting each finished piece; how many were finished before."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("exporting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    total, kept = sum(task.piece.source.bytes for group in tasks for task in group), 0
    shown = Progress(*columns, console=console, disable=not (progress and console.is_terminal))
    with shown as bar, (partial / _DONE).open("a") as journal:
        whole = bar.add_task("exporting", total=total)
        for results in _results(tasks, done, min(workers, len(tasks))):
            for key, size, checksums, was_there in results:
                bar.advance(whole, size)
                kept += was_there
                # After a line break, since a kill may have cut the line before.
                journal.write("\n" + json.dumps({"key": key, "checksums": checksums}))
            journal.flush()
    return kept


_Result = list[tuple[str, int, dict[str, int], bool]]


def _results(
    tasks: Sequence[Sequence[_Task]], done: Mapping[str, Mapping[str, int]], workers: int
) -> Iterator[_Result]:
    known = [{task.piece.key: done[task.piece.key] for task in group if task.piece.key in done} for group in tasks]
    if workers == 1:
        yield from map(convert_pieces, tasks, known)
        return
    executor: Executor
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (os.getpid(),)) as executor:
        futures = [executor.submit(convert_pieces, *both) for both in zip(tasks, known, strict=True)]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise _Resumable(
                "a worker process ended, killed for memory perhaps: start again with the same arguments and fewer "
                "workers to go on from what is done."
            ) from error
        finally:
            executor.shutdown(cancel_futures=True)


def _start(parent: int) -> None:
    """One torch thread in each worker; it ends with the process that started it, and leaves Ctrl-C to that one."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def convert_pieces(tasks: Sequence[_Task], done: Mapping[str, Mapping[str, int]]) -> _Result:
    """Convert pieces that belong together; those in `done` are left as they are if their checksums are right.

    Returns:
        For each piece its key, its bytes, the checksums of what it became, and whether that was there.

    Raises:
        ExportError: a value that is NaN or infinite, or words that do not give back the weight.
        OSError: a file cannot be read or written.
    """
    results: _Result = []
    kept = {task.piece.key for task in tasks if task.piece.key in done and done[task.piece.key] == _checksums(task)}
    amax = None
    if any(task.piece.key not in kept for task in tasks):
        amax = _amax([task.piece for task in tasks])
    for task in tasks:
        key, size = task.piece.key, task.piece.source.bytes
        results.append((key, size, dict(done[key]) if key in kept else _convert(task, amax), key in kept))
    return results


def _checksums(task: _Task) -> dict[str, int]:
    """Of what stands in a piece's places."""
    found = {}
    for name, (path, place) in task.places.items():
        checksum, left = 0, place.bytes
        with path.open("rb", buffering=0) as file:
            file.seek(place.offset)
            while left and (read := file.read(min(left, 2**22))):
                checksum, left = zlib.crc32(read, checksum), left - len(read)
        found[name] = checksum
    return found


def _amax(pieces: Sequence[Piece]) -> Tensor | None:
    """The largest magnitude in all of the pieces, fp32 ``[1, 1]``, if something is scaled by it."""
    scheme = pieces[0].scheme
    if scheme is None or not scheme.weights.per_tensor:
        return None
    found = [
        grid.largest(piece.source.rows(*rows).to(piece.loaded)) for piece in pieces for rows in chunks(piece.source)
    ]
    return torch.stack(found).amax(0)


def _convert(task: _Task, amax: Tensor | None) -> dict[str, int]:
    """Write a piece; the checksums of its tensors."""
    piece = task.piece
    descriptors: dict[Path, int] = {}
    checksums, ends = dict.fromkeys(task.places, 0), dict.fromkeys(task.places, 0)
    try:
        for path, _ in task.places.values():
            if path not in descriptors:
                descriptors[path] = os.open(path, os.O_WRONLY)
        for name, tensor in _converted(piece, amax):
            path, place = task.places[name]
            if tensor.dtype != place.dtype or ends[name] + tensor.nbytes > place.bytes:
                raise ExportError(f"{name}: {piece.format} wrote other tensors of rows than of the whole weight.")
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            _write(descriptors[path], data, place.offset + ends[name])
            checksums[name] = zlib.crc32(data, checksums[name])
            ends[name] += len(data)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    if short := [name for name, (_, place) in task.places.items() if ends[name] != place.bytes]:
        raise ExportError(f"{short[0]}: {piece.format} wrote other tensors of rows than of the whole weight.")
    return checksums


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _converted(piece: Piece, amax: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a piece becomes, some rows at a time."""
    if piece.scheme is None:
        for rows in chunks(piece.source):
            tensor = piece.source.rows(*rows).to(piece.loaded).to(piece.served)
            if piece.finite:
                check_finite(piece.key, tensor)
            yield piece.key, tensor
        return
    name, once = piece.layer, set()
    n, k = piece.source.shape
    for start, stop in chunks(piece.source) if by_rows(piece.format) else [(0, n)]:
        weight = piece.source.rows(start, stop).to(piece.loaded)
        check_finite(piece.key, weight)
        for leaf, tensor in checked(name, _layer(piece, weight, amax, start, stop), piece.format).items():
            if tensor.ndim == 2:
                yield f"{name}.{leaf}", tensor
            elif leaf not in once:  # of the whole tensor, and the same in all of its rows
                once.add(leaf)
                yield f"{name}.{leaf}", torch.tensor((n, k)) if leaf == "weight_shape" else tensor


def _layer(piece: Piece, weight: Tensor, amax: Tensor | None, start: int, stop: int) -> Any:
    """Rows of a weight as the layer that trained them."""
    assert piece.scheme is not None
    layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.__class__ = QATLinear
    layer.scheme, layer.qualified_name = piece.scheme, piece.layer
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if piece.learned is not None:
        scale = piece.learned.rows(start, stop)
        if not ((scale >= 0) & scale.isfinite()).all():
            raise ExportError(
                f"{piece.layer}.{learned.KEY} holds scales that are negative or not finite: their learning rate was "
                "too high, see lockstep.qat.learned."
            )
        layer.register_parameter(learned.KEY, nn.Parameter(scale, requires_grad=False))
    if piece.input_scale is not None:
        layer.register_buffer(piece.scheme.activations.scale_name, torch.tensor([piece.input_scale]))  # type: ignore[union-attr]
    if amax is not None:  # that of the whole tensor, and of those that share it, stands for them
        rest: Any = nn.Linear(1, 1, bias=False, device="meta")
        rest.__class__ = QATLinear
        rest.scheme, rest.qualified_name = piece.scheme, piece.layer
        rest.weight = nn.Parameter(amax, requires_grad=False)
        layer.fused = (layer, rest)
    return layer
