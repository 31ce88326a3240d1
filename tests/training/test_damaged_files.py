"""What a power failure leaves of kept files does not stop a search: the trial is trained again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from autopeft.optimization.successive_halving import SuccessiveHalving
from tests.learnable import outcomes, tiny_search

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "flipped": lambda content: content[:-9] + bytes([content[-9] ^ 64]) + content[-8:],
}


def damage(folder: Path, kind: str) -> list[Path]:
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        path.write_bytes(DAMAGES[kind](path.read_bytes()))
    return paths


@pytest.mark.parametrize("kind", ["truncated"])
@pytest.mark.slow
def test_a_search_goes_on_without_its_damaged_files(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    halving = SuccessiveHalving(rungs=(0.5,), reduction_factor=2)
    settings = {"halving": halving, "baselines": False, "seed": 5}  # trial 1 goes on after the third trial
    whole = tiny_search(tmp_path / "whole", **settings).run(trials=6, progress=False)
    search = tiny_search(tmp_path / "cut", **settings)
    search.run(trials=3, progress=False)
    paused = damage(search.folder / "paused", kind)
    kept = damage(search.folder / "adapters", kind)
    assert paused
    assert kept
    front = tiny_search(tmp_path / "cut", **settings).run(trials=6, progress=False)
    # Trained again from the start: the same values, for more compute.
    assert outcomes(front.records) == outcomes(whole.records)
    warned = [path for path in (*paused, *kept) if str(path) in caplog.text]
    assert warned
    for path in warned:
        assert caplog.text.count(f"{path} is damaged and counts as missing") == 1


@pytest.mark.parametrize("kind", ["flipped"])
@pytest.mark.slow
def test_an_export_whose_checkpoint_is_damaged_trains_again(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = tiny_search(tmp_path)
    front = search.run(trials=2, progress=False)
    assert damage(search.folder / "adapters", kind)
    next(iter(front)).export(tmp_path / "export")
    assert (tmp_path / "export").is_dir()
    assert "is damaged and counts as missing" in caplog.text
