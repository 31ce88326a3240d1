"""Low-rank and sparse updates of one weight together."""

from __future__ import annotations

from torch import Tensor, nn

from autopeft.core.configuration import Adapter
from autopeft.methods.layer_adapter import LayerMethod, WeightUpdate
from autopeft.methods.lora import lora_scaling
from autopeft.methods.sparse import SparseUpdate
from autopeft.models.site_shapes import SiteShape


class LowRankAndSparse(WeightUpdate):
    """s·B·A + S, with B = 0 and S = 0 to begin with."""

    def __init__(self, layer: nn.Module, shape: SiteShape, rank: int, scaling: float, entries: int) -> None:
        super().__init__()
        self.down = nn.Linear(shape.in_features, rank, bias=False)
        self.up = nn.Linear(rank, shape.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.scaling = scaling
        self.sparse = SparseUpdate(layer, shape, entries)

    def update(self, inputs: Tensor) -> Tensor:
        """Add both products."""
        low_rank: Tensor = self.up(self.down(inputs))
        return self.scaling * low_rank + self.sparse.update(inputs)

    def weight(self) -> Tensor:
        """Add both matrices."""
        return self.scaling * self.up.weight @ self.down.weight + self.sparse.weight()


class LoraSparse(LayerMethod):
    """RoSA: a low-rank and a sparse update of one weight.

    Nikdan et al., "RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation", 2024. The sparse
    numbers are those of the largest magnitude, where the paper looks at gradients; α is scaled as in rsLoRA.
    """

    name = "lora_sparse"

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return r·(d_in + d_out) and the number of sparse entries."""
        assert adapter.size is not None
        return adapter.size * (shape.in_features + shape.out_features) + _entries(shape, adapter)

    def module(self, layer: nn.Module, shape: SiteShape, adapter: Adapter) -> LowRankAndSparse:
        """Return both updates."""
        assert adapter.size is not None
        scaling = lora_scaling(adapter)
        return LowRankAndSparse(layer, shape, adapter.size, scaling, _entries(shape, adapter))


def _entries(shape: SiteShape, adapter: Adapter) -> int:
    return max(1, round(float(adapter.option("density")) * shape.in_features * shape.out_features))
