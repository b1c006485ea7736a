"""Loss spikes: which steps are judged to be some, and that each remedy does what it says to weights, rates and scales.

The oracles are training loops in plain torch, torch's own total norm, and what the Hugging Face trainer logs itself.
"""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from models import VOCAB, TinyMlp, grouped, tiny_llama
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer as HFTrainer
from transformers import TrainingArguments

import lockstep
from lockstep.callbacks import LossSpikeCallback, LossSpikeError, LossSpikeTrainerCallback
from lockstep.callbacks.spikes import SCALES
from lockstep.qat import spikes
from lockstep.qat.spikes import NormHistogram, SpikeDetector, clipping_advice, squared_norms

pytestmark = pytest.mark.filterwarnings("ignore:.*(pin_memory|use_cpu|num_workers|GPU available|lr_scheduler).*")
QUICK = {"window": 4, "threshold": 8.0}  # judges from the third step on


def test_a_model_that_does_not_train_is_refused():
    model = TinyMlp().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of TinyMlp trains"):
        LossSpikeCallback("skip")._begin(model, torch.optim.SGD([nn.Parameter(torch.ones(1))]))


# Which steps are spikes -----------------------------------------------------------------------------------------------


def judged(detector: SpikeDetector, losses: list[float], norms: list[float]) -> list[int]:
    """The steps that are spikes; the others enter the window."""
    found = []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if detector.judge(loss, norm):
            found.append(step)
        else:
            detector.accept(loss, norm)
    return found


def ordinary(seed: int, steps: int = 400) -> tuple[list[float], list[float]]:
    """A loss that falls from 6 to 2 nats, and norms that fall and rise with the warm-up, with ordinary noise."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(steps)
    loss = 2 + 4 * torch.exp(-time / 60) + 0.1 * torch.randn(steps, generator=generator)
    norm = (1 + 2 * torch.exp(-time / 10)) * torch.exp(0.25 * torch.randn(steps, generator=generator))
    return loss.tolist(), norm.tolist()


@given(st.integers(0, 2**31))
def test_an_ordinary_run_has_no_spike(seed):
    assert judged(SpikeDetector(50, 8.0), *ordinary(seed)) == []


@given(st.integers(0, 2**31), st.integers(60, 399), st.sampled_from(["loss", "norm"]))
def test_a_planted_spike_is_the_only_one_found(seed, step, what):
    losses, norms = ordinary(seed)
    if what == "loss":
        losses[step] += 10
    else:
        norms[step] *= 1000
    assert judged(SpikeDetector(50, 8.0), losses, norms) == [step]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_spike_from_the_first_step_on(bad):
    assert SpikeDetector(50, 8.0).judge(bad, 1.0).startswith(f"loss {bad}")
    assert SpikeDetector(50, 8.0).judge(1.0, abs(bad)).startswith(f"gradient norm {abs(bad)}")
    assert SpikeDetector(50, 8.0).judge(None, 1.0) == ""


def test_a_flat_curve_makes_neither_noise_nor_a_fall_a_spike():
    detector = SpikeDetector(50, 8.0)
    assert judged(detector, [2.0] * 50, [1.0] * 50) == []
    assert detector.judge(2.1, 1.5) == ""
    assert detector.judge(0.01, 1e-6) == ""
    assert "loss 2.5 (median 2, limit 2.16)" in detector.judge(2.5, 1.0)
    zero = SpikeDetector(50, 8.0)  # as a policy's loss is
    assert judged(zero, [1e-9 * (-1) ** step for step in range(100)], [1e-3] * 100) == []


def test_spikes_do_not_move_what_later_ones_are_compared_with():
    losses, norms = ordinary(0)
    for step in range(100, 150):
        losses[step] += 8
    assert judged(SpikeDetector(50, 8.0), losses, norms) == list(range(100, 150))


def test_a_window_that_went_through_json_judges_alike():
    losses, norms = ordinary(1)
    first, second = SpikeDetector(50, 8.0), SpikeDetector(50, 8.0)
    judged(first, losses[:70], norms[:70])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for loss in (2.5, 3.0, 3.5, 4.0):
        assert first.judge(loss, 1.0) == second.judge(loss, 1.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"remedy": "stop"}, "choose None, 'skip', 'lower_rate', 'restore_scales'"),
        ({"window": 3}, "window=3"),
        ({"threshold": 0}, "threshold=0"),
        ({"rate_factor": 1.0}, "rate_factor=1.0"),
        ({"rate_steps": 0}, "rate_steps=0"),
        ({"patience": 0}, "patience=0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, said):
    for kind in (LossSpikeCallback, LossSpikeTrainerCallback):
        with pytest.raises(ValueError, match=said.replace("[", r"\[")):
            kind(**arguments)


# Norms ----------------------------------------------------------------------------------------------------------------


def test_norms_are_torchs_and_name_the_layers():
    model = TinyMlp(dtype=torch.float32)
    model(torch.randn(4, 128)).sum().backward()
    model.norm.weight.grad = None
    names, parameters = zip(*model.named_parameters(), strict=True)
    squares = squared_norms(parameters)
    whole = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    torch.testing.assert_close(squares.sum().sqrt(), whole)
    model.second.weight.grad[3, 4] = math.nan
    squares = squared_norms(parameters).tolist()
    assert spikes.worst_layers(names, squares) == "layers with non-finite gradients: second of 3"
    assert spikes.worst_layers(["a.weight", "a.bias", "b.weight"], [9.0, 16.0, 4.0]).endswith("a (5), b (2)")


SHARDED = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from models import TinyMlp
from lockstep.qat.spikes import squared_norms

dist.init_process_group("gloo")
cpu = torch.device("cpu")
x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))

def norm(wrap, sharded=False):
    model = wrap(TinyMlp(dtype=torch.float32))
    model(x).square().sum().backward()
    parts = squared_norms(list(model.parameters()), sharded)
    dist.all_reduce(parts)
    return parts.sum().sqrt().item()

plain = TinyMlp(dtype=torch.float32)
plain(x).square().sum().backward()
whole = torch.nn.utils.get_total_norm([one.grad for one in plain.parameters()]).item()
found = {
    "ddp": norm(DistributedDataParallel),
    "fsdp2": norm(lambda model: fully_shard(model) or model),
    "fsdp1": norm(lambda model: FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu), True),
}
for name, one in found.items():
    assert abs(one / whole - 1) < 1e-5, (name, one, whole)
print("ok")
"""


