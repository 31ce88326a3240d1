"""A LoRA supernet: one training that gives every LoRA sub-configuration its initial weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autopeft.callbacks import StopOnDivergence
from autopeft.callbacks.lora_modules import find_lora_modules, truncated_tensors
from autopeft.core.configuration import Adapter, Configuration
from autopeft.core.durable_files import load_tensors, save_tensors
from autopeft.core.errors import check_numbers
from autopeft.core.evaluation import Cost
from autopeft.core.seeding import seeded
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.run import interrupts_stay_interrupts
from autopeft.evaluation.supernet.nested_ranks import PerRowRanks, SandwichRankSampler
from autopeft.methods import attach
from autopeft.methods.lora import lora_scaling
from autopeft.training.compute_meter import ComputeMeter
from autopeft.training.trainer import build_trainer, dismantle, quiet_lightning
from autopeft.training.validation_schedule import ValidationSchedule

METHOD = "lora"
"""The only method that a supernet has."""

_METADATA_KEY = "autopeft"


@dataclass(frozen=True, kw_only=True)
class LoraSupernet:
    """The weights of every sub-configuration of a LoRA configuration, from one training.

    A sub-configuration has at each site a LoRA of at most the largest rank with the same options, or none.
    Its weights are the first ranks of the supernet's, under the scaling of the largest rank; the head is
    shared. One-shot architecture search: Cai et al., "Once-for-All", 2020; see also `nested_ranks`.

    Attributes:
        largest: LoRA at every site, of the largest rank.
        tensors: The trained tensors of `largest`, as its `Attachment` names them.
        cost: What the training cost.
    """

    largest: Configuration
    tensors: Mapping[str, Tensor]
    cost: Cost

    @classmethod
    def train(
        cls,
        evaluator: Evaluator,
        largest: Configuration,
        *,
        trainings: float = 1.0,
        seed: int | None = None,
    ) -> Self:
        """Train a supernet; every row of a batch trains a sub-configuration of its own.

        Args:
            evaluator: Gives backbone, task and training settings.
            largest: LoRA at one or more sites, of the largest ranks; its learning rate is used.
            trainings: Length, in trainings of one configuration.
            seed: Seed of initialisation and sampling; the evaluator's by default.

        Raises:
            ValueError: The configuration has no LoRA or other methods, or a number is out of range.
            DivergenceError: The loss is not finite.
        """
        others = [name for name in largest.methods if name != METHOD]
        if others or not len(largest):
            raise ValueError(
                f"A supernet is {METHOD} at one or more sites, got {', '.join(others) or 'no adapters'}."
            )
        check_numbers(above=0, trainings=trainings)
        evaluator.backbone.check(largest)
        seed = evaluator.seed if seed is None else seed
        meter = ComputeMeter(evaluator.device)
        with attach(evaluator.backbone, largest, seed) as attachment:
            steps = _fit(evaluator, largest, trainings, seed)
            tensors = attachment.state_dict()
        return cls(largest=largest, tensors=tensors, cost=meter.read(steps))

    def contains(self, configuration: Configuration) -> bool:
        """Say whether a configuration is a sub-configuration."""

        def fits(largest: Adapter, adapter: Adapter) -> bool:
            alike = (adapter.method, adapter.options) == (largest.method, largest.options)
            return alike and (adapter.size or 0) <= (largest.size or 0)

        pairs = ((self.largest.adapters.get(site), adapter) for site, adapter in configuration)
        return all(whole is not None and fits(whole[0], adapter) for whole, adapter in pairs)

    def state(self, configuration: Configuration) -> dict[str, Tensor]:
        """Return copies of a sub-configuration's tensors, as its `Attachment` loads them.

        Raises:
            ValueError: It is no sub-configuration.
        """
        if not self.contains(configuration):
            raise ValueError(f"{configuration!r} is no sub-configuration of the supernet.")
        tensors: dict[str, Tensor] = {}
        for site, adapter in configuration:
            largest, name = self.largest.adapters[site][0], f"{site}.{METHOD}"
            down = self.tensors[f"{name}.lora_A.weight"]
            tensors |= truncated_tensors(
                name,
                down=down,
                up=self.tensors[f"{name}.lora_B.weight"],
                keep=torch.arange(len(down)) < (adapter.size or 0),
                rescale=lora_scaling(largest) / lora_scaling(adapter),
            )
        head = {name: tensor.clone() for name, tensor in self.tensors.items() if name.startswith("head.")}
        return tensors | head

    def save(self, path: Path) -> None:
        """Write the supernet to a safetensors file.

        Raises:
            OSError: The file cannot be written.
        """
        metadata = {"largest": self.largest.to_dict(), "cost": asdict(self.cost)}
        save_tensors(path, self.tensors, {_METADATA_KEY: json.dumps(metadata)})

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read a supernet that `save` wrote; None if the file is missing or damaged."""
        found = load_tensors(path)
        if found is None:
            return None
        tensors, texts = found
        metadata = json.loads(texts[_METADATA_KEY])
        largest = Configuration.from_dict(metadata["largest"])
        return cls(largest=largest, tensors=tensors, cost=Cost(**metadata["cost"]))


def _fit(evaluator: Evaluator, largest: Configuration, trainings: float, seed: int) -> int:
    """Train the attached adapters, and return the number of optimizer steps."""
    steps = max(1, round(trainings * evaluator.plan.total_steps))
    training = replace(evaluator.training, patience=None)
    plan = ValidationSchedule(total_steps=steps, rungs=(steps,), stops=(steps,))
    module = evaluator.module(largest, total_steps=steps)
    modules = find_lora_modules(evaluator.backbone.model)
    blocks: NDArray[np.int64] = np.array(
        [evaluator.backbone.blocks_below(site.place) for site in largest.adapters]
    )
    ranks: NDArray[np.int64] = np.array([adapter.size for _, adapter in largest])
    row_ranks = PerRowRanks(
        SandwichRankSampler(blocks, ranks, seed),
        [modules[evaluator.backbone.shape(site).module] for site in largest.adapters],
    )
    batches = evaluator.batches(seed, plan=plan)
    module.train()
    with ExitStack() as stack:
        stack.callback(module.eval)
        with seeded(seed, evaluator.device), quiet_lightning(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You defined a `validation_step`")
            trainer = build_trainer(training, [StopOnDivergence()], monitor=evaluator.monitor, pieces=1)
            stack.callback(dismantle, trainer)
            lowered = evaluator.backbone.cached_casts.in_place(training.resolved_precision())
            with interrupts_stay_interrupts(), lowered, row_ranks.gating(module):
                trainer.fit(module, batches)
            return int(trainer.global_step)
