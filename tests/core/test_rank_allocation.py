"""What ranks can be allocated in training, and what cannot."""

from __future__ import annotations

import pytest

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.rank_allocation import RANK_ALLOCATIONS

QUERY, KEY = Site(0, "query"), Site(1, "key")
LORA = Configuration(
    {QUERY: Adapter("lora", 4), KEY: Adapter("lora", 2), Site(1, "ffn"): Adapter("series", 1)}
)


@pytest.mark.parametrize(
    ("allocation", "adapters", "message"),
    [
        ("sora", {}, "every adapted layer carries lora and"),
        ("sora", {QUERY: Adapter("dora", 4)}, "every adapted layer carries lora and"),
        ("sora", {QUERY: Adapter("lora", 4), KEY: Adapter("ia3")}, "every adapted layer carries lora and"),
        ("adalora", {QUERY: Adapter("lora", 4)}, "every adapted layer carries adalora and"),
        ("elalora", {QUERY: Adapter("lora", 1), KEY: Adapter("lora", 2)}, "the mean rank is 2 or more"),
        ("ist", {QUERY: Adapter("lora", 4)}, "two blocks or more"),
        ("ist", {**LORA.adapters, Site(2, "ffn"): Adapter("series", 1)}, "each of them lora"),
        ("sora", {Site(0, "ffn_experts_up"): Adapter("lora", 4)}, "every adapted layer carries lora and"),
    ],
)
def test_what_it_cannot_be_used_with(allocation: str, adapters: dict[Site, Adapter], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Configuration(adapters, allocation=allocation)
    configuration = Configuration(adapters)
    assert configuration.with_allocation(allocation) == configuration


@pytest.mark.parametrize("allocation", sorted(RANK_ALLOCATIONS.keys() - {"adalora"}))
def test_it_is_part_of_a_configuration(allocation: str) -> None:
    allocated = LORA.with_allocation(allocation)
    assert allocated.allocation == allocation
    assert allocated.key != LORA.key
    assert Configuration.from_yaml(allocated.to_yaml()) == allocated
    assert f"by {allocation}" in repr(allocated)
    assert allocated.replace(allocation=None) == LORA


def test_unknown_ones_are_named() -> None:
    with pytest.raises(ValueError, match=r"allocation 'adalorra'.*did you mean 'adalora'"):
        LORA.replace(allocation="adalorra")
