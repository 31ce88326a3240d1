"""The real data sets that benchmarks compare on, small enough for two cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from assets.prepare import prepare
from autopeft.tasks import TextClassification


@dataclass(frozen=True, kw_only=True)
class BenchmarkData:
    """A data set and the metric it is judged by.

    Attributes:
        asset: Its name in `assets.prepare`.
        metric: "accuracy", or "matthews" where one class is rare.
    """

    asset: str
    metric: str = "accuracy"

    def task(self, *, train: int, validation: int, test: int) -> TextClassification:
        """Return the task with so many examples in each split."""
        return TextClassification(
            dataset=str(prepare(self.asset) / f"{self.asset}.csv"),
            train_examples=train,
            validation_examples=validation,
            test_examples=test,
        )


DATASETS: Mapping[str, BenchmarkData] = {
    "questions": BenchmarkData(asset="questions"),
    "movies": BenchmarkData(asset="movies"),
    "spam": BenchmarkData(asset="spam", metric="matthews"),
    "snippets": BenchmarkData(asset="snippets"),
}
"""Question type (6 classes), movie sentiment (2, balanced), SMS spam (2, 1 in 8 is spam), product
reviews' sentences (2)."""
