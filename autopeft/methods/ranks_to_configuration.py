"""From ranks that were learned in training to a configuration that has them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.errors import check_whole, unknown_choice
from autopeft.models.backbone import Backbone


def configuration_from_ranks(
    backbone: Backbone, configuration: Configuration, ranks: Mapping[str, int]
) -> Configuration:
    """Return a configuration with other LoRA ranks and everything else alike.

    α, rsLoRA and dropout of each LoRA stay: the tensors of a callback's `truncated_state()` are made for it.
    LoRA at sites that are not named, other methods and hyper-parameters stay as they are.

    Args:
        backbone: The backbone the configuration is for.
        configuration: What was trained.
        ranks: Rank by module name, as a rank callback's `ranks()` returns them: the backbone's name of
            the module, which any prefix (such as "model.") may precede. A LoRA of rank 0 is left out.

    Raises:
        ValueError: A name is that of no linear module in a block, or of one without LoRA in the
            configuration, a module is named twice, or a rank is no whole number from 0 up.
    """
    learned: dict[Site, int] = {}
    for name, rank in ranks.items():
        site = site_of_module(backbone, name)
        if site in learned:
            raise ValueError(f"Site {site} is named twice, the second time by {name!r}.")
        check_whole(f"The rank of {name}", rank, least=0)
        if not any(adapter.method == "lora" for adapter in configuration.adapters.get(site, ())):
            raise ValueError(f"{name} is the site {site}, where the configuration has no LoRA.")
        learned[site] = rank
    adapters = dict(configuration.adapters)
    for site, rank in learned.items():
        adapters[site] = tuple(
            Adapter("lora", rank, dict(adapter.options)) if adapter.method == "lora" else adapter
            for adapter in adapters[site]
            if rank or adapter.method != "lora"
        )
    return configuration.replace(adapters=adapters, allocation=None)


def attachment_tensors(backbone: Backbone, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a callback's truncated tensors under the names an `Attachment` has for them.

    A name that is that of no linear module in a block raises a ValueError.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, local = name.rpartition(".lora_")
        renamed[f"{site_of_module(backbone, module)}.lora.lora_{local}"] = tensor
    return renamed


def site_of_module(backbone: Backbone, name: str) -> Site:
    """Return the site of a linear module, by its name in the backbone, which any prefix may precede.

    Where there is no such module, a ValueError names the nearest one.
    """
    modules = {shape.module: site for site, shape in backbone.sites.items() if shape.kind == "linear"}
    # The longest name wins: one module's name may end another's.
    fitting = [module for module in modules if name == module or name.endswith(f".{module}")]
    if not fitting:
        raise unknown_choice(f"linear module of {backbone.name}", name, modules)
    return modules[max(fitting, key=len)]
