"""Spaces for a purpose: what each offers, on two models, and by its name in YAML."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.methods import METHODS, attach, count_parameters, unmergeable
from autopeft.models.backbone import Backbone
from autopeft.search import Search
from autopeft.search_spaces import (
    Everything,
    LowMemory,
    Mergeable,
    NASPEFTPaper,
    PerLayer,
    Servable,
    ShearsPaper,
    Stratified,
    Tiny,
)
from autopeft.search_spaces.presets import PRESETS
from autopeft.search_spaces.suggest_trial import DrawnTrial
from autopeft.yaml_config import build_config
from tests.learnable import learnable_task
from tests.tiny_models import tiny_backbone


@cache
def backbone_of(architecture: str) -> Backbone:
    return tiny_backbone(architecture, num_hidden_layers=3)


SMALLEST = {name: (row.sizes[0], row.sizes[0]) for name, row in METHOD_SPECS.items() if row.size_name}
"""One size a method: peft is asked what it makes of each, which takes some seconds for all families."""


@pytest.mark.parametrize(
    ("made", "architecture"),
    [
        pytest.param(
            made,
            architecture,
            marks=pytest.mark.slow if made in (Everything, Mergeable) and architecture == "llama" else (),
        )
        for made in PRESETS
        for architecture in ("bert", "llama")
    ],
)
def test_gives_configurations_that_the_model_carries(made: type[PerLayer], architecture: str) -> None:
    backbone, generator = backbone_of(architecture), random.Random(0)
    offered = made().default_methods if made in (Everything, Mergeable) else ()
    sizes = {name: SMALLEST[name] for name in offered if name in SMALLEST}
    space = made(sizes=sizes, learning_rate=(3e-4, 1e-2))
    space.validate(backbone)
    asked = [space.draw(generator, backbone) for _ in range(5)]
    assert len(set(asked)) == 5
    for configuration in asked:
        space.encode(configuration, backbone)  # raises for what is no point of it
        backbone.check(configuration)
    with attach(backbone, asked[-1]):
        pass
    used = {method for configuration in asked for method in configuration.methods}
    assert used <= set(space.methods or space.default_methods)
    assert len(space.baselines(backbone, trials=8)) == 2


def test_everything_offers_every_method_that_a_site_takes() -> None:
    assert set(Everything().default_methods) == set(METHOD_SPECS)
    assert len(METHOD_SPECS) >= 40
    assert set(Mergeable().default_methods) == {
        name for name, method in METHODS.items() if method.is_mergeable
    }
    assert {"lora", "full", "ssf", "sparse"} <= set(Mergeable().default_methods)
    assert not {"series", "prefix", "compacter", "loreft"} & set(Mergeable().default_methods)


def test_shears_has_the_ranks_of_its_paper() -> None:
    """[32, 24, 16] for query, key and value together, up and down, of LLaMA (its `nncf_config`)."""
    backbone, space = backbone_of("llama"), ShearsPaper(learning_rate=1e-3)
    ranks = dict(zip(("query", "key", "value", "ffn_up", "ffn_down"), (24, 24, 24, 16, 32), strict=True))
    papers = {
        Site(block, role): Adapter("lora", rank)
        for _, block in backbone.places
        for role, rank in ranks.items()
    }
    point = space.point(papers)
    assert space.suggest(DrawnTrial(None, space.encode(point, backbone)), backbone) == point
    with pytest.raises(ValueError, match="is no point of ShearsPaper"):
        space.encode(space.point({Site(0, "query"): Adapter("lora", 8)}), backbone)


def test_nas_peft_has_every_rank_and_biases() -> None:
    backbone, space = backbone_of("bert"), NASPEFTPaper(learning_rate=1e-3)
    papers = {Site(0, "query"): Adapter("lora", 5), Site(1, "ffn_up"): Adapter("bitfit")}
    assert space.encode(space.point(papers), backbone)
    assert [*space.choice_of("lora").sizes] == [*range(1, 17)]


def test_stratified_has_what_spafit_trains() -> None:
    """The lowest third frozen, biases in the middle, at the top LoRA in the attention and biases besides."""
    backbone, space = backbone_of("bert"), Stratified(learning_rate=1e-3)
    papers = {Site(block, role): Adapter("bitfit") for block in (1, 2) for role in ("ffn_up", "ffn_down")}
    papers |= {Site(1, role): Adapter("bitfit") for role in ("query", "value")}
    papers |= {Site(2, role): Adapter("lora", 8) for role in ("query", "value")}
    assert space.encode(space.point(papers), backbone)


def test_low_memory_leaves_the_lower_half_alone() -> None:
    backbone = backbone_of("bert")
    space, generator = LowMemory(learning_rate=1e-3), random.Random(1)
    for _ in range(5):
        lowest = space.draw(generator, backbone).lowest_block
        assert lowest is None or lowest[1] >= 1
    assert "ladder" in space.methods_on(backbone)
    assert [len(group) for group in replace(space, groups=2).block_groups(backbone)] == [1, 1]


def test_tiny_keeps_below_its_bound_at_a_real_width(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )  # MiniLM's
    config.save_pretrained(tmp_path)
    task = learnable_task()
    backbone = Backbone.without_weights(tmp_path, task.head, dtype=torch.float32)
    space, generator = Tiny(learning_rate=1e-3), random.Random(0)

    def adapters(configuration: Configuration) -> int:
        return count_parameters(backbone, configuration) - backbone.head_parameters

    drawn = [space.draw(generator, backbone) for _ in range(20)]
    assert len({space.encode(configuration, backbone) and configuration.key for configuration in drawn}) > 15
    assert 5_000 < max(map(adapters, drawn)) <= 10_000
    assert {method for configuration in drawn for method in configuration.methods} == {*space.default_methods}
    assert all(adapters(known.configuration) <= 10_000 for known in space.baselines(backbone))
    # What is made from the drawn may go beyond, and is not trained.
    assert adapters(space.extremes(backbone)[1]) > 10_000
    (bound,) = Search(str(tmp_path), task, space, tracking=None).constraints
    assert (bound.objective.name, bound.bound) == ("adapter_parameters", 10_000)
    given = {"adapter_parameters": "5k", "peak_memory": "1 GiB"}
    found = Search(str(tmp_path), task, space, constraints=given, tracking=None).constraints
    assert {limit.objective.name: limit.bound for limit in found} == {
        "adapter_parameters": 5_000,
        "peak_memory": 2**30,
    }


def test_settings_of_a_preset_can_be_replaced() -> None:
    space = Servable(sizes={"rank": (16, 16)}, roles=("query",), learning_rate=1e-3)
    drawn = space.extremes(backbone_of("bert"))[1]
    assert {str(adapter) for _, adapter in drawn} == {"lora(16)"}
    assert len(Stratified().block_groups(backbone_of("bert"))) == 3
    tiny = Tiny(methods=("lora",), learning_rate=1e-3).extremes(backbone_of("bert"))[1]
    assert {adapter.size for _, adapter in tiny} == {1}
    assert not len(unmergeable(drawn))


def test_yaml_knows_them_by_name() -> None:
    settings = {
        "backbone": "prajjwal1/bert-tiny",
        "task": {"type": "TextClassification", "dataset": "x.csv"},
        "space": {"type": "LowMemory", "groups": 2, "sizes": {"side width": [4, 12, 20]}},
    }
    assert build_config(settings).search.space == LowMemory(groups=2, sizes={"side width": (4, 12, 20)})
