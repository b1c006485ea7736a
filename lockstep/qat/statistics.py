"""How well a layer's weights sit on their grid: numbers to watch during training."""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep import grid
from lockstep.grid import Quantized
from lockstep.scheme import TensorSpec


def sqnr_db(weight: Tensor, quantized: Quantized, spec: TensorSpec) -> float:
    """Signal-to-quantization-noise ratio in decibels: ``10 log10(sum w^2 / sum (w - w_fq)^2)``; inf without noise."""
    signal = weight.detach().float()
    noise = signal - grid.dequantize(quantized, spec).float()
    return (10 * torch.log10(signal.square().sum() / noise.square().sum())).item()


def saturation(quantized: Quantized, spec: TensorSpec) -> float:
    """Share of the codes that stand at either end of the code range, from 0 to 1."""
    low, high = spec.code_range
    codes = quantized.codes.float()
    return ((codes == low) | (codes == high)).float().mean().item()


def code_flips(codes: Tensor, earlier: Tensor) -> float:
    """Share of the codes that differ from `earlier` ones of the same layer, from 0 to 1."""
    return (codes != earlier).float().mean().item()
