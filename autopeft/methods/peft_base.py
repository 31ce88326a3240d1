"""What the methods that peft implements share: peft's own injection, one peft adapter a group of sites.

Adapters that differ in an option peft holds once a config (rsLoRA, dropout) are injected as separate
peft adapters of one model. peft ignores patterns that match nothing, so `attach` in `attachment.py`
checks every site afterwards.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import cast

from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftType
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from autopeft.core.configuration import Adapter, Site
from autopeft.core.method_spec import B_RATE
from autopeft.methods.base import Method, Placement, Trainable, replace_module, swap
from autopeft.models.site_shapes import SiteShape


class PeftMethod(Method):
    """A method that peft implements, injected with one peft config a group of like adapters."""

    @property
    def size_pattern(self) -> str | None:
        """The config's field for sizes by module; None where there is none that the method heeds."""
        return None

    @abstractmethod
    def peft_config(self, placement: Placement) -> PeftConfig:
        """Return the peft config that gives every site of a group what its adapter says."""

    def rate(self, adapter: Adapter, name: str) -> float:
        """Return the method's rate, for B of a LoRA times the adapter's `b_rate`.

        Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024.
        """
        factor = dict(adapter.options).get(B_RATE, 1.0) if name.startswith("lora_B") else 1.0
        return float(factor) * super().rate(adapter, name)

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
        originals = {shape.module: model.get_submodule(shape.module) for shape, _ in placement.values()}
        for name, module in originals.items():
            undo.callback(replace_module, model, name, module)
            if self.changes_weights:
                parent, _, child = name.rpartition(".")
                swap(model.get_submodule(parent), child, copy.deepcopy(module), undo)
        undo.callback(vars(model).pop, "peft_config", None)
        return self.inject(model, placement)

    def inject(self, model: nn.Module, placement: Placement) -> Trainable:
        """Put the adapters in for good, and return what is trainable."""
        modes = {shape.module: model.get_submodule(shape.module).training for shape, _ in placement.values()}
        configs = vars(model).get("peft_config", {})
        layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
        active = {layer: layer.active_adapters for layer in layers}
        parameters: Trainable = {}
        for adapter_name, group in self.groups(placement).items():
            # peft takes several adapters of some families for one model's.
            vars(model).pop("peft_config", None)
            config = configs[adapter_name] = self.peft_config(group)
            with quiet_peft():
                # As `inject_adapter_in_model` does, which refuses families that share state over the model.
                tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)](model, config, adapter_name)
            shared = {
                _without(adapter_name, name): parameter
                for name, parameter in tuner.named_parameters(remove_duplicate=False)
                if not name.startswith("model.")
            }
            if shared:
                parameters[adapter_name] = shared
            for site, (shape, _) in group.items():
                layer = model.get_submodule(shape.module)
                while isinstance(layer, ParamWrapper) and layer.parameter_name != shape.parameter:
                    layer = layer.base_layer  # one a parameter, each around the one before
                if isinstance(layer, BaseTunerLayer):
                    active[layer] = [adapter_name]
                    layer.train(modes[shape.module])
                parameters[site] = _adapter_parameters(layer, adapter_name, shared.values())
        for layer, names in active.items():
            layer.set_adapter(names)  # injecting a peft adapter makes it the active one of every layer
        vars(model)["peft_config"] = configs
        return parameters


_NOISE = (
    "Unsupported layer type",  # LayerNorm tuning, of every norm
    "Specified to not",  # projections are drawn again by their seed
    "The following (rank|alpha)_pattern keys did not match",  # of experts, which `attach` checks
    "Using Rank-Stabilized LoRA",  # the base is not asked for again
    "Found missing adapter keys",  # of DeLoRA and TinyLoRA: what they compute again from the base
    "`is_gradient_checkpointing` is deprecated",
)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence warnings of peft about what is handled here."""
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield


def _adapter_parameters(
    layer: nn.Module, adapter_name: str, shared: Collection[nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Return the parameters of one peft adapter in a layer alone; empty where peft did not wrap it."""
    if not isinstance(layer, BaseTunerLayer):
        return {}
    found: dict[str, nn.Parameter] = {}
    for name, parameter in cast(nn.Module, layer).named_parameters():
        holder, _, held = name.partition(".")
        is_own = holder in layer.adapter_layer_names and held.partition(".")[0] == adapter_name
        if is_own and not any(parameter is other for other in shared):
            found[_without(adapter_name, name)] = parameter
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


def _without(adapter_name: str, name: str) -> str:
    """Return the name of a parameter as peft writes it: without that of its peft adapter."""
    return ".".join(part for part in name.split(".") if part != adapter_name)


def module_names(placement: Placement) -> list[str]:
    """Return the names of the modules that a placement puts adapters on."""
    return [shape.module for shape, _ in placement.values()]
