"""GEMMs on codes that torch has not: scales that change along K (Triton); and what goes before and after torch's own.

The roundings are `scaled_mm`'s. Within a group of inputs the sum is the tensor core's: exact of integers, so that INT4
weights with int8 inputs are ``torch.equal`` to `scaled_mm`; of fp8 in the tensor core's own order and width, as in
DeepGEMM's kernels, so those outputs differ from `scaled_mm`'s in the last bit now and then.
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.grid import Quantized
from lockstep.kernels import operators, scaled_mm, triton_int8
from lockstep.kernels.triton_arithmetic import INTERPRETED, _compiled, _Launch, _magnitude, _round, _widen
from lockstep.scheme import BLOCK, Scheme

BLOCK_N = BLOCK  # one block of weights wide


@triton.jit(do_not_specialize=["m"])
def _grouped_kernel(
    x, x_scale, w, w_scale, bias, out, m,
    n: tl.constexpr, k: tl.constexpr, size: tl.constexpr, blocks: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """A tile of outputs: sums of `size` inputs at a time, scaled and added up in fp32.

    `blocks`: scales of `w` are those of `size` x `size` blocks, and `x` has one for each group; else `w` has one for
    each row and group, and `x` one for each row.
    """
    groups: tl.constexpr = k // size
    row = tl.program_id(1).to(tl.int64) * block_m + tl.arange(0, block_m)
    column = tl.program_id(0) * block_n + tl.arange(0, block_n)
    inner = tl.arange(0, size)
    x_at = x + row[:, None] * k + inner[None, :]
    w_at = w + column.to(tl.int64)[None, :] * k + inner[:, None]
    total = tl.zeros([block_m, block_n], tl.float32)
    for group in range(groups):
        a = tl.load(x_at + group * size, mask=row[:, None] < m, other=0.0)
        b = tl.load(w_at + group * size, mask=column[None, :] < n, other=0.0)
        if INTERPRETED:  # its dot keeps the width of its operands
            dot = tl.dot(_widen(a), _widen(b), input_precision="ieee")
        elif blocks:
            dot = tl.dot(a, b, out_dtype=tl.float32)
        else:
            dot = tl.dot(a, b, out_dtype=tl.int32).to(tl.float32)
        if blocks:
            dot *= tl.load(x_scale + row * groups + group, mask=row < m, other=0.0)[:, None]
            total = total + dot * tl.load(w_scale + tl.program_id(0) * groups + group)  # the tile is a block wide
        else:
            scale = tl.load(w_scale + column.to(tl.int64) * groups + group, mask=column < n, other=0.0)
            total = total + dot * _widen(scale)[None, :]
    if not blocks:
        total *= tl.load(x_scale + row, mask=row < m, other=0.0)[:, None]
    y = _round(total, out.dtype.element_ty)
    if bias is not None:
        added = _widen(tl.load(bias + column, mask=column < n, other=0.0))
        y = _round(_widen(y) + added[None, :], out.dtype.element_ty)
    inside = (row[:, None] < m) & (column[None, :] < n)
    tl.store(out + row[:, None] * n + column[None, :], y, mask=inside)


@triton.jit
def _fp8_kernel(codes, scales, out, rows, groups: tl.constexpr, size: tl.constexpr, block: tl.constexpr):
    """A row of INT4 codes, a block of groups at a time, as `scaled_mm.fp8_from_int4` says."""
    n = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, block)[:, None]
    largest = tl.zeros([block, 1], tl.int32)
    for start in range(0, groups, block):
        s = _widen(tl.load(scales + n * groups + start + group, mask=start + group < groups, other=0.0))
        largest = tl.maximum(largest, _magnitude(s))
    amax = tl.max(largest, 0)[:, None].to(tl.float32, bitcast=True)
    row = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    row = tl.where(row < 4.359654017857143e-06, 4.359654017857143e-06, row)  # 1 / (448 * 512)
    tl.store(rows + n + tl.zeros([1, 1], tl.int32), row * 8.0)
    for start in range(0, groups, block):
        inside = start + group < groups
        s = _widen(tl.load(scales + n * groups + start + group, mask=inside, other=0.0))
        s = _widen(_round(tl.div_rn(s, tl.broadcast_to(row, s.shape)), tl.float8e4nv))
        s = _widen(_round(s * 0.125, tl.float8e4nv))
        at = (n * groups + start + group) * size + tl.arange(0, size)[None, :]
        code = tl.load(codes + at, mask=inside, other=0).to(tl.float32)
        tl.store(out + at, _round(code * s, tl.float8e4nv), mask=inside)


def fp8_from_int4(weight: Quantized) -> Quantized:
    """`scaled_mm.fp8_from_int4` in one pass: int8 ``[N, K]`` and scales ``[N, G]`` to e4m3 and fp32 ``[N, 1]``."""
    (n, k), groups = weight.codes.shape, weight.scale.shape[-1]
    out = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=weight.codes.device)
    rows = torch.empty(n, 1, dtype=torch.float32, device=weight.codes.device)
    _fp8_launch(n, groups, k // groups)(weight.codes.contiguous(), weight.scale.contiguous(), out, rows)
    return Quantized(out, rows)


def grouped(x: Quantized, weight: Quantized, blocks: bool, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x @ W.T + bias`` of codes ``[M, K]`` and ``[N, K]`` to ``[M, N]`` in `dtype`.

    With `blocks`: e4m3 codes, fp32 scales ``[M, K/128]`` and ``[ceil(N/128), K/128]``. Else int8 codes, those of INT4
    weights with scales ``[N, K/g]``, the inputs' with fp32 scales ``[M, 1]``.
    """
    (m, k), n = x.codes.shape, len(weight.codes)
    out = torch.empty(m, n, dtype=dtype, device=x.codes.device)
    launch = _grouped_launch(m, n, k, BLOCK if blocks else k // weight.scale.shape[-1], blocks)
    tensors = (x.codes, x.scale, weight.codes, weight.scale)
    launch(*(tensor.contiguous() for tensor in tensors), None if bias is None else bias.contiguous(), out)
    return out


def _linear(x: Quantized, weight: Quantized, scheme: Scheme, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    spec, lead = scheme.weights, x.codes.shape[:-1]
    own = spec.format == "int8" or spec.strategy == "block" or spec.bits == 4
    if not own or not x.codes.numel() or not weight.codes.numel():
        return scaled_mm.linear(x, weight, scheme, bias, dtype)
    scale = x.scale.reshape(-1, x.scale.shape[-1])
    rows = Quantized(x.codes.reshape(-1, x.codes.shape[-1]), scale)
    if spec.format == "int8":
        y = triton_int8.gemm(rows.codes, weight.codes, scale, weight.scale, scheme.engine, bias, dtype)
    elif spec.bits == 4 and rows.codes.is_floating_point():
        with scaled_mm.without_autocast(x.codes.device):
            y = scaled_mm.fp8(rows, fp8_from_int4(weight), None, dtype)
        y = y if bias is None else y + bias
    else:
        y = grouped(rows, weight, spec.strategy == "block", bias, dtype)
    return y.view(*lead, len(weight.codes))


linear = operators.scaled_linear("lockstep::triton_scaled_linear", _linear)


@lru_cache
def _grouped_launch(m: int, n: int, k: int, size: int, blocks: bool) -> _Launch:
    block_m = 128 if m > 64 else 64
    programs = (triton.cdiv(n, BLOCK_N), triton.cdiv(m, block_m), 1)
    arguments = (m, n, k, size, blocks, block_m, BLOCK_N)
    compiled = _compiled("grouped", n, k, size, blocks, block_m)
    return _Launch(_grouped_kernel, programs, arguments, 4 if block_m == 64 else 8, compiled)


@lru_cache
def _fp8_launch(n: int, groups: int, size: int) -> _Launch:
    block = min(triton.next_power_of_2(groups), 4096 // size)
    return _Launch(_fp8_kernel, (n, 1, 1), (groups, size, block))
