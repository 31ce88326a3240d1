"""What the methods that peft implements share: peft's own injection, one peft adapter a group of sites.

Adapters that differ in an option peft holds once a config (rsLoRA, dropout) are injected as separate
peft adapters of one model. peft ignores patterns that match nothing, so `attach` in `attachment.py`
checks every site afterwards.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import cast

from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from autopeft.core.configuration import Adapter, Site
from autopeft.methods.base import Method, Placement, Trainable, replace_module
from autopeft.models.site_shapes import SiteShape

UNMATCHED = "The following (rank|alpha)_pattern keys did not match"
"""What peft warns of patterns for experts, which it takes: it looks for them among the modules.

That each site has its rank is checked by `attach`."""


class PeftMethod(Method):
    """A method that peft implements, injected with one peft config a group of like adapters."""

    @abstractmethod
    def peft_config(self, placement: Placement) -> PeftConfig:
        """Return the peft config that gives every site of a group what its adapter says."""

    def group_key(self, shape: SiteShape, adapter: Adapter) -> Hashable:
        """Return what the adapters of one peft config have in common."""
        return ()

    def groups(self, placement: Placement) -> dict[str, Placement]:
        """Split a placement into groups, by the name of the peft adapter that holds each."""

        def key(item: tuple[Site, tuple[SiteShape, Adapter]]) -> str:
            return repr(self.group_key(*item[1]))

        grouped = [dict(items) for _, items in groupby(sorted(placement.items(), key=key), key)]
        return {
            self.name if index == 0 else f"{self.name}_{index + 1}": group
            for index, group in enumerate(grouped)
        }

    def attach(self, model: nn.Module, placement: Placement, undo: ExitStack) -> Trainable:
        """Inject the adapters; see `Method.attach`."""
        parameters: dict[Site, Mapping[str, nn.Parameter]] = {}
        originals = {shape.module: model.get_submodule(shape.module) for shape, _ in placement.values()}
        for name, module in originals.items():
            undo.callback(replace_module, model, name, module)
        undo.callback(vars(model).pop, "peft_config", None)
        groups = self.groups(placement)
        with _quiet_peft():
            for adapter_name, group in groups.items():
                inject_adapter_in_model(self.peft_config(group), model, adapter_name)
        for adapter_name, group in groups.items():
            for site, (shape, _) in group.items():
                layer = model.get_submodule(shape.module)
                while isinstance(layer, ParamWrapper) and layer.parameter_name != shape.parameter:
                    layer = layer.base_layer  # one a parameter, each around the one before
                if isinstance(layer, BaseTunerLayer):
                    # Injecting a peft adapter makes it the active one of every layer, also of those that
                    # carry another.
                    layer.set_adapter(adapter_name)
                    layer.train(originals[shape.module].training)
                parameters[site] = _adapter_parameters(layer, adapter_name)
        return parameters


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Silence warnings of what we are here for: adapters on disjoint modules, norms of any class, experts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        warnings.filterwarnings("ignore", message=UNMATCHED)
        yield


def _adapter_parameters(layer: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of one peft adapter in a layer; empty where peft did not wrap it."""
    if not isinstance(layer, BaseTunerLayer):
        return {}
    found: dict[str, nn.Parameter] = {}
    for name, parameter in cast(nn.Module, layer).named_parameters():
        holder, _, held = name.partition(".")
        adapter, *local = held.split(".")
        if holder in layer.adapter_layer_names and adapter == adapter_name:
            found[".".join([holder, *local])] = parameter
    return found


def stored_names(placement: Placement) -> dict[Site, str]:
    """Return how peft's names of the tensors at each site of a group begin.

    The layers around several parameters of one module lie in each other, the last parameter's outermost.
    """
    outer: Counter[str] = Counter()
    names: dict[Site, str] = {}
    for site, (shape, _) in reversed(sorted(placement.items())):
        names[site] = f"{shape.module}." + "base_layer." * outer[shape.module]
        outer[shape.module] += 1
    return names


def module_names(placement: Placement) -> list[str]:
    """Return the names of the modules that a placement puts adapters on."""
    return [shape.module for shape, _ in placement.values()]
