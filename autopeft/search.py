"""Search: ask for a configuration, evaluate it, tell the outcome, keep everything."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from optuna.samplers import BaseSampler
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from autopeft.core.cache_folder import cache_folder
from autopeft.core.errors import check_whole
from autopeft.core.hypervolume_axes import fixed_axes
from autopeft.core.objectives import resolve_constraints, resolve_objectives
from autopeft.core.pareto import Axis
from autopeft.core.profiling import Profile, section
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.site_scoring import score_sites
from autopeft.evaluation.supernet.settings import WarmStart
from autopeft.evaluation.supernet.warm_start import WarmStarts, initial_weights
from autopeft.export.export import ExportReport, export_adapter
from autopeft.models.backbone import Backbone
from autopeft.models.loading import default_dtype
from autopeft.optimization.budget import Budget
from autopeft.optimization.samplers import make_sampler
from autopeft.optimization.study_store import StudyStore, load_study
from autopeft.optimization.successive_halving import AshaPromoter, SuccessiveHalving
from autopeft.reporting.front import ParetoFront
from autopeft.reporting.score_validation import ScoreCheck, check_scores
from autopeft.reporting.sensitivity_report import SensitivityReport
from autopeft.search_identity import describe_search, search_identity
from autopeft.search_loop import SearchLoop, TrialCallback
from autopeft.search_spaces import SearchSpace
from autopeft.sensitivity import CHEAP_SCORES
from autopeft.sensitivity.cached_scores import SCORE_BATCHES
from autopeft.tasks import Task
from autopeft.tasks.batch import model_inputs
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.training.settings import Training


class Search:
    """A multi-objective search for PEFT configurations of one backbone on one task.

    Nothing is loaded before `validate` or `run`. A search is known by its name: the same call again
    resumes it, finished trials are kept whatever happens to the process.

    Args:
        backbone: Hub name, local folder, a loaded transformers model, or a `Backbone`.
        task: What to fine-tune for.
        space: What to choose from.
        objectives: Names of metrics and costs to trade off; at least one metric.
        constraints: Bounds checked before training, as in `{"peak_memory": "12 GiB"}`. Candidates
            that break one are not trained.
        training: What every candidate has in common.
        fidelity: How candidates are trained in part and the promising ones on; None to train each to
            the end.
        warm_start: Initialise LoRA trials from a supernet; None to initialise all from random weights.
        sampler: "ehvi" (see `EhviSampler`), "tpe", "nsga2", "nsga3", "random", "gp", "botorch" or an Optuna
            sampler.
        seed: The same seed gives the same configurations and, on the CPU, the same scores. Every training
            has a seed of its own, made from it.
        seeds: Trainings that what is on the front is to have, each with another seed. The values of a trial
            are the means over its trainings; where these do not hold, it leaves the front.
        baselines: Whether to try the space's reference points first: what people do today.
        score_check: Whether a call that ends a search scores the sites, and says how well the scores
            would have ranked its trials.
        name: Name of the search; by default made from backbone, task and a hash of the settings.
        folder: Where searches are kept, each in a folder of its own name.
        tracking: MLflow tracking URI; None to record nothing in MLflow.
        experiment: MLflow experiment.
        tokenizer: Needed where a loaded model does not say where its tokenizer lies.

    Raises:
        ValueError: An argument is not valid; what needs the backbone or the data is checked by
            `validate`, which `run` calls before anything is trained.
    """

    def __init__(
        self,
        backbone: str | Path | PreTrainedModel | Backbone,
        task: Task,
        space: SearchSpace,
        *,
        objectives: Sequence[str] = ("accuracy", "trainable_parameters", "peak_memory"),
        constraints: Mapping[str, float | str] | None = None,
        training: Training | None = None,
        fidelity: SuccessiveHalving | None = None,
        warm_start: WarmStart | None = None,
        sampler: str | BaseSampler = "ehvi",
        seed: int = 0,
        seeds: int = 1,
        baselines: bool = True,
        score_check: bool = True,
        name: str | None = None,
        folder: str | Path = "autopeft_runs",
        tracking: str | None = "sqlite:///mlflow.db",
        experiment: str = "autopeft",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_whole("seed", seed, least=0)
        check_whole("seeds", seeds, what="a number of trainings", least=1)
        self.task = task
        self.space = space
        self.objectives = resolve_objectives(objectives, task.metrics)
        self.constraints = resolve_constraints(constraints or {}, task.metrics)
        self.training = training if training is not None else Training()
        self.fidelity = fidelity
        self.warm_start = warm_start
        self.seed = seed
        self.seeds = seeds
        self.baselines = baselines
        self.score_check = score_check
        self.experiment = experiment
        self.tracking = tracking
        self.sampler = make_sampler(sampler, seed)
        self.sampler_name = sampler if isinstance(sampler, str) else type(sampler).__name__
        self._source = backbone
        self._tokenizer = tokenizer
        self._name = name
        self._root = Path(folder)
        self._evaluator: Evaluator | None = None
        valid_name = name is None or (isinstance(name, str) and re.fullmatch(r"\w[\w.\- ]{0,119}", name))
        if not valid_name:
            raise ValueError(
                "A search's name is a folder's name: a letter or digit, then letters, digits, '.', '-', '_' "
                f"or spaces, got {name!r}."
            )

    @property
    def evaluator(self) -> Evaluator:
        """The evaluator with its resident backbone; loaded on first use."""
        if self._evaluator is None:
            with section("tokenise"):
                self.task.validate()
            with section("load"):
                dtype = default_dtype(self.training.resolved_device())
                backbone = Backbone.load(self._source, self.task.head, self._tokenizer, dtype=dtype)
            self.space.validate(backbone)
            self._evaluator = Evaluator(
                backbone,
                self.task,
                self.training,
                self.objectives,
                self.constraints,
                rungs=() if self.fidelity is None else self.fidelity.rungs,
                seed=self.seed,
                cache=cache_folder(),
            )
            if self.space.scores_needed:
                self.space = self.space.with_scores(self.sensitivity(self.space.scores_needed).scores)
        return self._evaluator

    @property
    def backbone(self) -> Backbone:
        """The resident backbone; loaded on first use."""
        return self.evaluator.backbone

    def sensitivity(
        self, scores: Sequence[str] = CHEAP_SCORES, *, batches: int = SCORE_BATCHES
    ) -> SensitivityReport:
        """Score the sites of the backbone on the task before anything is trained.

        Computed once for a (backbone, task, seed) and kept in the searches' folder.

        Args:
            scores: Scores of `autopeft.sensitivity.SCORES`.
            batches: Training batches to use; the validation and test splits are not read.

        Raises:
            ValueError: A score is unknown, or batches is below 1.
        """
        found = score_sites(self.evaluator, tuple(scores), batches=batches, folder=self._root / "scores")
        return SensitivityReport(scores=found, batches=batches)

    def check_scores(self, scores: Sequence[str] = CHEAP_SCORES) -> ScoreCheck:
        """Say how well scores, known before training, ranked the trials of this search.

        Args:
            scores: Scores of `autopeft.sensitivity.SCORES`.

        Raises:
            ValueError: A score is unknown, the search was not started, or has too few completed trials.
        """
        metric = next(one for one in self.objectives if one.is_metric)
        return check_scores(self.front().records, self.sensitivity(scores).scores, metric)

    def validate(self) -> None:
        """Find everything that can be wrong before training: data, backbone, space, constraints.

        Raises:
            ValueError: Says what was wrong, what was expected, and the nearest valid choice.
        """
        smallest, _ = self.space.extremes(self.backbone)
        if not self.constraints:
            self.evaluator.costs(smallest)
            return
        # What has the fewest parameters need not take the least memory.
        points = [smallest, *(baseline.configuration for baseline in self.space.baselines(self.backbone))]
        values = [self.evaluator.costs(one) for one in dict.fromkeys(points)]
        for constraint in self.constraints:
            closest = min(values, key=constraint.violation)
            if constraint.violation(closest) > 0:
                raise ValueError(
                    "No candidate can keep the constraint: the closest of the space's smallest configuration "
                    f"and its baselines already has {constraint.describe(closest)}."
                )

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this search the one it is: a resumed search must have the same."""
        return search_identity(
            backbone=self.backbone,
            task=self.task,
            space=self.space,
            training=self.training,
            fidelity=self.fidelity,
            warm_start=self.warm_start,
            objectives=[objective.name for objective in self.objectives],
            constraints={one.objective.name: one.bound for one in self.constraints},
            sampler=self.sampler_name,
            seed=self.seed,
            seeds=self.seeds,
            baselines=self.baselines,
        )

    @property
    def name(self) -> str:
        """The search's name."""
        if self._name is None:
            text = json.dumps(self.identity, sort_keys=True)
            digest = hashlib.sha256(text.encode()).hexdigest()[:8]
            stem = re.sub(r"[^\w.\-]+", "-", f"{self.task.name}-{self.backbone.name}")
            self._name = f"{stem}-{digest}"
        return self._name

    @property
    def folder(self) -> Path:
        """Where this search is kept."""
        return self._root / self.name

    def axes(self) -> tuple[Axis, ...]:
        """Return the fixed axes of the hypervolume.

        A metric runs from its trivial score to its best value; parameters, memory and FLOPs, on a log scale,
        from the space's largest to its smallest configuration. Times are left out: nothing bounds them.
        """
        ends = [self.evaluator.costs(one) for one in self.space.extremes(self.backbone)]
        bounds = {metric: self.task.bounds(metric) for metric in self.task.metrics}
        return fixed_axes(self.objectives, bounds, ends)

    def promotion(self) -> AshaPromoter | None:
        """Return what decides which paused trial goes on; None where trials do not pause."""
        if self.fidelity is None:
            return None
        steps, monitor = self.evaluator.plan.rungs, self.evaluator.monitor
        references = [one.name for one in self.space.baselines(self.backbone) if one.is_trained_whole]
        return AshaPromoter(self.fidelity, steps, self.objectives, self.axes(), monitor, references)

    def warm_starts(self, *, trains: bool = True) -> WarmStarts | None:
        """Return the supernets that trials are initialised from; None without warm starts.

        Args:
            trains: Whether to train supernets that are not in the search's folder.
        """
        if self.warm_start is None:
            return None
        folder = self.folder / "supernets"
        return WarmStarts(self.warm_start, self.evaluator, self.space, folder, trains=trains)

    def run(
        self,
        trials: int | None = None,
        *,
        hours: float | None = None,
        gpu_seconds: float | None = None,
        cpu_seconds: float | None = None,
        progress: bool = True,
        profile: bool = False,
        callbacks: Sequence[TrialCallback] = (),
    ) -> ParetoFront:
        """Search until a budget is spent; see `Budget` for the bounds.

        Callbacks are called with each trial's record and the front, once the trial is kept: when it has
        finished, each time it pauses at a rung or was trained again. What they raise ends the call.

        Ctrl-C ends the search early and returns the front so far. The same call again resumes: an
        interrupted trial is run again, a search that is done returns its front at once.

        With `profile`, the call ends with a table of where its time went, which is also kept in the
        search's folder and in MLflow below `profile/`; see `autopeft.core.profiling.SECTIONS`.

        Returns:
            The Pareto front of all finished trials.

        Raises:
            ValueError: Something is not valid (see `validate`), or no candidate is feasible.
        """
        budget = Budget(trials=trials, hours=hours, gpu_seconds=gpu_seconds, cpu_seconds=cpu_seconds)
        with Profile() if profile else nullcontext():
            self.validate()
            store = StudyStore(self.folder, self.name, self.objectives, self.constraints)
            try:
                return SearchLoop(self, store, budget, progress=progress, callbacks=callbacks).run()
            finally:
                store.close()

    def front(self) -> ParetoFront:
        """Return the front of the trials finished so far, without running any.

        Raises:
            ValueError: The search has not been started.
        """
        _, records = load_study(self.folder)
        return ParetoFront(records, self.objectives, self.axes(), exporter=self)

    def export(
        self,
        number: int,
        folder: str | Path,
        *,
        merged: bool = False,
        retrain: bool = False,
        seed: int | None = None,
        overwrite: bool = False,
    ) -> ExportReport:
        """Write a trial's adapter, head included, and check that it loads and gives the same logits.

        Args:
            number: The trial.
            folder: Where to write; must be empty or missing.
            merged: Write a full model with the adapters merged into the weights.
            retrain: Train the configuration again, at full fidelity and from the trial's initial weights,
                also where the search kept its tensors; off the front it kept none.
            seed: Seed of re-training; that of the trial's first training by default.
            overwrite: Replace what is in the folder.

        Raises:
            ValueError: There is no such completed trial, the folder cannot be written, a method cannot be
                merged, or the supernet the trial was initialised from is gone.
            RuntimeError: Re-training failed, or the written adapter does not reproduce the logits.
        """
        front, checkpoints = self.front(), AdapterCheckpoints(self.folder / "adapters")
        record = front.trial(number).record
        if record.evaluation.status != "complete":
            raise ValueError(
                f"Trial {number} {record.evaluation.status} ({record.evaluation.reason}): "
                "there is nothing to export."
            )
        original = number if record.duplicate_of is None else record.duplicate_of
        evaluation, configuration = front.trial(original).record.evaluation, record.evaluation.configuration
        state: Mapping[str, Tensor] | None = None if retrain else checkpoints.load(original)
        if state is None:
            weights = initial_weights(self.warm_starts(trains=False), evaluation)
            seed = evaluation.seed if seed is None else seed
            trained = self.evaluator.train(configuration, seed, initial_weights=weights)
            if trained.state is None:
                raise RuntimeError(f"Re-training trial {number} failed: {trained.evaluation.reason}")
            state, evaluation = trained.state, trained.evaluation
        test = self.evaluator.test(configuration, state)
        return export_adapter(
            self.backbone,
            configuration,
            state,
            folder,
            values={**evaluation.values, **{f"test_{name}": value for name, value in test.items()}},
            details={
                "search": self.name,
                "trial": str(number),
                "trainings": evaluation.describe_trainings(checkpoints.seed(original)),
                "initialised from": evaluation.initialised_from,
                "frozen blocks in training": self.training.frozen_blocks,
                **{f"task {key}": text for key, text in self.task.identity().items()},
            },
            trainings=evaluation.trainings,
            probe=model_inputs(self.evaluator.data.largest_batch()),
            merged=merged,
            overwrite=overwrite,
        )

    def describe(self) -> str:
        """Say in a few lines what is searched for and how."""
        return describe_search(self)

    def __repr__(self) -> str:
        names = ", ".join(objective.name for objective in self.objectives)
        return f"Search({self._name or self._source!r}, {type(self.space).__name__}, {names})"
