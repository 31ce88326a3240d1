"""Attach a configuration to a resident backbone, check every site, and take it out again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor, nn

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import method_spec
from autopeft.core.profiling import section
from autopeft.core.seeding import seeded
from autopeft.methods.base import RATE, Placement
from autopeft.methods.head import copy_head
from autopeft.methods.registry import METHODS
from autopeft.models.backbone import Backbone
from autopeft.models.site_shapes import SiteShape


def count_site(backbone: Backbone, site: Site, adapter: Adapter) -> int:
    """Return the exact number of trainable parameters of one adapter at one site."""
    return METHODS[adapter.method].count(backbone.shape(site), adapter)


def obstacle(backbone: Backbone, site: Site, adapter: Adapter) -> str | None:
    """Say why an adapter of this method and size cannot sit on a site, or return None where it can."""
    shape = backbone.shape(site)
    why = backbone.obstacle(shape, adapter.method)
    return why or METHODS[adapter.method].obstacle(shape, adapter, backbone.quantized.get(shape.module))


def count_parameters(backbone: Backbone, configuration: Configuration) -> int:
    """Return the exact number of trainable parameters, head included, before anything is built."""
    adapters = sum(count_site(backbone, site, adapter) for site, adapter in configuration)
    shared = 0
    if any(METHODS[name].shares_state for name in configuration.methods):
        by_method = placements(configuration, backbone.sites)
        shared = sum(METHODS[name].count_shared(placement) for name, placement in by_method.items())
    return adapters + shared + backbone.head_parameters


def placements(configuration: Configuration, shapes: Mapping[Site, SiteShape]) -> dict[str, Placement]:
    """Return, for each method of a configuration, its sites and what the backbone has there."""
    return {
        method: {site: (shapes[site], adapter) for site, adapter in configuration if adapter.method == method}
        for method in configuration.methods
    }


def attach_methods(
    model: nn.Module, by_method: Mapping[str, Placement], undo: ExitStack
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Attach the methods' adapters to a model.

    Returns:
        What is trained and what is kept with it, as "site.method.name".
    """
    trained: dict[str, nn.Parameter] = {}
    kept: dict[str, Tensor] = {}
    for name, placement in by_method.items():
        trainable = METHODS[name].attach(model, placement, undo)
        own: dict[str, Tensor] = {}
        for site, (shape, adapter) in placement.items():
            at_site = trainable.get(site, {})
            expected = METHODS[name].count(shape, adapter)
            found = sum(tensor.numel() for tensor in at_site.values() if tensor.requires_grad)
            if found != expected:
                raise RuntimeError(
                    f"{site} should carry {adapter} with {expected} parameters, but "
                    f"{shape.module} got {found}: {name} did not attach there."
                )
            for local, tensor in at_site.items():
                setattr(tensor, RATE, METHODS[name].rate(adapter, local))
                own[f"{site}.{name}.{local}"] = tensor
        shared = {
            f"{group}.shared.{local}": tensor
            for group, named in trainable.items()
            if isinstance(group, str)
            for local, tensor in named.items()
        }
        expected, found = METHODS[name].count_shared(placement), sum(map(Tensor.numel, shared.values()))
        if found != expected:
            raise RuntimeError(f"The sites of {name} should share {expected} parameters, but share {found}.")
        for tensor in shared.values():
            setattr(tensor, RATE, method_spec(name).rate)
        for full_name, tensor in (own | shared).items():
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                trained[full_name] = tensor
            else:
                kept[full_name] = tensor
    return trained, kept


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a ValueError where what is to be loaded has other names or shapes than what is attached."""
    if shapes.keys() != tensors.keys():
        difference = sorted(shapes.keys() ^ tensors.keys())
        raise ValueError(
            f"The trained tensors do not belong to this configuration: {len(difference)} names "
            f"differ, the first is {difference[0]}."
        )
    for name, tensor in tensors.items():
        if shapes[name] != tuple(tensor.shape):
            raise ValueError(f"{name} has the shape {shapes[name]}, expected {tuple(tensor.shape)}.")


def load_tensors(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy trained tensors into those of the same names: all or none."""
    check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in state.items()})
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(state[name])


class Attachment:
    """A configuration attached to a backbone; use it in a `with` block, which detaches it.

    While attached, exactly the parameters of the adapters and of `Backbone.trained_head` require gradients.

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
        for site, adapter in configuration:
            if (why := obstacle(backbone, site, adapter)) is not None:
                raise ValueError(f"{adapter.method!r} cannot sit on {site} of {backbone.name}: {why}.")
        self.backbone = backbone
        self.configuration = configuration
        self.parameters: dict[str, nn.Parameter] = {}
        self.kept: dict[str, Tensor] = {}  # with what is trained, as the places of sparse numbers
        self._undo = ExitStack()
        self._undo.callback(self._release)
        backbone.attached = configuration
        try:
            with seeded(seed):
                self._attach_methods()
                self.parameters |= copy_head(backbone, self._undo)
            for tensor in self.tensors.values():
                if tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize:
                    tensor.data = tensor.data.float()  # as peft trains and loads adapters on any base
            self._select_trainable()
        except BaseException:
            self.detach()
            raise

    def _attach_methods(self) -> None:
        by_method = placements(self.configuration, self.backbone.sites)
        trained, self.kept = attach_methods(self.backbone.model, by_method, self._undo)
        self.parameters |= trained

    def _select_trainable(self) -> None:
        model = self.backbone.model.requires_grad_(False)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(self._is_trained(name))
        found = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        expected = self.trainable_parameters
        if found != expected:
            raise RuntimeError(
                f"{found} parameters require gradients after attaching, the configuration has {expected}."
            )

    def _is_trained(self, name: str) -> bool:
        return not name.startswith("head.") or name.startswith(
            tuple(f"head.{module}." for module in self.backbone.trained_head)
        )

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters that are trained: adapters and head."""
        return count_parameters(self.backbone, self.configuration)

    @property
    def structure(self) -> Hashable:
        """All that decides which operations a step takes and how large their results are."""
        return type(self), tuple(self.configuration)

    @property
    def cut(self) -> int | None:
        """Number of blocks below everything that is trained; None where nothing is frozen."""
        return self.backbone.blocks_below(self.configuration.lowest_block)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is trained and what is kept with it."""
        return {**self.parameters, **self.kept}

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of `tensors`: adapters under "site.method.name"; the head is there whole."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.tensors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put trained tensors in place; see `load_tensors`."""
        load_tensors(self.tensors, state)

    @section("attach")
    def detach(self) -> None:
        """Take everything out; the backbone is then what it was, bit for bit. Safe to call again."""
        self._undo.close()

    def _release(self) -> None:
        self.backbone.model.requires_grad_(False)
        self.backbone.attached = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(backbone: Backbone, configuration: Configuration, seed: int = 0) -> Attachment:
    """Attach a configuration to a backbone; see `Attachment`."""
    return Attachment(backbone, configuration, seed)
