"""A W4A16 GEMM over packed words, in the serving kernel's order, for GPUs on which no engine is installed (Triton).

The operands and the roundings are `reference.linear`'s, accumulation is in fp32. The order of the additions is this
kernel's own, so outputs differ from another kernel's in the last bit now and then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.grid import Quantized
from lockstep.kernels.triton_grid import INTERPRETED, TL_DTYPES, _round, _unpacked, _widen
from lockstep.layouts import words
from lockstep.scheme import TensorSpec

BLOCK_M = BLOCK_N = BLOCK_K = 64


@triton.jit
def _gemm_kernel(
    x, packed, scales, bias, out, m, n, k: tl.constexpr, size: tl.constexpr, after: tl.constexpr, served: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * block_m + tl.arange(0, block_m)[:, None]
    column = tl.program_id(1).to(tl.int64) * block_n + tl.arange(0, block_n)
    total = tl.zeros([block_m, block_n], tl.float32)
    for start in range(0, k, block_k):
        inner = start + tl.arange(0, block_k)
        a = tl.load(x + row * k + inner[None, :], mask=(row < m) & (inner[None, :] < k), other=0.0)
        word = start // 8 + tl.arange(0, block_k // 8)[None, :]
        at = column[:, None] * (k // 8) + word
        packs = tl.load(packed + at, mask=(column[:, None] < n) & (word < k // 8), other=0)
        b = tl.reshape(_unpacked(tl.reshape(packs, [block_n * block_k // 8])), [block_n, block_k])
        if not after:
            group = column[:, None] * (k // size) + start // size
            scale = _widen(tl.load(scales + group, mask=column[:, None] < n, other=0.0))
            b = _widen(_round(b * scale, served))
        b = _round(b, x.dtype.element_ty)
        if INTERPRETED:  # its dot reads bf16 as integers
            a, b = _widen(a), _widen(b)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    dtype: tl.constexpr = out.dtype.element_ty
    y = _round(total, dtype)
    if after or bias is not None:
        wide = _widen(y)
        if after:
            wide *= _widen(tl.load(scales + column, mask=column < n, other=0.0))[None, :]
        if bias is not None:
            wide += _widen(tl.load(bias + column, mask=column < n, other=0.0))[None, :]
        y = _round(wide, dtype)
    tl.store(out + row * n + column[None, :], y, mask=(row < m) & (column[None, :] < n))


def linear(x: Tensor, quantized: Quantized, spec: TensorSpec, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` for `x` ``[..., K]`` in the served dtype or fp32; the codes are packed at each call.

    Raises:
        ValueError: K is not a multiple of 8, or `x` has another dtype.
    """
    n, k = quantized.codes.shape
    _check(x, n, k, spec, bias)
    return packed_linear(x, words.pack(quantized.codes, spec.bits), quantized.scale, spec, bias)


def packed_linear(x: Tensor, packed: Tensor, scale: Tensor, spec: TensorSpec, bias: Tensor | None = None) -> Tensor:
    """`linear` for words int32 ``[N, K / 8]`` (`layouts.words`) and scales ``[N, G]``. ValueError as there."""
    n, k = packed.shape[0], packed.shape[1] * 8
    _check(x, n, k, spec, bias)
    rows, after = x.reshape(-1, k).contiguous(), spec.scale_follows_gemm(k)
    scale = scale.to(x.dtype) if after else scale
    out = x.new_empty(*x.shape[:-1], n)
    size = k // scale.shape[-1]
    block_k = min(size, BLOCK_K) if size in (32, 64, 128) else BLOCK_K
    if out.numel():
        _gemm_kernel[triton.cdiv(len(rows), BLOCK_M), triton.cdiv(n, BLOCK_N)](
            *(rows, packed.contiguous(), scale.contiguous(), None if bias is None else bias.contiguous(), out),
            *(len(rows), n, k, size, after, TL_DTYPES[spec.served_dtype], BLOCK_M, BLOCK_N, block_k),
            enable_fp_fusion=False,
        )
    return out


def _check(x: Tensor, n: int, k: int, spec: TensorSpec, bias: Tensor | None) -> None:
    if k % 8 or x.shape[-1] != k or x.dtype not in (spec.served_dtype, torch.float32):
        raise ValueError(
            f"triton cannot run a weight of {[n, k]} served in {spec.served_dtype} on an input of {list(x.shape)} in "
            f"{x.dtype}: it needs a multiple of 8 inputs, as many as the weight has, in the served dtype or float32."
        )
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype):
        raise ValueError(f"the bias is {list(bias.shape)} {bias.dtype}: it must be {[n]} {x.dtype}.")
