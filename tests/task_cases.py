"""Every task on rows that tiny random models learn, with a slow reference for its metrics."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import PIL.Image
from datasets import Audio, Dataset, DatasetDict
from numpy.typing import NDArray
from scipy import stats
from scipy.io import wavfile
from sklearn import metrics as sklearn_metrics

from autopeft.tasks import (
    AudioClassification,
    ImageClassification,
    MultiLabelClassification,
    PreferenceOptimization,
    Regression,
    Seq2Seq,
    SpeechRecognition,
    TextClassification,
    TokenClassification,
)
from autopeft.tasks.dataset_task import DatasetTask
from tests.learnable import learnable_rows

Row = tuple[NDArray[np.float64], Any]
"""The logits of a row, and its label."""


@dataclass(frozen=True)
class TaskCase:
    """A task, and what it has to measure.

    Attributes:
        make: Makes the task, of its class, with 48 training rows.
        reference: Its loss and metrics by name, of rows.
        architectures: Of models that it is for.
    """

    make: Callable[[], DatasetTask]
    reference: Callable[[Sequence[Row]], Mapping[str, float]]
    architectures: tuple[str, ...] = ("bert", "llama")


def splits_of(rows: Callable[[int, int], Mapping[str, Sequence[Any]]]) -> DatasetDict:
    """Return three splits of rows, which are made of a count and a seed."""
    sizes = {"train": 48, "validation": 30, "test": 30}
    return DatasetDict(
        {name: Dataset.from_dict(rows(size, seed)) for seed, (name, size) in enumerate(sizes.items())}
    )


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max()
    log: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return log


def _classes(rows: Sequence[Row]) -> dict[str, float]:
    predicted, labels = [logits.argmax() for logits, _ in rows], [label for _, label in rows]
    return {
        "loss": float(np.mean([-_log_softmax(logits)[label] for logits, label in rows])),
        "accuracy": sklearn_metrics.accuracy_score(labels, predicted),
        "f1": sklearn_metrics.f1_score(labels, predicted, average="macro"),
        "matthews": sklearn_metrics.matthews_corrcoef(labels, predicted),
    }


def scored_rows(count: int, seed: int) -> dict[str, list[Any]]:
    """Return texts whose number is the share of words below w40, less a half."""
    draw = random.Random(seed)
    rows: dict[str, list[Any]] = {"text": [], "other": [], "label": []}
    for _ in range(count):
        words, low = [draw.randrange(3, 80) for _ in range(7)], draw.random()
        words = [word % 40 + 3 if draw.random() < low else word % 40 + 43 for word in words]
        rows["text"].append(" ".join(f"w{word}" for word in words[:4]))
        rows["other"].append(" ".join(f"w{word}" for word in words[4:]))
        rows["label"].append(sum(word < 43 for word in words) / 7 - 0.5)
    return rows


def _numbers(rows: Sequence[Row]) -> dict[str, float]:
    predicted, labels = np.array([logits[0] for logits, _ in rows]), np.array([label for _, label in rows])
    return {
        "loss": np.mean((predicted - labels) ** 2),
        "pearson": stats.pearsonr(predicted, labels).statistic,
        "spearman": stats.spearmanr(predicted, labels).statistic,
        "rmse": np.sqrt(np.mean((predicted - labels) ** 2)),
    }


def tagged_rows(count: int, seed: int) -> dict[str, list[Any]]:
    """Return texts with the label of each decade of words that they hold."""
    draw = random.Random(seed)
    decades = [draw.sample(range(4), draw.randint(0, 2)) for _ in range(count)]
    words = [[*(draw.randrange(10) + 10 * decade + 3 for decade in own), 90] for own in decades]
    texts = [" ".join(f"w{word}" for word in 2 * row) for row in words]
    return {"text": texts, "label": [[f"d{decade}" for decade in own] for own in decades]}


def _label_sets(rows: Sequence[Row]) -> dict[str, float]:
    logits, labels = (np.array(values) for values in zip(*rows, strict=True))
    predicted = logits > 0
    signed = np.where(labels == 1, logits, -logits)
    return {
        "loss": np.mean(np.log1p(np.exp(-signed))),
        "f1_micro": sklearn_metrics.f1_score(labels, predicted, average="micro"),
        "f1_macro": sklearn_metrics.f1_score(labels, predicted, average="macro"),
        "exact_match": np.mean(
            [(left == right).all() for left, right in zip(labels, predicted, strict=True)]
        ),
        "mean_average_precision": sklearn_metrics.average_precision_score(labels, logits, average="macro"),
    }


def spelt_rows(count: int, seed: int) -> dict[str, list[Any]]:
    """Return words of which those below w40 are places, of one or two words, and those below w60 people."""
    draw = random.Random(seed)
    rows: dict[str, list[Any]] = {"tokens": [], "labels": []}
    for _ in range(count):
        words = [f"w{draw.randrange(3, 100)}" for _ in range(draw.randint(3, 8))]
        kinds = [next((kind for most, kind in _KINDS if int(word[1:]) < most), "O") for word in words]
        before = ["O", *kinds[:-1]]
        labels = [
            kind if kind == "O" else f"{'I' if kind == earlier else 'B'}-{kind}"
            for kind, earlier in zip(kinds, before, strict=True)
        ]
        rows["tokens"].append(words)
        rows["labels"].append(labels)
    return rows


_KINDS = ((40, "LOC"), (60, "PER"))
TAGS = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Return first word, last word and kind of each entity, word by word."""
    found, start = set(), 0
    for place, tag in enumerate([*tags, "O"]):
        before = tags[place - 1] if place else "O"
        is_new = tag[0] in "BS" or before[0] in "ESO" or before[2:] != tag[2:]
        if before != "O" and (is_new or tag == "O"):
            found.add((start, place - 1, before[2:]))
        if tag != "O" and is_new:
            start = place
    return found


