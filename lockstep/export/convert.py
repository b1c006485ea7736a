"""`convert`: masters on disk to a served folder, tensor by tensor, without the model in memory.

What is quantized, and as what, is decided by `lockstep.prepare` on the model's skeleton on the ``meta`` device; each
layer is then read a few rows at a time, quantized, read back from its words and compared with what training multiplies
with (C3), and written to its place in a file whose size was known beforehand. The bits are those of
`lockstep.export.save_pretrained` of the loaded model, since both go through the same functions.

Memory: a process holds about `CHUNK` weights at a time, or 128 rows if that is more, with some 50 bytes for each,
whatever the model's, the shard's or the tensor's size. Formats that do not store a weight row by row (``gptq``,
``marlin``) need that for a whole tensor; of a distributed checkpoint a whole tensor is held as it is stored.

A kill loses the tensors that were under way. What is done stands beside the folder (``.NAME.resumable``) with a
checksum of each tensor; the same call goes on from there, and converts again what does not match its checksum.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import re
import shutil
import signal
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lockstep import grid
from lockstep.export import card, formats, hub
from lockstep.export.checkpoint import bitwise_equal
from lockstep.export.directory import EXPORTED, ExportError, check_destination, replacing
from lockstep.export.legality import check_exportable, check_measured
from lockstep.export.masters import TYPES, Part, Stored, read_json, release, stored_tensors
from lockstep.export.save import check_finite, checked, file_names, parse_bytes, quantization_config, write_folder
from lockstep.export.served import (
    Layer,
    prepared_cache,
    quantized_keys,
    quantized_layers,
    served_state,
    served_tensor,
    stored_as,
)
from lockstep.grid import Quantized
from lockstep.qat import learned
from lockstep.qat.experts import Expert
from lockstep.qat.linear import QATLinear
from lockstep.qat.prepare import PrepareReport, prepare, show
from lockstep.scheme import BLOCK, Rule, Scheme, dtype_name

CHUNK = 2**21  # weights quantized at a time: the temporaries of more fall out of a core's cache
WORKERS = 2  # at most, if nobody asks for another number: with them all processes together stay below 2 GiB
_SCALES = (".weight_scale", ".input_scale", ".input_global_scale", ".k_scale", ".v_scale")
_STATE, _DONE = "arguments.json", "done.jsonl"
# Small files beside masters that would tell engines another quantization, or a peft model; and what a trainer noted.
_FOREIGN = (
    *("adapter_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"),
    "trainer_state.json",
)
_CODES = {dtype: code for code, dtype in TYPES.items()}


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
    stored, left_out, found = _named_as(wants, stored, prefix)
    if source.is_dir() and not (source / ".metadata").is_file():
        _check_left_out(model, source, left_out)
    pieces, more = _pieces(model, wants, stored, loaded, format)
    left_out = (*left_out, *more)
    shards = _shards(pieces, limit)
    arguments = _arguments(model, stored, loaded, format, limit) | {"prefix": found}

    target = Path(directory).expanduser().absolute()
    partial = target.with_name(f".{target.name}.resumable")
    with replacing(target, overwrite) as incomplete:
        try:
            done = _begin(partial, arguments)
            _create(partial, shards)
            places = {place.name: place for shard in shards.values() for place in shard}
            tasks = [[_Task(piece, piece.placed(places, partial)) for piece in task] for task in _as_one(pieces)]
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
        card.write(
            incomplete,
            name=target.name,
            base_model=str(getattr(model, "name_or_path", "")),
            trained=trained,
            reasons=reasons,
        )
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
    state = source / "trainer_state.json"
    steps = read_json(state).get("global_step") if state.is_file() else None
    return f"The masters are those of step {steps} of a Hugging Face Trainer." if steps else ""


def _size(bytes: int) -> str:
    return f"{bytes / 1e9:,.2f} GB" if bytes >= 1e9 else f"{bytes / 1e6:,.2f} MB"


# The model without its weights ----------------------------------------------------------------------------------------


def skeleton(folder: Path, stored: Mapping[str, Stored] | None = None) -> tuple[Any, torch.dtype | None]:
    """The causal language model that a transformers folder describes, on the ``meta`` device.

    Args:
        folder: it has a ``config.json``.
        stored: what transformers would load into the model: then also the dtype in which it would, as
            ``dtype="auto"`` says. None: the masters trained in the dtype that they are stored in.

    Raises:
        ValueError: it has no config that transformers knows, or is quantized already.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no config.json: name the transformers folder with config and tokenizer (config_from)."
        )
    if found := read_json(path).get("quantization_config"):
        raise ValueError(
            f"{folder} is quantized already ({path.name} has quantization_config {str(found)[:40]!r}): convert the "
            "masters that it was made of."
        )
    try:
        config = AutoConfig.from_pretrained(folder)
        nested = bool(getattr(config.get_text_config(), "quantization_config", None))
        dtype = config.dtype
        if dtype is None:
            dtype = next((one.dtype for one in (stored or {}).values() if one.dtype.is_floating_point), torch.float32)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype {dtype!r} is none of torch's.")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # a config's values are used all over a model: what one of them breaks raises anything
        lines = [line.strip() for line in str(error).splitlines()] or ["no reason is given"]
        said = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        raise ValueError(
            f"{path}: transformers makes no causal language model of it ({type(error).__name__}: {said[:300]}). A "
            "model of another kind is exported loaded, with lockstep.export.save_pretrained."
        ) from error
    if nested:
        raise ValueError(f"{folder} is quantized already: convert the masters that it was made of.")
    generation = folder / "generation_config.json"
    if generation.is_file():
        read_json(generation)
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # as above
            raise ValueError(f"{generation}: transformers rejects it: {str(error)[:300]}.") from error
    return model, None if stored is None else dtype


