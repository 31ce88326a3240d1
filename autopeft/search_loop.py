"""One call of `Search.run`: ask → evaluate → tell → record, until the budget is spent."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from optuna.trial import Trial, TrialState

from autopeft.budget import Budget, Spent
from autopeft.checkpoints import Checkpoints
from autopeft.configuration import Configuration
from autopeft.dead_ends import refuse_hopeless, used_up
from autopeft.evaluation import Evaluation, TrialRecord
from autopeft.front import ParetoFront
from autopeft.garbage import settled_objects
from autopeft.gathered_trial import GatheredTrial
from autopeft.identity import environment
from autopeft.pareto import contributions
from autopeft.paused_training import PausedTrainings
from autopeft.profiling import section
from autopeft.progress import SearchProgress
from autopeft.score_check import FEWEST_TRIALS, check_scores
from autopeft.search_profile import record_profile
from autopeft.search_spaces import History
from autopeft.study_store import StudyStore
from autopeft.tracking import Tracker
from autopeft.training import quiet_lightning

if TYPE_CHECKING:
    from autopeft.search import Search

_logger = logging.getLogger(__name__)
_ANCHOR = "autopeft:anchor"
_PUBLISH_EVERY_SECONDS = 60.0
_STATES = {
    "complete": TrialState.COMPLETE,
    "paused": TrialState.RUNNING,
    "infeasible": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


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
        self.checkpoints = Checkpoints(search.folder / "adapters")
        self.paused = PausedTrainings(search.folder / "paused")
        self.promotion = search.promotion()
        self.elastic = search.elastic_proposals()
        self.progress = SearchProgress(search.objectives, enabled=progress)
        self.tracker: Tracker | None = None
        self._known = {
            record.evaluation.configuration.key: record
            for record in reversed(store.records)
            if record.evaluation.status in ("complete", "paused") and record.duplicate_of is None
        }
        self._has_run = False
        rungs = search.evaluator.plan.rungs
        self._evaluations = sum(
            max(1, sum(step <= record.evaluation.cost.steps for step in rungs)) for record in store.records
        )
        self._evaluations_at_start = self._evaluations
        self._published = -math.inf  # the first trial is to be seen at once
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
            with self.progress, quiet_lightning(), settled_objects():
                self._announce(front)
                while self._goes_on():
                    front = self._step(front)
            self._check_scores(front)
            if self.elastic is not None and self._has_run:
                self.elastic.report(self.records, self.progress.say, self.tracker)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
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
        self.checkpoints.keep_only(self.front().members)
        if search.anchors:
            tried = {record.anchor for record in self.records}
            for anchor in search.space.anchors(search.backbone):
                if anchor.name not in tried:
                    self.store.live.enqueue_trial(
                        search.space.encode(anchor.configuration, search.backbone),
                        user_attrs={_ANCHOR: anchor.name},
                    )
        if search.tracking is not None:
            self.tracker = Tracker(
                search.tracking,
                experiment=search.experiment,
                search_name=search.name,
                objectives=search.objectives,
                **({"ui_url": search.tracking} if search.tracking.startswith("http") else {}),
            )
            self.tracker.start(
                note=search.describe(),
                identity={**search.identity, "environment": environment()},
                records=self.records,
            )

    def _announce(self, front: ParetoFront) -> None:
        self.progress.say(self.search.describe())
        if self.records:
            self.progress.say(f"Resuming with {len(self.records)} finished trials.")
        self._say_link()
        self._show(front)

    def _goes_on(self) -> bool:
        """Whether there is more to do; when all trials are begun, the promising ones are trained on."""
        if self.budget.spent_share(self._spent) < 1:
            return not self._used_up()
        only_trials_are_spent = self.budget.spent_share(replace(self._spent, trials=0)) < 1
        return only_trials_are_spent and self._promoted() is not None

    @section("ask")
    def _promoted(self) -> tuple[TrialRecord, int] | None:
        return None if self.promotion is None else self.promotion.next(self.records)

    def _step(self, front: ParetoFront) -> ParetoFront:
        promoted = self._promoted()
        return self._begin(front) if promoted is None else self._continue(*promoted, front)

    def _continue(self, record: TrialRecord, rung: int, front: ParetoFront) -> ParetoFront:
        """Train a paused trial on to a rung; at the last one it completes."""
        self.progress.running(record.number)
        if self.tracker is not None:
            self.tracker.trial_started(record.number, record.evaluation.configuration)
        record = self._train(record.number, record.evaluation.configuration, front, record.anchor, rung)
        evaluation = record.evaluation
        objectives = self.search.objectives
        values = (
            [evaluation.values[one.name] for one in objectives] if evaluation.status == "complete" else None
        )
        self.store.update(record, _STATES[evaluation.status], values)
        if evaluation.status != "paused":
            self.paused.drop(record.number)
        self._spent = self._sum()
        return self._after(record, front)

    def _begin(self, front: ParetoFront) -> ParetoFront:
        self._propose(front)
        with section("ask"):
            trial = GatheredTrial.of(self.store.live.ask())
            configuration = self.search.space.suggest(trial, self.search.backbone)
            if isinstance(trial, GatheredTrial):
                trial.write()
        self.progress.running(trial.number)
        twin = self._known.get(configuration.key)
        if twin is not None:
            record = TrialRecord(
                number=trial.number,
                evaluation=twin.evaluation,
                duplicate_of=twin.number,
                anchor=trial.user_attrs.get(_ANCHOR),
            )
        else:
            record = self._evaluate(trial, configuration, front)
        self._tell(trial, record.evaluation)
        finished = self.store.live.get_trials(deepcopy=False)[trial.number]
        self.store.save(record, finished)
        self._spent = self._spent.plus(record)
        return self._after(record, front)

    @section("ask")
    def _propose(self, front: ParetoFront) -> None:
        """Let the space say what the next trial tries, unless an anchor is waiting."""
        live, search = self.store.live, self.search
        if live.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return
        number = len(live.get_trials(deepcopy=False))
        if self.elastic is not None:
            points = {point.configuration: point.values for point in front}
            proposed = self.elastic.propose(number, self.records, points)
            self._spent = self._sum()
            if proposed is not None:
                live.enqueue_trial(proposed)
                return
        if not search.space.proposes(number):  # what each point adds to the hypervolume is work
            return
        shares = contributions([point.values for point in front], self.axes)
        parents = {point.configuration: share for point, share in zip(front, shares, strict=True)}
        generator = random.Random(f"{search.seed}:{number}")
        proposal = search.space.propose(number, parents, generator, search.backbone, self._history())
        if proposal is not None:
            live.enqueue_trial(dict(proposal))

    def _history(self) -> History:
        """Return every trial with the values known of it; a failed training has the worst of the metrics."""
        worst = {one.objective.name: one.worst for one in self.axes if not one.objective.before_training}
        names = [objective.name for objective in self.search.objectives]
        forecast = None if self.promotion is None else self.promotion.forecast(self.records)
        trials = []
        for evaluation in (one.evaluation for one in self.records if one.duplicate_of is None):
            values = dict(evaluation.values)
            if evaluation.status == "failed":
                values |= worst
            elif evaluation.status == "paused" and forecast is not None:
                values |= dict(zip(names, forecast.values(evaluation), strict=True))
            trials.append((evaluation.configuration, values))
        constraints, served = self.search.constraints, self.search.training.frozen_prefix == "cached"
        return History(trials=trials, axes=self.axes, constraints=constraints, is_prefix_served=served)

    def _sum(self) -> Spent:
        """Return what was spent on all trials, and on the elastic adapter."""
        spent = Spent.of(self.records)
        return spent if self.elastic is None else replace(spent, cost=spent.cost + self.elastic.cost)

    def _evaluate(self, trial: Trial, configuration: Configuration, front: ParetoFront) -> TrialRecord:
        if self.tracker is not None:
            self.tracker.trial_started(trial.number, configuration)
        return self._train(trial.number, configuration, front, trial.user_attrs.get(_ANCHOR), 0)

    def _train(
        self, number: int, configuration: Configuration, front: ParetoFront, anchor: str | None, rung: int
    ) -> TrialRecord:
        """Train a trial up to a rung, from where it paused, and keep what it left."""
        train = self.search.evaluator.train
        if self.promotion is None:
            trained = train(configuration)
        else:
            trained = train(configuration, rung=rung, paused=self.paused.load(number))
        record = TrialRecord(number=number, evaluation=trained.evaluation, anchor=anchor)
        # Before the trial is recorded: it must never be without its tensors.
        if trained.paused is not None:
            self.paused.save(number, trained.paused)
        if trained.state is not None and number in front.with_trial(record).members:
            self.checkpoints.save(number, trained.state)
        return record

    @section("record")
    def _tell(self, trial: Trial, evaluation: Evaluation) -> None:
        """Tell Optuna: constraints on every trial, values of complete ones, a state for the others.

        An infeasible candidate is a pruned trial that breaks its constraints, which is how samplers
        learn where not to go without being shown a score it never had.
        """
        known = evaluation.values
        for constraint in self.search.constraints:
            name = constraint.objective.name
            trial.set_constraint(name, constraint.violation(known) if name in known else 0.0)
        values, state = None, None
        if evaluation.status == "complete":
            values = [known[objective.name] for objective in self.search.objectives]
        elif evaluation.status == "paused":
            assert self.promotion is not None
            values = self.promotion.forecast(self.records).values(evaluation)
        else:
            state = _STATES[evaluation.status]
        self.store.live.tell(trial, values, state)

    @section("record")
    def _after(self, record: TrialRecord, front: ParetoFront) -> ParetoFront:
        if record.duplicate_of is None and record.evaluation.status in ("complete", "paused"):
            self._known[record.evaluation.configuration.key] = record
        self._has_run = True
        self._evaluations += 1
        before, front = front.members, front.with_trial(record)
        if front.members != before:
            self.checkpoints.keep_only(front.members)
        self.progress.finished(record, on_front=record.number in front.members)
        self._show(front)
        self._track(record, front, changed=front.members != before)
        with section("callbacks"):
            for callback in self.callbacks:
                callback(record, front)
        refuse_hopeless(self.records)
        return front

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
        if time.monotonic() - self._published > _PUBLISH_EVERY_SECONDS:
            self._published = time.monotonic()
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

    def _used_up(self) -> bool:
        found = used_up(self.records, self.budget)
        if found:
            self.progress.say("The latest candidates had all been tried: the search ends.")
        return found

    def _close(self, front: ParetoFront) -> None:
        if self.progress.enabled:
            self.progress.show(front.table())
            self._say_link()

    def _say_link(self) -> None:
        if self.tracker is None:
            return
        self.progress.say(f"MLflow: {self.tracker.link}")
        uri = str(self.search.tracking)
        if not uri.startswith("http"):
            self.progress.say(f"        (served by: autopeft ui --tracking {uri})")
