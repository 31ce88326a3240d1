"""Write a trained configuration to a folder, load it again, and say what came of it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from autopeft.core.configuration import Configuration
from autopeft.export.folder_format import (
    CARD_FILE,
    CONFIGURATION_FILE,
    MANIFEST_FILE,
    Manifest,
    TaskHead,
    adapter_layout,
    write_adapters,
)
from autopeft.export.loading import load_adapter
from autopeft.export.merging import merged_model
from autopeft.export.model_card import how_to_load, kind_of, model_card, servers
from autopeft.export.servable import uniform_lora
from autopeft.export.verification import PROBE_ROWS, base_options, check_export, trained_logits
from autopeft.methods import METHODS, placements, unmergeable
from autopeft.models.backbone import Backbone
from autopeft.models.quantized_layers import quantization_of

__all__ = ["ExportReport", "export_adapter", "load_adapter"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote, and how it was checked.

    Attributes:
        folder: The folder.
        kind: What kind of folder it is, as a phrase.
        files: Paths of its files, relative to the folder.
        bytes: Their size together.
        max_logit_difference: Largest absolute difference between the logits of the trained model and of
            the one that was loaded from the folder; None where that was not checked.
        checked: How it was checked.
        servers: Which servers can take it.
        how_to_load: A Python snippet that loads it.
    """

    folder: Path
    kind: str
    files: tuple[str, ...]
    bytes: int
    max_logit_difference: float | None
    checked: str
    servers: str
    how_to_load: str

    def __str__(self) -> str:
        snippet = "\n".join(f"    {line}".rstrip() for line in self.how_to_load.splitlines())
        return (
            f"Exported to {self.folder}: {self.kind} "
            f"({len(self.files)} files, {self.bytes / 2**20:.1f} MiB).\n"
            f"{self.checked}\n"
            f"Servers: {self.servers}\n"
            f"Load it with:\n\n{snippet}"
        )


def export_adapter(
    backbone: Backbone,
    configuration: Configuration,
    state: Mapping[str, Tensor],
    folder: str | Path,
    *,
    probe: Mapping[str, Tensor],
    values: Mapping[str, float] | None = None,
    details: Mapping[str, str] | None = None,
    prediction: str = "logits",
    trainings: int = 1,
    base: str | None = None,
    merged: bool = False,
    servable: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    fresh: bool = True,
) -> ExportReport:
    """Write a trained configuration, head included, and check that it loads and gives the same logits.

    The folder appears whole or not at all. The backbone is afterwards what it was before.

    Args:
        backbone: The backbone it was trained on, carrying nothing.
        configuration: What was trained.
        state: The trained tensors, as `Attachment.state_dict` gives them.
        folder: Where to write; must be empty or missing.
        probe: A batch of real inputs, without labels; logits are compared on its first rows.
        values: Figures for the model card; those of the test split begin with "test_".
        details: Task, data set, search, trial and so on for the model card.
        prediction: The field of the model's output that is compared.
        trainings: Number of trainings behind the figures, each with a seed of its own.
        base: What the folder says of its base model; by default where the backbone came from.
        merged: Write a whole model with the adapters merged into the weights.
        servable: Write LoRA with one rank and one scale for all modules, as vLLM, SGLang and llama.cpp read
            it; the function is the same.
        overwrite: Replace an earlier export in the folder.
        verify: Whether to load the folder again and compare.
        fresh: Whether that happens in a fresh process, which takes some seconds.

    Raises:
        ValueError: The folder cannot be written or holds something, the tensors do not belong to the
            configuration, a method cannot be merged or served, both are asked for, or the model is of no
            class that can be exported.
        RuntimeError: What was written does not load, or gives other logits.
    """
    target = Path(folder).expanduser()
    _check_target(target, overwrite)
    if not len(configuration) and not backbone.head:
        raise ValueError("Nothing was trained: the untrained model is the base model itself.")
    others = [f"{site} ({adapter.method})" for site, adapter in unmergeable(configuration)]
    if merged and servable:
        raise ValueError("A merged model is served as it is: choose merged=True or servable=True.")
    if merged and others:
        mergeable = [name for name, method in METHODS.items() if method.is_mergeable]
        raise ValueError(
            f"Cannot merge {', '.join(others)}: only {', '.join(mergeable)} are updates of weights. "
            "Export with merged=False."
        )
    probe = {name: tensor[:PROBE_ROWS] for name, tensor in probe.items()}
    expected = trained_logits(backbone, configuration, state, probe, prediction)
    if servable:
        configuration, state = uniform_lora(configuration, state)
    by_method = placements(configuration, backbone.sites)
    manifest = Manifest(
        layout="merged" if merged else adapter_layout(by_method),
        base=backbone.origin if base is None else base,
        base_fingerprint=backbone.fingerprint,
        head=TaskHead.of(backbone),
        sites={site: backbone.shape(site) for site in configuration.adapters},
        quantization=None if merged else quantization_of(backbone.model),
    )
    options = base_options(manifest, backbone.origin)
    with _names_folder(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        workshop = tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)
    with workshop:
        unfinished = Path(workshop.name, "export")
        with _names_folder(target.parent):
            unfinished.mkdir()  # with the user's own permissions: the workshop is private
            if merged:
                _write_merged(unfinished, merged_model(backbone, configuration, state))
            else:
                write_adapters(unfinished, by_method, state, base=manifest.base, head=manifest.head)
            if backbone.processor is not None:
                backbone.processor.save_pretrained(unfinished)
            configuration.save(unfinished / CONFIGURATION_FILE)
            manifest.save(unfinished)
        check = None
        if verify:
            check = check_export(unfinished, manifest, backbone, probe, expected, prediction, fresh=fresh)
        checked = "It was not loaded again to be checked." if check is None else str(check)
        card = model_card(
            manifest=manifest,
            configuration=configuration,
            values=values or {},
            details=details or {},
            folder=target.name,
            options=options,
            check=checked,
            trainings=trainings,
        )
        (unfinished / CARD_FILE).write_text(card, encoding="utf-8")
        if target.exists():
            # Out of the way first: a folder is only moved onto an empty one.
            os.replace(target, unfinished.with_name("replaced"))
        os.replace(unfinished, target)
    _logger.info("Exported %r to %s", configuration, target)
    files = sorted(file for file in target.rglob("*") if file.is_file())
    return ExportReport(
        folder=target,
        kind=kind_of(manifest),
        files=tuple(str(file.relative_to(target)) for file in files),
        bytes=sum(file.stat().st_size for file in files),
        max_logit_difference=None if check is None else check.difference,
        checked=checked,
        servers=servers(manifest, configuration),
        how_to_load=how_to_load(manifest, str(target), options),
    )


def _write_merged(folder: Path, model: PreTrainedModel) -> None:
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        # safetensors makes files that only their owner can read: a server may be someone else.
        shutil.copymode(folder / "config.json", file)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: an export writes a folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"{target} is not empty: choose another folder, or replace an earlier export with overwrite=True."
        )
    if not (target / MANIFEST_FILE).is_file():
        raise ValueError(
            f"{target} holds something other than an earlier export (it has no {MANIFEST_FILE}), "
            "which is not overwritten: choose another folder."
        )


@contextmanager
def _names_folder(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into a ValueError that names the folder."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"Cannot write in {folder}: {error.strerror}. Make room there, or choose another folder."
        ) from error
