"""Methods whose modules come from peft: LoRA, IA3 and LayerNorm tuning.

Adapters that differ in an option peft holds once a config (rsLoRA, dropout) are injected as separate
peft adapters of one model. peft ignores patterns that match nothing, so `attach` in `attachment.py`
checks every site afterwards.

peft's injection matches every module of a model against every pattern, and walks the model a dozen times.
As the modules are known by name here, its layers are made for them directly, in the order in which peft
would make them; where a layer is none of the plain ones, peft's injection is used.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from types import MappingProxyType
from typing import Any

from peft import IA3Config, IA3Model, LNTuningConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora.layer import dispatch_default as lora_layer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from autopeft.core.configuration import Adapter, Site
from autopeft.methods.base import Attached, Method, Placement, replace_module, undrawn_linears
from autopeft.models.backbone import SiteShape
from autopeft.models.module_modes import set_mode


class PeftMethod(Method):
    """A method that peft implements, injected with one peft config a group of like adapters."""

    name: str

    @abstractmethod
    def peft_config(self, placement: Placement) -> PeftConfig:
        """Return the peft config that gives every site of a group what its adapter says."""

    def group_key(self, shape: SiteShape, adapter: Adapter) -> Hashable:
        """Return what the adapters of one peft config have in common."""
        return ()

    @abstractmethod
    def new_layer(
        self, module: nn.Module, shape: SiteShape, adapter: Adapter, adapter_name: str, config: Any
    ) -> nn.Module:
        """Return peft's layer around a plain module, as injecting the config would make it."""

    def groups(self, placement: Placement) -> dict[str, Placement]:
        """Split a placement into groups, by the name of the peft adapter that holds each."""

        def key(item: tuple[Site, tuple[SiteShape, Adapter]]) -> str:
            return repr(self.group_key(*item[1]))

        grouped = [dict(items) for _, items in groupby(sorted(placement.items(), key=key), key)]
        return {
            self.name if index == 0 else f"{self.name}_{index + 1}": group
            for index, group in enumerate(grouped)
        }

    def attach(self, model: nn.Module, placement: Placement) -> Attached:
        """Inject the adapters; see `Method.attach`."""
        parameters: dict[Site, Mapping[str, nn.Parameter]] = {}
        originals = {shape.module: model.get_submodule(shape.module) for shape, _ in placement.values()}

        def undo() -> None:
            for name, module in originals.items():
                replace_module(model, name, module)
            if hasattr(model, "peft_config"):
                del model.peft_config

        groups = self.groups(placement)
        put = self._wrap if all(map(_is_plain, originals.values())) else self._inject
        try:
            with _quiet_peft(), undrawn_linears():  # peft's LoRA draws A and sets B to 0
                for adapter_name, group in groups.items():
                    put(model, adapter_name, group)
            for adapter_name, group in groups.items():
                for site, (shape, _) in group.items():
                    layer = model.get_submodule(shape.module)
                    if isinstance(layer, BaseTunerLayer):
                        # Injecting a peft adapter makes it the active one of every layer, also of
                        # those that carry another.
                        layer.set_adapter(adapter_name)
                        set_mode(layer, training=originals[shape.module].training)
                    parameters[site] = _adapter_parameters(layer, adapter_name)
        except BaseException:
            undo()
            raise
        return Attached(parameters=parameters, undo=undo)

    def _wrap(self, model: nn.Module, adapter_name: str, group: Placement) -> None:
        """Put peft's layers around the modules of a group, in the order in which they stand in the model."""
        config = self.peft_config(group)
        by_module = {shape.module: (shape, adapter) for shape, adapter in group.values()}
        modules = [(name, one) for name, one in model.named_modules() if name in by_module]
        for name, module in modules:
            layer = self.new_layer(module, *by_module[name], adapter_name, config)
            replace_module(model, name, layer)

    def _inject(self, model: nn.Module, adapter_name: str, group: Placement) -> None:
        inject_adapter_in_model(self.peft_config(group), model, adapter_name)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Silence warnings of what we are here for: several adapters on disjoint modules, norms of any class."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        yield


def _is_plain(module: nn.Module) -> bool:
    """Whether peft has nothing to see to: no quantised, sharded or wrapped layer."""
    known = type(module) in (nn.Linear, Conv1D) or not isinstance(module, nn.Linear | BaseTunerLayer)
    return known and getattr(module, "_hf_tp_plan", None) is None


