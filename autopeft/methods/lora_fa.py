"""LoRA-FA: LoRA with a frozen A."""

from __future__ import annotations

from torch import nn

from autopeft.core.configuration import Adapter
from autopeft.methods.base import Placement, Trainable
from autopeft.methods.lora import Lora
from autopeft.models.site_shapes import SiteShape


class LoraFA(Lora):
    """LoRA of which B alone is trained, so that a layer's input need not be kept for the backward pass.

    Zhang et al., "LoRA-FA: Memory-Efficient Low-Rank Adaptation for Large Language Models Fine-Tuning", 2023.
    A is kept and exported with B: to peft it is a LoRA.
    """

    name = "lora_fa"

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return r·d_out."""
        return adapter.size_or_zero * shape.out_features

    def inject(self, model: nn.Module, placement: Placement) -> Trainable:
        """Put LoRA in and freeze A; see `PeftMethod.inject`."""
        trainable = super().inject(model, placement)
        for site in placement:
            trainable[site]["lora_A.weight"].requires_grad_(False)
        return trainable
