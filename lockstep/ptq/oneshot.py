"""llm-compressor's ``oneshot`` on a working copy of a model: what the adapters for GPTQ, AWQ and SmoothQuant share."""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from lockstep.export import compressed_tensors
from lockstep.export.groups import Group
from lockstep.ptq.rounded import Batches
from lockstep.scheme import Scheme


def config_groups(scheme: Scheme, layers: Sequence[str]) -> dict[str, Any]:
    """The ``config_groups`` of a modifier for the weights of `layers`.

    Inputs stay as they are: llm-compressor calibrates with unquantized ones whatever the scheme says.
    """
    (group,) = compressed_tensors.config([Group("", scheme, ("Linear",))], [])["config_groups"].values()
    return {"group_0": {"targets": list(layers), "weights": group["weights"]}}


def oneshot(model: Any, modifiers: Sequence[Any], batches: Batches) -> dict[str, Tensor]:
    """Run `modifiers` on `model`, a copy that is thrown away afterwards, on its own device, layer after layer.

    The library attaches schemes, hooks and forwards to `model` and does not take them back. It writes no file, and
    leaves no session behind; what it prints is for `quiet`.

    Args:
        model: a transformers model on one device.
        modifiers: llm-compressor's, in their order.
        batches: what the model is called with, as they are: neither padded, cut, nor shuffled.

    Returns:
        The scales that it stored, ``[N, G]`` in the weight's dtype, by layer.
    """
    import llmcompressor
    from compressed_tensors.offload.dispatch import remove_dispatch
    from compressed_tensors.utils import patch_attr
    from llmcompressor.core.session_functions import create_session
    from llmcompressor.pipelines.cache import IntermediatesCache
    from llmcompressor.pipelines.data_free import pipeline as data_free
    from llmcompressor.pipelines.sequential import pipeline as sequential

    device = model.device
    with ExitStack() as stack:
        stack.enter_context(create_session())
        for pipeline in (data_free, sequential):  # which would take the first GPU
            stack.enter_context(patch_attr(pipeline, "get_main_device", lambda: device))
        if device.type == "cpu":  # AWQ pins memory for a GPU, which torch refuses where there is none
            stack.enter_context(patch_attr(IntermediatesCache, "pin_memory", lambda *_: None))
        # It looks the config up under this name, on the hub if it is no folder.
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model.config.save_pretrained(folder)
        model.config._name_or_path = folder
        loader: DataLoader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        processor: Any = object()  # nothing is tokenized or saved: it is only there not to be looked up
        llmcompressor.oneshot(
            model=model,
            recipe=list(modifiers),
            dataset=loader,
            processor=processor,
            sequential_offload_device=str(device),
        )
        remove_dispatch(model)
    return {name: module.weight_scale.detach() for name, module in model.named_modules() if _has_scale(module)}


def _has_scale(module: nn.Module) -> bool:
    return getattr(module, "weight_scale", None) is not None


@contextmanager
def quiet() -> Iterator[None]:
    """Within it llm-compressor neither logs nor shows progress bars; what goes wrong is an exception."""
    _load()
    from loguru import logger

    torch_fx, before = logging.getLogger("torch.fx._symbolic_trace"), os.environ.get("TOKENIZERS_PARALLELISM")
    level, names = torch_fx.level, ("llmcompressor", "compressed_tensors")
    for name in names:
        logger.disable(name)
    torch_fx.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        for name in names:
            logger.enable(name)
        torch_fx.setLevel(level)
        if before is None:  # oneshot sets it
            os.environ.pop("TOKENIZERS_PARALLELISM", None)


def _load() -> None:
    if "llmcompressor" not in sys.modules:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            from llmcompressor.logger import configure_logger
        configure_logger()  # again: its logger keeps the standard output of the moment in which it was configured
