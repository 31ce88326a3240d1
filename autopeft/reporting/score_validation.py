"""Were the scores right? How well each score ranked the trials of a search before they were trained."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.figure import Figure as StaticFigure
from plotly import graph_objects as go
from rich.console import Console
from rich.table import Table
from scipy import stats

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective
from autopeft.reporting.html_page import save_html_page
from autopeft.search_spaces.score_allocation import site_values
from autopeft.sensitivity import SiteScores
from autopeft.sensitivity.control_scores import random_scores, uniform_scores

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PARAMETERS = "trainable_parameters"
CONTROLS = ("uniform", "random", PARAMETERS)
FEWEST_TRIALS = 10
_QUANTILE = 1.959963984540054  # of the normal distribution, for 95 %
_TITLE = "Were the scores right? Rank correlation of score-implied with trained"
_AXIS = "Spearman's rank correlation given the number of parameters, 95 % interval"
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """How one score's ranking of the trials agrees with the trained one.

    Attributes:
        score: Name of the score; "trainable_parameters" is the number of parameters itself.
        control: Whether it is what the scores have to beat.
        spearman: Spearman's rank correlation.
        spearman_low: Lower end of its 95 % interval (Bonett and Wright, Psychometrika 2000).
        spearman_high: Upper end.
        partial: Spearman's rank correlation given the number of trainable parameters: what the score knows
            beyond it. 0 for the number itself.
        partial_low: Lower end of its 95 % interval.
        partial_high: Upper end.
        kendall: Kendall's τ-b.
        kendall_low: Lower end of its 95 % interval (Fieller, Hartley and Pearson, Biometrika 1957).
        kendall_high: Upper end.
    """

    score: str
    control: bool
    spearman: float
    spearman_low: float
    spearman_high: float
    partial: float
    partial_low: float
    partial_high: float
    kendall: float
    kendall_low: float
    kendall_high: float

    @property
    def label(self) -> str:
        """The score's name, marked where it is a control."""
        return f"{self.score} (control)" if self.control else self.score


