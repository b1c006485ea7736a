"""A layer's inputs, fused: amax, scale and codes in one pass over memory, and what its int8 GEMM leaves to do (Triton).

Each function is ``torch.equal`` to what `activations` and `scaled_mm` compute (C2); `triton_arithmetic` says what that
takes. A NaN makes its row's or group's scale NaN, and an infinity makes it infinite, as there: which codes stand beside
such a scale is left to the hardware, as is the code of a NaN under a measured int8 scale.

A row of up to `ROW` inputs is held in registers, so it is read once; a longer one is read again while it is still in
the cache.
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep import activations
from lockstep.grid import Quantized
from lockstep.kernels import operators, scaled_mm
from lockstep.kernels.triton_arithmetic import (
    _compiled,
    _divide,
    _divide_normal,
    _Launch,
    _magnitude,
    _power_of_two_up,
    _reciprocal,
    _round,
    _widen,
)
from lockstep.scheme import FORMATS, ActivationSpec

BLOCK = 2048  # numbers of a program
ROW = 16384  # numbers of a row that a program holds
TRANSPOSED = 64  # rows and columns of a tile that is transposed

_FAR = tl.constexpr(2.0**120)  # its square is above what fp32 holds, times any denormal above 127


@dataclass(frozen=True, eq=False)  # `_rule` makes one of each, and hashing it by identity is quick
class Rule:
    """An `ActivationSpec`, as the compiler wants it; the rows of `activations`' table."""

    largest: float  # of the codes
    fp8: bool
    least_amax: float
    scale_by_reciprocal: bool  # amax * (1 / largest), else amax / largest
    least_scale: float
    power_of_two: bool
    code: str  # "x / scale", "x * (1 / scale)" or "x * (largest / amax)"
    to_even: bool  # how integers round halfway


# The arithmetic of activations.py ------------------------------------------------------------------------------------


@triton.jit
def _scale(amax, rule: tl.constexpr):
    largest = tl.full(amax.shape, rule.largest, tl.float32)
    scale = amax * _reciprocal(largest) if rule.scale_by_reciprocal else tl.div_rn(amax, largest)
    scale = tl.where(scale < rule.least_scale, rule.least_scale, scale)  # NaN stays
    return _power_of_two_up(scale) if rule.power_of_two else scale


@triton.jit
def _integers(x):
    """RNE(x) in [-128, 127] as int8; halfway cases to even."""
    return (tl.minimum(tl.maximum(x, -128.0), 127.0) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _codes(x, amax, scale, dtype: tl.constexpr, rule: tl.constexpr):
    """The codes of `x`, whose groups have one element in `amax` and `scale`."""
    if rule.code == "x / scale":
        codes = _round(_divide_normal(x, scale), dtype)
    elif rule.code == "x * (1 / scale)":
        codes = _round(x * tl.where(scale == 0, 0.0, _reciprocal(scale)), dtype)
    else:
        inverse = tl.div_rn(tl.full(amax.shape, rule.largest, tl.float32), amax)
        if rule.fp8:
            codes = _round(x * inverse, dtype)
        elif rule.to_even:  # of denormals the inverse is infinite: every code but that of 0 is at an end
            infinite = inverse == float("inf")
            lifted = x * tl.where(infinite, _FAR, 1.0)
            codes = _integers(lifted * tl.where(infinite, _FAR, tl.where(amax == 0, 0.0, inverse)))
        else:
            x = x * inverse
            whole = x.to(tl.int32)  # towards 0
            rest = x - whole.to(tl.float32)
            codes = (whole + tl.where(rest >= 0.5, 1, tl.where(rest <= -0.5, -1, 0))).to(tl.int8)
    return codes


@triton.jit
def _read(x, factors, row, column, rows, size: tl.constexpr, step: tl.constexpr):
    inside = (row < rows) & (column < size)
    value = _widen(tl.load(x + row * size + column, mask=inside, other=0.0))
    if factors is not None:
        value *= tl.load(factors + column * step, mask=column < size, other=0.0)
    return value


@triton.jit
def _amax(largest, rule: tl.constexpr):
    amax = tl.max(largest, 1).to(tl.float32, bitcast=True)[:, None]
    return tl.where(amax < rule.least_amax, rule.least_amax, amax)  # NaN stays


# Rows (tokens, groups) of `size` inputs, `tile` of them a program -----------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _dynamic_kernel(
    x, factors, codes, scales, rows,
    size: tl.constexpr, tile: tl.constexpr, block: tl.constexpr, step: tl.constexpr, rule: tl.constexpr,
):  # fmt: skip
    """With `factors`, one for each column or, if `step` is 0, one for all, `x` is multiplied by them first."""
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)[:, None]
    column = tl.arange(0, block)[None, :]
    dtype: tl.constexpr = codes.dtype.element_ty
    if size <= block:
        value = _read(x, factors, row, column, rows, size, step)
        amax = _amax(_magnitude(value), rule)
        scale = _scale(amax, rule)
        inside = (row < rows) & (column < size)
        tl.store(codes + row * size + column, _codes(value, amax, scale, dtype, rule), mask=inside)
    else:
        largest = tl.zeros([tile, block], tl.int32)
        for start in range(0, size, block):
            value = _read(x, factors, row, start + column, rows, size, step)
            largest = tl.maximum(largest, _magnitude(value))
        amax = _amax(largest, rule)
        scale = _scale(amax, rule)
        for start in range(0, size, block):
            value = _read(x, factors, row, start + column, rows, size, step)
            inside = (row < rows) & (start + column < size)
            tl.store(codes + row * size + start + column, _codes(value, amax, scale, dtype, rule), mask=inside)
    tl.store(scales + row, scale, mask=row < rows)


