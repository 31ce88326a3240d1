"""YAML names a task and a space of a user's own by import path, and a search's folder keeps them so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from autopeft.cli import main
from autopeft.search_document import LOST, save_document
from autopeft.yaml_config import build_config
from tests.own_tasks import OwnTask
from tests.test_yaml_config import changed

OWN = """
from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from autopeft.search_spaces import Uniform
from autopeft.tasks import Task, TextClassification
if TYPE_CHECKING:
    from somewhere import Something

@dataclass(frozen=True, eq=False)
class Ratings(TextClassification):
    folder: Path = Path("ratings")
    scale: int = 5

class Narrow(Uniform):
    pass

class Unfinished(Task):
    pass

class Unreadable(Task):
    def __init__(self, given: Something) -> None:
        pass

def ratings():
    pass
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_ratings.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_ratings", "own_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "own_ratings"


@pytest.mark.parametrize("mark", [":", "."])
def test_a_task_and_a_space_of_ones_own_have_an_import_path(mark: str, own_module: str) -> None:
    task = {"type": f"{own_module}{mark}Ratings", "dataset": "data.csv", "scale": 7, "folder": "there"}
    settings = changed("task", task) | {
        "space": {"type": f"{own_module}{mark}Narrow", "sizes": {"rank": [1, 4]}}
    }
    found: Any = build_config(settings).search
    assert (type(found.task).__name__, found.task.scale, found.task.folder) == ("Ratings", 7, Path("there"))
    assert (type(found.space).__name__, found.space.sizes) == ("Narrow", {"rank": (1, 4)})


def test_a_class_of_ones_own_may_have_the_name_of_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "from autopeft import tasks\nclass Task(tasks.TextClassification):\n    pass\n"
    (tmp_path / "own_names.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    found = build_config(changed("task", {"type": "own_names:Task", "dataset": "data.csv"})).search
    assert type(found.task).__module__ == "own_names"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "own_nowhere:Ratings",
            r"^task type 'own_nowhere:Ratings': importing 'own_nowhere' failed .*No",
        ),
        (
            "own_broken.Ratings",
            r"importing 'own_broken' failed .*No module named 'not_there_at_all'",
        ),
        ("own_ratings:Rating", r"^Unknown Task in own_ratings 'Rating': .* did you mean 'Ratings'"),
        ("own_ratings:ratings", r"^Unknown Task in own_ratings 'ratings': expected one of Ratings, "),
        ("own_ratings:Narrow", r"^Unknown Task in own_ratings 'Narrow'"),
        ("own_ratings:Unfinished", r"^'task': Can't instantiate abstract class Unfinished"),
        ("own_ratings:Unreadable", r"^The types of Unreadable's arguments cannot be read: .*Something"),
    ],
)
def test_a_wrong_import_path_is_named(task: str, message: str, own_module: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(changed("task", {"type": task}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scale", "five", r"^task\.scale should be a whole number, got 'five'"),
        ("scael", 5, r"^Unknown key of 'task' 'scael': .* did you mean 'scale'"),
    ],
)
def test_settings_of_ones_own_are_checked(key: str, value: Any, message: str, own_module: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(changed("task", {"type": "own_ratings:Ratings", "dataset": "data.csv", key: value}))


def test_the_command_finds_modules_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that has the command imported says that it was: the task's data are missing."""
    (tmp_path / "own_here.py").write_text(OWN)
    (tmp_path / "search.yaml").write_text(
        yaml.safe_dump(changed("task", {"type": "own_here:Ratings", "dataset": "missing.csv"}))
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["autopeft", "validate", "search.yaml"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "missing.csv" in capsys.readouterr().err


class NestedTasks:
    class Inner(OwnTask):
        pass


def test_a_task_of_ones_own_is_kept_by_its_import_path(tmp_path: Path) -> None:
    save_document(tmp_path / "search.yaml", {"task": OwnTask(rows=24), "seed": 3})
    kept = yaml.safe_load((tmp_path / "search.yaml").read_text())
    assert kept == {"task": {"type": "tests.own_tasks:OwnTask", "rows": 24}, "seed": 3}


@pytest.mark.parametrize(
    ("task", "lost"),
    [
        (NestedTasks.Inner(), {"task": f"{__name__}.NestedTasks.Inner"}),
        (OwnTask(rows=OwnTask), {"task.rows": "tests.own_tasks.OwnTask"}),  # type: ignore[arg-type]
        (type("OwnTask", (OwnTask,), {"__module__": "__main__"})(), {"task": "__main__.OwnTask"}),
    ],
    ids=("nested", "a setting that is no text", "of a script"),
)
def test_what_no_file_can_name_is_noted(task: Any, lost: dict[str, str], tmp_path: Path) -> None:
    save_document(tmp_path / "search.yaml", {"task": task})
    assert yaml.safe_load((tmp_path / "search.yaml").read_text())[LOST] == lost
