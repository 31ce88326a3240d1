"""Configuration: which adapter method, of what size, at which site, and how it is trained."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml

from autopeft.core.adapter import Adapter, Place, Site, parse_sites, place_name, role_order, stack_order
from autopeft.core.documents import parse_json, parse_yaml, read_text
from autopeft.core.errors import check_choice, check_numbers, unknown_choice
from autopeft.core.method_specs import KIND_OF_ROLE, METHOD_SPECS, ROLES
from autopeft.core.rank_allocation import RANK_ALLOCATIONS, allocation_obstacle

__all__ = ["Adapter", "Configuration", "Site"]

_MOST_SITES = 100_000  # several times the largest networks: ranges must not fill the memory
AdapterLike = Adapter | Iterable[Adapter]


@dataclass(frozen=True, init=False, eq=False)
class Configuration:
    """An immutable map site → adapters, with the hyper-parameters it is trained with.

    Args:
        adapters: The adapters of each site. An empty map trains the task's head alone.
        learning_rate: Peak learning rate of AdamW, above 0: that of LoRA, of which other methods take the
            multiple in their specification.
        weight_decay: Decoupled weight decay, at least 0.
        allocation: How ranks are allocated in training, one of `RANK_ALLOCATIONS`; the sizes are then those
            that training begins with. None for ranks that stay.

    Raises:
        ValueError: A method sits on a site of the wrong kind, a site carries a method twice or two
            methods that exclude each other, the adapters have no ranks to allocate, or a hyper-parameter is
            out of range.
    """

    adapters: Mapping[Site, tuple[Adapter, ...]] = field(repr=False)
    learning_rate: float
    weight_decay: float
    allocation: str | None

    def __init__(
        self,
        adapters: Mapping[Site, AdapterLike] | None = None,
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        allocation: str | None = None,
    ) -> None:
        check_numbers(above=0, learning_rate=learning_rate)
        check_numbers(least=0, weight_decay=weight_decay)
        object.__setattr__(self, "adapters", _canonical(adapters or {}))
        object.__setattr__(self, "learning_rate", float(learning_rate))
        object.__setattr__(self, "weight_decay", float(weight_decay))
        object.__setattr__(self, "allocation", allocation)
        if allocation is not None:
            check_choice("allocation", RANK_ALLOCATIONS, allocation)
            if (why := allocation_obstacle(allocation, self.adapters)) is not None:
                raise ValueError(f"The allocation {allocation!r} is for configurations in which {why}.")

    @cached_property
    def key(self) -> str:
        """SHA-256 (hex) of the canonical form: equal for equal configurations, on every machine."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Configuration) and self._content == other._content

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the hash, which another process has another of."""
        return {name: value for name, value in vars(self).items() if name != "_hash"}

    @property
    def _content(self) -> tuple[Any, ...]:
        return self.learning_rate, self.weight_decay, self.allocation, self.adapters

    @cached_property
    def _hash(self) -> int:
        return hash(self._content)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods in use, in the registry's order."""
        used = {adapter.method for _, adapter in self}
        return tuple(name for name in METHOD_SPECS if name in used)

    @property
    def lowest_block(self) -> Place | None:
        """The lowest block with an adapter (backpropagation stops there), or None."""
        return next((site.place for site in self.adapters), None)

    def __iter__(self) -> Any:
        """Iterate over (site, adapter) pairs in canonical order."""
        return ((site, adapter) for site, adapters in self.adapters.items() for adapter in adapters)

    def __len__(self) -> int:
        return sum(map(len, self.adapters.values()))

    def replace(self, **changes: Any) -> Configuration:
        """Return a copy with `adapters`, `learning_rate`, `weight_decay` or `allocation` changed."""
        return replace(self, **changes)

    def with_allocation(self, allocation: str | None) -> Configuration:
        """Return it with a way to allocate ranks in training; without where it cannot be used here."""
        if allocation is not None and allocation_obstacle(allocation, self.adapters) is not None:
            allocation = None
        return self.replace(allocation=allocation)

    def to_dict(self) -> dict[str, Any]:
        """Return the canonical form as plain data."""
        return {
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            **({} if self.allocation is None else {"allocation": self.allocation}),
            "sites": {
                str(site): [adapter.to_dict() for adapter in several]
                for site, several in self.adapters.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Configuration:
        """Read a configuration from plain data.

        A site may be a range of blocks ("0-5.query") and may hold one adapter or a list of them.

        Raises:
            ValueError: A key, site, method, size or option is not valid, or a site is named twice.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"A configuration is a mapping, got {type(data).__name__}.")
        known = ("learning_rate", "weight_decay", "allocation", "sites")
        check_choice("configuration key", known, *data)
        sites = data.get("sites") or {}
        if not isinstance(sites, Mapping):
            raise ValueError(f"sites is a mapping of sites to adapters, got {sites!r}.")
        adapters: dict[Site, tuple[Adapter, ...]] = {}
        for text, given in sites.items():
            read = _read_adapters(text, given)
            if len(adapters) > _MOST_SITES:
                raise ValueError(f"A configuration has at most {_MOST_SITES:,} sites.")
            for site in parse_sites(str(text)):
                if site in adapters:
                    raise ValueError(f"Site {site} is named twice (the second time by {text!r}).")
                adapters[site] = read
        rest = {key: data[key] for key in known[:-1] if key in data}
        return cls(adapters, **rest)

    def to_yaml(self) -> str:
        """Return the canonical form as YAML."""
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=100))

    @classmethod
    def from_yaml(cls, text: str) -> Configuration:
        """Read a configuration from YAML."""
        return cls.from_dict(parse_yaml(text, "The configuration"))

    def save(self, path: str | Path) -> None:
        """Write the configuration to a .yaml, .yml or .json file."""
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        elif path.suffix in (".yaml", ".yml"):
            path.write_text(self.to_yaml())
        else:
            raise unknown_choice("configuration suffix", path.suffix, (".yaml", ".yml", ".json"))

    @classmethod
    def load(cls, path: str | Path) -> Configuration:
        """Read a configuration from a YAML or JSON file."""
        path = Path(path)
        # As YAML 1.1, JSON's 1e-05 would be text.
        parse = parse_json if path.suffix == ".json" else parse_yaml
        return cls.from_dict(parse(read_text(path), str(path)))

    def grid(self) -> str:
        """Return the compact picture: a row a block, a column a role, a letter and size a cell."""
        return text_grid(self.cells())

    def cells(self) -> dict[tuple[Place, str], str]:
        """Return the label of every occupied cell of the picture, by (block, role)."""
        return {
            (site.place, site.role): "+".join(
                f"{adapter.specification.symbol}{adapter.size or ''}" for adapter in adapters
            )
            for site, adapters in self.adapters.items()
        }

    def __repr__(self) -> str:
        methods = ", ".join(self.methods) or "head only"
        methods += "" if self.allocation is None else f" by {self.allocation}"
        return (
            f"Configuration({methods}; {len(self)} adapters; "
            f"learning_rate={self.learning_rate:g}; {self.key[:8]})"
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p><pre>{html.escape(self.grid())}</pre>"


def grid_axes(cells: Iterable[tuple[Place, str]]) -> tuple[list[Place], list[str]]:
    """Return the blocks of a picture, from 0 of each stack to its highest occupied one, and the roles."""
    highest: dict[str, int] = {}
    roles: set[str] = set()
    for (stack, block), role in cells:
        highest[stack] = max(block, highest.get(stack, 0))
        roles.add(role)
    places = [
        (stack, block) for stack in sorted(highest, key=stack_order) for block in range(highest[stack] + 1)
    ]
    return places, sorted(roles, key=lambda role: (role_order(role), role))


def text_grid(cells: Mapping[tuple[Place, str], str]) -> str:
    """Draw occupied cells, labels by (block, role), as a table of text, with a legend of the letters in use.

    There is a line a block, from the highest occupied one of a stack down to block 0: the output is on top.
    """
    if not cells:
        return "(no adapters)"
    places, roles = grid_axes(cells)
    table = [("block", *roles)]
    for place in reversed(places):
        table.append((place_name(place), *(cells.get((place, role), "·") for role in roles)))
    left, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    rows = ["  ".join([block.rjust(left), *map(str.center, labels, widths)]) for block, *labels in table]
    letters = {part.rstrip("0123456789") for label in cells.values() for part in label.split("+")}
    legend = ", ".join(
        f"{method.symbol} {method.name}" + (f" ({method.size_name})" if method.size_name else "")
        for method in METHOD_SPECS.values()
        if method.symbol in letters
    )
    return "\n".join(line.rstrip() for line in [*rows, legend])


def _read_adapters(site: Any, given: Any) -> tuple[Adapter, ...]:
    entries = given if isinstance(given, list | tuple) else [given]
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"Site {site}: expected an adapter such as {{method: lora, size: 8}}, got {entry!r}."
            )
    return tuple(Adapter.from_dict(entry) for entry in entries)


def _canonical(adapters: Mapping[Site, AdapterLike]) -> _FrozenMap:
    if isinstance(adapters, _FrozenMap):  # another configuration's
        return adapters
    checked = {
        site: _shared(_of_site(site, adapters[site])) for site in sorted(adapters, key=attrgetter("order"))
    }
    return _FrozenMap({site: several for site, several in checked.items() if several})


@lru_cache(maxsize=4096)
def _shared(several: tuple[Adapter, ...]) -> tuple[Adapter, ...]:
    """Return the adapters that were equal before: a study's thousands of records have few that differ."""
    return several


def _of_site(site: Site, given: AdapterLike) -> tuple[Adapter, ...]:
    several = (given,) if isinstance(given, Adapter) else tuple(given)
    kind = site.kind
    for adapter in several:
        kinds = adapter.specification.kinds
        if kind not in kinds:
            roles = [role for role in ROLES if KIND_OF_ROLE[role] in kinds]
            raise ValueError(
                f"{adapter.method!r} cannot sit on {site} (a {kind} site); "
                f"it takes the roles {', '.join(roles)}."
            )
    if len(several) < 2:
        return several
    names = [adapter.method for adapter in several]
    if len(set(names)) != len(names):
        raise ValueError(f"Site {site} carries a method twice: {', '.join(names)}.")
    wrapping = {adapter.method for adapter in several if adapter.specification.wraps}
    for adapter in several:
        rivals = wrapping - {adapter.method} if adapter.specification.wraps else frozenset[str]()
        for rival in sorted((adapter.specification.excludes | rivals) & set(names)):
            raise ValueError(
                f"Site {site} carries {adapter.method} and {rival}, which take the same place: "
                "a site takes one of them."
            )
    return tuple(sorted(several, key=lambda adapter: list(METHOD_SPECS).index(adapter.method)))


class _FrozenMap(dict[Site, tuple[Adapter, ...]]):
    """A dict in canonical order that refuses changes: a configuration's key must not go stale."""

    def __hash__(self) -> int:  # type: ignore[override]
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(self.items()))

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("A Configuration is immutable; use Configuration.replace(adapters=...).")

    def __reduce__(self) -> tuple[type[_FrozenMap], tuple[dict[Site, tuple[Adapter, ...]]]]:
        # The default fills an empty map, which this one refuses.
        return _FrozenMap, (dict(self),)

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse
