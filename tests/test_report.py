"""The report: what it finds in runs, what it computes, what it says, and that nothing is passed over in silence."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from models import tiny_llama

import lockstep
from lockstep.cli import main
from lockstep.report import compare, figures, write
from lockstep.report.html import STYLE, page
from lockstep.report.sources import Curve, Found, Row, Study, read

# A synthetic study: every number follows from these few, and none of them was measured.
BF16, WEIGHTS = 7.5, 84_934_656
BITS = {"W4A16 g128": 4.125, "W4A16 g32": 4.5, "W4A16 channel": 4.02, "W8A8": 8.02, "NVFP4": 4.5}
LOST = {"W4A16 g128": 0.0117, "W4A16 g32": 0.0085, "W4A16 channel": 0.0203, "W8A8": 0.0012, "NVFP4": 0.021}
KEPT = {"RTN": 1.0, "GPTQ": 0.62, "AWQ": 0.7, "HQQ": 0.8, "QAT": 0.26, "QAT learned scales": 0.2, "QAD": 0.02}
TOKENS = 19_660_800


def study(blocks: int = 2) -> dict:
    """A record as benchmarks/accuracy writes it. Of `KEPT` each method keeps that share of what rounding loses."""
    rows = []
    for seed in range(3):
        shift = 0.002 * (seed - 1)
        rows.append(
            {"label": "bf16 + the same tokens", "scheme": "bf16", "method": "bf16", "seed": seed, "baseline": "bf16"}
            | {"perplexity": BF16 + shift, "accuracy": 0.61, "agreement": 1.0, "kl": 0.0, "exact_line": 0.31}
            | {"weight_bytes": 2 * WEIGHTS, "bits_per_weight": 16.0, "train_seconds": 40.0, "train_tokens": TOKENS}
            | {"served_perplexity": BF16 + shift, "parses": 0.9, "format": "bf16"}
            | {"curve": [[step, 2.02 + 0.3 * math.exp(-step / 60) + shift] for step in range(0, 301, 10)]}
        )
        for format, loss in LOST.items():
            for method, kept in KEPT.items():
                trained = method.startswith("QA")
                if seed and not trained:
                    continue
                noise = shift * (1 + 0.2 * kept) if trained else -0.002
                perplexity = BF16 * (1 + loss * kept) + noise
                rows.append(
                    {"label": f"{format} {method}", "scheme": format, "method": method, "seed": seed, "format": format}
                    | {"perplexity": perplexity, "accuracy": 0.61 - loss * kept / 2, "kl": loss * kept / 2}
                    | {"agreement": 1 - 5 * loss * kept, "exact_line": 0.31 - loss * kept, "parses": 0.9}
                    | {"weight_bytes": int(WEIGHTS * BITS[format] / 8), "bits_per_weight": BITS[format]}
                    | {"train_seconds": 46.0 if trained else 0.0, "train_tokens": TOKENS if trained else 0}
                    | {"served_perplexity": perplexity, "baseline": "rtn" if method == "RTN" else None}
                )
                if trained:
                    rows[-1]["command"] = f"python benchmarks/accuracy/run.py --method {method} --seed {seed}"
                    rows[-1]["curve"] = [
                        [step, 2.02 + loss * kept + 0.32 * math.exp(-step / 70) + shift] for step in range(0, 301, 10)
                    ]
                    rows[-1]["layers"] = {
                        f"model.layers.{block}.{kind}": 20 - 100 * loss + kept + 0.3 * ((block * 7 + place * 5) % 11)
                        for block in range(blocks)
                        for place, kind in enumerate(KINDS)
                    }
    return {
        "kind": "lockstep-study",
        "environment": {"gpu": "none, synthetic", "torch": "0.0", "versions": {"lockstep": "0.1.0"}},
        "model": {"name": "synthetic 100 M", "data": "no text at all"},
        "rows": rows,
        "findings": ["All numbers of this record are made up & <none> was measured."],
    }


KINDS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


@pytest.fixture
def record(tmp_path) -> Path:
    path = tmp_path / "study.json"
    path.write_text(json.dumps(study()))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with everything in it, each file written by whoever writes it for a user."""
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from transformers import TrainerState

    from lockstep.align.page import append
    from lockstep.calibrate import CalibrationReport, LayerRange, Outlier
    from lockstep.sensitivity import Cost, SensitivityReport

    folder = tmp_path_factory.mktemp("all") / "int4"
    loggers = CSVLogger(folder, "csv"), TensorBoardLogger(folder, "tensorboard")
    for step in range(0, 200, 20):
        values = {"train/loss": 4 - step / 100, "qat/sqnr_db/mean": 20.0, "qat/code_flips/mean": 0.01}
        for logger in loggers:
            logger.log_metrics(
                values | {f"qat/sqnr_db/layers.{block}.mlp.up_proj": 18.0 + block for block in range(3)}, step
            )
    for logger in loggers:
        logger.log_metrics({"val/loss": 2.25, "val/perplexity": math.exp(2.25)}, 199)
        logger.save()
        logger.finalize("success")
    (folder / "config.yaml").write_text("seed_everything: 0\nmodel: <tiny>\n")
    for step in (10, 20):
        state = TrainerState(global_step=step)
        state.log_history = [{"loss": 3 - at / 10, "step": at, "epoch": 0.1} for at in range(5, step + 1, 5)]
        state.log_history += [{"eval_loss": 2.5 - step / 100, "step": step}, {"train_loss": 2.9, "step": step}]
        (folder / "hf" / f"checkpoint-{step}").mkdir(parents=True)
        state.save_to_json(folder / "hf" / f"checkpoint-{step}" / "trainer_state.json")

    model = tiny_llama()
    lockstep.prepare(model, "W4A16")
    lockstep.export.save_pretrained(model, folder / "exported")
    result = lockstep.align.compare(model, folder / "exported", torch.arange(32).view(1, 32))
    result.save(folder / "align.json")
    rows = (LayerRange("layers.0.up_proj", 3.5, 0.01, 0.002, (Outlier(7, 31.25),)),)
    CalibrationReport("minmax", 4, rows).save(folder / "calibration.json")
    costs = (Cost("layers.0", ("layers.0.a",), "W4A16", 0.0625, 10), Cost("layers.0", ("layers.0.a",), "-", 0.0, 40))
    SensitivityReport(3.5, costs).save(folder / "sensitivity.json")
    (folder / "plan.json").write_text(json.dumps(lockstep.plan(model.config, "W4A16").json()))
    gap = dict.fromkeys(("mean_abs", "p99_abs", "max_abs", "k1", "k3", "ess", "ess_sequence"), 0.0123)
    gap |= dict.fromkeys(("perplexity_ratio", "ratio_mean", "ratio_max", "pearson"), 1.0)
    line = {"step": 5, "version": 1, "gap": gap, "prompt": None, "tokens": 64, "floor": 0.01, "limit": 0.02}
    append(folder / "alignment.jsonl", line)
    return folder


