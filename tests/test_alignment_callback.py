"""`AlignmentCallback` and `AlignmentTrainerCallback` in real trainers: planted faults, what is done, log and page."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import time
import warnings
from pathlib import Path

import pytest
import ranks
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from models import tiny_llama, token_ids
from torch.utils.data import DataLoader
from transformers import Trainer as HFTrainer
from transformers import TrainerCallback, TrainingArguments

import lockstep
from lockstep.align import MismatchError, Rollout, mismatch, page, truncated_importance_weights
from lockstep.align.decompose import measure
from lockstep.callbacks import AlignmentCallback, AlignmentTrainerCallback
from lockstep.export.rollout import RolloutSession, Sampling
from lockstep.export.rollout.embedded import EmbeddedEngine

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*not resumable.*",
    "ignore:.*exists and is not empty.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:.*pin_memory.*",
    "ignore:.*use_cpu.*",
)

ROLLOUT = Rollout(token_ids(4, 16).tolist(), [4, 4, 5, 5])


def model():
    """One layer, so that a forward is a few milliseconds."""
    return tiny_llama(num_hidden_layers=1, hidden_size=128, intermediate_size=128).train()


def session_of(model, scheme=None):
    if scheme is None:
        lockstep.prepare(model, "W4A16")
    return RolloutSession(model, EmbeddedEngine.from_model(model, scheme=scheme), scheme=scheme)


class Policy(LightningModule):
    """Fits fixed tokens; synchronizes before each step but those in `forgets`, as a loop does that samples."""

    def __init__(self, model, session, forgets=(), rate=0.02):
        super().__init__()
        self.model, self.forgets, self.rate = model, forgets, rate
        self.held = [session]  # not a child

    def training_step(self, batch, number):
        if self.global_step not in self.forgets and self.held[0] is not None:
            self.held[0].sync()
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=self.rate)


class Memory(DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


def fit(policy, callback, directory, steps=6, logger=False, ckpt=None, callbacks=(), **options):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=logger,
        callbacks=[callback, *callbacks],
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=directory,
        **options,
    )
    data = DataLoader(token_ids(16, 12, seed=2), batch_size=4)
    trainer.fit(policy, data, ckpt_path=ckpt)
    return trainer


def records(directory):
    return page.read_log(Path(directory) / "alignment" / "alignment.jsonl")


def events(directory):
    return [(one["step"], one["event"]) for one in records(directory) if "event" in one]


def gaps(directory):
    return [(one["step"], one["gap"]["mean_abs"]) for one in records(directory) if "gap" in one]


def watching(session, directory, action="warn", **options):
    options = {"every_n_steps": 1, **options}
    return AlignmentCallback(session, ROLLOUT, action=action, directory=str(directory / "alignment"), **options)


# In lockstep ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["warn", "resync", "tis", "stop"])
def test_in_lockstep_nothing_happens(tmp_path, action):
    """A trainer that synchronizes before it samples is at the floor at each step, whatever is to be done if not."""
    session = session_of(model())
    callback, logger = watching(session, tmp_path, action), Memory()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trainer and engine differ.*")
        trainer = fit(Policy(session.model, session), callback, tmp_path, logger=logger)
    assert trainer.global_step == 6
    assert events(tmp_path) == [(0, "start"), (0, "floor")]
    assert [step for step, _ in gaps(tmp_path)] == [*range(6)]
    assert all(gap <= callback.limit for _, gap in gaps(tmp_path))
    rows = [(step, row) for step, row in logger.rows if "mismatch/mean_abs" in row]
    assert [row["mismatch/mean_abs"] for _, row in rows] == [gap for _, gap in gaps(tmp_path)]
    assert [step for step, _ in rows] == [*range(6)]
    assert {row["mismatch/over"] for _, row in rows} == {0.0}
    assert trainer.callback_metrics["mismatch/floor"] == pytest.approx(callback.floor)
    assert callback.mismatch.prompt.tokens == 3 + 3 + 4 + 4


def test_training_is_bitwise_what_it_is_without_the_callback(tmp_path):
    one, other = session_of(model()), session_of(model())
    fit(Policy(one.model, one), watching(one, tmp_path), tmp_path, steps=4)
    trainer = Trainer(
        accelerator="cpu", max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(Policy(other.model, other), DataLoader(token_ids(16, 12, seed=2), batch_size=4))
    for (name, own), theirs in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(own, theirs), name
    assert one.model.training


def test_every_n_steps_and_the_names_of_others(tmp_path):
    session, logger = session_of(model()), Memory()
    callback = watching(session, tmp_path, every_n_steps=3, names="verl")
    fit(Policy(session.model, session), callback, tmp_path, steps=7, logger=logger, accumulate_grad_batches=2)
    assert [step for step, _ in gaps(tmp_path)] == [0, 3, 6]
    rows = [row for _, row in logger.rows if "rollout_corr/kl" in row]
    assert len(rows) == 3
    assert rows[-1]["training/rollout_probs_diff_valid"] == 1


def test_the_trainer_is_measured_in_the_precision_in_which_it_trains(tmp_path):
    """Masters in fp32 under autocast: what they compute without it is not what is trained."""
    wide = tiny_llama(torch.float32, num_hidden_layers=1, hidden_size=128, intermediate_size=128)
    session = session_of(wide)
    session.sync()
    with torch.autocast("cpu", torch.bfloat16):
        trains = measure(session, ROLLOUT).sampled.mean_abs
    assert trains != measure(session, ROLLOUT).sampled.mean_abs
    fit(Policy(wide, session), watching(session, tmp_path), tmp_path, steps=1, precision="bf16-mixed")
    assert gaps(tmp_path) == [(0, trains)]


# Planted: old weights ------------------------------------------------------------------------------------------------


def test_old_weights_are_warned_of_with_the_step_and_the_numbers(tmp_path):
    session = session_of(model())
    callback = watching(session, tmp_path)
    with pytest.warns(UserWarning, match=r"step 3: trainer and engine differ by .* nats on average, the limit is"):
        fit(Policy(session.model, session, forgets=(3, 4)), callback, tmp_path)
    assert events(tmp_path) == [(0, "start"), (0, "floor"), (3, "warn"), (4, "warn")]
    over = dict(gaps(tmp_path))
    assert over[4] > over[3] > callback.limit > over[5]
    assert not callback.correcting


def test_old_weights_are_synchronized_away(tmp_path):
    session = session_of(model())
    callback = watching(session, tmp_path, "resync")
    fit(Policy(session.model, session, forgets=(3,)), callback, tmp_path)
    assert events(tmp_path) == [(0, "start"), (0, "floor"), (3, "resync")]
    before, after = (one for one in records(tmp_path) if one["step"] == 3 and "gap" in one)
    assert before["gap"]["mean_abs"] > before["limit"] >= after["gap"]["mean_abs"]
    assert after["version"] == before["version"] + 1
    assert callback.mismatch is not None


def test_old_weights_stop_the_training_after_this_step(tmp_path):
    session = session_of(model())
    callback = watching(session, tmp_path, "stop")
    with pytest.warns(UserWarning, match=r"step 2: trainer and engine differ by .*Training ends with this step"):
        trainer = fit(Policy(session.model, session, forgets=(2,)), callback, tmp_path)
    assert trainer.global_step == 3
    assert events(tmp_path)[-1] == (2, "stop")


def test_a_training_that_may_not_end_yet_is_not_said_to_end(tmp_path):
    """Lightning trains on to its min_steps."""
    session = session_of(model())
    with pytest.warns(UserWarning, match=r"Training ends as soon as min_steps and min_epochs allow"):
        trainer = fit(
            Policy(session.model, session, forgets=(2,)), watching(session, tmp_path, "stop"), tmp_path, min_steps=5
        )
    assert trainer.global_step == 5


def test_old_weights_switch_the_weights_of_the_loss_on_until_they_are_gone(tmp_path):
    session = session_of(model())
    callback = watching(session, tmp_path, "tis")
    own, engine = -torch.rand(2, 5) * 3, -torch.rand(2, 5) * 3
    mask = torch.arange(5).expand(2, 5) < torch.tensor([[5], [3]])
    seen = []

    class Watched(Policy):
        def training_step(self, batch, number):
            seen.append(callback.weights(own, engine, mask))
            return super().training_step(batch, number)

    fit(Watched(session.model, session, forgets=(2, 3)), callback, tmp_path)
    assert events(tmp_path) == [(0, "start"), (0, "floor"), (2, "tis on"), (4, "tis off")]
    corrected = truncated_importance_weights(own, engine, mask)
    expected = [mask.float()] * 3 + [corrected] * 2 + [mask.float()]
    assert not torch.equal(corrected, mask.float())
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


# Planted: an engine that computes otherwise --------------------------------------------------------------------------


class Noisy:
    """An engine whose kernel is a little off from the answer number `after` on."""

    def __init__(self, engine, after, size=0.1):
        self.engine, self.left, self.size = engine, after, size

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def logprobs(self, sequences):
        self.left -= 1
        rows, noise = self.engine.logprobs(sequences), torch.Generator().manual_seed(0)
        if self.left >= 0:
            return rows
        return [row - self.size * torch.rand(len(row), generator=noise) for row in rows]


def test_a_gap_that_a_sync_does_not_close_is_an_error_that_says_how_to_find_it(tmp_path):
    session = session_of(model())
    session._engine = Noisy(session.engine, after=4)  # two answers in step 0
    callback = watching(session, tmp_path, "resync")
    with pytest.raises(MismatchError, match=r"step 3: a sync did not close the gap.*decompose.*audit"):
        fit(Policy(session.model, session), callback, tmp_path)
    assert events(tmp_path)[-2:] == [(3, "resync"), (3, "stop")]
    assert "a sync did not close the gap" in (tmp_path / "alignment" / "alignment.html").read_text()


def test_noise_is_measured_as_large_as_it_is(tmp_path):
    session = session_of(model())
    session._engine = Noisy(session.engine, after=4)
    with pytest.warns(UserWarning, match="step 3: trainer and engine differ"):
        fit(Policy(session.model, session), watching(session, tmp_path), tmp_path)
    assert [step for step, event in events(tmp_path) if event == "warn"] == [3, 4, 5]
    assert dict(gaps(tmp_path))[4] == pytest.approx(0.05, rel=0.2)


def test_the_floor_of_a_trainer_that_does_not_see_the_grid_does_not_hide_it(tmp_path):
    """No QAT and INT4 rollouts: the gap is over the limit from the first step on, whatever is synchronized."""
    session = session_of(model(), scheme="W4A16")
    callback = watching(session, tmp_path)
    with pytest.warns(UserWarning, match="step 0: trainer and engine differ"):
        fit(Policy(session.model, session), callback, tmp_path, steps=2)
    assert [step for step, event in events(tmp_path) if event == "warn"] == [0, 1]
    assert callback.floor < 0.1 * gaps(tmp_path)[0][1]


# Rollouts with the engine's own log-probabilities --------------------------------------------------------------------


@pytest.mark.parametrize("action", ["stop", "resync"])
def test_the_last_rollout_is_measured_with_what_the_engine_said_when_it_sampled(tmp_path, action):
    """After a sync the engine is asked anew: what it said before was said with the old weights."""
    session = session_of(model())
    prompts = [ids[:5] for ids in ROLLOUT.tokens]
    last = []

    class Sampled(Policy):
        def training_step(self, batch, number):
            loss = super().training_step(batch, number)
            if self.global_step:
                completions = session.engine.generate(
                    prompts, Sampling(max_tokens=8, n=4, temperature=0.8, seed=number)
                )
                last[:] = [Rollout.of(prompts, completions, 0.8)]
            return loss

    callback = AlignmentCallback(
        lambda: session,
        lambda: last[0] if last else None,
        every_n_steps=1,
        action=action,
        factor=1.5,
        directory=str(tmp_path / "alignment"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(Sampled(session.model, session, forgets=(4,)), callback, tmp_path)
    assert trainer.global_step == (5 if action == "stop" else 6)
    steps = [1, 2, 3, 4] if action == "stop" else [1, 2, 3, 4, 4, 5]  # there was nothing to measure before
    assert [step for step, _ in gaps(tmp_path)] == steps
    assert events(tmp_path) == [(0, "start"), (1, "floor"), (4, action)]
    assert callback.floor < 0.02
    assert callback.mismatch.prompt is None


def test_a_floor_that_is_known_is_not_measured_and_nothing_is_synchronized(tmp_path):
    session = session_of(model())
    session.sync()
    callback = watching(session, tmp_path, floor=10.0)
    fit(Policy(session.model, None), callback, tmp_path, steps=3)
    assert session.version == 1
    assert events(tmp_path) == [(0, "start")]
    assert callback.limit == pytest.approx(11.001)


# The log and the page ------------------------------------------------------------------------------------------------


def test_a_run_that_is_resumed_goes_on_with_log_floor_and_correction(tmp_path):
    session = session_of(model())
    save = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    callback = watching(session, tmp_path, "tis")
    fit(Policy(session.model, session, forgets=(3, 4, 5)), callback, tmp_path, steps=6, callbacks=[save])
    assert callback.correcting
    log = tmp_path / "alignment" / "alignment.jsonl"
    with log.open("a") as file:
        file.write('{"step": 6, "version"')  # the kill came in the middle of a line
    floor, first = callback.floor, log.read_text()

    session = session_of(model())
    session.sync()
    callback = watching(session, tmp_path, "tis")
    fit(
        Policy(session.model, session, forgets=(4,)),
        callback,
        tmp_path,
        steps=8,
        ckpt=tmp_path / "kept" / "step=4.ckpt",
    )
    assert callback.floor == floor
    assert log.read_text().startswith(first.rpartition("\n")[0])  # nothing is rewritten
    assert [step for step, _ in gaps(tmp_path)] == [*range(8)]
    assert events(tmp_path) == [(0, "start"), (0, "floor"), (3, "tis on"), (4, "start"), (5, "tis off")]
    fit(
        Policy(session.model, session),
        (other := watching(session, tmp_path, "warn")),
        tmp_path,
        steps=5,
        ckpt=tmp_path / "kept" / "step=4.ckpt",
    )
    assert not other.correcting  # the log says "tis on" at step 3, and nothing would ever switch it off
    ours, theirs = torch.zeros(1, 2), torch.ones(1, 2)
    assert other.weights(ours, theirs).tolist() == [[1.0, 1.0]]
    fit(Policy(session.model, session), watching(session, tmp_path), tmp_path, steps=1)  # another run, from the start
    assert [step for step, _ in gaps(tmp_path)] == [0]


def write_until_killed(path):
    """What a trainer does to the log, in a process of its own."""
    page.mend(path)
    for number in range(len(page.read_log(path)), 10**9):
        page.append(path, {"step": number, "event": "warn", "message": "x" * (number % 4096)})


def test_a_log_survives_kills_at_any_moment(tmp_path):
    path = tmp_path / "log.jsonl"
    held = 0
    for number in range(12):
        child = os.fork()
        if not child:
            try:
                write_until_killed(path)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 60
        while not path.exists() or path.read_bytes().count(b"\n") < held + 5 + number:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        whole = path.read_bytes().count(b"\n")
        assert [one["step"] for one in page.read_log(path)] == [*range(whole)]  # nothing is lost, nothing is twice
        assert whole >= held + 5 + number
        held = whole


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_half_written_line_is_left_out_and_mended(tmp_path, cut):
    path = tmp_path / "log.jsonl"
    for step in range(3):
        page.append(path, {"step": step, "gap": {"mean_abs": float("nan")}})
    path.write_bytes(path.read_bytes()[:-cut])
    assert [one["step"] for one in page.read_log(path)] == [0, 1]
    page.mend(path)
    page.append(path, {"step": 2, "event": "warn", "message": ""})
    assert [one["step"] for one in page.read_log(path)] == [0, 1, 2]
    assert page.read_log(path)[0]["gap"]["mean_abs"] is None  # JSON has no NaN


def with_a_full_disk(work, room):
    """What `work` raises or warns of in a process whose files may have `room` bytes: a write beyond is cut short."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        return work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_line_that_the_disk_has_no_room_for_is_an_error_and_leaves_none(tmp_path):
    path, line = tmp_path / "log.jsonl", {"step": 0, "event": "warn", "message": "x" * 100}
    page.append(path, line)
    held = path.read_bytes()
    with pytest.raises(OSError, match=re.escape(str(path))):
        with_a_full_disk(lambda: page.append(path, line), len(held) + 50)
    assert path.read_bytes() == held
    page.append(path, line)  # there is room again
    assert page.read_log(path) == [line, line]


