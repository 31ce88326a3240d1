"""The supernets of a search, and the weights that its trainings are initialised from."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.durable_files import load_json, save_json
from autopeft.core.errors import check_numbers
from autopeft.core.evaluation import Cost, Evaluation
from autopeft.core.seeding import training_seed
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.run import InitialWeights, reason_of_failure
from autopeft.evaluation.supernet.supernet import METHOD, LoraSupernet
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import SearchSpace
from autopeft.training.compute_meter import ComputeMeter

_logger = logging.getLogger(__name__)

_DRAWS = 32


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Initialise trials from a LoRA supernet that is trained once a search.

    Trials that have LoRA alone are initialised from it, baselines apart; further trainings of a trial with
    other seeds from supernets of their own. A supernet is trained when it is first needed, and its compute
    is part of what the search costs.

    Attributes:
        trainings: Length of a supernet's training, in trainings of one configuration.

    Raises:
        ValueError: The length is not above 0.
    """

    trainings: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(above=0, trainings=self.trainings)

    def describe(self) -> str:
        """Describe the settings in a line."""
        return f"LoRA trials are initialised from a supernet of {self.trainings:g} trainings"


class WarmStartError(ValueError):
    """There is no supernet to initialise a training from."""


@dataclass(frozen=True)
class _Failure:
    """Why a supernet's training failed, and its cost."""

    reason: str
    cost: Cost


@dataclass(eq=False)
class WarmStarts:
    """The supernets of a search, trained when first needed and kept in a folder, so that a search resumes.

    Supernet 0 initialises the first training of every trial, supernet n the training with the n-th further
    seed: with one supernet for all, its luck would be taken for the quality of the trials.
    """

    settings: WarmStart  # length of the training
    evaluator: Evaluator  # trains the supernets
    space: SearchSpace  # the largest LoRA of its configurations becomes the supernet's
    folder: Path  # where supernets are kept
    trains: bool = True  # whether to train those that are missing; only the process that runs the search may

    def __post_init__(self) -> None:
        self._supernets: dict[int, LoraSupernet] = {}
        self._failures_path = self.folder / "failures.json"
        self._failures = {
            int(number): _Failure(failure["reason"], Cost(**failure["cost"]))
            for number, failure in (load_json(self._failures_path) or {}).items()
        }
        for path in self.folder.glob("supernet-*.safetensors"):
            supernet = LoraSupernet.load(path)
            if supernet is not None:
                self._supernets[int(path.stem.partition("-")[2])] = supernet

    @property
    def cost(self) -> Cost:
        """Compute of all trainings, failed ones included."""
        trained = (supernet.cost for supernet in self._supernets.values())
        failed = (failure.cost for failure in self._failures.values())
        return sum((*trained, *failed), Cost())

    @property
    def obstacle(self) -> str | None:
        """Why there is no supernet 0; None while there is or may be one."""
        return self._failures[0].reason if 0 in self._failures else None

    def supernet(self, number: int = 0) -> LoraSupernet | None:
        """Return the supernet of the trials' training `number`, trained if needed; None if there is none."""
        if self.trains and number not in self._supernets and number not in self._failures:
            self._train(number)
        return self._supernets.get(number)

    def cost_to_come(self, evaluations: Iterable[Evaluation], seeds: int) -> Cost:
        """Return the expected cost of the supernets that these trials need for so many trainings of each."""
        first = self._supernets.get(0)
        if first is None:
            return Cost()
        fewest = min((each.trainings for each in evaluations if each.warm_start), default=seeds)
        missing = {*range(fewest, seeds)} - self._supernets.keys() - self._failures.keys()
        return sum((first.cost for _ in missing), Cost())

    def for_new_trial(self, configuration: Configuration) -> InitialWeights | None:
        """Return the initial weights of a new trial; None where it starts from random weights."""
        if not set(configuration.methods) <= {METHOD}:
            return None
        supernet = self.supernet()
        if supernet is None or not supernet.contains(configuration):
            return None
        return supernet.state(configuration)

    def _train(self, number: int) -> None:
        largest = largest_lora(self.space, self.evaluator.backbone, self.evaluator.seed)
        if largest is None:
            self._failures[number] = _Failure("the space has no configuration of LoRA alone", Cost())
            return
        meter = ComputeMeter(self.evaluator.device)
        reason = reason_of_failure(partial(self._train_and_save, number, largest))
        if reason is not None:
            failure = _Failure(f"the supernet's training failed: {reason}", meter.read())
            self._failures[number] = failure
            _logger.warning("%s: %s", self._path(number).stem, failure.reason)
            # A resumed search must not train again what failed before.
            failures = {str(number): asdict(failure) for number, failure in self._failures.items()}
            save_json(self._failures_path, failures)

    def _train_and_save(self, number: int, largest: Configuration) -> None:
        seed = self.evaluator.seed
        supernet = LoraSupernet.train(
            self.evaluator,
            largest,
            trainings=self.settings.trainings,
            seed=seed if number == 0 else training_seed(seed, -1, number),
        )
        supernet.save(self._path(number))
        self._supernets[number] = supernet

    def _path(self, number: int) -> Path:
        return self.folder / f"supernet-{number}.safetensors"


def initial_weights(
    warm_starts: WarmStarts | None, evaluation: Evaluation, training: int = 0
) -> InitialWeights | None:
    """Return the initial weights of a trial's `training`, from 0; None for random weights.

    They are from the supernet of that training, and from supernet 0 where that one's training failed.

    Raises:
        WarmStartError: The trial was initialised from a supernet, and there is none.
    """
    if not evaluation.warm_start:
        return None
    if warm_starts is None:
        raise WarmStartError(
            "The trial was initialised from a supernet: give the search the warm_start=WarmStart(...) that "
            "it ran with."
        )
    supernet = warm_starts.supernet(training) or warm_starts.supernet()
    if supernet is None:
        why = warm_starts.obstacle or f"there is no file supernet-0.safetensors in {warm_starts.folder}"
        raise WarmStartError(f"The supernet that the trial was initialised from is gone: {why}.")
    return supernet.state(evaluation.configuration)


def largest_lora(space: SearchSpace, backbone: Backbone, seed: int = 0) -> Configuration | None:
    """Return LoRA of the largest rank at every site where the space has any; None without one.

    The space's extremes, baselines and some draws are searched, also where LoRA stands beside other methods.
    """
    points = [*space.extremes(backbone), *(baseline.configuration for baseline in space.baselines(backbone))]
    generator = random.Random(f"supernet:{seed}")
    points += [space.draw(generator, backbone) for _ in range(_DRAWS)]
    largest: dict[Site, Adapter] = {}
    for site, adapter in chain.from_iterable(points):
        if adapter.method == METHOD:
            known = largest.get(site)
            if known is None or (adapter.size or 0) > (known.size or 0):
                largest[site] = adapter
    return Configuration(largest, learning_rate=points[0].learning_rate) if largest else None
