"""Move ranks from where they are not needed to where they are, while training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from autopeft.callbacks.smoothed_sensitivity import SensitivityGates
from autopeft.core.errors import check_numbers

Move = tuple[str, int, str]
"""A rank that is moved: (module it leaves, its index there, module that gains one)."""


@dataclass(eq=False, kw_only=True)
class ElaLoRA(SensitivityGates):
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
        stop_step: Optimizer step after which the ranks stay as they are; None for no bound.
        seed: Seed of the rows of A that are drawn anew.
        warmup_steps, betas: See `SensitivityGates`.

    Raises:
        ValueError: An argument is out of range; when a fit starts: the layers cannot hold the budget.
    """

    moves: int
    minimum_rank: int = 1
    stop_step: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(least=1, moves=self.moves, minimum_rank=self.minimum_rank)
        if self.stop_step is not None:
            check_numbers(least=self.warmup_steps, stop_step=self.stop_step)
        self._generator = torch.Generator().manual_seed(self.seed)
        self._added: list[tuple[str, int]] = []

    def initial_gates(self) -> dict[str, Tensor]:
        """Return gates that spread the budget evenly."""
        self.check_budget(self.minimum_rank)
        largest = {name: module.rank for name, module in self._modules.items()}
        return self.first_ranks(spread_evenly(self.budget, largest, self.minimum_rank))

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Take the step's sensitivities into the averages, before weights and gradients change."""
        for name, module in self._modules.items():
            for letter, weight in (("A", module.down.weight), ("B", module.up.weight)):
                if weight.grad is not None:
                    self._averages.update(f"{name}.lora_{letter}", (weight * weight.grad).abs().float())

    def importance(self) -> dict[str, Tensor]:
        """Return the importance of every rank, by module, each of shape (rank,)."""
        return {
            name: self._averages.score(f"{name}.lora_A").mean(1)
            + self._averages.score(f"{name}.lora_B").mean(0)
            for name in self._modules
            if {f"{name}.lora_A", f"{name}.lora_B"} <= self._averages.means.keys()
        }

    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Reallocate, where it is time."""
        if not self.is_due(step) or (self.stop_step is not None and step > self.stop_step):
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
        for averages in (self._averages.means, self._averages.uncertainties):  # a new rank has no history
            averages[f"{name}.lora_A"][index] = 0
            averages[f"{name}.lora_B"][:, index] = 0
        self._gates[name][index] = 1
        self._added.append((name, index))

    def state_dict(self) -> dict[str, Any]:
        """Return the gates, the averages, what was just added and the generator's state."""
        own = {"added": list(self._added), "generator": self._generator.get_state()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state."""
        super().load_state_dict(state_dict)
        self._added = list(state_dict["added"])
        self._generator.set_state(state_dict["generator"])


def spread_evenly(budget: int, most: Mapping[str, int], least: int) -> dict[str, int]:
    """Return ranks that sum to the budget and differ as little as they can, the first ones being larger.

    Every rank is at least the least one and at most what `most` says of its module.
    """
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

    Importance and masks, which say what ranks are active, are of shape (rank,) a module that takes part.
    Ranks that are spared, as (module, index), stay.
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
    while takers and len(moves) < most:
        taker = takers.pop()
        if any(giver == taker for giver, _, _ in moves):
            continue
        served = {taker, *(earlier for _, _, earlier in moves)}
        found = next(
            (rank for rank in ranked if rank[1] not in served and left[rank[1]] > minimum_rank), None
        )
        if found is None or found[0] >= means[taker]:
            break
        _, giver, index = found
        ranked.remove(found)
        left[giver] -= 1
        moves.append((giver, index, taker))
    return moves
