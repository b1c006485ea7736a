"""GRPO in Lightning: rollouts by an engine that is kept in step with the trainer, the gap between the two measured.

The algorithm is that of DeepSeekMath (Shao et al. 2024, arXiv:2402.03300) without its KL term, which DAPO
(arXiv:2503.14476), Dr. GRPO (arXiv:2503.20783) and TRL leave out as well. One step: the engine answers each problem
several times, every answer has a reward, what counts is how much better it is than the other answers to its problem,
and the policy takes one or several clipped updates (PPO) towards the better ones. Then the engine gets the new weights.

Three policies have a log-probability for each token: the one that sampled it, in the engine; the old one, which is the
trainer's before its first update on these answers; and the current one. The clipped ratio is current to old, as in verl
and TRL, so that where trainer and engine differ, they differ unseen: the samples are not from the policy that is
trained. `tis_cap` weighs them for it.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from lockstep.align.decompose import Rollout
from lockstep.align.metrics import token_logprobs
from lockstep.align.mismatch import Mismatch, mismatch, truncated_importance_weights
from lockstep.callbacks.alignment import AlignmentCallback
from lockstep.export.config import quantization_config
from lockstep.export.rollout.embedded import EmbeddedEngine
from lockstep.export.rollout.engine import Completion, RolloutEngine, Sampling
from lockstep.export.rollout.session import RolloutSession
from lockstep.qat.prepare import prepare, quantized_modules, unprepare
from lockstep.recipes.arithmetic import IGNORED, Arithmetic, Problem, padded, reward, solved, stream_seed
from lockstep.recipes.causal_lm import load_model
from lockstep.scheme import Scheme

WARMUP_RAMP, RAMP = 50, 10  # optimizer steps until the learning rate is reached, in each of the two phases
CLIP_GRADIENT = 1.0  # largest norm
VLLM_CACHE = 1 << 30  # bytes for keys and values; by default vLLM takes most of the memory, which is the trainer's too
STD_FLOOR = 1e-4  # TRL's, which keeps groups of equal rewards at advantage 0


class GRPO(LightningModule):
    """Supervised steps, then reinforcement learning on a task whose answers can be checked.

    What trains quantized is up to a `QATCallback`, with ``start_step`` equal to `warmup_steps`; what the engine serves
    is `rollout`. Only if the two are the same scheme do both sides hold the same policy. Everything that is random in a
    step follows from the datamodule's seed and the number of the step, and every step begins with a sync, so a run that
    is killed and resumed goes on as if nothing had been.

    Logs ``rl/reward`` (mean over the sampled answers), ``rl/entropy`` (nats per token, estimated from the samples),
    ``rl/clipped`` (share of tokens whose ratio was beyond the clip), ``rl/gradient_norm``, ``mismatch/...`` of the
    sampled tokens (see `lockstep.align.Mismatch.metrics`), ``sync/seconds`` and ``sync/bytes``; every `evaluate_every`
    steps ``held_out/accuracy`` (greedy, through the engine) and ``held_out/mismatch/...`` on the right answers to the
    held-out problems, the same tokens each time; while supervised, ``warmup/loss``.

    Runs on one device.

    Args:
        model: see `lockstep.recipes.CausalLM`.
        rollout: what the engine serves: a scheme, or None for weights in bf16.
        engine: ``"embedded"``, Lockstep's own, or ``"vllm"``, which must be importable here.
        kernel: of the embedded engine's quantized layers, see ``lockstep kernels``; None: its own choice.
        warmup_steps: supervised optimizer steps before the reinforcement learning.
        warmup_learning_rate: theirs.
        learning_rate: of the reinforcement learning. With 0 everything runs and no weight changes.
        samples: answers to each problem, which are compared with one another.
        updates: optimizer steps for each rollout, each on its own share of the problems.
        clip: the ratio of new to old probability counts from ``1 - clip`` to ``1 + clip``.
        tis_cap: the largest importance weight for what trainer and engine differ in (truncated importance sampling);
            None: none, as if they were the same.
        evaluate_every: steps from one look at the held-out problems to the next.
        save_dir: write the masters there as a transformers folder when the fit ends.
        alignment_dir: watch the gap with a `lockstep.callbacks.AlignmentCallback`, every `evaluate_every` steps, and
            keep its page there; it measures the floor, and warns where the gap is wider.
        as_served: compute log-probabilities in the engine's precision throughout: norms, embeddings and what is not
            quantized rounded to 16 bits from their fp32 masters in each forward, no autocast. Under ``bf16-mixed`` the
            residual stream is fp32 in the trainer and bf16 in engines, which is most of the gap that same weights have.
    """

    def __init__(
        self,
        model: str | None = None,
        rollout: Scheme | str | None = "W4A16",
        engine: Literal["embedded", "vllm"] = "embedded",
        kernel: str | None = None,
        warmup_steps: int = 0,
        warmup_learning_rate: float = 4e-3,
        learning_rate: float = 3e-4,
        samples: int = 8,
        updates: int = 2,
        clip: float = 0.2,
        tis_cap: float | None = None,
        evaluate_every: int = 10,
        save_dir: str | None = None,
        alignment_dir: str | None = None,
        as_served: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.rollout = None if rollout is None else Scheme.of(rollout)
        self.model: Any = None
        self.session: RolloutSession | None = None
        self.answered: tuple[list[Problem], list[Completion]] | None = None
        if samples < 2:
            raise ValueError(f"samples={samples}: an answer is compared with others to its problem, so at least 2.")
        if as_served and alignment_dir is not None:
            raise ValueError("alignment_dir measures the trainer's own precision: leave it out with as_served.")

    @property
    def task(self) -> Arithmetic:
        """The trainer's datamodule. Raises TypeError for one that has no problems."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(datamodule, Arithmetic):
            name = type(datamodule).__name__
            raise TypeError(f"the datamodule is {name}: GRPO needs a lockstep.recipes.arithmetic.Arithmetic.")
        return datamodule

    @property
    def tokenizer(self) -> Any:
        """The task's, saved along with the checkpoints."""
        return self.task.tokenizer

    def configure_callbacks(self) -> list[Callback]:
        """The callback that `alignment_dir` asks for, on the answers of the step that it falls into."""
        if self.hparams["alignment_dir"] is None:
            return []
        every = self.hparams["evaluate_every"] * self.hparams["updates"]
        folder = self.hparams["alignment_dir"]
        # Of some thousand tokens, and of a policy that becomes sharper, the floor is no closer than that.
        return [AlignmentCallback(lambda: self.session, self._last_rollout, every, factor=2.0, directory=folder)]

    def configure_model(self) -> None:
        """Build or load the model, with fp32 masters."""
        if self.trainer.world_size > 1:
            raise ValueError(f"GRPO runs on one device, not on {self.trainer.world_size}: set trainer.devices to 1.")
        if self.task.prompts % self.hparams["updates"]:
            raise ValueError(f"{self.task.prompts} problems do not divide into updates={self.hparams['updates']}.")
        if self.model is None:
            self.model = load_model(self.hparams["model"], self.tokenizer).train()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without decay; the rate of each step is set in the step."""
        return torch.optim.AdamW(self.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, float]:
        """One supervised step, or one rollout with its updates. Returns what it logs."""
        done, warmup = self.trainer.global_step, self.hparams["warmup_steps"]
        if done < warmup:
            metrics = self._supervised_step(done)
        else:
            metrics = self._rl_step((done - warmup) // self.hparams["updates"])
        self.log_dict(metrics, batch_size=1)
        return metrics

    def on_train_end(self) -> None:
        """The last weights' accuracy."""
        if self.session is not None:
            self.session.sync()
            metrics = self.evaluate()
            self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
            for logger in self.trainer.loggers:
                logger.log_metrics(metrics, step=self.trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_fit_end(self) -> None:
        """Save the masters, under their ordinary names."""
        if self.hparams["save_dir"]:
            self.model.save_pretrained(self.hparams["save_dir"])
            self.tokenizer.save_pretrained(self.hparams["save_dir"])

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The engine's greedy accuracy on the held-out problems, and the gap on their solutions, at the last sync."""
        session, problems = self._session(), self.task.held_out
        found = {"held_out/accuracy": accuracy(session, problems)}
        tokens, labels = solved(problems)
        with self.trainer.strategy.precision_plugin.forward_context():
            ours = self.logprobs(tokens.to(self.device))
        assert session.engine is not None
        theirs = session.engine.logprobs([one.prompt + one.answer for one in problems])
        gap = compared(ours, filled(theirs, ours), labels[:, 1:] != IGNORED)
        return found | {f"held_out/{name}": value for name, value in gap.metrics().items()}

    def _supervised_step(self, step: int) -> dict[str, float]:
        tokens, labels = (one.to(self.device) for one in self.task.examples(step))
        loss = self.model(input_ids=tokens, labels=labels, use_cache=False).loss
        norm = self._update(loss, self.hparams["warmup_learning_rate"] * min(1.0, (step + 1) / WARMUP_RAMP))
        return {"warmup/loss": loss.item(), "warmup/gradient_norm": norm}

    def _rl_step(self, step: int) -> dict[str, float]:
        """A rollout with the weights of now, and the updates on it."""
        session = self._session()
        if step == 0:  # moments of the supervised gradients say nothing of these
            self.optimizers().optimizer.state.clear()  # type: ignore[union-attr]
        report = session.sync()
        metrics = self.evaluate() if step % self.hparams["evaluate_every"] == 0 else {}
        sample = self._sample(step)
        order = torch.randperm(self.task.prompts, generator=torch.Generator().manual_seed(self._seed("order", step)))
        shares = [sample.of_problems(some) for some in order.chunk(self.hparams["updates"])]
        # In the shapes of the updates, so that the first ratio is exactly 1.
        with torch.no_grad():
            old = [self.logprobs(share.tokens) for share in shares]
        rollout = [share.logprobs for share in shares]
        gap = compared(torch.cat(old), torch.cat(rollout), torch.cat([share.mask for share in shares]))
        rate, norms, clipped = self.hparams["learning_rate"], [], []
        for number, (share, before) in enumerate(zip(shares, old, strict=True)):
            ramp = min(1.0, (step * self.hparams["updates"] + number + 1) / RAMP)
            loss, beyond = self._loss(share, before)
            norms.append(self._update(loss, rate * ramp))
            clipped.append(beyond)
        return metrics | {
            "rl/step": float(step),
            "rl/reward": sample.rewards.mean().item(),
            "rl/entropy": -sample.logprobs[sample.mask].mean().item(),
            "rl/clipped": sum(clipped) / len(clipped),
            "rl/gradient_norm": sum(norms) / len(norms),
            "sync/seconds": report.seconds,
            "sync/bytes": float(report.bytes),
            **gap.metrics(),
        }

    def _sample(self, step: int) -> Sample:
        """What the engine answers to the problems of a step."""
        problems = self.task.problems(step)
        sampling = Sampling(
            max_tokens=self.task.max_tokens,
            n=self.hparams["samples"],
            stop=(self.tokenizer.eos_token_id,),
            seed=self._seed("sample", step),
        )
        engine = self._session().engine
        assert engine is not None
        answers = engine.generate([one.prompt for one in problems], sampling)
        asked = [one for one in problems for _ in range(sampling.n)]
        self.answered = asked, answers
        return Sample.of(asked, answers, sampling.n).to(self.device)

    def _last_rollout(self) -> Rollout | None:
        """What the engine answered last, as `lockstep.align` takes it; None while supervised."""
        if self.answered is None:
            return None
        tokens = [[*one.prompt, *answer.tokens] for one, answer in zip(*self.answered, strict=True)]
        lengths = [len(one.prompt) for one in self.answered[0]]
        return Rollout(tokens, lengths, [answer.logprobs for answer in self.answered[1]])

    def _loss(self, share: Sample, old: Tensor) -> tuple[Tensor, float]:
        """The policy loss of a share of the answers, and the share of its tokens beyond the clip."""
        clip, cap = self.hparams["clip"], self.hparams["tis_cap"]
        weights = None
        if cap is not None:
            weights = truncated_importance_weights(old, share.logprobs, share.mask, cap)
        current = self.logprobs(share.tokens)
        ratio = (current.detach() - old).exp()[share.mask]
        beyond = ((ratio - 1).abs() > clip).float().mean().item()
        return policy_loss(current, old, share.advantages, share.mask, clip, weights), beyond

    def logprobs(self, tokens: Tensor) -> Tensor:
        """The trainer's log-probability of every token ``[N, T]`` but the first, fp32 ``[N, T - 1]``."""
        if not self.hparams["as_served"]:
            logits = self.model(input_ids=tokens, use_cache=False).logits
        else:
            dtype = torch.bfloat16 if self.rollout is None else self.rollout.weights.served_dtype
            quantized = {id(layer.weight) for _, layer in quantized_modules(self.model)}  # from their masters, once
            served = {
                name: one if id(one) in quantized else one.to(dtype) for name, one in self.model.named_parameters()
            }
            with torch.autocast(self.device.type, enabled=False):
                given = {"input_ids": tokens, "use_cache": False}
                logits = torch.func.functional_call(self.model, served, (), given).logits
        return token_logprobs(logits[:, :-1], tokens[:, 1:])

    def _update(self, loss: Tensor, rate: float) -> float:
        """One optimizer step; returns the norm of the gradient."""
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        self.manual_backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), CLIP_GRADIENT)
        optimizer.step()
        return norm.item()

    def _session(self) -> RolloutSession:
        if self.session is None:
            self.session = open_session(self.model, self.rollout, self.hparams["engine"], self.hparams["kernel"])
        return self.session

    def _seed(self, what: str, step: int) -> int:
        return stream_seed(what, self.task.seed, step)