@dataclass(frozen=True, kw_only=True)
class ScoreCheck:
    """The rank correlation of every score with the trained metric, best first.

    Attributes:
        metric: The metric that was trained for.
        trials: Number of trials compared.
        correlations: One entry a score; controls (uniform, random, the number of parameters) are marked.
    """

    metric: str
    trials: int
    correlations: tuple[Correlation, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return a row a score."""
        return pd.DataFrame([asdict(correlation) for correlation in self.correlations])

    def table(self) -> Table:
        """Return a rich table."""
        table = Table(title=f"{_TITLE} {self.metric}, {self.trials} trials", title_justify="left")
        for heading in ("score", "Spearman", "given parameters", "Kendall"):
            table.add_column(heading, justify="left" if heading == "score" else "right")
        for correlation in self.correlations:
            table.add_row(
                correlation.label,
                _cell(correlation.spearman, correlation.spearman_low, correlation.spearman_high),
                _cell(correlation.partial, correlation.partial_low, correlation.partial_high),
                _cell(correlation.kendall, correlation.kendall_low, correlation.kendall_high),
            )
        table.caption = (
            "With 95 % intervals. Plain correlations owe much to the number of parameters: what a score adds "
            "to it stands under 'given parameters'."
        )
        return table

    def plot(self) -> Figure:
        """Return a plotly figure: every score's rank correlation given the number of parameters."""
        figure = go.Figure()
        for control, colour in ((False, "#0072B2"), (True, "#7F7F7F")):
            chosen = [each for each in self.correlations if each.control == control]
            figure.add_trace(
                go.Scatter(
                    x=[each.partial for each in chosen],
                    y=[each.score for each in chosen],
                    error_x={
                        "type": "data",
                        "symmetric": False,
                        "array": [each.partial_high - each.partial for each in chosen],
                        "arrayminus": [each.partial - each.partial_low for each in chosen],
                    },
                    mode="markers",
                    marker={"size": 11, "color": colour},
                    name="control" if control else "score",
                )
            )
        figure.add_vline(x=0, line_color="#444444")
        order = [each.score for each in reversed(self.correlations)]
        figure.update_yaxes(categoryorder="array", categoryarray=order)
        figure.update_xaxes(title=_AXIS, range=[-1, 1])
        height = 200 + 32 * len(order)
        title = f"{_TITLE} {self.metric}, {self.trials} trials"
        figure.update_layout(title=title, template="plotly_white", width=900, height=height)
        return figure

    def image(self) -> bytes:
        """Return the figure as PNG."""
        figure = StaticFigure(figsize=(9, 1.4 + 0.32 * len(self.correlations)), layout="constrained")
        axes = figure.subplots()
        for place, each in enumerate(reversed(self.correlations)):
            axes.errorbar(
                each.partial,
                place,
                xerr=[[each.partial - each.partial_low], [each.partial_high - each.partial]],
                fmt="o",
                capsize=3,
                color="#7F7F7F" if each.control else "#0072B2",
            )
        axes.set_yticks(range(len(self.correlations)), [each.label for each in self.correlations[::-1]])
        axes.axvline(0, color="#444444", linewidth=1)
        axes.set_xlim(-1, 1)
        axes.set_xlabel(_AXIS)
        axes.set_title(f"{_TITLE} {self.metric}, {self.trials} trials", fontsize=10)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()

    def save(self, folder: Path) -> tuple[Path, ...]:
        """Write the chart (HTML and PNG) and the table into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"score_check.{ending}" for ending in ("html", "png", "csv")]
        save_html_page(self.plot(), paths[0], title=_TITLE)
        paths[1].write_bytes(self.image())
        self.to_frame().to_csv(paths[2], index=False)
        return tuple(paths)

    def __repr__(self) -> str:
        console = Console(width=110, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()


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
    """Compare what scores imply of the trials with what training gave.

    Args:
        records: Trials of a search; those that completed and are no duplicates are compared.
        scores: Scores by name. Controls are added: the number of trainable parameters, a random and a
            uniform score of the same sites.
        metric: The metric that was trained for.

    Raises:
        ValueError: Fewer than `FEWEST_TRIALS` trials can be compared.
    """
    usable = [
        record.evaluation
        for record in records
        if record.evaluation.status == "complete" and record.duplicate_of is None
    ]
    if len(usable) < FEWEST_TRIALS:
        raise ValueError(f"Scores are checked on {FEWEST_TRIALS} trials or more, got {len(usable)}.")
    trained = [evaluation.values[metric.name] for evaluation in usable]
    parameters = [evaluation.values[PARAMETERS] for evaluation in usable]
    sites = sorted({site for each in scores.values() for site in each.values})
    controls = {"random": random_scores(sites, seed=0), "uniform": uniform_scores(sites)} if sites else {}
    implied = {
        name: [implied_quality(evaluation.configuration, each) for evaluation in usable]
        for name, each in {**controls, **scores}.items()
    }
    implied[PARAMETERS] = parameters
    found = [_correlation(name, values, trained, parameters) for name, values in implied.items()]
    return ScoreCheck(
        metric=metric.name,
        trials=len(usable),
        correlations=tuple(sorted(found, key=lambda correlation: -correlation.spearman)),
    )


def _correlation(
    name: str, implied: Sequence[float], trained: Sequence[float], parameters: Sequence[float]
) -> Correlation:
    count = len(trained)
    constant = len(set(implied)) == 1 or len(set(trained)) == 1
    spearman = _spearman(implied, trained)
    partial = _partial(spearman, _spearman(implied, parameters), _spearman(trained, parameters))
    kendall = 0.0 if constant else float(stats.kendalltau(implied, trained).statistic)
    spearman_low, spearman_high = _interval(spearman, math.sqrt((1 + spearman**2 / 2) / (count - 3)))
    partial_low, partial_high = _interval(partial, math.sqrt((1 + partial**2 / 2) / (count - 4)))
    kendall_low, kendall_high = _interval(kendall, math.sqrt(0.437 / (count - 4)))
    return Correlation(
        score=name,
        control=name in CONTROLS,
        spearman=spearman,
        spearman_low=spearman_low,
        spearman_high=spearman_high,
        partial=partial,
        partial_low=partial_low,
        partial_high=partial_high,
        kendall=kendall,
        kendall_low=kendall_low,
        kendall_high=kendall_high,
    )


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 0 where one of them is constant."""
    constant = len(set(first)) == 1 or len(set(second)) == 1
    return 0.0 if constant else float(stats.spearmanr(first, second).statistic)


def _partial(both: float, first: float, second: float) -> float:
    """Return the partial correlation of two quantities, given a third.

    Args:
        both: Correlation of the two.
        first: Correlation of the first with the third.
        second: Correlation of the second with the third.
    """
    left = (1 - first**2) * (1 - second**2)
    return 0.0 if left < _ROUNDING else (both - first * second) / math.sqrt(left)


def _cell(value: float, low: float, high: float) -> str:
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def _interval(correlation: float, deviation: float) -> tuple[float, float]:
    """Return the 95 % interval by Fisher's transformation."""
    middle = math.atanh(min(max(correlation, -0.9999999), 0.9999999))
    return math.tanh(middle - _QUANTILE * deviation), math.tanh(middle + _QUANTILE * deviation)
