"""The ablation: runs that differ in what they should alone, figures that are right, and faults that are told."""

from __future__ import annotations

import fcntl
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lockstep.callbacks import QATCallback
from lockstep.recipes import ablation, ablation_report
from lockstep.recipes.ablation import ARMS, parse

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*smaller than the logging interval.*")

TINY = """
    --device cpu --layers 1 --intermediate 128 --heads 2 --digits 1 --batch-size 64 --warmup-steps 60 --warmup-reward 2
    --prompts 8 --samples 8 --steps 10 --held-out 64 --evaluate-every 4
"""


def run(out: Path, *words: str) -> object:
    """The command, as a user gives it, with its runs in processes of their own; what it exits with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ablation", *TINY.split(), "--out", str(out), *words])
        patch.setattr(ablation.signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as status:
            ablation.main()
    return status.value.code


def edit(path: Path, change: Any) -> None:
    """Let `change` change each line of a curve."""
    rows = ablation_report.read_curve(path)
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# Runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """One arm, with both controls, all in processes of their own; one of them is killed with SIGKILL."""
    folder = tmp_path_factory.mktemp("ablation")
    assert run(folder, "--seeds", "1", "--arms", "qat-int4", "--jobs", "2") == 0
    return folder


def test_one_command_runs_everything_and_reports(out):
    results = json.loads((out / "results.json").read_text())
    found = results["arms"]["qat-int4"]["0"]
    assert found["rollouts"] == 10
    assert found["complete"]
    assert 0 < found["gap"] <= found["largest_gap"] < 0.1
    assert results["environment"]["torch"] == torch.__version__
    assert results["size"]["steps"] == 10
    assert results["starts"]["seed0"]["updates"] == 60
    assert "qat-int4" in (out / "table.txt").read_text()
    assert (out / "curves.png").stat().st_size > 10_000


def test_a_run_killed_between_two_updates_goes_on_as_if_nothing_had_been(out):
    """Every number of every step, from the weights, the moments and the samples on."""
    killed = json.loads((out / "seed0/killed/result.json").read_text())
    assert killed["resumed"]
    assert (out / "seed0/killed/checkpoints/last.ckpt").exists()
    checks = ablation_report.controls(out)
    assert checks["killed"] == {"rollouts": 10, "different": [], "largest_reward_difference": 0.0, "gpu": False}
    rows = ablation_report.read_curve(out / "seed0/killed/curve.jsonl")
    assert [row["rl/step"] for row in rows] == list(range(10))
    assert min(row["rl/gradient_norm"] for row in rows) > 0


def test_with_learning_rate_zero_the_control_sees_no_drift(out):
    assert ablation_report.controls(out)["lr0"] == {"rollouts": 10, "drifted": [], "unequal_tensors": []}


def test_the_controls_tell_what_drifted_and_what_differed(out, tmp_path):
    for name in ("lr0", "killed", "qat-int4"):
        for file in ("curve.jsonl", "result.json"):
            target = tmp_path / "seed0" / name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((out / "seed0" / name / file).read_bytes())

    def drift(row: dict[str, float]) -> None:
        row["held_out/mismatch/mean_abs"] += 1e-15 * (row["rl/step"] == 9)

    def differ(row: dict[str, float]) -> None:
        row["rl/reward"] += 0.25 * (row["rl/step"] == 7)

    edit(tmp_path / "seed0/lr0/curve.jsonl", drift)
    edit(tmp_path / "seed0/killed/curve.jsonl", differ)
    found = ablation_report.controls(tmp_path)
    assert found["lr0"]["drifted"] == ["held_out/mismatch/mean_abs"]
    assert found["killed"]["different"] == ["rl/reward"]
    said = " ".join(ablation_report.controls_in_words(found))
    assert "DRIFTED: held_out/mismatch/mean_abs" in said
    assert "DIFFERENT: rl/reward (reward by up to 0.25)" in said
    assert "not a digit" not in said
    result = json.loads((tmp_path / "seed0/killed/result.json").read_text())
    result["environment"]["cuda"] = "13.0"
    (tmp_path / "seed0/killed/result.json").write_text(json.dumps(result))
    said = " ".join(ablation_report.controls_in_words(ablation_report.controls(tmp_path)))
    assert "DIFFERENT: rl/reward (on a GPU sums are not repeatable; reward by up to 0.25)" in said


def test_what_is_done_is_not_run_again_and_other_settings_are_refused(out):
    before = {path: path.stat().st_mtime_ns for path in out.glob("seed0/*/result.json")}
    assert run(out, "--seeds", "1", "--arms", "qat-int4") == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("seed0/*/result.json")} == before
    refusal = run(out, "--seeds", "1", "--arms", "qat-int4", "--rate", "0.5")
    assert "holds runs with {'rate': 0.0003}" in str(refusal)
    refusal = run(out, "--seeds", "1", "--arms", "qat-int4", "--device", "cuda")
    assert "holds runs with {'device': 'cpu'}" in str(refusal)
    (out / "table.txt").unlink()
    assert run(out, "--report-only", "--device", "cuda", "--engine", "vllm") == 0
    assert "qat-int4" in (out / "table.txt").read_text()
    results = json.loads((out / "results.json").read_text())
    assert (results["device"], results["engine"], results["as_served"]) == ("cpu", "embedded", False)


def test_a_folder_of_before_devices_were_noted_is_still_reported(out, tmp_path):
    for path in out.glob("seed0/*/*.json*"):
        target = tmp_path / path.relative_to(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    settings = json.loads((out / "settings.json").read_text())
    del settings["device"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert run(tmp_path, "--report-only") == 0
    assert json.loads((tmp_path / "results.json").read_text())["device"] is None
    assert run(tmp_path, "--seeds", "1", "--arms", "qat-int4") == 0
    assert json.loads((tmp_path / "settings.json").read_text())["device"] == "cpu"


def test_two_processes_do_not_write_one_run(tmp_path):
    """The command was killed, its run lives on, and the command is given again."""
    options, size = parse([*TINY.split(), "--out", str(tmp_path), "--run", "start"])
    (tmp_path / "seed0/start").mkdir(parents=True)
    with (tmp_path / "seed0/start/lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match=r"seed0/start: another process is at this run"):
            ablation.run_one(options, size)
    assert [path.name for path in (tmp_path / "seed0/start").iterdir()] == ["lock"]


def test_a_run_that_fails_is_named_with_the_end_of_its_log(tmp_path, capsys):
    """A start that cannot be built: heads that do not divide the width. Its arms are not waited for."""
    status = run(tmp_path, "--seeds", "1", "--arms", "bf16-bf16", "--no-controls", "--heads", "3")
    assert status == "failed: seed0/start"
    said = capsys.readouterr().out
    assert "seed 0 start: FAILED" in said
    assert "hidden size (128) is not a multiple" in said


# The arms ----------------------------------------------------------------------------------------------------------


def test_arms_differ_in_what_trains_quantized_and_what_is_served_alone(out, tmp_path, monkeypatch):
    """Same start, same problems, same samples' seeds, same rates: else the arms would not be comparable."""
    seen: dict[str, dict[str, Any]] = {}
    original = ablation.Curve.on_train_batch_end

    def look(self, trainer, pl_module, outputs, batch, batch_idx):
        original(self, trainer, pl_module, outputs, batch, batch_idx)
        facts = seen[self.path.parent.name]
        facts["updates"] = trainer.global_step
        facts["asked"] = [one.prompt for one in pl_module.answered[0]]
        facts["seed"] = pl_module._seed("sample", 0)

    def start(self, trainer, pl_module):
        live = pl_module.model.state_dict()
        settings = {name: value for name, value in pl_module.hparams.items() if name != "rollout"}
        seen[self.path.parent.name] = {
            "weights": {name: tensor.clone() for name, tensor in live.items()},
            "settings": settings,
            "rollout": pl_module.rollout,
            "qat": [str(one.scheme) for one in trainer.callbacks if isinstance(one, QATCallback)],
        }

    monkeypatch.setattr(ablation.Curve, "on_train_start", start)
    monkeypatch.setattr(ablation.Curve, "on_train_batch_end", look)
    _, size = parse([*TINY.split(), "--steps", "1"])
    for name in ablation.FOUR:
        ablation.train_arm(name, size, 0, "cpu", "embedded", out / "seed0/start", tmp_path / name)
    baseline = seen["bf16-bf16"]
    for name, facts in seen.items():
        assert {"settings", "updates", "asked", "seed"} <= facts.keys()
        for same in ("settings", "updates", "asked", "seed"):
            assert facts[same] == baseline[same], (name, same)
        assert facts["weights"].keys() == baseline["weights"].keys()
        assert all(torch.equal(one, baseline["weights"][key]) for key, one in facts["weights"].items()), name
    int4 = str(ablation.lockstep.Scheme.of("W4A16"))
    what = {name: (facts["qat"], facts["rollout"] and str(facts["rollout"])) for name, facts in seen.items()}
    assert what == {
        "bf16-bf16": ([], None),
        "qat-bf16": ([int4], None),
        "bf16-int4": ([], int4),
        "qat-int4": ([int4], int4),
    }


