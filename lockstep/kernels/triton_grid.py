"""The grid, fused: amax, scale, codes and what is made of them in one pass over memory (Triton).

This module is the ``quantize`` kernel "triton" (`kernels.Quantizer`): weights here, inputs in `triton_activations`, the
GEMMs that torch lacks in `triton_scaled_mm`.

Each function is ``torch.equal`` to what `grid` and `layouts` compute (C2). What that takes, beside `grid`'s order and
what `triton_arithmetic` says of divisions:

* Rounding half to even by adding and subtracting 1.5 * 2**23: exact below 2**22, and whatever is beyond is clamped.
  Added 8 more, the sum's low bits are the field of a word.
* Where weight and scale have 16 bits, w times the reciprocal of the scale instead of the division. A quotient of two
  numbers of 11 bits or less that is not half an integer is at least 2**-13 away from any; the product is off by less
  than 2**-15, in 8 bits. So rounded to multiples of 2**-14 (plus and minus 768), a tie is a tie again, and nothing
  else is.
* Magnitudes compared as integers, where NaN is above infinity and so takes its whole group. The served weight is NaN
  there; which codes stand beside a NaN scale, or an infinite one of pow2/448, is left to the hardware.

Learned scales are read where the others are computed; they may be negative, which a division here does not take, so the
sign goes to the weight. Their gradients are equal to grid's but for the order in which a scale's are summed.

A weight is read once and its result written once: 4 bytes a bf16 weight for a fake quantization, which runs at the
speed of a copy; 2.5 for packing, where arithmetic shows. A group is contiguous in memory, so the grouped kernels see a
flat list of groups; a channel-wise row may be longer than the registers are, and is read again while it is still in the
cache. A tensor's scale comes from its largest magnitude, which is given, or found by torch in a pass of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep import grid
from lockstep.kernels import operators, triton_activations, triton_check, triton_scaled_mm
from lockstep.kernels.triton_arithmetic import (
    INTERPRETED,
    TL_DTYPES,
    _divide,
    _Launch,
    _magnitude,
    _power_of_two_up,
    _reciprocal,
    _round,
    _widen,
)
from lockstep.layouts import marlin
from lockstep.scheme import BLOCK as TILE
from lockstep.scheme import RULES, Scheme, TensorSpec

# The fastest on an H200.
BLOCK = 2048  # weights of a program
PACK_BLOCK = 4096  # weights of a program that packs
ROW_BLOCK = 4096  # weights of a row that are read at a time
MARLIN_BLOCK = 128  # inputs of a tile for Marlin, beside its 64 outputs
UNPACK_BLOCK = 512  # words of a program that unpacks

FUSED_RULES = ("amax/7", "amax/7.5", "max/-8", "amax/127", "amax/127.5", "amax/448", "pow2/448")

# The sum of eight fp32 exponents of 1.5 * 2**23, each shifted left by another multiple of 4, modulo 2**32.
_EXPONENTS = tl.constexpr(0x4B400000 * 0x11111111 % 2**32)


@dataclass(frozen=True, eq=False)  # `_rule` makes one of each, and hashing it by identity is quick
class Rule:
    """A `TensorSpec` and a master's dtype, as the compiler wants them."""

    divisor: float
    low: float
    high: float
    signed: bool  # the rule max/-8
    any_sign: bool  # scales that are given
    fp8: bool
    power_of_two: bool
    exact: tl.dtype  # in which the extreme is divided
    quotient: tl.dtype  # in which the weight is divided
    by_reciprocal: bool  # no need to divide: see above
    scale: tl.dtype
    limit: float  # the largest scale


# The arithmetic of grid.py -------------------------------------------------------------------------------------------


@triton.jit
def _scale(extreme, rule: tl.constexpr):
    """The scale of a group whose `extreme` is given, rounded to its dtype, in fp32."""
    scale = _widen(_round(tl.div_rn(extreme, tl.full(extreme.shape, rule.divisor, tl.float32)), rule.exact))
    if rule.power_of_two:
        return _power_of_two_up(scale)
    scale = tl.where(scale > rule.limit, rule.limit, tl.where(scale < -rule.limit, -rule.limit, scale))  # NaN stays
    return _widen(_round(scale, rule.scale)) + 0.0  # + 0.0 makes -0 a 0