@dataclass(frozen=True)
class Sample:
    """Answers to problems, all those to one problem in neighbouring rows.

    `tokens` int64 ``[N, T]``; of the tokens but the first, `mask` bool ``[N, T - 1]`` says which were sampled, and
    `logprobs` fp32 with which log-probability, 0 elsewhere; `rewards` and `advantages` fp32 ``[N]``; `n` rows belong to
    each problem.
    """

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    rewards: Tensor
    advantages: Tensor
    n: int

    @classmethod
    def of(cls, asked: Sequence[Problem], answers: Sequence[Completion], n: int) -> Sample:
        """From what was asked in each row, and what came."""
        tokens, labels = padded([(one.prompt, answer.tokens) for one, answer in zip(asked, answers, strict=True)])
        mask = labels[:, 1:] != IGNORED
        logprobs = torch.zeros(mask.shape)
        logprobs[mask] = torch.cat([answer.logprobs for answer in answers])
        rewards = torch.tensor([reward(one, answer.tokens) for one, answer in zip(asked, answers, strict=True)])
        return cls(tokens, mask, logprobs, rewards, group_advantages(rewards.view(-1, n)).flatten(), n)

    def of_problems(self, which: Tensor) -> Sample:
        """The rows of some of the problems, given by their numbers."""
        rows = (which.unsqueeze(1) * self.n + torch.arange(self.n)).flatten().to(self.tokens.device)
        return self._each(lambda one: one[rows])

    def to(self, device: torch.device) -> Sample:
        """On a device."""
        return self._each(lambda one: one.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Sample:
        tensors = (self.tokens, self.mask, self.logprobs, self.rewards, self.advantages)
        tokens, mask, logprobs, rewards, advantages = map(change, tensors)
        return Sample(tokens, mask, logprobs, rewards, advantages, self.n)


def group_advantages(rewards: Tensor) -> Tensor:
    """``(reward - mean) / (std + 1e-4)`` within each row of ``[problems, samples]`` (DeepSeekMath, section 4.1.2).

    The deviation is the unbiased one, as in TRL. Dr. GRPO shows that dividing by it weighs easy and hard problems more
    than those in between; on a task of one difficulty, that changes little.
    """
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + STD_FLOOR)


def policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float, weights: Tensor | None = None
) -> Tensor:
    """PPO's clipped loss, mean over each answer's tokens and then over the answers (DeepSeekMath, equation 3).

    The mean over an answer favours short right answers and long wrong ones (Dr. GRPO); here lengths hardly differ.

    Args:
        logprobs: ``[N, T]``, by the policy that is trained; the gradient flows here.
        old: the same by the trainer before the first update.
        advantages: ``[N]``.
        mask: bool ``[N, T]``, the sampled tokens.
        clip: the ratio counts from ``1 - clip`` to ``1 + clip``.
        weights: ``[N, T]``, importance weights of the tokens; None: 1.
    """
    ratio, gain = (logprobs - old).exp(), advantages.unsqueeze(1)
    loss = -torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
    if weights is not None:
        loss = loss * weights
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def open_session(
    model: Any,
    rollout: Scheme | None,
    engine: Literal["embedded", "vllm"] = "embedded",
    kernel: str | None = None,
) -> RolloutSession:
    """A session for an engine that serves `model` as `rollout`: a scheme, or None for bf16, whatever it trains as.

    Raises:
        ValueError: the model trains on one scheme and is to be served in another.
    """
    trained = {layer.scheme for _, layer in quantized_modules(model)}
    if rollout is not None and trained - {rollout}:
        raise ValueError(
            f"the trainer computes with {', '.join(map(str, trained))}, rollout={rollout} is another scheme: serve "
            "what is trained, or bf16 (None)."
        )
    scheme = None if trained else rollout  # to be quantized at each sync
    if engine == "vllm":
        return RolloutSession(model, _start_vllm(model, rollout, scheme), scheme=scheme)
    made = EmbeddedEngine.from_model(model, plain=rollout is None, scheme=scheme, kernel=kernel)
    return RolloutSession(model, made, scheme=scheme)


