"""Warm-up of quantization: which layers compute what at which step, in real trainers, and that nothing stays of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from models import HIDDEN, TinyMlp, channel, grouped, prepared, tiny_llama, tiny_moe, token_ids
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer as HFTrainer
from transformers import TrainerCallback, TrainingArguments

import lockstep
from lockstep import Rule, Scheme, grid
from lockstep.callbacks import QATCallback, QATTrainerCallback
from lockstep.export import Checkpoint, ExportError
from lockstep.qat import quantized_modules, warmup
from lockstep.qat.linear import QATLinear
from lockstep.qat.warmup import Schedule, Warmup, eight_bits, stop
from lockstep.scheme import PRESETS

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*not resumable.*",
    "ignore:.*exists and is not empty.*",
    "ignore:.*no `val_dataloader`.*",
    "ignore:.*LeafSpec",
    "ignore:.*ModelCheckpoint.*",
)

KINDS = ("layers", "noise", "bits")
every_kind = pytest.mark.parametrize("kind", KINDS)


def linear(scheme: str | Scheme = "W4A16", width: int = 256, dtype: torch.dtype = torch.float32) -> QATLinear:
    """One layer in train mode, as a model has it."""
    torch.manual_seed(0)
    return prepared(nn.Sequential(nn.Linear(width, 64)).to(dtype), scheme)[0].train()


def inputs(width: int = 256, rows: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def at(layer: QATLinear, kind: Any, step: int, steps: int = 4) -> QATLinear:
    """The layer as it computes at a step of a warm-up."""
    Schedule(nn.Sequential(layer), Warmup(kind, steps)).follow(step)
    return layer


def warming(model: nn.Module) -> list[str]:
    return [name for name, layer in quantized_modules(model) if layer.warmup is not None]


# Layers ------------------------------------------------------------------------------------------------------------


def test_layers_go_over_in_order_and_those_that_engines_fuse_together():
    model = prepared(tiny_llama(num_hidden_layers=1), "W4A16")
    schedule = Schedule(model, Warmup("layers", steps=8, stages=4))
    waiting = []
    for step in range(10):
        assert schedule.follow(step) == (step < 8)
        waiting.append([name.rpartition(".")[2] for name in warming(model)])
    attention, mlp = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    everything = [*attention, "o_proj", *mlp, "down_proj"]
    left = [everything, everything[3:], everything[4:], ["down_proj"], []]
    assert waiting == [left[0]] * 2 + [left[1]] * 2 + [left[2]] * 2 + [left[3]] * 2 + [left[4]] * 2


def test_backward_order_begins_with_the_last_layer_and_one_stage_is_all_at_once():
    model = prepared(TinyMlp(), "W4A16")
    schedule = Schedule(model, Warmup("layers", steps=2, order="backward", stages=2))
    schedule.follow(0)
    assert warming(model) == ["first", "second"]
    schedule.follow(1)
    assert warming(model) == ["first"]
    schedule = Schedule(model, Warmup("layers", steps=2, stages=1))
    schedule.follow(1)
    assert warming(model) == ["first", "second"]
    assert not schedule.follow(2)
    assert warming(model) == []


def test_a_sensitivity_report_puts_the_least_sensitive_layers_first(tmp_path):
    model, path = tiny_llama(num_hidden_layers=1), tmp_path / "report.json"
    batch = {"input_ids": token_ids(), "labels": token_ids()}
    report = lockstep.sensitivity(model, [batch], schemes=["W4A16", "W8A8"])
    report.save(path)
    prepared(model, "W4A16")
    schedule = Schedule(model, Warmup("layers", steps=4, order=str(path)))
    found = []
    for step in range(1, 5):
        schedule.follow(step)
        found += [{name for name, _ in quantized_modules(model)} - set(warming(model)) - set().union(*found)]
    quantized = [cost for cost in report.costs if cost.scheme != "-"]
    worst = {cost.layers: cost.increase for cost in sorted(quantized, key=lambda cost: cost.increase)}
    assert found == [set(unit) for unit in sorted(worst, key=worst.__getitem__)]

    damaged = json.loads(path.read_text())
    damaged["costs"] = [cost for cost in damaged["costs"] if "down_proj" not in cost["unit"]]
    path.write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match=r"has no model\.layers\.0\.mlp\.down_proj"):
        Schedule(model, Warmup("layers", steps=4, order=str(path)))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_that_waits_is_plain_and_one_that_is_through_is_as_served(autocast):
    model = prepared(TinyMlp(dtype=torch.float32), "MXFP4").train()
    Schedule(model, Warmup("layers", steps=2, stages=2)).follow(1)
    x = inputs(128).requires_grad_()
    plain = TinyMlp(dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    served = prepared(copy.deepcopy(plain), "MXFP4").train()
    found, expected = [], []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for kept, (a, b) in ((found, (model, model)), (expected, (served, plain))):
            y = b.second(a.norm(a.first(x)).relu())
            kept += [y, *torch.autograd.grad(y.float().square().sum(), [x, a.first.weight, b.second.weight])]
    assert model.second.warmup is warmup.plain
    assert model.first.warmup is None
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "size"), [(grouped(32), 32), (channel(), 256), ("MXFP4", 32), ("FP8_DYNAMIC", 256), ("FP8_BLOCK", 256)]
)
@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_random_share_of_whole_groups_is_quantized_and_of_whole_tokens(scheme, size, step):
    """What the layer multiplies with is read off its output for unit vectors, and off the weight's for the tokens."""
    torch.manual_seed(0)
    layer = prepared(nn.Sequential(nn.Linear(256, 512, bias=False)), scheme)[0].train()
    weights, inputs_spec = layer.scheme.weights, layer.scheme.activations
    at(layer, "noise", step)
    torch.manual_seed(3)
    found = layer(torch.eye(256)).T.detach()  # unit vectors are exact in every input format
    served = grid.fake_quantize(layer.weight.detach(), weights).float()
    differs = (served != layer.weight).view(512, -1, size)
    is_served = (found == served).view(512, -1, size).all(-1)
    is_master = (found == layer.weight).view(512, -1, size).all(-1)
    assert (is_served | is_master).all()
    telling = differs.any(-1)
    assert is_served[telling].float().mean().item() == pytest.approx(step / 4, abs=0.09)
    if inputs_spec is not None:
        x = inputs(rows=400)
        layer.weight.data = torch.eye(512, 256)
        torch.manual_seed(4)
        y = layer(x)[:, :256]
        changed = (y != x).any(-1).float().mean().item()
        assert changed == pytest.approx(step / 4, abs=0.09)


