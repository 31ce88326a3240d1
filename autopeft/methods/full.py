"""Full: the weights of a layer themselves are trained."""

from __future__ import annotations

from contextlib import ExitStack

from torch import nn

from autopeft.core.configuration import Adapter
from autopeft.methods.base import Method, Placement, Trainable, swap
from autopeft.models.site_shapes import SiteShape


class Full(Method):
    """Full fine-tuning of single layers: weight and bias are trained in a copy.

    Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", 2023. The copy stands in
    the layer while attached; the backbone's own weights come back on detaching.
    """

    name = "full"
    is_mergeable = True

    def obstacle(self, shape: SiteShape, adapter: Adapter, bits: int | None = None) -> str | None:
        """Return what is against it: weights that are packed cannot be trained."""
        return None if bits is None else f"its weights are packed in {bits} bits"

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return the number of parameters of the layer, or of the experts' matrices."""
        return shape.parameters

    def attach(self, model: nn.Module, placement: Placement, undo: ExitStack) -> Trainable:
        """Put trainable copies of the weights in place; see `Method.attach`."""
        parameters: Trainable = {}
        for site, (shape, _) in placement.items():
            module = model.get_submodule(shape.module)
            own = dict(module.named_parameters(recurse=False))
            names = [shape.parameter] if shape.parameter else [*own]
            copies = {name: nn.Parameter(own[name].detach().clone()) for name in names}
            for name, copy in copies.items():
                swap(module, name, copy, undo)
            parameters[site] = copies
        return parameters
