"""The export directory: whatever ends an export early, what was served before is still there, whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from models import TinyMlp, prepared

from lockstep.export import Checkpoint, ExportError, save_pretrained
from lockstep.export import directory as module
from lockstep.export.directory import check_destination, replacing

EXPORT = json.dumps({"quantization_config": {"lockstep": {}}})


def write_export(directory: Path, content: str = "old") -> Path:
    """What `replacing` takes for an earlier export."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(EXPORT)
    (directory / "weights.safetensors").write_text(content)
    return directory


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Every path below, hidden ones too, with the content of files."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


# A new export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty"])
def test_directory_appears_whole(tmp_path, existing):
    """Whoever watches for the folder must not load half a model."""
    out = tmp_path / "a" / "b" / "out"
    if existing:
        out.mkdir(parents=True)
    with replacing(out) as incomplete:
        (incomplete / "weights.safetensors").write_text("new")
        assert incomplete.parent == out.parent
        assert not (out / "weights.safetensors").exists()
    assert snapshot(out) == {"weights.safetensors": b"new"}
    assert list(out.parent.iterdir()) == [out]


def test_an_earlier_export_is_replaced_and_not_mixed_with(tmp_path):
    """A shard left over from a larger model would be loaded too."""
    out = write_export(tmp_path / "out")
    (out / "more.safetensors").write_text("old")
    with replacing(out, overwrite=True) as incomplete:
        assert not list(incomplete.iterdir())
        write_export(incomplete, "new")
        assert (out / "weights.safetensors").read_text() == "old"
    assert snapshot(tmp_path) == {"out": None, "out/config.json": EXPORT.encode(), "out/weights.safetensors": b"new"}


def test_readers_find_an_export_at_every_moment(tmp_path):
    """A server that starts while the trainer exports gets the old or the new one, and never none."""
    out, probe = write_export(tmp_path / "out"), tmp_path / "probe"
    probe.mkdir()
    if not module._exchange(out, probe) or not module._exchange(out, probe):
        pytest.skip("this file system cannot exchange two names in one step")
    seen, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                seen.add((out / "weights.safetensors").read_text())
            except OSError as error:
                seen.add(f"missing: {error}")

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(50):
        with replacing(out, overwrite=True) as incomplete:
            write_export(incomplete, "new")
    done.set()
    reader.join()
    assert seen <= {"old", "new"}


def test_without_an_exchange_in_one_step_the_export_is_still_replaced(tmp_path, monkeypatch):
    """Network file systems, and systems other than Linux."""
    monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    out = write_export(tmp_path / "out")
    for content in ("new", "newer"):
        with replacing(out, overwrite=True) as incomplete:
            write_export(incomplete, content)
        assert snapshot(tmp_path) == {
            "out": None,
            "out/config.json": EXPORT.encode(),
            "out/weights.safetensors": content.encode(),
        }


def test_exchange_that_the_system_lacks_or_refuses_is_reported(tmp_path, monkeypatch):
    """So that the fallback is taken, instead of the old export being taken for the new one."""
    (tmp_path / "a").mkdir()
    assert module._exchange(tmp_path / "a", tmp_path / "missing") is False
    monkeypatch.setattr(module.ctypes, "CDLL", lambda *args, **kwargs: object())
    (tmp_path / "b").mkdir()
    assert module._exchange(tmp_path / "a", tmp_path / "b") is False


# Refused destinations ----------------------------------------------------------------------------------------------


def a_file(path: Path) -> Path:
    path.write_text("notes")
    return path


def a_link(path: Path) -> Path:
    path.symlink_to(write_export(path.parent / "elsewhere"))
    return path


def a_dangling_link(path: Path) -> Path:
    path.symlink_to(path.parent / "nowhere")
    return path


def a_folder(path: Path, config: str | None = None) -> Path:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    if config is not None:
        (path / "config.json").write_bytes(config.encode(errors="surrogateescape"))
    return path


