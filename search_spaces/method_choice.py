"""What a site may carry: a method with the sizes it may have there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autopeft.core.adapter import Adapter, Site
from autopeft.core.method_specs import OptionValue
from autopeft.search_spaces.learning_rates import log_place


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """A method that a site may carry.

    Attributes:
        method: Its name.
        sizes: The sizes there are, rising; empty for a method without a size.
        options: Options of its adapters.
    """

    method: str
    sizes: Sequence[int] = ()
    options: Mapping[str, OptionValue] = field(default_factory=dict)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The adapters of all sizes, rising."""
        return tuple(self.of_size(size) for size in self.sizes or (1,))

    @property
    def three_adapters(self) -> tuple[Adapter, Adapter, Adapter]:
        """The adapters of the smallest, the middle and the largest size."""
        adapters = self.adapters
        return adapters[0], adapters[len(adapters) // 2], adapters[-1]

    @property
    def smallest(self) -> Adapter:
        """The adapter of the smallest size."""
        return self.of_size(1)

    @property
    def largest(self) -> Adapter:
        """The adapter of the largest size."""
        return self.of_size(self.sizes[-1] if self.sizes else 1)

    def __str__(self) -> str:
        return f"{self.method} {'|'.join(map(str, self.sizes))}".rstrip()

    def of_size(self, size: int) -> Adapter:
        """Return the adapter of a size, or of the nearest there is on a log scale."""
        if not self.sizes:
            return Adapter(self.method, None, dict(self.options))
        size = min(max(size, self.sizes[0]), self.sizes[-1])
        if size not in self.sizes:
            size = min(self.sizes, key=lambda known: abs(math.log(known / size)))
        return Adapter(self.method, size, dict(self.options))

    def place(self, adapter: Adapter) -> float:
        """Return where an adapter's size lies on a log scale, from 0.5 (smallest) to 1 (largest)."""
        if not self.sizes:
            return 0.5
        low, high = self.sizes[0], self.sizes[-1]
        return 0.5 + 0.5 * log_place(min(max(adapter.size or low, low), high), low, high)


Choices = Mapping[Site, Mapping[str, MethodChoice]]
"""The methods that each site may carry, by name."""
