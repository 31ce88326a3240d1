"""Speed of generation as an objective: with adapters attached, and with what can be merged in the weights."""

from __future__ import annotations

from typing import Any

import pytest

from autopeft.core.configuration import Configuration
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.packing.trainer import PackedTrainer
from autopeft.methods import count_parameters
from tests.evaluation.test_language_models import evaluator_of, lora
from tests.every_method import EVERY_METHOD
from tests.tiny_models import everywhere, fingerprint

SPEEDS = ("tokens_per_second", "tokens_per_second_merged")
OBJECTIVES = ("loss", "trainable_parameters", *SPEEDS)


def attached_when_generating(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> list[Configuration]:
    """Return a list that gets what the backbone carries each time that text is generated."""
    task, seen = evaluator.task, []
    generate = task.generate_tokens

    def generate_tokens(*arguments: Any) -> int:
        assert evaluator.backbone.attached is not None
        seen.append(evaluator.backbone.attached)
        return generate(*arguments)

    monkeypatch.setitem(vars(task), "generate_tokens", generate_tokens)
    return seen


def test_what_is_merged_is_not_attached_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = evaluator_of(OBJECTIVES)
    seen = attached_when_generating(evaluator, monkeypatch)
    before = fingerprint(evaluator.backbone.model)
    first, other = (evaluator.evaluate(lora(evaluator.backbone, rate)) for rate in (1e-2, 1e-3))
    assert fingerprint(evaluator.backbone.model) == before
    assert all(first.values[name] > 0 for name in SPEEDS)
    assert first.values[SPEEDS[1]] == other.values[SPEEDS[1]]
    plain = Configuration()
    assert set(seen) == {first.configuration, plain, other.configuration}
    assert seen.count(plain) == seen.count(other.configuration) > 1

    seen.clear()
    prefixes = everywhere(evaluator.backbone, "prefix").adapters
    mixed = Configuration({**prefixes, **lora(evaluator.backbone).adapters})
    assert evaluator.evaluate(mixed).status == "complete"
    assert {attached.methods for attached in seen} == {("lora", "prefix"), ("prefix",)}


def test_a_speed_is_that_of_the_tokens_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = evaluator_of(OBJECTIVES, count=100)
    rows = len(evaluator.data.rows("validation"))  # type: ignore[attr-defined]
    model = evaluator.backbone.model.eval()
    assert evaluator.task.generate_tokens(model, evaluator.data, 5) == 5 * min(rows, 8)
    seconds = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(seconds)))
    monkeypatch.setitem(vars(evaluator.task), "generate_tokens", lambda *_: 80)
    assert evaluator.generation_speed() == 80.0


def test_speeds_are_measured_at_the_first_pause_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = evaluator_of(OBJECTIVES)
    configuration = lora(evaluator.backbone)
    paused = evaluator.train(configuration, rung=0)
    assert paused.evaluation.status == "paused"
    seen = attached_when_generating(evaluator, monkeypatch)
    values = evaluator.train(configuration, paused=paused.paused).evaluation.values
    assert {name: values[name] for name in SPEEDS} == {
        name: paused.evaluation.values[name] for name in SPEEDS
    }
    assert not seen


def test_nothing_is_generated_unless_an_objective_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = evaluator_of()
    seen = attached_when_generating(evaluator, monkeypatch)
    evaluation = evaluator.evaluate(lora(evaluator.backbone))
    assert evaluation.status == "complete"
    assert not seen
    assert not set(SPEEDS) & evaluation.values.keys()


@pytest.mark.slow
def test_packed_trials_have_speeds_of_their_own() -> None:
    evaluator = evaluator_of(OBJECTIVES)
    configurations = [lora(evaluator.backbone, rate) for rate in (1e-2, 1e-3)]
    first, other = (trained.evaluation.values for trained in PackedTrainer(evaluator).train(configurations))
    assert first["tokens_per_second"] != other["tokens_per_second"]
    assert first["tokens_per_second_merged"] == other["tokens_per_second_merged"]


def test_the_untrained_model_has_speeds_and_no_bytes() -> None:
    values = evaluator_of(OBJECTIVES).evaluate(Configuration()).values
    assert all(values[name] > 0 for name in SPEEDS)
    assert values["adapter_bytes"] == 0


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_every_method_generates(method: str) -> None:
    evaluator = evaluator_of(OBJECTIVES)
    configuration = everywhere(evaluator.backbone, method)
    if not len(configuration):
        pytest.skip(f"a Llama has no place for {method}")
    evaluation = evaluator.evaluate(configuration)
    assert evaluation.status == "complete", evaluation.reason
    trained = 4 * count_parameters(evaluator.backbone, configuration)
    # What is not trained, but written.
    kept = method in ("sparse", "lora_sparse", "lora_fa", "lora_ga", "lora_xs", "corda")
    found = evaluation.values["adapter_bytes"]
    assert found > trained if kept else found == trained
