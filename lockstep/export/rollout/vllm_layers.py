"""What is live in vLLM's model: its linear layers by their names in the checkpoint, and their tensors, read back.

Read against vLLM 0.32. Nothing here changes the model. It runs in vLLM's worker, as `vllm_worker` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lockstep.layouts import marlin, words
from lockstep.scheme import dtype_name

MARLIN = "MarlinLinearKernel"
CPU_INT4 = "CPUWNA16LinearKernel"
EXPERTS = "RoutedExperts"  # vLLM's module of the experts of a block
IDENTITY = 256  # rows of it at a time


class Unreadable(Exception):
    """A layer's stored tensors cannot be made from what its kernel reads."""


class Part(NamedTuple):
    """A linear layer of the checkpoint in the module that runs it, perhaps with others: ``outputs[start:stop]``."""

    module: str
    layer: Any
    start: int
    stop: int
    tensor: str = ""  # of experts: which of the two stacked weights, "w13_" or "w2_"


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


def by_module(live: Mapping[str, Part]) -> dict[str, list[str]]:
    """The names in the checkpoint of what each module runs as one, by the module's name."""
    found: dict[str, list[str]] = {}
    for name, part in live.items():
        found.setdefault(part.module, []).append(name)
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
        known["inputs"] = _inputs("int8", scheme)
        if not scheme.input_symmetric:
            known["unknown"] = "int8 with asymmetric inputs"
    elif method == "CompressedTensorsW8A8Fp8":
        known["weights"] = ["fp8_e4m3", _text(scheme.strategy), None, True]
        block = known["weights"][1] == "block"
        known["inputs"] = ["fp8_e4m3", "group", 128, True] if block else _inputs("fp8_e4m3", scheme)
    else:
        known["unknown"] = f"{method} of vLLM"
    return known


def _inputs(format: str, scheme: Any) -> list[Any]:
    return [format, "tensor", None, False] if scheme.is_static_input_scheme else [format, "token", None, True]


def _text(strategy: Any) -> str:
    return str(getattr(strategy, "value", strategy))


def stored(model: Any, format: str | None) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors, made again from what the kernels read. Unreadable where that is not known."""
    live, seen = parts(model), set[int]()
    linear = {id(part.layer) for part in live.values()}
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


def _linear_classes() -> tuple[Any, Any]:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return LinearBase, ParallelLMHead
