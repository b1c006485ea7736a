"""`Rollouts`: TRL's ``GRPOTrainer`` samples from a rollout engine that runs the very weights being trained."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import ProcessorMixin

from lockstep.align.decompose import Rollout
from lockstep.export.gather import ranks_of, together
from lockstep.export.rollout.engine import Completion, Sampling
from lockstep.export.rollout.session import RolloutSession
from lockstep.qat.prepare import unwrapped

if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer

# What is read and set of a GRPOTrainer beyond `args`, `model` and `state`, as of TRL 1.16.
NEEDED = ("use_vllm", "vllm_importance_sampling_correction", "eos_token_ids", "tools", "environment_factories")


class Rollouts:
    """The ``rollout_func`` of a TRL ``GRPOTrainer`` whose completions come from a `RolloutSession`.

    >>> trainer = GRPOTrainer(
    ...     model, reward_funcs=reward, args=GRPOConfig("out"), train_dataset=prompts, processing_class=tokenizer,
    ...     rollout_func=Rollouts(lambda model: RolloutSession(model, EmbeddedEngine.from_model(model))),
    ...     callbacks=[QATTrainerCallback("W4A16")],
    ... )

    Before each generation the session is synced: PyTorch does not tell of every write to a weight, so all are looked
    at, and sent are those that changed. Each completion says under which version it was sampled, which must be the
    session's. The
    log-probabilities of the sampled tokens go to TRL, which corrects the loss with them and logs ``sampling/...``, as
    the ``vllm_importance_sampling_...`` arguments of ``GRPOConfig`` say. For that TRL is told that it uses vLLM,
    whichever engine the session has; ``use_vllm`` of the arguments stays False, since with it TRL would start an engine
    of its own.

    `AlignmentTrainerCallback` goes beside it, with what was sampled last:

    >>> rollouts = Rollouts(lambda model: RolloutSession(model, EmbeddedEngine.from_model(model)))
    >>> callbacks = [QATTrainerCallback("W4A16"), AlignmentTrainerCallback(lambda: rollouts.session, rollouts.last)]

    Temperature, top-k, top-p, the length and the ends of an answer are the trainer's; the seed is made of the trainer's
    seed, the rank and the optimizer step, so that a resumed run samples what an uninterrupted one does. Answers to a
    prompt that the trainer repeats are asked for together. Evaluations sample in the same way.

    With several processes each has a session. Where each holds the whole model (DDP) each has an engine too, which
    answers its own prompts; of a sharded model (FSDP2, ZeRO-3) rank zero has the engine, and answers those of all.

    Args:
        session: the session, for the very model that the trainer has; or a function that makes one of the trainer's
            model. It is called at the first generation: after `QATTrainerCallback` has switched the layers, on a model
            that is on its device and, with FSDP2 or ZeRO-3, sharded.

    Raises:
        ValueError: at the first generation, for each argument of the trainer that the engine cannot honour, by name.
        AuditError: the engine does not run what is trained: see `RolloutSession.audit`.
        RuntimeError: a completion of other weights than the trainer's.
    """

    def __init__(self, session: RolloutSession | Callable[[nn.Module], RolloutSession]) -> None:
        self._session = session if isinstance(session, RolloutSession) else None
        self._make = None if isinstance(session, RolloutSession) else session
        self._trainer: Any = None
        self._last: Rollout | None = None
        self._calls: dict[str, tuple[int, int]] = {}  # in training and evaluation: a step, and generations in it

    @property
    def session(self) -> RolloutSession:
        """What the completions come from. RuntimeError before the first generation, if a function makes it."""
        if self._session is None:
            raise RuntimeError("there is no session yet: Rollouts makes it at the first generation.")
        return self._session

    def last(self) -> Rollout | None:
        """The last generation of this process with its log-probabilities, as `AlignmentTrainerCallback` takes it."""
        return self._last

    def __call__(self, prompts: Sequence[Any], trainer: GRPOTrainer) -> dict[str, list[list[Any]]]:
        """One completion for each of `prompts`: their ids, the completions' ids and log-probabilities, as lists."""
        if trainer is not self._trainer:
            self._bind(trainer)
        self.sync_weights()
        ids = _tokenized(prompts, trainer)
        completions = self._completions(ids, trainer)
        self._last = Rollout.of(ids, completions, self._trainer.args.temperature)
        return {
            "prompt_ids": ids,
            "completion_ids": [one.tokens for one in completions],
            "logprobs": [one.logprobs.tolist() for one in completions],
        }

    def sync_weights(self) -> None:
        """Bring the engine to the weights that the trainer has now. It is called before each generation."""
        self.session.sync()

    def _bind(self, trainer: Any) -> None:
        """Refuse what cannot be honoured, make the session, and let TRL use the log-probabilities."""
        if missing := [name for name in NEEDED if not hasattr(trainer, name)]:
            raise RuntimeError(f"this TRL's {type(trainer).__name__} has no {missing[0]}: use trl 1.16 or later.")
        _refuse(trainer)
        if self._make is not None:
            self._session = self._make(trainer.model)
        if unwrapped(self.session.model) is not unwrapped(trainer.model):
            raise ValueError(
                "the session was made of another model than the trainer's. Pass the same object to both, or pass "
                "Rollouts a function: Rollouts(lambda model: RolloutSession(model, engine))."
            )
        self._trainer = trainer
        # TRL looks at the log-probabilities of a rollout_func under this name alone. It then asks for a sync at each
        # new step, just before a call that syncs anyway.
        trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
        trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)

    def _completions(self, prompts: list[list[int]], trainer: Any) -> list[Completion]:
        engine, ranks, seed = self.session.engine, ranks_of(trainer.model), self._seed(trainer)
        if ranks is None:
            return self._answers(engine, prompts, trainer, seed)
        # The ranks of a sharded model share the engine of the first, which answers them all at once.
        everyone = together(lambda: prompts, ranks)
        wanted = [prompt for each in everyone for prompt in each]

        def work() -> list[Completion]:
            return [] if engine is None else self._answers(engine, wanted, trainer, seed)

        answers, before = together(work, ranks)[0], sum(map(len, everyone[: ranks.rank()]))
        return answers[before : before + len(prompts)]

    def _answers(self, engine: Any, prompts: list[list[int]], trainer: Any, seed: int) -> list[Completion]:
        unique, n = _grouped(prompts)
        found = engine.generate(unique, _sampling(trainer, n, seed))
        if len(found) != len(prompts):
            raise RuntimeError(f"{type(engine).__name__} gave {len(found)} answers to {len(prompts)} prompts.")
        version = self.session.version
        if others := {one.version for one in found} - {version}:
            raise RuntimeError(
                f"the engine answered with version {min(others)} of the weights, and the trainer is at {version}: "
                "something else updates it, or an update was lost. Give it to one session alone."
            )
        return found

    def _seed(self, trainer: Any) -> int:
        mode, step = "train" if trainer.model.training else "eval", trainer.state.global_step
        last, count = self._calls.get(mode, (step, -1))
        self._calls[mode] = here = (step, count + 1 if last == step else 0)
        # As text through a checksum: sums of small numbers would give two ranks, or two steps, the same stream.
        return zlib.crc32(f"{trainer.args.seed} {trainer.args.process_index} {mode} {here}".encode())