class Text(HTMLParser):
    """What of a page is read: its words, its tags, and what it refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.all = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data") and value]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def text_of(path: Path) -> Text:
    found = Text(path.read_text(encoding="utf-8"))
    assert found.open == []  # every tag is closed, and in order
    return found


# The page ------------------------------------------------------------------------------------------------------------


def test_a_study_becomes_a_page_that_says_who_won(record, tmp_path):
    assert write([record], tmp_path / "new" / "report.html", "Synthetic") == tmp_path / "new" / "report.html"
    found = text_of(tmp_path / "new" / "report.html")
    assert (
        "35 rows in 5 formats were compared against bf16 + the same tokens (perplexity 7.5), up to 3 seeds" in found.all
    )
    assert "Lowest perplexity at equal bytes: QAD in 5 of 5 formats." in found.all
    assert "smallest within 1 % of bf16's perplexity is W4A16 channel QAD (40.7 MiB, 25% of bf16's bytes)" in found.all
    for heading in ("Comparison", "Quality against bytes", "Over the steps", "By layer", "What it costs to make"):
        assert heading in found.words
    for absent in ("Runs", "Sizes and memory", "Does it serve what it trained?"):
        assert absent not in found.words
    assert "All numbers of this record are made up & <none> was measured." in found.words  # and not markup
    assert "python benchmarks/accuracy/run.py --method QAD --seed 2" in found.words


def test_everything_in_a_folder_is_on_the_page(run, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(out), "--title", "All of <it>"]) == 0
    assert capsys.readouterr() == (f"written: {out}\n", "")
    found = text_of(out)
    for heading in ("All of <it>", "Runs", "Over the steps", "By layer", "Does it serve what it trained?"):
        assert heading in found.words
    for heading in ("The gap between trainer and engine", "Sizes and memory", "Environment and commands"):
        assert heading in found.words
    for said in (
        "1 alignment report: every checkpoint computes",
        "seed_everything: 0 model: <tiny>",
        "31.2",
        "aligned",
    ):
        assert said in found.all
    assert "2 runs were compared; int4 is best: val/loss is 2.25 at the end" in found.all
    assert "Comparison" not in found.words


def test_the_page_needs_nothing_from_elsewhere(run, record, tmp_path):
    page_of_all = text_of(write([run, record], tmp_path / "report.html"))
    assert page_of_all.links
    assert [link for link in page_of_all.links if not link.startswith(("#", "data:image/png;base64,"))] == []
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html
    assert not re.search(r"url\((?!#)|@import", html)


def test_the_same_runs_give_the_same_page(run, tmp_path):
    pages = [write([run], tmp_path / f"{name}.html").read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


def test_figures_take_the_text_colour_of_the_page(record):
    """A dark page would show black letters on black."""
    lines = compare.lines(read([record]).studies[0])
    drawn = figures.inline(figures.tradeoff(lines, compare.front(lines)))
    assert "currentColor" in drawn
    assert figures.INK not in drawn
    assert "#000000" not in drawn


# What is computed ----------------------------------------------------------------------------------------------------


def test_increase_and_share_won_back_are_paired_by_seed(record):
    """By hand: each seed against bf16 of its own seed, and the one round-to-nearest row of the format."""
    lines = {line.label: line for line in compare.lines(read([record]).studies[0])}
    increases, shares = [], []
    for seed in range(3):
        bf16 = BF16 + 0.002 * (seed - 1)
        quantized = BF16 * (1 + LOST["W4A16 g128"] * KEPT["QAT"]) + 0.002 * (seed - 1) * (1 + 0.2 * KEPT["QAT"])
        rounded = BF16 * (1 + LOST["W4A16 g128"]) - 0.002
        increases.append(100 * (quantized / bf16 - 1))
        shares.append(100 * (rounded - quantized) / (rounded - bf16))
    values = lines["W4A16 g128 QAT"].values
    assert values["increase"] == pytest.approx(spread(increases))
    assert values["won_back"] == pytest.approx(spread(shares))
    assert values["cost"].mean == pytest.approx(46 / 40)
    assert lines["W4A16 g128 GPTQ"].values["won_back"].mean == pytest.approx(100 * (1 - KEPT["GPTQ"]), abs=1e-9)
    assert lines["W4A16 g128 GPTQ"].values["won_back"].deviation is None
    assert "won_back" not in lines["W4A16 g128 RTN"].values
    assert "cost" not in lines["W4A16 g128 GPTQ"].values


def spread(values):
    tensor = torch.tensor(values, dtype=torch.float64)
    return (tensor.mean().item(), tensor.std().item())


def of_rows(*rows: dict) -> list[compare.Line]:
    filled = [{"scheme": "", "method": row["label"]} | row for row in rows]
    return compare.lines(Study("s.json", {}, {}, tuple(Row(**row) for row in filled), ()))


def test_bf16_with_the_same_tokens_is_what_a_trained_row_is_compared_with():
    """Not bf16 as it was before, which would credit QAT for training longer."""
    lines = of_rows(
        {"label": "bf16", "perplexity": 8.0, "baseline": "bf16", "train_tokens": 0},
        {"label": "bf16 longer", "perplexity": 7.0, "baseline": "bf16", "train_tokens": 100},
        {"label": "QAT", "perplexity": 7.7, "train_tokens": 100, "format": "int4"},
        {"label": "GPTQ", "perplexity": 7.7, "format": "int4"},
    )
    found = {line.label: line.values["increase"].mean for line in lines}
    assert found == pytest.approx({"bf16": 100 / 7, "bf16 longer": 0, "QAT": 10, "GPTQ": 10})


def test_rows_of_another_format_have_their_own_rounding():
    lines = of_rows(
        {"label": "bf16", "perplexity": 7.0, "baseline": "bf16", "format": "bf16"},
        {"label": "RTN 4", "perplexity": 8.0, "baseline": "rtn", "format": "4"},
        {"label": "QAT 4", "perplexity": 7.5, "format": "4"},
        {"label": "QAT 3", "perplexity": 7.5, "format": "3"},
        {"label": "RTN 8", "perplexity": 7.0, "baseline": "rtn", "format": "8"},
        {"label": "QAT 8", "perplexity": 6.9, "format": "8"},
    )
    assert {line.label: line.mean("won_back") for line in lines if "QAT" in line.label} == {
        "QAT 4": 50.0,
        "QAT 3": None,
        "QAT 8": None,  # rounding lost nothing
    }


def test_the_front_holds_what_no_other_row_beats():
    rows = {"small": (1, 9.0), "worse and larger": (2, 9.5), "middle": (3, 8.0), "as good, larger": (4, 8.0)}
    lines = of_rows(
        *({"label": name, "weight_bytes": size, "perplexity": value} for name, (size, value) in rows.items()),
        {"label": "best", "weight_bytes": 9, "perplexity": 7.0},
        {"label": "no size", "perplexity": 1.0},
    )
    assert [line.label for line in compare.front(lines)] == ["small", "middle", "best"]


@pytest.mark.parametrize(("gap", "doubt"), [(0.001, "within the spread of the seeds"), (0.5, "")])
def test_a_lead_within_the_spread_of_the_seeds_is_called_so(gap, doubt):
    rows = [{"label": "bf16", "perplexity": 7.0, "baseline": "bf16"}]
    for seed, noise in enumerate((-0.1, 0.0, 0.1)):
        rows.append({"label": "A", "perplexity": 7.2 + noise, "seed": seed, "format": "4"})
        rows.append({"label": "B", "perplexity": 7.2 + gap + noise, "seed": seed, "format": "4"})
    (won,) = compare.winners(of_rows(*rows))
    assert (won.best.label, won.next.label, won.doubt) == ("A", "B", doubt)


def test_what_a_reader_must_know_is_a_warning(tmp_path):
    content = study()
    content["rows"] = [row for row in content["rows"] if row["baseline"] != "bf16"]
    content["rows"][4]["served_perplexity"] += 0.01
    (tmp_path / "s.json").write_text(json.dumps(content))
    (no_bf16, served) = compare.warnings(read([tmp_path / "s.json"]))
    assert "marks no row as its bf16 baseline" in no_bf16
    assert served.startswith("W4A16 g128 QAT, seed 0: served perplexity is 7.5")
    assert "increase" not in compare.lines(read([tmp_path / "s.json"]).studies[0])[0].values
    assert text_of(write([tmp_path / "s.json"], tmp_path / "r.html"))


def test_one_seed_and_a_loss_that_is_not_finite_are_warnings():
    rows = tuple(Row("QAT", "", "QAT", perplexity=7.0, train_seconds=3.0, baseline=one) for one in (None,))
    found = Found(studies=[Study("s.json", {}, {}, rows, ())])
    found.curves.append(Curve("run", "train/loss", ((1, 2.0), (2, math.nan))))
    said = compare.warnings(found)
    assert "One seed only, so no spread is known: QAT." in said
    assert "run: train/loss is not finite at step 2." in said


# What is read --------------------------------------------------------------------------------------------------------


def test_loggers_of_the_same_run_count_once(run):
    """Lightning's CSV and TensorBoard, in fp64 and fp32, hold the same curves."""
    found = read([run])
    (loss,) = [curve for curve in found.curves if curve.metric == "train/loss"]
    assert loss.points[0] == (0, 4.0)
    assert len(loss.points) == 10
    assert loss.run == "int4"
    assert found.layers() == {"int4": {f"layers.{block}.mlp.up_proj": 18.0 + block for block in range(3)}}
    assert (found.damaged, found.skipped) == ([], [])


