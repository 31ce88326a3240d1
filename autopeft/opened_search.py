"""A search that was opened: backbone and data are loaded, the sites are scored."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from optuna import create_study
from optuna.distributions import distribution_to_json
from optuna.samplers import BaseSampler

from autopeft.core.cache_folder import cache_folder
from autopeft.core.configuration import Configuration
from autopeft.core.errors import NoCandidateError
from autopeft.core.pareto import Axis, fixed_axes
from autopeft.core.profiling import section, whole_section
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.rehearsal import naming, rehearse
from autopeft.evaluation.site_scoring import score_sites
from autopeft.evaluation.warm_start import WarmStarts
from autopeft.export.export import export_adapter
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.optimization.ehvi_sampler import encoded
from autopeft.optimization.proposal import History
from autopeft.optimization.samplers import make_sampler
from autopeft.optimization.study_store import quiet_optuna
from autopeft.optimization.successive_halving import AshaPromoter, SuccessiveHalving
from autopeft.reporting.front import ParetoFront
from autopeft.reporting.layer_card import LayerCard
from autopeft.search_identity import SearchSettings, describe_sampler
from autopeft.search_prior import earlier_fronts
from autopeft.search_spaces import SearchSpace
from autopeft.search_spaces.prior import Prior

_SLIGHTLY = 0.01


@dataclass(frozen=True, kw_only=True)
class OpenSearch:
    """What a search works with.

    Attributes:
        backbone: The resident backbone.
        evaluator: Trains and measures configurations on it; holds the data.
        space: The search space with its learning rates and the scores it needs.
        prior: What earlier fronts say of them.
        axes: The fixed axes of the hypervolume. A metric runs from its trivial score to its best value;
            parameters, memory and FLOPs on a log scale from the space's largest to its smallest
            configuration. Times are left out: what they can be is not known before training.
    """

    backbone: Backbone
    evaluator: Evaluator
    space: SearchSpace
    prior: Prior
    axes: tuple[Axis, ...]

    def validate(self) -> None:
        """Find a constraint that no configuration can keep.

        Raises:
            NoCandidateError: Says by how much the closest breaks it.
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
                raise NoCandidateError(
                    "No candidate can keep the constraint: the closest of the space's smallest configuration "
                    f"and its baselines already has {constraint.describe(closest)}."
                )

    def layer_card(self, front: ParetoFront, *, memory: bool = False) -> LayerCard:
        """Return what the sites cost, peak memory on request, and what they have given to a front."""
        costs = self.evaluator.costs if memory else None
        return LayerCard.of(self.backbone, self.space, self.prior, front, costs)

    def promoter(self, halving: SuccessiveHalving | None) -> AshaPromoter | None:
        """Return what decides which paused trial goes on; None where trials do not pause."""
        if halving is None:
            return None
        evaluator, baselines = self.evaluator, self.space.baselines(self.backbone)
        references = [baseline.name for baseline in baselines if baseline.is_trained_whole]
        return AshaPromoter(
            halving, evaluator.plan.rungs, evaluator.objectives, self.axes, evaluator.monitor, references
        )

    def warm_starts(self, is_on: bool, folder: Path, *, trains: bool = True) -> WarmStarts | None:
        """Return what trials inherit from in a search's folder; None where they do not.

        With `trains`, what is not there is trained.
        """
        if not is_on:
            return None
        return WarmStarts(self.evaluator, self.space, folder / "warm_starts", trains=trains)


