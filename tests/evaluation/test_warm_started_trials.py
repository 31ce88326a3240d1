"""The trainings of a trial that inherits its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autopeft.core.jobs import New, Replicate, Resume
from autopeft.core.seeding import training_seed
from autopeft.evaluation.largest_lora import LargestLora
from autopeft.evaluation.warm_start import WarmStartError, WarmStarts, initial_weights
from tests.search.test_warm_start import SPACE, chosen_of, distance, runner_of, warm_runner


@pytest.mark.slow
def test_each_training_of_a_trial_inherits_from_one_of_its_own(tmp_path: Path) -> None:
    runner, weights = warm_runner(tmp_path)
    configuration = chosen_of(weights, rate=1e-9)
    record = runner.run(New(number=7, configuration=configuration, rung=None))
    assert record.evaluation.warm_start
    again = runner.run(Replicate(record=record, training=1))
    again = runner.run(Replicate(record=again, training=2))
    assert again.evaluation.trainings == 3
    states = [initial_weights(weights, record.evaluation, number) for number in range(3)]
    for number, state in enumerate(states):
        assert state is not None
        # A rate of next to nothing: what was trained is what it began from.
        known = runner.evaluator.train(configuration, 0, initial_weights=state).evaluation.values
        seed = training_seed(0, 7, number)
        assert again.evaluation.by_seed[seed]["accuracy"] == pytest.approx(known["accuracy"])
        assert again.evaluation.by_seed[seed]["validation_loss"] == pytest.approx(
            known["validation_loss"], abs=1e-5
        )
    assert distance(states[0] or {}, states[1] or {}) > 1e-3
    assert distance(states[1] or {}, states[2] or {}) > 1e-3
    files = sorted(path.name for path in (tmp_path / "warm_starts").iterdir())
    assert files == [f"largest-{number}.safetensors" for number in range(3)]
    read = WarmStarts(runner.evaluator, SPACE, tmp_path / "warm_starts")
    assert read.cost == weights.cost
    assert read.cost.steps == 3 * runner.evaluator.plan.total_steps


def test_if_a_further_largest_lora_fails_the_first_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner, weights = warm_runner(tmp_path)
    record = runner.run(New(number=3, configuration=chosen_of(weights), rung=None))
    assert weights.cost_to_come([record.evaluation], 3).steps == 2 * weights.cost.steps
    save = LargestLora.save
    monkeypatch.setattr(LargestLora, "save", lambda *_: 1 / 0)
    again = runner.run(Replicate(record=record, training=1))
    assert again.evaluation.trainings == 2
    assert not again.evaluation.failures
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.setattr(LargestLora, "save", save)
    runner.run(Replicate(record=again, training=2))  # from the third
    resumed = WarmStarts(runner.evaluator, SPACE, tmp_path / "warm_starts")
    assert resumed.cost == weights.cost
    assert sorted(resumed._trained) == [0, 2]
    assert sorted(resumed._failures) == [1]
    assert resumed.cost_to_come([record.evaluation], 3).steps == 0


def test_a_trial_whose_weights_are_gone_cannot_be_trained_again(tmp_path: Path) -> None:
    runner, weights = warm_runner(tmp_path)
    record = runner.run(New(number=3, configuration=chosen_of(weights), rung=None))
    with pytest.raises(WarmStartError, match="give the search warm_start=True"):
        initial_weights(None, record.evaluation)
    (tmp_path / "warm_starts" / "largest-0.safetensors").unlink()
    gone = WarmStarts(runner.evaluator, SPACE, tmp_path / "warm_starts", trains=False)
    with pytest.raises(WarmStartError, match=r"there is no file largest-0\.safetensors in"):
        initial_weights(gone, record.evaluation)
    again = runner_of(runner.evaluator, tmp_path, gone).run(Replicate(record=record, training=1)).evaluation
    (reason,) = again.failures.values()
    assert "The largest LoRA that the trial was initialised from is gone" in reason
    assert again.values["accuracy"] < record.evaluation.values["accuracy"]
    paused = replace(record, evaluation=replace(record.evaluation, status="paused", reason="paused"))
    lost = runner_of(runner.evaluator, tmp_path, gone).run(Resume(record=paused, rung=1)).evaluation
    assert lost.status == "failed"
    assert lost.cost == record.evaluation.cost
