"""The frozen blocks below the lowest adapter: run in evaluation mode, looked at, or left out.

A cut k divides the blocks: those below, 0 to k - 1, carry nothing that is trained. What they give for a row
is the same in every epoch and for every candidate with that cut, once their dropout is off.

No architecture is known here. The model runs its own forward pass; only the blocks below the cut are told to
return what they were given, and the hidden states are put in where block k would take them (at the cut above
all blocks: where the last one returns them). What is computed outside the blocks stays: masks, positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_HIDDEN = "hidden_states"


class UnservableError(ValueError):
    """The blocks below a cut cannot be left out of this model's forward pass."""


class _ReachedError(Exception):
    """Ends a forward pass at the cut."""


class FrozenBlocks:
    """In a `with` block, whatever a forward pass does up to the cut is done in evaluation mode.

    The modules' modes are switched while the model runs, and are outside a forward pass what they were: it
    makes no difference whether a module below the cut is used again above it. Enter it when the adapters are
    attached; leaving it takes out all hooks.

    Args:
        model: A transformers model.
        blocks: Its blocks, from the input to the output.
        cut: Number of blocks below the cut, from 0 to all.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], cut: int) -> None:
        if not 0 <= cut <= len(blocks):
            raise ValueError(f"A cut lies between 0 and {len(blocks)}, the number of blocks; got {cut}.")
        self.model = model
        self.blocks = tuple(blocks)
        self.cut = cut
        self._handles: list[RemovableHandle] = []
        self._modules: list[nn.Module] = []
        self._switched: list[nn.Module] = []
        self._look: Callable[[Tensor], None] | None = None
        self._states: Tensor | None = None

    def __enter__(self) -> Self:
        self._modules = list(self.model.modules())
        if self.cut < len(self.blocks):
            boundary = self.blocks[self.cut].register_forward_pre_hook(self._before_block, with_kwargs=True)
        else:
            boundary = self.blocks[-1].register_forward_hook(self._after_block)
        self._handles = [
            self.model.register_forward_pre_hook(self._begin),
            boundary,
            # Also where the forward pass was broken off.
            self.model.register_forward_hook(self._end, always_call=True),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._modules = []

    def _begin(self, _model: nn.Module, _inputs: Any) -> None:
        self._switched = [module for module in self._modules if module.training]
        for module in self._switched:
            # Past nn.Module.__setattr__, which takes ten times as long for hundreds of modules a step.
            vars(module)["training"] = False

    def _end(self, _model: nn.Module, _inputs: Any, _output: Any) -> None:
        for module in self._switched:
            vars(module)["training"] = True
        self._switched = []

    def _before_block(self, _block: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        hidden = self._cross(inputs[0] if inputs else keywords.get(_HIDDEN))
        if inputs:
            return (hidden, *inputs[1:]), keywords
        return inputs, keywords | {_HIDDEN: hidden}

    def _after_block(self, _block: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = self._cross(_hidden_of(output))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _cross(self, hidden: Any) -> Any:
        """Return the hidden states that go on above the cut."""
        self._end(self.model, None, None)
        if self._look is not None:
            self._look(hidden)
        if self._states is None:
            return hidden
        if hidden.shape != self._states.shape:
            raise RuntimeError(
                f"Hidden states of shape {tuple(self._states.shape)} do not fit a batch whose are of shape "
                f"{tuple(hidden.shape)}."
            )
        return self._states

    @contextmanager
    def looking(self, look: Callable[[Tensor], None]) -> Iterator[None]:
        """Show every forward pass's hidden states at the cut, of shape (rows, tokens, width)."""
        self._look = look
        try:
            yield
        finally:
            self._look = None

    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the model up to the cut and return the hidden states there: (rows, tokens, width)."""
        found: list[Tensor] = []

        def stop(hidden: Tensor) -> None:
            found.append(hidden)
            raise _ReachedError

        with self.looking(stop):
            try:
                self.model(**inputs)
            except _ReachedError:
                return found[0]
        raise UnservableError(f"the forward pass does not come to block {self.cut}")

    @contextmanager
    def serving(self, states: Tensor, structure: Structure) -> Iterator[None]:
        """Leave the blocks below the cut out of forward passes, and put these hidden states in their place.

        Args:
            states: Of shape (rows, tokens, width), on the model's device; at padding anything finite.
            structure: What the blocks return.

        Raises:
            UnservableError: A block below the cut returns more than hidden states.
        """
        before = [vars(block).get("forward") for block in self.blocks[: self.cut]]
        passing = [structure.pass_through(index) for index in range(self.cut)]
        self._states = states
        try:
            for block, forward in zip(self.blocks, passing, strict=False):
                vars(block)["forward"] = forward
            yield
        finally:
            self._states = None
            for block, own in zip(self.blocks, before, strict=False):
                if own is None:
                    vars(block).pop("forward", None)
                else:
                    vars(block)["forward"] = own


class Structure:
    """What each block of a model returns, seen in one forward pass.

    Args:
        model: A transformers model, in evaluation mode.
        blocks: Its blocks, from the input to the output.
        inputs: Inputs to run it on.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], inputs: Mapping[str, Tensor]) -> None:
        self._outputs: list[tuple[int, str]] = [(0, "is not run")] * len(blocks)
        self._order: list[int] = []
        handles = [
            block.register_forward_hook(self._watch(index), with_kwargs=True)
            for index, block in enumerate(blocks)
        ]
        try:
            model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        if self._order != list(range(len(blocks))):
            self._outputs = [(0, "is not run once, after the one below it")] * len(blocks)

    def _watch(self, index: int) -> Callable[..., None]:
        def look(_block: nn.Module, inputs: Any, keywords: Mapping[str, Any], output: Any) -> None:
            self._order.append(index)
            given = inputs[0] if inputs else keywords.get(_HIDDEN)
            self._outputs[index] = (
                len(output) if isinstance(output, tuple) else 0,
                _obstacle(given, output),
            )

        return look

    def obstacle(self, cut: int) -> str | None:
        """Say why the blocks below a cut cannot be left out; None where they can."""
        found = (f"block {index} {why}" for index, (_, why) in enumerate(self._outputs[:cut]) if why)
        return next(found, None)

    def pass_through(self, index: int) -> Callable[..., Any]:
        """Return a forward function that gives back its hidden states as the block would."""
        length, why = self._outputs[index]
        if why:
            raise UnservableError(f"block {index} {why}")

        def forward(*inputs: Any, **keywords: Any) -> Any:
            hidden = inputs[0] if inputs else keywords[_HIDDEN]
            return (hidden, *[None] * (length - 1)) if length else hidden

        return forward


