"""Train several configurations in one pass over one resident backbone."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device

from autopeft.callbacks.measuring import rows_in
from autopeft.core.configuration import Configuration
from autopeft.core.profiling import section
from autopeft.core.seeding import seeded
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.frozen_blocks.block_skipping import Structure
from autopeft.evaluation.memory.available import available_bytes
from autopeft.evaluation.packing.member import MemberRun, PackingError
from autopeft.evaluation.packing.model import PackedModel
from autopeft.evaluation.run import InitialWeights, Trained
from autopeft.tasks.base import Batch
from autopeft.tasks.batch import model_inputs
from autopeft.training.accumulation import TrainingBatch, with_shares
from autopeft.training.compute_meter import ComputeMeter

_logger = logging.getLogger(__name__)
_PROBE_ROWS = 4
# A pack was seen to take up to 2.7 % more than its members' counts: copies of the rows where members join.
_MARGIN = 1.05


class PackedTrainer:
    """Trains configurations together, with the outcomes that `Evaluator.train` has one by one.

    They are equal within float tolerance where there is no dropout; dropout masks differ. The value
    `peak_memory_measured` is missing: it is known for a pack alone. The compute of a pack is charged to its
    members in equal parts. Hidden states on disk are not read: frozen blocks that members share run once.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        # Blocks of an encoder-decoder do not all have the same rows and tokens.
        is_encoder_decoder = bool(evaluator.backbone.model.config.is_encoder_decoder)
        self._is_refuted = is_encoder_decoder or not evaluator.task.is_one_pass

    def can_pack(self, configuration: Configuration) -> bool:
        """Return whether a configuration has LoRA of layers alone, and task, training and model allow it."""
        training = self._evaluator.training
        is_alone = self._is_refuted or training.patience or training.callbacks
        is_plain = (
            set(configuration.methods) <= {"lora"}
            and configuration.allocation is None
            and len(self._evaluator.backbone.stacks) == 1
        )
        return is_plain and not is_alone and all(site.kind != "experts" for site in configuration.adapters)

    def train(
        self,
        configurations: Sequence[Configuration],
        seed: int | None = None,
        *,
        rung: int | None = None,
        initial_weights: Sequence[InitialWeights | None] | None = None,
    ) -> list[Trained]:
        """Return one outcome a configuration, in their order; for the arguments see `Evaluator.train`.

        A configuration that diverges leaves the pack, and the others go on. A pack that fails as a whole, or
        runs out of memory, is halved and started again. What cannot be packed is trained alone.
        """
        evaluator, plan = self._evaluator, self._evaluator.plan
        seed = evaluator.seed if seed is None else seed
        end = plan.total_steps if rung is None else plan.rungs[rung]
        weights = initial_weights or [None] * len(configurations)
        members: dict[int, MemberRun] = {}
        for place, (configuration, own) in enumerate(zip(configurations, weights, strict=True)):
            evaluator.backbone.check(configuration)
            if len(configurations) > 1 and self.can_pack(configuration):
                # What fails here is the outcome of a training alone, and so is what breaks a constraint.
                with section("set-up"), suppress(Exception):
                    member = MemberRun(evaluator, configuration, seed, end, initial_weights=own)
                    if not member.violations:
                        members[place] = member
        outcomes: dict[int, Trained] = {}
        for pack in self._packs(members):
            outcomes |= self._train({place: members[place] for place in pack}, rung)
        for place, (configuration, own) in enumerate(zip(configurations, weights, strict=True)):
            if place not in outcomes:
                outcomes[place] = evaluator.train(configuration, seed, rung=rung, initial_weights=own)
        return [outcomes[place] for place in range(len(configurations))]

    def _packs(self, members: Mapping[int, MemberRun]) -> Iterator[list[int]]:
        """Yield packs of two or more that fit into memory, similar cuts together."""
        evaluator, model = self._evaluator, self._evaluator.backbone.model
        frozen = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        bounds = (limit.bound for limit in evaluator.constraints if limit.objective.name == "peak_memory")
        room = min([available_bytes(evaluator.device), *(bound - frozen for bound in bounds)])
        packs: list[list[int]] = [[]]
        for place in sorted(members, key=lambda place: members[place].cut):
            together = (members[other].peak_bytes - frozen for other in (*packs[-1], place))
            if _MARGIN * sum(together) > room:
                packs.append([])
            packs[-1].append(place)
        yield from (pack for pack in packs if len(pack) > 1)

    def _train(self, members: Mapping[int, MemberRun], rung: int | None) -> dict[int, Trained]:
        """Train a pack; one that fails as a whole is halved."""
        pack, device = list(members.values()), self._evaluator.device
        meter, seed = ComputeMeter(device), pack[0].seed
        try:
            with seeded(seed, [device]), self._evaluator.own_dropout():
                _PackedTraining(self._evaluator, [*pack], self._structure, self._probe).run(seed)
            return {place: member.outcome(member.reason) for place, member in members.items()}
        except Exception as error:
            self._is_refuted |= isinstance(error, PackingError)
            failure = f"{type(error).__name__}: {error}"
        # Outside the except block, whose traceback keeps tensors alive.
        _logger.warning("A pack of %d failed and is halved (%s).", len(pack), failure)
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        wasted, half = meter.read().times(1 / len(pack)), len(pack) // 2
        trained: list[Trained] = []
        for part in (pack[:half], pack[half:]):
            configurations = [member.configuration for member in part]
            weights = [member.initial_weights for member in part]
            trained += self.train(configurations, seed, rung=rung, initial_weights=weights)
        return {place: own.with_added_cost(wasted) for place, own in zip(members, trained, strict=True)}

    @cached_property
    def _probe(self) -> Batch:
        rows = model_inputs(self._evaluator.data.largest_batch()).items()
        return {name: tensor[:_PROBE_ROWS].to(self._evaluator.device) for name, tensor in rows}

    @cached_property
    def _structure(self) -> Structure | None:
        """What blocks return, to share frozen ones; None where they have dropout or cannot be left out."""
        evaluator, backbone = self._evaluator, self._evaluator.backbone
        if evaluator.training.frozen_blocks == "train":
            return None
        backbone.model.eval()
        with torch.no_grad():
            structure = Structure(backbone, evaluator.task, self._probe)
        return None if structure.obstacle(len(backbone.blocks)) else structure


