"""ParetoFront: its members, choosing from it, and how it looks."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from autopeft.core.evaluation import Evaluation, TrialRecord, with_replicate
from autopeft.core.objectives import Objective, resolve_objectives
from autopeft.core.pareto import Axis, front_records
from autopeft.reporting.configuration_image import configuration_svg
from autopeft.reporting.front import ParetoFront
from autopeft.reporting.verdict import UNKNOWN, state_of
from tests.records import AXES, METRICS, OBJECTIVES, front_of, random_configuration, synthetic_records

ACCURACY, PARAMETERS, MEMORY = OBJECTIVES
POINTS = (
    # accuracy, parameters, MiB
    (0.50, 2_000, 200),  # 0: the cheapest
    (0.80, 20_000, 300),  # 1
    (0.90, 400_000, 900),  # 2: the best
    (0.70, 30_000, 400),  # 3: beaten by 1
    (0.82, 20_000, 500),  # 4: as many parameters as 1, more memory
)


def record(number: int, accuracy: float, parameters: float, mebibytes: float) -> TrialRecord:
    configuration = random_configuration(random.Random(number))
    values = {"accuracy": accuracy, "trainable_parameters": parameters, "peak_memory": mebibytes * 2**20}
    return TrialRecord(
        number=number, evaluation=Evaluation(configuration=configuration, status="complete", values=values)
    )


RECORDS = [record(number, *values) for number, values in enumerate(POINTS)]
FAILED = TrialRecord(
    number=5,
    evaluation=Evaluation(
        configuration=random_configuration(random.Random(5)), status="failed", reason="diverged: loss is nan"
    ),
)


@pytest.fixture
def front() -> ParetoFront:
    return ParetoFront([*RECORDS, FAILED], OBJECTIVES, AXES, search="mine")


def test_members_are_the_trials_none_beats_cheapest_first(front: ParetoFront) -> None:
    assert [point.number for point in front] == [0, 1, 4, 2]
    assert front.members == {0, 1, 2, 4}
    assert len(front) == 4
    assert front[0].number == 0
    assert [point.number for point in front[-2:]] == [4, 2]


def test_members_of_a_synthetic_search_are_those_found_apart() -> None:
    records = synthetic_records(40)
    assert ParetoFront(records, OBJECTIVES, AXES).members == front_of(records)


def test_a_duplicate_is_represented_by_its_original(front: ParetoFront) -> None:
    twin = TrialRecord(number=6, evaluation=RECORDS[2].evaluation, duplicate_of=2)
    assert {record.number for record in front_records([*RECORDS, twin], OBJECTIVES)} == front.members


def test_best_without_bounds_has_the_best_metric(front: ParetoFront) -> None:
    assert front.best().number == 2


@pytest.mark.parametrize(
    ("bounds", "number"),
    [
        ({"trainable_parameters": "20k"}, 4),
        ({"trainable_parameters": 20_000}, 4),  # the bound itself is allowed
        ({"trainable_parameters": 19_999}, 0),
        ({"peak_memory": "300 MiB"}, 1),
        ({"trainable_parameters": "1M", "peak_memory": "1 GiB"}, 2),
        ({"accuracy": 0.81, "trainable_parameters": "100k"}, 4),
        ({"accuracy": "0.85"}, 2),
    ],
)
def test_best_keeps_every_bound(front: ParetoFront, bounds: dict[str, float | str], number: int) -> None:
    assert front.best(**bounds).number == number


def test_best_says_which_point_comes_closest(front: ParetoFront) -> None:
    with pytest.raises(ValueError, match=r"parameters ≤ 1\.0 k.*closest is trial 0: accuracy 0\.5000"):
        front.best(trainable_parameters="1k")
    with pytest.raises(ValueError, match=r"accuracy ≥ 0\.9500.*closest is trial 2"):
        front.best(accuracy=0.95)
    with pytest.raises(ValueError, match=r"accuracy ≥ 0\.8500.*bounds before it.*closest is trial 4"):
        front.best(trainable_parameters="100k", accuracy=0.85)


def test_best_refuses_what_is_no_objective_or_no_amount(front: ParetoFront) -> None:
    with pytest.raises(ValueError, match="did you mean 'peak_memory'"):
        front.best(peak_memry="1 GiB")
    with pytest.raises(ValueError, match="unit of bytes"):
        front.best(peak_memory="1 parsec")
    with pytest.raises(ValueError, match="above 0"):
        front.best(trainable_parameters=0)


def test_among_equals_the_cheapest_is_best() -> None:
    equal = [record(0, 0.8, 5_000, 300), record(1, 0.8, 4_000, 400), record(2, 0.8, 9_000, 200)]
    assert ParetoFront(equal, OBJECTIVES, AXES).best().number == 1


def test_the_knee_gives_away_little_of_the_metric(front: ParetoFront) -> None:
    """A tolerance is a share of the metric's axis, which is 0.8 long."""
    assert front.knee().number == 2
    assert front.knee(tolerance=0.11).number == 4
    assert front.knee(tolerance=0.13).number == 1
    assert front.knee(tolerance=1).number == 0
    with pytest.raises(ValueError, match="tolerance is a share of the metric's axis"):
        front.knee(tolerance=-0.1)


