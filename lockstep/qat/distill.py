"""Quantization-aware distillation (QAD): the model before quantization teaches the one that trains quantized.

The loss of a token is ``(1 - kl_share) * CE + kl_share * T^2 * KL(softmax(t / T) || softmax(s / T))``, with the logits
t of the teacher and s of the student, and the cross-entropy CE with the token's label. The factor T^2 keeps the size of
the gradient the same at every temperature (Hinton et al., arXiv:1503.02531). The KL alone at T = 1 is what NVIDIA's QAD
(arXiv:2601.20088) trains on, and LLM-QAT (arXiv:2305.17888) up to a constant.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.qat.learned import PTQ_REPORT, ptq_report
from lockstep.qat.prepare import quantized_experts, quantized_modules

IGNORED = -100  # the label of a token that does not count, in torch and transformers
METRICS = ("qat/kl", "qat/cross_entropy")
CHUNK = 2**24  # logits of which there are fp32 copies at a time: 64 MiB each

# What concerns the student's loss or its outputs.
NOT_FOR_THE_TEACHER = (
    "labels",
    "shift_labels",
    "num_items_in_batch",
    "use_cache",
    "past_key_values",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
)


@dataclass(frozen=True)
class Teacher:
    """Who teaches, and how much of the loss that is.

    Args:
        model: folder or hub name of a causal language model of transformers, loaded in the dtype in which the student
            is served; or such a model, which is used in the dtype it has, moved to the student's device and put into
            eval mode. It never trains, and is in no checkpoint of the student.
        kl_share: of the loss, from 0 to 1; the rest is cross-entropy. By default all: the labels then only say which
            tokens count.
        temperature: divides both models' logits in the KL. Positive.

    Raises:
        ValueError: `kl_share` or `temperature` is out of its range.
    """

    model: str | nn.Module
    kl_share: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.kl_share <= 1:
            raise ValueError(f"teacher: kl_share={self.kl_share} is a share of the loss: give 0 to 1.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"teacher: temperature={self.temperature} divides the logits: give a positive number.")


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    kl_share: float = 1.0,
    temperature: float = 1.0,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and KL to the teacher over the tokens that count, in one pass over the logits.

    Computed in fp32, in chunks of rows. The forward computes the student's gradient too, as Liger-Kernel's fused losses
    do (arXiv:2410.10989), and keeps it alone: ``[tokens, vocabulary]`` in the dtype of the student's logits. The
    backward multiplies it in place, so it runs once; there is no gradient to the teacher and no second derivative.

    Args:
        student_logits: ``[tokens, vocabulary]``, floating.
        teacher_logits: the same shape, floating; -inf is probability zero.
        labels: int64 ``[tokens]``, the next token of each, or `ignore_index` where it does not count.
        kl_share: see `Teacher`.
        temperature: see `Teacher`.
        num_items_in_batch: divides the sum over tokens; by default their count in `labels`, so the loss is their mean.
            Both as in transformers' ``ForCausalLMLoss``, so gradient accumulation and data parallelism stay right.
        ignore_index: see `labels`.

    Returns:
        The loss, fp32; and three sums over the tokens that count, fp32 ``[3]`` without gradient: of the KL in nats (at
        `temperature`, without its square), of the cross-entropy in nats, and of ones. The mean over no token is NaN, as
        in torch, with a gradient of zero.

    Raises:
        ValueError: the shapes do not fit.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"the teacher's logits are {list(teacher_logits.shape)}, the student's {list(student_logits.shape)}: their "
            "vocabularies, or the tokens they saw, differ."
        )
    if labels.shape != student_logits.shape[:1]:
        raise ValueError(
            f"{labels.numel()} labels, but logits {list(student_logits.shape)} of {len(student_logits)} tokens: the "
            "loss needs the logits of all tokens. Leave logits_to_keep away."
        )
    loss, sums = _DistillationLoss.apply(
        student_logits, teacher_logits, labels, kl_share, temperature, num_items_in_batch, ignore_index
    )
    return loss, sums


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        kl_share: float,
        temperature: float,
        items: Tensor | int | None,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        sums = torch.zeros(3, device=student.device, dtype=torch.float32)
        counts = labels != ignore_index
        for chunk in _chunks(student):
            kl, cross_entropy, row_gradient = _by_token(
                student[chunk].float(),
                teacher[chunk].float(),
                labels[chunk].where(counts[chunk], 0),
                kl_share,
                temperature,
                gradient is not None,
            )
            counted = counts[chunk]
            sums += torch.stack([kl.where(counted, 0).sum(), cross_entropy.where(counted, 0).sum(), counted.sum()])
            if gradient is not None:
                gradient[chunk] = row_gradient.where(counted[:, None], 0)
        divisor = sums[2] if items is None else torch.as_tensor(items, device=student.device, dtype=torch.float32)
        ctx.gradient, ctx.divisor = gradient, divisor
        ctx.mark_non_differentiable(sums)
        return ((1 - kl_share) * sums[1] + kl_share * temperature**2 * sums[0]) / divisor, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the backward of distillation_loss runs once: its gradient is scaled in place.")
        # Only now, so that what is rounded to the logits' dtype, fp16 maybe, is of the size of one before and scaled
        # against underflow after.
        scale = (gradients[0] / ctx.divisor).where(ctx.divisor > 0, 0)
        for chunk in _chunks(gradient):
            gradient[chunk] = gradient[chunk].float() * scale
        return gradient, None, None, None, None, None, None


def _chunks(logits: Tensor) -> list[slice]:
    rows = max(1, CHUNK // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _by_token(
    student: Tensor, teacher: Tensor, labels: Tensor, kl_share: float, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """KL and cross-entropy ``[tokens]`` in nats, and the gradient of their mixture to the student's logits."""
    log_q1 = student.log_softmax(-1)
    log_q = log_q1 if temperature == 1 else (student / temperature).log_softmax(-1)
    log_p = (teacher / temperature).log_softmax(-1)
    p = log_p.exp()
    kl = (p * (log_p - log_q)).where(p > 0, 0).sum(-1)
    cross_entropy = -log_q1.gather(1, labels[:, None])[:, 0]
    if not with_gradient:
        return kl, cross_entropy, student
    # T^2 KL has the gradient T (q - p).
    gradient = (log_q.exp() - p) * (kl_share * temperature)
    if kl_share < 1:
        gradient += log_q1.exp() * (1 - kl_share)
        gradient[torch.arange(len(labels), device=labels.device), labels] -= 1 - kl_share
    return kl, cross_entropy, gradient


