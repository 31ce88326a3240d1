"""One call of `Search.run`: ask → evaluate → tell → record, until the budget is spent."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from optuna.study import Study

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.profiling import section
from autopeft.optimization.budget import Budget, Spent
from autopeft.optimization.proposer import Proposal, Proposer
from autopeft.optimization.seed_replication import (
    cost_of_replicates,
    evaluations_of,
    next_to_replicate,
    under_replicated,
)
from autopeft.optimization.stop_rules import is_exhausted, raise_if_hopeless
from autopeft.optimization.study_store import StudyStore
from autopeft.reporting.console import SearchProgress
from autopeft.reporting.front import ParetoFront
from autopeft.reporting.mlflow.tracking_uri import redact
from autopeft.reporting.score_validation import FEWEST_TRIALS, check_scores
from autopeft.reporting.search_profile import record_profile
from autopeft.search_identity import environment
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.training.trainer import quiet_lightning
from autopeft.training.training_checkpoint import TrainingCheckpoints
from autopeft.trial_runner import TrialRunner

if TYPE_CHECKING:
    from autopeft.reporting.mlflow.tracker import Tracker
    from autopeft.search import Search

_logger = logging.getLogger(__name__)

TrialCallback = Callable[[TrialRecord, ParetoFront], None]


class SearchLoop:
    """One call of `Search.run`: ask → evaluate → tell → record, until the budget is spent."""

    def __init__(
        self,
        search: Search,
        store: StudyStore,
        budget: Budget,
        *,
        progress: bool,
        callbacks: Sequence[TrialCallback] = (),
    ) -> None:
        self.search = search
        self.callbacks = callbacks
        self.store = store
        self.budget = budget
        self.axes = search.axes()
        self.checkpoints = AdapterCheckpoints(search.folder / "adapters")
        self.paused = TrainingCheckpoints(search.folder / "paused")
        self.promotion = search.promotion()
        self.warm_starts = search.warm_starts()
        self.training = TrialRunner(
            search.evaluator,
            self.checkpoints,
            self.paused,
            seed=search.seed,
            seeds=search.seeds,
            warm_starts=self.warm_starts,
        )
        self.proposer = Proposer(
            search.space,
            search.backbone,
            search.sampler,
            objectives=search.objectives,
            axes=self.axes,
            constraints=search.constraints,
            baselines=search.baselines,
            trials=budget.trials,
            forecast=None if self.promotion is None else self.promotion.forecast,
            are_states_served=self._are_states_served,
            view=self._view,
        )
        self._running: dict[int, Proposal] = {}
        self.progress = SearchProgress(search.objectives, enabled=progress)
        self.tracker: Tracker | None = None
        self._known: dict[str, TrialRecord] = {}
        for record in store.records:
            self._know(record)
        self._has_run = False
        rungs = search.evaluator.plan.rungs
        self._evaluations = sum(evaluations_of(record, rungs) for record in store.records)
        self._evaluations_at_start = self._evaluations
        self._started = time.monotonic()
        self._spent = self._sum()
        self._share_at_start = budget.spent_share(self._spent)

    @property
    def records(self) -> Sequence[TrialRecord]:
        """Every finished trial so far."""
        return self.store.records

    def front(self) -> ParetoFront:
        """Return the front so far."""
        return ParetoFront(self.records, self.search.objectives, self.axes, self.search)

    def run(self) -> ParetoFront:
        """Run trials until the budget is spent, and leave study, runs and front in order."""
        self._prepare()
        status: Literal["FINISHED", "KILLED", "FAILED"] = "FAILED"
        front = self.front()
        try:
            with self.progress, quiet_lightning():
                self._announce(front)
                while self._goes_on(front):
                    front = self._step(front)
            self._check_scores(front)
            if self.warm_starts is not None and self.warm_starts.obstacle is not None and self._has_run:
                self.progress.say(f"There were no warm starts: {self.warm_starts.obstacle}.")
            status = "FINISHED"
        except KeyboardInterrupt:
            status, front = "KILLED", self.front()
            self.progress.say("Interrupted: finished trials are kept, the same call resumes.")
        finally:
            if self.tracker is not None:
                self.tracker.publish_front(self.records, self.front().members)
            try:
                done = self._evaluations - self._evaluations_at_start
                record_profile(self.search.folder, done, self.tracker, self.progress)
            finally:
                if self.tracker is not None:
                    self.tracker.finish(status, self.records)
        self._close(front)
        return front

    def _prepare(self) -> None:
        search = self.search
        self.store.check_identity(search.identity)
        self.store.set_attribute("metrics", list(search.task.metrics))
        axes = [[one.objective.name, one.worst, one.best] for one in self.axes]
        self.store.set_attribute("axes", axes)
        self._drop_tensors(self.front())
        if search.tracking is not None:
            from autopeft.reporting.mlflow.tracker import (
                Tracker,  # MLflow is a fifth of what importing all takes
            )

            self.tracker = Tracker(
                search.tracking,
                experiment=search.experiment,
                search_name=search.name,
                study_id=self.store.study_id,
                objectives=search.objectives,
            )
            self.tracker.start(
                note=search.describe(),
                identity={**search.identity, "environment": environment()},
                records=self.records,
                members=self.front().members,
            )

    def _announce(self, front: ParetoFront) -> None:
        self.progress.say(self.search.describe())
        if self.records:
            self.progress.say(f"Resuming with {len(self.records)} finished trials.")
        self._say_link()
        self._show(front)

    def _goes_on(self, front: ParetoFront) -> bool:
        """Whether there is more to do; when all trials are begun, some are trained on, or again."""
        if self.budget.spent_share(self._spent) < 1 and not self._is_used_up():
            return True
        only_trials_are_spent = self.budget.spent_share(replace(self._spent, trials=0)) < 1
        is_left = self._promoted() is not None or self._to_repeat(front) is not None
        return only_trials_are_spent and is_left

    def _is_used_up(self) -> bool:
        return is_exhausted(self.records, self.budget)

    @section("ask")
    def _promoted(self) -> tuple[TrialRecord, int] | None:
        return None if self.promotion is None else self.promotion.next(self.records)

    def _to_repeat(self, front: ParetoFront) -> TrialRecord | None:
        """Return who is to be trained again; nobody waits when the budget is just enough for those who do."""
        waiting = self._lacking(front)
        repeats = cost_of_replicates(waiting, self.search.seeds)
        if self.warm_starts is not None:
            evaluations = [record.evaluation for record in waiting]
            repeats += self.warm_starts.cost_to_come(evaluations, self.search.seeds)
        may_wait = self.budget.spent_share(self._spent, repeats) < 1 and not self._is_used_up()
        return next_to_replicate(waiting, len(self.records) - 1, may_wait=may_wait)

    def _lacking(self, front: ParetoFront) -> list[TrialRecord]:
        return under_replicated((point.record for point in front), self.search.seeds)

    def _step(self, front: ParetoFront) -> ParetoFront:
        """Do what is worth most: who stays on the front is trained again before others go on or begin."""
        if (to_repeat := self._to_repeat(front)) is not None:
            return self._repeat(to_repeat, front)
        promoted = self._promoted()
        return self._begin(front) if promoted is None else self._continue(*promoted, front)

    def _continue(self, record: TrialRecord, rung: int, front: ParetoFront) -> ParetoFront:
        """Train a paused trial on to a rung; at the last one it completes."""
        self._show_running({record.number: record.evaluation.configuration})
        return self._update(self.training.go_on(record, front, rung), front)

    def _repeat(self, record: TrialRecord, front: ParetoFront) -> ParetoFront:
        """Train a member of the front again, with another seed."""
        self._show_running({record.number: record.evaluation.configuration})
        return self._update(self.training.repeat(record), front)

    def _show_running(self, trials: Mapping[int, Configuration]) -> None:
        self.progress.running(list(trials))
        if self.tracker is not None:
            self.tracker.trials_started(trials)

    def _update(self, record: TrialRecord, front: ParetoFront) -> ParetoFront:
        """Keep what became of a trial that was known."""
        _, *duplicates = self.store.tell(record)
        for duplicate in duplicates:
            front = front.with_trial(duplicate)
            if self.tracker is not None:
                self.tracker.trial_finished(duplicate)
        if record.evaluation.status != "paused":
            self.paused.drop(record.number)
        self._spent = self._sum()
        return self._after([record], front)

    def _begin(self, front: ParetoFront) -> ParetoFront:
        """Begin a trial, or as many as are trained together."""
        self._running = {}
        for _ in range(self.budget.at_most(1, self._spent)):
            pending = [proposal.configuration for proposal in self._running.values()]
            number = len(self.records) + len(pending)
            self._running[number] = self.proposer.propose(number, self.records, pending)
        records = self._train(self._running, front)
        for record in records:
            proposal = self._running[record.number]
            self.store.tell(record, proposal.parameters, proposal.distributions, proposal.attributes)
        if self.warm_starts is None:
            for record in records:
                self._spent = self._spent.plus(record)
        else:  # a supernet may have been trained
            self._spent = self._sum()
        return self._after(records, front)

    def _view(self) -> Study:
        forecast = None if self.promotion is None else self.promotion.forecast(self.records).values
        running = self._running.values()
        return self.store.sampler_view(self.search.sampler, expected=forecast, running=running)

    def _are_states_served(self, block: int) -> bool:
        return self.search.evaluator.prefixes.is_served(block)

    def _train(self, asked: Mapping[int, Proposal], front: ParetoFront) -> list[TrialRecord]:
        """Train what was asked for, each configuration once; what was tried before is not trained again."""
        new: dict[str, int] = {}
        for number, proposal in asked.items():
            if proposal.configuration.key not in self._known:
                new.setdefault(proposal.configuration.key, number)
        configurations = {number: asked[number].configuration for number in new.values()}
        if new:
            self._show_running(configurations)
        rung = None if self.promotion is None else 0
        references = [number for number in new.values() if asked[number].baseline is not None]
        trained = self.training.begin(configurations, front, rung=rung, references=references)
        records = []
        for number, proposal in asked.items():
            key = proposal.configuration.key
            twin = self._known.get(key) or trained[new[key]]
            duplicate_of = None if number == twin.number else twin.number
            records.append(
                TrialRecord(
                    number=number,
                    evaluation=twin.evaluation,
                    duplicate_of=duplicate_of,
                    baseline=proposal.baseline,
                )
            )
        return records

    def _sum(self) -> Spent:
        """Return what was spent on all trials and on the supernets."""
        spent = Spent.of(self.records)
        return spent if self.warm_starts is None else replace(spent, cost=spent.cost + self.warm_starts.cost)

    @section("record")
    def _after(self, records: Sequence[TrialRecord], front: ParetoFront) -> ParetoFront:
        """Say what became of trials that were trained together; return the front with all of them."""
        before = front.members
        for record in records:
            self._know(record)
            front = front.with_trial(record)
        self._has_run = True
        if front.members != before or any(one.evaluation.by_seed for one in records):
            self._drop_tensors(front)
        for record in records:
            self._evaluations += 1
            self.progress.finished(record, on_front=record.number in front.members)
            self._show(front)
            self._track(record, front, changed=front.members != before)
            with section("callbacks"):
                for callback in self.callbacks:
                    callback(record, front)
        raise_if_hopeless(self.records)
        return front

    def _know(self, record: TrialRecord) -> None:
        """Remember what its configuration gave; one that failed may be tried again."""
        if record.duplicate_of is not None:
            return
        key = record.evaluation.configuration.key
        if record.evaluation.status in ("complete", "paused"):
            self._known[key] = record
        else:
            self._known.pop(key, None)

    def _drop_tensors(self, front: ParetoFront) -> None:
        """Keep the tensors of the front and of who was trained again; all, while members may yet fall."""
        if not self._lacking(front):
            repeated = {one.number for one in self.records if one.evaluation.by_seed}
            self.checkpoints.keep_only(front.members | repeated)

    @section("other")
    def _show(self, front: ParetoFront) -> None:
        share = self.budget.spent_share(self._spent)
        progressed = share - self._share_at_start
        elapsed = time.monotonic() - self._started
        self.progress.update(
            share,
            front_size=len(front),
            hypervolume=front.hypervolume,
            seconds_left=elapsed / progressed * max(0.0, 1 - share) if progressed > 0 else None,
        )

    @section("log")
    def _track(self, record: TrialRecord, front: ParetoFront, *, changed: bool) -> None:
        if self.tracker is None:
            return
        if changed:
            self.tracker.front_changed(front.members)
        self.tracker.trial_finished(record)
        cost = self._spent.cost
        self.tracker.progress(
            {
                "hypervolume": front.hypervolume,
                "front_size": float(len(front)),
                "cost/wall_seconds": cost.wall_seconds,
                "cost/cpu_seconds": cost.cpu_seconds,
                "cost/gpu_seconds": cost.gpu_seconds,
                "cost/steps": float(cost.steps),
            },
            step=self._evaluations - 1,
        )
        if self.tracker.is_front_due:
            self.tracker.publish_front(list(self.records), front.members)

    def _check_scores(self, front: ParetoFront) -> None:
        """Say how well the scores would have ranked the trials; a search never fails by it."""
        search = self.search
        known = [one for one in self.records if one.duplicate_of is None]
        complete = sum(one.evaluation.status == "complete" for one in known)
        if not search.score_check or not self._has_run or complete < FEWEST_TRIALS:
            return
        try:
            report = search.sensitivity()
            check = check_scores(self.records, report.scores, front.metric)
        except Exception:
            _logger.warning("The scores of the sites could not be checked.", exc_info=True)
            return
        self.progress.show(check.table())
        if self.tracker is not None:
            self.tracker.log_report(report.save, "sensitivity")
            self.tracker.log_report(check.save, "sensitivity")

    def _close(self, front: ParetoFront) -> None:
        if self._is_used_up() and not self._goes_on(front):
            self.progress.say("The latest candidates had all been tried: the search ends.")
        self.progress.show(front.table())
        if fewer := len(self._lacking(front)):
            self.progress.say(
                f"{fewer} of these were not trained with every seed; with budget left, a call goes on."
            )
        self._say_link()

    def _say_link(self) -> None:
        if self.tracker is None:
            return
        self.progress.say(f"MLflow: {self.tracker.link}")
        uri = redact(str(self.search.tracking))
        if not uri.startswith("http"):
            self.progress.say(f"        (served by: autopeft ui --tracking {uri})")
