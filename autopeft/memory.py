"""Peak training memory, counted on fake tensors: exact, before training, the same on every machine.

Two optimizer steps are followed in the order Lightning takes them: forward with the gradients of the step
before still there, gradients freed, backward, AdamW. Forward and backward are run once on tensors without
data while every live storage is counted; what the optimizer adds follows from the trainable parameters. What
kernels allocate for themselves inside one operation is not seen.

There are two ways to run without data: fake CPU tensors, which take every path the CPU would take, and meta
tensors (`autopeft.meta_tensors`), which take a tenth of the time. `MemoryCounter` uses the second where it
has seen it agree with the first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from autopeft.batches import LABELS, model_inputs
from autopeft.live_storage import Loss, StorageCounter
from autopeft.meta_autocast import MetaAutocast
from autopeft.meta_tensors import MetaCounter, cpu_attention
from autopeft.modes import every_module, in_mode
from autopeft.precision import Precision, autocast

_STEP_COUNTER_BYTES = 4  # AdamW keeps one float32 step counter a parameter


@dataclass(frozen=True, kw_only=True)
class MemoryCount:
    """Peak live bytes of a training, and what they consist of.

    Attributes:
        peak_bytes: Largest number of live bytes at any moment of a step.
        parameter_bytes: Parameters and buffers, frozen ones included.
        gradient_bytes: Gradients of all trainable parameters.
        optimizer_bytes: State of AdamW.
        activation_bytes: The rest of the peak: batch, activations, temporaries.
    """

    peak_bytes: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def activation_bytes(self) -> int:
        """The rest of the peak: batch, activations, temporaries (and gradients not there yet)."""
        others = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        return max(0, self.peak_bytes - others)


class MemoryCounter:
    """Count candidates of one resident model; what the backbone contributes is converted once.

    Args:
        model: A transformers model with a head, with whatever is attached to it at the time of a count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._remembered: dict[Any, Any] = {}
        self._agrees: dict[tuple[frozenset[type], Hashable], bool] = {}

    def count(
        self, batch: Mapping[str, Tensor], loss: Loss, *, precision: Precision = "32-true"
    ) -> MemoryCount:
        """Count one candidate, as attached now. Model, gradients and random generators stay untouched.

        Args:
            batch: The largest training batch, labels under "labels"; only its shapes matter.
            loss: Maps logits (batch, labels) and labels (batch,) to a scalar.
            precision: "bf16-mixed" counts under autocast.

        Raises:
            ValueError: The model does something that takes data, as a mixture of experts does.
        """
        try:
            with in_mode(self._model, training=True):
                shapes = frozenset((name, tensor.shape) for name, tensor in model_inputs(batch).items())
                kind = frozenset(map(type, every_module(self._model))), (shapes, precision)
                if self._is_quick(*kind):
                    return self._count_on_meta(batch, loss, precision)
                slow = self._count_on_fake(batch, loss, precision)
                if kind not in self._agrees:
                    self._agrees[kind] = slow == self._try_on_meta(batch, loss, precision)
                return slow
        except (NotImplementedError, RuntimeError, AssertionError) as error:
            raise ValueError(
                f"The peak memory of {type(self._model).__name__} cannot be counted without running it "
                f"({str(error).strip().splitlines()[0]}): leave peak_memory out of objectives and "
                "constraints."
            ) from error

    def _is_quick(self, modules: frozenset[type], setting: Hashable) -> bool:
        """Whether the quick way was seen to agree for a model of these and perhaps more kinds of modules."""
        return any(
            agrees and setting == known and modules <= several
            for (several, known), agrees in self._agrees.items()
        )

    def _count_on_fake(self, batch: Mapping[str, Tensor], loss: Loss, precision: Precision) -> MemoryCount:
        with FakeTensorMode() as fake:
            context = autocast(precision, "cpu")
            return self._count(StorageCounter(), partial(_on_cpu, fake), batch, loss, context)

    def _try_on_meta(
        self, batch: Mapping[str, Tensor], loss: Loss, precision: Precision
    ) -> MemoryCount | None:
        try:
            return self._count_on_meta(batch, loss, precision)
        except (NotImplementedError, RuntimeError):
            return None

    def _count_on_meta(self, batch: Mapping[str, Tensor], loss: Loss, precision: Precision) -> MemoryCount:
        def convert(tensor: Tensor) -> Tensor:
            made = torch.empty_like(tensor, device="meta")
            return made.requires_grad_(tensor.requires_grad)

        mixed = MetaAutocast() if precision == "bf16-mixed" else None
        with cpu_attention(self._remembered, None if mixed is None else mixed.lowered):
            context = nullcontext() if mixed is None else mixed.casting()
            return self._count(MetaCounter(self._remembered), convert, batch, loss, context)

    def _count(
        self,
        counter: StorageCounter,
        convert: Callable[[Tensor], Tensor],
        batch: Mapping[str, Tensor],
        loss: Loss,
        forward: AbstractContextManager[Any],
    ) -> MemoryCount:
        with _converted(self._model, convert) as (parameters, buffers):
            inputs = {name: convert(one) for name, one in model_inputs(batch).items()}
            labels = convert(batch[LABELS])
            batch_bytes = counter.exclude((*inputs.values(), labels))
            parameter_bytes = counter.exclude((*parameters, *buffers))
            trainable = [one for one in parameters if one.requires_grad]
            gradient_bytes = sum(one.numel() * one.element_size() for one in trainable)
            optimizer_bytes = 2 * gradient_bytes + _STEP_COUNTER_BYTES * len(trainable)
            with counter:
                with forward:
                    output = self._model(**inputs)
                    value = loss(output.logits, labels)
                    del output
                    forward_peak = counter.peak_bytes
                    counter.restart_peak()
                value.backward()
                backward_peak = counter.peak_bytes
        # AdamW on the CPU goes parameter by parameter, with two temporaries of its size.
        temporaries = 2 * max((one.numel() * one.element_size() for one in trainable), default=0)
        step = max(gradient_bytes + forward_peak, backward_peak, gradient_bytes + temporaries)
        return MemoryCount(
            peak_bytes=parameter_bytes + batch_bytes + optimizer_bytes + step,
            parameter_bytes=parameter_bytes,
            gradient_bytes=gradient_bytes,
            optimizer_bytes=optimizer_bytes,
        )


