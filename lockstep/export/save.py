"""Write what was trained: stream the tensors that an engine loads, or save a checkpoint folder of them.

Every quantized layer is checked as it leaves (C3): the words, unpacked and dequantized, must be bit for bit the weight
that the training forward used.
"""

from __future__ import annotations

import copy
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lockstep import grid, kernels
from lockstep.export import card, formats, hub
from lockstep.export.arriving import arriving
from lockstep.export.checkpoint import bitwise_equal, same_bits
from lockstep.export.directory import ExportError, replacing
from lockstep.export.gather import fsdp_units, gathered, ranks_of, together, without_wrappers
from lockstep.export.groups import Group
from lockstep.export.legality import check_exportable, check_measured
from lockstep.export.masters import INDEX
from lockstep.export.served import (
    Layer,
    kv_cache_scheme,
    quantized_keys,
    quantized_layers,
    served_state,
    served_tensor,
    stored_as,
    unquantized_layers,
)
from lockstep.grid import Quantized
from lockstep.kernels import Quantizer
from lockstep.qat.experts import Expert, QATExperts
from lockstep.qat.prepare import unwrapped, with_adapters_merged
from lockstep.scheme import Scheme, TensorSpec, dtype_name

PLAIN = "plain"  # of `stream`: no quantization


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


def quantization_config(model: nn.Module, format: str | None = None) -> dict[str, Any]:
    """What ``config.json`` says of the quantization of a prepared `model`, in the words of `format`."""
    model = unwrapped(model)
    with without_wrappers(model):
        layers = quantized_layers(model)
        by_layer = stored_as(layers, format)
        ignored = unquantized_layers(model)
    schemes = {name: layer.scheme for name, layer in layers.items()}
    return quantization_entry(by_layer, schemes, ignored, kv_cache_scheme(model, by_layer))