def test_norms_over_ranks_are_those_of_the_whole_model(tmp_path):
    assert [one.strip() for one in ranks.run(SHARDED, tmp_path)] == ["ok", "ok"]


def test_percentiles_of_the_histogram_are_those_of_the_norms():
    norms = torch.exp(torch.randn(2000, generator=torch.Generator().manual_seed(0))).tolist()
    histogram = NormHistogram()
    for norm in [*norms, 0.0, math.inf, math.nan]:
        histogram.add(norm)
    histogram = NormHistogram(json.loads(json.dumps(histogram.state())))
    for percent in (50, 95, 99, 100):
        exact = sorted(norms)[20 * percent - 1]
        assert histogram.percentile(percent) == pytest.approx(exact, rel=0.02)
    assert histogram.share_above(1.0) == pytest.approx(sum(norm > 1 for norm in norms) / 2000, abs=0.01)


def test_clipping_advice_follows_from_the_norms():
    histogram = NormHistogram()
    assert clipping_advice(histogram, 1.0, "clip") == ""
    for step in range(1000):
        histogram.add(2.0 if step < 980 else 9.0)
    assert "Nothing is clipped: clip=9" in clipping_advice(histogram, None, "clip")
    assert "Nothing is clipped" in clipping_advice(histogram, 0.0, "clip")
    assert "clip=1 clipped 100 % of them: it rescales most steps" in clipping_advice(histogram, 1.0, "clip")
    assert "clip=100 clipped 0 % of them: it lets through 49.7 times the median" in clipping_advice(
        histogram, 100.0, "clip"
    )
    assert clipping_advice(histogram, 4.0, "clip").endswith(
        "median 2.01, 95 % below 2.01, 99 % below 9.03, largest 9.03. clip=4 clipped 2 % of them."
    )


# In Lightning ---------------------------------------------------------------------------------------------------------


def batches(steps: int, bad: tuple[int, ...] = (), value: float = 1e3) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets, in which those of the `bad` ones are `value` times too large."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 8, generator=generator)
    found = []
    for step in range(steps):
        x = torch.randn(16, 8, generator=generator)
        found.append((x, (x @ teacher) * (value if step in bad else 1.0)))
    return found


