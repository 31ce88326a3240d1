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

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PARAMETERS = "trainable_parameters"
CONTROLS = ("uniform", "random", PARAMETERS)
FEWEST_TRIALS = 10
_QUANTILE = 1.959963984540054  # of the normal distribution, for 95 %
_TITLE = "Were the scores right? Rank correlation of score-implied with trained"


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """How one score's ranking of the trials agrees with the trained one.

    Attributes:
        score: Name of the score; "trainable_parameters" is the number of parameters itself.
        control: Whether it is what the scores have to beat.
        spearman: Spearman's rank correlation.
        spearman_low: Lower end of its 95 % interval (Bonett and Wright, Psychometrika 2000).
        spearman_high: Upper end.
        kendall: Kendall's τ-b.
        kendall_low: Lower end of its 95 % interval (Fieller, Hartley and Pearson, Biometrika 1957).
        kendall_high: Upper end.
    """

    score: str
    control: bool
    spearman: float
    spearman_low: float
    spearman_high: float
    kendall: float
    kendall_low: float
    kendall_high: float


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
        return pd.DataFrame([asdict(one) for one in self.correlations])

    def table(self) -> Table:
        """Return a rich table."""
        table = Table(title=f"{_TITLE} {self.metric}, {self.trials} trials", title_justify="left")
        for heading in ("score", "Spearman", "95 % interval", "Kendall", "95 % interval"):
            table.add_column(heading, justify="left" if heading == "score" else "right")
        for one in self.correlations:
            table.add_row(
                f"{one.score} (control)" if one.control else one.score,
                f"{one.spearman:+.2f}",
                f"{one.spearman_low:+.2f} to {one.spearman_high:+.2f}",
                f"{one.kendall:+.2f}",
                f"{one.kendall_low:+.2f} to {one.kendall_high:+.2f}",
            )
        return table

    def plot(self) -> Figure:
        """Return a plotly figure: Spearman's correlation of every score with its interval."""
        figure = go.Figure()
        for control, colour in ((False, "#0072B2"), (True, "#7F7F7F")):
            chosen = [one for one in self.correlations if one.control == control]
            figure.add_trace(
                go.Scatter(
                    x=[one.spearman for one in chosen],
                    y=[one.score for one in chosen],
                    error_x={
                        "type": "data",
                        "symmetric": False,
                        "array": [one.spearman_high - one.spearman for one in chosen],
                        "arrayminus": [one.spearman - one.spearman_low for one in chosen],
                    },
                    mode="markers",
                    marker={"size": 11, "color": colour},
                    name="control" if control else "score",
                )
            )
        figure.add_vline(x=0, line_color="#444444")
        order = [one.score for one in reversed(self.correlations)]
        figure.update_yaxes(categoryorder="array", categoryarray=order)
        figure.update_xaxes(title="Spearman's rank correlation, 95 % interval", range=[-1, 1])
        height = 200 + 32 * len(order)
        title = f"{_TITLE} {self.metric}, {self.trials} trials"
        figure.update_layout(title=title, template="plotly_white", width=900, height=height)
        return figure

    def image(self) -> bytes:
        """Return the figure as PNG."""
        figure = StaticFigure(figsize=(9, 1.4 + 0.32 * len(self.correlations)), layout="constrained")
        axes = figure.subplots()
        for place, one in enumerate(reversed(self.correlations)):
            axes.errorbar(
                one.spearman,
                place,
                xerr=[[one.spearman - one.spearman_low], [one.spearman_high - one.spearman]],
                fmt="o",
                capsize=3,
                color="#7F7F7F" if one.control else "#0072B2",
            )
        names = [f"{one.score} (control)" if one.control else one.score for one in self.correlations]
        axes.set_yticks(range(len(names)), names[::-1])
        axes.axvline(0, color="#444444", linewidth=1)
        axes.set_xlim(-1, 1)
        axes.set_xlabel("Spearman's rank correlation, 95 % interval")
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
        scores: Scores by name. The number of trainable parameters is compared as well.
        metric: The metric that was trained for.

    Raises:
        ValueError: Fewer than `FEWEST_TRIALS` trials can be compared.
    """
    usable = [
        one.evaluation for one in records if one.evaluation.status == "complete" and one.duplicate_of is None
    ]
    if len(usable) < FEWEST_TRIALS:
        raise ValueError(f"Scores are checked on {FEWEST_TRIALS} trials or more, got {len(usable)}.")
    trained = [one.values[metric.name] for one in usable]
    implied = {
        name: [implied_quality(one.configuration, score) for one in usable] for name, score in scores.items()
    }
    implied[PARAMETERS] = [one.values[PARAMETERS] for one in usable]
    found = [_correlation(name, values, trained) for name, values in implied.items()]
    return ScoreCheck(
        metric=metric.name,
        trials=len(usable),
        correlations=tuple(sorted(found, key=lambda one: -one.spearman)),
    )


def _correlation(name: str, implied: Sequence[float], trained: Sequence[float]) -> Correlation:
    count = len(trained)
    constant = len(set(implied)) == 1 or len(set(trained)) == 1
    spearman = 0.0 if constant else float(stats.spearmanr(implied, trained).statistic)
    kendall = 0.0 if constant else float(stats.kendalltau(implied, trained).statistic)
    spearman_low, spearman_high = _interval(spearman, math.sqrt((1 + spearman**2 / 2) / (count - 3)))
    kendall_low, kendall_high = _interval(kendall, math.sqrt(0.437 / (count - 4)))
    return Correlation(
        score=name,
        control=name in CONTROLS,
        spearman=spearman,
        spearman_low=spearman_low,
        spearman_high=spearman_high,
        kendall=kendall,
        kendall_low=kendall_low,
        kendall_high=kendall_high,
    )


def _interval(correlation: float, deviation: float) -> tuple[float, float]:
    """Return the 95 % interval by Fisher's transformation."""
    middle = math.atanh(min(max(correlation, -0.9999999), 0.9999999))
    return math.tanh(middle - _QUANTILE * deviation), math.tanh(middle + _QUANTILE * deviation)
