"""Multi-label classification: lists and columns of labels, what is none, and the trivial score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from sklearn import metrics as sklearn_metrics

from autopeft.tasks import MultiLabelClassification
from autopeft.tasks.dataset_task import SPLITS

LISTS = [["toxic"], [], ["rude", "toxic"], ["rude"]]


def task(labels: list[Any] | None = None, **settings: Any) -> MultiLabelClassification:
    labels = LISTS * 15 if labels is None else labels
    data = Dataset.from_dict({"text": [f"w{row}" for row in range(len(labels))], "label": labels})
    return MultiLabelClassification(**{"dataset": data, **settings})


def columns(toxic: list[Any], rude: list[Any]) -> MultiLabelClassification:
    data = Dataset.from_dict({"text": [f"w{row}" for row in range(len(toxic))], "toxic": toxic, "rude": rude})
    return MultiLabelClassification(data, label=("toxic", "rude"))


def test_lists_and_columns_are_the_same_labels() -> None:
    lists = task()
    lists.validate()
    assert lists.labels == ("rude", "toxic")
    assert set(lists.split("train").labels) == {(0, 1), (0, 0), (1, 1), (1, 0)}
    toxic, rude = ([int(name in row) for row in LISTS * 15] for name in ("toxic", "rude"))
    apart = columns(toxic, rude)
    apart.validate()
    assert apart.labels == ("toxic", "rude")
    for name in SPLITS:
        assert apart.split(name).columns == lists.split(name).columns
        assert apart.split(name).labels == tuple(labels[::-1] for labels in lists.split(name).labels)
    assert dict(apart.head.config)["problem_type"] == "multi_label_classification"


def test_names_of_class_labels() -> None:
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["x", "y", "z"]))})
    data = Dataset.from_dict({"text": ["w1", "w2"] * 20, "label": [[0, 2], [1]] * 20}, features=features)
    loaded = MultiLabelClassification(data)
    loaded.validate()
    assert loaded.labels == ("x", "y", "z")
    assert set(loaded.split("train").labels) == {(1, 0, 1), (0, 1, 0)}


def test_rows_without_labels_are_left_out_and_rows_of_no_label_are_not() -> None:
    loaded = task([None, *LISTS * 10])
    assert sum(len(loaded.split(name).labels) for name in SPLITS) == 40
    loaded = columns([1, 0, -1, None, *[0, 1] * 20], [0, 1, 1, 1, *[0, 1] * 20])
    assert sum(len(loaded.split(name).labels) for name in SPLITS) == 42


def test_the_trivial_score_is_that_of_frequencies() -> None:
    loaded = task([["a", "b"], ["a"], ["a"], ["b"], []] * 20)
    labels = torch.tensor(loaded.split("validation").labels)
    always_a = torch.zeros_like(labels)
    always_a[:, 0] = 1
    expected = sklearn_metrics.f1_score(labels, always_a, average="micro")
    assert loaded.trivial_score("f1_micro") == pytest.approx(expected)
    assert loaded.trivial_score("mean_average_precision") == pytest.approx(float(labels.float().mean()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: task(["a,b", "a"] * 20), "Row 0 of the train split has 'a,b' in 'label', expected a list"),
        (
            lambda: columns([0, 1, 0, 3] * 9, [0, 1] * 18),
            "Row 3 of the train split has 3 in 'toxic'",
        ),
        (lambda: task([["a"], []] * 20), r"at least two labels in 'label', got \('a',\)"),
        (lambda: task([["a", "b"], *[[]] * 99]), "No row of the validation split has a label"),
        (lambda: task([None] * 9 + [["a"]], text="label"), "label names the column of labels"),
        (lambda: task(label=("label", "labels")), "column of the train split 'labels'.*did you mean 'label'"),
    ],
)
def test_what_is_wrong_is_said(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().validate()


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_label_that_training_lacks_is_said_with_its_row(name: str) -> None:
    train = Dataset.from_dict({"text": ["w1"] * 40, "label": LISTS * 10})
    strange = Dataset.from_dict({"text": ["w1"] * 3, "label": [None, ["rude"], ["rude", "toxc"]]})
    with pytest.raises(ValueError, match=f"Row 2 of the {name} split has the label 'toxc'.*'toxic'"):
        MultiLabelClassification(DatasetDict({"train": train, name: strange})).validate()
