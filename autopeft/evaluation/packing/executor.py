"""An executor that trains new LoRA trials together."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from autopeft.core.errors import check_whole
from autopeft.core.evaluation import TrialRecord
from autopeft.core.jobs import New
from autopeft.evaluation.executor import LocalExecutor
from autopeft.evaluation.packing.trainer import PackedTrainer
from autopeft.evaluation.run import Trained
from autopeft.evaluation.trial_runner import TrialRunner


@dataclass(frozen=True)
class PackedExecutor:
    """Trains new LoRA trials in one pass over the backbone, as in `Search(executor=PackedExecutor(size=8))`.

    Every other job runs alone: resumed and replicated trials, and configurations with other methods. The
    trials of a pack have the seed of the first. It is meant for devices that one trial leaves idle, and does
    not pay on a CPU (`python -m benchmarks.packing`).

    Attributes:
        size: Trials that are trained together at most.

    Raises:
        ValueError: The size is below 2.
    """

    size: int = 8

    def __post_init__(self) -> None:
        check_whole("size", self.size, what="a number of trials", least=2)

    def __call__(self, runner: TrialRunner) -> _PackedJobs:
        """Return an executor that runs jobs in this process.

        Raises:
            ValueError: The backbone lies on several devices.
        """
        return _PackedJobs(runner, self.size)


class _PackedJobs(LocalExecutor):
    """Runs jobs when they are waited for, new LoRA trials together."""

    serves_hidden_states = False  # frozen blocks run once for all of a pack

    def __init__(self, runner: TrialRunner, size: int) -> None:
        if len(runner.evaluator.backbone.devices) > 1:
            raise ValueError("PackedExecutor is for a backbone on one device: leave out device_map or it.")
        super().__init__(runner)
        self._trainer = PackedTrainer(runner.evaluator)
        self._size = size
        self._trained: deque[tuple[New, Trained]] = deque()

    @property
    def free(self) -> int:
        return 0 if self._trained else self._size - len(self._jobs)

    def wait(self) -> TrialRecord:
        runner = self._runner
        if not self._trained:
            if len(pack := self._pack()) < 2:
                return super().wait()
            for job in pack:
                self._jobs.remove(job)
            trained = self._trainer.train(
                [job.configuration for job in pack],
                runner.seed_of(pack[0]),
                rung=pack[0].rung,
                initial_weights=[runner.initial_weights(job) for job in pack],
            )
            self._trained.extend(zip(pack, trained, strict=True))
        # Files are written with a trial's own record: the loop deletes those of trials that it does not know.
        return runner.recorded(*self._trained.popleft())

    def _pack(self) -> list[New]:
        """Return the first job and all that can be trained together with it; none if it is to run alone."""
        new = [job for job in self._jobs if isinstance(job, New) and self._can_pack(job)]
        return [job for job in new if job.rung == new[0].rung] if self._jobs[0] in new else []

    def _can_pack(self, job: New) -> bool:
        # What a killed process has left of a trial is resumed alone.
        return self._trainer.can_pack(job.configuration) and self._runner.left_behind(job) is None

    def close(self) -> None:
        super().close()
        self._trained.clear()
