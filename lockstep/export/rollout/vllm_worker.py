"""What `VLLMEngine` runs inside vLLM's worker: take weights, count them, and show what really computes.

vLLM adds `WeightReceiver` to its own worker class (``worker_extension_cls``), so that a call over its RPC is a method's
name and plain data. Read against vLLM 0.32: `initialize_layerwise_reload` puts the parameters of a checkpoint in place
of the kernel's, on ``meta``; when as many elements have come as a module has, the module is loaded, repacked and copied
into the kernel's own memory; `finalize_layerwise_reload` gives modules that got nothing their kernel tensors back, and
repacks partly loaded ones **with uninitialised memory** for the rest. It checks no names. So they are counted here,
and an update that is not whole is refused before it is finalized.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lockstep.export.rollout.engine import checksum
from lockstep.layouts import marlin, words
from lockstep.scheme import dtype_name

Wire = tuple[str, list[int], bytes]  # dtype, shape and bits of a tensor: plain data, nothing is pickled

MARLIN = "MarlinLinearKernel"
CPU_INT4 = "CPUWNA16LinearKernel"
SHOWN = 8  # names in an error
EXPERTS = "RoutedExperts"  # vLLM's module of the experts of a block
IDENTITY = 256  # rows of it at a time


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


class Unreadable(Exception):
    """A layer's stored tensors cannot be made from what its kernel reads."""


class Part(NamedTuple):
    """A linear layer of the checkpoint in the module that runs it, perhaps with others: ``outputs[start:stop]``."""

    module: str
    layer: Any
    start: int
    stop: int
    tensor: str = ""  # of experts: which of the two stacked weights, "w13_" or "w2_"


@dataclass
class Update:
    """An update on its way: the checksums of what came, by name, and of the last bucket apart."""

    whole: bool
    format: str | None
    received: dict[str, int] = field(default_factory=dict)
    bucket: dict[str, int] = field(default_factory=dict)


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
        model.load_weights = _counting(model.load_weights, update)
        try:
            if transfer:
                self.start_weight_update()
            elif format != "marlin":
                _reload().initialize_layerwise_reload(model)
            for part in parts(model).values():
                _keep_what_is_pointed_to(kernel_of(part.layer))
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
                _own_what_waits(self.get_model())
        return update.bucket

    def lockstep_received(self: Any) -> dict[str, int]:
        """The checksums of what came since the last call, by another way than `lockstep_load`."""
        update = _update(self)
        bucket, update.bucket = update.bucket, {}
        return bucket

    def lockstep_end(self: Any, transfer: bool) -> None:
        """Put what came into effect. RuntimeError, and nothing is, if it is not whole."""
        model, update = self.get_model(), _update(self)
        problems = (_not_whole_marlin if update.format == "marlin" else _not_whole)(model, update)
        if problems:
            more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise RuntimeError(f"the update is not whole: {'; '.join(problems[:SHOWN])}{more}")
        layerwise = update.format != "marlin"
        tied, unpacked = (_tied_to_loaded(model), _experts_to_pack(model)) if layerwise else ([], [])
        with _context(self), _no_warnings_of_what_was_kept():
            if transfer:
                self.finish_weight_update()
            elif layerwise:
                _reload().finalize_layerwise_reload(model, self.vllm_config.model_config)
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
        model, reload = self.get_model(), _reload()
        with _context(self), _no_warnings_of_what_was_kept():
            if update.format != "marlin":
                for module in model.modules():
                    info = reload.layerwise.get_layerwise_info(module)
                    # Else vLLM would load once more what it failed to load.
                    info.load_numel, info.loaded_weights = 0, []
                reload.finalize_layerwise_reload(model, self.vllm_config.model_config)
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


def parts(model: Any) -> dict[str, Part]:
    """Each linear layer of the checkpoint, experts too, by its name there, in the live model."""
    linear, head = _linear_classes()
    fused = getattr(model, "packed_modules_mapping", {})
    found: dict[str, Part] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, linear):
            sizes, names = list(module.output_partition_sizes), list(fused.get(leaf, [leaf]))
            if len(names) != len(sizes):
                sizes, names = [sum(sizes)], [leaf]
            start = 0
            for one, size in zip(names, sizes, strict=True):
                whole = checkpoint_name(model, f"{parent}.{one}" if parent else one)
                found[whole] = Part(name, module, start, start + size)
                start += size
        elif isinstance(module, head) and id(getattr(module, "weight", None)) not in seen:
            found[checkpoint_name(model, name)] = Part(name, module, 0, module.org_vocab_size)
        elif type(module).__name__ == EXPERTS:
            found |= _experts(name, checkpoint_name(model, parent), module)
        seen |= {id(parameter) for parameter in module.parameters(recurse=False)}
    return found


