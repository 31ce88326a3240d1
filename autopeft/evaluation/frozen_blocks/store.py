"""Hidden states on disk: memory-mapped safetensors files, bounded in bytes.

The least recently used ones go first.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_logger = logging.getLogger(__name__)
_NAME = "states"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_HEADER_BYTES = 1024
_CHECKSUM = "crc32"


class StateWriter:
    """Writes hidden states one piece after another.

    Args:
        file: Where to; empty.
        positions: Number of positions that will be written.
    """

    def __init__(self, file: IO[bytes], positions: int) -> None:
        self._file = file
        self._positions = positions
        self._written = 0
        self._checksum = 0
        self._width = 0
        self._dtype = torch.float32
        self._file.write(b" " * _HEADER_BYTES)

    def write(self, states: Tensor) -> None:
        """Append states of shape (positions, width), on any device."""
        self._width, self._dtype = states.shape[1], states.dtype
        self._written += len(states)
        content = _bytes_of(states.detach().cpu())
        self._checksum = zlib.crc32(content, self._checksum)
        self._file.write(content)

    def write_padding(self) -> None:
        """Append a position of zeros, as wide as those before it."""
        self.write(torch.zeros(1, self._width, dtype=self._dtype))

    def finish(self) -> None:
        """Write the header: before, the file is not a valid one.

        Raises:
            ValueError: Other than the announced number of positions was written.
        """
        if self._written != self._positions:
            raise ValueError(f"{self._written} positions were written, {self._positions} announced.")
        size = self._positions * self._width * self._dtype.itemsize
        shape = [self._positions, self._width]
        entry = {"dtype": _DTYPES[self._dtype], "shape": shape, "data_offsets": [0, size]}
        notes = {_CHECKSUM: str(self._checksum)}
        header = json.dumps({"__metadata__": notes, _NAME: entry}).encode()
        room = _HEADER_BYTES - 8
        self._file.seek(0)
        self._file.write(room.to_bytes(8, "little") + header.ljust(room))
        self._file.flush()
        os.fsync(self._file.fileno())


class HiddenStateFiles:
    """The files of hidden states in one folder, together of a bounded size.

    A file is written beside its place and moved there when it is whole: a process that is killed leaves at
    most an unfinished file, which the next one removes.

    Args:
        folder: Where they lie; made when the first is written.
        limit_bytes: Bytes that all files together may take.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._checked: set[tuple[str, int]] = set()
        self._remove_unfinished()

    def open(self, key: str) -> Tensor | None:
        """Return a file's states of shape (positions, width), memory-mapped, and count it as used.

        None where there is none.
        """
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                states: Tensor = file.get_tensor(_NAME)
                checksum = (file.metadata() or {}).get(_CHECKSUM)
            os.utime(path)
            self._check(key, path.stat().st_ino, states, checksum)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            _logger.warning("The hidden states in %s cannot be read (%s) and are made again.", path, error)
            return None
        return states

    @contextmanager
    def writing(self, key: str, positions: int) -> Iterator[StateWriter]:
        """Write a file; it is there once the `with` block ends without an exception.

        Raises:
            OSError: The folder cannot be written, or the disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{key}.{os.getpid()}.part"
        try:
            with unfinished.open("wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # tells others that it is still being written
                writer = StateWriter(file, positions)
                yield writer
                writer.finish()
                os.replace(unfinished, self._path(key))
        finally:
            unfinished.unlink(missing_ok=True)

    def make_room(self, size: int, keep: frozenset[str] = frozenset()) -> bool:
        """Remove the least recently used files until `size` bytes more fit; say whether they do.

        Args:
            size: Bytes to be written.
            keep: Keys of files that stay.
        """
        kept = {self._path(key) for key in keep}
        files = self._files()
        total = sum(size for _, size, _ in files)
        for _, bytes_there, path in files:
            if self._fits(total, size):
                break
            if path not in kept:
                total -= bytes_there
                path.unlink(missing_ok=True)  # a process that has it mapped keeps it until done
        return self._fits(total, size)

    def _files(self) -> list[tuple[int, int, Path]]:
        """Return time of last use, bytes and path of files, the least recently used first."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return sorted(found)

    def _fits(self, total: int, size: int) -> bool:
        return total + size <= self.limit_bytes and size < self._free()

    def _free(self) -> int:
        folder = next(place for place in (self.folder, *self.folder.absolute().parents) if place.is_dir())
        return shutil.disk_usage(folder).free

    def _check(self, key: str, inode: int, states: Tensor, checksum: str | None) -> None:
        """Compare a file with its checksum, once a process."""
        if (key, inode) not in self._checked:
            if str(zlib.crc32(_bytes_of(states))) != checksum:
                raise ValueError("its checksum differs")
            self._checked.add((key, inode))

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _remove_unfinished(self) -> None:
        for path in self.folder.glob("*.part"):
            try:
                with path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)
            except OSError:  # another process is writing it, or has just finished
                continue


def _bytes_of(states: Tensor) -> memoryview:
    return states.contiguous().view(torch.uint8).numpy().data
