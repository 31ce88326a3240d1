"""An executor that trains new LoRA trials together."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from autopeft.core.errors import check_whole
from autopeft.core.evaluation import TrialRecord
from autopeft.core.jobs import Job, New
from autopeft.evaluation.packing.trainer import PackedTrainer
from autopeft.evaluation.trial_runner import TrialRunner


@dataclass(frozen=True)
class PackedExecutor:
    """Trains new LoRA trials in one pass over the backbone, as in `Search(executor=PackedExecutor(size=8))`.

    Every other job runs alone: resumed and replicated trials, and configurations with other methods. The
    trials of a pack see the same batches, by the seed of the first. It is meant for devices that one trial
    leaves idle, and does not pay on a CPU (`python -m benchmarks.packing`).

    Attributes:
        size: Trials that are trained together at most.

    Raises:
        ValueError: The size is below 2.
    """

    size: int = 8

    def __post_init__(self) -> None:
        check_whole("size", self.size, what="a number of trials", least=2)

    def __call__(self, runner: TrialRunner) -> PackingExecutor:
        """Return the executor of a search."""
        return PackingExecutor(runner, self.size)


class PackingExecutor:
    """The executor that a `PackedExecutor` makes; for its guarantees see `Executor`.

    Args:
        runner: Runs jobs alone, and keeps what trainings leave.
        size: Trials that are trained together at most.
    """

    def __init__(self, runner: TrialRunner, size: int) -> None:
        self._runner = runner
        self._size = size
        self._trainer = PackedTrainer(runner.evaluator)
        self._jobs: list[Job] = []
        self._finished: deque[TrialRecord] = deque()

    @property
    def free(self) -> int:
        """Jobs that fit into the next pack; 0 while finished trials are to be taken."""
        return 0 if self._finished else self._size - len(self._jobs)

    def submit(self, job: Job) -> None:
        """Take a job."""
        self._jobs.append(job)

    def wait(self) -> TrialRecord:
        """Return the record of a job, after a pack or a job alone was trained."""
        if not self._finished:
            self._train(self._jobs.pop(0))
        return self._finished.popleft()

    def _train(self, first: Job) -> None:
        runner = self._runner
        if not isinstance(first, New) or not self._can_pack(first):
            self._finished.append(runner.run(first))
            return
        pack = [first]
        pack += [
            job
            for job in self._jobs
            if isinstance(job, New) and job.rung == first.rung and self._can_pack(job)
        ]
        self._jobs = [job for job in self._jobs if job not in pack]
        trained = self._trainer.train(
            [job.configuration for job in pack],
            runner.seed(first),
            rung=first.rung,
            initial_weights=[runner.initial_weights(job) for job in pack],
        )
        self._finished += [runner.recorded(job, own) for job, own in zip(pack, trained, strict=True)]

    def _can_pack(self, job: New) -> bool:
        # What a killed process left of a trial is gone on from, alone.
        return self._trainer.can_pack(job.configuration) and not self._runner.has_left_behind(job)

    def close(self) -> None:
        """Drop jobs that were not begun."""
        self._jobs.clear()
        self._finished.clear()
