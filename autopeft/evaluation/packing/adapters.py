"""The adapters of several candidates on one frozen model, each acting on its own slice of the rows.

A frozen module runs once over the rows of all candidates. Hooks behind it add what each candidate's adapter
does to its slice: LoRA as one batched product over candidates, the other methods slice by slice. The hooks
stand in the order in which `autopeft.methods` attaches: methods on one module compose as they do alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.evaluation.packing.layout import Layout, PerSlice, Undo, give_parameters, replace_forward
from autopeft.evaluation.packing.prefix_tuning import give_prefixes
from autopeft.methods.bottleneck import Bottleneck, Parallel, Series, beside_sublayer
from autopeft.models.backbone import Backbone, SiteShape


@dataclass(frozen=True, eq=False)
class Member:
    """A candidate of a pack.

    Attributes:
        configuration: What it trains.
        parameters: Its trainable parameters, named as by `Attachment`.
    """

    configuration: Configuration
    parameters: Mapping[str, nn.Parameter]

    def parameters_under(self, prefix: str) -> dict[str, nn.Parameter]:
        """Return the parameters whose name begins with a prefix, by the rest of it."""
        return {
            name.removeprefix(prefix): one for name, one in self.parameters.items() if name.startswith(prefix)
        }


@dataclass(frozen=True)
class MemberAdapter:
    """One candidate's adapter at a site, with its parameters under their local names."""

    adapter: Adapter
    parameters: Mapping[str, nn.Parameter]


At = Mapping[int, MemberAdapter]
"""The adapters of one method at one site, by candidate."""


class PackedLora:
    """LoRA of several candidates at one site: two batched products, ranks padded to the largest.

    The padded matrices are what gradients are computed for; the candidates' own parameters become views
    of them, and so do their gradients. Padding starts at 0 and keeps a gradient of 0.

    Args:
        layout: The slices of the pass.
        shape: The site.
        members: The adapters by candidate.
    """

    def __init__(self, layout: Layout, shape: SiteShape, members: At) -> None:
        self.layout = layout
        self.name = shape.module
        first = members[min(members)].parameters["lora_A.weight"]
        width = max(one.parameters["lora_A.weight"].shape[0] for one in members.values())
        count = len(members)
        self.down = first.new_zeros(count, width, shape.in_features).requires_grad_()
        self.up = first.new_zeros(count, width, shape.out_features).requires_grad_()
        self.down.grad, self.up.grad = torch.zeros_like(self.down), torch.zeros_like(self.up)
        self.candidates = torch.tensor(sorted(members), device=first.device)
        scales: list[float] = []
        self.dropout: list[float] = []
        for place, (_, member) in enumerate(sorted(members.items())):
            down, up = member.parameters["lora_A.weight"], member.parameters["lora_B.weight"]
            rank = down.shape[0]
            _become_view(down, self.down.detach()[place, :rank], self.down.grad[place, :rank])
            _become_view(up, self.up.detach()[place, :rank].T, self.up.grad[place, :rank].T)
            alpha = float(member.adapter.option("alpha"))
            scales.append(alpha / (math.sqrt(rank) if member.adapter.option("rslora") else rank))
            self.dropout.append(float(member.adapter.option("dropout")))
        self.scaling = first.new_tensor(scales).view(-1, 1, 1)

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Add every candidate's update to its slice of the output."""
        if not self.layout.slices:
            return None
        given = self.layout.matrices(inputs[0], self.name)
        base = self.layout.matrices(output, self.name)
        everyone = len(self.candidates) == self.layout.slices
        if not everyone:
            given = given.index_select(0, self.candidates)
        inner = torch.bmm(self._drop(given), self.down.transpose(1, 2))
        inner = inner * self.scaling.to(inner.dtype)
        if everyone:
            return torch.baddbmm(base, inner, self.up).view(output.shape)
        update = torch.bmm(inner, self.up).to(base.dtype)
        return base.index_add(0, self.candidates, update).view(output.shape)

    def _drop(self, given: Tensor) -> Tensor:
        if not self.layout.training or not any(self.dropout):
            return given
        slices = zip(given.unbind(), self.dropout, strict=True)
        return torch.stack([functional.dropout(one, rate) for one, rate in slices])

    def zero_grad(self) -> None:
        """Set the gradients to 0 in place: the candidates' own are views of them."""
        for padded in (self.down, self.up):
            assert padded.grad is not None
            padded.grad.zero_()


def _become_view(parameter: nn.Parameter, values: Tensor, gradient: Tensor) -> None:
    values.copy_(parameter.detach())
    parameter.data = values
    parameter.grad = gradient


