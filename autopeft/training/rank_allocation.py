"""The callbacks that decide about ranks while a configuration is trained, with plans for its length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from lightning.pytorch import Callback
from peft import AdaLoraConfig

from autopeft.callbacks import IST, AdaLoRA, ARDLoRA, ElaLoRA, IncreLoRA, SoRA
from autopeft.core.configuration import Configuration
from autopeft.core.rank_allocation import RANK_ALLOCATIONS

# Of SoRA and ARD-LoRA: a gate, which starts at 1, closes unless its gradients exceed the penalty
# often enough. Chosen on MiniLM and questions: with 0.01 most gates close, with 0.03 all.
_PENALTY = 0.003  # nats
_SHRINKAGE = 1.2  # of a gate over a training where its gradient is 0


def allocation_callbacks(configuration: Configuration, steps: int) -> list[Callback]:
    """Return what allocates a configuration's ranks in a training of so many optimizer steps, if anything."""
    if configuration.allocation is None:
        return []
    method = RANK_ALLOCATIONS[configuration.allocation].method
    ranks = [adapter.size_or_zero for _, adapter in configuration if adapter.method == method]
    return [_MAKERS[configuration.allocation](ranks, steps)]


def _budget(name: str, ranks: Sequence[int]) -> int:
    """Return the ranks of all layers together that a training is to end with, one a layer at least."""
    return max(len(ranks), round(RANK_ALLOCATIONS[name].kept * sum(ranks)))


def _adalora(ranks: Sequence[int], steps: int) -> Callback:
    """Let ranks fall between a tenth and three quarters of the training."""
    budget = _budget("adalora", ranks)
    schedule = AdaLoraConfig(
        init_r=max(ranks),
        target_r=budget // len(ranks),
        tinit=steps // 10,
        tfinal=steps // 4,
        deltaT=max(1, steps // 20),
        total_step=steps,
    )
    return AdaLoRA(schedule, budget)  # which need not be a whole number a layer


def _increlora(ranks: Sequence[int], steps: int) -> Callback:
    """Let ranks grow from 1 in the first half of the training."""
    budget, half = _budget("increlora", ranks), max(1, steps // 2)
    missing = budget - len(ranks)
    # Twice as often as it takes if all layers gain a rank each time, so that some may gain more.
    every = max(1, half // max(10, 2 * math.ceil(missing / len(ranks))))
    growth = max(1, math.ceil(missing / (half // every)))
    return IncreLoRA(budget, every_n_steps=every, modules_per_growth=growth)


def _elalora(ranks: Sequence[int], steps: int) -> Callback:
    """Move ranks ten times, up to three quarters of the training."""
    every = max(1, steps // 10)
    return ElaLoRA(
        _budget("elalora", ranks),
        every_n_steps=every,
        moves=max(1, len(ranks) // 4),
        warmup_steps=steps // 10,
        stop_step=max(steps // 10, 3 * steps // 4),
    )


def _gate_rate(steps: int) -> float:
    return _SHRINKAGE / (_PENALTY * steps)


_MAKERS: Mapping[str, Callable[[Sequence[int], int], Callback]] = {
    "adalora": _adalora,
    "increlora": _increlora,
    "elalora": _elalora,
    "sora": lambda ranks, steps: SoRA(_PENALTY, learning_rate=_gate_rate(steps)),
    "ard_lora": lambda ranks, steps: ARDLoRA(
        penalty=_PENALTY, total_variation=_PENALTY / 10, learning_rate=_gate_rate(steps)
    ),
    "ist": lambda ranks, steps: IST(every_n_steps=max(1, steps // 10)),
}
