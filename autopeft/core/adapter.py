"""Site and Adapter: the two words a configuration is written in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import groupby
from typing import Any

from autopeft.core.errors import check_choice, is_finite_number, shown, unknown_choice
from autopeft.core.method_specs import KIND_OF_ROLE, ROLES, Kind, MethodSpec, OptionValue, method_spec

_SITE = re.compile(r"((?P<stack>[A-Za-z_]\w*)\.)?(?P<first>\d{1,9})(-(?P<last>\d{1,9}))?\.(?P<role>[\w.]+)")
MOST_BLOCKS = 4096  # several times the deepest networks: a range must not fill the memory
_STACKS = ("vision", "audio", "encoder", "text", "decoder")  # in the order in which models run them

Place = tuple[str, int]
"""A block: the name of its stack, empty in a model that has one, and its index from the stack's input."""


@dataclass(frozen=True)
class Site:
    """A place for adapters: the module of one role (or a whole sublayer) in one block.

    Args:
        block: Index of the transformer block, from 0 at the input of its stack.
        role: One of `autopeft.core.method_specs.ROLES`; where a block has no role for a linear layer, the
            layer's name in it, as "mixer.in_proj".
        stack: Name of the stack of blocks, as "decoder"; empty in a model that has one.

    Raises:
        ValueError: The role is unknown or the block is negative.
    """

    block: int
    role: str
    stack: str = ""

    def __post_init__(self) -> None:
        if self.role not in KIND_OF_ROLE and not is_module_name(self.role):
            raise unknown_choice("role", self.role, ROLES)
        if self.block < 0:
            raise ValueError(f"A block index counts from 0, got {self.block}.")

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read a site from "3.query", or from "decoder.3.query"."""
        sites = parse_sites(text)
        if len(sites) != 1:
            raise ValueError(f"Expected one site such as '3.query', got {text!r}.")
        return sites[0]

    def __str__(self) -> str:
        return f"{place_name(self.place)}.{self.role}"

    def __lt__(self, other: Site) -> bool:
        return self.order < other.order

    @property
    def place(self) -> Place:
        """The block it is in."""
        return self.stack, self.block

    @property
    def kind(self) -> Kind:
        """What is there: a layer that is named by its module is linear."""
        return KIND_OF_ROLE.get(self.role, "linear")

    @cached_property
    def order(self) -> tuple[int, str, int, int, str]:
        """What sites are sorted by: the way through the model, then the place of the role in a block."""
        return *stack_order(self.stack), self.block, role_order(self.role), self.role


def is_module_name(role: str) -> bool:
    """Whether a role is a layer's name in its block, as "mixer.in_proj"."""
    parts = role.split(".")
    return len(parts) > 1 and all(map(str.isidentifier, parts)) and parts[-1] not in ("weight", "bias")


@cache
def role_order(role: str) -> int:
    """Return a role's place in tables and pictures; layers that are named by their modules come last."""
    return ROLES.index(role) if role in KIND_OF_ROLE else len(ROLES)


@cache
def stack_order(stack: str) -> tuple[int, str]:
    """Return a stack's place among others, from the input to the output."""
    return _STACKS.index(stack) if stack in _STACKS else len(_STACKS), stack


def place_name(place: Place) -> str:
    """Write a block as in "3", or with its stack as in "decoder.3"."""
    stack, block = place
    return f"{stack}.{block}" if stack else str(block)


@lru_cache(maxsize=4096)  # a study's records share their sites
def parse_sites(text: str) -> tuple[Site, ...]:
    """Read one site, or a range of blocks, from "3.query" or "0-5.query" (both ends included).

    A stack may stand in front, as in "decoder.3.query".
    """
    match = _SITE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"Cannot read the site {shown(text)}: expected 'block.role' or 'first-last.role', "
            "for example '3.query', '0-5.ffn_down' or 'decoder.3.query'."
        )
    first = int(match["first"])
    last = int(match["last"]) if match["last"] is not None else first
    if last < first:
        raise ValueError(f"The range of blocks in {shown(text)} runs backwards: {first} > {last}.")
    if last >= MOST_BLOCKS:
        raise ValueError(f"Cannot read the site {shown(text)}: expected blocks from 0 to {MOST_BLOCKS - 1}.")
    stack = match["stack"] or ""
    return tuple(Site(block, match["role"], stack) for block in range(first, last + 1))


