"""Merging adapters into the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from autopeft.core.configuration import Adapter, Configuration, Site
from tests.exports import (
    TOLERANCE,
    difference,
    expected_logits,
    export,
)
from tests.tiny_models import (
    everywhere,
    fingerprint,
    tiny_backbone,
    tiny_batch,
)


@pytest.mark.parametrize("methods", [("lora",), ("ia3",), ("layernorm",), ("bitfit",), ("lora", "bitfit")])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_merged_is_a_model_of_its_own(architecture: str, methods: tuple[str, ...], tmp_path: Path) -> None:
    backbone = tiny_backbone(architecture)
    adapters: dict[Site, list[Adapter]] = {}
    for method in methods:
        for site, several in everywhere(backbone, method).adapters.items():
            adapters.setdefault(site, []).extend(several)
    configuration = Configuration(adapters)
    before = fingerprint(backbone.model)
    report = export(backbone, configuration, tmp_path / "merged", target="merged", verify=False)
    assert fingerprint(backbone.model) == before
    assert report.max_logit_difference is None
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    expected = expected_logits(backbone, configuration)
    assert difference(model.eval(), tiny_batch(), expected) <= TOLERANCE
    plain = {name for name, _ in backbone.model.named_parameters()}
    assert {name for name, _ in model.named_parameters()} == plain
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(backbone.processor)


def test_merging_refuses_what_no_weight_can_take(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    configuration = Configuration(
        {
            Site(0, "query"): Adapter("lora", 2),
            Site(0, "attention"): Adapter("prefix", 2),
            Site(1, "ffn"): Adapter("series", 2),
        }
    )
    with pytest.raises(
        ValueError, match=r"'merged': no weight .* 0\.attention \(prefix\), 1\.ffn \(series\)"
    ):
        export(backbone, configuration, tmp_path / "out", target="merged")
    assert not list(tmp_path.iterdir())