def test_a_page_that_cannot_be_written_does_not_end_the_training(tmp_path):
    """All is in the log; when there is room again, the page is there."""
    session = session_of(model())
    blocked = tmp_path / "alignment" / "alignment.html.partial"
    blocked.mkdir(parents=True)
    callback = watching(session, tmp_path)
    with pytest.warns(UserWarning, match=r"alignment\.html could not be written .*alignment\.jsonl beside it holds"):
        trainer = fit(Policy(session.model, session), callback, tmp_path, steps=2)
    assert trainer.global_step == 2
    assert [step for step, _ in gaps(tmp_path)] == [0, 1]
    blocked.rmdir()
    callback._page()
    assert "At step 1" in (tmp_path / "alignment" / "alignment.html").read_text()


def test_a_log_of_something_else_is_named(tmp_path):
    session = session_of(model())
    (tmp_path / "alignment").mkdir()
    (tmp_path / "alignment" / "alignment.jsonl").write_text('{"step": 0}\n{"loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"alignment.jsonl, line 2 is no record of alignment: 'step'"):
        fit(Policy(session.model, session), watching(session, tmp_path), tmp_path)


def test_the_page_grows_holds_all_and_needs_nothing(tmp_path):
    session = session_of(model())
    sizes = []
    write = page.write_page

    class Looked(Policy):
        def on_train_batch_end(self, outputs, batch, number):
            sizes.append((tmp_path / "alignment" / "alignment.html").read_text().count("<tr"))

    with pytest.warns(UserWarning, match="trainer and engine differ"):
        fit(Looked(session.model, session, forgets=(3,)), watching(session, tmp_path), tmp_path)
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0]
    text = (tmp_path / "alignment" / "alignment.html").read_text()
    assert not re.search(r"<script|<link|src=|@import|url\((?!#)", text)
    assert '<span class="verdict yes">aligned</span>' in text
    assert text.count("<svg") == 1
    for words in ("step", "resync", "warn", "effective sample size, sequences", "the limit is"):
        assert (words in text) == (words != "resync")
    last = records(tmp_path)[-1]
    assert f"{last['gap']['mean_abs']:.5g}" in text
    assert [one.name for one in (tmp_path / "alignment").iterdir() if "partial" in one.name] == []
    assert write is page.write_page