def _hidden_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _obstacle(given: Any, output: Any) -> str:
    """Say why a block cannot be told to return its input; nothing where it can."""
    hidden = _hidden_of(output)
    if not isinstance(hidden, Tensor) or not isinstance(given, Tensor) or given.shape != hidden.shape:
        return "does not take and return hidden states of one shape"
    if hidden.ndim != 3:
        return f"has hidden states of shape {tuple(hidden.shape)}, not (rows, tokens, width)"
    if isinstance(output, tuple) and any(one is not None for one in output[1:]):
        return "returns more than hidden states, which later blocks may need"
    return ""


def states_at(
    cuts: Sequence[int], model: nn.Module, blocks: Sequence[nn.Module], inputs: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    """Run a model as it is up to the last of some cuts, and return the hidden states at each.

    Args:
        cuts: Numbers of blocks below each cut, rising, from 1 to all.
        model: A transformers model.
        blocks: Its blocks, from the input to the output.
        inputs: Its inputs.

    Raises:
        UnservableError: The forward pass does not come to the last cut.
    """
    found: dict[int, Tensor] = {}

    def note(cut: int, _block: nn.Module, _inputs: Any, output: Any) -> None:
        found[cut] = _hidden_of(output)
        if cut == cuts[-1]:
            raise _ReachedError

    with ExitStack() as stack:
        for cut in cuts:
            hook = blocks[cut - 1].register_forward_hook(partial(note, cut))
            stack.callback(hook.remove)
        try:
            model(**inputs)
        except _ReachedError:
            return found
    raise UnservableError(f"the forward pass does not come to block {cuts[-1]}")
