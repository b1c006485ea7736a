"""`compare`: the model as it trains beside the checkpoint as it is served, layer by layer and end to end."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lockstep import grid, kernels
from lockstep.align import metrics
from lockstep.align.report import AlignmentReport, EndToEnd, LayerAlignment
from lockstep.export.checkpoint import Checkpoint, CheckpointError, bitwise_equal
from lockstep.export.save import quantization_config, served_state, served_tensor
from lockstep.grid import Quantized
from lockstep.kernels import Kernel
from lockstep.qat.linear import QATLinear, compute_dtype
from lockstep.qat.prepare import quantized_modules, unwrapped
from lockstep.scheme import Scheme, dtype_name

# Rows of a layer's input that are multiplied in float64: enough for an error norm, cheap beside the forward.
FLOAT64_ROWS = 256

Batch = Tensor | Mapping[str, Any]


@torch.no_grad()
def compare(model: nn.Module, checkpoint: str | Path, batch: Batch, kernel: str = "reference") -> AlignmentReport:
    """Compare `model` as it trains (fake quant) with `checkpoint` as a serving kernel computes it (true quant).

    For each quantized layer: is the stored weight bitwise the trained one, and on the inputs that the layer really saw
    in `batch`, how far is the true kernel's output from the layer's own? End to end: logits and log-probabilities of
    the model's own forward against one in which every quantized layer runs the true kernel on the stored words and
    every other tensor is the stored one.

    The model runs in eval mode as it is called here; masters wider than the served dtype run under autocast to it, as
    they train. Model and checkpoint are left as they were.

    Args:
        model: a prepared model (`lockstep.prepare`) holding the trained weights.
        checkpoint: the exported folder.
        batch: what the model is called with: a mapping (``model(**batch)``) or a tensor.
        kernel: name of the true kernel: ``"reference"``, ``"vllm-marlin"`` and more (`lockstep.kernels.KERNELS`).

    Raises:
        CheckpointError: the folder cannot be read, or belongs to another model.
        KernelUnavailable: the kernel cannot compute the scheme here.
        ValueError: the model is not prepared, a tensor is on ``meta``, or the batch reaches no quantized layer.
    """
    model = unwrapped(model)
    layers = dict(quantized_modules(model))
    if not layers:
        raise ValueError(f"no layer of this {type(model).__name__} is prepared: call lockstep.prepare first.")
    if meta := [name for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor) and tensor.is_meta]:
        raise ValueError(f"{meta[0]} is on the meta device: load weights into the model first.")
    first = next(iter(layers.values()))
    scheme, device = first.scheme, first.weight.device
    true_kernel = kernels.find("linear", kernel, scheme.weights, device)
    stored = Checkpoint(checkpoint)
    if not layers.keys() & {*stored.layers, *(name.removesuffix(".weight") for name in stored.tensors)}:
        raise CheckpointError(
            f"{checkpoint} holds another model: it has {stored.layers[0]}, the model has {next(iter(layers))}, and no "
            "layer is in both. Of a LightningModule, pass the model that it holds."
        )

    rows, quantized = _compare_weights(layers, stored, device)
    problems = _compare_config(model, scheme, stored) | _compare_plain(model, scheme, stored, device)
    ours = "lockstep" in stored.config["quantization_config"]
    if ours and stored.scheme != scheme and all(row.weight_equal for row in rows):  # else it is named layer by layer
        problems["config.json, quantization_config"] = f"declares {stored.scheme}, trained {scheme}"
    plain = _usable_plain_tensors(model, scheme, stored, device)
    serve = {name: partial(_run, true_kernel, name, layers[name], weight) for name, weight in quantized.items()}
    watch = {row.name: partial(_watch, row, layers[row.name], serve[row.name]) for row in rows if row.name in serve}
    true = None
    with _as_served(model, scheme):
        fake = _logits(model, batch, watch)
        if len(serve) == len(layers) and plain is not None:
            true = _logits(model, batch, serve, plain)
    if serve and not any(row.outputs for row in rows):
        raise ValueError("no quantized layer saw an input: the batch is empty, or the model does not call its layers.")

    return AlignmentReport(
        scheme=scheme,
        checkpoint=str(checkpoint),
        kernel=kernel,
        layers=rows,
        plain_problems=problems,
        end_to_end=None if true is None else _end_to_end(fake, true, batch),
        environment=_environment(device, true_kernel),
    )


def _compare_weights(
    layers: Mapping[str, QATLinear], stored: Checkpoint, device: torch.device
) -> tuple[list[LayerAlignment], dict[str, Quantized]]:
    """Each layer's stored weight against the trained one, and the stored weights that a kernel can run."""
    rows, readable, fingerprints = [], {}, {}
    for name, layer in layers.items():
        spec = layer.scheme.weights
        row = LayerAlignment(name, (layer.out_features, layer.in_features))
        rows.append(row)
        trained = grid.quantize(layer.weight, spec)
        fingerprints[_fingerprint(trained)] = name
        try:
            codes, scale = stored.layer(name)
        except CheckpointError as error:
            row.problem = str(error).removeprefix(f"{name}: ")
            continue
        found = Quantized(codes.to(device), scale.to(device))
        if found.codes.shape != trained.codes.shape:
            row.problem = f"stored weight is {list(found.codes.shape)}, trained {list(trained.codes.shape)}"
        elif found.scale.shape != trained.scale.shape:
            row.problem = f"stored with {stored.scheme}, trained with {layer.scheme}"
        else:
            readable[name] = found
            row.weight_equal = all(bitwise_equal(a, b) for a, b in zip(found, trained, strict=True))
            if not row.weight_equal:
                row.problem = _difference(found, trained)
    for row in rows:
        if not row.weight_equal and row.name in readable:
            owner = fingerprints.get(_fingerprint(readable[row.name]))
            if owner not in (None, row.name):
                row.problem = f"holds the weight of {owner}"
    return rows, readable


