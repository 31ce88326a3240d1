"""Learning rates by family: parameters are trained at the multiple that their method's specification has."""

from __future__ import annotations

import pytest
from torchmetrics import MetricCollection

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.methods import attach
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
        rates = {id(parameter): group["initial_lr"] for group in groups for parameter in group["params"]}
        assert all(group["initial_lr"] * group["weight_decay"] == pytest.approx(1e-4) for group in groups)
        found = {name: rates[id(parameter)] for name, parameter in attachment.parameters.items()}
    for name, rate in found.items():
        method = name.split(".")[0] if "shared" in name else name.split(".")[2]
        factor = METHOD_SPECS[method].rate if method in METHOD_SPECS else 1.0  # of the head
        assert rate == pytest.approx(1e-3 * factor), name
    assert len(set(found.values())) == 3


def test_the_methods_of_the_default_spaces_keep_the_configurations_rate() -> None:
    assert {METHOD_SPECS[name].rate for name in ("lora", "series", "parallel", "prefix")} == {1.0}
