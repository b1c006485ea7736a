"""`compare`: the model as it trains beside the checkpoint as it is served, layer by layer and end to end."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lockstep import activations, grid, kernels
from lockstep.align import metrics
from lockstep.align.report import AlignmentReport, EndToEnd, LayerAlignment
from lockstep.export import hub
from lockstep.export.checkpoint import Checkpoint, CheckpointError, bitwise_equal
from lockstep.export.config import quantization_config
from lockstep.export.served import Layer, prepared_cache, quantized_keys, quantized_layers, served_plain, served_tensor
from lockstep.grid import Quantized
from lockstep.kernels import Kernel, scaled_mm
from lockstep.loading import as_served
from lockstep.qat import kv_cache
from lockstep.qat.experts import Expert, QATExperts, by_expert
from lockstep.qat.linear import QATLinear, compute_dtype
from lockstep.qat.prepare import quantized_experts, quantized_modules, unwrapped, with_adapters_merged
from lockstep.scheme import BLOCK, Scheme, TensorSpec, dtype_name

# Rows of a layer's input that are computed again, in float64 and the classic way: enough for an error norm and a
# share, cheap beside the forward.
SAMPLED_ROWS = 256

Batch = Tensor | Mapping[str, Any]


@torch.no_grad()
def compare(
    model: nn.Module, checkpoint: str | Path, batch: Batch, kernel: str | Sequence[str] = "reference"
) -> AlignmentReport:
    """Compare `model` as it trains (fake quant) with `checkpoint` as a serving kernel computes it (true quant).

    For each quantized layer: are the stored codes, scales, zero points and measured input scale bitwise the trained
    ones, and on the inputs that the layer really saw in `batch`, how far is the true kernel's output from the layer's
    own? End to end: logits and log-probabilities of the model's own forward against one in which every quantized layer
    runs the true kernel on the stored words, with the stored input scale, and every other tensor is the stored one.

    The model runs in eval mode as it is called here; masters wider than the served dtype run under autocast to it, as
    they train. Model and checkpoint are left as they were.

    Args:
        model: a prepared model (`lockstep.prepare`) holding the trained weights; with peft's adapters, what they are
            merged into is compared.
        checkpoint: the exported folder.
        batch: what the model is called with: a mapping (``model(**batch)``) or a tensor.
        kernel: name of the true kernel: ``"reference"``, ``"vllm-marlin"`` and more (`lockstep.kernels.KERNELS`). Of
            several names, for a model with several schemes, each layer runs the first that computes its scheme.

    Raises:
        CheckpointError: the folder cannot be read, or belongs to another model.
        KernelUnavailable: a layer's scheme can be computed here by none of the kernels named.
        ValueError: the model is not prepared or is being calibrated, an input scale is not measured, a tensor is on
            ``meta``, or the batch reaches no quantized layer.
    """
    with with_adapters_merged(model) as served:
        return _compare(unwrapped(served), checkpoint, batch, (kernel,) if isinstance(kernel, str) else kernel)


def _compare(model: nn.Module, checkpoint: str | Path, batch: Batch, kernel_names: Sequence[str]) -> AlignmentReport:
    if not any((*quantized_modules(model), *quantized_experts(model))):
        raise ValueError(f"no layer of this {type(model).__name__} is prepared: call lockstep.prepare first.")
    layers = _once(quantized_layers(model))
    if meta := [name for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor) and tensor.is_meta]:
        raise ValueError(f"{meta[0]} is on the meta device: load weights into the model first.")
    if observed := [name for name, layer in layers.items() if layer.observer is not None]:
        raise ValueError(f"{observed[0]} is being calibrated, and leaves its inputs as they are: compare afterwards.")
    if observed := [*kv_cache.observers_of(model)]:
        raise ValueError(f"{observed[0]} is being calibrated, keys and values pass as they are: compare afterwards.")
    first = next(iter(layers.values()))
    served, device = first.scheme.weights.served_dtype, first.weight.device
    true_kernels = _true_kernels(kernel_names, layers.values(), device)
    stored = Checkpoint(checkpoint)
    if not layers.keys() & {*stored.layers, *(name.removesuffix(".weight") for name in stored.tensors)}:
        raise CheckpointError(
            f"{checkpoint} holds another model: it has {stored.layers[0]}, the model has {next(iter(layers))}, and no "
            "layer is in both. Of a LightningModule, pass the model that it holds."
        )

    rows, usable = _compare_layers(layers, stored, device)
    problems = _compare_config(model, layers, rows, stored) | _compare_plain(model, layers, stored, device)
    plain = _usable_plain_tensors(model, layers, stored, device)
    serve = {
        name: partial(_run, true_kernels[layers[name].scheme], name, layers[name], *found)
        for name, found in usable.items()
    }
    watch = {row.name: partial(_watch, row, layers[row.name], serve[row.name]) for row in rows if row.name in serve}
    true = None
    with as_served(model, served):
        fake = _logits(model, batch, _forwards(model, layers, watch, own=True))
        if len(serve) == len(layers) and plain is not None:
            true = _logits(model, batch, _forwards(model, layers, serve), plain)
    if serve and not any(row.outputs for row in rows):
        raise ValueError("no quantized layer saw an input: the batch is empty, or the model does not call its layers.")

    return AlignmentReport(
        checkpoint=str(checkpoint),
        kernel=", ".join(dict.fromkeys(one.name for one in true_kernels.values())),
        layers=rows,
        plain_problems=problems,
        end_to_end=None if true is None else _end_to_end(fake, true, batch),
        environment=_environment(device, true_kernels.values()),
    )


def _once(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Each layer under the first of its names alone."""
    first: dict[Layer, str] = {}
    for name, layer in layers.items():
        first.setdefault(layer, name)
    return {name: layer for layer, name in first.items()}