@dataclass
class _PackedTraining:
    """A training of several members: one forward and backward pass a step, all else is a member's own.

    Lightning's Trainer trains one module, and cannot end one of several trials.
    """

    evaluator: Evaluator
    members: list[MemberRun]
    structure: Structure | None
    probe: Batch

    def __post_init__(self) -> None:
        self._meter = ComputeMeter(self.evaluator.device)

    def run(self, seed: int) -> None:
        """Train to the members' end; members that diverge leave the pack."""
        evaluator, plan = self.evaluator, self.evaluator.plan
        batches = evaluator.batches(seed)
        self._model = PackedModel(self.evaluator.backbone, self.members, self.structure)
        try:
            for _ in range(plan.pieces(0, self.members[0].end)):
                for batch in map(self._on_device, batches):
                    self._step(batch)
                    if not self.members:
                        return
                self._charge(training=True)
                self._validate()
            for member in self.members:
                member.end_training()
            self._model.train(False)
            backbone = evaluator.backbone
            with torch.no_grad(), backbone.computing_in(backbone.own_precision):
                outputs = self._model(self.probe)
        finally:
            self._model.remove()
            evaluator.backbone.model.eval()
        for member, own in zip(self.members, outputs, strict=True):
            if member.reason is None:
                member.verify(self.probe, evaluator.task.predicted(own))
        self._charge(training=False)

    @section("data")
    def _on_device(self, batch: TrainingBatch) -> Any:
        return move_data_to_device(batch, self.evaluator.device)

    def _precision(self) -> AbstractContextManager[None]:
        return self.evaluator.backbone.computing_in(self.evaluator.training.resolved_precision())

    def _step(self, batch: TrainingBatch) -> None:
        task = self.evaluator.task
        for member in self.members:
            member.optimizer.zero_grad(set_to_none=False)  # gradients are views
        losses = torch.zeros(len(self.members), device=self.evaluator.device)
        for share, part in with_shares(task, batch):
            with section("forward"), self._precision():
                of_part = share * torch.stack([task.loss(output, part) for output in self._model(part)])
            with section("backward"):
                of_part.sum().backward()  # no member's loss depends on the parameters of another
                losses = losses + of_part.detach()
        with section("optimizer"):
            for member, own in zip(self.members, losses, strict=True):
                member.step(own, rows_in(batch))
        if any(member.reason is not None for member in self.members):
            self._charge(training=True)
            self._model.remove()
            self.members = [member for member in self.members if member.reason is None]
            if self.members:
                self._model = PackedModel(self.evaluator.backbone, self.members, self.structure)

    @section("evaluate")
    def _validate(self) -> None:
        self._model.train(False)
        with torch.inference_mode():
            for batch in map(self._on_device, self.evaluator.data.val_dataloader()):
                with self._precision():
                    outputs = self._model(batch)
                for member, own in zip(self.members, outputs, strict=True):
                    member.module.add_validated(own, batch)
            for member in self.members:
                member.validated()
        self._model.train(True)
        self._charge(training=False)

    def _charge(self, *, training: bool) -> None:
        """Charge the members in equal parts for the compute since the last call."""
        share = self._meter.read().times(1 / len(self.members))
        for member in self.members:
            member.cost += share
            member.throughput.training_seconds += share.wall_seconds if training else 0.0
