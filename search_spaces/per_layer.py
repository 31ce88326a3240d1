"""PerLayer: method × role × size for each block (or group of blocks), each block on or off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

from autopeft.core.adapter import Place
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.errors import check_choice, check_whole
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.base import Baseline
from autopeft.search_spaces.method_choice import Encoding, placed
from autopeft.search_spaces.method_space import SlotSpace, in_top_half
from autopeft.search_spaces.suggest_trial import SuggestTrial


@dataclass(frozen=True, kw_only=True)
class PerLayer(SlotSpace):
    """Every block, or group of blocks, chooses for each role a method and a size, or none.

    Further arguments, and the errors raised, are those of `MethodSpace`.

    Attributes:
        groups: Number of groups of consecutive blocks that share their choices, of each stack; None for one
            group a block.
        encoding: How choices are laid before an Optuna sampler: "fixed" asks for every parameter every time,
            so that a trial also has the sizes of methods that it does not use, and of blocks that are off;
            "conditional" asks only for those that matter. The set of configurations is the same.
    """

    groups: int | None = None
    encoding: Encoding = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("encoding", get_args(Encoding), self.encoding)
        if self.groups is not None:
            check_whole("groups", self.groups, what="a number of groups of blocks", least=1)

    def block_groups(self, backbone: Backbone) -> tuple[tuple[Place, ...], ...]:
        """Split the blocks of each stack into groups of consecutive ones, as even as can be."""
        if self.groups is None:
            return super().block_groups(backbone)
        groups: list[tuple[Place, ...]] = []
        for stack, places in backbone.stacks.items():
            total = len(places)
            if self.groups > total:
                what = f"{total} {stack}".rstrip()
                raise ValueError(f"groups={self.groups}, but {backbone.name} has only {what} blocks.")
            edges = [round(index * total / self.groups) for index in range(self.groups + 1)]
            groups += [places[slice(*pair)] for pair in pairwise(edges)]
        return tuple(groups)

    def suggest_adapters(self, trial: SuggestTrial, backbone: Backbone) -> dict[Site, Adapter]:
        """Ask for on/off a group, then for every slot; see `SearchSpace.suggest_adapters`."""
        adapters: dict[Site, Adapter] = {}
        for group, slots in self.groups_of_slots(backbone).items():
            on = trial.suggest_categorical(f"{group}.on", (True, False))
            for slot in slots if on or self.encoding == "fixed" else ():
                adapter = slot.suggest(trial, self.encoding)
                if on and adapter is not None:
                    adapters |= dict.fromkeys(slot.sites, adapter)
        return adapters

    def encode_adapters(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        """Return on/off a group, and every slot's parameters; see `SearchSpace.encode_adapters`."""
        parameters: dict[str, Any] = {}
        for group, slots in self.groups_of_slots(backbone).items():
            on = any(site in configuration.adapters for slot in slots for site in slot.sites)
            parameters[f"{group}.on"] = on
            for slot in slots:
                parameters |= slot.encode(configuration)
        return parameters

    def all_baselines(self, backbone: Backbone) -> Iterator[Baseline]:
        """Yield the head alone, each method at its smallest everywhere, and the first at more sizes.

        These are in the top half of each stack (memory follows the lowest adapted block), in all MLPs, and
        everywhere.
        """
        methods = self.methods_on(backbone)
        first = self.choice_of(methods[0])
        everywhere = self.slots(backbone)
        top = [slot for slot in everywhere if all(in_top_half(site.place, backbone) for site in slot.sites)]
        yield Baseline(name="head alone", configuration=self.point())
        candidates = [(self.choice_of(method).smallest, "everywhere", everywhere) for method in methods]
        for adapter in first.three_adapters:
            candidates += [
                (adapter, "in the top half", top),
                (adapter, "in the MLPs", self.ffn_slots(backbone)),
                (adapter, "everywhere", everywhere),
            ]
        for adapter, where, slots in candidates:
            yield Baseline(name=f"{adapter} {where}", configuration=self.point(placed(adapter, slots)))

    def summary(self, backbone: Backbone) -> str:
        """Say what each role chooses from; see `SearchSpace.summary`."""
        groups = self.groups_of_slots(backbone)
        lines = [f"{len(groups)} groups of blocks ({', '.join(groups)}), each on or off; in each:"]
        offered = {slot.sites[0].role: slot for slots in groups.values() for slot in slots}
        for role, slot in offered.items():
            lines.append(f"  {role}: off, {', '.join(map(str, slot.choices.values()))}")
        return "\n".join(lines)