def test_where_both_sides_hold_the_same_weights_the_gap_is_the_kernels_noise(out, tmp_path):
    """The point of it all, in small: only the two mismatched arms are off by the grid."""
    _, size = parse([*TINY.split(), "--steps", "2"])
    gaps = {}
    for name in ablation.FOUR:
        ablation.train_arm(name, size, 0, "cpu", "embedded", out / "seed0/start", tmp_path / name)
        curve = ablation_report.read_curve(tmp_path / name / "curve.jsonl")
        gaps[name] = curve[0]["held_out/mismatch/mean_abs"]
    assert gaps["qat-int4"] < 2 * gaps["bf16-bf16"]
    assert min(gaps["qat-bf16"], gaps["bf16-int4"]) > 4 * gaps["bf16-bf16"]


def test_computed_as_served_only_the_grid_is_left(out, tmp_path):
    """FP8 as well, whose inputs are quantized: rounded otherwise, they take other codes."""
    _, size = parse([*TINY.split(), "--steps", "2"])
    gaps = {}
    for name in ARMS:
        ablation.train_arm(name, size, 0, "cpu", "embedded", out / "seed0/start", tmp_path / name, as_served=True)
        gaps[name] = max(row["mismatch/max_abs"] for row in ablation_report.read_curve(tmp_path / name / "curve.jsonl"))
    assert max(gaps[name] for name in ("bf16-bf16", "qat-int4", "qat-fp8")) <= 2**-22
    assert min(gaps[name] for name in ("qat-bf16", "bf16-int4", "bf16-fp8")) > 1e-3


