"""Oscillation of codes: what counts as one, and dampening, against the regularizer that it is the gradient of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from models import TinyMlp, grouped, prepared, tiny_llama, tiny_moe, token_ids
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer as HFTrainer
from transformers import TrainingArguments

import lockstep
from lockstep import Scheme, grid
from lockstep.callbacks import LossSpikeCallback, QATCallback, QATTrainerCallback, common
from lockstep.qat import oscillation, quantized_modules
from lockstep.qat.experts import experts
from lockstep.qat.prepare import quantized_experts
from lockstep.scheme import PRESETS, TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*not resumable.*")

# Measured ----------------------------------------------------------------------------------------------------------


def shares(*codes: list[float], dtype: torch.dtype = torch.int8) -> list[float | None]:
    """The oscillation at each log of a layer with these codes; None where there is nothing to compare yet."""
    found: list[float | None] = []
    before = None
    for one in codes:
        now = oscillation.follow(torch.tensor([one]).to(dtype), before)
        known = before is not None and before.direction is not None
        found.append(oscillation.oscillation(now, before, dtype) if known else None)
        before = now
    return found


def test_only_a_change_against_the_last_one_counts():
    """A traveller, one that goes back, one that rests in between, one that never moves."""
    logs = [[-7, 0, 3, 5], [-3, 1, 4, 5], [0, 0, 4, 5], [7, 1, 3, 5], [7, 1, 3, 5], [7, 0, 4, 5]]
    assert shares(*logs) == [None, None, 0.25, 0.5, 0.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_the_order_is_that_of_the_values_on_both_sides_of_zero(dtype):
    """Bytes of negative floats are ordered the other way around, and -0 is 0."""
    down = [[6.0, 6.0], [1.0, 3.0], [-1.0, -2.0], [-2.0, -6.0]]
    assert shares(*down, dtype=dtype) == [None, None, 0.0, 0.0]
    assert shares([0.0], [-2.0], [-4.0], [-1.0], [-4.0], dtype=dtype)[2:] == [0.0, 1.0, 1.0]
    if dtype.is_floating_point:
        assert shares([1.0], [0.0], [-0.0], [0.0], dtype=dtype)[2:] == [0.0, 0.0]


class Planted(LightningModule):
    """Its second layer's codes are set after each step: half of them go to and fro, the rest stay."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TinyMlp(dtype=torch.float32)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        codes = torch.full((128, 256), 3.0)
        codes[:, ::2] += batch_idx % 2
        codes[:, :4] = 7  # the scale stays: a whole group starts with its largest
        codes[:, 128:132] = 7
        self.model.second.weight.data = codes / 64
        return self.model(torch.ones(1, 128)).sum()


