"""Search: settings in, Pareto front out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from autopeft.core.errors import checked_names
from autopeft.core.export_report import ExportReport
from autopeft.core.profiling import Profile
from autopeft.evaluation.derived import measured_cut
from autopeft.evaluation.site_scoring import SCORE_BATCHES, score_sites
from autopeft.evaluation.warm_start import initial_weights
from autopeft.export.conversion import ENERGY
from autopeft.export.export import export_adapter
from autopeft.export.targets import COMPARISON, resolved_target
from autopeft.opened_search import OpenSearch, open_search
from autopeft.optimization.budget import Budget
from autopeft.optimization.study_store import SETTINGS_FILE, load_study
from autopeft.reporting.console import SearchProgress
from autopeft.reporting.front import ParetoFront
from autopeft.reporting.layer_card import LayerCard
from autopeft.reporting.score_validation import ScoreCheck, check_scores
from autopeft.reporting.sensitivity_report import SensitivityReport
from autopeft.reporting.verdict import Verdict
from autopeft.search_document import save_document
from autopeft.search_identity import SearchSettings, held_study
from autopeft.search_loop import TrialListener
from autopeft.search_run import SearchRun
from autopeft.search_verdict import SEEDS, reach_verdict
from autopeft.sensitivity import CHEAP_SCORES, SCORES
from autopeft.training.adapter_checkpoints import AdapterCheckpoints

_logger = logging.getLogger(__name__)


class Search(SearchSettings):
    """A multi-objective search for PEFT configurations of one backbone on one task.

    Nothing is loaded before `open`, `validate` or `run`. A search is known by its name: the same call again
    resumes it, finished trials are kept whatever happens to the process.

    Args:
        backbone: Hub name, local folder, a loaded transformers model, or a `Backbone`.
        task: What to fine-tune for.
        space: What to choose from; `ScoreGuided()` by default.
        objectives: Names of metrics and costs to trade off; at least one metric. By default the task's first
            metric, trainable parameters and peak memory.
        constraints: Bounds checked before training, as in `{"peak_memory": "12 GiB"}`, beside those that the
            space brings along, as `Tiny` does. Candidates that break one are not trained.
        training: What every candidate has in common.
        halving: How candidates are trained in part and the promising ones on; None to train each to
            the end.
        warm_start: Initialise trials that have LoRA alone from the space's largest LoRA, which is trained
            first and cut to their ranks, instead of from random weights.
        sampler: "ehvi", "tpe", "nsga2", "nsga3", "random", "gp", "botorch", an Optuna or a `HistorySampler`.
        seed: The same seed gives the same configurations and, on the CPU, the same scores. Every training
            has a seed of its own, made from it.
        seeds: Trainings that what is on the front is to have, each with another seed. The values of a trial
            are the means over its trainings; where these do not hold, it leaves the front.
        derive: Whether a trial's LoRA is cut to fewer parameters when it was trained, each time that may give
            a point of the front. Such a point is no trial: it takes one validation, has a number of its own
            (the trial's and 100,000 or a multiple), and as many trainings as the trial.
        executor: Where and how trials are trained: "local" for one at a time in this process, or what makes
            an `Executor`, as `PackedExecutor(size=8)` does.
        baselines: Whether to try the space's baselines first: what people do today.
        prior: Folders of earlier searches or of exported adapters to begin from; what was read is kept.
        score_check: Whether a call that ends a search, its budget of compute not spent, scores the sites and
            says how well the scores would have ranked its trials.
        name: Name of the search; by default made from backbone, task and a hash of the settings.
        folder: Where searches are kept, each in a folder of its own name.
        tracking: MLflow tracking URI; what makes another `Tracker`; None to record nothing.
        experiment: MLflow experiment.
        tokenizer: Or another processor, as of images; for a loaded model that does not say where its own is.
        dtype: See `LoadOptions`, as of the next three. They are for names and folders, not for loaded models.
        quantization: "nf4" or "int8" to pack the backbone's weights.
        attention: transformers' name of an implementation of attention.
        device_map: "auto" spreads a model that is too large for one GPU over all of them.
        head: "whole" trains the head that the task adds, "last" its last layer alone (what is before it stays
            as it is drawn or loaded), "pretrained" the output layer that a language model came with.

    Raises:
        ValueError: An argument is not valid; what needs the backbone or the data is checked by
            `validate`, which `run` calls before anything is trained.
    """

    _opened: OpenSearch | None = None
    interrupted = False
    """Whether Ctrl-C ended the latest call of `run`."""

    def open(self) -> OpenSearch:
        """Load backbone and data, try them on a batch, and score the sites; later calls return the same.

        Raises:
            ValueError: Data, backbone, task or space are not valid.
        """
        if self._opened is None:
            self._opened = open_search(self, self._root / "scores")
        return self._opened

    def validate(self) -> None:
        """Find everything that can be wrong before training: data, backbone, task, space, constraints.

        One batch is run through forward pass, loss, metrics, a step, a checkpoint and an export, and the
        sampler is asked once.

        Raises:
            ValueError: Says what was wrong, what was expected, and the nearest valid choice.
        """
        self.open().validate()

    def identity(self) -> dict[str, dict[str, str]]:
        """Return what makes this search the one it is: a resumed search must have the same.

        Raises:
            ValueError: Data, backbone or space are not valid.
        """
        opened = self.open()
        space = self.space.with_learning_rates(opened.backbone, opened.evaluator.plan.total_steps)
        return self._identity(opened.backbone.identity(), self.task.identity(), space)

    def describe(self) -> str:
        """Say in a few lines what is searched for and how.

        Raises:
            ValueError: Data, backbone or space are not valid.
        """
        opened = self.open()
        return self._describe(opened.backbone, opened.space, opened.prior)

    def sensitivity(
        self, scores: Sequence[str] = CHEAP_SCORES, *, batches: int = SCORE_BATCHES
    ) -> SensitivityReport:
        """Score the sites of the backbone on the task before anything is trained.

        Computed once for a (backbone, task, seed) and kept in the searches' folder.

        Args:
            scores: Scores of `autopeft.sensitivity.SCORES`.
            batches: Training batches to use; `leave_one_out` alone reads the validation split, as it trains.

        Raises:
            ValueError: A score is unknown, or batches is below 1.
        """
        names = checked_names("score", scores, SCORES)
        found = score_sites(self.open().evaluator, names, batches=batches, folder=self._root / "scores")
        return SensitivityReport(scores=found, batches=batches)

    def check_scores(self, scores: Sequence[str] = CHEAP_SCORES) -> ScoreCheck:
        """Say how well scores, known before training, ranked the trials of this search.

        Args:
            scores: Scores of `autopeft.sensitivity.SCORES`.

        Raises:
            ValueError: A score is unknown, the search was not started, or has too few completed trials.
        """
        front = self.front()
        return check_scores(front.records, self.sensitivity(scores).scores, front.metric)

    def layer_card(self, *, memory: bool = False) -> LayerCard:
        """Say what an adapter at each site costs, on request in memory, and what sites have given so far."""
        return self.open().layer_card(self.front(), memory=memory)

    def run(
        self,
        trials: int | None = None,
        *,
        hours: float | None = None,
        gpu_seconds: float | None = None,
        cpu_seconds: float | None = None,
        retry_failed: bool = False,
        verdict: float = 0.0,
        progress: bool = True,
        profile: bool = False,
        callbacks: Sequence[TrialListener] = (),
    ) -> ParetoFront:
        """Search until a budget is spent; see `Budget` for the bounds.

        Callbacks are called with each trial's record and the front, once the trial is kept: when it has
        finished, each time it pauses at a rung or was trained again. What they raise ends the call.

        Ctrl-C ends the search early and returns the front so far. The same call again resumes: an
        interrupted trial is run again. Trials and seconds are of all calls, hours of each.

        With a `verdict`, that share of the hours or seconds is kept for the method of this name, which is
        called at the end: for the tests of both fronts what they take by the mean of the search's trainings,
        half of the share at most, and for the uniform LoRA sweep the rest. Tests that take more than half
        come on top.

        With `retry_failed` trials that have failed are tried again, each once, as after a mistake in a task
        was mended.

        With `profile`, the call ends with a table of where its time went, which is also kept in the
        search's folder and in MLflow below `profile/`; see `autopeft.core.profiling.SECTIONS`.

        Returns:
            The Pareto front of all finished trials.

        Raises:
            ValueError: Something is not valid (see `validate`), or no candidate is feasible.
            RuntimeError: All candidates fail alike.
        """
        whole = Budget(trials=trials, hours=hours, gpu_seconds=gpu_seconds, cpu_seconds=cpu_seconds)
        budget = whole.less(verdict)
        with Profile() if profile else nullcontext():
            self.validate()
            opened, identity = self.open(), self.identity()
            with closing(held_study(self)) as study:
                study.check_identity(identity)
                kept = whole.bounds | ({"verdict": verdict} if verdict else {})
                save_document(self.folder / SETTINGS_FILE, {**self.arguments(), "run": kept})
                run = SearchRun(opened, self, study, budget, self.export, retry_failed=retry_failed)
                front = run.run(
                    description=self.describe(),
                    identity=identity,
                    progress=progress,
                    callbacks=callbacks,
                    check_scores=lambda: (self.sensitivity(), self.check_scores()),
                )
                self.interrupted = run.interrupted
            if not verdict or self.interrupted or not len(front):
                return front
            try:
                self._reach_verdict(verdict / (1 - verdict), progress=progress, covers_tests=True)
            except KeyboardInterrupt:
                self.interrupted = True
                SearchProgress(enabled=progress).say("Interrupted: search.verdict() goes on from there.")
            return self.front()

    def verdict(
        self, share: float = 1.0, *, seeds: int = SEEDS, full_fine_tuning: bool = False, progress: bool = True
    ) -> Verdict:
        """Say whether the front beats a uniform LoRA sweep, on the test split and with an interval.

        The sweep trains LoRA of one rank at one place: all linear modules, those of the top half, the MLP
        alone, or query and value. It begins with usual ranks at each, at the middle learning rate; then TPE
        chooses all three. It is a search in this one's folder. The points without which each front would lose
        most hypervolume, and the head alone, are then trained again with fresh seeds, which takes further
        compute. The same call again goes on where it was stopped.

        Args:
            share: Compute of the sweep, as a share of what the search took, warm starts included.
            seeds: Fresh trainings of each point.
            full_fine_tuning: Whether every weight is trained as well, at three rates and then with further
                seeds, to be named in the sentence. It takes two or three times the backbone's memory beside
                it, and gradients and optimizer states of all its weights.
            progress: Whether to print, a line for each fresh training.

        Raises:
            ValueError: An argument is not valid, or the front is empty.
            RuntimeError: The head alone cannot be trained, or all of the sweep fails alike.
            KeyboardInterrupt: Ctrl-C; what was done is kept.
        """
        return self._reach_verdict(share, seeds=seeds, full_fine_tuning=full_fine_tuning, progress=progress)

    def _reach_verdict(self, share: float, **options: Any) -> Verdict:
        return reach_verdict(self, self.front(), self.open(), Search, share, **options)

    def front(self) -> ParetoFront:
        """Return the front of the trials finished so far, read from disk.

        Raises:
            ValueError: The search has not been started.
        """
        attributes, records = load_study(self.folder)
        return ParetoFront.stored(attributes, records, self.export)

    def export(
        self,
        number: int,
        folder: str | Path,
        *,
        target: str | None = None,
        energy: float = ENERGY,
        retrain: bool = False,
        seed: int | None = None,
        overwrite: bool = False,
    ) -> ExportReport:
        """Write a trial's adapter, head included, and check that it loads and gives the same logits.

        Args:
            number: The trial.
            folder: Where to write; must be empty or missing.
            target: What it is for: "peft", "autopeft", "merged", "lora", "vllm", "sglang", "llama.cpp" or
                "peft-method-comparison". By default "peft" where one peft family holds everything, and
                "autopeft", a folder for each method, otherwise.
            energy: Share of each update that is kept where a target makes LoRA of other methods.
            retrain: Train the configuration again, at full fidelity and from the trial's initial weights,
                also where the search kept its tensors; off the front it kept none, and the log says so.
            seed: Seed of re-training; that of the trial's first training by default.
            overwrite: Replace what is in the folder.

        Raises:
            ValueError: There is no such completed trial, the folder cannot be written, the target cannot take
                the trial, or what it was initialised from is gone.
            RuntimeError: Re-training failed, or the written adapter does not reproduce the logits.
        """
        front, checkpoints = self.front(), AdapterCheckpoints(self.folder / "adapters")
        record = front.trial(number).record
        if record.evaluation.status != "complete":
            raise ValueError(
                f"Trial {number} {record.evaluation.status} ({record.evaluation.reason}): "
                "there is nothing to export."
            )
        original = record if record.duplicate_of is None else front.trial(record.duplicate_of).record
        evaluation, configuration = original.evaluation, record.evaluation.configuration
        allocation = front.trial(record.trained).record.evaluation.configuration.allocation
        opened = self.open()
        resolved_target(target, opened.backbone, configuration)  # before it is trained again
        state: Mapping[str, Tensor] | None = None if retrain else checkpoints.load(original)
        if target == COMPARISON:
            state = {}  # it has no weights
        if state is None:
            parent = evaluation
            if record.derived_from is not None:
                parent = front.trial(record.trained).record.evaluation
            if not retrain:
                seconds = parent.cost.wall_seconds / parent.trainings
                _logger.warning(
                    f"Trial {number} is not on the front, and its trained tensors were not kept: it is "
                    f"trained again, which took {seconds:.0f} s in the search."
                )
            warm_starts = opened.warm_starts(self.warm_start, self.folder, trains=False)
            weights = initial_weights(warm_starts, parent)
            seed = evaluation.seed if seed is None else seed
            trained = opened.evaluator.train(parent.configuration, seed, initial_weights=weights)
            if trained.state is not None and record.derived_from is not None:
                trained = measured_cut(opened.evaluator, trained, configuration)
            if trained.state is None:
                raise RuntimeError(f"Re-training trial {number} failed: {trained.evaluation.reason}")
            state, evaluation = trained.state, trained.evaluation
        return export_adapter(
            opened.backbone,
            configuration,
            state,
            folder,
            values=evaluation.values,
            details={
                "search": self.name,
                "trial": str(number),
                **({} if record.derived_from is None else {"cut from": f"trial {record.derived_from}"}),
                **({} if allocation is None else {"ranks allocated in training by": allocation}),
                "trainings": evaluation.describe_trainings(checkpoints.seed(original)),
                "initialised from": evaluation.initialised_from,
                "frozen blocks in training": self.training.frozen_blocks,
                **{f"task {key}": text for key, text in self.task.identity().items()},
            },
            prediction=self.task.prediction,
            trainings=evaluation.trainings,
            probe=opened.evaluator.model_call(),
            score=opened.evaluator.score,
            target=target,
            energy=energy,
            overwrite=overwrite,
        )

    def register(self, number: int, name: str, **options: Any) -> str:
        """Export a trial merged into a whole model, and put that into MLflow's model registry.

        Args:
            number: The trial.
            name: Name in the registry; a model that has it gets a new version.
            options: `retrain` and `seed` of `export`.

        Returns:
            Its URI, as "models:/reviews/1", for `mlflow.pyfunc.load_model`.

        Raises:
            ValueError: The search is not tracked, the trial cannot be exported so, or MLflow cannot use the
                store.
            RuntimeError: See `export`.
        """
        if not isinstance(self.tracking, str):
            raise ValueError(
                f"The search has tracking={self.tracking!r}: give it an MLflow tracking URI to register in."
            )
        from autopeft.reporting.mlflow.registry import register_model

        with TemporaryDirectory() as scratch:
            report = self.export(number, Path(scratch, "model"), target="merged", **options)
            tags = {"autopeft.registered_search": self.name, "autopeft.registered_trial": str(number)}
            return register_model(self.tracking, self.experiment, name, report.folder, tags, self.task)

    def __repr__(self) -> str:
        names = ", ".join(objective.name for objective in self.objectives)
        return f"Search({self._name or self.backbone!r}, {type(self.space).__name__}, {names})"