def test_the_share_is_of_the_step_and_the_choice_of_torchs_seed():
    layer, x = linear(), inputs()
    schedule = Schedule(nn.Sequential(layer), Warmup("noise", steps=4))
    outputs: dict[tuple[int, int], Tensor] = {}
    for step in range(5):
        assert schedule.follow(step) == (step < 4)
        for seed in (0, 1):
            torch.manual_seed(seed)
            outputs[step, seed] = layer(x)
            torch.manual_seed(seed)
            assert torch.equal(layer(x), outputs[step, seed])
    assert torch.equal(outputs[0, 0], F.linear(x, layer.weight, layer.bias))
    assert torch.equal(outputs[4, 0], linear()(x))
    assert all(not torch.equal(outputs[step, 0], outputs[step, 1]) for step in (1, 2, 3))


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
def test_gradients_are_straight_through_and_the_inputs_flow_through_the_mixed_weight(scheme):
    layer, x = at(linear(scheme), "noise", 2), inputs().requires_grad_()
    torch.manual_seed(0)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.manual_seed(0)
    columns = layer(torch.eye(256)).sub(layer.bias).T.detach()  # the same weight is drawn: it is drawn first
    torch.testing.assert_close(x.grad, grad @ columns, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))
    layer.weight.data = torch.eye(64, 256)
    torch.manual_seed(0)
    torch.rand(64, 2 if scheme == "W4A16" else 1, 1)
    used = x.detach().clone()
    if layer.scheme.activations is not None:
        quantized = lockstep.activations.quantize(used, layer.scheme.activations)
        served = lockstep.activations.dequantize(quantized, used.dtype)
        used = torch.where(torch.rand(len(used), 1) < 0.5, served, used)
        assert not torch.equal(used, x)
    torch.testing.assert_close(layer.weight.grad, grad.T @ used)


