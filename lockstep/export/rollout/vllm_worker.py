"""What `VLLMEngine` runs inside vLLM's worker: begin, load, end or abort an update, and show what really computes.

vLLM adds `WeightReceiver` to its own worker class (``worker_extension_cls``), so that a call over its RPC is a method's
name and plain data. `vllm_reload` has what vLLM's reload of a checkpoint needs around it, `vllm_layers` what is live.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lockstep.export.rollout.engine import checksum
from lockstep.export.rollout.vllm_layers import (
    MARLIN,
    Part,
    Unreadable,
    by_module,
    checkpoint_name,
    facts,
    kernel_of,
    parts,
    stored,
)
from lockstep.export.rollout.vllm_reload import (
    Update,
    count,
    counting,
    experts_to_pack,
    is_attention,
    keep_what_is_pointed_to,
    modules_of,
    not_whole,
    own_what_waits,
    reload,
    tied_to_loaded,
    without_its_warnings,
)
from lockstep.layouts import marlin
from lockstep.scheme import dtype_name

Wire = tuple[str, list[int], bytes]  # dtype, shape and bits of a tensor: plain data, nothing is pickled

SHOWN = 8  # names in an error


def to_wire(tensor: Tensor) -> Wire:
    """`tensor` as plain data."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return dtype_name(tensor.dtype), list(tensor.shape), flat.numpy().tobytes()


def from_wire(wire: Sequence[Any]) -> Tensor:
    """The tensor that `to_wire` took apart, on the CPU."""
    name, shape, data = wire
    dtype = getattr(torch, name)
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(shape)


