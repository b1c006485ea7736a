"""The distances of the alignment report, against NumPy's ``nextafter`` and torch's own functions in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lockstep.align.metrics import k3, kl_divergence, relative_error, token_logprobs, ulps

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, FP32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_numpy_dtype = pytest.mark.parametrize("dtype", [np.float16, np.float32])
seeds = st.integers(0, 2**32)
values = st.floats(-(2**15), 2**15, width=16) | st.sampled_from([2.0**-126, -(2.0**-140)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ulps --------------------------------------------------------------------------------------------------------------


def walk(start: np.floating, steps: int, towards: float) -> np.floating:
    for _ in range(steps):
        start = np.nextafter(start, start.dtype.type(towards))
    return start


@every_numpy_dtype
@given(
    value=st.floats(-(2**15), 2**15, width=16) | st.sampled_from([2.0**-126, -(2.0**-140)]),
    steps=st.integers(0, 40),
    up=st.booleans(),
)
def test_ulps_count_the_steps_of_nextafter(dtype, value, steps, up):
    """Through zero, through the denormals and over powers of two alike."""
    start = dtype(value)
    end = walk(start, steps, math.inf if up else -math.inf)
    a, b = torch.tensor([start]), torch.tensor([end])
    assert ulps(a, b).tolist() == ulps(b, a).tolist() == [steps]


def every_finite(dtype: torch.dtype) -> Tensor:
    """All finite values of a 16-bit dtype in ascending order, zero once."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[torch.isfinite(values)].double().unique().to(dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_neighbours_among_all_16_bit_numbers_are_one_ulp_apart(dtype):
    values = every_finite(dtype)
    assert len(values) == {BF16: 2 * 0x7F80 - 1, FP16: 2 * 0x7C00 - 1}[dtype]
    assert (ulps(values[:-1], values[1:]) == 1).all()
    assert ulps(values[:1], values[-1:]).item() == len(values) - 1


@every_dtype
def test_ulps_of_equal_numbers_are_zero_and_zero_has_no_sign(dtype):
    """A kernel that returns -0 where the model has 0 is not wrong."""
    x = torch.tensor([0.0, -0.0, 1.5, -math.inf], dtype=dtype)
    assert not ulps(x, x).any()
    assert ulps(torch.tensor([0.0], dtype=dtype), torch.tensor([-0.0], dtype=dtype)).item() == 0


@every_dtype
def test_ulps_do_not_overflow_between_the_ends(dtype):
    """2**32 numbers lie between the ends of fp32: more than fit in an int32."""
    limit = torch.tensor([math.inf], dtype=dtype)
    bits = torch.finfo(dtype).bits
    exponent_bits = {BF16: 8, FP16: 5, FP32: 8}[dtype]
    assert ulps(limit, -limit).item() == 2 * ((2**exponent_bits - 1) << (bits - 1 - exponent_bits))
    assert ulps(limit, -limit).dtype == torch.int64


def test_ulps_of_views_are_those_of_their_values():
    a, b = normal(4, 6, seed=1).bfloat16(), normal(4, 6, seed=2).bfloat16()
    assert torch.equal(ulps(a.T, b.T), ulps(a, b).T)


# relative_error ----------------------------------------------------------------------------------------------------


