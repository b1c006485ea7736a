"""`quantize`: one post-training method on a transformers model, in place, and what it takes to serve or train it.

    >>> result = quantize(model, "gptq", "W4A16", batches)
    >>> result.prepare(model)  # computes what the method's checkpoint serves; train it, or export it

The library works on a copy of the model in the served dtype. What comes back are plain weights in the model's own
dtype, with the scales of symmetric integers beside them as learned scales are stored. From both every code is
recomputed as the library has it, bit for bit; that is checked before anything is written. Each of these weights is as
near to where it was as its code allows, and not ``code * scale``: training moves weights by less than half a bin, and
from the middle of its bin none would reach another code.
"""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep import grid
from lockstep.calibrate import calibrate
from lockstep.export.groups import provenance
from lockstep.loading import LEARNED, MEASURED
from lockstep.ptq.awq import awq
from lockstep.ptq.clipping import minmax, mse, percentile
from lockstep.ptq.gptq import gptq
from lockstep.ptq.hqq import hqq
from lockstep.ptq.oneshot import config_groups, quiet
from lockstep.ptq.rounded import Batches, Rounded, is_symmetric_integer, with_their_rule, working_dtype
from lockstep.ptq.smoothquant import smoothquant
from lockstep.qat.experts import QATExperts, experts, layout_of
from lockstep.qat.learned import digest
from lockstep.qat.observers import storing_layers
from lockstep.qat.prepare import (
    PrepareReport,
    as_text,
    prepare,
    quantized_experts,
    quantized_modules,
    unprepare,
)
from lockstep.scheme import Scheme, TensorSpec

Method = Literal["rtn", "minmax", "percentile", "mse", "gptq", "awq", "smoothquant", "hqq"]
METHODS: tuple[str, ...] = get_args(Method)
_Adapter = Callable[[Any, list[str], Scheme, Batches], dict[str, Rounded]]
_ADAPTERS: dict[str, _Adapter] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "gptq": gptq,
    "awq": awq,
    "smoothquant": smoothquant,
    "hqq": hqq,
}
_NEEDS_BATCHES = ("gptq", "awq", "smoothquant")
BIN = 7 / 16  # of a bin to each side: weight and quotient, rounded to bf16, stay within the rest at every code of INT4


@dataclass(frozen=True)
class LayerError:
    """A layer, and the error ``|served - before| / |before|`` (Frobenius) of its weight.

    `before` is the weight that was rounded: the model's own, or with AWQ and SmoothQuant the smoothed one.
    """

    name: str
    error: float


@dataclass(frozen=True)
class PTQResult:
    """What `quantize` did, and what it takes to compute with it. Printing it gives a table.

    Attributes:
        method: one of `METHODS`.
        scheme: what is served. With the scales of a library the one that was asked for under llm-compressor's scale
            rule ("amax/7.5", "amax/127.5").
        scales: what is stored beside the masters, fp32 by key, on the host: ``NAME.weight_scale`` ``[N, G]`` of the
            symmetric integers of every method but ``rtn``, and measured input scales ``[1]``.
        seconds: of wall time.
        rows: an error for each layer.
        targets, ignore: as they were given.
    """

    method: Method
    scheme: Scheme
    scales: Mapping[str, Tensor]
    seconds: float
    rows: tuple[LayerError, ...]
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)

    @property
    def servable(self) -> bool:
        """Whether a scheme of ours serves it; HQQ's real zero points none does."""
        return self.method != "hqq"

    @property
    def learned_scales(self) -> bool:
        """Whether weight scales are stored: training and exporting take them with ``learned_scales=True``."""
        return any(key.endswith(LEARNED) for key in self.scales)

    def prepare(self, model: nn.Module) -> PrepareReport:
        """Prepare `model`, whose masters `quantize` wrote, with the stored scales: it computes what will be served.

        Raises:
            ValueError: the method is ``hqq``; a scale is not finite, not above zero, or not of its layer's shape.
        """
        if not self.servable:
            raise ValueError(
                "hqq has real zero points, which no kernel serves: evaluate the model as it is, or start training from "
                "it with lockstep.prepare, which rounds again."
            )
        for key, scale in self.scales.items():
            if not (scale.isfinite() & (scale > 0)).all():
                raise ValueError(f"{key} holds scales that are not finite and above zero: it was damaged.")
        report = prepare(model, self.scheme, self.targets, self.ignore, learned_scales=self.learned_scales)
        places = model.state_dict()
        for key, scale in self.scales.items():
            if key not in places or places[key].shape != scale.shape:
                found = list(places[key].shape) if key in places else "no such scale"
                unprepare(model)
                raise ValueError(f"{key} is {list(scale.shape)}, the model has {found}: it is another model's.")
        with torch.no_grad():
            for key, scale in self.scales.items():
                places[key].copy_(scale)
        return report

    def save(self, path: str | Path) -> Path:
        """Write method, scheme, seconds and errors as JSON; ValueError for another suffix. Returns the path."""
        path = Path(path)
        if path.suffix != ".json":
            raise ValueError(f"{path}: a post-training report is saved as .json.")
        content = {
            "method": self.method,
            "scheme": str(self.scheme),
            "rule": provenance(self.scheme),
            "learned_scales": self.learned_scales,
            "servable": self.servable,
            "seconds": self.seconds,
            "scales": {key: digest(scale) for key, scale in self.scales.items()},
            "rows": [asdict(row) for row in self.rows],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path.absolute()

    def __rich__(self):  # type: ignore[no-untyped-def]
        from rich.table import Table

        caption = f"served as {self.scheme}" + (", with the stored weight scales" if self.learned_scales else "")
        if not self.servable:
            caption = "real zero points: no engine serves it and it is not exported; evaluate it, or train from it"
        table = Table(
            "layer",
            "error of the weight",
            title=f"{self.method} of {len(self.rows)} layers in {self.seconds:.1f} s",
            caption=caption,
            title_justify="left",
            caption_justify="left",
        )
        for row in self.rows:
            table.add_row(row.name, f"{row.error:.3%}")
        return table

    def __str__(self) -> str:
        return as_text(self)


def quantize(
    model: Any,
    method: Method,
    scheme: Scheme | str,
    batches: Iterable[Mapping[str, Any]] = (),
    targets: str | Sequence[str] = ("Linear",),
    ignore: str | Sequence[str] = ("lm_head",),
) -> PTQResult:
    """Change the masters of `model` in place to what a post-training method yields.

    It takes the memory of a copy in the served dtype, and for GPTQ that of a layer's Hessians. Parameters that the
    method leaves alone keep every bit. ``rtn`` leaves all alone: the scheme's own rule rounds when the model is
    prepared.

    ============  ====================================================  ================================================
    method        schemes                                               needs batches
    ============  ====================================================  ================================================
    rtn           all                                                   if the scheme stores input ranges
    minmax, ...   symmetric INT4 and INT8, any inputs                   as rtn
    gptq          symmetric INT4 and INT8, any inputs                   yes
    awq           all; what is no symmetric integer by its own rule     yes
    smoothquant   those that quantize inputs; the same                  yes
    hqq           INT4 and INT8 with inputs as they are                 no
    ============  ====================================================  ================================================

    Args:
        model: a transformers model on one device, bf16, fp16 or fp32, not prepared.
        method: one of `METHODS`; ``"percentile"`` and ``"mse"`` are with ``"minmax"`` above.
        scheme: a preset's name or a `Scheme`.
        batches: mappings that the model is called with, such as ``{"input_ids": int64 [B, T]}``.
        targets: what to quantize, as in `lockstep.prepare`.
        ignore: what to leave out, as there.

    Raises:
        ValueError: an unknown method; a method that does not serve the scheme; no batches where it needs them; a layer
            whose codes would not be the library's; one that shares its weight with a module that is not quantized, as
            a tied head does; experts with another method than ``rtn``; what `lockstep.prepare` and `lockstep.calibrate`
            refuse.
        ImportError: the library is not installed.

    Nothing is changed when it raises.
    """
    began, wanted, batches = time.perf_counter(), Scheme.of(scheme), list(batches)
    _check(model, method, wanted, batches)
    targets, ignore = ((one,) if isinstance(one, str) else tuple(one) for one in (targets, ignore))
    masters: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    of_library = method not in ("rtn", "hqq") and is_symmetric_integer(wanted.weights)
    served = with_their_rule(wanted) if of_library else wanted
    if method != "rtn" and any(layout_of(module) for module in model.modules()):
        raise ValueError(f"{method} does not quantize experts: this {type(model).__name__} has some. Use rtn.")
    layers = _layers(model, served, targets, ignore, of_library)
    if method != "rtn":
        work = _working_copy(model, working_dtype(wanted.weights))
        rounded = _run(method, work, layers, served, batches)
        for name, one in rounded.items():
            dtype = model.get_parameter(f"{name}.weight").dtype
            masters[f"{name}.weight"], weight = _master(name, one, served.weights, dtype)
            errors[name] = _error(weight, one.before)
            if one.scale is not None:
                scales[f"{name}{LEARNED}"] = one.scale.float().cpu()
        masters |= _others(model, work, masters)
        del work, rounded
    result = PTQResult(method, served, scales, 0.0, (), targets, ignore)
    stores = wanted.activations is not None and wanted.activations.stores_scale
    before = {key: model.get_parameter(key).detach().clone() for key in masters} if stores else {}
    _write(model, masters)
    if result.servable:
        try:
            scales |= _measured(model, result, batches, errors)
        except BaseException:
            _write(model, before)
            raise
    rows = tuple(LayerError(name, error) for name, error in errors.items())
    return replace(result, seconds=time.perf_counter() - began, rows=rows)


def needs_batches(method: str, scheme: Scheme) -> bool:
    """Whether `quantize` runs the model: for a method that looks at inputs, or for a scheme that stores their range."""
    return method in _NEEDS_BATCHES or (scheme.activations is not None and scheme.activations.stores_scale)


def _check(model: nn.Module, method: str, scheme: Scheme, batches: Batches) -> None:
    spec, inputs = scheme.weights, scheme.activations
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose {', '.join(METHODS)}.")
    if method in ("minmax", "percentile", "mse", "gptq") and not is_symmetric_integer(spec):
        others = "rtn or awq" + ", or smoothquant" * (inputs is not None)
        raise ValueError(f"{method} is for symmetric INT4 and INT8, found {spec}: use {others}.")
    if method == "smoothquant" and inputs is None:
        raise ValueError(f"smoothquant is for schemes that quantize inputs, found {scheme}: use awq.")
    if method == "hqq" and (spec.format not in ("int4", "int8") or inputs is not None):
        raise ValueError(f"hqq is for INT4 and INT8 weights with inputs as they are, found {scheme}: use rtn or awq.")
    if needs_batches(method, scheme) and not batches:
        raise ValueError(f"{method} for {scheme} runs the model on batches: there is none.")
    if odd := [one for one in batches if not isinstance(one, Mapping)]:
        raise ValueError(f"a batch is a mapping (model(**batch)), found {type(odd[0]).__name__}.")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(f"quantize runs in one process, found {dist.get_world_size()} ranks: run it before them.")
    if any(True for _ in (*quantized_modules(model), *quantized_experts(model))):
        raise ValueError(f"this {type(model).__name__} is prepared: call lockstep.unprepare(model) first.")
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"this {type(model).__name__} has adapters: quantize what merge_and_unload() returns.")
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.isfinite().all():
            found = "is on meta, without values" if parameter.is_meta else "holds NaN or infinity"
            raise ValueError(f"{name} {found}: there is nothing to quantize.")
    if len(places := {parameter.device for parameter in model.parameters()}) > 1:
        raise ValueError(f"the model is on {', '.join(sorted(map(str, places)))}: quantize takes it on one device.")


