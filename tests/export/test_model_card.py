"""Model cards, and what is said of servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForSeq2SeqLM

from autopeft.core.configuration import Configuration
from tests.exports import (
    export,
    lora_of_many_ranks,
)
from tests.tiny_models import (
    everywhere,
    tiny_backbone,
)


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return dict(yaml.safe_load(head)), body


def test_card_has_figures_picture_and_ways_to_load(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    configuration = lora_of_many_ranks(backbone)
    values = {
        "accuracy": 0.8765,
        "trainable_parameters": 334_000.0,
        "test_accuracy": 0.8543,
        "examples_per_second": 51.0,
    }
    export(
        backbone,
        configuration,
        tmp_path / "out",
        values=values,
        details={"trial": "17", "data set": "a|b"},
        base="somebody/model",
    )
    meta, body = card_of(tmp_path / "out")
    assert meta["library_name"] == "peft"
    assert meta["pipeline_tag"] == "text-classification"
    assert meta["base_model"] == "somebody/model"
    assert meta["tags"] == ["autopeft", "lora"]
    assert "| accuracy | validation | 0.8765 |" in body
    assert "| accuracy | test | 0.8543 |" in body
    assert "| trainable_parameters | – | 334.0 k |" in body
    assert "| examples_per_second | – | 51.0000 |" in body
    assert "| trial | 17 |" in body
    assert "a\\|b" in body
    assert configuration.grid() in body
    assert "PeftModel.from_pretrained(base, 'out')" in body
    assert "autopeft.load_adapter('somebody/model', 'out')" in body
    assert "LABEL_0, LABEL_1, LABEL_2" in body
    assert "largest difference of its logits" in body


def test_a_task_without_a_pipeline_keeps_the_hubs_tag_and_its_results(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    backbone.auto_class = AutoModelForSeq2SeqLM
    values, details = {"loss": 1.5, "test_loss": 1.25}, {"task dataset": "words"}
    export(
        backbone,
        everywhere(backbone, "lora"),
        tmp_path / "out",
        values=values,
        details=details,
        verify=False,
    )
    meta, _ = card_of(tmp_path / "out")
    assert meta["pipeline_tag"] == "text2text-generation"
    (result,) = ModelCard.load(tmp_path / "out/README.md").data.eval_results
    assert result.metric_value == 1.25


def test_card_of_a_local_base_names_no_model_of_the_hub(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    export(backbone, Configuration(), tmp_path / "out", base=str(tmp_path), verify=False)
    meta, body = card_of(tmp_path / "out")
    assert "base_model" not in meta
    assert "not scored on a test split" in body
    assert "None were given." in body


def test_labels_and_paths_are_shown_as_they_are_and_local_places_not_at_all(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    labels = ["yes\n# Heading", "<b>no</b>", "[a](b)"]
    backbone.model.config.id2label = dict(enumerate(labels))
    base = tmp_path / "private" / "model"
    base.mkdir(parents=True)
    data = tmp_path / "private" / "data.csv"
    export(
        backbone,
        everywhere(backbone, "lora"),
        tmp_path / "out",
        details={"task dataset": str(data)},
        base=str(base),
        verify=False,
    )
    _, body = card_of(tmp_path / "out")
    assert r"Labels in the order of the logits: yes # Heading, \<b\>no\</b\>, \[a\](b)." in body
    assert str(tmp_path) not in body
    assert "Base model: model, a local folder." in body
    assert "'path/to/model'" in body
    assert "| task dataset | data.csv |" in body


@pytest.mark.parametrize(("trainings", "expected"), [(1, "one training with one seed"), (3, "3 trainings")])
def test_limits_say_how_many_trainings_there_were(trainings: int, expected: str, tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    export(backbone, Configuration(), tmp_path / "out", trainings=trainings, verify=False)
    _, body = card_of(tmp_path / "out")
    limits = body.partition("## Limits")[2]
    assert expected in limits
    assert ("one seed" in limits) == (trainings == 1)


def test_metadata_survives_the_hub_s_own_reader(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    data = {"task dataset": "somebody/data", "task subset": "easy"}
    values = {"accuracy": 0.9}
    scores = {"accuracy": 0.75, "f1": 0.5}
    export(
        backbone,
        everywhere(backbone, "lora"),
        tmp_path / "out",
        values=values,
        details=data,
        score=lambda *_: scores,
        verify=False,
    )
    metadata = ModelCard.load(tmp_path / "out" / "README.md").data
    assert isinstance(metadata, ModelCardData)
    results = metadata.eval_results or []
    assert {result.metric_type: result.metric_value for result in results} == scores
    expected = ("text-classification", "somebody/data", "easy", "test", None)
    assert {result.unique_identifier for result in results} == {expected}
    assert metadata.model_name == "out"
    assert metadata.datasets == ["somebody/data"]
    assert metadata.metrics == ["accuracy", "f1"]
    assert metadata.license is None


@pytest.mark.parametrize(
    ("method", "target", "library"),
    [("lora", "peft", "peft"), ("series", "autopeft", "autopeft"), ("lora", "merged", "transformers")],
)
def test_the_hub_is_told_what_loads_it(method: str, target: str, library: str, tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    export(backbone, everywhere(backbone, method), tmp_path / "out", target=target, verify=False)
    assert card_of(tmp_path / "out")[0]["library_name"] == library


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# Base\n", "apache-2.0"),
        ("# Base\n", None),
        ("---\n- a\n---\n", None),
    ],
)
def test_the_license_is_that_of_the_base_where_its_card_says_so(
    card: str, expected: str | None, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(card)
    backbone, data = tiny_backbone("bert"), {"task dataset": str(tmp_path / "data.csv")}
    lora = everywhere(backbone, "lora")
    export(backbone, lora, tmp_path / "out", base=str(base), details=data, verify=False)
    meta, _ = card_of(tmp_path / "out")
    assert meta.get("license") == expected
    assert "datasets" not in meta


def test_other_targets_are_told_by_method(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    ia3 = export(backbone, everywhere(backbone, "ia3"), tmp_path / "ia3", verify=False)
    assert ia3.servers.endswith("take it: 'autopeft', 'merged'.")
    prefix = export(backbone, everywhere(backbone, "prefix"), tmp_path / "prefix", verify=False)
    assert "autopeft.load_adapter" in prefix.servers
    assert "merged" not in prefix.servers
    lora = everywhere(backbone, "lora")
    merged = export(backbone, lora, tmp_path / "merged", target="merged", verify=False)
    assert merged.servers.startswith("Whatever runs transformers models")
