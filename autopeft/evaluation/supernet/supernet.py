"""One-shot elastic adapter: one training that gives every LoRA sub-configuration its weights.

A LoRA of the largest rank at every site is trained with sampled sub-ranks, so that the first r ranks of any
site do without the others, and any site without its adapter. A sub-configuration is then scored by inference
alone. What that says of a training of its own is to be checked (see `autopeft.evaluation.supernet.proposer`).
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autopeft.callbacks import StopOnDivergence
from autopeft.callbacks.lora_modules import LoraModule, find_lora_modules
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import Cost
from autopeft.core.seeding import seeded
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.run import interrupts_stay_interrupts
from autopeft.evaluation.supernet.block_output_reuse import BlockOutputReuse
from autopeft.evaluation.supernet.candidates import METHOD
from autopeft.evaluation.supernet.nested_ranks import PerRowRanks, SandwichRankSampler
from autopeft.methods import attach
from autopeft.tasks.batch import LABELS, model_inputs
from autopeft.training.compute_meter import ComputeMeter
from autopeft.training.settings import FineTuning, build_trainer, dismantle, quiet_lightning
from autopeft.training.validation_schedule import SegmentedBatches, ValidationSchedule

_META = "autopeft"
_LEFT = ("lora_A.weight", "lora_B.weight")


@dataclass(frozen=True, kw_only=True)
class SubScore:
    """How good a sub-configuration is on the validation split, with the elastic adapter's weights.

    Attributes:
        loss: Mean loss of a row.
        metrics: The task's metrics.
    """

    loss: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """The scores of sub-configurations, and what they took.

    Attributes:
        scores: One for each configuration, in their order.
        passes: Passes of a batch through one block, as counted.
        cost: Compute spent.
    """

    scores: tuple[SubScore, ...]
    passes: int
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class ElasticAdapter:
    """The weights of every sub-configuration of a LoRA configuration, from one training.

    A sub-configuration has at each site a LoRA of at most the largest rank, with the same options, or none.
    Its weights are the first ranks of the elastic ones, under the scaling of the largest rank; the head is
    shared. The method is that of "one-shot"
    architecture search: Cai et al., "Once-for-All", 2020; Yu and Huang, "Universally Slimmable Networks",
    2019 (sandwich rule); Valipour et al., "DyLoRA", 2023 (nested ranks).

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
        smallest_rank: int = 1,
        seed: int | None = None,
    ) -> Self:
        """Train an elastic adapter; every row of a batch trains a sub-configuration of its own.

        Args:
            evaluator: Its backbone, task and training settings.
            largest: LoRA at one or more sites, of the largest ranks; its learning rate is used.
            trainings: Length, in trainings of one candidate.
            smallest_rank: Smallest rank that is trained for.
            seed: Another seed than the evaluator's.

        Raises:
            ValueError: The configuration has no LoRA or other methods, or a number is out of range.
            DivergenceError: The loss is not finite.
        """
        _check_largest(largest)
        for name, value, least in (("trainings", trainings, 0), ("smallest_rank", smallest_rank, 0)):
            if not (math.isfinite(value) and value > least):
                raise ValueError(f"{name} is a number above {least}, got {value!r}.")
        evaluator.backbone.check(largest)
        seed = evaluator.seed if seed is None else seed
        meter = ComputeMeter(evaluator.device)
        with attach(evaluator.backbone, largest, seed) as attachment:
            steps = _fit(evaluator, largest, trainings, smallest_rank, seed)
            tensors = attachment.state_dict()
        return cls(largest=largest, tensors=tensors, cost=meter.read(steps))

    def obstacle(self, configuration: Configuration) -> str | None:
        """Say why a configuration is no sub-configuration; None where it is one."""
        for site, adapter in configuration:
            whole = self.largest.adapters.get(site, ())
            if adapter.method != METHOD:
                return f"{site} has {adapter.method}, not {METHOD}"
            if not whole:
                return f"{site} has no elastic adapter"
            assert adapter.size is not None
            assert whole[0].size is not None
            if adapter.size > whole[0].size:
                return f"rank {adapter.size} at {site} is above {whole[0].size}"
            if adapter.options != whole[0].options:
                return f"the options at {site} differ: {adapter}, not {whole[0]}"
        return None

    def check(self, configuration: Configuration) -> None:
        """Raise ValueError where a configuration is no sub-configuration."""
        obstacle = self.obstacle(configuration)
        if obstacle is not None:
            raise ValueError(f"The elastic adapter does not have {configuration!r}: {obstacle}.")

    def state(self, configuration: Configuration) -> dict[str, Tensor]:
        """Return copies of a sub-configuration's tensors, as its `Attachment` loads them.

        Raises:
            ValueError: It is no sub-configuration.
        """
        self.check(configuration)
        state: dict[str, Tensor] = {}
        for site, adapter in configuration:
            down, up = (self.tensors[f"{site}.{METHOD}.{name}"] for name in _LEFT)
            # A LoRA of a lower rank has another scaling than the one that was trained.
            rescaling = _scaling(self.largest.adapters[site][0]) / _scaling(adapter)
            pieces = (down[: adapter.size].clone(), up[:, : adapter.size] * rescaling)
            names = (f"{site}.{METHOD}.{name}" for name in _LEFT)
            state |= dict(zip(names, pieces, strict=True))
        head = {name: one.clone() for name, one in self.tensors.items() if name.startswith("head.")}
        return state | head

    def score(self, evaluator: Evaluator, configurations: Sequence[Configuration]) -> Scoring:
        """Score sub-configurations on the validation split, without training.

        They are gone through depth first over the blocks: one that agrees with the one before in its lowest
        blocks begins above them. No more is kept than what the blocks gave for one batch.

        Raises:
            ValueError: A configuration is no sub-configuration.
        """
        for one in configurations:
            self.check(one)
        meter = ComputeMeter(evaluator.device)
        sites = tuple(self.largest.adapters)
        ranks = [_ranks(one, sites) for one in configurations]
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
        logits: list[list[Tensor]] = [[] for _ in ranks]
        labels: list[Tensor] = []
        with self._attached(evaluator) as slices, BlockOutputReuse(slices.model, slices.blocks) as prefix:
            for batch in evaluator.data.val_dataloader():
                inputs = {name: one.to(evaluator.device) for name, one in model_inputs(batch).items()}
                labels.append(batch[LABELS])
                prefix.forget()
                for index in order:
                    same = slices.use(ranks[index])
                    logits[index].append(prefix.logits(inputs, same).float().cpu())
            passes = prefix.passes
        scores = [_judged(evaluator, torch.cat(one), torch.cat(labels)) for one in logits]
        return Scoring(scores=tuple(scores), passes=passes, cost=meter.read())

    @contextmanager
    def _attached(self, evaluator: Evaluator) -> Iterator[_Slices]:
        """Attach the largest configuration with its trained weights, ready for inference."""
        backbone = evaluator.backbone
        precision = evaluator.training.resolved_precision()
        with attach(backbone, self.largest, evaluator.seed) as attachment, torch.no_grad():
            attachment.load_state_dict(self.tensors)
            backbone.model.eval()
            modules = find_lora_modules(backbone.model)
            ordered = [modules[backbone.shape(site).module] for site in self.largest.adapters]
            blocks = [site.block for site in self.largest.adapters]
            with backbone.computing_in(precision):
                yield _Slices(backbone.model, backbone.blocks, ordered, blocks)

    def save(self, path: Path) -> None:
        """Write it as safetensors; the file is there whole or not at all."""
        rest = {"largest": self.largest.to_dict(), "cost": asdict(self.cost)}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        tensors = {name: one.contiguous() for name, one in self.tensors.items()}
        save_file(tensors, unfinished, metadata={_META: json.dumps(rest)})
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read what `save` wrote; None where there is no such file."""
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            rest = json.loads(file.metadata()[_META])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        largest = Configuration.from_dict(rest["largest"])
        return cls(largest=largest, tensors=tensors, cost=Cost(**rest["cost"]))


class _Slices:
    """Puts the first ranks of every module in its place."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        modules: Sequence[LoraModule],
        block_of: Sequence[int],
    ) -> None:
        self.model = model
        self.blocks = blocks
        self._modules = modules
        self._block_of = block_of
        self._whole = [(module.down.weight, module.up.weight) for module in modules]
        self._now: tuple[int, ...] = tuple(module.rank for module in modules)

    def use(self, ranks: tuple[int, ...]) -> int:
        """Use other ranks, and return the number of lowest blocks that stay as they were."""
        lowest = len(self.blocks)
        for index, (old, new) in enumerate(zip(self._now, ranks, strict=True)):
            if old != new:
                self._cut(index, new)
                lowest = min(lowest, self._block_of[index])
        self._now = ranks
        return lowest

    def _cut(self, index: int, rank: int) -> None:
        module, (down, up) = self._modules[index], self._whole[index]
        if rank == 0:
            module.layer.set_adapter([])
            return
        module.layer.set_adapter(module.adapter)
        module.down.weight = nn.Parameter(down[:rank], requires_grad=False)
        module.up.weight = nn.Parameter(up[:, :rank], requires_grad=False)


