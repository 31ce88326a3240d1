"""Training members of the front again, with other seeds, to remove selection bias.

Each member is trained again until it has been trained with a given number of seeds; its values are the means,
and where these do not hold it leaves the front. While a search is young much is on its front for a moment
only: a member is trained again when a few trials with higher numbers have begun, and a third time after many.
This is the intensification of SMAC (Hutter, Hoos and Leyton-Brown, "Sequential Model-Based Optimization for
General Algorithm Configuration", 2011), with a front in place of the one incumbent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autopeft.core.evaluation import Cost, TrialRecord

# Trials before a member's second training, and how many times as many each further one waits for: a third one
# is for what outlasts most of a search of 30 trials. Chosen on MiniLM alone (questions, spam).
_REPLICATION_DELAY, _DELAY_GROWTH = 3, 8


def under_replicated(members: Iterable[TrialRecord], seeds: int) -> list[TrialRecord]:
    """Return the members of the front that were trained with fewer seeds than they are to be.

    The untrained model is the same with every seed.
    """
    return [
        record
        for record in members
        if record.evaluation.trainings < seeds and record.evaluation.values["trainable_parameters"] > 0
    ]


def replication_delay(trainings: int) -> int:
    """Return how many trials have to begin after a member that was trained so often, until it is again."""
    return int(_REPLICATION_DELAY * _DELAY_GROWTH ** (trainings - 1))


def next_to_replicate(waiting: Sequence[TrialRecord], latest: int, *, may_wait: bool) -> TrialRecord | None:
    """Return the member of the front to train again, of those that lack trainings; None where none is due.

    While trials may still be begun, a member waits for some that come after it.
    """
    due = (
        record
        for record in waiting
        if not may_wait or latest - record.number >= replication_delay(record.evaluation.trainings)
    )
    return min(due, key=lambda record: (record.evaluation.trainings, record.number), default=None)


def cost_of_replicates(waiting: Sequence[TrialRecord], seeds: int) -> Cost:
    """Return what the trainings that members of the front lack will take, by those that they had."""
    evaluations = [record.evaluation for record in waiting]
    missing = [evaluation.cost.times(seeds / evaluation.trainings - 1) for evaluation in evaluations]
    return sum(missing, Cost())


def evaluations_of(record: TrialRecord, rungs: Sequence[int]) -> int:
    """Return how often a trial was recorded: at each rung (in steps) it reached, and after each replicate."""
    trainings = record.evaluation.trainings
    if record.duplicate_of is not None:
        return 1
    if trainings > 1:
        return len(rungs) + trainings - 1
    return max(1, sum(step <= record.evaluation.cost.steps for step in rungs))
