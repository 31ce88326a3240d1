"""A small task that tiny random models learn: the words of a text come mostly from its class's own."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from autopeft import Search
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import resolve_constraints, resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.models.backbone import Backbone
from autopeft.reporting.front import ParetoFront
from autopeft.search_spaces import Uniform
from autopeft.tasks import TextClassification
from autopeft.training.settings import Training
from tests.tiny_models import LABELS, tiny_backbone, tiny_classifier, tiny_tokenizer

OBJECTIVES = ("accuracy", "trainable_parameters", "peak_memory")
TRAINING = Training(epochs=1, batch_size=8, device="cpu", precision="32-true")
_WORDS_A_CLASS = 20


def learnable_rows(count: int, seed: int = 0) -> dict[str, list[Any]]:
    """Return texts of 4 to 8 words, and their classes in turn."""
    draw = random.Random(seed)
    rows: dict[str, list[Any]] = {"text": [], "label": []}
    for row in range(count):
        label = row % LABELS
        words = [
            draw.randrange(_WORDS_A_CLASS) + label * _WORDS_A_CLASS
            if draw.random() < 0.8
            else LABELS * _WORDS_A_CLASS + draw.randrange(_WORDS_A_CLASS)
            for _ in range(draw.randint(4, 8))
        ]
        rows["text"].append(" ".join(f"w{word}" for word in words))
        rows["label"].append("abc"[label])
    return rows


def learnable_task(*, rows: int = 48, **settings: Any) -> TextClassification:
    """Return the task with three splits in memory."""
    sizes = {"train": rows, "validation": 30, "test": 30}
    splits = {
        name: Dataset.from_dict(learnable_rows(size, seed)) for seed, (name, size) in enumerate(sizes.items())
    }
    return TextClassification(dataset=DatasetDict(splits), **settings)


def learner(**options: Any) -> Backbone:
    """Return a tiny BERT whose head is new."""
    return tiny_backbone("bert", new_head=True, **options)


def tiny_evaluator(
    backbone: Backbone | None = None,
    *,
    objectives: Iterable[str] = OBJECTIVES,
    constraints: dict[str, float | str] | None = None,
    training: Training = TRAINING,
    rungs: Sequence[float] = (),
    seed: int = 0,
    rows: int = 48,
) -> Evaluator:
    """Return an evaluator of a tiny BERT on the learnable task."""
    task = learnable_task(rows=rows)
    return Evaluator(
        learner() if backbone is None else backbone,
        task,
        training,
        resolve_objectives(objectives, task.metrics),
        resolve_constraints(constraints or {}, task.metrics),
        rungs=rungs,
        seed=seed,
    )


def tiny_search(folder: Path, **settings: Any) -> Search:
    """Return a search over LoRA ranks of a tiny BERT, without tracking."""
    defaults: dict[str, Any] = {
        "backbone": learner(),
        "task": learnable_task(),
        "space": Uniform(sizes={"rank": (1, 8)}, learning_rate=(3e-4, 1e-2)),
        "objectives": ("accuracy", "trainable_parameters"),  # counting memory takes longer than a training
        "training": TRAINING,
        "halving": None,
        "sampler": "tpe",
        "seeds": 1,
        "tracking": None,
        "folder": folder,
        "name": "tiny",
    }
    return Search(**(defaults | settings))


def run(search: Search, trials: int) -> ParetoFront:
    """Search without a progress bar."""
    return search.run(trials=trials, progress=False)


def save_tiny_model(folder: Path) -> Path:
    """Write a tiny BERT with its tokenizer, as a user would have it on disk."""
    tiny_classifier("bert").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_learnable_csv(path: Path, rows: int = 90) -> Path:
    """Write the task as one CSV file."""
    data = learnable_rows(rows)
    lines = [f"{text},{label}" for text, label in zip(data["text"], data["label"], strict=True)]
    path.write_text("\n".join(["text,label", *lines, ""]))
    return path


def outcomes(records: Iterable[TrialRecord]) -> list[tuple[Any, ...]]:
    """Return all of trials that the seed decides; times are left out."""
    return [
        (
            record.number,
            record.baseline,
            record.duplicate_of,
            record.evaluation.status,
            record.evaluation.warm_start,
            record.evaluation.configuration.to_dict(),
            {
                name: value
                for name, value in record.evaluation.values.items()
                if "second" not in name and "latency" not in name
            },
        )
        for record in records
    ]
