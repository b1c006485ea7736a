"""What becomes of masters on disk, decided on the model's skeleton: which stored tensor is which piece of the served
folder, as what it is stored there, and in which file.

`lockstep.export.convert` does the work that is planned here.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lockstep.export import formats, hub
from lockstep.export.checkpoint import bitwise_equal
from lockstep.export.directory import ExportError
from lockstep.export.files import file_names
from lockstep.export.legality import check_measured
from lockstep.export.masters import TYPES, Part, Stored, read_json
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
from lockstep.scheme import BLOCK, Scheme, dtype_name

CHUNK = 2**21  # weights quantized at a time: the temporaries of more fall out of a core's cache
_SCALES = (".weight_scale", ".input_scale", ".input_global_scale", ".k_scale", ".v_scale")
_CODES = {dtype: code for code, dtype in TYPES.items()}


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


def named_as(
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


def check_left_out(model: nn.Module, folder: Path, left_out: Sequence[str]) -> None:
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


def pieces_of(
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
        beside = [f"{one}.{learned.KEY}" for one in (owner, want.layer.qualified_name)]
        learnt = next((stored[one] for one in beside if one in stored), None)
        _check_learned(owner, scheme, found.shape, learnt)
        _check_ptq(found.path.parent, beside, scheme, learnt)
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
        if not alike or not all(bitwise_equal(one.rows(*rows), other.rows(*rows)) for rows in chunks(one)):
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


def _check_ptq(folder: Path, keys: Iterable[str], scheme: Scheme, learnt: Stored | None) -> None:
    scale = None if learnt is None else learnt.rows(0, learnt.shape[0])
    try:
        for key in keys:
            learned.check_ptq(folder, key, scheme.weights, scale)
    except ValueError as error:
        raise ExportError(str(error)) from None


def _layout(name: str, scheme: Scheme, format: str, shape: tuple[int, ...]) -> tuple[Place, ...]:
    """The tensors that a format stores of a weight of `shape`."""
    n, k = shape
    if not by_rows(format):
        stored = _stored_of(scheme, format, n, k, "meta")
    else:  # as many rows as N has, or words or blocks of them
        stored = [
            (leaf, dtype, (-(-n * found[0] // BLOCK), found[1]) if len(found) == 2 else found)
            for leaf, dtype, found in _stored_of(scheme, format, BLOCK, k)
        ]
    return tuple(Place(f"{name}.{leaf}", dtype, found) for leaf, dtype, found in stored)


def by_rows(format: str) -> bool:
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


def shards_of(pieces: Sequence[Piece], limit: int) -> dict[str, list[Place]]:
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
        *offsets, _ = accumulate((place.bytes for place in group), initial=len(file_header(group)))
        shards[file] = [replace(one, file=file, offset=offset) for one, offset in zip(group, offsets, strict=True)]
    return shards


def file_header(places: Iterable[Place]) -> bytes:
    """The header of a safetensors file of `places`, one after another."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in places:
        begin, end = end, end + one.bytes
        entries[one.name] = {"dtype": _CODES[one.dtype], "shape": list(one.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def as_one(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """The pieces in groups that one worker needs together: weights that share what is scaled by the tensor."""
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.shares or piece.key, []).append(piece)
    return list(groups.values())


def chunks(stored: Stored) -> list[tuple[int, int]]:
    """Rows of about `CHUNK` weights. A multiple of 128 but for the last, so that no block or word is cut."""
    count = stored.shape[0] if stored.shape else 1
    width = math.prod(stored.shape[1:])
    step = max(BLOCK, CHUNK // max(1, width) // BLOCK * BLOCK)
    return [(start, min(count, start + step)) for start in range(0, count, step)] or [(0, 0)]
