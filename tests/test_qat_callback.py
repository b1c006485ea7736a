"""`QATCallback` in real Lightning trainers: when it switches the layers, what it logs, and what it exports."""

from __future__ import annotations

import contextlib
import csv
import inspect
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lockstep
from lockstep import Rule, Scheme, grid
from lockstep.callbacks import QATCallback
from lockstep.callbacks.qat import served_model
from lockstep.export import Checkpoint, ExportError
from lockstep.qat import QATLinear

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*not resumable.*",
    "ignore:.*exists and is not empty.*",
    "ignore:.*no `val_dataloader`.*",
    "ignore:.*LeafSpec",
    "ignore:.*smaller than the logging interval.*",
    "ignore:.*ModelCheckpoint.*",
)

LAYERS = ("up", "down")
BATCHES = 8  # in an epoch


# A model, and runs of it -------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """Two layers, one of several groups a row and one of a single group; the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(up=nn.Linear(256, 128), act=nn.GELU(), down=nn.Linear(128, 64)))


def samples(number: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets that follow from the batch's number alone, so that every run can be repeated."""
    generator = torch.Generator().manual_seed(number)
    x, y = (torch.randn(8, width, generator=generator, dtype=torch.float32) for width in (256, 64))
    return x, y


def loss_of(model: nn.Module, number: int, dtype: torch.dtype) -> Tensor:
    x, y = samples(number)
    return nn.functional.mse_loss(model(x.to(dtype)).float(), y)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


class Regression(LightningModule):
    """Fits `network`. Remembers, batch by batch, the losses and the classes of its layers."""

    def __init__(self, build: str = "__init__") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.losses: list[float] = []
        self.seen: list[tuple[str, str]] = []
        self._build("__init__")

    def _build(self, hook: str) -> None:
        if self.hparams["build"] == hook and not hasattr(self, "model"):
            self.model = network()

    def setup(self, stage: str) -> None:
        self._build("setup")

    def configure_model(self) -> None:
        self._build("configure_model")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.note("configure_optimizers")
        return optimizer_of(self)

    def note(self, where: str) -> None:
        self.seen += [(where, type(layer).__name__) for layer in self.model.modules() if isinstance(layer, nn.Linear)]

    def loss(self, where: str, number: int) -> Tensor:
        self.note(where)
        return loss_of(self.model, number, self.dtype)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss("fit", self.current_epoch * BATCHES + batch_idx)
        self.losses.append(loss.item())
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.loss("validate", batch_idx))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test/loss", self.loss("test", batch_idx))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss("predict", batch_idx)

    def classes(self, where: str) -> list[str]:
        """Classes of the first layer, at each batch or call of `where`."""
        return [name for place, name in self.seen if place == where][:: len(LAYERS)]