class Regression(LightningModule):
    """Two layers, and a scheduler made by `schedule` of the optimizer."""

    def __init__(self, data: list[Any], schedule: Any = None, optimizer: Any = None, model: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.model = model or nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.data, self.schedule = data, schedule
        self.by_step = False  # or as the loader has it, which does not know where a resumed run stands
        self.make = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
        self.rates: list[float] = []

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.data[self.trainer.global_step] if self.by_step else batch
        return nn.functional.mse_loss(self.model(x).float(), y)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


def fit(module: LightningModule, *callbacks: Any, resume: str | None = None, **options: Any) -> Trainer:
    plain = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(callbacks=list(callbacks), **plain | quiet | options)
    trainer.fit(module, ckpt_path=resume)
    return trainer


def by_hand(module: Regression, held: tuple[int, ...] = (), factors: dict[int, float] | None = None) -> nn.Module:
    """The training loop as a book has it: some steps held back, or taken with a share of the rate."""
    model = copy.deepcopy(module.model)
    optimizer = module.make(model.parameters())
    schedule = module.schedule(optimizer) if module.schedule else None
    for step, (x, y) in enumerate(module.data):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        rate = optimizer.param_groups[0]["lr"]
        if step not in held:
            optimizer.param_groups[0]["lr"] = rate * (factors or {}).get(step, 1.0)
            optimizer.step()
            optimizer.param_groups[0]["lr"] = rate
        if schedule:
            schedule.step()
    return model


def assert_same(one: nn.Module, other: nn.Module) -> None:
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


SCHEDULES = {
    "none": None,
    "closed form": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30),
    "exponential": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 40),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_skipped_step_leaves_weights_and_moments(schedule):
    module = Regression(batches(16, bad=(7, 8)), SCHEDULES[schedule])
    expected = by_hand(module, held=(7, 8))
    callback = LossSpikeCallback("skip", **QUICK)
    with pytest.warns(UserWarning, match=r"step 7: loss .* and gradient norm .*; largest gradient norms: model\.2"):
        trainer = fit(module, callback)
    assert_same(module.model, expected)
    assert callback.count == 2
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {14}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_lowered_rate_ends_on_the_schedule(schedule):
    module = Regression(batches(20, bad=(7, 9)), SCHEDULES[schedule])
    expected = by_hand(module, factors=dict.fromkeys(range(7, 13), 0.25))
    plain = Regression(batches(20), SCHEDULES[schedule])
    fit(plain)
    # Momentum carries the bad gradients on, and with them higher losses: of no interest here.
    with pytest.warns(UserWarning, match=r"step 9: .*The learning rate is 0.25 of the schedule's for 4 steps"):
        fit(module, LossSpikeCallback("lower_rate", window=8, threshold=1e3, rate_factor=0.25, rate_steps=4))
    assert_same(module.model, expected)
    assert module.rates == plain.rates