def entity_f1(predicted: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> float:
    """Return the F1 of entities over rows."""
    pairs = [(entities(left), entities(right)) for left, right in zip(predicted, labels, strict=True)]
    total = sum(len(left) + len(right) for left, right in pairs)
    return 2 * sum(len(left & right) for left, right in pairs) / total if total else 0.0


def _words(rows: Sequence[Row]) -> dict[str, float]:
    kept = [(logits[labels != -100], labels[labels != -100]) for logits, labels in rows]
    words = [word for logits, labels in kept for word in zip(logits, labels, strict=True)]
    classes = _classes(words)
    predicted = [[TAGS[word] for word in logits.argmax(1)] for logits, _ in kept]
    f1 = entity_f1(predicted, [[TAGS[word] for word in labels] for _, labels in kept])
    return {"loss": classes["loss"], "accuracy": classes["accuracy"], "f1": f1}


def answered_rows(count: int, seed: int) -> dict[str, list[Any]]:
    """Return sources, and as targets one of two texts, by the sources' first word."""
    draw = random.Random(seed)
    sources = [[draw.randrange(3, 90) for _ in range(draw.randint(3, 8))] for _ in range(count)]
    return {
        "source": [" ".join(f"w{word}" for word in words) for words in sources],
        "target": ["w5 w6 w7" if words[0] < 45 else "w8 w9" for words in sources],
    }


def compared_rows(count: int, seed: int) -> dict[str, list[Any]]:
    """Return prompts with two replies, of which the chosen one has words below w45."""
    draw = random.Random(seed)

    def text(lowest: int, highest: int) -> str:
        return " ".join(f"w{draw.randint(lowest, highest)}" for _ in range(draw.randint(2, 6)))

    return {
        "prompt": [f"{text(0, 89)} " for _ in range(count)],
        "chosen": [text(0, 44) for _ in range(count)],
        "rejected": [text(45, 89) for _ in range(count)],
    }


def drawn_rows(count: int, seed: int) -> dict[str, list[Any]]:
    """Return images of 20 pixels a side in noise, more of it red, green or blue."""
    draw = np.random.default_rng(seed)
    labels = [row % 3 for row in range(count)]
    pixels = draw.integers(0, 160, (count, 20, 20, 3), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[..., label] += 90
    names = [("red", "green", "blue")[label] for label in labels]
    return {"image": [PIL.Image.fromarray(image) for image in pixels], "label": names}


def _spoken(notes: Sequence[Sequence[int]], seed: int) -> list[dict[str, bytes]]:
    """Return WAV files in which notes of 0.15 seconds each, of some hertz, follow each other in noise."""
    draw = np.random.default_rng(seed)
    files = []
    for row in notes:
        phases = [2 * np.pi * (note * np.arange(2400) / 16_000 + draw.random()) for note in row]
        wave = np.concatenate([np.sin(phase) for phase in phases]) + 0.1 * draw.normal(size=2400 * len(row))
        file = io.BytesIO()
        wavfile.write(file, 16_000, (8_000 * wave).astype(np.int16))
        files.append({"bytes": file.getvalue()})
    return files


def sung_rows(count: int, seed: int) -> dict[str, list[Any]]:
    """Return recordings of one low, middle or high note, of different lengths."""
    labels = [row % 3 for row in range(count)]
    notes = [[(300, 1000, 3000)[label]] * (2 + row // 3 % 3) for row, label in enumerate(labels)]
    return {"audio": _spoken(notes, seed), "label": [("low", "middle", "high")[label] for label in labels]}


def dictated_rows(count: int, seed: int) -> dict[str, list[Any]]:
    """Return recordings of notes, and a word for each of them."""
    draw = random.Random(seed)
    rows = [[draw.randrange(2) for _ in range(draw.randint(2, 4))] for _ in range(count)]
    notes = [[(300, 2000)[note] for note in row] for row in rows]
    return {"audio": _spoken(notes, seed), "text": [" ".join(f"w{note}" for note in row) for row in rows]}


def heard(dataset: DatasetDict) -> DatasetDict:
    """Return splits whose column "audio" is of the type `datasets.Audio`."""
    return dataset.cast_column("audio", Audio(decode=False))


def _tokens(rows: Sequence[Row]) -> dict[str, float]:
    kept = ((logits[labels != -100], labels[labels != -100]) for logits, labels in rows)
    losses = [
        -_log_softmax(word)[label]
        for logits, labels in kept
        for word, label in zip(logits, labels, strict=True)
    ]
    return {"loss": np.mean(losses), "perplexity": np.exp(np.mean(losses))}


def _undecided(rows: Sequence[Row]) -> dict[str, float]:
    """Return what a model scores that is the reference itself."""
    return {"loss": np.log(2), "accuracy": 0.5}


TASK_CASES: Mapping[str, TaskCase] = MappingProxyType(
    {
        "TextClassification": TaskCase(lambda: TextClassification(splits_of(learnable_rows)), _classes),
        "MultiLabelClassification": TaskCase(
            lambda: MultiLabelClassification(splits_of(tagged_rows)), _label_sets
        ),
        "TokenClassification": TaskCase(lambda: TokenClassification(splits_of(spelt_rows)), _words),
        "Regression": TaskCase(lambda: Regression(splits_of(scored_rows), text=("text", "other")), _numbers),
        "ImageClassification": TaskCase(
            lambda: ImageClassification(splits_of(drawn_rows)), _classes, ("vit", "dinov2")
        ),
        "AudioClassification": TaskCase(
            lambda: AudioClassification(heard(splits_of(sung_rows))),
            _classes,
            ("wav2vec2", "whisper", "audio-spectrogram-transformer"),
        ),
        "SpeechRecognition": TaskCase(
            lambda: SpeechRecognition(heard(splits_of(dictated_rows))), _tokens, ("whisper",)
        ),
        "PreferenceOptimization": TaskCase(
            lambda: PreferenceOptimization(splits_of(compared_rows), beta=1.0), _undecided, ("llama", "gpt2")
        ),
        "Seq2Seq": TaskCase(lambda: Seq2Seq(splits_of(answered_rows)), _tokens, ("t5", "bart")),
    }
)
