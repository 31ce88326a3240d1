"""Locking the study file, and repair after a crash or a manual edit."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from optuna.exceptions import OptunaError
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileOpenLock

from autopeft.core.atomic_files import naming_file, replacing
from autopeft.core.errors import shown

_logger = logging.getLogger(__name__)
_STALE_SECONDS = 3  # after which a lock of Optuna's was left by a killed process: a write takes milliseconds


def lock_folder(folder: Path, name: str) -> TextIO:
    """Keep a search to this process, and return the file that holds the lock: until it is closed.

    The folder is made if it is not there. The lock is gone with its process, however that ends. A file system
    without locks, as Lustre may be, is warned of.

    Raises:
        ValueError: Another process has the lock, or the folder cannot be written.
        OSError: The disk is full; the message names the file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise ValueError(
            f"The search cannot be kept in {folder}: {error.strerror}. "
            "Pass folder=... with a folder that can be written."
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # the other is how some shared file systems say it
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise ValueError(
            f"The search {name!r} is being run by process {owner}: wait for it, stop it, or give "
            "this one another name or seed."
        ) from error
    except OSError as error:
        _logger.warning(
            "The search cannot be kept to one process, as files in %s cannot be locked (%s): see that no "
            "other runs it, or trials are lost or counted twice.",
            folder,
            error.strerror,
        )
    try:
        with naming_file(folder / "lock"):
            file.truncate(0)
            os.write(file.fileno(), f"{os.getpid()} on {socket.gethostname()}".encode())
    except OSError:
        file.close()
        raise
    return file


def open_journal(path: Path, *, keeps_parameters: bool = True) -> JournalStorage:
    """Return the storage of a file that is to be written, without blank lines and half a line at its end.

    Optuna's own lock is kept while a line is written, since a dashboard may write to the file as well. Trials
    in memory have Optuna's parameters only with `keeps_parameters`: these take more than half of it.
    """
    lock = JournalFileOpenLock(str(path), grace_period=_STALE_SECONDS)
    if path.exists():
        lock.acquire()
        try:
            content = path.read_bytes()
            _parsed(path, content)
            whole = b"".join(line + b"\n" for line in _whole_lines(content) if line.strip())
            if whole != content:
                with replacing(path) as partial:
                    partial.write_bytes(whole)
        finally:
            lock.release()
    with damage_named(path, ValueError):  # which here are Optuna's
        return JournalStorage(_Journal(path, lock, keeps_parameters=keeps_parameters))


def read_journal(path: Path) -> JournalStorage:
    """Return the storage of a file that another process may be writing; it cannot be written.

    Its trials are without parameters, which Optuna takes two thirds of the time to make, and records have.
    """
    operations = _parsed(path, path.read_bytes())
    with damage_named(path, ValueError):  # which here are Optuna's
        return JournalStorage(_Lines(list(map(_without_parameters, operations))))


_DAMAGE = (
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RecursionError,
    OptunaError,
)


@contextmanager
def damage_named(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Raise what Optuna and our own readers say of JSON with other content as a ValueError with the path."""
    kinds: tuple[type[Exception], ...] = (*_DAMAGE, *others)
    try:
        yield
    except kinds as error:
        raise ValueError(
            f"{path} is damaged ({shown(error)}): expected operations of Optuna's journal, and trials of a "
            "search. Restore the file from a copy."
        ) from error


class _Journal(JournalFileBackend):
    """A file whose errors name it."""

    def __init__(self, path: Path, lock: JournalFileOpenLock, *, keeps_parameters: bool) -> None:
        super().__init__(str(path), lock_obj=lock)
        self._path = path
        self._keeps_parameters = keeps_parameters

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        operations = super().read_logs(log_number_from)
        yield from operations if self._keeps_parameters else map(_without_parameters, operations)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with naming_file(self._path):
            super().append_logs(logs)


class _Lines(BaseJournalBackend):
    """Lines that were read from a file."""

    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        self._lines = lines

    def read_logs(self, log_number_from: int) -> Sequence[dict[str, Any]]:
        return self._lines[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise NotImplementedError("This storage is for reading.")


def _without_parameters(operation: Mapping[str, Any]) -> dict[str, Any]:
    """Return an operation without what one that creates a trial has of Optuna's parameters."""
    return {key: operation[key] for key in operation.keys() - {"params", "distributions"}}


def _whole_lines(content: bytes) -> list[bytes]:
    """Return the lines without the last one, if a killed process had not ended it."""
    return content.split(b"\n")[:-1]


def _parsed(path: Path, content: bytes) -> list[dict[str, Any]]:
    """Return what stands in the lines; blank ones say nothing."""
    parsed = []
    for number, line in enumerate(_whole_lines(content), start=1):
        if not line.strip():
            continue
        try:
            operation = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _damaged(path, number) from error
        if not isinstance(operation, dict) or "op_code" not in operation:
            raise _damaged(path, number)
        parsed.append(operation)
    return parsed


def _damaged(path: Path, number: int) -> ValueError:
    return ValueError(
        f"Line {number} of {path} is damaged: expected an operation of Optuna's journal. Restore the file "
        f"from a copy, or keep the lines before it (`head -n {number - 1} {path} > mended`, then "
        f"`mv mended {path}`): the trials there are kept, later ones are run again."
    )
