"""Files of tensors: whole or not there, and found out when they are damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from autopeft.core.tensor_files import load_tensors, save_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}


def test_tensors_and_notes_come_back(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.safetensors"
    assert load_tensors(path) is None
    save_tensors(path, TENSORS, {"seed": "3"})
    loaded = load_tensors(path)
    assert loaded is not None
    tensors, notes = loaded
    assert notes == {"seed": "3"}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert list(path.parent.iterdir()) == [path]


def test_any_damage_is_found_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "file.safetensors"
    save_tensors(path, TENSORS)
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1], flipped, b"{}" * 40):
        caplog.clear()
        path.write_bytes(damaged)
        assert load_tensors(path) is None
        assert f"{path} is damaged" in caplog.text


def test_an_earlier_file_stays_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.safetensors"
    save_tensors(path, TENSORS)
    whole = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=f"Cannot write in {tmp_path}: No space left on device"):
        save_tensors(path, {"a": torch.zeros(1)})
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]
