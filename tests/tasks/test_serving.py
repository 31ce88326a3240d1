"""transformers' pipelines, as a task prepares them, say what the model says of rows cut as in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import pipeline

from autopeft.tasks import MultiLabelClassification, Regression, TextClassification, TokenClassification
from autopeft.tasks.dataset_task import DatasetTask
from tests.learnable import learnable_rows
from tests.task_cases import scored_rows, spelt_rows, splits_of, tagged_rows
from tests.tiny_models import tiny_headed, tiny_tokenizer

LONG = " ".join(f"w{number % 90}" for number in range(200))  # the tiny model has 64 positions
LENGTH = 12


def served(task: DatasetTask) -> tuple[Any, dict[str, Any]]:
    kind = "token-classification" if isinstance(task, TokenClassification) else "text-classification"
    make: Any = pipeline  # typed by the names of kinds
    made = make(kind, model=tiny_headed(task.head, "bert"), tokenizer=tiny_tokenizer())
    return made, task.serve(made)


def logits(made: Any, *texts: str) -> Tensor:
    inputs = tiny_tokenizer()(*texts, truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        found: Tensor = made.model(**inputs).logits[0]
    return found


@pytest.mark.parametrize("text", ["w3 w4", LONG])
def test_the_likeliest_class_has_its_probability(text: str) -> None:
    made, options = served(TextClassification(splits_of(learnable_rows), max_length=LENGTH))
    found, expected = made(text, **options), logits(made, text).softmax(-1)
    assert found[0]["label"] == "abc"[int(expected.argmax())]
    assert found[0]["score"] == pytest.approx(float(expected.max()), abs=1e-6)


def test_every_label_has_its_probability() -> None:
    task = MultiLabelClassification(splits_of(tagged_rows), max_length=LENGTH)
    made, options = served(task)
    found = {entry["label"]: entry["score"] for entry in made(LONG, **options)}
    expected = dict(zip(task.labels, logits(made, LONG).sigmoid().tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-6)


def test_pairs_are_cut_together() -> None:
    task = Regression(splits_of(scored_rows), text=("text", "other"), max_length=LENGTH)
    made, options = served(task)
    pair = {"text": LONG, "text_pair": "w5 w6"}
    assert task.served_example[0].keys() == pair.keys()
    found = made(pair, **options)
    assert found["score"] == pytest.approx(float(logits(made, LONG, "w5 w6")[0]), abs=1e-6)


def test_words_behind_the_length_have_no_tag() -> None:
    made, options = served(TokenClassification(splits_of(spelt_rows), max_length=LENGTH))
    made.model.config.id2label[made.model.config.label2id["O"]] = "none"  # pipelines leave out "O"
    found, expected = made(LONG, **options), logits(made, LONG).argmax(-1)
    names = made.model.config.id2label
    assert [entry["entity"] for entry in found] == [names[int(tag)] for tag in expected]
