"""Optuna's journal file of a process that is known to be its only writer."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock


class SoleWriterJournal(JournalFileBackend):
    """A journal that takes no lock for a write, and does not wait for the disk.

    What was appended has left the process when the call returns, so that killing it loses nothing; that it
    is safe from a power failure too takes some milliseconds more, which a thread waits for.

    Args:
        path: The file. Half a line that a killed process has left there is cut off.
    """

    def __init__(self, path: Path) -> None:
        _cut_half_a_line(path)
        super().__init__(str(path), lock_obj=_HeldAlready(str(path)))
        self._path = path
        self._count = path.read_bytes().count(b"\n")
        self._held: list[dict[str, Any]] | None = None
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._flushing: Future[None] | None = None

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write a line for each log; raise the OSError of this write, or of flushing the one before."""
        if self._held is not None:
            self._held += logs
            return
        self._flushed()
        text = "".join(f"{json.dumps(log, separators=(',', ':'))}\n" for log in logs)
        with self._path.open("ab") as file:
            file.write(text.encode())
        self._count += len(logs)
        self._flushing = self._disk.submit(_flush, self._path)

    @contextmanager
    def in_one_piece(self) -> Iterator[None]:
        """Write what is appended in a `with` block in one write at its end; nothing where it raises.

        The next read goes through the whole file: Optuna notes where lines begin as it reads them.
        """
        self._held = []
        try:
            yield
        except BaseException:
            self._held = None
            raise
        held, self._held = self._held, None
        self.append_logs(held)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Read the logs from a number on, with those that are yet to be written."""
        if log_number_from < self._count:  # else there is nothing in the file, which would be read through
            yield from super().read_logs(log_number_from)
        yield from (self._held or [])[max(0, log_number_from - self._count) :]

    def close(self) -> None:
        """Wait for the disk."""
        self._disk.shutdown()
        self._flushed()

    def _flushed(self) -> None:
        if self._flushing is not None:
            self._flushing.result()


class _HeldAlready(JournalFileSymlinkLock):
    """Optuna's lock, which is not needed: who writes holds the search's own."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        """Do nothing."""


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _cut_half_a_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("r+b") as handle:
                handle.truncate(len(whole))
