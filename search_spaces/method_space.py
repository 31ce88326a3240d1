"""Spaces that choose methods and sizes: settings, checks and slots that they share."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

from autopeft.core.adapter import Place, block_ranges
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.errors import check_choice, checked_names
from autopeft.core.method_specs import METHOD_SPECS, ROLES, method_spec
from autopeft.methods import count_site
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.base import SearchSpace
from autopeft.search_spaces.learning_rates import learning_rate_bounds
from autopeft.search_spaces.method_choice import MethodChoice, Slot, most_parameters, placed
from autopeft.search_spaces.mutation import SiteMutator
from autopeft.search_spaces.score_allocation import site_values
from autopeft.sensitivity import SiteScores

_logger = logging.getLogger(__name__)
_SLOTS, _LARGEST = _KEPT = "_slots_of_backbones", "_largest_on_backbones"
_DEFAULT_METHODS = ("lora", "series", "parallel", "prefix")

Sizes = Mapping[str, Sequence[int]]
"""By what a size is called or by method: (smallest, largest), or the sizes themselves if they are not two."""


@dataclass(frozen=True, kw_only=True)
class MethodSpace(SearchSpace):
    """A space that chooses methods and sizes at the sites of some roles.

    Attributes:
        methods: The methods to choose from; None for LoRA, series and parallel adapters and prefix tuning,
            without those that no site of the backbone can take.
        sizes: (smallest, largest) by what methods call their size, or for one method, which goes first:
            `{"rank": (1, 16), "vera": (16, 64)}`. Powers of two between them are searched. One size, or three
            and more, are those that are searched: `{"rank": (16, 24, 32)}`. Methods that are not named have
            the bounds that `autopeft methods` lists.
        roles: Roles that may carry an adapter; None for all that a method can sit on.
        learning_rate: See `SearchSpace`.
        options: Options fixed for a method, as in `{"lora": {"alpha": 16}}`.

    Raises:
        ValueError: A method, role, option or bound is not valid.
    """

    methods: Sequence[str] | None = None
    sizes: Sizes = field(default_factory=dict)
    roles: Sequence[str] | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    default_sizes: ClassVar[Sizes] = {}
    """What `sizes` are where they do not say others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.methods is not None:
            given: object = self.methods
            named = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
            for method in named:
                if not isinstance(method, str):
                    raise ValueError(
                        f"methods are names, got {type(method).__name__}: "
                        "call autopeft.methods.register and give its name."
                    )
            known = [method_spec(method).name for method in named]
            object.__setattr__(self, "methods", checked_names("method", known, known or METHOD_SPECS))
        if self.roles is not None:
            object.__setattr__(self, "roles", checked_names("role", self.roles, ROLES))
        check_choice("method in options", self._offered, *self.options)
        sized = {name: size for name in self._offered if (size := method_spec(name).size_name) is not None}
        check_choice("size or method in sizes", [*dict.fromkeys(sized.values()), *sized], *self.sizes)
        for method in self._offered:
            _ = self.choice_of(method).adapters  # checks the options

    @property
    def default_methods(self) -> Sequence[str]:
        """The methods to choose from where none are named."""
        return _DEFAULT_METHODS

    @property
    def _offered(self) -> Sequence[str]:
        return self.default_methods if self.methods is None else self.methods

    def choice_of(self, method: str) -> MethodChoice:
        """Return a method with the sizes and options it is searched with."""
        options = self.options.get(method, {})
        specification = method_spec(method)
        if specification.size_name is None:
            return MethodChoice(method=method, options=options)
        named = [
            (key, given[key])
            for given in (self.sizes, self.default_sizes)
            for key in (method, specification.size_name)
            if key in given
        ]
        key, bounds = named[0] if named else (method, specification.sizes)
        return MethodChoice(method=method, sizes=size_ladder(bounds, f"sizes[{key!r}]"), options=options)

    def block_groups(self, backbone: Backbone) -> tuple[tuple[Place, ...], ...]:
        """Return the groups of blocks that share their choices; here each block is one."""
        return tuple((place,) for place in backbone.places)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but what is kept of backbones of this process."""
        return {name: value for name, value in vars(self).items() if name not in _KEPT}

    def groups_of_slots(self, backbone: Backbone) -> dict[str, tuple[Slot, ...]]:
        """Return every group's slots by its name, as in "0-1"; made once, as proposing asks often."""
        known: WeakKeyDictionary[Backbone, dict[str, tuple[Slot, ...]]]
        known = vars(self).setdefault(_SLOTS, WeakKeyDictionary())
        if backbone not in known:
            known[backbone] = self._groups_of_slots(backbone)
        return known[backbone]

    def _groups_of_slots(self, backbone: Backbone) -> dict[str, tuple[Slot, ...]]:
        choices = [self.choice_of(method) for method in self._offered]
        groups: dict[str, tuple[Slot, ...]] = {}
        for places in self.block_groups(backbone):
            group = block_ranges(places)
            slots = []
            for role in self.roles or backbone.roles:
                asked = (Site(block, role, stack) for stack, block in places)
                sites = tuple(site for site in asked if site in backbone.sites)
                possible = {
                    choice.method: fitting
                    for choice in choices
                    if (fitting := choice.on(backbone, sites)) is not None
                }
                if sites and possible:
                    slots.append(Slot(name=f"{group}.{role}", sites=sites, choices=possible))
            groups[group] = tuple(slots)
        return groups

    def slots(self, backbone: Backbone) -> list[Slot]:
        """Return the slots of all groups."""
        return [slot for slots in self.groups_of_slots(backbone).values() for slot in slots]

    def ffn_slots(self, backbone: Backbone) -> list[Slot]:
        """Return the slots of the MLPs, of which LoRA gains most.

        Schulman et al., "LoRA Without Regret", 2025; in attention alone it is worse with as many parameters.
        """
        return [slot for slot in self.slots(backbone) if in_mlp(slot.sites[0])]

    def methods_on(self, backbone: Backbone) -> tuple[str, ...]:
        """Return the methods that some site of a backbone can take."""
        used = {method for slot in self.slots(backbone) for method in slot.choices}
        return tuple(method for method in self._offered if method in used)

    def validate(self, backbone: Backbone) -> None:
        """Raise ValueError for a role the backbone lacks and for a named method that no role can take.

        A method of the default list that no role can take is left out, and the log says so.
        """
        check_choice(f"role in {backbone.name}", backbone.roles, *(self.roles or ()))
        possible, roles = self.methods_on(backbone), ", ".join(self.roles or backbone.roles)
        for method in (method for method in self._offered if method not in possible):
            obstacle = f"{method!r} can sit on none of the roles {roles} of "
            if self.methods is not None or not possible:
                raise ValueError(
                    f"{obstacle}{backbone.name}: leave it out of methods, or add a role that takes it."
                )
            _logger.warning("%s%s: it is left out of the search.", obstacle, backbone.name)
        self.check_allocations(backbone)

    def choices(self, backbone: Backbone) -> dict[Site, Mapping[str, MethodChoice]]:
        """Return the methods of every slot, by its first site; see `SearchSpace.choices`."""
        return dict(sorted((slot.sites[0], slot.choices) for slot in self.slots(backbone)))


