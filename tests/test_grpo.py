"""GRPO in Lightning: the task, the loss against TRL's, both phases, and what holds trainer and engine in step."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

import lockstep
from lockstep import cli
from lockstep.callbacks import QATCallback
from lockstep.export.rollout import Completion
from lockstep.qat.prepare import quantized_modules
from lockstep.recipes import arithmetic, grpo
from lockstep.recipes.arithmetic import Arithmetic, Problem
from lockstep.recipes.grpo import GRPO, Sample

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*smaller than the logging interval.*")

RECIPE = Path(lockstep.__file__).parent / "recipes" / "grpo_int4.yaml"


# The task ----------------------------------------------------------------------------------------------------------


def text(problem: Problem) -> str:
    return arithmetic.decode(problem.prompt + problem.answer)


@pytest.mark.parametrize("digits", [1, 2, 4])
def test_problems_are_sums_and_their_answers_are_right(digits):
    task = Arithmetic(digits, prompts=50, held_out=20)
    for problem in (*task.problems(3), *task.held_out):
        number = rf"(\d{{{digits}}})"
        a, b, c = re.fullmatch(rf"{number}\+{number}=(\d{{{digits + 1}}});", text(problem)).groups()
        assert int(a) + int(b) == int(c)
        assert len(problem.answer) == task.max_tokens


def test_only_the_right_answer_ended_where_it_ends_is_rewarded():
    problem = arithmetic.problem(7, 25, 2)
    rewards = {
        answer: arithmetic.reward(problem, arithmetic.encode(answer))
        for answer in ("032;", "33;", "032", "032;;", "032;7", "032+", "32;", ";", "", "0032;", "007+25=032;", "132;")
    }
    assert [answer for answer, reward in rewards.items() if reward] == ["032;"]
    assert set(rewards.values()) == {0.0, 1.0}


def test_the_saved_tokenizer_encodes_as_the_task_does(tmp_path):
    """The exported folder is served with it: other ids would make other problems of the same text."""
    arithmetic.tokenizer().save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for problem in Arithmetic(3).problems(0):
        ids = saved(text(problem), add_special_tokens=False)["input_ids"]
        assert tuple(ids) == problem.prompt + problem.answer
        assert saved.decode(ids) == text(problem)
    assert saved.eos_token_id == problem.answer[-1]
    assert len(saved) == len(arithmetic.CHARACTERS)
    with pytest.raises(ValueError, match="substring not found"):
        arithmetic.encode("7-2")


def test_what_is_held_out_is_in_no_phase_of_any_seed():
    """Accuracy on problems that were trained on would only show memory."""
    held_out = {one.prompt for one in Arithmetic(2, held_out=500).held_out}
    assert len(held_out) > 300
    for seed, step in itertools.product(range(3), range(5)):
        task = Arithmetic(2, seed=seed)
        tokens, _ = task.examples(step)
        trained = {one.prompt for one in task.problems(step)} | {tuple(row[:6].tolist()) for row in tokens}
        assert not held_out & trained


def test_a_step_names_its_problems():
    one, same, other = Arithmetic(2, seed=1), Arithmetic(2, seed=1), Arithmetic(2, seed=2)
    assert one.problems(7) == same.problems(7)
    assert torch.equal(one.examples(7)[0], same.examples(7)[0])
    assert one.held_out == other.held_out
    streams = [one.problems(7), one.problems(8), other.problems(7)]
    assert len({tuple(stream) for stream in streams}) == 3


def test_labels_cover_the_answer_and_its_end_alone():
    problems = [arithmetic.problem(7, 25, 2), arithmetic.problem(99, 99, 2)]
    tokens, labels = arithmetic.solved(problems)
    shown = [arithmetic.decode(row[row >= 0]) for row in labels]
    assert shown == ["032;", "198;"]
    assert torch.equal(tokens[labels >= 0], labels[labels >= 0])
    tokens, labels = arithmetic.padded([((1, 2), (3,)), ((1, 2), (3, 4, 5))])
    assert labels.tolist() == [[-100, -100, 3, -100, -100], [-100, -100, 3, 4, 5]]
    assert tokens[0].tolist() == [1, 2, 3, 12, 12]


# The loss ----------------------------------------------------------------------------------------------------------


def policies(seed: int = 0) -> dict[str, Tensor]:
    """Log-probabilities of three policies far enough apart that ratios are clipped on both sides."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(6, 5, generator=generator, dtype=torch.float64) * 3
    lengths = torch.tensor([5, 1, 3, 5, 2, 4])
    return {
        "logprobs": old + torch.randn(6, 5, generator=generator, dtype=torch.float64) * 0.4,
        "old": old,
        "rollout": old + torch.randn(6, 5, generator=generator, dtype=torch.float64) * 0.4,
        "advantages": torch.randn(6, generator=generator, dtype=torch.float64),
        "mask": torch.arange(5) < lengths.unsqueeze(1),
    }


