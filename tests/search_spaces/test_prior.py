"""Earlier fronts on another backbone: where sites are placed, what is tried first, weights and rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.search_spaces import AutoPEFTPaper, PerLayer, ScoreGuided, SearchSpace, Uniform
from autopeft.search_spaces.prior import (
    EarlierFront,
    Member,
    Prior,
    blocks_at,
    site_credits,
    sites_at,
    translated,
)
from autopeft.sensitivity import SiteScores
from tests.tiny_models import tiny_backbone

FOUR = tiny_backbone("bert", num_hidden_layers=4)
TWO = {"": 2}
LORA = PerLayer(methods=("lora",), sizes={"rank": (1, 16)}, learning_rate=(1e-4, 1e-2))
LORA_ON_VALUE = replace(LORA, roles=("value",))


def configuration(sizes: Mapping[str, int], rate: float = 1e-3, method: str = "lora") -> Configuration:
    adapters = {Site.parse(site): Adapter(method, size) for site, size in sizes.items()}
    return Configuration(adapters, learning_rate=rate)


def front(
    *members: tuple[Configuration, float],
    tried: Sequence[str] = (),
    depths: Mapping[str, int] = TWO,
    hidden_size: int | None = None,
    steps: int | None = None,
) -> EarlierFront:
    named = [Member(f"trial {number}", point, worth) for number, (point, worth) in enumerate(members)]
    carrying = {site for point, _ in members for site in point.adapters}
    return EarlierFront(
        name="earlier",
        depths=depths,
        members=named,
        tried=frozenset({*map(Site.parse, tried), *carrying}),
        hidden_size=hidden_size,
        steps=steps,
    )


def sizes(point: Configuration | None) -> dict[str, int | None]:
    assert point is not None
    return {str(site): adapter.size for site, adapter in point}


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        (3, 3, [[0], [1], [2]]),
        (4, 2, [[0], [0], [1], [1]]),
        (2, 4, [[0, 1], [2, 3]]),
        (3, 2, [[0], [1], [1]]),
        (2, 3, [[0], [1, 2]]),
        (1, 3, [[0, 1, 2]]),
        (6, 12, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]),
    ],
)
def test_blocks_are_placed_by_their_depth(here: int, there: int, expected: list[list[int]]) -> None:
    assert [blocks_at(block, here, there) for block in range(here)] == expected


def test_every_block_has_its_like_and_is_that_ones() -> None:
    for here in range(1, 14):
        for there in range(1, 14):
            pairs = {(block, other) for block in range(here) for other in blocks_at(block, here, there)}
            assert pairs == {
                (block, other) for other in range(there) for block in blocks_at(other, there, here)
            }
            assert {block for block, _ in pairs} == set(range(here))
            assert {other for _, other in pairs} == set(range(there))
            assert all(abs((block + 0.5) / here - (other + 0.5) / there) <= 0.5 for block, other in pairs)


def test_sites_are_placed_by_stack_and_role() -> None:
    assert sites_at(Site(3, "query"), FOUR, TWO) == [Site(1, "query"), Site(1, "qkv")]
    assert sites_at(Site(0, "ffn_down"), FOUR, {"": 8}) == [Site(0, "ffn_down"), Site(1, "ffn_down")]
    assert sites_at(Site(0, "query"), FOUR, {"encoder": 2}) == []
    fused = tiny_backbone("gpt2")
    assert sites_at(Site(1, "qkv"), fused, TWO) == [
        Site(1, role) for role in ("qkv", "query", "key", "value")
    ]


def test_a_configuration_moves_to_a_deeper_a_shallower_and_a_fused_backbone() -> None:
    point = configuration({"1.query": 4, "1.value": 2}, rate=3e-3)
    deeper = translated(point, TWO, LORA, FOUR)
    assert sizes(deeper) == {"2.query": 4, "2.value": 2, "3.query": 4, "3.value": 2}
    assert deeper is not None
    assert deeper.learning_rate == pytest.approx(1.5e-3), "the sum of the rates stays"
    several = configuration({"4.query": 1, "5.query": 8, "7.query": 2})
    assert sizes(translated(several, {"": 8}, LORA, FOUR)) == {"2.query": 8, "3.query": 2}
    fused = tiny_backbone("gpt2")
    assert sizes(translated(point, TWO, LORA, fused)) == {"1.qkv": 4}
    assert sizes(translated(point, TWO, LORA, tiny_backbone("bert"))) == sizes(point)


def test_sizes_methods_and_rates_are_those_of_the_space() -> None:
    point = configuration({"1.query": 64, "1.value": 3}, rate=0.5)
    near = translated(point, TWO, LORA, FOUR)
    assert sizes(near) == {"2.query": 16, "2.value": 4, "3.query": 16, "3.value": 4}
    assert near is not None
    assert near.learning_rate == 1e-2
    fixed = translated(point, TWO, PerLayer(methods=("lora",), learning_rate=2e-3), FOUR)
    assert fixed is not None
    assert fixed.learning_rate == 2e-3
    assert translated(configuration({"1.ffn": 4}, method="series"), TWO, LORA, FOUR) is None
    some = LORA.nearest(configuration({"3.query": 4}), FOUR)
    assert translated(some, {"": 4}, LORA_ON_VALUE, FOUR) is None


@pytest.mark.parametrize(
    "space",
    [
        LORA,
        PerLayer(methods=("lora", "ia3"), groups=2, learning_rate=(3e-4, 1e-2)),
        ScoreGuided(sizes={"rank": (1, 16)}, learning_rate=(3e-4, 1e-2)),
        Uniform(sizes={"rank": (1, 16)}, learning_rate=(3e-4, 1e-2)),
        AutoPEFTPaper(),
    ],
    ids=lambda space: type(space).__name__,
)
def test_what_is_tried_is_a_point_of_the_space(space: SearchSpace) -> None:
    adapters: dict[Site, Any] = {site: Adapter("lora", 3) for site in map(Site.parse, ("0.query", "1.query"))}
    adapters |= {Site(block, "ffn"): (Adapter("series", 5), Adapter("parallel", 2)) for block in range(2)}
    point = translated(Configuration(adapters, learning_rate=1e-3), TWO, space, FOUR)
    assert point is not None
    assert space.encode(point, FOUR)
    assert point.adapters


def test_each_point_shares_its_worth_evenly_by_its_sites() -> None:
    single, pair = configuration({"1.query": 4}), configuration({"1.query": 1, "1.value": 64})
    credits = site_credits([(single, 0.75), (pair, 0.25), (Configuration(), 0.5)])
    assert credits == {Site(1, "query"): 0.875, Site(1, "value"): 0.125}


def test_weights_follow_the_credit_of_what_was_tried_within_bounds() -> None:
    single, pair = configuration({"1.query": 4}), configuration({"1.query": 1, "1.value": 64})
    known = front((single, 0.75), (pair, 0.25), tried=("0.query", "0.value"))
    weights = Prior.placed([known], LORA, FOUR, 100).weights
    expected = {"0.query": 0.5, "0.value": 0.5, "1.query": 2.0, "1.value": (1 + 0.125 / 0.25) / 2}
    assert weights == {
        Site(2 * block + half, role): expected[f"{block}.{role}"]
        for block in range(2)
        for half in range(2)
        for role in ("query", "value")
    }, "of the other roles nothing is known"
    alike = front((configuration({f"{block}.query": 4 for block in range(2)}), 1.0))
    assert set(Prior.placed([alike], LORA, FOUR, 100).weights.values()) == {1.0}
    both = Prior.placed([known, alike], LORA, FOUR, 100).weights
    assert both[Site(0, "query")] == (1 + (0 + 1) / 2) / 2


def test_weights_multiply_scores_and_spectra() -> None:
    sites = [Site(0, "query"), Site(1, "query")]
    scores = SiteScores(
        name="gora", values=dict.fromkeys(sites, 3.0), spectra=dict.fromkeys(sites, (2.0, 1.0))
    )
    found = scores.weighted({sites[1]: 0.5})
    assert found.values == {sites[0]: 3.0, sites[1]: 1.5}
    assert found.spectra == {sites[0]: (2.0, 1.0), sites[1]: (1.0, 0.5)}


def test_the_rates_of_a_method_are_the_mean_of_the_sums() -> None:
    single, pair = (
        configuration({"1.query": 4}, rate=1e-2),
        configuration({"0.query": 1, "1.query": 1}, rate=5e-5),
    )
    series = configuration({"1.ffn": 4}, rate=3e-3, method="series")
    rates = Prior.placed([front((single, 0.5), (pair, 0.5), (series, 1.0))], LORA, FOUR, 100).rates
    assert rates == {"lora": pytest.approx(1e-3), "series": pytest.approx(3e-3)}


def test_rates_follow_the_width_of_the_model_and_the_steps_of_a_training() -> None:
    """By the ratio of the middles of the default ranges: FOUR is as wide as 384 at least counts."""
    point = (configuration({"1.query": 4}, rate=1e-3), 1.0)
    for hidden_size, steps, factor in (
        (4096, 1000, (4096 / 384) ** 0.781),
        (4096, 10, (4096 / 384) ** 0.781 / 1.5),
        (384, 1000, 1.0),
        (32, 10, 1 / 1.5),
        (4096, None, (4096 / 384) ** 0.781),
        (None, None, 1.0),
    ):
        prior = Prior.placed([front(point, hidden_size=hidden_size, steps=steps)], LORA, FOUR, 1000)
        assert prior.rates == {"lora": pytest.approx(1e-3 * factor)}
        (baseline,) = prior.baselines
        assert len(baseline.configuration) == 2
        assert baseline.configuration.learning_rate == pytest.approx(1e-3 * factor / 2, rel=1e-2)
        assert ("as they were, for a model of unknown width: earlier" in prior.describe()) == (
            hidden_size is None
        )
    short = Prior.placed([front(point, hidden_size=384, steps=1000)], LORA, FOUR, 10)
    assert short.rates == {"lora": pytest.approx(1.5e-3)}


def test_what_adds_most_is_tried_first_and_each_once() -> None:
    points = [configuration({f"1.{role}": size}) for role in ("query", "key") for size in (1, 4)]
    known = front(*((point, index / 10) for index, point in enumerate(points)))
    other = front((points[0], 0.15), (configuration({"0.value": 4}), 0.05))
    baselines = Prior.placed([known, other], LORA, FOUR, 100).baselines
    names = ["trial 3 of earlier", "trial 2 of earlier", "trial 0 of earlier", "trial 1 of earlier"]
    assert [baseline.name for baseline in baselines] == [*names, "trial 1 of earlier (4)"]
    assert not any(baseline.is_trained_whole for baseline in baselines)


def test_what_cannot_be_placed_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"\(earlier\) can be placed on tiny-bert: it has series on ffn; the space"
    ):
        Prior.placed([front((configuration({"1.ffn": 4}, method="series"), 1.0))], LORA, FOUR, 100)
    decoder = front((configuration({"decoder.1.query": 4}), 1.0), depths={"encoder": 2, "decoder": 2})
    with pytest.raises(ValueError, match=r"lora on decoder\.query; the space offers lora on .*query"):
        Prior.placed([decoder], LORA, FOUR, 100)
    assert Prior.placed([], LORA, FOUR, 100) == Prior()


def test_a_front_travels_as_json() -> None:
    known = front(
        (configuration({"1.query": 4}), 0.75), (configuration({"0.value": 2}), 0.25), hidden_size=384, steps=9
    )
    assert EarlierFront.from_dict(known.to_dict()) == known
    before = {name: value for name, value in known.to_dict().items() if name not in ("hidden_size", "steps")}
    assert EarlierFront.from_dict(before) == replace(known, hidden_size=None, steps=None)
    assert math.isclose(sum(known.relative_credits.values()), len(known.tried))


def test_where_families_come_together_the_one_that_is_larger_in_its_own_range_stands() -> None:
    space = PerLayer(methods=("lora", "fourierft"), roles=("value",), learning_rate=1e-3)
    earlier = {Site(0, "value"): Adapter("fourierft", 64), Site(1, "value"): Adapter("lora", 32)}
    point = translated(Configuration(earlier), {"": 8}, space, FOUR)
    assert point is not None
    assert point.adapters == {Site(0, "value"): (Adapter("lora", 32),)}
