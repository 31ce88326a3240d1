"""Low-rank and sparse updates of one weight together."""

from __future__ import annotations

from torch import Tensor, nn

from autopeft.core.configuration import Adapter
from autopeft.methods.data_initialised import HasWeight
from autopeft.methods.layer_adapter import LayerMethod, WeightUpdate
from autopeft.methods.lora import lora_scaling
from autopeft.methods.sparse import ChosenNumbers, SparseUpdate, places_of_largest
from autopeft.models.site_shapes import SiteShape


class LowRankAndSparse(WeightUpdate):
    """s·B·A + S, with B = 0 and S = 0 to begin with."""

    def __init__(self, shape: SiteShape, rank: int, scaling: float, sparse: SparseUpdate) -> None:
        super().__init__()
        self.down = nn.Linear(shape.in_features, rank, bias=False)
        self.up = nn.Linear(rank, shape.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.scaling = scaling
        self.sparse = sparse

    def update(self, inputs: Tensor) -> Tensor:
        """Add both products."""
        low_rank: Tensor = self.up(self.down(inputs))
        return self.scaling * low_rank + self.sparse.update(inputs)

    def weight(self) -> Tensor:
        """Add both matrices."""
        return self.scaling * self.up.weight @ self.down.weight + self.sparse.weight()


class LoraSparse(ChosenNumbers, LayerMethod):
    """RoSA: a low-rank and a sparse update of one weight.

    Nikdan et al., "RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation", 2024. `choice`
    is as that of `Sparse`: the paper looks at gradients. α is scaled as in rsLoRA.
    """

    name = "lora_sparse"

    def initial_values(self, adapter: Adapter, statistic: Tensor, layer: HasWeight) -> dict[str, Tensor]:
        """Return which numbers are trained; see `DataInitialised.initial_values`."""
        entries = _entries(statistic.numel(), adapter)
        return {"sparse.indices": places_of_largest(statistic.abs(), entries)}

    def obstacle(self, shape: SiteShape, adapter: Adapter, bits: int | None = None) -> str | None:
        """Return what is against it: a density above 1."""
        density = float(adapter.option("density"))
        return f"its density is a share, at most 1, got {density:g}" if density > 1 else None

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return r·(d_in + d_out) and the number of sparse entries."""
        entries = _entries(shape.in_features * shape.out_features, adapter)
        return adapter.size_or_zero * (shape.in_features + shape.out_features) + entries

    def module(self, layer: nn.Module, shape: SiteShape, adapter: Adapter) -> LowRankAndSparse:
        """Return both updates."""
        entries = _entries(shape.in_features * shape.out_features, adapter)
        sparse = SparseUpdate(layer, shape, entries, str(adapter.option("choice")))
        return LowRankAndSparse(shape, adapter.size_or_zero, lora_scaling(adapter), sparse)


def _entries(numbers: int, adapter: Adapter) -> int:
    return max(1, round(float(adapter.option("density")) * numbers))
