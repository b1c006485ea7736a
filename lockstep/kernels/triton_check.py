"""Whether packed words are those of a weight, in one pass over both (Triton).

C3 asks it of every layer at every sync, so it must cost no more than the packing: 2.5 bytes a bf16 weight. It must also
be able to find the packing wrong, so it shares nothing with `triton_grid` but the table of rules. Where a code stands
is computed from the definition of the layout, code by code. Scales are `grid`'s, by an IEEE division. A code is not
computed again: it is the right one if what it leaves of the weight is no more than half a step.

It is a sieve. Words that it finds nothing in give back what trained. What it finds something in, a more patient reader
must look at: near the ends of a dtype's range it suspects more than is wrong.
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep import grid
from lockstep.kernels.triton_arithmetic import TL_DTYPES, _Launch, _magnitude, _round, _widen
from lockstep.scheme import RULES, TensorSpec

# A program's rows and columns, and the columns of a row that are read at a time.
ROWS, COLUMNS = 32, 128
ROW_BLOCK = 4096

Order = Literal["rows", "marlin"]


@dataclass(frozen=True, eq=False)  # `_grid` makes one of each, and hashing it by identity is quick
class _Grid:
    """A `TensorSpec` and a master's dtype, as the compiler wants them."""

    bits: int
    divisor: float
    low: float
    high: float
    furthest: float  # the code of largest magnitude, without its sign
    zeros: int  # a word of codes 0
    signed: bool  # the rule max/-8
    short: bool  # weights and scales have 16 bits, and the code is the integer next to their quotient
    exact: tl.dtype  # in which the extreme is divided
    quotient: tl.dtype  # in which the weight is divided
    scale: tl.dtype
    limit: float  # the largest scale
    served: tl.dtype


# Where a code stands -------------------------------------------------------------------------------------------------


@triton.jit
def _place_of_code(n, k, rows, columns, bits: tl.constexpr, marlin: tl.constexpr):
    """The word of code (n, k) of a matrix, and the lowest of its bits.

    Marlin's definition (layouts/marlin.py): thread ``4e + a`` owns row ``k = 2a + p + 8d`` of a tile of 16, and column
    ``n = 16w + 8h + e`` of its 64. With 4 bits the threads have a word for each w, with the fields (p, h, d); with 8 a
    word for each (w, h), with the fields (p, d).
    """
    fields: tl.constexpr = 32 // bits
    a, p, d = k % 8 // 2, k % 2, k % 16 // 8
    w, h, e = n % 64 // 16, n % 16 // 8, n % 8
    line, thread = k // 16 * (rows * 16 // fields), 4 * e + a
    if not marlin:
        place, field = n * (columns // fields) + k // fields, k % fields
    elif bits == 4:
        place, field = line + n // 64 * 128 + thread * 4 + w, 4 * p + 2 * h + d
    else:
        place, field = line + n // 64 * 256 + thread * 8 + 2 * w + h, 2 * p + d
    return place, field * bits


@triton.jit
def _place_of_scale(n, group, rows, groups, alone: tl.constexpr, marlin: tl.constexpr):
    """Where the scale of row n and `group`, `alone` if there is but one, is. Marlin's are transposed, and in another
    order within 64 or 32 rows."""
    if not marlin:
        place = n * groups + group
    elif alone:  # 32t + 2i + 8j + m, m in 0..1, is found at 32t + 8i + 2j + m
        place = n // 32 * 32 + n % 8 // 2 * 8 + n % 32 // 8 * 2 + n % 2
    else:  # 64t + 8j + i is found at 64t + 8i + j
        place = group * rows + n // 64 * 64 + n % 8 * 8 + n % 64 // 8
    return place


# What trained, in the steps of grid.py -------------------------------------------------------------------------------


@triton.jit
def _scale(largest, extreme, grid: tl.constexpr):
    """The scale, rounded to its dtype, of tiles with this `extreme`; NaN if the `largest` magnitude is not finite."""
    exact = _widen(_round(tl.div_rn(extreme, tl.full(extreme.shape, grid.divisor, tl.float32)), grid.exact))
    exact = tl.minimum(tl.maximum(exact, -grid.limit), grid.limit)
    scale = _widen(_round(exact, grid.scale)) + 0.0  # + 0.0 makes -0 a 0
    return tl.where(largest >= 0x7F800000, float("nan"), scale)


@triton.jit
def _scale_of_rows(w, grid: tl.constexpr):
    """The scale of each row of `w`: of its largest magnitude, or of its first element of that, with its sign."""
    magnitude = _magnitude(w)
    largest = tl.max(magnitude, 1)
    extreme = largest.to(tl.float32, bitcast=True)
    if grid.signed:
        column = tl.arange(0, w.shape[1])[None, :]
        first = tl.min(tl.where(magnitude == largest[:, None], column, w.shape[1]), 1)
        extreme = tl.sum(tl.where(column == first[:, None], w, 0.0), 1)
    return _scale(largest, extreme, grid)


@triton.jit
def _beyond(field, w, divisor, grid: tl.constexpr):
    """Above 0 where `field`, a code and ``2**(bits - 1)``, is not that of `w`; `divisor` has one element a row.

    The code is the integer next to ``w / divisor``. In 16 bits that needs no division: ``w - code * divisor`` is exact
    in fp32, and no more than half of `divisor`, or less than half if the code is odd.
    """
    # An integer below 2**23 as the low bits of a float.
    code = (field | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + (1 << (grid.bits - 1)))
    if grid.short:
        half = (divisor * 0.5).to(tl.int32, bitcast=True)
        beyond = tl.abs(w - code * divisor) - (half - (field & 1)).to(tl.float32, bitcast=True)
    else:
        if grid.signed:
            expected = tl.floor(w * tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor) + 8.5) - 8
            expected = tl.minimum(tl.maximum(expected, grid.low), grid.high)
        else:
            quotient = _widen(_round(tl.div_rn(w, tl.broadcast_to(divisor, w.shape)), grid.quotient))
            quotient = tl.minimum(tl.maximum(quotient, grid.low), grid.high)
            expected = (quotient + 12582912.0) - 12582912.0  # half to even
        beyond = tl.abs(code - expected)
    return beyond


