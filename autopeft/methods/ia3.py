"""IA3, implemented by peft."""

from __future__ import annotations

from collections.abc import Hashable

from peft import IA3Config, PeftConfig

from autopeft.core.configuration import Adapter
from autopeft.methods.base import Placement
from autopeft.methods.peft_base import PeftMethod, module_names
from autopeft.models.site_shapes import SiteShape


class IA3(PeftMethod):
    """IA3: a learned vector that scales a linear layer's output, or the input of the ffn's last layer.

    Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
    Learning", 2022: keys, values and the ffn's intermediate activations are scaled.
    """

    name = "ia3"
    is_mergeable = True

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return the width of what is scaled."""
        return shape.in_features if shape.site.role == "ffn_down" else shape.out_features

    def group_key(self, shape: SiteShape, adapter: Adapter) -> Hashable:
        """Return what a peft config has for all its modules alike."""
        return shape.transposed

    def peft_config(self, placement: Placement) -> PeftConfig:
        """Return an IA3Config over the modules."""
        shape, _ = next(iter(placement.values()))
        scaled_inputs = [shape.module for site, (shape, _) in placement.items() if site.role == "ffn_down"]
        return IA3Config(
            target_modules=module_names(placement),
            feedforward_modules=scaled_inputs,
            fan_in_fan_out=shape.transposed,
        )
