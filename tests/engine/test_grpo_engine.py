"""GRPO with rollouts by the real engine: vLLM on the CPU, in its own environment, which has Lightning too."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from lockstep.recipes.ablation import FOUR
from lockstep.recipes.ablation_report import read_curve

pytestmark = pytest.mark.engine

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-engine" / "bin" / "python"


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Three rollouts of each arm."""
    if not PYTHON.exists():
        pytest.fail(f"the engine's environment {PYTHON.parents[1]} is missing: run `make test-engine`.")
    folder = tmp_path_factory.mktemp("grpo")
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    done = subprocess.run(
        [PYTHON, HERE / "grpo.py", folder], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder / "seed0"


def gaps(out: Path, arm: str) -> list[float]:
    return [row["mismatch/mean_abs"] for row in read_curve(out / arm / "curve.jsonl")]


@pytest.mark.parametrize("arm", FOUR)
def test_an_arm_trains_and_the_engine_holds_the_last_weights_bit_for_bit(out, arm):
    rows = read_curve(out / arm / "curve.jsonl")
    assert [row["rl/step"] for row in rows] == [0, 1, 2]
    assert min(row["rl/gradient_norm"] for row in rows) > 0
    result = json.loads((out / arm / "result.json").read_text())
    assert result["unequal_tensors"] == []


def test_only_where_the_weights_differ_the_gap_is_wide(out):
    """What vLLM says of each token it sampled, against the trainer."""
    floor = max(gaps(out, "bf16-bf16"))
    assert max(gaps(out, "qat-int4")) < 2 * floor
    assert min(*gaps(out, "qat-bf16"), *gaps(out, "bf16-int4")) > 2 * floor
