"""Checkpoints: whole or not at all, and only those wanted."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.durable_files import save_tensors
from autopeft.core.evaluation import Evaluation, TrialRecord
from autopeft.training.adapter_checkpoints import AdapterCheckpoints

STATE = {"0.query.lora.a": torch.arange(6.0).reshape(2, 3), "head.classifier.bias": torch.ones(3)}


def trial(number: int, rank: int = 4) -> TrialRecord:
    configuration = Configuration({Site(0, "query"): Adapter("lora", rank)})
    return TrialRecord(number=number, evaluation=Evaluation(configuration=configuration, status="complete"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tensors_come_back(tmp_path: Path) -> None:
    checkpoints = AdapterCheckpoints(tmp_path / "adapters")
    assert checkpoints.load(trial(7)) is None
    checkpoints.save(trial(7), STATE, 5)
    found = checkpoints.load(trial(7))
    assert found is not None
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())
    assert names(tmp_path / "adapters") == ["trial-00007.safetensors"]


def test_tensors_that_are_views_are_kept_as_they_look(tmp_path: Path) -> None:
    checkpoints = AdapterCheckpoints(tmp_path)
    checkpoints.save(trial(0), {"transposed": STATE["0.query.lora.a"].T}, 5)
    assert torch.equal(
        load_file(tmp_path / "trial-00000.safetensors")["transposed"], torch.arange(6.0).reshape(2, 3).T
    )


def test_what_another_search_left_under_the_number_counts_as_missing(tmp_path: Path) -> None:
    """As a worker does that outlives its search: the seed follows from the number, and is the same."""
    checkpoints = AdapterCheckpoints(tmp_path)
    checkpoints.save(trial(3, rank=8), STATE, 5)
    assert checkpoints.load(trial(3)) is None
    assert checkpoints.seed(trial(3)) is None
    assert checkpoints.seed(trial(3, rank=8)) == 5
    save_tensors(checkpoints.path(4), STATE, {"seed": "5"})  # as earlier versions did
    assert checkpoints.load(trial(4)) is None


def test_saving_again_replaces(tmp_path: Path) -> None:
    checkpoints = AdapterCheckpoints(tmp_path)
    checkpoints.save(trial(1), STATE, 5)
    checkpoints.save(trial(1), {"other": torch.zeros(1)}, 5)
    found = checkpoints.load(trial(1))
    assert found is not None
    assert list(found) == ["other"]


def test_only_the_wanted_are_kept_and_what_was_unfinished_goes(tmp_path: Path) -> None:
    checkpoints = AdapterCheckpoints(tmp_path)
    for number in range(4):
        checkpoints.save(trial(number), STATE, 5)
    (tmp_path / "trial-00009.node-3.local.77.part").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not ours")
    checkpoints.keep_only({1, 3, 100_000})
    assert names(tmp_path) == ["notes.txt", "trial-00001.safetensors", "trial-00003.safetensors"]
    checkpoints.keep_only(())
    assert names(tmp_path) == ["notes.txt"]


def test_nothing_saved_yet_is_nothing_to_delete(tmp_path: Path) -> None:
    AdapterCheckpoints(tmp_path / "missing").keep_only({1})
    assert not (tmp_path / "missing").exists()


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = AdapterCheckpoints(tmp_path)
    checkpoints.save(trial(2), STATE, 5)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"trial-00002.safetensors cannot be written: No space left"):
        checkpoints.save(trial(2), {"other": torch.zeros(1)}, 5)
    assert names(tmp_path) == ["trial-00002.safetensors"]
    found = checkpoints.load(trial(2))
    assert found is not None
    assert found.keys() == STATE.keys()