def other_class(model: nn.Module, folder: Path) -> str:
    """Why a skeleton is not the model that `folder` was saved of, or empty: its config names another class.

    A multimodal model's, for one, of which transformers makes the language model alone.
    """
    named = read_json(folder / "config.json").get("architectures") or []  # a skeleton's config may be a part of it
    ours = type(model).__name__
    if not named or ours in named:
        return ""
    return (
        f"{folder / 'config.json'}: architectures names {', '.join(map(str, named))}, and the causal language model "
        f"that transformers makes of it is a {ours}: parts of the model, such as those for images, would be lost. "
        "Export the loaded model with lockstep.export.save_pretrained; or, if the language model is what you want, "
        f"save it as a {ours} of its own."
    )


# What becomes of it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A tensor of the written folder: its name, its dtype and shape, and where its bytes go."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """A stored tensor and what is written of it.

    Attributes:
        key: its name in the model.
        source: where it is read.
        loaded: the dtype that the model holds it in.
        served: the dtype that it is written in, if it is not quantized.
        finite: whether a NaN or an infinity in it is an error.
        writes: what is written, without its place.
        scheme: what it is quantized as, or None.
        format: the name of the format that stores it so.
        shares: the same for weights that share what is scaled by the tensor; empty: there is no such thing.
        learned: its stored scales, if they were learned.
        input_scale: the measured scale of the layer's inputs.
    """

    key: str
    source: Stored
    loaded: torch.dtype
    served: torch.dtype
    finite: bool
    writes: tuple[Place, ...]
    scheme: Scheme | None = None
    format: str = ""
    shares: str = ""
    learned: Stored | None = None
    input_scale: float | None = None

    @property
    def layer(self) -> str:
        """The name of the layer whose weight it is."""
        return self.key.removesuffix(".weight")

    def placed(self, places: Mapping[str, Place], folder: Path) -> dict[str, tuple[Path, Place]]:
        """The file and the place of each tensor that it becomes."""
        return {one.name: (folder / places[one.name].file, places[one.name]) for one in self.writes}


class Want(NamedTuple):
    """A tensor of the served model: its name in files, and which part of which entry of the state dict it is.

    `layer` is what is quantized of it, or None; `where` is the place in the entry, see `hub.Piece`.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    where: tuple[int | slice, ...] = ()
    layer: Layer | None = None


