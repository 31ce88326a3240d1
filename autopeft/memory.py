"""Peak training memory, counted on fake tensors: exact, before training, the same on every machine.

Two optimizer steps are followed in the order Lightning takes them: forward with the gradients of the step
before still there, gradients freed, backward, AdamW. Forward and backward are run once on tensors without
data while every live storage is counted; what the optimizer adds follows from the trainable parameters. What
kernels allocate for themselves inside one operation is not seen.

There are two ways to run without data. Fake CPU tensors take every path the CPU would take, at about 0.1 ms
an operation. Meta tensors with remembered output shapes take a tenth of that, but choose attention kernels
without knowing of the CPU. `MemoryCounter` uses the second wherever it has seen it agree with the first.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Loss = Callable[[Tensor, Tensor], Tensor]
Precision = Literal["32-true", "bf16-mixed"]
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


class StorageCounter(TorchDispatchMode):
    """Count the bytes of live storages that operations make while the mode is on.

    Attributes:
        live_bytes: Bytes of the storages alive now.
        peak_bytes: Largest value of `live_bytes` since the last `restart_peak`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def exclude(self, tensors: Iterable[Tensor]) -> int:
        """Leave out storages that were there before; return their bytes, each storage once."""
        before = self.live_bytes
        for tensor in tensors:
            self._track(tensor)
        found = self.live_bytes - before
        self.live_bytes = before
        self.restart_peak()
        return found

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = self.live_bytes

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def died(_: object) -> None:
            if self._known.pop(key, None) is not None:
                self.live_bytes -= size

        self._known[key] = weakref.ref(storage, died)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and track what it made."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._track(result)
        else:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._track(leaf)
        return result


class _MetaCounter(StorageCounter):
    """Count on meta tensors, remembering what shapes an operation gives for what shapes.

    Operations whose result shares storage with an argument (views, in-place) are run, which is quick for
    them; the others' results are made from memory. Asking for a value (as transformers does to learn
    whether a mask pads anything) is answered with False: the largest batch is a padded one.
    """

    def __init__(self, remembered: dict[Any, Any]) -> None:
        super().__init__()
        self._remembered = remembered

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make the operation's result, and track it."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return False
        kwargs = kwargs or {}
        try:
            key = (func, _signature(args), _signature(kwargs.values()), tuple(kwargs))
            remembered = self._remembered.get(key)
        except TypeError:  # an argument that cannot be hashed
            return super().__torch_dispatch__(func, types, args, kwargs)
        if remembered is None:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            self._remembered[key] = _recipe(result, (*args, *kwargs.values()))
            return result
        if remembered is _RUN:
            return super().__torch_dispatch__(func, types, args, kwargs)
        single, recipes = remembered
        made = [
            None if one is None else torch.empty_strided(one[0], one[1], dtype=one[2], device="meta")
            for one in recipes
        ]
        for tensor in made:
            if tensor is not None:
                self._track(tensor)
        return made[0] if single else tuple(made)


_RUN = object()


def _signature(values: Iterable[Any]) -> tuple[Any, ...]:
    """Return what decides the shapes of a result: shapes of tensors, and other arguments as they are."""
    return tuple(
        (value.shape, value.stride(), value.dtype)
        if isinstance(value, Tensor)
        else ("several", *_signature(value))
        if isinstance(value, list | tuple)
        else (type(value), value)
        for value in values
    )


def _recipe(result: Any, arguments: Iterable[Any]) -> Any:
    """Return how to make a result anew, or `_RUN` where it is not made of fresh, dense tensors."""
    several = (result,) if isinstance(result, Tensor) else result
    if not isinstance(several, tuple):
        return _RUN
    given = {one.untyped_storage()._cdata for one in tree_leaves(list(arguments)) if isinstance(one, Tensor)}
    recipes: list[tuple[Any, ...] | None] = []
    for one in several:
        if one is None:
            recipes.append(None)
            continue
        if not isinstance(one, Tensor) or one.untyped_storage()._cdata in given:
            return _RUN
        if one.untyped_storage().nbytes() != one.numel() * one.element_size():
            return _RUN
        recipes.append((one.shape, one.stride(), one.dtype))
    return isinstance(result, Tensor), tuple(recipes)


class MemoryCounter:
    """Count candidates of one resident model; what the backbone contributes is converted once.

    Args:
        model: A transformers model with a head, with whatever is attached to it at the time of a count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._remembered: dict[Any, Any] = {}
        self._agrees: dict[tuple[frozenset[type], Precision], bool] = {}

    def count(
        self, batch: Mapping[str, Tensor], loss: Loss, *, precision: Precision = "32-true"
    ) -> MemoryCount:
        """Count one candidate, as attached now. Model, gradients and random generators stay untouched.

        Args:
            batch: The largest training batch, labels under "labels"; only its shapes matter.
            loss: Maps logits (batch, labels) and labels (batch,) to a scalar.
            precision: "bf16-mixed" counts under autocast.
        """
        was_training = self._model.training
        self._model.train()
        try:
            kinds = frozenset(type(module) for module in self._model.modules()), precision
            if self._agrees.get(kinds, True):
                fast = self._count_on_meta(batch, loss, precision)
                if kinds in self._agrees:
                    return fast
                slow = self._count_on_fake(batch, loss, precision)
                self._agrees[kinds] = fast == slow
                return slow
            return self._count_on_fake(batch, loss, precision)
        finally:
            self._model.train(was_training)

    def _count_on_fake(self, batch: Mapping[str, Tensor], loss: Loss, precision: Precision) -> MemoryCount:
        with FakeTensorMode() as fake:

            def convert(tensor: Tensor) -> Tensor:
                converted: Tensor = fake.from_tensor(tensor)
                if converted.device.type != "cpu":  # the count must not depend on where the model lies
                    converted = converted.detach().cpu().requires_grad_(tensor.requires_grad)
                return converted

            return self._count(StorageCounter(), convert, batch, loss, precision)

    def _count_on_meta(self, batch: Mapping[str, Tensor], loss: Loss, precision: Precision) -> MemoryCount:
        def convert(tensor: Tensor) -> Tensor:
            made = torch.empty_like(tensor, device="meta")
            return made.requires_grad_(tensor.requires_grad)

        return self._count(_MetaCounter(self._remembered), convert, batch, loss, precision)

    def _count(
        self,
        counter: StorageCounter,
        convert: Callable[[Tensor], Tensor],
        batch: Mapping[str, Tensor],
        loss: Loss,
        precision: Precision,
    ) -> MemoryCount:
        parameters = {name: convert(one) for name, one in self._model.named_parameters()}
        buffers = {name: convert(one) for name, one in self._model.named_buffers()}
        inputs = {name: convert(one) for name, one in batch.items()}
        labels = inputs.pop("labels")
        batch_bytes = counter.exclude((*inputs.values(), labels))
        parameter_bytes = counter.exclude((*parameters.values(), *buffers.values()))
        trainable = [one for one in parameters.values() if one.requires_grad]
        gradient_bytes = sum(one.numel() * one.element_size() for one in trainable)
        optimizer_bytes = 2 * gradient_bytes + _STEP_COUNTER_BYTES * len(trainable)
        with counter, _autocast(precision):
            output = functional_call(self._model, {**parameters, **buffers}, kwargs=inputs)
            value = loss(output.logits, labels)
            del output
            forward_peak = counter.peak_bytes
            counter.restart_peak()
        with counter:
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
def _autocast(precision: Precision) -> Iterator[None]:
    context: Any = contextlib.nullcontext()
    if precision == "bf16-mixed":
        context = torch.autocast("cpu", dtype=torch.bfloat16)
    with context:
        yield


def measure_live_storage(model: nn.Module, batch: Mapping[str, Tensor], loss: Loss, *, steps: int = 2) -> int:
    """Return the peak live bytes of real optimizer steps on the CPU: what `MemoryCounter` predicts.

    Trains the model's trainable parameters for `steps` steps.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    trainable = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    counter = StorageCounter()
    base = counter.exclude((*batch.values(), *model.parameters(), *model.buffers()))
    with counter:
        for _ in range(steps):
            value = loss(model(**inputs).logits, batch["labels"])
            optimizer.zero_grad()
            value.backward()
            del value
            optimizer.step()
    return base + counter.peak_bytes


def count_flops(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Return the floating-point operations of one forward pass over a batch, counted on fake tensors.

    Counted by `torch.utils.flop_counter` (matrix products and attention).
    """
    with FakeTensorMode() as fake, torch.no_grad():
        tensors: dict[str, Tensor] = {
            name: fake.from_tensor(one) for name, one in (*model.named_parameters(), *model.named_buffers())
        }
        inputs = {name: fake.from_tensor(one) for name, one in batch.items() if name != "labels"}
        with FlopCounterMode(display=False) as counter:
            functional_call(model, tensors, kwargs=inputs)
    return int(counter.get_total_flops())
