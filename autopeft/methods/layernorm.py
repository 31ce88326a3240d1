"""LayerNorm tuning, implemented by peft."""

from __future__ import annotations

from peft import LNTuningConfig, PeftConfig

from autopeft.core.configuration import Adapter
from autopeft.methods.base import Placement
from autopeft.methods.peft_base import PeftMethod, module_names
from autopeft.models.site_shapes import SiteShape


class LayerNormTuning(PeftMethod):
    """LayerNorm tuning: scale and shift of a norm are trained in a copy.

    Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", 2023.
    """

    name = "layernorm"
    is_mergeable = True

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return the number of parameters of the norm."""
        return shape.parameters

    def peft_config(self, placement: Placement) -> PeftConfig:
        """Return an LNTuningConfig over the modules."""
        return LNTuningConfig(target_modules=module_names(placement))