def test_runs_that_log_the_same_numbers_are_all_kept(tmp_path):
    """Two arms whose codes never flip are two runs; a second logger that a kill cut off is not another one."""
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    for arm in ("a", "b"):
        loggers = CSVLogger(tmp_path / "runs" / arm, "csv"), TensorBoardLogger(tmp_path / "runs" / arm, "tensorboard")
        for step in range(3):
            for logger in loggers[: 1 if step == 2 else 2]:
                logger.log_metrics({"qat/code_flips/mean": 0.0, "train/loss": 2.0 + (arm == "b")}, step)
        for logger in loggers:
            logger.save()
    found = read([tmp_path / "runs"])
    assert sorted((curve.run, curve.metric, len(curve.points)) for curve in found.curves) == [
        ("runs/a", "qat/code_flips/mean", 3),
        ("runs/a", "train/loss", 3),
        ("runs/b", "qat/code_flips/mean", 3),
        ("runs/b", "train/loss", 3),
    ]


def test_versions_of_a_run_keep_their_names(tmp_path):
    for version in range(2):
        folder = tmp_path / "run" / "csv" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"step,train/loss\n1,{version}\n")
    assert [curve.run for curve in read([tmp_path / "run"]).curves] == ["run/csv/version_0", "run/csv/version_1"]


