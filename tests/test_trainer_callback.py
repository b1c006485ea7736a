"""`QATTrainerCallback` in real transformers and TRL trainers: when it acts, what it refuses, resumes and exports."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import ranks
import torch
from models import VOCAB, grouped, prepared, tiny_llama, tiny_moe
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import lockstep
from lockstep import grid
from lockstep.callbacks import QATTrainerCallback
from lockstep.export import Checkpoint, ExportError
from lockstep.export.served import quantized_layers
from lockstep.qat import QATLinear, statistics
from lockstep.qat.prepare import quantized_modules

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:.*use_cpu.*", "ignore:.*warmup.*")

LENGTH = 8
QUERY = "model.layers.0.self_attn.q_proj"


# A model, and runs of it ---------------------------------------------------------------------------------------------


def model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """One layer, the same weights at every call."""
    return tiny_llama(dtype, num_hidden_layers=1, hidden_size=128, intermediate_size=128).train()


def rows(count: int = 16) -> list[dict[str, Tensor]]:
    ids = torch.randint(VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(directory: Path | str, steps: int = 3, **options: Any) -> TrainingArguments:
    plain: dict[str, Any] = {
        "use_cpu": True,
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return TrainingArguments(str(directory), **plain | options)


def run_of(directory: Path | str, *callbacks: TrainerCallback, of: Any = None, **options: Any) -> Trainer:
    """A trainer, of `model` unless another is given."""
    made = {key: options.pop(key) for key in ("model_init", "optimizers", "eval_dataset") if key in options}
    if "model_init" not in made:
        made["model"] = of or model()
    args = arguments(directory, **options)
    return Trainer(args=args, train_dataset=rows(), callbacks=[*callbacks], **made)


def trained(directory: Path | str, *callbacks: TrainerCallback, resume: Any = None, **options: Any) -> Trainer:
    """A trainer after its run."""
    run = run_of(directory, *callbacks, **options)
    run.train(resume_from_checkpoint=resume)
    return run


def callback(scheme: Any = "W4A16", **options: Any) -> QATTrainerCallback:
    return QATTrainerCallback(scheme, **{"log_every_n_steps": 0} | options)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def state(of: Any) -> dict[str, Tensor]:
    of = of.model if isinstance(of, Trainer) else of
    return {key: tensor.clone() for key, tensor in of.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether all tensors are the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def is_export_of(directory: Path, of: nn.Module) -> bool:
    """Whether a folder holds, bit for bit, the weights that the layers of a model train with."""
    checkpoint = Checkpoint(directory)
    layers = quantized_layers(of)
    assert set(checkpoint.layers) == set(layers)
    return all(
        torch.equal(
            grid.dequantize(checkpoint.layer(name), layer.scheme.weights),
            grid.dequantize(layer.quantize(), layer.scheme.weights),
        )
        for name, layer in layers.items()
    )


def in_order(count: int) -> list[int]:
    """The rows that a trainer draws, as torch's sampler does from the seed of its arguments."""
    drawn: list[int] = []

    class Notes(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            ids = [row["input_ids"] for row in rows()]
            drawn.extend(next(n for n, one in enumerate(ids) if torch.equal(one, row)) for row in inputs["input_ids"])
            return torch.zeros(())

    plain = model()
    Notes(model=plain, args=arguments("unused", steps=count // 2), train_dataset=rows()).train()
    return drawn


def by_hand(steps: int, dtype: torch.dtype, autocast: bool, accumulate: int = 1, clip: float = 0.0) -> Any:
    """The same run in a loop of one's own, with `lockstep.prepare`: losses and weights."""
    own, found, order = prepared(model(dtype)), [], in_order(2 * steps * accumulate)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
    data = rows()
    for step in range(steps):
        total = torch.zeros(())
        for micro in range(accumulate):
            first = 2 * (step * accumulate + micro)
            ids = torch.stack([data[number]["input_ids"] for number in order[first : first + 2]])
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                items = torch.tensor(2 * accumulate * (LENGTH - 1))
                loss = own(input_ids=ids, labels=ids, num_items_in_batch=items).loss
            loss.backward()
            total += loss.detach()
        if clip:
            torch.nn.utils.clip_grad_norm_(own.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total.item())
    return found, state(own)


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "autocast", "accumulate", "clip"),
    [
        (torch.float32, False, 1, 0.0),
        (torch.float32, True, 2, 0.5),
        (torch.bfloat16, False, 1, 0.0),
    ],
)
def test_training_is_bitwise_what_prepare_gives_in_a_loop_of_ones_own(tmp_path, dtype, autocast, accumulate, clip):
    """The callback adds no arithmetic, and the training does see quantized weights."""
    options = {"bf16": autocast, "gradient_accumulation_steps": accumulate, "max_grad_norm": clip}
    run = trained(tmp_path, callback(), of=model(dtype), **options)
    expected, weights = by_hand(3, dtype, autocast, accumulate, clip)
    assert losses(run) == expected
    assert same(state(run), weights)
    assert all(a != b for a, b in zip(losses(trained(tmp_path, of=model(dtype), **options)), expected, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"gradient_accumulation_steps": 2, "reuse": "codes"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_change_no_arithmetic_change_no_bit(tmp_path, options):
    reuse = options.get("reuse")
    options = {key: value for key, value in options.items() if key != "reuse"}
    plain = {"gradient_accumulation_steps": options.get("gradient_accumulation_steps", 1)}
    autocast = "torch_compile" not in options  # which rounds elsewhere when it is compiled, without Lockstep too
    run = trained(tmp_path, callback(reuse=reuse), bf16=autocast, **options)
    assert same(state(run), state(trained(tmp_path, callback(), bf16=autocast, **plain)))
    assert all(isinstance(layer, QATLinear) for _, layer in quantized_modules(run.model))


def test_layers_are_switched_before_the_optimizer_and_keep_the_models_keys(tmp_path):
    kinds = []

    class Watching(Trainer):
        def create_optimizer(self, *args: Any) -> Any:
            kinds.append(type(self.model.get_submodule(QUERY)))
            return super().create_optimizer(*args)

    before = list(model().state_dict())
    run = Watching(model=model(), args=arguments(tmp_path, 1), train_dataset=rows(), callbacks=[callback()])
    run.train()
    assert kinds == [QATLinear]
    assert list(run.model.state_dict()) == before
    run.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert same(state(loaded), state(run))


def test_evaluation_and_prediction_are_quantized_without_training_too(tmp_path):
    run = run_of(tmp_path, callback(), per_device_eval_batch_size=2)
    ids = torch.stack([row["input_ids"] for row in rows(2)])
    own = prepared(model()).eval()
    with torch.no_grad():
        expected = own(input_ids=ids, labels=ids)
    assert run.evaluate(rows(2))["eval_loss"] == expected.loss.item()
    assert torch.equal(torch.from_numpy(run.predict(rows(2)).predictions), expected.logits)


def test_start_step_trains_in_full_precision_until_then(tmp_path):
    """And evaluates so, until the step after which it trains quantized."""
    run = trained(tmp_path, callback(start_step=2), steps=4)
    plain = trained(tmp_path, steps=4)
    assert [a == b for a, b in zip(losses(run), losses(plain), strict=True)] == [True, True, False, False]
    seen: list[tuple[int, str]] = []

    class Sees(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append((state.global_step, type(model.get_submodule(QUERY)).__name__))

    trained(
        tmp_path, callback(start_step=2), Sees(), steps=2, eval_dataset=rows(1), eval_strategy="steps", eval_steps=1
    )
    assert seen == [(1, "Linear"), (2, "QATLinear")]
    with pytest.raises(ExportError, match=r"nothing trained quantized: training ended at step 2, with start_step=2"):
        trained(tmp_path, callback(start_step=2, export_dir=str(tmp_path / "out")), steps=2)


# Too late ------------------------------------------------------------------------------------------------------------


def late(directory: Path, added: QATTrainerCallback, **options: Any) -> Trainer:
    run = run_of(directory, **options)
    run.add_callback(added)
    return run


def with_model_init(directory: Path, added: QATTrainerCallback, **options: Any) -> Trainer:
    return run_of(directory, added, model_init=model, **options)


def with_optimizer(directory: Path, added: QATTrainerCallback, **options: Any) -> Trainer:
    own = model()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
    return run_of(directory, added, of=own, optimizers=(optimizer, None), **options)


def with_optimizer_created(directory: Path, added: QATTrainerCallback, **options: Any) -> Trainer:
    run = late(directory, added, **options)
    run.create_optimizer()
    return run


@pytest.mark.parametrize("make", [late, with_model_init, with_optimizer, with_optimizer_created])
def test_where_the_scheme_adds_nothing_it_is_never_too_late(tmp_path, make):
    """A class that is swapped leaves the optimizer, the wrappers and the checkpoints what they are."""
    run = make(tmp_path, callback(), bf16=True)
    run.train()
    assert same(state(run), state(trained(tmp_path, callback(), bf16=True)))


@pytest.mark.parametrize("make", [late, with_model_init, with_optimizer_created])
@pytest.mark.parametrize(
    "options",
    [{"scheme": "FP8", "calibration_steps": 1}, {"learned_scales": True}, {"kv_cache": "fp8", "calibration_steps": 1}],
    ids=["measured", "learned", "cache"],
)
def test_where_it_adds_something_too_late_is_an_error_before_the_first_step(tmp_path, make, options):
    """Optimizers would not train it, and checkpoints not give it back."""
    run = make(tmp_path, callback(**options))
    with pytest.raises(ValueError, match=r"came to this model too late.*callbacks=\[...\]"):
        run.train()
    assert run.state.global_step == 0
    assert same(state(run), state(model()))


def test_an_evaluation_that_the_callback_came_too_late_for_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="this evaluation is not quantized"):
        late(tmp_path, callback()).evaluate(rows(2))


def test_learned_scales_need_an_optimizer_that_trains_them_as_scales(tmp_path):
    """The trainer's own would move them at the weights' rate, which destroys them; a ready one may lack them."""
    with pytest.raises(ValueError, match=r"q_proj.weight_scale is not in the optimizer.*optimizers=\(optimizer"):
        with_optimizer(tmp_path, callback(learned_scales=True))
    run = run_of(tmp_path, callback(learned_scales=True))
    with pytest.raises(ValueError, match=r"q_proj\.weight_scale is in a parameter group with other parameters"):
        run.train()
    with pytest.raises(ValueError, match=r"q_proj\.weight_scale is in a parameter group with weight decay"):
        learning(tmp_path, decay=0.1)
    run = learning(tmp_path)
    before = state(run)
    run.train()
    assert not torch.equal(before[f"{QUERY}.weight_scale"], state(run)[f"{QUERY}.weight_scale"])


def learning(directory: Path | str, *others: TrainerCallback, decay: float = 0.0, **options: Any) -> Trainer:
    """A run with learned scales, made as the docs say."""
    own = prepared(model(), learned_scales=True)
    scales = [one for name, one in own.named_parameters() if name.endswith("weight_scale")]
    rest = [one for name, one in own.named_parameters() if not name.endswith("weight_scale")]
    groups = [{"params": rest}, {"params": scales, "lr": 1e-5, "weight_decay": decay}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    return run_of(directory, callback(learned_scales=True), *others, of=own, optimizers=(optimizer, None), **options)


# What it refuses -----------------------------------------------------------------------------------------------------


def test_several_gpus_in_one_process_are_refused(tmp_path):
    """The replicas of nn.DataParallel have no parameters: learned scales would be left out in silence."""
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs in one process.*torchrun"):
        callback().on_init_end(args, None, None, model=model(), optimizer=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("trainer", ["Trainer", "SFTTrainer"])
def test_models_with_adapters_train_on_the_merged_weight_and_export_it(tmp_path, trainer):
    from peft import LoraConfig, get_peft_model

    from lockstep.qat import lora

    config, out = LoraConfig(target_modules=["q_proj", "down_proj"]), tmp_path / "out"
    added = callback(export_dir=str(out))
    if trainer == "Trainer":
        run = run_of(tmp_path / "run", added, of=get_peft_model(model(), config))
    else:
        run = sft(tmp_path / "run", added, peft_config=config)
    run.train()
    adapters = {name: one for name, one in run.model.named_parameters() if one.requires_grad}
    assert adapters
    assert all("lora_" in name for name in adapters)
    assert all(one.any() for name, one in adapters.items() if "lora_B" in name)  # they begin as zeros
    with lora.merged(run.model) as served:
        assert is_export_of(out, served)


@pytest.mark.parametrize("where", ["run", "."])
def test_an_export_that_could_not_be_written_is_refused_before_training(tmp_path, where, monkeypatch):
    """The trainer's own checkpoints would be in its way, at the end of the training."""
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(ExportError, match="is or holds the trainer's output_dir"):
        trained(tmp_path / "run", callback(export_dir=str(tmp_path / where)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    run = run_of(tmp_path / "run", callback(export_dir=str(tmp_path / "full"), overwrite=True))
    with pytest.raises(ExportError, match="is not empty and no Lockstep export"):
        run.train()
    assert run.state.global_step == 0


def test_compute_in_a_dtype_that_is_not_served_is_refused_by_name(tmp_path):
    fp16 = lockstep.Scheme.preset("W4A16", scale_dtype=torch.float16, served_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"q_proj: the forward computes in torch.bfloat16.*served in torch.float16"):
        trained(tmp_path, callback(fp16), bf16=True)
    run = trained(tmp_path, callback(fp16, export_dir=str(tmp_path / "out")), of=model(torch.float16), steps=1)
    assert is_export_of(tmp_path / "out", run.model)


# Statistics ----------------------------------------------------------------------------------------------------------


def test_statistics_stand_in_the_trainers_log_every_n_steps(tmp_path, capsys):
    """The trainer's record has them for each layer; what it prints, the means."""
    run = trained(tmp_path, callback(log_every_n_steps=2), steps=5, logging_strategy="no")
    entries = {entry["step"]: entry for entry in run.state.log_history if "qat/sqnr_db/mean" in entry}
    assert [*entries] == [2, 4]
    names = [name for name, _ in quantized_modules(run.model)]
    assert all(f"qat/{kind}/{name}" in entries[4] for kind in ("sqnr_db", "saturation", "code_flips") for name in names)
    assert not any("code_flips" in name for name in entries[2])
    assert {"loss", "epoch"} <= entries[4].keys()
    again = trained(tmp_path, callback(log_every_n_steps=4), steps=4)
    layer = again.model.get_submodule(QUERY)
    assert entries[4][f"qat/sqnr_db/{QUERY}"] == statistics.sqnr_db(
        layer.weight, layer.quantize(), layer.scheme.weights
    )
    printed = capsys.readouterr().out
    assert "qat/sqnr_db/mean" in printed
    assert f"qat/sqnr_db/{QUERY}" not in printed


def test_experts_train_are_logged_and_exported(tmp_path):
    """Also alone, with every linear layer left as it is."""
    added = callback(grouped(32), targets=["re:.*experts$"], log_every_n_steps=1, export_dir=str(tmp_path / "out"))
    moe = tiny_moe("qwen3_moe", torch.float32).train()
    run = run_of(tmp_path / "run", of=moe)
    run.add_callback(added)
    run.train()
    experts = "model.layers.1.mlp.experts"
    last = run.state.log_history[-2]
    assert {f"qat/{kind}/{experts}" for kind in ("sqnr_db", "saturation", "code_flips")} <= last.keys()
    layers = quantized_layers(run.model)
    own = [
        statistics.sqnr_db(layer.weight, layer.quantize(), layer.scheme.weights)
        for name, layer in layers.items()
        if name.startswith(experts)
    ]
    assert len(own) == 3 * 4
    assert last[f"qat/sqnr_db/{experts}"] == pytest.approx(sum(own) / len(own))
    assert is_export_of(tmp_path / "out", run.model)


# Ranges, checkpoints, resuming ---------------------------------------------------------------------------------------

SAVES = {"save_strategy": "steps", "save_steps": 1}


def measured(**options: Any) -> QATTrainerCallback:
    """Inputs and a KV cache that are measured over three steps."""
    return callback("FP8", kv_cache="fp8", calibration_steps=3, **options)


def test_evaluations_leave_no_trace_in_measured_ranges(tmp_path):
    """Nor in what is trained: a run that evaluates more often is the same run."""
    loud = [{**row, "input_ids": row["input_ids"].flip(0)} for row in rows(4)]
    options = {"eval_dataset": loud, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    run = trained(tmp_path, measured(observer="percentile"), steps=4, **options)
    assert same(state(run), state(trained(tmp_path, measured(observer="percentile"), steps=4)))


class StopsAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_a_run_that_ends_within_its_calibration_is_not_exported(tmp_path):
    with pytest.raises(ExportError, match=r"training ends at step 2, within calibration_steps=3"):
        trained(tmp_path, measured(export_dir=str(tmp_path / "out")), steps=2)
    with pytest.raises(ExportError, match=r"still being measured: training ended at step 2\b.*calibration_steps=3"):
        trained(tmp_path, measured(export_dir=str(tmp_path / "out")), StopsAt(2), steps=9)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_a_calibration_goes_on_from_checkpoints_of_every_strategy(tmp_path, strategy):
    """The trainer decides late, after an epoch or an evaluation, that it writes one."""
    options = {"steps": 11, "eval_strategy": "epoch" if strategy == "epoch" else "steps", "eval_steps": 8}
    options |= {"save_strategy": strategy, "eval_dataset": rows(2), "metric_for_best_model": "loss"}

    def added() -> QATTrainerCallback:
        return callback("FP8", calibration_steps=10, observer="percentile")

    unbroken = trained(tmp_path, added(), **options)
    assert unbroken.state.max_steps == 11
    assert (tmp_path / "checkpoint-8").is_dir()
    resumed = trained(tmp_path, added(), resume=str(tmp_path / "checkpoint-8"), **options)
    assert same(state(resumed), state(unbroken))


def test_a_checkpoint_without_its_measurements_is_refused(tmp_path):
    """Going on from nothing would measure something else than the run that was interrupted."""
    trained(tmp_path, measured(), steps=2, **SAVES)
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    content = json.loads(path.read_text())
    assert content["stateful_callbacks"].pop("lockstep")["step"] == 2
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"checkpoint of step 2 does not hold what calibration_steps=3"):
        trained(tmp_path, measured(), steps=4, resume=str(path.parent))


class Kills(TrainerCallback):
    """Ends its own process within a step, without another instruction of it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


KILLED = {"weights": 3, "measuring": 2, "measured": 4, "learned": 3}


def killed_run(kind: str, directory: Path | str, *others: TrainerCallback) -> Trainer:
    """A run of six steps with all that a checkpoint has to give back."""
    options: dict[str, Any] = {"steps": 6, "bf16": True, "dataloader_drop_last": True, **SAVES}
    if kind == "learned":
        return learning(directory, *others, **options)
    added = callback(reuse="codes") if kind == "weights" else measured(observer="moving_average")
    return run_of(directory, added, *others, optim="adamw_torch", **options | {"learning_rate": 1e-3})


def kill_all(directory: str) -> None:
    """Run each kind in a process of its own, which kills itself."""
    for kind, step in KILLED.items():
        child = os.fork()
        if not child:
            killed_run(kind, f"{directory}/{kind}", Kills(step)).train()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, kind


@functools.cache
def after_kills(directory: Path) -> Path:
    script = f"import test_trainer_callback as tests\ntests.kill_all({str(directory)!r})"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return directory


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    return after_kills(tmp_path_factory.mktemp("killed"))


@pytest.mark.parametrize("kind", [*KILLED])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, killed, kind):
    """Masters, measured and learned scales, and the observers of a calibration that was under way."""
    assert sorted(path.name for path in (killed / kind).iterdir()) == [
        f"checkpoint-{step}" for step in range(1, KILLED[kind] + 1)
    ]
    run = killed_run(kind, killed / kind)
    run.train(resume_from_checkpoint=True)
    unbroken = killed_run(kind, tmp_path)
    unbroken.train()
    assert run.state.global_step == 6
    assert same(state(run), state(unbroken))
    assert any(key.endswith(("input_scale", "weight_scale")) for key in state(run)) == (kind != "weights")
    assert losses(run) == losses(unbroken)


# Exports -------------------------------------------------------------------------------------------------------------


def test_the_export_holds_what_the_last_step_trained(tmp_path):
    run = trained(tmp_path / "run", measured(export_dir=str(tmp_path / "run" / "out")), steps=4, **SAVES)
    assert is_export_of(tmp_path / "run" / "out", run.model)
    assert Checkpoint(tmp_path / "run" / "out").stored_scale(QUERY) == run.model.get_submodule(QUERY).input_scale


def test_an_exception_in_training_exports_nothing(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        trained(tmp_path / "run", callback(export_dir=str(tmp_path / "out")), Fails())
    assert not (tmp_path / "out").exists()


def test_with_load_best_model_at_end_the_best_model_is_exported(tmp_path):
    """A learning rate that makes each step worse: the best model is the first."""
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 50.0}
    options["steps"] = 2
    added = callback(export_dir=str(tmp_path / "out"), reuse="weight")
    run = trained(tmp_path / "run", added, eval_dataset=rows(), **SAVES, **options)
    assert run.state.best_global_step < run.state.global_step
    best = tmp_path / "run" / f"checkpoint-{run.state.best_global_step}"
    masters = AutoModelForCausalLM.from_pretrained(best, dtype="auto")
    assert same(state(run), state(masters))
    assert is_export_of(tmp_path / "out", prepared(masters))


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
TOGETHER: dict[str, dict[str, Any]] = {"ddp": {}, "ddp-measured": {}, "zero3": {"deepspeed": PARTITIONED}}


def together(kind: str, directory: Path | str, **options: Any) -> Trainer:
    """A run, of two processes or one, that exports."""
    added = measured if kind == "ddp-measured" else callback
    added = added(export_dir=f"{directory}/{kind}", log_every_n_steps=2)
    return run_of(f"{directory}/{kind}-run", added, steps=4, **SAVES, **options)


def in_a_rank(directory: str) -> None:
    """Every kind, resumed from its second step too."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ here; gloo alone does it
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for kind, options in TOGETHER.items():
        run = together(kind, directory, per_device_train_batch_size=1, **options)
        run.train()
        assert type(run.model_wrapped).__name__ == {"zero3": "DeepSpeedEngine"}.get(kind, "DistributedDataParallel")
        assert ("qat/sqnr_db/mean" in run.state.log_history[-2]) == (rank == 0)
        first = {path.name: path.read_bytes() for path in Path(directory, kind).iterdir()}
        torch.save(losses(run), f"{directory}/{kind}-losses{rank}")
        torch.distributed.barrier()
        run = together(kind, directory, per_device_train_batch_size=1, **options)
        run.callback_handler.callbacks[-2].overwrite = True
        run.train(resume_from_checkpoint=f"{directory}/{kind}-run/checkpoint-2")
        assert first == {path.name: path.read_bytes() for path in Path(directory, kind).iterdir()}, kind


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    script = f"import test_trainer_callback as tests\ntests.in_a_rank({str(directory)!r})"
    ranks.run(script, directory / "ranks", DS_ACCELERATOR="cpu")
    return directory


@pytest.mark.parametrize("kind", [*TOGETHER])
def test_two_processes_train_as_one_resume_and_export_once(tmp_path, two_processes, kind):
    """The same rows in a step: their gradients are added up in another order, which moves losses by 1e-7 of them and,
    here, no code. Resumed from step 2 they export the same files."""
    alone = together(kind, tmp_path)
    alone.train()
    for rank in (0, 1):
        assert torch.load(two_processes / f"{kind}-losses{rank}") == pytest.approx(losses(alone), rel=1e-6)
    checkpoint = Checkpoint(two_processes / kind)
    assert is_export_of(tmp_path / kind, alone.model)
    for name, layer in quantized_modules(alone.model):
        differ = checkpoint.layer(name).codes != layer.quantize().codes
        assert differ.float().mean() <= 1e-3, name  # a weight within the noise of a boundary


# TRL -----------------------------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(BPE({one: number for number, one in enumerate(alphabet)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<|end|>", pad_token="<|pad|>")


def sft(directory: Path, *callbacks: TrainerCallback, **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    text = datasets.Dataset.from_list([{"text": f"{number} times {number} is {number**2}"} for number in range(8)])
    args = SFTConfig(
        str(directory),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        dataset_num_proc=None,
    )
    return SFTTrainer(
        model=model(), args=args, train_dataset=text, processing_class=tokenizer(), callbacks=[*callbacks], **options
    )


def test_sft_trainer_trains_quantized_and_its_export_loads(tmp_path):
    run = sft(tmp_path / "run", callback(export_dir=str(tmp_path / "out"), log_every_n_steps=1))
    run.train()
    plain = sft(tmp_path / "plain")
    plain.train()
    assert all(a != b for a, b in zip(losses(run), losses(plain), strict=True))
    assert is_export_of(tmp_path / "out", run.model)
    assert run.state.log_history[-2]["qat/code_flips/mean"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    ids = torch.stack([row["input_ids"] for row in rows(2)])
    lockstep.align.compare(run.model.eval(), tmp_path / "out", {"input_ids": ids}).assert_aligned()
    with torch.no_grad():
        assert torch.isfinite(loaded(input_ids=ids).logits).all()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_head_that_the_trainer_does_not_call_is_not_trained_as_if_it_were_quantized(tmp_path):
    """TRL multiplies with lm_head.weight itself: in training and in evaluation the head would be in full precision."""
    run = sft(tmp_path, callback(ignore=()))
    before = state(run)
    with pytest.raises(RuntimeError, match=r"lm_head is quantized, but the loss was computed.*Name lm_head in ignore"):
        run.train()
    assert same(state(run), before)
    with pytest.raises(RuntimeError, match="lm_head is quantized"):
        sft(tmp_path, callback(ignore=()), eval_dataset=run.train_dataset).evaluate()
    plain = trained(tmp_path, callback(ignore=()))  # transformers' own trainer calls it
    assert plain.state.global_step == 3