class WeightReceiver:
    """Methods for vLLM's worker: ``LLM(..., worker_extension_cls=lockstep.export.rollout.vllm.WORKER)``.

    `self` is the worker. Their results are plain data. `VLLMEngine` is their only caller.
    """

    lockstep_update: Update | None = None

    def lockstep_begin(self: Any, whole: bool, format: str | None, transfer: bool) -> None:
        """Get ready to take weights. `whole`: everything must come. `transfer`: by vLLM's weight transfer."""
        if getattr(self, "lockstep_update", None) is not None:
            raise RuntimeError("an update is already on its way: end it or abort it first.")
        model, update = self.get_model(), Update(whole, format)
        self.lockstep_update = update
        # Every way in passes here, vLLM's weight transfer too.
        model.load_weights = counting(model.load_weights, update)
        try:
            if transfer:
                self.start_weight_update()
            elif format != "marlin":
                reload().initialize_layerwise_reload(model)
            for part in parts(model).values():
                keep_what_is_pointed_to(kernel_of(part.layer))
        except BaseException:
            _close(self)
            raise

    def lockstep_load(self: Any, tensors: Mapping[str, Tensor] | Sequence[Sequence[Any]]) -> dict[str, int]:
        """Load one bucket. Returns the checksums of what came."""
        update = _update(self)
        update.bucket = {}
        named = dict(tensors) if isinstance(tensors, Mapping) else {name: from_wire(wire) for name, *wire in tensors}
        with _context(self):
            if update.format == "marlin":
                _load_marlin(self.get_model(), named, update)
            else:
                self.get_model().load_weights((name, tensor.to(self.device)) for name, tensor in named.items())
                own_what_waits(self.get_model())
        return update.bucket

    def lockstep_received(self: Any) -> dict[str, int]:
        """The checksums of what came since the last call, by another way than `lockstep_load`."""
        update = _update(self)
        bucket, update.bucket = update.bucket, {}
        return bucket

    def lockstep_end(self: Any, transfer: bool) -> None:
        """Put what came into effect. RuntimeError, and nothing is, if it is not whole."""
        model, update = self.get_model(), _update(self)
        problems = (_not_whole_marlin if update.format == "marlin" else not_whole)(model, update)
        if problems:
            more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise RuntimeError(f"the update is not whole: {'; '.join(problems[:SHOWN])}{more}")
        layerwise = update.format != "marlin"
        tied, unpacked = (tied_to_loaded(model), experts_to_pack(model)) if layerwise else ([], [])
        with _context(self), without_its_warnings():
            if transfer:
                self.finish_weight_update()
            elif layerwise:
                reload().finalize_layerwise_reload(model, self.vllm_config.model_config)
            for module in tied:
                module.quant_method.process_weights_after_loading(module)
            for module in unpacked:
                module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)
            for reset in ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache"):
                getattr(self.model_runner, reset, lambda: None)()
        _close(self)

    def lockstep_abort(self: Any, transfer: bool) -> bool:
        """Put the kernels' tensors back in place. Returns whether the old weights are whole: nothing had come."""
        update = getattr(self, "lockstep_update", None)
        if update is None:
            return False
        model, layerwise = self.get_model(), reload().layerwise
        with _context(self), without_its_warnings():
            if update.format != "marlin":
                for module in model.modules():
                    info = layerwise.get_layerwise_info(module)
                    # Else vLLM would load once more what it failed to load.
                    info.load_numel, info.loaded_weights = 0, []
                reload().finalize_layerwise_reload(model, self.vllm_config.model_config)
            if transfer and getattr(self, "_weight_update_active", False):
                self.finish_weight_update()
        _close(self)
        return not update.received

    def lockstep_live_layers(self: Any) -> dict[str, dict[str, Any]]:
        """For each linear layer of the checkpoint its module, rows and `facts`, and whether it is one of experts."""
        return {
            name: {"module": part.module, "rows": [part.start, part.stop], "stacked": bool(part.tensor)}
            | facts(part.layer)
            for name, part in parts(self.get_model()).items()
        }

    def lockstep_probe(self: Any, name: str, x: Any) -> Wire:
        """What the live layer makes of `x`, without its bias."""
        part = parts(self.get_model())[name]
        own = part.layer
        given = x if isinstance(x, Tensor) else from_wire(x)
        inputs = given.to(self.device, getattr(own, "params_dtype", given.dtype))
        if not torch.equal(inputs.to(given), given):
            raise ValueError(f"{name} computes in {dtype_name(inputs.dtype)}, which does not hold this input exactly.")
        with _context(self), torch.inference_mode():
            return to_wire(own.quant_method.apply(own, inputs, None)[..., part.start : part.stop])

    def lockstep_checksums(self: Any, format: str | None) -> dict[str, int] | None:
        """Of all tensors, read back from where the kernels have them, by their names in that format; None: cannot."""
        with _context(self), torch.inference_mode():
            try:
                return {name: checksum(tensor) for name, tensor in stored(self.get_model(), format)}
            except Unreadable:
                return None


def _update(worker: Any) -> Update:
    update = getattr(worker, "lockstep_update", None)
    if update is None:
        raise RuntimeError("no update is on its way: begin one first.")
    return update


def _close(worker: Any) -> None:
    worker.lockstep_update = None
    vars(worker.get_model()).pop("load_weights", None)


@contextmanager
def _context(worker: Any) -> Iterator[None]:
    """As vLLM has it while it loads a model: kernels ask for the config, and for torch's default dtype."""
    from vllm.config import set_current_vllm_config

    before = torch.get_default_dtype()
    torch.set_default_dtype(worker.vllm_config.model_config.dtype)
    try:
        with set_current_vllm_config(worker.vllm_config), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


# Kernel-format tensors -----------------------------------------------------------------------------------------------