def test_tensorboard_alone_is_read(run, tmp_path):
    (events,) = run.rglob("events.out.tfevents*")
    (loss,) = [curve for curve in read([events]).curves if curve.metric == "train/loss"]
    assert [step for step, _ in loss.points] == [*range(0, 200, 20)]
    assert loss.points[-1][1] == pytest.approx(4 - 1.8)


def test_without_tensorboard_its_files_are_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_file_loader", None)
    found = read([run])
    (said,) = found.skipped
    assert "events.out.tfevents" in said
    assert "tensorboard, which is not installed" in said
    assert said in text_of(write([run], tmp_path / "report.html")).words


def test_of_a_trainers_checkpoints_the_longest_log_is_read(run):
    of_hf = {curve.metric: curve for curve in read([run]).curves if curve.run == "int4/hf"}
    assert [step for step, _ in of_hf["loss"].points] == [5, 10, 15, 20]
    assert compare.metric(of_hf.values(), compare.LOSSES)["int4/hf"].metric == "loss"  # not the mean at the end


def test_sizes_are_those_of_the_files(run):
    (checkpoint,) = read([run]).checkpoints
    assert checkpoint.layers == 14
    stored = (run / "exported" / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(stored[:8], "little")
    assert checkpoint.sizes.total == len(stored) - header
    weights = sum(layer.weight.numel() for name, layer in tiny_llama().named_modules() if name.endswith("_proj"))
    assert checkpoint.sizes.weights == weights
    assert checkpoint.sizes.codes == weights // 2


DAMAGE = {
    "a study that is cut off": ("study.json", lambda text: text[: len(text) // 2], "study.json: .*line 1 column"),
    "metrics that are cut off": (
        "csv/version_0/metrics.csv",
        lambda text: text[:-30],
        "metrics.csv: line 12 has another",
    ),
    "metrics without steps": ("csv/version_0/metrics.csv", lambda text: text.replace("step", "stop"), "called step"),
    "no log in a state": ("hf/checkpoint-20/trainer_state.json", lambda _: "{}", "'log_history' is missing|KeyError"),
    "a log of another kind": ("alignment.jsonl", lambda _: "no\n", "alignment.jsonl, line 1 is no record"),
    "a checkpoint without tensors": ("exported/model.safetensors", lambda _: "", "model.safetensors is missing, trunc"),
    "empty events": ("tensorboard/version_0/EVENTS", lambda _: "", "no event can be read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_named(run, tmp_path, case):
    name, damage, message = DAMAGE[case]
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    (folder / "study.json").write_text(json.dumps(study()))
    path = folder / name
    if name.endswith("EVENTS"):
        (path,) = path.parent.glob("events.*")
    damaged = damage(path.read_text(errors="replace"))
    path.write_text(damaged)
    found = read([folder])
    (said,) = found.damaged
    assert said.startswith(str(folder))
    assert re.search(message, said)
    assert len(found.alignments) == len(found.plans) == 1  # the rest is read nevertheless


def test_damage_is_on_the_page_and_in_the_exit_status(tmp_path, capsys):
    (tmp_path / "study.json").write_text(json.dumps({"kind": "lockstep-study", "rows": [{"label": "alone"}]}))
    (tmp_path / "metrics.csv").write_text("loss\n1\n")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 1
    said = f"{tmp_path / 'metrics.csv'}: no column is called step"
    assert capsys.readouterr().err == f"damaged: {said}\n"
    found = text_of(tmp_path / "report.html")
    assert f"Not read, damaged: {said}" in found.words
    assert "Comparison" in found.words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perplexity": "low"}, "row 0 of the study, bf16 .*: perplexity is 'low', and no finite number"),
        ({"perplexity": math.inf}, "perplexity is inf"),
        ({"baseline": "fp32"}, "baseline is 'fp32'"),
        ({"label": ""}, "row 0 of the study has no label"),
        ({"curve": [1, 2]}, "study.json: "),
        ({"format": ["W4A16"]}, r"format is \['W4A16'\], and no text"),
        ({"command": ["python"]}, "command is .*and no text"),
        ({"weight_bytes": 10**400}, "study.json: "),
    ],
)
def test_a_wrong_field_of_a_study_is_named(tmp_path, change, message):
    content = study()
    content["rows"][0].update(change)
    (tmp_path / "study.json").write_text(json.dumps(content))
    (said,) = read([tmp_path]).damaged
    assert re.search(message, said)


ILLEGIBLE = {
    "an alignment of another version": {"aligned": True, "failures": [], "checkpoint": "out", "layers": []},
    "a plan of another version": {"lines": [], "totals": {}, "fits": {}},
    "a calibration of another version": {"observer": "minmax", "batches": 1, "rows": [{"name": "layer"}]},
    "a post-training report of another version": {"method": "gptq", "scheme": "W4A16", "seconds": 1.0, "rows": [{}]},
    "a sensitivity of another version": {"loss": "2.1", "costs": [{"unit": "layer"}]},
    "a study whose model is a list": {"kind": "lockstep-study", "rows": [{"label": "QAT"}], "model": ["Llama"]},
}


@pytest.mark.parametrize("case", ILLEGIBLE)
def test_a_file_that_cannot_be_shown_is_named_and_the_rest_is(tmp_path, capsys, case):
    (tmp_path / "a.json").write_text(json.dumps(ILLEGIBLE[case]))
    (tmp_path / "study.json").write_text(json.dumps(study()))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 1
    assert f"damaged: {tmp_path / 'a.json'}: " in capsys.readouterr().err
    words = text_of(tmp_path / "report.html").words
    assert any(word.startswith(f"Not read, damaged: {tmp_path / 'a.json'}: ") for word in words)
    assert "Comparison" in words


@pytest.mark.parametrize(
    "log",
    ['[{"loss": 1.0}]', "[3]", '[{"loss": 1.0, "step": Infinity}]', '[{"loss": 1.0, "step": "x"}]', "[" * 100_000],
)
def test_a_trainers_log_that_is_none_is_named(tmp_path, log):
    (tmp_path / "trainer_state.json").write_text(f'{{"global_step": 1, "log_history": {log}}}')
    (said,) = read([tmp_path]).damaged
    assert said.startswith(f"{tmp_path / 'trainer_state.json'}: ")


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    """The second is the worse one: under one name one of the two would be missing in silence."""
    for experiment, loss in (("first", 1.5), ("second", 2.5)):
        folder = tmp_path / experiment / "logs"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"step,val_loss\n1,3.0\n2,{loss}\n")
    folders = [tmp_path / "first" / "logs", tmp_path / "second" / "logs"]
    for runs in (folders, [folder / "metrics.csv" for folder in folders], [*folders, f"{folders[0]}/"]):
        found = read(runs)
        assert {curve.run: curve.points[-1][1] for curve in found.curves} == {"first": 1.5, "second": 2.5}
    assert "first is best" in compare.sentences(found)[0]


def test_a_seed_that_stands_twice_is_a_warning(tmp_path):
    content = {"kind": "lockstep-study", "rows": [{"label": "QAT", "seed": 1, "perplexity": 7.0}] * 2}
    (tmp_path / "study.json").write_text(json.dumps(content))
    assert any("QAT has seed 1 more than once" in said for said in compare.warnings(read([tmp_path])))


def test_more_curves_than_a_printed_page_has_room_for_are_several_figures_in_the_same_colours():
    """Of one run from the first panel to the last; a figure names its own runs alone."""
    panels = {f"measure {number}": {"qat": [[(0, 1.0), (1, 0.5)]]} for number in range(figures.PANELS)}
    panels |= {"one more": {"other": [[(0, 2.0), (1, 1.0)]], "qat": [[(0, 1.0), (1, 0.5)]]}}
    first, second = figures.curves(panels)
    assert [axes.get_ylabel() for axes in first.axes + second.axes] == list(panels)
    named = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in (first, second)]
    assert named == [["qat"], ["other", "qat"]]
    colours = [axes.lines[-1].get_color() for axes in first.axes + second.axes]
    assert len(set(colours)) == 1
    assert second.axes[0].lines[0].get_color() != colours[0]


def test_dark_colours_are_for_screens():
    """A browser may print with the dark scheme that its window has: pale letters on white paper."""
    dark = [rule for rule in re.findall(r"@media[^{]*", STYLE) if "dark" in rule]
    assert dark
    assert all(rule.startswith("@media screen and ") for rule in dark)


def test_labels_are_text_and_neither_formulas_nor_html(tmp_path):
    label = "<script>alert(1)</script> at $a_{$ or $\\frac{$"
    layers = {"model.layers.0.q_proj": 20.0}
    rows = [{"label": label, "method": label, "format": label, "perplexity": 7.0, "weight_bytes": 1, "layers": layers}]
    rows.append({"label": "bf16", "baseline": "bf16", "perplexity": 6.9, "weight_bytes": 4, "method": "bf16"})
    (tmp_path / "study.json").write_text(json.dumps({"kind": "lockstep-study", "rows": rows}))
    written = write([tmp_path], tmp_path / "report.html").read_text()
    assert "&lt;script&gt;" in written
    for wrong in ("<script", "Not read"):
        assert wrong not in written


def test_a_field_that_the_report_does_not_know_is_named(tmp_path):
    """A perplexity with a typing error would be missing in silence."""
    content = {
        "kind": "lockstep-study",
        "rows": [{"label": "QAT", "perplexty": 7.0}, {"label": "RTN", "perplexity": 7.1}],
    }
    (tmp_path / "study.json").write_text(json.dumps(content))
    assert read([tmp_path]).skipped == [f"{tmp_path}/study.json: the report has no place for perplexty of its rows."]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "nothing to report was found in .*run. Looked for: metrics.csv"),
        (lambda path: (path.mkdir(), (path / "config.yaml").write_text("a: 1")), "nothing to report was found"),
        (lambda path: None, "run is not there"),
    ],
)
def test_a_run_with_nothing_in_it_is_an_error(tmp_path, capsys, make, message):
    make(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "report.html").exists()


