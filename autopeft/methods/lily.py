"""Lily: low-rank updates whose second matrices are mixed from some that blocks share."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

from peft import PeftConfig
from torch import nn

from autopeft.core.configuration import Adapter
from autopeft.core.method_specs import PeftSpec
from autopeft.methods.base import Placement, Trainable
from autopeft.methods.peft_base import module_names
from autopeft.methods.peft_family import PeftFamily
from autopeft.models.site_shapes import SiteShape

_SHARED = "lily_B.weight"


class Lily(PeftFamily):
    """Lily: A of each site, and B as a mixture of `experts` matrices that the sites of a role share.

    Zhong et al., "Low-Rank Interconnected Adaptation across Layers", 2024. Those share that have the same
    stack, role, widths, rank and options. peft weighs the matrices by the mean over all tokens of a batch:
    what is computed for a text depends on the others in its batch and on padding, and in a language model on
    tokens to come.
    """

    reads_whole_batch = True

    def __init__(self, specification: PeftSpec) -> None:
        super().__init__(specification)
        self.shares_state = True

    def group_key(self, shape: SiteShape, adapter: Adapter) -> Hashable:
        """Return also what sites share by: peft shares what one config holds, if widths are equal."""
        site = shape.site
        return super().group_key(shape, adapter), site.stack, site.role, shape.in_features, shape.out_features

    def peft_config(self, placement: Placement) -> PeftConfig:
        """Return a config whose modules are one pattern: in a list peft would share by the ends of names."""
        config: Any = super().peft_config(placement)
        config.target_modules = "|".join(map(re.escape, module_names(placement)))
        return config  # type: ignore[no-any-return]

    def inject(self, model: nn.Module, placement: Placement) -> Trainable:
        """Put the adapters in, and return B of each group once; see `PeftMethod.inject`."""
        found = super().inject(model, placement)
        for name, group in self.groups(placement).items():
            for site in group:
                own = dict(found[site])
                found[name] = {_SHARED: own.pop(_SHARED)}
                found[site] = own
        return found

    def stored_shared(self, placement: Placement) -> tuple[str, str]:
        """Return the first site: what is loaded there is every site's."""
        return f"model.{module_names(placement)[0]}.{_SHARED}", _SHARED
