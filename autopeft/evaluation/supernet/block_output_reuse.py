"""Forward passes that begin where they differ from the one before.

No architecture is known here: the model runs its own forward pass, and a block whose input and weights are
what they were in the pass before gives back what it gave then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn


class BlockOutputReuse:
    """In a `with` block, `logits` can leave out the lowest blocks, which give what they gave last time.

    Enter it in evaluation mode and without gradients. What is computed outside the blocks (embeddings,
    masks, positions, pooler, head) is computed in each pass.

    Args:
        model: Returns an object with `logits`.
        blocks: Its blocks, from the input to the output.

    Attributes:
        passes: Passes through single blocks so far.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.model = model
        self.blocks = tuple(blocks)
        self.passes = 0
        self._reuse = 0
        self._outputs: dict[int, Any] = {}
        self._order: list[int] = []

    def __enter__(self) -> Self:
        for index, block in enumerate(self.blocks):
            vars(block)["forward"] = self._shared(index, block.forward)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for block in self.blocks:
            vars(block).pop("forward", None)
        self.forget()

    def forget(self) -> None:
        """Drop what the blocks gave: the next pass is a whole one."""
        self._outputs = {}

    def _shared(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any, **keywords: Any) -> Any:
            self._order.append(index)
            if index < self._reuse:
                return self._outputs[index]
            self.passes += 1
            output = forward(*inputs, **keywords)
            self._outputs[index] = output
            return output

        return run

    def logits(self, inputs: Mapping[str, Tensor], same: int) -> Tensor:
        """Return the logits, of shape (rows, labels).

        Args:
            inputs: The model's inputs; those of the pass before, unless `forget` was called.
            same: Number of lowest blocks whose weights are those of the pass before. All blocks are run
                where that pass did not run each of them once (a model may use a block twice).
        """
        self._reuse = same if len(self._outputs) == len(self.blocks) else 0
        self._order = []
        logits: Tensor = self.model(**inputs).logits
        if self._order != list(range(len(self.blocks))):
            self.forget()
        return logits
