"""A directory that appears whole or not at all: written beside its place and renamed into it."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

EXPORTED = {".json", ".safetensors", ".txt", ".model", ".jinja"}  # what checkpoints and tokenizers consist of
CARD = "README.md"
_SEAL = re.compile(r"\n<!-- written by lockstep, sha256 of what stands above: ([0-9a-f]{64}) -->\n\Z")


class ExportError(RuntimeError):
    """An export that cannot be made or was not finished; what stood in its place before still does."""


def check_destination(directory: str | Path, overwrite: bool) -> Path:
    """The absolute path of `directory` if an export may be written there.

    Raises:
        ExportError: it is a file, or holds something that is not an earlier export to be overwritten.
    """
    target = Path(directory).expanduser().absolute()
    if target == Path.cwd() or target in Path.cwd().parents:
        raise ExportError(f"{target} is or holds the working directory: name a directory in it.")
    parent = next(parent for parent in target.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"cannot write to {target}: {parent} is not a directory in which one may write.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ExportError(f"{target} is a file or a link: name a new directory.")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ExportError(
                f"{target} is not empty: name a new directory, or pass overwrite=True to replace an export."
            )
        if not _is_export(target):
            raise ExportError(f"{target} is not empty and no Lockstep export: overwrite=True replaces nothing else.")
        foreign = [path.name for path in target.iterdir() if path.is_dir() or path.suffix not in EXPORTED]
        if CARD in foreign and is_sealed(target / CARD):
            foreign.remove(CARD)
        elif CARD in foreign:
            raise ExportError(
                f"{target} holds a {CARD} that no export wrote, or that was edited since: overwrite=True would delete "
                "it. Move it away."
            )
        if foreign:
            raise ExportError(
                f"{target} also holds {foreign[0]}, which is no part of an export: overwrite=True would delete it."
            )
    return target


def check_new(directory: str | Path) -> Path:
    """The absolute path of `directory` if it is new or empty and may be written: for commands that replace nothing.

    Raises:
        ExportError: see `check_destination`.
    """
    target = Path(directory).expanduser().absolute()
    if target.is_dir() and any(target.iterdir()):
        raise ExportError(f"{target} is not empty: name a new folder as OUT, or empty this one.")
    return check_destination(target, overwrite=False)


def sealed(text: str) -> str:
    """`text` with a last line by which `is_sealed` knows that nobody has changed it since."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n<!-- written by lockstep, sha256 of what stands above: {digest} -->\n"


def is_sealed(path: Path) -> bool:
    """Whether `path` is a file that is as `sealed` made it. OSError if it cannot be read."""
    text = path.read_bytes().decode(errors="replace") if path.is_file() else ""
    seal = _SEAL.search(text)
    return seal is not None and hashlib.sha256(text[: seal.start()].encode()).hexdigest() == seal[1]


@contextmanager
def replacing(directory: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new directory beside `directory`, which takes its place when the block ends without an exception.

    Whatever ends the block early, a kill included, leaves `directory` as it was. What a killed export left beside it
    (``.NAME.incomplete``) is removed by the next one.

    Raises:
        ExportError: see `check_destination`; another process is exporting there; the disk refused.
    """
    target = check_destination(directory, overwrite)
    incomplete = target.parent / f".{target.name}.incomplete"
    with ExitStack() as locks:
        try:
            incomplete.mkdir(parents=True, exist_ok=True)
            _lock(incomplete, locks)
            if target.exists():
                _lock(target, locks)  # after the exchange it stands under the other name until it is removed
        except BlockingIOError:
            raise ExportError(f"another process is exporting to {target}.") from None
        except OSError as error:
            raise ExportError(f"cannot write to {target}: {error}") from error
        try:
            _empty(incomplete)
            _recover(target)
            yield incomplete
            _readable(incomplete)
            _sync(*incomplete.rglob("*"), incomplete)
            _take_place(incomplete, target)
        except OSError as error:
            raise ExportError(f"could not write {target}, which is as it was: {error}") from error
        finally:
            # Here lies what failed, or the export that was replaced.
            shutil.rmtree(incomplete, ignore_errors=True)


def _lock(directory: Path, locks: ExitStack) -> None:
    """Hold `directory` against other processes until `locks` closes. Raises BlockingIOError if one holds it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    locks.callback(os.close, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_export(directory: Path) -> bool:
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and "lockstep" in quantization


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _readable(directory: Path) -> None:
    """Give all files the permissions that a new file has: safetensors writes its own for their owner alone."""
    probe = directory / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _sync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _take_place(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        # A file system that cannot exchange two names in one step: the old export is away for an instant.
        old = _replaced(target)
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise
        old.rename(new)
    _sync(target.parent)


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _recover(target: Path) -> None:
    """Put back, or remove, the old export that a kill between the renames of `_take_place` left beside `target`."""
    old = _replaced(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(target)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically (Linux ``renameat2`` with ``RENAME_EXCHANGE``); False where there is no such call."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    return renameat2 is not None and renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0
