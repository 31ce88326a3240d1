"""The verdict of a whole search: a sweep beside it, fresh trainings, and where the sentence is shown."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from mlflow import MlflowClient

from autopeft.core.configuration import Configuration
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.resampled_test import DRAWS, resampled_test
from autopeft.reporting.mlflow.run_content import SEARCH_TAG, VERDICT_TAG
from autopeft.reporting.verdict import UNKNOWN
from autopeft.tasks import TextClassification
from tests.learnable import learnable_task, tiny_evaluator, tiny_search


def random_labels() -> TextClassification:
    """Return the learnable task with labels that nothing tells."""
    task, draw = learnable_task(), random.Random(0)
    assert isinstance(task.dataset, DatasetDict)
    shuffled = {
        name: Dataset.from_dict({"text": split["text"], "label": draw.sample([*split["label"]], len(split))})
        for name, split in task.dataset.items()
    }
    return TextClassification(dataset=DatasetDict(shuffled))


@pytest.mark.slow
def test_random_labels_have_no_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    train = Evaluator.train

    def noted(evaluator: Evaluator, configuration: Any, seed: Any = None, **options: Any) -> Any:
        seeds.append(seed)
        return train(evaluator, configuration, seed, **options)

    monkeypatch.setattr(Evaluator, "train", noted)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    search = tiny_search(tmp_path, task=random_labels(), tracking=store, derive=True)
    front = search.run(trials=2, progress=False)
    assert front.verdict == UNKNOWN
    found = search.verdict(0.1, seeds=2, progress=False)
    assert not found.beats
    used = {record.evaluation.seed for record in front.records}
    assert len({*seeds} - used) >= 2, "fresh ones"
    assert search.front().verdict == str(found)
    trained = len(seeds)
    assert search.verdict(0.1, seeds=2, progress=False) == found
    assert len(seeds) == trained, "what was done is kept"
    (run,) = MlflowClient(store).search_runs(["1"], f"tags.`{SEARCH_TAG}` = 'tiny'")
    assert run.data.tags[VERDICT_TAG] == str(found)
    again = search.run(trials=3, progress=False)
    assert again.verdict == UNKNOWN, "there are other trials"


@pytest.mark.slow
def test_a_share_of_the_compute_is_for_the_verdict(tmp_path: Path) -> None:
    search = tiny_search(tmp_path)
    front = search.run(trials=2, progress=False, verdict=0.25)
    assert "uniform LoRA sweep" in front.verdict != UNKNOWN
    assert "of 33% of the search's compute" in front.verdict
    with pytest.raises(ValueError, match=r"verdict is a share of the compute, .* got 1"):
        search.run(trials=2, verdict=1)


@pytest.mark.slow
def test_the_test_split_is_resampled_alike_for_all_models() -> None:
    evaluator = tiny_evaluator()
    trained = evaluator.train(Configuration(learning_rate=1e-2))
    assert trained.state is not None
    found = resampled_test(evaluator, trained.evaluation.configuration, trained.state)
    assert found[0] == evaluator.test(trained.evaluation.configuration, trained.state)["accuracy"]
    assert found == resampled_test(evaluator, trained.evaluation.configuration, trained.state)
    assert len(found) == 1 + DRAWS
    assert 0 < np.std(found[1:]) < 0.2
    assert np.mean(found[1:]) == pytest.approx(found[0], abs=0.05)
