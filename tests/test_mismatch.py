"""`align.mismatch`: against definitions written down again in numpy, TRL's own lines, and verl's definitions."""

from __future__ import annotations

import importlib.util
import math
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.align import Mismatch, mismatch, truncated_importance_weights


def sides(batch=5, length=12, noise=0.3, seed=0):
    """Log-probabilities of trainer and rollout, fp32 ``[batch, length]``, of one policy and a noisy one."""
    generator = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(batch, length, generator=generator).mul(6).add(0.01)
    return rollout + noise * torch.randn(batch, length, generator=generator), rollout


def masks(batch=5, length=12, prompts=(3, 1, 4, 2, 5), ends=(12, 9, 10, 12, 7)):
    """Sampled tokens and prompt tokens of sequences that end early."""
    place = torch.arange(length).expand(batch, length)
    start, end = torch.tensor(prompts)[:, None], torch.tensor(ends)[:, None]
    return (place >= start) & (place < end), place < start


def ragged(values, mask):
    return [row[keep] for row, keep in zip(values, mask, strict=True)]


def by_definition(trainer, rollout, mask):
    """What the module's docstring says, in numpy and float64."""
    p = [row[keep].double().numpy() for row, keep in zip(trainer, mask, strict=True)]
    q = [row[keep].double().numpy() for row, keep in zip(rollout, mask, strict=True)]
    d = np.concatenate(p) - np.concatenate(q)
    ratio = np.exp(d)
    whole = np.array([np.exp((one - other).sum()) for one, other in zip(p, q, strict=True)])
    return {
        "mean_abs": np.abs(d).mean(),
        "p99_abs": np.quantile(np.abs(d), 0.99, method="inverted_cdf"),
        "max_abs": np.abs(d).max(),
        "k1": (np.concatenate(q) - np.concatenate(p)).mean(),
        "k3": (ratio - 1 - np.log(ratio)).mean(),
        "perplexity_ratio": np.mean([np.exp(-a.mean()) / np.exp(-b.mean()) for a, b in zip(p, q, strict=True)]),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "ess": ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()),
        "ess_sequence": whole.sum() ** 2 / (len(whole) * (whole**2).sum()),
        "pearson": np.corrcoef(np.exp(np.concatenate(p)), np.exp(np.concatenate(q)))[0, 1],
    }


def test_measures_are_what_they_are_defined_as_for_prompt_and_sampled_tokens_apart():
    (trainer, rollout), (sampled, prompt) = sides(), masks()
    found = mismatch(trainer, rollout, sampled, prompt)
    assert found.sampled.values() == pytest.approx(by_definition(trainer, rollout, sampled), rel=1e-12)
    assert found.prompt.values() == pytest.approx(by_definition(trainer, rollout, prompt), rel=1e-12)
    assert (found.sampled.tokens, found.prompt.tokens) == (int(sampled.sum()), int(prompt.sum()))
    assert (found.sampled.sequences, found.prompt.sequences) == (5, 5)
    names = found.metrics()
    assert names["mismatch/k3"] == found.sampled.k3
    assert names["mismatch/prompt/k3"] == found.prompt.k3
    assert found.sampled.k3 != found.prompt.k3


def test_ragged_rows_and_padded_ones_are_the_same_and_padding_may_hold_anything():
    (trainer, rollout), (sampled, prompt) = sides(), masks()
    whole = mismatch(trainer, rollout, sampled, prompt)
    real = sampled | prompt
    lists = [ragged(one, real) for one in (trainer, rollout, sampled, prompt)]
    assert mismatch(*lists).metrics() == whole.metrics()
    assert mismatch(lists[0], lists[1], prompt_mask=lists[3]).metrics() == whole.metrics()  # the rest is sampled
    trainer, rollout = trainer.clone(), rollout.clone()
    trainer[~real], rollout[~real] = float("nan"), float("-inf")
    assert mismatch(trainer, rollout, sampled, prompt).metrics() == whole.metrics()


