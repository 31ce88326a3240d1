"""Train a LoRA whose every truncation works: DyLoRA."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from autopeft.callbacks.rank_gates import RankGates, check_at_least


class DyLoRA(RankGates):
    """Draw a rank b at each optimizer step, and train with the first b ranks of every module.

    Valipour et al., "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free
    Low-Rank Adaptation", 2023: y = W·x + s(b)·B[:, :b]·A[:b]·x, with b uniform and s(b) the scaling a LoRA
    of rank b has. So the first ranks learn to do without the others, and `truncated_state(b)` is a LoRA
    of rank b as it was trained, for every b. Modules of a lower rank than b use all they have.
    Validation, and the fitted model, use every rank.

    Args:
        minimum_rank: Lowest rank that is drawn.
        maximum_rank: Highest rank that is drawn; None for the highest rank of any module.
        seed: Seed of the draws.

    Raises:
        ValueError: An argument is out of range, also of the module's ranks when a fit starts.
    """

    def __init__(self, *, minimum_rank: int = 1, maximum_rank: int | None = None, seed: int = 0) -> None:
        super().__init__()
        check_at_least("minimum_rank", minimum_rank, 1)
        if maximum_rank is not None:
            check_at_least("maximum_rank", maximum_rank, minimum_rank)
        self.minimum_rank = minimum_rank
        self.maximum_rank = maximum_rank
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: tuple[int, int] | None = None

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

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw a rank where an optimizer step begins, and use it."""
        if self._drawn is None or self._drawn[0] != trainer.global_step:
            high = self.maximum_rank or self._highest_rank
            rank = int(torch.randint(self.minimum_rank, high + 1, (), generator=self._generator))
            self._drawn = trainer.global_step, rank
        self._use(self._drawn[1])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use every rank; in a fit the next batch turns back to the drawn one."""
        self._use(None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use every rank."""
        self._use(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Use every rank, and take the gates off."""
        self._use(None)
        super().on_exception(trainer, pl_module, exception)

    def _use(self, rank: int | None) -> None:
        for name, gate in self._gates.items():
            gate.copy_(self._factors_of(name, rank))

    def _factors_of(self, name: str, rank: int | None) -> Tensor:
        module = self._modules[name]
        device = module.down.weight.device
        if rank is None or rank >= module.rank:
            return torch.ones(module.rank, device=device)
        # The layer multiplies by the scaling of its full rank.
        rescaling = module.scaling(rank) / module.scaling(module.rank)
        return (torch.arange(module.rank, device=device) < rank) * rescaling

    def truncated_state(self, rank: int | None = None) -> dict[str, Tensor]:
        """Return the tensors of an ordinary LoRA of the first ranks; see `RankGates.truncated_state`.

        Args:
            rank: How many ranks to keep, at most as many as a module has; None for all.

        Raises:
            ValueError: The rank is below 1.
        """
        if rank is not None:
            check_at_least("rank", rank, 1)
        state: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, module in self._modules.items():
                state |= module.truncated(self._factors_of(name, rank))
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return the latest draw and the generator's state; the gates follow from them."""
        return {"drawn": self._drawn, "generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state."""
        self._drawn = state_dict["drawn"] and tuple(state_dict["drawn"])
        self._generator.set_state(state_dict["generator"])
