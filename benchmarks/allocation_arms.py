"""What the allocation benchmark compares: ways to spend a budget of parameters, and the budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopeft.core.adapter import Adapter, Site
from autopeft.core.configuration import Configuration
from autopeft.methods import count_site
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.score_allocation import Allocation
from autopeft.sensitivity import SiteScores

QUERY_VALUE = ("query", "value")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to spend a budget.

    Attributes:
        name: How the table calls it.
        score: Of `autopeft.sensitivity.SCORES`.
        allocator: Of `autopeft.sensitivity.allocation.ALLOCATORS`.
        placement: Share of the sites that may carry an adapter.
        temperature: Of the proportional allocator; the higher, the more the best sites get.
        lowest_block: Blocks below it get nothing.
        roles: Roles that may; None for all linear modules.
        scale_decay: Factor a block, from the last one down, of the adapters' scale (LoRA's alpha): a step of
            AdamW is as large as the learning rate, so this is a learning rate a block.
    """

    name: str
    score: str
    allocator: str = "proportional"
    placement: float = 1.0
    temperature: float | None = None
    lowest_block: int = 0
    roles: tuple[str, ...] | None = None
    scale_decay: float = 1.0

    def configuration(
        self, backbone: Backbone, scores: SiteScores, budget: int, learning_rate: float
    ) -> Configuration:
        """Return what the arm trains at a budget."""
        allocation = Allocation(
            budget=budget,
            allocator=self.allocator,
            placement=self.placement,
            lowest_block=self.lowest_block,
            roles=self.roles,
            allocator_options={} if self.temperature is None else {"temperature": self.temperature},
        )
        adapters = falling(allocation.adapters(backbone, scores), self.scale_decay)
        return Configuration(adapters, learning_rate=learning_rate)


def falling(adapters: Mapping[Site, Adapter], decay: float) -> dict[Site, Adapter]:
    """Return adapters whose scale falls by a factor a block, from the highest one down."""
    top = max(site.block for site in adapters)
    found = {}
    for site, adapter in adapters.items():
        alpha = max(1, round(int(adapter.option("alpha")) * decay ** (top - site.block)))
        found[site] = Adapter(adapter.method, adapter.size, {**dict(adapter.options), "alpha": alpha})
    return found


ARMS = (
    Arm(name="uniform", score="uniform"),
    Arm(name="uniform on query, value", score="uniform", roles=QUERY_VALUE),
    Arm(name="uniform on value, attention output", score="uniform", roles=("value", "attention_output")),
    Arm(name="uniform, learning rate falling by 0.8 a block", score="uniform", scale_decay=0.8),
    Arm(name="random, proportional", score="random"),
    Arm(name="gradient_norm, proportional", score="gradient_norm"),
    Arm(name="gradient_norm, temperature 0.5", score="gradient_norm", temperature=0.5),
    Arm(name="gradient_norm, best half of sites", score="gradient_norm", placement=0.5),
    Arm(name="gradient_norm, upper half of blocks", score="gradient_norm", lowest_block=3),
    Arm(name="fisher, fisher", score="fisher", allocator="fisher"),
    Arm(name="gora, gora", score="gora", allocator="gora"),
    Arm(name="gradient_spectrum, water_filling", score="gradient_spectrum", allocator="water_filling"),
    Arm(name="explained_variance, explained_variance", score="explained_variance",
        allocator="explained_variance"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Budget:
    """As many parameters as a uniform LoRA has.

    Attributes:
        rank: Its rank.
        uniform: The arm that is this uniform LoRA, whom the others are compared with.
        rates: Learning rates to choose from.
    """

    rank: int
    uniform: Arm = ARMS[0]
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)

    def parameters(self, backbone: Backbone) -> int:
        """Return the parameters of its LoRA, without the head's."""
        sites = Allocation(budget=1, roles=self.uniform.roles).candidates(backbone)
        lora = Adapter("lora", self.rank)
        return sum(count_site(backbone, site, lora) for site in sites)


BUDGETS: Mapping[str, Budget] = {
    "1 on query, value": Budget(rank=1, uniform=ARMS[1], rates=(2e-3, 4e-3, 8e-3)),
    **{str(rank): Budget(rank=rank) for rank in (1, 2, 4, 8)},
}