def test_usage(record, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["report"])
    assert "runs" in capsys.readouterr().err
    assert main(["report", str(record), "--out", str(tmp_path / "report.pdf")]) == 2
    assert "written as .html" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert main(["report", str(tmp_path / "other.json"), "--out", str(tmp_path / "r.html")]) == 1
    assert "no study record and none of our reports" in capsys.readouterr().err


def test_layers_without_numbers_and_experts_have_places():
    assert figures.place("model.layers.3.mlp.up_proj") == (3, "mlp.up_proj")
    assert figures.place("model.layers.3.mlp.experts.17.up_proj") == (3, "mlp.experts.*.up_proj")
    assert figures.place("lm_head") is None
    assert figures.layer_maps({"run": {"lm_head": 3.0}}, "dB", worst_is_low=True) is None


def test_long_curves_are_thinned_to_means():
    points = [(step, float(step % 2)) for step in range(3000)]
    drawn = figures.thinned(points)
    assert len(drawn) == figures.POINTS
    assert {value for _, value in drawn} == {0.5}
    assert figures.thinned(points[:10]) == [(float(step), value) for step, value in points[:10]]
    assert page(Found(), "nothing").count("<h2>") == 0


# Runs that are not alike ----------------------------------------------------------------------------------------------


def curve(run, metric, *values):
    return Curve(run, metric, tuple(enumerate(values)))