def test_equal_sides_have_no_gap():
    trainer, _ = sides()
    found = mismatch(trainer, trainer).sampled
    assert (found.mean_abs, found.p99_abs, found.max_abs, found.k1, found.k3) == (0, 0, 0, 0, 0)
    assert (found.perplexity_ratio, found.ratio_mean, found.ratio_max) == (1, 1, 1)
    assert (found.ess, found.ess_sequence, found.pearson) == pytest.approx((1, 1, 1))
    assert mismatch(trainer, trainer).prompt is None


def test_a_sequence_of_prompt_alone_counts_to_the_prompt_alone():
    (trainer, rollout), (sampled, prompt) = sides(), masks(ends=(3, 9, 10, 12, 7))
    found = mismatch(trainer, rollout, sampled, prompt)
    assert (found.sampled.sequences, found.prompt.sequences) == (4, 5)
    kept = sampled.any(1)
    again = mismatch(trainer[kept], rollout[kept], sampled[kept], prompt[kept])
    assert found.metrics("verl") == again.metrics("verl")


def test_huge_differences_do_not_overflow_the_sample_sizes():
    """A log-ratio of 800, as a broken layer gives it: `exp` of it is infinite in float64, the share is not."""
    trainer, rollout = torch.zeros(1, 4), torch.tensor([[-800.0, 0, 0, 0]])
    found = mismatch(trainer, rollout).sampled
    assert found.ess == pytest.approx(0.25)
    assert found.ess_sequence == pytest.approx(1)
    assert found.ratio_max == float("inf")


# Other people's names ------------------------------------------------------------------------------------------------


def verl(trainer, rollout, mask, threshold=2.0):
    """verl/trainer/ppo/rollout_corr_helper.py and utils/debug/metrics.py written down again, padded as there."""
    p, q, m = trainer.double().numpy(), rollout.double().numpy(), mask.double().numpy()

    def mean(values, axis=None):
        return (values * m).sum(axis) / m.sum(axis)

    log_ratio = p - q
    weight = np.exp(np.clip(log_ratio, -20, 20)) * m
    keep = m.astype(bool)
    cut = np.clip(weight, 1 / threshold, threshold)
    by_sequence = mean(weight, -1)
    found = {
        "rollout_is_mean": mean(weight),
        "rollout_is_max": weight[keep].max(),
        "rollout_is_min": weight[keep].min(),
        "rollout_is_ratio_fraction_high": mean(weight > threshold),
        "rollout_is_ratio_fraction_low": mean(weight < 1 / threshold),
        "rollout_is_std": np.sqrt(mean(cut**2) - mean(cut) ** 2),
        "rollout_is_eff_sample_size": 1 / mean((cut / mean(cut)) ** 2),
        "rollout_is_seq_mean": by_sequence.mean(),
        "rollout_is_seq_std": by_sequence.std(ddof=1),
        "rollout_is_seq_max": by_sequence.max(),
        "rollout_is_seq_min": by_sequence.min(),
        "rollout_is_seq_max_deviation": np.abs(by_sequence - 1).max(),
        "rollout_is_seq_fraction_high": (by_sequence > threshold).mean(),
        "rollout_is_seq_fraction_low": (by_sequence < 1 / threshold).mean(),
    }
    own, other = mean(p, -1), mean(q, -1)
    found |= {
        "training_ppl": np.exp(-own).mean(),
        "training_log_ppl": (-own).mean(),
        "kl": mean(q - p),
        "k3_kl": mean(np.exp(log_ratio) - log_ratio - 1),
        "rollout_ppl": np.exp(-other).mean(),
        "rollout_log_ppl": (-other).mean(),
        "log_ppl_diff": (other - own).mean(),
        "log_ppl_abs_diff": np.abs(other - own).mean(),
        "log_ppl_diff_max": (other - own).max(),
        "log_ppl_diff_min": (other - own).min(),
        "ppl_ratio": np.exp(other - own).mean(),
        "chi2_token": mean(np.exp(np.clip(log_ratio, -20, 20)) ** 2) - 1,
        "chi2_seq": np.exp(2 * np.clip((log_ratio * m).sum(-1), -20, 20)).mean() - 1,
    }
    apart = np.abs(np.exp(p) - np.exp(q))[keep]
    return {f"rollout_corr/{name}": value for name, value in found.items()} | {
        "training/rollout_probs_diff_valid": 1,
        "training/rollout_probs_diff_max": apart.max(),
        "training/rollout_probs_diff_mean": apart.mean(),
        "training/rollout_probs_diff_std": apart.std(ddof=1),
        "training/rollout_actor_probs_pearson_corr": np.corrcoef(np.exp(p)[keep], np.exp(q)[keep])[0, 1],
    }


