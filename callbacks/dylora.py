"""Train a LoRA whose every truncation works: DyLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from autopeft.callbacks.rank_gates import RankGates
from autopeft.core.errors import check_numbers


@dataclass(eq=False, kw_only=True)
class DyLoRA(RankGates):
    """Draw a rank b at each optimizer step, and train with the first b ranks of every module.

    Valipour et al., "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free
    Low-Rank Adaptation", 2023: y = W·x + s(b)·B[:, :b]·A[:b]·x, with b uniform and s(b) the scaling a LoRA
    of rank b has. `truncated_state(b)` is a LoRA of rank b as it was trained, for every b. Modules of a lower
    rank than b use all they have. Validation, and the fitted model, use every rank.

    Args:
        minimum_rank: Lowest rank that is drawn.
        maximum_rank: Highest rank that is drawn; None for the highest rank of any module.
        seed: Seed of the draws.

    Raises:
        ValueError: An argument is out of range, also of the module's ranks when a fit starts.
    """

    minimum_rank: int = 1
    maximum_rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(least=1, minimum_rank=self.minimum_rank)
        if self.maximum_rank is not None:
            check_numbers(least=self.minimum_rank, maximum_rank=self.maximum_rank)
        self._generator = torch.Generator().manual_seed(self.seed)
        self._drawn: tuple[int, int] | None = None
        self._used: int | None = None  # every rank

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the arguments with the ranks there are."""
        super().on_fit_start(trainer, pl_module)
        highest = self._highest_rank
        if max(self.minimum_rank, self.maximum_rank or 0) > highest:
            raise ValueError(
                f"Ranks from {self.minimum_rank} to {self.maximum_rank or highest} cannot be drawn: the "
                f"LoRA layers have {highest} at most."
            )

    @property
    def _highest_rank(self) -> int:
        return max(module.rank for module in self._modules.values())

    @property
    def drawn_rank(self) -> int | None:
        """The rank of the latest optimizer step; None before the first."""
        return None if self._drawn is None else self._drawn[1]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Draw a rank where an optimizer step begins, and use it."""
        if self._drawn is None or self._drawn[0] != trainer.global_step:
            high = self.maximum_rank or self._highest_rank
            rank = int(torch.randint(self.minimum_rank, high + 1, (), generator=self._generator))
            self._drawn = trainer.global_step, rank
        self._used = self._drawn[1]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use every rank; in a fit the next batch turns back to the drawn one."""
        self._used = None

    on_train_end = on_validation_start

    def fold(self) -> None:
        """Use every rank, and take the gates off."""
        self._used = None
        super().fold()

    def factors(self, name: str) -> Tensor:
        """Return what each rank of a module is multiplied by: those above the one in use by 0."""
        module = self._modules[name]
        rank = min(self._used or module.rank, module.rank)
        # The layer multiplies by the scaling of its full rank.
        rescaling = module.scaling(rank) / module.scaling(module.rank)
        return (torch.arange(module.rank, device=module.down.weight.device) < rank) * rescaling

    def truncated_state(self, rank: int | None = None) -> dict[str, Tensor]:
        """Return the tensors of an ordinary LoRA of the first ranks; see `RankGates.truncated_state`.

        Args:
            rank: How many ranks to keep, from 1 (else a ValueError) to what a module has; None for all.
        """
        if rank is not None:
            check_numbers(least=1, rank=rank)
        before, self._used = self._used, rank
        try:
            return super().truncated_state()
        finally:
            self._used = before

    def state_dict(self) -> dict[str, Any]:
        """Return the latest draw and the generator's state; the gates follow from them."""
        return {"drawn": self._drawn, "generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state."""
        self._drawn = state_dict["drawn"] and tuple(state_dict["drawn"])
        self._generator.set_state(state_dict["generator"])
