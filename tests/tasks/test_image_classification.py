from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from transformers import AutoImageProcessor, AutoModel, ViTImageProcessorPil

from autopeft import Adapter, Configuration, Training
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.export.export import export_adapter
from autopeft.models.backbone import Backbone
from autopeft.tasks import ImageClassification
from autopeft.tasks.batch import LABELS, rows_of
from tests.task_cases import drawn_rows, splits_of
from tests.tiny_models import tiny_headed, tiny_tokenizer
from tests.tiny_processors import tiny_processor

PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})


def task(**settings: Any) -> ImageClassification:
    return ImageClassification(splits_of(drawn_rows), **settings)


def written(folder: Path, splits: tuple[str, ...] = ("",)) -> Path:
    """Write ten images a class, as files, in a folder of each class."""
    for split in splits:
        for label in ("cat", "dog"):
            place = folder / split / label
            place.mkdir(parents=True)
            for index in range(10):
                pixels = np.full((8, 12, 3), 20 * index + (label == "dog"), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


class TestData:
    def test_a_batch_is_what_the_processor_makes(self) -> None:
        made, rows = task(), drawn_rows(48, seed=0)
        data = made.data(PROCESSOR, batch_size=8, seed=0)
        batch = next(iter(data.train_dataloader()))
        named = rows_of(batch)
        assert named is not None
        assert named[0] == "train"
        expected = PROCESSOR([rows["image"][row] for row in named[1].tolist()], return_tensors="pt")
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        names = [rows["label"][row] for row in named[1].tolist()]
        assert [made.labels[label] for label in batch[LABELS].tolist()] == names

    def test_grey_images_are_given_three_channels(self) -> None:
        rows = drawn_rows(30, seed=0)
        grey = [image.convert("L") for image in rows["image"]]
        made = ImageClassification(Dataset.from_dict(rows | {"image": grey}))
        assert made.data(PROCESSOR, batch_size=4, seed=0).largest_batch()["pixel_values"].shape[1] == 3

    def test_no_image_is_decoded_before_it_is_asked_for(self) -> None:
        rows = broken(drawn_rows(30, seed=0), row=29)
        made = ImageClassification(DatasetDict(train=rows, validation=rows, test=rows))
        next(iter(made.data(PROCESSOR, batch_size=4, seed=0).val_dataloader()))

    @pytest.mark.parametrize("splits", [("",), ("train", "validation", "test")])
    def test_a_folder_of_class_folders(self, tmp_path: Path, splits: tuple[str, ...]) -> None:
        made = ImageClassification(written(tmp_path / "pets", splits))
        made.validate()
        assert made.labels == ("cat", "dog")
        assert len(made.split("train")) == (20 if splits[0] else 16)
        assert made.identity()["content"] == ImageClassification(tmp_path / "pets").identity()["content"]

    def test_identity_tells_images_apart(self) -> None:
        other = splits_of(lambda count, seed: drawn_rows(count, seed + 5))
        assert task().identity()["content"] == task().identity()["content"]
        assert task().identity()["content"] != ImageClassification(other).identity()["content"]


class TestAugmentation:
    def pixels(self, epochs: int, start: int = 0, seed: int = 0) -> list[torch.Tensor]:
        loader = task(augment=True).data(PROCESSOR, batch_size=48, seed=seed).train_dataloader()
        loader.batch_sampler.set_epoch(start)  # type: ignore[union-attr]
        return [batch["pixel_values"] for _ in range(epochs) for batch in loader]

    def test_is_another_in_every_epoch_and_with_every_seed(self) -> None:
        first, second = self.pixels(2)
        (other,) = self.pixels(1, seed=1)
        for one_epoch, another in ((first, second), (first, other)):
            distances = torch.cdist(one_epoch.flatten(1), another.flatten(1))
            assert float(distances.min()) > 0

    def test_an_epoch_can_be_drawn_again(self) -> None:
        _, second = self.pixels(2)
        (again,) = self.pixels(1, start=1)
        assert torch.equal(second, again)

    def test_leaves_validation_as_it_is_and_keeps_no_hidden_states(self) -> None:
        plain, augmented = (
            task(augment=augment).data(PROCESSOR, batch_size=48, seed=0) for augment in (False, True)
        )
        (expected,), (found,) = plain.val_dataloader(), augmented.val_dataloader()
        assert torch.equal(expected["pixel_values"], found["pixel_values"])
        assert plain.collator("train") is not None
        assert augmented.collator("train") is None


def broken(rows: dict[str, list[Any]], row: int) -> Dataset:
    """Return images of which one is cut off in the middle."""
    whole = Dataset.from_dict(rows).cast_column("image", Image(decode=False))
    images = [dict(image) for image in whole["image"]]
    images[row]["bytes"] = images[row]["bytes"][:200]
    features = Features({"image": Image(), "label": ClassLabel(names=["blue", "green", "red"])})
    labels = [["blue", "green", "red"].index(label) for label in rows["label"]]
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: task(image="picture"), "column of the train split.*'picture'"),
        (lambda: task(image="label", label="image"), "Row 0 of the train split has '.*', expected an image"),
        (lambda: task(label="image"), "label names the column of labels, got 'image', which is read"),
        (
            lambda: ImageClassification(broken(drawn_rows(30, seed=0), row=7)),
            "Row 7 of the train split has no image that can be read",
        ),
    ],
)
def test_wrong_data_are_said_before_training(make: Callable[[], ImageClassification], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().validate()


def test_texts_are_no_images() -> None:
    with pytest.raises(ValueError, match="Expected an image processor for images, got a TokenizersBackend"):
        task().data(tiny_tokenizer(), batch_size=4, seed=0)


def test_a_folder_without_images_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="and no folders of images"):
        ImageClassification(tmp_path).validate()


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    head = task().head
    AutoModel.from_config(tiny_headed(head, "vit").config).save_pretrained(tmp_path / "vit")
    tiny_processor(head).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.mark.slow
