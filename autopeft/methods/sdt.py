"""SDT: A and D of some channels of a state space are trained."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autopeft.core.configuration import Adapter
from autopeft.methods.base import Method, Placement, Switchable, Trainable
from autopeft.models.site_shapes import SiteShape

# In the order of a mixer's own parameters, which parametrizations are removed in to keep it.
_TRAINED = ("A_log", "D")


class ChannelUpdate(Switchable):
    """A parametrization of a parameter: what is added to the rows of some channels, 0 to begin with."""

    def __init__(self, parameter: nn.Parameter, channels: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(len(channels), *parameter.shape[1:], device=parameter.device))
        self.register_buffer("channels", channels)
        self.channels: Tensor

    def forward(self, original: Tensor) -> Tensor:
        """Return the parameter in single precision: in half of it, a small step would round to none."""
        return original.float().index_add(0, self.channels, self.values) if self.is_on else original


class SDT(Method):
    """Sparse dimension tuning: the rows of A (its logarithm) and D of `size` channels are trained.

    Galim et al., "Parameter-Efficient Fine-Tuning of State Space Models", 2024. The paper takes the channels
    whose A a warm-up on the data moves most; here, without data, they lie evenly over all. In Mamba-2 a
    channel is a head, and its A a single number.

    All states of a channel are trained, and its D. The paper chooses among the states as well, and trains the
    channel's columns of the projection to B and C in the place of D; in Mamba-2 no channel has such columns.
    """

    name = "sdt"
    is_mergeable = True

    def obstacle(self, shape: SiteShape, adapter: Adapter, bits: int | None = None) -> str | None:
        """Return what is against it: there are not so many channels."""
        channels = shape.in_features
        return f"its state space has {channels:,} channels" if adapter.size_or_zero > channels else None

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return the number of parameters of the channels."""
        return adapter.size_or_zero * shape.parameters // shape.in_features

    def attach(self, model: nn.Module, placement: Placement, undo: ExitStack) -> Trainable:
        """Parametrize A and D; see `Method.attach`."""
        tensors: Trainable = {}
        for site, (shape, adapter) in placement.items():
            mixer = model.get_submodule(shape.module)
            size = adapter.size_or_zero
            channels = torch.arange(size, dtype=torch.int32) * shape.in_features // size
            channels = channels.to(mixer.get_parameter("A_log").device)
            own = {"channels": channels}
            for name in reversed(_TRAINED):
                update = ChannelUpdate(mixer.get_parameter(name), channels)
                parametrize.register_parametrization(mixer, name, update, unsafe=True)  # it changes the type
                undo.callback(parametrize.remove_parametrizations, mixer, name, leave_parametrized=False)
                own[name] = update.values
            tensors[site] = own
        return tensors