def trl_loss(logprobs: Tensor, given: dict[str, Tensor], weights: Tensor | None) -> Tensor:
    """What TRL's GRPOTrainer makes of the same log-probabilities, with its own code."""
    trl = pytest.importorskip("trl")

    class Quiet(dict):
        def __missing__(self, key: str) -> list[float]:
            return []

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        loss_type="grpo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        args=SimpleNamespace(delta=None),
        model=SimpleNamespace(training=True),
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, **_: x, num_processes=1),
        _metrics={"train": Quiet()},
    )
    ids = torch.zeros(given["mask"].shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": given["mask"].long(),
        "advantages": given["advantages"],
        "old_per_token_logps": given["old"],
        "importance_sampling_ratio": weights,
    }
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("tis_cap", [None, 1.5])
def test_the_loss_and_its_gradient_are_trls(tis_cap):
    given = policies()
    weights = None
    if tis_cap is not None:
        weights = (given["old"] - given["rollout"]).exp().clamp(max=tis_cap)
    ours, theirs = (given["logprobs"].clone().requires_grad_() for _ in range(2))
    loss = grpo.policy_loss(ours, given["old"], given["advantages"], given["mask"], 0.2, weights)
    wanted = trl_loss(theirs, given, weights)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    clipped = ours.grad[given["mask"]] == 0
    assert 0 < clipped.sum() < len(clipped)
    assert not ours.grad[~given["mask"]].any()


def test_the_loss_is_that_of_the_paper_token_by_token():
    """Equation 3 of DeepSeekMath without the KL term, in plain Python."""
    given = {name: tensor.tolist() for name, tensor in policies(1).items()}
    answers = []
    for row, advantage in enumerate(given["advantages"]):
        terms = []
        for token in range(5):
            if given["mask"][row][token]:
                ratio = math.exp(given["logprobs"][row][token] - given["old"][row][token])
                terms.append(min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))
        answers.append(sum(terms) / len(terms))
    fields = policies(1)
    fields.pop("rollout")
    loss = grpo.policy_loss(**fields, clip=0.2)
    assert loss.item() == pytest.approx(-sum(answers) / len(answers), rel=1e-12)


def test_advantages_compare_an_answer_with_the_others_to_its_problem():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    found = grpo.group_advantages(rewards)
    std = math.sqrt(3 * 0.25**2 / 3 + 0.75**2 / 3)  # unbiased: over n - 1
    assert found[0].tolist() == pytest.approx([0.75 / (std + 1e-4)] + [-0.25 / (std + 1e-4)] * 3)
    assert not found[1:3].any()
    assert found[3].tolist() == pytest.approx([0.866, 0.866, -0.866, -0.866], abs=1e-3)


def test_a_sample_keeps_each_log_probability_with_its_token():
    problems = [arithmetic.problem(a, 1, 1) for a in (3, 4)]
    answers = [
        Completion(arithmetic.encode(words), torch.tensor(logprobs), 1, words.endswith(";"))
        for words, logprobs in (
            ("04;", [-1.0, -2, -3]),
            ("4;", [-4.0, -5]),
            ("055", [-6.0, -7, -8]),
            ("05;", [-9.0] * 3),
        )
    ]
    sample = Sample.of([problems[0]] * 2 + [problems[1]] * 2, answers, 2)
    assert sample.rewards.tolist() == [1, 0, 0, 1]
    assert sample.advantages[0] == -sample.advantages[1] > 0
    assert sample.advantages[3] == -sample.advantages[2] > 0
    for row, answer in enumerate(answers):
        sampled = sample.tokens[row, 1:][sample.mask[row]]
        assert sampled.tolist() == answer.tokens
        assert torch.equal(sample.logprobs[row][sample.mask[row]], answer.logprobs)
    second = sample.of_problems(torch.tensor([1]))
    assert torch.equal(second.tokens, sample.tokens[2:])
    assert second.rewards.tolist() == [0, 1]


