"""Learning rates whose sums are near those that proved good: of the front's configuration nearest in size."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.optimization.candidates import LearningRatePrior
from tests.tiny_models import tiny_backbone

BACKBONE = tiny_backbone("bert")
BOUNDS = (1e-4, 1e-2)
SMALL = Configuration({Site(1, "query"): Adapter("lora", 1)}, learning_rate=8e-3)
LARGE = Configuration(
    {Site(block, role): Adapter("lora", 16) for block in range(2) for role in ("query", "value")},
    learning_rate=4e-4,
)


HEAD = Configuration({}, learning_rate=1e-2)


def drawn(
    configuration: Configuration,
    seed: int = 0,
    front: Sequence[Configuration] = (HEAD, SMALL, LARGE),
    earlier: Mapping[str, float] | None = None,
) -> list[float]:
    rates = LearningRatePrior(front, BACKBONE, BOUNDS, earlier or {})
    generator = random.Random(seed)
    return [rates.draw(configuration, generator) for _ in range(400)]


def test_a_rate_is_near_that_of_the_configuration_nearest_in_size() -> None:
    near_small = drawn(Configuration({Site(0, "value"): Adapter("lora", 2)}, learning_rate=1e-4))
    near_large = drawn(Configuration({Site(0, "ffn_up"): Adapter("lora", 16)}, learning_rate=1e-4))
    assert math.isclose(statistics.median(near_small), 8e-3, rel_tol=0.15)
    assert math.isclose(statistics.median(near_large), 4 * 4e-4, rel_tol=0.15), "one adapter bears four's"
    assert max(near_large) / min(near_large) > 4, "others are tried as well"


def test_the_head_alone_is_followed_only_where_there_is_no_other() -> None:
    assert drawn(HEAD) == drawn(SMALL), "that of the smallest adapter"
    for configuration in (SMALL, LARGE):
        assert math.isclose(statistics.median(drawn(configuration, front=[HEAD])), 1e-2, rel_tol=0.15)


def test_methods_that_the_front_lacks_have_the_rates_of_earlier_searches() -> None:
    two = Configuration({Site(block, "ffn"): Adapter("series", 4) for block in range(2)}, learning_rate=1e-4)
    earlier = {"series": 4e-3, "lora": 1e-4}
    assert math.isclose(statistics.median(drawn(two, earlier=earlier)), 4e-3 / 2, rel_tol=0.15)
    assert drawn(SMALL, earlier=earlier) == drawn(SMALL), "LoRA is on the front"
    assert drawn(two, earlier={"prefix": 4e-3}) == drawn(two)


def test_rates_lie_in_the_space_and_follow_from_the_seed() -> None:
    rates = drawn(SMALL)
    assert all(BOUNDS[0] <= rate <= BOUNDS[1] and rate == float(f"{rate:.3g}") for rate in rates)
    assert max(rates) == BOUNDS[1]
    assert rates == drawn(SMALL)
    assert rates != drawn(SMALL, seed=1)