# The comparison ------------------------------------------------------------------------------------------------------


@triton.jit
def _row_scales_kernel(weight, out, columns: tl.constexpr, block: tl.constexpr, grid: tl.constexpr):
    """The scales of whole rows, fp32."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([1, block], tl.int32)
    for start in range(0, columns, block):
        column = start + tl.arange(0, block)[None, :]
        w = _widen(tl.load(weight + row * columns + column, mask=column < columns, other=0.0))
        largest = tl.maximum(largest, _magnitude(w))
    of_row = tl.max(largest, 1)
    tl.store(out + row + tl.arange(0, 1), _scale(of_row, of_row.to(tl.float32, bitcast=True), grid))


@triton.jit
def _check_kernel(
    weight,
    words,
    scales,
    of_rows,
    found,
    rows,
    columns,
    groups,
    alone: tl.constexpr,
    size: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    grid: tl.constexpr,
    marlin: tl.constexpr,
):
    """Look at a tile of one matrix, and set `found` if anything is not as it should be.

    With `of_rows`, the scales of whole rows, groups are cut at will.
    """
    matrix = tl.program_id(2).to(tl.int64)
    weight += matrix * rows * columns
    words += matrix * rows * (columns // (32 // grid.bits))
    scales += matrix * rows * groups
    # A matrix has fewer than 2**31 words, and may have more weights.
    weight += tl.program_id(1).to(tl.int64) * tile_rows * columns
    row = tl.arange(0, tile_rows)[:, None]
    n = tl.program_id(1) * tile_rows + row
    worst = 0.0
    for part in tl.static_range(tile_columns // size):
        group = tl.program_id(0) * (tile_columns // size) + part
        k = group * size + tl.arange(0, size)[None, :]
        inside = (n < rows) & (k < columns)
        w = _widen(tl.load(weight + row * columns + k, mask=inside, other=0.0))
        if of_rows is None:
            scale = _scale_of_rows(w, grid)[:, None]
        else:
            group = 0
            scale = tl.load(of_rows + matrix * rows + n, mask=n < rows, other=0.0)
        place = _place_of_scale(n, group, rows, groups, alone, marlin)
        stored = _widen(tl.load(scales + place, mask=(n < rows) & (group < groups), other=0.0))
        furthest = _widen(_round(stored * grid.furthest, grid.served))
        wrong = (stored.to(tl.int32, bitcast=True) != scale.to(tl.int32, bitcast=True)) | (scale != scale)
        wrong = wrong | (_magnitude(furthest) >= 0x7F800000)
        worst = tl.maximum(worst, tl.max(tl.max(wrong.to(tl.float32), 1), 0))
        place, shift = _place_of_code(n, k, rows, columns, grid.bits, marlin)
        field = (tl.load(words + place, mask=inside, other=grid.zeros) >> shift) & ((1 << grid.bits) - 1)
        beyond = _beyond(field, w, tl.where(scale == 0, 1.0, scale), grid)
        worst = tl.maximum(worst, tl.max(tl.max(beyond, 1), 0))
    if worst != 0:  # nor NaN
        tl.store(found, 1)


def check_packed(weight: Tensor, words: Tensor, scale: Tensor, spec: TensorSpec, order: Order) -> Tensor | None:
    """See `kernels.Quantizer`. Found are codes and scales that are not those of `weight`, and NaN and infinity in it or
    in what is served; suspected, groups whose largest code would be served as infinity, and those whose scale is too
    small or too large for its dtype to hold it well."""
    *lead, n, k = weight.shape
    if not spec.symmetric or spec.format not in ("int4", "int8") or not weight.numel():
        return None
    groups, in_a_word, marlin = spec.num_groups(k), 32 // spec.bits, order == "marlin"
    if k % in_a_word or (marlin and (n % 64 or k % 16)):
        return None
    if marlin:
        expected = (*lead, k // 16, n * 16 // in_a_word), (*lead, groups, n)
    else:
        expected = (*lead, n, k // in_a_word), (*lead, n, groups)
    if ((*words.shape,), (*scale.shape,)) != expected or (words.dtype, scale.dtype) != (torch.int32, spec.scale_dtype):
        return None
    by_row, compare = _launches(spec, weight.dtype, weight.shape, marlin)
    weight, of_rows = weight.contiguous(), None
    if by_row is not None:
        of_rows = weight.new_empty(math.prod(lead) * n, dtype=torch.float32)
        by_row(weight, of_rows)
    found = torch.zeros((), dtype=torch.int32, device=weight.device)
    compare(weight, words.contiguous(), scale.contiguous(), of_rows, found)
    return found


@lru_cache
def _launches(spec: TensorSpec, master: torch.dtype, shape: torch.Size, marlin: bool) -> tuple[_Launch | None, _Launch]:
    """The scales of rows, where those are what trains, and the comparison."""
    grid.check(master, shape, spec)
    *lead, n, k = shape
    by_row, groups = None, spec.num_groups(k)
    if spec.group_size is None:
        block = max(8, min(triton.next_power_of_2(k), ROW_BLOCK))
        by_row = _Launch(_row_scales_kernel, (math.prod(lead) * n, 1, 1), (k, block, _grid(spec, master)))
    programs = (triton.cdiv(k, COLUMNS), triton.cdiv(n, ROWS), math.prod(lead))
    sizes = (n, k, groups, groups == 1, spec.group_size or COLUMNS, ROWS, COLUMNS)
    return by_row, _Launch(_check_kernel, programs, (*sizes, _grid(spec, master), marlin), warps=8)


@cache
def _grid(spec: TensorSpec, master: torch.dtype) -> _Grid:
    """The grid of `spec` for a master of dtype `master`: the dtypes of `grid`'s table."""
    rule, in_own_dtype = RULES[spec.scale_rule], spec.scale_rule in ("amax/7.5", "amax/127.5")
    zero = 1 << (spec.bits - 1)
    zeros = sum(zero << place for place in range(0, 32, spec.bits))
    return _Grid(
        spec.bits,
        rule.divisor,
        rule.low,
        rule.high,
        furthest=max(-rule.low, rule.high),
        zeros=zeros - 2**32,
        signed=spec.scale_rule == "max/-8",
        short=spec.scale_rule in ("amax/7", "amax/127") and torch.float32 not in (master, spec.scale_dtype),
        exact=TL_DTYPES[master if in_own_dtype else torch.float32],
        quotient=TL_DTYPES[torch.promote_types(master, spec.scale_dtype) if in_own_dtype else torch.float32],
        scale=TL_DTYPES[spec.scale_dtype],
        limit=torch.finfo(spec.scale_dtype).max,
        served=TL_DTYPES[spec.served_dtype],
    )
