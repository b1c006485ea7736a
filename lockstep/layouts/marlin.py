"""Marlin: INT4 and INT8 words in the order in which the GPU kernel reads them; scales and zero points to match.

The layout of IST-DASLab's Marlin (Frantar et al., arXiv:2408.11743), bit-identical to what ``gptq_marlin_repack`` makes
in vLLM and SGLang. A warp's 32 threads hold a tile of 16 inputs x 64 outputs as the tensor core's ``m16n8k16`` wants
it: thread ``4e + a`` owns, for each of four 16-wide column blocks ``w``, the weights at

    row k = 2a + p + 8d,  column n = 16w + 8h + e        a, w in 0..3;  e in 0..7;  p, d, h in 0..1

so one 128-bit load gives a thread all it multiplies. Within a word the fields are interleaved for the kernel's
two-at-a-time conversion to 16-bit floats.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lockstep.layouts import words
from lockstep.scheme import TensorSpec

TILE_K, TILE_N = 16, 64


def pack_weight(codes: Tensor, bits: int = 4) -> Tensor:
    """Signed int8 codes ``[..., N, K]`` to words: int32 ``[..., K/16, 2N]`` for 4 bits, ``[..., K/16, 4N]`` for 8.

    Raises:
        ValueError: N is not a multiple of 64, K not one of 16, or `bits` is neither 4 nor 8.
    """
    *lead, n, k = codes.shape
    check(n, k, bits)
    tiles = codes.mT.reshape(*lead, k // TILE_K, TILE_K, n // TILE_N, TILE_N).transpose(-3, -2).flatten(-2)
    return words.pack(tiles[..., _tile_order(bits).to(codes.device)].flatten(-2), bits)


def unpack_weight(packed: Tensor, bits: int = 4) -> Tensor:
    """The inverse of `pack_weight`: words to int8 codes ``[..., N, K]``."""
    *lead, k, n = packed.shape
    k, n = k * TILE_K, n * 32 // bits // TILE_K
    check(n, k, bits)
    ordered = words.unpack(packed, bits).view(*lead, k // TILE_K, n // TILE_N, TILE_K * TILE_N)
    tiles = torch.empty_like(ordered)
    tiles[..., _tile_order(bits).to(packed.device)] = ordered
    tiles = tiles.view(*lead, k // TILE_K, n // TILE_N, TILE_K, TILE_N).transpose(-3, -2)
    return tiles.reshape(*lead, k, n).mT.contiguous()


def pack_scales(scale: Tensor) -> Tensor:
    """Scales ``[..., N, G]`` in the kernel's order ``[..., G, N]``: permuted within 64 outputs, or 32 if G is 1.

    Raises:
        ValueError: N is not a multiple of 64.
    """
    *lead, n, groups = scale.shape
    check(n, TILE_K, 4)
    if groups == 1:
        return scale.mT.reshape(*lead, 1, n // 32, 4, 4, 2).transpose(-3, -2).reshape(*lead, 1, n)
    return scale.mT.reshape(*lead, groups, n // 64, 8, 8).transpose(-2, -1).reshape(*lead, groups, n)


def unpack_scales(packed: Tensor) -> Tensor:
    """The inverse of `pack_scales`: ``[..., G, N]`` in the kernel's order to ``[..., N, G]``."""
    *lead, groups, n = packed.shape
    check(n, TILE_K, 4)
    if groups == 1:
        return packed.reshape(*lead, 1, n // 32, 4, 4, 2).transpose(-3, -2).reshape(*lead, 1, n).mT.contiguous()
    return packed.reshape(*lead, groups, n // 64, 8, 8).transpose(-2, -1).reshape(*lead, groups, n).mT.contiguous()


def pack_zero_points(zero_point: Tensor, bits: int = 4) -> Tensor:
    """Zero points int8 ``[..., N, G]`` to words int32 ``[..., G, N * bits / 32]``: permuted within 64 outputs as the
    scales of several groups, their fields interleaved as those of the weights.

    Raises:
        ValueError: N is not a multiple of 64, or `bits` is neither 4 nor 8.
    """
    *lead, n, groups = zero_point.shape
    check(n, TILE_K, bits)
    rows = zero_point.mT.reshape(*lead, groups, n // 64, 8, 8).transpose(-2, -1).reshape(*lead, groups, -1, 32 // bits)
    return words.pack(rows[..., _interleaved(bits)].flatten(-2), bits)


def unpack_zero_points(packed: Tensor, bits: int = 4) -> Tensor:
    """The inverse of `pack_zero_points`: words ``[..., G, N * bits / 32]`` to int8 ``[..., N, G]``."""
    *lead, groups, n = packed.shape
    n = n * 32 // bits
    check(n, TILE_K, bits)
    ordered = words.unpack(packed, bits).view(*lead, groups, -1, 32 // bits)
    rows = torch.empty_like(ordered)
    rows[..., _interleaved(bits)] = ordered
    return rows.view(*lead, groups, n // 64, 8, 8).transpose(-2, -1).reshape(*lead, groups, n).mT.contiguous()


def problem(n: int, k: int, spec: TensorSpec) -> str | None:
    """Why the kernel cannot run a layer of N outputs and K inputs, or None. Its tiles are 64 x 128 or 128 x 64."""
    if (n % 64 or k % 128) and (n % 128 or k % 64):
        return f"N={n}, K={k}: Marlin needs N % 64 == 0 and K % 128 == 0, or N % 128 == 0 and K % 64 == 0"
    if spec.served_dtype == torch.float32:
        return "Marlin serves bfloat16 and float16, the scheme is served in float32"
    return None


def _interleaved(bits: int) -> list[int]:
    """The order of the fields in a word: those that the kernel converts together lie 16 bits apart."""
    return [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]


def check(n: int, k: int, bits: int) -> None:
    """ValueError if N outputs and K inputs in `bits` bits do not fill the tiles."""
    if bits not in (4, 8):
        raise ValueError(f"Marlin packs 4 or 8 bits, not {bits}.")
    if n % TILE_N or k % TILE_K:
        raise ValueError(f"N={n}, K={k}: Marlin tiles need N % {TILE_N} == 0 and K % {TILE_K} == 0.")


@lru_cache
def _tile_order(bits: int) -> Tensor:
    """For each field of a tile's words, in their order, its index ``64 * k + n`` in the tile."""
    a, e, w, h, d, p = torch.meshgrid(*(torch.arange(size) for size in (4, 8, 4, 2, 2, 2)), indexing="ij")
    index = TILE_N * (2 * a + p + 8 * d) + 16 * w + 8 * h + e
    # Thread (e, a), then column block w; 4 bits: one word with fields (p, h, d); 8 bits: word h with fields (p, d).
    order = (1, 0, 2, 5, 3, 4) if bits == 4 else (1, 0, 2, 3, 5, 4)
    return index.permute(order).flatten()
