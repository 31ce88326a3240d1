"""Were the scores right? How well each score ranked the trials of a search before they were trained."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from plotly import graph_objects as go
from rich.table import Table
from scipy import stats

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective
from autopeft.core.tables import Tabular, titled_table
from autopeft.reporting.formats import html_page
from autopeft.search_spaces.score_allocation import site_values
from autopeft.sensitivity import SiteScores
from autopeft.sensitivity.computation import random_scores, uniform_scores

PARAMETERS = "trainable_parameters"
CONTROLS = ("uniform", "random", PARAMETERS)
FEWEST_TRIALS = 10
_TITLE = "Were the scores right? Rank correlation of score-implied with trained"
_AXIS = "Spearman's rank correlation given the number of parameters, 95 % interval"
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ScoreCheck(Tabular):
    """How every score's ranking of the trials agrees with the trained one.

    Attributes:
        metric: The metric that was trained for.
        trials: Number of trials compared.
        frame: A row a score, the best first by `partial`: its name (`score`); whether it is what the scores
            have to beat (`control`: uniform, random, the number of parameters); `spearman`, Spearman's rank
            correlation, with the 95 % interval of Bonett and Wright (Psychometrika 2000); `partial`, the same
            given the number of trainable parameters: what the score knows beyond it; `kendall`, Kendall's τ-b
            with the interval of Fieller, Hartley and Pearson (Biometrika 1957). Intervals end in `_low` and
            `_high`.
    """

    metric: str
    trials: int
    frame: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """Return a row a score; see `frame`."""
        return self.frame.copy()

    def table(self) -> Table:
        """Return a rich table."""
        headings = ("score", "Spearman", "given parameters", "Kendall")
        table = titled_table(self._title, headings, words=["score"])
        for row in self.frame.to_dict("records"):
            intervals = (
                f"{row[name]:+.2f} ({row[f'{name}_low']:+.2f} to {row[f'{name}_high']:+.2f})"
                for name in ("spearman", "partial", "kendall")
            )
            table.add_row(_label(row["score"]), *intervals)
        table.caption = (
            "With 95 % intervals. Plain correlations owe much to the number of parameters: what a score adds "
            "to it stands under 'given parameters'."
        )
        return table

    def plot(self) -> go.Figure:
        """Return a plotly figure: every score's rank correlation given the number of parameters."""
        frame = self.frame[::-1]  # plotly counts upwards
        bars = go.Scatter(
            x=frame["partial"],
            y=frame["score"].map(_label).map(html.escape),
            error_x={
                "array": frame["partial_high"] - frame["partial"],
                "arrayminus": frame["partial"] - frame["partial_low"],
            },
            mode="markers",
            marker={"size": 11, "color": frame["control"].map({False: "#0072B2", True: "#7F7F7F"})},
        )
        figure = go.Figure(bars)
        figure.add_vline(x=0, line_color="#444444")
        figure.update_xaxes(title=_AXIS, range=[-1, 1])
        height = 200 + 32 * len(frame)
        figure.update_layout(
            title=html.escape(self._title), template="plotly_white", width=900, height=height
        )
        return figure

    @property
    def _title(self) -> str:
        return f"{_TITLE} {self.metric}, {self.trials} trials"

    def save(self, folder: str | Path) -> tuple[Path, ...]:
        """Write the chart (HTML, self-contained) and the table into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        page, table = folder / "score_check.html", folder / "score_check.csv"
        page.write_text(html_page(self.plot(), title=_TITLE), encoding="utf-8")
        self.frame.to_csv(table, index=False)
        return page, table


def _label(score: str) -> str:
    return f"{score} (control)" if score in CONTROLS else score


def implied_quality(configuration: Configuration, scores: SiteScores) -> float:
    """Return Σ s_i · log2(1 + r_i) over a configuration's adapters: what a score expects of it.

    r_i is the adapter's size (1 for a method without one), whose worth falls with every doubling; s_i is
    the site's score (see `site_values`).
    """
    values = site_values(scores, configuration.adapters)
    return sum(
        values[site] * math.log2(1 + (adapter.size or 1))
        for site, several in configuration.adapters.items()
        for adapter in several
    )


def check_scores(
    records: Sequence[TrialRecord], scores: Mapping[str, SiteScores], metric: Objective
) -> ScoreCheck:
    """Compare what scores imply of the trials with what training gave."""
    usable = [
        record.evaluation
        for record in records
        if record.evaluation.status == "complete" and record.duplicate_of is record.derived_from is None
    ]
    if len(usable) < FEWEST_TRIALS:
        raise ValueError(f"Scores are checked on {FEWEST_TRIALS} trials or more, got {len(usable)}.")
    trained = [metric.sign * evaluation.values[metric.name] for evaluation in usable]
    parameters = [evaluation.values[PARAMETERS] for evaluation in usable]
    sites = sorted({site for each in scores.values() for site in each.values})
    controls = {"random": random_scores(sites, seed=0), "uniform": uniform_scores(sites)} if sites else {}
    implied = {
        name: [implied_quality(evaluation.configuration, each) for evaluation in usable]
        for name, each in {**controls, **scores}.items()
    }
    implied[PARAMETERS] = parameters
    rows = [_agreement(name, values, trained, parameters) for name, values in implied.items()]
    frame = pd.DataFrame(rows).sort_values("partial", ascending=False, kind="stable", ignore_index=True)
    return ScoreCheck(metric=metric.name, trials=len(usable), frame=frame)


def _agreement(
    name: str, implied: Sequence[float], trained: Sequence[float], parameters: Sequence[float]
) -> dict[str, object]:
    """Return a row of a check's frame."""
    count = len(trained)
    with np.errstate(invalid="ignore"):  # what is constant correlates with nothing
        ranked = np.corrcoef(stats.rankdata([implied, trained, parameters], axis=1))
    spearman, first, second = np.nan_to_num(ranked[[0, 0, 1], [1, 2, 2]]).tolist()
    left = (1 - first**2) * (1 - second**2)
    partial = 0.0 if left < _ROUNDING else (spearman - first * second) / math.sqrt(left)
    kendall = float(np.nan_to_num(stats.kendalltau(implied, trained).statistic))
    return {
        "score": name,
        "control": name in CONTROLS,
        **_estimate("spearman", spearman, (1 + spearman**2 / 2) / (count - 3)),
        **_estimate("partial", partial, (1 + partial**2 / 2) / (count - 4)),
        **_estimate("kendall", kendall, 0.437 / (count - 4)),
    }


def _estimate(name: str, correlation: float, variance: float) -> dict[str, float]:
    """Return a correlation and its 95 % interval by Fisher's transformation, which has that variance."""
    middle = math.atanh(min(max(correlation, -0.9999999), 0.9999999))
    low, high = stats.norm.interval(0.95, loc=middle, scale=math.sqrt(variance))
    return {name: correlation, f"{name}_low": math.tanh(low), f"{name}_high": math.tanh(high)}