def wanted(model: nn.Module) -> list[Want]:
    """What the served model consists of, in the order of its state dict, under the names that files and engines know.

    Each projection of each expert is one; scales that are stored beside a quantized weight are none.
    """
    found, keys = [], quantized_keys(model)
    for key, tensor in served_state(model).items():
        for name, layer in keys.get(key, {}).items():
            found.append(Want(f"{name}.weight", key, (layer.out_features, layer.in_features), layer=layer))
        if key not in keys:
            for name, piece in hub.pieces(model, key, tensor.shape).items():
                found.append(Want(name, key, tuple(tensor[piece.where].shape), piece.where))
    return found


def _named_as(
    wants: Sequence[Want], stored: Mapping[str, Stored], prefix: str | None
) -> tuple[dict[str, Stored], tuple[str, ...], str]:
    """What is stored, without the prefix that a trainer's module puts before the model's names; what is outside it; it.

    ExportError if no prefix leads to most of the model, or several do and none is asked for.
    """
    known = {name for want in wants for name in (want.name, want.key)}
    counts = Counter(found for name in stored if (found := _prefix(name, known)) is not None)
    models = [one for one, count in counts.items() if 2 * count >= len({want.key for want in wants})]
    if not models:
        count = max(counts.values(), default=0)
        raise ExportError(
            f"of the {len(wants)} tensors of the model, {wants[0].name} for one, only {count} are stored; "
            f"found are names such as {', '.join(list(stored)[:3])}: is this the config of another model?"
        )
    if prefix is None and len(models) > 1:
        ways = " or ".join(f"--prefix {one or repr(one)}" for one in models)
        raise ExportError(
            f"the model is stored {len(models)} times, under {_listed(models)}, for one as {models[0]}{wants[0].name}: "
            f"say which to export with prefix ({ways})."
        )
    asked = models[0] if prefix is None else f"{prefix.rstrip('.')}." if prefix else ""
    if asked not in models:
        raise ExportError(f"prefix {prefix!r}: the model is not stored under it, but under {_listed(models)}.")
    others = tuple(one for one in models if len(one) > len(asked))  # which may begin with it, as all do with none
    inside = [name for name in stored if name.startswith(asked) and not name.startswith(others)]
    outside = {*stored} - {*inside}
    return (
        {name.removeprefix(asked): stored[name] for name in inside},
        tuple(name for name in stored if name in outside),
        asked,
    )


def _listed(prefixes: Iterable[str]) -> str:
    return " and ".join(one or "no prefix at all" for one in prefixes)


def _check_left_out(model: nn.Module, folder: Path, left_out: Sequence[str]) -> None:
    """ExportError if a transformers folder stores what the model has no place for, beyond what transformers drops."""
    if lost := [name for name in left_out if not _known_to_be_left_out(model, name)]:
        raise ExportError(
            f"{folder} stores {lost[0]} and {len(lost) - 1} more that {type(model).__name__} has no place for, and "
            "they would be lost: they are of a larger model, such as one for images too. Export that, loaded, with "
            "lockstep.export.save_pretrained; or save the language model as a folder of its own."
        )