def test_without_a_remedy_the_run_is_as_without_the_callback(tmp_path):
    plain, watched = (Regression(batches(16, bad=(7,))) for _ in range(2))
    fit(plain, gradient_clip_val=1.0)
    callback = LossSpikeCallback(**QUICK)
    with pytest.warns(UserWarning, match=r"step 7: .*The step is taken: remedy=None"):
        fit(watched, callback, gradient_clip_val=1.0, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert_same(plain.model, watched.model)
    assert callback.count == 1
    (logged,) = [line for line in next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[1:] if line]
    assert "1.0" in logged.split(",")


@pytest.mark.parametrize("remedy", ["skip", "lower_rate"])
def test_a_step_with_nan_is_never_taken_by_a_remedy(remedy):
    data = batches(10)
    data[0][1][3] = math.nan
    data[6][1][3] = math.nan
    module = Regression(data)
    expected = by_hand(module, held=(0, 6))
    with pytest.warns(UserWarning, match=r"step 0: loss nan and gradient norm nan; .*model\.0, model\.2 of 2"):
        fit(module, LossSpikeCallback(remedy, window=50))
    assert_same(module.model, expected)


def test_the_layer_whose_gradient_is_not_finite_is_named():
    module = Regression(batches(6))
    calls = iter(range(6))
    module.model[0].weight.register_hook(lambda grad: grad * (math.inf if next(calls) == 4 else 1))
    with pytest.warns(
        UserWarning, match=r"step 4: gradient norm (inf|nan); layers with non-finite gradients: model.0 of 2"
    ):
        fit(module, LossSpikeCallback("skip"))
    assert all(one.isfinite().all() for one in module.parameters())


def test_micro_batches_make_one_step_and_one_loss():
    """The second of three is bad; the last step of the epoch has two of them only."""
    data = batches(17, bad=(10,))
    module = Regression(data)
    model, seen = copy.deepcopy(module.model), []
    optimizer = module.make(model.parameters())
    for start in range(0, 17, 3):
        parts = data[start : start + 3]
        losses = [nn.functional.mse_loss(model(x), y) for x, y in parts]
        seen.append(sum(loss.item() for loss in losses) / len(parts))
        optimizer.zero_grad()
        for loss in losses:
            (loss / 3).backward()
        if start != 9:
            optimizer.step()
    callback = LossSpikeCallback("skip", window=6, threshold=20)
    with pytest.warns(UserWarning, match=re.escape(f"step 3: loss {seen[3]:.4g} ")):
        fit(module, callback, accumulate_grad_batches=3)
    assert callback.detector.state_dict()["losses"] == pytest.approx(
        [one for step, one in enumerate(seen) if step != 3]
    )
    assert_same(module.model, model)


def half(scale: float = 2.0**10) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_holds_back_too(precision):
    def run(data: list[Any], *callbacks: Any) -> Regression:
        module = Regression(data)
        plugins = {"plugins": half()} if precision == "16-mixed" else {"precision": precision}
        fit(module, *callbacks, gradient_clip_val=1.0, **plugins)
        return module

    data = batches(12, bad=(8,), value=50.0)
    callback = LossSpikeCallback("skip", **QUICK)
    with pytest.warns(UserWarning, match=r"step 8: loss"):
        held = run(data, callback)
    assert callback.count == 1
    assert_same(held.model, run(data[:8] + data[9:]).model)
    # The scaled loss is not what is judged.
    assert max(callback.detector.losses) < 100


def test_overflow_is_the_scalers_until_its_scale_is_one():
    module, callback = Regression(batches(8)), LossSpikeCallback("skip", patience=3)
    plugin = half(2.0**20)
    fit(module, callback, plugins=plugin)
    assert callback.count == 0
    assert plugin.scaler.get_scale() < 2.0**17
    module = Regression(batches(8))
    module.model[0].weight.register_hook(lambda grad: grad * math.inf)
    with (
        pytest.warns(UserWarning, match="not taken"),
        pytest.raises(LossSpikeError, match=r"model\.0 of 2.*remedy='skip', patience=3"),
    ):
        fit(module, LossSpikeCallback("skip", patience=3), plugins=half(4.0))


def test_a_remedy_that_does_not_help_ends_the_run():
    module = Regression(batches(30, bad=tuple(range(10, 30))))
    said = r"step 14: .*5 steps without a good one.*data from step 10 on"
    with pytest.warns(UserWarning, match="not taken"), pytest.raises(LossSpikeError, match=said):
        fit(module, LossSpikeCallback("skip", patience=5, **QUICK))
    # Whoever fits again after it has an optimizer without hooks, and rates that are the schedule's.
    assert not module.trainer.optimizers[0]._optimizer_step_post_hooks


def test_steps_that_are_taken_become_the_new_level():
    data = batches(40, bad=tuple(range(10, 40)), value=30.0)
    callback = LossSpikeCallback(patience=4, window=8)
    module = Regression(data, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-6))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(module, callback)
    ours = [str(one.message) for one in said if str(one.message).startswith("step ")]
    assert callback.count == len(ours) == 4
    assert "After 4 in a row this is the new level" in ours[-1]


def test_nan_without_a_remedy_does_not_flood():
    data = [(x, y * math.nan) for x, y in batches(12)]
    callback = LossSpikeCallback(patience=3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(Regression(data), callback)
    ours = [str(one.message) for one in said if str(one.message).startswith("step ")]
    assert callback.count == 12
    assert len(ours) == 3
    assert ours[-1].endswith("No more warnings until a step is none.")


@pytest.mark.parametrize("remedy", ["skip", "lower_rate"])
def test_a_resumed_run_is_the_unbroken_one(remedy, tmp_path):
    """The checkpoint is written after the first spike, while the rate is lowered."""

    def module() -> Regression:
        made = Regression(batches(20, bad=(7, 12)), SCHEDULES["cosine"])
        made.by_step = True
        return made

    def callback() -> LossSpikeCallback:
        return LossSpikeCallback(remedy, rate_steps=6, **QUICK)

    whole, first = module(), callback()
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=9, save_top_k=-1)
    with pytest.warns(UserWarning, match="step 12"):
        fit(whole, first, saving, enable_checkpointing=True, max_steps=20)
    resumed, second = module(), callback()
    with pytest.warns(UserWarning, match="step 12"):
        fit(resumed, second, resume=str(tmp_path / "step=9.ckpt"), max_steps=20)
    assert_same(whole.model, resumed.model)
    assert second.state_dict() == first.state_dict()


