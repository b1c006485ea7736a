"""Marlin: INT4 and INT8 words in the order in which the GPU kernel reads them, and scales permuted to match.

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
    """Signed int8 codes ``[N, K]`` to Marlin words: int32 ``[K/16, 2N]`` for 4 bits, ``[K/16, 4N]`` for 8.

    Raises:
        ValueError: N is not a multiple of 64, K not one of 16, or `bits` is neither 4 nor 8.
    """
    n, k = codes.shape
    _check(n, k, bits)
    tiles = codes.T.reshape(k // TILE_K, TILE_K, n // TILE_N, TILE_N).transpose(1, 2).flatten(2)
    return words.pack(tiles[..., _tile_order(bits).to(codes.device)].flatten(1), bits)


def unpack_weight(packed: Tensor, bits: int = 4) -> Tensor:
    """The inverse of `pack_weight`: words ``[K/16, 2N]`` (8 bits: ``[K/16, 4N]``) to int8 codes ``[N, K]``."""
    k, n = packed.shape[0] * TILE_K, packed.shape[1] * 32 // bits // TILE_K
    _check(n, k, bits)
    ordered = words.unpack(packed, bits).view(k // TILE_K, n // TILE_N, TILE_K * TILE_N)
    tiles = torch.empty_like(ordered)
    tiles[..., _tile_order(bits).to(packed.device)] = ordered
    return tiles.view(k // TILE_K, n // TILE_N, TILE_K, TILE_N).transpose(1, 2).reshape(k, n).T.contiguous()


def pack_scales(scale: Tensor) -> Tensor:
    """Scales ``[N, G]`` to the kernel's order ``[G, N]``, permuted within 64 outputs, or 32 if there is one group.

    Raises:
        ValueError: N is not a multiple of 64.
    """
    n, groups = scale.shape
    _check(n, TILE_K, 4)
    if groups == 1:
        return scale.T.reshape(1, n // 32, 4, 4, 2).transpose(2, 3).reshape(1, n)
    return scale.T.reshape(groups, n // 64, 8, 8).transpose(2, 3).reshape(groups, n)


def unpack_scales(packed: Tensor) -> Tensor:
    """The inverse of `pack_scales`: ``[G, N]`` in the kernel's order to ``[N, G]``."""
    groups, n = packed.shape
    _check(n, TILE_K, 4)
    if groups == 1:
        return packed.reshape(1, n // 32, 4, 4, 2).transpose(2, 3).reshape(1, n).T.contiguous()
    return packed.reshape(groups, n // 64, 8, 8).transpose(2, 3).reshape(groups, n).T.contiguous()


def problem(n: int, k: int, spec: TensorSpec) -> str | None:
    """Why the kernel cannot run a layer of N outputs and K inputs, or None. Its tiles are 64 x 128 or 128 x 64."""
    if (n % 64 or k % 128) and (n % 128 or k % 64):
        return f"N={n}, K={k}: Marlin needs N % 64 == 0 and K % 128 == 0, or N % 128 == 0 and K % 64 == 0"
    if spec.served_dtype == torch.float32:
        return "Marlin serves bfloat16 and float16, the scheme is served in float32"
    return None


def _check(n: int, k: int, bits: int) -> None:
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