QAT = curve("qat", "train/loss", 4.0, 3.641)
QAD = [curve("qad", "train/loss", 0.01, 0.00047), curve("qad", "qat/kl", 0.01, 0.00047)]


def test_a_divergence_from_a_teacher_is_not_compared_with_a_cross_entropy():
    (said,) = compare.sentences(Found(curves=[QAT, *QAD]))
    assert "best" not in said.replace("none is called best", "")
    assert said.startswith("2 runs were compared; none logs a validation loss, and the training losses of those with")
    validated = [curve("qat", "val/loss", 4.0, 3.7), curve("qad", "val/loss", 4.0, 3.6)]
    (said,) = compare.sentences(Found(curves=[QAT, *QAD, *validated]))
    assert "qad is best: val/loss is 3.6 at the end (next: qat 3.7)" in said


def test_a_training_loss_is_called_what_it_is():
    (said,) = compare.sentences(Found(curves=[QAT, curve("other", "train/loss", 4.0, 3.5)]))
    assert "other is lowest in training, and none was validated: train/loss is 3.5 at the end (next: qat" in said


def test_losses_with_a_teacher_are_drawn_and_listed_apart(monkeypatch):
    panels = {}
    monkeypatch.setattr(figures, "curves", lambda shown, colours: panels.update(shown) or [figures.sizes([])])
    logged = [curve("qad", "qat/cross_entropy", 3.8, 3.7), curve("qad", "qat/oscillation/mean", 0.25, 0.5)]
    html = page(Found(curves=[QAT, *QAD, *logged, curve("qad", "spike/count", 1.0, 2.0)]), "runs")
    assert list(panels["training loss, nats"]) == ["qat"]
    assert list(panels["training loss of distillation, nats"]) == ["qad"]
    assert panels["KL from the teacher, nats"]["qad"] == [QAD[1].points]
    assert panels["cross-entropy of distillation, nats"]["qad"] == [((0, 3.8), (1, 3.7))]
    assert panels["codes that changed back (oscillation), %"]["qad"] == [[(0, 25.0), (1, 50.0)]]
    assert "2 loss spikes in qad" in html
    assert "training loss of distillation, last" in html


