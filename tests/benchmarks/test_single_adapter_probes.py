"""What the benchmark of lone adapters trains, and what it makes of it."""

from __future__ import annotations

import pytest

from autopeft.core.configuration import Adapter, Site
from autopeft.search_spaces.method_choice import MethodChoice
from benchmarks.single_adapter_probes import candidates, correlations, reached
from tests.learnable import tiny_evaluator


def test_every_site_is_trained_alone_and_the_head_too() -> None:
    evaluator = tiny_evaluator(objectives=("accuracy", "trainable_parameters"))
    lora = {"lora": MethodChoice(method="lora", sizes=range(2, 9))}
    sites = Site(0, "query"), Site(1, "value")
    found = candidates(dict.fromkeys(sites, lora), 1e-2)
    assert list(found) == ["head alone", "0.query", "1.value"]
    assert [list(configuration) for configuration in found.values()] == [
        [],
        *([(site, Adapter("lora", 2))] for site in sites),
    ]
    assert {configuration.learning_rate for configuration in found.values()} == {1e-2}
    scores = reached(evaluator, found)
    assert scores.keys() == found.keys()
    hopeless = {"diverges": found["0.query"].replace(learning_rate=1e30)}
    worst = evaluator.task.trivial_score("accuracy", evaluator.data)
    assert reached(evaluator, hopeless) == {"diverges": worst}


def test_correlations_are_with_the_means_and_between_the_seeds() -> None:
    first = {"head alone": 9.0, "a": 1.0, "b": 2.0, "c": 3.0}
    second = {"head alone": 0.0, "a": 3.0, "b": 2.0, "c": 6.0}
    values = {"right": {"a": 0.2, "b": 0.2, "c": 0.5}, "wrong": {"a": 5.0, "b": 6.0, "c": 1.0}}
    found = correlations([first, second], values)
    assert found["right"] == pytest.approx(1.0)
    assert found["wrong"] < -0.8
    assert found["the mean of the other seeds"] == pytest.approx(0.5)
    assert correlations([first], values).keys() == values.keys()
