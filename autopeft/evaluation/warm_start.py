"""Warm starts: the largest LoRA of a search, trained once a seed, and what its trials inherit from it."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from autopeft.core.configuration import Configuration
from autopeft.core.durable_files import load_json, save_json
from autopeft.core.evaluation import Cost, Evaluation
from autopeft.core.seeding import training_seed
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.largest_lora import METHOD, LargestLora, largest_lora
from autopeft.evaluation.run import InitialWeights, reason_of_failure
from autopeft.search_spaces import SearchSpace

_logger = logging.getLogger(__name__)


class WarmStartError(ValueError):
    """There is nothing to initialise a training from."""


@dataclass(frozen=True)
class _Failure:
    """Why a training failed, and its cost."""

    reason: str
    cost: Cost


@dataclass(eq=False)
class WarmStarts:
    """The largest LoRA of a search, trained when first needed and kept in a folder, so that a search resumes.

    Training 0 initialises the first training of every trial, training n that with the n-th further seed:
    otherwise the noise of one training would bias all trials.
    """

    evaluator: Evaluator  # trains it
    space: SearchSpace  # whose largest LoRA it is
    folder: Path  # where it is kept
    trains: bool = True  # whether to train what is missing; only processes that run the search may

    def __post_init__(self) -> None:
        self._trained: dict[int, LargestLora] = {}
        self._failures: dict[int, _Failure] = {}
        self._failures_path = self.folder / "failures.json"
        self._read()

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how another process makes its own, of the files."""
        return type(self), (self.evaluator, self.space, self.folder, self.trains)

    def _read(self) -> None:
        """Read what is new in the folder."""
        for number, failure in (load_json(self._failures_path) or {}).items():
            self._failures[int(number)] = _Failure(failure["reason"], Cost(**failure["cost"]))
        for path in self.folder.glob("largest-*.safetensors"):
            number = int(path.stem.partition("-")[2])
            if number not in self._trained and (trained := LargestLora.load(path)) is not None:
                self._trained[number] = trained

    def has(self, number: int) -> bool:
        """Return whether a training is over, or has failed, in this process or another."""
        if number not in self._trained and number not in self._failures:
            self._read()
        return number in self._trained or number in self._failures

    @property
    def cost(self) -> Cost:
        """Compute of all trainings, failed ones and those of other processes included."""
        self._read()
        trained = (largest.cost for largest in self._trained.values())
        failed = (failure.cost for failure in self._failures.values())
        return sum((*trained, *failed), Cost())

    @property
    def obstacle(self) -> str | None:
        """Why there is no training 0; None while there is or may be one."""
        return self._failures[0].reason if 0 in self._failures else None

    def largest(self, number: int = 0) -> LargestLora | None:
        """Return what the trainings `number` of trials inherit from, trained if needed; None without."""
        if self.trains and not self.has(number):
            self._train(number)
        return self._trained.get(number)

    def cost_to_come(self, evaluations: Iterable[Evaluation], seeds: int) -> Cost:
        """Return what is still to be trained, as expected, for so many trainings of each of these trials."""
        first = self._trained.get(0)
        if first is None:
            return Cost()
        fewest = min((each.trainings for each in evaluations if each.warm_start), default=seeds)
        missing = {*range(fewest, seeds)} - self._trained.keys() - self._failures.keys()
        return sum((first.cost for _ in missing), Cost())

    def inherits(self, configuration: Configuration) -> bool:
        """Return whether a new trial begins from the largest LoRA, if that has all of it."""
        return set(configuration.methods) <= {METHOD}

    def for_new_trial(self, configuration: Configuration) -> InitialWeights | None:
        """Return the initial weights of a new trial; None where it starts from random weights."""
        if not self.inherits(configuration):
            return None
        largest = self.largest()
        if largest is None or not largest.contains(configuration):
            return None
        return largest.state(configuration)

    def _train(self, number: int) -> None:
        try:
            configuration = self._configuration()
        except ValueError as error:
            self._fail(number, _Failure(str(error).removesuffix("."), Cost()))
            _logger.warning("There are no warm starts: %s.", self._failures[number].reason)
            return
        seed = self.evaluator.seed if number == 0 else training_seed(self.evaluator.seed, -1, number)
        trained = self.evaluator.train(configuration, seed, is_trial=False)
        reason, cost = trained.evaluation.reason, trained.evaluation.cost
        if trained.state is not None:
            largest = LargestLora(configuration=configuration, tensors=trained.state, cost=cost)
            reason = reason_of_failure(partial(largest.save, self._path(number)))
            if reason is None:
                self._trained[number] = largest
                return
        failure = _Failure(f"the training of the largest LoRA failed: {reason}", cost)
        self._fail(number, failure)
        _logger.warning("%s: %s", self._path(number).stem, failure.reason)

    def _fail(self, number: int, failure: _Failure) -> None:
        """Note a failure: neither a resumed search nor another process is to train it again."""
        self._read()  # what others noted meanwhile is kept
        self._failures[number] = failure
        failures = {str(number): asdict(failure) for number, failure in self._failures.items()}
        save_json(self._failures_path, failures)

    def _configuration(self) -> Configuration:
        """Return the largest LoRA, from the lowest site up at which it keeps a bound on peak memory.

        That may stand for what the device has. Other constraints bind trials alone: what keeps them can be
        cut from what does not.

        Raises:
            ValueError: There is none.
        """
        evaluator = self.evaluator
        whole = largest_lora(self.space, evaluator.backbone, evaluator.seed)
        if whole is None:
            raise ValueError("the space has no LoRA on a linear layer")
        evaluator.backbone.check(whole)
        bound = next((each for each in evaluator.constraints if each.objective.name == "peak_memory"), None)
        if bound is None:
            return whole
        sites = [*whole.adapters.items()]
        upper = [whole.replace(adapters=dict(sites[lowest:])) for lowest in range(len(sites))]
        lowest = bisect_left(upper, True, key=lambda part: bound.violation(evaluator.costs(part)) <= 0)
        if lowest == len(upper):
            raise ValueError("LoRA of the largest rank breaks the bound on peak memory at every site")
        return upper[lowest]

    def _path(self, number: int) -> Path:
        return self.folder / f"largest-{number}.safetensors"


def initial_weights(
    warm_starts: WarmStarts | None, evaluation: Evaluation, training: int = 0
) -> InitialWeights | None:
    """Return the initial weights of a trial's `training`, from 0; None for random weights.

    They are cut from that training of the largest LoRA, and from training 0 where that one failed.

    Raises:
        WarmStartError: The trial inherited its weights, and what it inherited from is gone.
    """
    if not evaluation.warm_start:
        return None
    if warm_starts is None:
        raise WarmStartError(
            "The trial was initialised from the largest LoRA: give the search warm_start=True, with which it "
            "ran."
        )
    largest = warm_starts.largest(training) or warm_starts.largest()
    if largest is None:
        why = warm_starts.obstacle or f"there is no file largest-0.safetensors in {warm_starts.folder}"
        raise WarmStartError(f"The largest LoRA that the trial was initialised from is gone: {why}.")
    return largest.state(evaluation.configuration)