def test_the_plots_show_the_numbers_of_the_log(tmp_path):
    session = session_of(model())
    with pytest.warns(UserWarning, match="trainer and engine differ"):
        fit(Policy(session.model, session, forgets=(3, 4)), watching(session, tmp_path), tmp_path)
    found = records(tmp_path)
    gap, k3, ess = page.figure(found).axes
    lines = {line.get_label(): line for line in gap.lines}
    measured = [one for one in found if "gap" in one]
    assert [*lines["mean |difference|"].get_ydata()] == [one["gap"]["mean_abs"] for one in measured]
    assert [*lines["limit"].get_ydata()] == [one["limit"] for one in measured]
    assert [*lines["floor"].get_ydata()] == [one["floor"] for one in measured]
    assert [*k3.lines[0].get_ydata()] == [one["gap"]["k3"] for one in measured]
    assert [*ess.lines[1].get_ydata()] == [one["gap"]["ess_sequence"] for one in measured]
    assert [line.get_xdata()[0] for line in gap.lines if line.get_linestyle() == ":"] == [0, 3, 4]


def test_a_page_of_a_broken_engine_can_be_written():
    """Infinite ratios and no correlation stand in the log as null."""
    broken = mismatch(torch.zeros(1, 3), torch.full((1, 3), -800.0)).sampled.values()
    record = {"step": 0, "version": 1, "gap": broken, "prompt": None, "tokens": 3, "floor": 0.0, "limit": 0.1}
    text = page.page([page._finite(record)])
    assert '<span class="verdict no">not aligned</span>' in text
    assert "nan" not in text.lower().replace("finance", "").split("</svg>")[1]
    assert "Nothing is measured yet" in page.page([])


