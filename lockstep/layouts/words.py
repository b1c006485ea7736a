"""Codes in 32-bit words: field i of a little-endian word holds bits ``[bits * i, bits * (i + 1))``, offset binary."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed int8 `codes` ``[..., n]`` to int32 words ``[..., n * bits / 32]``; field = code + 2**(bits - 1)."""
    fields = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if bits == 4:
        fields = fields[..., 0::2] | (fields[..., 1::2] << 4)
    # By way of one dimension: of a size of 1 torch keeps whatever stride it had, and refuses the view.
    return fields.reshape(-1).view(torch.int32).view(*fields.shape[:-1], fields.shape[-1] // 4)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: int32 words ``[..., n]`` to int8 codes ``[..., n * 32 / bits]``."""
    if words.dtype != torch.int32:
        raise ValueError(f"packed words are int32, found {words.dtype}")
    fields = words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], words.shape[-1] * 4)
    if bits == 4:
        fields = torch.stack([fields & 0xF, fields >> 4], dim=-1).flatten(-2)
    return (fields.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
