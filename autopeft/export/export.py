"""Write a trained configuration to a folder, load it again, and say what came of it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from autopeft.core.configuration import Configuration
from autopeft.core.export_report import Conversion, ExportReport
from autopeft.export.comparison import TRAINING_FILE, check_comparison, write_comparison
from autopeft.export.conversion import ENERGY, as_exported, exported_state, plain_lora
from autopeft.export.folder_format import (
    CARD_FILE,
    CONFIGURATION_FILE,
    MANIFEST_FILE,
    Manifest,
    TaskHead,
    write_adapters,
)
from autopeft.export.loading import load_adapter
from autopeft.export.merging import merged_model
from autopeft.export.model_card import how_to_load, kind_of, model_card, servers
from autopeft.export.serving import SERVERS, with_one_rank
from autopeft.export.targets import (
    COMPARISON,
    LORA_TARGETS,
    TARGETS,
    layout_of,
    possible_targets,
    resolved_target,
)
from autopeft.export.verification import PROBE_ROWS, base_options, check_export, trained_logits
from autopeft.methods import placements
from autopeft.models.backbone import Backbone
from autopeft.models.quantized_layers import quantization_of
from autopeft.tasks.base import SplitName

__all__ = ["export_adapter", "load_adapter"]

_logger = logging.getLogger(__name__)

Score = Callable[[Configuration, Mapping[str, Tensor], SplitName], Mapping[str, float]]
"""Returns the metrics of a configuration and its trained tensors on a split, as `Evaluator.score` does."""


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
    target: str | None = None,
    energy: float = ENERGY,
    score: Score | None = None,
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
        values: Figures for the model card.
        details: Task, data set, search, trial and so on for the model card.
        prediction: The field of the model's output that is compared.
        trainings: Number of trainings behind the figures, each with a seed of its own.
        base: What the folder says of its base model; by default where the backbone came from.
        target: What it is for, one of `TARGETS`; by default "peft" where one peft family holds everything,
            and "autopeft" otherwise.
        energy: Share of each update that is kept where other methods are made LoRA; see `plain_lora`.
        score: Returns the metrics of a configuration and its tensors on a split: of what is written on the
            test split, and where methods are made LoRA on the validation split before and after.
        overwrite: Replace an earlier export in the folder.
        verify: Whether to load the folder again and compare.
        fresh: Whether that happens in a fresh process, which takes some seconds.

    Raises:
        ValueError: The folder cannot be written or holds something, the tensors do not belong to the
            configuration, which the target cannot take, or the model is of no class that can be exported.
        RuntimeError: What was written does not load, or gives other logits.
    """
    place = Path(folder).expanduser()
    _check_place(place, overwrite)
    target = resolved_target(target, backbone, configuration)
    if target == COMPARISON:
        return _comparison(backbone, configuration, place)
    probe = {name: tensor[:PROBE_ROWS] for name, tensor in probe.items()}
    expected = trained_logits(backbone, configuration, state, probe, prediction)
    possible = possible_targets(backbone, configuration)
    trained_methods = configuration.methods
    configuration, state = as_exported(configuration), exported_state(configuration, state)
    if configuration.methods != trained_methods:
        details = {**(details or {}), "methods in training": ", ".join(trained_methods)}
    conversion, searched = None, configuration
    if target in LORA_TARGETS:
        plain = plain_lora(backbone, configuration, state, energy)
        if plain.energy_kept:
            pairs = ((configuration, state), (plain.configuration, plain.state))
            trained, as_lora = ({} if score is None else score(*pair, "validation") for pair in pairs)
            conversion = Conversion(energy_kept=plain.energy_kept, trained=trained, as_lora=as_lora)
            expected = trained_logits(backbone, plain.configuration, plain.state, probe, prediction)
        configuration, state = plain.configuration, plain.state
        if target in SERVERS:
            adapters = len(configuration)
            configuration, state = with_one_rank(target, configuration, state, backbone.sites)
            if zeros := len(configuration) - adapters:
                why = f"{zeros}, as {target} wants LoRA on all or none of what it stacks"
                details = {**(details or {}), "adapters of zeros": why}
    by_method = placements(configuration, backbone.sites)
    layout = layout_of(target, by_method)
    manifest = Manifest(
        layout=layout,
        base=backbone.origin if base is None else base,
        base_fingerprint=backbone.fingerprint,
        head=TaskHead.of(backbone),
        sites={site: backbone.shape(site) for site in configuration.adapters},
        blocks=backbone.depths,
        hidden_size=backbone.hidden_size,
        quantization=None if layout == "merged" else quantization_of(backbone.model),
        trained=None if configuration == searched else searched.to_dict(),
    )
    options = base_options(manifest, backbone.origin)
    figures = dict(values or {})
    if score is not None:
        figures |= {f"test_{name}": value for name, value in score(configuration, state, "test").items()}
    check = None
    with _written_whole(place) as unfinished:
        with _names_folder(place.parent):
            if layout == "merged":
                merged_model(backbone, configuration, state).save_pretrained(unfinished)
                for file in unfinished.glob("*.safetensors"):
                    # safetensors makes files that only their owner can read: a server may be someone else.
                    shutil.copymode(unfinished / "config.json", file)
            else:
                head, named = manifest.head, manifest.base
                write_adapters(unfinished, by_method, state, layout=layout, base=named, head=head)
            if backbone.processor is not None:
                backbone.processor.save_pretrained(unfinished)
            configuration.save(unfinished / CONFIGURATION_FILE)
            manifest.save(unfinished)
        if verify:
            server = target if target in SERVERS else None
            own_head = {name: tensor for name, tensor in state.items() if name.startswith("head.")}
            without = trained_logits(backbone, Configuration(), own_head, probe, prediction)
            check = check_export(
                unfinished,
                manifest,
                backbone,
                probe,
                expected,
                prediction,
                without=without,
                server=server,
                fresh=fresh,
            )
        checked = "It was not loaded again to be checked." if check is None else str(check)
        model_card(
            manifest=manifest,
            configuration=configuration,
            values=figures,
            details=details or {},
            folder=place.name,
            options=options,
            check=checked,
            trainings=trainings,
            conversion=conversion,
            target=target,
            possible=possible,
        ).save(unfinished / CARD_FILE)
    return ExportReport(
        folder=place,
        kind=kind_of(manifest),
        **_files(place),
        max_logit_difference=None if check is None else check.difference,
        checked=checked,
        servers=servers(target, manifest, str(place), configuration, possible),
        how_to_load=how_to_load(manifest, str(place), options),
        conversion=conversion,
    )