def _true_kernels(names: Sequence[str], layers: Iterable[Layer], device: torch.device) -> dict[Scheme, Kernel]:
    """For each scheme in use the first kernel of `names` that computes it."""
    found = {}
    for scheme in dict.fromkeys(layer.scheme for layer in layers):
        refusals = []
        for name in names:
            try:
                found[scheme] = kernels.find("linear", name, scheme, device)
                break
            except kernels.KernelUnavailable as refusal:
                refusals.append(str(refusal))
        else:
            raise kernels.KernelUnavailable(" ".join(refusals) or "no kernel is named.")
    return found


Stored = tuple[Quantized, Tensor | None]


def _compare_layers(
    layers: Mapping[str, Layer], stored: Checkpoint, device: torch.device
) -> tuple[list[LayerAlignment], dict[str, Stored]]:
    """Each layer's stored tensors against the trained ones; and those that a kernel can run, with their input scale."""
    rows, usable, fingerprints = [], {}, {}
    for name, layer in layers.items():
        row = LayerAlignment(name, (layer.out_features, layer.in_features), layer.scheme)
        rows.append(row)
        trained, trained_scale = layer.quantize(), layer.stored_scale()
        fingerprints[_fingerprint(trained)] = name
        try:
            found, declared = _on(device, stored.layer(name)), stored.scheme_of(name)
        except CheckpointError as error:
            row.problem = str(error).removeprefix(f"{name}: ")
            continue
        if found.codes.shape != trained.codes.shape:
            row.problem = f"stored weight is {list(found.codes.shape)}, trained {list(trained.codes.shape)}"
            continue
        if declared.layout != layer.scheme.layout:
            row.problem = f"stored with {declared}, trained with {layer.scheme}"
            continue
        problems = [_difference(found, trained)]
        row.weight_equal = not problems[0]
        try:
            scale = stored.stored_scale(name)
            scale = None if scale is None else scale.to(device)
            usable[name] = (found, scale)
            problems.append(_input_difference(layer, scale, trained_scale))
        except CheckpointError as error:
            problems.append(str(error).removeprefix(f"{name}: "))
        row.problem = "; ".join(filter(None, problems))
    for row in rows:
        if not row.weight_equal and row.name in usable:
            owner = fingerprints.get(_fingerprint(usable[row.name][0]))
            if owner not in (None, row.name):
                row.problem = f"holds the weight of {owner}"
    return rows, usable