def block_ranges(places: Iterable[Place]) -> str:
    """Write blocks as in "0-5, 7", or with their stacks as in "encoder.0-5, decoder.3"."""
    ordered = sorted(places, key=lambda place: (stack_order(place[0]), place[1]))
    runs = groupby(enumerate(ordered), key=lambda entry: (entry[1][0], entry[1][1] - entry[0]))
    spans = [[place for _, place in run] for _, run in runs]
    return ", ".join(place_name(span[0]) + (f"-{span[-1][1]}" if len(span) > 1 else "") for span in spans)


@dataclass(frozen=True, init=False)
class Adapter:
    """One adapter of a configuration: a method, its size and the options that differ from default.

    Args:
        method: A name that `method_spec` knows.
        size: Rank, bottleneck width or prefix length, at least 1; None for methods without a size.
        options: Options of the method; those equal to the default are dropped, so that two
            spellings of the same adapter are equal.

    Raises:
        ValueError: Unknown method or option, a size where there is none, a missing or zero size.
    """

    method: str
    size: int | None
    options: tuple[tuple[str, OptionValue], ...]

    def __init__(
        self, method: str, size: int | None = None, options: Mapping[str, OptionValue] | None = None
    ) -> None:
        specification = method_spec(method)
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "size", _checked_size(specification, size))
        object.__setattr__(self, "options", _canonical_options(specification, options or {}))

    @property
    def size_or_zero(self) -> int:
        """The size as a number: 0 of a method without one."""
        return self.size or 0

    @property
    def specification(self) -> MethodSpec:
        """What the method's name stands for."""
        return method_spec(self.method)

    def option(self, name: str) -> OptionValue:
        """Return an option's value, the default where the configuration leaves it out."""
        return dict(self.options).get(name, self.specification.options[name])

    def to_dict(self) -> dict[str, Any]:
        """Return the adapter as plain data, defaults left out."""
        size = {} if self.size is None else {"size": self.size}
        return {"method": self.method, **size, **dict(self.options)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Adapter:
        """Read an adapter from `{"method": "lora", "size": 8, ...}`; "rank" is taken for "size"."""
        if "method" not in data:
            raise ValueError(f"An adapter needs a 'method', got the keys {shown(sorted(map(str, data)))}.")
        if not isinstance(data["method"], str):
            raise ValueError(f"A 'method' is a name, got {shown(data['method'])}.")
        rest = {key: value for key, value in data.items() if key != "method"}
        if "rank" in rest and "size" in rest:
            raise ValueError("An adapter has one size: give 'size' or 'rank', not both.")
        size = rest.pop("rank", None) if "rank" in rest else rest.pop("size", None)
        return cls(data["method"], size, rest)

    def __str__(self) -> str:
        inside = [] if self.size is None else [str(self.size)]
        inside += [f"{name}={value}" for name, value in self.options]
        return f"{self.method}({', '.join(inside)})"


def _checked_size(specification: MethodSpec, size: int | None) -> int | None:
    if specification.size_name is None:
        if size is not None:
            raise ValueError(f"{specification.name!r} has no size, got size={size!r}.")
        return None
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(
            f"{specification.name!r} needs a {specification.size_name} of at least 1 (a whole number), "
            f"got {size!r}; leave the site out to have no adapter there."
        )
    return size


def _canonical_options(
    specification: MethodSpec, given: Mapping[str, OptionValue]
) -> tuple[tuple[str, OptionValue], ...]:
    kept: dict[str, OptionValue] = {}
    for name, value in given.items():
        check_choice(f"option of {specification.name!r}", specification.options, name)
        default = specification.options[name]
        value = _typed_option(specification, name, value, default)
        if value != default:
            kept[name] = value
    return tuple(sorted(kept.items()))


def _typed_option(
    specification: MethodSpec, name: str, value: OptionValue, default: OptionValue
) -> OptionValue:
    label = f"Option {name!r} of {specification.name!r}"
    if isinstance(default, bool | str):
        if type(value) is not type(default):
            raise ValueError(f"{label} is a {type(default).__name__}, got {value!r}.")
        if name in specification.choices:
            check_choice(label.lower(), specification.choices[name], value)
        return value
    if not isinstance(value, int | float) or not is_finite_number(value):
        raise ValueError(f"{label} is a finite number, got {value!r}.")
    if name == "dropout" and not 0 <= value < 1:
        raise ValueError(f"{label} is a probability in [0, 1), got {value!r}.")
    if name in specification.minimums and value <= specification.minimums[name]:
        raise ValueError(f"{label} must be above {specification.minimums[name]}, got {value!r}.")
    if isinstance(default, int):
        if value != int(value):
            raise ValueError(f"{label} is a whole number, got {value!r}.")
        return int(value)
    return float(value)
