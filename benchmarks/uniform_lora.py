"""LoRA of one rank, placed as people place it: what searches are compared with."""

from __future__ import annotations

from autopeft.core.configuration import Adapter, Configuration
from autopeft.models.backbone import Backbone

PLACES = ("all", "query and value", "top half", "MLP")
_QUERY_AND_VALUE = ("query", "value", "qkv", "cross_query", "cross_value")


def uniform(backbone: Backbone, rank: int, rate: float, where: str = "all") -> Configuration:
    """Return rsLoRA of one rank on all linear modules, or on those of one of `PLACES`."""
    top = {place for places in backbone.stacks.values() for place in places[len(places) // 2 :]}
    chosen = {
        site: Adapter("lora", rank)
        for site, shape in backbone.sites.items()
        if shape.kind == "linear"
        and (
            where == "all"
            or (where == "query and value" and site.role in _QUERY_AND_VALUE)
            or (where == "top half" and site.place in top)
            or (where == "MLP" and site.role.startswith("ffn"))
        )
    }
    return Configuration(chosen, learning_rate=rate)