def _adapter_parameters(layer: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of one peft adapter in a layer; empty where peft did not wrap it."""
    if not isinstance(layer, BaseTunerLayer):
        return {}
    found: dict[str, nn.Parameter] = {}
    for holder_name in layer.adapter_layer_names:
        holder = getattr(layer, holder_name)
        if adapter_name not in holder:
            continue
        held = holder[adapter_name]
        if isinstance(held, nn.Parameter):
            found[holder_name] = held
        else:
            found |= {f"{holder_name}.{name}": one for name, one in held.named_parameters()}
    return found


def _module_names(placement: Placement) -> list[str]:
    return [shape.module for shape, _ in placement.values()]


class Lora(PeftMethod):
    """LoRA: a low-rank update B·A beside a frozen weight, scaled by α/√r (rsLoRA) or α/r.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; Kalajdzievski, "A Rank
    Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.
    """

    name = "lora"
    size_dimensions = MappingProxyType({"lora_A.weight": 0, "lora_B.weight": 1})

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return r·(d_in + d_out)."""
        assert adapter.size is not None
        return adapter.size * (shape.in_features + shape.out_features)

    def group_key(self, shape: SiteShape, adapter: Adapter) -> Hashable:
        """Return what peft holds once a config."""
        return adapter.option("rslora"), adapter.option("dropout"), shape.transposed

    def peft_config(self, placement: Placement) -> PeftConfig:
        """Return a LoraConfig with a rank and an alpha for every module."""
        shape, adapter = next(iter(placement.values()))
        # PEFT reads pattern keys as regular expressions behind an optional "(.*\.)?" prefix, so a full
        # module name matches itself alone.
        ranks = {shape.module: one.size for shape, one in placement.values()}
        alphas = {shape.module: one.option("alpha") for shape, one in placement.values()}
        common: dict[str, Any] = {
            "r": adapter.size,
            "lora_alpha": adapter.option("alpha"),
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
        }
        return LoraConfig(
            **common,
            target_modules=_module_names(placement),
            use_rslora=bool(adapter.option("rslora")),
            lora_dropout=float(adapter.option("dropout")),
            fan_in_fan_out=shape.transposed,
        )

    def new_layer(
        self, module: nn.Module, shape: SiteShape, adapter: Adapter, adapter_name: str, config: Any
    ) -> nn.Module:
        """Return LoRA's layer; see `PeftMethod.new_layer`."""
        layer = lora_layer(
            module,
            adapter_name,
            config=config,
            r=adapter.size,
            lora_alpha=adapter.option("alpha"),
            target_name=shape.module,
        )
        assert layer is not None  # a plain linear layer has one
        return layer


class IA3(PeftMethod):
    """IA3: a learned vector that scales a linear layer's output, or the input of the ffn's last layer.

    Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
    Learning", 2022: keys, values and the ffn's intermediate activations are scaled.
    """

    name = "ia3"

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return the width of what is scaled."""
        return shape.in_features if shape.site.role == "ffn_down" else shape.out_features

    def group_key(self, shape: SiteShape, adapter: Adapter) -> Hashable:
        """Return what peft holds once a config."""
        return shape.transposed

    def peft_config(self, placement: Placement) -> PeftConfig:
        """Return an IA3Config over the modules."""
        shape, _ = next(iter(placement.values()))
        scaled_inputs = [shape.module for site, (shape, _) in placement.items() if site.role == "ffn_down"]
        return IA3Config(
            target_modules=_module_names(placement),
            feedforward_modules=scaled_inputs,
            fan_in_fan_out=shape.transposed,
        )

    def new_layer(
        self, module: nn.Module, shape: SiteShape, adapter: Adapter, adapter_name: str, config: Any
    ) -> nn.Module:
        """Return IA3's layer; see `PeftMethod.new_layer`."""
        scales_input = shape.site.role == "ffn_down"
        layer: nn.Module = IA3Model._create_new_module(
            config, adapter_name, module, is_feedforward=scales_input
        )
        return layer


class LayerNormTuning(PeftMethod):
    """LayerNorm tuning: scale and shift of a norm are trained in a copy.

    Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", 2023.
    """

    name = "layernorm"

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return the number of parameters of the norm."""
        return shape.parameters

    def peft_config(self, placement: Placement) -> PeftConfig:
        """Return an LNTuningConfig over the modules."""
        return LNTuningConfig(target_modules=_module_names(placement))

    def new_layer(
        self, module: nn.Module, shape: SiteShape, adapter: Adapter, adapter_name: str, config: Any
    ) -> nn.Module:
        """Return the norm's layer; see `PeftMethod.new_layer`."""
        return LNTuningLayer(module, adapter_name, config=config)
