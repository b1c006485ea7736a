"""What is refused before it is exported: what a format could not store, or an engine serve as another model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lockstep.export import compressed_tensors, formats
from lockstep.export.checkpoint import bitwise_equal
from lockstep.export.directory import ExportError
from lockstep.export.gather import whole, without_wrappers
from lockstep.export.hub import layer_name
from lockstep.export.served import (
    Layer,
    kv_cache_scheme,
    prepared_cache,
    quantized_keys,
    quantized_layers,
    served_state,
    stored_as,
)
from lockstep.qat import learned
from lockstep.qat.experts import Expert
from lockstep.qat.prepare import FUSED, run_as_one, unwrapped, with_adapters_merged
from lockstep.scheme import BLOCK


def check_exportable(model: nn.Module, format: str | None = None) -> None:
    """Refuse what could not be written or served, before anything is written: as far as it shows before training.

    Raises:
        ExportError: nothing is prepared; a layer does not fit the format or the kernel; projections that engines fuse
            are not quantized alike; a quantized layer shares its weight with one that is not; the format has no word
            for several schemes, or for the KV cache.
        ValueError: an unknown format.
    """
    with with_adapters_merged(unwrapped(model)) as served, without_wrappers(served):
        _check_exportable(served, format)


def _check_exportable(model: nn.Module, format: str | None) -> None:
    layers = quantized_layers(model)
    by_layer = stored_as(layers, format)
    state = served_state(model)
    if odd := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise ExportError(f"{odd[0]} is a {type(state[odd[0]]).__name__}: a checkpoint holds tensors only.")
    quantized = quantized_keys(model)
    _check_tied(model, quantized)
    if lost := [key for key in quantized if key not in state]:
        raise ExportError(f"{lost[0]} is not in the state dict (pruned, or parametrized?).")
    for name, layer in layers.items():
        if problem := formats.find(by_layer[name]).problem(layer.out_features, layer.in_features, layer.scheme):
            raise ExportError(
                f"{name} cannot be stored as {by_layer[name]}: {problem}. Name it in ignore, or choose a format."
            )
    _check_experts(layers)
    _check_one_scheme(layers, by_layer)
    _check_fused(model, layers)
    kv_cache_scheme(model, by_layer)
    _warn_of_other_arithmetic(layers)


def _warn_of_other_arithmetic(layers: Mapping[str, Layer]) -> None:
    for name, layer in layers.items():
        inputs = layer.scheme.activations
        if layer.scheme.weights.format == "int4" and inputs is not None and inputs.format == "int8":
            warnings.warn(
                f"{name} trains as W4A8: vLLM 0.22 serves such a folder with FP8 inputs on Hopper, with inputs as they "
                "are on CPUs, and refuses it elsewhere; later versions quantize to int8 with --linear-backend humming "
                "alone. Train W4AFP8 for Hopper. See docs/engines.md.",
                stacklevel=3,
            )
            return


def check_measured(model: nn.Module) -> None:
    """Refuse ranges that are not measured, or are being measured; layers that engines run as one must share theirs.

    Of a sharded model with learned scales all ranks must call it.
    """
    with with_adapters_merged(unwrapped(model)) as served, without_wrappers(served):
        _check_measured(served)


def _check_measured(model: nn.Module) -> None:
    layers = quantized_layers(model)
    scales: dict[str, Tensor | None] = {}
    for name, layer in layers.items():
        learnt = layer.learned_scale
        if learnt is not None and not learnt.is_meta:
            learnt = whole(learnt)
            if not ((learnt >= 0) & learnt.isfinite()).all():
                raise ExportError(
                    f"{name}.{learned.KEY} holds scales that are negative or not finite: their learning rate was too "
                    "high, see lockstep.qat.learned."
                )
        if layer.observer is not None:
            raise ExportError(f"{name} is being calibrated: freeze its range before the export.")
        try:
            scale = layer.stored_scale()
            scales[name] = None if scale is None or scale.is_meta else scale
        except ValueError:
            raise ExportError(f"{name}: the range of its inputs is not measured: run `lockstep calibrate`.") from None
    for first, *others in run_as_one(layers):
        for name in others:
            a, b = scales[first], scales[name]
            if a is not None and b is not None and not bitwise_equal(a.cpu(), b.cpu()):
                raise ExportError(
                    f"{name} has input scale {b.item():g} and {first} {a.item():g}, but engines run them as one layer: "
                    "calibrate them together."
                )
    for name, module in model.named_modules():
        cache = prepared_cache(module)
        if cache is None or cache.spec.dynamic:
            continue
        if cache.observer is not None:
            raise ExportError(f"{name}: the range of its keys and values is being measured: freeze it first.")
        if not all(scale.is_meta or bool((scale > 0).all()) for scale in (module.k_scale, module.v_scale)):
            raise ExportError(f"{name}: the range of its keys and values is not measured: run `lockstep calibrate`.")


def _check_one_scheme(layers: Mapping[str, Layer], by_layer: Mapping[str, str]) -> None:
    """Refuse several schemes where an engine or the format takes but one."""
    first, *others = layers
    for name in others:
        one, other = layers[first].scheme, layers[name].scheme
        if one.weights.served_dtype != other.weights.served_dtype:
            raise ExportError(
                f"{first} is served in {one.weights.served_dtype}, {name} in {other.weights.served_dtype}: an engine "
                "serves a model in one dtype."
            )
        if one != other and formats.find(by_layer[name]).METHOD != compressed_tensors.METHOD:
            raise ExportError(
                f"{by_layer[name]} declares one scheme for all layers, found {one} ({first}) and {other} ({name}): "
                'choose format="auto", or one scheme.'
            )


def _check_fused(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    linear = [layer_name(model, name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for siblings in run_as_one(linear):
        plain = [name for name in siblings if name not in layers]
        together = f"engines run {', '.join(siblings)} as one layer"
        if plain and len(plain) < len(siblings):
            raise ExportError(f"{plain[0]} is not quantized, but {together}: ignore all or none.")
        if plain or len(siblings) == 1:
            continue
        first = siblings[0]
        for name in siblings[1:]:
            if layers[name].scheme != layers[first].scheme:
                raise ExportError(
                    f"{name} is quantized as {layers[name].scheme} and {first} as {layers[first].scheme}, but "
                    f"{together}: give them one scheme."
                )
        if layers[first].scheme.weights.strategy == "block":
            order = {leaf: place for parts in FUSED for place, leaf in enumerate(parts)}
            _check_blocks(sorted(siblings, key=lambda name: order[name.rpartition(".")[2]]), layers)
    for name, layer in layers.items():
        if isinstance(layer, Expert) and layer.part == "gate_proj" and layer.scheme.weights.strategy == "block":
            _check_blocks([name, name.replace("gate_proj", "up_proj")], layers)


def _check_experts(layers: Mapping[str, Layer]) -> None:
    """Refuse experts that no engine serves as they train, and warn of those that some do not."""
    for name, layer in layers.items():
        if not isinstance(layer, Expert):
            continue
        weights, module = layer.scheme.weights, layer.module
        if getattr(module, "down_proj_bias", None) is not None or module.layout.interleaved:
            raise ExportError(
                f"{name} is an expert of {module.plain_class.__name__}, with a bias or interleaved rows, which engines "
                f"serve in bf16 or in gpt-oss's own MXFP4 alone. Name {module.qualified_name} in ignore."
            )
        if weights.strategy == "tensor":
            raise ExportError(
                f"{name}: engines have no kernel for experts of {layer.scheme}: choose FP8_DYNAMIC, by channel."
            )
        if layer.part == "down_proj" and weights.group_size == layer.in_features:
            warnings.warn(
                f"{name} has {layer.in_features} inputs, one group: vLLM 0.32 then orders the scales of the layer's "
                "first projections for one group too, whatever they have. Choose a smaller group_size.",
                stacklevel=4,
            )
            return


def _check_blocks(siblings: list[str], layers: Mapping[str, Layer]) -> None:
    """Below one another, only the last of several layers may end within a block."""
    for name in siblings[:-1]:
        if (n := layers[name].out_features) % BLOCK:
            raise ExportError(
                f"{name} has {n} outputs, but engines put {', '.join(siblings)} below one another, where each but the "
                f"last needs a multiple of {BLOCK}: name them in ignore, or choose a scheme by channel."
            )


def _check_tied(model: nn.Module, quantized: Collection[str]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners = {id(parameters[key]): key for key in quantized if key in parameters}
    for key, parameter in parameters.items():
        if key not in quantized and (owner := owners.get(id(parameter))):
            name, other = owner.rpartition(".")[0], key.rpartition(".")[0]
            raise ExportError(
                f"{name} trains quantized but shares its weight with {other}, which does not: an engine would tie the "
                f"two and serve one of them otherwise than it trained. Name {name} in ignore, or untie them."
            )