def quantization_entry(
    by_layer: Mapping[str, str],
    schemes: Mapping[str, Scheme],
    ignored: Sequence[str],
    kv_cache: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The ``quantization_config`` of layers by their formats and schemes, see `Format.config`."""
    groups: dict[tuple[str, Scheme], list[str]] = {}
    for name, format in by_layer.items():
        groups.setdefault((format, schemes[name]), []).append(name)
    writer = formats.find(next(iter(by_layer.values())))
    return writer.config([Group(*key, tuple(names)) for key, names in groups.items()], ignored, kv_cache)


class Check(NamedTuple):
    """A check that is launched: a number or bool ``[]`` on its device, 0 if all is right; and who looks closer if not.

    That raises ExportError, or finds that all is right nevertheless.
    """

    found: Tensor
    look: Callable[[], None]


class Made(NamedTuple):
    """What is stored of a module: of use to nobody before its checks are settled."""

    tensors: dict[str, Tensor]
    checks: list[Check]


def settle(checks: Sequence[Check]) -> None:
    """Wait for `checks`. ExportError if something is wrong."""
    settling(checks)()


def settling(checks: Sequence[Check]) -> Callable[[], None]:
    """`settle`, of which the waiting is done when the result is called."""
    alike: dict[tuple[torch.device, torch.dtype], list[Check]] = {}
    for check in checks:
        alike.setdefault((check.found.device, check.found.dtype), []).append(check)
    found = [(some, arriving(torch.stack([check.found for check in some]))) for some in alike.values()]

    def wait() -> None:
        for some, read in found:
            for check, value in zip(some, read(), strict=True):
                if value:
                    check.look()

    return wait


class Entry(NamedTuple):
    """A module that has something to store.

    Within the block of `whole` its parameters are whole; there `parts` makes what is stored of it, and appends to a
    list the checks that it has launched and not settled; without a list it settles each before it goes on. They too
    are settled in the block, if the model is sharded.
    """

    name: str  # in the state dict
    whole: Callable[[], AbstractContextManager[None]]
    parts: Callable[[list[Check] | None], Iterable[tuple[str, Tensor]]]

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """What is stored, each tensor checked."""
        return self.parts(None)

    def made(self) -> Made:
        """What is stored, whose checks are to be settled."""
        checks: list[Check] = []
        return Made(dict(self.parts(checks)), checks)


def entries(model: nn.Module, format: str | None, ranks: dist.ProcessGroup | None) -> list[Entry]:
    """What `stream` goes through, in the order of the state dict. All of `ranks` (`ranks_of`) must call it.

    Any order is right, if it is that of all ranks. `model` is within `with_adapters_merged`.
    """
    return _entries(model, format, sharded=False) if ranks is None else _agreed(model, format, ranks)


def _entries(model: nn.Module, format: str | None, sharded: bool) -> list[Entry]:
    units, model = fsdp_units(model), unwrapped(model)
    keys: dict[str, dict[str, Layer]] = {}
    by_layer: dict[str, str] = {}
    if format != PLAIN:
        check_exportable(model, format)
        check_measured(model)
    with without_wrappers(model):
        found = quantized_keys(model)
        layers = {name: layer for of_key in found.values() for name, layer in of_key.items()}
        scheme = _served_as(model, layers)
        if format != PLAIN:
            keys, by_layer = found, stored_as(layers, format)
        state, owners = served_state(model), dict(model.named_modules(remove_duplicate=False))

    def entry(name: str, own: list[str]) -> Entry:
        module = owners[name]

        def parts(later: list[Check] | None) -> Iterator[tuple[str, Tensor]]:
            for key in own:
                parameter = module._parameters.get(key.rpartition(".")[2])
                tensor = state[key] if parameter is None else parameter.detach()
                quantized = keys.get(key, {})
                _check_whole(key, tensor, quantized, parameter is not None)
                if quantized:
                    yield from _stored(key, quantized, by_layer, later)
                    continue
                served = served_tensor(model, key, tensor, scheme)
                if parameter is not None:  # buffers may hold an infinity on purpose, as masks do
                    _check_finite(key, served, later)
                # FSDP1 takes the memory back.
                yield from hub.stored_tensors(model, key, served.clone() if units else served).items()

        if not sharded:
            return Entry(name, nullcontext, parts)
        return Entry(name, partial(gathered, getattr(module, "fused", ()) or (module,), units), parts)

    return [entry(name, list(own)) for name, own in groupby(state, _owner)]


def _served_as(model: nn.Module, layers: Mapping[str, Layer]) -> Scheme:
    """A scheme with the served dtype of `model`, of which `layers` are prepared."""
    if layers:
        return next(iter(layers.values())).scheme
    own = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.bfloat16)
    return Scheme(TensorSpec(served_dtype=torch.float16 if own == torch.float16 else torch.bfloat16))


def _agreed(model: nn.Module, format: str | None, ranks: dist.ProcessGroup) -> list[Entry]:
    """`_entries` of a sharded model. ExportError on all ranks if one has prepared it otherwise."""
    entries: list[Entry] = []

    def plan() -> str:
        entries.extend(_entries(model, format, sharded=True))
        with without_wrappers(unwrapped(model)):
            names = [*served_state(unwrapped(model))]
        return json.dumps([None if format == PLAIN else quantization_config(model, format), names])

    first, *others = together(plan, ranks)
    for rank, other in enumerate(others, 1):
        if other != first:
            raise ExportError(f"rank {rank} has prepared its model otherwise than rank 0: prepare alike on all ranks.")
    return entries


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


def _check_whole(key: str, tensor: Tensor, quantized: Mapping[str, Layer], is_parameter: bool) -> None:
    if tensor.is_meta:
        raise ExportError(f"{key} is on the meta device: load weights into the model first.")
    lost = not tensor.numel()
    for layer in quantized.values():
        lost |= layer.weight.shape != (layer.out_features, layer.in_features)
    if isinstance(tensor, DTensor) or (is_parameter and lost):
        raise ExportError(
            f"{key} is sharded over ranks in a way that is not known here ({type(tensor).__name__} of shape "
            f"{list(tensor.shape)}): export FSDP1's outermost wrapper, or shard by FSDP2, ZeRO-3 or DTensor."
        )


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
    rank, entries = dist.get_rank(ranks), _agreed(model, format, ranks)
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
        for number, entry in enumerate(entries):
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


def _stored(
    key: str, layers: Mapping[str, Layer], by_layer: Mapping[str, str], later: list[Check] | None
) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of the master `key`, with their names: of each layer of it, or of its experts as one."""
    first = next(iter(layers))
    if by_layer[first] == "marlin" and isinstance(layers[first], Expert):
        yield from _stacked(first, cast("list[Expert]", list(layers.values())), later).items()
        return
    for name, layer in layers.items():
        for suffix, stored in checked(name, layer, by_layer[name], later).items():
            yield f"{name}.{suffix}", stored


def checked(name: str, layer: Layer, format: str, later: list[Check] | None = None) -> dict[str, Tensor]:
    """The tensors of one layer, of which its weight was read back and found to be the one that it trained with.

    With `later` the check may have been launched only, and is appended to it.
    """
    layout, scheme, spec = formats.find(format), layer.scheme, layer.scheme.weights
    weight = layer.weight.detach()
    kernel = kernels.training(scheme, weight.device)
    in_one_pass = format in formats.PACKED and spec.symmetric and layer.learned_scale is None
    quantized = None if in_one_pass else layer.quantize()
    try:
        if quantized is None:
            tensors = formats.PACKED[format](weight, spec, kernel)
        else:
            tensors = layout.write(quantized, spec)
    except ValueError as error:
        raise ExportError(f"{name} cannot be stored as {format}: {error}.") from error

    def read_back(stored: Mapping[str, Tensor]) -> None:
        check_finite(f"{name}.weight", weight)
        try:
            read = layout.read(stored, spec)
        except ValueError as error:
            raise ExportError(f"{name} cannot be stored as {format}: {error}.") from error
        check_finite(f"{name}.weight, as it is served", grid.dequantize(read, spec))
        if not (_is_trained(read, layer, kernel) and (quantized is None or same_bits(read, quantized))):
            raise ExportError(
                f"{name}: the packed words do not give back the weight that it trained with. Nothing is written."
            )

    _check(weight, tensors, spec, format, kernel if quantized is None else None, read_back, later)
    scale = layer.stored_scale()
    if scale is not None and scheme.activations is not None:
        tensors[scheme.activations.scale_name] = scale.detach()
    return tensors


def _stacked(name: str, experts: Sequence[Expert], later: list[Check] | None) -> dict[str, Tensor]:
    """All experts of one parameter as the fused kernel has them, read back: gate rows above up rows.

    `name` is one of theirs.
    """
    scheme, order = experts[0].scheme, ("gate_proj", "up_proj", "down_proj")
    numbers = range(1 + max(expert.number for expert in experts))
    of = {(expert.number, expert.part): expert.weight.detach() for expert in experts}
    parts = [part for part in order if (0, part) in of]
    weight = torch.stack([torch.cat([of[number, part] for part in parts]) for number in numbers])
    kernel, module, format = kernels.training(scheme, weight.device), name.rsplit(".", 2)[0], formats.find("marlin")
    words, scales = kernel.pack_marlin(weight, scheme.weights)

    def read_back(stored: Mapping[str, Tensor]) -> None:
        check_finite(module, weight)
        served = grid.dequantize(format.read(stored, scheme.weights), scheme.weights)
        check_finite(f"{module}, as it is served", served)
        if not bitwise_equal(served, kernel.fake_quantize(weight, scheme.weights)):
            raise ExportError(f"{module}: the packed words do not give back the weights that it trained with.")

    _check(weight, {"B": words, "s": scales}, scheme.weights, "marlin", kernel, read_back, later)
    which = "w2" if parts == ["down_proj"] else "w13"
    return {f"{module}.{which}_weight_packed": words, f"{module}.{which}_weight_scale": scales}


# Words, scales and their order, where a kernel may have a check of its own (`Quantizer.check_packed`).
_CHECKED: dict[str, tuple[str, str, Literal["rows", "marlin"]]] = {
    "pack-quantized": ("weight_packed", "weight_scale", "rows"),
    "marlin": ("B", "s", "marlin"),
}
_READ_BACK: set[tuple[Any, ...]] = set()  # kinds of weights of which one was read back in this process


def _kind(weight: Tensor, spec: TensorSpec, format: str, kernel: Quantizer) -> tuple[Any, ...]:
    """What weights have in common that the same compiled kernels train, pack and check."""
    return kernel, spec, format, weight.dtype, weight.shape, weight.device


def _check(
    weight: Tensor,
    tensors: Mapping[str, Tensor],
    spec: TensorSpec,
    format: str,
    kernel: Quantizer | None,
    read_back: Callable[[Mapping[str, Tensor]], None],
    later: list[Check] | None,
) -> None:
    """Have the stored `tensors` of `weight` checked by the kernel that has packed them, or else by `read_back`.

    The kernel's check knows what the forward multiplies with from the grid's definition alone. So the first weight of a
    kind is read back in any case, and compared with what the forward's own kernel makes of it: should a compiler have
    broken that or the check, it has done so for all of the kind.
    """
    if kernel is None:
        read_back(tensors)
        return
    kind, found = _kind(weight, spec, format, kernel), None
    if format in _CHECKED and kind in _READ_BACK:
        words, scale, order = _CHECKED[format]
        found = kernel.check_packed(weight, tensors[words], tensors[scale], spec, order)
    if found is None:
        read_back(tensors)
        _READ_BACK.add(kind)
    else:
        _settle_or_append(Check(found, partial(read_back, dict(tensors))), later)


def _settle_or_append(check: Check, later: list[Check] | None) -> None:
    if later is None:
        settle([check])
    else:
        later.append(check)


def _is_trained(read: Quantized, layer: Layer, kernel: Quantizer) -> bool:
    """Whether `read` is bit for bit what the layer's forward multiplies with."""
    spec, weight, amax = layer.scheme.weights, layer.weight.detach(), layer.amax()
    if layer.learned_scale is not None:
        return same_bits(read, layer.quantize())
    if layer.scheme.activations is None:
        return bitwise_equal(grid.dequantize(read, spec), kernel.fake_quantize(weight, spec, amax))
    codes, scale, *_ = kernel.quantize(weight, spec, None, amax)
    return same_bits(read, Quantized(codes, scale, read.zero_point, read.global_scale))


def check_finite(name: str, tensor: Tensor) -> None:
    """ExportError if a value of the tensor `name` is NaN or infinite."""
    _check_finite(name, tensor, None)


def _check_finite(name: str, tensor: Tensor, later: list[Check] | None) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return

    def look() -> None:
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise ExportError(
                f"{name}: {bad} of {tensor.numel()} values are NaN or infinite in {dtype_name(tensor.dtype)}."
            )

    # The largest magnitude takes one pass over memory, `isfinite` of each value seven; of 8 bits torch has it not.
    if tensor.itemsize == 1:
        found = (~torch.isfinite(tensor)).any()
    else:
        largest = torch.linalg.vector_norm(tensor, torch.inf)
        found = largest - largest != 0
    _settle_or_append(Check(found, look), later)


Shard = tuple[str, list[str], int]  # the file, the tensors in it, their bytes


class Shards:
    """Tensors on their way into files of at most `limit` bytes, which are called ``LABEL-0`` and so on."""

    def __init__(self, directory: Path, limit: int, label: str) -> None:
        self._directory, self._limit, self._label = directory, limit, label
        self._files: list[Shard] = []
        self._tensors: dict[str, Tensor] = {}
        self._memory: set[int] = set()  # where they are
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor. OSError if a file that is full now cannot be written."""
        tensor = tensor.cpu()
        size = tensor.numel() * tensor.element_size()
        if self._tensors and self._bytes + size > self._limit:
            self._flush()
        # A copy of its own where two names share memory, which safetensors does not store.
        shared = tensor.untyped_storage().data_ptr() in self._memory
        tensor = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        self._tensors[name] = tensor
        self._memory.add(tensor.untyped_storage().data_ptr())
        self._bytes += size

    def written(self) -> list[Shard]:
        """All files, when all tensors are added. OSError if one could not be written."""
        if self._tensors:
            self._flush()
        return self._files

    def _flush(self) -> None:
        file = f"{self._label}-{len(self._files)}"
        try:
            save_file(self._tensors, self._directory / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        self._files.append((file, list(self._tensors), self._bytes))
        self._tensors, self._memory, self._bytes = {}, set(), 0


def _finish(model: nn.Module, directory: Path, shards: list[Shard], format: str | None, tokenizer: Any) -> None:
    """Give the files their names, and write what else belongs in the folder."""
    model = unwrapped(model)
    with without_wrappers(model):
        served = next(iter(quantized_layers(model).values())).scheme.weights.served_dtype
    write_folder(model, directory, shards, quantization_config(model, format), served, tokenizer)


def write_card(
    model: nn.Module,
    written: Path,
    directory: str | Path,
    trained: str = "",
    reasons: Mapping[str, str] | None = None,
) -> None:
    """The card of the export in `written`, which is to be called `directory`."""
    base = str(getattr(unwrapped(model), "name_or_path", ""))
    card.write(written, name=Path(directory).absolute().name, base_model=base, trained=trained, reasons=reasons)


def write_folder(
    model: Any,
    directory: Path,
    shards: Sequence[Shard],
    quantization: Mapping[str, Any],
    served: torch.dtype,
    tokenizer: Any = None,
) -> None:
    """Give the files of `shards` their names, and write what else belongs in the folder of a model: index and configs.

    Args:
        model: without wrappers.
        directory: where the files are.
        shards: in the order of the tensors.
        quantization: see `quantization_config`.
        served: the dtype that the engine computes in.
        tokenizer: saved along.
    """
    weight_map: dict[str, str] = {}
    for (written, names, _), file in zip(shards, file_names(len(shards)), strict=True):
        if written != file:
            (directory / written).rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size for *_, size in shards)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2))
    _write_config(model, directory, quantization, dtype_name(served))
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def file_names(count: int) -> list[str]:
    """What transformers calls the `count` files of a model's tensors."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_config(model: Any, directory: Path, quantization: Mapping[str, Any], served: str) -> None:
    if hasattr(model, "config") and hasattr(model.config, "save_pretrained"):
        config: Any = copy.deepcopy(model.config)
        config.dtype = served
        # fully_shard has put a class of its own before the model's.
        config.architectures = [next(kind.__name__ for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))]
        config.quantization_config = quantization
        config.save_pretrained(directory)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(directory)
    else:
        content = {"dtype": served, "quantization_config": quantization}
        (directory / "config.json").write_text(json.dumps(content, indent=2))


def parse_bytes(size: int | str, what: str) -> int:
    """Bytes, or a string such as ``"500MB"`` (decimal units). ValueError, with the name `what`, for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", str(size).upper()) or re.fullmatch(r"(\d+)()", str(size))
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{what}={size!r}: give bytes, or a string such as '500MB' or '5GB'.")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))