def test_arguments_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="action='retry': choose 'warn', 'resync', 'tis', 'stop'"):
        AlignmentCallback(None, ROLLOUT, action="retry")
    with pytest.raises(ValueError, match="every_n_steps=0"):
        AlignmentCallback(None, ROLLOUT, every_n_steps=0)
    with pytest.raises(ValueError, match=r"factor=0\.5"):
        AlignmentTrainerCallback(None, ROLLOUT, factor=0.5)
    for name in ("factor", "tolerance", "floor"):
        for value in (float("nan"), float("inf"), -1.0):
            with pytest.raises(ValueError, match=f"{name}={value}"):
                AlignmentCallback(None, ROLLOUT, **{name: value})
    with pytest.raises(ValueError, match=r"every_n_steps=2\.5: a whole number"):
        AlignmentCallback(None, ROLLOUT, every_n_steps=2.5)
    with pytest.raises(ValueError, match="sequences=None"):
        AlignmentCallback(None, None)
    with pytest.raises(ValueError, match="names='wandb': choose 'lockstep', 'verl', 'trl'"):
        AlignmentCallback(None, ROLLOUT, names="wandb")
    with pytest.raises(ValueError, match="labels != -100"):
        AlignmentCallback(None, ROLLOUT).weights(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[-100, 5]]))


