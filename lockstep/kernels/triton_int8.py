"""The int8 GEMM with its epilogue, in one kernel for GPUs (Triton).

Sums of int8 products are exact in int32 in any order, and the epilogue is `scaled_mm.int8_epilogue`'s: so the result is
``torch.equal`` to the reference's, whatever the tiles. The sums never go to memory, as they do with ``torch._int_mm``.
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels.triton_arithmetic import _compiled, _Launch, _multiply_add, _round, _widen

# The fastest on an H200: inputs and outputs of a program, products at a time, programs that share a column of weights.
BLOCK_M, BLOCK_N, BLOCK_K, GROUP = 128, 128, 64, 8


@triton.jit(do_not_specialize=["m"])
def _gemm_kernel(
    x, weight, x_scales, w_scales, bias, out, m, n: tl.constexpr, k: tl.constexpr,
    x_scale_step: tl.constexpr, scales_first: tl.constexpr, masked: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, group: tl.constexpr,
):  # fmt: skip
    # Programs that run at the same time share rows of the input and of the weight in the cache.
    program, columns = tl.program_id(0), tl.cdiv(n, block_n)
    first = program // (group * columns) * group
    height = tl.minimum(tl.cdiv(m, block_m) - first, group)
    row = (first + program % (group * columns) % height) * block_m + tl.arange(0, block_m)
    column = program % (group * columns) // height * block_n + tl.arange(0, block_n)
    inner = tl.arange(0, block_k)
    # Rows beyond the end are read from the start again, which is quicker than a mask; they are not written.
    a = x + (row % m)[:, None].to(tl.int64) * k + inner[None, :]
    b = weight + (column % n)[None, :].to(tl.int64) * k + inner[:, None]
    total = tl.zeros([block_m, block_n], tl.int32)
    for start in range(0, k, block_k):
        if masked:
            left = tl.load(a, mask=(start + inner < k)[None, :], other=0)
            right = tl.load(b, mask=(start + inner < k)[:, None], other=0)
        else:
            left, right = tl.load(a), tl.load(b)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
        a += block_k
        b += block_k
    w_scale = tl.load(w_scales + column, mask=column < n, other=0.0)[None, :]
    x_scale = tl.load(x_scales + row * x_scale_step, mask=row < m, other=0.0)[:, None]
    if scales_first:
        left, right = total.to(tl.float32), x_scale * w_scale
    else:
        left, right = total.to(tl.float32) * w_scale, tl.broadcast_to(x_scale, [block_m, block_n])
    if bias is None:
        y = left * right
    else:
        added = _widen(tl.load(bias + column, mask=column < n, other=0.0))[None, :]
        y = _multiply_add(left, right, tl.broadcast_to(added, left.shape))
    inside = (row < m)[:, None] & (column < n)[None, :]
    tl.store(out + row[:, None].to(tl.int64) * n + column[None, :], _round(y, out.dtype.element_ty), mask=inside)


def gemm(
    x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, engine: str, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`scaled_mm.sums` and `int8_epilogue` in one: codes ``[M, K]`` and ``[N, K]`` to ``[M, N]`` in `dtype`."""
    (m, k), n = x.shape, len(weight)
    out = x.new_empty(m, n, dtype=dtype)
    launch = _gemm_launch(m, n, k, x_scale.numel() > 1, engine)
    tensors = (x.contiguous(), weight.contiguous(), x_scale.contiguous(), w_scale.contiguous())
    launch(*tensors, None if bias is None else bias.contiguous(), out)
    return out


@lru_cache
def _gemm_launch(m: int, n: int, k: int, by_token: bool, engine: str) -> _Launch:
    programs = (triton.cdiv(m, BLOCK_M) * triton.cdiv(n, BLOCK_N), 1, 1)
    arguments = (m, n, k, int(by_token), engine == "sglang", k % BLOCK_K > 0, BLOCK_M, BLOCK_N, BLOCK_K, GROUP)
    return _Launch(_gemm_kernel, programs, arguments, warps=4, stages=5, compiled=_compiled("int8", *arguments[1:6]))
