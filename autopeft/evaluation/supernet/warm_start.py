"""The elastic adapters of a search, and what its trainings begin from."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Cost, Evaluation
from autopeft.core.seeding import training_seed
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.run import InitialWeights, reason_of_failure
from autopeft.evaluation.supernet.candidates import drawn, has_lora_alone, largest_lora
from autopeft.evaluation.supernet.settings import GENERATIONS, Elastic
from autopeft.evaluation.supernet.supernet import ElasticAdapter
from autopeft.search_spaces import SearchSpace
from autopeft.training.compute_meter import ComputeMeter

_logger = logging.getLogger(__name__)


class ElasticError(ValueError):
    """There is no elastic adapter to begin a training from."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """Why an adapter's training failed, and what it took."""

    reason: str
    cost: Cost


class ElasticWeights:
    """The elastic adapters of a search: trained when first asked for, kept in a folder so that it resumes.

    The first scores, proposes, and gives trials their first weights. A trial's trainings with other seeds
    begin each from an adapter of its own, trained with another seed: else the luck of one adapter would be
    taken for what trials are worth.

    Args:
        settings: What to train.
        evaluator: Trains.
        space: What the largest configuration is of.
        folder: Where adapters are kept.
        trains: Whether it trains what is not in the folder: for who holds the search alone.
    """

    def __init__(
        self,
        settings: Elastic,
        evaluator: Evaluator,
        space: SearchSpace,
        folder: Path,
        *,
        trains: bool = True,
    ) -> None:
        self.settings = settings
        self.evaluator = evaluator
        self.space = space
        self.folder = folder
        self._trains = trains
        self._adapters: dict[int, ElasticAdapter] = {}
        self._failures: dict[int, _Failure] = {}
        self._load()

    @property
    def cost(self) -> Cost:
        """Compute of all trainings, also of those that failed."""
        costs = [one.cost for one in self._adapters.values()]
        return sum((*costs, *(one.cost for one in self._failures.values())), Cost())

    @property
    def obstacle(self) -> str | None:
        """Why there is no elastic adapter; None while there may be one."""
        return self._failures[0].reason if 0 in self._failures else None

    @property
    def trained(self) -> ElasticAdapter | None:
        """The first adapter where it is trained by now."""
        return self._adapters.get(0)

    def adapter(self, number: int = 0) -> ElasticAdapter | None:
        """Return an adapter, trained where it was not; None where it cannot be.

        Args:
            number: Of a trial's trainings, from 0.
        """
        if self._trains and number not in self._adapters and number not in self._failures:
            self._train(number)
        return self._adapters.get(number)

    def cost_to_come(self, members: Iterable[Evaluation], seeds: int) -> Cost:
        """Return what the adapters will take that further trainings of trials begin from.

        Args:
            members: Of trials that are to be trained again.
            seeds: Trainings that each is to have.
        """
        first = self.trained
        if first is None:
            return Cost()
        wanted = {number for one in members if one.warm_start for number in range(one.trainings, seeds)}
        missing = wanted - self._adapters.keys() - self._failures.keys()
        return sum((first.cost for _ in missing), Cost())

    def of_new(self, trials: Mapping[int, Configuration]) -> dict[int, InitialWeights]:
        """Return by number what new trials begin from; those that begin from random weights are left out.

        Args:
            trials: Configurations by number.
        """
        covered = {number: one for number, one in trials.items() if has_lora_alone(one)}
        adapter = self.adapter() if covered and self.settings.warm_start else None
        if adapter is None:
            return {}
        return {number: adapter.state(one) for number, one in covered.items() if not adapter.obstacle(one)}

    def draws(self, generator: random.Random) -> list[Configuration]:
        """Return points of the space of LoRA alone: the reference points, and draws."""
        count = max(1, self.settings.candidates // GENERATIONS)
        return drawn(self.space, self.evaluator.backbone, count, generator)

    def generator(self) -> random.Random:
        """Return what draws are made with, at its beginning."""
        return random.Random(f"elastic:{self.evaluator.seed}")

    def _train(self, number: int) -> None:
        largest = largest_lora(self.space, self.evaluator.backbone, self.draws(self.generator()))
        if largest is None:
            self._failures[number] = _Failure(
                reason="the space has no configuration of LoRA alone", cost=Cost()
            )
            return
        meter = ComputeMeter(self.evaluator.device)
        reason = reason_of_failure(partial(self._train_and_save, number, largest))
        if reason is not None:
            self._failures[number] = _Failure(
                reason=f"the elastic adapter's training failed: {reason}", cost=meter.read()
            )
            _logger.warning("%s of a search: %s", self._path(number).stem, self._failures[number].reason)
            self._save_failures()

    def _train_and_save(self, number: int, largest: Configuration) -> None:
        seed = self.evaluator.seed
        trained = ElasticAdapter.train(
            self.evaluator,
            largest,
            trainings=self.settings.trainings,
            seed=seed if number == 0 else training_seed(seed, -1, number),
        )
        trained.save(self._path(number))
        self._adapters[number] = trained

    def _path(self, number: int) -> Path:
        return self.folder / f"adapter{f'-{number}' if number else ''}.safetensors"

    @property
    def _failures_path(self) -> Path:
        return self.folder / "failures.json"

    def _save_failures(self) -> None:
        """Keep why trainings failed: a search that resumes is not to try them again."""
        data = {str(number): asdict(one) for number, one in self._failures.items()}
        write_json(self._failures_path, data)

    def _load(self) -> None:
        if self._failures_path.is_file():
            for number, one in json.loads(self._failures_path.read_text()).items():
                self._failures[int(number)] = _Failure(reason=one["reason"], cost=Cost(**one["cost"]))
        for path in sorted(self.folder.glob("adapter*.safetensors")):
            adapter = ElasticAdapter.load(path)
            if adapter is not None:
                self._adapters[int(path.stem.partition("-")[2] or 0)] = adapter


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a file that is there whole or not at all; its folder is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(data))
    os.replace(unfinished, path)


def first_weights(
    elastic: ElasticWeights | None, evaluation: Evaluation, training: int = 0
) -> InitialWeights | None:
    """Return what a training of a trial begins from, to train it anew or again; None for random weights.

    Args:
        elastic: The search's.
        evaluation: The trial's.
        training: Which of its trainings, from 0.

    Returns:
        The weights of the adapter of that training; where its own training failed, of the first.

    Raises:
        ElasticError: The trial began from an elastic adapter's weights, and there is none.
    """
    if not evaluation.warm_start:
        return None
    if elastic is None:
        raise ElasticError(
            "The trial began from an elastic adapter's weights: give the search the elastic=Elastic(...) "
            "that it ran with."
        )
    adapter = elastic.adapter(training) or elastic.adapter()
    if adapter is None:
        why = elastic.obstacle or f"there is no file adapter.safetensors in {elastic.folder}"
        raise ElasticError(f"The elastic adapter that the trial began from is gone: {why}.")
    return adapter.state(evaluation.configuration)