def _refuse(trainer: Any) -> None:
    """ValueError, with every argument that would have changed the completions or their log-probabilities."""
    args: GRPOConfig = trainer.args
    no_effect = "is not among what an engine samples with here: leave it out"
    problems: list[tuple[str, Any, str]] = [
        ("use_vllm=True", args.use_vllm, "starts an engine of TRL's own, in bf16: leave it False"),
        ("use_transformers_continuous_batching=True", args.use_transformers_continuous_batching, no_effect),
        (f"cache_implementation={args.cache_implementation!r}", args.cache_implementation, no_effect),
        (f"generation_kwargs={args.generation_kwargs!r}", args.generation_kwargs, no_effect),
        (f"min_p={args.min_p!r}", args.min_p, no_effect),
        (f"repetition_penalty={args.repetition_penalty!r}", args.repetition_penalty != 1.0, no_effect),
        ("vllm_structured_outputs_regex", args.vllm_structured_outputs_regex, no_effect),
        (f"temperature={args.temperature!r}", not args.temperature > 0, "cannot be divided by: use a positive one"),
        ("max_completion_length=None", not args.max_completion_length, "is no length: set it"),
        ("cast_lm_head_to_fp32=True", args.cast_lm_head_to_fp32, "gives the trainer logits that no engine computes"),
        ("tools", trainer.tools, "are run by TRL's own generation"),
        ("environment_factory", trainer.environment_factories is not None, "is run by TRL's own generation"),
    ]
    if isinstance(trainer.processing_class, ProcessorMixin):
        problems.append((type(trainer.processing_class).__name__, True, "is for more than text: pass a tokenizer"))
    if found := [f"{name} {why}" for name, refused, why in problems if refused]:
        raise ValueError(f"Rollouts cannot do as the trainer's arguments say. {'; '.join(found)}.")


def _sampling(trainer: Any, n: int, seed: int) -> Sampling:
    args: GRPOConfig = trainer.args
    return Sampling(
        max_tokens=args.max_completion_length or 0,  # None is refused
        temperature=args.temperature,
        top_k=max(0, args.top_k or 0),  # vLLM's -1 and None are "all" to TRL too
        top_p=args.top_p,
        n=n,
        stop=tuple(trainer.eos_token_ids),
        seed=seed,
    )


def _tokenized(prompts: Sequence[Any], trainer: Any) -> list[list[int]]:
    """Token ids of prompts, of text or of messages, as `GRPOTrainer` makes them without a ``rollout_func``."""
    tokenizer = trainer.processing_class
    if all(isinstance(prompt, str) for prompt in prompts):
        return tokenizer(text=list(prompts))["input_ids"]
    options = trainer.args.chat_template_kwargs or {}
    return tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **options
    )["input_ids"]


def _grouped(prompts: Iterable[list[int]]) -> tuple[list[list[int]], int]:
    """Prompts without the repetitions of each, and how often each comes; as they are, if not all come as often."""
    runs = [(prompt, len(list(same))) for prompt, same in itertools.groupby(prompts)]
    times = {count for _, count in runs}
    if len(times) == 1:
        return [prompt for prompt, _ in runs], times.pop()
    return [prompt for prompt, count in runs for _ in range(count)], 1
