"""The grid, fused: amax, scale, codes and what is made of them in one pass over memory (Triton).

Each function is ``torch.equal`` to what `grid` and `layouts` compute (C2). What that takes, beside `grid`'s order:

* ``div_rn``, the IEEE division; Triton's ``/`` may be off by a unit in the last place.
* ``enable_fp_fusion=False``: ``w * (1 / scale) + 8.5`` rounds twice in `grid`, a fused multiply-add once.
* Rounding half to even by adding and subtracting 1.5 * 2**23: exact below 2**22, and whatever is beyond is clamped.
  Added 8 more, the sum's low bits are the field of a word.
* Where weight and scale have 16 bits, w times the reciprocal of the scale instead of the division. A quotient of two
  numbers of 11 bits or less that is not half an integer is at least 2**-13 away from any; the product is off by less
  than 2**-20. So rounded to multiples of 2**-14 (plus and minus 768), a tie is a tie again, and nothing else is.
* Magnitudes compared as integers, where NaN is above infinity and so takes its whole group. The served weight is NaN
  there; which codes stand beside the NaN scale is left to the hardware.

A weight is read once and its result written once: 4 bytes a bf16 weight for a fake quantization, which runs at the
speed of a copy; 2.5 for packing, where arithmetic shows. A group is contiguous in memory, so the grouped kernels see a
flat list of groups; a channel-wise row may be longer than the registers are, and is read again while it is still in the
cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep import grid
from lockstep.kernels import operators
from lockstep.layouts import marlin
from lockstep.scheme import RULES, TensorSpec

TL_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.int8: tl.int8,
    torch.int32: tl.int32,
}

# Triton's interpreter drops bf16 denormals and does not round ties to even; with integers it does as the GPU does.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# The fastest on an H200.
BLOCK = 2048  # weights of a program
PACK_BLOCK = 4096  # weights of a program that packs
ROW_BLOCK = 4096  # weights of a row that are read at a time
MARLIN_BLOCK = 128  # inputs of a tile for Marlin, beside its 64 outputs
UNPACK_BLOCK = 512  # words of a program that unpacks

# The sum of eight fp32 exponents of 1.5 * 2**23, each shifted left by another multiple of 4, modulo 2**32.
_EXPONENTS = tl.constexpr(0x4B400000 * 0x11111111 % 2**32)


@dataclass(frozen=True, eq=False)  # `_rule` makes one of each, and hashing it by identity is quick
class Rule:
    """A `TensorSpec` and a master's dtype, as the compiler wants them."""

    divisor: float
    low: int
    high: int
    signed: bool  # the rule max/-8
    exact: tl.dtype  # in which the extreme is divided
    quotient: tl.dtype  # in which the weight is divided
    by_reciprocal: bool  # no need to divide: see above
    scale: tl.dtype
    limit: float  # the largest scale


# The arithmetic of grid.py -------------------------------------------------------------------------------------------


