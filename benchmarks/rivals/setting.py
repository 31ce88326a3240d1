"""What all rivals have in common: data, space, training, and the log of what they tried."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from assets.prepare import prepare
from autopeft.core.configuration import Configuration
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.methods import count_parameters
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import PerLayer
from autopeft.tasks import TextClassification
from autopeft.training.settings import Training, TrainingPrecision
from benchmarks.datasets import DATASETS

TRAINING = Training(epochs=3, batch_size=16, validate_every=3, device="cpu")
EXAMPLES = {"train": 256, "validation": 300, "test": 500}
RATE = (5e-4, 1e-2)
RANKS = (1, 32)


def per_layer() -> PerLayer:
    """Return the space of every method but the AutoPEFT paper's: a LoRA rank, or none, at every site."""
    return PerLayer(methods=("lora",), sizes={"rank": RANKS}, learning_rate=RATE)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One candidate that was trained to the end.

    Attributes:
        configuration: As plain data.
        score: The metric on the validation split; None where the training failed.
        parameters: Trainable parameters.
        cpu_seconds: Processor time of the whole process when it was done, imports included.
        warm_start: Whether it was initialised from the largest LoRA.
    """

    configuration: dict[str, Any]
    score: float | None
    parameters: int
    cpu_seconds: float
    warm_start: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run: a data set, a seed, a number of candidates.

    Attributes:
        dataset: A name of `DATASETS`.
        seed: Seed of the search. A rival's trainings have it too, autopeft's have their own, made from it.
        trials: Candidates to begin.
    """

    dataset: str
    seed: int
    trials: int

    @property
    def metric(self) -> str:
        """The metric of the data set."""
        return DATASETS[self.dataset].metric

    @property
    def model(self) -> str:
        """Folder of the pretrained model."""
        return str(prepare("minilm"))

    @cached_property
    def task(self) -> TextClassification:
        """The data, the same rows in the same splits for all."""
        return DATASETS[self.dataset].task(**EXAMPLES)

    def load(self) -> Backbone:
        """Load the pretrained model."""
        return Backbone.load(self.model, self.task.head)

    def evaluator(self, backbone: Backbone, precision: TrainingPrecision = "32-true") -> Evaluator:
        """Return what trains a configuration as people do: through the whole model, in single precision.

        Args:
            backbone: What is trained.
            precision: Another one than people's.
        """
        objectives = resolve_objectives((self.metric, "trainable_parameters"), self.task.metrics)
        training = replace(TRAINING, frozen_blocks="train", precision=precision)
        return Evaluator(backbone, self.task, training, objectives, seed=self.seed)

    def entry(
        self,
        backbone: Backbone,
        configuration: Configuration,
        score: float | None,
        *,
        warm_start: bool = False,
    ) -> Entry:
        """Return the log's entry of a candidate that was done just now."""
        return Entry(
            configuration=configuration.to_dict(),
            score=score,
            parameters=count_parameters(backbone, configuration),
            cpu_seconds=time.process_time(),
            warm_start=warm_start,
        )
