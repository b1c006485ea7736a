"""Distances between two results that ought to be equal."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Representable numbers between `a` and `b` (same shape and 16- or 32-bit float dtype), as int64. -0 equals 0."""
    return (_ordered(a) - _ordered(b)).abs()


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``norm(value - truth) / norm(truth)`` in float64; 0 if both are zero."""
    truth = truth.double()
    error = (value.double() - truth).norm()
    return 0.0 if error == 0 else (error / truth.norm()).item()


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities ``[...]`` of `tokens` ``[...]`` under `logits` ``[..., V]``, in fp32."""
    return logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """``KL(softmax(logits) || softmax(other))`` at each position ``[...]``, in fp32 nats."""
    p, q = logits.float().log_softmax(-1), other.float().log_softmax(-1)
    # Both sum to 1, so this is sum(p log(p / q)), in terms that are never negative and do not cancel.
    return (p.exp() * k3(p, q)).sum(-1)


def k3(logprobs: Tensor, other: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL from samples of `logprobs`: ``r - 1 - log r``, ``r = other / own``."""
    log_ratio = other - logprobs
    return log_ratio.expm1() - log_ratio


def _ordered(x: Tensor) -> Tensor:
    """The bits of a float as an integer that grows with it."""
    bits = x.contiguous().view(_INTEGERS[x.dtype]).long()
    sign = torch.iinfo(_INTEGERS[x.dtype]).min
    return torch.where(bits < 0, sign - bits, bits)