def test_inputs_beyond_a_measured_range_get_no_gradient_where_they_are_quantized():
    layer = linear(Scheme.preset("FP8"))
    layer.input_scale.fill_(1 / 448)  # up to 1
    at(layer, "noise", 2)
    x = (10 * inputs(rows=64)).requires_grad_()
    torch.manual_seed(0)
    layer(x).sum().backward()
    torch.manual_seed(0)
    torch.rand(64, 1, 1)
    chosen = torch.rand(64, 1) < 0.5
    assert torch.equal(x.grad == 0, (x.abs() > 432 / 448) & chosen)  # codes of 448
    assert 0.2 < chosen.float().mean() < 0.8


@every_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_an_activation_checkpoint_recomputes_the_same_weights(kind, reentrant):
    layer, x = at(linear(), kind, 2), inputs().requires_grad_()
    found = []
    for checkpointed in (False, True):
        layer.weight.grad = None
        torch.manual_seed(0)
        h = checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=reentrant) if checkpointed else layer(x).tanh()
        torch.rand(5)  # what follows in the forward
        (grad,) = torch.autograd.grad(h.square().sum(), x, retain_graph=True) if not reentrant else (None,)
        h.square().sum().backward()
        found.append([h.detach(), layer.weight.grad.clone(), *([grad] if grad is not None else [])])
        x.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["amax/7", "amax/7.5", "max/-8", "range/15"])
def test_int8_in_the_groups_of_the_int4_weights(rule):
    """The first two against compressed-tensors and by hand; the others have the same fine grid."""
    scheme = Scheme.preset(
        "W4A16" if rule != "range/15" else "W4A16_ASYM",
        group_size=32,
        scale_rule=rule,
        **({"scale_dtype": torch.float16} if rule == "max/-8" else {}),
    )
    layer = at(linear(scheme), "bits", 3)
    found = layer(torch.eye(256)).sub(layer.bias).T.detach()
    groups = layer.weight.detach().view(64, 8, 32)
    divisor, low = (127.5, -128) if rule == "amax/7.5" else (127.0, -127)
    scale = (groups.abs().amax(-1, keepdim=True) / divisor).to(scheme.weights.scale_dtype).float()
    codes = (groups / scale).round().clamp(low, 127)
    torch.testing.assert_close(found, (codes * scale).bfloat16().float().view(64, 256), atol=1e-6, rtol=0)
    assert len(torch.unique(codes)) > 100
    assert eight_bits(scheme.weights).group_size == 32


def test_quantized_inputs_stay_as_they_are_served():
    layer = at(linear("W4A8"), "bits", 0)
    x = inputs()
    served = lockstep.activations.dequantize(lockstep.activations.quantize(x, layer.scheme.activations), torch.float32)
    weight = grid.fake_quantize(layer.weight.detach(), Scheme.preset("W8A16").weights).float()
    assert torch.equal(layer(x), F.linear(served, weight, layer.bias))


# Outside of it -----------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("INT8", "FP8", "NVFP4")])
def test_evaluation_and_what_follows_the_warm_up_are_bitwise_as_served(kind, name):
    if kind == "bits" and not name.startswith("W4"):
        return
    layer, untouched, x = at(linear(name), kind, 1), linear(name), inputs()
    torch.manual_seed(0)
    during = layer(x)
    assert not torch.equal(during, untouched(x))
    torch.manual_seed(0)
    assert torch.equal(layer.eval()(x), during)  # transformers' from_pretrained leaves a model so, and it trains
    with torch.no_grad():
        assert torch.equal(layer(x), untouched(x))
    at(layer.train(), kind, 4)
    for one in (layer, untouched):
        one(x).square().sum().backward()
    assert torch.equal(layer(x), untouched(x))
    assert torch.equal(layer.weight.grad, untouched.weight.grad)
    assert vars(layer).keys() == vars(untouched).keys()
    assert layer.state_dict().keys() == untouched.state_dict().keys()


@every_kind
def test_state_dicts_copies_and_unprepare_know_nothing_of_it(kind):
    model = prepared(TinyMlp(), "W4A16")
    keys = model.state_dict().keys()
    Schedule(model, Warmup(kind, 4)).follow(1)
    assert model.state_dict().keys() == keys
    stop(copy.deepcopy(model))
    assert len(warming(model)) == 2
    stop(model)
    assert warming(model) == []