DESTINATIONS = {
    "file": (a_file, True, "is a file or a link: name a new directory"),
    "link": (a_link, True, "is a file or a link"),
    "dangling link": (a_dangling_link, False, "is a file or a link"),
    "not empty": (write_export, False, "is not empty: name a new directory, or pass overwrite=True"),
    "no config": (a_folder, True, "is not empty and no Lockstep export: overwrite=True replaces nothing else"),
    "other model": (lambda path: a_folder(path, '{"model_type": "llama"}'), True, "no Lockstep export"),
    "other export": (
        lambda path: a_folder(path, '{"quantization_config": {"quant_method": "gptq"}}'),
        True,
        "no Lockstep export",
    ),
    "broken config": (lambda path: a_folder(path, "{"), True, "no Lockstep export"),
    "binary config": (lambda path: a_folder(path, "\udcff"), True, "no Lockstep export"),
    "list": pytest.param(
        *(lambda path: a_folder(path, "[]"), True, "no Lockstep export"),
    ),
    "text": pytest.param(
        *(lambda path: a_folder(path, '{"quantization_config": "lockstep"}'), True, "no Lockstep export"),
    ),
}


@pytest.mark.parametrize(("make", "overwrite", "message"), DESTINATIONS.values(), ids=DESTINATIONS)
def test_what_is_not_an_earlier_export_is_never_replaced(tmp_path, make, overwrite, message):
    """A mistyped path must not cost somebody's work."""
    out = make(tmp_path / "out")
    before = snapshot(tmp_path)
    for attempt in (check_destination, lambda *args: replacing(*args).__enter__()):
        with pytest.raises(ExportError, match=f"^{out} .*{message}"):
            attempt(out, overwrite)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("parent", ["file", "proc"])
def test_place_that_cannot_be_written_is_named(tmp_path, parent):
    out = (a_file(tmp_path / "notes") if parent == "file" else Path("/proc")) / "out"
    with pytest.raises(ExportError, match=f"^cannot write to {out}: "):
        save_pretrained(prepared(TinyMlp()), out)


# Exports that end early --------------------------------------------------------------------------------------------


class Refuses:
    """A tokenizer whose files cannot be written, for a reason of its own."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_pretrained(self, directory: Path) -> None:
        assert any(directory.glob("*.safetensors"))
        raise self.error


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "earlier-export"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ValueError("no vocabulary"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ExportError),
    ],
    ids=["exception", "ctrl-c", "disk-full"],
)
def test_export_that_fails_leaves_everything_as_it_was(tmp_path, earlier, error, raised):
    """The server keeps the last good model, and the disk is not littered."""
    model, out = prepared(TinyMlp()), tmp_path / "out"
    if earlier:
        save_pretrained(model, out)
    before = snapshot(tmp_path)
    with pytest.raises(raised) as caught:
        save_pretrained(prepared(TinyMlp(seed=1)), out, tokenizer=Refuses(error), overwrite=True)
    assert snapshot(tmp_path) == before
    if raised is ExportError:
        assert str(caught.value) == f"could not write {out}, which is as it was: {error}"


@contextmanager
def limited_file_size(size: int) -> Iterator[None]:
    """Writes beyond `size` fail, as they do on a full disk (Python ignores the signal that comes with it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_in_the_middle_of_a_shard_is_an_error_that_names_the_directory(tmp_path):
    """Real writes that fail in safetensors' own code, not a simulated exception."""
    out = save_pretrained(prepared(TinyMlp()), tmp_path / "out")
    before = snapshot(tmp_path)
    with limited_file_size(20_000), pytest.raises(ExportError, match=f"^could not write {out}, which is as it was: "):
        save_pretrained(prepared(TinyMlp(seed=1)), out, overwrite=True)
    assert snapshot(tmp_path) == before


def test_full_disk_in_the_fallback_keeps_the_earlier_export(tmp_path, monkeypatch):
    """The second of three renames fails when the old export has been moved away already."""
    monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    out = write_export(tmp_path / "out")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == ".out.incomplete":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ExportError, match="which is as it was"), replacing(out, overwrite=True) as incomplete:
        write_export(incomplete, "new")
    assert (out / "weights.safetensors").read_text() == "old"


EXPORTS_AND_STOPS = """
import sys, time, torch, lockstep
from lockstep.export import files, save_pretrained

sys.path.insert(0, {tests!r})
from models import TinyMlp, prepared

class Stop:
    def save_pretrained(self, directory):
        print("stopped", flush=True)
        time.sleep(600)

written, save_file = 0, files.save_file
def second_shard_stops(*args, **kwargs):
    global written
    written += 1
    if written == 2 and {between_shards}:
        Stop().save_pretrained(None)
    save_file(*args, **kwargs)
files.save_file = second_shard_stops

save_pretrained(prepared(TinyMlp(seed=1)), {out!r}, tokenizer=Stop(), max_shard_size=20_000, overwrite=True)
"""