@pytest.mark.parametrize("noise", [0.01, 0.3, 1.5, 30.0])
def test_verl_names_have_verl_definitions(noise):
    """From a good gap to a broken engine's, where verl clamps log-ratios at 20."""
    (trainer, rollout), (sampled, prompt) = sides(noise=noise), masks()
    found = mismatch(trainer, rollout, sampled, prompt).metrics("verl")
    assert found == pytest.approx(verl(trainer, rollout, sampled), rel=1e-9)


def trl_lines():
    """The lines of the installed GRPOTrainer that make the ratios and log the metrics, as they are."""
    spec = importlib.util.find_spec("trl")
    if spec is None:
        pytest.skip("needs trl")
    source = Path(spec.origin).parent.joinpath("trainer", "grpo_trainer.py").read_text()
    ratio = source.index(
        "                mask = completion_mask if tool_mask is None else completion_mask * tool_mask\n"
    )
    ratio = source[
        ratio : source.index("            # Compute the per-token log probabilities for the reference model")
    ]
    logged = source.index("            delta = torch.abs(old_per_token_logps - sampling_per_token_logps)\n")
    logged = source[logged : source.index('        output = {\n            "prompt_ids"', logged)]
    return textwrap.dedent(ratio) + textwrap.dedent(logged)


@pytest.mark.parametrize("noise", [0.01, 0.3, 1.5])
def test_trl_names_have_what_trl_logs(noise):
    (trainer, rollout), (sampled, _) = sides(noise=noise), masks()
    logged = {}

    class Lists(dict):
        def __missing__(self, name):
            return SimpleNamespace(append=lambda value: logged.__setitem__(name, value))

    trainer_of_trl = SimpleNamespace(
        vllm_importance_sampling_mode="sequence_mask",
        vllm_importance_sampling_clip_min=None,
        vllm_importance_sampling_clip_max=3.0,
        accelerator=SimpleNamespace(gather=lambda one: one.reshape(1)),
        _metrics={"train": Lists()},
    )
    scope = {
        "self": trainer_of_trl,
        "mode": "train",
        "device": "cpu",
        "torch": torch,
        "tool_mask": None,
        "math": __import__("math"),
        "nanmin": torch.min,
        "nanmax": torch.max,
        "old_per_token_logps": trainer.double(),
        "sampling_per_token_logps": rollout.double(),
        "completion_mask": sampled.long(),
    }
    exec(trl_lines(), scope)
    assert len(logged) == 5
    assert mismatch(trainer, rollout, sampled).metrics("trl") == pytest.approx(logged, rel=1e-9)


def test_trl_defaults_are_those_that_its_names_stand_for():
    spec = importlib.util.find_spec("trl")
    if spec is None:
        pytest.skip("needs trl")
    config = Path(spec.origin).parent.joinpath("trainer", "grpo_config.py").read_text()
    assert 'vllm_importance_sampling_mode: str = field(\n        default="sequence_mask"' in config
    assert "vllm_importance_sampling_clip_max: float | None = field(\n        default=3.0" in config


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'wandb': choose 'lockstep', 'verl' or 'trl'"):
        mismatch(*sides()).metrics("wandb")


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("side", ["trainer", "rollout"])
@pytest.mark.parametrize("where", [(3, 7), (2, 0)], ids=["sampled", "prompt"])
def test_what_is_not_finite_is_named(bad, side, where):
    """TRL passes over it; here a masked-out token that the trainer forbids, or an overflow, is an error."""
    (trainer, rollout), (sampled, prompt) = sides(), masks()
    {"trainer": trainer, "rollout": rollout}[side][where] = bad
    with pytest.raises(ValueError, match=rf"^{side}: .*sequence {where[0]}, token {where[1]} is {bad} \(1 of"):
        mismatch(trainer, rollout, sampled, prompt)
    if where == (3, 7):
        with pytest.raises(ValueError, match=rf"^{side}: .*sequence 3, token 7 is {bad}"):
            truncated_importance_weights(trainer, rollout, sampled)