@triton.jit
def _quotient(w, scale, rule: tl.constexpr):
    """What rounds half to even to the code of `w`, in fp32; `scale` has one element where `w` has a group."""
    if rule.any_sign:
        w, scale = tl.where(scale < 0, w * -1.0, w), tl.abs(scale)
    divisor = tl.where(scale == 0, 1.0, scale)
    if rule.signed:
        quotient = tl.floor(w * _reciprocal(divisor) + 8.5) - 8
    elif rule.by_reciprocal:
        lift = tl.where(divisor < 1.1754944e-38, 16777216.0, 1.0)  # a denormal's reciprocal is infinite
        quotient = (w * lift) * _reciprocal(divisor * lift)
        quotient = (quotient + 768.0) - 768.0
    elif rule.fp8:
        quotient = tl.where(scale == 0, 0.0, _divide(w, divisor))
    else:
        quotient = _widen(_round(_divide(w, divisor), rule.quotient))
    return tl.minimum(tl.maximum(quotient, rule.low), rule.high)


@triton.jit
def _codes(w, scale, rule: tl.constexpr):
    """The codes of `w`, in fp32."""
    if rule.fp8:
        return _widen(_round(_quotient(w, scale, rule), tl.float8e4nv))
    return (_quotient(w, scale, rule) + 12582912.0) - 12582912.0


