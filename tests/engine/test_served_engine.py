"""Perplexity as trained, restored, in transformers and in vLLM: `benchmarks/accuracy/served.py` on two small models."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lockstep
from lockstep import Scheme
from lockstep.recipes.evaluate import evaluate, line_ends_of
from lockstep.recipes.text import TextData

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accuracy" / "served.py"
SCHEMES = {"INT4 channel": Scheme.preset("W4A16", strategy="channel"), "W8A8": Scheme.preset("W8A8")}
KERNELS = {"INT4 channel": "CPUWNA16LinearKernel", "W8A8": "CPUInt8ScaledMMLinearKernel"}
WAYS = ["trained", "restored", "reference", "transformers", "vLLM"]


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        import served

        yield served


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A Qwen3, trained for a few steps with each scheme: folders ``NAME`` and ``NAME masters``; and a ``corpus``."""
    out = tmp_path_factory.mktemp("served")
    data = TextData(vocab_size=512, block_size=64, batch_size=8, max_bytes=400_000)
    data.setup()
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config = AutoConfig.for_model("qwen3", vocab_size=len(data.tokenizer), tie_word_embeddings=True, **sizes, **heads)
    for name, scheme in SCHEMES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        lockstep.prepare(model, scheme)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for batch in islice(data.train_dataloader(), 40):
            with torch.autocast("cpu", torch.bfloat16):
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        lockstep.export.save_pretrained(model, out / name, tokenizer=data.tokenizer)
        lockstep.unprepare(model)
        model.save_pretrained(out / f"{name} masters")
    tokens = torch.cat([batch["input_ids"].flatten() for batch in islice(data.val_dataloader(), 8)]).numpy()
    (out / "corpus").mkdir()
    data.tokenizer.save_pretrained(out / "corpus")
    for split in ("train", "tune", "test"):
        np.save(out / "corpus" / f"{split}.npy", tokens.astype("uint16"))
    (out / "corpus" / "facts.json").write_text("{}")
    return out


@pytest.fixture(scope="module")
def rows(place):
    """By folder and way, what the script wrote."""
    folders, masters = ([place / f"{name}{more}" for name in SCHEMES] for more in ("", " masters"))
    words = ["--text-from", place / "corpus", "--blocks", "16", "--out", place]
    command = [sys.executable, SCRIPT, *folders, "--masters", *masters, *words]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    written = (place / "served_perplexity_cpu.json").read_text()
    assert str(place) not in written + (place / "served_perplexity_cpu.md").read_text()
    return {(row["folder"], row["path"]): row for row in json.loads(written)["rows"]}


@pytest.mark.parametrize("name", SCHEMES)
def test_the_engine_serves_the_perplexity_that_was_trained(rows, name):
    """Up to the noise of bf16, which the standard error tells; by the kernel that was meant."""
    assert [way for folder, way in rows if folder == name] == WAYS
    assert all(rows[name, way]["status"] == "ok" for way in WAYS), rows
    assert KERNELS[name] in rows[name, "vLLM"]["note"]
    trained, served = (rows[name, way]["perplexity"] for way in ("trained", "vLLM"))
    print(f"{name}: trained {trained:.6f}, served {served:.6f}")
    assert abs(math.log(served / trained)) < 1e-3
    assert rows[name, "trained"]["tokens"] == 16 * 63


@pytest.mark.parametrize("name", SCHEMES)
def test_trained_is_what_the_study_measures(rows, place, name, script):
    """`evaluate` on the same blocks; else the table compares something that nobody trained or reports."""
    model = AutoModelForCausalLM.from_pretrained(place / f"{name} masters", dtype=torch.float32)
    blocks = script.corpus(place / "corpus", 0).blocks("test", 64)[:16]
    ends = line_ends_of(script.load_tokenizer(str(place / name)))
    unquantized = evaluate(model, blocks, ends).perplexity
    lockstep.prepare(model, SCHEMES[name])
    measured = evaluate(model, blocks, ends).perplexity
    assert rows[name, "trained"]["perplexity"] == pytest.approx(measured, rel=1e-6)
    assert measured != pytest.approx(unquantized, rel=1e-5)


def test_masters_of_another_model_are_refused(place, script):
    with pytest.raises(
        ValueError, match=r"layers\.0.* of W8A8 masters is not quantized to the words that INT4 channel"
    ):
        script.trained(place / "INT4 channel", place / "W8A8 masters")


def test_what_the_engine_refuses_is_told_with_its_reason_beside_the_other_ways(script, tmp_path):
    model = tiny_llama(torch.float32)
    lockstep.prepare(model, "W8A16")
    lockstep.export.save_pretrained(model, tmp_path / "W8A16")
    rows = [*script.measure(tmp_path / "W8A16", "-", torch.arange(32).view(2, 16))]
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "failed"]
    assert "Quant type (uint8b128) not supported by CPUWNA16" in rows[-1]["reason"]


def test_what_cannot_be_asked_for_is_said(place, tmp_path, monkeypatch, capsys, script):
    def said(*words):
        monkeypatch.setattr(sys, "argv", ["served.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            script.main()
        assert end.value.code not in (None, 0)
        return f"{end.value} {capsys.readouterr().err}"

    folder, text = place / "W8A8", ["--text-from", place / "corpus"]
    assert "W8A8 masters is not an exported folder" in said(place / "W8A8 masters", *text)
    assert "takes from 2 to 64 tokens" in said(folder, "--context", 128, *text)
    assert "--blocks 9999 are more" in said(folder, "--blocks", 9999, *text)
    assert "has no facts.json" in said(folder, "--text-from", tmp_path)
    assert "is no folder" in said(folder, "--masters", tmp_path / "none", *text)
    assert "give one for each" in said(folder, "--masters", "-", "-", *text)
    AutoTokenizer.from_pretrained(folder).train_new_from_iterator(["other"], 300).save_pretrained(place / "corpus")
    assert "another tokenizer" in said(folder, *text)
    monkeypatch.setattr(script, "PYTHON", script.ROOT / "none")
    assert "make test-engine" in said(folder, *text)


@pytest.mark.parametrize(
    ("value", "other", "n"),
    [(7.0909, 7.0909, 16), (7.09097, 7.09083, 4), (7.0910, 7.0917, 3), (9.9996, 10.0002, 4), (71.2, 7.12, 0)],
)
def test_digits(script, value, other, n):
    assert script.digits(value, other) == n
