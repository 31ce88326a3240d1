"""Peak training memory, counted on fake tensors: exact, before training, the same on every machine.

Two optimizer steps are followed in the order Lightning takes them: forward with the gradients of the step
before still there, gradients freed, backward, AdamW. Forward and backward are run once on tensors without
data while every live storage is counted; what the optimizer adds follows from the trainable parameters. What
kernels allocate for themselves inside one operation is not seen.

There are two ways to run without data: fake CPU tensors, which take every path the CPU would take, and meta
tensors (`autopeft.meta_tensors`), which take a tenth of the time. And where another candidate with the same
adapters at the same sites was counted, nothing need be run: its memory is a formula in the adapters' sizes
(`autopeft.memory_formula`). `MemoryCounter` takes a quicker way where it has seen it agree with a slower one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from autopeft.batches import LABELS, model_inputs
from autopeft.live_storage import Loss, StorageCounter
from autopeft.memory_count import MemoryCount
from autopeft.memory_formula import (
    MemoryFormula,
    NotLinearError,
    SizedAdapters,
    SymbolicCounter,
    Symbols,
    formula_of,
)
from autopeft.meta_autocast import MetaAutocast
from autopeft.meta_tensors import MetaCounter, cpu_attention
from autopeft.modes import every_module, in_mode
from autopeft.precision import Precision, autocast

_Modules: TypeAlias = Sequence[nn.Module]
_Setting: TypeAlias = tuple[Hashable, Precision]


@dataclass
class _Followed:
    """What was seen of one step.

    Attributes:
        parameters: Converted parameters.
        buffers: Converted buffers.
        batch_bytes: Bytes of the batch.
        parameter_bytes: Bytes of parameters and buffers.
        forward_peak: Largest number of bytes that the forward pass made and that were alive at once.
        backward_peak: The same of the backward pass, beside what the forward pass left.
    """

    parameters: list[Tensor]
    buffers: list[Tensor]
    batch_bytes: int = 0
    parameter_bytes: int = 0
    forward_peak: int = 0
    backward_peak: int = 0


class _Trust:
    """Whether a way of counting agrees with a slower one.

    Attributes:
        seen: What was seen, by kinds of modules and setting.
    """

    def __init__(self) -> None:
        self.seen: dict[tuple[frozenset[type], _Setting], bool] = {}

    def known(self, modules: _Modules, setting: _Setting) -> bool | None:
        """Whether a way agrees for a model of these kinds of modules; None where that is not known.

        It does where it was seen to for a model of these and perhaps more kinds.
        """
        kinds = frozenset(map(type, modules))
        if any(agrees and known == setting and kinds <= more for (more, known), agrees in self.seen.items()):
            return True
        return self.seen.get((kinds, setting))

    def note(self, modules: _Modules, setting: _Setting, *, agrees: bool) -> None:
        """Note what was seen."""
        self.seen[frozenset(map(type, modules)), setting] = agrees


class MemoryCounter:
    """Count candidates of one resident model; what the backbone contributes is converted once.

    Args:
        model: A transformers model with a head, with whatever is attached to it at the time of a count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._remembered: dict[Any, Any] = {}
        self._numbers: dict[Hashable, int] = {}
        self._meta, self._formula = _Trust(), _Trust()
        self._formulas: dict[Hashable, MemoryFormula | None] = {}

    def count(
        self,
        batch: Mapping[str, Tensor],
        loss: Loss,
        *,
        precision: Precision = "32-true",
        adapters: SizedAdapters | None = None,
    ) -> MemoryCount:
        """Count one candidate, as attached now. Model, gradients and random generators stay untouched.

        Args:
            batch: The largest training batch, labels under "labels"; only its shapes matter.
            loss: Maps logits (batch, labels) and labels (batch,) to a scalar.
            precision: "bf16-mixed" counts under autocast.
            adapters: What is attached (`Attachment.sized`): others that differ in sizes alone are then
                counted by a formula. None to follow a step in any case.

        Raises:
            ValueError: The model does something that takes data, as a mixture of experts does.
        """
        modules = every_module(self._model)
        shapes = frozenset((name, tensor.shape) for name, tensor in model_inputs(batch).items())
        setting = shapes, precision
        case = None if adapters is None else (adapters.kind, setting, loss, _hooks(modules))
        formula = self._formulas.get(case)
        if adapters is not None and formula is not None:
            return formula.count(adapters.values)
        try:
            with in_mode(self._model, training=True):
                if adapters is None or case in self._formulas:
                    return self._followed_count(modules, setting, batch, loss)
                return self._first_of_kind(modules, setting, batch, loss, adapters, case)
        except (NotImplementedError, RuntimeError, AssertionError) as error:
            raise ValueError(
                f"The peak memory of {type(self._model).__name__} cannot be counted without running it "
                f"({str(error).strip().splitlines()[0]}): leave peak_memory out of objectives and "
                "constraints."
            ) from error

    def _first_of_kind(
        self,
        modules: _Modules,
        setting: _Setting,
        batch: Mapping[str, Tensor],
        loss: Loss,
        adapters: SizedAdapters,
        case: Hashable,
    ) -> MemoryCount:
        """Count by a new formula, beside following the step where formulas were not seen to agree."""
        agrees = self._formula.known(modules, setting)
        formula = None if agrees is False else self._new_formula(batch, loss, setting[1], adapters)
        if agrees and formula is not None:
            self._formulas[case] = formula
            return formula.count(adapters.values)
        followed = self._followed_count(modules, setting, batch, loss)
        if agrees is None:
            agrees = formula is not None and formula.count(adapters.values) == followed
            self._formula.note(modules, setting, agrees=agrees)
        self._formulas[case] = formula if agrees else None
        return followed

    def _followed_count(
        self, modules: _Modules, setting: _Setting, batch: Mapping[str, Tensor], loss: Loss
    ) -> MemoryCount:
        """Follow a step on meta tensors where that was seen to agree, or else on fake ones."""
        agrees = self._meta.known(modules, setting)
        if agrees:
            return self._count_on_meta(batch, loss, setting[1])
        slow = self._count_on_fake(batch, loss, setting[1])
        if agrees is None:
            self._meta.note(modules, setting, agrees=slow == self._try_on_meta(batch, loss, setting[1]))
        return slow

    def _count_on_fake(self, batch: Mapping[str, Tensor], loss: Loss, precision: Precision) -> MemoryCount:
        with FakeTensorMode() as fake:
            context = autocast(precision, "cpu")
            return _count_of(self._follow(StorageCounter(), partial(_on_cpu, fake), batch, loss, context))

    def _try_on_meta(
        self, batch: Mapping[str, Tensor], loss: Loss, precision: Precision
    ) -> MemoryCount | None:
        try:
            return self._count_on_meta(batch, loss, precision)
        except (NotImplementedError, RuntimeError):
            return None

    def _count_on_meta(self, batch: Mapping[str, Tensor], loss: Loss, precision: Precision) -> MemoryCount:
        counter = MetaCounter(self._remembered)
        return _count_of(self._follow_on_meta(counter, Symbols().convert, batch, loss, precision))

    def _new_formula(
        self, batch: Mapping[str, Tensor], loss: Loss, precision: Precision, adapters: SizedAdapters
    ) -> MemoryFormula | None:
        """Return the formula of what is attached; None where there is none."""
        symbols = Symbols(self._numbers, adapters.sizes)
        counter = SymbolicCounter(self._remembered, symbols)
        try:
            seen = self._follow_on_meta(counter, symbols.convert, batch, loss, precision)
            return formula_of(symbols, counter, seen.parameters, seen.buffers, seen.batch_bytes)
        except (NotLinearError, NotImplementedError, RuntimeError):
            return None

    def _follow_on_meta(
        self,
        counter: MetaCounter,
        convert: Callable[[Tensor], Tensor],
        batch: Mapping[str, Tensor],
        loss: Loss,
        precision: Precision,
    ) -> _Followed:
        mixed = MetaAutocast() if precision == "bf16-mixed" else None
        with cpu_attention(self._remembered, None if mixed is None else mixed.lowered):
            context = nullcontext() if mixed is None else mixed.casting()
            return self._follow(counter, convert, batch, loss, context)

    def _follow(
        self,
        counter: StorageCounter,
        convert: Callable[[Tensor], Tensor],
        batch: Mapping[str, Tensor],
        loss: Loss,
        forward: AbstractContextManager[Any],
    ) -> _Followed:
        """Run forward and backward once on converted tensors."""
        with _converted(self._model, convert) as seen:
            inputs = {name: convert(one) for name, one in model_inputs(batch).items()}
            labels = convert(batch[LABELS])
            seen.batch_bytes = counter.exclude((*inputs.values(), labels))
            seen.parameter_bytes = counter.exclude((*seen.parameters, *seen.buffers))
            with counter:
                with forward:
                    output = self._model(**inputs)
                    value = loss(output.logits, labels)
                    del output
                    seen.forward_peak = counter.peak_bytes
                    counter.restart_peak()
                value.backward()
                seen.backward_peak = counter.peak_bytes
                counter.restart_peak()
        return seen


