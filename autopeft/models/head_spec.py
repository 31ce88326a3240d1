"""The head a task puts on a pretrained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from transformers import (
    AutoTokenizer,
    BaseImageProcessor,
    FeatureExtractionMixin,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

Processor = PreTrainedTokenizerBase | BaseImageProcessor | FeatureExtractionMixin | ProcessorMixin
"""What makes a model's inputs of data."""

HeadPart = Literal["whole", "last", "pretrained"]
"""What is trained beside adapters: the task's head, its last layer, or a language model's output layer."""


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What loading has to know to give a pretrained model a task's head.

    Attributes:
        auto_class: The transformers auto class that builds the model with its head.
        config: What the model's config is told: number and names of labels, for a classifier.
        is_trained: Whether the head is trained with the adapters. A pretrained one that is not stays frozen.
        processor_class: The auto class of the task's processor: `AutoTokenizer`, `AutoImageProcessor`,
            `AutoFeatureExtractor`, `AutoProcessor`, or None where the task needs none.
    """

    auto_class: Any
    config: Mapping[str, Any] = field(default_factory=dict)
    is_trained: bool = True
    processor_class: Any = AutoTokenizer

    @classmethod
    def of_labels(
        cls, auto_class: Any, labels: Sequence[str], *, processor_class: Any = AutoTokenizer, **config: Any
    ) -> Self:
        """Return the head of a classifier whose labels have these names, in the order of the logits.

        What else the model's config is told goes by name.
        """
        names = dict(enumerate(labels))
        label2id = {name: index for index, name in names.items()}
        config |= {"num_labels": len(names), "id2label": names, "label2id": label2id}
        return cls(auto_class=auto_class, config=config, processor_class=processor_class)

    @property
    def num_labels(self) -> int | None:
        """Number of labels; None where the task does not say."""
        return self.config.get("num_labels")

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the logits; empty where they have none."""
        return tuple(map(str, self.config.get("id2label", {}).values()))
