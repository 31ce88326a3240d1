"""Tasks, spaces, samplers and executors of another package are known under the names of its entry points.

tests/methods/test_own_method.py has the methods'.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from optuna.samplers import RandomSampler

from autopeft.optimization.samplers import make_sampler
from autopeft.yaml_config import build_config
from tests.test_yaml_config import changed

CODE = """
from dataclasses import dataclass
from optuna.samplers import RandomSampler
from autopeft.evaluation.executor import LocalExecutor
from autopeft.search_spaces import Uniform
from autopeft.tasks import TextClassification

@dataclass(frozen=True, eq=False)
class Ratings(TextClassification):
    scale: int = 5

class Narrow(Uniform):
    pass

class Dice(RandomSampler):
    pass

@dataclass(frozen=True)
class BatchQueue:
    places: int

    def __call__(self, runner):
        return LocalExecutor(runner)
"""
ENTRIES = """
[autopeft.tasks]
ratings = installed_plugin:Ratings
[autopeft.spaces]
narrow = installed_plugin:Narrow
[autopeft.samplers]
dice = installed_plugin:Dice
[autopeft.executors]
batch_queue = installed_plugin:BatchQueue
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package with entry points on the path."""
    folder = tmp_path / "installed_plugin-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-plugin\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(ENTRIES)
    (tmp_path / "installed_plugin.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "installed_plugin", raising=False)


@pytest.mark.usefixtures("installed")
def test_a_file_names_what_another_package_has() -> None:
    settings = changed("task", {"type": "ratings", "dataset": "data.csv", "scale": 7})
    settings |= {"space": {"type": "narrow", "sizes": {"rank": [1, 4]}}, "sampler": "dice"}
    settings["executor"] = {"type": "batch_queue", "places": 3}
    search: Any = build_config(settings).search
    assert (type(search.task).__name__, search.task.scale) == ("Ratings", 7)
    assert (type(search.space).__name__, search.space.sizes) == ("Narrow", {"rank": (1, 4)})
    assert (type(search.executor).__name__, search.executor.places) == ("BatchQueue", 3)
    made = make_sampler(search.sampler, seed=0, number=1)
    assert isinstance(made, RandomSampler)
    assert type(made).__name__ == "Dice"


def test_without_the_package_the_names_are_unknown() -> None:
    with pytest.raises(ValueError, match="Unknown task type 'ratings'"):
        build_config(changed("task", {"type": "ratings", "dataset": "data.csv"}))
    with pytest.raises(ValueError, match="Unknown sampler 'dice'"):
        make_sampler("dice", seed=0)