def test_what_does_not_fit_is_named():
    (trainer, rollout), (sampled, prompt) = sides(), masks()
    with pytest.raises(ValueError, match="rollout has 4 sequences, trainer 5"):
        mismatch(trainer, rollout[:4])
    with pytest.raises(ValueError, match=r"mask: sequence 0 has \[11\] tokens, trainer's \[12\]"):
        mismatch(trainer, rollout, sampled[:, 1:])
    with pytest.raises(TypeError, match=r"trainer: sequence 0 is a list: give tensors, a row a sequence"):
        mismatch([[-1.0, -2.0]], [[-1.0, -2.0]])
    with pytest.raises(ValueError, match=r"rollout: log-probabilities are torch.bfloat16, .* in float32"):
        mismatch(trainer, rollout.bfloat16())
    with pytest.raises(ValueError, match="sequence 1, token 0 is in mask and in prompt_mask"):
        mismatch(trainer, rollout, sampled | (torch.arange(5) == 1)[:, None], prompt)
    with pytest.raises(ValueError, match="none of the 60 tokens is sampled"):
        mismatch(trainer, rollout, torch.zeros_like(sampled))
    with pytest.raises(ValueError, match=r"rollout is \[5, 11\], trainer \[5, 12\]"):
        truncated_importance_weights(trainer, rollout[:, 1:])
    with pytest.raises(ValueError, match=r"rollout: log-probabilities are torch.bfloat16, .* in float32"):
        truncated_importance_weights(trainer, rollout.bfloat16())
    with pytest.raises(ValueError, match=r"trainer is \[12\]: it must be \[sequences, tokens\]"):
        truncated_importance_weights(trainer[0], rollout[0])
    with pytest.raises(ValueError, match="cap=0"):
        truncated_importance_weights(trainer, rollout, cap=0)
    with pytest.raises(ValueError, match="level='geometric': choose 'token' or 'sequence'"):
        truncated_importance_weights(trainer, rollout, level="geometric")


def test_labels_are_not_taken_for_a_mask():
    """As bool, -100 would be sampled, and the token 0 would not."""
    (trainer, rollout), (sampled, _) = sides(), masks()
    labels = torch.where(sampled, 7, -100)
    for wrong in (labels, labels.float(), [*labels]):
        with pytest.raises(ValueError, match=r"^mask has -100(\.0)? in it.*pass labels != -100"):
            mismatch(trainer, rollout, wrong)
    with pytest.raises(ValueError, match=r"^prompt_mask has .*pass labels != -100"):
        mismatch(trainer, rollout, prompt_mask=labels)
    with pytest.raises(ValueError, match=r"^mask has .*pass labels != -100"):
        truncated_importance_weights(trainer, rollout, labels)
    chosen = mismatch(trainer, rollout, labels != -100).sampled
    assert chosen.tokens == mismatch(trainer, rollout, sampled.float()).sampled.tokens == int(sampled.sum())


@pytest.mark.parametrize("constant", ["trainer", "rollout"])
def test_there_is_no_correlation_with_a_constant(constant):
    """The mean of many equal numbers is not that number: what is left looks like a correlation."""
    given = dict(zip(("trainer", "rollout"), sides(1, 997), strict=True))
    given[constant] = torch.full((1, 997), -0.3)
    gap = mismatch(**given).sampled
    assert math.isnan(gap.pearson)
    assert math.isnan(gap.values()["pearson"])


