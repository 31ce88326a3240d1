"""Random adapters and configurations for property tests."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import strategies as st

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import KIND_OF_ROLE, METHOD_SPECS, ROLES, OptionValue, PeftSpec
from autopeft.core.rank_allocation import RANK_ALLOCATIONS
from autopeft.models.backbone import Backbone

_OPTIONS: dict[str, st.SearchStrategy[OptionValue]] = {
    "alpha": st.integers(1, 64),
    "rslora": st.booleans(),
    "dropout": st.sampled_from((0.0, 0.1, 0.25)),
    "activation": st.sampled_from(("gelu", "relu", "silu", "tanh")),
    "scaling": st.floats(0.125, 8.0),
    "initial_std": st.sampled_from((0.02, 0.1)),
    "positions": st.integers(0, 3),
    "b_rate": st.sampled_from((0.5, 4.0, 16.0)),
    "density": st.sampled_from((0.001, 0.01)),
    "choice": st.sampled_from(("magnitude", "gradient", "random")),
}


ANYWHERE = [name for name, spec in METHOD_SPECS.items() if not isinstance(spec, PeftSpec)] + ["dora", "vera"]
"""Methods that take any size at any site of their kinds."""


@st.composite
def adapters(draw: st.DrawFn, methods: Iterable[str] = tuple(METHOD_SPECS), largest: int = 64) -> Adapter:
    """Draw a valid adapter of one of the methods."""
    specification = METHOD_SPECS[draw(st.sampled_from(sorted(methods)))]
    size = None if specification.size_name is None else draw(st.integers(1, largest))
    names = draw(st.sets(st.sampled_from(sorted(specification.options)))) if specification.options else ()
    return Adapter(specification.name, size, {name: draw(_OPTIONS[name]) for name in sorted(names)})


def _compatible(methods: Iterable[str]) -> bool:
    names = set(methods)
    is_apart = not any(METHOD_SPECS[name].excludes & names for name in names)
    return is_apart and sum(METHOD_SPECS[name].wraps for name in names) < 2


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    """Draw a valid configuration of any network."""
    sites = draw(st.sets(st.builds(Site, st.integers(0, 12), st.sampled_from(ROLES)), max_size=6))
    placed: dict[Site, list[Adapter]] = {}
    for site in sorted(sites):
        kind = KIND_OF_ROLE[site.role]
        fitting = [name for name, spec in METHOD_SPECS.items() if kind in spec.kinds]
        placed[site] = draw(_several(fitting, 64))
    configuration = Configuration(
        placed,
        learning_rate=draw(st.floats(1e-6, 1.0)),
        weight_decay=draw(st.sampled_from((0.0, 0.01, 0.1))),
    )
    return configuration.with_allocation(draw(st.sampled_from((None, *RANK_ALLOCATIONS))))


@st.composite
def _several(draw: st.DrawFn, methods: Iterable[str], largest: int) -> list[Adapter]:
    several: list[Adapter] = []
    for adapter in draw(st.lists(adapters(methods, largest), max_size=3)):
        names = [earlier.method for earlier in several]
        if adapter.method not in names and _compatible((*names, adapter.method)):
            several.append(adapter)
    return several


@st.composite
def configurations_of(draw: st.DrawFn, backbone: Backbone, largest: int = 5) -> Configuration:
    """Draw a valid configuration that a backbone can carry."""
    placed: dict[Site, list[Adapter]] = {}
    for site, shape in backbone.sites.items():
        fitting = [name for name in ANYWHERE if not backbone.obstacle(shape, name)]
        occupied = draw(st.booleans())
        if fitting and occupied:
            placed[site] = draw(_several(fitting, largest))
    return Configuration(placed)