def _known_to_be_left_out(model: nn.Module, name: str) -> bool:
    """Whether transformers drops a stored tensor too, or it is one of the frequencies in checkpoints of long ago."""
    patterns = [r"rotary_emb\.inv_freq$", *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    return any(re.search(one, name) for one in patterns)


def _prefix(name: str, known: set[str]) -> str | None:
    """What stands before the longest of the `known` names that `name` ends with, if it ends with one."""
    parts = name.split(".")
    cuts = (cut for cut in range(len(parts)) if ".".join(parts[cut:]) in known)
    return next(("".join(f"{part}." for part in parts[:cut]) for cut in cuts), None)


def _pieces(
    model: Any, wants: Sequence[Want], stored: Mapping[str, Stored], loaded: torch.dtype | None, format: str | None
) -> tuple[list[Piece], list[str]]:
    """A piece for each tensor of the served model, and the stored names that nothing becomes of.

    Raises:
        ExportError: a tensor is missing, of another shape, or unknown to the model; a scale is missing or no positive
            number, or not the same for layers that engines run as one; two tied tensors differ.
    """
    layers = quantized_layers(model)
    by_layer = stored_as(layers, format)
    if experts := [name for name, layer in layers.items() if isinstance(layer, Expert) and by_layer[name] == "marlin"]:
        raise ExportError(f"{experts[0]}: all experts of a layer are one tensor in marlin: export the loaded model.")
    any_scheme = next(iter(layers.values())).scheme
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    _check_tied(tied, stored)
    partner = {source: target for target, source in tied.items()}
    _fill_in_scales(model, layers, wants, stored)
    pieces, used = [], set(tied)
    for want in wants:
        names = (want.name, partner.get(want.key, want.name), want.key)
        name = next((one for one in names if one in stored), None)
        if name is None:
            raise ExportError(f"{want.name} is not stored, {type(model).__name__} has one of {list(want.shape)}.")
        used.add(name)
        found = _part(want, stored[name]) if name == want.key else stored[name]
        if found.shape != want.shape:
            raise ExportError(
                f"{name} is stored as {list(found.shape)}, the config describes {list(want.shape)}: another model's."
            )
        held = _loaded_dtype(model, want.key, found.dtype, loaded)
        if want.layer is None:
            meta = torch.empty((), dtype=held, device="meta")
            served = served_tensor(model, want.key, meta, any_scheme).dtype
            write = Place(want.name, served, found.shape)
            pieces.append(Piece(want.name, found, held, served, want.key in parameters, (write,)))
            continue
        owner, scheme = want.name.removesuffix(".weight"), want.layer.scheme
        beside = (f"{one}.{learned.KEY}" for one in (owner, want.layer.qualified_name))
        learnt = next((stored[one] for one in beside if one in stored), None)
        _check_learned(owner, scheme, found.shape, learnt)
        writes = _layout(owner, scheme, by_layer[owner], found.shape)
        measured = want.layer.stored_scale()
        how = (scheme, by_layer[owner], _shares(want.layer), learnt, None if measured is None else measured.item())
        pieces.append(Piece(want.name, found, held, held, True, writes, *how))
    left_out = [name for name in stored if name not in used]
    if unknown := [name for name in left_out if not name.endswith(_SCALES) and not _known_to_be_left_out(model, name)]:
        raise ExportError(
            f"{unknown[0]} and {len(unknown) - 1} more are stored, and {type(model).__name__} has no place for them."
        )
    owners = {one for owner, layer in layers.items() for one in (owner, layer.qualified_name)}
    consumed = {f"{owner}.{leaf}" for owner in owners for leaf in (learned.KEY, "input_scale", "input_global_scale")}
    return pieces, [name for name in left_out if name not in consumed]


def _part(want: Want, stored: Stored) -> Stored:
    """What of the stored state-dict entry a wanted tensor is: all of it, or rows of an expert's matrix."""
    if isinstance(want.layer, Expert):
        layout = want.layer.module.layout
        cut = layout.parts()[want.layer.part]
        return Part(stored.path, stored.dtype, want.shape, stored, want.layer.number, cut, layout.transposed)
    if want.where:
        number, rows = want.where
        return Part(stored.path, stored.dtype, want.shape, stored, number, rows, False)  # type: ignore[arg-type]
    return stored


def _shares(layer: Layer) -> str:
    """The same for layers that share what is scaled by the tensor; nothing if none is."""
    if not layer.scheme.weights.per_tensor:
        return ""
    if isinstance(layer, Expert):
        return f"{layer.module.qualified_name}.{layer.parameter} {layer.number}"
    return (layer.fused or (layer,))[0].qualified_name


def _loaded_dtype(model: Any, key: str, dtype: torch.dtype, loaded: torch.dtype | None) -> torch.dtype:
    """The dtype in which transformers holds a tensor that is stored in `dtype`; that itself if `loaded` is None."""
    if loaded is None or not dtype.is_floating_point or key.endswith(_SCALES):
        return dtype
    keep = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())] * (loaded != torch.float32)
    keep += [*(getattr(model, "_keep_in_fp32_modules", None) or ())] * (loaded == torch.float16)
    return torch.float32 if any(re.search(rf"(^|\.){part}(\.|$)", key) for part in keep) else loaded


