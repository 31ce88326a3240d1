"""What an adapter folder, which may be a stranger's, is held against before any of it takes memory.

The base says what is at each site and what its head is; the files' headers say how large the tensors are.
A folder that claims anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from inspect import signature
from math import prod
from pathlib import Path

from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.errors import shown
from autopeft.core.method_specs import PeftSpec
from autopeft.export.folder_format import HEAD_FILE, PEFT_FILE, Manifest, elements
from autopeft.methods import METHODS, Placement
from autopeft.models.block_discovery import find_blocks
from autopeft.models.site_shapes import SiteShape, all_sites

Sizes = Mapping[str, tuple[int, ...]]
"""Shapes of trained tensors, by the names of `Attachment.state_dict`."""
_PLAUSIBLE = 1024  # a size that may be tried on the smallest layers too, as papers do
_MOST_LABELS = 100_000  # of a head that the base brings
_OF_THE_BASE = {"base_layer", "original_module"}


def check_labels(folder: Path, manifest: Manifest) -> None:
    """Raise where there are more labels than the head has parameters: each takes some in the model."""
    head, most = manifest.head, _MOST_LABELS
    if head.modules:
        most = elements(folder / (PEFT_FILE if manifest.layout == "peft" else HEAD_FILE))
    if len(set(head.labels)) != len(head.labels) or len(head.labels) > most:
        raise ValueError(f"The manifest's {len(head.labels)} labels are not those of the head.")


def check_quantization(manifest: Manifest) -> None:
    """Raise where the base would be quantised by what bitsandbytes does not take, or by patterns.

    transformers reads the names of modules as regular expressions, which may take forever.
    """
    given = manifest.quantization or {}
    if unknown := given.keys() - signature(BitsAndBytesConfig).parameters:
        raise ValueError(
            f"The manifest's quantization has {min(unknown)!r}, which bitsandbytes does not take."
        )
    if (kind := given.get("bnb_4bit_quant_type", "nf4")) not in ("fp4", "nf4"):
        raise ValueError(f"The manifest's bnb_4bit_quant_type is fp4 or nf4, got {kind!r}.")
    names = given.get("llm_int8_skip_modules") or ()
    if not isinstance(names, list | tuple) or any(not re.fullmatch(r"[\w.]+", str(name)) for name in names):
        raise ValueError("The manifest's llm_int8_skip_modules are no list of modules' names.")


def checked_sites(
    model: nn.Module, configuration: Configuration, manifest: Manifest
) -> Mapping[Site, SiteShape]:
    """Return what the base has at the configuration's sites; raise where the folder says it has another."""
    present = all_sites(model, find_blocks(model))
    for site in configuration.adapters:
        there = manifest.sites.get(site)
        if there is None:
            raise ValueError(f"The manifest does not say where the site {site} of the configuration is.")
        if present.get(site) != there:
            what = "no module" if site not in present else "something else at"
            raise ValueError(
                f"{type(model).__name__} has {what} {shown(there.module)}: this is not the base the "
                "adapter was trained on."
            )
    return {site: present[site] for site in configuration.adapters}


def check_sizes(by_method: Mapping[str, Placement], sizes: Sizes) -> None:
    """Raise where adapters would hold more parameters than there are in the files.

    Nor may a tensor take the place of one of the base's own, which peft wraps.
    """
    for name in sizes:
        if not _OF_THE_BASE.isdisjoint(name.split(".")):
            raise ValueError(f"The folder's {name} would replace weights of the base.")
    for name, placement in by_method.items():
        shared = sum(prod(size) for key, size in sizes.items() if re.match(rf"{name}\w*\.shared\.", key))
        for site, (shape, adapter) in placement.items():
            if _is_of_matrices(adapter) and adapter.size_or_zero > (most := _most(shape)):
                raise ValueError(
                    f"{site} should carry {adapter}, but a size of {most:,} is the most for {shape.module}."
                )
            prefix = f"{site}.{name}."
            found = sum(prod(size) for key, size in sizes.items() if key.startswith(prefix))
            is_plausible = adapter.size_or_zero <= max(found, shared, _most(shape))
            if not is_plausible or METHODS[name].count(shape, adapter) > found:
                raise ValueError(
                    f"{site} should carry {adapter}, but the folder has {found} numbers for it, and {shared} "
                    f"that sites share: fewer than that takes on {shape.module}."
                )


def _is_of_matrices(adapter: Adapter) -> bool:
    """Whether a size of a family of peft's stands for matrices that a stranger's file need not hold.

    Some are drawn by a seed, and others are made where peft is asked how many numbers they have.
    """
    row = adapter.specification
    if not isinstance(row, PeftSpec):
        return False
    return row.size_field in ("r", "oft_block_size") or row.config.get("save_projection") is False


def _most(shape: SiteShape) -> int:
    """Return the largest size that may be tried whatever the files hold: beyond it is more than full rank."""
    return max(shape.in_features, shape.out_features, _PLAUSIBLE)


def check_head(model: nn.Module, modules: Collection[str], sizes: Sizes) -> None:
    """Raise where what replaces the head is not the whole head, or is more than a head."""
    blocks = [block.name for block in find_blocks(model)]
    inner = getattr(model, "get_input_embeddings", lambda: None)()
    for name in modules:
        module = dict(model.named_modules()).get(name)
        holds_block = any(f"{block}.".startswith(f"{name}.") for block in blocks)
        in_block = any(f"{name}.".startswith(f"{block}.") for block in blocks)
        if module is None or not name or holds_block or in_block or inner in module.modules():
            raise ValueError(f"{type(model).__name__} has no head {name!r}.")
    expected = {
        f"head.{path}.{name}": tuple(parameter.shape)
        for head in modules
        for path, module in model.get_submodule(head).named_modules(prefix=head)
        for name, parameter in module.named_parameters(recurse=False)
    }
    found = {name: shape for name, shape in sizes.items() if name.startswith("head.")}
    if found != expected:
        first = min(expected.items() ^ found.items())[0]
        raise ValueError(
            f"The folder's {first} is no part of the head {', '.join(modules) or '(none)'} of "
            f"{type(model).__name__}, or is not complete."
        )


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raise where a trained tensor holds NaN or infinity."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"The folder's {name} holds numbers that are not finite.")
