"""TRL's `GRPOTrainer` with `Rollouts`: it samples from the weights it trains, and its own metrics show that it does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import ranks
import torch
from models import tiny_llama
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin, TrainerCallback

import lockstep
from lockstep import grid
from lockstep.callbacks import QATTrainerCallback
from lockstep.callbacks.alignment import AlignmentTrainerCallback
from lockstep.callbacks.trl import Rollouts
from lockstep.export.rollout.embedded import EmbeddedEngine
from lockstep.export.rollout.engine import Sampling
from lockstep.export.rollout.session import RolloutSession
from lockstep.qat.prepare import quantized_modules

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*rollout_func.*", "ignore:.*pin_memory.*", "ignore:.*use_cpu.*", "ignore:.*warmup.*"
)

GAP = "sampling/sampling_logp_difference/mean"
QUERY = "model.layers.0.self_attn.q_proj"
PROMPTS = [f"{number} plus {number} is" for number in range(8)]


# A model, and runs of it ---------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(BPE({one: number for number, one in enumerate(alphabet)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<|end|>", pad_token="<|pad|>")


def model(**config: Any) -> PreTrainedModel:
    """One layer of several groups a row, with the tokenizer's vocabulary, that prefers some tokens to others."""
    words = tokenizer()
    sizes = {"num_hidden_layers": 1, "intermediate_size": 256, "vocab_size": len(words)}
    ids = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": None}
    made = tiny_llama(**sizes | ids | config)
    with torch.no_grad():
        for one in made.modules():
            if isinstance(one, nn.Linear):
                one.weight *= 4
    return made.train()


def dequantized(of: PreTrainedModel) -> PreTrainedModel:
    """A model with plain layers that hold what W4A16 serves of `of`."""
    made = copy.deepcopy(of)
    lockstep.prepare(made, "W4A16")
    served = {name: grid.dequantize(one.quantize(), one.scheme.weights) for name, one in quantized_modules(made)}
    lockstep.unprepare(made)
    with torch.no_grad():
        for name, weight in served.items():
            made.get_submodule(name).weight.copy_(weight)
    return made


def low_bytes(completion_ids: list[list[int]], **others: Any) -> list[float]:
    """The share of a completion's tokens in the lower half of the vocabulary: verifiable, and learned by a bias."""
    return [sum(token < 128 for token in one) / len(one) for one in completion_ids]


def int4(of: nn.Module) -> RolloutSession:
    return RolloutSession(of, EmbeddedEngine.from_model(of))


def plain(of: nn.Module) -> RolloutSession:
    return RolloutSession(of, EmbeddedEngine.from_model(of, plain=True))


def int4_of_what_is_not_trained_so(of: nn.Module) -> RolloutSession:
    return RolloutSession(of, EmbeddedEngine.from_model(of, scheme="W4A16"), scheme="W4A16")


def qat(**options: Any) -> QATTrainerCallback:
    return QATTrainerCallback("W4A16", log_every_n_steps=0, **options)