class SetupFails(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        raise RuntimeError("no data")


def loader(batches: int = BATCHES) -> DataLoader:
    return DataLoader(range(batches))


class Numbers(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def trainer(*callbacks: Callback, steps: int = 4, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    defaults = {"accelerator": "cpu", "devices": 1, "max_steps": steps, "enable_checkpointing": saves}
    return Trainer(callbacks=list(callbacks), **quiet | defaults | options)


def fit(*callbacks: Callback, module: LightningModule | None = None, ckpt_path: Any = None, **options: Any) -> Any:
    """The LightningModule after a short run."""
    module = module or Regression()
    trainer(*callbacks, **options).fit(module, loader(), ckpt_path=ckpt_path)
    return module


def by_hand(steps: int, dtype: torch.dtype, autocast: bool, accumulate: int = 1) -> list[float]:
    """The losses of the same run in a loop of one's own, with `lockstep.prepare`."""
    model = network().to(dtype)
    lockstep.prepare(model, "W4A16")
    optimizer, losses = optimizer_of(model), []
    for number in range(steps * accumulate):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, number, dtype)
        losses.append(loss.item())
        (loss / accumulate).backward()
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def files(directory: Path) -> dict[str, bytes]:
    """All but the model card, which says what its folder is called."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "README.md"}


# When the layers are switched --------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", ["__init__", "setup", "configure_model"])
@pytest.mark.parametrize("where", ["fit", "validate", "test", "predict"])
def test_layers_are_quantized_wherever_the_model_is_built_and_whatever_is_run(build, where):
    """A model evaluated or trained in full precision by mistake gives numbers that are not those served."""
    module = Regression(build)
    getattr(trainer(QATCallback()), where)(module, loader())
    assert len(module.classes(where)) == (4 if where == "fit" else BATCHES)
    assert {name for _, name in module.seen} == {"QATLinear"}
    if where == "fit":
        assert module.seen[0] == ("configure_optimizers", "QATLinear")
    assert "configure_model" not in vars(module)


def test_a_datamodule_serves_as_well_as_dataloaders():
    module, run = Regression(), trainer(QATCallback(), num_sanity_val_steps=1, limit_val_batches=2, max_epochs=1)
    run.fit(module, datamodule=Numbers())
    run.validate(module, datamodule=Numbers())
    assert {name for _, name in module.seen} == {"QATLinear"}
    assert module.losses == fit(QATCallback()).losses


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("precision", "dtype", "autocast"),
    [
        ("32-true", torch.float32, False),
        ("bf16-mixed", torch.float32, True),
        ("bf16-true", torch.bfloat16, False),
    ],
)
def test_training_is_bitwise_what_prepare_gives_in_a_loop_of_ones_own(precision, dtype, autocast, accumulate):
    """The callback adds no arithmetic, and the training does see quantized weights."""
    options = {"precision": precision, "accumulate_grad_batches": accumulate}
    losses = fit(QATCallback(log_every_n_steps=1), **options).losses
    assert losses == by_hand(4, dtype, autocast, accumulate)
    plain = fit(**options).losses
    assert all(a != b for a, b in zip(losses, plain, strict=True))


def test_compute_in_a_dtype_that_is_not_served_is_refused_by_name():
    """fp16 training for a bf16 engine would round differently from what is served."""
    with pytest.raises(ValueError, match=r"up: the forward computes in torch.float16.*served in torch.bfloat16"):
        fit(QATCallback(), precision="16-true")


def test_nothing_is_converted_inside_fit(tmp_path):
    """After fit the module tests from memory and from any checkpoint, with the keys that it always had."""
    best = ModelCheckpoint(tmp_path, monitor="qat/sqnr_db/mean", mode="max", every_n_train_steps=1, save_top_k=1)
    run, module = trainer(QATCallback(log_every_n_steps=1), best, steps=6), Regression()
    before = list(module.state_dict())
    run.fit(module, loader())
    assert [type(module.model.up), type(module.model.down)] == [QATLinear, QATLinear]
    assert list(module.state_dict()) == before
    at_the_end = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    (now,) = run.test(module, loader(), verbose=False)
    for ckpt_path in ("best", best.best_model_path):
        (then,) = run.test(module, loader(), ckpt_path=ckpt_path, verbose=False)
        assert then != now
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, saved[key]) for key, tensor in module.state_dict().items())
    assert any(not torch.equal(tensor, saved[key]) for key, tensor in at_the_end.items())
    assert set(module.classes("test")) == {"QATLinear"}


def test_one_callback_and_one_module_may_be_fitted_twice():
    """Notebooks run a cell again."""
    callback, module = QATCallback(), Regression()
    fit(callback, module=module)
    fit(callback, module=module)
    assert set(module.classes("fit")) == {"QATLinear"}
    assert len(module.losses) == 8


def test_a_run_that_fails_in_setup_leaves_no_trace():
    """A plain run of the same module afterwards, in a notebook, would be quantized in silence."""
    module = Regression()
    with pytest.raises(RuntimeError, match="no data"):
        fit(QATCallback(), SetupFails(), module=module)
    fit(module=module)
    assert set(module.classes("fit")) == {"Linear"}


@pytest.mark.parametrize("start_step", [0, 2])
def test_a_compiled_child_trains_as_the_plain_one(tmp_path, start_step):
    """``torch.compile`` wraps the model: the wrapper is neither quantized nor exported, what it wraps is."""
    torch._dynamo.reset()
    module = Regression()
    module.model = torch.compile(module.model, backend="aot_eager")
    fit(QATCallback(start_step=start_step, export_dir=str(tmp_path / "compiled")), module=module)
    plain = fit(QATCallback(start_step=start_step, export_dir=str(tmp_path / "plain")))
    assert module.losses == plain.losses
    assert files(tmp_path / "compiled") == files(tmp_path / "plain")


# start_step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("start_step", [0, 1, 3])
def test_training_is_plain_before_start_step_and_quantized_from_it_on(start_step, accumulate):
    module = fit(QATCallback(start_step=start_step), accumulate_grad_batches=accumulate)
    plain = start_step * accumulate
    assert module.classes("fit") == ["Linear"] * plain + ["QATLinear"] * (4 * accumulate - plain)
    never = fit(accumulate_grad_batches=accumulate)
    assert module.losses[:plain] == never.losses[:plain]
    assert module.losses[plain] != never.losses[plain]


def test_validation_during_fit_runs_on_the_layers_as_they_train():
    """Before start_step the curve is the plain model's; afterwards, and in ``validate``, the quantized one's."""
    module, run = Regression(), trainer(QATCallback(start_step=2), val_check_interval=1, limit_val_batches=1)
    run.fit(module, loader(), loader())
    assert module.classes("validate") == ["Linear"] * 2 + ["QATLinear"] * 3  # the sanity check, then steps 1 to 4
    run.validate(module, loader(), verbose=False)
    assert module.classes("validate")[-1] == "QATLinear"


@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("steps", [2, 4])
def test_export_of_a_run_that_never_reached_start_step_is_an_error(tmp_path, steps, validates):
    """The checkpoint would hold a model that never trained quantized, whether or not it was validated so at the end."""
    run = trainer(QATCallback(start_step=4, export_dir=str(tmp_path / "out")), steps=steps, val_check_interval=1)
    with pytest.raises(ExportError, match=rf"step {steps}\b.*start_step\W+4"):
        run.fit(Regression(), loader(), loader() if validates else None)
    assert not list(tmp_path.iterdir())


# Checkpoints -------------------------------------------------------------------------------------------------------


def saver(directory: Path, step: int, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(directory, "saved", every_n_train_steps=step, save_top_k=1, monitor=None, **options)


def saved_at(directory: Path, step: int, *callbacks: Callback, **options: Any) -> Path:
    """A checkpoint at `step` of a run that ends there."""
    fit(*callbacks, saver(directory, step), steps=step, **options)
    return directory / "saved.ckpt"


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("start_step", [0, 2, 3, 5], ids=["from-0", "before", "at", "after"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, accumulate, start_step, precision):
    """Nothing that training depends on is lost in a checkpoint, on either side of start_step."""
    options = {"precision": precision, "accumulate_grad_batches": accumulate}
    whole = fit(QATCallback(start_step=start_step), steps=7, **options)
    path = saved_at(tmp_path, 3, QATCallback(start_step=start_step), **options)
    resumed = fit(QATCallback(start_step=start_step), steps=7, ckpt_path=path, **options)
    assert resumed.losses == whole.losses[3 * accumulate :]
    assert resumed.classes("fit") == whole.classes("fit")[3 * accumulate :]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_sanity_check_of_a_resumed_run_validates_quantized(tmp_path):
    path = saved_at(tmp_path, 3, QATCallback(start_step=2))
    module, run = Regression(), trainer(QATCallback(start_step=2), limit_val_batches=1, val_check_interval=1)
    run.fit(module, loader(), loader(), ckpt_path=path)
    assert set(module.classes("validate")) == {"QATLinear"}


@pytest.mark.parametrize("saved_with", [True, False], ids=["saved-with", "saved-without"])
def test_checkpoints_load_with_and_without_the_callback(tmp_path, saved_with, recwarn):
    """Quantization is a choice of the run, not of the file: the same keys, strictly, both ways."""
    path = saved_at(tmp_path, 3, *[QATCallback()] * saved_with)
    content = torch.load(path, weights_only=True)
    assert list(content["state_dict"]) == list(Regression().state_dict())
    recwarn.clear()
    resumed = fit(*[QATCallback()] * (not saved_with), ckpt_path=path, steps=5)
    assert set(resumed.classes("fit")) == {"Linear" if saved_with else "QATLinear"}
    assert len(resumed.losses) == 2
    assert not [str(warning.message) for warning in recwarn if "QATCallback" in str(warning.message)]


def test_weights_only_checkpoint_and_load_from_checkpoint_give_the_masters(tmp_path):
    trained = fit(QATCallback(), saver(tmp_path, 3, save_weights_only=True), steps=3)
    path = tmp_path / "saved.ckpt"
    loaded = Regression.load_from_checkpoint(path)
    assert [type(loaded.model.up), type(loaded.model.down)] == [nn.Linear, nn.Linear]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trained.parameters(), strict=True))
    run = trainer(QATCallback())
    assert run.test(Regression(), loader(), ckpt_path=path, verbose=False) == run.test(trained, loader(), verbose=False)
    assert run.test(Regression(), loader(), ckpt_path=path, verbose=False) != trainer().test(
        loaded, loader(), verbose=False
    )


# Metrics -----------------------------------------------------------------------------------------------------------


class Snapshots(Callback):
    """After each optimizer step, before the next batch: the weights, and the metrics that callbacks can read."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.metrics: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        model, step = pl_module.model, trainer.global_step
        if step not in self.weights:
            self.weights[step] = {name: getattr(model, name).weight.detach().clone() for name in LAYERS}
        metrics = trainer.callback_metrics.items()
        self.metrics[step] = {name: value.item() for name, value in metrics if name.startswith("qat/")}


def rows(directory: Path) -> dict[int, dict[str, float]]:
    """The ``qat/`` columns of ``metrics.csv``, by the logger's step."""
    found: dict[int, dict[str, float]] = {}
    for path in directory.rglob("metrics.csv"):
        with path.open() as file:
            for row in csv.DictReader(file):
                values = {name: float(value) for name, value in row.items() if name.startswith("qat/") and value}
                if values:
                    assert int(row["step"]) not in found, "two rows for one step"
                    found[int(row["step"])] = values
    return found


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[N, G, 128]`` and scales ``[N, G, 1]`` of W4A16, written out."""
    groups = weight.reshape(len(weight), -1, 128)
    scale = (groups.abs().amax(-1, keepdim=True) / torch.tensor(7.0)).bfloat16().float()
    return (groups / scale).round().clamp(-7, 7), scale


def expected_metrics(now: dict[str, Tensor], before: dict[str, Tensor] | None) -> dict[str, float]:
    metrics = {}
    for name, weight in now.items():
        codes, scale = codes_of(weight)
        served = (codes * scale).bfloat16().double().reshape_as(weight)
        noise = (weight.double() - served).square().sum().item()
        metrics[f"qat/sqnr_db/{name}"] = 10 * math.log10(weight.double().square().sum().item() / noise)
        metrics[f"qat/saturation/{name}"] = (codes.abs() == 7).sum().item() / codes.numel()
        if before:
            changed = (codes != codes_of(before[name])[0]).sum().item()
            metrics[f"qat/code_flips/{name}"] = changed / codes.numel()
    for kind in ("sqnr_db", "saturation", *["code_flips"] * bool(before)):
        metrics[f"qat/{kind}/mean"] = sum(metrics[f"qat/{kind}/{name}"] for name in LAYERS) / len(LAYERS)
    return metrics


@pytest.mark.parametrize("accumulate", [1, 3])
def test_logged_metrics_are_right_and_stand_at_the_right_steps(tmp_path, accumulate):
    """Every second optimizer step, in the logger, in the row of Lightning's own metrics, and for other callbacks."""
    snapshots = Snapshots()
    fit(
        QATCallback(log_every_n_steps=2),
        snapshots,
        steps=6,
        accumulate_grad_batches=accumulate,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=2,
    )
    weights, logged = snapshots.weights, rows(tmp_path)
    assert list(logged) == [1, 3, 5]  # Lightning counts from 0
    for row, step in zip(logged.values(), (2, 4, 6), strict=True):
        expected = expected_metrics(weights[step], weights[step - 2] if step > 2 else None)
        oscillation = {name for name in row if "oscillation" in name}  # see test_oscillation.py
        assert bool(oscillation) == (step == 6)
        assert {name: row[name] for name in row.keys() - oscillation} == pytest.approx(expected, rel=1e-4)
        for name, value in row.items():
            if "code_flips" in name or "saturation" in name:
                assert value == pytest.approx(expected[name], rel=1e-7)
        assert snapshots.metrics[step] == pytest.approx(row, rel=1e-6)
    assert any(row.get("qat/code_flips/mean", 0) > 0 for row in logged.values())
    assert not snapshots.metrics[1]
    assert snapshots.metrics[3] == snapshots.metrics[2]

    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        lightnings = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert lightnings == list(logged)


def test_a_step_without_flips_and_a_layer_without_noise_are_logged_as_such(tmp_path):
    """0 flips and infinite SQNR are answers, not gaps."""

    class Still(Regression):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.model.down.weight.data = torch.arange(128 * 64).view(64, 128).remainder(15).sub(7) / 64
            return torch.optim.SGD(self.parameters(), lr=0.0)

    fit(QATCallback(log_every_n_steps=1), module=Still(), steps=2, logger=CSVLogger(tmp_path))
    row = rows(tmp_path)[1]
    assert [row[f"qat/code_flips/{name}"] for name in (*LAYERS, "mean")] == [0, 0, 0]
    assert row["qat/sqnr_db/down"] == math.inf
    assert math.isfinite(row["qat/sqnr_db/up"])


class Counting(QATCallback):
    """Counts how often weights are quantized for the statistics."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        super().__init__(**options)
        self.calls = 0
        self.work: dict[int, int] = {}
        quantize = grid.quantize

        def counted(*args: Any) -> grid.Quantized:
            self.calls += 1
            return quantize(*args)

        monkeypatch.setattr(grid, "quantize", counted)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        before = self.calls
        super().on_train_batch_end(trainer, *args)
        self.work[trainer.global_step] = self.work.get(trainer.global_step, 0) + self.calls - before


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("every", "expected"), [(3, [0, 0, 2, 0, 0, 2, 0]), (0, [0] * 7)])
def test_nothing_is_computed_between_logs(tmp_path, monkeypatch, every, expected, accumulate):
    """The statistics cost one quantization of each layer when they are logged, and nothing else; 0 is never."""
    counting = Counting(monkeypatch, log_every_n_steps=every)
    fit(counting, steps=7, accumulate_grad_batches=accumulate, logger=CSVLogger(tmp_path))
    assert [counting.work[step] for step in range(1, 8)] == expected
    assert counting.work.get(0, 0) == 0
    assert list(rows(tmp_path)) == ([2, 5] if every else [])


def test_metrics_begin_with_quantized_training(tmp_path):
    """Before start_step there are no codes in use to speak of."""
    fit(QATCallback(log_every_n_steps=1, start_step=2), steps=4, logger=CSVLogger(tmp_path))
    assert list(rows(tmp_path)) == [2, 3]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_logs_the_steps_that_the_uninterrupted_one_logs(tmp_path, accumulate):
    """One row a step: a checkpoint at a logged step is not logged again when training goes on."""
    options = {"accumulate_grad_batches": accumulate}
    path = saved_at(tmp_path, 4, **options)
    fit(QATCallback(log_every_n_steps=2), steps=8, ckpt_path=path, logger=CSVLogger(tmp_path / "resumed"), **options)
    assert list(rows(tmp_path / "resumed")) == [5, 7]


def test_a_second_fit_logs_as_the_first_did(tmp_path):
    """The callback remembers nothing of a run that is over, neither its steps nor another model's codes."""
    callback = QATCallback(log_every_n_steps=4)
    for name in ("first", "second"):
        fit(callback, logger=CSVLogger(tmp_path / name))
    assert rows(tmp_path / "second") == rows(tmp_path / "first") != {}


# Export ------------------------------------------------------------------------------------------------------------


class Tokenizer:
    def __init__(self, content: str) -> None:
        self.content = content

    def save_pretrained(self, directory: Path) -> None:
        (Path(directory) / "tokenizer.json").write_text(self.content)


@pytest.mark.parametrize("format", ["pack-quantized", "gptq", "marlin"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_export_is_bitwise_what_the_final_weights_give(tmp_path, format, precision):
    """What is written at the end of fit is the model that fit leaves, whole."""
    callback = QATCallback(export_dir=str(tmp_path / "out"), export_format=format)
    trained = fit(callback, precision=precision)
    final = network().to(trained.dtype)
    final.load_state_dict(trained.model.state_dict())
    lockstep.prepare(final, "W4A16")
    expected = lockstep.export.save_pretrained(final, tmp_path / "expected", format)
    assert files(tmp_path / "out") == files(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]
    x = samples(0)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert lockstep.align.compare(trained.model, tmp_path / "out", x.to(trained.dtype)).aligned


@pytest.mark.parametrize("owner", ["module", "datamodule", "both", "neither"])
def test_tokenizer_of_the_module_or_of_the_datamodule_is_saved_along(tmp_path, owner):
    """Engines refuse a folder without one."""
    module, data = Regression(), Numbers()
    if owner in ("module", "both"):
        module.tokenizer = Tokenizer("module's")
    if owner in ("datamodule", "both"):
        data.tokenizer = Tokenizer("datamodule's")
    trainer(QATCallback(export_dir=str(tmp_path / "out")), limit_val_batches=0).fit(module, datamodule=data)
    saved = files(tmp_path / "out").get("tokenizer.json", b"").decode()
    assert saved == {"module": "module's", "both": "module's", "datamodule": "datamodule's", "neither": ""}[owner]


class Fails(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            raise self.error


def test_an_earlier_export_survives_a_fit_that_fails_and_is_replaced_by_one_that_does_not(tmp_path):
    """A night's result is not lost to the next morning's typing error."""
    out = tmp_path / "out"

    def export(*callbacks: Callback, steps: int) -> None:
        fit(QATCallback(export_dir=str(out), overwrite=True), *callbacks, steps=steps)

    export(steps=1)
    first = files(out)
    with pytest.raises(RuntimeError, match="out of memory"):
        export(Fails(RuntimeError("out of memory")), steps=3)
    assert files(out) == first
    export(steps=3)
    assert files(out).keys() == first.keys()
    assert files(out) != first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("case", ["error", "interrupt", "fast_dev_run", "validate", "test", "predict"])
def test_nothing_is_exported_by_what_is_no_complete_fit(tmp_path, case):
    callback = QATCallback(export_dir=str(tmp_path / "out"))
    if case in ("error", "interrupt"):
        error = RuntimeError if case == "error" else KeyboardInterrupt
        with pytest.raises((error, SystemExit)):
            fit(callback, Fails(error("stop")))
    elif case == "fast_dev_run":
        fit(callback, fast_dev_run=True)
    else:
        getattr(trainer(callback), case)(Regression(), loader())
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_stopped_early_is_exported(tmp_path):
    """Early stopping and time limits end a fit as well as max_steps does."""

    class Stops(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    module = fit(QATCallback(export_dir=str(tmp_path / "out")), Stops())
    assert len(module.losses) == 2
    assert Checkpoint(tmp_path / "out").layers


def occupied(directory: Path) -> None:
    directory.mkdir()
    (directory / "thesis.tex").write_text("years of work")


def a_file(directory: Path) -> None:
    directory.write_text("")


def exported(directory: Path) -> None:
    fit(QATCallback(export_dir=str(directory)), steps=1)


def nothing(directory: Path) -> None:
    pass


def attention() -> LightningModule:
    module = Regression()
    projections = nn.ModuleDict({name: nn.Linear(128, 128) for name in ("q_proj", "k_proj", "v_proj")})
    module.model = nn.ModuleDict({"attention": projections})
    return module


REFUSED_EXPORTS = {
    "occupied": (occupied, Regression, {}, ExportError, "not empty: name a new directory, or pass overwrite"),
    "no-export": (occupied, Regression, {"overwrite": True}, ExportError, "no Lockstep export"),
    "file": (a_file, Regression, {}, ExportError, "is a file"),
    "earlier": (exported, Regression, {}, ExportError, "pass overwrite=True to replace an export"),
    "format": (nothing, Regression, {"export_format": "awq"}, ValueError, "no export format 'awq': there are pack-"),
    "dtypes": (
        nothing,
        Regression,
        {"scheme": Scheme.preset("W4A16", scale_dtype=torch.float16)},
        ExportError,
        "choose the same dtype for both",
    ),
    "fused": (
        nothing,
        attention,
        {"ignore": ["re:.*k_proj"]},
        ExportError,
        "attention.k_proj is not quantized, but engines run",
    ),
}


@pytest.mark.parametrize(
    ("place", "module", "options", "error", "message"), REFUSED_EXPORTS.values(), ids=REFUSED_EXPORTS
)
def test_export_that_cannot_succeed_is_refused_before_the_first_step(tmp_path, place, module, options, error, message):
    """Not after a night of training."""
    place(tmp_path / "out")
    before = files(tmp_path / "out") if (tmp_path / "out").is_dir() else None
    module = module()
    with pytest.raises(error, match=message):
        fit(QATCallback(**{"ignore": (), "export_dir": str(tmp_path / "out")} | options), module=module)
    assert module.losses == []
    assert before is None or files(tmp_path / "out") == before


def test_nan_weights_are_not_exported_and_the_tensor_is_named(tmp_path):
    """A diverged run leaves a message, not a checkpoint."""

    class Diverges(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.model.down.weight.data[3, 5] = math.nan

    with pytest.raises(ExportError, match=r"down\.weight: 1 of 8192 values are NaN"):
        fit(QATCallback(export_dir=str(tmp_path / "out")), Diverges())
    assert not list(tmp_path.iterdir())


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    fit(QATCallback(export_dir=str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())


def test_two_processes_train_alike_log_once_and_export_once(tmp_path):
    """In DDP both ranks come to the end, also when they choose checkpoints by a ``qat/`` metric."""
    in_processes(
        tmp_path,
        """
        import sys
        sys.path.insert(0, {tests!r})
        import torch
        from test_qat_callback import CSVLogger, ModelCheckpoint, QATCallback, Regression, loader, trainer

        torch.set_num_threads(1)
        quantize = QATCallback(export_dir="out", log_every_n_steps=1)
        best = ModelCheckpoint("best", monitor="qat/sqnr_db/mean", every_n_train_steps=1)
        run = trainer(quantize, best, steps=2, strategy="ddp", devices=2, logger=CSVLogger("log"))
        module = Regression()
        run.fit(module, loader())
        assert run.world_size == 2
        torch.save(module.model.state_dict(), f"rank{{run.global_rank}}.pt")
        """,
    )
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    model = network()
    model.load_state_dict(first)
    lockstep.prepare(model, "W4A16")
    assert files(lockstep.export.save_pretrained(model, tmp_path / "expected")) == files(tmp_path / "out")
    assert list(rows(tmp_path / "log")) == [0, 1]


# Measured ranges ---------------------------------------------------------------------------------------------------

INPUT_SCALES = ("model.up.input_scale", "model.down.input_scale")


def static(calibration_steps: int = 3, **options: Any) -> QATCallback:
    return QATCallback("FP8", calibration_steps=calibration_steps, **options)


def scales(module: LightningModule) -> list[float]:
    return [module.state_dict()[key].item() for key in INPUT_SCALES]


class Watches(Callback):
    """After each batch: the optimizer step, whether anything is measured, and whether both scales are numbers."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool, bool]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        measuring = any(layer.observer is not None for layer in (pl_module.model.up, pl_module.model.down))
        self.seen.append((trainer.global_step, measuring, all(map(math.isfinite, scales(pl_module)))))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranges_are_frozen_after_exactly_that_optimizer_step(accumulate):
    """A step too late trains on unquantized inputs, one too early measures other ranges than was asked for."""
    watches = Watches()
    module = fit(static(), watches, steps=5, accumulate_grad_batches=accumulate)
    assert watches.seen == [
        (step, step < 3, step >= 3) for step in (number // accumulate for number in range(1, 5 * accumulate + 1))
    ]
    by_hand_model = network()
    optimizer = optimizer_of(by_hand_model)
    lockstep.prepare(by_hand_model, "FP8")
    lockstep.qat.observers.observe(by_hand_model)
    losses = []
    for number in range(5 * accumulate):
        if number == 3 * accumulate:
            lockstep.qat.observers.freeze(by_hand_model)
        loss = loss_of(by_hand_model, number, torch.float32)
        losses.append(loss.item())
        (loss / accumulate).backward()
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert module.losses == losses
    assert scales(module) == [by_hand_model.up.input_scale.item(), by_hand_model.down.input_scale.item()]
    largest = max(samples(number)[0].abs().max().item() for number in range(3 * accumulate))
    assert scales(module)[0] == pytest.approx(largest / 448, rel=1e-6)


def test_inputs_are_as_they_are_until_then_and_quantized_afterwards():
    """Until then it is the run whose weights alone are quantized."""
    plain = fit(QATCallback(log_every_n_steps=0), steps=5)
    early, late = fit(static(2), steps=5).losses, fit(static(4), steps=5).losses
    assert early[:2] == late[:2] != plain.losses[:2]
    assert early[2] != late[2]


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stopped", [1, 2, 3, 4])
def test_a_run_stopped_at_any_step_goes_on_to_the_same_scales_and_losses(tmp_path, stopped, accumulate, observer):
    """Within the calibration steps it measures on; at and after their end it keeps what it has and measures nothing.
    Validation, the sanity check of the resumed run too, adds nothing to the ranges."""
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "val_check_interval": 2, "limit_val_batches": 2}

    def run(steps: int, *callbacks: Callback, ckpt_path: Path | None = None) -> Regression:
        module = Regression()
        trainer(static(observer=observer), *callbacks, steps=steps, **options).fit(
            module, loader(), loader(), ckpt_path=ckpt_path
        )
        return module

    whole = run(6)
    run(stopped, saver(tmp_path, stopped))
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert all(math.isnan(saved["state_dict"][key]) is (stopped < 3) for key in INPUT_SCALES)
    assert bool(saved["lockstep"]["observers"]) is (stopped < 3)
    watches = Watches()
    resumed = run(6, watches, ckpt_path=tmp_path / "saved.ckpt")
    assert scales(resumed) == scales(whole)
    assert resumed.losses == whole.losses[stopped * accumulate :]
    assert [measuring for _, measuring, _ in watches.seen] == [step < 3 for step, _, _ in watches.seen]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_a_run_that_is_killed_within_its_calibration_goes_on_from_its_last_checkpoint(tmp_path):
    """As a machine that goes away does it: nothing at all happens after the step at which it stops."""
    script = """
        import os, sys
        sys.path.insert(0, {tests!r})
        from test_qat_callback import Callback, Regression, fit, saver, static

        class Killed(Callback):
            def on_train_batch_start(self, trainer, *_):
                if trainer.global_step == 2:
                    os.kill(os.getpid(), 9)

        fit(static(), Killed(), saver(".", 1), steps=6)
    """
    (tmp_path / "run.py").write_text(textwrap.dedent(script).format(tests=str(Path(__file__).parent)))
    process = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert process.returncode == -signal.SIGKILL, process.stderr
    whole = fit(static(), steps=6)
    resumed = fit(static(), steps=6, ckpt_path=tmp_path / "saved.ckpt")
    assert scales(resumed) == scales(whole)
    assert resumed.losses == whole.losses[2:]


def test_validation_works_before_there_are_ranges_and_changes_none():
    """The sanity check runs before any batch was seen. Held-out batches must not decide what is clipped."""
    watches = Watches()
    module, run = Regression(), trainer(static(), watches, steps=5, val_check_interval=1, limit_val_batches=2)
    run.fit(module, loader(), loader())
    assert [step for step, _, _ in watches.seen] == [1, 2, 3, 4, 5]
    assert len(module.classes("validate")) == 2 + 2 * 5
    alone = fit(static(), steps=5)
    assert scales(module) == scales(alone)
    assert module.losses == alone.losses
    run.validate(module, loader(), verbose=False)
    assert scales(module) == scales(alone)


def test_a_fit_that_ends_within_its_calibration_is_not_exported(tmp_path):
    """Its inputs have never been quantized, and there is no scale to write."""
    early = trainer(static(4, export_dir=str(tmp_path / "out")), steps=3)
    with pytest.raises(ExportError, match=r"training ends at step 3, within calibration_steps=4"):
        early.fit(Regression(), loader())
    assert early.global_step == 0, "it was known before the first step"
    run, module = trainer(static(4, export_dir=str(tmp_path / "out")), steps=9), Regression()
    stop = lambda trainer, *_: setattr(trainer, "should_stop", trainer.global_step == 3)  # noqa: E731
    run.callbacks.append(LambdaCallback(on_train_batch_end=stop))
    with pytest.raises(ExportError, match=r"still being measured: training ended at step 3\b.*calibration_steps=4"):
        run.fit(module, loader())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"up\.input_scale is not measured"):
        run.validate(module, loader(), verbose=False)  # and does not go on with inputs as they are


@pytest.mark.parametrize("scheme", ["FP8", "NVFP4"])
def test_an_export_with_measured_ranges_holds_those_of_the_training(tmp_path, scheme):
    """Nothing that is refused before training for want of ranges, which are not there yet."""
    callback = QATCallback(scheme, calibration_steps=2, export_dir=str(tmp_path / "out"), log_every_n_steps=1)
    module = fit(callback, steps=4)
    checkpoint = Checkpoint(tmp_path / "out")
    for name in LAYERS:
        layer = getattr(module.model, name)
        assert checkpoint.stored_scale(name) == layer.stored_scale()
        assert torch.equal(grid.dequantize(checkpoint.layer(name), layer.scheme.weights), served(layer))
    assert lockstep.align.compare(module.model, tmp_path / "out", samples(9)[0].bfloat16()).aligned


def served(layer: QATLinear) -> Tensor:
    return grid.dequantize(layer.quantize(), layer.scheme.weights)


def test_without_calibration_steps_ranges_come_from_the_model_or_are_missed_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"up\.input_scale is not measured"):
        fit(QATCallback("FP8"))
    module = Regression()
    lockstep.prepare(module.model, "FP8")
    for layer in (module.model.up, module.model.down):
        layer.input_scale.fill_(0.01)
    fit(QATCallback("FP8", export_dir=str(tmp_path / "out")), module=module)
    assert scales(module) == [pytest.approx(0.01)] * 2
    assert Checkpoint(tmp_path / "out").stored_scale("up") == module.model.up.input_scale


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "W4A16", "calibration_steps": 2}, "no layer's inputs and no KV cache have measured ranges"),
        ({"scheme": "FP8_DYNAMIC", "calibration_steps": 2}, "no layer's inputs and no KV cache have measured ranges"),
        ({"scheme": "FP8", "calibration_steps": 2, "observer": "max"}, "observer='max': choose minmax"),
    ],
)
def test_calibration_that_measures_nothing_is_refused_before_the_first_step(options, message):
    module = Regression()
    with pytest.raises(ValueError, match=message):
        fit(QATCallback(**options), module=module)
    assert module.losses == []


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "FP8", "calibration_steps": 2},
        {"scheme": "W4A16", "learned_scales": True},
        {"scheme": "NVFP4"},
        {"scheme": [Rule(["up"], "W8A8"), Rule(["Linear"], "FP8")]},
        {"scheme": "W4A16", "kv_cache": "fp8"},
    ],
    ids=["calibration", "learned", "measured", "recipe", "cache"],
)
def test_a_late_start_is_refused_with_what_a_checkpoint_must_know_from_the_first_step(options):
    """Scales would be lost when the layers are switched, and checkpoints on either side have other keys."""
    with pytest.raises(ValueError, match=r"start_step=5 adds to the model"):
        QATCallback(start_step=5, **options)
    QATCallback(start_step=5, scheme=[Rule(["up"], None), Rule(["Linear"], "W8A8")], kv_cache="int8_per_token_head")


def in_processes(directory: Path, script: str) -> None:
    """Run `script` as a user starts a run on two processes."""
    (directory / "run.py").write_text(textwrap.dedent(script).format(tests=str(Path(__file__).parent)))
    with (directory / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "run.py"], cwd=directory, stdout=output, stderr=output, start_new_session=True
        )
        try:
            assert process.wait(timeout=120) == 0, (directory / "output").read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_two_processes_freeze_the_same_scales_of_what_both_have_seen(tmp_path):
    """The second process has the larger inputs. Stopped at step 1, they go on to the same."""
    in_processes(
        tmp_path,
        """
        import sys
        sys.path.insert(0, {tests!r})
        import torch
        from test_qat_callback import Regression, loader, samples, saver, scales, static, trainer

        class Ranks(Regression):
            def loss(self, where, number):
                x, y = samples(2 * number + self.global_rank)
                return torch.nn.functional.mse_loss(self.model((1 + self.global_rank) * x), y)

        torch.set_num_threads(1)
        found = []
        for steps, path in ((1, None), (4, "saved.ckpt"), (4, None)):
            module = Ranks()
            run = trainer(
                static(), saver(".", 1, enable_version_counter=False), steps=steps, strategy="ddp", devices=2
            )
            run.fit(module, loader(), ckpt_path=path)
            found.append(scales(module))
        assert run.world_size == 2
        torch.save(found, f"rank{{run.global_rank}}.pt")
        """,
    )
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first[1:] == second[1:]
    assert first[1] == first[2]
    largest = max((1 + number % 2) * samples(number)[0].abs().max().item() for number in range(6))
    assert first[2][0] == pytest.approx(largest / 448, rel=1e-6)


# Learned scales, recipes, other options ----------------------------------------------------------------------------


class Gentle(Regression):
    """Gives learned scales a rate that goes with their size, as they need it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        named = dict(self.named_parameters())
        scales = [one for name, one in named.items() if name.endswith("weight_scale")]
        others = [one for name, one in named.items() if not name.endswith("weight_scale")]
        return torch.optim.AdamW([{"params": others}, {"params": scales, "lr": 1e-5}], lr=1e-3)


def test_learned_scales_are_in_the_optimizer_move_and_are_exported(tmp_path):
    """Parameters that come after the optimizer never train; a scale that is not exported is not the trained one."""
    callback = QATCallback("W4A16", learned_scales=True, export_dir=str(tmp_path / "out"), log_every_n_steps=1)
    run, module = trainer(callback, saver(tmp_path, 4), steps=4), Gentle()
    run.fit(module, loader())
    _, group = run.optimizers[0].param_groups
    start = network()
    lockstep.prepare(start, "W4A16", learned_scales=True)
    checkpoint = Checkpoint(tmp_path / "out")
    for name in LAYERS:
        learned = getattr(module.model, name).weight_scale
        assert any(learned is parameter for parameter in group["params"])
        assert not torch.equal(learned, getattr(start, name).weight_scale)
        assert torch.equal(checkpoint.layer(name).scale, learned.detach().bfloat16())
    assert any(path.name == "saved.ckpt" for path in tmp_path.iterdir())


def test_a_run_with_learned_scales_resumes_bit_for_bit(tmp_path):
    whole = fit(QATCallback(learned_scales=True), steps=5)
    path = saved_at(tmp_path, 2, QATCallback(learned_scales=True))
    resumed = fit(QATCallback(learned_scales=True), steps=5, ckpt_path=path)
    assert resumed.losses == whole.losses[2:]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_a_recipe_trains_each_layer_as_its_first_rule_says_and_exports_so(tmp_path):
    recipe = [Rule(["re:.*down"], "W8A8"), Rule(["Linear"], "W4A16")]
    module = fit(QATCallback(recipe, export_dir=str(tmp_path / "out"), log_every_n_steps=1))
    checkpoint = Checkpoint(tmp_path / "out")
    assert (checkpoint.scheme_of("up"), checkpoint.scheme_of("down")) == (Scheme(), Scheme.preset("W8A8"))
    assert lockstep.align.compare(module.model, tmp_path / "out", samples(9)[0].bfloat16()).aligned
    kept = fit(QATCallback([Rule(["up"], None), Rule(["Linear"], "W4A16")]))
    assert [type(kept.model.up), type(kept.model.down)] == [nn.Linear, QATLinear]


def test_fp8_input_gradient_is_passed_on():
    """The first loss is the forward's alone, the second has seen the other gradient."""
    exact, fast = (fit(QATCallback("FP8_DYNAMIC", fp8_input_gradient=on), steps=3) for on in (False, True))
    assert fast.model.up.fp8_input_gradient
    assert exact.losses[0] == fast.losses[0]
    assert exact.losses[1] != fast.losses[1]
    with pytest.raises(ValueError, match="fp8_input_gradient needs fp8 weights"):
        fit(QATCallback("W4A16", fp8_input_gradient=True))


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4", "W4A16_ASYM"])
def test_statistics_of_every_kind_of_code_are_finite_and_of_the_weight_that_trains(tmp_path, scheme):
    from lockstep.qat import statistics

    run, module = trainer(QATCallback(scheme, log_every_n_steps=1), logger=CSVLogger(tmp_path), steps=3), Regression()
    run.fit(module, loader())
    layer, found = module.model.down, run.callback_metrics
    assert found["qat/sqnr_db/down"] == pytest.approx(
        statistics.sqnr_db(layer.weight, layer.quantize(), layer.scheme.weights)
    )
    assert 10 < found["qat/sqnr_db/mean"] < 60
    assert 0 < found["qat/saturation/down"] <= 1
    assert 0 < found["qat/code_flips/down"] < 1


# What it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["Conv2d"]}, "target 'Conv2d' matches no module"),
        ({"targets": ["up"], "ignore": ["up"]}, "nothing to quantize"),
        ({"scheme": "W4A61"}, "no preset 'W4A61': near ones are W4A16"),
    ],
)
def test_what_prepare_refuses_the_run_refuses_before_its_first_step(options, message):
    module = Regression()
    with pytest.raises(ValueError, match=message):
        fit(QATCallback(**options), module=module)
    assert module.losses == []


def test_a_group_that_does_not_divide_is_named():
    module = Regression()
    module.model = nn.Sequential(OrderedDict(fits=nn.Linear(256, 192), odd=nn.Linear(192, 64)))
    with pytest.raises(ValueError, match=r"odd, weight of shape \(64, 192\).*group_size 32 or 64 would fit"):
        fit(QATCallback(), module=module)


# Which module it is ------------------------------------------------------------------------------------------------


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


class Holder(LightningModule):
    """A LightningModule with these children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def test_served_model_is_the_transformers_model_or_the_only_child_or_the_module_itself():
    """Names in `targets`, `ignore`, metrics and the checkpoint are names in that module."""
    net, head, llama = network(), nn.Sequential(nn.Linear(128, 64)), tiny_llama()
    assert served_model(Holder(net=net)) is net
    assert served_model(Holder(net=net, loss=nn.CrossEntropyLoss())) is net
    assert served_model(Holder(net=torch.compile(net))) is net
    assert served_model(Holder(llama=llama, value_head=head)) is llama
    assert served_model(Holder(llama=torch.compile(llama), value_head=head)) is llama
    several = Holder(net=net, head=head)
    assert served_model(several) is several
    two = Holder(student=llama, teacher=tiny_llama())
    assert served_model(two) is two


def test_a_module_whose_only_child_is_a_layer_trains_quantized():
    """The first LightningModule that people write is one ``nn.Linear``."""

    class Boring(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(128, 2)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(torch.ones(1, 128)).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self)

    assert isinstance(fit(QATCallback(), module=Boring()).layer, QATLinear)


def test_several_children_are_one_model_with_their_names_in_front(tmp_path):
    class Pair(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(64, 64))

    fit(QATCallback(ignore=["head.0"], export_dir=str(tmp_path / "out")), module=Pair())
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.layers == ("model.down", "model.up")
    assert "head.0.weight" in checkpoint.plain_tensors()


class Language(LightningModule):
    """A transformers model beside a head of its owner's."""

    def __init__(self) -> None:
        super().__init__()
        self.llama = tiny_llama()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.value_head = nn.Linear(128, 1)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        ids = torch.arange(16)[None]
        output = self.llama(input_ids=ids, labels=ids, output_hidden_states=True)
        loss = output.loss + self.value_head(output.hidden_states[-1]).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_transformers_model_inside_trains_and_exports_under_its_own_names(tmp_path, precision):
    """``ignore=["lm_head"]`` is the model's head; the folder is the model's alone, and transformers loads it."""
    from transformers import AutoModelForCausalLM

    module = fit(QATCallback(export_dir=str(tmp_path / "out")), module=Language(), precision=precision, steps=6)
    assert module.losses[-1] < module.losses[0]
    assert type(module.llama.lm_head) is type(module.value_head) is nn.Linear
    assert isinstance(module.llama.model.layers[0].self_attn.q_proj, QATLinear)
    layers = Checkpoint(tmp_path / "out").layers
    assert len(layers) == 7
    assert all(name.startswith("model.layers.0.") for name in layers)
    ids = torch.arange(16)[None]
    report = lockstep.align.compare(module.llama, tmp_path / "out", {"input_ids": ids})
    assert all(layer.weight_equal for layer in report.layers)
    assert report.aligned or precision == "bf16-true"  # which rounds the rotary frequencies, as engines do not
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight, module.llama.lm_head.weight.bfloat16())


# The KV cache ------------------------------------------------------------------------------------------------------

CACHE_SCALES = [f"llama.model.layers.0.self_attn.{which}_scale" for which in "kv"]


def test_a_static_cache_is_measured_frozen_saved_resumed_and_exported(tmp_path):
    options: dict[str, Any] = {"kv_cache": "fp8", "calibration_steps": 2}
    whole = fit(QATCallback("FP8", export_dir=str(tmp_path / "out"), **options), module=Language(), steps=4)
    assert all(whole.state_dict()[key].isfinite() for key in CACHE_SCALES)
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.kv_cache == whole_spec("fp8")
    stored = checkpoint.tensor("model.layers.0.self_attn.k_scale")
    assert torch.equal(stored.flatten(), whole.state_dict()[CACHE_SCALES[0]].flatten())
    for stopped in (1, 3):
        directory = tmp_path / str(stopped)
        fit(QATCallback("FP8", **options), saver(directory, stopped), module=Language(), steps=stopped)
        resumed = fit(QATCallback("FP8", **options), module=Language(), steps=4, ckpt_path=directory / "saved.ckpt")
        assert resumed.losses == whole.losses[stopped:]
        assert all(torch.equal(resumed.state_dict()[key], whole.state_dict()[key]) for key in CACHE_SCALES)
    weights_alone = fit(QATCallback("FP8", calibration_steps=2), module=Language(), steps=4)
    assert weights_alone.losses[:2] == whole.losses[:2]
    assert weights_alone.losses[2:] != whole.losses[2:]


def whole_spec(name: str) -> Any:
    from lockstep.qat.kv_cache import spec_of

    return spec_of(name)


def test_a_static_cache_may_go_with_a_scheme_without_measured_ranges(tmp_path):
    callback = QATCallback("W4A16", kv_cache="fp8", calibration_steps=2, export_dir=str(tmp_path / "out"))
    module = fit(callback, module=Language(), steps=3)
    assert all(module.state_dict()[key].isfinite() for key in CACHE_SCALES)
    assert Checkpoint(tmp_path / "out").kv_cache == whole_spec("fp8")


def test_a_dynamic_cache_needs_no_calibration_and_a_static_one_says_that_it_does():
    dynamic = fit(QATCallback("W4A16", kv_cache="int8_per_token_head"), module=Language(), steps=3)
    plain = fit(QATCallback("W4A16"), module=Language(), steps=3)
    assert list(dynamic.state_dict()) == list(plain.state_dict())
    assert dynamic.losses[0] != plain.losses[0]
    with pytest.raises(RuntimeError, match=r"k_scale is \[nan\].*needs calibrated scales"):
        fit(QATCallback("W4A16", kv_cache="fp8"), module=Language(), steps=3)


@pytest.mark.parametrize(
    ("cache", "error", "message"),
    [
        ("fp4", ValueError, "no KV cache format 'fp4': choose fp8"),
        ("fp8_per_token_head", ExportError, "--kv-cache-dtype fp8_per_token_head"),
    ],
)
def test_a_cache_that_cannot_be_exported_is_refused_before_the_first_step(tmp_path, cache, error, message):
    module = Language()
    with pytest.raises(error, match=message):
        fit(QATCallback("W4A16", kv_cache=cache, export_dir=str(tmp_path / "out")), module=module)
    assert module.losses == []


def test_a_cache_of_a_model_without_attention_is_refused():
    with pytest.raises(TypeError, match="has no attention that a KV cache can be quantized in"):
        fit(QATCallback("W4A16", kv_cache="int8_per_token_head"))


# A model from a folder with scales ---------------------------------------------------------------------------------


class FromFolder(Language):
    """What users write: a transformers model from a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The masters of a run with measured ranges, saved by transformers with the scales among them."""
    folder = tmp_path_factory.mktemp("trained")
    module = fit(QATCallback("FP8", kv_cache="fp8", calibration_steps=2), module=Language(), steps=2)
    module.llama.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("where", ["fit", "validate"])
def test_scales_that_the_models_folder_stores_are_read_from_it(trained, where):
    """transformers leaves out the keys that it does not know; without them the first batch is refused."""
    from safetensors.torch import load_file

    module = FromFolder(trained)
    module.validation_step = module.training_step  # type: ignore[method-assign]
    getattr(trainer(QATCallback("FP8", kv_cache="fp8"), steps=1), where)(module, loader())
    stored = load_file(trained / "model.safetensors")
    found = {key: value for key, value in module.llama.state_dict().items() if key.endswith("_scale")}
    assert len(found) == 7 + 2
    assert all(torch.equal(value, stored[key]) for key, value in found.items())


def test_scales_of_the_folder_give_way_to_those_of_a_checkpoint_and_to_new_ones(trained, tmp_path):
    again = fit(QATCallback("FP8", calibration_steps=1), saver(tmp_path, 1), module=FromFolder(trained), steps=2)
    resumed = fit(QATCallback("FP8"), module=FromFolder(trained), ckpt_path=tmp_path / "saved.ckpt", steps=3)
    name = "llama.model.layers.0.mlp.down_proj.input_scale"
    read = fit(QATCallback("FP8"), module=FromFolder(trained), steps=1)
    assert torch.equal(resumed.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(read.state_dict()[name], again.state_dict()[name])


def test_a_folder_with_some_of_the_scales_alone_is_refused_by_name(tmp_path):
    module = fit(QATCallback("FP8", calibration_steps=1), module=Language(), steps=1)
    module.llama.save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match=r"half stores no model\.layers\.0\.self_attn\.k_scale: run"):
        fit(QATCallback("FP8", kv_cache="fp8"), module=FromFolder(tmp_path / "half"))


# From YAML ---------------------------------------------------------------------------------------------------------

W32 = Scheme.preset("W4A16", group_size=32)
FP16 = Scheme.preset("W4A16", group_size=32, scale_dtype=torch.float16, served_dtype=torch.float16)
RECIPE = [Rule(["re:.*up"], "W8A8"), Rule(["Linear"], W32)]
KEPT = [Rule(["re:.*down"], None), Rule(["Linear"], "FP8_DYNAMIC")]


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("W4A16", Scheme()),
        ("{weights: {group_size: 32}}", W32),
        ("{class_path: lockstep.Scheme, init_args: {weights: {group_size: 32}}}", W32),
        ("{weights: {group_size: 32, scale_dtype: torch.float16, served_dtype: torch.float16}}", FP16),
        ("[{targets: ['re:.*up'], scheme: W8A8}, {targets: [Linear], scheme: {weights: {group_size: 32}}}]", RECIPE),
        ("[{targets: ['re:.*down'], scheme: null}, {targets: [Linear], scheme: FP8_DYNAMIC}]", KEPT),
    ],
    ids=["preset", "fields", "class", "dtypes", "recipe", "recipe-with-null"],
)
def test_lightning_cli_builds_it_from_yaml_and_from_the_config_that_it_saves(tmp_path, monkeypatch, scheme, expected):
    """A run is repeated from its ``config.yaml``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fit"])
    (tmp_path / "run.yaml").write_text(
        textwrap.dedent(f"""
            seed_everything: 0
            model: {{class_path: {__name__}.Regression}}
            data: {{class_path: {__name__}.Numbers}}
            trainer:
              accelerator: cpu
              max_steps: 1
              limit_val_batches: 0
              enable_checkpointing: false
              enable_progress_bar: false
              enable_model_summary: false
              logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: logs}}}}
              callbacks:
                - class_path: lockstep.callbacks.QATCallback
                  init_args:
                    scheme: {scheme}
                    targets: ["re:.*up"]
                    kv_cache: null
                    log_every_n_steps: 1
        """)
    )

    def run(config: Path) -> Trainer:
        return LightningCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=["fit", "--config", str(config)],
        ).trainer

    def callback_of(trainer: Trainer) -> QATCallback:
        (callback,) = [callback for callback in trainer.callbacks if isinstance(callback, QATCallback)]
        return callback

    first = run(tmp_path / "run.yaml")
    assert callback_of(first).scheme == expected
    by_hand = network()
    lockstep.prepare(by_hand, expected, ["up"])
    for name in LAYERS:
        layer, wanted = (getattr(model, name) for model in (first.lightning_module.model, by_hand))
        assert getattr(layer, "scheme", None) == getattr(wanted, "scheme", None)
        assert type(layer) is type(wanted)
    (saved,) = tmp_path.rglob("config.yaml")
    assert callback_of(run(saved)).scheme == expected


def test_arguments_are_typed_and_documented_for_yaml():
    """jsonargparse reads the signature and the docstring; an argument without either is lost to YAML or to --help."""
    parameters = inspect.signature(QATCallback).parameters
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters.values())
    assert all(f"        {name}: " in (QATCallback.__doc__ or "") for name in parameters)


def test_learned_scales_that_went_negative_are_refused_at_the_export(tmp_path):
    """Adam at the weights' own rate walks through zero in a few steps: the engine would serve noise."""
    callback = QATCallback("W4A16", learned_scales=True, export_dir=str(tmp_path / "out"))
    with pytest.raises(ExportError, match=r"weight_scale holds scales that are negative.* learning rate was too high"):
        trainer(callback, steps=4).fit(Regression(), loader())
    assert not (tmp_path / "out").exists()
