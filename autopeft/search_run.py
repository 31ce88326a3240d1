"""One call of `Search.run`: what is set up before the loop, and closed after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

from optuna.study import Study

from autopeft.core.evaluation import Cost
from autopeft.core.export_report import ExportReport
from autopeft.core.profiling import section
from autopeft.evaluation.executor import Executor, LocalExecutor
from autopeft.evaluation.trial_runner import TrialRunner
from autopeft.opened_search import OpenSearch
from autopeft.optimization.budget import Budget, is_exhausted
from autopeft.optimization.proposer import Proposer
from autopeft.optimization.scheduler import Scheduler
from autopeft.optimization.seed_replication import evaluations_of
from autopeft.optimization.study_store import StudyStore
from autopeft.reporting.front import ParetoFront
from autopeft.reporting.score_validation import FEWEST_TRIALS, ScoreCheck
from autopeft.reporting.search_report import RunEnd, SearchReport
from autopeft.reporting.sensitivity_report import SensitivityReport
from autopeft.reporting.tracker import Tracker
from autopeft.reporting.verdict import stored_verdict
from autopeft.search_identity import SearchSettings, environment
from autopeft.search_loop import FileCleanup, TrialListener, run_loop
from autopeft.search_prior import TRAINED, keep_fronts
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.training.trainer import quiet_lightning
from autopeft.training.training_checkpoint import TrainingCheckpoints

_logger = logging.getLogger(__name__)
ScoreChecks = Callable[[], tuple[SensitivityReport, ScoreCheck]]
"""Scores the sites, and says how well the scores rank the trials."""


class SearchRun:
    """One call of `Search.run`, on a study that this process holds."""

    interrupted = False  # by Ctrl-C

    def __init__(
        self,
        opened: OpenSearch,
        settings: SearchSettings,
        study: StudyStore,
        budget: Budget,
        export: Callable[..., ExportReport],
        *,
        retry_failed: bool = False,
    ) -> None:
        evaluator = opened.evaluator
        trains_here = getattr(settings.executor, "trains_here", True)
        if budget.gpu_seconds is not None and trains_here and evaluator.device.type != "cuda":
            raise ValueError(
                f"gpu_seconds is given, but trials are trained on the {evaluator.device}, which takes none: "
                "give cpu_seconds or hours."
            )
        self.opened, self.evaluator, self.axes, self.study = opened, evaluator, opened.axes, study
        self.budget, self.export, self.settings = budget, export, settings
        keep_fronts(opened.prior.fronts, study.folder)
        evaluator.hidden_states.expect(budget.trials)
        self.warm_starts = opened.warm_starts(settings.warm_start, study.folder)
        self.promoter = opened.promoter(settings.halving)
        checkpoints = AdapterCheckpoints(study.folder / "adapters")
        paused = TrainingCheckpoints(study.folder / "paused")
        self.runner = TrialRunner(
            evaluator, checkpoints, paused, seed=settings.seed, warm_starts=self.warm_starts
        )
        self.tracker = self._make_tracker()
        proposer = Proposer(
            space=opened.space,
            backbone=opened.backbone,
            sampler=settings.sampler,
            objectives=evaluator.objectives,
            axes=opened.axes,
            view=self._view,
            seed=settings.seed,
            constraints=evaluator.constraints,
            baselines=opened.space.baselines(opened.backbone, budget.trials) if settings.baselines else (),
            prior=opened.prior,
            forecast=None if self.promoter is None else self.promoter.forecast,
            are_states_served=self._are_states_served,
        )
        failed = [record.number for record in study.records if record.evaluation.status == "failed"]
        self.scheduler = Scheduler(
            proposer.propose,
            budget,
            evaluator.objectives,
            seeds=settings.seeds,
            promoter=self.promoter,
            overhead=self.warm_starts,
            derives=settings.derive,
            retried=failed if retry_failed else [],
        )
        self.cleanup = FileCleanup(checkpoints, paused, settings.seeds, self.scheduler.running)

    def front(self) -> ParetoFront:
        """Return the front so far."""
        records = self.study.records
        return ParetoFront(
            records,
            self.evaluator.objectives,
            self.axes,
            self.export,
            stored_verdict(self.study.attribute("verdict", {}), records),
            search=self.settings.name,
            backbone=self.opened.backbone.name,
        )

    def run(
        self,
        *,
        description: str,
        identity: Mapping[str, Mapping[str, str]],
        progress: bool,
        callbacks: Sequence[TrialListener],
        check_scores: ScoreChecks,
    ) -> ParetoFront:
        """Run the loop, and leave study, files and what is tracked in order; see `Search.run`."""
        front = self.front()
        self.study.set_attribute("metrics", [asdict(each) for each in self.evaluator.task.objectives])
        trained = {"hidden_size": self.opened.backbone.hidden_size, "steps": self.evaluator.plan.total_steps}
        self.study.set_attribute(TRAINED, trained)
        axes = [[axis.objective.name, axis.worst, axis.best] for axis in front.axes]
        self.study.set_attribute("axes", axes)
        self.cleanup.tidy(front)
        rungs = self.evaluator.plan.rungs
        before = sum(evaluations_of(record, rungs) for record in self.study.records)
        report = SearchReport(self._spent, evaluations=before, progress=progress, tracker=self.tracker)
        timed = [section("callbacks")(callback) for callback in callbacks]
        status: RunEnd = "FAILED"
        # Last, so that its workers are stopped whatever goes wrong.
        make_executor = LocalExecutor if isinstance(self.settings.executor, str) else self.settings.executor
        self.executor: Executor = make_executor(self.runner)
        try:
            with report.progress, quiet_lightning():
                report.begin(
                    front, description=description, identity={**identity, "environment": environment()}
                )
                if (use := self.evaluator.hidden_states.describe()) is not None:
                    report.progress.say(use)
                front = run_loop(
                    self.scheduler,
                    self.executor,
                    self.study,
                    front,
                    started=report.started,
                    listeners=[self.cleanup, report.finished, *timed],
                )
            if self.settings.score_check and report.evaluations > before:
                self._check_scores(report, check_scores)
            report.tracker.log_report(self.opened.layer_card(front).save, "layers")
            status = "FINISHED"
        except KeyboardInterrupt:
            status, front, self.interrupted = "KILLED", self.front(), True
            report.progress.say("Interrupted: finished trials are kept, the same call resumes.")
        finally:
            try:
                self.executor.close()
            except BaseException:
                status = "FAILED"
                raise
            finally:
                front = self.front() if status == "FAILED" else front
                report.end(status, front, self.study.folder, report.evaluations - before)
        self._close(report, front)
        return front

    def _make_tracker(self) -> Tracker:
        tracking = self.settings.tracking
        if tracking is None:
            return Tracker()
        names = {"search_name": self.settings.name, "study_id": self.study.study_id}
        if not isinstance(tracking, str):
            return tracking(**names, objectives=self.settings.objectives)
        from autopeft.reporting.mlflow.tracker import MlflowTracker  # takes a fifth of importing all

        try:
            where = {"experiment": self.settings.experiment, **names}
            return MlflowTracker(tracking, **where, objectives=self.settings.objectives)
        except ValueError as error:
            if not self.study.records:
                raise
            _logger.warning(
                "The search goes on and is not recorded in MLflow: %s The study has everything: the next "
                "call of the search writes it.",
                error,
            )
            return Tracker()

    def _spent(self) -> tuple[float, Cost]:
        spent = self.scheduler.spent(self.study.records)
        return self.budget.spent_share(spent), spent.cost

    def _are_states_served(self, cut: int) -> bool:
        return self.executor.serves_hidden_states and self.evaluator.hidden_states.is_served(cut)

    def _view(self) -> Study:
        """Return the study that an Optuna sampler is asked from."""
        expected = None if self.promoter is None else self.promoter.forecast(self.study.records).values
        return self.study.view(expected=expected, running=self.scheduler.proposed)

    def _check_scores(self, report: SearchReport, check_scores: ScoreChecks) -> None:
        """Say how well the scores would have ranked the trials; a search never fails by it."""
        progress = report.progress
        records = [record for record in self.study.records if record.duplicate_of is None]
        if sum(record.evaluation.status == "complete" for record in records) < FEWEST_TRIALS:
            return
        spent = replace(self.scheduler.spent(self.study.records), trials=0)
        if self.budget.spent_share(spent) >= 1:
            progress.say("The budget is spent: the scores are not checked; search.check_scores() does it.")
            return
        try:
            scores, check = check_scores()
        except Exception:
            _logger.warning("The scores of the sites could not be checked.", exc_info=True)
            return
        progress.show(check.table())
        report.tracker.log_report(scores.save, "sensitivity")
        report.tracker.log_report(check.save, "sensitivity")

    def _close(self, report: SearchReport, front: ParetoFront) -> None:
        """Say what came out, and what is left to do."""
        records, scheduler, progress = self.study.records, self.scheduler, report.progress
        if self.warm_starts is not None and self.warm_starts.obstacle is not None:
            progress.say(f"There were no warm starts: {self.warm_starts.obstacle}.")
        if is_exhausted(records, self.budget):
            progress.say("The latest candidates had all been tried: the search ends.")
        progress.show(front.table())
        if lacking := scheduler.lacking(records):
            progress.say(f"{len(lacking)} of these lack trainings with further seeds: run more to add them.")
        if promising := scheduler.promising(records):
            numbers = ", ".join(str(record.number) for record, _ in promising)
            are = "trial is" if len(promising) == 1 else "trials are"
            progress.say(f"{len(promising)} promising {are} paused ({numbers}): run more to train on.")
        report.say_link()
