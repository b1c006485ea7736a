"""Distillation: its loss against plain torch, and a teacher in real Lightning and transformers trainers."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from models import VOCAB, prepared, tiny_llama, tiny_moe
from test_trainer_callback import PARTITIONED, is_export_of, tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from lockstep.callbacks import QATCallback, QATTrainerCallback
from lockstep.export import Checkpoint
from lockstep.qat import distill, quantized_modules
from lockstep.qat.distill import Distillation, Teacher, distillation_loss

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*",
    "ignore:.*exists and is not empty.*",
    "ignore:.*LeafSpec",
    "ignore:.*`val_dataloader`.*",
    "ignore:.*not resumable.*",
    "ignore:.*logging interval.*",
    "ignore:.*ModelCheckpoint.*",
    "ignore:.*num_workers.*",
)

CPU, FP32 = torch.device("cpu"), torch.float32
LENGTH = 8


# The loss ------------------------------------------------------------------------------------------------------------


def plain_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, kl_share: float, temperature: float, items: int | None = None
) -> Tensor:
    """The same by torch's own functions, in the dtype of the logits."""
    counted = labels != -100
    q, p = (F.log_softmax(logits / temperature, -1) for logits in (student[counted], teacher[counted]))
    kl = F.kl_div(q, p.exp(), reduction="sum")
    cross_entropy = F.cross_entropy(student, labels, reduction="sum")
    return ((1 - kl_share) * cross_entropy + kl_share * temperature**2 * kl) / (items or counted.sum())


