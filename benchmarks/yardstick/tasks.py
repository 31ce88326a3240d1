"""The real tasks that fronts are compared on: half of them for tuning, the other half held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assets.prepare import prepare
from autopeft import Search
from autopeft.evaluation.evaluator import Evaluator
from autopeft.models.backbone import Backbone
from autopeft.yaml_config import load_config

_CONFIGS = Path(__file__).parents[2] / "configs"
_FORMATS = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class FrontTask:
    """A backbone, data and training, as a file of `configs/` has them.

    Attributes:
        config: The file.
        model: Name of the backbone in `assets.prepare`.
        data: Name of the data set there.
        file: Its file, where it has several.
        changes: Settings that differ from the file's, as in "training.epochs=2".
        is_held_out: Whether nothing may be tuned on it.
    """

    config: str
    model: str
    data: str
    file: str = "*"
    changes: Sequence[str] = ()
    is_held_out: bool = False

    def changed(self, changes: Sequence[str]) -> FrontTask:
        """Return the task with further changes."""
        return replace(self, changes=(*self.changes, *changes))

    def search(self, **options: Any) -> Search:
        """Return the default search of the task, or with other arguments."""
        (file,) = (path for path in prepare(self.data).glob(self.file) if path.suffix in _FORMATS)
        paths = (f"backbone={prepare(self.model)}", f"task.dataset={file}")
        made = load_config(_CONFIGS / self.config, [*paths, *self.changes]).search
        return Search(**made.arguments() | {"tracking": None} | options)

    def evaluator(self, rungs: Sequence[float] = ()) -> Evaluator:
        """Return what trains as people do, through the whole model, and pauses at rungs if told."""
        search = self.search()
        training, task = replace(search.training, frozen_blocks="train"), search.task
        device = training.resolved_device()
        backbone = Backbone.load(
            search.backbone, task.head, search.tokenizer, options=search.loading, device=device
        )
        backbone.train_head(search.head)
        return Evaluator(backbone, task, training, search.objectives, rungs=rungs)


_NO_GENERATION = ("task.generate=[]", "objectives=[loss, trainable_parameters, peak_memory]")
TASKS: Mapping[str, FrontTask] = {
    "questions": FrontTask(config="demo.yaml", model="minilm", data="questions"),
    "spam": FrontTask(
        config="demo.yaml",
        model="minilm",
        data="spam",
        changes=("objectives=[matthews, trainable_parameters, peak_memory]",),
    ),
    "tags": FrontTask(config="parts_of_speech.yaml", model="minilm", data="brown"),
    "dialogue": FrontTask(
        config="dialogue.yaml", model="smollm2", data="dialogue", changes=("task.train_examples=512",)
    ),
    "evidence": FrontTask(
        config="evidence.yaml", model="minilm", data="claims", file="related.csv", is_held_out=True
    ),
    "images": FrontTask(config="images.yaml", model="dinov2", data="cifar10", is_held_out=True),
    "commands": FrontTask(
        config="speech_commands.yaml",
        model="whisper-2s",
        data="commands",
        changes=("task.train_examples=512",),
        is_held_out=True,
    ),
    "pronunciations": FrontTask(
        config="pronunciations.yaml",
        model="speller",
        data="pronunciations",
        changes=_NO_GENERATION,
        is_held_out=True,
    ),
}
"""By name: classification, tags, language modelling; pairs, images, audio, sequence to sequence, on MiniLM,
SmolLM2, DINOv2, Whisper's encoder and a T5; each has 512 training rows or more."""