def _layers(
    model: nn.Module, scheme: Scheme, targets: Sequence[str], ignore: Sequence[str], learned_scales: bool
) -> list[str]:
    """The layers that `prepare` would switch, with its errors for those that cannot be."""
    prepare(model, scheme, targets, ignore, learned_scales=learned_scales)
    try:
        layers = [name for name, _ in quantized_modules(model)]
    finally:
        unprepare(model)
    _check_tied(model, layers)
    return layers


def _check_tied(model: nn.Module, layers: Sequence[str]) -> None:
    quantized = {f"{name}.weight" for name in layers}
    owners = {id(model.get_parameter(key)): key for key in quantized}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if key not in quantized and (owner := owners.get(id(parameter))):
            name, other = owner.rpartition(".")[0], key.rpartition(".")[0]
            raise ValueError(
                f"{name} shares its weight with {other}, which is not quantized: what a method makes of one would "
                f"become of the other too. Name {name} in ignore, or untie them."
            )


def _working_copy(model: nn.Module, dtype: torch.dtype) -> Any:
    """A copy in eval mode whose parameters are in `dtype`; buffers such as rotary frequencies stay as they are."""
    parameters = {id(one): nn.Parameter(one.detach().to(dtype, copy=True), False) for one in model.parameters()}
    return copy.deepcopy(model, cast("dict[int, Any]", parameters)).eval()