@triton.jit
def _result(w, scale, dtype: tl.constexpr, rule: tl.constexpr, result: tl.constexpr):
    """What `result` names, in `dtype`: "weight", "codes", or "bytes", which are the words of codes of 8 bits."""
    if result == "bytes":
        value = (_quotient(w, scale, rule) + (12582912.0 + 128)).to(tl.int32, bitcast=True).to(tl.int8)
    elif result == "codes" and dtype == tl.int8:  # the low byte of the sum: a conversion takes four times as long
        value = (_quotient(w, scale, rule) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    elif result == "codes" and dtype == tl.float8e4nv:
        value = _round(_quotient(w, scale, rule), dtype)
    elif result == "codes":
        value = _round(_codes(w, scale, rule), dtype)
    else:
        value = _round(_codes(w, scale, rule) * scale, dtype)
    return value


@triton.jit
def _fields(w, scale, shift, rule: tl.constexpr):
    """``code + 8`` in the low bits, shifted left; what is above them `_EXPONENTS` takes off the sum of eight."""
    return (_quotient(w, scale, rule) + (12582912.0 + 8)).to(tl.int32, bitcast=True) << shift


@triton.jit
def _group_scale(w, axis: tl.constexpr, rule: tl.constexpr):
    """The scales of groups that lie along `axis` of `w`, which is 1 wide in the result."""
    magnitude = _magnitude(w)
    if rule.signed:
        first = tl.expand_dims(tl.argmax(magnitude, axis), axis)
        here = tl.arange(0, w.shape[axis])
        for _ in tl.static_range(axis):
            here = tl.expand_dims(here, 0)
        extreme = tl.sum(tl.where(here == first, w, 0.0), axis)
    else:
        extreme = tl.max(magnitude, axis).to(tl.float32, bitcast=True)
    return tl.expand_dims(_scale(extreme, rule), axis)


@triton.jit
def _given_scale(at, inside, rule: tl.constexpr):
    """Learned scales, rounded to their dtype, in fp32."""
    return _widen(_round(tl.load(at, mask=inside).to(tl.float32), rule.scale))


@triton.jit
def _words(w, scale, rule: tl.constexpr):
    """Weights ``[rows, 8 * n]`` to words ``[rows, n]``, lowest bits first."""
    shift = 4 * (tl.arange(0, w.shape[1])[None, :] % 8)
    fields = tl.reshape(_fields(w, scale, shift, rule), [w.shape[0], w.shape[1] // 8, 8])
    return tl.sum(fields, 2) - _EXPONENTS


@triton.jit
def _unpacked(words, fields: tl.constexpr = 8):
    """The codes ``[n, fields]`` of words ``[n]``, in fp32."""
    width: tl.constexpr = 32 // fields
    field = (words[:, None] >> (width * tl.arange(0, fields))[None, :]) & ((1 << width) - 1)
    return (field - (1 << (width - 1))).to(tl.float32)


# A program a block of groups, or a row. `result` is one of `_result`'s, "words" or "scale". ---------------------------


@triton.jit
def _groups_kernel(
    weight, given, out, scales, groups, size: tl.constexpr, block: tl.constexpr, rule: tl.constexpr,
    result: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * block
    row = tl.arange(0, block)[:, None]
    inside = first + row < groups
    at = row * size + tl.arange(0, size)[None, :]
    w = _widen(tl.load(weight + first * size + at, mask=inside, other=0.0))
    scale = _group_scale(w, 1, rule) if given is None else _given_scale(given + first + row, inside, rule)
    if result == "words":
        word = row * (size // 8) + tl.arange(0, size // 8)[None, :]
        tl.store(out + first * (size // 8) + word, _words(w, scale, rule), mask=inside)
    elif result != "scale":
        tl.store(out + first * size + at, _result(w, scale, out.dtype.element_ty, rule, result), mask=inside)
    if scales is not None:
        tl.store(scales + first + row, _round(scale, rule.scale), mask=inside)


@triton.jit
def _rows_kernel(
    weight, given, out, scales, size: tl.constexpr, block: tl.constexpr, rule: tl.constexpr, result: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)[None, :]
    if given is None:
        largest = tl.zeros([1, block], tl.int32)
        for start in range(0, size, block):
            w = _widen(tl.load(weight + row * size + start + column, mask=start + column < size, other=0.0))
            largest = tl.maximum(largest, _magnitude(w))
        scale = _scale(tl.max(largest, 1).to(tl.float32, bitcast=True), rule)[:, None]
    else:
        scale = _given_scale(given + row + tl.zeros([1, 1], tl.int32), None, rule)
    if result != "scale":
        for start in range(0, size, block):
            inside = start + column < size
            w = _widen(tl.load(weight + row * size + start + column, mask=inside, other=0.0))
            if result == "words":
                word = start // 8 + tl.arange(0, block // 8)[None, :]
                tl.store(out + row * (size // 8) + word, _words(w, scale, rule), mask=word < size // 8)
            else:
                value = _result(w, scale, out.dtype.element_ty, rule, result)
                tl.store(out + row * size + start + column, value, mask=inside)
    if scales is not None:  # last: a row that fits a program is then read once
        tl.store(scales + row + tl.zeros([1, 1], tl.int32), _round(scale, rule.scale))


@triton.jit
def _gradients_kernel(
    grad, weight, given, grad_weight, grad_scale, rows, size: tl.constexpr, block: tl.constexpr, chunk: tl.constexpr,
    rule: tl.constexpr, balance: tl.constexpr
):  # fmt: skip
    """`grid.learned_gradients` of `block` groups or rows of `size` weights, `chunk` of each at a time."""
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)[:, None]
    column = tl.arange(0, chunk)[None, :]
    scale = _given_scale(given + row, row < rows, rule)
    step = tl.where(scale == 0, 1.0, scale)
    total = tl.zeros([block, chunk], tl.float32)
    for start in range(0, size, chunk):
        inside = (row < rows) & (start + column < size)
        at = row * size + start + column
        w, g = _widen(tl.load(weight + at, mask=inside, other=0.0)), _widen(tl.load(grad + at, mask=inside, other=0.0))
        position = _divide(tl.where(step < 0, w * -1.0, w), tl.abs(step))
        within = (position >= rule.low) & (position <= rule.high)
        code = _codes(w, scale, rule)
        total += g * tl.where(within, code - position, code)
        tl.store(grad_weight + at, _round(tl.where(within, g, g * 0.0), grad_weight.dtype.element_ty), mask=inside)
    tl.store(grad_scale + row, (tl.sum(total, 1) * balance)[:, None], mask=row < rows)


@triton.jit
def _tensor_kernel(
    weight, amax, out, scales, size: tl.constexpr, block: tl.constexpr, rule: tl.constexpr, result: tl.constexpr
):
    """A block of a matrix of `size` weights, whose largest magnitude is `amax`."""
    matrix = tl.program_id(1).to(tl.int64)
    scale = _scale(tl.zeros([1], tl.float32) + tl.load(amax + matrix), rule)
    if scales is not None:  # noqa: SIM102 - Triton would look at both
        if tl.program_id(0) == 0:
            tl.store(scales + matrix + tl.arange(0, 1), _round(scale, rule.scale))
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    w = _widen(tl.load(weight + matrix * size + at, mask=at < size, other=0.0))
    value = _result(w, scale, out.dtype.element_ty, rule, result)
    tl.store(out + matrix * size + at, value, mask=at < size)


@triton.jit
def _tiles_kernel(
    weight, out, scales, n: tl.constexpr, k: tl.constexpr, tile: tl.constexpr, rule: tl.constexpr, result: tl.constexpr
):
    """A square of `tile` x `tile` weights, or what the matrix has left of it."""
    matrix = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * tile + tl.arange(0, tile)[:, None]
    column = tl.program_id(0) * tile + tl.arange(0, tile)[None, :]
    inside, at = (row < n) & (column < k), (matrix * n + row) * k + column
    w = _widen(tl.load(weight + at, mask=inside, other=0.0))
    extreme = tl.max(tl.max(_magnitude(w), 1), 0).to(tl.float32, bitcast=True)
    scale = _scale(tl.zeros([1, 1], tl.float32) + extreme, rule)
    tl.store(out + at, _result(w, scale, out.dtype.element_ty, rule, result), mask=inside)
    if scales is not None:
        place = (matrix * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        tl.store(scales + place + tl.zeros([1, 1], tl.int32), _round(scale, rule.scale))


@triton.jit
def _marlin_kernel(
    weight, out, scales, n, k, size: tl.constexpr, block: tl.constexpr, rule: tl.constexpr, grouped: tl.constexpr
):
    """A tile of 64 outputs and `block` inputs, to words and scales in the order of `layouts.marlin`.

    The tile of codes is read as ``[w 4, h 2, e 8, tile, d 2, a 4, p 2]`` (see there). Where a field stands in its word
    follows from (p, h, d) alone, so a word is the sum over those three axes of fields that are shifted already.
    Without groups the scales are those of the rows, and are read.
    """
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * 64 + tl.arange(0, 64)[:, None]
    column = tl.program_id(0) * block + tl.arange(0, block)[None, :]
    w = _widen(tl.load(weight + (expert * n + row) * k + column, mask=column < k, other=0.0))
    shift = 4 * (row // 8 % 2 * 2 + column // 8 % 2 + column % 2 * 4)
    if grouped:
        groups: tl.constexpr = block // size
        w = tl.reshape(w, [64, groups, size])
        scale = _group_scale(w, 2, rule)
        fields = _fields(w, scale, tl.reshape(shift, [64, groups, size]), rule)
        group = tl.program_id(0) * groups + tl.arange(0, groups)[None, :]
        place = (expert * (k // size) + group) * n + row // 64 * 64 + 8 * (row % 8) + row % 64 // 8
        tl.store(scales + place, _round(tl.reshape(scale, [64, groups]), rule.scale), mask=group < k // size)
    else:
        fields = _fields(w, _widen(tl.load(scales + expert * n + row)), shift, rule)
    fields = tl.reshape(fields, [4, 2, 8, block // 16, 2, 4, 2])
    words = tl.permute(tl.sum(tl.sum(tl.sum(fields, 6), 1), 3), [2, 1, 3, 0]) - _EXPONENTS
    tile = tl.program_id(0) * (block // 16) + tl.arange(0, block // 16)[:, None]
    place = (expert * (k // 16) + tile) * (2 * n) + tl.program_id(1) * 128 + tl.arange(0, 128)[None, :]
    tl.store(out + place, tl.reshape(words, [block // 16, 128]), mask=tile < k // 16)


@triton.jit
def _dequantize_kernel(packed, scales, out, words, size: tl.constexpr, fields: tl.constexpr, block: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * block
    word = first + tl.arange(0, block)
    inside = word < words
    value = _unpacked(tl.load(packed + word, mask=inside, other=0), fields)
    if scales is not None:
        value *= _widen(tl.load(scales + word // (size // fields), mask=inside, other=0.0))[:, None]
    at = tl.arange(0, block)[:, None] * fields + tl.arange(0, fields)[None, :]
    tl.store(out + first * fields + at, _round(value, out.dtype.element_ty), mask=inside[:, None])


# The operators -------------------------------------------------------------------------------------------------------


def pack_quantized(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Words int32 ``[..., N, K * bits / 32]`` (`layouts.words`) and scales ``[..., N, G]`` of `weight` ``[..., N, K]``.

    Raises:
        ValueError: K does not fill words, or the codes are no integers.
    """
    *rows, k = weight.shape
    fields = _integers_in_a_word(spec)
    if k % fields:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)}: words hold {fields} codes, {k} inputs do not fill them."
        )
    words, scale = weight.new_empty(*rows, k // fields, dtype=torch.int32), _empty_scale(weight, spec)
    if spec.bits == 8:
        _run(weight, spec, None, words.view(torch.int8), scale, "bytes")
    else:
        _run(weight, spec, None, words, scale, "words")
    return words, scale


def pack_marlin(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Words int32 ``[..., K/16, N * bits / 2]`` and scales ``[..., G, N]`` in the order of `layouts.marlin`.

    Codes of 8 bits are brought into that order by torch.

    Raises:
        ValueError: N is not a multiple of 64 or K not one of 16, or the codes are no integers.
    """
    *experts, n, k = weight.shape
    marlin.check(n, k, spec.bits)
    if _integers_in_a_word(spec) == 4:
        codes, scale = _quantize(weight, spec, torch.int8)
        return marlin.pack_weight(codes, spec.bits), marlin.pack_scales(scale)
    launch, weight = _marlin_launch(spec, weight.dtype, weight.shape), weight.contiguous()
    words, scale = weight.new_empty(*experts, k // 16, 2 * n, dtype=torch.int32), _empty_scale(weight, spec)
    groups = scale.shape[-1]
    if groups == 1:  # a row may be longer than a tile
        _run(weight, spec, None, None, scale, "scale")
    launch(weight, words, scale)
    return words, marlin.pack_scales(scale) if groups == 1 else scale.view(*experts, groups, n)


def dequantize_packed(packed: Tensor, scale: Tensor | None, spec: TensorSpec) -> Tensor:
    """``RN(code * scale)`` ``[..., N, K]`` in the served dtype, or the codes themselves without `scale`.

    `packed` int32 ``[..., N, K * bits / 32]`` and `scale` ``[..., N, G]`` are those of `pack_quantized`.
    """
    *rows, columns = packed.shape
    fields = _integers_in_a_word(spec)
    groups = spec.num_groups(columns * fields)
    if packed.dtype != torch.int32 or (scale is not None and scale.shape != (*rows, groups)):
        raise ValueError(
            f"words are int32 [..., N, K/{fields}] and scales [..., N, {groups}] for {spec}; found {packed.dtype} "
            f"{tuple(packed.shape)} and {None if scale is None else tuple(scale.shape)}."
        )
    out = packed.new_empty(*rows, columns * fields, dtype=spec.served_dtype)
    scale = None if scale is None else scale.contiguous()
    _dequantize_launch(spec, packed.shape)(packed.contiguous(), scale, out)
    return out


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, or None if they can."""
    if device.type == "cpu" and not INTERPRETED.value:
        return "Triton runs on the CPU only in its interpreter: set TRITON_INTERPRET=1 before Lockstep is imported"
    if device.type not in ("cpu", "cuda"):
        return f"they run on CUDA, the weight is on {device}"
    return None


def not_fused(scheme: Scheme) -> str | None:
    """Why no kernel here computes `scheme` in one pass, or None."""
    weights, inputs = scheme.weights, scheme.activations
    if weights.scale_rule not in FUSED_RULES:
        return f"weights are fused for the rules {', '.join(FUSED_RULES)}, found {weights.scale_rule}"
    if inputs is not None and inputs.group_size not in (None, 128):
        return f"inputs are fused by token, by tensor and in groups of 128, found {inputs}"
    return None


def _integers_in_a_word(spec: TensorSpec) -> int:
    if spec.format not in ("int4", "int8"):
        raise ValueError(f"words hold integers, found {spec}.")
    return 32 // spec.bits


def _fake_quantize(weight: Tensor, spec: TensorSpec, amax: Tensor | None = None, given: Tensor | None = None) -> Tensor:
    out = torch.empty(weight.shape, dtype=spec.served_dtype, device=weight.device)
    _run(weight, spec, amax, out, None, "weight", given)
    return out


def _quantize(
    weight: Tensor, spec: TensorSpec, dtype: torch.dtype, amax: Tensor | None = None, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    codes, scale = torch.empty(weight.shape, dtype=dtype, device=weight.device), _empty_scale(weight, spec)
    _run(weight, spec, amax, codes, scale, "codes", given)
    return codes, scale


def _learned_gradients(grad: Tensor, weight: Tensor, scale: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    of_weight, of_scale = (torch.empty_like(one, memory_format=torch.contiguous_format) for one in (weight, scale))
    launch = _gradients_launch(spec, weight.dtype, weight.shape)
    launch(grad.contiguous(), weight.contiguous(), scale.contiguous(), of_weight, of_scale)
    return of_weight, of_scale


def _run(
    weight: Tensor,
    spec: TensorSpec,
    amax: Tensor | None,
    out: Tensor | None,
    scale: Tensor | None,
    result: str,
    given: Tensor | None = None,
) -> None:
    launch = _quantize_launch(spec, weight.dtype, weight.shape, result, given is not None)
    weight = weight.contiguous()
    if spec.strategy in ("group", "channel"):
        launch(weight, None if given is None else given.contiguous(), out, scale)
        return
    if given is not None:
        raise ValueError(f"scales are given for groups and channels, found {spec}.")
    if spec.strategy == "block":
        launch(weight, out, scale)
        return
    amax = grid.largest(weight) if amax is None else amax.float().expand(*weight.shape[:-2], 1, 1).contiguous()
    if not weight.numel() and scale is not None:
        scale.copy_(grid.quantize(weight, spec, amax).scale)
    launch(weight, amax, out, scale)


def _empty_scale(weight: Tensor, spec: TensorSpec) -> Tensor:
    return weight.new_empty(_scale_shape(spec, weight.dtype, weight.shape), dtype=spec.scale_dtype)


def _fp8_input_gradient(grad: Tensor, weight: Tensor, spec: TensorSpec, amax: Tensor | None) -> Tensor:
    codes, scale = _quantize(weight, spec, torch.float8_e4m3fn, amax)
    return triton_activations.fp8_input_gradient(grad, codes, scale)


fake_quantize = operators.fake_quantize("lockstep::triton_fake_quantize", _fake_quantize)
quantize = operators.quantize("lockstep::triton_quantize", _quantize)
quantize_activations = triton_activations.quantize
dequantize_activations = triton_activations.dequantize
scaled_linear = triton_scaled_mm.linear
learned_gradients = operators.learned_gradients("lockstep::triton_learned_gradients", _learned_gradients)
fp8_input_gradient = operators.input_gradient("lockstep::triton_fp8_input_gradient", _fp8_input_gradient)
check_packed = triton_check.check_packed


# Launching -----------------------------------------------------------------------------------------------------------


@lru_cache
def _scale_shape(spec: TensorSpec, master: torch.dtype, shape: torch.Size) -> tuple[int, ...]:
    grid.check(master, shape, spec)
    return (*shape[:-2], *spec.scale_shape(*shape[-2:]))


@lru_cache
def _quantize_launch(spec: TensorSpec, master: torch.dtype, shape: torch.Size, result: str, given: bool) -> _Launch:
    grid.check(master, shape, spec)
    rule, (n, k) = _rule(spec, master, given), shape[-2:]
    matrices = math.prod(shape[:-2])
    if spec.strategy == "tensor":
        return _Launch(_tensor_kernel, (triton.cdiv(n * k, BLOCK), matrices, 1), (n * k, BLOCK, rule, result))
    if spec.strategy == "block":
        programs = (triton.cdiv(k, TILE), triton.cdiv(n, TILE), matrices)
        return _Launch(_tiles_kernel, programs, (n, k, TILE, rule, result), warps=8)
    size = spec.group_size or k
    rows = shape.numel() // size
    if spec.group_size:
        block = (PACK_BLOCK if result == "words" else BLOCK) // size
        return _Launch(_groups_kernel, (triton.cdiv(rows, block), 1, 1), (rows, size, block, rule, result))
    block = max(8, min(triton.next_power_of_2(size), ROW_BLOCK))
    return _Launch(_rows_kernel, (rows, 1, 1), (size, block, rule, result))


@lru_cache
def _gradients_launch(spec: TensorSpec, master: torch.dtype, shape: torch.Size) -> _Launch:
    grid.check(master, shape, spec)
    size = spec.group_size or shape[-1]
    rows = shape.numel() // size
    chunk = spec.group_size or max(8, min(triton.next_power_of_2(size), ROW_BLOCK))
    block = BLOCK // chunk if spec.group_size else 1
    arguments = (rows, size, block, chunk, _rule(spec, master, given=True), grid.lsq_balance(size, spec))
    return _Launch(_gradients_kernel, (triton.cdiv(rows, block), 1, 1), arguments, warps=8)  # 4 take 220 registers each


@lru_cache
def _marlin_launch(spec: TensorSpec, master: torch.dtype, shape: torch.Size) -> _Launch:
    grid.check(master, shape, spec)
    *experts, n, k = shape
    groups = spec.num_groups(k)
    programs = (triton.cdiv(k, MARLIN_BLOCK), n // marlin.TILE_N, math.prod(experts))
    return _Launch(_marlin_kernel, programs, (n, k, k // groups, MARLIN_BLOCK, _rule(spec, master), groups > 1))


@lru_cache
def _dequantize_launch(spec: TensorSpec, shape: torch.Size) -> _Launch:
    fields = 32 // spec.bits
    size, words = spec.group_size or shape[-1] * fields, shape.numel()
    return _Launch(_dequantize_kernel, (triton.cdiv(words, UNPACK_BLOCK), 1, 1), (words, size, fields, UNPACK_BLOCK))


@cache
def _rule(spec: TensorSpec, master: torch.dtype, given: bool = False) -> Rule:
    """The rule of `spec` for a master of dtype `master`, with the dtypes of `grid`'s table; `given`: of its scales."""
    if spec.scale_rule not in FUSED_RULES:
        raise NotImplementedError(f"{spec.scale_rule}: add its branch to _quotient, and its dtypes here.")
    in_own_dtype = spec.scale_rule in ("amax/7.5", "amax/127.5")
    in_16_bits = torch.float32 not in (master, spec.scale_dtype)
    return Rule(
        *RULES[spec.scale_rule][1:4],
        signed=spec.scale_rule == "max/-8",
        any_sign=given,
        fp8=spec.format == "fp8_e4m3",
        power_of_two=spec.scale_rule == "pow2/448",
        exact=TL_DTYPES[master if in_own_dtype else torch.float32],
        quotient=TL_DTYPES[torch.promote_types(master, spec.scale_dtype) if in_own_dtype else torch.float32],
        by_reciprocal=spec.scale_rule in ("amax/7", "amax/127") and in_16_bits,
        scale=TL_DTYPES[spec.scale_dtype],
        limit=torch.finfo(spec.scale_dtype).max,
    )