def test_the_fit_ends_with_advice_on_clipping(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):  # which a recipe's test may have quietened
        fit(Regression(batches(10)), LossSpikeCallback(), gradient_clip_val=1e-4)
    assert "gradient norms of 10 steps without spikes: median" in caplog.text
    assert "gradient_clip_val=0.0001 clipped 100 % of them" in caplog.text


def test_what_takes_its_steps_itself_is_refused_by_name():
    manual = Regression(batches(2))
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="Regression sets automatic_optimization=False"):
        fit(manual, LossSpikeCallback())
    trainer = SimpleNamespace(strategy=DeepSpeedStrategy.__new__(DeepSpeedStrategy))
    with pytest.raises(ValueError, match="DeepSpeed, whose engine keeps the gradients"):
        LossSpikeCallback().on_fit_start(trainer, Regression(batches(2)))
    with pytest.raises(ValueError, match="LBFGS takes several gradients"):
        fit(Regression(batches(2), optimizer=torch.optim.LBFGS), LossSpikeCallback())
    fused = Regression(batches(2), optimizer=lambda parameters: torch.optim.AdamW(parameters, fused=True))
    with pytest.raises(ValueError, match="AdamW with fused=True"):
        fit(fused, LossSpikeCallback(), plugins=half())
    with pytest.raises(ValueError, match=r"trains no learned scales.*learned_scales=True"):
        fit(Regression(batches(2)), LossSpikeCallback("restore_scales"))


# Learned scales -------------------------------------------------------------------------------------------------------


class Scaled(LightningModule):
    """A prepared model with learned scales whose targets are too large in the `bad` steps."""

    def __init__(self, bad: tuple[int, ...], steps: int = 12) -> None:
        super().__init__()
        self.model = TinyMlp(dtype=torch.float32)
        lockstep.prepare(self.model, grouped(64), learned_scales=True)
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(8, 128, generator=generator) for _ in range(steps)]
        self.data = [(x, x.sin() * (1e3 if step in bad else 1.0)) for step, x in enumerate(inputs)]
        self.seen: list[dict[str, Tensor]] = []
        self.by_step = True

    train_dataloader = Regression.train_dataloader
    training_step = Regression.training_step

    def scales(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {name: one.detach().clone() for name, one in named if name.endswith("weight_scale")}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.scales())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_scales_and_their_moments_are_those_of_the_last_good_step():
    module, seen = Scaled(bad=(8,)), {}
    moments = {}

    class Watch(LossSpikeCallback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            state = trainer.optimizers[0].state
            scale, weight = pl_module.model.first._parameters["weight_scale"], pl_module.model.first.weight
            moments[batch_idx] = {key: value.clone() for key, value in state[scale].items()} if scale in state else {}
            seen[batch_idx] = weight.detach().clone()

    with pytest.warns(
        UserWarning, match=r"step 8: .*not taken, the scales of 2 layers are those of the last good step"
    ):
        fit(module, Watch("restore_scales", **QUICK))
    for name, one in module.seen[9].items():
        assert torch.equal(one, module.seen[7][name])
        assert not torch.equal(module.seen[8][name], module.seen[7][name])
    assert moments[9].keys() == moments[7].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(moments[9][key], moments[7][key]) for key in moments[7])
    assert torch.equal(seen[9], seen[8])  # the weights stay
    assert not torch.equal(seen[10], seen[9])  # and go on