def test_a_study_draws_losses_with_a_teacher_apart(tmp_path, monkeypatch):
    panels = {}
    monkeypatch.setattr(figures, "curves", lambda shown, colours: panels.update(shown) or [figures.sizes([])])
    rows = [
        {"label": name, "method": name, "format": "4", "kl_share": share, "curve": [[0, 2.0], [1, 1.0]]}
        for name, share in (("qat", None), ("qad", 1.0))
    ]
    (tmp_path / "s.json").write_text(json.dumps({"kind": "lockstep-study", "rows": rows}))
    page(read([tmp_path]), "study")
    assert {words: list(runs) for words, runs in panels.items()} == {
        "training loss, nats: 4": ["qat"],
        "training loss of distillation, nats: 4": ["qad"],
    }


def test_a_teacher_is_seen_in_tensorboards_files_of_a_trainer(tmp_path):
    """Hugging Face's TensorBoardCallback puts ``train/`` before the names."""
    from torch.utils.tensorboard import SummaryWriter

    for run, names in {"qat": ("train/loss",), "qad": ("train/loss", "train/qat/kl")}.items():
        with SummaryWriter(str(tmp_path / run)) as writer:
            for name in names:
                writer.add_scalar(name, 0.5, 1)
    found = read([tmp_path / "qat", tmp_path / "qad"])
    assert [list(runs) for runs in compare.training(found.curves)] == [["qat"], ["qad"]]


def test_a_small_lead_of_one_run_is_no_lead():
    runs = [curve(name, "val/loss", 4.0, end) for name, end in (("warm", 3.79), ("cold", 3.793), ("c", 3.798))]
    others = [curve(name, "train/loss", 4.0, 3.5) for name in "de"]
    (said,) = compare.sentences(Found(curves=[*runs, *others]))
    assert said == (
        "5 runs were compared, 3 of them by validation loss; warm is lowest, but within 0.5 %, and one run each: no "
        "spread is known: val/loss is 3.79 at the end (next: cold 3.793, c 3.798)."
    )


@pytest.mark.parametrize(("lead", "doubt"), [(0.02, compare.ONE_EACH), (0.1, "")])
def test_a_small_lead_of_one_seed_is_no_lead(lead, doubt):
    rows = [{"label": "bf16", "perplexity": 7.0, "baseline": "bf16"}]
    rows += [{"label": name, "perplexity": 7.2 + more, "format": "4"} for name, more in (("A", 0), ("B", lead))]
    (won,) = compare.winners(of_rows(*rows))
    assert won.doubt == doubt


