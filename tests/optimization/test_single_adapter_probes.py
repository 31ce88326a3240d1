"""One adapter alone at every site: what is left to try, and that a search tries all and then goes on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from optuna.trial import FixedTrial
from torch.nn.functional import cross_entropy

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.objectives import Constraint, resolve_constraints, resolve_objectives
from autopeft.core.pareto import Axis
from autopeft.methods import count_parameters
from autopeft.optimization.single_adapter_probes import single_adapter_probes
from autopeft.search_spaces import History, ScoreGuided
from autopeft.search_spaces.mutation import SizedMethod
from autopeft.sensitivity import compute_scores
from tests.tiny_models import tiny_backbone

BACKBONE = tiny_backbone("bert")
SPACE = ScoreGuided(
    scores=("condition_number",),
    ranks=(2, 16),
    learning_rate=(1e-4, 1e-2),
    modelled=1.0,
    probe_share=1.0,
    guided_trials=1,
)
SPACE = SPACE.with_scores(compute_scores(BACKBONE, (), cross_entropy, SPACE.scores))
QUERY, VALUE, FFN = Site(0, "query"), Site(0, "value"), Site(1, "ffn")
KNOWN = Configuration({QUERY: Adapter("lora", 4)}, learning_rate=1e-3)


def test_what_is_left_is_every_method_alone_at_every_site_where_it_was_not_tried_alone() -> None:
    sized = {name: SizedMethod(method=name, smallest=2, largest=8) for name in ("lora", "series", "parallel")}
    lora = {"lora": sized["lora"]}
    choices = {QUERY: lora, VALUE: lora, FFN: {name: sized[name] for name in ("series", "parallel")}}
    tried = [
        Configuration({}, learning_rate=1e-3),
        Configuration({QUERY: Adapter("lora", 8)}, learning_rate=1e-4),
        Configuration({VALUE: Adapter("lora", 2), FFN: Adapter("parallel", 2)}, learning_rate=1e-3),
        Configuration({FFN: Adapter("series", 2)}, learning_rate=1e-3),
    ]
    expected = [
        Configuration({VALUE: Adapter("lora", 2)}, learning_rate=1e-2),
        Configuration({FFN: Adapter("parallel", 2)}, learning_rate=1e-2),
    ]
    assert single_adapter_probes(choices, tried, 1e-2) == expected


def proposals(
    space: ScoreGuided,
    count: int,
    pending: Sequence[Configuration] = (),
    constraints: Sequence[Constraint] = (),
) -> list[Configuration]:
    """What is proposed one after another where whatever is tried reaches the same, reference points first."""
    metric, cost = resolve_objectives(("accuracy", "trainable_parameters"), ("accuracy",))
    fewest, most = (count_parameters(BACKBONE, one) for one in space.extremes(BACKBONE))
    axes = (
        Axis(objective=metric, worst=0.0, best=1.0),
        Axis(objective=cost, worst=float(most), best=float(fewest)),
    )
    tried = [baseline.configuration for baseline in space.baselines(BACKBONE)]
    first = len(tried)
    for number in range(first, first + count):
        points = [
            {"accuracy": 0.5, "trainable_parameters": float(count_parameters(BACKBONE, one))} for one in tried
        ]
        trials = [*zip(tried, points, strict=True), *((one, {}) for one in pending)]
        history = History(trials=trials, axes=axes, constraints=constraints)
        front = {tried[0]: 0.1, KNOWN: 0.1}
        found = space.propose(number, front, random.Random(number), BACKBONE, history)
        tried.append(space.suggest(FixedTrial(found), BACKBONE))
    return tried[first:]


def test_every_site_is_tried_alone_once_and_then_the_search_goes_on() -> None:
    sites = list(SPACE.choices(BACKBONE))
    found = proposals(SPACE, len(sites) + 4)
    alone = found[: len(sites)]
    assert sorted(site for one in alone for site, _ in one) == sites
    assert {adapter for one in alone for _, adapter in one} == {Adapter("lora", 2)}
    rates = sorted(one.learning_rate for one in alone)
    assert len({*rates}) > len(sites) // 2
    assert 5e-4 < rates[len(rates) // 2] < 2e-3, "near what the front has"
    assert len({*found}) == len(found), "who comes later is somebody else"


def test_who_is_about_to_be_trained_counts_as_tried_and_who_breaks_a_constraint_is_left_out() -> None:
    lone = single_adapter_probes(SPACE.choices(BACKBONE), (), 1e-2)
    counts = {site: count_parameters(BACKBONE, one) for one in lone for site, _ in one}
    bound = min(counts.values())
    allowed = {site for site, count in counts.items() if count == bound}
    assert len(allowed) < len(counts)
    waits = min(allowed)
    pending = [one for one in lone if waits in one.adapters]
    constraints = resolve_constraints({"trainable_parameters": bound}, ("accuracy",))
    found = proposals(SPACE, len(allowed) - 1, pending, constraints)
    assert {site for one in found for site, _ in one} == allowed - {waits}


def test_rates_stay_where_they_are_fixed_and_a_share_of_none_tries_nobody_alone() -> None:
    fixed = proposals(replace(SPACE, learning_rate=2e-3), 4)
    assert {one.learning_rate for one in fixed} == {2e-3}
    assert all(len(one) == 1 for one in fixed)
    others = proposals(replace(SPACE, probe_share=0.0), len(SPACE.choices(BACKBONE)))
    assert {site for one in others if len(one) == 1 for site, _ in one} < SPACE.choices(BACKBONE).keys()


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_outside_of_0_to_1_is_told(share: float) -> None:
    with pytest.raises(ValueError, match=r"probe_share is a share of the modelled trials in \[0, 1\], got"):
        ScoreGuided(probe_share=share)