def _on(device: torch.device, quantized: Quantized) -> Quantized:
    return Quantized(*(part if part is None else part.to(device) for part in quantized))  # type: ignore[arg-type]


def _difference(found: Quantized, trained: Quantized) -> str:
    """What differs between two weights of one layout, in words; empty if nothing does."""
    parts = []
    for what, one, other in zip(("codes", "scales", "zero points", "global scales"), found, trained, strict=True):
        if one is None or other is None:  # both, since the layouts agree
            continue
        if one.shape != other.shape:
            parts.append(f"{what} are {list(one.shape)}, trained {list(other.shape)}")
        elif one.dtype != other.dtype:
            parts.append(f"{what} are {one.dtype}, trained {other.dtype}")
            if differing := int((one.float() != other.float()).sum()):
                parts.append(f"{differing} of {one.numel()} {what} differ")
        elif not bitwise_equal(one, other):
            parts.append(_first_difference(what, one, other))
    moved_on = found.scale.shape == trained.scale.shape and _share(found.scale, trained.scale) > 0.1
    if moved_on and _share(found.codes, trained.codes) > 0:
        parts[-1] += "; the model has moved on since the export, or this is another model"
    return "; ".join(parts)


def _share(one: Tensor, other: Tensor) -> float:
    """Share of the values that differ."""
    return (one.float() != other.float()).double().mean().item()


