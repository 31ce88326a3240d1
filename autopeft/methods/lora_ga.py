"""LoRA-GA: LoRA that starts from the gradient of the weight."""

from __future__ import annotations

from torch import Tensor

from autopeft.core.configuration import Adapter
from autopeft.methods.data_initialised import HasWeight, OffsetLora, Statistic, singular_vectors
from autopeft.models.site_shapes import SiteShape


class LoraGA(OffsetLora):
    """LoRA-GA: with G = UΣVᵀ, A₀ has the first r columns of V, B₀ the next r of U, both times ⁴√d_out / 4.

    Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", 2024: so the first step changes
    the weight as much like a step of full fine-tuning as an update of this rank can. The factor is
    the paper's, which keeps outputs stable.
    """

    name = "lora_ga"
    statistic: Statistic = "mean gradient"

    def obstacle(self, shape: SiteShape, adapter: Adapter, bits: int | None = None) -> str | None:
        """Return what is against it: there are not so many singular vectors."""
        most = min(shape.in_features, shape.out_features)
        if 2 * adapter.size_or_zero <= most:
            return None
        return f"its gradient has {most:,} singular vectors, and each rank takes two"

    def factors(self, adapter: Adapter, statistic: Tensor, layer: HasWeight) -> tuple[Tensor, Tensor]:
        """Return A₀ and B₀; see `OffsetLora.factors`."""
        left, _, right = singular_vectors(statistic, 2 * adapter.size_or_zero)
        scale = len(statistic) ** 0.25 / 4
        return scale * right[: adapter.size_or_zero], scale * left[:, adapter.size_or_zero :]