def test_a_session_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no session: make one before the first optimizer step"):
        fit(Policy(model(), None), watching(None, tmp_path), tmp_path)


# The Hugging Face trainer --------------------------------------------------------------------------------------------


class Syncs(TrainerCallback):
    """What a loop does that samples."""

    def __init__(self, session, forgets=()):
        self.session, self.forgets = session, forgets

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step not in self.forgets:
            self.session.sync()


class Listens(TrainerCallback):
    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


def train(session, callback, directory, forgets=(), steps=6, resume=None, **options):
    args = TrainingArguments(
        directory / "run",
        **{
            "use_cpu": True,
            "max_steps": steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.02,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 100,
        }
        | options,
    )
    rows = [{"input_ids": row, "labels": row} for row in token_ids(16, 12, seed=2)]
    after = Listens()
    trainer = HFTrainer(session.model, args, train_dataset=rows, callbacks=[Syncs(session, forgets), callback, after])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, after.rows


def hugging(session, directory, action="warn", **options):
    options = {"every_n_steps": 1, **options}
    return AlignmentTrainerCallback(session, ROLLOUT, action=action, directory=str(directory / "alignment"), **options)


def test_the_hugging_face_trainer_measures_and_logs(tmp_path):
    session = session_of(model())
    callback = hugging(session, tmp_path, every_n_steps=2, names="trl")
    trainer, rows = train(session, callback, tmp_path)
    assert trainer.state.global_step == 6
    assert [step for step, _ in gaps(tmp_path)] == [0, 2, 4]
    logged = [one for one in trainer.state.log_history if "mismatch/floor" in one]
    assert [one["step"] for one in logged] == [1, 3, 5]  # with the step that follows
    name = "sampling/sampling_logp_difference/mean"
    assert [one[name] for one in logged] == [gap for _, gap in gaps(tmp_path)]
    assert [one[name] for one in rows if name in one] == [one[name] for one in logged]


