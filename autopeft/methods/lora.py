"""LoRA, implemented by peft."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

from peft import LoraConfig, PeftConfig

from autopeft.core.configuration import Adapter, Site
from autopeft.methods.base import Placement
from autopeft.methods.peft_base import PeftMethod
from autopeft.models.site_shapes import SiteShape


class Lora(PeftMethod):
    """LoRA: a low-rank update B·A beside a frozen weight, scaled by α/√r (rsLoRA) or α/r.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; Kalajdzievski, "A Rank
    Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.
    """

    name = "lora"
    is_mergeable = True
    size_pattern = "rank_pattern"

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return r·(d_in + d_out), of every expert."""
        return adapter.size_or_zero * (shape.in_features + shape.out_features) * shape.experts

    def obstacle(self, shape: SiteShape, adapter: Adapter, bits: int | None = None) -> str | None:
        """Return what is against it."""
        if shape.experts > 1 and adapter.option("dropout"):
            return "peft has no dropout in front of experts (set dropout to 0)"
        return None

    def group_key(self, shape: SiteShape, adapter: Adapter) -> Hashable:
        """Return what a peft config has for all its modules alike."""
        return adapter.option("rslora"), adapter.option("dropout"), shape.transposed

    def peft_config(self, placement: Placement) -> PeftConfig:
        """Return a LoraConfig with a rank and an alpha for every module."""
        shape, adapter = next(iter(placement.values()))
        rank, alpha = adapter.size, adapter.option("alpha")
        # PEFT reads pattern keys as regular expressions behind an optional "(.*\.)?" prefix, so a full
        # module name matches itself alone. Servers read no patterns: they name what differs alone.
        ranks = {shape.target: each.size for shape, each in placement.values() if each.size != rank}
        alphas = {shape.target: each.option("alpha") for shape, each in placement.values()}
        patterns: dict[str, Any] = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": ranks,
            "alpha_pattern": {module: each for module, each in alphas.items() if each != alpha},
        }
        return LoraConfig(
            **patterns,
            target_modules=[shape.target for shape, _ in placement.values() if not shape.parameter],
            target_parameters=[shape.target for shape, _ in placement.values() if shape.parameter] or None,
            use_rslora=bool(adapter.option("rslora")),
            lora_dropout=float(adapter.option("dropout")),
            fan_in_fan_out=shape.transposed,
        )


def lora_tensors(site: Site) -> tuple[str, str]:
    """Return how `Attachment.state_dict` calls A and B of a site's LoRA."""
    return f"{site}.{Lora.name}.lora_A.weight", f"{site}.{Lora.name}.lora_B.weight"


def lora_scaling(adapter: Adapter) -> float:
    """Return the factor of a low-rank update: α/√r as in rsLoRA, or α/r where the option says so."""
    divisor = (
        adapter.size_or_zero if ("rslora", False) in adapter.options else math.sqrt(adapter.size_or_zero)
    )
    return float(adapter.option("alpha")) / divisor