def grpo(
    directory: Path | str,
    rollouts: Rollouts | None,
    *callbacks: TrainerCallback,
    of: Any = None,
    reward: Callable[..., list[float]] = low_bytes,
    prompts: Sequence[Any] = PROMPTS,
    **options: Any,
) -> Any:
    """A trainer: 4 answers to a prompt a step, of 6 tokens."""
    made = {key: options.pop(key) for key in ("eval_dataset", "processing_class", "tools") if key in options}
    usual = {
        "use_cpu": True,
        "bf16": False,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return trl.GRPOTrainer(
        of or model(),
        reward_funcs=reward,
        args=trl.GRPOConfig(str(directory), **usual | options),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        callbacks=[*callbacks],
        rollout_func=rollouts,
        **{"processing_class": tokenizer()} | made,
    )


def trained(directory: Path | str, rollouts: Rollouts | None, *callbacks: TrainerCallback, **options: Any) -> Any:
    """A trainer after its run."""
    run = grpo(directory, rollouts, *callbacks, **options)
    run.train()
    return run


def logged(run: Any, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


class Calls:
    """Makes sessions, as Rollouts is asked to, and notes what is asked of them."""

    def __init__(self, make: Callable[[nn.Module], RolloutSession] = int4) -> None:
        self.make, self.samplings, self.prompts, self.syncs = make, [], [], []
        self.order: list[str] = []

    def __call__(self, of: nn.Module) -> RolloutSession:
        session = self.make(of)
        generate, sync = session.engine.generate, session.sync

        def generates(prompts: Any, sampling: Sampling) -> Any:
            self.order.append("generate")
            self.prompts.append(prompts)
            self.samplings.append(sampling)
            return generate(prompts, sampling)

        def syncs() -> Any:
            self.order.append("sync")
            self.syncs.append(sync())
            return self.syncs[-1]

        session.engine.generate, session.sync = generates, syncs
        return session


# The weights that are trained are those that answer -----------------------------------------------------------------


def test_trl_measures_no_gap_beyond_the_same_weights_floor(tmp_path):
    """The floor: the same answers by an engine of plain layers to a trainer of plain layers, all with the weights that
    W4A16 serves. What is left is TRL's left padding and attention without a cache."""
    still = {"learning_rate": 0.0, "max_steps": 4}
    floor = trained(tmp_path, Rollouts(plain), of=dequantized(model()), **still)
    run = trained(tmp_path, Rollouts(int4), qat(), **still)
    assert logged(run, "reward") == logged(floor, "reward")  # the same answers
    assert len(logged(run, GAP)) == 4
    for mine, least in zip(logged(run, GAP), logged(floor, GAP), strict=True):
        assert 0 < mine <= 1.02 * least


def never_again(sync: Callable[[Rollouts], None]) -> Callable[[Rollouts], None]:
    """The first sync, and no other: what happens where a step does not reach the engine."""
    return lambda self: None if self.session.version else sync(self)


def test_trl_measures_a_gap_where_the_engine_has_other_weights(tmp_path, monkeypatch):
    """The metric that shows no gap does show one: it is the engine's log-probabilities that TRL is given."""
    run = trained(tmp_path / "run", Rollouts(int4), qat())
    untrained_so = trained(tmp_path / "grid", Rollouts(int4_of_what_is_not_trained_so))
    monkeypatch.setattr(Rollouts, "sync_weights", never_again(Rollouts.sync_weights))
    stale = trained(tmp_path / "stale", Rollouts(int4), qat())
    for gaps in (logged(untrained_so, GAP), logged(stale, GAP)[1:]):
        assert min(gaps) > 10 * max(logged(run, GAP))
    assert min(logged(untrained_so, "sampling/importance_sampling_ratio/min")) < 0.9


def checked_by(found: list[dict[str, str]], rollouts: Rollouts) -> Callable[..., list[float]]:
    """A reward that compares trainer and engine: TRL asks for it between the generation and the optimizer step."""

    def reward(**columns: Any) -> list[float]:
        found.append(rollouts.session.verify().problems)
        return low_bytes(**columns)

    return reward


def test_after_every_generation_both_sides_hold_the_same_bits(tmp_path):
    found: list[dict[str, str]] = []
    rollouts = Rollouts(calls := Calls())
    run = trained(tmp_path, rollouts, qat(), reward=checked_by(found, rollouts), max_steps=4)
    assert found == [{}] * 4
    assert [report.version for report in calls.syncs] == [1, 2, 3, 4]
    assert min(report.sent for report in calls.syncs) > 0
    for name in ("loss", "grad_norm", "reward", "entropy", GAP):
        assert len(logged(run, name)) == 4
        assert all(map(math.isfinite, logged(run, name)))


def test_a_sync_that_was_left_out_is_found_and_named(tmp_path, monkeypatch):
    found: list[dict[str, str]] = []
    monkeypatch.setattr(Rollouts, "sync_weights", never_again(Rollouts.sync_weights))
    rollouts = Rollouts(int4)
    trained(tmp_path, rollouts, qat(), reward=checked_by(found, rollouts), max_steps=2)
    assert found[0] == {}
    assert f"{QUERY}.weight_packed" in found[1]


def test_a_learning_rate_of_zero_drifts_nowhere(tmp_path):
    """Nothing is sent twice, and what TRL measures at a step is what it measures of the same prompts at another."""
    rollouts = Rollouts(calls := Calls())
    run = trained(tmp_path, rollouts, qat(), learning_rate=0.0, max_steps=4, prompts=PROMPTS[:1], top_k=1)
    assert [report.sent > 0 for report in calls.syncs] == [True, False, False, False]
    assert len(set(logged(run, GAP))) == 1


def test_the_policy_learns(tmp_path):
    options = {"optim": "adamw_torch", "learning_rate": 0.003, "per_device_train_batch_size": 16}
    run = trained(tmp_path, Rollouts(int4), qat(), max_steps=20, **options)
    rewards = logged(run, "reward")
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1


class Keeps:
    """A reward that keeps the completions, by their prompts."""

    def __init__(self) -> None:
        self.answers: dict[str, list[list[int]]] = {}
        self.__name__ = "keeps"

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **others: Any) -> list[float]:
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            self.answers.setdefault(prompt, []).append(ids)
        return low_bytes(completion_ids)


def test_answers_are_those_of_trls_own_generation_with_the_dequantized_weights(tmp_path):
    """The likeliest tokens, by transformers' ``generate`` in TRL, of a plain model that holds what is served."""
    options = {"learning_rate": 0.0, "max_steps": 8, "top_k": 1, "temperature": 0.7}
    mine, theirs = Keeps(), Keeps()
    trained(tmp_path / "mine", Rollouts(int4), qat(), reward=mine, **options)
    trained(tmp_path / "theirs", None, of=dequantized(model()), reward=theirs, **options)
    assert mine.answers.keys() == {*PROMPTS}
    assert mine.answers == theirs.answers


# When weights are sent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, ["sync", "generate"] * 4),
        ({"gradient_accumulation_steps": 2}, ["sync", "generate"] * 2),
        ({"steps_per_generation": 2}, ["sync", "generate"]),
        ({"num_iterations": 2}, ["sync", "generate"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_weights_are_sent_when_a_generation_needs_others(tmp_path, options, order):
    trained(tmp_path, Rollouts(calls := Calls()), qat(), max_steps=2, **options)
    assert calls.order == order
    assert len({sampling.seed for sampling in calls.samplings}) == order.count("generate")


def test_evaluations_before_during_and_after_training_have_the_weights_of_the_moment(tmp_path):
    """Also after the best model was loaded, or another by hand, at the same step; sent once, however many batches."""
    found: list[dict[str, str]] = []
    rollouts = Rollouts(calls := Calls())
    check = checked_by(found, rollouts)

    def rising(**columns: Any) -> list[float]:
        check(**columns)
        return [float(len(found))] * 4

    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "greater_is_better": False}
    data = datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS[:2]])  # two batches
    # The reward is constant in a group, so only weight decay moves the weights.
    moves = {"optim": "adamw_torch", "weight_decay": 1.0, "learning_rate": 0.05}
    run = grpo(tmp_path, rollouts, qat(), reward=rising, eval_dataset=data, **options, **best, **moves)

    def sent() -> list[str]:
        """The generations, and the syncs that sent anything."""
        reports = iter(calls.syncs)
        order = [one for one in calls.order if one == "generate" or next(reports).sent]
        calls.order, calls.syncs = [], []
        return order

    evaluation = ["sync", "generate", "generate"]
    run.evaluate()
    assert sent() == evaluation
    run.train()
    assert sent() == ["generate", *evaluation, "generate", *evaluation]  # sent before the evaluation of each step
    assert (run.state.best_global_step, run.state.global_step) == (1, 2)
    run.evaluate()
    assert sent() == evaluation
    run.evaluate()
    assert sent() == evaluation[1:]
    run.model.load_state_dict(model(seed=1).state_dict())
    run.evaluate()
    assert sent() == evaluation
    run.train()
    assert [sorted(problems) for problems in found] == [[]] * len(found)


