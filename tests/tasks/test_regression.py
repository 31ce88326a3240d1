"""Regression: numbers of texts, what is none, and what predicting the mean scores."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from autopeft.models.backbone import Backbone
from autopeft.tasks import Regression
from autopeft.tasks.dataset_task import SPLITS
from tests.learnable import tiny_search
from tests.tiny_models import tiny_headed, tiny_tokenizer


def rows(count: int = 60) -> dict[str, list[Any]]:
    return {"text": [f"w{row}" for row in range(count)], "label": [row % 7 - 3.5 for row in range(count)]}


def task(**settings: Any) -> Regression:
    return Regression(**{"dataset": Dataset.from_dict(rows()), **settings})


def test_splits_are_disjoint_and_limited_by_seed() -> None:
    texts = [set(task().split(name).columns[0]) for name in SPLITS]
    assert [*map(len, texts)] == [48, 6, 6]
    assert len(set.union(*texts)) == 60
    limited = task(train_examples=9)
    assert limited.split("train") == task(train_examples=9).split("train")
    assert len(limited.split("train").labels) == 9
    assert limited.split("train") != task(train_examples=9, seed=1).split("train")


def test_the_trivial_score_is_that_of_the_mean() -> None:
    loaded = task()
    labels, mean = np.array(loaded.split("validation").labels), np.mean(loaded.split("train").labels)
    assert loaded.trivial_score("rmse") == pytest.approx(np.sqrt(((labels - mean) ** 2).mean()))
    assert (loaded.trivial_score("pearson"), loaded.trivial_score("spearman")) == (0, 0)
    assert [loaded.best_score(metric.name) for metric in loaded.metrics] == [1, 1, 0]


def test_correlations_of_predictions_that_are_all_alike_are_zero() -> None:
    metrics = task().metric_collection()
    output, batch = SimpleNamespace(logits=torch.ones(4, 1)), {"labels": torch.arange(4.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics says that they are undefined
        task().update_metrics(metrics, output, batch, torch.tensor(0.0))
        found = metrics.compute()
    assert (float(found["pearson"]), float(found["spearman"])) == (0, 0)


def test_minus_one_is_a_number_and_rows_without_one_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    source = rows()
    source["label"] = [-1.0, None, math.nan, *source["label"][3:]]
    loaded = task(dataset=Dataset.from_dict(source))
    loaded.validate()
    assert "2 of the 60 rows of the train split have no label" in caplog.text
    assert sum(len(loaded.split(name).labels) for name in SPLITS) == 58


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b"] * 20, "Row 0 of the train split has 'a' in 'label', expected a number"),
        ([True, False] * 20, "Row 0 of the train split has True in 'label'"),
        ([[1.0], [2.0]] * 20, r"Row 0 of the train split has \[1.0\] in 'label'"),
        ([0.5, 1.0, math.inf, 2.0] * 10, "Row 2 of the train split has inf in 'label'"),
        ([1.5] * 40, r"All rows of the train split have 1\.5 in 'label'"),
        ([None] * 40, "no labels in the training split"),
    ],
)
def test_what_is_no_number_is_said(labels: list[Any], message: str) -> None:
    data = Dataset.from_dict({"text": ["w1"] * 40, "label": labels})
    with pytest.raises(ValueError, match=message):
        task(dataset=data).validate()


def test_what_is_no_number_in_the_test_split_is_said() -> None:
    strange = Dataset.from_dict({"text": ["w1", "w2"], "label": ["1,5", "2"]})
    with pytest.raises(ValueError, match="Row 0 of the test split has '1,5' in 'label'"):
        task(dataset=DatasetDict(train=Dataset.from_dict(rows()), test=strange)).validate()


def test_a_search_tries_its_export_on_one_number(tmp_path: Path) -> None:
    made = task()
    backbone = Backbone.load(tiny_headed(made.head, "bert"), made.head, tiny_tokenizer())
    objectives = ("pearson", "trainable_parameters")
    tiny_search(tmp_path, backbone=backbone, task=made, objectives=objectives).validate()
