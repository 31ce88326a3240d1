"""State-offset tuning: a learnt offset is added to the hidden state of a state space at every token."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopeft.core.configuration import Adapter
from autopeft.methods.base import Method, Placement, Switchable, Trainable, hang
from autopeft.methods.layer_adapter import in_type_of
from autopeft.models.site_shapes import SiteShape


class StateOffset(Switchable):
    """What an offset h' of the state adds to a mixer's scan: (C·h') · silu(gate) for each token.

    A mixer returns W((C·h + D·x) · silu(gate)), with W its output projection: hooks of its layers see C and
    the gate, and add to what the projection is given.
    """

    def __init__(self, channels: int, states: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(channels, states))
        self._seen: dict[str, Tensor] = {}  # of the pass that runs

    def begin(self, mixer: nn.Module, _inputs: Any) -> None:
        """Have a mixer call its layers in training too, as it does in evaluation.

        There a kernel would else read the layers' weights past them.
        """
        mixer.training = False

    def see_gate(self, _layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        """Keep the second half of the projection to (x, gate), (..., channels)."""
        self._seen["gate"] = output.chunk(2, dim=-1)[1]

    def see_output_matrix(self, _layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        """Keep C, (..., states)."""
        self._seen["output matrix"] = output[..., -self.offset.shape[1] :]

    def add(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Add to the gated scan, (..., channels)."""
        if not self.is_on:
            return inputs
        (scanned,) = inputs
        read = functional.linear(in_type_of(self, self._seen["output matrix"]), self.offset)
        return (scanned + (read * functional.silu(self._seen["gate"])).to(scanned.dtype),)

    def end(self, mixer: nn.Module, _inputs: Any, _output: Any) -> None:
        """Put the mixer in the mode that it was in, which is this module's."""
        mixer.training = self.training
        self._seen.clear()


class StateOffsetTuning(Method):
    """State-offset tuning: h' in y = C·(h + h') is trained, a number for each channel and state.

    Kang et al., "State-offset Tuning: State-based Parameter-Efficient Fine-Tuning for State Space Models",
    2025. Where padding is masked, C is 0 there, and nothing is added. It needs a mixer whose C a module
    returns, as those of Mamba, Falcon-Mamba and Jamba.
    """

    name = "state_offset"

    def obstacle(self, shape: SiteShape, adapter: Adapter, bits: int | None = None) -> str | None:
        """Return what is against it: Mamba-2 makes C by a convolution that its kernels compute."""
        return None if shape.output_matrix_module else "no module of its state space returns C"

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return the number of channels times that of states."""
        return shape.in_features * shape.out_features

    def attach(self, model: nn.Module, placement: Placement, undo: ExitStack) -> Trainable:
        """Hook the offsets to the mixers' layers; see `Method.attach`."""
        parameters: Trainable = {}
        for site, (shape, _) in placement.items():
            mixer = model.get_submodule(shape.module)
            module = StateOffset(shape.in_features, shape.out_features)
            hang(mixer, "autopeft_state_offset", module, undo)
            for handle in (
                mixer.register_forward_pre_hook(module.begin),
                mixer.get_submodule("in_proj").register_forward_hook(module.see_gate),
                model.get_submodule(shape.output_matrix_module).register_forward_hook(
                    module.see_output_matrix
                ),
                mixer.get_submodule("out_proj").register_forward_pre_hook(module.add),
                mixer.register_forward_hook(module.end, always_call=True),
            ):
                undo.callback(handle.remove)
            parameters[site] = dict(module.named_parameters())
        return parameters