def test_a_backbone_brings_its_image_processor_and_an_export_takes_it(
    vit_folder: Path, tmp_path: Path
) -> None:
    made = task()
    backbone = Backbone.load(vit_folder, made.head)
    assert backbone.processor.to_dict() == PROCESSOR.to_dict()
    configuration = Configuration(
        {site: Adapter("lora", 2) for site, shape in backbone.sites.items() if shape.kind == "linear"}
    )
    objectives = resolve_objectives(("accuracy", "trainable_parameters"), made.metrics)
    training = Training(epochs=1, batch_size=16, device="cpu", precision="32-true")
    evaluator = Evaluator(backbone, made, training, objectives)
    state = evaluator.train(configuration).state
    assert state is not None
    report = export_adapter(
        backbone, configuration, state, tmp_path / "adapter", probe=evaluator.model_call()
    )
    assert "fresh process that never imported autopeft" in report.checked
    assert "processor = AutoImageProcessor.from_pretrained" in report.how_to_load
    assert AutoImageProcessor.from_pretrained(tmp_path / "adapter").to_dict() == PROCESSOR.to_dict()


def test_a_backbone_without_an_image_processor_is_said(tmp_path: Path) -> None:
    tiny_headed(task().head, "vit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="No image processor was found for the backbone"):
        Backbone.load(tmp_path, task().head)


@pytest.mark.slow
def test_trainings_are_served_hidden_states(tmp_path: Path) -> None:
    made = task()
    backbone = Backbone.load(tiny_headed(made.head, "dinov2"), made.head, PROCESSOR)
    sites = {
        site: Adapter("lora", 2)
        for site, shape in backbone.sites.items()
        if shape.kind == "linear" and site.block == 1
    }
    configuration = Configuration(sites, learning_rate=1e-2)
    objectives = resolve_objectives(("accuracy", "trainable_parameters"), made.metrics)
    training = Training(epochs=30, batch_size=8, device="cpu", precision="32-true")
    values = []
    for folder in (tmp_path, None):
        evaluator = Evaluator(backbone, made, training, objectives, cache=folder)
        values.append(evaluator.train(configuration).evaluation.values["accuracy"])
        assert len(evaluator.hidden_states.uses) == (folder is not None)
    assert values[0] == values[1]