def _experts(name: str, stored: str, module: Any) -> dict[str, Part]:
    """The projections of the experts that `module` runs as one: gate rows above up rows in w13, down in w2."""
    inner, outer = module.intermediate_size_per_partition, module.hidden_size
    gate, up, down = module.ckpt_gate_proj_name, module.ckpt_up_proj_name, module.ckpt_down_proj_name
    found = {}
    for number in range(module.moe_config.num_experts):
        found[f"{stored}.{number}.{gate}"] = Part(name, module, 0, inner, "w13_")
        if up is not None:
            found[f"{stored}.{number}.{up}"] = Part(name, module, inner, 2 * inner, "w13_")
        found[f"{stored}.{number}.{down}"] = Part(name, module, 0, outer, "w2_")
    return found


def checkpoint_name(model: Any, name: str) -> str:
    """The name in the checkpoint of what vLLM calls `name`: its mapping of prefixes, backwards."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    prefixes = {new: old for old, new in getattr(mapper, "orig_to_new_prefix", {}).items() if new is not None}
    for new in sorted(prefixes, key=len, reverse=True):
        if name.startswith(new):
            return prefixes[new] + name.removeprefix(new)
    return name


def kernel_of(layer: Any) -> Any:
    """The object that multiplies: vLLM keeps one in the layer's scheme or method, or the method does it itself."""
    owner = getattr(layer, "scheme", None) or layer.quant_method
    found = (value for value in vars(owner).values() if type(value).__name__.endswith("Kernel"))
    return next(found, owner)


def facts(layer: Any) -> dict[str, Any]:
    """What the live objects say a layer computes.

    ``weights`` (format, strategy, group size, symmetric) and ``inputs`` (format, strategy, group size, dynamic) are as
    in `Scheme.layout`, or None where they are not quantized; ``unknown`` says in words what is not known here.
    """
    kernel, scheme = kernel_of(layer), cast(Any, getattr(layer, "scheme", None))
    method = type(scheme or layer.quant_method).__name__
    known: dict[str, Any] = {
        "kernel": type(kernel).__name__,
        "dtype": dtype_name(getattr(layer, "params_dtype", None) or next(layer.parameters()).dtype),
        "weights": None,
        "inputs": None,
        "unknown": None,
    }
    config, experts = cast(Any, getattr(kernel, "config", None)), type(layer).__name__ == EXPERTS
    if method.startswith("Unquantized"):
        return known
    if hasattr(config, "weight_type") and hasattr(config, "group_size"):  # vLLM's MPLinearLayerConfig
        bits, group = config.weight_type.size_bits, config.group_size
        grouping = ("group", group) if group > 0 else ("channel", None)
        known["weights"] = [f"int{bits}", *grouping, not config.zero_points]
        if getattr(layer, "use_w4a8", False) or config.act_type.itemsize == 1:
            known["unknown"] = f"int{bits} weights with 8-bit inputs, which {known['kernel']} quantizes on its own"
    elif experts and hasattr(layer.quant_method, "num_bits"):
        own = layer.quant_method
        grouping = ("group", own.group_size) if own.group_size > 0 else ("channel", None)
        known["weights"] = [f"int{own.num_bits}", *grouping, bool(own.symmetric)]
        known["kernel"] = MARLIN if getattr(own, "is_marlin", False) else _text(getattr(own, "wna16_backend", method))
        if getattr(own.input_dtype, "itemsize", 2) == 1:
            known["unknown"] = f"int{own.num_bits} weights of experts with 8-bit inputs"
    elif method == "CompressedTensorsW8A8Int8":
        known["weights"] = ["int8", _text(scheme.strategy), None, True]
        known["inputs"] = ["int8", "tensor", None, False] if scheme.is_static_input_scheme else _by_token("int8")
        if not scheme.input_symmetric:
            known["unknown"] = "int8 with asymmetric inputs"
    elif method == "CompressedTensorsW8A8Fp8":
        known["weights"] = ["fp8_e4m3", _text(scheme.strategy), None, True]
        known["inputs"] = (
            ["fp8_e4m3", "tensor", None, False] if scheme.is_static_input_scheme else _by_token("fp8_e4m3")
        )
        if known["weights"][1] == "block":
            known["inputs"] = ["fp8_e4m3", "group", 128, True]
    else:
        known["unknown"] = f"{method} of vLLM"
    return known


def _by_token(format: str) -> list[Any]:
    return [format, "token", None, True]


def _text(strategy: Any) -> str:
    return str(getattr(strategy, "value", strategy))


