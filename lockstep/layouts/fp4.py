"""FP4 (E2M1) codes two in a byte: the even input in the low nibble, a nibble is ``sign << 3 | index`` of the magnitude.

As compressed-tensors stores NVFP4 and MXFP4, and as the tensor cores of Blackwell read them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def pack(codes: Tensor) -> Tensor:
    """Codes ``[..., K]``, float8_e4m3fn that hold E2M1's values (-0 among them), to bytes uint8 ``[..., K/2]``.

    Raises:
        ValueError: K is odd, or a value is none of E2M1's.
    """
    nibbles = _nibble_of_byte().to(codes.device)[codes.contiguous().view(torch.uint8).int()]
    if codes.shape[-1] % 2 or (nibbles > 15).any():
        raise ValueError(f"{codes.shape[-1]} codes do not fill bytes, or hold what is no E2M1 value")
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: bytes uint8 ``[..., n]`` to codes float8_e4m3fn ``[..., 2n]``."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed FP4 codes are torch.uint8, found {packed.dtype}")
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
    return _byte_of_nibble().to(packed.device)[nibbles.int()].view(torch.float8_e4m3fn)


@lru_cache
def _byte_of_nibble() -> Tensor:
    values = torch.tensor(MAGNITUDES)
    return torch.cat([values, -values]).to(torch.float8_e4m3fn).view(torch.uint8)


@lru_cache
def _nibble_of_byte() -> Tensor:
    nibbles = torch.full((256,), 255, dtype=torch.uint8)
    nibbles[_byte_of_nibble().int()] = torch.arange(16, dtype=torch.uint8)
    return nibbles
