"""What an executor is asked to do, as plain data: it can be sent to another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord

Rivals = tuple[Mapping[str, float], ...]
"""Values of the front: from a whole training, points are derived that may come onto it."""


@dataclass(frozen=True, kw_only=True)
class New:
    """Train a new trial."""

    number: int
    configuration: Configuration
    baseline: str | None = None  # the name of the baseline that it is; None where it is another configuration
    rung: int | None = None  # rung to pause at; None to train to the end
    # What became of an earlier attempt, whose cost is added; None where this is the first.
    failed: TrialRecord | None = None
    rivals: Rivals | None = None  # None where nothing is derived


@dataclass(frozen=True, kw_only=True)
class TrialJob:
    """A job on a trial that was trained before."""

    record: TrialRecord

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.record.number


@dataclass(frozen=True, kw_only=True)
class Resume(TrialJob):
    """Train a paused trial up to the rung of an index, of which the last is the whole training."""

    rung: int
    rivals: Rivals | None = None  # see `New`


@dataclass(frozen=True, kw_only=True)
class Replicate(TrialJob):
    """Train a complete trial again with another seed; `training` is its index, 1 for the first time."""

    training: int


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    """Record a trial whose configuration was tried before: nothing is trained."""

    number: int
    original: TrialRecord  # the earlier trial, whose outcome it takes over
    baseline: str | None = None  # see `New`


Job = New | Resume | Replicate | Duplicate
