"""Bottleneck adapters: in series behind a sublayer, or in parallel beside it.

`adapters` (AdapterHub) has them for transformers 4 only, and peft has none: these are small modules
held in place by hooks, so that they work on any architecture whose sublayers have an output projection.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autopeft.core.configuration import Adapter
from autopeft.methods.base import Method, Placement, Switchable, Trainable, hang
from autopeft.methods.layer_adapter import in_type_of
from autopeft.models.site_shapes import SiteShape

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class Bottleneck(Switchable):
    """down-projection → non-linearity → up-projection → scaling; the up-projection begins at 0."""

    down: Any  # a linear layer, or what computes as one
    up: Any

    def __init__(self, down: nn.Module, up: nn.Module, activation: str, scaling: float = 1.0) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.activation = ACTIVATIONS[activation]()
        self.scaling = scaling

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        given = in_type_of(self, hidden)
        update: Tensor = self.up(self.activation(self.down(given)))
        update = update if self.scaling == 1.0 else update * self.scaling
        return update if given is hidden else update.to(hidden.dtype)


class _BottleneckMethod(Method):
    """What series and parallel adapters share: the module, where it is kept and how it is removed."""

    reads_input: bool
    """Whether it reads the sublayer's input, and not its output."""

    def in_features(self, shape: SiteShape) -> int:
        """Return the width of what the adapter reads."""
        return shape.in_features if self.reads_input else shape.out_features

    def bottleneck(self, shape: SiteShape, adapter: Adapter) -> Bottleneck:
        """Return an adapter's module, on the CPU."""
        down = nn.Linear(self.in_features(shape), adapter.size_or_zero)
        up = nn.Linear(adapter.size_or_zero, shape.out_features)
        for parameter in (down.bias, up.weight, up.bias):
            nn.init.zeros_(parameter)
        scaling = float(adapter.option("scaling")) if "scaling" in adapter.specification.options else 1.0
        return Bottleneck(down, up, str(adapter.option("activation")), scaling)

    def connect(self, model: nn.Module, shape: SiteShape, bottleneck: Bottleneck) -> list[RemovableHandle]:
        """Hook the adapter into the model's forward pass."""
        raise NotImplementedError

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return b·(d_in + d_out) weights and b + d_out biases."""
        width = self.in_features(shape) + shape.out_features
        return adapter.size_or_zero * width + adapter.size_or_zero + shape.out_features

    def attach(self, model: nn.Module, placement: Placement, undo: ExitStack) -> Trainable:
        """Hook the adapters in; see `Method.attach`."""
        parameters: Trainable = {}
        for site, (shape, adapter) in placement.items():
            bottleneck = self.bottleneck(shape, adapter)
            hang(model.get_submodule(shape.module), f"autopeft_{self.name}", bottleneck, undo)
            for handle in self.connect(model, shape, bottleneck):
                undo.callback(handle.remove)
            parameters[site] = dict(bottleneck.named_parameters())
        return parameters


class Series(_BottleneckMethod):
    """Series adapter: y + f(y) behind a sublayer's output projection, before the residual.

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019; on the ffn alone it is the
    placement of Pfeiffer et al., "AdapterFusion", 2021.
    """

    name = "series"
    reads_input = False

    def connect(self, model: nn.Module, shape: SiteShape, bottleneck: Bottleneck) -> list[RemovableHandle]:
        """Add f(y) to the output y of the projection."""

        def add(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            return output + bottleneck(output) if bottleneck.is_on else output

        return [model.get_submodule(shape.module).register_forward_hook(add)]


class Parallel(_BottleneckMethod):
    """Parallel adapter: y + s·f(x), with x the sublayer's input and y its output.

    He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", 2022 (scaled parallel
    adapter, s = 4). x is what the sublayer's first linear layer is given: in a pre-norm block, the
    normalised hidden state.
    """

    name = "parallel"
    reads_input = True

    def connect(self, model: nn.Module, shape: SiteShape, bottleneck: Bottleneck) -> list[RemovableHandle]:
        """Remember x at the sublayer's first layer, and add s·f(x) to the output y of its last."""
        seen: list[Tensor] = []

        def forget(_module: nn.Module, _inputs: tuple[Any, ...]) -> None:
            seen.clear()  # of a pass that was broken off

        def remember(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            # The first call alone: DeBERTa's query layer is given relative positions afterwards.
            if not seen:
                seen.append(inputs[0])

        def add(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            given = seen.pop()
            return output + bottleneck(given) if bottleneck.is_on else output

        start = model.get_submodule(shape.attention_module or shape.input_module)
        return [
            start.register_forward_pre_hook(forget),
            model.get_submodule(shape.input_module).register_forward_pre_hook(remember),
            model.get_submodule(shape.module).register_forward_hook(add),
        ]