@triton.jit
def _widen(x):
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _round(x, dtype: tl.constexpr):
    """RN(x) in `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        even = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x10000)
        return (even >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _magnitude(w):
    return w.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(extreme, rule: tl.constexpr):
    """The scale of a group whose `extreme` is given, rounded to its dtype, in fp32."""
    scale = _widen(_round(tl.div_rn(extreme, tl.full(extreme.shape, rule.divisor, tl.float32)), rule.exact))
    scale = tl.where(scale > rule.limit, rule.limit, tl.where(scale < -rule.limit, -rule.limit, scale))  # NaN stays
    return _widen(_round(scale, rule.scale)) + 0.0  # + 0.0 makes -0 a 0


@triton.jit
def _quotient(w, scale, rule: tl.constexpr):
    """What rounds half to even to the code of `w`, in fp32; `scale` has one element where `w` has a group."""
    divisor = tl.where(scale == 0, 1.0, scale)
    if rule.signed:
        quotient = tl.floor(w * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), divisor) + 8.5) - 8
    elif rule.by_reciprocal:
        lift = tl.where(divisor < 1.1754944e-38, 16777216.0, 1.0)  # a denormal's reciprocal is infinite
        quotient = (w * lift) * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), divisor * lift)
        quotient = (quotient + 768.0) - 768.0
    else:
        quotient = _widen(_round(tl.div_rn(w, tl.broadcast_to(divisor, w.shape)), rule.quotient))
    return tl.minimum(tl.maximum(quotient, rule.low), rule.high)


@triton.jit
def _codes(w, scale, rule: tl.constexpr):
    """The codes of `w`, in fp32."""
    return (_quotient(w, scale, rule) + 12582912.0) - 12582912.0


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
def _words(w, scale, rule: tl.constexpr):
    """Weights ``[rows, 8 * n]`` to words ``[rows, n]``, lowest bits first."""
    shift = 4 * (tl.arange(0, w.shape[1])[None, :] % 8)
    fields = tl.reshape(_fields(w, scale, shift, rule), [w.shape[0], w.shape[1] // 8, 8])
    return tl.sum(fields, 2) - _EXPONENTS


@triton.jit
def _unpacked(words):
    """The codes ``[n, 8]`` of words ``[n]``, in fp32."""
    return (((words[:, None] >> (4 * tl.arange(0, 8))[None, :]) & 0xF) - 8).to(tl.float32)


# A program a block of groups, or a row. `result` is "weight", "codes", "words" or "scale". ----------------------------


@triton.jit
def _groups_kernel(
    weight, out, scales, groups, size: tl.constexpr, block: tl.constexpr, rule: tl.constexpr, result: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * block
    row = tl.arange(0, block)[:, None]
    inside = first + row < groups
    at = row * size + tl.arange(0, size)[None, :]
    w = _widen(tl.load(weight + first * size + at, mask=inside, other=0.0))
    scale = _group_scale(w, 1, rule)
    if result == "words":
        word = row * (size // 8) + tl.arange(0, size // 8)[None, :]
        tl.store(out + first * (size // 8) + word, _words(w, scale, rule), mask=inside)
    elif result != "scale":
        codes = _codes(w, scale, rule)
        value = codes * scale if result == "weight" else codes
        tl.store(out + first * size + at, _round(value, out.dtype.element_ty), mask=inside)
    if scales is not None:
        tl.store(scales + first + row, _round(scale, rule.scale), mask=inside)


@triton.jit
def _rows_kernel(
    weight, out, scales, size: tl.constexpr, block: tl.constexpr, rule: tl.constexpr, result: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)[None, :]
    largest = tl.zeros([1, block], tl.int32)
    for start in range(0, size, block):
        w = _widen(tl.load(weight + row * size + start + column, mask=start + column < size, other=0.0))
        largest = tl.maximum(largest, _magnitude(w))
    scale = _scale(tl.max(largest, 1).to(tl.float32, bitcast=True), rule)
    if scales is not None:
        tl.store(scales + row + tl.arange(0, 1), _round(scale, rule.scale))
    scale = scale[:, None]
    if result != "scale":
        for start in range(0, size, block):
            inside = start + column < size
            w = _widen(tl.load(weight + row * size + start + column, mask=inside, other=0.0))
            if result == "words":
                word = start // 8 + tl.arange(0, block // 8)[None, :]
                tl.store(out + row * (size // 8) + word, _words(w, scale, rule), mask=word < size // 8)
            else:
                codes = _codes(w, scale, rule)
                value = codes * scale if result == "weight" else codes
                tl.store(out + row * size + start + column, _round(value, out.dtype.element_ty), mask=inside)


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
def _dequantize_kernel(packed, scales, out, words, size: tl.constexpr, block: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * block
    word = first + tl.arange(0, block)
    inside = word < words
    value = _unpacked(tl.load(packed + word, mask=inside, other=0))
    if scales is not None:
        value *= _widen(tl.load(scales + word // (size // 8), mask=inside, other=0.0))[:, None]
    at = tl.arange(0, block)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + first * 8 + at, _round(value, out.dtype.element_ty), mask=inside[:, None])


# The operators -------------------------------------------------------------------------------------------------------


def pack_quantized(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Words int32 ``[..., N, K/8]`` (`layouts.words`) and scales ``[..., N, G]`` of `weight` ``[..., N, K]``.

    Raises:
        ValueError: K is not a multiple of 8.
    """
    *rows, k = weight.shape
    if k % 8:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: words hold 8 codes, {k} inputs do not fill them.")
    launch = _quantize_launch(spec, weight.dtype, weight.shape, "words")
    words, scale = weight.new_empty(*rows, k // 8, dtype=torch.int32), _empty_scale(weight, spec)
    launch(weight.contiguous(), words, scale)
    return words, scale


def pack_marlin(weight: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Words int32 ``[..., K/16, 2N]`` and scales ``[..., G, N]`` in the order of `layouts.marlin`.

    Raises:
        ValueError: N is not a multiple of 64 or K not one of 16.
    """
    *experts, n, k = weight.shape
    marlin.check(n, k, spec.bits)
    launch, weight = _marlin_launch(spec, weight.dtype, weight.shape), weight.contiguous()
    words, scale = weight.new_empty(*experts, k // 16, 2 * n, dtype=torch.int32), _empty_scale(weight, spec)
    groups = scale.shape[-1]
    if groups == 1:  # a row may be longer than a tile
        _quantize_launch(spec, weight.dtype, weight.shape, "scale")(weight, None, scale)
    launch(weight, words, scale)
    return words, marlin.pack_scales(scale) if groups == 1 else scale.view(*experts, groups, n)


def dequantize_packed(packed: Tensor, scale: Tensor | None, spec: TensorSpec) -> Tensor:
    """``RN(code * scale)`` ``[..., N, K]`` in the served dtype, or the codes themselves without `scale`.

    `packed` int32 ``[..., N, K/8]`` and `scale` ``[..., N, G]`` are those of `pack_quantized`.
    """
    *rows, columns = packed.shape
    groups = spec.num_groups(columns * 8)
    if packed.dtype != torch.int32 or (scale is not None and scale.shape != (*rows, groups)):
        raise ValueError(
            f"words are int32 [..., N, K/8] and scales [..., N, {groups}] for {spec}; found {packed.dtype} "
            f"{tuple(packed.shape)} and {None if scale is None else tuple(scale.shape)}."
        )
    out = packed.new_empty(*rows, columns * 8, dtype=spec.served_dtype)
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


def _fake_quantize(weight: Tensor, spec: TensorSpec) -> Tensor:
    launch = _quantize_launch(spec, weight.dtype, weight.shape, "weight")
    weight = weight.contiguous()
    out = torch.empty_like(weight, dtype=spec.served_dtype)
    launch(weight, out, None)
    return out


def _quantize(weight: Tensor, spec: TensorSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    launch = _quantize_launch(spec, weight.dtype, weight.shape, "codes")
    weight = weight.contiguous()
    codes, scale = torch.empty_like(weight, dtype=dtype), _empty_scale(weight, spec)
    launch(weight, codes, scale)
    return codes, scale


def _empty_scale(weight: Tensor, spec: TensorSpec) -> Tensor:
    return weight.new_empty(*weight.shape[:-1], spec.num_groups(weight.shape[-1]), dtype=spec.scale_dtype)


fake_quantize = operators.fake_quantize("lockstep::triton_fake_quantize", _fake_quantize)
quantize = operators.quantize("lockstep::triton_quantize", _quantize)


# Launching -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Launch:
    """A kernel with all of its arguments but the tensors.

    Triton's own look-up of a compiled kernel takes longer than a small layer's kernel runs. Here only what the tensors
    bring is looked up: device, dtypes, which are None. Triton compiles another kernel for tensors that do not begin at
    a multiple of 16 bytes, so those take its own way each time.
    """

    kernel: Any
    programs: tuple[int, ...]  # three: a compiled kernel takes no fewer
    arguments: tuple[Any, ...]
    compiled: dict[tuple, Any] = field(default_factory=dict)

    def __call__(self, *tensors: Tensor | None) -> None:
        if 0 in self.programs:
            return
        device = tensors[0].device  # type: ignore[union-attr]
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(*tensors)
            return
        key = (device, *(None if tensor is None else tensor.dtype for tensor in tensors))
        aligned = not any(tensor.data_ptr() % 16 for tensor in tensors if tensor is not None)
        if aligned and (compiled := self.compiled.get(key)) is not None:
            compiled[self.programs](*tensors, *self.arguments)
            return
        launched = self.kernel[self.programs](*tensors, *self.arguments, enable_fp_fusion=False)
        if aligned:
            self.compiled[key] = launched


@lru_cache
def _quantize_launch(spec: TensorSpec, master: torch.dtype, shape: torch.Size, result: str) -> _Launch:
    grid.check(master, shape, spec)
    size = spec.group_size or shape[-1]
    rows, rule = shape.numel() // size if size else 0, _rule(spec, master)
    if spec.group_size:
        block = (PACK_BLOCK if result == "words" else BLOCK) // size
        return _Launch(_groups_kernel, (triton.cdiv(rows, block), 1, 1), (rows, size, block, rule, result))
    block = max(8, min(triton.next_power_of_2(size), ROW_BLOCK))
    return _Launch(_rows_kernel, (rows, 1, 1), (size, block, rule, result))


@lru_cache
def _marlin_launch(spec: TensorSpec, master: torch.dtype, shape: torch.Size) -> _Launch:
    grid.check(master, shape, spec)
    *experts, n, k = shape
    groups = spec.num_groups(k)
    programs = (triton.cdiv(k, MARLIN_BLOCK), n // marlin.TILE_N, math.prod(experts))
    return _Launch(_marlin_kernel, programs, (n, k, k // groups, MARLIN_BLOCK, _rule(spec, master), groups > 1))


@lru_cache
def _dequantize_launch(spec: TensorSpec, shape: torch.Size) -> _Launch:
    size, words = spec.group_size or shape[-1] * 8, shape.numel()
    return _Launch(_dequantize_kernel, (triton.cdiv(words, UNPACK_BLOCK), 1, 1), (words, size, UNPACK_BLOCK))


@cache
def _rule(spec: TensorSpec, master: torch.dtype) -> Rule:
    """The rule of `spec` for a master of dtype `master`, with the dtypes of `grid`'s table."""
    if spec.scale_rule not in ("amax/7", "amax/7.5", "max/-8"):
        raise NotImplementedError(f"{spec.scale_rule}: add its branch to _quotient, and its dtypes here.")
    in_own_dtype = spec.scale_rule == "amax/7.5"
    return Rule(
        *RULES[spec.scale_rule],
        signed=spec.scale_rule == "max/-8",
        exact=TL_DTYPES[master if in_own_dtype else torch.float32],
        quotient=TL_DTYPES[torch.promote_types(master, spec.scale_dtype) if in_own_dtype else torch.float32],
        by_reciprocal=spec.scale_rule == "amax/7" and torch.float32 not in (master, spec.scale_dtype),
        scale=TL_DTYPES[spec.scale_dtype],
        limit=torch.finfo(spec.scale_dtype).max,
    )
