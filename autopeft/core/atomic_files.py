"""Files that are written whole or not at all, whatever happens to the process or the machine."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, and put what was written into its place at the end of the block.

    The folder is made. What was written is flushed to the disk and moved; then the folder is flushed, too.
    Where the block raises, what was there before stays.

    Raises:
        OSError: The disk is full or the folder cannot be written to; the message names the file.
    """
    # Hosts that share a folder have processes of equal numbers.
    partial = path.with_name(f"{path.stem}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        with naming_file(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _flush(partial)
            os.replace(partial, path)
            _flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Have errors of the operating system say which file cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from error


def _flush(path: Path) -> None:
    """Wait until a file, or what a folder holds, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