class PackedAdapters:
    """Adapters and heads of several candidates, held on a frozen model by hooks until `remove`.

    Args:
        backbone: The frozen model; not changed.
        members: The candidates; slice i is the i-th one's.
        layout: The slices of the pass, which the caller keeps up to date.
    """

    def __init__(self, backbone: Backbone, members: Sequence[Member], layout: Layout) -> None:
        self.backbone = backbone
        self.members = members
        self.layout = layout
        self._loras: list[PackedLora] = []
        self._copies: list[nn.Module] = []
        self._undo: list[Undo] = []
        try:
            for site, shape in backbone.sites.items():
                if found := self._at(site, "layernorm"):
                    self._per_slice(shape.module, {at: _own(one) for at, one in found.items()})
                if found := self._at(site, "bitfit"):
                    self._hook(shape.module, self._shift(shape, found))
                if found := self._at(site, "lora"):
                    self._loras.append(PackedLora(layout, shape, found))
                    self._hook(shape.module, self._loras[-1])
                if found := self._at(site, "ia3"):
                    self._scale(shape, found)
            self._sublayers()
            for head in backbone.head:
                self._per_slice(
                    head,
                    {at: member.parameters_under(f"head.{head}.") for at, member in enumerate(members)},
                )
        except BaseException:
            self.remove()
            raise

    def _sublayers(self) -> None:
        prefixes: dict[str, dict[int, Mapping[str, nn.Parameter]]] = {}
        for site, shape in self.backbone.sites.items():
            if found := self._at(site, "series"):
                self._hook(shape.module, self._series(shape, found))
        for site, shape in self.backbone.sites.items():
            if found := self._at(site, "parallel"):
                self._parallel(shape, found)
            if found := self._at(site, "prefix"):
                prefixes[shape.attention_module] = {at: one.parameters for at, one in found.items()}
        if prefixes:
            self._undo.append(give_prefixes(self.backbone.model, prefixes, self.layout))

    def _at(self, site: Site, method: str) -> dict[int, MemberAdapter]:
        return {
            at: MemberAdapter(adapter, member.parameters_under(f"{site}.{method}."))
            for at, member in enumerate(self.members)
            for adapter in member.configuration.adapters.get(site, ())
            if adapter.method == method
        }

    def _module(self, name: str) -> nn.Module:
        return self.backbone.model.get_submodule(name)

    def _hook(self, name: str, hook: Any) -> None:
        self._undo.append(self._module(name).register_forward_hook(hook).remove)

    def _per_slice(self, name: str, parameters: Mapping[int, Mapping[str, nn.Parameter]]) -> None:
        """Give candidates a copy each of a module, with their own parameters in it."""
        module = self._module(name)
        copies = {at: copy.deepcopy(module) for at in parameters}
        for at, own in parameters.items():
            give_parameters(copies[at], own)
        self._copies += copies.values()
        forward = PerSlice(self.layout, name, module.forward, copies)
        self._undo.append(replace_forward(module, forward))

    def _shift(self, shape: SiteShape, found: At) -> Any:
        frozen = cast(Tensor, self._module(shape.module).bias)
        neutral = torch.zeros_like(frozen)
        layout = self.layout

        def shift(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            if not layout.slices:
                return None
            shifts = [
                found[at].parameters["bias"] - frozen if at in found else neutral
                for at in range(layout.slices)
            ]
            base = layout.matrices(output, shape.module)
            return (base + torch.stack(shifts).unsqueeze(1).to(base.dtype)).view(output.shape)

        return shift

    def _scale(self, shape: SiteShape, found: At) -> None:
        """IA3: scale the output, or the input of the ffn's last layer, as peft does."""
        layout = self.layout
        neutral = torch.ones_like(found[min(found)].parameters["ia3_l"]).flatten()

        def scaled(tensor: Tensor) -> Tensor:
            factors = [
                found[at].parameters["ia3_l"].flatten() if at in found else neutral
                for at in range(layout.slices)
            ]
            base = layout.matrices(tensor, shape.module)
            return (base * torch.stack(factors).unsqueeze(1).to(base.dtype)).view(tensor.shape)

        def before(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return (scaled(inputs[0]), *inputs[1:]) if layout.slices else None

        def behind(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            return scaled(output) if layout.slices else None

        if shape.site.role == "ffn_down":
            self._undo.append(self._module(shape.module).register_forward_pre_hook(before).remove)
        else:
            self._hook(shape.module, behind)

    def _bottlenecks(self, shape: SiteShape, found: At, method: Series | Parallel) -> dict[int, Bottleneck]:
        made: dict[int, Bottleneck] = {}
        for at, one in found.items():
            with torch.device("meta"):  # nothing is drawn: the weights are there
                made[at] = method.build(shape, one.adapter)
            give_parameters(made[at], one.parameters)
        return made

    def _series(self, shape: SiteShape, found: At) -> Any:
        bottlenecks = self._bottlenecks(shape, found, Series())

        def add(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            return self._add(shape, bottlenecks, output, output) if self.layout.slices else None

        return add

    def _parallel(self, shape: SiteShape, found: At) -> None:
        bottlenecks = self._bottlenecks(shape, found, Parallel())

        def add(given: Tensor, output: Tensor) -> Tensor:
            return self._add(shape, bottlenecks, given, output) if self.layout.slices else output

        handles = beside_sublayer(self.backbone.model, shape, add)
        self._undo += [handle.remove for handle in handles]

    def _add(
        self, shape: SiteShape, bottlenecks: Mapping[int, Bottleneck], given: Tensor, output: Tensor
    ) -> Tensor:
        """Add f(given) of each candidate that has one to its slice of the output."""
        sources = self.layout.sliced(given, shape.module)
        slices = list(self.layout.sliced(output, shape.module).unbind())
        for at, bottleneck in bottlenecks.items():
            slices[at] = slices[at] + bottleneck(sources[at])
        return torch.cat(slices)

    def train(self, mode: bool) -> None:
        """Switch dropout inside adapters and heads."""
        self.layout.training = mode
        for module in self._copies:
            module.train(mode)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for member in self.members:
            for name, parameter in member.parameters.items():
                if ".lora." not in name:
                    parameter.grad = None
        for lora in self._loras:
            lora.zero_grad()

    def remove(self) -> None:
        """Take everything out of the model. Safe to call again."""
        while self._undo:
            self._undo.pop()()


def _own(one: MemberAdapter) -> dict[str, nn.Parameter]:
    """Return a tuned norm's parameters under the norm's own names."""
    return {name.removeprefix("ln_tuning_layers."): parameter for name, parameter in one.parameters.items()}