def _first_difference(what: str, found: Tensor, trained: Tensor) -> str:
    """``3 of 512 codes differ, first at [0, 7]: stored 3, trained 4``; by bits, so -0 differs from 0."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    differing = found.contiguous().view(integers) != trained.contiguous().view(integers)
    where = differing.nonzero()[0].tolist()
    one, other = (tensor[tuple(where)].float().item() for tensor in (found, trained))
    count = f"{int(differing.sum())} of {found.numel()} {what} differ"
    return f"{count}, first at {where}: stored {one:.9g}, trained {other:.9g}"


def _input_difference(layer: Layer, found: Tensor | None, trained: Tensor | None) -> str:
    """What differs between the stored and the trained input scale, in words; empty if nothing does."""
    if found is None or trained is None or bitwise_equal(found, trained.detach()):  # both None, since the layouts agree
        return ""
    name = layer.scheme.activations.scale_name  # type: ignore[union-attr]
    return f"{name} is {found.tolist()}, trained {trained.tolist()}"


def _fingerprint(quantized: Quantized) -> bytes:
    """Identifies a weight by its shape, its scales and its first row of codes: scales of a tensor may be shared."""
    parts = [quantized.scale.float().cpu().contiguous(), quantized.codes[:1].float().cpu().contiguous()]
    return hashlib.sha256(
        repr(tuple(quantized.codes.shape)).encode() + b"".join(part.numpy().tobytes() for part in parts)
    ).digest()


def _compare_config(
    model: Any, layers: Mapping[str, Layer], rows: Iterable[LayerAlignment], stored: Checkpoint
) -> dict[str, str]:
    """What ``config.json`` says otherwise than an export of this model would. Foreign ones have their own words."""
    problems = {}
    served = next(iter(layers.values())).scheme.weights.served_dtype
    declared = stored.config["quantization_config"]
    if "lockstep" in declared:
        found = {row.name: _declared(stored, row.name) for row in rows}
        odd = [name for name, scheme in found.items() if scheme not in (None, layers[name].scheme)]
        if not odd:
            expected = json.loads(json.dumps(quantization_config(model, stored.format)))
            for key in expected.keys() | declared.keys():
                if expected.get(key) != declared.get(key):
                    problems[f"config.json, quantization_config.{key}"] = (
                        f"{declared.get(key)}, trained {expected.get(key)}"
                    )
        elif not any(row.problem for row in rows if row.name in odd):  # else it is named layer by layer
            problems["config.json, quantization_config"] = (
                f"declares {found[odd[0]]} for {odd[0]}, trained {layers[odd[0]].scheme}"
            )
    dtype = stored.config.get("dtype", stored.config.get("torch_dtype"))
    if dtype not in (None, dtype_name(served)):
        problems["config.json, dtype"] = f"{dtype}, trained to be served in {dtype_name(served)}"
    if hasattr(model, "config") and hasattr(model.config, "to_dict"):
        trained = model.config.to_dict()
        found = type(model.config).from_json_file(stored.directory / "config.json").to_dict()
        found["model_type"] = stored.config.get("model_type")
        kinds = stored.config.get("architectures")
        if "lockstep" in stored.config["quantization_config"] and kinds != [type(model).__name__]:
            problems["config.json, architectures"] = f"{kinds}, trained {[type(model).__name__]}"
        for key in sorted(trained.keys() - _NOT_THE_MODEL):
            if trained[key] != found.get(key):
                problems[f"config.json, {key}"] = f"{found.get(key)}, trained {trained[key]}"
    return problems


def _declared(stored: Checkpoint, name: str) -> Scheme | None:
    """The stored scheme of a layer; None of one that cannot be read, which its row says."""
    try:
        return stored.scheme_of(name)
    except CheckpointError:
        return None


# Entries of a transformers config that do not change what the model computes.
_NOT_THE_MODEL = {
    *("quantization_config", "dtype", "torch_dtype", "architectures", "transformers_version", "_name_or_path"),
    *("use_cache", "output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id", "pad_token_id"),
}


def _compare_plain(
    model: nn.Module, layers: Mapping[str, Layer], stored: Checkpoint, device: torch.device
) -> dict[str, str]:
    """What is wrong with the tensors that are stored unquantized, by name."""
    quantized = quantized_layers(model)
    known, problems = set(model.state_dict()), {}
    for name, expected in served_plain(model, next(iter(layers.values())).scheme):
        known.add(name)
        if name not in stored.tensors:
            problems[name] = "is not in the checkpoint"
            continue
        found = stored.tensor(name).to(device)
        if found.dtype != expected.dtype or found.shape != expected.shape:
            problems[name] = (
                f"stored as {list(found.shape)} {found.dtype}, trained as {list(expected.shape)} {expected.dtype}"
            )
        elif not bitwise_equal(found, expected):
            differing = int((found != expected).sum())
            problems[name] = f"{differing} of {found.numel()} values differ from the trained ones"
    for name in stored.layers:
        if name not in quantized:
            plain = f"{name}.weight" in known
            problems[name] = "is stored quantized, and trained as it is" if plain else "is not in the model"
    for name in stored.plain_tensors():
        if name not in known:
            problems[name] = "is not in the model"
        if name.removesuffix(".weight") in quantized.keys() & {*stored.layers}:
            problems[name] = "is stored plain beside its packed words"
    for key, buffer in model.named_buffers():
        if key.endswith("inv_freq") and buffer.dtype != torch.float32:
            problems[key] = (
                f"rotary frequencies are {buffer.dtype} in training, engines compute them in float32: `.to(dtype)` "
                "on a whole model, or Lightning's bf16-true, rounded them"
            )
    return problems


def _usable_plain_tensors(
    model: nn.Module, layers: Mapping[str, Layer], stored: Checkpoint, device: torch.device
) -> dict[str, Tensor] | None:
    """The stored unquantized tensors that the model has, under the first of its names; None if one does not fit."""
    scheme, quantized = next(iter(layers.values())).scheme, quantized_keys(model)
    names, plain = {*stored.plain_tensors()}, {}
    for key, own in (*model.named_parameters(), *model.named_buffers()):
        pieces = hub.pieces(model, key, own.shape) if key not in quantized else {}
        if not pieces or not pieces.keys() <= names:
            continue
        whole = torch.empty_like(own, dtype=served_tensor(model, key, own, scheme).dtype)
        for name, piece in pieces.items():
            tensor, place = stored.tensor(name).to(device), whole[piece.where] if piece.where else whole
            if (tensor.shape, tensor.dtype) != (place.shape, place.dtype):
                return None
            scale = name.endswith(kv_cache.SCALES) and prepared_cache(model.get_submodule(key.rpartition(".")[0]))
            if scale and not (tensor.isfinite() & (tensor > 0)).all():  # which attention refuses
                return None
            place.copy_(tensor)
        plain[key] = whole
    return plain


Forward = Callable[[Tensor], Tensor]


def _run(kernel: Kernel, name: str, layer: Layer, weight: Quantized, scale: Tensor | None, input: Tensor) -> Tensor:
    """The true kernel on the stored words, with the stored input scale."""
    dtype = compute_dtype(input)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    try:
        return kernel.run(input.to(dtype), weight, layer.scheme, bias, scale)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _watch(row: LayerAlignment, layer: Layer, serve: Forward, input: Tensor) -> Tensor:
    """Compute as the layer does, and compare with the true kernel on the way."""
    fake = layer(input) if isinstance(layer, Expert) else QATLinear.forward(layer, input)
    _measure(row, layer, input, fake, serve(input))
    return fake


def _measure(row: LayerAlignment, layer: Layer, x: Tensor, fake: Tensor, true: Tensor) -> None:
    """Fold one call of a layer into its row: sizes are summed, shares averaged, extremes kept."""
    if not fake.numel():
        return
    seen, outputs = row.outputs, fake.numel()
    row.outputs += outputs
    share = outputs / row.outputs
    row.equal += ((fake == true).double().mean().item() - row.equal) * share
    row.max_ulps = max(row.max_ulps, int(metrics.ulps(fake, true).max()))
    differences = (row.difference, metrics.relative_error(true, fake))
    row.difference = math.nan if any(map(math.isnan, differences)) else max(differences)
    if seen == 0:
        x = x.to(compute_dtype(x)).reshape(-1, x.shape[-1])
        sample = torch.linspace(0, len(x) - 1, min(len(x), SAMPLED_ROWS), device=x.device).long()
        own, other = (y.reshape(-1, y.shape[-1])[sample] for y in (fake, true))
        truth = _float64(layer, x[sample])
        row.fake_error = metrics.relative_error(own, truth)
        row.true_error = metrics.relative_error(other, truth)
        if layer.scheme.activations is not None or layer.scheme.weights.scale_follows_gemm(layer.in_features):
            row.classic_equal = (_classic(layer, x[sample]) == other).double().mean().item()


def _float64(layer: Layer, x: Tensor) -> Tensor:
    """The layer's output for rows `x` in float64: on the trained codes and scales, and on the codes of its inputs."""
    spec, inputs = layer.scheme.weights, layer.scheme.activations
    quantized = layer.quantize()
    if inputs is not None:
        rows = _exact_inputs(activations.quantize(x, inputs, layer.stored_scale()))
        if spec.format == "int4" and inputs.format == "fp8_e4m3":  # what that kernel makes of it before its GEMM
            codes, scale, *_ = scaled_mm.fp8_from_int4(quantized)
            weight = codes.double() * scale.double()
        else:
            weight = _exact_weight(quantized, spec)
    else:  # weights that are rounded before the GEMM are what is served
        rows = x.double()
        exact = spec.scale_follows_gemm(layer.in_features)
        weight = _exact_weight(quantized, spec) if exact else grid.dequantize(quantized, spec).double()
    bias = 0 if layer.bias is None else layer.bias.to(x.dtype).double()
    return rows @ weight.T + bias