class Compiled:
    """A compiled model that counts how often it is compiled, and refuses to break its graph."""

    def __init__(self, model: nn.Module) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.model = torch.compile(model, backend="aot_eager", fullgraph=True)

    def step(self, *inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        loss = self.model(*inputs).square().sum()
        loss.backward()
        return loss.detach()

    @property
    def graphs(self) -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@every_kind
@pytest.mark.parametrize("scheme", ["W4A16", "W4A8"])
def test_a_compiled_model_has_no_break_and_is_compiled_once_a_phase(kind, scheme):
    """Phases: the stages of "layers"; for the others the warm-up, whose share moves at each step, and what follows."""
    model = prepared(TinyMlp(dtype=torch.float32), scheme).train()
    schedule = Schedule(model, Warmup(kind, steps=8, stages=2))
    compiled, x, graphs, losses = Compiled(model), inputs(128), [], []
    for step in range(11):
        schedule.follow(step)
        losses.append(compiled.step(x))
        graphs.append(compiled.graphs)
    assert graphs == ([1] * 4 + [2] * 4 + [3] * 3 if kind == "layers" else [1] * 8 + [2] * 3)
    assert not torch._dynamo.utils.counters["graph_break"]
    if kind == "noise":
        assert len({loss.item() for loss in losses[:8]}) > 4, "the share is baked in"
    stop(model)
    torch.testing.assert_close(losses[-1], model(x).square().sum().detach())


def test_a_model_that_never_warmed_up_compiles_as_before():
    model = prepared(TinyMlp(dtype=torch.float32), "W4A16").train()
    compiled = Compiled(model)
    for _ in range(3):
        compiled.step(inputs(128))
    assert compiled.graphs == 1


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "slowly", "steps": 4}, r"kind='slowly'.*'layers', 'noise', 'bits'"),
        ({"kind": "noise", "steps": 0}, "steps=0"),
        ({"kind": "layers", "steps": 4, "stages": 0}, "stages=0"),
        ({"kind": "layers", "steps": 4, "order": "sideways"}, "order='sideways'.*sensitivity"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Warmup(**arguments)


@pytest.mark.parametrize("make", [QATCallback, QATTrainerCallback])
def test_learned_scales_are_refused_when_the_callback_is_made(make):
    with pytest.raises(ValueError, match="warmup with learned_scales"):
        make("W4A16", warmup=Warmup("noise", 4), learned_scales=True)


@every_kind
def test_layers_that_cannot_warm_up_are_refused_by_name(kind):
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts holds experts"):
        Schedule(prepared(tiny_moe(), grouped(32)), Warmup(kind, 4))
    with pytest.raises(ValueError, match="first has learned scales"):
        Schedule(prepared(TinyMlp(), "W4A16", learned_scales=True), Warmup(kind, 4))


def test_bits_are_for_int4_weights_alone():
    model = prepared(TinyMlp(), [Rule(["first"], "W4A16"), Rule(["second"], "FP8_DYNAMIC")])
    with pytest.raises(ValueError, match=r"second trains as fp8_e4m3 .*from INT8 to INT4.*'noise'"):
        Schedule(model, Warmup("bits", 4))


def test_adapters_are_refused_by_name():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], r=4))
    lockstep.prepare(model, "W4A16")
    with pytest.raises(ValueError, match=r"q_proj.* trains with an adapter"):
        Schedule(model, Warmup("noise", 4))


# In Lightning ------------------------------------------------------------------------------------------------------