def _difference(found: Quantized, trained: Quantized) -> str:
    """What differs between two weights of one shape, in words."""
    codes, scales = found.codes != trained.codes, found.scale != trained.scale
    parts = []
    if codes.any():
        where = codes.nonzero()[0].tolist()
        n, k = where
        parts.append(
            f"{int(codes.sum())} of {codes.numel()} codes differ, first at {where}: "
            f"stored {found.codes[n, k].item()}, trained {trained.codes[n, k].item()}"
        )
    if found.scale.dtype != trained.scale.dtype:
        parts.append(f"scales are {found.scale.dtype}, trained {trained.scale.dtype}")
    if scales.any():
        parts.append(f"{int(scales.sum())} of {scales.numel()} scales differ")
    hint = "; the model has moved on since the export, or this is another model" if scales.float().mean() > 0.1 else ""
    return "; ".join(parts) + hint


def _fingerprint(quantized: Quantized) -> bytes:
    """Identifies a weight by its shape and scales."""
    scale = quantized.scale.float().cpu().contiguous()
    return hashlib.sha256(repr(tuple(quantized.codes.shape)).encode() + scale.numpy().tobytes()).digest()


def _compare_config(model: Any, scheme: Scheme, stored: Checkpoint) -> dict[str, str]:
    """What ``config.json`` says otherwise than an export of this model would. Foreign ones have their own words."""
    problems = {}
    declared = stored.config["quantization_config"]
    if "lockstep" in declared and stored.scheme == scheme:  # another scheme is named layer by layer
        expected = json.loads(json.dumps(quantization_config(model, stored.format)))
        for key in expected.keys() | declared.keys():
            if expected.get(key) != declared.get(key):
                problems[f"config.json, quantization_config.{key}"] = (
                    f"{declared.get(key)}, trained {expected.get(key)}"
                )
    dtype = stored.config.get("dtype", stored.config.get("torch_dtype"))
    if dtype not in (None, dtype_name(scheme.weights.served_dtype)):
        problems["config.json, dtype"] = f"{dtype}, trained to be served in {dtype_name(scheme.weights.served_dtype)}"
    if hasattr(model, "config") and hasattr(model.config, "to_dict"):
        trained = model.config.to_dict()
        found = type(model.config).from_dict(dict(stored.config)).to_dict()
        found["model_type"] = stored.config.get("model_type")
        for key in sorted(trained.keys() - _NOT_THE_MODEL):
            if trained[key] != found.get(key):
                problems[f"config.json, {key}"] = f"{found.get(key)}, trained {trained[key]}"
    return problems


# Entries of a transformers config that do not change what the model computes.
_NOT_THE_MODEL = {
    *("quantization_config", "dtype", "torch_dtype", "architectures", "transformers_version", "_name_or_path"),
    *("use_cache", "output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id", "pad_token_id"),
}