def test_a_best_model_that_is_loaded_without_torchs_notice_is_sent(tmp_path):
    """As DeepSpeed loads it, into ``.data``, after an evaluation of the last step and before another."""
    found: list[dict[str, str]] = []
    rollouts = Rollouts(int4)
    data = datasets.Dataset.from_list([{"prompt": PROMPTS[0]}])
    evaluates = {"eval_dataset": data, "eval_strategy": "steps", "eval_steps": 1}
    run = trained(tmp_path, rollouts, qat(), reward=checked_by(found, rollouts), max_steps=1, **evaluates)
    for _ in range(2):
        run.model.get_submodule(QUERY).weight.data.mul_(-1)
        run.evaluate()
    assert found == [{}] * 4


def test_a_resumed_run_samples_and_learns_what_an_uninterrupted_one_does(tmp_path):
    """Though the uninterrupted one has evaluated at the step of the checkpoint, and the resumed one has not."""
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    data = datasets.Dataset.from_list([{"prompt": "what is"}])
    whole, rest = Keeps(), Keeps()
    first = trained(tmp_path, Rollouts(int4), qat(), reward=whole, eval_dataset=data, **options)
    run = grpo(tmp_path, Rollouts(int4), qat(), reward=rest, of=model(seed=1), eval_dataset=data, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(rest.answers) == 3
    assert rest.answers.pop("what is") == whole.answers.pop("what is")[4:]
    assert all(whole.answers[prompt] == answers for prompt, answers in rest.answers.items())
    state = first.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in run.model.state_dict().items())