def _exact_weight(quantized: Quantized, spec: TensorSpec) -> Tensor:
    """``(code - zero point) * scale / global scale``, float64 ``[N, K]``."""
    codes, scale, zero_point, global_scale = quantized
    n, k = codes.shape
    height = {"tensor": n, "block": BLOCK}.get(spec.strategy, 1)
    width = BLOCK if spec.strategy == "block" else spec.group_size or k

    def spread(tiles: Tensor) -> Tensor:
        return tiles.double().repeat_interleave(height, 0)[:n].repeat_interleave(width, 1)[:, :k]

    weight = codes.double() if zero_point is None else codes.double() - spread(zero_point)
    weight = weight * spread(scale)
    return weight if global_scale is None else weight / global_scale.double()


def _exact_inputs(quantized: Quantized) -> Tensor:
    """``code * scale / global scale``, float64 ``[M, K]``."""
    codes, scale, _, global_scale = quantized
    rows = (codes.double().unflatten(-1, (scale.shape[-1], -1)) * scale.double().unsqueeze(-1)).flatten(-2)
    return rows if global_scale is None else rows / global_scale.double()


def _classic(layer: Layer, x: Tensor) -> Tensor:
    """The layer's output for rows `x` as fake quant usually is computed: ``F.linear`` of dequantized tensors."""
    spec, inputs = layer.scheme.weights, layer.scheme.activations
    if inputs is not None:
        x = activations.dequantize(activations.quantize(x, inputs, layer.stored_scale()), x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, grid.dequantize(layer.quantize(), spec).to(x.dtype), bias)


