"""Peak training memory, counted on fake tensors: exact, before training, the same on every machine.

Two optimizer steps are followed in the order Lightning takes them: forward with the gradients of the step
before still there, gradients freed, backward, AdamW. Forward and backward are run once on tensors without
data while every live storage is counted; what the optimizer adds follows from the trainable parameters. What
kernels allocate for themselves inside one operation is not seen.

There are two ways to run without data: fake CPU tensors, which take every path the CPU would take, and meta
tensors (`meta_tracing`), which take a tenth of the time. And where another candidate with the same
adapters at the same sites was counted, nothing need be run: its memory is a formula in the adapters' sizes
(`size_formula`). `MemoryCounter` takes a quicker way where it has seen it agree with a slower one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from autopeft.core.precision import Precision, autocast
from autopeft.evaluation.memory.meta_autocast import MetaAutocast
from autopeft.evaluation.memory.meta_tracing import MetaCounter, cpu_attention, on_meta
from autopeft.evaluation.memory.peak import MemoryCount
from autopeft.evaluation.memory.size_formula import (
    MemoryFormula,
    Resized,
    SizedAdapters,
    SymbolicCounter,
    Symbols,
    formula_of,
)
from autopeft.evaluation.memory.storage_tracker import StorageCounter
from autopeft.models.module_modes import in_mode, iter_modules
from autopeft.tasks.base import Loss
from autopeft.tasks.batch import LABELS, model_inputs

_Setting: TypeAlias = tuple[Hashable, Precision]
_MOST_FORMULAS = 512


@dataclass(frozen=True)
class Step:
    """What is to be followed.

    Attributes:
        batch: Labels under "labels"; only its shapes matter.
        loss: Maps logits (batch, labels) and labels (batch,) to a scalar.
        precision: "bf16-mixed" is followed under autocast.
    """

    batch: Mapping[str, Tensor]
    loss: Loss
    precision: Precision = "32-true"

    @property
    def setting(self) -> _Setting:
        """What decides, beside the model, whether ways of counting agree."""
        shapes = frozenset((name, one.shape, one.dtype) for name, one in self.batch.items())
        return shapes, self.precision


@dataclass
class _Followed:
    """What was seen of one step.

    Attributes:
        parameters: Converted parameters.
        buffers: Converted buffers.
        batch_bytes: Bytes of the batch.
        parameter_bytes: Bytes of parameters and buffers.
        forward_peak: Largest number of bytes that the forward pass made and that were alive at once.
        backward_peak: The same of the backward pass, what the forward pass left included.
    """

    parameters: list[Tensor]
    buffers: list[Tensor]
    batch_bytes: int = 0
    parameter_bytes: int = 0
    forward_peak: int = 0
    backward_peak: int = 0


class _Trust:
    """Whether a way of counting agrees with a slower one, by what models consist of.

    Attributes:
        seen: What was seen, by ingredients (classes of modules, methods with their options) and setting.
    """

    def __init__(self) -> None:
        self.seen: dict[tuple[frozenset[Hashable], _Setting], bool] = {}

    def known(self, ingredients: frozenset[Hashable], setting: _Setting) -> bool | None:
        """Whether a way agrees for a model of these ingredients; None where that is not known.

        It does where it was seen to for a model of these and perhaps more, unless it was seen to differ for
        one of some of them.
        """
        seen = [(some, agrees) for (some, known), agrees in self.seen.items() if known == setting]
        if any(not agrees and some <= ingredients for some, agrees in seen):
            return False
        return True if any(agrees and ingredients <= more for more, agrees in seen) else None

    def note(self, ingredients: frozenset[Hashable], setting: _Setting, *, agrees: bool) -> None:
        """Note what was seen."""
        self.seen[ingredients, setting] = agrees


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
            loss: Maps logits (batch, labels) and labels (batch,) to a scalar. It is part of what a formula
                is found by: hashable, and equal from one call to the next.
            precision: "bf16-mixed" counts under autocast.
            adapters: What is attached (`Attachment.sized`): others that differ in sizes alone are then
                counted by a formula. None to follow a step in any case.

        Raises:
            ValueError: The model does something that takes data, as a mixture of experts does.
        """
        step = Step(batch, loss, precision)
        modules = iter_modules(self._model)
        case = None if adapters is None else (adapters.structure, step.setting, loss, _state_of(modules))
        formula = self._formulas.get(case)
        if adapters is not None and formula is not None:
            return formula.count(adapters.values)
        ingredients: frozenset[Hashable] = frozenset(map(type, modules))
        try:
            with in_mode(self._model, training=True):
                if adapters is None:
                    return self._count_followed(ingredients, step)
                ingredients |= adapters.methods
                if case in self._formulas:
                    return self._count_followed(ingredients, step)
                return self._count_first(ingredients, step, adapters, case)
        except (NotImplementedError, RuntimeError, AssertionError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"The peak memory of {type(self._model).__name__} cannot be counted without running it "
                f"({why}): leave peak_memory out of objectives and constraints."
            ) from error

    def _count_first(
        self, ingredients: frozenset[Hashable], step: Step, adapters: SizedAdapters, case: Hashable
    ) -> MemoryCount:
        """Count the first of a case: by a new formula, and by following the step where it is not trusted."""
        while len(self._formulas) >= _MOST_FORMULAS:
            del self._formulas[next(iter(self._formulas))]
        agrees = self._formula.known(ingredients, step.setting)
        formula = None if agrees is False else self._new_formula(step, adapters)
        if agrees and formula is not None and self._meta.known(ingredients, step.setting):
            self._formulas[case] = formula
            return formula.count(adapters.values)
        followed = self._count_followed(ingredients, step)
        if agrees is None:
            agrees = formula is not None and self._holds(formula, followed, step, adapters)
            self._formula.note(ingredients, step.setting, agrees=agrees)
        self._formulas[case] = formula if agrees else None
        return followed

    def _holds(
        self, formula: MemoryFormula, followed: MemoryCount, step: Step, adapters: SizedAdapters
    ) -> bool:
        """Whether a formula gives what was followed, pass by pass, and where all sizes are others."""
        if formula.count(adapters.values) != followed:
            return False
        for sizes in (adapters.values, range(1, len(adapters.sizes) + 1)):
            found = self._try_on_meta(step, Resized(adapters.sizes, sizes).convert)
            if found is None or asdict(found) != asdict(formula.count(sizes)):
                return False
        return True

    def _count_followed(self, ingredients: frozenset[Hashable], step: Step) -> MemoryCount:
        """Follow a step on meta tensors where that was seen to agree, or else on fake ones."""
        agrees = self._meta.known(ingredients, step.setting)
        if agrees:
            return self.count_on_meta(step)
        slow = self.count_on_fake(step)
        if agrees is None:
            self._meta.note(ingredients, step.setting, agrees=slow == self._try_on_meta(step))
        return slow

    def count_on_fake(self, step: Step) -> MemoryCount:
        """Follow a step on fake CPU tensors, with the model in the mode it has."""
        with FakeTensorMode() as fake:
            context = autocast(step.precision, "cpu")
            return _count_of(self._follow(StorageCounter(), partial(_on_cpu, fake), step, context))

    def _try_on_meta(self, step: Step, convert: Callable[[Tensor], Tensor] = on_meta) -> MemoryCount | None:
        try:
            return self.count_on_meta(step, convert)
        except (NotImplementedError, RuntimeError):
            return None

    def count_on_meta(self, step: Step, convert: Callable[[Tensor], Tensor] = on_meta) -> MemoryCount:
        """Follow a step on meta tensors, made by `convert`, with the model in the mode it has."""
        return _count_of(self._follow_on_meta(MetaCounter(self._remembered), convert, step))

    def _new_formula(self, step: Step, adapters: SizedAdapters) -> MemoryFormula | None:
        """Return the formula of what is attached; None where there is none."""
        try:
            symbols = Symbols(self._numbers, adapters.sizes)
            counter = SymbolicCounter(self._remembered, symbols)
            seen = self._follow_on_meta(counter, symbols.convert, step)
            return formula_of(symbols, counter, seen.parameters, seen.buffers, seen.batch_bytes)
        except Exception:  # whatever a model makes of such sizes: the step itself is followed then
            return None

    def _follow_on_meta(
        self, counter: MetaCounter, convert: Callable[[Tensor], Tensor], step: Step
    ) -> _Followed:
        mixed = MetaAutocast() if step.precision == "bf16-mixed" else None
        with cpu_attention(self._remembered, None if mixed is None else mixed.lowered):
            context = nullcontext() if mixed is None else mixed.casting()
            return self._follow(counter, convert, step, context)

    def _follow(
        self,
        counter: StorageCounter,
        convert: Callable[[Tensor], Tensor],
        step: Step,
        forward: AbstractContextManager[Any],
    ) -> _Followed:
        """Run forward and backward once on converted tensors."""
        with _converted(self._model, convert) as seen:
            inputs = {name: convert(one) for name, one in model_inputs(step.batch).items()}
            labels = convert(step.batch[LABELS])
            seen.batch_bytes = counter.exclude((*inputs.values(), labels))
            seen.parameter_bytes = counter.exclude((*seen.parameters, *seen.buffers))
            with counter:
                with forward:
                    output = self._model(**inputs)
                    value = step.loss(output.logits, labels)
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


def _state_of(modules: Sequence[nn.Module]) -> Hashable:
    """Return what may differ between models of one structure: hooks, replaced methods and what is trained."""
    found: list[Hashable] = [len(modules)]
    for place, one in enumerate(modules):
        hooks = (*one._forward_pre_hooks.values(), *one._forward_hooks.values())
        trained = [name for name, each in one._parameters.items() if each is not None and each.requires_grad]
        if hooks or trained or "forward" in vars(one):
            names = (getattr(hook, "__qualname__", type(hook)) for hook in hooks)
            found.append((place, type(one), *names, *trained, "forward" in vars(one)))
    return tuple(found)


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
        for module in iter_modules(model):
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