class Regression(LightningModule):
    """Fits the small network; notes each loss, and in each validation what a quantized twin finds."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TinyMlp(dtype=torch.float32)
        self.losses: list[float] = []
        self.validated: list[tuple[float, float]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def training_step(self, number: Tensor, batch_idx: int) -> Tensor:
        torch.manual_seed(self.global_step)  # Lightning's checkpoints do not hold the generator
        loss = self.model(inputs(128, rows=4) * (1 + 0.1 * batch_idx)).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, number: Tensor, batch_idx: int) -> None:
        twin = TinyMlp(dtype=torch.float32)
        twin.load_state_dict(self.model.state_dict(), strict=False)
        prepared(twin, "W4A16").eval()
        self.validated.append((self.model(inputs(128)).sum().item(), twin(inputs(128)).sum().item()))


class Watch(Callback):
    """How many layers warm up in each batch."""

    def __init__(self) -> None:
        self.waiting: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.waiting.append(len(warming(pl_module.model)))


def loader(batches: int = 8) -> DataLoader:
    return DataLoader(torch.arange(batches).float().view(-1, 1))


def fit(*callbacks: Callback, steps: int = 8, module: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    module = module or Regression()
    saves = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    defaults = {"max_steps": steps, "enable_checkpointing": saves, "devices": 1}
    trainer = Trainer(callbacks=list(callbacks), **quiet | defaults | options)
    trainer.fit(module, loader(), loader(1), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize(("start_step", "accumulate"), [(0, 1), (2, 1), (0, 2)])
def test_it_follows_the_optimizer_steps_from_start_step_on(start_step, accumulate):
    watch = Watch()
    options = {"start_step": start_step, "warmup": Warmup("layers", steps=4, stages=2)}
    fit(QATCallback("W4A16", **options), watch, steps=8 // accumulate, accumulate_grad_batches=accumulate)
    assert (
        watch.waiting
        == {
            (0, 1): [2, 2, 1, 1, 0, 0, 0, 0],
            (2, 1): [0, 0, 2, 2, 1, 1, 0, 0],
            (0, 2): [2, 2, 2, 2, 1, 1, 1, 1],
        }[start_step, accumulate]
    )


@every_kind
def test_validation_within_it_shows_what_would_be_served(kind):
    module = fit(QATCallback("W4A16", warmup=Warmup(kind, steps=8)), val_check_interval=2)
    assert len(module.validated) > 3
    assert all(found == served for found, served in module.validated)


@every_kind
def test_a_run_that_resumes_within_it_goes_on_bit_for_bit(tmp_path, kind):
    def callback() -> QATCallback:
        return QATCallback("W4A16", warmup=Warmup(kind, steps=6, stages=3))

    whole = fit(callback(), ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}"))
    resumed = fit(callback(), ckpt_path=tmp_path / "step=3.ckpt")
    assert resumed.losses == whole.losses[3:]
    assert whole.losses != fit(QATCallback("W4A16")).losses


def test_a_second_fit_warms_up_anew_and_other_runs_do_not():
    callback, watch = QATCallback("W4A16", warmup=Warmup("noise", steps=4)), Watch()
    fit(callback, watch, steps=2)
    module = fit(callback, watch, steps=6)
    assert watch.waiting == [2, 2] + [2] * 4 + [0] * 2
    interrupted = fit(callback, steps=2)
    assert len(warming(interrupted.model)) == 2
    fit(QATCallback("W4A16"), module=interrupted, steps=2)
    assert warming(interrupted.model) == warming(module.model) == []


def test_a_fit_that_ends_within_it_is_not_exported(tmp_path):
    callback = QATCallback("W4A16", warmup=Warmup("bits", steps=8), start_step=2, export_dir=str(tmp_path / "out"))
    module = Regression()
    with pytest.raises(ExportError, match=r"ends at step 8, within warmup\.steps=8 from start_step=2"):
        fit(callback, module=module)
    assert module.losses == [], "what is known before training is refused before it"
    with pytest.raises(ExportError, match="ends at step 8, within"):
        fit(callback, module=module, steps=-1, max_epochs=1)
    assert len(module.losses) == 8
    assert not (tmp_path / "out").exists()


@every_kind
def test_the_export_after_it_holds_the_served_weights(tmp_path, kind):
    callback = QATCallback("W4A16", warmup=Warmup(kind, steps=4), export_dir=str(tmp_path / "out"))
    model = fit(callback, steps=6).model
    exported = Checkpoint(tmp_path / "out")
    for name, layer in quantized_modules(model):
        spec = layer.scheme.weights
        assert torch.equal(grid.dequantize(exported.layer(name), spec), grid.fake_quantize(layer.weight, spec))


@pytest.mark.parametrize("kind", ["layers", "noise"])
def test_ranges_are_measured_meanwhile(kind):
    """Inputs are as they are while they are measured, in both; the ranges are those of a run that does not quantize."""
    watch = Watch()
    model = fit(QATCallback("FP8", warmup=Warmup(kind, steps=4), calibration_steps=2), watch).model
    assert watch.waiting[-1] == 0 < watch.waiting[0]
    largest = max(float((inputs(128, rows=4) * (1 + 0.1 * number)).abs().max()) for number in (0, 1))
    assert model.first.input_scale.item() == pytest.approx(largest / 448)


class Tiny(Regression):
    """For the command line."""

    def train_dataloader(self) -> DataLoader:
        return loader()


def test_yaml_names_it_by_its_fields(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = {
        "class_path": "lockstep.callbacks.QATCallback",
        "init_args": {"warmup": {"kind": "layers", "steps": 4, "order": "backward"}, "dampening": 0.1},
    }
    trainer = {"max_steps": 6, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    Path("config.yaml").write_text(json.dumps({"trainer": trainer | {"callbacks": [callback]}}))
    cli = LightningCLI(Tiny, args=["fit", "--config", "config.yaml"], save_config_callback=None)
    (made,) = [one for one in cli.trainer.callbacks if isinstance(one, QATCallback)]
    assert (made.warmup, made.dampening) == (Warmup("layers", 4, order="backward"), 0.1)


RANKS = """
import json
import torch
import torch.distributed as dist
from models import TinyMlp, prepared
from torch.nn.parallel import DistributedDataParallel
from lockstep.qat.warmup import Schedule, Warmup