# The report --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", range(1, 11))
def test_the_quantiles_are_students(freedom):
    """The density, integrated: 2.5 % lie beyond the quantile."""
    x = torch.linspace(0, ablation_report.T975[freedom - 1], 100_001, dtype=torch.float64)
    density = torch.distributions.StudentT(torch.tensor(float(freedom), dtype=torch.float64)).log_prob(x).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(0.475, abs=2e-5)


def test_the_interval_of_three_seeds():
    middle, half = ablation_report.interval([0.5, 0.6, 0.7])
    assert middle == pytest.approx(0.6)
    assert half == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert math.isnan(ablation_report.interval([0.5])[1])


def rows(rewards: list[float], gap: float = 0.01) -> list[dict[str, float]]:
    return [
        {
            "rl/step": float(step),
            "rl/reward": reward,
            "mismatch/mean_abs": gap * (step + 1),
            "held_out/accuracy": reward,
        }
        for step, reward in enumerate(rewards)
    ]


def test_figures_of_a_run():
    found = ablation_report.figures(
        rows([0.1] * 10 + [0.5] * 8 + [0.8, 0.6]), {"accuracy": 0.9, "served_accuracy": 0.7}, 20
    )
    assert found["reward"] == pytest.approx(0.7)
    assert found["first_reward"] == 0.1
    assert (found["accuracy"], found["served_accuracy"]) == (0.9, 0.7)
    assert found["gap"] == pytest.approx(0.195)
    assert found["largest_gap"] == pytest.approx(0.2)
    assert not found["collapsed"]
    assert ablation_report.figures(rows([0.4, 0.6, 0.8, 0.8, 0.3, 0.3]), {}, 20)["collapsed"]
    assert not ablation_report.figures(rows([0.4, 0.6, 0.8, 0.8, 0.5, 0.5]), {}, 20)["collapsed"]


def test_the_table_compares_seed_by_seed_and_marks_what_is_unfinished(tmp_path):
    """Seeds differ by more than arms do: only differences within a seed show a small effect."""
    for seed, level in enumerate((0.3, 0.5, 0.7)):
        for arm, lead in (("bf16-bf16", 0.0), ("qat-int4", 0.05)):
            folder = tmp_path / f"seed{seed}" / arm
            folder.mkdir(parents=True)
            text = "".join(json.dumps(row) + "\n" for row in rows([0.2] * 5 + [level + lead] * 5))
            (folder / "curve.jsonl").write_text(text + '{"rl/step": 10, "rl/rew')
            if (seed, arm) != (2, "qat-int4"):
                (folder / "result.json").write_text(json.dumps({"accuracy": level + lead, "served_accuracy": 0.1}))
    found = ablation_report.collect(tmp_path, 10)
    console = Console(width=250, record=True, file=(tmp_path / "shown").open("w"))
    console.print(ablation_report.table(found))
    lines = {line.split()[1]: line for line in console.export_text().splitlines() if "int4" in line or "bf16" in line}
    assert "+0.050 ± 0.000" in lines["qat-int4"]
    assert "rollouts so far: seed 2: 10" in lines["qat-int4"]
    assert "0.500 ± 0.497" in lines["bf16-bf16"]
    assert "rollouts so far" not in lines["bf16-bf16"]
    ablation_report.plot(tmp_path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_smoothing_looks_back_only():
    smooth = ablation_report._smooth(torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 6.0]]))
    assert smooth[0].tolist() == pytest.approx([0, 0.5, 2 / 3, 0.75, 0.8, 2.0])


def test_every_arm_is_reported():
    assert [*ablation_report.STYLES] == [*ARMS]


def test_every_arm_has_a_scheme_or_none_on_each_side():
    assert {name: (arm.trains, arm.serves) for name, arm in ARMS.items()} == {
        "bf16-bf16": (None, None),
        "qat-bf16": ("W4A16", None),
        "bf16-int4": (None, "W4A16"),
        "qat-int4": ("W4A16", "W4A16"),
        "qat-fp8": ("FP8_DYNAMIC", "FP8_DYNAMIC"),
        "bf16-fp8": (None, "FP8_DYNAMIC"),
    }
