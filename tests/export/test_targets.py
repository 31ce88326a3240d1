"""What an export is for, and what each target takes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig
from transformers import AutoModelForCausalLM

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.export.export import load_adapter
from autopeft.methods import count_parameters
from autopeft.models.backbone import Backbone
from tests.exports import (
    TOLERANCE,
    difference,
    expected_logits,
    export,
)
from tests.tiny_models import (
    everywhere,
    tiny_backbone,
    tiny_batch,
    tiny_language_model,
    tiny_tokenizer,
)


def language_backbone(architecture: str = "llama") -> Backbone:
    model, auto_class = tiny_language_model(architecture), AutoModelForCausalLM
    return Backbone(model, tiny_tokenizer(), name="tiny", head=(), auto_class=auto_class)


LORA, IA3 = Adapter("lora", 2), Adapter("ia3")
SITE = Site(0, "query")


@pytest.mark.parametrize(
    ("head", "sites", "target", "expected"),
    [
        (False, {SITE: LORA}, "vlm", "Unknown target 'vlm'.*did you mean 'vllm'"),
        (
            False,
            {SITE: LORA, Site(1, "value"): IA3},
            "peft",
            "this is lora, ia3. Targets that take it: 'autopeft', 'merged', 'lora', 'vllm'",
        ),
        (
            False,
            {Site(0, "attention"): Adapter("prefix", 2)},
            "lora",
            r"no weight can take in 0\.attention \(prefix\).* take it: 'autopeft'\.$",
        ),
        (True, {SITE: LORA}, "vllm", "is an AutoModelForSeq.*: 'peft', 'autopeft', 'merged', 'lora'"),
        (True, {}, "lora", "a head alone, and no adapter.*: 'autopeft', 'merged'"),
        (True, {}, "peft", "this is a head alone.*'autopeft'"),
        (
            False,
            {Site(0, "ffn_norm"): Adapter("layernorm")},
            "lora",
            "0.ffn_norm: it changes a norm.*'merged'",
        ),
        (True, {SITE: [LORA, Adapter("bitfit")]}, "lora", "bitfit at 0.query: it changes the bias"),
        (False, {SITE: LORA, Site(1, "value"): IA3}, "peft-method-comparison", "this is lora, ia3"),
        (True, {SITE: LORA}, "peft-method-comparison", "causal language models"),
    ],
)
def test_what_a_target_cannot_take_is_refused_with_one_that_can(
    head: bool, sites: dict[Site, Any], target: str, expected: str, tmp_path: Path
) -> None:
    backbone = tiny_backbone("bert") if head else language_backbone()
    with pytest.raises(ValueError, match=expected):
        export(backbone, Configuration(sites), tmp_path / "out", target=target)
    assert not list(tmp_path.iterdir())


def test_a_plain_lora_can_be_a_folder_of_autopeft(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    configuration = everywhere(backbone, "lora")
    report = export(backbone, configuration, tmp_path / "out", target="autopeft")
    assert {"lora/adapter_config.json", "head.safetensors"} <= set(report.files)
    loaded = load_adapter(copy.deepcopy(backbone.model), tmp_path / "out")
    assert difference(loaded, tiny_batch(), expected_logits(backbone, configuration)) <= TOLERANCE


def test_an_experiment_of_peft_s_comparison_is_a_config_and_settings(tmp_path: Path) -> None:
    backbone = language_backbone()
    sites = everywhere(backbone, "hira").adapters
    configuration = Configuration(sites, learning_rate=1e-3, weight_decay=0.1)
    folder = tmp_path / "out"
    report = export(backbone, configuration, folder, target="peft-method-comparison")
    assert report.files == ("adapter_config.json", "training_params.json")
    config = PeftConfig.from_pretrained(str(folder))
    assert not config.inference_mode
    assert config.peft_type == "HIRA"
    assert f"{count_parameters(backbone, configuration):,} parameters" in report.checked
    settings = json.loads((folder / "training_params.json").read_text())
    assert settings == {"dtype": "float32", "optimizer_kwargs": {"lr": 15e-3, "weight_decay": 0.1}}
    export(backbone, configuration, folder, target="peft", overwrite=True, verify=False)
