"""Was the elastic adapter right? How well its scores ranked what was then trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from scipy import stats

FEWEST_TRIALS = 8


@dataclass(frozen=True, kw_only=True)
class ElasticCheck:
    """The rank correlation of an elastic adapter's scores with the trained metric.

    Attributes:
        metric: The metric that was trained for.
        trials: Number of trained sub-configurations compared.
        warm_start: Whether these began from the elastic adapter's weights. How it ranks trainings from random
            weights is then not known.
        spearman: Spearman's rank correlation with the elastic adapter's loss, the sign turned.
        spearman_parameters: That of the number of trainable parameters alone: what it has to beat.
        lowest: The correlation below which the elastic adapter proposes nothing.
    """

    metric: str
    trials: int
    warm_start: bool
    spearman: float
    spearman_parameters: float
    lowest: float

    @property
    def trusted(self) -> bool:
        """Whether it proposes; with few trials it is given the benefit of the doubt."""
        return self.trials < FEWEST_TRIALS or self.spearman >= self.lowest

    def describe(self) -> str:
        """Say in a line how good its ranking was."""
        if self.trials < FEWEST_TRIALS:
            return f"Elastic adapter: {self.trials} trials to compare it with, too few to tell."
        verdict = "" if self.trusted else f"; below {self.lowest:g} it proposes nothing"
        begun = " (from its weights)" if self.warm_start else ""
        return (
            f"Elastic adapter: its scores rank {self.trials} trained configurations{begun} by {self.metric} "
            f"with Spearman {self.spearman:+.2f} (number of parameters: {self.spearman_parameters:+.2f})"
            f"{verdict}."
        )

    def save(self, folder: Path) -> tuple[Path, ...]:
        """Write the figures into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "elastic_check.csv"
        pd.DataFrame([{**asdict(self), "trusted": self.trusted}]).to_csv(path, index=False)
        return (path,)


def check_elastic(
    metric: str,
    *,
    scores: Sequence[float],
    trained: Sequence[float],
    parameters: Sequence[float],
    warm_start: bool,
    lowest: float,
) -> ElasticCheck:
    """Compare scores (the larger the better) of configurations with what training gave."""
    return ElasticCheck(
        metric=metric,
        trials=len(trained),
        warm_start=warm_start,
        spearman=_spearman(scores, trained),
        spearman_parameters=_spearman(parameters, trained),
        lowest=lowest,
    )


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    found = float(stats.spearmanr(first, second).statistic)
    return found if math.isfinite(found) else 0.0
