"""What the tests of the arithmetic draw from: every `TensorSpec`, and weights that are hard to quantize."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from lockstep import TensorSpec
from lockstep.scheme import RULES

BF16, FP16, FP32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPINGS = [{"group_size": size} for size in (32, 64, 128)] + [{"strategy": "channel"}]
Q4_0 = {"scale_rule": "max/-8", "group_size": 32, "scale_dtype": FP16}

# Every rule in every grouping; integer scales in fp32, which an oracle need not round.
EVERY_SPEC = [
    TensorSpec(rule.format, strategy, size, rule.symmetric, name, rule.scale_dtypes[-1])
    for name, rule in RULES.items()
    for strategy, size in rule.groupings
]

dtypes = st.sampled_from(DTYPES)
groupings = st.sampled_from(GROUPINGS)
specs = st.one_of(
    st.builds(
        lambda grouping, **fields: TensorSpec(**grouping, **fields),
        groupings,
        scale_rule=st.sampled_from(["amax/7", "amax/7.5"]),
        scale_dtype=dtypes,
        served_dtype=dtypes,
    ),
    st.builds(lambda served: TensorSpec(**Q4_0, served_dtype=served), dtypes),
)


@st.composite
def weights(draw, dtype=dtypes, lead=((), (3,)), rows=(1, 4), columns=(128, 384)) -> Tensor:
    """Random weights ``[..., N, K]`` of every magnitude, with groups of zeros, outliers and strides of all kinds."""
    shape = (*draw(st.sampled_from(lead)), draw(st.sampled_from(rows)), draw(st.sampled_from(columns)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    w = torch.randn(shape, generator=generator).unflatten(-1, (-1, 32))
    magnitude = torch.randint(-22, 4, (*w.shape[:-1], 1), generator=generator).float().exp2()
    w *= magnitude * (torch.rand(magnitude.shape, generator=generator) > 0.1)
    w[..., 5] *= draw(st.sampled_from([0.0, 1.0, 100.0]))
    w = w.flatten(-2).to(draw(dtype))
    match draw(st.sampled_from(["contiguous", "transposed", "strided"])):
        case "transposed":
            return w.transpose(-1, -2).contiguous().transpose(-1, -2)
        case "strided":
            return w.repeat_interleave(2, dim=-1)[..., ::2]
    return w


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a tensor: they tell -0 from 0, and a NaN is equal to itself."""
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def nearest(x: Fraction, dtype: torch.dtype) -> Fraction:
    """`x` rounded to the nearest value of `dtype`, ties to even (overflow left aside)."""
    info = torch.finfo(dtype)
    binade = max(math.frexp(x)[1] - 1, math.frexp(info.smallest_normal)[1] - 1)
    quantum = Fraction(2) ** binade * Fraction(info.eps)
    return round(x / quantum) * quantum  # Python rounds fractions half to even


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1])


def nearest_code(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The nearest of plus and minus `values` to each `x`, by exhaustive search; what is beyond them saturates.

    `values` ascend from 0 and alternate between even and odd mantissas: a tie goes to the even one.
    """
    distance = np.abs(np.minimum(np.abs(np.asarray(x, np.float64)), values[-1])[..., None] - values)
    nearest = distance.argmin(-1)
    above = np.minimum(nearest + 1, len(values) - 1)
    tie = np.take_along_axis(distance, nearest[..., None], -1) == np.take_along_axis(distance, above[..., None], -1)
    even = np.where(tie[..., 0] & (nearest % 2 == 1), above, nearest)
    return np.copysign(values[even], x)


def finite_positive(dtype: torch.dtype) -> Tensor:
    """Every finite positive value of a 16-bit dtype."""
    values = torch.arange(1, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]
