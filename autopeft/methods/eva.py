"""EVA: LoRA that starts in the directions in which a layer's inputs vary."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from autopeft.core.configuration import Adapter
from autopeft.methods.data_initialised import HasWeight, LoraFromData, Statistic
from autopeft.methods.lora import Lora


class Eva(LoraFromData, Lora):
    """EVA: the rows of A are the leading principal components of the layer's inputs, B = 0.

    Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024. Ranks are the
    configuration's; the allocator `explained_variance` allocates them as EVA does.
    """

    name = "eva"
    statistic: Statistic = "input directions"

    def initial_values(self, adapter: Adapter, statistic: Tensor, layer: HasWeight) -> dict[str, Tensor]:
        """Return the first rows of A; see `DataInitialised.initial_values`."""
        return {"lora_A.weight": statistic[: adapter.size]}

    def as_lora(self, adapter: Adapter) -> Adapter:
        """Return the same as LoRA."""
        return Adapter("lora", adapter.size, dict(adapter.options))

    def lora_factors(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return A and B."""
        return tensors["lora_A.weight"], tensors["lora_B.weight"]
