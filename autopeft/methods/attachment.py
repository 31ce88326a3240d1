"""Attach a configuration to a resident backbone, check every site, and take it out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.core.profiling import section
from autopeft.core.seeding import seeded
from autopeft.evaluation.memory.size_formula import AdapterSize, SizedAdapters
from autopeft.methods.base import Method, Placement
from autopeft.methods.bitfit import BitFit
from autopeft.methods.bottleneck import Bottleneck, Parallel, Series
from autopeft.methods.peft_methods import IA3, LayerNormTuning, Lora
from autopeft.methods.prefix_tuning import Prefix, PrefixTuning
from autopeft.models.backbone import Backbone
from autopeft.models.module_modes import iter_parameters

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "lora": Lora(),
        "ia3": IA3(),
        "layernorm": LayerNormTuning(),
        "bitfit": BitFit(),
        "series": Series(),
        "parallel": Parallel(),
        "prefix": PrefixTuning(),
    }
)
"""The torch side of every method in `METHOD_SPECS`; those that replace modules come first."""

assert METHODS.keys() == METHOD_SPECS.keys()


def carries_adapters(model: nn.Module) -> bool:
    """Return whether adapters of peft or of autopeft are attached to a model, or it is a `PeftModel`."""
    adapters = (BaseTunerLayer, Bottleneck, Prefix)
    return hasattr(model, "peft_config") or any(isinstance(one, adapters) for one in model.modules())


def count_site(backbone: Backbone, site: Site, adapter: Adapter) -> int:
    """Return the exact number of trainable parameters of one adapter at one site."""
    return METHODS[adapter.method].count(backbone.shape(site), adapter)


def count_parameters(backbone: Backbone, configuration: Configuration) -> int:
    """Return the exact number of trainable parameters, head included, before anything is built.

    Raises:
        ValueError: The configuration names a site the backbone does not have.
    """
    adapters = sum(count_site(backbone, site, adapter) for site, adapter in configuration)
    return adapters + backbone.head_parameters


def placement_of(backbone: Backbone, configuration: Configuration, method: str) -> Placement:
    """Return the sites at which a configuration has one method, with what the backbone has there."""
    return {
        site: (backbone.shape(site), adapter) for site, adapter in configuration if adapter.method == method
    }


class Attachment:
    """A configuration attached to a backbone; use it in a `with` block, which detaches it.

    While attached, exactly the adapters' and the head's parameters require gradients.

    Args:
        backbone: The resident backbone; one configuration at a time.
        configuration: What to attach.
        seed: Seed of the adapters' (and of a new head's) initial weights.

    Raises:
        ValueError: The backbone already carries a configuration, or cannot carry this one.
        RuntimeError: A site does not carry what the configuration says.
    """

    @section("attach")
    def __init__(self, backbone: Backbone, configuration: Configuration, seed: int = 0) -> None:
        if backbone.attached is not None:
            raise ValueError(f"{backbone.name} already carries {backbone.attached!r}: detach that one first.")
        backbone.check(configuration)
        self.backbone = backbone
        self.configuration = configuration
        self.parameters: dict[str, nn.Parameter] = {}
        self._sizes: list[AdapterSize] = []
        self._undo: list[Callable[[], None]] = []
        self._detached = False
        backbone.attached = configuration
        try:
            with seeded(seed):
                self._attach_methods()
                self._attach_head()
            for parameter in self.parameters.values():
                if parameter.dtype.itemsize < torch.float32.itemsize:
                    parameter.data = parameter.data.float()  # as peft trains and loads adapters on any base
            self._select_trainable()
        except BaseException:
            self.detach()
            raise

    def _attach_methods(self) -> None:
        for name in self.configuration.methods:
            placement = placement_of(self.backbone, self.configuration, name)
            attached = METHODS[name].attach(self.backbone.model, placement)
            self._undo.append(attached.undo)
            for site, (shape, adapter) in placement.items():
                parameters = attached.parameters.get(site, {})
                expected = METHODS[name].count(shape, adapter)
                found = sum(parameter.numel() for parameter in parameters.values())
                if found != expected:
                    raise RuntimeError(
                        f"{site} should carry {adapter} with {expected} parameters, but "
                        f"{shape.module} got {found}: {name} did not attach there."
                    )
                if adapter.size is not None:
                    dimensions = METHODS[name].size_dimensions.items()
                    placed = tuple((parameters[local], dimension) for local, dimension in dimensions)
                    self._sizes.append(AdapterSize((site, name), adapter.size, placed))
                self.parameters |= {
                    f"{site}.{name}.{local}": parameter for local, parameter in parameters.items()
                }

    def _attach_head(self) -> None:
        """Train the head in a copy: the backbone's own head is left as it was."""
        model = self.backbone.model
        originals: list[tuple[nn.Module, str, nn.Parameter]] = []

        def restore() -> None:
            for original in reversed(originals):
                setattr(*original)

        self._undo.append(restore)
        std = float(getattr(model.config, "initializer_range", 0.02))
        for head in self.backbone.head:
            for path, module in model.get_submodule(head).named_modules(prefix=head):
                for local, original in list(module.named_parameters(recurse=False)):
                    originals.append((module, local, original))
                    trained = nn.Parameter(original.detach().clone())
                    setattr(module, local, trained)
                    self.parameters[f"head.{path}.{local}"] = trained
                if self.backbone.new_head and isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=std)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def _select_trainable(self) -> None:
        parameters = iter_parameters(self.backbone.model)
        for parameter in parameters:
            parameter.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        found = sum(one.numel() for one in parameters if one.requires_grad)
        expected = self._expected_parameters()
        if found != expected:
            raise RuntimeError(
                f"{found} parameters require gradients after attaching, the configuration has {expected}."
            )

    def _expected_parameters(self) -> int:
        return count_parameters(self.backbone, self.configuration)

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters that are trained: adapters and head."""
        return self._expected_parameters()

    @property
    def sized(self) -> SizedAdapters:
        """What is attached, its sizes apart from everything else about it."""
        structure = tuple((site, one.method, one.options) for site, one in self.configuration)
        methods = frozenset((one.method, one.options) for _, one in self.configuration)
        return SizedAdapters((type(self), structure), methods, tuple(self._sizes))

    @property
    def cut(self) -> int | None:
        """Number of blocks below everything that is trained; None where nothing is frozen."""
        lowest = self.configuration.lowest_block
        return len(self.backbone.blocks) if lowest is None else lowest

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the trained tensors: adapters under "site.method.name", then the head."""
        return {name: one.detach().cpu().clone() for name, one in self.parameters.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put trained tensors in place.

        Raises:
            ValueError: A tensor is missing or left over, or a shape differs.
        """
        if state.keys() != self.parameters.keys():
            difference = sorted(state.keys() ^ self.parameters.keys())
            raise ValueError(
                f"The trained tensors do not belong to this configuration: {len(difference)} names "
                f"differ, the first is {difference[0]}."
            )
        for name, parameter in self.parameters.items():
            if state[name].shape != parameter.shape:
                raise ValueError(
                    f"{name} has the shape {tuple(state[name].shape)}, expected {tuple(parameter.shape)}."
                )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])

    @section("attach")
    def detach(self) -> None:
        """Take everything out; the backbone is then what it was, bit for bit. Safe to call again."""
        if self._detached:  # another configuration may be attached by now
            return
        self._detached = True
        while self._undo:
            self._undo.pop()()
        for parameter in iter_parameters(self.backbone.model):
            parameter.requires_grad_(False)
        self.backbone.attached = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()


def attach(backbone: Backbone, configuration: Configuration, seed: int = 0) -> Attachment:
    """Attach a configuration to a backbone; see `Attachment`."""
    return Attachment(backbone, configuration, seed)
