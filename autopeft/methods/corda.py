"""CorDA: LoRA that starts from what a weight does on the inputs it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from autopeft.core.configuration import Adapter
from autopeft.methods.data_initialised import HasWeight, OffsetLora, Statistic, singular_vectors
from autopeft.methods.layer_adapter import beyond_full_rank
from autopeft.methods.lora import lora_scaling
from autopeft.models.site_shapes import SiteShape

_DAMPING = 0.01  # peft's, as a share of the mean of the diagonal


class CorDA(OffsetLora):
    """CorDA: with W·C = UΣVᵀ, C the inputs' second moment, s·B₀·A₀ = U_r·Σ_r·V_rᵀ·C⁻¹, the root of Σ in both.

    Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", 2024, in its
    instruction-previewed mode (IPM in peft). How a product is split between A and B depends on C's unit; here
    the mean of its diagonal is 1, so that inputs without a direction of their own give PiSSA's factors.
    """

    name = "corda"
    statistic: Statistic = "second moment"

    def obstacle(self, shape: SiteShape, adapter: Adapter, bits: int | None = None) -> str | None:
        """Return what is against it: there are not so many singular values."""
        return beyond_full_rank(shape, adapter)

    def factors(self, adapter: Adapter, statistic: Tensor, layer: HasWeight) -> tuple[Tensor, Tensor]:
        """Return A₀ and B₀; see `OffsetLora.factors`."""
        moment = statistic.double() / statistic.double().diagonal().mean()
        moment.diagonal().add_(_DAMPING)
        left, sigma, right = singular_vectors(layer.weight.double() @ moment, adapter.size_or_zero)
        right = torch.cholesky_solve(right.mT, torch.linalg.cholesky(moment)).mT
        root = (sigma / lora_scaling(adapter)).sqrt()
        return (root[:, None] * right).float(), (left * root).float()
