"""What is near a configuration: changes against the scores too, rates near the parents', local search."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.optimization.candidates import Candidates, local_search
from autopeft.optimization.gaussian_process import Array
from autopeft.search_spaces import AutoPEFTPaper, PerLayer, ScoreGuided, SearchSpace
from autopeft.search_spaces.learning_rates import summed_learning_rate
from autopeft.search_spaces.method_choice import MethodChoice
from autopeft.search_spaces.mutation import SiteMutator
from autopeft.sensitivity import compute_scores
from tests.loss_task import CROSS_ENTROPY
from tests.tiny_models import tiny_backbone

BACKBONE = tiny_backbone("bert")
SPACE = ScoreGuided(scores=("condition_number",), sizes={"rank": (1, 16)}, learning_rate=(1e-4, 1e-2))
SPACE = SPACE.with_scores(compute_scores(BACKBONE, (), CROSS_ENTROPY, SPACE.scores))


def test_refinement_adds_and_drops_against_the_scores_too() -> None:
    lora = MethodChoice(method="lora", sizes=range(1, 9))
    choices = {Site(block, role): {"lora": lora} for block in range(4) for role in ("query", "value")}
    values = {site: float(site.block) for site in choices}
    mutator = SiteMutator(choices=choices, values=values, learning_rate=(1e-3, 1e-3))
    parent = Configuration(
        {site: Adapter("lora", 4) for site in choices if site.block > 0}, learning_rate=1e-3
    )
    generator = random.Random(0)
    children = [mutator({parent: 1.0}, generator) for _ in range(300)]
    added = [child for child in children if any(site.block == 0 for site in child.adapters)]
    assert len(added) > 30, "block 0 promises nothing"
    best, worst = ({Site(block, role) for role in ("query", "value")} for block in (3, 1))
    against = [
        child for child in children if worst <= child.adapters.keys() and not best <= child.adapters.keys()
    ]
    assert len(against) > 5, "the best are dropped before the worst at times"


def test_a_size_of_a_ladder_is_changed_to_the_next() -> None:
    choice = MethodChoice(method="lora", sizes=(3, 4, 8, 16, 20))
    assert [choice.of_size(2 * size).size for size in choice.sizes] == [8, 8, 16, 20, 20]
    assert [choice.of_size(round(size / 2)).size for size in choice.sizes] == [3, 3, 4, 8, 8]
    assert MethodChoice(method="ia3").of_size(4) == Adapter("ia3")


def test_what_is_added_beside_another_family_has_the_same_place_in_its_own_range() -> None:
    space = PerLayer(methods=("lora", "fourierft"), roles=("query",), learning_rate=1e-3)
    mutator, generator = space.mutator(BACKBONE), random.Random(0)
    first, second = Site(0, "query"), Site(1, "query")
    for carried, alike in (("fourierft", 128), {"lora": 8}), (("lora", 64), {"fourierft": 1024}):
        parent = Configuration({first: Adapter(*carried)}, learning_rate=1e-3)
        children = (mutator({parent: 1.0}, generator).adapters for _ in range(200))
        added = [
            child[second][0]
            for child in children
            if second in child and child.get(first) == parent.adapters[first]
        ]
        for method, size in {carried[0]: carried[1], **alike}.items():
            sizes = [adapter.size for adapter in added if adapter.method == method]
            assert sizes.count(size) > len(sizes) / 2


def test_slots_of_several_blocks_change_together_and_methods_without_a_size_are_added() -> None:
    space = PerLayer(methods=("lora", "ia3"), groups=1, sizes={"rank": (3, 20)}, learning_rate=1e-3)
    mutator, generator = space.mutator(BACKBONE), random.Random(0)
    parent = space.baselines(BACKBONE)[1].configuration
    children = {mutator({parent: 1.0}, generator) for _ in range(100)}
    for child in children:
        space.encode(child, BACKBONE)
    assert len(children) > 20
    grandchildren = [mutator(dict.fromkeys(children, 1.0), generator) for _ in range(50)]
    assert any("ia3" in child.methods for child in grandchildren)


def test_children_in_parameters_are_near_their_parents_and_cross_them() -> None:
    space = AutoPEFTPaper()
    parents = [space.draw(random.Random(seed), BACKBONE) for seed in (1, 2)]
    mutator, generator = space.mutator(BACKBONE), random.Random(0)
    encoded = [space.encode(parent, BACKBONE) for parent in parents]
    apart = []
    for _ in range(200):
        child = space.encode(mutator(dict.fromkeys(parents, 1.0), generator), BACKBONE)
        apart.append(min(sum(child[name] != parent[name] for name in child) for parent in encoded))
    assert sum(number <= 2 for number in apart) > 150
    assert len({*apart}) > 2


def test_half_the_children_keep_the_summed_learning_rate() -> None:
    sites = list(SPACE.choices(BACKBONE))[:4]
    parent = Configuration({site: Adapter("lora", 2) for site in sites}, learning_rate=1e-3)
    mutator, generator = SPACE.mutator(BACKBONE), random.Random(0)
    children = [mutator({parent: 1.0}, generator) for _ in range(400)]
    other = [child for child in children if len(child) not in (0, 4)]
    same_rate = sum(child.learning_rate == 1e-3 for child in other)
    same_sum = sum(math.isclose(summed_learning_rate(child), 4e-3, rel_tol=0.01) for child in other)
    for count in (same_rate, same_sum):  # half of each half, as the other half is changed at random
        assert 0.15 < count / len(other) < 0.35
    head = Configuration({}, learning_rate=1e-2)
    adapted = [child for child in (mutator({head: 1.0}, generator) for _ in range(400)) if len(child) > 4]
    assert len(adapted) > 20
    assert sorted(child.learning_rate for child in adapted)[len(adapted) // 4] > 5e-3, "nothing to sum over"


def test_smallest_adapters_in_the_mlps_and_everywhere_are_baselines_at_the_published_rate() -> None:
    in_mlps, everywhere = (baseline.configuration for baseline in SPACE.baselines(BACKBONE)[-2:])
    assert {site.role for site in in_mlps.adapters} == {"ffn_up", "ffn_down"}
    assert everywhere.adapters.keys() == SPACE.choices(BACKBONE).keys()
    assert {adapter.size for _, adapter in everywhere} == {1}
    assert in_mlps.learning_rate == everywhere.learning_rate == SPACE.point().learning_rate


def test_what_is_left_of_a_cut_is_a_candidate_with_its_rate_and_one_near_the_fronts() -> None:
    cut = Configuration(
        {Site(1, "query"): Adapter("lora", 3), Site(1, "ffn_up"): Adapter("lora", 1)}, learning_rate=2e-3
    )
    front = {baseline.configuration: 0.1 for baseline in SPACE.baselines(BACKBONE)[1:3]}

    def pool(space: SearchSpace, cuts: Sequence[Configuration]) -> list[Configuration]:
        found = Candidates(space, BACKBONE, front, random.Random(0), {}, cuts)
        return found.pool(lambda candidates: np.zeros(len(candidates)))

    with_cut = pool(SPACE, [cut])
    assert cut in with_cut
    rates = [candidate.learning_rate for candidate in with_cut if candidate.adapters == cut.adapters]
    assert len(set(rates)) > 1
    assert cut not in pool(SPACE, [])
    ladder = PerLayer(methods=("lora",), sizes={"rank": (1, 16)}, learning_rate=(1e-4, 1e-2))
    near = ladder.nearest(cut, BACKBONE)
    assert near != cut
    assert near in pool(ladder, [cut]), "of other sizes the nearest point of the space"


def test_rungs_spare_all_baselines_but_the_larger_one_at_the_higher_rate() -> None:
    baselines = SPACE.baselines(BACKBONE)
    assert [baseline.is_trained_whole for baseline in baselines] == [True] * 3 + [False] * 3
    lower, higher = (baseline.configuration for baseline in baselines[2:4])
    assert lower.adapters == higher.adapters
    assert lower.learning_rate < higher.learning_rate


def test_climbing_finds_better_candidates_than_as_many_changes_at_random() -> None:
    sites = [Site(block, role) for block in range(6) for role in ("query", "key", "value")]
    lora = MethodChoice(method="lora", sizes=range(1, 9))
    choices: dict[Site, dict[str, MethodChoice]] = {site: {"lora": lora} for site in sites}
    mutator = SiteMutator(choices=choices, values=dict.fromkeys(sites, 1.0), learning_rate=(1e-4, 1e-2))
    wanted = {site for site in sites if site.role != "value" and site.block > 2}

    def worth(candidates: Sequence[Configuration]) -> Array:
        """The share of the sites that are as they should be."""
        return np.array(
            [1 - len(wanted ^ candidate.adapters.keys()) / len(sites) for candidate in candidates]
        )

    gained = []
    for seed in range(12):
        generator = random.Random(seed)
        drawn = [
            Configuration(dict.fromkeys(generator.sample(sites, 5), Adapter("lora", 2)), learning_rate=1e-3)
            for _ in range(20)
        ]
        found = local_search(drawn, worth, mutator, generator)
        assert all(len(configuration) for configuration in found)
        changed = [mutator(dict.fromkeys(drawn, 1.0), generator) for _ in found]
        gained.append(max(worth(found)) - max(worth(changed)))
    assert sum(gained) / len(gained) > 0.05
    assert local_search(drawn, worth, mutator, random.Random(1)) == local_search(
        drawn, worth, mutator, random.Random(1)
    )
