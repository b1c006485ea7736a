"""Calibration: measure the ranges of a prepared model on a few batches, and what its outliers are.

Of the inputs of layers with a stored scale, and of the keys and values of a static KV cache.

    >>> lockstep.prepare(model, "FP8")
    >>> print(calibrate(model, batches, observer="minmax", steps=32))

``lockstep calibrate`` does so for a transformers folder and writes another one: the same masters, byte for byte, and
beside them the scales in fp32, ``[1]`` under ``NAME.input_scale`` (NVFP4: ``NAME.input_global_scale``) with a layer's
NAME, and under ``NAME.k_scale`` and ``NAME.v_scale`` with an attention module's. `lockstep.loading.load_scales` reads
them into a prepared model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.export.directory import EXPORTED, check_new, replacing
from lockstep.loading import as_served, calibration_batches, load_model
from lockstep.qat import observers
from lockstep.qat.linear import QATLinear
from lockstep.qat.observers import Histogram, Observer, ObserverName
from lockstep.qat.prepare import as_text, prepare, quantized_experts, quantized_modules, show, unwrapped
from lockstep.scheme import Scheme

Batch = Tensor | Mapping[str, Any]
OUTLIERS = 5
SCALES = "model-input-scales.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Outlier:
    """An input channel, and its largest magnitude over the median channel's."""

    channel: int
    ratio: float


@dataclass(frozen=True)
class LayerRange:
    """What calibration found at one layer.

    Attributes:
        name: the module's name.
        range: the magnitude that the largest code stands for; one for layers that engines run as one.
        scale: what is stored, see `lockstep.activations.static_scale`.
        clipped: share of the inputs beyond `range`, both rounded to bf16.
        outliers: the channels with the largest magnitudes, the largest first. The median is that of the channels that
            are not always zero.
    """

    name: str
    range: float
    scale: float
    clipped: float
    outliers: tuple[Outlier, ...]


