"""Spaces for a purpose: `PerLayer` with other methods, sizes or blocks; all its settings can be set too."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from autopeft.core.adapter import Place
from autopeft.core.configuration import Configuration
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.methods import METHODS, count_parameters
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.base import Baseline
from autopeft.search_spaces.method_space import Sizes, in_top_half
from autopeft.search_spaces.per_layer import PerLayer


@dataclass(frozen=True, kw_only=True)
class Everything(PerLayer):
    """Every method there is, also registered ones; those that no site can take are left out."""

    @property
    def default_methods(self) -> Sequence[str]:
        """All methods."""
        return tuple(METHOD_SPECS)


@dataclass(frozen=True, kw_only=True)
class Mergeable(PerLayer):
    """Every method that weights can take in, so that what is found costs nothing when it is served."""

    @property
    def default_methods(self) -> Sequence[str]:
        """Methods that merge, by what the installed peft makes of them."""
        return tuple(name for name in METHOD_SPECS if METHODS[name].is_mergeable)


@dataclass(frozen=True, kw_only=True)
class Servable(PerLayer):
    """LoRA of ranks that servers take; `export(target="vllm")` writes one rank for all modules."""

    methods: Sequence[str] | None = ("lora",)
    default_sizes: ClassVar[Sizes] = {"rank": (8, 64)}


@dataclass(frozen=True, kw_only=True)
class LowMemory(PerLayer):
    """Methods that keep little for the backward pass, in the top half of each stack.

    The memory of activations follows the lowest block with an adapter, and there what a method's gradients
    need: for LoRA-FA, LoRA-XS and biases not the inputs of layers, for a ladder beside the blocks nothing of
    them.
    """

    @property
    def default_methods(self) -> Sequence[str]:
        """LoRA-FA, LoRA-XS, BitFit and ladders."""
        return ("lora_fa", "lora_xs", "bitfit", "ladder")

    def block_groups(self, backbone: Backbone) -> tuple[tuple[Place, ...], ...]:
        """Return the groups of the top half of each stack; see `PerLayer.block_groups`."""
        groups = super().block_groups(backbone)
        top = (tuple(place for place in group if in_top_half(place, backbone)) for group in groups)
        return tuple(group for group in top if group)


@dataclass(frozen=True, kw_only=True)
class Tiny(PerLayer):
    """Methods of few numbers; a search trains nothing of more than 10,000 adapter parameters in all.

    The bound is a constraint: a search that is given another one of `adapter_parameters` has that. What is
    drawn, and baselines, keep to it.
    """

    most: ClassVar[int] = 10_000
    """40 kB in single precision; LoRA of rank 1 on MiniLM's query and value has 9,216."""

    # LoRA-XS trains the square of its rank: up to 64 a site, where LoRA of rank 1 has 768 at MiniLM's query.
    default_sizes: ClassVar[Sizes] = {"lora": (1, 1), "lora_xs": (2, 8)}

    @property
    def constraints(self) -> Mapping[str, float | str]:
        """At most 10,000 adapter parameters."""
        return {"adapter_parameters": self.most}

    @property
    def default_methods(self) -> Sequence[str]:
        """Numbers that all sites share, small matrices, vectors, and LoRA at its smallest."""
        return ("tinylora", "lora_xs", "ia3", "layernorm", "bitfit", "ssf", "lora")

    def draw(self, generator: random.Random, backbone: Backbone) -> Configuration:
        """Draw a point, and leave out slots until it keeps the bound; see `SearchSpace.draw`."""
        point, slots = super().draw(generator, backbone), self.slots(backbone)
        generator.shuffle(slots)
        while not self._keeps(point, backbone):
            left_out = slots.pop().sites
            kept = {site: several for site, several in point.adapters.items() if site not in left_out}
            point = point.replace(adapters=kept, allocation=None).with_allocation(point.allocation)
        return point

    def all_baselines(self, backbone: Backbone) -> Iterator[Baseline]:
        """Yield those of `PerLayer` that keep the bound."""
        several = super().all_baselines(backbone)
        return (known for known in several if self._keeps(known.configuration, backbone))

    def _keeps(self, point: Configuration, backbone: Backbone) -> bool:
        return count_parameters(backbone, point) - backbone.head_parameters <= self.most


@dataclass(frozen=True, kw_only=True)
class NASPEFTPaper(PerLayer):
    """LoRA of any rank, or the bias, for every matrix.

    Lawton et al., "Neural Architecture Search for Parameter-Efficient Fine-tuning of Large Pre-trained
    Language Models", 2023. The paper prunes one training, in which a matrix may keep both; here each
    configuration is trained, and a matrix has one of them at most.
    """

    default_sizes: ClassVar[Sizes] = {"rank": tuple(range(1, 17))}  # the bound is ours

    @property
    def default_methods(self) -> Sequence[str]:
        """LoRA and BitFit, which needs biases."""
        return ("lora", "bitfit")


@dataclass(frozen=True, kw_only=True)
class ShearsPaper(PerLayer):
    """LoRA of the paper's three ranks for every matrix.

    Muñoz et al., "Shears: Unstructured Sparsity with Neural Low-rank Adapter Search", 2024. The weights stay
    as they are, where the paper prunes them beforehand. Each matrix may be left alone and has a rank of its
    own: in the paper's settings for LLaMA each has an adapter, and query, key and value the same rank.
    """

    methods: Sequence[str] | None = ("lora",)
    default_sizes: ClassVar[Sizes] = {"rank": (16, 24, 32)}


@dataclass(frozen=True, kw_only=True)
class Stratified(PerLayer):
    """Three groups of blocks, each with LoRA or biases at its roles, or frozen.

    Arora and Wang, "SPAFIT: Stratified Progressive Adaptation Fine-tuning for Pre-trained Large Language
    Models", 2024, which says beforehand what each group has.
    """

    groups: int | None = 3

    @property
    def default_methods(self) -> Sequence[str]:
        """LoRA and BitFit, which needs biases."""
        return ("lora", "bitfit")


PRESETS = (Everything, Mergeable, Servable, LowMemory, Tiny, NASPEFTPaper, ShearsPaper, Stratified)
"""All spaces of this module."""
