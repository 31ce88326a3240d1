"""What a training holds at its peak, put together from what was counted of one step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from torch import Tensor

_STEP_COUNTER_BYTES = 4  # AdamW keeps one float32 step counter a parameter


@dataclass(frozen=True, kw_only=True)
class MemoryCount:
    """Peak live bytes of a training, and what they consist of.

    Attributes:
        peak_bytes: Largest number of live bytes at any moment of a step.
        parameter_bytes: Parameters and buffers, frozen ones included.
        gradient_bytes: Gradients of all trainable parameters.
        optimizer_bytes: State of AdamW.
    """

    peak_bytes: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @classmethod
    def of_step(
        cls,
        *,
        parameter_bytes: int,
        batch_bytes: int,
        trainable: Iterable[Tensor],
        forward_peak: int,
        backward_peak: int,
    ) -> Self:
        """Put a count together.

        Args:
            parameter_bytes: Parameters and buffers, frozen ones included.
            batch_bytes: The batch.
            trainable: Trainable parameters; their gradients are as large.
            forward_peak: Largest number of bytes that the forward pass made and that were alive at once.
            backward_peak: The same of the backward pass, what the forward pass left included.
        """
        sizes = [parameter.numel() * parameter.element_size() for parameter in trainable]
        trainable_bytes = sum(sizes)
        optimizer_bytes = 2 * trainable_bytes + _STEP_COUNTER_BYTES * len(sizes)
        # AdamW on the CPU goes parameter by parameter, with two temporaries of its size.
        update = trainable_bytes + 2 * max(sizes, default=0)
        # The gradients of the step before are alive during the forward pass.
        step = max(trainable_bytes + forward_peak, backward_peak, update)
        return cls(
            peak_bytes=parameter_bytes + batch_bytes + optimizer_bytes + step,
            parameter_bytes=parameter_bytes,
            gradient_bytes=trainable_bytes,
            optimizer_bytes=optimizer_bytes,
        )

    @property
    def activation_bytes(self) -> int:
        """The rest of the peak: batch, activations, temporaries (and gradients not there yet)."""
        others = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        return max(0, self.peak_bytes - others)