@dataclass(frozen=True)
class CalibrationReport:
    """The result of `calibrate`, a row for each layer. Print it for a table, or `save` it.

    Attributes:
        observer: what became the range.
        batches: how many batches this rank ran.
        rows: of all ranks' inputs.
        kv_scales: the scales of keys and values by their keys, one for each head where the cache has as many.
    """

    observer: ObserverName
    batches: int
    rows: tuple[LayerRange, ...]
    kv_scales: Mapping[str, list[float]] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON; ValueError for another suffix than ``.json``. Returns the absolute path."""
        path = Path(path)
        if path.suffix != ".json":
            raise ValueError(f"{path}: a calibration report is saved as .json.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path.absolute()

    def __rich__(self):  # type: ignore[no-untyped-def]
        from rich.table import Table

        table = Table(
            title=f"ranges of the inputs of {len(self.rows)} layers by {self.observer}, {self.batches} batches",
            caption="outliers: channel (its largest magnitude over the median channel's)",
            title_justify="left",
            caption_justify="left",
        )
        for header in ("layer", "range", "scale", "clipped", "outliers"):
            table.add_column(header, justify="left" if header in ("layer", "outliers") else "right", overflow="fold")
        for row in self.rows:
            outliers = ", ".join(f"{outlier.channel} ({outlier.ratio:.1f})" for outlier in row.outliers)
            table.add_row(row.name, f"{row.range:.4g}", f"{row.scale:.4g}", f"{row.clipped:.3%}", outliers)
        for key, scales in self.kv_scales.items():
            table.add_row(key, "", ", ".join(f"{scale:.4g}" for scale in scales), "", "")
        return table

    def __str__(self) -> str:
        return as_text(self)


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch] | Batch,
    observer: ObserverName = "minmax",
    steps: int | None = None,
    progress: bool = True,
) -> CalibrationReport:
    """Run batches through a prepared model and write every scale that it stores: of inputs, of keys and values.

    The layers compute with quantized weights and with inputs, keys and values as they are meanwhile, in eval mode
    without gradients; experts, whose inputs have no stored scale, compute as they train; masters wider than the served
    dtype run under autocast to it, unless the caller has an autocast of their own. Over several ranks every rank must
    call it, each with its own batches; all write the same bits.

    Args:
        model: prepared with measured input ranges (``FP8``, ``NVFP4``, static INT8), or a static KV cache.
        batches: what the model is called with, one after another: mappings (``model(**batch)``) or tensors, a
            ``DataLoader`` of them, or a single one. They are moved to the model's device.
        observer: what becomes the range: ``"minmax"``, ``"percentile"``, ``"moving_average"`` or ``"mse"``, see
            `lockstep.qat.observers`.
        steps: how many of the batches; all of them by default.
        progress: show a progress bar, on rank zero and on a terminal.

    Returns:
        A row for each layer, with its outlier channels.

    Raises:
        ValueError: no scale is stored; a layer saw no input, only zeros, or a NaN or infinity.
        TypeError: a batch of another kind.

    Whether it raises or not, the layers end as they were but for the scales, which are all written or none.
    """
    from lockstep.qat import kv_cache  # which imports transformers

    layers, attention, seen = observers.storing_layers(model), _attention(model), 0
    before = {key: scale.clone() for key, scale in _scales(model).items()}
    schemes = [layer.scheme for _, layer in quantized_modules(model)]
    schemes += [module.scheme for _, module in quantized_experts(model)]
    served = schemes[0].weights.served_dtype if schemes else torch.float32
    try:
        if layers or not attention:
            observers.observe(model, observer)
        kv_cache.observe(model, observer)
        recorders = {name: _Recorder(layer) for name, layer in layers.items()}
        for name, recorder in recorders.items():
            layers[name].observer = recorder
        device = next(model.parameters()).device
        with torch.no_grad(), as_served(model, served):
            for batch in _tracked(batches, steps, progress):
                _call(model, batch, device)
                seen += 1
        recorded = {name: recorder.over_ranks() for name, recorder in recorders.items()}
        ranges = observers.freeze(model) if layers else {}
        kv_cache.freeze(model)
    except BaseException:
        for key, scale in _scales(model).items():
            scale.copy_(before[key])
        raise
    finally:
        observers.unobserve(model)
        kv_cache.unobserve(model)
    rows = tuple(_row(name, layer, ranges[name], *recorded[name]) for name, layer in layers.items())
    kept = {key: scale for key, scale in _scales(model).items() if key.endswith(kv_cache.SCALES)}
    return CalibrationReport(observer, seen, rows, {key: scale.flatten().tolist() for key, scale in kept.items()})


def calibrate_command(
    model: str,
    out: str,
    scheme: Scheme | str = "FP8",
    observer: ObserverName = "minmax",
    kv_cache: str | None = None,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
    device: str | None = None,
    text: str | None = None,
    steps: int = 32,
    max_tokens: int = 512,
    json: str | None = None,
) -> int:
    """Measure the input ranges of a model; write it to a new folder together with the scales to train with.

    Args:
        model: transformers folder with the masters.
        out: where to write the same masters and the scales; a new or empty folder.
        scheme: what the model will train as, a preset's name such as FP8 or NVFP4, or its fields.
        observer: what becomes the range: minmax, percentile, moving_average or mse.
        kv_cache: what keys and values will be, fp8 or another static name of lockstep.qat.kv_cache; default: as they
            are.
        targets: what will be quantized, as in lockstep.prepare.
        ignore: what will be left out.
        device: a torch device; default: the GPU if there is one.
        text: file to run the model on, of at least one batch; default: a module of the Python standard library.
        steps: how many batches of it at most.
        max_tokens: how many tokens in a batch.
        json: write the report as JSON there.
    """

    from lockstep.qat.kv_cache import prepare_kv_cache

    if json and Path(json).suffix != ".json":
        raise ValueError(f"{json}: a calibration report is saved as .json.")
    if steps < 1 or max_tokens < 1:
        raise ValueError(f"steps={steps}, max_tokens={max_tokens}: calibration needs at least one of each.")
    wanted, source = Scheme.of(scheme), Path(model)
    _check_source(source)
    check_new(out)
    loaded, tokenizer = load_model(model, device)
    prepare(loaded, wanted, targets, ignore)
    if kv_cache is not None:
        prepare_kv_cache(loaded, kv_cache)
    batches = calibration_batches(loaded, tokenizer, text, steps, max_tokens)

    with replacing(out) as incomplete:
        report = calibrate(loaded, batches, observer, steps)
        _write(source, incomplete, {key: scale.cpu() for key, scale in _scales(loaded).items()})
    show(report)
    print(f"written: {Path(out).absolute()}")
    if json:
        print(f"written: {report.save(json)}")
    return 0


class _Recorder:
    """An observer that also counts the magnitudes that its own observer sees, and keeps each channel's largest."""

    def __init__(self, layer: QATLinear) -> None:
        self.observer: Observer = layer.observer  # type: ignore[assignment]
        self.histogram = Histogram()
        self.channels = torch.zeros(layer.in_features)

    def update(self, x: Tensor) -> None:
        self.observer.update(x)
        self.histogram.update(x)
        if x.numel():
            largest = x.detach().reshape(-1, x.shape[-1]).abs().amax(0).float()
            self.channels = torch.maximum(self.channels.to(x.device), largest)

    def reduce(self) -> Observer:
        return self.observer.reduce()

    def over_ranks(self) -> tuple[Histogram, Tensor]:
        return self.histogram.reduce(), observers.over_ranks(self.channels, "max")


def _row(name: str, layer: QATLinear, range: Tensor, histogram: Histogram, channels: Tensor) -> LayerRange:
    largest, places = channels.topk(min(OUTLIERS, len(channels)))
    ratios = (largest.double() / channels[channels > 0].median()).tolist()
    outliers = tuple(Outlier(*one) for one in zip(places.tolist(), ratios, strict=True))
    return LayerRange(name, range.item(), _scale(layer).item(), histogram.share_above(range).item(), outliers)


def _scale(layer: QATLinear) -> Tensor:
    assert layer.scheme.activations is not None
    return layer.get_buffer(layer.scheme.activations.scale_name)


def _attention(model: nn.Module) -> dict[str, Any]:
    """The attention modules with a static KV cache, by name."""
    caches = {name: (module, vars(module).get("kv_cache")) for name, module in unwrapped(model).named_modules()}
    return {name: module for name, (module, cache) in caches.items() if cache is not None and not cache.spec.dynamic}


def _scales(model: nn.Module) -> dict[str, Tensor]:
    """Every scale that calibration writes, by the key that it is stored under."""
    from lockstep.qat import kv_cache  # which imports transformers

    inputs = {name: layer.scheme.activations for name, layer in observers.storing_layers(model).items()}
    keys = [f"{name}.{spec.scale_name}" for name, spec in inputs.items() if spec is not None]
    keys += [f"{name}.{key}" for name in _attention(model) for key in kv_cache.SCALES]
    return {key: unwrapped(model).get_buffer(key) for key in keys}


def _call(model: nn.Module, batch: Batch, device: torch.device) -> None:
    if isinstance(batch, Mapping):
        model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    elif isinstance(batch, Tensor):
        model(batch.to(device))
    else:
        raise TypeError(f"a batch is a mapping (model(**batch)) or a tensor, found {type(batch).__name__}.")


def _tracked(batches: Iterable[Batch] | Batch, steps: int | None, progress: bool) -> Iterator[Batch]:
    """The first `steps` of `batches`, with a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if isinstance(batches, Mapping | Tensor):
        batches = [batches]
    length = len(batches) if isinstance(batches, Sized) else None
    total = min((one for one in (steps, length) if one is not None), default=None)
    console = Console(stderr=True)
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (progress and first and console.is_terminal)) as bar:
        yield from bar.track(islice(batches, steps), total=total)


def _check_source(source: Path) -> None:
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder: MODEL is the transformers folder with the masters.")
    if not (source / "model.safetensors").is_file() and not (source / _INDEX).is_file():
        raise ValueError(f"{source} has no model.safetensors and no {_INDEX}: save the model with save_pretrained.")


def _write(source: Path, target: Path, scales: Mapping[str, Tensor]) -> None:
    """Copy the transformers folder `source`, and add a shard with `scales` in the place of an earlier one."""
    from safetensors.torch import save_file

    if (source / "model.safetensors").is_file():  # which transformers reads even where there is an index too
        shard, sizes = "model-00001-of-00001.safetensors", _sizes(source / "model.safetensors")
        weight_map, files = dict.fromkeys(sizes, shard), {"model.safetensors": shard}
        metadata = {"total_size": sum(sizes.values())}
    else:
        index = json.loads((source / _INDEX).read_text(encoding="utf-8"))
        weight_map, metadata = index["weight_map"], index.get("metadata", {})
        if SCALES in weight_map.values():
            metadata["total_size"] = metadata.get("total_size", 0) - sum(_sizes(source / SCALES).values())
            weight_map = {key: shard for key, shard in weight_map.items() if shard != SCALES}
        files = {shard: shard for shard in weight_map.values()}
    if stored := weight_map.keys() & scales.keys():
        raise ValueError(f"{source} holds {min(stored)} among its masters: calibrate the folder without scales.")

    others = (path.name for path in source.iterdir() if path.is_file() and path.suffix in EXPORTED | {".py"})
    files |= {name: name for name in others if not name.endswith(".safetensors") and name != _INDEX}
    for name, copied in files.items():
        shutil.copyfile(source / name, target / copied)
    save_file(dict(scales), target / SCALES, metadata={"format": "pt"})
    metadata["total_size"] = metadata.get("total_size", 0) + sum(_sizes(target / SCALES).values())
    weight_map |= dict.fromkeys(scales, SCALES)
    content = {"metadata": metadata, "weight_map": weight_map}
    (target / _INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sizes(path: Path) -> dict[str, int]:
    """The bytes of each tensor of a safetensors file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: end - begin for name, (begin, end) in spans.items()}
