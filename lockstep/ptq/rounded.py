"""What an adapter hands back of a layer, and the scheme that this is served as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lockstep.scheme import Scheme, TensorSpec

# llm-compressor's symmetric integers; GGUF's "max/-8" is another grid.
_THEIRS = {"amax/7": "amax/7.5", "amax/7.5": "amax/7.5", "amax/127": "amax/127.5", "amax/127.5": "amax/127.5"}

Batches = list[Mapping[str, Any]]


class Rounded(NamedTuple):
    """A layer as a library quantized it.

    `before` ``[N, K]`` is the weight that was rounded, smoothed where the method smooths; `weight` ``[N, K]`` and
    `scale` ``[N, G]`` are what the library computes the codes from. Without a `scale`, `weight` is already dequantized.
    """

    before: Tensor
    weight: Tensor
    scale: Tensor | None


def is_symmetric_integer(spec: TensorSpec) -> bool:
    """Whether llm-compressor has the grid of `spec` but for the divisor, so that its codes and scales can be served."""
    return spec.scale_rule in _THEIRS


def with_their_rule(scheme: Scheme) -> Scheme:
    """`scheme` with llm-compressor's scale rule: "amax/7.5" for INT4, "amax/127.5" for INT8."""
    return replace(scheme, weights=replace(scheme.weights, scale_rule=_THEIRS[scheme.weights.scale_rule]))


def working_dtype(spec: TensorSpec) -> torch.dtype:
    """The dtype in which a library sees the model: its scales, which are in it, must be exact in the stored dtype."""
    return spec.scale_dtype if spec.scale_dtype in (torch.bfloat16, torch.float16) else spec.served_dtype


def weights_of(model: nn.Module, layers: list[str]) -> dict[str, Tensor]:
    """Copies of the weights of `layers` on the host."""
    return {name: model.get_parameter(f"{name}.weight").detach().cpu().clone() for name in layers}
