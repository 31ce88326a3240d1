"""What tests of exports share: configurations, tensors as training leaves them, the export itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.export_report import ExportReport
from autopeft.export.export import export_adapter
from autopeft.export.verification import trained_logits
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from tests.tiny_models import (
    places,
    tiny_batch,
)

TOLERANCE = 1e-5

State = dict[str, Tensor]


def trained(backbone: Backbone, configuration: Configuration, std: float = 0.1) -> State:
    """Tensors as training would leave them: everything moved away from where it starts."""
    generator = torch.Generator().manual_seed(0)
    with attach(backbone, configuration) as attachment:
        return {
            name: tensor + std * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in attachment.state_dict().items()
        }


def lora_of_many_ranks(backbone: Backbone) -> Configuration:
    """Each site its own rank and alpha; every fourth site has none."""
    sites = places(backbone, "lora")
    return Configuration(
        {
            site: Adapter("lora", 1 + index % 7, {"alpha": 4 + index % 5})
            for index, site in enumerate(sites)
            if index % 4
        }
    )


def all_methods(backbone: Backbone) -> Configuration:
    """Return every method that the backbone takes in one configuration, LoRA in two groups."""
    sized = {"lora": 2, "series": 3, "parallel": 2, "prefix": 4}
    adapters: dict[Site, list[Adapter]] = {}
    linears = places(backbone, "lora")
    for index, site in enumerate(linears):
        choices = (Adapter("lora", 3, {"rslora": False}), Adapter("lora", 2), Adapter("ia3"))
        adapters[site] = [choices[index % 3], Adapter("bitfit")]
    for method in ("layernorm", "series", "parallel", "prefix"):
        for site in places(backbone, method):
            adapters.setdefault(site, []).append(Adapter(method, sized.get(method)))
    return Configuration(
        {
            site: [
                adapter for adapter in found if not backbone.obstacle(backbone.shape(site), adapter.method)
            ]
            for site, found in adapters.items()
        }
    )


def export(backbone: Backbone, configuration: Configuration, folder: Path, **options: Any) -> ExportReport:
    state = trained(backbone, configuration)
    return export_adapter(backbone, configuration, state, folder, probe=tiny_batch(), **options)


def expected_logits(backbone: Backbone, configuration: Configuration) -> Tensor:
    return trained_logits(backbone, configuration, trained(backbone, configuration), tiny_batch())


@torch.no_grad()
def difference(model: Any, batch: Mapping[str, Tensor], expected: Tensor) -> float:
    return float((model(**batch).logits - expected).abs().max())
