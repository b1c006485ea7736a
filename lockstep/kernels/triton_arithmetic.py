"""What the fused kernels share: rounding, division, and the launch of a compiled kernel (Triton).

What it takes to be ``torch.equal`` to plain torch, beside its order of operations:

* ``div_rn``, the IEEE division; Triton's ``/`` may be off by a unit in the last place.
* ``enable_fp_fusion=False``: a product and a sum round twice, a fused multiply-add once.
* Where many numbers have one divisor: the quotient by its reciprocal, corrected twice with an exact remainder, which is
  how CUDA itself divides, less its look at each number for one that overflows (Markstein, IBM J. R&D 34, 1990).
"""

# mypy: allow-untyped-defs
# (what Triton compiles has no Python types)

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TL_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.int8: tl.int8,
    torch.int32: tl.int32,
}

# Triton's interpreter drops bf16 denormals, rounds ties away from even, and has no rounding to fp8 nor a fused
# multiply-add; with integers and float64 it does as the GPU does.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Divisors beyond these are multiplied, with what they divide, so that reciprocals and remainders are normal numbers.
_SMALL, _UP = tl.constexpr(2.0**-40), tl.constexpr(2.0**80)
_LARGE, _DOWN = tl.constexpr(2.0**100), tl.constexpr(2.0**-80)


@triton.jit
def _widen(x):
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if INTERPRETED and x.dtype == tl.float8e4nv:
        byte = x.to(tl.int8, bitcast=True).to(tl.int32)
        magnitude = byte & 0x7F
        normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
        bits = tl.where(magnitude == 0x7F, 0x7FC00000, value.to(tl.int32, bitcast=True))
        return (bits | ((byte & 0x80) << 24)).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _round(x, dtype: tl.constexpr):
    """RN(x) of fp32 in `dtype`, ties to even; in fp8 saturating, as the GPU's conversion does."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        even = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x10000)
        return (even >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    if INTERPRETED and dtype == tl.float8e4nv:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        steps = magnitude.to(tl.float32, bitcast=True) * 512.0 + 12582912.0  # of 2**-9, below 2**-6
        code = tl.where(magnitude < 0x3C800000, steps.to(tl.int32, bitcast=True) - 0x4B400000, normal)
        code = tl.where(x == x, code | ((bits >> 24) & 0x80), 0x7F)
        return code.to(tl.int8).to(tl.float8e4nv, bitcast=True)
    return x.to(dtype)


@triton.jit
def _magnitude(w):
    """|w| as an integer: NaN is above infinity."""
    return w.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _reciprocal(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def _divide_normal(x, y):
    """RN(x / y) with the sign of `x`, for y from 2**-70 to 2**120, one element for a group of `x`, and finite x / y.

    Quotients below 2**-32 may be off, but no larger than that.
    """
    if INTERPRETED:
        return tl.div_rn(x, tl.broadcast_to(y, x.shape))
    inverse = _reciprocal(y)
    # Times -1.0: Triton's minus is a subtraction from 0. Remainders are quotient * y - x: so a -0 stays one.
    minus_x, minus_inverse = x * -1.0, inverse * -1.0
    quotient = x * inverse
    quotient = tl.fma(tl.fma(quotient, y, minus_x), minus_inverse, quotient)
    return tl.fma(tl.fma(quotient, y, minus_x), minus_inverse, quotient)


@triton.jit
def _divide(x, y):
    """RN(x / y) with the sign of `x`, up to 1024, for any finite y > 0, one element for a group of `x`; else 1024."""
    lift = tl.where(y < _SMALL, _UP, tl.where(y > _LARGE, _DOWN, 1.0))
    divisor = y * lift
    limit = divisor * 1024.0
    return _divide_normal(tl.minimum(tl.maximum(x * lift, -limit), limit), divisor)


@triton.jit
def _power_of_two_up(x):
    """fp32 `x` >= 0 rounded up to a power of two, no less than 2**-126; 0 and NaN stay."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True), x)


@triton.jit
def _multiply_add(x, y, z):
    """RN(x * y + z) in fp32."""
    if INTERPRETED:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    return tl.fma(x, y, z)


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
    warps: int = 4
    compiled: dict[tuple, Any] = field(default_factory=dict)
    stages: int = 3

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
        options = {"enable_fp_fusion": False, "num_warps": self.warps, "num_stages": self.stages}
        launched = self.kernel[self.programs](*tensors, *self.arguments, **options)
        if aligned:
            self.compiled[key] = launched


@cache
def _compiled(*what: Any) -> dict[tuple, Any]:
    """What was compiled for `what`, whatever the number of tokens: that changes from call to call."""
    return {}