@triton.jit
def _of_rows(scales, row, rows, tile: tl.constexpr, step: tl.constexpr):
    """One number for each row, or for all of them if `step` is 0: as ``[tile, 1]``."""
    if tile == 1 or step == 0:  # read by all threads at once
        scale = tl.zeros([1, 1], tl.float32) + tl.load(scales + tl.program_id(0).to(tl.int64) * step)
    else:
        scale = tl.load(scales + row, mask=row < rows, other=0.0)
    return scale


@triton.jit(do_not_specialize=["rows"])
def _static_kernel(x, scale, codes, rows, size: tl.constexpr, tile: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)[:, None]
    column = tl.program_id(1) * block + tl.arange(0, block)[None, :]
    inside = (row < rows) & (column < size)
    value = _widen(tl.load(x + row * size + column, mask=inside, other=0.0))
    scale = _of_rows(scale, row, rows, tile, 0)
    dtype: tl.constexpr = codes.dtype.element_ty
    code = _integers(_divide(value, scale)) if dtype == tl.int8 else _round(value * _reciprocal(scale), dtype)
    tl.store(codes + row * size + column, code, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _dequantize_kernel(
    codes, scales, out, rows, size: tl.constexpr, tile: tl.constexpr, block: tl.constexpr, step: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)[:, None]
    column = tl.program_id(1) * block + tl.arange(0, block)[None, :]
    inside = (row < rows) & (column < size)
    value = _widen(tl.load(codes + row * size + column, mask=inside, other=0.0))
    value *= _of_rows(scales, row, rows, tile, step)
    tl.store(out + row * size + column, _round(value, out.dtype.element_ty), mask=inside)


@triton.jit
def _transpose_kernel(codes, out, n: tl.constexpr, k: tl.constexpr, tile: tl.constexpr):
    row = tl.program_id(1).to(tl.int64) * tile + tl.arange(0, tile)
    column = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = (row[:, None] < n) & (column[None, :] < k)
    value = tl.load(codes + row[:, None] * k + column[None, :], mask=inside, other=0)
    tl.store(out + column[:, None] * n + row[None, :], tl.trans(value), mask=tl.trans(inside))


# The operators -------------------------------------------------------------------------------------------------------


def fp8_input_gradient(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """``grad @ W`` in fp8, for `grad` ``[M, N]`` and a weight of e4m3 `codes` ``[N, K]``.

    `grad` times `scale` ``[N, 1]`` or ``[1, 1]`` becomes codes by token, as SGLang quantizes; the result ``[M, K]`` is
    in its dtype.
    """
    rows = _quantize_rows(grad, ActivationSpec("fp8_e4m3", "token", engine="sglang"), scale)
    return scaled_mm.fp8(rows, Quantized(transposed(codes), scale.new_ones(1, 1)), None, grad.dtype)


def transposed(codes: Tensor) -> Tensor:
    """Codes of one byte ``[N, K]`` as ``[K, N]``, contiguous."""
    n, k = codes.shape
    out = torch.empty(k, n, dtype=codes.dtype, device=codes.device)
    programs = (triton.cdiv(k, TRANSPOSED), triton.cdiv(n, TRANSPOSED), 1)
    launch = _Launch(_transpose_kernel, programs, (n, k, TRANSPOSED), 4, _compiled("transpose", n, k))
    launch(codes.contiguous().view(torch.int8), out.view(torch.int8))
    return out


def _quantize(x: Tensor, spec: ActivationSpec, stored: Tensor | None) -> tuple[Tensor, Tensor]:
    if spec.stores_scale and stored is None:
        raise ValueError(f"{spec} inputs need a measured {spec.scale_name}: run lockstep calibrate.")
    if spec.dynamic:
        codes, scale, *_ = _quantize_rows(x, spec, None)
        return codes, scale
    codes = torch.empty(x.shape, dtype=spec.code_dtype, device=x.device)
    _static_launch(x.shape)(x.contiguous(), stored, codes)
    return codes, stored  # type: ignore[return-value]


def _quantize_rows(x: Tensor, spec: ActivationSpec, factors: Tensor | None) -> Quantized:
    launch = _dynamic_launch(spec, x.shape, factors is not None and factors.numel() > 1)
    codes = torch.empty(x.shape, dtype=spec.code_dtype, device=x.device)
    scale = x.new_empty((*x.shape[:-1], spec.num_groups(x.shape[-1])), dtype=torch.float32)
    launch(x.contiguous(), None if factors is None else factors.contiguous(), codes, scale)
    return Quantized(codes, scale)


def _dequantize(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    codes, scale, *_ = quantized
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    _dequantize_launch(codes.shape, scale.shape)(codes.contiguous(), scale.contiguous(), out)
    return out


quantize = operators.quantize_activations("lockstep::triton_quantize_activations", _quantize)
dequantize = operators.dequantize_activations("lockstep::triton_dequantize_activations", _dequantize)


# Launching -----------------------------------------------------------------------------------------------------------


def _tiling(size: int, largest: int) -> tuple[int, int, int]:
    """Rows and columns of a program, and its warps, of 512 numbers each."""
    block = max(8, min(triton.next_power_of_2(size), largest))
    tile = max(1, BLOCK // block)
    return tile, block, max(4, min(tile * block // 512, 16))


def _grid(shape: torch.Size, groups: int) -> tuple[tuple[int, int, int], int, int, int, int, int]:
    """Programs for rows of a `groups`-th of ``shape[-1]``; rows and their size; those of a program, and its warps."""
    size = max(shape[-1] // groups, 1)
    rows = shape.numel() // size
    tile, block, warps = _tiling(size, BLOCK)
    return (triton.cdiv(rows, tile), triton.cdiv(size, block), 1), rows, size, tile, block, warps


@lru_cache
def _dynamic_launch(spec: ActivationSpec, shape: torch.Size, by_column: bool) -> _Launch:
    size = max(shape[-1] // spec.num_groups(shape[-1]), 1)
    rows = shape.numel() // size
    tile, block, warps = _tiling(size, ROW)
    arguments = (rows, size, tile, block, int(by_column), _rule(spec))
    return _Launch(_dynamic_kernel, (triton.cdiv(rows, tile), 1, 1), arguments, warps, _compiled(spec, size, by_column))


@lru_cache
def _static_launch(shape: torch.Size) -> _Launch:
    programs, rows, size, tile, block, warps = _grid(shape, 1)
    return _Launch(_static_kernel, programs, (rows, size, tile, block), warps, _compiled("static", size))


@lru_cache
def _dequantize_launch(shape: torch.Size, scales: torch.Size) -> _Launch:
    groups, step = scales[-1], int(scales.numel() > 1)
    programs, rows, size, tile, block, warps = _grid(shape, groups)
    arguments = (rows, size, tile, block, step)
    return _Launch(_dequantize_kernel, programs, arguments, warps, _compiled("dequantize", size, step))


@cache
def _rule(spec: ActivationSpec) -> Rule:
    fp8, by_group, sglang = spec.format == "fp8_e4m3", spec.strategy == "group", spec.engine == "sglang"
    if not fp8 or (sglang and by_group and not spec.power_of_two):
        code = "x * (largest / amax)"
    else:
        code = "x * (1 / scale)" if sglang else "x / scale"
    least_scale = activations.FLOOR if spec.power_of_two else 0.0
    if fp8 and not by_group and not sglang:
        least_scale = activations.FP8_TOKEN_FLOOR
    return Rule(
        largest=FORMATS[spec.format].largest,
        fp8=fp8,
        least_amax=activations.FLOOR if by_group or (sglang and not fp8) else 0.0,
        scale_by_reciprocal=sglang and by_group,
        least_scale=least_scale,
        power_of_two=spec.power_of_two,
        code=code,
        to_even=not sglang,
    )