def test_scales_that_cross_zero_are_a_spike_that_no_loss_needs_to_show():
    module = Scaled(bad=())
    take = module.on_train_batch_start

    def spoil(batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            with torch.no_grad():
                module.model.second._parameters["weight_scale"][3, 1] *= -1
        take(batch, batch_idx)

    module.on_train_batch_start = spoil
    with pytest.warns(UserWarning, match=r"step 5: .*negative scales in 1 of 2 layers, the first is model\.second"):
        fit(module, LossSpikeCallback("restore_scales", window=50))
    assert all((one > 0).all() for one in module.scales().values())
    assert all(torch.equal(module.seen[6][name], one) for name, one in module.seen[4].items())


def test_after_a_restore_the_scales_alone_move_more_slowly_and_a_bad_last_step_is_undone():
    """The scales' rate is their own size: every step of Adam at it takes some below zero."""

    class Fast(Scaled):
        def configure_optimizers(self) -> Any:
            named = dict(self.named_parameters())
            scales = [one for name, one in named.items() if name.endswith("weight_scale")]
            others = [one for name, one in named.items() if not name.endswith("weight_scale")]
            size = torch.cat([one.detach().flatten() for one in scales]).mean().item()
            return torch.optim.Adam([{"params": others}, {"params": scales, "lr": 2 * size}], lr=1e-3)

    class Rates(LossSpikeCallback):
        def _lower(self, optimizer: Any) -> None:
            super()._lower(optimizer)
            used.append([group["lr"] for group in optimizer.param_groups])

    used: list[list[float]] = []
    module, plain = Fast(bad=(), steps=6), Fast(bad=(), steps=6)
    fit(plain)
    assert any((one < 0).any() for one in plain.scales().values())
    with pytest.warns(UserWarning, match="the last step: negative scales in 2 of 2 layers"):
        fit(module, Rates("restore_scales", rate_factor=1e-3, rate_steps=3))
    assert all((one > 0).all() for one in module.scales().values())
    weights, scales = zip(*used, strict=True)  # steps 0, 2, 3, 4 and 5: step 1 is held back
    assert set(weights) == {1e-3}
    assert [rate / scales[0] for rate in scales] == pytest.approx([1, 1e-3, 1e-3, 1e-3, 1])


def test_restored_scales_survive_a_resume(tmp_path):
    """The step after the checkpoint is a spike: what it restores is in the checkpoint."""
    whole = Scaled(bad=(8,))
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)
    with pytest.warns(UserWarning, match="step 8"):
        fit(whole, LossSpikeCallback("restore_scales", **QUICK), saving, enable_checkpointing=True, max_steps=12)
    resumed = Scaled(bad=(8,))
    with pytest.warns(UserWarning, match="step 8"):
        fit(resumed, LossSpikeCallback("restore_scales", **QUICK), resume=str(tmp_path / "step=8.ckpt"), max_steps=12)
    assert_same(whole.model, resumed.model)


# Several processes ----------------------------------------------------------------------------------------------------

LIGHTNING_DDP = """
import json, math, os, warnings
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
import test_spikes as tests
from lockstep.callbacks import LossSpikeCallback

torch.set_num_threads(1)
rank = int(os.environ["RANK"])

def run(remedy, value):
    # Each rank sees every other batch; the bad one is rank one's alone.
    module = tests.Regression(tests.batches(24, bad=(15,), value=value))
    module.train_dataloader = lambda: DataLoader(
        module.data, batch_size=None, sampler=DistributedSampler(module.data, shuffle=False)
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        callback = LossSpikeCallback(remedy, **tests.QUICK)
        trainer = tests.fit(module, callback, strategy="ddp", devices=2, use_distributed_sampler=False)
    ours = [str(one.message) for one in said if str(one.message).startswith("step ")]
    steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    weights = [one.sum().item() for one in module.parameters()]
    return [callback.count, sorted(steps), weights, ours, list(callback.detector.losses)]

print(json.dumps([run("skip", 1e3), run("skip", math.nan), run("lower_rate", 1e3)]))
"""


def test_ranks_hold_back_together_what_one_of_them_has_seen(tmp_path):
    ours, theirs = (json.loads(out.strip().splitlines()[-1]) for out in ranks.run(LIGHTNING_DDP, tmp_path))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[:3] + mine[4:] == other[:3] + other[4:]
        assert all(map(math.isfinite, mine[2]))
        assert mine[3][0].startswith("step 7: loss ")
        assert other[3] == []  # rank zero speaks
    assert [one[0] for one in ours[:2]] == [1, 1]
    assert [one[1] for one in ours] == [[11], [11], [12]]


HF_DDP = """
import json, os, warnings
import torch
import test_spikes as tests
from lockstep.callbacks import LossSpikeTrainerCallback

torch.set_num_threads(1)
folder = os.environ["DIRECTORY"]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    callback = LossSpikeTrainerCallback("skip", **tests.QUICK)
    trainer, seen = tests.train(folder, callback, steps=8, bad=(5,), ddp_backend="gloo")
weights = [one.sum().item() for one in trainer.model.parameters()]
logged = [[one["loss"], one["grad_norm"]] for one in trainer.state.log_history if "grad_norm" in one]
print(json.dumps([callback.count, weights, seen, logged]))
"""


