from __future__ import annotations

from dataclasses import replace

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Evaluation, TrialRecord
from autopeft.core.objectives import Objective
from benchmarks.family_fronts import trivial_trials


def test_trials_at_the_trivial_score_or_worse_and_failed_ones_came_to_nothing() -> None:
    accuracy = Objective.score("accuracy")
    whole = Evaluation(configuration=Configuration(), status="complete", values={})
    evaluations = [replace(whole, values={"accuracy": value}) for value in (0.19, 0.2, 0.21)]
    evaluations += [whole, replace(whole, status="failed", reason="diverged")]  # the first was not measured
    records = [TrialRecord(number=number, evaluation=each) for number, each in enumerate(evaluations)]
    assert trivial_trials(records, accuracy, 0.2) == 3
    loss = Objective(name="loss", direction="minimize", unit="", is_metric=True)
    values = [replace(whole, values={"loss": value}) for value in (0.19, 0.2, 0.21)]
    assert trivial_trials([TrialRecord(number=0, evaluation=each) for each in values], loss, 0.2) == 2