def _check_largest(largest: Configuration) -> None:
    others = [name for name in largest.methods if name != METHOD]
    if others or not len(largest):
        raise ValueError(
            f"An elastic adapter is {METHOD} at one or more sites, got {', '.join(others) or 'no adapters'}."
        )


def _scaling(adapter: Adapter) -> float:
    """Return what a LoRA multiplies its update by: α/√r (rsLoRA) or α/r."""
    assert adapter.size is not None
    return float(adapter.option("alpha")) / (
        math.sqrt(adapter.size) if adapter.option("rslora") else adapter.size
    )


def _ranks(configuration: Configuration, sites: Sequence[Site]) -> tuple[int, ...]:
    """Return the rank at every site, 0 where it has none; sites lie in the order of their blocks."""
    adapters = configuration.adapters
    return tuple((adapters[site][0].size or 0) if site in adapters else 0 for site in sites)


def _fit(
    evaluator: Evaluator, largest: Configuration, trainings: float, smallest_rank: int, seed: int
) -> int:
    """Train what is attached, and return the number of optimizer steps."""
    steps_per_epoch = evaluator.data.steps_per_epoch
    steps = max(1, round(trainings * evaluator.training.total_steps(steps_per_epoch)))
    training = replace(
        evaluator.training, epochs=max(1, math.ceil(steps / steps_per_epoch)), max_steps=steps, patience=None,
        validate_every=1,
    )  # fmt: skip
    plan = ValidationSchedule(total_steps=steps, rungs=(steps,), stops=(steps,))
    module = FineTuning(
        evaluator.backbone.model,
        evaluator.task,
        learning_rate=largest.learning_rate,
        weight_decay=largest.weight_decay,
        warmup_share=training.warmup_share,
        total_steps=steps,
    )
    shapes = [evaluator.backbone.shape(site).module for site in largest.adapters]
    blocks: NDArray[np.int64] = np.array([site.block for site in largest.adapters])
    ranks: NDArray[np.int64] = np.array([adapter.size for _, adapter in largest])
    draw = SandwichRankSampler(blocks, ranks, smallest_rank, seed)
    batches = SegmentedBatches(evaluator.data.train_dataloader(seed), plan, steps_per_epoch)
    module.train()
    with ExitStack() as ending:
        ending.callback(module.eval)
        with seeded(seed, evaluator.device), quiet_lightning(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You defined a `validation_step`")
            callbacks = [StopOnDivergence(), PerRowRanks(draw, tuple(shapes))]
            trainer = build_trainer(training, callbacks, monitor=evaluator.monitor, pieces=1)
            ending.callback(dismantle, trainer)
            lowered = evaluator.backbone.cached_casts.in_place(training.resolved_precision())
            with interrupts_stay_interrupts(), lowered:
                trainer.fit(module, batches)
            return int(trainer.global_step)


def _judged(evaluator: Evaluator, logits: Tensor, labels: Tensor) -> SubScore:
    metrics = evaluator.task.metric_collection()
    metrics.update(logits, labels)
    found = {name: float(value) for name, value in metrics.compute().items()}
    return SubScore(loss=float(evaluator.task.loss(logits, labels)), metrics=found)