def _check_tied(tied: Mapping[str, str], stored: Mapping[str, Stored]) -> None:
    for target, source in tied.items():
        one, other = stored.get(target), stored.get(source)
        if one is None or other is None:
            continue
        alike = (one.shape, one.dtype) == (other.shape, other.dtype)
        if not alike or not all(bitwise_equal(one.rows(*rows), other.rows(*rows)) for rows in _chunks(one)):
            raise ExportError(
                f"{target} and {source} are stored with different values, and the config ties them: set "
                "tie_word_embeddings to false, or drop one."
            )


def _fill_in_scales(
    model: nn.Module, layers: Mapping[str, Layer], wants: Sequence[Want], stored: Mapping[str, Stored]
) -> None:
    """Give the skeleton the measured scales that are stored, of inputs, keys and values. ExportError for odd ones."""
    places: list[tuple[Any, str, tuple[str, str], str]] = []
    for name, layer in layers.items():
        inputs = layer.scheme.activations
        if inputs is not None and inputs.stores_scale:
            names = (f"{name}.{inputs.scale_name}", f"{layer.qualified_name}.{inputs.scale_name}")
            places.append((layer, inputs.scale_name, names, "inputs"))
    for want in wants:
        owner, _, leaf = want.key.rpartition(".")
        if leaf in ("k_scale", "v_scale") and prepared_cache(module := model.get_submodule(owner)):
            places.append((module, leaf, (want.name, want.key), "keys and values"))
    for module, leaf, names, what in places:
        found = next((stored[one] for one in names if one in stored), None)
        if found is None:
            raise ExportError(
                f"{names[0].rpartition('.')[0]}: the range of its {what} is not measured ({names[0]} is not stored): "
                "run `lockstep calibrate`."
            )
        if (found.shape, found.dtype) != ((1,), torch.float32):
            raise ExportError(f"{names[0]} is not one float32: {dtype_name(found.dtype)} {list(found.shape)}.")
        module._buffers[leaf] = found.rows(0, 1)
    check_measured(model)


def _check_learned(name: str, scheme: Scheme, shape: tuple[int, ...], learnt: Stored | None) -> None:
    if learnt is None:
        return
    spec = scheme.weights
    if spec.format not in ("int4", "int8") or spec.scale_rule in ("max/-8", "range/15"):
        raise ExportError(f"{name}.{learned.KEY} is stored, and {scheme} has no learned scales.")
    wanted = spec.scale_shape(*shape)  # type: ignore[call-arg]
    if (learnt.shape, learnt.dtype) != (wanted, torch.float32):
        raise ExportError(
            f"{name}.{learned.KEY} is {dtype_name(learnt.dtype)} {list(learnt.shape)}, {scheme} has float32 "
            f"{list(wanted)}: it was learned with another scheme."
        )
    try:
        learned.check_rule(learnt.path.parent, f"{name}.{learned.KEY}", spec)
    except ValueError as error:
        raise ExportError(str(error)) from None