def stored(model: Any, format: str | None) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors, made again from what the kernels read. Unreadable where that is not known."""
    live, linear, seen = parts(model), {id(part.layer) for part in parts(model).values()}, set()
    for name, part in live.items():
        if part.tensor:
            raise Unreadable(part.module)
        for suffix, tensor in _unpacked(part, format).items():
            yield f"{name}.{suffix}", tensor
        bias = getattr(part.layer, "bias", None)
        if isinstance(bias, Tensor):
            if type(kernel_of(part.layer)).__name__ == MARLIN:
                bias = marlin.unpack_scales(bias.detach()[None])[:, 0]
            yield f"{name}.bias", bias.detach()[part.start : part.stop]
    for name, module in model.named_modules():
        rows = getattr(module, "org_vocab_size", None)
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(module) not in linear and id(parameter) not in seen:
                yield (
                    checkpoint_name(model, f"{name}.{leaf}"),
                    parameter.detach()[:rows] if rows else parameter.detach(),
                )
            seen.add(id(parameter))


def _unpacked(part: Part, format: str | None) -> dict[str, Tensor]:
    """The stored tensors of one layer by suffix: Marlin's, or else those of ``pack-quantized``."""
    layer, kernel, known = part.layer, kernel_of(part.layer), facts(part.layer)
    if known["unknown"] or known["inputs"]:
        raise Unreadable(part.module)
    if known["weights"] is None:
        return {"weight": _plain(part)}
    number, _, _, symmetric = known["weights"]
    if known["kernel"] not in (MARLIN, CPU_INT4) or kernel.w_q_name != "weight_packed" or not symmetric:
        raise Unreadable(part.module)
    bits, rows = 4 if number == "int4" else 8, slice(part.start, part.stop)
    packed, scale = (getattr(layer, name).detach() for name in (kernel.w_q_name, kernel.w_s_name))
    if format == "marlin":
        columns = slice(part.start * bits // 2, part.stop * bits // 2)
        return {"B": packed[:, columns].contiguous(), "s": scale[:, rows].contiguous()}
    if known["kernel"] == MARLIN:
        codes, scales = marlin.unpack_weight(packed, bits)[rows], marlin.unpack_scales(scale)[rows]
    else:
        codes, scales = _cpu_codes(packed)[rows], scale.mT[rows].contiguous()
    return {
        "weight_packed": words.pack(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),  # vLLM keeps none
    }


def _plain(part: Part) -> Tensor:
    """An unquantized weight ``[N, K]``; through its kernel, by an identity, where a library has packed it."""
    weight = part.layer.weight.detach()
    if weight.dim() == 2 and weight.shape[0] >= part.stop:
        return weight[part.start : part.stop]
    size, found = part.layer.input_size, []
    for start in range(0, size, IDENTITY):
        some = torch.eye(size, dtype=part.layer.params_dtype, device=weight.device)[start : start + IDENTITY]
        found.append(part.layer.quant_method.apply(part.layer, some, None)[:, part.start : part.stop])
    whole = torch.cat(found).mT.contiguous()
    if (whole == 0).any():
        raise Unreadable(part.module)  # a product does not tell 0.0 from -0.0
    return whole


def _cpu_codes(packed: Tensor) -> Tensor:
    """Codes ``[N, K]`` from the words of vLLM's CPU kernel: int32 ``[N/16, 2K]``, 16 outputs of an input in two."""
    blocks = words.unpack(packed.reshape(packed.shape[0], -1, 2), 4)  # [N/16, K, 16]
    return blocks.transpose(1, 2).reshape(-1, blocks.shape[1]).contiguous()


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
    live, left = parts(model), dict(tensors)
    of: dict[str, list[str]] = {}
    for name, part in live.items():
        of.setdefault(part.module, []).append(name)
    copies: list[tuple[Any, Tensor, str]] = []
    for module, names in of.items():
        came = [name for name in names if f"{name}.B" in left]
        bias = [name for name in names if f"{name}.bias" in left]
        layer = live[names[0]].layer
        quantized = type(kernel_of(layer)).__name__ == MARLIN
        for some in (came, bias if quantized else []):
            if some and some != names:
                missing = ", ".join(name for name in names if name not in some)
                raise ValueError(f"{module} runs {', '.join(names)} as one: in this bucket {missing} is missing.")
        if came:
            if not quantized:
                raise ValueError(f"{names[0]} came as Marlin words; live runs {facts(layer)['kernel']} ({module}).")
            suffixes = [suffix for suffix in ("B", "s", "z") if f"{names[0]}.{suffix}" in left]
            fused = fuse_marlin([{suffix: left.pop(f"{name}.{suffix}") for suffix in suffixes} for name in names])
            kernel = kernel_of(layer)
            targets = {"B": kernel.w_q_name, "s": kernel.w_s_name, "z": kernel.w_zp_name}
            copies += [
                (getattr(layer, targets[key]), tensor, f"{module}.{targets[key]}") for key, tensor in fused.items()
            ]
        if bias and quantized:
            whole = marlin_bias(torch.cat([left.pop(f"{name}.bias") for name in names]))
            copies.append((layer.bias, whole, f"{module}.bias"))
    for name in [name for name in left if name.endswith(("_weight_packed", "_weight_scale"))]:  # stacked experts
        owner, _, leaf = name.rpartition(".")
        holder = next((part.layer for part in live.values() if part.tensor and _stack(model, part) == owner), None)
        if holder is None:
            raise ValueError(f"{name}: the live model has no such experts.")
        copies.append((getattr(holder, leaf), left.pop(name), name))
    for target, tensor, name in copies:
        if target.shape != tensor.shape or target.dtype != tensor.dtype:
            raise ValueError(
                f"{name}: live {dtype_name(target.dtype)} {list(target.shape)}, came {dtype_name(tensor.dtype)} "
                f"{list(tensor.shape)}. Kernel-format tensors must lie as vLLM has them: send the checkpoint's format."
            )
    for name in tensors:
        if name not in left:
            _count(name, tensors[name], update)
    for target, tensor, _ in copies:
        target.data.copy_(tensor)
    model.load_weights(left.items())


def _counting(load: Any, update: Update) -> Any:
    """`model.load_weights` with each tensor's checksum written down as it passes."""

    def load_weights(weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        last = "nothing yet"

        def passing() -> Iterator[tuple[str, Tensor]]:
            nonlocal last
            for name, tensor in weights:
                last = f"{name} ({dtype_name(tensor.dtype)} {list(tensor.shape)})"
                _count(name, tensor, update)
                yield name, tensor

        try:
            return load(passing(), *args, **kwargs)
        except Exception as error:  # vLLM's own often names no tensor
            raise RuntimeError(f"vLLM did not take {last}: {type(error).__name__}: {error}") from error

    return load_weights


def _count(name: str, tensor: Tensor, update: Update) -> None:
    if name in update.received:
        # Would be counted as elements of another tensor that did not come.
        raise ValueError(f"{name} came twice in one update.")
    update.received[name] = update.bucket[name] = checksum(tensor)


def _keep_what_is_pointed_to(kernel: Any) -> None:
    """oneDNN's handler points to the scales that it was made with; vLLM copies them elsewhere and lets them go."""
    if not hasattr(kernel, "dnnl_handler") or "process_weights_after_loading" in vars(kernel):
        return
    process = kernel.process_weights_after_loading

    def process_and_keep(layer: Any) -> None:
        process(layer)
        kernel.lockstep_kept = [*layer.parameters(recurse=False)]

    kernel.process_weights_after_loading = process_and_keep


def _own_what_waits(model: nn.Module) -> None:
    """Copy what waits for the rest of its module: the sender may use its buffer again."""
    for module in model.modules():
        for _, arguments in _reload().layerwise.get_layerwise_info(module).loaded_weights:
            for key, value in arguments.arguments.items():
                if isinstance(value, Tensor) and not value.is_meta and key != "param" and not hasattr(value, "_owned"):
                    copy = value.clone()
                    copy._owned = True  # type: ignore[attr-defined]
                    arguments.arguments[key] = copy


def _not_whole(model: Any, update: Update) -> list[str]:
    """What is missing, in words: of modules of which a part came, and of all if the update must be whole."""
    live = parts(model)
    owners = _owners(update)
    of: dict[str, list[str]] = {}
    for name, part in live.items():
        of.setdefault(part.module, []).append(name)
    info_of = _reload().layerwise.get_layerwise_info
    came = {
        id(tensor)
        for module in model.modules()
        if _came(info_of(module))
        for tensor in _kernel_tensors(module, info_of)
    }
    problems: list[str] = []
    for name, module in model.named_modules():
        info = info_of(module)
        restored = info.restore_metadata[0]
        if not restored or _is_attention(module):
            continue
        names = of.get(name, [checkpoint_name(model, name)])
        short = info.can_load() and info.load_numel < info.load_numel_total
        if not _came(info):
            tied = all(id(tensor) in came for tensor in _kernel_tensors(module, info_of))
            if update.whole and not tied:
                problems += [f"{one} did not come" for one in names]
            continue
        if type(module).__name__ == EXPERTS:  # has tensors that no checkpoint holds, and padding
            missing = [one for one in names if short and one not in owners]
        else:
            suffixes = list(restored) + ["bias"] * isinstance(getattr(module, "bias", None), Tensor)
            wanted = [f"{one}.{suffix}" for one in names for suffix in dict.fromkeys(suffixes)]
            missing = [one for one in wanted if one not in update.received]
            # None at all: the checkpoint has names for them that are not known here, and vLLM's count must do.
            missing = missing if short or len(missing) < len(wanted) else []
        if missing:
            problems.append(f"{', '.join(missing)} did not come, but others of {name}, which runs as one")
    return problems


def _not_whole_marlin(model: Any, update: Update) -> list[str]:
    """The same of kernel-format tensors, which `_load_marlin` takes for all layers of a module or for none."""
    owners = _owners(update)
    problems = []
    for name, part in parts(model).items():
        if name not in owners and not (
            part.tensor and f"{_stack(model, part)}.{part.tensor}weight_packed" in update.received
        ):
            problems.append(f"{name} did not come")
    layers = {id(part.layer) for part in parts(model).values()}
    tensors = {id(tensor) for part in parts(model).values() for tensor in part.layer.parameters(recurse=False)}
    for name, module in model.named_modules():
        own = [one for one in module.parameters(recurse=False) if id(one) not in tensors]
        if own and id(module) not in layers and not _is_attention(module):
            stored = checkpoint_name(model, name)
            problems += [f"{stored} did not come"] * (stored not in owners)
    return problems if update.whole else []


def _owners(update: Update) -> set[str]:
    """The modules of the checkpoint of which a tensor came."""
    return {name.rpartition(".")[0] for name in update.received}


def _stack(model: Any, part: Part) -> str:
    """What the checkpoint calls the module of the experts `part`."""
    return checkpoint_name(model, part.module.rpartition(".")[0])


def _came(info: Any) -> bool:
    """Whether something came for a module: it is loaded already, or waits."""
    return not info.can_load() or info.load_numel > 0


def _kernel_tensors(module: nn.Module, info_of: Any) -> list[Tensor]:
    """The parameters that the kernel reads, where they are while an update is on its way."""
    kept = info_of(module).kernel_tensors
    return list((module._parameters if kept is None else kept[0]).values())


def _tied_to_loaded(model: nn.Module) -> list[Any]:
    """Modules that got nothing, but share a parameter with one that did: what they derived from it is to be redone.

    vLLM reloads a tied parameter through one of its modules alone; on the CPU the output layer would go on with the
    weight that a library packed for it before.
    """
    info_of = _reload().layerwise.get_layerwise_info
    modules = [(module, info_of(module)) for module in model.modules()]
    came = {id(tensor) for module, info in modules if _came(info) for tensor in _kernel_tensors(module, info_of)}
    return [
        module
        for module, info in modules
        if not _came(info)
        and hasattr(module, "quant_method")
        and any(id(tensor) in came for tensor in _kernel_tensors(module, info_of))
    ]


def _experts_to_pack(model: nn.Module) -> list[Any]:
    """Experts that something came for and that a kernel of the CPU runs.

    vLLM packs their weights for that kernel when it starts, not when it reloads: it would read plain ones as packed.
    """
    info_of = _reload().layerwise.get_layerwise_info

    def of_the_cpu(module: Any) -> bool:
        experts = getattr(getattr(module.quant_method, "moe_kernel", None), "fused_experts", None)
        return type(experts).__module__.endswith(".cpu_moe")

    found = (module for module in model.modules() if type(module).__name__ == EXPERTS and _came(info_of(module)))
    return [module for module in found if of_the_cpu(module)]


def _update(worker: Any) -> Update:
    update = getattr(worker, "lockstep_update", None)
    if update is None:
        raise RuntimeError("no update is on its way: begin one first.")
    return update


def _close(worker: Any) -> None:
    worker.lockstep_update = None
    vars(worker.get_model()).pop("load_weights", None)


def _reload() -> Any:
    """vLLM's layerwise reload, which is loaded here anyway: this runs in its worker."""
    from vllm.model_executor.model_loader import reload

    return reload


def _linear_classes() -> tuple[Any, Any]:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return LinearBase, ParallelLMHead


def _is_attention(module: nn.Module) -> bool:
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    return bool(is_deferred_attention_layer(module))


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


@contextmanager
def _no_warnings_of_what_was_kept() -> Iterator[None]:
    """vLLM warns of each module that got nothing, and names its class only. `_not_whole` has seen to it."""
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")

    def keep(record: logging.LogRecord) -> bool:
        return "Failed to load weights" not in record.msg

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