# Training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    """A model of one layer for sums of one digit."""
    folder = tmp_path_factory.mktemp("config")
    LlamaConfig(
        vocab_size=len(arithmetic.CHARACTERS),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=12,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def start(config, tmp_path_factory) -> str:
    """The same after some supervised steps."""
    folder = tmp_path_factory.mktemp("start")
    seed_everything(0, verbose=False)
    fit(GRPO(config, warmup_steps=60, warmup_learning_rate=2e-3, save_dir=str(folder)), 60)
    return str(folder)


class Lines(Callback):
    """What each step returned."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append(dict(outputs))


def fit(module: GRPO, steps: int, *callbacks: Callback, data: Any = None) -> list[dict[str, float]]:
    """Train for `steps` optimizer steps; what each step returned."""
    lines = Lines()
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=steps,
        callbacks=[*callbacks, lines],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, data or Arithmetic(1, batch_size=64, prompts=8, held_out=16))
    return lines.rows


def masters(module: GRPO) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in module.model.named_parameters()}


class OneRollout(Arithmetic):
    """The same problems in every step."""

    def problems(self, step: int) -> list[Problem]:
        return super().problems(0)


def test_the_rewards_teach_what_the_examples_did_not(start):
    rows = fit(
        GRPO(start, learning_rate=2e-3, samples=16, evaluate_every=100),
        2 * 35,
        QATCallback("W4A16", log_every_n_steps=0),
        data=OneRollout(1, prompts=8, held_out=8),
    )
    rewards = [row["rl/reward"] for row in rows]
    assert sum(rewards[:3]) / 3 < 0.5
    assert sum(rewards[-3:]) / 3 > 0.8


def test_supervised_steps_come_first_and_quantization_with_the_rollouts(start):
    """Both phases in one run, as the recipe has them."""
    module = GRPO(start, warmup_steps=6)
    quantized = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            quantized.append(len([*quantized_modules(pl_module.model)]))

    rows = fit(module, 6 + 2 * 3, QATCallback("W4A16", start_step=6, log_every_n_steps=0), Look())
    assert quantized == [0] * 6 + [7] * 6
    assert all("warmup/loss" in row and "rl/reward" not in row for row in rows[:6])
    assert [row["rl/step"] for row in rows[6:]] == [0, 1, 2]
    assert min(row["sync/bytes"] for row in rows[7:]) > 0
    assert module.session.version == 4  # one for each rollout, and one for the last look at the held-out problems


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC", None])
def test_with_learning_rate_zero_nothing_drifts(start, scheme):
    """The gap on the same tokens stays to the last digit, and so do the weights of both sides."""
    module = GRPO(start, rollout=scheme, learning_rate=0.0, samples=4, evaluate_every=1)
    rows = fit(module, 8, *([QATCallback(scheme, log_every_n_steps=0)] if scheme else []))
    held_out = [{name: value for name, value in row.items() if name.startswith("held_out/")} for row in rows]
    assert len(held_out) == 4
    assert held_out.count(held_out[0]) == 4
    before = GRPO(start)
    before.model = grpo.load_model(start)
    assert all(torch.equal(one, masters(before)[name]) for name, one in masters(module).items())
    assert not module.session.verify().problems
    assert len({row["mismatch/mean_abs"] for row in rows}) == 4, "each step has its own samples"


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC", None])
def test_computed_as_served_trainer_and_engine_agree_to_the_last_bit_while_training(start, scheme):
    """Up to the log-softmax of another batch shape, 2^-23. What is left of the gap otherwise is autocast's residual."""
    gaps, norms = {}, []
    for as_served in (True, False):
        module = GRPO(start, rollout=scheme, learning_rate=1e-3, as_served=as_served, evaluate_every=1)
        rows = fit(module, 8, *([QATCallback(scheme, log_every_n_steps=0)] if scheme else []))
        gaps[as_served] = max(row[name] for row in rows for name in ("mismatch/max_abs", "held_out/mismatch/max_abs"))
        norms.append([row["rl/gradient_norm"] for row in rows])
        assert {one.dtype for one in module.model.parameters()} == {torch.float32}
    assert gaps[True] <= 2**-22
    assert gaps[False] > 1e-3
    assert norms[0][0] == pytest.approx(norms[1][0], rel=0.1)


def test_the_ratio_of_the_first_update_is_one_to_the_last_bit(start, monkeypatch):
    """The old policy is computed in the shapes of the update; any rounding between them would pass for a step."""
    seen = []

    def recorded(logprobs, old, advantages, mask, clip, weights=None):
        seen.append((logprobs - old)[mask].abs().max().item())
        return loss(logprobs, old, advantages, mask, clip, weights)

    loss = grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", recorded)
    fit(GRPO(start, learning_rate=1e-3, samples=4), 4, QATCallback("W4A16", log_every_n_steps=0))
    assert seen[0] == seen[2] == 0
    assert seen[1] > 0
    assert seen[3] > 0


def test_an_engine_that_is_not_synced_shows_in_the_gap(start, monkeypatch):
    module = GRPO(start, learning_rate=2e-3, samples=4, evaluate_every=100)
    sync = grpo.RolloutSession.sync
    synced = []

    def once(session):
        synced.append(session.sync_report if synced else sync(session))
        session.sync_report = synced[-1]
        return synced[-1]

    monkeypatch.setattr(grpo.RolloutSession, "sync", once)
    gaps = [row["mismatch/mean_abs"] for row in fit(module, 16, QATCallback("W4A16", log_every_n_steps=0))]
    assert gaps[-1] > 5 * gaps[0]


def test_weights_for_the_mismatch_change_the_update(start):
    """bf16 training against INT4 rollouts: the weights are not 1, and the first update already differs."""
    found = []
    for cap in (None, 2.0):
        module = GRPO(start, learning_rate=1e-3, samples=4, tis_cap=cap)
        fit(module, 2)
        found.append(masters(module))
    assert any(not torch.equal(one, found[1][name]) for name, one in found[0].items())


def test_moments_of_the_supervised_steps_are_forgotten(config):
    module = GRPO(config, warmup_steps=3, samples=4)
    steps = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            states = list(optimizer.state.values())
            steps.append(int(states[0]["step"]) if states else 0)

    fit(module, 7, Look())
    assert steps == [0, 1, 2, 0, 1, 2, 3]


def test_what_cannot_be_run_is_refused(start):
    with pytest.raises(ValueError, match=r"the trainer computes with fp8_e4m3 .*, rollout=int4 .*: serve what is tr"):
        fit(GRPO(start, samples=4), 2, QATCallback("FP8_DYNAMIC", log_every_n_steps=0))
    with pytest.raises(ValueError, match="8 problems do not divide into updates=3"):
        fit(GRPO(start, updates=3), 3)
    with pytest.raises(ValueError, match="samples=1: an answer is compared"):
        GRPO(start, samples=1)
    with pytest.raises(ValueError, match="leave it out with as_served"):
        GRPO(start, as_served=True, alignment_dir="alignment")
    with pytest.raises(TypeError, match="the datamodule is TextData"):
        fit(GRPO(start), 2, data=lockstep.recipes.TextData(max_bytes=20_000, vocab_size=300))


def test_the_recipe_runs_from_the_command_line(config, tmp_path, monkeypatch):
    """Warm-up, rollouts, export, masters, the alignment page and a checkpoint to go on from."""
    monkeypatch.chdir(tmp_path)
    recipe = RECIPE.read_text()
    for old, new in (("start_step: 300", "start_step: 20"), ("every_n_train_steps: 100", "every_n_train_steps: 24")):
        assert old in recipe
        recipe = recipe.replace(old, new)
    Path("recipe.yaml").write_text(recipe)
    words = (
        f"fit --config recipe.yaml --model.init_args.model {config} --model.init_args.warmup_steps 20 "
        "--model.init_args.samples 4 --model.init_args.evaluate_every 2 --data.init_args.digits 1 "
        "--data.init_args.prompts 4 --data.init_args.batch_size 16 --data.init_args.held_out 8 "
        "--trainer.max_steps 28 --trainer.accelerator cpu --trainer.enable_model_summary false"
    )
    assert cli.main(words.split()) == 0
    out = tmp_path / "runs/grpo_int4"
    header = next(out.glob("csv/**/metrics.csv")).read_text().splitlines()[0].split(",")
    wanted = {"warmup/loss", "rl/reward", "held_out/accuracy", "mismatch/mean_abs", "mismatch/max_abs", "mismatch/k3"}
    assert {*wanted, "mismatch/ess", "mismatch/floor", "sync/seconds", "sync/bytes"} <= set(header)
    assert len(lockstep.export.Checkpoint(out / "checkpoint").layers) == 7
    assert "<svg" in (out / "alignment/alignment.html").read_text()
    assert (out / "masters/model.safetensors").exists()
    resumed = torch.load(out / "last/last.ckpt", weights_only=False)
    assert resumed["global_step"] == 24
