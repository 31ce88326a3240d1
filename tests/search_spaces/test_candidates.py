"""What `ScoreGuided` chooses from: refinements against the scores too, and rates near the front's."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from torch.nn.functional import cross_entropy

from autopeft.configuration import Adapter, Configuration, Site
from autopeft.search_spaces import ScoreGuided
from autopeft.search_spaces.refinement import Refiner, SizedMethod
from autopeft.sensitivity import compute_scores
from tests.models import tiny_backbone

BACKBONE = tiny_backbone("bert")
SPACE = ScoreGuided(scores=("condition_number",), ranks=(1, 16), learning_rate=(1e-4, 1e-2))
SPACE = SPACE.with_scores(compute_scores(BACKBONE, (), cross_entropy, SPACE.scores))


def test_refinement_adds_and_drops_against_the_scores_too() -> None:
    lora = SizedMethod(method="lora", smallest=1, largest=8)
    choices = {Site(block, role): {"lora": lora} for block in range(4) for role in ("query", "value")}
    values = {site: float(site.block) for site in choices}
    refiner = Refiner(choices=choices, values=values, learning_rate=(1e-3, 1e-3))
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
    anchors = [anchor.configuration.replace(learning_rate=1e-3) for anchor in space.anchors(BACKBONE)]
    pool = [one for one, _ in space._pool(dict.fromkeys(anchors, 0.1), random.Random(0), BACKBONE)]
    assert all(len(one) for one in pool), "the head alone is a reference point"
    if isinstance(learning_rate, float):
        assert {one.learning_rate for one in pool} == {1e-3}
        return
    own, near = pool[: len(pool) // 2], pool[len(pool) // 2 :]
    assert [one.adapters for one in own] == [one.adapters for one in near]
    apart = [abs(math.log(one.learning_rate / 1e-3)) for one in near]
    assert sum(apart) / len(apart) < 0.5


def test_rungs_spare_the_reference_points_that_take_least() -> None:
    spared = [anchor.is_trained_whole for anchor in SPACE.anchors(BACKBONE)]
    assert spared == [True] * 3 + [False] * (len(spared) - 3)
    assert len(spared) > 3
