"""Full fine-tuning on a resident backbone, as a baseline: every weight is trained in a copy."""

from __future__ import annotations

from torch import nn

from autopeft.core.configuration import Configuration
from autopeft.methods.attachment import Attachment
from autopeft.methods.base import swap
from autopeft.models.backbone import Backbone


class FullFineTuning(Attachment):
    """Train every parameter, in a copy: afterwards the backbone is what it was. See `Attachment`.

    Takes as much memory again as the backbone has parameters.

    Raises:
        ValueError: The configuration, which gives learning rate and weight decay, has adapters.
    """

    def __init__(self, backbone: Backbone, configuration: Configuration, seed: int = 0) -> None:
        if len(configuration):
            raise ValueError(f"Full fine-tuning has no adapters, got {configuration!r}.")
        super().__init__(backbone, configuration, seed)

    def _attach_methods(self) -> None:
        copies: dict[int, nn.Parameter] = {}  # tied weights stay tied
        heads = tuple(f"{head}." for head in self.backbone.head)
        for path, module in self.backbone.model.named_modules():
            if f"{path}.".startswith(heads):
                continue
            for name, original in list(module.named_parameters(recurse=False)):
                if id(original) not in copies:
                    copies[id(original)] = nn.Parameter(original.detach().clone())
                copy = copies[id(original)]
                swap(module, name, copy, self._undo)
                self.parameters.setdefault(f"full.{path}.{name}", copy)

    def _is_trained(self, name: str) -> bool:
        return True

    @property
    def cut(self) -> None:
        """None: nothing is frozen."""
        return None

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters of backbone and head."""
        return sum(parameter.numel() for parameter in set(self.parameters.values()))
