"""Hidden states of an encoder that decoders, images and other blocks are served."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from autopeft import Training
from autopeft.core.configuration import Adapter, Configuration
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.frozen_blocks.block_skipping import servable_blocks
from autopeft.models.backbone import Backbone
from autopeft.tasks import ImageClassification, Seq2Seq
from autopeft.tasks.dataset_task import DatasetTask
from tests.evaluation.test_hidden_state_cache import assert_alike, served_cuts
from tests.slow_cases import slow_unless
from tests.task_cases import TASK_CASES, answered_rows, drawn_rows, splits_of
from tests.tiny_models import fingerprint, tiny_chat_tokenizer, tiny_headed
from tests.tiny_processors import tiny_processor

TRAINING = Training(epochs=1, batch_size=8, device="cpu", precision="32-true", frozen_blocks="cached")


def backbone_of(architecture: str, task: DatasetTask) -> Backbone:
    is_text = isinstance(task, Seq2Seq)
    processor = tiny_chat_tokenizer() if is_text else tiny_processor(task.head, architecture)
    return Backbone.load(tiny_headed(task.head, architecture), task.head, processor)


def evaluator_of(backbone: Backbone, task: DatasetTask, folder: Path | None) -> Evaluator:
    objectives = resolve_objectives((task.metrics[0].name, "trainable_parameters"), task.metrics)
    return Evaluator(backbone, task, TRAINING, objectives, cache=folder)


def above(backbone: Backbone, cut: int) -> Configuration:
    """Return LoRA at every layer from a block on, of those that follow the first stack too."""
    lora = Adapter("lora", 3)
    sites = [site for site, shape in backbone.sites.items() if shape.kind == "linear"]
    return Configuration(
        {site: lora for site in sites if backbone.blocks_below(site.place) >= cut}, learning_rate=1e-2
    )


@pytest.mark.parametrize(
    ("architecture", "cut", "served"),
    slow_unless(
        lambda architecture, cut, _: (architecture, cut) in (("bart", 2), ("t5", 3), ("whisper", 3)),
        [("bart", 1, 1), ("bart", 2, 2), ("bart", 3, 2), ("t5", 2, 2), ("t5", 3, 2), ("whisper", 3, 2)],
    ),
)
def test_a_decoder_is_served_what_the_encoder_returns(
    architecture: str, cut: int, served: int, tmp_path: Path
) -> None:
    case = TASK_CASES["SpeechRecognition" if architecture == "whisper" else "Seq2Seq"]
    task = case.make()
    backbone = backbone_of(architecture, task)
    before = fingerprint(backbone.model)
    cached = evaluator_of(backbone, task, tmp_path)
    assert cached.hidden_states.is_served(cut)
    first, second = (cached.train(above(backbone, cut)) for _ in range(2))
    assert served_cuts(cached) == [served, served]
    assert fingerprint(backbone.model) == before
    assert_alike(first, evaluator_of(backbone, task, None).train(above(backbone, cut)))
    assert_alike(second, first, tolerance=0)


def test_blocks_inside_an_encoder_that_hand_on_more_are_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """T5's first block makes the position bias of all others."""
    caplog.set_level(logging.INFO)
    task = Seq2Seq(splits_of(answered_rows))
    backbone = backbone_of("t5", task)
    cached = evaluator_of(backbone, task, tmp_path)
    assert cached.train(above(backbone, 1)).evaluation.status == "complete"
    assert served_cuts(cached) == []
    assert "block 0 returns more than hidden states" in caplog.text


def test_the_size_said_beforehand_is_of_the_encoder(tmp_path: Path) -> None:
    task = Seq2Seq(splits_of(answered_rows))
    backbone = backbone_of("bart", task)
    assert servable_blocks(backbone) == 2
    cached = evaluator_of(backbone, task, tmp_path)
    said = cached.hidden_states.describe()
    assert said is not None
    assert "GiB for each lowest block" in said
    cached.train(above(backbone, 3))
    files = list((tmp_path / "hidden_states").glob("*.safetensors"))
    assert len(files) == 2  # of the encoder's last block, for training and validation


@pytest.mark.parametrize("architecture", ["vit", "dinov2"])
def test_images_are_served_patches(architecture: str, tmp_path: Path) -> None:
    task = ImageClassification(splits_of(drawn_rows))
    backbone = backbone_of(architecture, task)
    cached = evaluator_of(backbone, task, tmp_path)
    trained = cached.train(above(backbone, 1))
    assert served_cuts(cached) == [1]
    assert_alike(trained, evaluator_of(backbone, task, None).train(above(backbone, 1)))