def test_hypervolume_grows_with_the_front(front: ParetoFront) -> None:
    fewer = ParetoFront(RECORDS[:1], OBJECTIVES, AXES)
    assert 0 < fewer.hypervolume < front.hypervolume < 1


def test_a_front_is_thinned_on_request(front: ParetoFront) -> None:
    few = front.thinned(2)
    assert len(few) == len(few.members) == 2
    assert front.knee().number in few.members < front.members
    assert few.records == front.records
    assert few.hypervolume < front.hypervolume
    assert len(front) == 4
    assert [point.number for point in front.thinned(1)] == [front.knee().number]
    assert front.thinned(9).members == front.members
    with pytest.raises(ValueError, match="points is a whole number from 1 up, got 0"):
        front.thinned(0)


def test_an_empty_front_says_so() -> None:
    empty = ParetoFront([FAILED], OBJECTIVES, AXES)
    assert len(empty) == 0
    assert empty.hypervolume == 0
    for choose in (empty.best, empty.knee):
        with pytest.raises(ValueError, match="none of the 1 trials completed"):
            choose()
    assert "0 of 1 trials" in repr(empty)
    assert "0 of 1 trials" in empty._repr_html_()
    assert list(empty.to_frame().columns) == list(ParetoFront(RECORDS, OBJECTIVES, AXES).to_frame().columns)
    assert len(ParetoFront([], OBJECTIVES, AXES).to_frame()) == 0


def test_frames_hold_the_front_or_all_trials(front: ParetoFront) -> None:
    frame = front.to_frame()
    assert list(frame["trial"]) == [0, 1, 4, 2]
    assert list(frame["accuracy"]) == [0.5, 0.8, 0.82, 0.9]
    everything = front.to_frame(all_trials=True)
    assert sorted(everything["trial"]) == [0, 1, 2, 3, 4, 5]
    assert set(everything[everything["front"]]["trial"]) == front.members


def test_the_text_shows_every_point(front: ParetoFront) -> None:
    text = repr(front)
    assert "4 of 6 trials" in text
    for expected in ("0.5000", "400.0 k", "900.0 MiB", "learning rate"):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 140


def test_notebooks_get_a_table(front: ParetoFront) -> None:
    html = front._repr_html_()
    assert "<table" in html
    assert f"hypervolume {front.hypervolume:.4f}" in html
    assert html.count("<tr>") == 1 + len(front)
    for expected in ("0.9000", "400.0 k", "900.0 MiB", "learning rate"):
        assert expected in html
    for point in front:
        assert point.configuration.key not in html
    assert "NaN" not in html


def test_notebooks_show_a_point_with_its_configuration(front: ParetoFront) -> None:
    point = front.best()
    html = point._repr_html_()
    assert html.startswith("<p>trial 2: accuracy 0.9000, trainable_parameters 400.0 k")
    assert configuration_svg(point.configuration) in html
    assert repr(point) == f"{point}\n{point.configuration.grid()}"
    assert str(front.trial(5)) == "trial 5 (failed: diverged: loss is nan)"


