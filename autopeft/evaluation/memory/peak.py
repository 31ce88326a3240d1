"""What a training holds at its peak, put together from what was counted of one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

_STEP_COUNTER_BYTES = 4  # AdamW keeps one float32 step counter a parameter


@dataclass(frozen=True, kw_only=True)
class MemoryCount:
    """Peak live bytes of a training, and what they consist of.

    Counts are equal where the peak and its parts are; what the two passes hold is not compared.

    Attributes:
        peak_bytes: Largest number of live bytes at any moment of a step.
        parameter_bytes: Parameters and buffers, frozen ones included.
        gradient_bytes: Gradients of all trainable parameters.
        optimizer_bytes: State of AdamW.
        forward_bytes: Largest number of bytes that the forward pass made and that were alive at once.
        backward_bytes: The same of the backward pass, what the forward pass left included.
        activation_bytes: The rest of the peak: batch, activations, temporaries.
    """

    peak_bytes: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    forward_bytes: int = field(compare=False)
    backward_bytes: int = field(compare=False)

    @classmethod
    def of_step(
        cls,
        *,
        parameter_bytes: int,
        batch_bytes: int,
        trainable_bytes: int,
        trainable_tensors: int,
        largest_bytes: int,
        forward_peak: int,
        backward_peak: int,
    ) -> Self:
        """Put a count together.

        Args:
            parameter_bytes: Parameters and buffers, frozen ones included.
            batch_bytes: The batch.
            trainable_bytes: Trainable parameters, and so their gradients.
            trainable_tensors: How many they are.
            largest_bytes: The largest of them.
            forward_peak: Largest number of bytes that the forward pass made and that were alive at once.
            backward_peak: The same of the backward pass, what the forward pass left included.
        """
        optimizer_bytes = 2 * trainable_bytes + _STEP_COUNTER_BYTES * trainable_tensors
        # AdamW on the CPU goes parameter by parameter, with two temporaries of its size.
        update = 2 * largest_bytes
        step = max(trainable_bytes + forward_peak, backward_peak, trainable_bytes + update)
        return cls(
            peak_bytes=parameter_bytes + batch_bytes + optimizer_bytes + step,
            parameter_bytes=parameter_bytes,
            gradient_bytes=trainable_bytes,
            optimizer_bytes=optimizer_bytes,
            forward_bytes=forward_peak,
            backward_bytes=backward_peak,
        )

    @property
    def activation_bytes(self) -> int:
        """The rest of the peak: batch, activations, temporaries (and gradients not there yet)."""
        others = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        return max(0, self.peak_bytes - others)