def test_the_callback_logs_it_from_the_third_time_on():
    logged: list[dict[str, float]] = []

    class Log(QATCallback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            found = trainer.callback_metrics.items()
            logged.append({name: value.item() for name, value in found if "oscillation" in name})

    run(Planted(), Log("W4A16", log_every_n_steps=1), steps=4)
    moving = (256 - 8) / 2 / 256
    assert logged[:2] == [{}, {}]
    for found in logged[2:]:
        assert found["qat/oscillation/second"] == pytest.approx(moving)
        assert found["qat/oscillation/first"] == 0
        assert found["qat/oscillation/mean"] == pytest.approx(moving / 2)


def test_experts_are_averaged_and_a_resting_model_does_not_oscillate():
    model = prepared(tiny_moe(), grouped(32))
    codes: Any = {}
    for _ in range(3):
        metrics, codes = common.layer_statistics(model, codes)
    assert metrics["qat/oscillation/mean"] == 0
    assert "qat/oscillation/model.layers.0.mlp.experts" in metrics
    one = next(iter(codes.values()))
    assert one.codes.dtype == one.direction.dtype == torch.int8, "two bytes a weight"


# Dampened ----------------------------------------------------------------------------------------------------------


def linear(spec: TensorSpec) -> Any:
    torch.manual_seed(0)
    scheme = Scheme(spec) if spec.format != "fp8_e4m3" or spec.strategy == "group" else None
    named = scheme or next(one for one in PRESETS.values() if one.weights == spec)
    return prepared(nn.Sequential(nn.Linear(256, 128)), named)[0]


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_pull_is_to_the_served_weight_and_stops_at_the_range(name):
    layer = linear(PRESETS[name].weights)
    quantized, spec = layer.quantize(), layer.scheme.weights
    served = grid.dequantize(quantized, spec).float()
    pull = oscillation.pull(layer.weight.detach(), quantized, spec)
    inside = pull != 0
    assert torch.equal(pull[inside], (layer.weight.detach() - served)[inside])
    assert 0 < pull.abs().max() <= layer.weight.abs().max() / 4
    codes, (low, high) = quantized.codes.float(), spec.code_range
    assert inside[(codes > low + 1) & (codes < high - 1) & (layer.weight != served)].all()


def test_a_weight_that_was_cut_off_is_not_pulled():
    """Under amax/7.5 the largest weights lie beyond the code 7, which is as near as they get."""
    spec = TensorSpec(group_size=32, scale_rule="amax/7.5", scale_dtype=torch.float32)
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([7.5, -7.5, 7.2, 6.8]) / 8
    pull = oscillation.pull(weight, grid.quantize(weight, spec), spec)
    torch.testing.assert_close(pull[0, :4] * 8, torch.tensor([0, 0.5, 0, -0.2]), atol=1e-2, rtol=0)


def test_strength_rises_by_half_a_cosine():
    assert [oscillation.risen(2.0, step, 4) for step in (-1, 0, 2, 4, 9)] == pytest.approx([0, 0, 1, 2, 2])


class Regression(LightningModule):
    """Shrinks its outputs; notes the gradients that the optimizer steps with."""

    def __init__(self, learning_rate: float = 0.05, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.learning_rate, self.seen = TinyMlp(dtype=dtype), learning_rate, []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.model, batch_idx)

    def configure_gradient_clipping(self, optimizer: Any, *how: Any, **named: Any) -> None:
        self.clip_gradients(optimizer, *how, **named)
        self.seen.append(gradients(self.model))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def loss_of(model: nn.Module, number: int, rows: slice = slice(None)) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(4, 128, generator=generator).to(next(model.parameters()).dtype)
    return model(x[rows]).float().square().mean()


def run(module: LightningModule, *callbacks: Any, steps: int, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[*callbacks], max_steps=steps, enable_checkpointing=False, **quiet | options)
    trainer.fit(module, DataLoader(torch.arange(16.0)))
    return module


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC", "NVFP4A16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_the_gradient_of_the_regularizer_bit_for_bit(scheme, accumulate):
    """Autograd's, of strength / 2 * ||w - fq(w)||^2 added to the loss once an optimizer step, and nothing else."""
    steps, strength = 3, 0.5
    module = run(Regression(), QATCallback(scheme, dampening=strength), steps=steps, accumulate_grad_batches=accumulate)
    own = prepared(TinyMlp(dtype=torch.float32), scheme)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
    for step in range(steps):
        for micro in range(accumulate):
            (loss_of(own, step * accumulate + micro) / accumulate).backward()
        for _, layer in quantized_modules(own):
            served = grid.dequantize(layer.quantize(), layer.scheme.weights).float()
            difference = layer.weight - served
            difference = difference[
                difference == oscillation.pull(layer.weight, layer.quantize(), layer.scheme.weights)
            ]
            (oscillation.risen(strength, step, steps) / 2 * difference.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, found), expected in zip(module.model.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-6, msg=name)
    undamped = run(Regression(), QATCallback(scheme), steps=steps, accumulate_grad_batches=accumulate)
    assert not torch.equal(undamped.model.first.weight, module.model.first.weight)


def test_weights_settle_in_the_middle_of_their_bins():
    def distance(strength: float) -> float:
        module = run(Regression(learning_rate=0.5), QATCallback("W4A16", dampening=strength), steps=16)
        layer = module.model.first
        return oscillation.pull(layer.weight.detach(), layer.quantize(), layer.scheme.weights).abs().mean().item()

    assert distance(1.0) < 0.4 * distance(0.0)


def test_it_comes_before_the_clipping_in_lightning():
    options = {"steps": 3, "gradient_clip_val": 1e-3}
    seen = run(Regression(), QATCallback("W4A16", dampening=100.0), **options).seen
    norms = [torch.stack([one.norm() for one in step.values()]).norm().item() for step in seen]
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)
    plain = run(Regression(), QATCallback("W4A16"), **options).seen
    assert torch.equal(plain[0]["first.weight"], seen[0]["first.weight"])  # the strength rises from 0
    assert not torch.equal(plain[1]["first.weight"], seen[1]["first.weight"])


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_of_fp16_are_dampened_unscaled(fused):
    scheme = Scheme.preset("W4A16", scale_dtype=torch.float16, served_dtype=torch.float16)

    class Scaled(Regression):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate, fused=fused)

    def seen(strength: float) -> list[dict[str, Tensor]]:
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12))
        module = Scaled(learning_rate=0.0)
        return run(module, QATCallback(scheme, dampening=strength), steps=3, plugins=[plugin]).seen

    if fused:
        with pytest.raises(ValueError, match=r"SGD with fused=True unscales .*Leave fused out"):
            seen(1.0)
        return
    layer = prepared(TinyMlp(dtype=torch.float32), scheme).first
    pull = oscillation.pull(layer.weight.detach(), layer.quantize(), layer.scheme.weights)
    added = seen(1.0)[2]["first.weight"] - seen(0.0)[2]["first.weight"]
    torch.testing.assert_close(added, 0.75 * pull, atol=1e-6, rtol=1e-3)


def test_learned_scales_pull_to_their_own_grid_and_are_not_pulled():
    model = prepared(TinyMlp(dtype=torch.float32), "W4A16", learned_scales=True)
    model.first.weight_scale.data *= 1.5
    loss_of(model, 0).backward()
    before = gradients(model)
    oscillation.dampen(model, 2.0, list(model.parameters()))
    served = grid.dequantize(model.first.quantize(), model.first.scheme.weights).float()
    expected = before["first.weight"] + 2 * (model.first.weight.detach() - served)
    assert torch.equal(model.first.weight.grad, expected)
    assert torch.equal(model.first.weight_scale.grad, before["first.weight_scale"])


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_are_dampened_each_on_its_own_grid(kind):
    model = prepared(tiny_moe(kind, torch.float32), grouped(32)).train()
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    before = gradients(model)
    oscillation.dampen(model, 2.0, list(model.parameters()))
    ((name, module), *_) = quantized_experts(model)
    for expert in experts(module):
        after, old = (
            module.layout.rows(one)[expert.number, module.layout.parts()[expert.part]]
            for one in (getattr(module, expert.parameter).grad, before[f"{name}.{expert.parameter}"])
        )
        pull = oscillation.pull(expert.weight.detach(), expert.quantize(), expert.scheme.weights)
        assert torch.equal(after, old + 2 * pull)
        assert pull.any()


def test_only_the_weights_of_the_optimizer_that_steps():
    model = prepared(TinyMlp(dtype=torch.float32), "W4A16")
    loss_of(model, 0).backward()
    before = gradients(model)
    oscillation.dampen(model, 1.0, [model.first.weight, model.norm.weight])
    after = gradients(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["first.weight"]


@pytest.mark.parametrize(
    ("clip", "expected"), [(0.0, "whole"), (1e-3, "clipped, and then dampened")], ids=["unclipped", "clipped"]
)
def test_the_trainer_dampens_after_its_clipping(tmp_path, clip, expected):
    seen = hf(tmp_path, QATTrainerCallback(grouped(32), dampening=4.0, log_every_n_steps=0), clip)
    plain = hf(tmp_path, QATTrainerCallback(grouped(32), log_every_n_steps=0), clip)
    model = prepared(small_llama(), grouped(32))
    for name, layer in quantized_modules(model):
        pull = oscillation.pull(layer.weight.detach(), layer.quantize(), layer.scheme.weights)
        key = f"{name}.weight"
        torch.testing.assert_close(
            seen[2][key], plain[2][key] + 3 * pull, atol=1e-6, rtol=1e-4, msg=f"{key} {expected}"
        )
        assert torch.equal(seen[0][key], plain[0][key])


def small_llama() -> Any:
    return tiny_llama(torch.float32, num_hidden_layers=1, hidden_size=128, intermediate_size=128)


def hf(directory: Path, callback: QATTrainerCallback, clip: float, **options: Any) -> list[dict[str, Tensor]]:
    """The gradients that each of three steps of a trainer with rate 0 sees."""
    data = [{"input_ids": ids, "labels": ids} for ids in token_ids(8, 8)]
    defaults = {"use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "no"}
    quiet = {"report_to": "none", "disable_tqdm": True, "max_grad_norm": clip}
    args, model = TrainingArguments(str(directory), **defaults | quiet | options), small_llama()
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.0), []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(model)))
    HFTrainer(model=model, args=args, train_dataset=data, callbacks=[callback], optimizers=(optimizer, None)).train()
    return seen