class Distillation:
    """A teacher at work: from now until `remove`, the loss that `student` computes with autograd on is the mixture.

    Before the student's forward the teacher runs on the same inputs, then its logits wait for the student's
    ``loss_function``, which this replaces. So the loss gets the labels, ``shift_labels`` and ``num_items_in_batch`` as
    transformers gives them to its cross-entropy, which is not computed a second time, and a mixture of experts adds its
    balancing loss as ever. With autograd off, as both trainers validate and generate, nothing changes. (Train mode says
    nothing: what ``from_pretrained`` loads is in eval mode, and Lightning trains it so.)

    The teacher is not in the student's module tree. A copy or a pickle of the student has the teacher's place empty.

    Args:
        teacher: see `Teacher`.
        student: a causal language model of transformers, out of its wrappers.
        device: where the student computes.
        dtype: of a teacher that is loaded here.
        tokenizer: the student's, or a processor that has one. Its tokens and their ids must be those of the tokenizer
            in the teacher's folder, where there is one. None: only the sizes of the vocabularies are compared.

    Raises:
        ValueError: the student is no such model, or has another loss; the teacher cannot be loaded, is partitioned by
            ZeRO-3, is quantized, is the student or shares parameters with it, or has another vocabulary.
    """

    def __init__(
        self, teacher: Teacher, student: nn.Module, device: torch.device, dtype: torch.dtype, tokenizer: Any = None
    ) -> None:
        self.kl_share, self.temperature = teacher.kl_share, teacher.temperature
        self.student = student
        if isinstance(teacher.model, str):
            _check_tokens(teacher.model, tokenizer)
        self.teacher: nn.Module | None = _teacher_of(teacher, student, device, dtype)
        self._logits: Tensor | None = None
        self._sums = torch.zeros(3, device=device)
        self._reached_backward = False
        self._handles = [
            student.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            student.register_forward_hook(self._after),
        ]
        student.loss_function = self._loss  # type: ignore[assignment]

    def remove(self) -> None:
        """Leave the student as it was."""
        for handle in self._handles:
            handle.remove()
        del self.student._loss_function
        self.teacher = self._logits = None

    def __reduce__(self) -> Any:
        return _empty_place, ()

    @torch.compiler.disable
    def _before(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.teacher is None or not torch.is_grad_enabled():
            return None
        if kwargs.get("fused_lm_head"):
            raise RuntimeError(
                f"TRL computes its loss within the head of {type(student).__name__}, without logits that the teacher "
                "could be compared with. Train with transformers' own: class Distilled(SFTTrainer): compute_loss = "
                "transformers.Trainer.compute_loss"
            )
        names = inspect.signature(student.forward).parameters
        inputs = dict(zip(names, args, strict=False)) | kwargs
        if inputs.get("input_ids") is None:
            raise ValueError("the teacher reads input_ids, and the student was called without them.")
        if inputs.get("labels") is None:
            inputs["labels"] = _own_tokens(inputs["input_ids"], inputs.get("attention_mask"))
        asked = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_TEACHER}
        device_type = inputs["input_ids"].device.type
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            self._logits = self.teacher(**asked, use_cache=False, return_dict=True).logits
        return (), inputs

    @torch.compiler.disable
    def _loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """In the place of ``transformers.loss.loss_utils.ForCausalLMLoss``, with its arguments."""
        if self.teacher is None or not torch.is_grad_enabled():
            from transformers.loss.loss_utils import ForCausalLMLoss

            plain: Any = ForCausalLMLoss
            return plain(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        teacher_logits, self._logits = self._logits, None
        name = type(self.student).__name__
        if teacher_logits is None:
            raise RuntimeError(
                f"{name}'s loss was asked for outside of a call of {name}, so the teacher has not seen its inputs: "
                "call the model, not model.forward, and let it compute the loss."
            )
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss, sums = distillation_loss(
            logits.flatten(0, -2),
            teacher_logits.flatten(0, -2),
            shift_labels.flatten().to(logits.device),
            self.kl_share,
            self.temperature,
            num_items_in_batch,
            ignore_index,
        )
        self._sums += sums
        loss.register_hook(self._note_backward)
        return loss

    @torch.compiler.disable
    def _after(self, student: nn.Module, args: Any, outputs: Any) -> None:
        if self._logits is not None:
            self._logits = None
            raise RuntimeError(
                f"{type(student).__name__} computed no loss, or not from its logits by its loss_function, as with "
                "Liger's fused cross-entropy: there is nothing that the teacher could be compared with. Switch the "
                "fused loss off."
            )

    def _note_backward(self, gradient: Tensor) -> None:
        self._reached_backward = True

    def check_backward(self) -> None:
        """Before the first optimizer step: RuntimeError if what trains is another loss than the student's own."""
        if not self._reached_backward:
            raise RuntimeError(
                f"the teacher teaches nothing: the gradients do not come from the loss that "
                f"{type(self.student).__name__} returns. Train on model(..., labels=...).loss, without label smoothing "
                "and without a loss function of your own."
            )

    def metrics(self) -> dict[str, float]:
        """`METRICS`, nats per token since the last call, over all ranks, which all call."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        kl, cross_entropy, tokens = sums.tolist()
        return dict(zip(METRICS, (kl / tokens, cross_entropy / tokens), strict=True)) if tokens else {}


def _empty_place() -> Distillation:
    place = object.__new__(Distillation)
    place.teacher = place._logits = None
    return place


def _own_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The labels of a text that is its own: every token that attention sees."""
    if attention_mask is None:
        return input_ids
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"no labels, and an attention_mask {list(attention_mask.shape)} that does not say which of the tokens "
            f"{list(input_ids.shape)} count: give labels."
        )
    return input_ids.masked_fill(attention_mask == 0, IGNORED)


