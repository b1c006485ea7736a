"""The gap between trainer and rollout engine: log-probabilities of the same tokens from both sides, compared.

With ``d = trainer - rollout`` of a token, in nats:

- ``k1 = mean(-d)`` and ``k3 = mean(exp(d) - 1 - d)`` estimate ``KL(rollout || trainer)`` from tokens that the rollout
  sampled (Schulman, http://joschu.net/blog/kl-approx.html). k3 is never negative and varies less.
- importance ratios are ``exp(d)``, for a sequence ``exp(sum d)``;
- effective sample size ``(sum w)^2 / (n sum w^2)`` of these ratios (Kish), from 1/n to 1: the share of the tokens, or
  sequences, that would tell as much if all had weight 1;
- the perplexity ratio is trainer over rollout, ``exp(mean(-d))`` by sequence, then the mean, as verl has it;
- Pearson's correlation is of probabilities, as MiniMax-M1 (arXiv:2506.13585) and verl have it.

All is computed in float64 on the CPU. The names that verl and TRL log under, with their definitions:
`Mismatch.metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Names = Literal["lockstep", "verl", "trl"]
Rows = Tensor | Sequence[Tensor]

# verl clamps log-ratios to this before `exp`, and truncates at its `rollout_is_threshold`, by default 2.
VERL_BOUND, VERL_THRESHOLD = 20.0, 2.0
# TRL's default: one ratio for each sequence, and none (0) above vllm_importance_sampling_clip_max.
TRL_CLIP = 3.0


class MismatchError(RuntimeError):
    """Trainer and engine stay further apart than they may; the message gives the numbers."""


@dataclass(frozen=True, eq=False, repr=False)
class Gap:
    """Two log-probabilities of each token of a set: float64 rows ``[tokens of the sequence]``, no row empty."""

    trainer: tuple[Tensor, ...]
    rollout: tuple[Tensor, ...]

    @cached_property
    def differences(self) -> Tensor:
        """``trainer - rollout`` of all tokens, sequence after sequence, float64 ``[tokens]``."""
        return torch.cat([one - other for one, other in zip(self.trainer, self.rollout, strict=True)])

    @property
    def tokens(self) -> int:
        """How many were compared."""
        return self.differences.numel()

    @property
    def sequences(self) -> int:
        """How many hold at least one of them."""
        return len(self.trainer)

    @property
    def mean_abs(self) -> float:
        """Mean of ``|d|``, nats."""
        return self.differences.abs().mean().item()

    @property
    def p99_abs(self) -> float:
        """The smallest ``|d|`` that 99 % of the tokens do not exceed."""
        return self.differences.abs().kthvalue(math.ceil(0.99 * self.tokens)).values.item()

    @property
    def max_abs(self) -> float:
        """The largest ``|d|``."""
        return self.differences.abs().max().item()

    @property
    def k1(self) -> float:
        """``mean(rollout - trainer)``: KL(rollout || trainer), unbiased on sampled tokens, of either sign."""
        return -self.differences.mean().item()

    @property
    def k3(self) -> float:
        """``mean(exp(d) - 1 - d)``: the same, never negative."""
        return (self.differences.expm1() - self.differences).mean().item()

    @property
    def perplexity_ratio(self) -> float:
        """Trainer's over rollout's, mean over the sequences."""
        return self._by_sequence(torch.mean).neg().exp().mean().item()

    @property
    def ratio_mean(self) -> float:
        """Mean importance ratio of a token."""
        return self.differences.exp().mean().item()

    @property
    def ratio_max(self) -> float:
        """The largest importance ratio of a token."""
        return self.differences.max().exp().item()

    @property
    def ess(self) -> float:
        """Effective sample size of the tokens' importance ratios, as a share of the tokens."""
        return _effective_share(self.differences)

    @property
    def ess_sequence(self) -> float:
        """The same of the sequences' ratios."""
        return _effective_share(self._by_sequence(torch.sum))

    @property
    def pearson(self) -> float:
        """Correlation of the tokens' probabilities; NaN for one token, or where a side gives all the same."""
        probabilities = torch.stack([torch.cat(self.trainer).exp(), torch.cat(self.rollout).exp()])
        if (probabilities == probabilities[:, :1]).all(1).any():  # else what is left of rounding the mean is correlated
            return math.nan
        centred = probabilities - probabilities.mean(1, keepdim=True)
        one, other = centred
        return ((one @ other) / (one.norm() * other.norm())).item()

    def values(self) -> dict[str, float]:
        """All of these by their names here."""
        return {
            "mean_abs": self.mean_abs,
            "p99_abs": self.p99_abs,
            "max_abs": self.max_abs,
            "k1": self.k1,
            "k3": self.k3,
            "perplexity_ratio": self.perplexity_ratio,
            "ratio_mean": self.ratio_mean,
            "ratio_max": self.ratio_max,
            "ess": self.ess,
            "ess_sequence": self.ess_sequence,
            "pearson": self.pearson,
        }

    def __repr__(self) -> str:
        what = f"{self.tokens} tokens of {self.sequences} sequences"
        return f"Gap({what}, mean_abs={self.mean_abs:.4g}, max_abs={self.max_abs:.4g}, k3={self.k3:.4g})"

    def _by_sequence(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        rows = self.differences.split([len(row) for row in self.trainer])
        return torch.stack([reduce(row) for row in rows])


@dataclass(frozen=True)
class Mismatch:
    """What `mismatch` found: the `sampled` tokens, and apart from them the `prompt`'s, None if there are none."""

    sampled: Gap
    prompt: Gap | None = None

    def metrics(self, names: Names = "lockstep") -> dict[str, float]:
        """The measures under the names that a dashboard knows.

        ``"lockstep"``: ``mismatch/NAME`` for each of `Gap.values`, and ``mismatch/prompt/NAME``.

        ``"verl"``: ``rollout_corr/NAME`` and ``training/rollout_NAME`` of the sampled tokens, as
        verl/trainer/ppo/rollout_corr_helper.py logs them with its defaults, ``rollout_is: token`` and
        ``rollout_is_threshold: 2.0``, and verl/utils/debug/metrics.py. Sequences without a sampled token, which verl
        counts with perplexity 1, are left out.

        ``"trl"``: ``sampling/NAME`` of the sampled tokens, as GRPOTrainer logs them with its defaults,
        ``vllm_importance_sampling_mode="sequence_mask"`` and ``vllm_importance_sampling_clip_max=3.0``: ratios are of
        sequences, and 0 above 3.

        Raises:
            ValueError: other names.
        """
        if names == "lockstep":
            found = {f"mismatch/{name}": value for name, value in self.sampled.values().items()}
            prompt = {} if self.prompt is None else self.prompt.values()
            return found | {f"mismatch/prompt/{name}": value for name, value in prompt.items()}
        if names == "verl":
            return _verl_weights(self.sampled) | _verl_distances(self.sampled) | _verl_probabilities(self.sampled)
        if names == "trl":
            return _trl(self.sampled)
        raise ValueError(f"names={names!r}: choose 'lockstep', 'verl' or 'trl'.")


def mismatch(trainer: Rows, rollout: Rows, mask: Rows | None = None, prompt_mask: Rows | None = None) -> Mismatch:
    """Compare two sides' log-probabilities of the same tokens of the same sequences.

    Args:
        trainer: fp32 or float64 ``[B, T]``, or a list of B rows of any length; token for token those of `rollout`.
        rollout: the same from the engine.
        mask: which are sampled tokens (verl's response_mask, TRL's completion_mask), bool or 0 and 1, in the same form;
            default: all that are not the prompt's. What neither mask names, padding, may hold anything.
        prompt_mask: which are the prompt's.

    Raises:
        ValueError: shapes differ; a 16-bit dtype, whose rounding is a mismatch of its own; a mask of other numbers,
            as labels are; a token is sampled and the prompt's; no token is sampled; a log-probability is infinite or
            NaN: names the side, sequence and token.
    """
    ours, theirs = _rows("trainer", trainer), _rows("rollout", rollout)
    _check_shapes("rollout", theirs, ours)
    prompt = [torch.zeros_like(row, dtype=torch.bool) for row in ours]
    if prompt_mask is not None:
        prompt = [as_mask("prompt_mask", row).cpu() for row in prompt_mask]
        _check_shapes("prompt_mask", prompt, ours)
    sampled = [~row for row in prompt]
    if mask is not None:
        sampled = [as_mask("mask", row).cpu() for row in mask]
        _check_shapes("mask", sampled, ours)
    for number, (one, other) in enumerate(zip(sampled, prompt, strict=True)):
        if both := (one & other).nonzero().flatten().tolist():
            raise ValueError(
                f"sequence {number}, token {both[0]} is in mask and in prompt_mask: mask names sampled tokens alone."
            )
    for name, side in (("trainer", ours), ("rollout", theirs)):
        for number, row in enumerate(side):
            bad = ~row.isfinite() & (sampled[number] | prompt[number])
            if bad.any():
                token = int(bad.nonzero()[0])
                raise ValueError(
                    f"{name}: the log-probability of sequence {number}, token {token} is {row[token].item()} "
                    f"({int(bad.sum())} of this sequence's {len(row)} tokens are not finite)."
                )
    if not any(row.any() for row in sampled):
        raise ValueError(f"none of the {sum(map(len, ours))} tokens is sampled: there is nothing to compare.")
    found = _gap(ours, theirs, sampled)
    return Mismatch(found, _gap(ours, theirs, prompt) if any(row.any() for row in prompt) else None)


def truncated_importance_weights(
    trainer: Tensor,
    rollout: Tensor,
    mask: Tensor | None = None,
    cap: float = 2.0,
    level: Literal["token", "sequence"] = "token",
) -> Tensor:
    """``min(exp(trainer - rollout), cap)``: what a token's loss is multiplied with where the two sides differ.

    Truncated importance sampling (Ionides 2008; for rollout engines Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training", and verl's ``rollout_is``): truncation biases towards the rollout's
    policy and bounds the variance. The weights bear no gradient.

    Args:
        trainer: fp32 or float64 ``[B, T]``, log-probabilities by the trainer as it was when the loss is taken (old, not
            current ones).
        rollout: the same by the engine that sampled the tokens.
        mask: the sampled tokens; others get weight 0 and may hold anything. Default: all.
        cap: the largest weight; 2 in Yao et al. and verl, 3 in TRL.
        level: ``"token"``: a ratio each. ``"sequence"``: every token of a sequence has the product of its ratios.

    Returns:
        fp32 ``[B, T]``, on `trainer`'s device.

    Raises:
        ValueError: shapes differ; a 16-bit dtype; a mask of other numbers than 0 and 1; `cap` is not positive; another
            `level`; a sampled token's log-probability is infinite or NaN: names the side, sequence and token.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"level={level!r}: choose 'token' or 'sequence'.")
    if not cap > 0:
        raise ValueError(f"cap={cap}: it is the largest weight, which must be positive.")
    sampled = torch.ones_like(trainer, dtype=torch.bool) if mask is None else as_mask("mask", mask)
    if trainer.ndim != 2:
        raise ValueError(f"trainer is {list(trainer.shape)}: it must be [sequences, tokens].")
    for name, one in (("rollout", rollout), ("mask", sampled)):
        if one.shape != trainer.shape:
            raise ValueError(f"{name} is {list(one.shape)}, trainer {list(trainer.shape)}: they must be alike.")
    for name, one in (("trainer", trainer), ("rollout", rollout)):
        _check_dtype(name, one)
        bad = ~one.detach().isfinite() & sampled
        if bad.any():
            row, token = bad.nonzero()[0].tolist()
            value = one[row, token].item()
            raise ValueError(f"{name}: the log-probability of sequence {row}, token {token} is {value}.")
    difference = torch.where(sampled, trainer.detach().double() - rollout.detach().double(), 0.0)
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True).expand_as(difference)
    return torch.where(sampled, difference.exp().clamp(max=cap), 0.0).float()


def as_mask(name: str, values: Tensor) -> Tensor:
    """`values` as bool.

    Raises:
        ValueError: one is neither 0 nor 1, as in labels: their -100 would count as chosen, and their token 0 as not.
    """
    others = values[(values != 0) & (values != 1)]
    if others.numel():
        raise ValueError(f"{name} has {others[0].item()} in it, and may hold 0 and 1: of labels pass labels != -100.")
    return values.bool()


def _check_dtype(name: str, values: Tensor) -> None:
    if values.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name}: log-probabilities are {values.dtype}, which rounds them by more than what is measured: compute "
            "them in float32."
        )


def _rows(name: str, values: Rows) -> list[Tensor]:
    for number, row in enumerate(values):
        if not isinstance(row, Tensor):
            raise TypeError(f"{name}: sequence {number} is a {type(row).__name__}: give tensors, a row a sequence.")
    rows = [row.detach() for row in values]
    for number, row in enumerate(rows):
        _check_dtype(name, row)
        if row.ndim != 1:
            raise ValueError(f"{name}: sequence {number} has shape {list(row.shape)}: it must be [tokens].")
    return [row.double().cpu() for row in rows]


def _check_shapes(name: str, rows: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    if len(rows) != len(like):
        raise ValueError(f"{name} has {len(rows)} sequences, trainer {len(like)}.")
    for number, (one, other) in enumerate(zip(rows, like, strict=True)):
        if one.shape != other.shape:
            raise ValueError(f"{name}: sequence {number} has {list(one.shape)} tokens, trainer's {list(other.shape)}.")


def _gap(trainer: Sequence[Tensor], rollout: Sequence[Tensor], keep: Sequence[Tensor]) -> Gap:
    held = [number for number, row in enumerate(keep) if row.any()]
    return Gap(*(tuple(side[number][keep[number]] for number in held) for side in (trainer, rollout)))


def _effective_share(log_weights: Tensor) -> float:
    log_share = 2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0) - math.log(len(log_weights))
    return log_share.exp().item()


def _verl_weights(gap: Gap) -> dict[str, float]:
    """verl's `compute_is_metrics` for ``rollout_is: token``: before truncation, but for std and sample size."""
    weights = gap.differences.clamp(-VERL_BOUND, VERL_BOUND).exp()
    lower, upper = 1 / VERL_THRESHOLD, VERL_THRESHOLD
    clamped = weights.clamp(lower, upper)
    means = torch.stack([row.mean() for row in weights.split([len(row) for row in gap.trainer])])
    found = {
        "mean": weights.mean(),
        "max": weights.max(),
        "min": weights.min(),
        "ratio_fraction_high": (weights > upper).double().mean(),
        "ratio_fraction_low": (weights < lower).double().mean(),
        "std": clamped.var(correction=0).sqrt(),
        "eff_sample_size": clamped.mean() ** 2 / clamped.square().mean(),
        "seq_mean": means.mean(),
        "seq_std": means.std() if len(means) > 1 else torch.zeros(()),
        "seq_max": means.max(),
        "seq_min": means.min(),
        "seq_max_deviation": (means - 1).abs().max(),
        "seq_fraction_high": (means > upper).double().mean(),
        "seq_fraction_low": (means < lower).double().mean(),
    }
    return {f"rollout_corr/rollout_is_{name}": value.item() for name, value in found.items()}


def _verl_distances(gap: Gap) -> dict[str, float]:
    """verl's `compute_offpolicy_metrics`."""
    trainer = -torch.stack([row.mean() for row in gap.trainer])  # log-perplexities by sequence
    rollout = -torch.stack([row.mean() for row in gap.rollout])
    tokens = gap.differences.clamp(-VERL_BOUND, VERL_BOUND)
    totals = gap._by_sequence(torch.sum).clamp(-VERL_BOUND, VERL_BOUND)
    found = {
        "training_ppl": trainer.exp().mean(),
        "training_log_ppl": trainer.mean(),
        "rollout_ppl": rollout.exp().mean(),
        "rollout_log_ppl": rollout.mean(),
        "log_ppl_diff": (trainer - rollout).mean(),
        "log_ppl_abs_diff": (trainer - rollout).abs().mean(),
        "log_ppl_diff_max": (trainer - rollout).max(),
        "log_ppl_diff_min": (trainer - rollout).min(),
        "ppl_ratio": (trainer - rollout).exp().mean(),
        "chi2_token": (2 * tokens).exp().mean() - 1,
        "chi2_seq": (2 * totals).exp().mean() - 1,
    }
    values = {f"rollout_corr/{name}": value.item() for name, value in found.items()}
    return values | {"rollout_corr/kl": gap.k1, "rollout_corr/k3_kl": gap.k3}


def _verl_probabilities(gap: Gap) -> dict[str, float]:
    """verl's `calculate_debug_metrics`."""
    differences = (torch.cat(gap.trainer).exp() - torch.cat(gap.rollout).exp()).abs()
    return {
        "training/rollout_probs_diff_valid": 1.0,
        "training/rollout_probs_diff_max": differences.max().item(),
        "training/rollout_probs_diff_mean": differences.mean().item(),
        "training/rollout_probs_diff_std": differences.std().item() if len(differences) > 1 else math.nan,
        "training/rollout_actor_probs_pearson_corr": gap.pearson,
    }


def _trl(gap: Gap) -> dict[str, float]:
    ratios = gap._by_sequence(torch.sum).exp()
    ratios = torch.where(ratios > TRL_CLIP, 0.0, ratios)
    return {
        "sampling/sampling_logp_difference/mean": gap.mean_abs,
        "sampling/sampling_logp_difference/max": gap.max_abs,
        "sampling/importance_sampling_ratio/min": ratios.min().item(),
        "sampling/importance_sampling_ratio/mean": ratios.mean().item(),
        "sampling/importance_sampling_ratio/max": ratios.max().item(),
    }