def _forwards(
    model: nn.Module, layers: Mapping[str, Layer], each: Mapping[str, Forward], own: bool = False
) -> dict[nn.Module, Callable[..., Tensor]]:
    """The forward of each module in which `each` layer runs as given. With `own`, experts run that way only to be
    watched, and their module gives what it computes itself, in whichever implementation."""
    forwards: dict[nn.Module, Callable[..., Tensor]] = {}
    mixtures: dict[nn.Module, dict[str, Forward]] = {}
    for name, layer in layers.items():
        if isinstance(layer, Expert):
            mixtures.setdefault(layer.module, {})[layer.leaf] = each.get(name, layer)
        elif name in each:
            forwards[layer] = each[name]
    return forwards | {module: partial(_run_experts, module, of, own) for module, of in mixtures.items()}  # type: ignore[arg-type]


def _run_experts(
    module: QATExperts, each: Mapping[str, Forward], own: bool, hidden: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    dtype = module.scheme.weights.served_dtype
    routing = [one.to(dtype) if one.is_floating_point() else one for one in (*args, *kwargs.values())]
    output = by_expert(module, hidden, *routing, linear=lambda expert, x: each[expert.leaf](x))
    return type(module).forward(module, hidden, *args, **kwargs) if own else output


def _logits(
    model: nn.Module,
    batch: Batch,
    forwards: Mapping[nn.Module, Callable[..., Tensor]],
    tensors: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The model's logits with some layers' forwards, and some parameters and buffers, replaced for this call."""
    # An instance may have a forward of its own by now, as accelerate's hooks set it.
    own = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else ((batch,), {})
        output = functional_call(model, dict(tensors or {}), args, kwargs)
    finally:
        for module, earlier in own.items():
            del module.forward
            if earlier is not None:
                setattr(module, "forward", earlier)  # noqa: B010
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model returned {type(output).__name__}: alignment needs logits or a tensor.")
    return logits


def _end_to_end(fake: Tensor, true: Tensor, batch: Batch) -> EndToEnd:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.shape == fake.shape[:-1]:
        own, other, tokens = fake[..., :-1, :], true[..., :-1, :], ids[..., 1:].long()
        mask = None if mask is None else (mask[..., :-1] & mask[..., 1:]).bool()
    else:
        own, other, tokens, mask = fake, true, fake.argmax(-1), None
    keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    if not keep.any():
        raise ValueError("no position to compare: the batch needs sequences of two unmasked tokens or more.")
    own, other, tokens = own[keep], other[keep], tokens[keep]
    logprobs, other_logprobs = metrics.token_logprobs(own, tokens), metrics.token_logprobs(other, tokens)
    difference = (logprobs - other_logprobs).abs()
    return EndToEnd(
        positions=tokens.numel(),
        max_logit_difference=(own.float() - other.float()).abs().max().item(),
        kl=metrics.kl_divergence(own, other).mean().item(),
        k3=metrics.k3(logprobs, other_logprobs).mean().item(),
        top1_agreement=(own.argmax(-1) == other.argmax(-1)).float().mean().item(),
        mean_logprob_difference=difference.mean().item(),
        max_logprob_difference=difference.max().item(),
    )


def _environment(device: torch.device, used: Iterable[Kernel]) -> dict[str, str]:
    import lockstep

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {
        "lockstep": lockstep.__version__,
        "torch": torch.__version__,
        "kernel from": ", ".join(dict.fromkeys(kernel.origin() or "unknown" for kernel in used)),
    }
    return versions | {"device": f"{device.type} ({name})"}
