"""At which optimizer steps a training is validated, and where it may pause."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from autopeft.tasks import Batch
from autopeft.training.accumulation import TrainingBatch
from autopeft.training.settings import Training


@dataclass(frozen=True, kw_only=True)
class ValidationSchedule:
    """The steps of a training that goes from stop to stop.

    Attributes:
        total_steps: Optimizer steps of a whole training.
        rungs: Steps after which a training may pause, increasing; the last is `total_steps`.
        stops: Steps after which it is validated, increasing: whole epochs, rungs and the last step.
    """

    total_steps: int
    rungs: tuple[int, ...]
    stops: tuple[int, ...]

    @classmethod
    def of(cls, training: Training, steps_per_epoch: int, shares: Sequence[float] = ()) -> ValidationSchedule:
        """Return the plan of a training.

        Args:
            training: Says how long it is, and how often it is validated.
            steps_per_epoch: Optimizer steps an epoch.
            shares: Shares of the training, in (0, 1), after which it may pause.

        Raises:
            ValueError: Two shares come to the same step, or one to none or to the whole training.
        """
        total = training.total_steps(steps_per_epoch)
        rungs = [round(share * total) for share in shares]
        if sorted({*rungs} - {0, total}) != rungs:
            steps = ", ".join(map(str, rungs))
            raise ValueError(
                f"The rungs {', '.join(f'{share:g}' for share in shares)} of {total} optimizer steps are the "
                f"steps {steps}: expected increasing steps from 1 to {total - 1}. Use fewer rungs, or train "
                "longer."
            )
        every = training.validate_every * steps_per_epoch
        stops = {*range(every, total, every), *rungs, total}
        return cls(total_steps=total, rungs=(*rungs, total), stops=tuple(sorted(stops)))

    def pieces(self, start: int, end: int) -> int:
        """Return the number of stops after `start` and up to `end`."""
        return sum(start < stop <= end for stop in self.stops)

    def next_stop(self, step: int) -> int:
        """Return the first stop after a step."""
        return self.stops[bisect_right(self.stops, step)]


class SegmentedBatches:
    """Training batches from one stop to the next at every iteration, across the ends of epochs.

    Lightning takes each iteration for an epoch, at whose end it validates.

    Args:
        loader: Has a batch sampler with `set_epoch`, that draws the same batches for the same epoch.
        plan: Where to stop.
        step: Optimizer steps already taken.
        accumulate: Parts of a batch; above 1, the sampler is a `ShuffledBatches`.
    """

    def __init__(
        self, loader: DataLoader[Batch], plan: ValidationSchedule, step: int = 0, accumulate: int = 1
    ) -> None:
        sampler: Any = loader.batch_sampler
        self._sampler = sampler if accumulate == 1 else sampler.joined(accumulate)
        self._loader = loader
        self._plan = plan
        self._step = step
        self._accumulate = accumulate
        self._epoch = -1
        self._batches: list[list[int]] = []

    def __iter__(self) -> Iterator[TrainingBatch]:
        end = self._plan.next_stop(self._step)
        steps = [self._parts(step) for step in range(self._step, end)]
        batches = iter(
            DataLoader(
                self._loader.dataset,
                batch_sampler=[part for parts in steps for part in parts],
                collate_fn=self._loader.collate_fn,
                num_workers=self._loader.num_workers,
                generator=torch.Generator(),  # it draws seeds for workers, even where there are none
            )
        )
        for parts in steps:
            self._step += 1  # before the batch is given away: an iterator may be left at its last one
            made = [next(batches) for _ in parts]
            yield made if self._accumulate > 1 else made[0]

    def _parts(self, step: int) -> list[list[int]]:
        rows = self._rows(step)
        size = -(-len(rows) // self._accumulate)
        return [rows[at : at + size] for at in range(0, len(rows), size)]

    def _rows(self, step: int) -> list[int]:
        epoch, position = divmod(step, len(self._sampler))
        if epoch != self._epoch:
            self._sampler.set_epoch(epoch)
            self._epoch, self._batches = epoch, list(self._sampler)
        return self._batches[position]