@dataclass(frozen=True, kw_only=True)
class SlotSpace(MethodSpace):
    """A space in which every slot may carry any of its choices, or none.

    Attributes:
        site_scores: The scores that the space needs; a `Search` fills them in.
    """

    site_scores: Mapping[str, SiteScores] = field(default_factory=dict, repr=False, compare=False)

    def with_scores(self, scores: Mapping[str, SiteScores]) -> Self:
        """Return the space with scores."""
        return replace(self, site_scores=scores)

    def scores_of(self, name: str) -> SiteScores:
        """Return the scores of a name; raise ValueError where they have not been given to the space."""
        if name not in self.site_scores:
            raise ValueError(
                f"The space has no {name!r} scores yet: use it in a Search, which computes them, or call "
                "with_scores(autopeft.sensitivity.compute_scores(...))."
            )
        return self.site_scores[name]

    def cost_everywhere(self, adapter: Adapter, backbone: Backbone) -> int:
        """Return the number of parameters of an adapter at all sites that can take it."""
        return sum(count_site(backbone, site, adapter) for site in placed(adapter, self.slots(backbone)))

    def mutator(self, backbone: Backbone) -> SiteMutator:
        """Return moves by slot, role or block, led by the first score; see `SearchSpace.mutator`."""
        choices, leading = self.choices(backbone), self.scores_needed[:1]
        return SiteMutator(
            learning_rate=learning_rate_bounds(self.learning_rate),
            allocations=self.allocations,
            choices=choices,
            values=site_values(self.scores_of(*leading), choices) if leading else dict.fromkeys(choices, 1.0),
            tied={slot.sites[0]: slot.sites for slot in self.slots(backbone)},
        )

    def extremes(self, backbone: Backbone) -> tuple[Configuration, Configuration]:
        """Return the head alone, and the most parameters; found once, as proposing asks often."""
        known: WeakKeyDictionary[Backbone, dict[Site, Adapter]]
        known = vars(self).setdefault(_LARGEST, WeakKeyDictionary())
        if backbone not in known:
            known[backbone] = most_parameters(self.slots(backbone), backbone)
        return self.point(), self.point(known[backbone])

    def count(self, backbone: Backbone) -> int:
        """Return the product over all slots of their choices."""
        return math.prod(slot.count for slot in self.slots(backbone))


def size_ladder(given: Any, name: str) -> tuple[int, ...]:
    """Return the powers of two within (smallest, largest), both ends included; what is not two as given."""
    sizes = tuple(given) if isinstance(given, tuple | list) else ()
    whole = {type(size) for size in sizes} == {int}
    if not whole or sizes[0] < 1 or list(sizes) != sorted(sizes):
        raise ValueError(
            f"{name} is (smallest, largest), two whole numbers from 1 up, or a choice of one or of three and "
            f"more, rising, got {given!r}; "
            "to have no adapter at a site is always possible and needs no size 0."
        )
    if len(sizes) != 2:
        return tuple(dict.fromkeys(sizes))
    low, high = sizes
    powers = (2**exponent for exponent in range(high.bit_length()))
    return tuple(sorted({low, *(power for power in powers if low < power < high), high}))


def in_top_half(place: Place, backbone: Backbone) -> bool:
    """Whether a block is in the upper half of its stack, as the middle one of an odd number is."""
    stack, block = place
    return block >= backbone.depths[stack] // 2


def in_mlp(site: Site) -> bool:
    """Whether a site is in the MLP of its block."""
    return site.role.startswith("ffn")
