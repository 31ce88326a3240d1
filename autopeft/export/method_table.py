"""Every adapter method with what it can do, found out on the installed peft, and what it costs on a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModel

from autopeft.core.configuration import Adapter, Configuration
from autopeft.core.method_specs import METHOD_SPECS, MethodSpec
from autopeft.core.peft_families import LEFT_OUT
from autopeft.core.tables import Tabular, titled_table
from autopeft.export.serving import SERVERS
from autopeft.export.targets import becomes_lora
from autopeft.methods import METHODS, Method, PeftMethod, count_parameters, obstacle
from autopeft.methods.abilities import PROBED_SHAPE, abilities
from autopeft.methods.data_initialised import OffsetLora
from autopeft.models.backbone import Backbone
from autopeft.models.head_spec import HeadSpec


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """What is known of one method."""

    name: str
    symbol: str  # in compact pictures
    sites: tuple[str, ...]  # the kinds of site it can sit on
    size: str | None  # what its size means
    sizes: tuple[int, int] | None  # the (smallest, largest) that spaces offer by default
    rate: float  # its learning rate as a multiple of LoRA's
    merges: bool  # the weights can take it in
    shares_state: bool  # sites share trainable parameters
    size_pattern: bool  # one peft adapter holds several sizes
    starts_at_base: bool  # right after attaching the model computes what it did before
    to_lora: bool  # `export(target="lora")` makes one of it, on layers without a bias
    takes_4_bits: bool | None  # it trains on a base in 4 bits; None where there is no bitsandbytes to ask
    takes_8_bits: bool | None
    servers: tuple[str, ...]  # what serves the LoRA that it is, or is made
    smallest: int | None  # parameters at the smallest size, on all sites of the model that take it
    middle: int | None  # the same at a middle size


@dataclass(frozen=True, kw_only=True, repr=False)
class MethodTable(Tabular):
    """Every method, and the types of peft's that are none."""

    model: str  # the model whose parameters are counted; empty without one
    rows: tuple[MethodRow, ...]
    left_out: Mapping[str, str]  # types of peft's that are no method here, and why
    peft: str  # version of the installed peft

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    def table(self) -> Table:
        """Return a row a method."""
        words = ("method", "sites", "size")
        signs = ("merges", "shares", "at base", "to LoRA", "4 bits", "8 bits")
        ends = ("servers", "smallest", "middle") if self.model else ("servers",)
        title = f"{len(self.rows)} adapter methods, with peft {self.peft}"
        table = titled_table(title, (*words, "rate", *signs, *ends), words=(*words, "servers"))
        for row in self.rows:
            size = f"{row.size} {row.sizes[0]} to {row.sizes[1]}" if row.sizes else "–"
            packed = (row.takes_4_bits, row.takes_8_bits)
            said = (row.merges, row.shares_state, row.starts_at_base, row.to_lora, *packed)
            marks = ("–" if sign is None else "yes" if sign else "no" for sign in said)
            costs = ("–" if count is None else f"{count:,}" for count in (row.smallest, row.middle))
            servers = ", ".join(row.servers) or "no"
            cells = (row.name, ", ".join(row.sites), size, f"{row.rate:g}", *marks, servers)
            table.add_row(*cells, *(costs if self.model else ()))
        table.caption = "\n".join(f"No method: {name}, as {why}." for name, why in self.left_out.items())
        return table


def method_table(model: str | Path | None = None) -> MethodTable:
    """Return every method; with a model also what it costs there.

    Args:
        model: Hub name, or a folder with a config.json, to count parameters on.

    Raises:
        ValueError: There is no such model.
    """
    head = HeadSpec(auto_class=AutoModel, is_trained=False)
    backbone = None if model is None else Backbone.without_weights(model, head, dtype=torch.float32)
    return MethodTable(
        model="" if backbone is None else backbone.name,
        rows=tuple(_row(specification, backbone) for specification in METHOD_SPECS.values()),
        left_out=LEFT_OUT,
        peft=version("peft"),
    )


def _row(specification: MethodSpec, backbone: Backbone | None) -> MethodRow:
    name, sized = specification.name, specification.size_name is not None
    method, (low, high) = METHODS[name], specification.sizes
    middle = low * 2 ** round(math.log2(high / low) / 2)
    return MethodRow(
        name=name,
        symbol=specification.symbol,
        sites=tuple(sorted(specification.kinds)),
        size=specification.size_name,
        sizes=(low, high) if sized else None,
        rate=specification.rate,
        merges=method.is_mergeable,
        shares_state=method.shares_state,
        size_pattern=isinstance(method, PeftMethod) and method.size_pattern is not None,
        starts_at_base=method.starts_at_base,
        to_lora=becomes_lora(name),
        takes_4_bits=_takes(4, method, specification),
        takes_8_bits=_takes(8, method, specification),
        servers=tuple(SERVERS) if becomes_lora(name) else (),
        smallest=_everywhere(backbone, Adapter(name, low if sized else None)),
        middle=_everywhere(backbone, Adapter(name, middle if sized else None)),
    )


def _takes(bits: int, method: Method, specification: MethodSpec) -> bool | None:
    probed = METHODS["lora"] if isinstance(method, OffsetLora) else method  # as which it is exported
    if isinstance(probed, PeftMethod) and "linear" in specification.kinds:
        found = abilities(probed)
        return found.takes_4_bits if bits == 4 else found.takes_8_bits
    layer = replace(PROBED_SHAPE, block_module="block", output_matrix_module="layer")
    adapter = Adapter(method.name, specification.sizes[0] if specification.size_name else None)
    # Biases of packed layers are not trained: see `Backbone.obstacle`.
    return not specification.needs_bias and method.obstacle(layer, adapter, bits) is None


def _everywhere(backbone: Backbone | None, adapter: Adapter) -> int | None:
    """Return the parameters of an adapter on all sites that take it; None where there is no model or site."""
    if backbone is None:
        return None
    sites = [site for site in backbone.sites if obstacle(backbone, site, adapter) is None]
    if not sites:
        return None
    return count_parameters(backbone, Configuration(dict.fromkeys(sites, adapter))) - backbone.head_parameters
