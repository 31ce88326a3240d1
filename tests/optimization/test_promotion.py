"""Promotion: of the trials that pause at a rung, which go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from autopeft import SuccessiveHalving
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import VALIDATION_LOSS, Cost, CurvePoint, Evaluation, TrialRecord
from autopeft.core.objectives import Objective, resolve_objectives
from autopeft.core.pareto import Axis
from autopeft.optimization.successive_halving import AshaPromoter

METRICS = (Objective.score("accuracy"), Objective.score("f1"))
OBJECTIVES = resolve_objectives(("accuracy", "trainable_parameters"), METRICS)
AXES = (
    Axis(objective=OBJECTIVES[0], worst=0.0, best=1.0),
    Axis(objective=OBJECTIVES[1], worst=1e6, best=1e2),
)
ERROR = Objective(name="error", direction="minimize", unit="nats", is_metric=True)
ERRORS = (ERROR, OBJECTIVES[1])
ERROR_AXES = (Axis(objective=ERROR, worst=0.0, best=-1.0), AXES[1])
GENERATED = Objective.score("bleu", at_end=True)
RUNGS = (10, 30, 90)
HALVING = SuccessiveHalving(rungs=(1 / 9, 1 / 3), reduction_factor=2)


def trial(
    number: int, parameters: float, *accuracies: float, status: str | None = None, loss: float = math.nan
) -> TrialRecord:
    """Make a trial that reached as many rungs as it has accuracies, with one validation loss at all."""
    steps = RUNGS[len(accuracies) - 1]
    status = status or ("complete" if len(accuracies) == len(RUNGS) else "paused")
    curves = [
        CurvePoint(metric=name, step=step, value=value)
        for step, value in zip(RUNGS, accuracies, strict=False)
        for name in ("accuracy", "f1", "training_loss")
    ]
    curves += [CurvePoint(metric=VALIDATION_LOSS, step=point.step, value=loss) for point in curves[::3]]
    evaluation = Evaluation(
        configuration=Configuration({Site(0, "query"): Adapter("lora", number + 1)}),
        status=status,  # type: ignore[arg-type]
        reason=None if status == "complete" else "because",
        values={
            "accuracy": max(accuracies),
            "trainable_parameters": parameters,
            "training_seconds": float(steps),
        },
        curves=tuple(curves),
        cost=Cost(steps=steps),
        fidelity=steps / RUNGS[-1],
    )
    return TrialRecord(number=number, evaluation=evaluation)


def with_errors(record: TrialRecord) -> TrialRecord:
    """Return a trial with the negative of its accuracy, which is better when smaller."""
    evaluation = record.evaluation
    curves = [
        replace(point, metric="error", value=-point.value) if point.metric == "accuracy" else point
        for point in evaluation.curves
    ]
    values = {**evaluation.values, "error": -evaluation.values["accuracy"]}
    del values["accuracy"]
    return replace(record, evaluation=replace(evaluation, values=values, curves=tuple(curves)))


def next_of(records: Sequence[TrialRecord], halving: SuccessiveHalving = HALVING) -> tuple[int, int] | None:
    """Return which trial goes on to which rung: the same, whether more or less of a metric is better."""
    score, error = (
        AshaPromoter(halving, RUNGS, objectives, axes, objectives[0]).next(trials)
        for objectives, axes, trials in (
            (OBJECTIVES, AXES, records),
            (ERRORS, ERROR_AXES, [with_errors(record) for record in records]),
        )
    )
    found, mirrored = (
        None if promotion is None else (promotion[0].number, promotion[1]) for promotion in (score, error)
    )
    assert found == mirrored
    return found


def test_one_of_the_factor_goes_on() -> None:
    assert next_of([]) is None
    assert next_of([trial(0, 1e3, 0.5)]) == (0, 1), "a first one goes on: a short search ends with a front"
    assert next_of([trial(0, 1e3, 0.5, 0.6)]) == (0, 2)
    first = trial(0, 1e3, 0.5, 0.6, 0.7)
    assert next_of([first, trial(1, 2e3, 0.4)]) is None
    assert next_of([first, trial(1, 2e3, 0.4), trial(2, 3e3, 0.8), trial(3, 4e3, 0.6)]) == (2, 1)


def test_what_costs_less_goes_on_beside_what_is_better() -> None:
    records = [trial(0, 1e5, 0.9), trial(1, 1e2, 0.4), trial(2, 1e5, 0.5), trial(3, 1e5, 0.6)]
    first = next_of(records)
    assert first is not None
    chosen = {first[0]}
    others = [record for record in records if record.number != first[0]]
    accuracy = records[first[0]].evaluation.values["accuracy"]
    went_on = trial(first[0], records[first[0]].evaluation.values["trainable_parameters"], accuracy, 0.9, 0.9)
    second = next_of([went_on, *others])
    assert second is not None
    assert chosen | {second[0]} == {0, 1}


def test_the_highest_rung_comes_first() -> None:
    records = [trial(0, 1e3, 0.5, 0.6), trial(1, 1e2, 0.9), trial(2, 1e4, 0.3, 0.4)]
    assert next_of(records) == (0, 2)


def test_a_trial_beaten_beyond_the_noise_waits() -> None:
    # Three whole trainings gained 0.1, 0.2 and 0.3 after the first rung: noise of 0.1.
    known = [trial(n, 5e5, 0.1, 0.1, 0.2 + 0.1 * n) for n in range(3)]
    better = trial(3, 1e3, 0.50, 0.6, 0.7)
    promotion = AshaPromoter(HALVING, RUNGS, OBJECTIVES, AXES, OBJECTIVES[0])
    assert promotion.forecast(known).gains(better.evaluation, RUNGS[0]) == pytest.approx([0.1, 0.2, 0.3])
    near, far = trial(4, 2e3, 0.45), trial(5, 2e3, 0.30)
    assert promotion.next([*known, better, near]) == (near, 1)
    assert promotion.next([*known, better, far]) is None


def test_a_trial_that_cannot_be_hoped_to_pass_a_whole_training_waits() -> None:
    # Whole trainings gained 0.2 in the median after the first rung, with noise of 0.1.
    known = [trial(n, 5e5, 0.1, 0.1, 0.2 + 0.1 * n) for n in range(3)]
    promotion = AshaPromoter(HALVING, RUNGS, OBJECTIVES, AXES, OBJECTIVES[0])
    whole = trial(3, 1e3, 0.1, 0.1, 0.7, status="complete")
    hopeful, hopeless = trial(4, 2e3, 0.50), trial(4, 2e3, 0.15)
    assert promotion.next([*known, whole, hopeful]) == (hopeful, 1)
    assert promotion.next([*known, whole, hopeless]) is None
    cheaper = trial(4, 9e2, 0.15)
    assert promotion.next([*known, whole, cheaper]) == (cheaper, 1)


def test_what_has_learned_nothing_is_not_tried_again() -> None:
    # All that cost the least have one score: promotion by rank alone would train each to the end.
    known = [trial(n, 1e2, 0.3, 0.3, 0.3) for n in range(3)]
    assert next_of([*known, *(trial(n, 1e2, 0.3) for n in range(3, 9))]) is None
    other = trial(9, 1e2, 0.31)
    assert next_of([*known, *(trial(n, 1e2, 0.3) for n in range(3, 9)), other]) == (9, 1)


def test_where_the_metric_tells_none_apart_the_loss_decides() -> None:
    # Also where the score that all have is not the majority's.
    known = [trial(n, 5e5, 0.3, 0.5, 0.6 + 0.1 * n, loss=0.6) for n in range(3)]
    waiting = [trial(3, 2e3, 0.3, loss=0.65), trial(4, 2e3, 0.3, loss=0.4), trial(5, 2e3, 0.3, loss=0.5)]
    assert next_of([*known, *waiting]) == (4, 1)
    went_on = trial(4, 2e3, 0.3, 0.5, 0.6, loss=0.4)
    assert next_of([*known, waiting[0], went_on, waiting[2]]) == (5, 1)
    cheaper = trial(6, 1e3, 0.3, loss=0.6)
    assert next_of([*known, waiting[0], went_on, cheaper]) == (6, 1), "none that costs less has a lower loss"


def test_a_loss_that_is_not_known_comes_last() -> None:
    known = [trial(n, 5e5, 0.3, 0.5, 0.6 + 0.1 * n, loss=0.6) for n in range(3)]
    waiting = [trial(3, 2e3, 0.3), trial(4, 2e3, 0.3, loss=0.5)]
    assert next_of([*known, *waiting]) == (4, 1)


def test_of_those_at_the_majoritys_score_one_of_the_factor_goes_on_by_loss() -> None:
    # By the metric none would go on: others that cost the same have begun to raise it.
    known = [trial(n, 1e3, 0.5, 0.7, 0.70 + 0.01 * n, loss=0.2) for n in range(3)]
    known.append(trial(9, 5e5, 0.5, 0.7, 0.9, loss=0.2))
    late = [trial(3 + n, 1e3, 0.0, loss=loss) for n, loss in enumerate((0.65, 0.4, 0.5, 0.6))]
    assert next_of([*known, late[0]]) is None, "fewer than the factor"
    assert next_of([*known, *late]) == (4, 1)
    went_on = trial(4, 1e3, 0.0, 0.5, 0.6, loss=0.4)
    assert next_of([*known, went_on, *late[:1], *late[2:]]) == (5, 1), "one of two"
    lost = trial(5, 1e3, 0.0, 0.0, 0.0, loss=0.5)
    assert next_of([*known, went_on, lost, late[0], late[3]]) is None
    dearer = [trial(record.number, 6e5, 0.0, loss=0.4) for record in late]
    assert next_of([*known, *dearer]) is None, "one that costs less is as good as can be hoped for"


def test_the_first_at_the_trivial_score_goes_on_where_none_has_begun() -> None:
    assert next_of([trial(0, 1e3, 0.0, loss=0.5)]) == (0, 1)
    assert next_of([trial(0, 1e3, 0.0, 0.0, loss=0.5)]) == (0, 2)
    assert next_of([trial(0, 1e3, 0.0, 0.0, loss=0.5), trial(1, 2e3, 0.4, 0.5)]) == (1, 2)


def test_a_trial_at_the_trivial_score_keeps_none_waiting() -> None:
    # Late ones gained much, those that had begun little: a late one is expected to pass those.
    late = [trial(n, 5e5, 0.0, 0.4, 0.80 + 0.001 * n, loss=0.65) for n in range(5)]
    begun = [trial(n, 5e5, 0.5, 0.55, 0.60 + 0.001 * n, loss=0.2) for n in range(5, 10)]
    cheaper, better = trial(10, 1e3, 0.0, loss=0.65), trial(11, 2e3, 0.5, loss=0.2)
    promotion = AshaPromoter(
        SuccessiveHalving(rungs=(1 / 9, 1 / 3), reduction_factor=12), RUNGS, OBJECTIVES, AXES, OBJECTIVES[0]
    )
    known = [*late, *begun, cheaper, better]
    forecast = promotion.forecast(known)
    assert forecast.values(cheaper.evaluation)[0] > forecast.values(better.evaluation)[0]
    assert promotion.next(known) == (better, 1)


def test_what_is_hoped_for_is_what_those_of_like_costs_gained() -> None:
    # Large ones gain much after the first rung, small ones little.
    large = [trial(n, 5e5 + n, 0.2, 0.4, 0.7 + 0.01 * n) for n in range(5)]
    small = [trial(n, 2e2 + n, 0.3, 0.3, 0.3 + 0.01 * (n - 5)) for n in range(5, 10)]
    promotion = AshaPromoter(HALVING, RUNGS, OBJECTIVES, AXES, OBJECTIVES[0])
    another, dear = trial(10, 3e2, 0.28), trial(11, 6e5, 0.28)
    known = [*large, *small]
    assert promotion.forecast(known).gains(another.evaluation, RUNGS[0]) == pytest.approx(
        [0.04, 0.03, 0.02, 0.01, 0.0]
    )
    assert promotion.forecast(known).values(another.evaluation)[0] == pytest.approx(0.30)
    assert promotion.forecast(known).values(dear.evaluation)[0] == pytest.approx(0.80)
    assert promotion.next([*known, another]) is None
    assert promotion.next([*known, dear]) == (dear, 1)


def test_reference_points_go_on_whatever_a_rung_says() -> None:
    known = [trial(n, 1e3, 0.5, 0.6, 0.7) for n in range(3)]
    worst = trial(3, 5e5, 0.1)
    assert next_of([*known, worst]) is None
    promotion = AshaPromoter(HALVING, RUNGS, OBJECTIVES, AXES, OBJECTIVES[0], ["uniform lora 8"])
    reference, other = (replace(worst, baseline=name) for name in ("uniform lora 8", "uniform lora 64"))
    assert promotion.next([*known, reference]) == (reference, 1)
    assert promotion.next([*known, other]) is None, "no baseline of those that always go on"


def test_what_is_hoped_for_is_what_those_of_like_loss_gained() -> None:
    # All cost the same and have the same metric at the rung; those of low loss have begun to learn.
    begun = [trial(n, 1e3, 0.3, 0.5, 0.7 + 0.01 * n, loss=1.4) for n in range(5)]
    stuck = [trial(n, 1e3, 0.3, 0.3, 0.3, loss=1.7) for n in range(5, 10)]
    promotion = AshaPromoter(HALVING, RUNGS, OBJECTIVES, AXES, OBJECTIVES[0])
    near, far, unknown = (trial(10, 1e3, 0.3, loss=loss) for loss in (1.45, 1.65, math.nan))
    forecast = promotion.forecast([*begun, *stuck])
    assert forecast.values(near.evaluation)[0] == pytest.approx(0.72)
    assert forecast.values(far.evaluation)[0] == pytest.approx(0.3)
    assert forecast.values(unknown.evaluation)[0] == pytest.approx(0.3), "as bad a loss as any"
    lost = trial(11, 1e3, 0.3, 0.3, 0.3)
    assert promotion.forecast([*begun, *stuck, lost]).values(near.evaluation)[0] == pytest.approx(0.72)
    dear = trial(12, 1.2e3, 0.3, loss=1.45)  # all others cost the same, which is no measure of costs
    assert forecast.values(dear.evaluation)[0] == pytest.approx(0.72)


def test_one_whole_training_tells_what_it_gained() -> None:
    promotion = AshaPromoter(HALVING, RUNGS, OBJECTIVES, AXES, OBJECTIVES[0])
    forecast = promotion.forecast([trial(0, 1e3, 0.3, 0.5, 0.7, loss=1.0)])
    assert forecast.values(trial(1, 5e3, 0.2, loss=2.0).evaluation)[0] == pytest.approx(0.6)


def test_a_rung_at_which_none_has_learned_anything_stops_those_alone_that_cost_more_than_the_best() -> None:
    # As with Matthews correlation, which is 0 until the rarer class is predicted at all.
    cheap = [trial(n, 1e2 * (n + 1), 0.0, 0.0, gained) for n, gained in enumerate((0.0, 0.8))]
    best = trial(2, 1e6, 0.0, 0.0, 0.9)
    waiting = [trial(n, 9e5 - 1e3 * n, 0.0) for n in range(3, 8)]
    assert next_of([*cheap, best, *waiting[:2]]) is None, "one of two goes on"
    assert next_of([*cheap, best, *waiting]) == (3, 1), "the first, not the cheapest"
    assert next_of([*cheap, trial(2, 3e2, 0.0, 0.0, 0.9), *waiting]) is None
    failed = [trial(n, 1e2 * (n + 1), 0.0, 0.0, 0.0) for n in range(3)]
    assert next_of([*failed, *waiting]) == (3, 1), "that cheap ones have not learned says nothing of others"


def test_failures_duplicates_and_infeasible_ones_do_not_count() -> None:
    duplicate = TrialRecord(number=9, evaluation=trial(1, 1e2, 0.9).evaluation, duplicate_of=1)
    failed = trial(3, 1e2, 0.9, status="failed")
    first = trial(0, 1e3, 0.5, 0.6, 0.7)
    assert next_of([first, duplicate, failed]) is None
    assert next_of([first, trial(1, 1e2, 0.9), duplicate, failed]) == (1, 1)


def test_a_paused_trial_is_expected_to_gain_what_others_gained() -> None:
    promotion = AshaPromoter(HALVING, RUNGS, OBJECTIVES, AXES, OBJECTIVES[0])
    paused = trial(3, 7e2, 0.4, 0.3)
    assert promotion.forecast([]).values(paused.evaluation) == [0.4, 7e2]
    known = [trial(n, 1e3, 0.1, 0.5, 0.5 + gain) for n, gain in enumerate((0.1, 0.2, 0.6))]
    assert promotion.forecast(known).values(paused.evaluation) == [pytest.approx(0.6), 7e2]


def test_a_metric_that_is_minimised_is_expected_to_fall_as_others_fell() -> None:
    promotion = AshaPromoter(HALVING, RUNGS, ERRORS, ERROR_AXES, ERROR)
    # The best validation counts, which is not the last one.
    stopped = with_errors(trial(3, 7e2, 0.4, 0.3))
    assert promotion.forecast([]).scores_at(stopped.evaluation, RUNGS[1]) == {"error": -0.4}
    gained = [trial(n, 1e3, 0.1, 0.5, 0.5 + gain) for n, gain in enumerate((0.1, 0.2, 0.6))]
    forecast = promotion.forecast([with_errors(record) for record in gained])
    assert forecast.values(stopped.evaluation) == [pytest.approx(-0.6), 7e2]
    assert forecast.beyond(stopped.evaluation, RUNGS[1], -0.4)[0] == pytest.approx(-0.6)


def test_the_promising_are_the_same_of_scores_and_of_errors() -> None:
    known = [trial(n, 5e5, 0.1, 0.1, 0.2 + 0.1 * n) for n in range(3)]
    waiting = [trial(3, 1e3, 0.50), trial(4, 2e3, 0.45), trial(5, 6e5, 0.9, 0.9), trial(6, 2e2, 0.0)]
    records = [*known, *waiting]
    promising = AshaPromoter(HALVING, RUNGS, OBJECTIVES, AXES, OBJECTIVES[0]).promising(records)
    mirrored = AshaPromoter(HALVING, RUNGS, ERRORS, ERROR_AXES, ERROR).promising(
        [with_errors(record) for record in records]
    )
    found, expected = ([(record.number, rung) for record, rung in pairs] for pairs in (mirrored, promising))
    assert found == expected == [(3, 1), (5, 2)]


def with_generated(record: TrialRecord, bleu: float) -> TrialRecord:
    """Return a trial with a metric that is only measured at the end."""
    evaluation = record.evaluation
    return replace(record, evaluation=replace(evaluation, values={**evaluation.values, "bleu": bleu}))


def test_what_is_measured_at_the_end_alone_is_left_out_at_rungs() -> None:
    objectives = (OBJECTIVES[0], GENERATED, OBJECTIVES[1])
    axes = (AXES[0], Axis(objective=GENERATED, worst=0.1, best=1.0), AXES[1])
    promotion = AshaPromoter(HALVING, RUNGS, objectives, axes, OBJECTIVES[0])
    assert GENERATED not in promotion.objectives
    known = [trial(n, 5e5, 0.1, 0.1, 0.2 + 0.1 * n) for n in range(3)]
    whole = [with_generated(record, 0.5 - 0.2 * record.number) for record in known]
    better, near, far = trial(3, 1e3, 0.50, 0.6, 0.7), trial(4, 2e3, 0.45), trial(5, 2e3, 0.30)
    whole.append(with_generated(better, 0.0))
    assert promotion.next([*whole, near]) == (near, 1)
    assert promotion.next([*whole, far]) is None
    without = AshaPromoter(HALVING, RUNGS, OBJECTIVES, AXES, OBJECTIVES[0])
    assert promotion.promising([*whole, near, far]) == without.promising([*known, better, near, far])


def test_what_is_measured_at_the_end_alone_is_expected_to_be_the_median() -> None:
    objectives = (OBJECTIVES[0], GENERATED, OBJECTIVES[1])
    axes = (AXES[0], Axis(objective=GENERATED, worst=0.1, best=1.0), AXES[1])
    promotion = AshaPromoter(HALVING, RUNGS, objectives, axes, OBJECTIVES[0])
    waiting = trial(9, 2e3, 0.4).evaluation
    assert promotion.forecast([]).values(waiting) == [0.4, 0.1, 2e3], "as bad as a model that learnt nothing"
    whole = [with_generated(trial(n, 1e3, 0.4, 0.5, 0.5), bleu) for n, bleu in enumerate((0.9, 0.2, 0.3))]
    assert promotion.forecast(whole).values(waiting) == [pytest.approx(0.5), 0.3, 2e3]
