"""BitFit: the bias of a linear layer or norm is trained.

peft has biases only as an option of LoRA (all or none), and BEFT's for `nn.Linear` alone; this one
takes any module with a bias, GPT-2's Conv1D and norms included.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from autopeft.core.configuration import Adapter
from autopeft.methods.base import Method, Placement, Trainable, swap
from autopeft.models.site_shapes import SiteShape


class BitFit(Method):
    """BitFit trains biases only (Ben Zaken et al., "BitFit", 2022).

    The bias is trained in a copy that stands in the module while attached; the backbone's own bias
    comes back on detaching.
    """

    name = "bitfit"
    is_mergeable = True

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return the number of biases."""
        return shape.bias

    def attach(self, model: nn.Module, placement: Placement, undo: ExitStack) -> Trainable:
        """Put trainable copies of the biases in place; see `Method.attach`."""
        parameters: Trainable = {}
        for site, (shape, _) in placement.items():
            module = model.get_submodule(shape.module)
            if isinstance(module, BaseTunerLayer):  # LoRA or IA3 on the same layer
                module = module.get_base_layer()
            bias = nn.Parameter(cast(nn.Parameter, module.bias).detach().clone())
            swap(module, "bias", bias, undo)
            parameters[site] = {"bias": bias}
        return parameters