dist.init_process_group("gloo")
losses = []
for kind in ("layers", "noise", "bits"):
    model = prepared(TinyMlp(dtype=torch.float32), "W4A16").train()
    schedule, wrapped = Schedule(model, Warmup(kind, steps=2, stages=2)), DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(4):
        schedule.follow(step)
        torch.manual_seed(10 * step + dist.get_rank())  # inputs and noise of its own
        loss = wrapped(torch.randn(4, 128)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(json.dumps([one.double().sum().item() for one in model.parameters()]))
print(json.dumps(losses))
dist.destroy_process_group()
"""


def test_data_parallel_ranks_end_with_the_same_weights(tmp_path):
    """Every parameter has a part in each step, and each rank its own noise, as of a dropout."""
    first, second = (output.splitlines()[-4:] for output in ranks.run(RANKS, tmp_path))
    assert first[:3] == second[:3]
    assert first[3] != second[3]


# In a Hugging Face trainer -----------------------------------------------------------------------------------------


class Waiting(TrainerCallback):
    """How many layers warm up after each step."""

    def __init__(self) -> None:
        self.waiting: list[int] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.waiting.append(len(warming(kwargs["model"])))


def hf(directory: Path, *callbacks: TrainerCallback, steps: int = 6, resume: Any = None, **options: Any) -> HFTrainer:
    data = [{"input_ids": ids, "labels": ids} for ids in token_ids(8, 8)]
    arguments = {
        "use_cpu": True,
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    model = tiny_llama(torch.float32, num_hidden_layers=1, hidden_size=HIDDEN // 2, intermediate_size=128)
    args = TrainingArguments(str(directory), **arguments | options)
    trainer = HFTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=[*callbacks])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def entries(run: HFTrainer, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


@every_kind
def test_the_trainer_warms_up_resumes_and_evaluates_as_served(tmp_path, kind):
    """With gradient checkpointing; the checkpoint holds the generator, so "noise" resumes bit for bit too."""

    def callback() -> QATTrainerCallback:
        return QATTrainerCallback(grouped(32), warmup=Warmup(kind, steps=4, stages=2), log_every_n_steps=0)

    watch = Waiting()
    options = {"gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 2}
    saves = {"save_strategy": "steps", "save_steps": 3}
    whole = hf(tmp_path, callback(), watch, **options, **saves)
    assert watch.waiting == ([7, 7, 3, 3, 0, 0] if kind == "layers" else [7, 7, 7, 7, 0, 0])
    resumed = hf(tmp_path, callback(), resume=str(tmp_path / "checkpoint-3"), **options)
    assert entries(resumed, "loss") == entries(whole, "loss")
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    short = hf(tmp_path, callback(), steps=2)
    assert len(warming(short.model)) == 7
    during = short.evaluate()["eval_loss"]
    stop(short.model)
    assert short.evaluate()["eval_loss"] == during


def test_the_trainers_export_refuses_a_run_that_ends_within_it(tmp_path):
    callback = QATTrainerCallback(grouped(32), warmup=Warmup("noise", steps=6), export_dir=str(tmp_path / "out"))
    with pytest.raises(ExportError, match=r"ends at step 6, within warmup\.steps=6"):
        hf(tmp_path / "run", callback)
