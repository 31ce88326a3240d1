"""Recordings: what files hold, rates, batches, and what is wrong with them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset, DatasetDict
from numpy.typing import NDArray
from scipy.io import wavfile
from transformers import AutoFeatureExtractor, AutoProcessor, Wav2Vec2FeatureExtractor

from autopeft import Configuration, Training
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.export.folder_format import TaskHead
from autopeft.models.backbone import Backbone
from autopeft.tasks import AudioClassification, SpeechRecognition
from autopeft.tasks.batch import IGNORED, LABELS, rows_of
from autopeft.tasks.generation import word_error_rate
from tests.task_cases import dictated_rows, heard, splits_of, sung_rows
from tests.tiny_models import everywhere, tiny_headed, tiny_tokenizer
from tests.tiny_processors import tiny_processor

EXTRACTOR = Wav2Vec2FeatureExtractor()


def task(**settings: Any) -> AudioClassification:
    return AudioClassification(heard(splits_of(sung_rows)), **settings)


def spoken(**settings: Any) -> SpeechRecognition:
    return SpeechRecognition(heard(splits_of(dictated_rows)), new_tokens=8, **settings)


def waves(count: int = 30, rate: int = 16_000) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    return [{"array": draw.uniform(-1, 1, 800 + 10 * row), "sampling_rate": rate} for row in range(count)]


def of_arrays(recordings: list[dict[str, Any]], **settings: Any) -> AudioClassification:
    labels = ["high" if row % 2 else "low" for row in range(len(recordings))]
    return AudioClassification(Dataset.from_dict({"audio": recordings, "label": labels}), **settings)


def of_files(contents: list[bytes]) -> Dataset:
    labels = ["high" if row % 2 else "low" for row in range(len(contents))]
    rows = {"audio": [{"bytes": content, "path": None} for content in contents], "label": labels}
    return Dataset.from_dict(rows).cast_column("audio", Audio(decode=False))


def wav(samples: NDArray[Any], rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    wavfile.write(file, rate, samples)
    return file.getvalue()


@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.int16, 2**15), (np.int32, 2**31), (np.uint8, 2**7), (np.float32, 1)]
)
def test_samples_of_every_kind_are_read_alike(dtype: Any, scale: int) -> None:
    wave = np.random.default_rng(0).uniform(-0.9, 0.9, (800, 2))
    offset = 2**7 if dtype is np.uint8 else 0
    content = wav((wave * scale + offset).astype(dtype))
    read, rate = AudioClassification(of_files([content] * 30)).recordings("train").decoded(0)
    assert rate == 16_000
    assert np.abs(read - wave.mean(axis=1)).max() < (0.02 if dtype is np.uint8 else 1e-4)


def test_a_batch_is_what_the_feature_extractor_makes() -> None:
    recordings = waves()
    data = of_arrays(recordings).data(EXTRACTOR, batch_size=8, seed=0)
    split = data.split("train")[0]
    for batch in data.val_dataloader(), data.train_dataloader(0):
        assert rows_of(next(iter(batch))) is not None
    collated = data.features("train", [3, 0])
    arrays = [recordings[split.rows[row]]["array"].astype(np.float32) for row in (3, 0)]
    expected = EXTRACTOR(arrays, sampling_rate=16_000, padding=True, return_tensors="pt")
    assert torch.equal(collated["input_values"], expected["input_values"])
    largest = max(len(recordings[row]["array"]) for row in split.rows)
    assert data.largest_batch()["input_values"].shape == (8, largest)
    assert data.collator("train") is None  # only the model knows how many frames a row has


def test_other_rates_are_resampled_where_that_is_asked_for() -> None:
    seconds = np.arange(8_000) / 8_000
    recordings = [{"array": np.sin(2 * np.pi * 440 * seconds), "sampling_rate": 8_000}] * 30
    resampled = of_arrays(recordings, resample=True)
    found = resampled.recordings("train").wave(0, 16_000)
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert np.abs(found - expected)[200:-200].max() < 0.01
    data = resampled.data(EXTRACTOR, batch_size=4, seed=0)
    assert data.largest_batch()["input_values"].shape == (4, 16_000)
    with pytest.raises(ValueError, match=r"Row \d+ of the train split has 8,000 samples a second.*16,000"):
        of_arrays(recordings).data(EXTRACTOR, batch_size=4, seed=0)


def test_long_recordings_are_cut_aloud(caplog: pytest.LogCaptureFixture) -> None:
    cut = of_arrays(waves(), max_seconds=0.06)
    cut.validate()
    assert "of the 24 recordings of the train split are cut at max_seconds=0.06" in caplog.text
    assert cut.data(EXTRACTOR, batch_size=4, seed=0).largest_batch()["input_values"].shape == (4, 960)


@pytest.mark.parametrize("kind", ["names", "folders"])
def test_files_of_a_folder(tmp_path: Path, kind: str) -> None:
    names = []
    for row in range(20):
        label = "high" if row % 2 else "low"
        file = tmp_path / label / f"{row}.wav"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(wav(np.full(800, row, dtype=np.int16)))
        names.append(f"{label}/{row}.wav,{label}")
    if kind == "names":
        (tmp_path / "data.csv").write_text("\n".join(["audio,label", *names]))
    made = AudioClassification(tmp_path / "data.csv" if kind == "names" else tmp_path)
    made.validate()
    assert made.labels == ("high", "low")
    assert len(made.split("train")) == 16


def broken(row: int) -> Dataset:
    """Return recordings of which one is cut off in the middle; the first two rows have no label."""
    contents = [wav(np.zeros(800, dtype=np.int16))] * 30
    contents[row] = contents[row][:400]
    data = of_files(contents)
    labels = [None, None, *data["label"][2:]]
    return data.remove_columns("label").add_column("label", labels)


ODD = [np.array([], dtype=np.float32), np.array([np.nan, 0, 0])]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: task(audio="sound"), "column of the train split.*'sound'"),
        (
            lambda: AudioClassification(Dataset.from_dict({"audio": [1.0] * 30, "label": ["a", "b"] * 15})),
            "Row 0 of the train split has '1.0' in 'audio', expected a recording",
        ),
        (
            lambda: AudioClassification(broken(7)),
            "Row 7 of the train split has no recording that can be read: Reached EOF",
        ),
        (
            lambda: AudioClassification(of_files([b"no recording"] * 30)),
            "it is no WAV file, and others need soundfile",
        ),
        (lambda: of_arrays([{"array": ODD[0], "sampling_rate": 8}] * 30), "it has no samples"),
        (lambda: of_arrays([{"array": ODD[1], "sampling_rate": 8}] * 30), "not all samples are numbers"),
        (lambda: AudioClassification(task().dataset, max_seconds=0), "max_seconds is above 0, got 0"),
        (lambda: spoken(audio="sound"), "column of the train split.*'sound'"),
        (lambda: spoken(target="words"), "column of the train split.*'words'"),
        (
            lambda: task(subset=None, label="label", audio="label"),
            "label names the column of labels, got 'label', which is read",
        ),
    ],
)
def test_wrong_data_are_said_before_training(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().validate()


def test_streamed_rows_are_refused() -> None:
    streamed = heard(splits_of(sung_rows))["train"].to_iterable_dataset()
    for source in (streamed, {"train": streamed}):
        with pytest.raises(ValueError, match="'train' is a IterableDataset, expected a"):
            AudioClassification(source).validate()


def test_texts_are_no_recordings() -> None:
    with pytest.raises(ValueError, match="Expected a feature extractor for audio, got a TokenizersBackend"):
        task().data(tiny_tokenizer(), batch_size=4, seed=0)
    with pytest.raises(ValueError, match="Expected a processor of a feature extractor and a tokenizer"):
        spoken().data(tiny_tokenizer(), batch_size=4, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "place"), [(task, ("", 1)), (spoken, ("decoder", 0))])
def test_trainings_are_served_hidden_states_of_recordings_of_one_size(
    make: Callable[[], Any], place: tuple[str, int], tmp_path: Path
) -> None:
    made = make()
    processor = tiny_processor(made.head, "whisper")
    backbone = Backbone.load(tiny_headed(made.head, "whisper"), made.head, processor)
    sites = {site: adapter for site, adapter in everywhere(backbone, "lora") if site.place == place}
    configuration = Configuration(sites, learning_rate=1e-2)
    metric = made.metrics[0].name
    objectives = resolve_objectives((metric, "trainable_parameters"), made.metrics)
    values = []
    for folder in (tmp_path, None):
        training = Training(epochs=30, batch_size=8, device="cpu", precision="32-true")
        evaluator = Evaluator(backbone, made, training, objectives, cache=folder)
        values.append(evaluator.train(configuration).evaluation.values[metric])
        assert len(evaluator.hidden_states.uses) == (folder is not None)
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_workers_make_the_same_batches_and_draw_nothing() -> None:
    drawn = []
    for workers in (0, 2):
        made = task(workers=workers)
        backbone = Backbone.load(tiny_headed(made.head, "wav2vec2"), made.head, EXTRACTOR)
        objectives = resolve_objectives(("accuracy", "trainable_parameters"), made.metrics)
        training = Training(epochs=2, batch_size=16, accumulate=2, device="cpu")
        batches = Evaluator(backbone, made, training, objectives).batches(seed=0)
        before = torch.get_rng_state()
        parts = [part for _ in range(2) for parts in batches for part in parts]
        assert torch.equal(before, torch.get_rng_state())
        drawn.append(parts + list(made.data(EXTRACTOR, batch_size=8, seed=0, cache=None).val_dataloader()))
    assert len(drawn[0]) == len(drawn[1]) == 2 * 6 + 4
    for batch, other in zip(*drawn, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in batch.items())


def test_speech_models_do_nothing_at_random() -> None:
    made = task()
    model = tiny_headed(made.head, "wav2vec2")
    assert model.config.apply_spec_augment
    assert model.config.layerdrop
    backbone = Backbone.load(model, made.head, EXTRACTOR)
    assert not model.config.apply_spec_augment
    assert not model.config.layerdrop
    assert backbone.head == ("projector", "classifier")
    base: Any = model.train().base_model
    assert not base.feature_extractor(torch.zeros(1, 1600)).requires_grad


class TestRecognition:
    def test_labels_are_texts_after_the_start(self) -> None:
        made = spoken()
        processor: Any = tiny_processor(made.head)
        data = made.data(processor, batch_size=8, seed=0)
        batch = next(iter(data.val_dataloader()))
        named = rows_of(batch)
        assert named is not None
        tokenizer = processor.tokenizer
        for row, labels in zip(named[1].tolist(), batch[LABELS], strict=True):
            ids = labels[labels != IGNORED].tolist()
            text = made.recordings("validation").labels[row]
            assert tokenizer.decode(ids) == f"<|notimestamps|>{text}<|endoftext|>"
        model = tiny_headed(made.head, "whisper")
        given = model(input_features=batch["input_features"], labels=batch[LABELS]).logits
        assert torch.equal(made.forward(model, batch).logits, given)  # transformers shifts labels alike

    def test_the_largest_batch_has_the_longest_texts(self) -> None:
        made = spoken()
        data = made.data(tiny_processor(made.head), batch_size=4, seed=0)
        longest = max(map(len, made.recordings("train").labels)) + 2
        assert data.largest_batch()[LABELS].shape == (4, longest)

    def test_recordings_of_one_text_stay_together(self) -> None:
        rows = dictated_rows(60, seed=0)
        made = SpeechRecognition(heard(DatasetDict(train=Dataset.from_dict(rows)))["train"])
        made.validate()
        texts = [set(made.recordings(name).labels) for name in ("train", "validation", "test")]
        assert sum(map(len, texts)) == len(set.union(*texts)) == len(set(rows["text"]))

    def test_word_error_rate_is_measured_at_the_end(self) -> None:
        made = spoken(generated_rows=10)
        backbone = Backbone.load(tiny_headed(made.head, "whisper"), made.head, tiny_processor(made.head))
        names = ("loss", "trainable_parameters", "word_error_rate")
        training = Training(epochs=1, batch_size=16, device="cpu")
        evaluator = Evaluator(backbone, made, training, resolve_objectives(names, made.metrics))
        rate = made.metric("word_error_rate")
        assert (rate.direction, made.best_score(rate.name)) == ("minimize", 0.0)
        assert made.trivial_score(rate.name, evaluator.data) == 1.0  # of a model that writes nothing
        evaluation = evaluator.train(everywhere(backbone, "lora")).evaluation
        assert evaluation.values["word_error_rate"] >= 0.5
        assert made.generate_tokens(backbone.model, evaluator.data, 3) == 3 * 8


def test_word_error_rate_is_of_all_words() -> None:
    assert word_error_rate(["w0 w1 w2", "w1"], ["w0 w2", "w1 w1"]) == pytest.approx(2 / 4)


@pytest.mark.parametrize(("make", "auto_class"), [(task, AutoFeatureExtractor), (spoken, AutoProcessor)])
def test_a_backbone_brings_its_processor(make: Callable[[], Any], auto_class: Any, tmp_path: Path) -> None:
    made = make()
    tiny_headed(made.head, "whisper").save_pretrained(tmp_path)
    tiny_processor(made.head, "whisper").save_pretrained(tmp_path)
    backbone = Backbone.load(tmp_path, made.head)
    assert backbone.processor.to_dict() == auto_class.from_pretrained(tmp_path).to_dict()
    assert TaskHead.of(backbone).processor_class == auto_class.__name__


def test_a_backbone_without_a_feature_extractor_is_said(tmp_path: Path) -> None:
    tiny_headed(task().head, "whisper").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="No feature extractor was found for the backbone"):
        Backbone.load(tmp_path, task().head)
