"""A search that may allocate ranks in training: its front, replicates and exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopeft import Search, load_adapter
from autopeft.search_spaces import Uniform
from autopeft.training.settings import Training
from tests.learnable import outcomes, tiny_search

SPACE = Uniform(sizes={"rank": (8, 8)}, learning_rate=(1e-2, 3e-2), allocations=("elalora",))
TRAINING = Training(epochs=3, batch_size=8, device="cpu", precision="32-true")


def search(folder: Path) -> Search:
    objectives = ("accuracy", "trainable_parameters", "peak_memory")
    return tiny_search(
        folder, space=SPACE, training=TRAINING, objectives=objectives, sampler="ehvi", seeds=2, seed=1
    )


@pytest.mark.slow
def test_what_ranks_came_to_is_on_the_front_and_exported(tmp_path: Path) -> None:
    found = search(tmp_path)
    front = found.run(trials=3, progress=False)
    by_number = {record.number: record for record in front.records}
    asked = [record for record in front.records if record.evaluation.configuration.allocation]
    assert asked
    assert {record.evaluation.status for record in front.records} == {"complete"}
    left = [record for record in front.records if record.derived_from is not None]
    assert left
    for record in left:
        values, parent = record.evaluation.values, by_number[record.trained].evaluation
        assert values["trainable_parameters"] < parent.values["trainable_parameters"]
        assert values["peak_memory"] == parent.values["peak_memory"]
        assert record.evaluation.configuration.allocation is None
    point = next(point for point in front if point.record.derived_from is not None)
    parent = by_number[point.record.trained].evaluation
    assert point.record.evaluation.trainings == parent.trainings == 2
    for retrain in (False, True):
        report = front.trial(point.number).export(tmp_path / f"adapter {retrain}", retrain=retrain)
        card = (report.folder / "README.md").read_text()
        assert f"| ranks allocated in training by | {parent.configuration.allocation} |" in card
    load_adapter(found.open().backbone.model, tmp_path / "adapter False")
    frame = front.to_frame(all_trials=True).set_index("trial")
    assert frame.loc[point.record.trained, "allocation"] == parent.configuration.allocation
    again = search(tmp_path).run(trials=3, progress=False)
    assert outcomes(again.records) == outcomes(front.records)
