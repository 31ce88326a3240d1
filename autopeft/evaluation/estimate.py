"""What fine-tuning a model would take, from its config alone: no weights, no data, no GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from rich.table import Table

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.errors import check_choice, check_whole, checked_names
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.core.objectives import COST_OBJECTIVES
from autopeft.core.tables import Tabular, titled_table
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.evaluation.memory.packed_weights import Bits, pack
from autopeft.methods import attach, obstacle
from autopeft.models.backbone import Backbone
from autopeft.models.own_dropout import own_dropout
from autopeft.models.positions import check_positions
from autopeft.tasks import CausalLM, Task, TextClassification
from autopeft.training.settings import Training

METHODS = ("lora", "parallel", "ia3")
"""The families that are estimated unless others are asked for."""
_IA3_ROLES = ("key", "value", "ffn_down")
_LABELS = 2
_PLACEMENTS: Mapping[str, float] = {"everywhere": 1.0, "top half": 0.5, "top quarter": 0.25}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One family at one placement.

    Attributes:
        method: The adapter family, with its size.
        placement: Which of the blocks carry it.
        trainable_parameters: Exact; a new head included.
        peak_memory: Bytes at the peak of a training step, weights and optimizer included.
    """

    method: str
    placement: str
    trainable_parameters: int
    peak_memory: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Estimates(Tabular):
    """What `estimate` found.

    Attributes:
        model: Name of the model.
        parameters: Number of its parameters.
        weight_bytes: Bytes of its weights and buffers.
        rows: One estimate a family and placement.
    """

    model: str
    parameters: int
    weight_bytes: int
    rows: tuple[Estimate, ...]

    def table(self) -> Table:
        """Return the estimates as a rich table."""
        memory, parameters = COST_OBJECTIVES["peak_memory"], COST_OBJECTIVES["trainable_parameters"]
        size, weights = parameters.format(self.parameters), memory.format(self.weight_bytes)
        words = ("method", "blocks")
        headings = (*words, "trainable parameters", "peak memory")
        table = titled_table(f"{self.model}: {size} parameters, {weights} of weights", headings, words=words)
        for row in self.rows:
            table.add_row(
                row.method,
                row.placement,
                parameters.format(row.trainable_parameters),
                memory.format(row.peak_memory),
            )
        return table


def estimate(
    model: str | Path,
    task: str | Task = "causal-lm",
    *,
    rank: int = 16,
    batch_size: int = 4,
    length: int = 512,
    methods: Sequence[str] = METHODS,
    accumulate: int = 1,
    nf4: bool = False,
    int8: bool = False,
    checkpointing: bool = False,
) -> Estimates:
    """Count trainable parameters and peak memory of a training, without weights.

    The model is built from its config on torch's meta device. Memory is that of a training step in bfloat16
    with adapters, gradients and AdamW in float32, as `Search` counts it: what kernels allocate for themselves
    and what CUDA itself takes is not in it.

    Args:
        model: Hub name, or a folder with a config.json.
        task: "causal-lm", "text-classification", or a task of one's own data.
        rank: Rank of LoRA; of other families the bottleneck width or the prefix length.
        batch_size: Rows a step.
        length: Tokens a row.
        methods: Adapter families.
        accumulate: Parts of a batch, which run through the model one after another.
        nf4: Whether the blocks' linear layers lie packed in 4 bits, as in QLoRA.
        int8: Whether they lie packed in 8 bits.
        checkpointing: Whether activations are computed again in the backward pass.

    Raises:
        ValueError: An argument is not valid, there is no such model, it has learnt fewer positions than rows
            have tokens, or a family can sit on none of the layers that it is for, as `full` where they are
            packed.
    """
    for name, value in (("rank", rank), ("length", length)):
        check_whole(name, value, least=1)
    training = Training(batch_size=batch_size, accumulate=accumulate)
    if nf4 and int8:
        raise ValueError("The linear layers lie packed in 4 bits or in 8: expected nf4 or int8, got both.")
    methods = checked_names("method", methods, METHOD_SPECS)
    task = _task(task) if isinstance(task, str) else task
    backbone = Backbone.without_weights(model, task.head, dtype=torch.bfloat16)
    parameters = backbone.parameters
    if nf4 or int8:
        layers = [shape.module for shape in backbone.sites.values() if shape.kind == "linear"]
        bits: Bits = 4 if nf4 else 8
        pack(backbone.model, layers, bits)
        backbone.quantized = dict.fromkeys(layers, bits)
    for method in methods:
        adapter = _adapter(method, rank)
        meant = [site for site, shape in backbone.sites.items() if not backbone.obstacle(shape, method)]
        obstacles = [obstacle(backbone, site, adapter) for site in meant]
        if obstacles and all(obstacles):
            raise ValueError(f"{method!r} cannot sit on {meant[0]} of {backbone.name}: {obstacles[0]}.")
    if checkpointing:
        backbone.enable_checkpointing()
    tensors = {id(tensor): tensor for tensor in (*backbone.model.parameters(), *backbone.model.buffers())}
    batch = task.example_batch(training.part_size, length)
    if (mask := task.mask(batch)) is not None:
        check_positions(backbone.model, mask.shape[-1])
    counter = MemoryCounter(backbone.model)
    rows = []
    for method in methods:
        for placement, share in _PLACEMENTS.items():
            configuration = _placed(backbone, method, rank, share)
            if not len(configuration):
                continue
            with (
                own_dropout(backbone.model, is_on=task.trains_with_dropout),
                attach(backbone, configuration) as attachment,
            ):
                peak = counter.count(batch, task, precision="bf16-mixed", accumulate=accumulate)
                rows.append(
                    Estimate(
                        method=str(_adapter(method, rank)).removesuffix("()"),
                        placement=placement,
                        trainable_parameters=attachment.trainable_parameters,
                        peak_memory=peak,
                    )
                )
    return Estimates(
        model=backbone.name,
        parameters=parameters,
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        rows=tuple(rows),
    )


def _task(name: str) -> Task:
    """Return a task by name, with just enough data to know its head."""
    labels = [str(index) for index in range(_LABELS)] * 2
    known: Mapping[str, Task] = {
        "causal-lm": CausalLM(dataset=Dataset.from_dict({"text": ["text"]})),
        "text-classification": TextClassification(
            dataset=Dataset.from_dict({"text": ["text"] * len(labels), "label": labels})
        ),
    }
    check_choice("task", known, name)
    return known[name]


def _adapter(method: str, size: int) -> Adapter:
    return Adapter(method, size if METHOD_SPECS[method].size_name else None)


def _placed(backbone: Backbone, method: str, size: int, share: float) -> Configuration:
    """Return a method at its usual sites of the top blocks of each stack."""
    top = {
        place
        for places in backbone.stacks.values()
        for place in places[len(places) - max(1, round(share * len(places))) :]
    }
    adapter = _adapter(method, size)
    sites: dict[Site, Adapter] = {
        site: adapter
        for site in backbone.sites
        if site.place in top
        and not obstacle(backbone, site, adapter)
        and (method != "ia3" or site.role in _IA3_ROLES)
        and (method != "parallel" or site.role == "ffn")
    }
    return Configuration(sites, learning_rate=1e-3)