def test_the_front_and_its_axis_are_the_same_number():
    """B has the lower mean perplexity, by its seed alone; paired with its own bf16 it is larger and worse."""
    rows = [{"label": "bf16", "perplexity": 7.0 + seed, "seed": seed, "baseline": "bf16"} for seed in range(2)]
    rows += [
        {"label": "A", "perplexity": (7.0 + seed) * 1.01, "seed": seed, "weight_bytes": 1, "format": "4"}
        for seed in range(2)
    ]
    rows.append({"label": "B", "perplexity": 7.0 * 1.02, "seed": 0, "weight_bytes": 2, "format": "4"})
    lines = of_rows(*rows)
    assert lines[1].mean("perplexity") > lines[2].mean("perplexity")
    assert [line.label for line in compare.front(lines)] == ["A"]
    assert compare.winners(lines)[0].best.label == "A"


def test_the_first_sentences_have_their_spread(tmp_path):
    """And neither a format with one row nor the model before training is a win."""
    rows = [{"label": "before", "perplexity": 7.0, "format": "bf16", "method": "base", "weight_bytes": 4}]
    for seed, noise in enumerate((-0.01, 0.0, 0.01)):
        rows.append({"label": "bf16", "perplexity": 7.0, "baseline": "bf16", "format": "bf16", "seed": seed})
        rows.append({"label": "RTN", "perplexity": 7.5, "baseline": "rtn", "format": "4", "method": "rtn"})
        rows.append({"label": "QAT", "perplexity": 7.05 + noise, "format": "4", "method": "qat"})
        rows[-1] |= {"weight_bytes": 1, "seed": seed}
        rows[-2] |= {"weight_bytes": 1, "seed": seed}
    rows.append({"label": "alone", "perplexity": 7.2, "format": "8", "method": "alone", "weight_bytes": 2})
    (tmp_path / "s.json").write_text(json.dumps({"kind": "lockstep-study", "rows": rows}))
    said = " ".join(compare.sentences(read([tmp_path])))
    assert said.startswith("3 rows in 2 formats were compared")
    assert ": +0.71 ± 0.14 %." in said
    assert "Lowest perplexity at equal bytes: qat in 1 of 1 format." in said
    assert "they win back 90.0 ± 2.0 % (QAT)" in said


def test_layers_that_sit_on_their_grid_take_no_place_in_the_map(tmp_path):
    layers = {f"model.layers.{block}.q_proj": 10.0 + block for block in range(12)}
    exact = [{"label": f"GPTQ {one}", "layers": dict.fromkeys(layers, math.inf)} for one in range(figures.MAPS)]
    rows = [*exact, {"label": "QAT", "layers": layers}, {"label": "QAD", "layers": dict.fromkeys(layers, 30.0)}]
    (tmp_path / "s.json").write_text(json.dumps({"kind": "lockstep-study", "rows": rows}))
    found = read([tmp_path])
    drawn = figures.layer_maps(found.layers(), "dB", worst_is_low=True)
    assert [axes.get_title("left") for axes in drawn.axes if axes.get_title("left")] == ["QAT", "QAD"]
    text = text_of(write([tmp_path], tmp_path / "r.html"))
    assert "Left out, without a finite ratio: GPTQ 0, GPTQ 1, GPTQ 2, GPTQ 3." in text.words
    assert "QAT: the worst 10 layers" in text.words
    assert "QAD: the worst 10 layers" in text.words


def test_the_environment_is_readable(tmp_path):
    about = {"curve": [[1, 2.0]] * 2, "steps": list(range(9)), "gpus": ["a", "b"], "peak_bytes": 3 * 2**30}
    about |= {"corpus": {"train": {"bytes": 2**20}}, "train_seconds": 205.17588, "torchao": None}
    content = {"kind": "lockstep-study", "rows": [{"label": "QAT"}], "environment": about}
    (tmp_path / "s.json").write_text(json.dumps(content))
    words = text_of(write([tmp_path], tmp_path / "r.html")).words
    shown = dict(pairwise(words))
    assert (shown["peak_bytes"], shown["corpus: train: bytes"], shown["train_seconds"]) == (
        "3.0 GiB",
        "1.0 MiB",
        "205.2 s",
    )
    assert (shown["gpus"], shown["torchao"]) == ('["a", "b"]', "none")
    assert not {"curve", "steps"} & {*words}


def test_what_ptq_wrote_is_a_run(tmp_path, capsys):
    model = tiny_llama()
    result = lockstep.ptq.quantize(model, "rtn", "W4A16", [])
    model.save_pretrained(tmp_path / "out")
    result.save(tmp_path / "out" / "ptq.json")
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "r.html")]) == 0
    worst = max(result.rows, key=lambda row: row.error)
    found = text_of(tmp_path / "r.html")
    assert (
        f"Post-training rtn as {result.scheme} took {result.seconds:.1f} s for {len(result.rows)} layers" in found.all
    )
    assert f"largest errors of a weight: {worst.name} {worst.error:.2%}" in found.all
    assert "Post-training: rtn" in found.words