def test_the_hugging_face_trainer_warns_resyncs_stops_and_corrects(tmp_path):
    for action in ("warn", "resync", "stop", "tis"):
        directory = tmp_path / action
        directory.mkdir()
        session = session_of(model())
        callback = hugging(session, directory, action)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer, _ = train(session, callback, directory, forgets=(2, 3))
        said = [str(one.message) for one in caught if "trainer and engine differ" in str(one.message)]
        found = events(directory)[2:]
        assert trainer.state.global_step == (3 if action == "stop" else 6)
        assert (
            found
            == {
                "warn": [(2, "warn"), (3, "warn")],
                "resync": [(2, "resync"), (3, "resync")],
                "stop": [(2, "stop")],
                "tis": [(2, "tis on"), (4, "tis off")],
            }[action]
        )
        assert len(said) == {"warn": 2, "stop": 1}.get(action, 0)


def test_the_hugging_face_trainer_resumes(tmp_path):
    session = session_of(model())
    train(session, hugging(session, tmp_path), tmp_path, steps=4, save_strategy="steps", save_steps=3)
    session = session_of(model())
    callback = hugging(session, tmp_path)
    train(session, callback, tmp_path, steps=6, resume=str(tmp_path / "run" / "checkpoint-3"))
    assert [step for step, _ in gaps(tmp_path)] == [*range(6)]
    assert events(tmp_path) == [(0, "start"), (0, "floor"), (3, "start")]


