"""What a model has at the sites of its blocks: modules, sizes and numbers of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from autopeft.core.adapter import Site
from autopeft.core.method_specs import Kind
from autopeft.models.block_discovery import BlockModules, linear_sizes


@dataclass(frozen=True, kw_only=True)
class SiteShape:
    """What a backbone has at one site."""

    site: Site  # block and role
    kind: Kind  # what is there
    module: str  # qualified name of the module; of a sublayer, its output projection
    input_module: str  # qualified name of the module that is first given the site's input
    in_features: int  # width of the input; of a state space the number of channels (in Mamba-2 of heads)
    out_features: int  # width of the output; of a state space the numbers that a channel's A has
    # Number of parameters of the module itself (of sublayers the projection's, of state spaces A's and D's).
    parameters: int
    bias: int  # number of bias parameters of the module, 0 without one
    transposed: bool = False  # whether the weight is stored as (input, output), as in GPT-2's Conv1D
    key_value_features: int = 0  # attention only: width of one token's keys over all key heads
    attention_module: str = ""  # attention only: qualified name of the module that computes attention
    block_module: str = ""  # the ffn of blocks with attention only: qualified name of the block
    # State spaces only: qualified name of the module whose output ends in each token's C; empty without one.
    output_matrix_module: str = ""
    parameter: str = ""  # experts only: name of the module's parameter of shape (experts, ., .)
    experts: int = 1  # experts only: how many matrices the parameter holds

    @property
    def target(self) -> str:
        """Qualified name of what is adapted: the module, or of experts the parameter."""
        return f"{self.module}.{self.parameter}" if self.parameter else self.module


def site_shapes(model: nn.Module, block: BlockModules) -> Iterable[SiteShape]:
    """Yield what a model has at each site of one of its blocks."""
    stack, index = block.place
    names = {role: f"{block.name}.{path}" for role, path in block.roles.items()}
    shapes = {role: _module_shape(model, Site(index, role, stack), name) for role, name in names.items()}
    yield from shapes.values()
    source = shapes.get("query", shapes.get("qkv"))
    output = shapes.get("attention_output")
    if source is not None and output is not None:
        yield _sublayer(
            Site(index, "attention", stack),
            source,
            output,
            key_value_features=_key_value_features(shapes),
            attention_module=source.module.rpartition(".")[0],
        )
    first = shapes.get("ffn_up", shapes.get("ffn_gate_up"))
    if first is not None and "ffn_down" in shapes:
        name = block.name if block.has_attention else ""
        yield _sublayer(Site(index, "ffn", stack), first, shapes["ffn_down"], block_module=name)


def all_sites(model: nn.Module, blocks: Sequence[BlockModules]) -> dict[Site, SiteShape]:
    """Return every site of a model's blocks."""
    of_modules = (shape for block in blocks for shape in site_shapes(model, block))
    return {shape.site: shape for shape in (*of_modules, *whole_blocks(blocks))}


def whole_blocks(blocks: Iterable[BlockModules]) -> Iterator[SiteShape]:
    """Yield the sites of whole blocks, of stacks that are one list: not stages of unlike widths."""
    for stack, in_stack in groupby(blocks, key=lambda block: block.place[0]):
        placed = list(in_stack)
        if len({block.name.rpartition(".")[0] for block in placed}) > 1:
            continue
        for block in placed:
            yield SiteShape(
                site=Site(block.place[1], "block", stack),
                kind="block",
                module=block.name,
                input_module=block.name,
                in_features=block.width,
                out_features=block.width,
                parameters=0,
                bias=0,
            )


def _key_value_features(shapes: Mapping[str, SiteShape]) -> int:
    if "key" in shapes:
        return shapes["key"].out_features
    return (shapes["qkv"].out_features - shapes["attention_output"].in_features) // 2


def _sublayer(site: Site, first: SiteShape, output: SiteShape, **names: Any) -> SiteShape:
    return replace(
        output,
        site=site,
        kind=site.kind,
        input_module=first.module,
        in_features=first.in_features,
        transposed=False,
        **names,
    )


def _module_shape(model: nn.Module, site: Site, name: str) -> SiteShape:
    if site.kind == "experts":
        return _experts_shape(model, site, name)
    if site.kind == "state space":
        return _state_space_shape(model, site, name)
    module = model.get_submodule(name)
    bias = getattr(module, "bias", None)
    biases = 0 if bias is None else int(bias.numel())
    if site.kind == "linear":
        assert isinstance(module, nn.Linear | Conv1D)
        in_features, out_features = linear_sizes(module)
        parameters = in_features * out_features + biases
    else:
        in_features = out_features = next(module.parameters()).numel()
        parameters = sum(parameter.numel() for parameter in module.parameters())
    return SiteShape(
        site=site,
        kind=site.kind,
        module=name,
        input_module=name,
        in_features=in_features,
        out_features=out_features,
        parameters=parameters,
        bias=biases,
        transposed=isinstance(module, Conv1D),
    )


def _experts_shape(model: nn.Module, site: Site, name: str) -> SiteShape:
    module, _, parameter = name.rpartition(".")
    experts, *sizes = model.get_parameter(name).shape
    transposed = bool(getattr(model.get_submodule(module), "is_transposed", False))  # transformers' mark
    in_features, out_features = sizes if transposed else reversed(sizes)
    return SiteShape(
        site=site,
        kind="experts",
        module=module,
        input_module=module,
        in_features=in_features,
        out_features=out_features,
        parameters=experts * in_features * out_features,
        bias=0,
        parameter=parameter,
        experts=experts,
    )


def _state_space_shape(model: nn.Module, site: Site, name: str) -> SiteShape:
    mixer = model.get_submodule(name)
    rates, skips = mixer.get_parameter("A_log"), mixer.get_parameter("D")
    # Falcon-Mamba and Jamba normalise C; Mamba-2 takes it from a convolution whose module is not called.
    source = next((child for child in ("c_layernorm", "x_proj") if hasattr(mixer, child)), None)
    return SiteShape(
        site=site,
        kind="state space",
        module=name,
        input_module=name,
        in_features=len(rates),
        out_features=rates.numel() // len(rates),
        parameters=rates.numel() + skips.numel(),
        bias=0,
        output_matrix_module=f"{name}.{source}" if source else "",
    )
