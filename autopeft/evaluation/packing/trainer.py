"""Train several configurations in one pass over one resident backbone.

    trained = PackedTrainer(evaluator).train([first, second, third])

All see the same batches in the same order. See `autopeft.evaluation.packing.forward` for the pass,
`autopeft.evaluation.packing.loop` for the training, docs/search.md for when it pays.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autopeft.core.configuration import Configuration
from autopeft.core.errors import check_whole
from autopeft.core.evaluation import Cost, CurvePoint, Evaluation
from autopeft.core.profiling import section
from autopeft.core.seeding import seeded
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.packing.adapters import Member
from autopeft.evaluation.packing.forward import check_agreement, cut_of
from autopeft.evaluation.packing.layout import PackingError
from autopeft.evaluation.packing.loop import PackedCandidate, PackedTraining
from autopeft.evaluation.run import InitialWeights, Trained, at_pause
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.tasks.batch import model_inputs
from autopeft.training.compute_meter import ComputeMeter
from autopeft.training.module import FineTuning, names_in_training

__all__ = ["PackedTrainer", "PackingError", "packing_gain", "worthwhile_packs"]

_logger = logging.getLogger(__name__)
_CHECKED_ROWS = 4
_CHECKED_STD = 0.05
# A pack was seen to take up to 2.7 % more than its candidates' counts: copies of the rows where they part.
_MARGIN = 1.05


def packing_gain(cuts: Sequence[int], blocks: int) -> float:
    """Return how much less work candidates are together than one by one, in block passes.

    Alone, a candidate takes the forward of every block and the backward of those from its cut on; together,
    the forward below the highest cut is paid once, and each candidate's blocks from its cut on as before.
    What packing saves and costs beside that (fewer, larger operations) is not counted: it depends on the
    device, see benchmarks/packing.py.

    Args:
        cuts: Number of blocks below each candidate's lowest adapter.
        blocks: Number of blocks of the backbone.
    """
    alone = sum(blocks + (blocks - cut) for cut in cuts)
    together = max(cuts) + sum(2 * (blocks - cut) for cut in cuts)
    return alone / together


def worthwhile_packs(
    backbone: Backbone,
    configurations: Sequence[Configuration],
    *,
    max_size: int = 8,
    min_gain: float = 1.1,
) -> list[list[Configuration]]:
    """Group configurations into packs that save work, those with like cuts together.

    Args:
        backbone: What they are attached to.
        configurations: What is to be trained.
        max_size: Candidates a pack at most.
        min_gain: Smallest factor by which a candidate's work must fall in a large pack; one that gains less
            stays alone. On the CPU, one that shares no block gains next to nothing.

    Returns:
        Groups of one or more, every configuration in one of them.

    Raises:
        ValueError: `max_size` is below 1.
    """
    check_whole("max_size", max_size, what="a number of candidates", least=1)
    blocks = len(backbone.blocks)

    def gains(configuration: Configuration) -> bool:
        own = 2 * (blocks - cut_of(backbone, configuration))
        return own + cut_of(backbone, configuration) >= min_gain * own

    ordered = sorted(filter(gains, configurations), key=lambda one: cut_of(backbone, one))
    packs = [ordered[start : start + max_size] for start in range(0, len(ordered), max_size)]
    return packs + [[one] for one in configurations if not gains(one)]


@dataclass(frozen=True)
class _Admitted:
    """A configuration whose costs are known.

    Attributes:
        place: Its place among those given.
        values: Costs before training.
        extra_bytes: Counted bytes of its training beside the frozen backbone.
        cost: Compute spent on it by itself.
        initial_weights: What it begins from; None for random ones.
    """

    place: int
    configuration: Configuration
    values: Mapping[str, float]
    extra_bytes: int
    cost: Cost
    initial_weights: InitialWeights | None


@dataclass(frozen=True)
class _How:
    """What all candidates of a pack are trained with: a seed, and the rung they pause at, if any."""

    seed: int
    rung: int | None


class PackedTrainer:
    """Trains configurations together, with outcomes equal to `Evaluator.train`'s one by one.

    Equal within float tolerance where there is no dropout; with dropout the masks differ. What a candidate
    cannot be given in a pack is left out: `peak_memory_measured`, which is known for the pack alone. Hidden
    states that `HiddenStateCache` keeps are not read: blocks that candidates share run once for all of them.
    Compute is shared out: a candidate is charged what was spent on it alone, and of each stretch of the
    training its share by `autopeft.evaluation.packing.loop.shares`; all shares add up to what was spent.

    Args:
        evaluator: Gives backbone, task, training, objectives and constraints.
        max_bytes: Memory a pack may take: the frozen backbone, and what the counts before training give
            for its candidates beside it. A pack that would take more is split, at most to candidates alone.
            None for no bound: a pack that runs out of memory is then halved and begun again. The search's
            bfloat16 copies of frozen weights (`CachedCasts`, on the CPU alone) are not counted.

    Raises:
        ValueError: `max_bytes` is not above 0.
    """

    def __init__(self, evaluator: Evaluator, *, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(f"max_bytes is a number of bytes above 0 or None, got {max_bytes!r}.")
        self.evaluator = evaluator
        self.max_bytes = max_bytes

    def train(
        self,
        configurations: Sequence[Configuration],
        seed: int | None = None,
        *,
        rung: int | None = None,
        initial_weights: Sequence[InitialWeights | None] | None = None,
    ) -> list[Trained]:
        """Check costs, train, and measure on the validation split; see `Evaluator.train`.

        A candidate that diverges leaves the pack and the others go on. A failure of the pack as a whole is
        nobody's outcome: it is halved and each half begun again, down to `Evaluator.train` for one.

        Args:
            configurations: What to train together.
            seed: Another seed than the evaluator's, for all of them.
            rung: Pause there (an index into the plan's rungs); None to train to the end. Who has paused goes
                on by `Evaluator.train`.
            initial_weights: What each begins from, None for random ones; None for all of them.

        Returns:
            One outcome a configuration, in their order.

        Raises:
            ValueError: The backbone cannot carry a configuration, or cannot be packed (`PackingError`); not
                as many initial weights as configurations.
            KeyboardInterrupt: The user interrupted; the backbone carries nothing.
        """
        if initial_weights is None:
            initial_weights = [None] * len(configurations)
        if len(initial_weights) != len(configurations):
            raise ValueError(
                f"{len(initial_weights)} initial weights for {len(configurations)} configurations: "
                "expected one each, None for random ones."
            )
        for configuration in configurations:
            self.evaluator.backbone.check(configuration)
        how = _How(self.evaluator.seed if seed is None else seed, rung)
        outcomes: dict[int, Trained] = {}
        admitted: list[_Admitted] = []
        for place, (configuration, start) in enumerate(zip(configurations, initial_weights, strict=True)):
            found = self._admit(place, configuration, start, how)
            if isinstance(found, Trained):
                outcomes[place] = found
            else:
                admitted.append(found)
        for pack in self._split(admitted):
            outcomes |= self._train(pack, how)
        return [outcomes[place] for place in range(len(configurations))]

    def check(self, configurations: Sequence[Configuration]) -> None:
        """Check that configurations give the logits in a pack that they give alone.

        Raises:
            PackingError: They do not, or the model cannot be packed at all.
        """
        if self.evaluator.training.callbacks:
            raise PackingError(
                "Training(callbacks=...) reaches only trials that are trained alone: use pack_size=1."
            )
        self._candidates(configurations, [None] * len(configurations), self.evaluator.seed)

    def _admit(
        self, place: int, configuration: Configuration, start: InitialWeights | None, how: _How
    ) -> _Admitted | Trained:
        """Count a configuration's costs; return its outcome where it is not to be trained in a pack."""
        evaluator = self.evaluator
        meter = ComputeMeter(evaluator.device)
        try:
            values = evaluator.costs(configuration)
            extra = 0 if self.max_bytes is None else self._extra_bytes(configuration, values)
        except Exception:  # an outcome, in the words of a training alone
            return evaluator.train(configuration, how.seed, rung=how.rung, initial_weights=start)
        violated = [one.describe(values) for one in evaluator.constraints if one.violation(values) > 0]
        if not violated:
            return _Admitted(place, configuration, values, extra, meter.read(), start)
        evaluation = Evaluation(
            configuration=configuration,
            status="infeasible",
            reason="; ".join(violated),
            values=values,
            cost=meter.read(),
            seed=how.seed,
            fidelity=0.0,
        )
        return Trained(evaluation, None)

    @property
    def _frozen_bytes(self) -> int:
        model = self.evaluator.backbone.model
        return sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))

    def _extra_bytes(self, configuration: Configuration, values: Mapping[str, float]) -> int:
        evaluator = self.evaluator
        if "peak_memory" in values:
            return int(values["peak_memory"]) - self._frozen_bytes
        with attach(evaluator.backbone, configuration) as attachment:
            return evaluator.peak_bytes(attachment) - self._frozen_bytes

    def _split(self, admitted: Sequence[_Admitted]) -> list[list[_Admitted]]:
        """Fill packs up to the memory bound, like cuts together."""
        if self.max_bytes is None:
            return [list(admitted)] if admitted else []
        room = self.max_bytes - self._frozen_bytes
        packs: list[list[_Admitted]] = []
        for one in sorted(admitted, key=lambda one: cut_of(self.evaluator.backbone, one.configuration)):
            if packs and _MARGIN * sum(other.extra_bytes for other in (*packs[-1], one)) <= room:
                packs[-1].append(one)
            else:
                packs.append([one])
        return packs

    def _train(self, pack: Sequence[_Admitted], how: _How) -> dict[int, Trained]:
        meter = ComputeMeter(self.evaluator.device)
        failure: str | None = None
        try:
            return self._train_together(pack, how)
        except PackingError:
            raise
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        # Outside the except block on purpose: the traceback would keep the tensors alive.
        if self.evaluator.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        wasted = meter.read().times(1 / len(pack))
        with_added_cost = [replace(one, cost=one.cost + wasted) for one in pack]
        if len(pack) == 1:
            return {pack[0].place: self._train_alone(with_added_cost[0], how)}
        _logger.warning("A pack of %d failed and is halved (%s).", len(pack), failure)
        half = len(with_added_cost) // 2
        return self._train(with_added_cost[:half], how) | self._train(with_added_cost[half:], how)

    def _train_alone(self, one: _Admitted, how: _How) -> Trained:
        trained = self.evaluator.train(
            one.configuration, how.seed, rung=how.rung, initial_weights=one.initial_weights
        )
        return trained.with_added_cost(one.cost)

    def _train_together(self, pack: Sequence[_Admitted], how: _How) -> dict[int, Trained]:
        evaluator, plan = self.evaluator, self.evaluator.plan
        meter = ComputeMeter(evaluator.device)
        configurations = [one.configuration for one in pack]
        candidates = self._candidates(configurations, [one.initial_weights for one in pack], how.seed)
        preparation = meter.read().times(1 / len(pack))
        with seeded(how.seed, evaluator.device):
            PackedTraining(
                evaluator.backbone,
                evaluator.task,
                evaluator.data,
                evaluator.training,
                candidates,
                plan=plan,
                end=plan.total_steps if how.rung is None else plan.rungs[how.rung],
            ).run(how.seed)
        return {
            one.place: self._outcome(replace(one, cost=one.cost + preparation), candidate, how.seed)
            for one, candidate in zip(pack, candidates, strict=True)
        }

    @section("set-up")
    def _candidates(
        self, configurations: Sequence[Configuration], starts: Sequence[InitialWeights | None], seed: int
    ) -> list[PackedCandidate]:
        """Attach each configuration for its initial weights, and check that the pack computes the same."""
        evaluator = self.evaluator
        batch = {
            name: one[:_CHECKED_ROWS].to(evaluator.device)
            for name, one in model_inputs(evaluator.data.largest_batch()).items()
        }
        evaluator.backbone.model.eval()
        generator = torch.Generator().manual_seed(seed)
        members: list[Member] = []
        expected: list[Tensor] = []
        initial: list[dict[str, Tensor]] = []
        names: list[dict[str, str]] = []
        for configuration, start in zip(configurations, starts, strict=True):
            with attach(evaluator.backbone, configuration, seed) as attachment, torch.no_grad():
                if start is not None:
                    attachment.load_state_dict(start)
                members.append(Member(configuration, dict(attachment.parameters)))
                names.append(names_in_training(evaluator.backbone.model, attachment.parameters))
                initial.append({name: one.detach().clone() for name, one in attachment.parameters.items()})
                for one in attachment.parameters.values():
                    # As they are, most adapters change nothing.
                    one.add_(_CHECKED_STD * torch.randn(one.shape, generator=generator).to(one))
                expected.append(evaluator.backbone.model(**batch).logits)
        check_agreement(evaluator.backbone, members, batch, expected)
        with torch.no_grad():
            for member, weights in zip(members, initial, strict=True):
                for name, parameter in member.parameters.items():
                    parameter.copy_(weights[name])
        return [
            PackedCandidate(member, self._module(member), evaluator.training, evaluator.monitor, known)
            for member, known in zip(members, names, strict=True)
        ]

    def _module(self, member: Member) -> FineTuning:
        evaluator = self.evaluator
        holder = nn.ModuleList([nn.ParameterList(member.parameters.values())])
        module = FineTuning(
            holder,
            evaluator.task,
            learning_rate=member.configuration.learning_rate,
            weight_decay=member.configuration.weight_decay,
            warmup_share=evaluator.training.warmup_share,
            total_steps=evaluator.plan.total_steps,
        )
        module.metrics.to(evaluator.device)
        return module

    def _outcome(self, one: _Admitted, candidate: PackedCandidate, seed: int) -> Trained:
        evaluator = self.evaluator
        meter = ComputeMeter(evaluator.device)
        values = dict(one.values)
        state = candidate.state_dict()
        reason = candidate.reason
        if reason is None:
            values |= candidate.metrics
            values["training_seconds"] = candidate.training_seconds
            values["examples_per_second"] = candidate.examples_per_second
            if "inference_latency" in evaluator.needed():
                with attach(evaluator.backbone, one.configuration, seed) as attachment:
                    attachment.load_state_dict(state)
                    values["inference_latency"] = evaluator.latency()
            unusable = [each.name for each in evaluator.objectives if not math.isfinite(values[each.name])]
            if unusable:
                reason = f"diverged: {unusable[0]} is {values[unusable[0]]}"
        complete = reason is None and candidate.paused is None
        evaluation = Evaluation(
            configuration=one.configuration,
            status="complete" if reason is None else "failed",
            reason=reason,
            values={name: value for name, value in values.items() if math.isfinite(value)},
            curves=tuple(
                CurvePoint(metric=metric, step=step, value=value)
                for metric, step, value in candidate.points
                if math.isfinite(value)
            ),
            cost=one.cost + candidate.cost + meter.read(candidate.steps),
            seed=seed,
            warm_start=one.initial_weights is not None,
            fidelity=1.0 if complete else candidate.steps / evaluator.plan.total_steps,
        )
        if reason is None and candidate.paused is not None:
            return at_pause(evaluation, candidate.paused, evaluator.monitor)
        return Trained(evaluation, state if complete else None)
