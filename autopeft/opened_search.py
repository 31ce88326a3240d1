"""A search that was opened: backbone and data are loaded, the sites are scored."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from autopeft.core.pareto import Axis, fixed_axes
from autopeft.core.profiling import section
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.site_scoring import score_sites
from autopeft.evaluation.supernet.warm_start import WarmStart, WarmStarts
from autopeft.models.backbone import Backbone
from autopeft.optimization.successive_halving import AshaPromoter, SuccessiveHalving
from autopeft.search_identity import SearchSettings
from autopeft.search_spaces import SearchSpace


@dataclass(frozen=True, kw_only=True)
class OpenSearch:
    """What a search works with.

    Attributes:
        backbone: The resident backbone.
        evaluator: Trains and measures configurations on it; holds the data.
        space: The search space with the scores it needs.
        axes: The fixed axes of the hypervolume. A metric runs from its trivial score to its best value;
            parameters, memory and FLOPs on a log scale from the space's largest to its smallest
            configuration. Times are left out: what they can be is not known before training.
    """

    backbone: Backbone
    evaluator: Evaluator
    space: SearchSpace
    axes: tuple[Axis, ...]

    def validate(self) -> None:
        """Find a constraint that no configuration can keep.

        Raises:
            ValueError: Says by how much the closest breaks it.
        """
        constraints = self.evaluator.constraints
        if not constraints:
            return
        smallest, _ = self.space.extremes(self.backbone)
        # What has the fewest parameters need not take the least memory.
        points = [smallest, *(baseline.configuration for baseline in self.space.baselines(self.backbone))]
        values = [self.evaluator.costs(configuration) for configuration in dict.fromkeys(points)]
        for constraint in constraints:
            closest = min(values, key=constraint.violation)
            if constraint.violation(closest) > 0:
                raise ValueError(
                    "No candidate can keep the constraint: the closest of the space's smallest configuration "
                    f"and its baselines already has {constraint.describe(closest)}."
                )

    def promoter(self, halving: SuccessiveHalving | None) -> AshaPromoter | None:
        """Return what decides which paused trial goes on; None where trials do not pause."""
        if halving is None:
            return None
        evaluator, baselines = self.evaluator, self.space.baselines(self.backbone)
        references = [baseline.name for baseline in baselines if baseline.is_trained_whole]
        return AshaPromoter(
            halving, evaluator.plan.rungs, evaluator.objectives, self.axes, evaluator.monitor, references
        )

    def warm_starts(
        self, settings: WarmStart | None, folder: Path, *, trains: bool = True
    ) -> WarmStarts | None:
        """Return the supernets that trials are initialised from, in a search's folder; None without.

        With `trains`, those that are not there are trained.
        """
        if settings is None:
            return None
        return WarmStarts(settings, self.evaluator, self.space, folder / "supernets", trains=trains)


def open_search(settings: SearchSettings, scores: Path) -> OpenSearch:
    """Load backbone and data, check that the space fits, and compute the scores that it needs.

    Args:
        settings: The search's.
        scores: Folder where scores are kept.

    Raises:
        ValueError: Data, backbone, space or schedule are not valid.
    """
    task, space = settings.task, settings.space
    with section("tokenise"):
        task.validate()
    with section("load"):
        device = settings.training.resolved_device()
        backbone = Backbone.load(
            settings.backbone, task.head, settings.tokenizer, options=settings.loading, device=device
        )
    space.validate(backbone)
    evaluator = Evaluator(
        backbone,
        task,
        settings.training,
        settings.objectives,
        settings.constraints,
        rungs=() if settings.halving is None else settings.halving.rungs,
        seed=settings.seed,
        cache=cache_folder(),
    )
    if space.scores_needed:
        space = space.with_scores(score_sites(evaluator, space.scores_needed, folder=scores))
    ends = [evaluator.costs(configuration) for configuration in space.ends(backbone)]
    bounds = {
        metric.name: (task.trivial_score(metric.name, evaluator.data), task.best_score(metric.name))
        for metric in evaluator.objectives
        if metric.is_metric
    }
    axes = fixed_axes(evaluator.objectives, bounds, ends)
    return OpenSearch(backbone=backbone, evaluator=evaluator, space=space, axes=axes)


def cache_folder() -> Path:
    """Return where what can be computed again is kept: tokenised texts and hidden states.

    The environment variable AUTOPEFT_CACHE names the folder; by default it is `autopeft` in the user's cache
    folder (XDG_CACHE_HOME, or ~/.cache).
    """
    if named := os.environ.get("AUTOPEFT_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autopeft"
