"""When what earlier fronts had is tried: early, and as long as what it costs in vain is a tenth of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import Cost, Evaluation, TrialRecord
from autopeft.core.pareto import fixed_axes
from autopeft.optimization.ehvi_sampler import EhviSampler
from autopeft.optimization.proposal import History, nothing_is_served
from autopeft.optimization.proposer import Proposer
from autopeft.optimization.trial_records import TrialRecords
from autopeft.search_spaces import Baseline, PerLayer
from autopeft.search_spaces.prior import Prior
from tests.records import OBJECTIVES
from tests.tiny_models import tiny_backbone

BACKBONE = tiny_backbone("bert")
SPACE = PerLayer(methods=("lora",), sizes={"rank": (1, 8)}, learning_rate=(3e-4, 1e-2))
STANDING = SPACE.baselines(BACKBONE)[:3]
EARLIER = tuple(
    Baseline(
        name=f"trial {size} of earlier", configuration=SPACE.point({Site(1, "query"): Adapter("lora", size)})
    )
    for size in (1, 2, 4, 8)
)


def proposer(**changes: Any) -> Proposer:
    given: dict[str, Any] = {
        "space": SPACE,
        "backbone": BACKBONE,
        "sampler": "random",
        "objectives": OBJECTIVES,
        "axes": (),
        "view": None,
        "seed": 0,
        "constraints": (),
        "baselines": STANDING,
        "prior": Prior(baselines=EARLIER),
        "forecast": None,
        "are_states_served": None,
    }
    return Proposer(**(given | changes))


def known(records: Sequence[TrialRecord]) -> TrialRecords:
    return TrialRecords(OBJECTIVES, records)


def trial(number: int, baseline: str | None, *, steps: int, accuracy: float) -> TrialRecord:
    """Make a trial up; the larger its number, the more parameters it has."""
    values = {"accuracy": accuracy, "trainable_parameters": float(number + 1), "peak_memory": 1.0}
    configuration = SPACE.point({Site(0, "value"): Adapter("lora", 1 + number)})
    evaluation = Evaluation(
        configuration=configuration, status="complete", values=values, cost=Cost(steps=steps)
    )
    return TrialRecord(number=number, evaluation=evaluation, baseline=baseline)


def proposed(*, good: bool, trials: int = 24) -> list[str | None]:
    """Return the baselines that a search tries, the prior's for 10 steps and others for 30."""
    records: list[TrialRecord] = []
    for number in range(trials):
        name = proposer().propose(number, known(records)).baseline
        is_earlier = name is not None and name.endswith("earlier")
        accuracy = 0.5 + number / 100 if not is_earlier or good else 0.0
        records.append(trial(number, name, steps=10 if is_earlier else 30, accuracy=accuracy))
    return [record.baseline for record in records]


STANDING_NAMES, EARLIER_NAMES = ([baseline.name for baseline in each] for each in (STANDING, EARLIER))


def test_what_is_good_is_tried_at_once_behind_the_first_two() -> None:
    assert proposed(good=True)[:8] == [*STANDING_NAMES[:2], *EARLIER_NAMES, STANDING_NAMES[2], None]


def test_what_is_bad_takes_a_tenth_of_the_steps() -> None:
    names = proposed(good=False)
    assert names[:4] == [*STANDING_NAMES[:2], EARLIER_NAMES[0], STANDING_NAMES[2]]
    assert [name for name in names if name in EARLIER_NAMES] == EARLIER_NAMES
    for end in range(4, len(names)):
        steps = [10 if name in EARLIER_NAMES else 30 for name in names[:end]]
        assert sum(step for step in steps if step == 10) <= 0.1 * sum(steps) + 10


def test_the_sampler_is_told_what_is_left_of_cuts_on_the_front() -> None:
    told: list[History] = []

    class Watching(EhviSampler):
        def choose(self, *arguments: Any) -> Configuration:
            told.append(arguments[-1])
            return SPACE.point()

    def evaluation(rank: int, *, accuracy: float, derived: tuple[Evaluation, ...] = ()) -> Evaluation:
        values = {"accuracy": accuracy, "trainable_parameters": float(rank), "peak_memory": 1.0}
        point = SPACE.point({Site(0, "value"): Adapter("lora", rank)})
        return Evaluation(
            configuration=point, status="complete", values=values, cost=Cost(steps=1), derived=derived
        )

    good, bad = (evaluation(rank, accuracy=accuracy) for rank, accuracy in ((4, 0.8), (7, 0.1)))
    record = TrialRecord(number=0, evaluation=evaluation(8, accuracy=0.9, derived=(good, bad)))
    ends = [{"trainable_parameters": parameters, "peak_memory": parameters} for parameters in (1.0, 9.0)]
    axes = fixed_axes(OBJECTIVES, {"accuracy": (0.0, 1.0)}, ends)
    asked = proposer(sampler=Watching(), baselines=(), prior=Prior(), axes=axes)
    asked.propose(1, known([record]))
    assert told[0].cuts == [good.configuration]
    assert [configuration for configuration, _ in told[0].trials] == [record.evaluation.configuration]


def test_one_is_tried_at_a_time_and_duplicates_cost_nothing() -> None:
    records = [trial(number, name, steps=30, accuracy=0.9) for number, name in enumerate(STANDING_NAMES)]
    assert proposer().propose(3, known(records)).baseline == EARLIER_NAMES[0]
    assert proposer().propose(4, known(records), [EARLIER[0].configuration]).baseline is None
    bad = trial(3, EARLIER_NAMES[0], steps=30, accuracy=0.0)
    assert proposer().propose(4, known([*records, bad])).baseline is None
    same = replace(bad, duplicate_of=0)
    assert proposer().propose(4, known([*records, same])).baseline == EARLIER_NAMES[1]


def test_without_standing_baselines_the_prior_begins() -> None:
    assert proposer(baselines=()).propose(0, known([])).baseline == EARLIER_NAMES[0]
    assert proposer(prior=Prior()).propose(0, known([])).baseline == STANDING_NAMES[0]


def test_rates_of_earlier_searches_reach_the_sampler() -> None:
    seen: list[Any] = []

    class Watching(EhviSampler):
        def choose(self, number: int, space: Any, backbone: Any, history: Any) -> Configuration:
            seen.append(history.earlier_rates)
            return super().choose(number, space, backbone, history)

    prior = Prior(rates={"series": 1e-3})
    proposer(baselines=(), prior=prior, sampler=Watching(), are_states_served=nothing_is_served).propose(
        0, known([])
    )
    assert seen == [{"series": 1e-3}]