@contextmanager
def _converted(
    model: nn.Module, convert: Callable[[Tensor], Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Put converted tensors in the place of a model's parameters and buffers, tied ones once.

    It is what `torch.func.functional_call` does, in one walk through the model in place of five.

    Yields:
        The converted parameters and buffers.
    """
    converted: dict[int, Tensor] = {}
    originals: list[tuple[dict[str, Any], str, Tensor]] = []
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    try:
        for module in every_module(model):
            holders: tuple[dict[str, Any], dict[str, Any]] = (module._parameters, module._buffers)
            for holder, several in zip(holders, found, strict=True):
                for name, original in holder.items():
                    if original is None:
                        continue
                    if id(original) not in converted:
                        converted[id(original)] = convert(original)
                        several.append(converted[id(original)])
                    originals.append((holder, name, original))
        for holder, name, original in originals:
            holder[name] = converted[id(original)]
        yield found
    finally:
        for holder, name, original in originals:
            holder[name] = original


def _on_cpu(fake: FakeTensorMode, tensor: Tensor) -> Tensor:
    """Return a fake CPU tensor: a count must not depend on where the model lies."""
    converted: Tensor = fake.from_tensor(tensor)
    if converted.device.type != "cpu":
        converted = converted.detach().cpu().requires_grad_(tensor.requires_grad)
    return converted


def count_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Return the floating-point operations of one forward pass over a batch, counted on fake tensors.

    Counted by `torch.utils.flop_counter` (matrix products and attention).
    """
    with FakeTensorMode() as fake, torch.no_grad():
        tensors: dict[str, Tensor] = {
            name: _on_cpu(fake, one) for name, one in (*model.named_parameters(), *model.named_buffers())
        }
        inputs = {name: _on_cpu(fake, one) for name, one in model_inputs(batch).items()}
        with FlopCounterMode(display=False) as counter:
            functional_call(model, tensors, kwargs=inputs)
    return int(counter.get_total_flops())
