"""Peak training memory, counted on fake tensors: exact, before training, the same on every machine.

Two optimizer steps are followed in the order Lightning takes them: forward with the gradients of the step
before still there, gradients freed, backward, AdamW. Forward and backward are run once on tensors without
data while every live storage is counted; what the optimizer adds follows from the trainable parameters. What
kernels allocate for themselves inside one operation is not seen. Of a batch in parts two are followed: the
backward pass of the second adds to the gradients of the first.

Fake CPU tensors take every path that the CPU would take, at about 0.1 ms an operation. A count is kept, so
that a configuration that differs in its hyper-parameters alone is not counted again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from autopeft.core.precision import Precision, autocast
from autopeft.evaluation.memory.packed_weights import with_packed_stand_ins
from autopeft.evaluation.memory.storage_tracker import GROUPED_PRODUCT, StorageCounter, without_data
from autopeft.tasks import Batch, Task
from autopeft.training.accumulation import loss_in_parts

_MOST_COUNTS = 4096
_STEP_COUNTER_BYTES = 4  # AdamW keeps one float32 step counter a parameter


class MemoryCounter:
    """Count candidates of one resident model, and keep the counts.

    Args:
        model: A transformers model with a head, with whatever is attached to it at the time of a count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._counts: dict[Hashable, tuple[int, Task]] = {}

    def count(
        self,
        batch: Mapping[str, Tensor],
        task: Task,
        *,
        precision: Precision = "32-true",
        accumulate: int = 1,
        attached: Hashable = None,
    ) -> int:
        """Return the largest number of live bytes at any moment of a step, of what is attached now.

        Model, gradients and random generators stay untouched.

        Args:
            batch: The largest training batch, or part of one; only its shapes matter.
            task: Gives the forward pass and the loss.
            precision: "bf16-mixed" counts under autocast.
            accumulate: Parts of a training batch.
            attached: What is attached, sizes included (`Attachment.structure`): a count of the same is
                returned without another run. None to count in any case.

        Raises:
            ValueError: The model does something that takes data, as a mixture of experts that run one by one
                does (transformers' `experts_implementation="eager"`).
        """
        if attached is None:
            return self._follow(batch, task, precision, accumulate)
        shapes = frozenset((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        trained = tuple(name for name, each in self._model.named_parameters() if each.requires_grad)
        # By identity: a task that is a data class may have no hash.
        case = (attached, trained, shapes, id(task), precision, accumulate)
        if case not in self._counts:
            self._counts[case] = self._follow(batch, task, precision, accumulate), task
            if len(self._counts) > _MOST_COUNTS:
                del self._counts[next(iter(self._counts))]
        return self._counts[case][0]

    def _follow(self, batch: Mapping[str, Tensor], task: Task, precision: Precision, accumulate: int) -> int:
        was_training = self._model.training
        try:
            self._model.train()
            with with_packed_stand_ins(self._model):
                return _follow_step(self._model, batch, task, precision, accumulate)
        except (NotImplementedError, RuntimeError, AssertionError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"The peak memory of {type(self._model).__name__} cannot be counted without running it "
                f"({why}): leave peak_memory out of objectives and constraints."
            ) from error
        finally:
            self._model.train(was_training)


class _Step(nn.Module):
    """A forward and a backward pass as a module, which can be called with other tensors than its own."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(
        self,
        batch: Batch,
        counter: StorageCounter | None = None,
        precision: Precision = "32-true",
        accumulate: int = 1,
    ) -> int:
        """Return the peak of the forward pass; what is left in the counter is that of the backward pass.

        Without a counter there is a forward pass alone.
        """
        if counter is None:
            self.task.forward(self.model, batch)
            return 0
        with autocast(precision, "cpu"):
            parts = [(0.5, batch)] * 2
            loss = self._loss(batch) if accumulate == 1 else loss_in_parts(parts, self._loss)
        forward_peak = counter.peak_bytes
        counter.restart_peak()
        if loss.requires_grad:  # an untrained model has nothing to train
            loss.backward()
        return forward_peak

    def _loss(self, batch: Batch) -> Tensor:
        return self.task.loss(self.task.forward(self.model, batch), batch)


def _follow_step(
    model: nn.Module, batch: Mapping[str, Tensor], task: Task, precision: Precision, accumulate: int
) -> int:
    """Run forward and backward once on fake tensors, and return the peak of a training."""
    counter = StorageCounter()
    step = _Step(model, task)
    with without_data() as fake:
        tensors = _stand_ins(step, fake)
        inputs = {name: fake(tensor) for name, tensor in batch.items()}
        base = counter.exclude((*tensors.values(), *inputs.values()))
        with counter:
            given = (inputs, counter, precision, accumulate)
            forward_peak: int = functional_call(step, tensors, given, tie_weights=False)
            backward_peak = counter.peak_bytes
        sizes = [tensor.nbytes for tensor in set(tensors.values()) if tensor.requires_grad]
    trainable = sum(sizes)
    optimizer_state = 2 * trainable + _STEP_COUNTER_BYTES * len(sizes)
    # AdamW on the CPU goes parameter by parameter, with two temporaries of its size.
    update = trainable + 2 * max(sizes, default=0)
    # Of a whole batch, the gradients of the step before are alive during the forward pass.
    before = trainable if accumulate == 1 else 0
    base += (accumulate - 1) * sum(tensor.nbytes for tensor in inputs.values())
    return base + optimizer_state + max(before + forward_peak, backward_peak, update)


def _stand_ins(step: nn.Module, fake: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return a fake tensor for every parameter and buffer of every module, of tied ones the same.

    A module that several hold, as peft's shared projections, has one name: `functional_call` would put its
    tensors in place once a name, and leave fake ones behind.
    """
    made: dict[int, Tensor] = {}
    found = {}
    for path, module in step.named_modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in own:
            if id(tensor) not in made:
                made[id(tensor)] = fake(tensor)
            found[f"{path}.{name}" if path else name] = made[id(tensor)]
    return found


def count_flops(model: nn.Module, batch: Mapping[str, Tensor], task: Task) -> int:
    """Return the floating-point operations of one forward pass over a batch, counted on fake tensors.

    Counted by `torch.utils.flop_counter` (matrix products and attention).
    """

    def of_experts(rows: Sequence[int], weights: Sequence[int], *_: object, **__: object) -> int:
        return 2 * math.prod(rows) * weights[-1]

    step, experts = _Step(model, task), {GROUPED_PRODUCT: of_experts}
    with with_packed_stand_ins(model), without_data() as fake, torch.no_grad():
        tensors = _stand_ins(step, fake)
        inputs = {name: fake(tensor) for name, tensor in batch.items()}
        with FlopCounterMode(display=False, custom_mapping=experts) as counter:
            functional_call(step, tensors, (inputs,), tie_weights=False)
    return int(counter.get_total_flops())
