"""Durable files: whole or not at all, flushed before they are moved, and damage is noticed."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autopeft.core.atomic_files import replacing
from autopeft.core.durable_files import load_json, load_tensors, save_json, save_tensors

TENSORS = {
    "a": torch.arange(300.0).reshape(30, 10).T,
    "step": torch.tensor(3.0),
    "none": torch.zeros(0, 4),
    "half": torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
}
METADATA = {"seed": "5", "note": "text with ümlauts"}
CONTENT = [{"name": "gora", "values": {"0.query": 0.1 + 0.2, "1.key": -1e-300}}, None, True, "ü"]


def test_tensors_and_metadata_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file.safetensors"
    assert load_tensors(path) is None
    save_tensors(path, TENSORS, METADATA)
    found = load_tensors(path)
    assert found is not None
    assert found[1] == METADATA
    assert found[0].keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[0][name].dtype == tensor.dtype
        assert torch.equal(found[0][name], tensor)
    assert os.listdir(path.parent) == ["file.safetensors"]


def test_json_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file.json"
    assert load_json(path) is None
    save_json(path, CONTENT)
    assert load_json(path) == CONTENT


def empty(content: bytes) -> bytes:
    return b""


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def half_of_the_header(content: bytes) -> bytes:
    return content[:20]


def zeros(content: bytes) -> bytes:
    return bytes(len(content))


@pytest.mark.parametrize("damage", [empty, truncated, half_of_the_header, zeros])
@pytest.mark.parametrize("kind", ["tensors", "json"])
def test_a_damaged_file_counts_as_missing_with_one_warning(
    kind: str, damage: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, load = saved(kind, tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING, logger="autopeft"):
        assert load(path) is None
        assert load(path) is None
    (warning,) = caplog.messages
    assert str(path) in warning
    assert saved(kind, tmp_path)[1](path) is not None  # a new one takes its place


@pytest.mark.parametrize("kind", ["tensors", "json"])
def test_no_flipped_bit_gives_other_content(kind: str, tmp_path: Path) -> None:
    path, load = saved(kind, tmp_path)
    whole = path.read_bytes()
    expected = load(path)
    draw = random.Random(0)
    places = {*range(8), *(draw.randrange(len(whole)) for _ in range(400))}
    noticed = 0
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        found = load(path)
        noticed += found is None
        assert found is None or str(found) == str(expected)  # as white space of the header may
    assert noticed > 0.8 * len(places)


def test_everything_is_flushed_before_it_is_moved_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix or "folder")
        fsync(descriptor)

    def watched_replace(source: Any, target: Any) -> None:
        events.append("moved")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    save_tensors(tmp_path / "file.safetensors", TENSORS, METADATA)
    assert events == [".part", "moved", "folder"]


def test_what_fails_on_the_way_leaves_the_earlier_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    save_json(path, CONTENT)

    def write() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise MemoryError

    with pytest.raises(MemoryError):
        write()
    assert load_json(path) == CONTENT
    assert os.listdir(tmp_path) == ["file.json"]


@pytest.mark.parametrize("kind", ["tensors", "json"])
def test_a_folder_that_cannot_be_written_is_named(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in the way").write_text("")
    with pytest.raises(OSError, match=r"in the way/file\.\w+ cannot be written"):
        saved(kind, tmp_path / "in the way")


def saved(kind: str, folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    if kind == "json":
        save_json(folder / "file.json", CONTENT)
        return folder / "file.json", load_json
    save_tensors(folder / "file.safetensors", TENSORS, METADATA)
    return folder / "file.safetensors", load_tensors
