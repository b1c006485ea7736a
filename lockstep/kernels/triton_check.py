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

# The weights of a program in the order of rows; what it reads of a row that has no groups; and of a row of Marlin's.
BLOCK, COLUMNS, MARLIN_COLUMNS = 4096, 128, 128
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


# Where a code stands: each word is loaded once, and spread over the weights that it has the codes of ----------------


@triton.jit
def _fields_of_rows(words, n, rows, columns, size: tl.constexpr, grid: tl.constexpr):
    """The fields of rows `n` ``[R]``, from the column ``program_id(1) * size`` on: ``[R, size]``."""
    fields: tl.constexpr = 32 // grid.bits
    word = tl.program_id(1) * (size // fields) + tl.arange(0, size // fields)[None, :, None]
    row = n[:, None, None]
    inside = (row < rows) & (word < columns // fields)
    word = tl.load(words + row.to(tl.int64) * (columns // fields) + word, mask=inside, other=grid.zeros)
    shift = (grid.bits * tl.arange(0, fields))[None, None, :]
    return tl.reshape((word >> shift) & ((1 << grid.bits) - 1), [n.shape[0], size])


@triton.jit
def _fields_of_tiles(words, rows, columns, block: tl.constexpr, grid: tl.constexpr):
    """The fields of the 64 rows and the `block` columns of this program: ``[64, block]``.

    Marlin's definition (layouts/marlin.py): thread ``4e + a`` owns row ``k = 2a + p + 8d`` of a tile of 16, and column
    ``n = 16w + 8h + e`` of its 64. With 4 bits the threads have a word for each w, with the fields (p, h, d); with 8 a
    word for each (w, h), with the fields (p, d). The axes here are those of n and k: ``[w, h, e, tile, d, a, p]``.
    """
    in_a_line: tl.constexpr = 16 * 64 * grid.bits // 32
    w = tl.arange(0, 4)[:, None, None, None, None, None, None]
    h = tl.arange(0, 2)[None, :, None, None, None, None, None]
    e = tl.arange(0, 8)[None, None, :, None, None, None, None]
    tile = tl.program_id(0) * (block // 16) + tl.arange(0, block // 16)[None, None, None, :, None, None, None]
    d = tl.arange(0, 2)[None, None, None, None, :, None, None]
    a = tl.arange(0, 4)[None, None, None, None, None, :, None]
    p = tl.arange(0, 2)[None, None, None, None, None, None, :]
    if grid.bits == 4:
        place, field = (4 * e + a) * 4 + w, 4 * p + 2 * h + d
    else:
        place, field = (4 * e + a) * 8 + 2 * w + h, 2 * p + d
    place += tile * (rows // 64 * in_a_line) + tl.program_id(1) * in_a_line
    word = tl.load(words + place, mask=tile < columns // 16, other=grid.zeros)
    return tl.reshape((word >> (field * grid.bits)) & ((1 << grid.bits) - 1), [64, block])


@triton.jit
def _place_of_scale(n, group, rows, alone: tl.constexpr):
    """Where Marlin has the scale of row n and `group`, `alone` if there is but one: in another order within 64 or 32
    rows."""
    if alone:  # 32t + 2i + 8j + m, m in 0..1, is found at 32t + 8i + 2j + m
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
def _scale_is_wrong(stored, scale, grid: tl.constexpr):
    """Whether the `stored` scale is not `scale`, bit for bit, or is no finite number, or the engine makes one of it."""
    furthest = _widen(_round(stored * grid.furthest, grid.served))
    wrong = (stored.to(tl.int32, bitcast=True) != scale.to(tl.int32, bitcast=True)) | (scale != scale)
    return wrong | (_magnitude(furthest) >= 0x7F800000)


@triton.jit
def _report(found, w, field, stored, scale, grid: tl.constexpr):
    """Set `found` if a code of `w` ``[R, C]``, or the stored scale of a row of it, is not as it should be."""
    beyond = _beyond(field, w, tl.where(scale == 0, 1.0, scale)[:, None], grid)
    wrong = (tl.max(beyond, 1) > 0) | _scale_is_wrong(stored, scale, grid)
    tl.store(found + tl.arange(0, w.shape[0]) * 0, 1, mask=wrong)


@triton.jit
def _check_rows_kernel(
    weight, words, scales, of_rows, found, rows, columns, size: tl.constexpr, block: tl.constexpr, grid: tl.constexpr
):
    """Look at `block` rows, and `size` columns of them, and set `found` if anything is not as it should be.

    A row is a group, or else `of_rows` has its scale.
    """
    n = tl.program_id(0) * block + tl.arange(0, block)
    k = tl.program_id(1) * size + tl.arange(0, size)
    inside = (n < rows)[:, None] & (k < columns)[None, :]
    w = _widen(tl.load(weight + n.to(tl.int64)[:, None] * columns + k[None, :], mask=inside, other=0.0))
    stored = _widen(tl.load(scales + n, mask=n < rows, other=0.0))
    if of_rows is None:
        scale = _scale_of_rows(w, grid)
    else:
        scale = tl.load(of_rows + n, mask=n < rows, other=0.0)
    _report(found, w, _fields_of_rows(words, n, rows, columns, size, grid), stored, scale, grid)


@triton.jit
def _check_tiles_kernel(
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
    block: tl.constexpr,
    grid: tl.constexpr,
):
    """Look at 64 rows and `block` columns of one matrix, and set `found` if anything is not as it should be.

    With `of_rows`, the scales of whole rows, groups are cut at will.
    """
    matrix = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * 64
    k = tl.program_id(0) * block + tl.arange(0, block)[None, :]
    at = (matrix * rows + first) * columns + tl.arange(0, 64)[:, None] * columns + k
    w = _widen(tl.load(weight + at, mask=k < columns, other=0.0))
    field = _fields_of_tiles(words + matrix * rows * (columns // (32 // grid.bits)), rows, columns, block, grid)
    # A row for each group.
    here: tl.constexpr = block // size
    w, field = tl.reshape(w, [64 * here, size]), tl.reshape(field, [64 * here, size])
    n = tl.program_id(1) * 64 + tl.arange(0, 64 * here) // here
    group = tl.program_id(0) * here + tl.arange(0, 64 * here) % here
    if of_rows is None:
        scale = _scale_of_rows(w, grid)
    else:
        group = group * 0
        scale = tl.load(of_rows + matrix * rows + n)
    place = matrix * rows * groups + _place_of_scale(n, group, rows, alone)
    stored = _widen(tl.load(scales + place, mask=group < groups, other=0.0))
    _report(found, w, field, stored, scale, grid)


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
    matrices, groups, rule = math.prod(lead), spec.num_groups(k), _grid(spec, master)
    by_row = None
    if spec.group_size is None:
        block = max(8, min(triton.next_power_of_2(k), ROW_BLOCK))
        by_row = _Launch(_row_scales_kernel, (matrices * n, 1, 1), (k, block, rule))
    if marlin:
        programs = (triton.cdiv(k, MARLIN_COLUMNS), n // 64, matrices)
        sizes = (n, k, groups, groups == 1, spec.group_size or MARLIN_COLUMNS, MARLIN_COLUMNS)
        return by_row, _Launch(_check_tiles_kernel, programs, (*sizes, rule), warps=8)
    # Groups are rows, one after another.
    rows, columns, size = matrices * n * groups, k // groups, spec.group_size or COLUMNS
    programs = (triton.cdiv(rows, BLOCK // size), triton.cdiv(columns, size), 1)
    return by_row, _Launch(_check_rows_kernel, programs, (rows, columns, size, BLOCK // size, rule))


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