def _count_of(seen: _Followed) -> MemoryCount:
    sizes = [one.numel() * one.element_size() for one in seen.parameters if one.requires_grad]
    return MemoryCount.of_step(
        parameter_bytes=seen.parameter_bytes,
        batch_bytes=seen.batch_bytes,
        trainable_bytes=sum(sizes),
        trainable_tensors=len(sizes),
        largest_bytes=max(sizes, default=0),
        forward_peak=seen.forward_peak,
        backward_peak=seen.backward_peak,
    )


def _hooks(modules: _Modules) -> Hashable:
    """Return what modules there are, and how many hooks each has: some adapters, and a cut, are hooks."""
    return tuple((type(one), len(one._forward_hooks), len(one._forward_pre_hooks)) for one in modules)


@contextmanager
def _converted(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> Iterator[_Followed]:
    """Put converted tensors in the place of a model's parameters and buffers, tied ones once.

    It is what `torch.func.functional_call` does, in one walk through the model in place of five.

    Yields:
        What is to be seen of a step, with the converted parameters and buffers.
    """
    converted: dict[int, Tensor] = {}
    originals: list[tuple[dict[str, Any], str, Tensor]] = []
    seen = _Followed([], [])
    try:
        for module in every_module(model):
            holders: tuple[dict[str, Any], dict[str, Any]] = (module._parameters, module._buffers)
            for holder, several in zip(holders, (seen.parameters, seen.buffers), strict=True):
                for name, original in holder.items():
                    if original is None:
                        continue
                    if id(original) not in converted:
                        converted[id(original)] = convert(original)
                        several.append(converted[id(original)])
                    originals.append((holder, name, original))
        for holder, name, original in originals:
            holder[name] = converted[id(original)]
        yield seen
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
