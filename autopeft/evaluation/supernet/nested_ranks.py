"""The sandwich rule over the rows of a batch, and the hooks that train each row with its own ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from numpy.typing import NDArray
from torch import Tensor, nn

from autopeft.callbacks.lora_modules import LoraModule

_LARGEST_SHARE = 0.25
_SMALLEST_SHARE = 0.125
_LEAST_DENSITY = 0.2


class SandwichRankSampler:
    """Draws sub-configurations of LoRA: a rank for each module and row, 0 where it has none.

    The sandwich rule of Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques",
    2019, over the rows of one batch: some train the largest configuration, some rank 1
    everywhere, the others random sub-configurations. Of these each has a lowest block, a share of the
    modules above it, and ranks log-uniform over powers of two, half of the time the same for all modules.
    For each module `blocks` has the index of its block, and `ranks` its largest rank.
    """

    def __init__(self, blocks: NDArray[np.int64], ranks: NDArray[np.int64], seed: int) -> None:
        self.blocks = blocks
        self.largest = ranks
        self._generator = np.random.default_rng(seed)

    def sandwich(self, rows: int) -> NDArray[np.int64]:
        """Return the ranks that the rows of a batch train, shuffled, of shape (rows, modules)."""
        largest = max(1, round(_LARGEST_SHARE * rows))
        smallest = min(rows - largest, max(1, round(_SMALLEST_SHARE * rows)))
        drawn = [self.draw() for _ in range(rows - largest - smallest)]
        ranks = np.array([self.largest] * largest + [np.ones_like(self.largest)] * smallest + drawn)
        return self._generator.permutation(ranks)

    def draw(self) -> NDArray[np.int64]:
        """Return the ranks of a random sub-configuration, of shape (modules,)."""
        generator = self._generator
        lowest = generator.integers(self.blocks.max() + 1)
        density = generator.uniform(_LEAST_DENSITY, 1.0)
        on = (self.blocks >= lowest) & (generator.random(len(self.blocks)) < density)
        place = generator.random() if generator.random() < 0.5 else generator.random(len(self.blocks))
        # Equal shares of [0, 1) for the powers of two from 1 to the largest rank.
        doublings = np.floor(place * (np.log2(self.largest) + 1))
        ranks = np.minimum(2.0**doublings, self.largest).astype(np.int64)
        return np.where(on, ranks, 0)


class PerRowRanks:
    """Train each row of a batch with ranks of its own: one pass trains many sub-configurations.

    A row whose rank at a module is r computes W·x + s·B[:, :r]·A[:r]·x, and has a gradient in those ranks
    alone (the nesting of DyLoRA, Valipour et al., 2023). The scaling s is that of the largest rank for every
    row: with the scaling of a LoRA of rank r, the rows would pull the shared ranks to different magnitudes.
    """

    def __init__(self, sampler: SandwichRankSampler, modules: Sequence[LoraModule]) -> None:
        self._sampler = sampler
        self._modules = modules
        self._gates: dict[str, Tensor] = {}

    @contextmanager
    def gating(self, training: LightningModule) -> Iterator[None]:
        """Put the gates onto A's outputs in a `with` block, drawn for each batch that a training is given."""
        with ExitStack() as stack:
            stack.callback(training.register_forward_pre_hook(self._draw).remove)
            for module in self._modules:
                hook = module.down.register_forward_hook(partial(self._gate, module.name))
                stack.callback(hook.remove)
            yield

    def _draw(self, _training: nn.Module, inputs: tuple[Mapping[str, Tensor]]) -> None:
        """Draw the ranks of a batch's rows."""
        (batch,) = inputs
        ranks = torch.from_numpy(self._sampler.sandwich(len(next(iter(batch.values())))))
        for module, of_rows in zip(self._modules, ranks.T, strict=True):
            self._gates[module.name] = rank_gates(of_rows, module)

    def _gate(self, name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        gate = self._gates[name].to(output.dtype)
        if output.shape[0] != gate.shape[0] or output.ndim < 2:
            raise ValueError(
                f"The rows of a batch cannot train ranks of their own: {name} gives a tensor of shape "
                f"{tuple(output.shape)} for {gate.shape[0]} rows."
            )
        return output * gate.view(gate.shape[0], *[1] * (output.ndim - 2), gate.shape[1])


def rank_gates(ranks: Tensor, module: LoraModule) -> Tensor:
    """Return 1 at each row's first ranks and 0 at the others, of shape (rows, ranks of the module)."""
    return (torch.arange(module.rank) < ranks[:, None]).to(module.down.weight)
