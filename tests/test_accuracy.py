"""The accuracy study: its held-out text is held out, and what it writes is what it measured."""

import argparse
import fcntl
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "accuracy"


@pytest.fixture(scope="module")
def scripts():
    """The modules of the study, which are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS.parent)
        patch.syspath_prepend(SCRIPTS)
        import corpus
        import study
        import training

        yield argparse.Namespace(corpus=corpus, study=study, training=training)


# The text ------------------------------------------------------------------------------------------------------------

LINES = [f"this_is_a_long_line_that_nobody_else_would_write = {number}" for number in range(40)]
DOCUMENTS = st.lists(
    st.tuples(st.sampled_from([f"package{number}" for number in range(30)]), st.lists(st.sampled_from(LINES))),
    max_size=40,
).map(lambda found: [(package, "\n".join(lines)) for package, lines in found])


@settings(deadline=None)
@given(DOCUMENTS)
def test_no_held_out_file_is_in_training_nor_shares_much_with_it(scripts, documents):
    splits, dropped = scripts.corpus.split_by_package(documents)
    packages = {split: {package for package, _ in found} for split, found in splits.items()}
    assert not packages["train"] & packages["test"]
    assert not packages["tune"] & (packages["test"] | packages["train"])
    assert sum(map(len, splits.values())) + dropped == len(documents)
    seen = {line for _, text in splits["train"] for line in text.splitlines()}
    for _, text in splits["test"] + splits["tune"]:
        lines = text.splitlines()
        assert sum(line in seen for line in lines) <= 0.25 * len(lines)


def test_a_large_package_always_trains(scripts):
    held_out = next(f"p{number}" for number in range(100) if scripts.corpus._split_of(f"p{number}") == "test")
    small = [(f"other{number}", f"x = {number}\n" * 100) for number in range(200)]
    splits, _ = scripts.corpus.split_by_package([*small, (held_out, "y = 1\n" * 10_000)])
    assert held_out in {package for package, _ in splits["train"]}
    splits, _ = scripts.corpus.split_by_package([*small, (held_out, "y = 1\n")])
    assert held_out in {package for package, _ in splits["test"]}


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("import os\nprint(os.getcwd())\n", True),
        ("x = [" + "1, " * 400 + "]\n", False),  # a table in a line
        ("x = '" + "a" * 90 + "'\n" + "y = '" + "b" * 200 + "'\n", False),  # long lines throughout
        ("# ---------- ---------- ----------\n" * 5, False),
        ("", False),
    ],
)
def test_files_that_nobody_wrote_are_left_out(scripts, text, written):
    assert scripts.corpus.is_written(text) is written


# A whole run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(scripts, tmp_path, monkeypatch):
    """A study of a tiny model on a tiny text, to be worked through by one worker."""

    def sources():
        for number in range(60):
            yield f"package{number}", "".join(f"value_{number}_{line} = {line} + {number}\n" for line in range(60))

    monkeypatch.setattr(scripts.corpus, "installed_sources", sources)
    model = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    size = scripts.training.Size(
        {**model, "num_key_value_heads": 1, "head_dim": 64}, vocabulary=300, context=64, batch=2, base_steps=4,
        base_batch=2, base_rate=1e-2, steps=3, test_blocks=4, prompts=2, calibration=2, rates=rates(), rows=rows_of,
    )  # fmt: skip
    monkeypatch.setitem(scripts.study.SIZES, "small", size)
    monkeypatch.setattr(scripts.study.sys, "argv", ["study.py", "--size", "small", "--out", str(tmp_path)])
    options = argparse.Namespace(
        size="small", out=tmp_path, seeds=2, formats=["INT4 g128"], share=1.0, tune=True, device="cpu", worker=0
    )
    made = scripts.training.Study(tmp_path, size, "cpu")
    scripts.study.write(tmp_path / "base.json", made.train_base(1))
    return options


def rates():
    return {"bf16": (1e-3, 1e-2), "qat": (1e-3,), "qad": (1e-3, 1e-2)}


def rows_of(seeds):
    from rows import Row

    return [
        Row("bf16", seeds=seeds),
        Row("ptq", "INT4 g128", "rtn", seeds=seeds),
        Row("qad", "INT4 g128", seeds=seeds),
        Row("qad", "W8A8", seeds=seeds),  # whose format was not asked for
    ]


def test_a_study_measures_every_row_goes_on_where_it_stopped_and_writes_its_record(scripts, run, tmp_path, monkeypatch):
    scripts.study.work(run, deadline=0)
    assert not list((tmp_path / "rows").glob("*.json"))  # no time, nothing begun
    (tmp_path / "rows" / "base.claimed").touch()  # another worker is at it
    scripts.study.work(run, deadline=0)
    assert not list((tmp_path / "rows").glob("*.json"))
    (tmp_path / "rows" / "base.claimed").unlink()

    scripts.study.work(run, deadline=math.inf)
    done = {path.stem: path.stat().st_mtime_ns for path in (tmp_path / "rows").glob("*.json")}
    rows = [
        f"{label} {seed}"
        for label in ("bf16 same tokens", "INT4 g128 round to nearest", "INT4 g128 QAD")
        for seed in (0, 1)
    ]
    tried = ["try bf16 0.001 0", "try bf16 0.01 0", "try qad 0.001 0.5", "try qad 0.01 0.5", "try qad 0.01 1"]
    assert sorted(done) == sorted(["base", *rows, *tried])
    assert not list((tmp_path / "rows").glob("*.failed"))
    scripts.study.work(run, deadline=math.inf)
    assert {path.stem: path.stat().st_mtime_ns for path in (tmp_path / "rows").glob("*.json")} == done

    scripts.study.record(run)
    content = json.loads((tmp_path / "study.json").read_text())
    assert content["failed"] == []
    assert str(tmp_path) not in content["command"]
    by_name = {(row["label"], row["seed"]): row for row in content["rows"]}
    best = min(
        (trial for trial in content["trials"] if trial["trial"][0] == "qad"), key=lambda one: one["tune_perplexity"]
    )
    qad = by_name["INT4 g128 QAD", 0]
    assert [qad["learning_rate"], qad["kl_share"]] == best["trial"][1:]
    assert qad["aligned"] is True
    assert qad["served_perplexity"] == pytest.approx(qad["perplexity"], rel=1e-3)
    assert qad["train_tokens"] == by_name["bf16 same tokens", 0]["train_tokens"] == 3 * 2 * 64
    assert by_name["bf16 same tokens", 0]["kl"] < 1e-3  # its own reference, in bf16
    assert 4.1 < qad["bits_per_weight"] < 4.2
    assert "INT4 g128 QAD" in (tmp_path / "study.md").read_text()
    assert "INT4 g128 QAD" in (tmp_path / "study.html").read_text()


def test_a_row_that_fails_is_named_and_the_others_are_done(scripts, run, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.training.Study, "rounded", lambda *_: 1 / 0)
    run.tune, run.seeds = False, 1
    scripts.study.work(run, deadline=math.inf)
    scripts.study.record(run)
    content = json.loads((tmp_path / "study.json").read_text())
    assert content["failed"] == ["INT4 g128 round to nearest 0"]
    assert "ZeroDivisionError" in (tmp_path / "rows" / "INT4 g128 round to nearest 0.failed").read_text()
    assert {row["label"] for row in content["rows"]} == {"bf16, before", "bf16 same tokens", "INT4 g128 QAD"}


def test_fresh_text_is_kept_from_the_base_model(scripts, run, tmp_path):
    made = scripts.training.Study(tmp_path, scripts.study.SIZES["small"], "cpu")
    seen, fresh = ({tuple(block.tolist()) for block in part} for part in (made.seen, made.fresh))
    assert fresh
    assert not seen & fresh
    assert torch.equal(torch.cat([made.seen, made.fresh]), made.text.blocks("train", 64))


@pytest.mark.parametrize("problem", ["another size", "another run"])
def test_a_folder_holds_one_study_and_one_run_at_a_time(tmp_path, problem):
    if problem == "another size":
        (tmp_path / "size.json").write_text('{"context": 1}')
    command = [sys.executable, str(SCRIPTS / "study.py"), "--size", "small", "--out", str(tmp_path)]
    with (tmp_path / "lock").open("w") as lock:
        if problem == "another run":
            fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1
    said = {"another size": "holds a study of another size", "another run": "another run is at work in"}
    assert said[problem] in done.stderr
    assert not (tmp_path / "corpus").exists()
