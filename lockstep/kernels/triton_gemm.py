"""A W4A16 GEMM over packed words, in the serving kernel's order, for GPUs on which no engine is installed (Triton).

The order is `reference.linear`'s, with fp32 accumulation. The order of the additions is this
kernel's own, so outputs differ from another kernel's in the last bit now and then; the operands never do.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lockstep.grid import Quantized
from lockstep.kernels.triton_grid import INTERPRETED, _round, _unpacked, _widen
from lockstep.layouts import words
from lockstep.scheme import TensorSpec


@triton.jit
def _gemm_kernel(
    x, packed, scales, bias, out, m, n, k,
    size: tl.constexpr, after: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
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
            b *= _widen(tl.load(scales + group, mask=column[:, None] < n, other=0.0))
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
        ValueError: K is not a multiple of 8, or several groups do not divide it into blocks.
    """
    n, k = quantized.codes.shape
    if k % 8:
        raise ValueError(f"triton cannot run a weight of {[n, k]}: words hold 8 codes, {k} inputs do not fill them.")
    rows = x.reshape(-1, k).contiguous()
    out = x.new_empty(*x.shape[:-1], n)
    after = spec.scale_follows_gemm(k)
    size = k if after else k // quantized.scale.shape[-1]
    block_m, block_n, block_k = 64, 64, 64 if after else min(size, 64)
    if out.numel():
        _gemm_kernel[triton.cdiv(len(rows), block_m), triton.cdiv(n, block_n)](
            *(rows, words.pack(quantized.codes, spec.bits), quantized.scale.contiguous(), bias, out, len(rows), n, k),
            *(size, after, block_m, block_n, block_k),
            enable_fp_fusion=False,
        )
    return out
