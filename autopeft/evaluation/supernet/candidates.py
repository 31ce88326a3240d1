"""Which configurations of a space an elastic adapter can score, and how new ones are made of them."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence

import optuna

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.models.backbone import Backbone
from autopeft.optimization.study_store import quiet_optuna
from autopeft.search_spaces import SearchSpace

METHOD = "lora"
"""The only method that an elastic adapter has."""
_TRIES_A_CHILD = 10
_TRIES_A_DRAW = 10


def has_lora_alone(configuration: Configuration) -> bool:
    """Whether a configuration has no method but LoRA, or nothing at all."""
    return set(configuration.methods) <= {METHOD}


def drawn(
    space: SearchSpace, backbone: Backbone, count: int, generator: random.Random
) -> list[Configuration]:
    """Return the reference points and even draws of a space that have LoRA alone, or nothing.

    Args:
        space: Any space.
        backbone: Its backbone.
        count: How many to draw; fewer come back where few draws are of LoRA alone.
        generator: The only source of chance.
    """
    sampler = optuna.samplers.RandomSampler(seed=generator.getrandbits(32))
    with quiet_optuna():
        study = optuna.create_study(sampler=sampler)
    points = [baseline.configuration for baseline in space.baselines(backbone)]
    points += space.extremes(backbone)
    for _ in range(_TRIES_A_DRAW * count):
        if len(points) >= count:
            break
        point = space.suggest(study.ask(), backbone)
        points += [point] if has_lora_alone(point) else []
    return [one for one in dict.fromkeys(points) if has_lora_alone(one)]


def largest_lora(
    space: SearchSpace, backbone: Backbone, points: Iterable[Configuration]
) -> Configuration | None:
    """Return LoRA of the largest rank at every site at which the space has any; None without one.

    Args:
        space: Where its largest and reference points have LoRA beside other methods, that counts too.
        backbone: Its backbone.
        points: Points of the space.
    """
    seen = [*space.extremes(backbone), *(one.configuration for one in space.baselines(backbone)), *points]
    largest: dict[Site, Adapter] = {}
    for configuration in seen:
        for site, adapter in configuration:
            if adapter.method == METHOD:
                known = largest.get(site)
                if known is None or (adapter.size or 0) > (known.size or 0):
                    largest[site] = adapter
    if not largest:
        return None
    return Configuration(largest, learning_rate=seen[0].learning_rate)


def crossed(
    space: SearchSpace,
    backbone: Backbone,
    parents: Sequence[Configuration],
    known: Collection[Configuration],
    count: int,
    generator: random.Random,
) -> list[Configuration]:
    """Return points of a space that have one parent's blocks below a cut and another's above it.

    A child agrees with a parent below its cut, so that inference can begin there. Fewer than `count` come
    back where most crossings are known already.
    """
    children: dict[Configuration, None] = {}
    blocks = len(backbone.blocks)
    for _ in range(_TRIES_A_CHILD * count):
        if len(children) == count:
            break
        lower, upper = generator.choice(parents), generator.choice(parents)
        cut = generator.randrange(blocks)
        adapters = {site: one for site, one in lower.adapters.items() if site.block < cut}
        adapters |= {site: one for site, one in upper.adapters.items() if site.block >= cut}
        child = _changed(adapters, cut, generator)
        if child not in known and _is_point(space, child, backbone):
            children[child] = None
    return list(children)


def _changed(adapters: dict[Site, tuple[Adapter, ...]], cut: int, generator: random.Random) -> Configuration:
    """Take out, double or halve one block's or one role's adapters above a cut, in two of three children."""
    change = generator.choice((None, "drop", "resize"))
    above = sorted(site for site in adapters if site.block >= cut)
    if change is None or not above:
        return Configuration(adapters)
    chosen = generator.choice(above)
    by_block = generator.random() < 0.5
    factor = generator.choice((0.5, 2.0))
    changed = dict(adapters)
    for site in above:
        if site.block == chosen.block if by_block else site.role == chosen.role:
            if change == "drop":
                del changed[site]
            else:
                (one,) = changed[site]
                size = max(1, round((one.size or 1) * factor))
                changed[site] = (Adapter(one.method, size, dict(one.options)),)
    return Configuration(changed)


def _is_point(space: SearchSpace, configuration: Configuration, backbone: Backbone) -> bool:
    rate = space.learning_rate
    trained = configuration.replace(learning_rate=rate if isinstance(rate, float) else rate[0])
    try:
        space.encode(trained, backbone)
    except ValueError:
        return False
    return True