# Over several processes --------------------------------------------------------------------------------------------

TOGETHER = """
import torch
import torch.distributed as dist
from test_oscillation import *
from lightning.pytorch.strategies import DDPStrategy

class Half(Regression):
    def training_step(self, batch, batch_idx):
        return loss_of(self.model, batch_idx, slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2))

dist.init_process_group("gloo")
ddp = {{"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo"), "use_distributed_sampler": False}}
module = run(Half(), *dampened(2.0), steps=4, **ddp)
of_hf = hf(Path({directory!r}), QATTrainerCallback(grouped(32), dampening=4.0), 1e-3, per_device_train_batch_size=1)
torch.save((module.seen, of_hf), f"{directory}/{{dist.get_rank()}}.pt")
dist.barrier()
"""


def dampened(strength: float) -> list[QATCallback]:
    return [QATCallback("W4A16", dampening=strength, log_every_n_steps=0)]


def test_data_parallel_ranks_are_dampened_as_one_process(tmp_path):
    """In both trainers, the gradients of each step: those of the whole batch, and the pull once."""
    alone, plain = (run(Regression(), *dampened(strength), steps=4).seen for strength in (2.0, 0.0))
    of_hf = hf(tmp_path / "one", QATTrainerCallback(grouped(32), dampening=4.0), 1e-3)
    ranks.run(TOGETHER.format(directory=str(tmp_path)), tmp_path / "ranks")
    for rank in (0, 1):
        of_lightning, of_transformers = torch.load(tmp_path / f"{rank}.pt")
        for found, expected in ((of_lightning, alone), (of_transformers, of_hf)):
            assert len(found) == len(expected)
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-7, rtol=1e-5)
    changed = [step["first.weight"] - other["first.weight"] for step, other in zip(alone, plain, strict=True)]
    assert changed[0].count_nonzero() == 0  # it rises from 0
    assert min(change.abs().max() for change in changed[1:]) > 1e-4


DEEPSPEED = """
import deepspeed
import torch
from test_oscillation import *
from test_trainer_callback import PARTITIONED

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ here; gloo alone does it
torch.distributed.init_process_group("gloo")
for stage in (1, 2):
    callback, zero = QATTrainerCallback(grouped(32), dampening=4.0), {{"stage": stage}}
    try:
        hf(Path({directory!r}), callback, 0.0, deepspeed=PARTITIONED | {{"zero_optimization": zero}})
    except ValueError as error:
        print("refused:", error)
"""


def test_deepspeed_is_refused_before_the_first_step(tmp_path):
    pytest.importorskip("deepspeed")
    script = DEEPSPEED.format(directory=str(tmp_path))
    for output in ranks.run(script, tmp_path / "ranks", DS_ACCELERATOR="cpu"):
        refused = [line for line in output.splitlines() if line.startswith("refused:")]
        assert len(refused) == 2
        assert all("dampening: the trainer runs DeepSpeed" in line for line in refused)


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [QATCallback, QATTrainerCallback])
@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_that_is_none_is_refused(make, strength):
    with pytest.raises(ValueError, match=r"dampening=.*0 or more"):
        make("W4A16", dampening=strength)