def fuse_marlin(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The Marlin words of layers that run as one, in their order: q, k, v or gate, up.

    Words ``B`` int32 ``[K/16, N * bits / 2]``, scales ``s`` ``[G, N]``, zero points ``z``: outputs lie along the last
    axis in tiles of 64, which no layer shares with the next, so they stand side by side.
    """
    return {suffix: torch.cat([layer[suffix] for layer in layers], -1) for suffix in layers[0]}


def marlin_bias(bias: Tensor) -> Tensor:
    """A bias ``[N]`` in the order in which the kernel reads it, that of channel-wise scales."""
    return marlin.pack_scales(bias[:, None])[0]


def _load_marlin(model: Any, tensors: Mapping[str, Tensor], update: Update) -> None:
    """Copy kernel-format tensors into the live ones; the rest goes the way of a checkpoint's plain tensors.

    All is checked before the first is copied.
    """
    left = dict(tensors)
    copies = [*_of_linears(model, left), *_of_experts(model, left)]
    for target, tensor, name in copies:
        if target.shape != tensor.shape or target.dtype != tensor.dtype:
            raise ValueError(
                f"{name}: live {dtype_name(target.dtype)} {list(target.shape)}, came {dtype_name(tensor.dtype)} "
                f"{list(tensor.shape)}. Kernel-format tensors must lie as vLLM has them: send the checkpoint's format."
            )
    for name in tensors.keys() - left.keys():
        count(name, tensors[name], update)
    for target, tensor, _ in copies:
        target.data.copy_(tensor)
    model.load_weights(left.items())


def _of_linears(model: Any, left: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Live tensor, what it gets and its name, for each fused linear layer. Takes what it uses out of `left`."""
    live = parts(model)
    for module, names in by_module(live).items():
        came = [name for name in names if f"{name}.B" in left]
        bias = [name for name in names if f"{name}.bias" in left]
        layer = live[names[0]].layer
        kernel = kernel_of(layer)
        quantized = type(kernel).__name__ == MARLIN
        for some in (came, bias if quantized else []):
            if some and some != names:
                missing = ", ".join(name for name in names if name not in some)
                raise ValueError(f"{module} runs {', '.join(names)} as one: in this bucket {missing} is missing.")
        if came:
            if not quantized:
                raise ValueError(f"{names[0]} came as Marlin words; live runs {facts(layer)['kernel']} ({module}).")
            suffixes = [suffix for suffix in ("B", "s", "z") if f"{names[0]}.{suffix}" in left]
            fused = fuse_marlin([{suffix: left.pop(f"{name}.{suffix}") for suffix in suffixes} for name in names])
            targets = {"B": kernel.w_q_name, "s": kernel.w_s_name, "z": kernel.w_zp_name}
            for suffix, tensor in fused.items():
                yield getattr(layer, targets[suffix]), tensor, f"{module}.{targets[suffix]}"
        if bias and quantized:
            yield layer.bias, marlin_bias(torch.cat([left.pop(f"{name}.bias") for name in names])), f"{module}.bias"


def _of_experts(model: Any, left: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, str]]:
    """The same for stacked experts."""
    holders = {_stack(model, part): part.layer for part in parts(model).values() if part.tensor}
    for name in [name for name in left if name.endswith(("_weight_packed", "_weight_scale"))]:
        owner, _, leaf = name.rpartition(".")
        if owner not in holders:
            raise ValueError(f"{name}: the live model has no such experts.")
        yield getattr(holders[owner], leaf), left.pop(name), name


def _not_whole_marlin(model: Any, update: Update) -> list[str]:
    """What did not come of an update that must be whole, in words.

    Of a module that fuses layers `_load_marlin` takes all or none, so a partial update needs no look.
    """
    if not update.whole:
        return []
    live, owners = parts(model), modules_of(update)
    missing = [name for name, part in live.items() if name not in owners and not _expert_came(model, part, update)]
    layers = {id(part.layer) for part in live.values()}
    tensors = {id(tensor) for part in live.values() for tensor in part.layer.parameters(recurse=False)}
    for name, module in model.named_modules():
        own = any(id(one) not in tensors for one in module.parameters(recurse=False))
        name_stored = checkpoint_name(model, name)
        if own and id(module) not in layers and not is_attention(module) and name_stored not in owners:
            missing.append(name_stored)
    return [f"{name} did not come" for name in missing]


def _expert_came(model: Any, part: Part, update: Update) -> bool:
    return bool(part.tensor) and f"{_stack(model, part)}.{part.tensor}weight_packed" in update.received


def _stack(model: Any, part: Part) -> str:
    """What the checkpoint calls the module of the experts `part`."""
    return checkpoint_name(model, part.module.rpartition(".")[0])
