"""Files that survive a crash, and whose damage is noticed: written whole or not at all, with a checksum.

A file that is empty, truncated or altered is moved aside when it is read and counts as missing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autopeft.core.atomic_files import replacing

CHECKSUM = "sha256"
"""Key of the checksum in a file's metadata."""

_DAMAGED = ".damaged"
_DAMAGE = (
    SafetensorError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,  # of numbers that are no JSON of ours
    RecursionError,  # of its depth
)
_Content = TypeVar("_Content")
_logger = logging.getLogger(__name__)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, of any device and layout, and texts to a safetensors file with a checksum of them."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        try:
            save_file(whole, partial, metadata={**metadata, CHECKSUM: _digest(whole, metadata)})
        except SafetensorError as error:  # also where the disk is full
            raise OSError(errno.EIO, str(error)) from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return tensors, on the CPU, and metadata; None where the file is missing or damaged."""

    def read() -> tuple[dict[str, Tensor], dict[str, str]]:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        expected = metadata.pop(CHECKSUM, "")
        if _digest(tensors, metadata) != expected:
            raise ValueError("its checksum does not match its content")
        return tensors, metadata

    return unless_damaged(path, read)


def save_json(path: Path, content: Any) -> None:
    """Write JSON, with texts as keys, and a checksum."""
    text = json.dumps(content, indent=1)
    with replacing(path) as partial:
        partial.write_text(f'{{"{CHECKSUM}": "{_text_digest(text)}", "content": {text}}}\n', encoding="utf-8")


def load_json(path: Path) -> Any | None:
    """Return what `save_json` wrote; None where the file is missing or damaged."""

    def read() -> Any:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if _text_digest(json.dumps(kept["content"], indent=1)) != kept[CHECKSUM]:
            raise ValueError("its checksum does not match its content")
        return kept["content"]

    return unless_damaged(path, read)


def unless_damaged(path: Path, read: Callable[[], _Content | None]) -> _Content | None:
    """Return what was read; None, with a warning, where it is damaged. The file is then moved aside."""
    try:
        return read() if path.is_file() else None
    except _DAMAGE as error:
        _logger.warning("%s is damaged and counts as missing: %s", path, error)
        with contextlib.suppress(OSError):  # also a folder that is only read is read on
            os.replace(path, path.with_name(path.name + _DAMAGED))
        return None


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(sorted(metadata.items()))).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
