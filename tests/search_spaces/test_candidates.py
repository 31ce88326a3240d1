"""What `ScoreGuided` chooses from: refinements against the scores too, and rates near the front's."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from torch.nn.functional import cross_entropy

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.optimization.gaussian_process import Array
from autopeft.optimization.local_search import local_search
from autopeft.search_spaces import ScoreGuided
from autopeft.search_spaces.base import summed_learning_rate
from autopeft.search_spaces.mutation import Mutator, SizedMethod
from autopeft.sensitivity import compute_scores
from tests.tiny_models import tiny_backbone

BACKBONE = tiny_backbone("bert")
SPACE = ScoreGuided(scores=("condition_number",), ranks=(1, 16), learning_rate=(1e-4, 1e-2))
SPACE = SPACE.with_scores(compute_scores(BACKBONE, (), cross_entropy, SPACE.scores))


def test_refinement_adds_and_drops_against_the_scores_too() -> None:
    lora = SizedMethod(method="lora", smallest=1, largest=8)
    choices = {Site(block, role): {"lora": lora} for block in range(4) for role in ("query", "value")}
    values = {site: float(site.block) for site in choices}
    refiner = Mutator(choices=choices, values=values, learning_rate=(1e-3, 1e-3))
    parent = Configuration(
        {site: Adapter("lora", 4) for site in choices if site.block > 0}, learning_rate=1e-3
    )
    generator = random.Random(0)
    children = [refiner.child({parent: 1.0}, generator) for _ in range(300)]
    added = [child for child in children if any(site.block == 0 for site in child.adapters)]
    assert len(added) > 30, "block 0 promises nothing"
    best, worst = ({Site(block, role) for role in ("query", "value")} for block in (3, 1))
    against = [one for one in children if worst <= one.adapters.keys() and not best <= one.adapters.keys()]
    assert len(against) > 5, "the best are dropped before the worst at times"


@pytest.mark.parametrize("learning_rate", [(1e-4, 1e-2), 1e-3])
def test_a_pool_has_rates_near_the_fronts(learning_rate: float | tuple[float, float]) -> None:
    space = replace(SPACE, learning_rate=learning_rate)
    sites = list(space.choices(BACKBONE))[:4]
    four = Configuration({site: Adapter("lora", 2) for site in sites}, learning_rate=1e-3)
    front = {Configuration({}, learning_rate=1e-2): 0.1, four: 0.1}
    refiner = space._refiner(BACKBONE)
    pool = [one for one, _ in space._pool(front, refiner, random.Random(0), BACKBONE)]
    assert all(len(one) for one in pool), "the head alone is a reference point"
    if isinstance(learning_rate, float):
        assert {one.learning_rate for one in pool} == {1e-3}
        return
    own, near = pool[: len(pool) // 2], pool[len(pool) // 2 :]
    assert [one.adapters for one in own] == [one.adapters for one in near]
    apart = [abs(math.log(summed_learning_rate(one) / 4e-3)) for one in near]
    assert sum(apart) / len(apart) < 0.5


def test_half_the_children_keep_the_summed_learning_rate() -> None:
    sites = list(SPACE.choices(BACKBONE))[:4]
    parent = Configuration({site: Adapter("lora", 2) for site in sites}, learning_rate=1e-3)
    refiner, generator = SPACE._refiner(BACKBONE), random.Random(0)
    children = [refiner.child({parent: 1.0}, generator) for _ in range(400)]
    other = [one for one in children if len(one) not in (0, 4)]
    same_rate = sum(one.learning_rate == 1e-3 for one in other)
    same_sum = sum(math.isclose(summed_learning_rate(one), 4e-3, rel_tol=0.01) for one in other)
    for count in (same_rate, same_sum):  # half of each half, as the other half is changed at random
        assert 0.15 < count / len(other) < 0.35
    head = Configuration({}, learning_rate=1e-2)
    adapted = [one for one in (refiner.child({head: 1.0}, generator) for _ in range(400)) if len(one) > 4]
    assert len(adapted) > 20
    assert sorted(one.learning_rate for one in adapted)[len(adapted) // 4] > 5e-3, "nothing to sum over"


def test_rungs_spare_all_anchors_but_the_larger_one_at_the_higher_rate() -> None:
    baselines = SPACE.baselines(BACKBONE)
    assert [baseline.is_trained_whole for baseline in baselines] == [True, True, True, False]
    lower, higher = (baseline.configuration for baseline in baselines[-2:])
    assert lower.adapters == higher.adapters
    assert lower.learning_rate < higher.learning_rate


def test_climbing_finds_better_candidates_than_as_many_changes_at_random() -> None:
    sites = [Site(block, role) for block in range(6) for role in ("query", "key", "value")]
    lora = SizedMethod(method="lora", smallest=1, largest=8)
    choices: dict[Site, dict[str, SizedMethod]] = {site: {"lora": lora} for site in sites}
    refiner = Mutator(choices=choices, values=dict.fromkeys(sites, 1.0), learning_rate=(1e-4, 1e-2))
    wanted = {site for site in sites if site.role != "value" and site.block > 2}

    def worth(candidates: Sequence[Configuration]) -> Array:
        """The share of the sites that are as they should be."""
        return np.array([1 - len(wanted ^ one.adapters.keys()) / len(sites) for one in candidates])

    gained = []
    for seed in range(12):
        generator = random.Random(seed)
        drawn = [
            Configuration(dict.fromkeys(generator.sample(sites, 5), Adapter("lora", 2)), learning_rate=1e-3)
            for _ in range(20)
        ]
        found = local_search(drawn, worth, refiner, generator)
        assert all(len(one) for one in found)
        changed = [refiner.child(dict.fromkeys(drawn, 1.0), generator) for _ in found]
        gained.append(max(worth(found)) - max(worth(changed)))
    assert sum(gained) / len(gained) > 0.05
    assert local_search(drawn, worth, refiner, random.Random(1)) == local_search(
        drawn, worth, refiner, random.Random(1)
    )
