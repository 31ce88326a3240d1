"""Files of tensors that can be made again: written whole or not at all, checked when they are read."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

_logger = logging.getLogger(__name__)
_CHECKSUM = "crc32"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with a checksum; neither a crash nor a power failure leaves half of it.

    Args:
        path: The file; an earlier one is replaced. Several processes may write the same one.
        tensors: By name, on any device.
        notes: Kept in the file's metadata.

    Raises:
        ValueError: The folder cannot be written, or its disk is full.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(held, {**(notes or {}), _CHECKSUM: _checksum(held)})
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise unwritable(path.parent, error) from error
    finally:
        if unfinished.exists():
            unfinished.unlink()


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return a file's tensors and notes; None for a missing file, and (with a warning) for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = dict(file.metadata() or {})
        tensors = load(path.read_bytes())
        if notes.pop(_CHECKSUM, None) != _checksum(tensors):
            raise SafetensorError("its checksum is not that of its content")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (SafetensorError, OSError) as error:
        _logger.warning("%s is damaged (%s) and is made again.", path, error)
        return None
    return tensors, notes


def unwritable(folder: Path, error: OSError) -> ValueError:
    """Build the error for a folder in which nothing can be written, or no more."""
    return ValueError(
        f"Cannot write in {folder}: {error.strerror}. Make room there, or choose another folder."
    )


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    return str(zlib.crc32(save(dict(tensors))))