def _start_vllm(model: Any, rollout: Scheme | None, scheme: Scheme | None) -> RolloutEngine:
    """vLLM in this process, started from a config alone, without weights."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm

    from lockstep.export.rollout.vllm import VLLMEngine

    config = copy.deepcopy(model.config)
    config.dtype = "bfloat16"
    if rollout is not None:
        if scheme is not None:
            prepare(model, scheme)
        try:
            config.quantization_config = quantization_config(model)
        finally:
            if scheme is not None:
                unprepare(model)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        llm = vllm.LLM(
            model=folder,
            load_format="dummy",
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=config.max_position_embeddings,
            generation_config="vllm",  # no sampling defaults from the folder
            enable_prefix_caching=False,
            enforce_eager=True,
            kv_cache_memory_bytes=VLLM_CACHE,
        )
    return VLLMEngine(llm)


def accuracy(session: RolloutSession, problems: Sequence[Problem]) -> float:
    """The share of the problems that the engine solves when it takes the likeliest token each time."""
    longest = max(len(one.answer) for one in problems)
    sampling = Sampling(max_tokens=longest, temperature=0.0, stop=(problems[0].answer[-1],))
    assert session.engine is not None
    answers = session.engine.generate([one.prompt for one in problems], sampling)
    right = [reward(one, answer.tokens) for one, answer in zip(problems, answers, strict=True)]
    return sum(right) / len(right)


def compared(trainer: Tensor, rollout: Tensor, mask: Tensor) -> Mismatch:
    """`lockstep.align.mismatch` of two ``[N, T]``, fetched to the host at once."""
    return mismatch(trainer.cpu(), rollout.cpu(), mask.cpu())


def filled(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """Rows of several lengths as one tensor of the shape of `like`, 0 where a row has ended; on the CPU."""
    tensor = torch.zeros(like.shape)
    for number, row in enumerate(rows):
        tensor[number, : len(row)] = row
    return tensor