# What is asked of the engine -----------------------------------------------------------------------------------------


def test_sampling_is_the_trainers(tmp_path):
    options = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "max_completion_length": 3, "seed": 11}
    data = datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS[:2]])
    of = model()
    of.generation_config.eos_token_id = [7, 9]
    evaluations = {"eval_dataset": data, "num_generations_eval": 2}
    run = grpo(tmp_path, Rollouts(calls := Calls()), qat(), of=of, max_steps=2, **options, **evaluations)
    run.train()
    run.evaluate()
    first = calls.samplings[0]
    stop = (tokenizer().eos_token_id, 7, 9)
    assert first == Sampling(max_tokens=3, temperature=0.8, top_k=5, top_p=0.9, n=4, stop=stop, seed=first.seed)
    assert [sampling.n for sampling in calls.samplings] == [4, 4, 2]  # two prompts, twice each, in the evaluation
    assert [len(prompts) for prompts in calls.prompts] == [1, 1, 2]
    assert len({sampling.seed for sampling in calls.samplings}) == 3
    again = Calls()
    trained(tmp_path, Rollouts(again), qat(), of=copy.deepcopy(of), max_steps=1, **options)
    assert again.samplings == calls.samplings[:1]


def test_answers_end_at_the_trainers_end_and_differ_within_a_group(tmp_path):
    kept = Keeps()
    of = model()
    of.generation_config.eos_token_id = [*range(64)]
    trained(tmp_path, Rollouts(int4), qat(), of=of, reward=kept, max_steps=8, max_completion_length=8)
    answers = [ids for group in kept.answers.values() for ids in group]
    ends = {*range(64), tokenizer().eos_token_id}
    assert all(not ends & {*ids[:-1]} for ids in answers)
    assert any(ids[-1] in ends and len(ids) < 8 for ids in answers)
    assert all(len({*map(tuple, group)}) > 1 for group in kept.answers.values())


def test_prompts_are_tokenized_as_trl_does_it(tmp_path):
    """Text, and messages through the chat template with the arguments of the trainer."""
    words = tokenizer()
    words.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{{ mood }}{% endif %}"
    )
    talks = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    for prompts, options in ((PROMPTS, {}), (talks, {"chat_template_kwargs": {"mood": "happy"}})):
        calls = Calls()
        run = grpo(tmp_path, Rollouts(calls), qat(), prompts=prompts, processing_class=words, **options)
        run.train()
        asked = {tuple(ids) for each in calls.prompts for ids in each}
        assert asked <= {tuple(ids) for ids in run._tokenize_prompts(list(prompts))[0]}
        assert len(asked) == 3


# Beside the alignment callback ---------------------------------------------------------------------------------------


