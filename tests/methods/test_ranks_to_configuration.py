"""Ranks that were learned become a configuration that can be attached and computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autopeft.callbacks import IncreLoRA, RankGates, SoRA
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.methods import attach
from autopeft.methods.ranks_to_configuration import attachment_tensors, configuration_from_ranks
from tests.callbacks.lora_fits import Classifier, fit
from tests.tiny_models import logits_of, places, tiny_backbone


def mixed(backbone: Any) -> Configuration:
    """Return LoRA everywhere, with different options and beside other methods."""
    options: tuple[dict[str, Any], ...] = (
        {},
        {"rslora": False},
        {"alpha": 3, "rslora": False},
        {"alpha": 20},
    )
    adapters: dict[Site, Any] = {
        site: Adapter("lora", 3 + index % 3, options[index % len(options)])
        for index, site in enumerate(places(backbone, "lora"))
    }
    adapters[Site(0, "ffn")] = Adapter("series", 4)
    return Configuration(adapters, learning_rate=3e-3, weight_decay=0.1)


def half_gates(ranks: dict[str, int]) -> dict[str, Tensor]:
    """Return gates with zeros in places, and one module without any rank."""
    gates = {name: torch.linspace(-1, 1, rank) * (torch.arange(rank) != 1) for name, rank in ranks.items()}
    gates[next(iter(gates))] = torch.zeros(ranks[next(iter(gates))])
    return gates


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("kind", ["gates", "sparse", "incremental"])
def test_the_learned_ranks_attached_compute_the_same(kind: str, architecture: str) -> None:
    backbone = tiny_backbone(architecture)
    configuration = mixed(backbone)
    count = len(places(backbone, "lora"))
    callback: RankGates = IncreLoRA(count + 3, every_n_steps=1, modules_per_growth=1)
    if kind != "incremental":
        callback = RankGates() if kind == "gates" else SoRA(1.0, learning_rate=0.05)
        sizes = {
            f"model.{backbone.shape(site).module}": int(adapter.size or 0)
            for site, adapter in configuration
            if adapter.method == "lora"
        }
        callback.load_state_dict({"gates": half_gates(sizes)})
    with attach(backbone, configuration) as attachment:
        with torch.no_grad():
            for parameter in attachment.parameters.values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        fit(Classifier(backbone.model).train(), callback, steps=4)
        expected, trained = logits_of(backbone), attachment.state_dict()

    learned = configuration_from_ranks(backbone, configuration, callback.ranks())
    assert learned.learning_rate == configuration.learning_rate
    assert learned.weight_decay == configuration.weight_decay
    assert learned.adapters[Site(0, "ffn")] == configuration.adapters[Site(0, "ffn")]
    lora = {site: adapter for site, adapter in learned if adapter.method == "lora"}
    assert sum(int(adapter.size or 0) for adapter in lora.values()) == sum(callback.ranks().values())
    assert (len(lora) < count) == (kind != "incremental")
    with attach(backbone, learned, seed=9) as attachment:
        rest = {name: tensor for name, tensor in trained.items() if ".lora." not in name}
        attachment.load_state_dict(rest | attachment_tensors(backbone, callback.truncated_state()))
        torch.testing.assert_close(logits_of(backbone), expected, rtol=1e-4, atol=1e-5)


def test_options_stay_and_sites_without_a_rank_are_left_out() -> None:
    backbone = tiny_backbone("bert")
    query, value, key = Site(0, "query"), Site(0, "value"), Site(1, "key")
    configuration = Configuration(
        {
            query: Adapter("lora", 8, {"alpha": 5, "dropout": 0.1}),
            value: (Adapter("lora", 8, {"rslora": False}), Adapter("bitfit")),
            key: Adapter("lora", 8),
        }
    )
    ranks = {f"anything.{backbone.shape(query).module}": 3, backbone.shape(value).module: 0}
    assert configuration_from_ranks(backbone, configuration, ranks) == Configuration(
        {
            query: Adapter("lora", 3, {"alpha": 5, "dropout": 0.1}),
            value: Adapter("bitfit"),
            key: Adapter("lora", 8),
        }
    )
    assert configuration_from_ranks(backbone, configuration, {}) == configuration


def test_names_and_ranks_that_do_not_fit_are_refused() -> None:
    backbone = tiny_backbone("bert")
    site = Site(0, "query")
    name = backbone.shape(site).module
    configuration = Configuration({site: Adapter("lora", 8)})
    cases: list[tuple[dict[str, Any], str]] = [
        ({f"{name}s": 2}, rf"Unknown linear module of tiny-bert '{name}s'.*did you mean '{name}'"),
        ({name.replace("query", "value"): 2}, "is the site 0.value, where the configuration has no LoRA"),
        ({name: 2, f"model.{name}": 2}, "Site 0.query is named twice"),
        ({name: -1}, "a whole number from 0 up, got -1"),
        ({name: 2.0}, "a whole number from 0 up, got 2.0"),
    ]
    for ranks, message in cases:
        with pytest.raises(ValueError, match=message):
            configuration_from_ranks(backbone, configuration, ranks)
