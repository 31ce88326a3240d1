"""The adapter families of peft that a row of `PEFT_FAMILIES` says all of."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from dataclasses import fields, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftType
from torch import nn
from transformers.pytorch_utils import Conv1D

from autopeft.core.configuration import Adapter
from autopeft.core.method_spec import B_RATE
from autopeft.core.method_specs import PeftSpec
from autopeft.methods.abilities import PROBED_SHAPE, abilities
from autopeft.methods.base import Placement
from autopeft.methods.peft_base import PeftMethod, module_names, quiet_peft
from autopeft.models.site_shapes import SiteShape


class _Probed(NamedTuple):
    """What peft makes of an adapter on a layer."""

    own_parameters: int
    shared_parameters: int  # that all layers share
    refusal: str | None  # what peft says against it


class PeftFamily(PeftMethod):
    """A family of peft's on linear layers, said by its row; peft's own layers tell its counts."""

    def __init__(self, specification: PeftSpec) -> None:
        self.name = specification.name
        self.row = specification
        self._config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[specification.peft_type]]
        self.shares_state = PEFT_TYPE_TO_TUNER_MAPPING[PeftType[specification.peft_type]].uses_shared_state
        self._fields = {each.name for each in fields(self._config_class)}

    @cached_property
    def size_pattern(self) -> str | None:
        """The config's field for sizes by module; None where there is none that the family heeds (probed)."""
        field = self.row.size_field
        pattern = "rank_pattern" if field in ("r", "effective_rank") else f"{field}_pattern"
        if not field or pattern not in self._fields:
            return None
        with torch.device("meta"), quiet_peft():
            model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("first", "second")})
            sizes = {"first": 2, "second": 4}
            config = self._config_class(
                target_modules=list(sizes), **{field: 2, pattern: sizes, **self.row.config}
            )
            PEFT_TYPE_TO_TUNER_MAPPING[PeftType[self.row.peft_type]](model, config, "probe")
        counts = {sum(map(nn.Parameter.numel, layer.parameters())) for layer in model.values()}
        return pattern if len(counts) > 1 else None

    @cached_property
    def changes_weights(self) -> bool:
        """Whether a layer's weights are others after an injection (probed)."""
        return abilities(self).changes_weights

    @cached_property
    def starts_at_base(self) -> bool:
        """Whether the model computes the same right after an injection (probed)."""
        return abilities(self).starts_at_base

    @cached_property
    def is_mergeable(self) -> bool:
        """Whether a merged layer computes what it did before (probed)."""
        return abilities(self).merges

    def size_value(self, shape: SiteShape, size: int) -> int:
        """Return what peft's config says of a size at a site."""
        return size

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return what peft's layer has; raise a ValueError where there is an `obstacle`."""
        probed = self._probed(shape, adapter)
        if probed.refusal is not None:
            raise ValueError(f"{adapter} cannot sit on {shape.module}: {probed.refusal}")
        return probed.own_parameters

    def count_shared(self, placement: Placement) -> int:
        """Return what each group of like adapters shares."""
        if not self.shares_state:
            return 0
        first = (next(iter(group.values())) for group in self.groups(placement).values())
        return sum(self._probed(shape, adapter).shared_parameters for shape, adapter in first)

    def obstacle(self, shape: SiteShape, adapter: Adapter, bits: int | None = None) -> str | None:
        """Return what peft says against an adapter on a layer of these widths."""
        if bits is not None:
            takes = abilities(self).takes_4_bits if bits == 4 else abilities(self).takes_8_bits
            if takes is False:
                return f"its weights are packed in {bits} bits, where peft cannot train it (tried on the CPU)"
        return self._probed(shape, adapter).refusal

    def _probed(self, shape: SiteShape, adapter: Adapter) -> _Probed:
        alike = replace(shape, site=PROBED_SHAPE.site, module="layer", input_module="", parameters=0)
        return _probe(self, alike, adapter)

    def group_key(self, shape: SiteShape, adapter: Adapter) -> Hashable:
        """Return what a peft config has for all its modules alike: without a pattern, also the size."""
        size = None if adapter.size is None or self.size_pattern else self.size_value(shape, adapter.size)
        options = tuple(option for option in adapter.options if option[0] != B_RATE)
        return options, shape.transposed, size

    def peft_config(self, placement: Placement) -> PeftConfig:
        """Return a config of the family over the modules."""
        row = self.row
        shape, adapter = next(iter(placement.values()))
        options = {row.fields.get(name, name): adapter.option(name) for name in row.options if name != B_RATE}
        scaling = float(options.pop("scaling", 1.0))
        sizes = {
            shape.module: self.size_value(shape, adapter.size)
            for shape, adapter in placement.values()
            if adapter.size
        }
        values: dict[str, Any] = {**row.config, **options}
        if row.size_field:
            values[row.size_field] = sizes[shape.module]
        if row.alpha_field:
            values[row.alpha_field] = scaling * values[row.size_field]
        if self.size_pattern and len(set(sizes.values())) > 1:
            values[self.size_pattern] = sizes
            if row.alpha_field:
                values["alpha_pattern"] = {module: scaling * size for module, size in sizes.items()}
        if "fan_in_fan_out" in self._fields:
            values["fan_in_fan_out"] = shape.transposed
        with quiet_peft():
            config: PeftConfig = self._config_class(target_modules=module_names(placement), **values)
        return config


@lru_cache(maxsize=4096)
def _probe(family: PeftFamily, shape: SiteShape, adapter: Adapter) -> _Probed:
    """Return what peft makes of an adapter on a layer.

    Asked of peft's own layer: without data on the meta device, or where the family looks at its numbers, on
    the CPU.
    """
    for device in ("meta", "cpu"):
        try:
            return _counted(family, shape, adapter, device)
        except (ValueError, TypeError, NotImplementedError, UserWarning) as error:  # how peft refuses a layer
            refusal = str(error)
        except RuntimeError:
            if device == "cpu":
                raise
    return _Probed(0, 0, refusal)


def _counted(family: PeftFamily, shape: SiteShape, adapter: Adapter, device: str) -> _Probed:
    with torch.device(device), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(Invalid|Adjust)")  # peft would take another size
        model = nn.ModuleDict({"layer": _layer(shape)})
        trainable = family.inject(model, {shape.site: (shape, adapter)})
        try:
            model["layer"](torch.empty(1, shape.in_features))
        except RuntimeError as error:
            raise ValueError(f"peft makes a layer that computes nothing: {error}") from error
    counts = {key: sum(map(nn.Parameter.numel, named.values())) for key, named in trainable.items()}
    own, shared = counts.pop(shape.site), sum(counts.values())
    return _Probed(own, shared, None if own + shared else "peft puts nothing there")


def _layer(shape: SiteShape) -> nn.Module:
    if shape.transposed:
        return Conv1D(shape.out_features, shape.in_features)
    return nn.Linear(shape.in_features, shape.out_features, bias=bool(shape.bias))