# Several processes ---------------------------------------------------------------------------------------------------

REPLICATED = """
import os
import torch.distributed as dist
from test_alignment_callback import *

rank = int(os.environ["RANK"])

def run(action, engines, after=10**9):
    directory = Path(os.environ["DIRECTORY"]) / action / str(after)
    inner = model()
    lockstep.prepare(inner, "W4A16")
    session = None
    if rank < engines:
        engine = EmbeddedEngine.from_model(inner)
        session = RolloutSession(inner, Noisy(engine, after, size=float("nan")))
    callback = watching(session, directory, action)
    try:
        policy = Policy(inner, session, forgets=(2,))
        trainer = fit(policy, callback, directory, steps=4, strategy="ddp", devices=2)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return [trainer.global_step, session and session.version, callback.correcting, callback.floor]

runs = [run("stop", 1), run("resync", 2), run("tis", 1), run("warn", 1, after=3)]
print(json.dumps(runs))
"""


def test_ranks_act_together_on_what_rank_zero_measures(tmp_path):
    outputs = ranks.run(REPLICATED, tmp_path / "ranks", DIRECTORY=str(tmp_path))
    ours, theirs = (json.loads(output.strip().splitlines()[-1]) for output in outputs)
    never = str(10**9)
    (stop, resync, tis, broken), (stop_, resync_, tis_, broken_) = ours, theirs
    assert stop[0] == stop_[0] == 3
    assert events(tmp_path / "stop" / never)[-1] == (2, "stop")
    assert resync == resync_  # each has synchronized its own engine as often
    assert (2, "resync") in events(tmp_path / "resync" / never)
    assert tis[0] == tis_[0] == 4
    assert tis[2:] == tis_[2:]
    assert events(tmp_path / "tis" / never)[2:] == [(2, "tis on"), (3, "tis off")]
    assert [step for step, _ in gaps(tmp_path / "tis" / never)] == [0, 1, 2, 3]  # rank zero alone writes
    assert broken[0] == "ValueError"  # and not a hang of the other
    assert "rollout: the log-probability of sequence 0, token 0 is nan" in broken[1]
    assert broken_[0] == "RuntimeError"
    assert broken[1] in broken_[1]


SHARDED = """
import os
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from test_alignment_callback import *

dist.init_process_group("gloo")
rank, directory = dist.get_rank(), Path(os.environ["DIRECTORY"])
inner = model()
lockstep.prepare(inner, "W4A16")
engine = EmbeddedEngine.from_model(inner) if rank == 0 else None
mesh = init_device_mesh("cpu", (2,))
for layer in inner.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(inner, mesh=mesh)
session = RolloutSession(inner, engine)
given = (lambda: ROLLOUT) if rank == 0 else (lambda: Rollout([[1, 2]]))  # rank zero's count
callback = AlignmentCallback(session, given, every_n_steps=1, action="resync", directory=str(directory / "alignment"))
optimizer = torch.optim.SGD(inner.parameters(), lr=0.02)
callback._begin(0)
for step in range(3):
    if step != 1:
        session.sync()
    batch = token_ids(4, 12, seed=step + 10 * rank)
    inner(input_ids=batch, labels=batch).loss.backward()
    metrics, stop = callback._check(step)
    optimizer.step()
    optimizer.zero_grad()
print(json.dumps([metrics["mismatch/mean_abs"], callback.floor, session.version if rank == 0 else None]))
dist.destroy_process_group()
"""


def test_all_ranks_of_a_sharded_model_take_part(tmp_path):
    outputs = ranks.run(SHARDED, tmp_path / "ranks", DIRECTORY=str(tmp_path))
    one, other = (json.loads(output.strip().splitlines()[-1]) for output in outputs)
    assert one[:2] == other[:2]
    assert events(tmp_path) == [(0, "start"), (0, "floor"), (1, "resync")]
    assert all(gap < 0.05 for step, gap in gaps(tmp_path) if step != 1)