def _layout(name: str, scheme: Scheme, format: str, shape: tuple[int, ...]) -> tuple[Place, ...]:
    """The tensors that a format stores of a weight of `shape`."""
    n, k = shape
    if not _by_rows(format):
        stored = _stored_of(scheme, format, n, k, "meta")
    else:  # as many rows as N has, or words or blocks of them
        stored = [
            (leaf, dtype, (-(-n * found[0] // BLOCK), found[1]) if len(found) == 2 else found)
            for leaf, dtype, found in _stored_of(scheme, format, BLOCK, k)
        ]
    return tuple(Place(f"{name}.{leaf}", dtype, found) for leaf, dtype, found in stored)


def _by_rows(format: str) -> bool:
    """Whether a format stores rows of a weight apart from one another, so that some can be stored by themselves."""
    return formats.find(format).METHOD in ("compressed-tensors", "fp8")


@functools.cache
def _stored_of(
    scheme: Scheme, format: str, n: int, k: int, device: str = "cpu"
) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor that a format stores of N x K weights: of zeros, or of no values at all."""
    spec = scheme.weights
    codes = torch.zeros(n, k, dtype=spec.code_dtype, device=device)
    scale = torch.ones(spec.scale_shape(n, k), device=device).to(spec.scale_dtype)
    # Of an asymmetric grid GPTQ stores as many as of a symmetric one, but looks at the values.
    zeros = None if spec.symmetric or format == "gptq" else torch.zeros(scale.shape, dtype=torch.int8, device=device)
    second = torch.ones(1, 1, device=device) if spec.scale_rule == "nv/6" else None
    tensors = formats.find(format).write(Quantized(codes, scale, zeros, second), spec)
    if scheme.activations is not None and scheme.activations.stores_scale:
        tensors[scheme.activations.scale_name] = torch.ones(1)
    return [(leaf, tensor.dtype, tuple(tensor.shape)) for leaf, tensor in tensors.items()]


def _shards(pieces: Sequence[Piece], limit: int) -> dict[str, list[Place]]:
    """The files to write and what stands in them; as few as `limit` bytes allow, wide dtypes first, so all aligned."""
    groups: list[list[Place]] = [[]]
    filled = 0
    for place in (place for piece in pieces for place in piece.writes):
        if groups[-1] and filled + place.bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(place)
        filled += place.bytes
    shards = {}
    for file, group in zip(file_names(len(groups)), groups, strict=True):
        group.sort(key=lambda place: -place.dtype.itemsize)
        *offsets, _ = accumulate((place.bytes for place in group), initial=len(_header(group)))
        shards[file] = [replace(one, file=file, offset=offset) for one, offset in zip(group, offsets, strict=True)]
    return shards


def _header(places: Iterable[Place]) -> bytes:
    """The header of a safetensors file of `places`, one after another."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in places:
        begin, end = end, end + one.bytes
        entries[one.name] = {"dtype": _CODES[one.dtype], "shape": list(one.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _as_one(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """The pieces in groups that one worker needs together: weights that share what is scaled by the tensor."""
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.shares or piece.key, []).append(piece)
    return list(groups.values())


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
        path, header = partial / name, _header(places)
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
        grid.largest(piece.source.rows(*rows).to(piece.loaded)) for piece in pieces for rows in _chunks(piece.source)
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
        for rows in _chunks(piece.source):
            tensor = piece.source.rows(*rows).to(piece.loaded).to(piece.served)
            if piece.finite:
                check_finite(piece.key, tensor)
            yield piece.key, tensor
        return
    name, once = piece.layer, set()
    n, k = piece.source.shape
    for start, stop in _chunks(piece.source) if _by_rows(piece.format) else [(0, n)]:
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


def _chunks(stored: Stored) -> list[tuple[int, int]]:
    """Rows of about `CHUNK` weights. A multiple of 128 but for the last, so that no block or word is cut."""
    count = stored.shape[0] if stored.shape else 1
    width = math.prod(stored.shape[1:])
    step = max(BLOCK, CHUNK // max(1, width) // BLOCK * BLOCK)
    return [(start, min(count, start + step)) for start in range(0, count, step)] or [(0, 0)]