def open_search(settings: SearchSettings, scores: Path) -> OpenSearch:
    """Load backbone and data, check that the space fits, rehearse a trial, and compute the space's scores.

    Args:
        settings: The search's.
        scores: Folder where scores are kept.

    Raises:
        ValueError: Data, backbone, task, space, schedule or prior are not valid.
    """
    task, space = settings.task, settings.space
    fronts = earlier_fronts(settings.prior, settings.folder)
    with section("tokenise"):
        task.validate()
    with section("load"):
        device = settings.training.resolved_device()
        backbone = Backbone.load(
            settings.backbone, task.head, settings.tokenizer, options=settings.loading, device=device
        )
    backbone.train_head(settings.head)
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
    space = space.with_learning_rates(backbone, evaluator.plan.total_steps)
    prior = Prior.placed(fronts, space, backbone, evaluator.plan.total_steps)
    # Before scores and costs, which run the task as well and cannot say what is wrong with it.
    single = single_adapters(space, backbone)
    rehearse(evaluator, single[0])
    rehearse_export(evaluator, single)
    if space.scores_needed:
        found = score_sites(evaluator, space.scores_needed, folder=scores)
        space = space.with_scores({name: each.weighted(prior.weights) for name, each in found.items()})
    rehearse_sampler(settings, space, backbone)
    ends = [evaluator.costs(configuration) for configuration in space.ends(backbone)]
    bounds = {
        metric.name: (task.trivial_score(metric.name, evaluator.data), task.best_score(metric.name))
        for metric in evaluator.objectives
        if metric.is_metric
    }
    axes = fixed_axes(evaluator.objectives, bounds, ends)
    return OpenSearch(backbone=backbone, evaluator=evaluator, space=space, prior=prior, axes=axes)


def single_adapters(space: SearchSpace, backbone: Backbone) -> list[Configuration]:
    """Return the smallest adapter of each of a space's methods alone, as high as it can be.

    There it takes least memory. Of a space without methods it is the head alone.
    """
    found: dict[str, Configuration] = {}
    for site, methods in reversed([*space.choices(backbone).items()]):
        for method, choice in methods.items():
            found.setdefault(method, space.point({site: choice.smallest}))
    return list(found.values()) or [space.point()]


@whole_section("rehearse")
def rehearse_export(evaluator: Evaluator, configurations: Iterable[Configuration]) -> None:
    """Write adapters that are hardly trained to a temporary folder, and load them in this process.

    Raises:
        ValueError: The model, or a configuration, cannot be exported.
    """
    with naming(f"Exporting {type(evaluator.task).__name__}"), TemporaryDirectory() as folder:
        # One row: logits of many tokens over a large vocabulary take gigabytes.
        probe = {name: tensor[:1] for name, tensor in evaluator.model_call().items()}
        for number, configuration in enumerate(configurations):
            with attach(evaluator.backbone, configuration, evaluator.seed) as attachment:
                # New adapters add nothing: that one was lost would not show. What they keep stays, as it does
                # in training: some add what is trained less what it began with.
                state = attachment.state_dict()
                state |= {name: state[name] + _SLIGHTLY for name in attachment.parameters}
            export_adapter(
                evaluator.backbone,
                configuration,
                state,
                Path(folder, str(number)),
                prediction=evaluator.task.prediction,
                probe=probe,
                fresh=False,
            )


@whole_section("rehearse")
def rehearse_sampler(settings: SearchSettings, space: SearchSpace, backbone: Backbone) -> None:
    """Ask the sampler for a configuration, and encode it as a trial's.

    Raises:
        ValueError: Sampler and space do not go together, or a parameter cannot be kept.
    """
    with naming(f"Sampling {type(space).__name__} by {describe_sampler(settings.sampler)}"):
        try:  # a copy: what a sampler of the user's own draws here would be missing in the search
            sampler = make_sampler(copy.deepcopy(settings.sampler), settings.seed)
        except TypeError:  # it holds what cannot be copied, such as a lock
            return
        if isinstance(sampler, BaseSampler):
            with quiet_optuna():
                directions = [objective.direction for objective in settings.objectives]
                study = create_study(directions=directions, sampler=sampler)
            configuration = space.suggest(study.ask(), backbone)
        else:
            history = History(trials=(), axes=(), constraints=settings.constraints)
            configuration = sampler.choose(0, space, backbone, history)
        backbone.check(configuration)
        _, distributions = encoded(space, configuration, backbone)
        for distribution in distributions.values():
            distribution_to_json(distribution)