def test_the_alignment_callback_measures_what_trl_measures_and_syncs_what_was_left_out(tmp_path, monkeypatch):
    """Of the very answers that are trained on, at their temperature."""
    rollouts = Rollouts(int4)
    options = {"every_n_steps": 1, "factor": 3.0}  # of the floor that 24 tokens have
    aligned = AlignmentTrainerCallback(
        lambda: rollouts.session, rollouts.last, directory=str(tmp_path / "page"), **options
    )
    run = trained(tmp_path / "run", rollouts, qat(), aligned, temperature=0.9)
    assert logged(run, "mismatch/over") == [0.0] * 3
    assert logged(run, "mismatch/mean_abs") == pytest.approx(logged(run, GAP), rel=1e-3)
    assert len(rollouts.last().tokens) == 4

    monkeypatch.setattr(Rollouts, "sync_weights", never_again(Rollouts.sync_weights))
    rollouts = Rollouts(calls := Calls())
    aligned = AlignmentTrainerCallback(
        lambda: rollouts.session, rollouts.last, action="resync", directory=str(tmp_path / "stale"), **options
    )
    run = trained(tmp_path / "stale-run", rollouts, qat(), aligned)
    assert logged(run, "mismatch/over") == [0.0, 1.0, 1.0]
    assert len(calls.syncs) == 4  # the first, one for the floor, and one for each of the two that were left out


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 0.1}, r"min_p=0\.1 is not among what an engine samples with"),
        ({"repetition_penalty": 1.1}, r"repetition_penalty=1\.1 is not among"),
        ({"generation_kwargs": {"typical_p": 0.9}}, r"generation_kwargs=\{'typical_p': 0\.9\} is not among"),
        ({"cache_implementation": "static"}, r"cache_implementation='static' is not among"),
        ({"cast_lm_head_to_fp32": True}, r"cast_lm_head_to_fp32=True gives the trainer logits that no engine"),
        ({"max_completion_length": None}, r"max_completion_length=None is no length"),
        ({"min_p": 0.1, "repetition_penalty": 0.9}, r"min_p=0\.1 .*; repetition_penalty=0\.9"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_an_engine_cannot_do_is_refused_by_name_before_it_samples(tmp_path, options, message):
    run = grpo(tmp_path, Rollouts(calls := Calls()), qat(), **options)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert (calls.order, run.state.global_step) == ([], 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: setattr(run.args, "use_vllm", True), "use_vllm=True starts an engine of TRL's own, in bf16"),
        (lambda run: setattr(run, "tools", [print]), "tools are run by TRL's own generation"),
        (lambda run: setattr(run, "environment_factories", {None: dict}), "environment_factory is run by TRL's own"),
        (
            lambda run: setattr(run, "processing_class", ProcessorMixin()),
            "ProcessorMixin is for more than text: pass a tokenizer",
        ),
        (lambda run: setattr(run.args, "temperature", 0.0), "temperature=0.0 cannot be divided by"),
    ],
    ids=["engine", "tools", "environment", "processor", "temperature"],
)
def test_what_trl_does_with_an_engine_of_its_own_is_refused(tmp_path, change, message):
    """Set on the trainer that is made: each needs a package, a template or a model that is not here."""
    run = grpo(tmp_path, Rollouts(calls := Calls()), qat())
    change(run)
    with pytest.raises(ValueError, match=message):
        run.rollout_func(PROMPTS[:1], run)
    assert calls.order == []


def test_a_session_of_another_model_is_refused(tmp_path):
    other = model()
    lockstep.prepare(other, "W4A16")
    with pytest.raises(ValueError, match=r"another model than the trainer's.*Rollouts\(lambda model"):
        grpo(tmp_path, Rollouts(int4(other)), qat()).train()


def test_a_session_that_is_made_first_serves_as_well(tmp_path):
    of = model()
    lockstep.prepare(of, "W4A16")
    rollouts = Rollouts(session := int4(of))
    assert rollouts.session is session
    trained(tmp_path, rollouts, qat(), of=of, max_steps=2)
    assert session.version == 2