def test_the_hugging_face_trainer_over_two_ranks(tmp_path):
    """The norms are those of the reduced gradients, and the losses those of both ranks, as the trainer logs them."""
    outputs = ranks.run(HF_DDP, tmp_path / "ranks", DIRECTORY=str(tmp_path))
    ours, theirs = (json.loads(output.strip().splitlines()[-1]) for output in outputs)
    assert ours[0] == theirs[0] == 1
    assert ours[1:3] == theirs[1:3]
    for step, ((loss, norm), (logged_loss, logged_norm)) in enumerate(zip(ours[2], ours[3], strict=True)):
        assert norm == pytest.approx(logged_norm, rel=1e-4)
        assert loss == pytest.approx(logged_loss / (100 if step == 5 else 1), rel=1e-4)


# In the Hugging Face trainer ------------------------------------------------------------------------------------------


def llama() -> Any:
    return tiny_llama(torch.float32, num_hidden_layers=1, hidden_size=64, intermediate_size=64).train()


class Bad(HFTrainer):
    """In the `bad` optimizer steps the loss is `value` times too large, outside of the model."""

    bad: tuple[int, ...] = ()
    value = 100.0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * self.value if self.state.global_step in self.bad else loss


def rows(count: int = 64) -> list[dict[str, Tensor]]:
    ids = torch.randint(VOCAB, (count, 8), generator=torch.Generator().manual_seed(1))
    # Padded rows of different lengths: the losses of micro-batches weigh differently.
    return [{"input_ids": row, "labels": row.where(torch.arange(8) < 4 + n % 5, -100)} for n, row in enumerate(ids)]


def train(
    folder: Any,
    callback: LossSpikeTrainerCallback,
    steps: int = 8,
    bad: tuple[int, ...] = (),
    value: float = 100.0,
    kind: type[Bad] = Bad,
    model: Any = None,
    resume: str | None = None,
    **options: Any,
) -> tuple[Bad, list[list[float]]]:
    """A run, and the loss and the norm of each step as the callback judged them."""
    plain: dict[str, Any] = {
        "use_cpu": True,
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
    }
    made = {"optimizers": options.pop("optimizers")} if "optimizers" in options else {}
    args = TrainingArguments(str(folder), **plain | options)
    trainer = kind(model=model or llama(), args=args, train_dataset=rows(), callbacks=[callback], **made)
    trainer.bad, trainer.value = bad, value
    seen: list[list[float]] = []
    judge = callback.detector.judge
    callback.detector.judge = lambda loss, norm: seen.append([loss, norm]) or judge(loss, norm)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"max_grad_norm": 1e-3}])
def test_losses_and_norms_are_those_that_the_trainer_logs(options, tmp_path):
    trainer, seen = train(tmp_path, LossSpikeTrainerCallback(), steps=6, **options)
    logged = [one for one in trainer.state.log_history if "grad_norm" in one]
    assert len(logged) == len(seen) == 6
    for (loss, norm), one in zip(seen, logged, strict=True):
        assert loss == pytest.approx(one["loss"], rel=1e-4)
        assert norm == pytest.approx(one["grad_norm"], rel=1e-4)


def test_the_trainer_does_not_take_a_skipped_step_and_logs_it(tmp_path):
    """With the loss outside of what the model returns, the norm tells."""
    callback = LossSpikeTrainerCallback("skip", **QUICK)
    with pytest.warns(UserWarning, match=r"step 5: gradient norm .*; largest gradient norms: .*The step is not taken"):
        trainer, _ = train(tmp_path, callback, bad=(5,))
    assert callback.count == 1
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {7}
    (logged,) = [one for one in trainer.state.log_history if "spike/count" in one]
    assert (logged["step"], logged["spike/count"], logged["spike/rate_factor"]) == (6, 1.0, 0.0)
    rates = [one["learning_rate"] for one in trainer.state.log_history if "learning_rate" in one]
    assert rates == pytest.approx([1e-3 * (8 - step) / 8 for step in range(8)])
    assert not trainer.model._forward_hooks


