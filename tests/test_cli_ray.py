"""`autopeft search --ray`: which executor it makes of what a file of settings has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from autopeft import RayExecutor, Search
from tests.test_cli import call, settings_of


@pytest.fixture
def executors(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The executors of searches that are called, which end at once."""
    found: list[Any] = []
    monkeypatch.setattr(Search, "validate", lambda self: None)
    monkeypatch.setattr(Search, "run", lambda self, **_: found.append(self.executor))
    return found


@pytest.mark.parametrize("stored", [{}, {"executor": "local"}, {"executor": {"cpus_per_worker": 1}}])
@pytest.mark.parametrize(
    ("given", "address"), [("local", None), ("auto", "auto"), ("10.0.0.1:6379", "10.0.0.1:6379")]
)
def test_ray_makes_the_executor(
    stored: dict[str, Any],
    given: str,
    address: str | None,
    tmp_path: Path,
    executors: list[Any],
) -> None:
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(settings_of(tmp_path) | stored))
    result = call("search", tmp_path / "search.yaml", "executor.workers=2", "--ray", given)
    assert result.exit_code == 0, result.output
    assert executors == [RayExecutor(workers=2, address=address)]


def test_ray_takes_the_place_of_another_executor_with_its_settings(
    tmp_path: Path, executors: list[Any]
) -> None:
    path = tmp_path / "search.yaml"
    for stored in ({"type": "PackedExecutor", "size": 8}, {"type": "RayExecutor", "workers": 3}):
        path.write_text(yaml.safe_dump(settings_of(tmp_path) | {"executor": stored}))
        assert call("search", path, "--ray", "auto").exit_code == 0
    assert executors == [RayExecutor(address="auto"), RayExecutor(workers=3, address="auto")]


def test_ray_needs_no_number_of_workers(tmp_path: Path, executors: list[Any]) -> None:
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(settings_of(tmp_path)))
    assert call("search", tmp_path / "search.yaml", "--ray", "auto").exit_code == 0
    assert executors == [RayExecutor(address="auto")]
