"""The sampler of expected hypervolume improvement, in every space."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.objectives import Constraint, resolve_constraints
from autopeft.core.pareto import Axis, contributions, hypervolume, non_dominated
from autopeft.methods import count_parameters
from autopeft.optimization.candidates import single_adapter_probes
from autopeft.optimization.ehvi_sampler import EhviSampler
from autopeft.optimization.proposal import History
from autopeft.search_spaces import AutoPEFTPaper, PerLayer, ScoreGuided, SearchSpace, Uniform
from autopeft.search_spaces.learning_rates import learning_rate_bounds, log_place, summed_learning_rate
from autopeft.sensitivity import compute_scores
from tests.loss_task import CROSS_ENTROPY
from tests.records import METRICS, OBJECTIVES
from tests.tiny_models import tiny_backbone

BACKBONE = tiny_backbone("bert")
RATE = (1e-4, 1e-2)
GUIDED = ScoreGuided(scores=("condition_number",), sizes={"rank": (2, 16)}, learning_rate=RATE)
GUIDED = GUIDED.with_scores(compute_scores(BACKBONE, (), CROSS_ENTROPY, GUIDED.scores))
MIXED = ScoreGuided(
    scores=("condition_number",),
    methods=("lora", "series", "prefix"),
    sizes={"rank": (2, 9)},
    learning_rate=1e-3,
).with_scores(GUIDED.site_scores)
SPACES: Mapping[str, SearchSpace] = MappingProxyType(
    {
        "guided": GUIDED,
        "guided-mixed": MIXED,
        "per-layer": PerLayer(learning_rate=RATE),
        "per-layer-groups": PerLayer(
            methods=("lora", "ia3"),
            groups=1,
            sizes={"rank": (3, 20)},
            learning_rate=RATE,
            encoding="conditional",
        ),
        "uniform": Uniform(methods=("lora", "ia3"), learning_rate=RATE),
        "paper": AutoPEFTPaper(learning_rate=RATE),
    }
)
ACCURACY, PARAMETERS, MEMORY = OBJECTIVES
PROBES_ALONE = EhviSampler(startup_trials=1, modelled=1.0, probe_share=1.0)
NO_PROBES = EhviSampler(startup_trials=1, modelled=1.0, probe_share=0.0)
Values = Mapping[str, float]


def axes_of(space: SearchSpace) -> tuple[Axis, ...]:
    fewest, most = (count_parameters(BACKBONE, end) for end in space.extremes(BACKBONE))
    return (
        Axis(objective=ACCURACY, worst=0.2, best=1.0),
        Axis(objective=PARAMETERS, worst=float(most), best=float(fewest)),
        Axis(objective=MEMORY, worst=4e6, best=1e6),
    )


def values(space: SearchSpace, configuration: Configuration) -> dict[str, float]:
    """Return made-up outcomes: best at a summed rate of 1e-2, better and dearer the more adapters."""
    fewest, most = (count_parameters(BACKBONE, end) for end in space.extremes(BACKBONE))
    size = log_place(count_parameters(BACKBONE, configuration), fewest, most)
    rate = math.log10(summed_learning_rate(configuration)) + 2
    lowest = 2 if configuration.lowest_block is None else configuration.lowest_block[1]
    return {
        "accuracy": 0.2 + 0.7 * math.exp(-2 * rate**2) * min(1.0, 1.5 * size),
        "trainable_parameters": float(count_parameters(BACKBONE, configuration)),
        "peak_memory": 1e6 * 4 ** (0.3 * (2 - lowest) + 0.3 * size),
    }


def history(
    space: SearchSpace,
    trials: Sequence[tuple[Configuration, Values]],
    constraints: Sequence[Constraint] = (),
) -> History:
    axes = axes_of(space)
    placed = [trial for trial in trials if trial[1]]
    flags = non_dominated([known for _, known in placed], [axis.objective for axis in axes])
    members = [trial for trial, flag in zip(placed, flags, strict=True) if flag]
    shares = contributions([known for _, known in members], axes)
    front = {member: share for (member, _), share in zip(members, shares, strict=True)}
    return History(trials=trials, axes=axes, front=front, constraints=constraints)


def searched(space: SearchSpace, sampler: EhviSampler, count: int) -> list[Configuration]:
    """Return the baselines, and what is chosen one after another."""
    known = [baseline.configuration for baseline in space.baselines(BACKBONE)]
    return searched_from(space, known[:count], sampler, count)


def searched_from(
    space: SearchSpace, known: Sequence[Configuration], sampler: EhviSampler, count: int
) -> list[Configuration]:
    trials = [(configuration, values(space, configuration)) for configuration in known]
    while len(trials) < count:
        chosen = sampler.choose(len(trials), space, BACKBONE, history(space, trials))
        trials.append((chosen, values(space, chosen)))
    return [configuration for configuration, _ in trials]


@pytest.mark.parametrize(
    "name", [name if "guided" in name else pytest.param(name, marks=pytest.mark.slow) for name in SPACES]
)
class TestEverySpace:
    def test_chooses_points_that_were_not_tried_and_follows_from_seed_and_history(self, name: str) -> None:
        space = SPACES[name]
        found = searched(space, EhviSampler(seed=3), 18)
        assert searched(space, EhviSampler(seed=3), 18) == found
        assert searched(space, EhviSampler(seed=4), 18) != found
        first = len(space.baselines(BACKBONE))
        for configuration in found[first:]:
            BACKBONE.check(configuration)
            space.encode(configuration, BACKBONE)
        if name != "uniform":  # it has few points
            assert len({*found}) >= len(found) - 1

    @pytest.mark.slow
    def test_finds_more_than_draws_do(self, name: str) -> None:
        space = SPACES[name]
        worth = {
            modelled: sum(
                hypervolume(
                    [
                        values(space, configuration)
                        for configuration in searched(space, EhviSampler(seed=seed, modelled=modelled), 24)
                    ],
                    axes_of(space),
                )
                for seed in range(3)
            )
            for modelled in (1.0, 0.0)
        }
        assert worth[1.0] > worth[0.0]


def test_startup_trials_have_methods_that_were_not_tried() -> None:
    for seed in range(6):
        found = searched_from(MIXED, [Configuration({}, learning_rate=1e-3)], EhviSampler(seed=seed), 4)
        assert {method for configuration in found for method in configuration.methods} == {*MIXED.methods}


def test_a_share_is_drawn_by_the_space() -> None:
    space = PerLayer(methods=("lora",), learning_rate=RATE)
    trials = [
        (baseline.configuration, values(space, baseline.configuration))
        for baseline in space.baselines(BACKBONE)
    ]
    known, sampler = history(space, trials), EhviSampler(modelled=0.5)
    drawn = 0
    for number in range(20, 60):
        generator = random.Random(f"0:{number}")
        is_drawn = generator.random() >= 0.5
        if is_drawn:
            assert sampler.choose(number, space, BACKBONE, known) == space.draw(generator, BACKBONE)
        drawn += is_drawn
    assert 10 < drawn < 30


def test_candidates_have_rates_near_the_fronts() -> None:
    sites = list(GUIDED.choices(BACKBONE))[:4]
    four = Configuration({site: Adapter("lora", 2) for site in sites}, learning_rate=1e-3)
    head = Configuration({}, learning_rate=1e-2)
    for space in (GUIDED, replace(GUIDED, learning_rate=1e-3)):
        low, high = learning_rate_bounds(space.learning_rate)
        trials = [
            (configuration, values(space, configuration))
            for configuration in (four, head.replace(learning_rate=high))
        ]
        known = history(space, trials)
        found = [NO_PROBES.choose(number, space, BACKBONE, known) for number in range(4, 12)]
        assert all(len(configuration) for configuration in found), "the head alone is a baseline"
        apart = [abs(math.log(summed_learning_rate(configuration) / 4e-3)) for configuration in found]
        assert sum(apart) / len(apart) < 1.5 or low == high
        assert {low <= configuration.learning_rate <= high for configuration in found} == {True}


KNOWN = Configuration({Site(0, "query"): Adapter("lora", 4)}, learning_rate=1e-3)


def probed(
    space: ScoreGuided,
    count: int,
    pending: Sequence[Configuration] = (),
    constraints: Sequence[Constraint] = (),
    sampler: EhviSampler = PROBES_ALONE,
) -> list[Configuration]:
    """Return what is chosen one after another where whatever is tried reaches the same, baselines first."""
    tried = [baseline.configuration for baseline in space.baselines(BACKBONE)]
    first, axes = len(tried), axes_of(space)[:2]
    for number in range(first, first + count):
        points = [
            {"accuracy": 0.5, "trainable_parameters": float(count_parameters(BACKBONE, configuration))}
            for configuration in tried
        ]
        trials: list[tuple[Configuration, Values]] = [*zip(tried, points, strict=True)]
        known = History(
            trials=[*trials, *((configuration, {}) for configuration in pending)],
            axes=axes,
            front={tried[0]: 0.1, KNOWN: 0.1},
            constraints=constraints,
        )
        tried.append(sampler.choose(number, space, BACKBONE, known))
    return tried[first:]


def test_every_site_is_tried_alone_once_and_then_the_search_goes_on() -> None:
    sites = list(GUIDED.choices(BACKBONE))
    found = probed(GUIDED, len(sites) + 4)
    alone = found[: len(sites)]
    assert sorted(site for configuration in alone for site, _ in configuration) == sites
    assert {adapter for configuration in alone for _, adapter in configuration} == {Adapter("lora", 2)}
    rates = sorted(configuration.learning_rate for configuration in alone)
    assert len({*rates}) > len(sites) // 2
    assert 5e-4 < rates[len(rates) // 2] < 2e-3, "near what the front has"
    assert len({*found}) == len(found), "what comes later is something else"


def test_what_is_being_trained_counts_as_tried_and_what_breaks_a_constraint_is_left_out() -> None:
    alone = single_adapter_probes(GUIDED.choices(BACKBONE), (), 1e-2)
    counts = {
        site: count_parameters(BACKBONE, configuration)
        for configuration in alone
        for site, _ in configuration
    }
    bound = min(counts.values())
    allowed = {site for site, count in counts.items() if count == bound}
    assert len(allowed) < len(counts)
    waits = min(allowed)
    pending = [configuration for configuration in alone if waits in configuration.adapters]
    constraints = resolve_constraints({"trainable_parameters": bound}, METRICS)
    found = probed(GUIDED, len(allowed) - 1, pending, constraints)
    assert {site for configuration in found for site, _ in configuration} == allowed - {waits}


def test_rates_stay_where_they_are_fixed_and_a_share_of_none_tries_no_site_alone() -> None:
    fixed = probed(replace(GUIDED, learning_rate=2e-3), 4)
    assert {configuration.learning_rate for configuration in fixed} == {2e-3}
    assert all(len(configuration) == 1 for configuration in fixed)
    others = probed(GUIDED, len(GUIDED.choices(BACKBONE)), sampler=NO_PROBES)
    assert {site for other in others if len(other) == 1 for site, _ in other} < GUIDED.choices(
        BACKBONE
    ).keys()


def test_a_space_without_single_adapters_is_not_probed() -> None:
    found = searched(SPACES["uniform"], EhviSampler(probe_share=1.0), 12)
    assert min(len(configuration) for configuration in found) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe_share": -0.1}, r"probe_share is a share of the modelled trials in \[0, 1\], got"),
        ({"probe_share": 1.5}, r"probe_share is a share of the modelled trials"),
        ({"modelled": float("nan")}, r"modelled is a share of the trials"),
        ({"startup_trials": 0}, "startup_trials is a number of trials"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EhviSampler(**options)
