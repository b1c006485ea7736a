"""Around vLLM's layerwise reload: what came is counted, and what the reload loses is refused or restored.

Read against vLLM 0.32: `initialize_layerwise_reload` puts the parameters of a checkpoint in place of the kernel's, on
``meta``; when as many elements have come as a module has, the module is loaded, repacked and copied into the kernel's
own memory; `finalize_layerwise_reload` gives modules that got nothing their kernel tensors back, and repacks partly
loaded ones **with uninitialised memory** for the rest. It checks no names. So they are counted here, and an update that
is not whole is refused before it is finalized.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lockstep.export.rollout.engine import checksum
from lockstep.export.rollout.vllm_layers import EXPERTS, by_module, checkpoint_name, parts
from lockstep.scheme import dtype_name


@dataclass
class Update:
    """An update on its way: the checksums of what came, by name, and of the last bucket apart."""

    whole: bool
    format: str | None
    received: dict[str, int] = field(default_factory=dict)
    bucket: dict[str, int] = field(default_factory=dict)


def reload() -> Any:
    """vLLM's layerwise reload, which is loaded here anyway: this runs in its worker."""
    from vllm.model_executor.model_loader import reload as module

    return module


def counting(load: Any, update: Update) -> Any:
    """`model.load_weights` with each tensor's checksum written down as it passes."""

    def load_weights(weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        last = "nothing yet"

        def passing() -> Iterator[tuple[str, Tensor]]:
            nonlocal last
            for name, tensor in weights:
                last = f"{name} ({dtype_name(tensor.dtype)} {list(tensor.shape)})"
                count(name, tensor, update)
                yield name, tensor

        try:
            return load(passing(), *args, **kwargs)
        except Exception as error:  # vLLM's own often names no tensor
            raise RuntimeError(f"vLLM did not take {last}: {type(error).__name__}: {error}") from error

    return load_weights


def count(name: str, tensor: Tensor, update: Update) -> None:
    """Write the checksum of `tensor` down. ValueError for one that came before.

    vLLM would count its elements as those of another tensor, which did not come.
    """
    if name in update.received:
        raise ValueError(f"{name} came twice in one update.")
    update.received[name] = update.bucket[name] = checksum(tensor)


def keep_what_is_pointed_to(kernel: Any) -> None:
    """oneDNN's handler points to the scales that it was made with; vLLM copies them elsewhere and lets them go."""
    if not hasattr(kernel, "dnnl_handler") or "process_weights_after_loading" in vars(kernel):
        return
    process = kernel.process_weights_after_loading

    def process_and_keep(layer: Any) -> None:
        process(layer)
        kernel.lockstep_kept = [*layer.parameters(recurse=False)]

    kernel.process_weights_after_loading = process_and_keep


def own_what_waits(model: nn.Module) -> None:
    """Copy what waits for the rest of its module: the sender may use its buffer again."""
    for module in model.modules():
        for _, arguments in reload().layerwise.get_layerwise_info(module).loaded_weights:
            for key, value in arguments.arguments.items():
                if isinstance(value, Tensor) and not value.is_meta and key != "param" and not hasattr(value, "_owned"):
                    copy = value.clone()
                    copy._owned = True  # type: ignore[attr-defined]
                    arguments.arguments[key] = copy


def not_whole(model: Any, update: Update) -> list[str]:
    """What is missing, in words: of modules of which a part came, and of all if the update must be whole."""
    owners, of = modules_of(update), by_module(parts(model))
    info_of = reload().layerwise.get_layerwise_info
    came = _tensors_that_came(model, info_of)
    problems: list[str] = []
    for name, module in model.named_modules():
        info = info_of(module)
        restored = info.restore_metadata[0]
        if not restored or is_attention(module):
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
            biased = isinstance(getattr(module, "bias", None), Tensor)
            suffixes = dict.fromkeys([*restored, "bias"] if biased else restored)
            wanted = [f"{one}.{suffix}" for one in names for suffix in suffixes]
            missing = [one for one in wanted if one not in update.received]
            # None at all: the checkpoint has names for them that are not known here, and vLLM's count must do.
            missing = missing if short or len(missing) < len(wanted) else []
        if missing:
            problems.append(f"{', '.join(missing)} did not come, but others of {name}, which runs as one")
    return problems


def modules_of(update: Update) -> set[str]:
    """The modules of the checkpoint of which a tensor came."""
    return {name.rpartition(".")[0] for name in update.received}


def _came(info: Any) -> bool:
    """Whether something came for a module: it is loaded already, or waits."""
    return not info.can_load() or info.load_numel > 0


def _kernel_tensors(module: nn.Module, info_of: Any) -> list[Tensor]:
    """The parameters that the kernel reads, where they are while an update is on its way."""
    kept = info_of(module).kernel_tensors
    return list((module._parameters if kept is None else kept[0]).values())


def _tensors_that_came(model: nn.Module, info_of: Any) -> set[int]:
    """Ids of the parameters that the kernels read, of modules for which something came."""
    modules = (module for module in model.modules() if _came(info_of(module)))
    return {id(tensor) for module in modules for tensor in _kernel_tensors(module, info_of)}


def tied_to_loaded(model: nn.Module) -> list[Any]:
    """Modules that got nothing, but share a parameter with one that did: what they derived from it is to be redone.

    vLLM reloads a tied parameter through one of its modules alone; on the CPU the output layer would go on with the
    weight that a library packed for it before.
    """
    info_of = reload().layerwise.get_layerwise_info
    came = _tensors_that_came(model, info_of)
    return [
        module
        for module in model.modules()
        if not _came(info_of(module))
        and hasattr(module, "quant_method")
        and any(id(tensor) in came for tensor in _kernel_tensors(module, info_of))
    ]


def experts_to_pack(model: nn.Module) -> list[Any]:
    """Experts that something came for and that a kernel of the CPU runs.

    vLLM packs their weights for that kernel when it starts, not when it reloads: it would read plain ones as packed.
    """
    info_of = reload().layerwise.get_layerwise_info

    def of_the_cpu(module: Any) -> bool:
        experts = getattr(getattr(module.quant_method, "moe_kernel", None), "fused_experts", None)
        return type(experts).__module__.endswith(".cpu_moe")

    found = (module for module in model.modules() if type(module).__name__ == EXPERTS and _came(info_of(module)))
    return [module for module in found if of_the_cpu(module)]


def is_attention(module: nn.Module) -> bool:
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    return bool(is_deferred_attention_layer(module))


@contextmanager
def without_its_warnings() -> Iterator[None]:
    """vLLM warns of each module that got nothing, and names its class only. `not_whole` has seen to it."""
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")

    def keep(record: logging.LogRecord) -> bool:
        return "Failed to load weights" not in record.msg

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