# What holds for all --------------------------------------------------------------------------------------------------

rows = st.lists(
    st.lists(st.tuples(st.floats(-30, 0, width=32), st.floats(-30, 0, width=32)), min_size=1, max_size=6),
    min_size=1,
    max_size=5,
)


def as_tensors(pairs):
    return [[torch.tensor([pair[side] for pair in row]) for row in pairs] for side in (0, 1)]


@given(rows)
def test_bounds(pairs):
    trainer, rollout = as_tensors(pairs)
    gap = mismatch(trainer, rollout).sampled
    back = mismatch(rollout, trainer).sampled
    assert 0 <= gap.mean_abs <= gap.max_abs
    assert gap.p99_abs <= gap.max_abs
    assert gap.k3 >= 0
    assert 1 / gap.tokens <= gap.ess * (1 + 1e-9) <= 1 + 1e-6
    assert 1 / gap.sequences <= gap.ess_sequence * (1 + 1e-9) <= 1 + 1e-6
    assert (gap.mean_abs, gap.max_abs, gap.k1) == (back.mean_abs, back.max_abs, -back.k1)


@given(rows, st.randoms(use_true_random=False))
def test_order_of_the_sequences_does_not_matter(pairs, random):
    before = mismatch(*as_tensors(pairs)).metrics("verl")
    random.shuffle(pairs)
    assert mismatch(*as_tensors(pairs)).metrics("verl") == pytest.approx(before, rel=1e-9, abs=1e-12, nan_ok=True)


@given(
    st.floats(0.1, 10),
    st.integers(0, 2**31),
    st.sampled_from(["token", "sequence"]),
    st.sampled_from([0.01, 1.0, 20.0]),
)
def test_truncated_weights(cap, seed, level, noise):
    (trainer, rollout), (sampled, _) = sides(noise=noise, seed=seed), masks()
    trainer = trainer.clone().requires_grad_()
    hidden = torch.where(sampled, rollout, float("nan"))
    weights = truncated_importance_weights(trainer, hidden, sampled, cap, level)
    assert weights.dtype == torch.float32
    assert not weights.requires_grad
    assert (weights[~sampled] == 0).all()
    assert ((weights >= 0) & (weights <= torch.tensor(cap))).all()
    d = torch.where(sampled, trainer.detach().double() - rollout.double(), 0.0)
    d = d.sum(1, keepdim=True).expand_as(d) if level == "sequence" else d
    expected = torch.where(sampled, d.exp().clamp(max=cap), 0.0)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-9)
    one = truncated_importance_weights(rollout, rollout, sampled, max(cap, 1.0), level)
    assert torch.equal(one, sampled.float())


def test_truncated_weights_make_the_gradient_that_of_the_trainers_policy():
    """Expected over tokens that the rollout samples, weighted rewards have the gradient of the trainer's own policy.

    A policy over four tokens; without truncation that is exact, with it the gradient is that of truncated ratios.
    """
    logits = torch.tensor([0.5, -1.0, 0.2, 1.0], dtype=torch.float64, requires_grad=True)
    rollout = torch.tensor([0.1, -0.2, 0.6, 0.9], dtype=torch.float64).log_softmax(0)
    reward = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    trainer = logits.log_softmax(0)
    weights = truncated_importance_weights(trainer[None], rollout[None], cap=100.0)[0].double()
    (weighted,) = torch.autograd.grad((rollout.exp() * weights * trainer * reward).sum(), logits, retain_graph=True)
    (own,) = torch.autograd.grad((trainer.exp() * reward).sum(), logits)
    torch.testing.assert_close(weighted, own, rtol=1e-6, atol=1e-9)


def test_a_mismatch_is_made_of_two_gaps():
    found = mismatch(*sides(), *masks())
    assert isinstance(found, Mismatch)
    assert found.sampled.differences.dtype == torch.float64
    assert found.sampled.differences.shape == (found.sampled.tokens,)
