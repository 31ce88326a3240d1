"""Peak training memory, counted on fake tensors: exact, before training, the same on every machine.

Two optimizer steps are followed in the order Lightning takes them: forward with the gradients of the step
before still there, gradients freed, backward, AdamW. Forward and backward are run once on tensors without
data while every live storage is counted; what the optimizer adds follows from the trainable parameters. What
kernels allocate for themselves inside one operation is not seen.

Fake CPU tensors take every path that the CPU would take, at about 0.1 ms an operation. A count is kept, so
that a configuration that differs in its hyper-parameters alone is not counted again.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from autopeft.core.precision import Precision, autocast
from autopeft.evaluation.memory.storage_tracker import StorageCounter, without_data
from autopeft.tasks.base import Loss
from autopeft.tasks.batch import LABELS, model_inputs

_MOST_COUNTS = 4096
_STEP_COUNTER_BYTES = 4  # AdamW keeps one float32 step counter a parameter


class MemoryCounter:
    """Count candidates of one resident model, and keep the counts.

    Args:
        model: A transformers model with a head, with whatever is attached to it at the time of a count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._counts: dict[Hashable, int] = {}

    def count(
        self,
        batch: Mapping[str, Tensor],
        loss: Loss,
        *,
        precision: Precision = "32-true",
        attached: Hashable = None,
    ) -> int:
        """Return the largest number of live bytes at any moment of a step, of what is attached now.

        Model, gradients and random generators stay untouched.

        Args:
            batch: The largest training batch, labels under "labels"; only its shapes matter.
            loss: Maps logits (batch, labels) and labels (batch,) to a scalar. A count is kept by it: it must
                be hashable, and equal from one call to the next.
            precision: "bf16-mixed" counts under autocast.
            attached: What is attached, sizes included (`Attachment.structure`): a count of the same is
                returned without another run. None to count in any case.

        Raises:
            ValueError: The model does something that takes data, as a mixture of experts does.
        """
        if attached is None:
            return self._follow(batch, loss, precision)
        shapes = frozenset((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        trained = tuple(name for name, each in self._model.named_parameters() if each.requires_grad)
        case = (attached, trained, shapes, loss, precision)
        if case not in self._counts:
            self._counts[case] = self._follow(batch, loss, precision)
            if len(self._counts) > _MOST_COUNTS:
                del self._counts[next(iter(self._counts))]
        return self._counts[case]

    def _follow(self, batch: Mapping[str, Tensor], loss: Loss, precision: Precision) -> int:
        was_training = self._model.training
        try:
            self._model.train()
            return _follow_step(self._model, batch, loss, precision)
        except (NotImplementedError, RuntimeError, AssertionError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"The peak memory of {type(self._model).__name__} cannot be counted without running it "
                f"({why}): leave peak_memory out of objectives and constraints."
            ) from error
        finally:
            self._model.train(was_training)


def _follow_step(model: nn.Module, batch: Mapping[str, Tensor], loss: Loss, precision: Precision) -> int:
    """Run forward and backward once on fake tensors, and return the peak of a training."""
    counter = StorageCounter()
    with without_data() as fake:
        tensors = {name: fake(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        inputs = {name: fake(tensor) for name, tensor in model_inputs(batch).items()}
        labels = fake(batch[LABELS])
        base = counter.exclude((*tensors.values(), *inputs.values(), labels))
        with counter:
            with autocast(precision, "cpu"):
                output = functional_call(model, tensors, kwargs=inputs)
                value = loss(output.logits, labels)
                del output
            forward_peak = counter.peak_bytes
            counter.restart_peak()
            value.backward()
            backward_peak = counter.peak_bytes
        sizes = [tensor.nbytes for tensor in tensors.values() if tensor.requires_grad]
    trainable = sum(sizes)
    optimizer_state = 2 * trainable + _STEP_COUNTER_BYTES * len(sizes)
    # AdamW on the CPU goes parameter by parameter, with two temporaries of its size.
    update = trainable + 2 * max(sizes, default=0)
    # The gradients of the step before are alive during the forward pass.
    return base + optimizer_state + max(trainable + forward_peak, backward_peak, update)


def count_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Return the floating-point operations of one forward pass over a batch, counted on fake tensors.

    Counted by `torch.utils.flop_counter` (matrix products and attention).
    """
    with without_data() as fake, torch.no_grad():
        tensors = {name: fake(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        inputs = {name: fake(tensor) for name, tensor in model_inputs(batch).items()}
        with FlopCounterMode(display=False) as counter:
            functional_call(model, tensors, kwargs=inputs)
    return int(counter.get_total_flops())
