"""The tracker of a user's own in the documentation, run as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from autopeft.evaluation.executor import LocalExecutor
from autopeft.reporting.tracker import Tracker
from tests.learnable import tiny_search

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "own-tracker.md"


@pytest.fixture
def own_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Tracker]:
    """Return the page's class; it writes to the working directory."""
    (code, *_) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "json_lines.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import json_lines  # type: ignore[import-not-found]

    made: type[Tracker] = json_lines.JsonLines
    return made


def test_a_tracker_of_ones_own_has_every_trial(
    own_tracker: type[Tracker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = tiny_search(tmp_path, tracking=own_tracker)
    front = search.run(trials=4)
    lines = [json.loads(line) for line in Path(f"{search.name}.jsonl").read_text().splitlines()]
    trials = {line["trial"]: line for line in lines if "trial" in line}
    assert trials.keys() == {record.number for record in front.records}
    for record in front.records:
        names = [objective.name for objective in search.objectives]
        values = {name: record.evaluation.values.get(name) for name in names}
        assert trials[record.number]["values"] == values
    hypervolumes = [line["hypervolume"] for line in lines if "step" in line]
    assert hypervolumes[-1] == front.hypervolume > 0
    assert f"Trials: {search.name}.jsonl" in capsys.readouterr().out
    with pytest.raises(ValueError, match="MLflow tracking URI to register in"):
        search.register(front.best().number, "reviews")


def test_what_a_tracker_raises_ends_the_call_and_loses_nothing(tmp_path: Path) -> None:
    class Broken(Tracker):
        def __init__(self, **_: Any) -> None:
            pass

        def trial_finished(self, record: Any) -> None:
            if record.number == 1:
                raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        tiny_search(tmp_path, tracking=Broken).run(trials=3, progress=False)
    search = tiny_search(tmp_path)
    assert [record.number for record in search.front().records] == [0, 1]
    assert len(search.run(trials=3, progress=False).records) == 3


def test_a_run_ends_in_the_tracker_also_where_workers_cannot_be_stopped(tmp_path: Path) -> None:
    ended: list[str] = []

    class Ends(Tracker):
        def __init__(self, **_: Any) -> None:
            pass

        def finish(self, status: str, records: Any = ()) -> None:
            ended.append(status)

    class Unstoppable(LocalExecutor):
        alters_trials = False

        def close(self) -> None:
            raise OSError("out of reach")

    with pytest.raises(OSError, match="out of reach"):
        tiny_search(tmp_path, tracking=Ends, executor=Unstoppable).run(trials=1, progress=False)
    assert ended == ["FAILED"]
