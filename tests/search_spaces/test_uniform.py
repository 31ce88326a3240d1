from __future__ import annotations

import random
from typing import Any

import pytest
from optuna.trial import FixedTrial

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import Uniform
from tests.tiny_models import tiny_backbone, tiny_model

BERT = tiny_backbone("bert")
PLACES = ("all", "query and value", "top half", "MLP")


def test_one_adapter_sits_on_every_site_that_can_take_it() -> None:
    space = Uniform(sizes={"rank": (1, 8)}, learning_rate=1e-3)
    found = space.suggest(FixedTrial({"method": "lora", "lora.size": 4}), BERT)
    linear = ("query", "key", "value", "attention_output", "ffn_up", "ffn_down")
    assert found == Configuration(
        {Site(block, role): Adapter("lora", 4) for block in (0, 1) for role in linear}
    )


def test_roles_narrow_it_down() -> None:
    space = Uniform(methods=("series", "prefix"), roles=("attention",), learning_rate=1e-3)
    for method in ("series", "prefix"):
        found = space.suggest(FixedTrial({"method": method, f"{method}.size": 1}), BERT)
        assert {site.role for site in found.adapters} == {"attention"}
        assert found.methods == (method,)


def test_choices_carry_the_options() -> None:
    space = Uniform(methods=("lora", "ia3"), sizes={"rank": (3, 5)}, options={"lora": {"alpha": 2}})
    assert list(space.adapters()) == ["lora(3, alpha=2)", "lora(4, alpha=2)", "lora(5, alpha=2)", "ia3()"]
    assert space.count(BERT) == 4


def test_only_a_uniform_point_has_an_encoding() -> None:
    space = Uniform(sizes={"rank": (1, 8)}, roles=("query",), learning_rate=1e-3)
    everywhere = {Site(block, "query"): Adapter("lora", 4) for block in (0, 1)}
    assert space.encode(Configuration(everywhere), BERT) == {"method": "lora", "lora.size": 4}
    for adapters in (
        {},
        {Site(0, "query"): Adapter("lora", 4)},
        everywhere | {Site(1, "query"): Adapter("lora", 2)},
        everywhere | {Site(1, "key"): Adapter("lora", 4)},
    ):
        with pytest.raises(ValueError, match=r"no point of Uniform; one near it is Configuration"):
            space.encode(Configuration(adapters), BERT)


def test_baselines_are_three_sizes_of_each_method() -> None:
    space = Uniform(methods=("lora", "ia3"), sizes={"rank": (1, 64)}, learning_rate=1e-3)
    assert [baseline.name for baseline in space.baselines(BERT)] == [
        "lora(1) everywhere",
        "ia3() everywhere",
        "lora(8) everywhere",
        "lora(64) everywhere",
    ]


def test_extremes_compare_methods() -> None:
    space = Uniform(methods=("lora", "ia3", "layernorm"), sizes={"rank": (4, 8)}, learning_rate=1e-3)
    smallest, largest = space.extremes(BERT)
    assert smallest.methods == ("layernorm",)
    assert largest == smallest.replace(
        adapters={site: Adapter("lora", 8) for site, shape in BERT.sites.items() if shape.kind == "linear"}
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("lara",)}, "did you mean 'lora'"),
        ({"sizes": {"rank": (0, 4)}}, r"sizes\['rank'\] is"),
        ({"learning_rate": -1}, "above 0"),
        ({"options": {"lora": {"alpha": -1}}}, "must be above 0"),
    ],
)
def test_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Uniform(**settings)


def test_must_fit_the_backbone() -> None:
    with pytest.raises(ValueError, match="'layernorm' can sit on none of the roles query"):
        Uniform(methods=("lora", "layernorm"), roles=("query",)).validate(BERT)


def test_description() -> None:
    text = Uniform(sizes={"rank": (4, 8)}, learning_rate=2e-3).describe(BERT)
    assert text.splitlines()[:2] == [
        "Uniform: one of lora(4), lora(8) everywhere",
        "learning rate fixed at 0.002",
    ]


def headless(architecture: str) -> Backbone:
    return Backbone(tiny_model(architecture), None, name=f"tiny-{architecture}", head=())


@pytest.mark.parametrize(
    ("architecture", "query_and_value", "mlp"),
    [
        ("bert", {"query", "value"}, {"ffn_up", "ffn_down"}),
        ("llama", {"query", "value"}, {"ffn_gate", "ffn_up", "ffn_down"}),
        ("gpt2", {"qkv"}, {"ffn_up", "ffn_down"}),
        ("vit", {"query", "value"}, {"ffn_up", "ffn_down"}),
        ("mamba", None, None),
    ],
)
def test_places_are_those_that_a_model_has(
    architecture: str, query_and_value: set[str] | None, mlp: set[str] | None
) -> None:
    backbone = headless(architecture)
    space = Uniform(sizes={"rank": (2, 2)}, places=PLACES, learning_rate=1e-3)
    sites = {
        place: {site for slot in slots for site in slot.sites}
        for place, slots in space.places_of("lora", backbone).items()
    }
    linear = {site for site, shape in backbone.sites.items() if shape.kind == "linear"}
    expected = {
        "all": linear,
        "query and value": {site for site in linear if site.role in (query_and_value or ())},
        "top half": {site for site in linear if site.block == 1},
        "MLP": {site for site in linear if site.role in (mlp or ())},
    }
    assert sites == {place: there for place, there in expected.items() if there}
    assert space.count(backbone) == len(sites)
    found = {space.draw(random.Random(seed), backbone) for seed in range(40)}
    assert {frozenset(point.adapters) for point in found} == {*map(frozenset, sites.values())}


def test_places_are_tried_in_turn_and_named() -> None:
    space = Uniform(sizes={"rank": (1, 8)}, places=PLACES, learning_rate=1e-3)
    baselines = space.baselines(BERT)
    assert [baseline.name for baseline in baselines[:5]] == [
        "lora(1) everywhere",
        "lora(1) on query and value",
        "lora(4) everywhere",
        "lora(1) on top half",
        "lora(4) on query and value",
    ]
    assert len(baselines) == 3 * 4
    text = space.describe(BERT)
    assert "lora(8) everywhere, on query and value, on top half, on MLP" in text
    smallest, _ = space.extremes(BERT)
    assert space.name_of(smallest, BERT) == "lora(1) on query and value"


def test_a_space_of_one_place_is_the_one_it_was() -> None:
    space = Uniform(learning_rate=(1e-3, 1e-2))
    assert {*space.encode(space.extremes(BERT)[0], BERT)} == {"method", "lora.size", "learning_rate"}


def test_a_place_must_be_one_and_have_a_site() -> None:
    with pytest.raises(ValueError, match="Unknown place 'mlp': expected one of all, query and value"):
        Uniform(places=("mlp",))
    with pytest.raises(ValueError, match="'lora' has no site in query and value, MLP of tiny-mamba"):
        Uniform(places=("query and value", "MLP")).validate(headless("mamba"))
