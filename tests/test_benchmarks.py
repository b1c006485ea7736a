"""The benchmarks run, at sizes at which their numbers mean nothing, and write what they promise."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BANDWIDTH = ["--shapes", "128x128", "64x128", "--paths", "lockstep", "compressed-tensors", "--rounds", "2"]
LAYER = ["--hidden", "128", "--intermediate", "256", "--tokens", "16", "--rounds", "2"]
MODEL = ["--hidden", "128", "--intermediate", "256", "--layers", "1", "--vocabulary", "64", "--sequence", "16"]
SMALL = ["--steps", "4", "--seeds", "2", "--hidden", "128", "--layers", "1", "--rows", "2", "--length", "128"]
RUNS = {
    "layer_step": (["--compiled-tokens", "16", "--paths", "lockstep", *LAYER], ["ratio", "median_ms"]),
    "eight_bit_step": (["--compiled-tokens", "16", "--paths", "lockstep FP8", "lockstep INT8", *LAYER], ["ratio"]),
    "fp8_gradient": (SMALL, ["loss", "cosine"]),
    "reuse": (["--micro-batches", "2", *LAYER], ["ratio", "median_ms", "micro_batches"]),
    "kernel_bandwidth": (BANDWIDTH, ["terabytes_per_second", "of_copy"]),
    "growth": (["--sizes", "128", "256", "--fixed", "128", "--rounds", "2"], ["microseconds"]),
    "kernel_agreement": (["--shapes", "128x256"], ["equal"]),
    "streaming_export": ([], ["seconds", "peak_rss_gib", "mb_per_second"]),
    "weight_sync": (["--layers", "1", "--rounds", "2"], ["median_ms", "ratio"]),
    "two_gpus": (["--precisions", "32-true", "--strategies", "ddp"], ["median_ms"]),
    "rollout_two_gpus": ([], ["median_ms", "gigabytes_per_second"]),
    "spikes": (["--steps", "10", "--base_steps", "4"], ["perplexity", "ratio"]),
    "warmup": (["--start-steps", "2"], ["loss"]),
    "whole_model": (["--modes", "eager", "--rounds", "2", *MODEL], ["tokens_per_second", "ratio"]),
}


@pytest.fixture
def harness(monkeypatch):
    """The module that the scripts share."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import harness

    return harness


def run(script, *arguments, out):
    """A script's JSON, after a run in a process of its own."""
    command = [sys.executable, BENCHMARKS / f"{script}.py", "--quick", "--device", "cpu", "--out", out, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("script", RUNS)
def test_script_writes_json_table_and_plot(script, tmp_path):
    arguments, keys = RUNS[script]
    printed = run(script, *arguments, out=tmp_path)
    content = json.loads((tmp_path / f"{script}_cpu.json").read_text())
    assert {"name", "claim", "environment", "options", "rows"} <= content.keys()
    assert {"hardware", "torch", "triton", "lockstep", "commit", "dirty", "date"} <= content["environment"].keys()
    measured = [row for row in content["rows"] if row["status"] == "ok"]
    assert any("lockstep" in row["path"] for row in measured)
    for row in measured:
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in keys), row
    for row in content["rows"]:
        assert row["status"] == "ok" or row["reason"], row
        assert row["path"] in printed
    assert (tmp_path / f"{script}_cpu.png").stat().st_size > 1000
    table = (tmp_path / f"{script}_cpu.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in table) == len(content["rows"]) + 1


def test_agreement_covers_weights_and_inputs(harness):
    """The reference against itself: all of ours is equal, and not all of what others compute."""
    import kernel_agreement

    options = argparse.Namespace(device=torch.device("cpu"), rows=[16], seeds=1)
    schemes = kernel_agreement.SCHEMES["reference"]
    rows = [row for one in schemes for row in kernel_agreement.measure("reference", one, (128, 256), options)]
    ours, others = ([row for row in rows if (row["path"] == "lockstep") == mine] for mine in (True, False))
    assert all(row["equal"] == 1 for row in ours)
    assert min(row["equal"] for row in others) < 0.7
    for row in rows:
        inputs = ", inputs " in row["spec"]
        assert (row["read_back"], row["equal_codes"]) == ((None, 1) if inputs else (1, None)), row
    assert {row["spec"].split()[0] for row in ours} == {"int4", "int8", "fp8_e4m3", "fp4_e2m1"}


def test_all_scripts_are_run_by_one_command(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import run as command

    assert set(command.SCRIPTS) == set(RUNS)


def test_a_case_that_raises_ends_in_its_row_and_leaves_the_others(harness):
    def broken():
        raise RuntimeError("first line\nsecond line")

    good, bad = harness.Case({"path": "good"}, lambda: None), harness.Case({"path": "bad"}, broken)
    harness.interleave([bad, good], torch.device("cpu"), rounds=3)
    assert bad.row == {"path": "bad", "status": "failed", "reason": "RuntimeError: first line"}
    assert good.row["status"] == "ok"
    assert len(good.seconds) == 3


def test_ratios_are_taken_within_a_round(harness):
    base, case = harness.Case({"status": "ok"}, print), harness.Case({"status": "ok"}, print)
    base.seconds, case.seconds = [1.0, 10.0, 2.0], [2.0, 20.0, 6.0]
    harness.add_ratios([case], base)
    assert case.row["ratio"] == 2.0


def test_extra_memory_is_against_bf16_in_the_same_mode(harness):
    rows = [
        {"path": "bf16", "mode": "eager", "peak_mib": 100.0},
        {"path": "bf16", "mode": "compiled", "peak_mib": 80.0},
        {"path": "lockstep", "mode": "compiled", "peak_mib": 85.0},
        {"path": "peer", "mode": "eager", "peak_mib": None},
    ]
    harness.add_extra_memory(rows, "bf16", "peak_mib", same=("mode",))
    assert [row.get("extra_peak_mib") for row in rows] == [0.0, 0.0, 5.0, None]


def test_the_commit_of_a_checkout_without_git_is_unknown(harness, monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.delenv("LOCKSTEP_COMMIT", raising=False)
    assert harness.commit() == {"commit": "unknown", "dirty": "unknown"}
    monkeypatch.setenv("LOCKSTEP_COMMIT", "abc")
    assert harness.commit()["commit"] == "abc"


def test_a_peer_that_is_missing_names_the_command_that_installs_it(harness):
    with pytest.raises(harness.Skipped, match=r"not installed: pip install some-peer==1\.0"):
        harness.require("some-peer", "no_such_module", "1.0")


def test_each_compiled_case_has_a_code_object_of_its_own(harness):
    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    one, other = harness.own_code(Twice()), harness.own_code(Twice())
    assert one(3) == other(3) == 6
    assert len({kind.forward.__code__ for kind in (type(one), type(other), Twice)}) == 3


def test_options_not_given_depend_on_quick(harness, monkeypatch):
    def parsed(*arguments) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["script", "--device", "cpu", *arguments])
        parser = harness.arguments(None, rounds=30, quick_rounds=5)
        parser.add_argument("--size", type=int)
        return harness.parse(parser, size=(1, 100))

    assert (parsed().size, parsed().rounds) == (100, 30)
    assert (parsed("--quick").size, parsed("--quick", "--rounds", "7").rounds) == (1, 7)
