"""Learning rates by family: parameters are trained at the multiple that their method's specification has."""

from __future__ import annotations

import pytest
from torchmetrics import MetricCollection

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.training.module import FineTuning
from tests.loss_task import CROSS_ENTROPY
from tests.tiny_models import tiny_backbone


def test_each_family_of_a_mix_has_its_own_rate() -> None:
    backbone = tiny_backbone("bert")
    configuration = Configuration(
        {
            Site(0, "query"): Adapter("vera", 16),
            Site(1, "query"): Adapter("lora", 2),
            Site(1, "value"): Adapter("unilora", 64),
        },
        learning_rate=1e-3,
        weight_decay=0.1,
    )
    found = rates(backbone, configuration)
    for name, rate in found.items():
        method = name.split(".")[0] if "shared" in name else name.split(".")[2]
        factor = METHOD_SPECS[method].rate if method in METHOD_SPECS else 1.0  # of the head
        assert rate == pytest.approx(1e-3 * factor), name
    assert len(set(found.values())) == 3


def rates(backbone: Backbone, configuration: Configuration) -> dict[str, float]:
    """Return the peak learning rates of what a configuration trains, by name."""
    with attach(backbone, configuration) as attachment:
        module = FineTuning(
            backbone.model,
            CROSS_ENTROPY,
            learning_rate=configuration.learning_rate,
            weight_decay=configuration.weight_decay,
            warmup_share=0.0,
            total_steps=10,
            metrics=MetricCollection({}),
        )
        groups = module.configure_optimizers()["optimizer"].param_groups
        by_id = {id(parameter): group["initial_lr"] for group in groups for parameter in group["params"]}
        assert all(group["initial_lr"] * group["weight_decay"] == pytest.approx(1e-4) for group in groups)
        return {name: by_id[id(parameter)] for name, parameter in attachment.parameters.items()}


@pytest.mark.parametrize("method", ["lora", "dora", "eva"])
def test_b_of_a_lora_may_be_trained_at_a_rate_of_its_own(method: str) -> None:
    """LoRA+: the ratio belongs to the adapter, whatever else is in the configuration."""
    sites = {Site(0, "query"): 16.0, Site(0, "value"): 1.0, Site(1, "query"): 0.5}
    adapters = {site: Adapter(method, 2, {"b_rate": ratio}) for site, ratio in sites.items()}
    configuration = Configuration(adapters, learning_rate=1e-3, weight_decay=0.1)
    assert Configuration.from_dict(configuration.to_dict()) == configuration
    assert configuration != Configuration(dict.fromkeys(sites, Adapter(method, 2)), learning_rate=1e-3)
    found = rates(tiny_backbone("bert"), configuration)
    for site, ratio in sites.items():
        own = {name.split(".")[3]: rate for name, rate in found.items() if name.startswith(f"{site}.")}
        expected = 1e-3 * METHOD_SPECS[method].rate
        assert own.pop("lora_B") == pytest.approx(ratio * expected)
        assert list(own.values()) == pytest.approx([expected] * len(own))
    with pytest.raises(ValueError, match=r"Option 'b_rate' of 'lora' must be above 0\.0, got 0"):
        Adapter("lora", 2, {"b_rate": 0})


def test_the_methods_of_the_default_spaces_keep_the_configurations_rate() -> None:
    assert {METHOD_SPECS[name].rate for name in ("lora", "series", "parallel", "prefix")} == {1.0}