def _comparison(backbone: Backbone, configuration: Configuration, place: Path) -> ExportReport:
    with _written_whole(place) as unfinished:
        with _names_folder(place.parent):
            write_comparison(unfinished, backbone, configuration)
        checked = check_comparison(unfinished, backbone, configuration)
    return ExportReport(
        folder=place,
        kind=TARGETS[COMPARISON],
        **_files(place),
        max_logit_difference=None,
        checked=checked,
        servers="None: there are no weights.",
        how_to_load=f"peft.PeftConfig.from_pretrained({str(place)!r})",
    )


def _files(place: Path) -> dict[str, Any]:
    files = sorted(file for file in place.rglob("*") if file.is_file())
    return {
        "files": tuple(str(file.relative_to(place)) for file in files),
        "bytes": sum(file.stat().st_size for file in files),
    }


@contextmanager
def _written_whole(place: Path) -> Iterator[Path]:
    """Give a folder to write to, which takes its place once all went well."""
    with _names_folder(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        workshop = tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent)
    with workshop:
        unfinished = Path(workshop.name, "export")
        with _names_folder(place.parent):
            unfinished.mkdir()  # with the user's own permissions: the workshop is private
        yield unfinished
        if place.exists():
            # Out of the way first: a folder is only moved onto an empty one.
            os.replace(place, unfinished.with_name("replaced"))
        os.replace(unfinished, place)
    _logger.info("Exported to %s", place)


def _check_place(place: Path, overwrite: bool) -> None:
    if place.exists() and not place.is_dir():
        raise ValueError(f"{place} is a file: an export writes a folder.")
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"{place} is not empty: choose another folder, or replace an earlier export with overwrite=True."
        )
    if not any((place / file).is_file() for file in (MANIFEST_FILE, TRAINING_FILE)):
        raise ValueError(
            f"{place} holds something other than an earlier export (it has no {MANIFEST_FILE}), "
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
