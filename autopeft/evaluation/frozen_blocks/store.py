"""Hidden states on disk: memory-mapped safetensors files, of which the least recently used go first."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autopeft.core.atomic_files import replacing

_logger = logging.getLogger(__name__)
_NAME = "states"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_HEADER_BYTES = 1024
_CHECKSUM = "crc32"


class HiddenStateFiles:
    """The files of hidden states in one folder, together of a bounded size.

    A file is written beside its place and moved there when it is whole: a process that is killed leaves at
    most an unfinished file, which the next one removes.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._checked: set[tuple[str, int]] = set()
        for path in folder.glob("*.part"):
            with contextlib.suppress(OSError), path.open("rb") as file:  # one that is being written is locked
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_size:  # else it may have been made this moment
                    path.unlink()

    def open(self, key: str) -> Tensor | None:
        """Return a file's states (positions, width), memory-mapped, and count it as used; None if missing."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                states: Tensor = file.get_tensor(_NAME)
                checksum = (file.metadata() or {}).get(_CHECKSUM)
            os.utime(path)
            version = key, path.stat().st_ino
            if version not in self._checked and str(zlib.crc32(_bytes_of(states))) != checksum:
                raise ValueError("its checksum differs")
            self._checked.add(version)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            _logger.warning("The hidden states in %s cannot be read (%s) and are made again.", path, error)
            return None
        return states

    def write(self, key: str, pieces: Iterable[Tensor]) -> None:
        """Write a file, piece after piece, each (positions, width); raise an OSError where that fails."""
        positions = checksum = width = 0
        dtype = torch.float32
        # It is locked until it is in its place.
        with contextlib.ExitStack() as locked, replacing(self._path(key)) as unfinished:
            lock = locked.enter_context(unfinished.open("wb"))
            with contextlib.suppress(OSError):  # where there are no locks, nothing unfinished is removed
                fcntl.flock(lock, fcntl.LOCK_EX)
            with unfinished.open("r+b") as file:
                file.write(b" " * _HEADER_BYTES)
                for states in pieces:
                    width, dtype = states.shape[1], states.dtype
                    content = _bytes_of(states.detach().cpu())
                    checksum = zlib.crc32(content, checksum)
                    positions += len(states)
                    file.write(content)
                file.seek(0)
                file.write(_header(positions, width, dtype, checksum))

    def make_room(self, size: int, keep: Iterable[str] = ()) -> bool:
        """Remove the least recently used files, not `keep`, until `size` bytes fit; say whether they do."""
        kept = {self._path(key) for key in keep}
        files: list[tuple[int, int, Path]] = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(file_size for _, file_size, _ in files)
        for _, file_size, path in sorted(files):
            if path not in kept and not self._fits(total, size):
                total -= file_size
                path.unlink(missing_ok=True)  # a process that has it mapped keeps it until done
        return self._fits(total, size)

    def _fits(self, total: int, size: int) -> bool:
        folder = next(place for place in (self.folder, *self.folder.absolute().parents) if place.is_dir())
        return total + size <= self.limit_bytes and size < shutil.disk_usage(folder).free

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def _header(positions: int, width: int, dtype: torch.dtype, checksum: int) -> bytes:
    """Return a safetensors header of `_HEADER_BYTES` bytes: its length, then JSON filled up with blanks."""
    size = positions * width * dtype.itemsize
    entry = {"dtype": _DTYPES[dtype], "shape": [positions, width], "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": {_CHECKSUM: str(checksum)}, _NAME: entry}).encode()
    room = _HEADER_BYTES - 8
    return room.to_bytes(8, "little") + text.ljust(room)


def _bytes_of(states: Tensor) -> memoryview:
    return states.contiguous().view(torch.uint8).numpy().data
