"""Families of peft's whose size, which rises with the parameters, peft's config has the other way round."""

from __future__ import annotations

import math

from autopeft.methods.peft_family import PeftFamily
from autopeft.models.site_shapes import SiteShape


class C3A(PeftFamily):
    """C3A: a weight update of circulant blocks (Chen et al., "Parameter-Efficient Fine-Tuning via Circular
    Convolution", 2024), with `size` blocks along the largest width that divides both of a layer's.
    """  # noqa: D205

    def size_value(self, shape: SiteShape, size: int) -> int:
        """Return the width of a block."""
        width, rest = divmod(math.gcd(shape.in_features, shape.out_features), size)
        if rest:
            raise ValueError(f"{size} blocks do not divide {shape.in_features} → {shape.out_features}")
        return width


class OSF(PeftFamily):
    """OSF: the `size` smallest singular values and vectors of a weight are trained, orthogonal to the others.

    Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", 2025.
    """

    def size_value(self, shape: SiteShape, size: int) -> int:
        """Return the number of singular values that stay as they are."""
        kept = min(shape.in_features, shape.out_features) - size
        if kept < 1:
            raise ValueError(
                f"{shape.in_features} → {shape.out_features} has no {size} singular values to spare"
            )
        return kept


class RandLora(PeftFamily):
    """RandLoRA: an update of full rank from random low-rank bases, of which each layer has `size`.

    Albert et al., "RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models", 2025.
    """

    def size_value(self, shape: SiteShape, size: int) -> int:
        """Return the rank of a base."""
        width = min(shape.in_features, shape.out_features)
        rank = math.ceil(width / size)
        if math.ceil(width / rank) != size:
            raise ValueError(f"{shape.in_features} → {shape.out_features} has no {size} bases of equal rank")
        return rank