def _run(method: str, work: Any, layers: list[str], scheme: Scheme, batches: Batches) -> dict[str, Rounded]:
    try:
        with torch.no_grad(), nullcontext() if method in ("percentile", "hqq") else quiet():
            return _ADAPTERS[method](work, layers, scheme, batches)
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        raise ImportError(f"{method} needs {missing}: pip install 'lockstep-qat[ptq]'.") from error


def _master(name: str, one: Rounded, spec: TensorSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The master in `dtype` that gives the library's codes, and the weight that is served."""
    if one.scale is None:
        return one.weight.to(dtype), one.weight
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize as their_codes

    args = QuantizationArgs(**config_groups(Scheme(spec), [name])["group_0"]["weights"])
    # On a GPU compressed-tensors divides in fp32, elsewhere in the weight's dtype as the rule says. A 16-bit master
    # tells 8-bit codes apart by the latter alone.
    tight = spec.format == "int8" and spec.scale_dtype.itemsize == 2
    weight, given = (x.cpu() if tight else x for x in (one.weight, one.scale))
    codes = their_codes(weight, given, torch.zeros_like(given, dtype=torch.int8), args, torch.int8)
    codes, scale = codes.to(one.weight.device), one.scale.to(spec.scale_dtype)
    served = grid.dequantize(grid.Quantized(codes, scale), spec)
    # 16 bits may hold nothing near the end of a bin. Nor, with 8-bit codes, the served weight: there the library's own
    # is the master, of which it made the code.
    master = one.weight.to(dtype)
    for better in (served, _nearest(one.before.to(codes.device), codes, scale, spec)):
        back = grid.quantize(better.to(dtype), spec, scale=scale).codes
        master = torch.where(back == codes, better.to(dtype), master)
    again = grid.quantize(master, spec, scale=scale).codes
    if not torch.equal(scale.float(), one.scale.float()) or not torch.equal(again, codes):
        raise ValueError(
            f"{name}: {int((again != codes).sum())} of {codes.numel()} codes would not be the library's as {spec}, "
            f"with scales in {one.scale.dtype}: please report it."
        )
    return master, served


def _nearest(before: Tensor, codes: Tensor, scale: Tensor, spec: TensorSpec) -> Tensor:
    """The weights nearest to `before` ``[N, K]`` that have `codes`, fp32; within their range, for the gradients."""
    low, high = spec.code_range
    inside = 0.5 - BIN  # in 16 bits the last code times its scale may be beyond
    groups, step = codes.float().unflatten(-1, (scale.shape[-1], -1)), scale.float().unsqueeze(-1)
    ends = ((groups - BIN).clamp(min=low + inside) * step, (groups + BIN).clamp(max=high - inside) * step)
    return before.float().view_as(groups).clamp(*ends).flatten(-2)


def _others(model: nn.Module, work: nn.Module, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other parameters that the method changed: norms, and weights that were scaled along."""
    found = {}
    for name, old in model.named_parameters():
        new = work.get_parameter(name)
        if name not in masters and not torch.equal(old.to(new.dtype), new):
            found[name] = new.to(old.dtype)
    return found


def _write(model: nn.Module, masters: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, master in masters.items():
            model.get_parameter(key).copy_(master)


def _measured(model: nn.Module, result: PTQResult, batches: Batches, errors: dict[str, float]) -> dict[str, Tensor]:
    """The input scales that the prepared `model` stores; adds to `errors` those of layers rounded by their own rule."""
    try:
        with warnings.catch_warnings():  # of modules that no rule names, the second time
            warnings.filterwarnings("ignore", message=".* in modules that no rule names")
            result.prepare(model)
        if storing_layers(model):
            calibrate(model, batches, progress=False)
        for name, module in (*quantized_modules(model), *quantized_experts(model)):
            if name not in errors:
                parts: Sequence[Any] = list(experts(module)) if isinstance(module, QATExperts) else [module]
                served = [grid.dequantize(part.quantize(), part.scheme.weights).flatten() for part in parts]
                errors[name] = _error(torch.cat(served), torch.cat([part.weight.detach().flatten() for part in parts]))
        return {key: value.cpu().clone() for key, value in model.state_dict().items() if key.endswith(MEASURED)}
    finally:
        unprepare(model)


def _error(served: Tensor, before: Tensor) -> float:
    before = before.to(served.device).float()
    difference = (served.float() - before).norm().item()
    return difference / before.norm().item() if difference else 0.0  # weights of zeros have no norm