def logits_and_labels(tokens: int = 13, vocabulary: int = 37, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[[0, tokens // 2, -1]] = -100
    return student, teacher, labels


def value_and_gradient(loss: Any, student: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf, *rest)
    value = value[0] if isinstance(value, tuple) else value
    (3 * value).backward()  # a loss is scaled before it gets its gradient
    assert leaf.grad is not None
    return value.detach(), leaf.grad


@pytest.mark.parametrize("items", [None, 29])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.5])
@pytest.mark.parametrize("kl_share", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_torchs(kl_share, temperature, items, monkeypatch):
    """In double precision torch says what is right; rows come in chunks that do not divide them."""
    monkeypatch.setattr(distill, "CHUNK", 4 * 37)
    student, teacher, labels = logits_and_labels()
    ours = value_and_gradient(distillation_loss, student, teacher, labels, kl_share, temperature, items)
    right = value_and_gradient(plain_loss, student.double(), teacher.double(), labels, kl_share, temperature, items)
    for mine, theirs in zip(ours, right, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-6, atol=1e-7)
    assert ours[1][labels == -100].count_nonzero() == 0


def test_the_gradient_is_the_slope_of_the_loss():
    """By finite differences: whatever both implementations might have in common."""
    student, teacher, labels = logits_and_labels(3, 5)
    labels[:] = torch.tensor([1, -100, 4])
    _, gradient = value_and_gradient(distillation_loss, student, teacher, labels, 0.6, 2.0)
    for row in range(3):
        for column in range(5):
            moved = [student.clone(), student.clone()]
            moved[0][row, column] += 1e-2
            moved[1][row, column] -= 1e-2
            high, low = (distillation_loss(one, teacher, labels, 0.6, 2.0)[0] for one in moved)
            assert 3 * (high - low).item() / 2e-2 == pytest.approx(gradient[row, column].item(), abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_16_bits_are_computed_in_fp32(dtype):
    """Only the gradient is rounded, to the logits' dtype: twice, before and after it is scaled."""
    student, teacher, labels = logits_and_labels()
    student, teacher = student.to(dtype), teacher.to(dtype)
    value, gradient = value_and_gradient(distillation_loss, student, teacher, labels, 0.7, 2.0)
    right = value_and_gradient(plain_loss, student.double(), teacher.double(), labels, 0.7, 2.0)
    assert value.dtype == FP32
    assert gradient.dtype == dtype
    torch.testing.assert_close(value.double(), right[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient.double(), right[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(("items", "scale"), [(2**17, 2**17), (1, 2**17)])
def test_fp16_gradients_meet_the_loss_scale_in_fp32(items, scale):
    """By 100,000 tokens each would be below fp16's smallest number; and the scale alone is above its largest."""
    teacher = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).half()
    leaf = (teacher + torch.tensor([0.01, -0.01, 0.01, -0.01]).half()).requires_grad_()
    loss, _ = distillation_loss(leaf, teacher, torch.tensor([0]), num_items_in_batch=items)
    (loss * scale).backward()
    right = (leaf.detach().double().softmax(-1) - teacher.double().softmax(-1)) * scale / items
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), right, rtol=2e-3, atol=1e-6)


def test_extreme_logits():
    """Differences of 10^4, and a teacher that rules tokens out, give finite numbers, and torch's."""
    student, teacher, labels = logits_and_labels(6)
    student[1, 3], student[2, 4], teacher[2, 4], teacher[3, 1] = 1e4, -1e4, 1e4, 1e4
    teacher[4, :20] = -torch.inf
    student[4, 3] = -torch.inf  # where the teacher rules it out too
    labels[:] = torch.tensor([7, 3, -100, 9, 30, -100])
    ours = value_and_gradient(distillation_loss, student, teacher, labels, 0.5)
    right = value_and_gradient(plain_loss, student.double(), teacher.double(), labels, 0.5, 1.0)
    kept = torch.ones(6, dtype=torch.bool)
    kept[4] = False  # of -inf torch's own gradient is NaN
    assert ours[0].isfinite()
    assert ours[1].isfinite().all()
    torch.testing.assert_close(ours[1][kept].double(), right[1][kept], rtol=1e-5, atol=1e-7)
    student[4, 3] = -1e4
    ours = value_and_gradient(distillation_loss, student, teacher, labels, 0.5)
    right = value_and_gradient(plain_loss, student.double(), teacher.double(), labels, 0.5, 1.0)
    for mine, theirs in zip(ours, right, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-7)


def test_what_does_not_count_may_hold_anything():
    """Padding's logits are not even numbers in some attention kernels."""
    student, teacher, labels = logits_and_labels()
    clean = value_and_gradient(distillation_loss, student, teacher, labels, 0.5)
    student[labels == -100], teacher[labels == -100] = torch.nan, torch.inf
    for first, second in zip(clean, value_and_gradient(distillation_loss, student, teacher, labels, 0.5), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("items", [None, 8])
def test_a_batch_without_a_token_is_as_in_torch(items):
    """A mean over nothing is NaN in value, and moves nothing; a sum over nothing is zero."""
    student, teacher, labels = logits_and_labels()
    labels[:] = -100
    value, gradient = value_and_gradient(distillation_loss, student, teacher, labels, 0.5, 1.0, items)
    leaf = student.clone().requires_grad_()
    theirs = ForCausalLMLoss(leaf, None, 37, items, shift_labels=labels)
    theirs.backward()
    torch.testing.assert_close(value, theirs.detach(), equal_nan=True)
    assert torch.equal(gradient, leaf.grad)
    assert gradient.count_nonzero() == 0


def test_sums_are_over_the_tokens_that_count():
    student, teacher, labels = logits_and_labels()
    _, sums = distillation_loss(student, teacher, labels, 0.5, 2.0, 100)
    expected = [plain_loss(student, teacher, labels, share, 2.0, 1) for share in (1.0, 0.0)]
    torch.testing.assert_close(sums, torch.tensor([expected[0] / 4, expected[1], 10.0]))


def test_a_second_backward_is_refused():
    """The gradient is scaled in place: a second one would be another."""
    student, teacher, labels = logits_and_labels()
    loss, _ = distillation_loss(student.requires_grad_(), teacher, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


def test_no_fp32_copy_of_the_logits_outlives_a_chunk(monkeypatch):
    """What the graph keeps is one tensor in the logits' dtype; and each operation sees a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == FP32:
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(distill, "CHUNK", 8 * 37)
    student, teacher, labels = logits_and_labels(64)
    student = student.bfloat16().requires_grad_()
    with Watch():
        loss, _ = distillation_loss(student, teacher.bfloat16(), labels, 0.5, 2.0)
        loss.backward()
    assert largest == 8 * 37


@pytest.mark.parametrize(
    ("teacher", "labels", "message"),
    [
        ((13, 38), 13, "vocabularies, or the tokens they saw, differ"),
        ((13, 37), 12, "Leave logits_to_keep away"),
    ],
)
def test_shapes_that_do_not_fit_are_named(teacher, labels, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(torch.zeros(13, 37), torch.zeros(teacher), torch.zeros(labels, dtype=torch.int64))


@pytest.mark.parametrize(
    ("field", "value"),
    [("kl_share", -0.1), ("kl_share", 1.1), ("temperature", 0.0), ("temperature", float("nan"))],
)
def test_a_teacher_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"teacher: {field}={value}"):
        Teacher("base", **{field: value})


# A teacher and its student -------------------------------------------------------------------------------------------


def model(dtype: torch.dtype = FP32, seed: int = 0, **config: Any) -> PreTrainedModel:
    return tiny_llama(
        dtype, seed, **{"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128} | config
    ).train()


def teacher_model() -> PreTrainedModel:
    return model(seed=1).eval()


def taught(student: Any, teacher: Any = None, **options: Any) -> Distillation:
    return Distillation(Teacher(teacher or teacher_model(), **options), student, CPU, FP32)


def batch(seed: int = 0, size: int = 2, length: int = LENGTH) -> dict[str, Tensor]:
    """With padding of different lengths, so that a mean over rows is no mean over tokens."""
    ids = torch.randint(VOCAB, (size, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(length) < length - torch.arange(size)[:, None] % 4
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


@torch.no_grad()
def expected_loss(student: Any, teacher: Any, inputs: dict[str, Tensor], kl_share: float, temperature: float) -> Tensor:
    """By hand, from both models in eval mode."""
    seen = {name: value for name, value in inputs.items() if name != "labels"}
    logits = [one.eval()(**seen).logits[:, :-1].flatten(0, 1).float() for one in (student, teacher)]
    return plain_loss(*logits, inputs["labels"][:, 1:].flatten(), kl_share, temperature)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(("kl_share", "temperature"), [(1.0, 1.0), (0.4, 2.0)])
def test_the_students_loss_is_the_mixture(kl_share, temperature, labels):
    """Without labels the text's own tokens are them, where attention sees them."""
    student, teacher, inputs = prepared(model()).train(), teacher_model(), batch()
    right = expected_loss(prepared(model()), teacher, inputs, kl_share, temperature)
    distillation = taught(student, teacher, kl_share=kl_share, temperature=temperature)
    given = inputs if labels else {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(student(**given).loss.detach(), right, rtol=1e-5, atol=1e-6)
    assert set(distillation.metrics()) == {"qat/kl", "qat/cross_entropy"}
    assert distillation.metrics() == {}


def test_the_loss_is_divided_as_transformers_divides_its_own():
    """At share 0 the mixture is transformers' cross-entropy, with every keyword that its trainer gives."""
    plain, student, inputs = model(), model(), batch()
    taught(student, kl_share=0.0)
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    for extra in (
        {},
        {"num_items_in_batch": 40},
        {"num_items_in_batch": torch.tensor(40)},
        {"shift_labels": shifted.roll(1)},
        {"labels": inputs["input_ids"], "ignore_index": int(shifted[0, 0])},
    ):
        losses = [one(**inputs | extra).loss for one in (plain, student)]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        for one, loss in zip((plain, student), losses, strict=True):
            one.zero_grad()
            loss.backward()
        for mine, theirs in zip(student.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_positional_inputs_and_tuples_are_as_good():
    student, inputs = model(), batch()
    taught(student)
    named = student(**inputs).loss
    assert torch.equal(student(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss, named)
    assert torch.equal(student(**inputs, return_dict=False)[0], named)


def test_a_mixture_of_experts_keeps_its_balancing_loss():
    """transformers adds it to the loss only where there are labels."""
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    plain, student = (tiny_moe("mixtral", FP32, **options).train() for _ in range(2))
    inputs = batch()
    taught(student, tiny_moe("mixtral", FP32, seed=1), kl_share=0.0)
    torch.testing.assert_close(student(**inputs).loss, plain(**inputs).loss, rtol=1e-6, atol=0)
    assert plain(**inputs).aux_loss > 0


def test_without_autograd_nothing_changes():
    """Perplexity on held-out text is the quantized model's own, and generation does not wait for the teacher."""
    student, teacher, inputs = model(), teacher_model(), batch()
    calls: list[bool] = []
    teacher.register_forward_hook(lambda *_: calls.append(True))
    own = student(**inputs).loss
    taught(student, teacher)
    for mode in (student.eval(), student.train()):
        with torch.no_grad():
            assert torch.equal(mode(**inputs).loss, own)
        mode.generate(inputs["input_ids"], max_new_tokens=2)
    assert not calls
    for mode in (student.eval(), student.train()):  # Lightning trains in eval mode what from_pretrained has loaded
        assert not torch.equal(mode(**inputs).loss, own)
    assert len(calls) == 2


def test_the_teacher_does_not_follow_autocast_nor_draw_random_numbers():
    """It is the model that was measured before, whatever precision the student trains in, and has no dropout."""
    student, teacher = model(attention_dropout=0.5), model(seed=1, attention_dropout=0.5).bfloat16()
    seen: list[Tensor] = []
    teacher.register_forward_hook(lambda *call: seen.append(call[-1].logits))
    inputs = batch()
    distillation = taught(student, teacher)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.float16):
        first = student(**inputs).logits
    distillation.remove()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(student(**inputs).logits, first)
    with torch.no_grad():
        assert torch.equal(teacher.eval()(inputs["input_ids"], inputs["attention_mask"]).logits, seen[0])
    assert seen[0].dtype == torch.bfloat16
    assert not seen[0].requires_grad


def test_the_teacher_is_no_part_of_the_student(tmp_path):
    """Of its parameters, its state dict, a copy, a pickle or a saved folder; and a copy trains by itself."""
    student, plain, inputs = model(), model(), batch()
    distillation = taught(student)
    own = plain(**inputs).loss
    assert list(student.state_dict()) == list(plain.state_dict())
    assert len(list(student.modules())) == len(list(plain.modules()))
    pickled = pickle.dumps(student)
    assert len(pickled) < len(pickle.dumps(plain)) * 1.05
    for other in (copy.deepcopy(student), pickle.loads(pickled)):
        assert torch.equal(other(**inputs).loss, own)
    student.save_pretrained(tmp_path)
    assert torch.equal(type(student).from_pretrained(tmp_path).train()(**inputs).loss, own)
    distillation.remove()
    assert torch.equal(student(**inputs).loss, own)
    assert vars(student).keys() == vars(plain).keys()
    assert not student._forward_hooks
    assert not student._forward_pre_hooks
    assert student.loss_function is plain.loss_function


def test_a_peft_model_has_a_teacher():
    """PEFT's wrapper calls the model within; its adapter learns."""
    peft = pytest.importorskip("peft")
    student, inputs = model(), batch()
    right = expected_loss(model(), teacher_model(), inputs, 1.0, 1.0)
    wrapped = peft.get_peft_model(student, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).train()
    distillation = taught(student)
    loss = wrapped(**inputs).loss
    torch.testing.assert_close(loss.detach(), right, rtol=1e-5, atol=1e-6)
    loss.backward()
    distillation.check_backward()


def test_gradient_checkpointing_and_compiled_layers_change_nothing():
    gradients = []
    for change in ("none", "checkpointing", "layers", "whole"):
        student = prepared(model()).train()
        called: Any = student
        if change == "checkpointing":
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elif change == "layers":
            for layer in student.model.layers:
                layer.compile(backend="eager")
        elif change == "whole":
            called = torch.compile(student, backend="eager")
        distillation = taught(student, kl_share=0.5)
        called(**batch()).loss.backward()
        distillation.check_backward()
        gradients.append([one.grad for one in student.parameters()])
    for other in gradients[1:]:
        for first, second in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


def liger_like(student: Any) -> None:
    """A forward that computes its loss from hidden states, and gives no logits."""

    def forward(input_ids: Tensor, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        hidden = student.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return CausalLMOutputWithPast(loss=hidden.float().mean())

    student.forward = forward


def test_a_fused_loss_is_refused():
    student = model()
    liger_like(student)
    taught(student)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM computed no loss, or not from its logits"):
        student(**batch())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs_embeds": torch.zeros(2, LENGTH, 128)}, "without them"),
        ({"input_ids": batch()["input_ids"], "attention_mask": torch.zeros(2, 1, LENGTH, LENGTH)}, "give labels"),
        ({**batch(), "logits_to_keep": 3}, "Leave logits_to_keep away"),
    ],
)
def test_inputs_without_all_that_it_takes_are_refused(inputs, message):
    student = model()
    taught(student)
    with pytest.raises(ValueError, match=message):
        student(**inputs)


def test_a_call_around_the_model_is_refused():
    """Whose inputs the teacher has not seen."""
    student = model()
    taught(student)
    with pytest.raises(RuntimeError, match=r"call the model, not model\.forward"):
        student.forward(**batch())


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (lambda: model(), lambda student: model(vocab_size=256), "vocabulary of 256 tokens, the student of 512"),
        (lambda: model(), lambda student: student, "model.embed_tokens.weight is the student's own"),
        (
            lambda: model(),
            lambda student: "no/such-folder",
            "cannot load a causal language model from 'no/such-folder'",
        ),
        (lambda: model(), lambda student: model().to("meta"), "model.embed_tokens.weight is on meta"),
        (lambda: model(), lambda student: prepared(model(), "W4A16"), "q_proj is prepared: .*before quantization"),
        (lambda: nn.Linear(128, 128), lambda student: teacher_model(), "Linear has a teacher, but is no causal"),
        (lambda: model().model, lambda student: teacher_model(), "LlamaModel has a teacher, but is no causal"),
    ],
)
def test_a_teacher_that_cannot_teach_is_named(student, teacher, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    student = student()
    with pytest.raises(ValueError, match=message):
        taught(student, teacher(student))


@pytest.mark.parametrize(("method", "taken"), [("gptq", False), ("rtn", True)])
def test_the_folder_of_a_post_training_method_is_no_teacher(tmp_path, method, taken):
    """Its weights are rounded as the student's; round to nearest leaves the masters alone."""
    model().save_pretrained(tmp_path)
    report = {"method": method, "servable": True, "rule": {"scale_rule": "amax/7"}, "scales": {}}
    (tmp_path / "ptq.json").write_text(json.dumps(report))
    if taken:
        taught(model(), str(tmp_path))
    else:
        with pytest.raises(ValueError, match=r"is what gptq made .*Give the model before quantization"):
            taught(model(), str(tmp_path))


def words(*tokens: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    vocabulary = {token: number for number, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])))


class Processor:
    """What a trainer of a model that also sees has in the tokenizer's place."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


@pytest.mark.parametrize("wrapped", [False, True], ids=["tokenizer", "processor"])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (("?", "b", "a", "c"), "'a' has id 2 in the tokenizer of .*, and id 1 in the student's"),
        (("?", "a", "b", "d"), "'c' has no id in the tokenizer of .*, and id 3 in the student's"),
        (("?", "a", "b", "c", "<pad>"), "'<pad>' has id 4 in the tokenizer of .*, and no id in the student's"),
    ],
    ids=["swapped", "another", "one more"],
)
def test_a_teacher_with_other_tokens_is_refused_by_the_first_of_them(base, tokens, message, wrapped, monkeypatch):
    """Of the same number: nothing else would show that it reads another text."""
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    words(*tokens).save_pretrained(base)
    own = words("?", "a", "b", "c")
    with pytest.raises(ValueError, match=f"teacher: {message}: the KL needs the same vocabulary"):
        Distillation(Teacher(base), model(), CPU, FP32, Processor(own) if wrapped else own)


def test_only_tokenizers_that_are_there_are_compared(base):
    """The same in both is taken; and a folder without one, a student without one, a teacher that is no folder."""
    own = words("?", "a", "b")
    Distillation(Teacher(base), model(), CPU, FP32, own)
    words("?", "a", "b").save_pretrained(base)
    Distillation(Teacher(base), model(), CPU, FP32, own)
    words("?", "b", "a").save_pretrained(base)
    for other in (None, object()):
        Distillation(Teacher(base), model(), CPU, FP32, other)
    Distillation(Teacher(teacher_model()), model(), CPU, FP32, own)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "none"}, "added_tokens": []}'])
def test_a_tokenizer_that_cannot_be_read_is_a_warning(base, content):
    (Path(base) / "tokenizer.json").write_text(content)
    with pytest.warns(UserWarning, match=r"the tokenizer in .* cannot be read, so its tokens are not compared"):
        Distillation(Teacher(base), model(), CPU, FP32, words("?", "a"))


def test_one_shared_layer_is_enough_to_be_refused():
    student, teacher = model(), teacher_model()
    teacher.lm_head.weight = student.lm_head.weight
    with pytest.raises(ValueError, match=r"teacher's lm_head\.weight is the student's own"):
        taught(student, teacher)


def test_a_teacher_in_pieces_is_refused():
    """As from_pretrained makes it once TrainingArguments with ZeRO-3 are there: its parameters are empty."""
    teacher = teacher_model()
    teacher.lm_head.weight.ds_id = 7
    with pytest.raises(ValueError, match=r"partitioned by DeepSpeed's ZeRO-3.* load it before"):
        taught(model(), teacher)


def test_a_students_own_loss_is_not_dropped():
    student = model()
    student.loss_function = lambda **_: torch.zeros(())
    with pytest.raises(ValueError, match="with its own loss"):
        taught(student)


# In Lightning --------------------------------------------------------------------------------------------------------


class Language(LightningModule):
    """A tiny Llama; remembers the losses of its batches."""

    def __init__(self, rows: int = 2, own_loss: bool = False) -> None:
        super().__init__()
        self.model: Any = model()
        self.rows, self.own_loss = rows, own_loss
        self.losses: list[float] = []

    def training_step(self, item: Tensor, batch_idx: int) -> Tensor:
        outputs = self.model(**rows_of(self.current_epoch * 4 * self.rows + batch_idx * self.rows, self.rows))
        self.losses.append(outputs.loss.item())
        return outputs.logits.float().square().mean() if self.own_loss else outputs.loss

    def validation_step(self, item: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.model(**rows_of(1000, 4)).loss)

    test_step = validation_step

    def predict_step(self, item: Tensor, batch_idx: int) -> Tensor:
        return self.model(**rows_of(1000, 4)).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows_of(first: int, count: int) -> dict[str, Tensor]:
    """Rows without padding, which follow from their numbers."""
    ids = torch.stack(
        [
            torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(n))
            for n in range(first, first + count)
        ]
    )
    return {"input_ids": ids, "labels": ids}


def loader(batches: int = 4) -> DataLoader:
    return DataLoader(range(batches))


class Numbers(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader()


def lightning(*callbacks: Callback, steps: int = 4, **options: Any) -> LightningTrainer:
    plain = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return LightningTrainer(max_steps=steps, callbacks=list(callbacks), **plain | options)


@pytest.fixture
def base(tmp_path) -> str:
    """The teacher's folder."""
    teacher_model().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def hooks_of(student: nn.Module) -> int:
    return len(student._forward_hooks) + len(student._forward_pre_hooks) + hasattr(student, "_loss_function")


def test_a_lightning_run_learns_from_its_teacher(base):
    """The very step of a loop by hand: the teacher in bf16, the KL alone; and nothing is left of it."""
    callback = QATCallback("W4A16", log_every_n_steps=2, teacher=Teacher(base))
    module, trainer = Language(), lightning(callback)
    trainer.fit(module, loader(), loader(1))

    by_hand: Any = prepared(model()).train()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    teacher = PreTrainedModel.from_pretrained.__func__(type(by_hand), base, dtype=torch.bfloat16).eval()
    losses = []
    for step in range(4):
        inputs = rows_of(2 * step, 2)
        with torch.no_grad():
            target = teacher(inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
        student = by_hand(inputs["input_ids"]).logits[:, :-1].flatten(0, 1)
        loss = plain_loss(student, target.float(), inputs["labels"][:, 1:].flatten(), 1.0, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert module.losses == pytest.approx(losses, rel=1e-5)
    for mine, theirs in zip(module.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert trainer.callback_metrics["qat/kl"].item() == pytest.approx(sum(losses[2:]) / 2, rel=1e-4)
    assert trainer.callback_metrics["qat/cross_entropy"] > 5
    assert trainer.callback_metrics["val/loss"] > 5  # cross-entropy; the KL is below 1
    assert hooks_of(module.model) == 0
    assert type(copy.deepcopy(module)) is Language
    pickle.dumps(module.model)


def test_accumulated_micro_batches_are_one_batch(base):
    runs = []
    for rows, accumulate in ((4, 1), (2, 2)):
        module = Language(rows)
        callback = QATCallback("W4A16", log_every_n_steps=0, teacher=Teacher(base, kl_share=0.5, temperature=2.0))
        lightning(callback, steps=2, accumulate_grad_batches=accumulate).fit(module, loader())
        runs.append(module.model)
    for one, other in zip(*(run.parameters() for run in runs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_teacher_is_in_no_checkpoint_and_a_resumed_run_is_the_unbroken_one(base, tmp_path):
    def fit(steps: int, resume: str | None = None) -> Language:
        module = Language()
        saving = ModelCheckpoint(tmp_path / f"{steps}", save_last=True)
        lightning(QATCallback("W4A16", log_every_n_steps=1, teacher=Teacher(base)), saving, steps=steps).fit(
            module, loader(), ckpt_path=resume, weights_only=False
        )
        return module

    unbroken = fit(4)
    fit(2)
    last = tmp_path / "2" / "last.ckpt"
    stored = torch.load(last, weights_only=False)
    assert {key.removeprefix("model.") for key in stored["state_dict"]} == set(model().state_dict())
    resumed = fit(4, str(last))
    assert resumed.losses == unbroken.losses[2:]
    for mine, theirs in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_only_fit_loads_the_teacher():
    module = Language()
    trainer = lightning(QATCallback("W4A16", teacher=Teacher("no/such-folder")))
    for run in (trainer.validate, trainer.test, trainer.predict):
        run(module, loader(1))
    assert type(module.model.model.layers[0].mlp.up_proj).__name__ == "QATLinear"


class Named(Numbers):
    tokenizer = words("?", "a", "b")


@pytest.mark.parametrize("owner", ["data module", "module"])
def test_the_tokenizer_of_a_lightning_run_is_compared_with_the_teachers(base, owner):
    words("?", "b", "a").save_pretrained(base)
    module = Language()
    if owner == "module":
        module.tokenizer = Named.tokenizer
    data: Any = loader() if owner == "module" else Named()
    with pytest.raises(ValueError, match=r"teacher: 'a' has id 2 in the tokenizer of .*, and id 1 in the student's"):
        lightning(QATCallback("W4A16", teacher=Teacher(base))).fit(module, data)
    assert hooks_of(module.model) == 0


class Stops(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise KeyError("the data ended")


def test_a_run_that_fails_leaves_nothing_behind(base):
    module = Language()
    with pytest.raises(KeyError, match="the data ended"):
        lightning(QATCallback("W4A16", log_every_n_steps=0, teacher=Teacher(base)), Stops()).fit(module, loader())
    assert hooks_of(module.model) == 0


def test_a_training_step_with_a_loss_of_its_own_is_refused(base):
    """Before a weight moves, and it leaves nothing behind either."""
    module = Language(own_loss=True)
    with pytest.raises(RuntimeError, match="the teacher teaches nothing"):
        lightning(QATCallback("W4A16", teacher=Teacher(base))).fit(module, loader())
    for mine, before in zip(module.model.parameters(), model().parameters(), strict=True):
        assert torch.equal(mine, before)
    assert hooks_of(module.model) == 0


def test_yaml_gives_a_teacher_without_naming_classes(base, tmp_path):
    options = {"scheme": "W4A16", "log_every_n_steps": 0, "teacher": {"model": base, "temperature": 2.0}}
    trainer = {
        "max_steps": 1,
        "logger": False,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "default_root_dir": str(tmp_path),
        "callbacks": [{"class_path": "lockstep.callbacks.QATCallback", "init_args": options}],
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"trainer": trainer}))

    def run(config: Path) -> Any:
        overwrite = {"overwrite": True}
        cli = LightningCLI(Language, Numbers, args=["fit", "--config", str(config)], save_config_kwargs=overwrite)
        (callback,) = [one for one in cli.trainer.callbacks if isinstance(one, QATCallback)]
        assert cli.model.losses[0] < 5  # no cross-entropy
        return callback

    assert run(file).teacher == Teacher(base, temperature=2.0)
    (saved,) = tmp_path.rglob("config.yaml")
    assert run(saved).teacher == Teacher(base, temperature=2.0)


# In transformers' trainer --------------------------------------------------------------------------------------------


def hf_rows(count: int = 16) -> list[dict[str, Tensor]]:
    """Rows of which different numbers of tokens count, as micro-batches would have them."""
    rows = [{name: value[0] for name, value in rows_of(number, 1).items()} for number in range(count)]
    return [{**row, "labels": row["labels"].where(torch.arange(LENGTH) > n % 5, -100)} for n, row in enumerate(rows)]


def hf(directory: Path, *callbacks: TrainerCallback, of: Any = None, steps: int = 3, **options: Any) -> Trainer:
    plain: dict[str, Any] = {
        "use_cpu": True,
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    made = {key: options.pop(key) for key in ("compute_loss_func", "processing_class") if key in options}
    args = TrainingArguments(str(directory), **plain | options)
    return Trainer(
        of or model(), args, train_dataset=hf_rows(), eval_dataset=hf_rows(2), callbacks=[*callbacks], **made
    )


def hf_callback(base: str, **options: Any) -> QATTrainerCallback:
    teacher = Teacher(base, **{key: options.pop(key) for key in ("kl_share", "temperature") if key in options})
    return QATTrainerCallback("W4A16", **{"log_every_n_steps": 1, "teacher": teacher} | options)


def weights_of(trainer: Trainer) -> list[Tensor]:
    return [one.detach().clone() for one in trainer.model.parameters()]


def test_a_transformers_run_learns_from_its_teacher(base, tmp_path):
    trainer = hf(tmp_path / "run", hf_callback(base), eval_strategy="steps", eval_steps=1)
    plain = expected_loss(prepared(model()), teacher_model().bfloat16(), rows_of(0, 2), 1.0, 1.0)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    kls = [entry["qat/kl"] for entry in trainer.state.log_history if "qat/kl" in entry]
    assert losses == pytest.approx(kls, rel=1e-3)
    assert 0 < losses[0] < 2 * plain
    assert all(entry["eval_loss"] > 5 for entry in trainer.state.log_history if "eval_loss" in entry)
    assert all(entry["qat/cross_entropy"] > 5 for entry in trainer.state.log_history if "qat/kl" in entry)
    assert hooks_of(trainer.model) == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_accumulation_in_transformers_counts_tokens(base, tmp_path, temperature):
    """Micro-batches with different numbers of tokens weigh as in one batch: num_items_in_batch."""
    weights = []
    for size, accumulate in ((4, 1), (2, 2), (1, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
        trainer = hf(tmp_path / "run", hf_callback(base, kl_share=0.5, temperature=temperature), **options)
        trainer.train()
        weights.append(weights_of(trainer))
    for other in weights[1:]:
        for one, two in zip(weights[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=2e-6)


def test_a_resumed_transformers_run_is_the_unbroken_one(base, tmp_path):
    whole = hf(tmp_path / "whole", hf_callback(base), steps=4)
    whole.train()
    hf(tmp_path / "run", hf_callback(base), steps=4, save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    from safetensors.torch import load_file

    assert set(load_file(checkpoint / "model.safetensors")) <= set(model().state_dict())
    resumed = hf(tmp_path / "run", hf_callback(base), steps=4)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(*pair) for pair in zip(weights_of(whole), weights_of(resumed), strict=True))


@pytest.mark.parametrize(
    "options", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": lambda outputs, *_, **__: outputs.logits.mean()}]
)
def test_a_trainer_with_a_loss_of_its_own_is_refused(base, tmp_path, options):
    trainer = hf(tmp_path / "run", hf_callback(base), **options)
    with pytest.raises(RuntimeError, match="the teacher teaches nothing"):
        trainer.train()
    assert all(torch.equal(*pair) for pair in zip(weights_of(trainer), model().parameters(), strict=True))


def test_the_trainers_tokenizer_is_compared_with_the_teachers(base, tmp_path):
    words("?", "b", "a").save_pretrained(base)
    trainer = hf(tmp_path / "run", hf_callback(base), processing_class=words("?", "a", "b"))
    with pytest.raises(ValueError, match=r"teacher: 'a' has id 2 in the tokenizer of .*, and id 1 in the student's"):
        trainer.train()
    assert hooks_of(trainer.model) == 0


def test_a_transformers_run_after_one_that_failed(base, tmp_path):
    """The trainer tells no callback that it failed: the next run puts the old teacher away."""

    class Fails(TrainerCallback):
        failed = False

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not self.failed:
                self.failed = True
                raise KeyError("the data ended")

    trainer = hf(tmp_path / "run", hf_callback(base), Fails())
    with pytest.raises(KeyError):
        trainer.train()
    assert trainer.evaluate()["eval_loss"] > 5
    copied = copy.deepcopy(trainer.model)
    assert copied.train()(**rows_of(0, 2)).loss > 5
    trainer.train()
    assert hooks_of(trainer.model) == 0


# In TRL's trainer ----------------------------------------------------------------------------------------------------


def sft(kind: Any, directory: Path, callback: QATTrainerCallback) -> Any:
    """A trainer of `kind`, an SFTTrainer, of texts of different lengths."""
    import datasets
    from trl import SFTConfig

    text = datasets.Dataset.from_list([{"text": f"{number} times {number} is {number**2}"} for number in range(8)])
    plain: dict[str, Any] = {"use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1}
    quiet: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataset_num_proc": None}
    args = SFTConfig(str(directory), bf16=False, **plain, **quiet)
    return kind(model=model(), args=args, train_dataset=text, processing_class=tokenizer(), callbacks=[callback])


def test_the_loss_within_trls_head_is_refused_by_name(base, tmp_path):
    from trl import SFTTrainer

    run = sft(SFTTrainer, tmp_path / "run", hf_callback(base))
    with pytest.raises(RuntimeError, match=r"TRL computes its loss within the head of LlamaForCausalLM.*SFTTrainer"):
        run.train()
    assert all(torch.equal(*pair) for pair in zip(weights_of(run), model().parameters(), strict=True))


def test_an_sft_trainer_with_the_loss_of_transformers_learns_from_its_teacher(base, tmp_path):
    """As the page and the error say; the first loss is the one by hand."""
    from trl import SFTTrainer

    class Distilled(SFTTrainer):
        compute_loss = Trainer.compute_loss

    run = sft(Distilled, tmp_path / "run", hf_callback(base, kl_share=0.5, export_dir=str(tmp_path / "out")))
    seen: list[dict[str, Any]] = []
    watch = run.model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs), with_kwargs=True)
    run.train()
    watch.remove()
    found = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(found) == 3
    for entry in found:
        assert entry["loss"] == pytest.approx((entry["qat/kl"] + entry["qat/cross_entropy"]) / 2, rel=1e-5)
    inputs = {name: seen[0][name] for name in ("input_ids", "attention_mask", "labels") if name in seen[0]}
    teacher = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    right = expected_loss(prepared(model()), teacher, inputs, 0.5, 1.0)
    assert found[0]["loss"] == pytest.approx(right.item(), rel=1e-5)
    assert is_export_of(tmp_path / "out", run.model)
    assert run.evaluate(run.train_dataset)["eval_loss"] > 5
    assert hooks_of(run.model) == 0


# Over several processes ----------------------------------------------------------------------------------------------

DDP = """
import torch, torch.distributed as dist
import lightning.pytorch
from test_distill import *
from lightning.pytorch.strategies import {strategy}

class Half(Language):
    def training_step(self, item, batch_idx):
        rank = dist.get_rank()
        outputs = self.model(**rows_of(4 * batch_idx + 2 * rank, 2))
        self.losses.append(outputs.loss.item())
        return outputs.loss

module = Half()
trainer = lightning(
    QATCallback("W4A16", log_every_n_steps=2, teacher=Teacher({base!r}, kl_share=0.5)), steps=2, devices=2,
    strategy={make}, use_distributed_sampler=False,
)
trainer.fit(module, loader())
from torch.distributed.tensor import DTensor
whole = {{k: (v.full_tensor() if isinstance(v, DTensor) else v) for k, v in module.model.state_dict().items()}}
if dist.get_rank() == 0:
    torch.save({{"weights": whole, "losses": module.losses, "kl": trainer.callback_metrics["qat/kl"]}}, {out!r})
else:
    torch.save(module.losses, {out!r} + ".1")
dist.barrier()
"""


@pytest.mark.parametrize(
    ("strategy", "make"),
    [("DDPStrategy", "DDPStrategy(process_group_backend='gloo')"), ("ModelParallelStrategy", "sharded()")],
)
def test_two_processes_train_as_one(base, tmp_path, strategy, make):
    """DDP, and FSDP2 with a whole teacher on each rank: losses and weights of one process with both halves."""
    module = Language(rows=4)
    one = lightning(QATCallback("W4A16", log_every_n_steps=2, teacher=Teacher(base, kl_share=0.5)), steps=2)
    one.fit(module, loader())
    out = str(tmp_path / "two.pt")
    sharded = ""
    if "sharded" in make:
        sharded = (
            "from torch.distributed.fsdp import fully_shard\n"
            "def configure_model(self):\n"
            "    for layer in self.model.model.layers:\n"
            "        fully_shard(layer, mesh=self.device_mesh['data_parallel'])\n"
            "    fully_shard(self.model, mesh=self.device_mesh['data_parallel'])\n"
            "Language.configure_model = configure_model\n"
            "sharded = lambda: ModelParallelStrategy(2, 1, process_group_backend='gloo')\n"
        )
    script = DDP.format(strategy=strategy, make=make, base=base, out=out)
    head, _, tail = script.partition("class Half")
    ranks.run(head + sharded + "class Half" + tail, tmp_path)
    two = torch.load(out)
    halves = torch.tensor([two["losses"], torch.load(out + ".1")])
    torch.testing.assert_close(halves.mean(0), torch.tensor(module.losses), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two["kl"], one.callback_metrics["qat/kl"], rtol=1e-5, atol=1e-6)
    for name, weight in module.model.state_dict().items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-6)


def under_zero(base: str, directory: str) -> None:
    """In a rank: stages 1 and 2 with a teacher from its folder, 3 with one that was loaded before."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ here; gloo alone does it
    torch.distributed.init_process_group("gloo")
    for stage in (1, 2, 3):
        teacher = Teacher(base if stage < 3 else teacher_of(base), kl_share=0.5)
        callback = QATTrainerCallback("W4A16", teacher=teacher, export_dir=f"{directory}/zero{stage}")
        zero = PARTITIONED["zero_optimization"] | {"stage": stage}
        options = {"per_device_train_batch_size": 1, "deepspeed": PARTITIONED | {"zero_optimization": zero}}
        run = hf(Path(directory, f"run{stage}"), callback, of=model(), **options)
        run.train()
        assert type(run.model_wrapped).__name__ == "DeepSpeedEngine"
        assert not hasattr(run.model, "_loss_function")
        entries = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        torch.save(entries, f"{directory}/losses{stage}-{torch.distributed.get_rank()}")
        torch.distributed.barrier()


def teacher_of(base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)


def test_deepspeeds_ranks_learn_from_a_teacher_as_one_process(base, tmp_path):
    """ZeRO-1, -2 and -3 in transformers' trainer: the losses, and the codes but for weights on a boundary."""
    alone = hf(tmp_path / "alone", hf_callback(base, kl_share=0.5))
    alone.train()
    losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    ranks.run(
        f"import test_distill as tests\ntests.under_zero({base!r}, {str(tmp_path)!r})",
        tmp_path / "ranks",
        DS_ACCELERATOR="cpu",
    )
    for stage in (1, 2, 3):
        for rank in (0, 1):
            assert torch.load(tmp_path / f"losses{stage}-{rank}") == pytest.approx(losses, rel=2e-6), stage
        exported = Checkpoint(tmp_path / f"zero{stage}")
        for name, layer in quantized_modules(alone.model):
            differ = exported.layer(name).codes != layer.quantize().codes
            assert differ.float().mean() <= 1e-3, (stage, name)
