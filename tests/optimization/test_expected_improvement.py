"""The expected gain in hypervolume: equal to sampling it, and it leads a search in every space."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.objectives import COST_OBJECTIVES, Constraint, Objective, resolve_constraints
from autopeft.core.pareto import Axis, hypervolume
from autopeft.methods import count_parameters
from autopeft.optimization import expected_improvement
from autopeft.optimization.expected_improvement import _LEARNED_TRIALS, ExpectedImprovement, Features
from autopeft.optimization.gaussian_process import GaussianProcess, Inputs
from autopeft.optimization.proposal import History
from autopeft.search_spaces import PerLayer, ScoreGuided
from autopeft.search_spaces.learning_rates import log_place
from autopeft.sensitivity import compute_scores
from tests.loss_task import CROSS_ENTROPY
from tests.records import METRICS, OBJECTIVES
from tests.tiny_models import tiny_backbone

BACKBONE = tiny_backbone("bert")
SPACE = ScoreGuided(scores=("condition_number",), sizes={"rank": (1, 16)}, learning_rate=(1e-4, 1e-2))
SPACE = SPACE.with_scores(compute_scores(BACKBONE, (), CROSS_ENTROPY, SPACE.scores))
FEWEST, MOST = (count_parameters(BACKBONE, extreme) for extreme in SPACE.extremes(BACKBONE))
ACCURACY, PARAMETERS, MEMORY = OBJECTIVES
AXES = (
    Axis(objective=ACCURACY, worst=0.2, best=1.0),
    Axis(objective=PARAMETERS, worst=MOST, best=FEWEST),
    Axis(objective=MEMORY, worst=4e6, best=1e6),
)
FEATURES = Features.of(SPACE, BACKBONE)


def values(configuration: Configuration) -> dict[str, float]:
    """Return made-up outcomes: best at a rate of 3e-3, better and dearer the more and lower the adapters."""
    rate = log_place(configuration.learning_rate, 1e-4, 1e-2)
    lowest, share, size = FEATURES.of_cost(configuration)
    return {
        "accuracy": 0.2 + 0.7 * math.exp(-8 * (rate - 0.75) ** 2) * min(1.0, 1.5 * size),
        "trainable_parameters": float(count_parameters(BACKBONE, configuration)),
        "peak_memory": 1e6 * 4 ** (0.6 * (1 - lowest) + 0.3 * share),
    }


def drawn(count: int, seed: int) -> list[Configuration]:
    generator = random.Random(seed)
    roles = sorted({site.role for site in SPACE.choices(BACKBONE)})
    return [
        Configuration(
            {
                Site(block, role): Adapter("lora", generator.randint(1, 16))
                for block in range(generator.randint(0, 1), 2)
                for role in generator.sample(roles, 3)
            },
            learning_rate=float(f"{1e-4 * 100 ** generator.random():.3g}"),
        )
        for _ in range(count)
    ]


def history(trials: Sequence[Configuration], **constraints: float | str) -> History:
    return History(
        trials=[(trial, values(trial)) for trial in trials],
        axes=AXES,
        constraints=resolve_constraints(constraints, METRICS),
    )


def test_the_gain_is_that_of_sampled_outcomes() -> None:
    trials, candidates = drawn(4, 0), drawn(6, 1)
    known = history(trials)
    gain = ExpectedImprovement(known, FEATURES)
    reached, _ = gain._models["accuracy"].predict(FEATURES.inputs(trials, ACCURACY))
    front = [
        {**values(configuration), "accuracy": mean}
        for configuration, mean in zip(trials, reached.tolist(), strict=True)
    ]
    before = hypervolume(front, AXES)
    normal = np.random.default_rng(0).standard_normal((400, 2))
    means, deviations = zip(
        gain._models["accuracy"].predict(FEATURES.inputs(candidates, ACCURACY)),
        gain._models["peak_memory"].predict(FEATURES.inputs(candidates, MEMORY)),
        strict=True,
    )
    for index, candidate in enumerate(candidates):
        gains = []
        for accuracy, memory in normal:
            outcome = {
                "accuracy": means[0][index] + deviations[0][index] * accuracy,
                "trainable_parameters": float(count_parameters(BACKBONE, candidate)),
                "peak_memory": math.exp(means[1][index] + deviations[1][index] * memory),
            }
            gains.append(hypervolume([*front, outcome], AXES) - before)
        error = 3 * float(np.std(gains)) / math.sqrt(len(gains)) + 5e-4
        assert gain([candidate])[0] == pytest.approx(float(np.mean(gains)), abs=error)
    assert max(gain(candidates)) > 0.01


def test_what_breaks_a_constraint_gains_nothing() -> None:
    trials, candidates = drawn(24, 0), drawn(40, 1)
    free = ExpectedImprovement(history(trials), FEATURES)(candidates)
    bound = ExpectedImprovement(history(trials, trainable_parameters=1500.0, peak_memory="2.2 MB"), FEATURES)
    for candidate, before, after in zip(candidates, free, bound(candidates), strict=True):
        costs = values(candidate)
        if costs["trainable_parameters"] > 1500 or costs["peak_memory"] > 2.3e6:
            assert after < 0.1 * before + 1e-6
        elif costs["peak_memory"] < 2.1e6:
            assert after == pytest.approx(before, rel=0.1)


def test_a_lucky_training_does_not_say_what_is_left_to_gain() -> None:
    trials, candidates = drawn(24, 0), drawn(24, 1)
    known = history(trials)
    lucky = min(range(24), key=lambda index: abs(known.trials[index][1]["accuracy"] - 0.6))
    shown = [
        (configuration, {**found, "accuracy": 0.95} if index == lucky else found)
        for index, (configuration, found) in enumerate(known.trials)
    ]
    honest, once, often = (
        ExpectedImprovement(observed, FEATURES)
        for observed in (
            known,
            replace(known, trials=shown),
            replace(known, trials=shown, trainings=[20 if index == lucky else 1 for index in range(24)]),
        )
    )
    dominated = [len(gain._cells) for gain in (honest, once, often)]
    assert dominated[0] - dominated[1] < 0.5 * (dominated[0] - dominated[2])
    assert sum(once(candidates)) > sum(often(candidates))


@pytest.mark.parametrize("is_log", [False, True])
def test_a_metric_that_is_minimised_gains_as_much(is_log: bool) -> None:
    error = Objective(name="error", direction="minimize", unit="nats", is_metric=True, log_scale=is_log)

    def of(accuracy: float) -> float:
        return math.exp(-accuracy) if is_log else -accuracy

    known, candidates = history(drawn(24, 0)), drawn(12, 1)
    mirrored = replace(
        known,
        trials=[
            (configuration, {**found, "error": of(found["accuracy"])})
            for configuration, found in known.trials
        ],
        axes=(Axis(objective=error, worst=of(0.2), best=of(1.0)), *AXES[1:]),
    )
    expected = ExpectedImprovement(known, FEATURES)(candidates)
    assert max(expected) > 0.001
    assert ExpectedImprovement(mirrored, FEATURES)(candidates) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_adapter_parameters_are_counted_also_where_there_are_none() -> None:
    adapters = COST_OBJECTIVES["adapter_parameters"]
    trials, candidates = [*drawn(12, 0), Configuration(learning_rate=3e-3)], drawn(12, 1)
    axes = (AXES[0], Axis(objective=adapters, worst=MOST, best=1.0))

    def values_of(configuration: Configuration) -> dict[str, float]:
        return {
            "accuracy": values(configuration)["accuracy"],
            "adapter_parameters": float(adapter_count(configuration)),
        }

    counts = sorted(map(adapter_count, candidates))
    bound = Constraint(objective=adapters, bound=counts[5])
    trial_values = [(trial, values_of(trial)) for trial in trials]
    free, bounded = (
        ExpectedImprovement(History(trials=trial_values, axes=axes, constraints=constraints), FEATURES)
        for constraints in ((), (bound,))
    )
    for candidate, gain, kept in zip(candidates, free(candidates), bounded(candidates), strict=True):
        assert kept == (gain if adapter_count(candidate) <= counts[5] else 0)
    assert all(0 <= gain < 1 for gain in free([Configuration(learning_rate=1e-2)]))


def adapter_count(configuration: Configuration) -> int:
    return count_parameters(BACKBONE, configuration) - BACKBONE.head_parameters


def test_the_best_has_not_been_tried() -> None:
    trials = drawn(8, 0)
    gain = ExpectedImprovement(history(trials), FEATURES)
    candidates = drawn(5, 1)
    compute = [FEATURES.compute(candidate, lambda block: False) for candidate in candidates]
    best = gain.best(candidates)
    assert best == int(np.argmax(gain(candidates) / compute))
    assert gain.best([*trials, candidates[0]]) == len(trials)
    assert gain.best(trials) is None


@pytest.mark.parametrize(("served", "ratio"), [({1}, 1.25 / 0.75), ({0, 2}, 1.25 / 1.0)])
def test_what_takes_less_compute_may_gain_less(served: set[int], ratio: float) -> None:
    upper = Configuration({Site(1, "query"): Adapter("lora", 8)}, learning_rate=3e-3)
    lower = upper.replace(adapters={Site(0, "query"): Adapter("lora", 8)})
    compute = [FEATURES.compute(configuration, served.__contains__) for configuration in (lower, upper)]
    assert compute[0] / compute[1] == pytest.approx(ratio)
    gains = []
    for seed in range(8):  # accuracy and parameters alone: where adapters sit is worth nothing
        known = replace(history(drawn(8, seed)), axes=AXES[:2], are_states_served=served.__contains__)
        gain = ExpectedImprovement(known, FEATURES)
        more, less = gain([lower, upper])
        assert gain.best([lower, upper]) == (0 if more > ratio * less else 1)
        gains.append(more / less)
    assert any(1 < advantage < ratio for advantage in gains)


def test_a_ladder_has_no_backward_pass_through_the_blocks() -> None:
    sites = {Site(0, "block"): Adapter("ladder", 4)}
    alone = Configuration(sites)
    mixed = Configuration({**sites, Site(1, "query"): Adapter("lora", 8)})
    assert [FEATURES.frozen_share(each) for each in (alone, mixed)] == [1.0, 0.5]
    assert FEATURES.of_cost(alone)[0] == 1.0
    upper = Configuration({Site(1, "block"): Adapter("ladder", 4)})
    compute = [FEATURES.compute(each, lambda block: block == 1) for each in (alone, mixed, upper)]
    assert compute == [0.75, 1.0, 0.5]


def test_gradients_of_an_encoder_s_ladder_go_back_through_the_decoder() -> None:
    backbone = tiny_backbone("t5")
    features = Features.of(PerLayer(methods=("ladder",), learning_rate=1e-3), backbone)
    shares = {
        stack: features.frozen_share(Configuration({Site(0, "block", stack=stack): Adapter("ladder", 4)}))
        for stack in backbone.stacks
    }
    assert shares == {"encoder": 0.0, "decoder": 1.0}


def test_a_placement_tells_sites_and_sizes() -> None:
    sites = list(FEATURES.choices)
    configuration = Configuration({sites[1]: Adapter("lora", 16), sites[4]: Adapter("lora", 4)})
    assert FEATURES.placement(configuration) == pytest.approx(
        [{1: 1.0, 4: 0.75}.get(index, 0.0) for index in range(len(sites))]
    )


def test_what_does_not_follow_from_the_learning_rate_is_worked_out_once() -> None:
    candidates = [each.replace(learning_rate=rate) for each in drawn(8, 2) for rate in (1e-3, 2e-3, 3e-3)]
    features, counter = replace(FEATURES), f"{expected_improvement.__name__}.count_parameters"
    with patch(counter, side_effect=count_parameters) as counting:
        for objective in (ACCURACY, MEMORY):
            features.inputs(candidates, objective)
    assert counting.call_count == 8


def test_many_adapters_at_a_low_rate_count_as_one_at_a_high_rate() -> None:
    sites = list(FEATURES.choices)
    single = Configuration({sites[0]: Adapter("lora", 1)}, learning_rate=8e-3)
    four = Configuration({site: Adapter("lora", 1) for site in sites[:4]}, learning_rate=2e-3)
    rates = [FEATURES.of_metric(each)[0] for each in (single, four, single.replace(learning_rate=4e-4))]
    assert rates[0] == pytest.approx(rates[1])
    assert rates[0] - rates[2] == pytest.approx(1.0), "a factor of twenty"


def test_costs_know_neither_rates_nor_placements_and_metrics_no_frozen_blocks() -> None:
    seconds = COST_OBJECTIVES["training_seconds"]
    upper = Configuration({Site(1, "query"): Adapter("lora", 8)}, learning_rate=3e-3)
    lower = upper.replace(adapters={Site(0, "query"): Adapter("lora", 8)})
    fast = upper.replace(learning_rate=6e-3)
    for cost in (MEMORY, seconds):
        features, placements = FEATURES.inputs([upper, lower, fast], cost)
        assert placements.shape == (3, 0)
        assert features[0].tolist() == features[2].tolist() != features[1].tolist()
    features, placements = FEATURES.inputs([upper, lower, fast], ACCURACY)
    assert features[0].tolist() == features[1].tolist() != features[2].tolist()
    assert placements[0].tolist() == placements[2].tolist() != placements[1].tolist()


def test_a_measured_cost_is_learned_from_the_blocks_it_takes() -> None:
    seconds = COST_OBJECTIVES["training_seconds"]
    trials = drawn(24, 0)
    outcomes = [{**values(trial), "training_seconds": FEATURES.of_cost(trial)[0] + 1.0} for trial in trials]
    known = History(
        trials=list(zip(trials, outcomes, strict=True)),
        axes=(*AXES[:2], Axis(objective=seconds, worst=3.0, best=0.5)),
    )
    gain = ExpectedImprovement(known, FEATURES)
    upper = Configuration({Site(1, "query"): Adapter("lora", 8)}, learning_rate=3e-3)
    lower = upper.replace(adapters={Site(0, "query"): Adapter("lora", 8)})
    (above, below), _ = gain._predicted(seconds, [upper, lower])
    assert above > below + 0.1, "they differ in nothing but the blocks below"


def test_of_very_many_trials_the_model_learns_from_those_that_add_most_and_the_latest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """400 trials, of which all but 100 are on the front."""
    trials, given = drawn(400, 0), list[int]()

    class Counted(GaussianProcess):
        def __init__(self, inputs: Inputs, *rest: Any, **options: Any) -> None:
            given.append(len(inputs.features))
            super().__init__(inputs, *rest, **options)

        def predict(self, inputs: Inputs) -> Any:
            given.append(len(inputs.features))
            return super().predict(inputs)

    monkeypatch.setattr(expected_improvement, "GaussianProcess", Counted)
    order = np.random.default_rng(0).permutation(300) / 300
    reached = [*(0.5 + 0.4 * order), *[0.4] * 100]
    known = [
        {"accuracy": accuracy, "trainable_parameters": max(5e3, 1e4 * accuracy), "peak_memory": 2e6}
        for accuracy in reached
    ]
    added = dict(zip(trials, order.tolist(), strict=False))
    shown = History(trials=list(zip(trials, known, strict=True)), axes=AXES, front=added)
    gain = ExpectedImprovement(shown, FEATURES)
    assert max(given) == _LEARNED_TRIALS
    most = sorted(range(300), key=lambda place: -added[trials[place]])[:_LEARNED_TRIALS]
    assert gain._learned_from(range(400)) == sorted(most)
    assert gain._placed == sorted(most)
    few = [*range(0, 300, 3), *range(300, 400)]  # of the front, and of the others
    assert gain._learned_from(few) == [*few[:100], *few[-28:]]


def test_a_learning_rate_next_to_a_tried_one_counts_as_tried() -> None:
    trials = drawn(8, 0)
    gain = ExpectedImprovement(history(trials), FEATURES)
    tried = trials[3]
    near = [tried.replace(learning_rate=tried.learning_rate * factor) for factor in (0.85, 1.15)]
    assert gain.best(near) is None
    assert gain.best([*near, tried.replace(learning_rate=tried.learning_rate * 1.3)]) == 2
    adapters = dict(list(tried.adapters.items())[1:])
    assert gain.best([*near, Configuration(adapters, learning_rate=tried.learning_rate)]) == 2


def test_methods_are_told_apart_by_models_of_costs_alone() -> None:
    space = PerLayer(methods=("lora", "dora", "series"), learning_rate=1e-3)
    features = Features.of(space, BACKBONE)

    def having(*methods: str) -> Configuration:
        roles = {"series": "ffn"}
        return Configuration(
            {Site(block, roles.get(name, "query")): Adapter(name, 16) for block, name in enumerate(methods)}
        )

    shares = [features.of_cost(having(*names))[3:] for names in (("lora",), ("dora",), ("lora", "series"))]
    assert shares == [[0, 0], [1, 0], [0, 0.5]]
    sizes = [features.of_metric(having(name)) for name in ("lora", "dora")]
    assert len(sizes[0]) == len(sizes[1]) == 2 + len(space.allocations)
