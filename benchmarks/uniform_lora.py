"""LoRA of one rank, placed as people place it: what searches are compared with."""

from __future__ import annotations

from autopeft.core.configuration import Adapter, Configuration
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import Uniform
from autopeft.search_spaces.method_choice import placed


def uniform(backbone: Backbone, rank: int, rate: float, where: str = "all") -> Configuration:
    """Return rsLoRA of one rank at one of `Uniform`'s places; the head alone where there is no site."""
    space = Uniform(sizes={"rank": (rank, rank)}, learning_rate=rate, places=(where,))
    slots = space.places_of("lora", backbone).get(where, [])
    return space.point(placed(Adapter("lora", rank), slots))
