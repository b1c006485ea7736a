"""A directory that appears whole or not at all: written beside its place and renamed into it."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ExportError(RuntimeError):
    """An export that cannot be made or was not finished; what stood in its place before still does."""


def check_destination(directory: str | Path, overwrite: bool) -> Path:
    """The absolute path of `directory` if an export may be written there.

    Raises:
        ExportError: it is a file, or holds something that is not an earlier export to be overwritten.
    """
    target = Path(directory).absolute()
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ExportError(f"{target} is a file or a link: name a new directory.")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ExportError(
                f"{target} is not empty: name a new directory, or pass overwrite=True to replace an export."
            )
        if not _is_export(target):
            raise ExportError(f"{target} is not empty and no Lockstep export: overwrite=True replaces nothing else.")
    return target


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
    try:
        incomplete.mkdir(parents=True, exist_ok=True)
        lock = os.open(incomplete, os.O_RDONLY)
    except OSError as error:
        raise ExportError(f"cannot write to {target}: {error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExportError(f"another process is exporting to {target}.") from None
        try:
            _empty(incomplete)
            yield incomplete
            _sync(incomplete)
            _take_place(incomplete, target)
        except OSError as error:
            raise ExportError(f"could not write {target}, which is as it was: {error}") from error
        finally:
            # Here lies what failed, or the export that was replaced.
            shutil.rmtree(incomplete, ignore_errors=True)
    finally:
        os.close(lock)


def _is_export(directory: Path) -> bool:
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return "lockstep" in (config.get("quantization_config") or {})


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _sync(directory: Path) -> None:
    for path in (*directory.iterdir(), directory):
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
        old = target.with_name(f".{target.name}.replaced")
        target.rename(old)
        new.rename(target)
        old.rename(new)
    _sync_names(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically (Linux ``renameat2`` with ``RENAME_EXCHANGE``); False where there is no such call."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    return renameat2 is not None and renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0


def _sync_names(parent: Path) -> None:
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