@given(seed=seeds, scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
def test_relative_error_is_the_ratio_of_norms_in_float64(seed, scale):
    """In 16 bits the squares of small errors would vanish, and of large values overflow."""
    truth = (normal(5, 7, seed=seed) * scale).bfloat16()
    value = (truth.double() * (1 + 1e-2 * normal(5, 7, seed=seed + 1))).bfloat16()
    difference = value.double().numpy() - truth.double().numpy()
    expected = np.linalg.norm(difference) / np.linalg.norm(truth.double().numpy())
    assert relative_error(value, truth) == pytest.approx(expected, rel=1e-12)


def test_relative_error_of_equal_tensors_is_zero_even_of_zeros():
    zeros = torch.zeros(3)
    assert relative_error(zeros, zeros) == 0.0
    assert relative_error(normal(3), normal(3)) == 0.0
    assert relative_error(torch.ones(3), zeros) == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_relative_error_of_what_is_not_finite_is_not_zero(value):
    """A kernel that returns NaN must not count as exact."""
    assert not relative_error(torch.tensor([1.0, math.nan]), torch.ones(2)) <= 1
    assert not relative_error(torch.ones(2), torch.tensor([1.0, value])) <= 1


# Log-probabilities, KL, k3 -----------------------------------------------------------------------------------------


@given(seed=seeds, spread=st.sampled_from([0.1, 1.0, 30.0]))
def test_token_logprobs_are_those_of_cross_entropy(seed, spread):
    logits = normal(2, 3, 11, seed=seed) * spread
    tokens = torch.randint(11, (2, 3), generator=torch.Generator().manual_seed(seed))
    expected = -F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(2, 3)
    assert torch.allclose(token_logprobs(logits.double().float(), tokens).double(), expected, rtol=1e-6, atol=1e-5)


def test_token_logprobs_of_16_bit_logits_are_computed_in_fp32():
    """In bf16 a log-probability has two digits: the gap between trainer and engine would drown."""
    logits = normal(4, 512).bfloat16()
    tokens = torch.arange(4)
    found = token_logprobs(logits, tokens)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), logits.double().log_softmax(-1)[tokens, tokens], atol=1e-5)


@given(seed=seeds, gap=st.sampled_from([1e-2, 0.3, 3.0]))
def test_kl_divergence_is_torch_s(seed, gap):
    own = normal(2, 3, 11, seed=seed)
    other = own + gap * normal(2, 3, 11, seed=seed + 1)
    p, q = own.log_softmax(-1), other.log_softmax(-1)
    expected = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    found = kl_divergence(own.float(), other.float())
    assert found.shape == (2, 3)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-6)


def test_divergences_of_a_distribution_from_itself_are_zero():
    logits = normal(3, 11).bfloat16()
    logprobs = token_logprobs(logits, torch.zeros(3, dtype=torch.long))
    assert not kl_divergence(logits, logits).any()
    assert not k3(logprobs, logprobs).any()


@given(seed=seeds, gap=st.sampled_from([0.1, 1.0, 3.0]))
def test_k3_is_schulman_s_formula_and_never_negative(seed, gap):
    """http://joschu.net/blog/kl-approx.html: ``(r - 1) - log r``, ``r`` the other's probability over our own."""
    own, other = -normal(16, seed=seed).abs(), -gap * normal(16, seed=seed + 1).abs()
    ratio = other.exp() / own.exp()
    found = k3(own, other)
    assert torch.allclose(found, ratio - 1 - ratio.log(), rtol=1e-9, atol=1e-12)
    assert (found >= -1e-15).all()


def test_k3_of_small_gaps_has_digits():
    """Aligned models differ by 1e-4 nats: the estimate must not be rounding noise, nor negative."""
    own = -normal(1000).abs().float()
    other = own + 1e-4 * normal(1000, seed=1).float()
    gap = other.double() - own.double()
    found = k3(own, other)
    assert (found >= 0).all()
    assert found.double().mean().item() == pytest.approx((gap.expm1() - gap).mean().item(), rel=1e-3)


def test_kl_divergence_of_small_gaps_has_digits():
    """So that a report never shows the negative divergence of a model that is aligned to six digits."""
    own = normal(50, 512).float()
    other = own + 1e-3 * normal(50, 512, seed=1).float()
    p, q = own.double().log_softmax(-1), other.double().log_softmax(-1)
    found = kl_divergence(own, other)
    assert (found >= 0).all()
    assert torch.allclose(found.double(), F.kl_div(q, p, log_target=True, reduction="none").sum(-1), rtol=1e-2, atol=0)


def test_mean_of_k3_over_samples_is_the_kl_divergence():
    """What makes it an estimate: own probability as weight, summed over all tokens."""
    own, other = normal(11, seed=1), normal(11, seed=2)
    tokens = torch.arange(11)
    logprobs, others = (token_logprobs(logits.expand(11, 11), tokens).double() for logits in (own, other))
    expected = kl_divergence(own, other).item()
    assert (logprobs.exp() * k3(logprobs, others)).sum().item() == pytest.approx(expected, rel=1e-5)
