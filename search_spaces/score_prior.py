"""Scores as a prior of a per-layer space: where its first trials put adapters, and how large ones."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from autopeft.core.adapter import Adapter, Site
from autopeft.search_spaces.score_allocation import site_values
from autopeft.search_spaces.slots import Slot
from autopeft.sensitivity import SiteScores

# That a slot gets an adapter: a score is a prior, so the lowest is tried at times, the highest not always.
_LOWEST_PROBABILITY, _HIGHEST_PROBABILITY = 0.15, 0.85


def rank_percentiles(slots: Iterable[Slot], scores: SiteScores) -> dict[str, float]:
    """Return where each slot stands among all by its score a site: 0 for the lowest, 1 for the highest."""
    several = list(slots)
    values = site_values(scores, [site for slot in several for site in slot.sites])
    by_slot = {slot.name: sum(values[site] for site in slot.sites) / len(slot.sites) for slot in several}
    ranking = sorted(by_slot, key=lambda name: (by_slot[name], name))
    return {name: place / max(1, len(ranking) - 1) for place, name in enumerate(ranking)}


def draw(
    slots: Iterable[Slot], standing: Mapping[str, float], generator: random.Random
) -> dict[Site, Adapter]:
    """Draw adapters, more often and larger where the score is higher.

    A slot gets an adapter with a probability from 0.15 to 0.85, by its standing; the method is drawn
    evenly, and the place of its size among the sizes is the better of two draws where the standing is
    above a draw, else the worse of two.
    """
    adapters: dict[Site, Adapter] = {}
    for slot in slots:
        share = standing[slot.name]
        if generator.random() >= _LOWEST_PROBABILITY + (_HIGHEST_PROBABILITY - _LOWEST_PROBABILITY) * share:
            continue
        sizes = generator.choice(list(slot.choices.values())).adapters
        places = [generator.randrange(len(sizes)) for _ in range(2)]
        place = max(places) if generator.random() < share else min(places)
        adapters |= dict.fromkeys(slot.sites, sizes[place])
    return adapters


def allocated_to_slots(
    slots: Iterable[Slot], method: str, sizes: Mapping[Site, Adapter]
) -> dict[Site, Adapter]:
    """Bring an allocation into slots: the mean size over a slot's sites, as the nearest size it offers."""
    adapters: dict[Site, Adapter] = {}
    for slot in slots:
        given = [sizes[site].size or 0 for site in slot.sites if site in sizes]
        mean = sum(given) / len(slot.sites)
        if method not in slot.choices or mean < 0.5:
            continue
        nearest = min(slot.choices[method].adapters, key=lambda adapter: abs((adapter.size or 0) - mean))
        adapters |= dict.fromkeys(slot.sites, nearest)
    return adapters
