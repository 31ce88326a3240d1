"""Peak training memory, counted on fake tensors: exact, before training, the same on every machine.

Two optimizer steps are followed in the order Lightning takes them: forward with the gradients of the step
before still there, gradients freed, backward, AdamW. Forward and backward are run once on tensors without
data while every live storage is counted; what the optimizer adds follows from the trainable parameters. What
kernels allocate for themselves inside one operation is not seen.

Fake CPU tensors take every path that the CPU would take, at about 0.1 ms an operation. A count is kept, so
that a configuration that differs in its hyper-parameters alone is not counted again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from autopeft.core.precision import Precision, autocast
from autopeft.evaluation.memory.packed_weights import with_packed_stand_ins
from autopeft.evaluation.memory.peak import MemoryCount
from autopeft.evaluation.memory.storage_tracker import StorageCounter, without_data
from autopeft.tasks import Task
from autopeft.tasks.batch import model_inputs

_MOST_COUNTS = 4096


class MemoryCounter:
    """Count candidates of one resident model, and keep the counts.

    Args:
        model: A transformers model with a head, with whatever is attached to it at the time of a count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._counts: OrderedDict[Hashable, MemoryCount] = OrderedDict()

    def count(
        self,
        batch: Mapping[str, Tensor],
        task: Task,
        *,
        precision: Precision = "32-true",
        attached: Hashable = None,
    ) -> MemoryCount:
        """Count one candidate, as attached now. Model, gradients and random generators stay untouched.

        Args:
            batch: The largest training batch; only its shapes matter.
            task: Gives the forward pass and the loss.
            precision: "bf16-mixed" counts under autocast.
            attached: What is attached, sizes included (`Attachment.structure`): a count of the same is
                returned without another run. None to count in any case.

        Raises:
            ValueError: The model does something that takes data, as a mixture of experts does.
        """
        if attached is None:
            return self._follow(batch, task, precision)
        shapes = frozenset((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        trained = tuple(name for name, each in self._model.named_parameters() if each.requires_grad)
        case = (attached, trained, shapes, task, precision)
        if case not in self._counts:
            self._counts[case] = self._follow(batch, task, precision)
            if len(self._counts) > _MOST_COUNTS:
                self._counts.popitem(last=False)
        return self._counts[case]

    def _follow(self, batch: Mapping[str, Tensor], task: Task, precision: Precision) -> MemoryCount:
        try:
            with _in_training_mode(self._model), with_packed_stand_ins(self._model):
                return _follow_step(self._model, batch, task, precision)
        except (NotImplementedError, RuntimeError, AssertionError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"The peak memory of {type(self._model).__name__} cannot be counted without running it "
                f"({why}): leave peak_memory out of objectives and constraints."
            ) from error


@contextmanager
def _in_training_mode(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)


class _Step(nn.Module):
    """A forward and a backward pass as a module, which can be called with other tensors than its own."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: Mapping[str, Tensor], counter: StorageCounter, precision: Precision) -> int:
        """Return the peak of the forward pass; what is left in the counter is that of the backward pass."""
        with autocast(precision, "cpu"):
            loss = self.task.loss(self.task.forward(self.model, batch), batch)
        forward_peak = counter.peak_bytes
        counter.restart_peak()
        loss.backward()
        return forward_peak


def _follow_step(
    model: nn.Module, batch: Mapping[str, Tensor], task: Task, precision: Precision
) -> MemoryCount:
    """Run forward and backward once on fake tensors."""
    counter = StorageCounter()
    step = _Step(model, task)
    with without_data() as fake:
        parameters = fake.of_all(step.named_parameters())
        buffers = fake.of_all(step.named_buffers())
        inputs = fake.of_all(batch.items())
        batch_bytes = counter.exclude(inputs.values())
        parameter_bytes = counter.exclude((*parameters.values(), *buffers.values()))
        with counter:
            forward_peak = functional_call(step, parameters | buffers, (inputs, counter, precision))
            backward_peak = counter.peak_bytes
    return MemoryCount.of_step(
        parameter_bytes=parameter_bytes,
        batch_bytes=batch_bytes,
        trainable=[parameter for parameter in parameters.values() if parameter.requires_grad],
        forward_peak=forward_peak,
        backward_peak=backward_peak,
    )


def count_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Return the floating-point operations of one forward pass over a batch, counted on fake tensors.

    Counted by `torch.utils.flop_counter` (matrix products and attention).
    """
    with without_data() as fake, torch.no_grad():
        tensors = fake.of_all((*model.named_parameters(), *model.named_buffers()))
        inputs = fake.of_all(model_inputs(batch).items())
        with FlopCounterMode(display=False) as counter:
            functional_call(model, tensors, kwargs=inputs)
    return int(counter.get_total_flops())


def measure_live_storage(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    task: Task,
    *,
    steps: int = 2,
    precision: Precision = "32-true",
) -> int:
    """Return the peak live bytes of real optimizer steps on the CPU: what `MemoryCounter` predicts.

    Trains the model's trainable parameters for `steps` steps.
    """
    optimizer = torch.optim.AdamW(each for each in model.parameters() if each.requires_grad)
    counter = StorageCounter()
    base = counter.exclude((*batch.values(), *model.parameters(), *model.buffers()))
    with counter:
        for _ in range(steps):
            with autocast(precision, "cpu"):
                value = task.loss(task.forward(model, batch), batch)
            optimizer.zero_grad()
            value.backward()
            del value
            optimizer.step()
    return base + counter.peak_bytes