def test_gradients_that_another_library_keeps_are_missed():
    model = prepared(TinyMlp(dtype=torch.float32), "W4A16")
    flat = nn.Parameter(torch.cat([one.detach().flatten() for one in model.parameters()]))  # as its optimizers have it
    with pytest.raises(ValueError, match=r"no quantized weight has a gradient.*DeepSpeed"):
        oscillation.dampen(model, 1.0, [flat])


def test_frozen_weights_are_missed():
    model = prepared(TinyMlp(dtype=torch.float32), "W4A16")
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    with pytest.raises(ValueError, match=r"frozen weights have none"):
        oscillation.dampen(model, 1.0, [*model.parameters(), other])


@pytest.mark.parametrize("first", ["spikes", "dampening"])
def test_a_step_that_the_spike_callback_holds_back_is_not_dampened(first):
    """Whichever callback comes first: the weights stay as they were, and training goes on."""
    callbacks = [LossSpikeCallback("skip"), QATCallback("W4A16", dampening=1.0, log_every_n_steps=0)]
    module = Regression()
    module.on_after_backward = lambda: [one.grad.fill_(torch.nan) for one in module.parameters()] and None
    before = [one.clone() for one in module.parameters()]
    with pytest.warns(UserWarning, match="not taken"):
        run(module, *(callbacks if first == "spikes" else callbacks[::-1]), steps=2)
    assert callbacks[0].count == 2
    assert all(map(torch.equal, before, module.parameters()))


def test_a_run_without_an_end_is_refused():
    with pytest.raises(ValueError, match=r"dampening rises over the run.*max_steps or max_epochs"):
        run(Regression(), QATCallback("W4A16", dampening=1.0), steps=-1, max_epochs=-1)


def test_fp16_whose_gradients_stay_scaled_is_refused(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_grad_norm=0.0, report_to="none")
    args.fp16 = True  # torch's scaler needs a GPU in accelerate
    model = small_llama()
    trainer = HFTrainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    callback = QATTrainerCallback(grouped(32), dampening=1.0)
    with pytest.raises(ValueError, match="dampening with fp16 and max_grad_norm=0"):
        callback.on_train_begin(
            args, trainer.state, trainer.control, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0)
        )


def test_adapters_are_refused_by_name():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], r=4))
    lockstep.prepare(model, "W4A16")
    with pytest.raises(ValueError, match=r"q_proj.* trains an adapter, not its weight"):
        oscillation.check_dampening(model)


# Sharded -----------------------------------------------------------------------------------------------------------

SHARDED = """
import torch
import torch.distributed as dist
from models import TinyMlp, channel, grouped, prepared
from torch.distributed.fsdp import fully_shard
from lockstep.qat import oscillation

dist.init_process_group("gloo")
for scheme, learned in ((channel(), False), (grouped(32), True)):
    found = []
    for sharded in (False, True):
        model = prepared(TinyMlp(dtype=torch.float32), scheme, learned_scales=learned)
        if sharded:
            for layer in (model.first, model.second):
                fully_shard(layer)
            fully_shard(model)
        torch.manual_seed(0)
        model(torch.randn(4, 128)).square().mean().backward()
        oscillation.dampen(model, 2.0, list(model.parameters()))
        grads = [one.grad for one in model.parameters()]
        found.append([one.full_tensor() if sharded else one for one in grads])
    for one, whole in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(one, whole, atol=1e-7, rtol=1e-6)
for scheme in ("FP8_BLOCK", "NVFP4A16"):
    model = prepared(TinyMlp(dtype=torch.float32), scheme)
    fully_shard(model)
    model(torch.randn(4, 128)).square().mean().backward()
    try:
        oscillation.dampen(model, 2.0, list(model.parameters()))
    except ValueError as error:
        print(str(error))
dist.destroy_process_group()
"""


def test_shards_of_fully_shard_are_dampened_as_the_whole_and_scales_across_ranks_refused(tmp_path):
    for output in ranks.run(SHARDED, tmp_path):
        lines = [line for line in output.splitlines() if "its weight is cut" in line]
        assert len(lines) == 2
        assert all(line.startswith("first: ") for line in lines)