@pytest.mark.parametrize("between_shards", [True, False], ids=["between-shards", "before-rename"])
def test_killed_export_leaves_the_earlier_one_and_is_cleared_by_the_next(tmp_path, between_shards):
    """kill -9, a preempted node, the out-of-memory killer: nothing of ours runs afterwards."""
    out = save_pretrained(prepared(TinyMlp()), tmp_path / "out")
    before = snapshot(out)
    script = EXPORTS_AND_STOPS.format(tests=str(Path(__file__).parent), out=str(out), between_shards=between_shards)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "stopped\n"
            with pytest.raises(ExportError, match=f"another process is exporting to {out}"):
                save_pretrained(prepared(TinyMlp(seed=2)), out, overwrite=True)
        finally:
            process.kill()
    assert snapshot(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.incomplete", "out"]
    assert any((tmp_path / ".out.incomplete").iterdir())

    save_pretrained(prepared(TinyMlp(seed=2)), out, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]
    assert snapshot(out).keys() == before.keys()
    assert snapshot(out) != before
    assert Checkpoint(out).layers == ("first", "second")


@pytest.mark.parametrize("moved_away", [False, True], ids=["after", "between"])
def test_fallback_killed_between_its_renames_is_cleared_by_the_next(tmp_path, monkeypatch, moved_away):
    """What the kill left beside must neither stop every later export nor stay for ever."""
    monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    write_export(tmp_path / ".out.replaced", "older")
    out = tmp_path / "out"
    if not moved_away:
        write_export(out)
    with replacing(out, overwrite=True) as incomplete:
        write_export(incomplete, "new")
    assert (out / "weights.safetensors").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_link_in_the_place_where_the_export_is_prepared_is_not_followed(tmp_path):
    """Whoever can write there could have another folder emptied."""
    precious = a_folder(tmp_path / "precious")
    (tmp_path / ".out.incomplete").symlink_to(precious)
    with pytest.raises(ExportError, match="cannot write to"), replacing(tmp_path / "out"):
        pass
    assert (precious / "thesis.tex").exists()


def test_second_export_to_one_directory_is_refused(tmp_path):
    """Two ranks that both export would interleave their shards."""
    out = tmp_path / "out"
    with replacing(out) as incomplete:
        (incomplete / "weights.safetensors").write_text("first")
        with pytest.raises(ExportError, match=f"^another process is exporting to {out}"), replacing(out):
            pytest.fail("two exports at once")
        assert (incomplete / "weights.safetensors").exists()
    assert snapshot(tmp_path) == {"out": None, "out/weights.safetensors": b"first"}


def test_exports_to_neighbours_do_not_disturb_each_other(tmp_path):
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "b") as second:
        (first / "weights.safetensors").write_text("a")
        (second / "weights.safetensors").write_text("b")
    assert snapshot(tmp_path) == {"a": None, "a/weights.safetensors": b"a", "b": None, "b/weights.safetensors": b"b"}


def open_below(directory: Path) -> Iterator[Path]:
    """What this process holds open in `directory`."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if (path := descriptor.readlink()).is_relative_to(directory):
                yield path


def test_lock_ends_with_the_export(tmp_path):
    """A trainer that exports at every epoch holds no descriptor and no lock between two."""
    for _ in range(3):
        with replacing(tmp_path / "out", overwrite=True) as incomplete:
            write_export(incomplete)
            assert incomplete in open_below(tmp_path)
        assert not list(open_below(tmp_path))


def test_nothing_is_renamed_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """After a power cut the new name must not point at empty files."""
    events: list[Any] = []
    fsync, take_place = os.fsync, module._take_place
    monkeypatch.setattr(
        os, "fsync", lambda file: (events.append(Path(os.readlink(f"/proc/self/fd/{file}")).name), fsync(file))
    )
    monkeypatch.setattr(module, "_take_place", lambda *paths: (events.append("rename"), take_place(*paths)))
    with replacing(tmp_path / "out") as incomplete:
        safetensors.torch.save_file({}, incomplete / "weights.safetensors")
    assert events == ["weights.safetensors", ".out.incomplete", "rename", tmp_path.name]


def test_what_somebody_put_beside_an_export_is_not_deleted(tmp_path):
    """A trainer's checkpoints in a folder of the export must survive the next one."""
    out = write_export(tmp_path / "out")
    (out / "checkpoints").mkdir()
    with pytest.raises(ExportError, match="also holds checkpoints"), replacing(out, overwrite=True):
        pass
    assert (out / "checkpoints").is_dir()
