"""Move ranks from where they are not needed to where they are, while training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from autopeft.callbacks.lora_modules import LoraModule
from autopeft.callbacks.rank_gates import RankGates, check_at_least
from autopeft.callbacks.smoothed_sensitivity import SmoothedSensitivity

Move = tuple[str, int, str]
"""A rank that is moved: (module it leaves, its index there, module that gains one)."""


class ElaLoRA(RankGates):
    """Keep a budget of ranks, and every few steps prune the least important and expand elsewhere.

    Chang et al., "ElaLoRA: Elastic & Learnable Low-Rank Adaptation for Efficient Model Fine-Tuning",
    2025. The sensitivity of a weight is |θ·∇θ|, s is `SmoothedSensitivity` of it, and the importance of
    a rank is mean s(its row of A) + mean s(its column of B) (the paper, whose layers are B·Λ·A, adds
    s(λ)). A module's importance is the mean of its active ranks'. Ranks of the least importance
    leave; the modules of the highest importance gain one each, with A drawn anew and B = 0, so that
    the model's function does not jump where a rank is added. A rank that was just added is spared once.
    No rank moves to a module that is less important than the rank itself.

    The layers are made with the largest rank they may reach; see `RankGates`.

    Args:
        budget: Ranks of all modules together, kept throughout; they start evenly spread.
        every_n_steps: Optimizer steps between reallocations.
        moves: Most ranks that move at one reallocation.
        minimum_rank: Rank no module falls below.
        warmup_steps: Optimizer steps before the first reallocation.
        stop_step: Optimizer step after which the ranks stay as they are; None for no bound.
        betas: Decay of the averages of sensitivity and uncertainty.
        seed: Seed of the rows of A that are drawn anew.

    Raises:
        ValueError: An argument is out of range; when a fit starts: the layers cannot hold the budget.
    """

    def __init__(
        self,
        budget: int,
        *,
        every_n_steps: int,
        moves: int,
        minimum_rank: int = 1,
        warmup_steps: int = 0,
        stop_step: int | None = None,
        betas: tuple[float, float] = (0.85, 0.85),
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least("budget", budget, 1)
        check_at_least("every_n_steps", every_n_steps, 1)
        check_at_least("moves", moves, 1)
        check_at_least("minimum_rank", minimum_rank, 1)
        check_at_least("warmup_steps", warmup_steps, 0)
        if stop_step is not None:
            check_at_least("stop_step", stop_step, warmup_steps)
        self.budget = budget
        self.every_n_steps = every_n_steps
        self.moves = moves
        self.minimum_rank = minimum_rank
        self.warmup_steps = warmup_steps
        self.stop_step = stop_step
        self.betas = betas
        self.seed = seed
        self._averages = SmoothedSensitivity(betas)
        self._generator = torch.Generator().manual_seed(seed)
        self._added: list[tuple[str, int]] = []

    def initial_gates(self) -> dict[str, Tensor]:
        """Return gates that spread the budget evenly."""
        ranks = spread_evenly(
            self.budget, {name: module.rank for name, module in self._modules.items()}, self.minimum_rank
        )
        return {
            name: (torch.arange(module.rank) < ranks[name]).float() for name, module in self._modules.items()
        }

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the step's sensitivities into the averages, before weights and gradients change."""
        for name, module in self._modules.items():
            for key, weight in _weights(name, module).items():
                if weight.grad is not None:
                    self._averages.update(key, (weight * weight.grad).abs().float())

    def importance(self) -> dict[str, Tensor]:
        """Return the importance of every rank, by module, each of shape (rank,)."""
        importance: dict[str, Tensor] = {}
        for name, module in self._modules.items():
            down, up = _weights(name, module)
            if down in self._averages and up in self._averages:
                importance[name] = self._averages.score(down).mean(1) + self._averages.score(up).mean(0)
        return importance

    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Reallocate, where it is time."""
        stopped = self.stop_step is not None and step > self.stop_step
        if stopped or step <= self.warmup_steps or step % self.every_n_steps:
            return
        masks = {name: gate.bool().cpu() for name, gate in self._gates.items()}
        importance = {name: scores.cpu() for name, scores in self.importance().items()}
        moves = choose_moves(
            importance, masks, most=self.moves, minimum_rank=self.minimum_rank, spared=self._added
        )
        self._added = []
        for giver, index, taker in moves:
            self._gates[giver][index] = 0
            self._add_rank(taker)

    @torch.no_grad()
    def _add_rank(self, name: str) -> None:
        module = self._modules[name]
        index = int((self._gates[name] == 0).nonzero()[0])
        down, up = module.down.weight, module.up.weight
        # As nn.Linear, and so peft, draws A.
        bound = down.shape[1] ** -0.5
        row = torch.empty(down.shape[1]).uniform_(-bound, bound, generator=self._generator)
        down[index] = row.to(down)
        up[:, index] = 0
        down_key, up_key = _weights(name, module)
        self._averages.forget(down_key, (index,))
        self._averages.forget(up_key, (slice(None), index))
        self._gates[name][index] = 1
        self._added.append((name, index))

    def state_dict(self) -> dict[str, Any]:
        """Return the gates, the averages, what was just added and the generator's state."""
        return {
            **super().state_dict(),
            "averages": self._averages.state_dict(),
            "added": list(self._added),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state."""
        super().load_state_dict(state_dict)
        self._averages.load_state_dict(state_dict["averages"])
        self._added = list(state_dict["added"])
        self._generator.set_state(state_dict["generator"])


def _weights(name: str, module: LoraModule) -> dict[str, Tensor]:
    """Return A and B, in this order, under their names in the averages."""
    return {f"{name}.lora_A": module.down.weight, f"{name}.lora_B": module.up.weight}


def spread_evenly(budget: int, most: Mapping[str, int], least: int) -> dict[str, int]:
    """Return ranks that sum to the budget and differ as little as they can, the first ones being larger.

    Args:
        budget: The sum.
        most: Largest rank of every module.
        least: Smallest rank of every module.

    Raises:
        ValueError: There are no such ranks.
    """
    if least > min(most.values()) or not least * len(most) <= budget <= sum(most.values()):
        raise ValueError(
            f"{len(most)} LoRA layers of ranks {least} to {min(most.values())}..{max(most.values())} "
            f"cannot hold {budget} ranks together."
        )
    ranks = dict.fromkeys(most, least)
    for _ in range(budget - least * len(most)):
        free = [name for name in most if ranks[name] < most[name]]
        ranks[min(free, key=ranks.__getitem__)] += 1
    return ranks


def choose_moves(
    importance: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    most: int,
    minimum_rank: int,
    spared: Collection[tuple[str, int]] = (),
) -> list[Move]:
    """Choose which ranks leave which module for which other one.

    The modules with free ranks are served in the order of their importance, the mean over their active
    ranks, with the least important active rank there is at that moment. A module gives or takes, not
    both, and takes one rank at most.

    Args:
        importance: Of every rank of every module that takes part, each of shape (rank,).
        masks: Which ranks are active, each of shape (rank,), boolean.
        most: Most moves.
        minimum_rank: Rank no module falls below.
        spared: (module, index) of active ranks that must stay.
    """
    left = {name: int(masks[name].sum()) for name in importance}
    means = {name: float(importance[name][masks[name]].mean()) for name in importance}
    ranked = sorted(
        (float(importance[name][index]), name, int(index))
        for name in importance
        for index in masks[name].nonzero().flatten().tolist()
        if (name, index) not in spared
    )
    takers = sorted((name for name in importance if not masks[name].all()), key=means.__getitem__)
    moves: list[Move] = []
    givers: set[str] = set()
    taken: set[str] = set()
    while takers and len(moves) < most:
        taker = takers.pop()
        if taker in givers:
            continue
        found = next(
            (
                (score, name, index)
                for score, name, index in ranked
                if name != taker and name not in taken and left[name] > minimum_rank
            ),
            None,
        )
        if found is None or found[0] >= means[taker]:
            break
        _, giver, index = found
        ranked.remove(found)
        left[giver] -= 1
        givers.add(giver)
        taken.add(taker)
        moves.append((giver, index, taker))
    return moves