def _check_before_rounding(folder: str) -> None:
    """ValueError if ``lockstep ptq`` wrote `folder`, whose weights were moved to where its codes are."""
    report = ptq_report(Path(folder))
    if report is not None and report["method"] != "rtn":  # which leaves the masters as they were
        raise ValueError(
            f"teacher: {folder} is what {report['method']} made ({PTQ_REPORT}). Give the model before quantization."
        )


def _check_tokens(folder: str, tokenizer: Any) -> None:
    """ValueError if the tokenizer that is stored in the teacher's `folder` has other tokens, or ids, than `tokenizer`.

    Nothing is compared if either is not there: the sizes of both models' vocabularies are, in any case.
    """
    from transformers import AutoTokenizer

    student: Any = tokenizer if hasattr(tokenizer, "get_vocab") else getattr(tokenizer, "tokenizer", None)
    stored = any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if not stored or not hasattr(student, "get_vocab"):
        return
    try:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    except Exception as error:  # transformers reads it without checks of its own: also KeyError, AttributeError
        warnings.warn(
            f"teacher: the tokenizer in {folder} cannot be read, so its tokens are not compared with the student's: "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
        return
    own = student.get_vocab()
    if different := own.items() ^ theirs.items():
        token, _ = min(different, key=lambda one: (one[1], one[0]))
        one, other = (f"id {ids[token]}" if token in ids else "no id" for ids in (theirs, own))
        raise ValueError(
            f"teacher: {token!r} has {one} in the tokenizer of {folder}, and {other} in the student's: the KL needs "
            "the same vocabulary. Give the model that the student was before quantization."
        )


def _teacher_of(teacher: Teacher, student: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM, PreTrainedModel
    from transformers.loss.loss_utils import ForCausalLMLoss

    name = type(student).__name__
    causal = isinstance(student, PreTrainedModel) and student.can_generate()
    if not causal or student.loss_function is not ForCausalLMLoss:
        raise ValueError(f"{name} has a teacher, but is no causal language model of transformers with its own loss.")
    if isinstance(teacher.model, str):
        _check_before_rounding(teacher.model)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(teacher.model, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(f"teacher: cannot load a causal language model from {teacher.model!r}: {error}") from error
    else:
        model = teacher.model
    if any(hasattr(one, "ds_id") for one in model.parameters()):
        raise ValueError(
            "the teacher is partitioned by DeepSpeed's ZeRO-3, and no engine gathers it: load it before "
            "TrainingArguments are made, and give the model instead of its folder."
        )
    if unloaded := [key for key, one in model.named_parameters() if one.is_meta]:
        raise ValueError(f"the teacher's {unloaded[0]} is on meta, without values: give a model that is loaded.")
    own = {id(one) for one in student.parameters()}
    if shared := [key for key, one in model.named_parameters() if id(one) in own]:
        raise ValueError(
            f"the teacher's {shared[0]} is the student's own: a teacher that changes with its student teaches nothing. "
            "Give the folder of the model before quantization, or a deep copy."
        )
    if quantized := next((key for key, _ in (*quantized_modules(model), *quantized_experts(model))), None):
        raise ValueError(
            f"the teacher's {quantized} is prepared: a teacher that is rounded as its student teaches nothing. Give "
            "the model before quantization."
        )
    both: list[Any] = [model, student]
    sizes = [one.config.get_text_config().vocab_size for one in both]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the teacher has a vocabulary of {sizes[0]} tokens, the student of {sizes[1]}: the KL needs the same one."
        )
    return model.to(device).eval()