def _compare_plain(model: nn.Module, scheme: Scheme, stored: Checkpoint, device: torch.device) -> dict[str, str]:
    """What is wrong with the tensors that are stored unquantized, by name."""
    modules = model.named_modules(remove_duplicate=False)
    quantized = {name for name, module in modules if isinstance(module, QATLinear)}
    known = set(model.state_dict())
    problems = {name: "is not in the model" for name in stored.plain_tensors() if name not in known}
    problems |= {name: "is not in the model" for name in stored.layers if f"{name}.weight" not in known}
    for name in {*stored.layers} - quantized:
        if f"{name}.weight" in known:
            problems[name] = "is stored quantized, and trained as it is"
    for name in quantized & {*stored.layers}:
        if f"{name}.weight" in stored.tensors:
            problems[f"{name}.weight"] = "is stored plain beside its packed words"
    for key, tensor in served_state(model).items():
        if key.removesuffix(".weight") in quantized:
            continue
        if key not in stored.tensors:
            problems[key] = "is not in the checkpoint"
            continue
        expected, found = served_tensor(model, key, tensor, scheme), stored.tensor(key).to(device)
        if found.dtype != expected.dtype or found.shape != expected.shape:
            problems[key] = (
                f"stored as {list(found.shape)} {found.dtype}, trained as {list(expected.shape)} {expected.dtype}"
            )
        elif not bitwise_equal(found, expected):
            differing = int((found != expected).sum())
            problems[key] = f"{differing} of {found.numel()} values differ from the trained ones"
    for key, buffer in model.named_buffers():
        if key.endswith("inv_freq") and buffer.dtype != torch.float32:
            problems[key] = (
                f"rotary frequencies are {buffer.dtype} in training, engines compute them in float32: `.to(dtype)` "
                "on a whole model, or Lightning's bf16-true, rounded them"
            )
    return problems


def _usable_plain_tensors(
    model: nn.Module, scheme: Scheme, stored: Checkpoint, device: torch.device
) -> dict[str, Tensor] | None:
    """The stored unquantized tensors that the model has, under the first of its names; None if one does not fit."""
    own = dict((*model.named_parameters(), *model.named_buffers()))
    plain = {name: stored.tensor(name).to(device) for name in stored.plain_tensors() if name in own}
    for name, tensor in plain.items():
        if (tensor.shape, tensor.dtype) != (own[name].shape, served_tensor(model, name, own[name], scheme).dtype):
            return None
    return plain


Forward = Callable[[Tensor], Tensor]


def _run(kernel: Kernel, name: str, layer: QATLinear, stored: Quantized, input: Tensor) -> Tensor:
    """The true kernel on the stored words."""
    dtype = compute_dtype(input)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    try:
        return kernel.run(input.to(dtype), stored, layer.scheme.weights, bias)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _watch(row: LayerAlignment, layer: QATLinear, serve: Forward, input: Tensor) -> Tensor:
    """Compute as the layer does, and compare with the true kernel on the way."""
    fake = QATLinear.forward(layer, input)
    _measure(row, layer, input, fake, serve(input))
    return fake


def _measure(row: LayerAlignment, layer: QATLinear, x: Tensor, fake: Tensor, true: Tensor) -> None:
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
        sample, truth = _float64(layer, x)
        row.fake_error = metrics.relative_error(fake.reshape(-1, fake.shape[-1])[sample], truth)
        row.true_error = metrics.relative_error(true.reshape(-1, true.shape[-1])[sample], truth)


def _float64(layer: QATLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of some rows of `x`, and the layer's output for them in float64 on the trained weights."""
    spec = layer.scheme.weights
    quantized = grid.quantize(layer.weight, spec)
    if spec.scale_follows_gemm(layer.in_features):
        weight = quantized.codes.double() * quantized.scale.double()
    else:
        weight = grid.dequantize(quantized, spec).double()
    rows = x.to(compute_dtype(x)).reshape(-1, x.shape[-1])
    sample = torch.linspace(0, len(rows) - 1, min(len(rows), FLOAT64_ROWS), device=x.device).long()
    bias = 0 if layer.bias is None else layer.bias.to(compute_dtype(x)).double()
    return sample, rows[sample].double() @ weight.T + bias


@contextmanager
def _as_served(model: nn.Module, scheme: Scheme) -> Iterator[None]:
    """Eval mode, and autocast to the served dtype for wider masters, unless the caller has an autocast of their own."""
    parameter = next(model.parameters())
    device_type, served = parameter.device.type, scheme.weights.served_dtype
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with ExitStack() as stack:
            wider = parameter.dtype == torch.float32 and served != torch.float32
            if wider and not torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, served))
            yield
    finally:
        for module, training in was_training.items():
            module.training = training


def _logits(
    model: nn.Module, batch: Batch, forwards: Mapping[str, Forward], tensors: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The model's logits with some layers' forwards, and some parameters and buffers, replaced for this call."""
    layers = {name: model.get_submodule(name) for name in forwards}
    # An instance may have a forward of its own by now, as accelerate's hooks set it.
    own = {name: vars(layer).get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.forward = forwards[name]
    try:
        args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else ((batch,), {})
        output = functional_call(model, dict(tensors or {}), args, kwargs)
    finally:
        for name, layer in layers.items():
            del layer.forward
            if own[name] is not None:
                setattr(layer, "forward", own[name])  # noqa: B010
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


def _environment(device: torch.device, kernel: Kernel) -> dict[str, str]:
    import lockstep

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {
        "lockstep": lockstep.__version__,
        "torch": torch.__version__,
        "kernel from": kernel.origin() or "unknown",
    }
    return versions | {"device": f"{device.type} ({name})"}
