"""The frozen blocks below the lowest adapter: run in evaluation mode, looked at, or left out.

A cut k divides the blocks: those below, 0 to k - 1, carry nothing that is trained. What they give for a row
is the same in every epoch and for every candidate with that cut, once their dropout is off. Below a cut in a
decoder lies the whole encoder, whose output is served; the decoder's own blocks below the cut are run.

No architecture is known here. In the model's own forward pass each block below the cut returns what it was
given, and the last one the hidden states; masks and positions are computed as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from autopeft.models.backbone import Backbone
from autopeft.tasks import Task

_HIDDEN = "hidden_states"


def servable_blocks(backbone: Backbone) -> int:
    """Return how many blocks can be left out at most: those of the first stack, as a whole encoder."""
    return len(next(iter(backbone.stacks.values())))


class UnservableError(ValueError):
    """The blocks below a cut cannot be left out of this model's forward pass."""


class _ReachedError(Exception):
    """Ends a forward pass at the cut."""


@contextmanager
def evaluation_mode_below(cut: int, backbone: Backbone) -> Iterator[None]:
    """Do whatever a forward pass does up to a cut in evaluation mode, in a `with` block.

    Modes are switched while the model runs, and are outside a forward pass what they were: a module below the
    cut may be used again above it. Enter it when the adapters are attached.
    """
    model, blocks = backbone.model, backbone.blocks
    modules = list(model.modules())
    switched: list[nn.Module] = []

    def begin(*_: Any) -> None:
        switched.extend(module for module in modules if module.training)
        for module in switched:
            # Past nn.Module.__setattr__, which takes ten times as long for hundreds of modules a step.
            vars(module)["training"] = False

    def end(*_: Any) -> None:
        while switched:
            vars(switched.pop())["training"] = True

    with ExitStack() as stack:
        below = blocks[cut - 1].register_forward_hook(end) if cut else None
        for hook in (
            model.register_forward_pre_hook(begin),
            below or blocks[0].register_forward_pre_hook(end),
            model.register_forward_hook(end, always_call=True),  # also where the pass was broken off
        ):
            stack.callback(hook.remove)
        yield


def states_at(
    cuts: Sequence[int], backbone: Backbone, task: Task, inputs: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    """Run a backbone up to the last of some cuts, which rise, from 1 on; raise where it does not come there.

    Returns:
        The hidden states at each cut, of shape (rows, tokens, width).
    """
    found: dict[int, Tensor] = {}

    def note(cut: int, _block: nn.Module, _inputs: Any, output: Any) -> None:
        found[cut] = _hidden_of(output)
        if cut == cuts[-1]:
            raise _ReachedError

    with ExitStack() as stack:
        for cut in cuts:
            hook = backbone.blocks[cut - 1].register_forward_hook(partial(note, cut))
            stack.callback(hook.remove)
        try:
            task.forward(backbone.model, inputs)
        except _ReachedError:
            return found
    raise UnservableError(f"the forward pass does not come to block {cuts[-1]}")


class Structure:
    """What each block of a backbone in evaluation mode returns, seen in one forward pass over some inputs."""

    def __init__(self, backbone: Backbone, task: Task, inputs: Mapping[str, Tensor]) -> None:
        self._blocks = blocks = backbone.blocks
        self._lengths = [0] * len(blocks)  # of the tuple that a block returns; 0 where it returns a tensor
        self._obstacles = ["is not run"] * len(blocks)
        self._extras = [False] * len(blocks)  # whether a block returns more than hidden states
        self._servable = servable_blocks(backbone)
        order: list[int] = []

        def look(index: int, _block: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
            order.append(index)
            self._lengths[index] = len(output) if isinstance(output, tuple) else 0
            self._obstacles[index] = _obstacle(inputs[0] if inputs else keywords.get(_HIDDEN), output)
            rest = output[1:] if isinstance(output, tuple) else ()
            self._extras[index] = any(part is not None for part in rest)

        with ExitStack() as stack:
            for index, block in enumerate(blocks):
                hook = block.register_forward_hook(partial(look, index), with_kwargs=True)
                stack.callback(hook.remove)
            task.forward(backbone.model, inputs)
        if [index for index in order if index < self._servable] != list(range(self._servable)):
            self._obstacles = ["is not run once, after the one below it"] * len(blocks)

    def obstacle(self, cut: int) -> str | None:
        """Say why the blocks below a cut cannot be left out; None where they can."""
        if cut > self._servable:
            return f"block {self._servable} begins another stack, which is given more than hidden states"
        for index in range(cut):
            if why := self._obstacles[index]:
                return f"block {index} {why}"
            if self._extras[index] and cut < self._servable:  # above a whole stack nothing asks for it
                return f"block {index} returns more than hidden states, which later blocks may need"
        return None

    @contextmanager
    def serving(self, cut: int, states: Tensor) -> Iterator[None]:
        """Leave the blocks below a cut out of forward passes, and put hidden states in their place.

        These are of shape (rows, tokens, width), on the model's device; at padding anything finite.

        Raises:
            UnservableError: A block below the cut returns more than hidden states.
        """
        if (why := self.obstacle(cut)) is not None:
            raise UnservableError(why)
        below = self._blocks[:cut]
        before = [vars(block).get("forward") for block in below]
        try:
            for index, block in enumerate(below):
                served = states if index == cut - 1 else None
                vars(block)["forward"] = partial(_pass_through, served, self._lengths[index])
            yield
        finally:
            for block, own in zip(below, before, strict=True):
                vars(block).pop("forward", None)
                if own is not None:
                    vars(block)["forward"] = own


def _pass_through(served: Tensor | None, length: int, *inputs: Any, **keywords: Any) -> Any:
    """Return what a block is given, or the served states, as the block would: alone, or first in a tuple."""
    hidden = inputs[0] if inputs else keywords[_HIDDEN]
    if served is not None:
        if hidden.shape != served.shape:
            raise RuntimeError(
                f"Hidden states of shape {tuple(served.shape)} do not fit a batch whose are of shape "
                f"{tuple(hidden.shape)}."
            )
        hidden = served
    return (hidden, *[None] * (length - 1)) if length else hidden


def _hidden_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _obstacle(given: Any, output: Any) -> str:
    """Say why a block cannot be told to return its input; nothing where it can."""
    hidden = _hidden_of(output)
    if not isinstance(hidden, Tensor) or not isinstance(given, Tensor) or given.shape != hidden.shape:
        return "does not take and return hidden states of one shape"
    if hidden.ndim != 3:
        return f"has hidden states of shape {tuple(hidden.shape)}, not (rows, tokens, width)"
    return ""