def test_there_is_no_session_before_there_is_a_model():
    with pytest.raises(RuntimeError, match="there is no session yet"):
        _ = Rollouts(int4).session


def test_an_engine_that_somebody_else_updates_is_found(tmp_path):
    """Another session on the same engine, here between the sync and the generation."""
    sessions: list[RolloutSession] = []

    def shared(of: nn.Module) -> RolloutSession:
        session = int4(of)
        sessions.append(session)
        generate = session.engine.generate

        def generates(*arguments: Any) -> Any:
            other = copy.deepcopy(of)
            with torch.no_grad():
                other.get_submodule(QUERY).weight.mul_(-1)
            RolloutSession(other, session.engine).sync()
            return generate(*arguments)

        session.engine.generate = generates
        return session

    with pytest.raises(RuntimeError, match=r"answered with version 2 of the weights, and the trainer is at 1"):
        trained(tmp_path, Rollouts(shared), qat())


def test_a_trl_without_what_is_needed_says_which_one_has_it(tmp_path):
    run = grpo(tmp_path, Rollouts(int4), qat())
    del run.eos_token_ids
    with pytest.raises(RuntimeError, match=r"GRPOTrainer has no eos_token_ids: use trl 1\.16"):
        run.train()


# Two processes -------------------------------------------------------------------------------------------------------

PARTITIONED = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
# DeepSpeed last: it stays switched on in the process.
TOGETHER: dict[str, dict[str, Any]] = {"ddp": {}, "zero3": {"deepspeed": PARTITIONED}}


def in_a_rank(directory: str) -> None:
    """Of every kind a run that stands still and takes the likeliest tokens, and one that trains."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ here; gloo alone does it
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for kind, options in TOGETHER.items():
        shared = kind == "zero3" and rank > 0

        def make(of: nn.Module, shared: bool = shared) -> RolloutSession:
            return RolloutSession(of, None if shared else EmbeddedEngine.from_model(of))

        kept, moving = Keeps(), Keeps()
        still = {"learning_rate": 0.0, "max_steps": 4, "top_k": 1, "per_device_train_batch_size": 2}
        run = trained(f"{directory}/{kind}", Rollouts(make), qat(), reward=kept, **still, **options)
        assert type(run.model_wrapped).__name__ == {"zero3": "DeepSpeedEngine"}.get(kind, "DistributedDataParallel")
        found: list[dict[str, str]] = []
        rollouts = Rollouts(make)
        check = checked_by(found, rollouts)

        def reward(check: Any = check, moving: Any = moving, **columns: Any) -> list[float]:
            check(**columns)
            return moving(**columns)

        run = trained(f"{directory}/{kind}-moving", rollouts, qat(), reward=reward, **options)
        said = {"still": kept.answers, "moving": moving.answers, "found": found, "version": rollouts.session.version}
        torch.save(said | {GAP: logged(run, GAP)}, f"{directory}/{kind}{rank}")
        torch.distributed.barrier()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    script = f"import test_trl_grpo as tests\ntests.in_a_rank({str(directory)!r})"
    ranks.run(script, directory / "ranks", DS_ACCELERATOR="cpu")
    return directory


@pytest.mark.parametrize("kind", [*TOGETHER])
def test_two_processes_sample_for_their_own_prompts_from_what_they_train(tmp_path, two_processes, kind):
    """With an engine each, or with one for both: the likeliest answers are those that one process gives."""
    said = [torch.load(two_processes / f"{kind}{rank}") for rank in (0, 1)]
    alone = Keeps()
    trained(tmp_path, Rollouts(int4), qat(), reward=alone, learning_rate=0.0, max_steps=8, top_k=1)
    for one in said:
        assert one["still"]
        assert all(ids == alone.answers[prompt][0] for prompt, group in one["still"].items() for ids in group)
        assert one["found"] == [{}] * 3
        assert one["version"] == 3
    moving = [[tuple(ids) for group in one["moving"].values() for ids in group] for one in said]
    assert len(moving[0]) == len(moving[1]) == 12
    assert len({*moving[0], *moving[1]}) > 20  # each its own random numbers
    assert max(said[0][GAP]) < 0.02