def test_the_trainers_rates_end_on_the_schedule(tmp_path):
    callback = LossSpikeTrainerCallback("lower_rate", rate_steps=2, rate_factor=0.5, **QUICK)
    sgd = {"optim": "sgd", "max_grad_norm": 0.0}
    steps: list[Tensor] = []

    class Watch(Bad):
        def _get_learning_rate(self) -> float:  # just after the step
            steps.append(self.model.lm_head.weight.detach().clone())
            return super()._get_learning_rate()

    with pytest.warns(UserWarning, match=r"step 5: gradient norm"):
        lowered, _ = train(tmp_path, callback, bad=(5,), value=50.0, kind=Watch, **sgd)
    after, steps = steps[:], []
    plain, _ = train(
        tmp_path, LossSpikeTrainerCallback(None, **QUICK | {"threshold": 1e9}), bad=(5,), value=50.0, kind=Watch, **sgd
    )
    assert all(map(torch.equal, after[:5], steps[:5]))
    torch.testing.assert_close(after[5] - after[4], 0.5 * (steps[5] - steps[4]), rtol=1e-3, atol=1e-8)
    rates = [
        [one["learning_rate"] for one in run.state.log_history if "learning_rate" in one] for run in (lowered, plain)
    ]
    assert rates[0] == rates[1]


def test_a_layer_with_nan_is_named_although_clipping_spreads_it(tmp_path):
    model = llama()
    calls = iter(range(8))
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.register_hook(lambda grad: grad * (math.nan if next(calls) == 3 else 1))
    said = r"step 3: gradient norm nan; layers with non-finite gradients: model\.layers\.0\.mlp\.up_proj of \d+"
    with pytest.warns(UserWarning, match=said):
        train(tmp_path, LossSpikeTrainerCallback("skip"), model=model)
    assert all(one.isfinite().all() for one in model.parameters())


def test_a_loss_that_the_model_does_not_return_is_told_or_noted(tmp_path):
    class Outside(Bad):
        noting: Any = None

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            loss = loss * (100 if self.state.global_step == 5 else 1)
            if self.noting:
                self.noting(loss)
            return loss

    callback = LossSpikeTrainerCallback("skip", **QUICK)
    with pytest.warns(UserWarning, match="no loss") as said:
        _, seen = train(tmp_path, callback, kind=Outside)
    texts = [str(one.message) for one in said]
    assert sum("the model returns no loss: gradient norms alone are judged" in text for text in texts) == 1
    assert any("step 5: gradient norm" in text for text in texts)
    assert {loss for loss, _ in seen} == {None}

    callback = LossSpikeTrainerCallback("skip", **QUICK)
    Outside.noting = staticmethod(callback.note_loss)
    with pytest.warns(UserWarning, match=r"step 5: loss .* and gradient norm"):
        train(tmp_path, callback, kind=Outside)


def test_evaluations_and_their_losses_do_not_count(tmp_path):
    class Evaluating(Bad):
        def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
            super()._maybe_log_save_evaluate(*args, **kwargs)
            self.evaluate(rows(4))

    _, seen = train(tmp_path, LossSpikeTrainerCallback(), kind=Evaluating)
    _, plain = train(tmp_path, LossSpikeTrainerCallback())
    assert seen == plain


@pytest.mark.parametrize("remedy", ["skip", "lower_rate", "restore_scales"])
def test_a_resumed_trainer_run_is_the_unbroken_one(remedy, tmp_path):
    def run(folder: Path, resume: str | None = None) -> tuple[Bad, LossSpikeTrainerCallback]:
        model = llama()
        lockstep.prepare(model, grouped(64), learned_scales=remedy == "restore_scales")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        callback = LossSpikeTrainerCallback(remedy, rate_steps=6, **QUICK)
        options = {"save_strategy": "steps", "save_steps": 6, "optimizers": (optimizer, None)}
        return train(folder, callback, 9, bad=(4, 6), model=model, resume=resume, **options)[0], callback

    with pytest.warns(UserWarning, match="step 6"):
        whole, first = run(tmp_path)
    with pytest.warns(UserWarning, match="step 6"):
        resumed, second = run(tmp_path, str(tmp_path / "checkpoint-6"))
    assert_same(whole.model, resumed.model)
    assert second._numbers() == first._numbers()
    assert (tmp_path / "checkpoint-6" / SCALES).exists() == (remedy == "restore_scales")
    if remedy == "restore_scales":
        (tmp_path / "checkpoint-6" / SCALES).unlink()
        with pytest.raises(ValueError, match=r"lockstep_scales\.pt is missing"):
            run(tmp_path, str(tmp_path / "checkpoint-6"))


def test_deepspeed_under_the_trainer_is_refused_by_name():
    optimizer = SimpleNamespace(accelerator_state=SimpleNamespace(distributed_type="DEEPSPEED"))
    with pytest.raises(ValueError, match="runs DeepSpeed, whose engine keeps the gradients"):
        LossSpikeTrainerCallback().on_train_begin(None, None, None, model=llama(), optimizer=optimizer)
