"""A task that is a loss alone, for tests that bring batches of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset
from torch import Tensor, nn

from autopeft.tasks import TextClassification


class LossTask(TextClassification):
    """Labels (rows,) under "labels", with a loss of one's own; there are no data.

    Args:
        loss: Maps logits (rows, labels) and labels (rows,) to a scalar.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(Dataset.from_dict({}))
        object.__setattr__(self, "_of_logits", loss)

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        found: Tensor = vars(self)["_of_logits"](output.logits.float(), batch["labels"])
        return found


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(1), labels)  # of a language model, too


CROSS_ENTROPY = LossTask(_cross_entropy)