def test_a_front_is_read_from_a_study(front: ParetoFront) -> None:
    attributes = {
        "name": "mine",
        "identity": {"search": {"objectives": "accuracy, trainable_parameters, peak_memory"}},
        "metrics": [asdict(Objective.score(name)) for name in ("accuracy", "f1")],
        "axes": [[axis.objective.name, axis.worst, axis.best] for axis in front.axes],
    }
    stored = ParetoFront.stored(attributes, list(reversed(front.records)))
    assert stored.members == front.members
    assert stored.hypervolume == front.hypervolume
    assert stored.records == front.records
    with pytest.raises(ValueError, match="'mine' has no finished trial yet"):
        ParetoFront.stored({"name": "mine"}, [])
    huge = [[axis.objective.name, axis.worst, 10**400] for axis in front.axes]
    with pytest.raises(ValueError, match=r"The study of 'mine' is damaged \(OverflowError"):
        ParetoFront.stored(attributes | {"axes": huge}, front.records)
    attributes["verdict"] = {"state": state_of(front.records), "text": "No better."}
    assert ParetoFront.stored(attributes, front.records).verdict == "No better."
    first, *others = front.records
    again = replace(first.evaluation, seed=first.evaluation.seed + 1)
    evaluation = with_replicate(first.evaluation, again, {"accuracy": 0.0})
    assert ParetoFront.stored(attributes, [replace(first, evaluation=evaluation), *others]).verdict == UNKNOWN


def test_a_plot_has_every_cost(front: ParetoFront) -> None:
    figure = front.plot().to_json()
    assert "trainable_parameters" in figure
    assert "peak_memory" in figure


def test_points_give_configuration_and_values(front: ParetoFront) -> None:
    point = front.best()
    assert point.configuration == RECORDS[2].evaluation.configuration
    assert point.values["accuracy"] == 0.9
    assert str(point) == "trial 2: accuracy 0.9000, trainable_parameters 400.0 k, peak_memory 900.0 MiB"


def test_any_trial_can_be_looked_at(front: ParetoFront) -> None:
    assert front.trial(3).values["accuracy"] == 0.7
    assert front.trial(5).record is FAILED
    with pytest.raises(ValueError, match=r"no trial 9; there are 6 trials"):
        front.trial(9)


def test_a_front_without_its_search_cannot_export(front: ParetoFront, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read without its search"):
        front.best().export(tmp_path)


def test_the_first_metric_chooses() -> None:
    objectives = resolve_objectives(("trainable_parameters", "f1_macro", "accuracy"), METRICS)
    records = []
    for trial in RECORDS:
        values = {**trial.evaluation.values, "f1_macro": 1 - trial.evaluation.values["accuracy"]}
        records.append(replace(trial, evaluation=replace(trial.evaluation, values=values)))
    front = ParetoFront(records, objectives, AXES[:2])
    assert front.metric.name == "f1_macro"
    assert front.best().number == 0


def test_a_metric_that_is_minimised_chooses_its_smallest() -> None:
    loss = Objective(name="loss", direction="minimize", unit="nats", is_metric=True)
    axes = (Axis(objective=loss, worst=2.0, best=0.0), AXES[1])
    records = [
        replace(
            trial,
            evaluation=replace(
                trial.evaluation,
                values={**trial.evaluation.values, "loss": 1 - trial.evaluation.values["accuracy"]},
            ),
        )
        for trial in RECORDS
    ]
    front = ParetoFront(records, (loss, PARAMETERS), axes)
    assert [point.number for point in front] == [0, 4, 2], "cheapest first"
    best = front.best()
    assert best.number == 2
    assert best.values["loss"] == min(point.values["loss"] for point in front)
    assert front.best(trainable_parameters=20_000).values["loss"] == pytest.approx(0.18)
    assert front.best(loss=0.15).number == 2
    with pytest.raises(ValueError, match=r"No point of the front has loss ≤ 0\.0500"):
        front.best(loss=0.05)
    assert front.knee(tolerance=0.001).number == 2


def test_a_front_with_one_more_trial_is_that_of_all_trials(front: ParetoFront) -> None:
    beaten, better = record(6, 0.60, 40_000, 500), record(6, 0.95, 40_000, 350)
    redone = record(1, 0.81, 20_000, 300)  # takes the place of a member that was paused
    assert front.with_trial(beaten).hypervolume == front.hypervolume
    for new in (better, redone):
        grown = front.with_trial(new)
        assert grown.search == "mine"
        assert grown.hypervolume == ParetoFront(grown.records, OBJECTIVES, AXES).hypervolume
        assert grown.hypervolume != front.hypervolume
    assert [known.number for known in front.with_trial(redone).records] == [0, 1, 2, 3, 4, 5]
