"""The earlier fronts that a search begins from, read from disk; no model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autopeft.core.configuration import Configuration
from autopeft.core.durable_files import load_json, save_json
from autopeft.core.errors import nearest
from autopeft.export.folder_format import CONFIGURATION_FILE, MANIFEST_FILE, Manifest
from autopeft.optimization.study_store import STUDY_FILE, load_study
from autopeft.reporting.front import ParetoFront
from autopeft.search_spaces.prior import EarlierFront, Member

PRIOR_FILE = "prior.json"
"""What a search has read, in its folder: later calls go on with it, whatever becomes of the sources."""
TRAINED = "trained"
"""The attribute of a study that says for which width and steps its learning rates are; see `EarlierFront`."""


def earlier_fronts(sources: Sequence[str | Path], folder: Path) -> list[EarlierFront]:
    """Return the fronts in some folders, or those that the search in `folder` has kept.

    Args:
        sources: Folders of searches, of exported adapters, or of several of the latter.
        folder: The search's own.

    Raises:
        ValueError: A folder is none of these, or its front has no adapters.
    """
    if sources and (kept := load_json(folder / PRIOR_FILE)) is not None:
        return [EarlierFront.from_dict(data) for data in kept]
    return [_read(Path(source).expanduser()) for source in sources]


def keep_fronts(fronts: Sequence[EarlierFront], folder: Path) -> None:
    """Keep in the folder of a search what it has read, unless it is there."""
    path = folder / PRIOR_FILE
    if fronts and not path.exists():
        save_json(path, [front.to_dict() for front in fronts])


def _read(folder: Path) -> EarlierFront:
    if (folder / STUDY_FILE).is_file():
        return _of_search(folder)
    if (folder / MANIFEST_FILE).is_file():
        return _of_adapters(folder, [folder])
    if exported := sorted(file.parent for file in folder.glob(f"*/{MANIFEST_FILE}")):
        return _of_adapters(folder, exported)
    inside = sorted(file.parent.name for file in folder.glob(f"*/{STUDY_FILE}"))
    beside = nearest(folder.name, (file.parent.name for file in folder.parent.glob(f"*/{STUDY_FILE}")))
    hint = f" It holds the searches {', '.join(inside)}: name one." if inside else ""
    if not inside and beside is not None:
        hint = f" Did you mean {folder.parent / beside}?"
    raise ValueError(
        f"There is nothing for the prior in {folder}: expected the folder of a search (with {STUDY_FILE}), "
        f"of an exported adapter (with {MANIFEST_FILE}), or of several of the latter.{hint}"
    )


def _of_search(folder: Path) -> EarlierFront:
    attributes, records = load_study(folder)
    front = ParetoFront.stored(attributes, records)
    members = [
        Member(f"trial {point.number}", point.configuration, share)
        for point, share in zip(front, front.shares(), strict=True)
        if point.configuration.adapters
    ]
    if not members:
        raise ValueError(
            f"The front of the search in {folder} has no adapters ({len(records)} trials): run it on, or "
            "leave it out of the prior."
        )
    blocks = (text.partition(" ") for text in attributes["identity"]["backbone"]["blocks"].split(", "))
    trained = (record.evaluation for record in records if record.evaluation.status in ("complete", "paused"))
    return EarlierFront(
        name=attributes["name"],
        depths={stack: int(count) for count, _, stack in blocks},
        members=members,
        tried=frozenset(site for evaluation in trained for site in evaluation.configuration.adapters),
        **attributes.get(TRAINED, {}),
    )


def _of_adapters(folder: Path, exported: Sequence[Path]) -> EarlierFront:
    manifests = [Manifest.load(adapter) for adapter in exported]
    bases = [(manifest.blocks, manifest.hidden_size) for manifest in manifests]
    depths, hidden_size = bases[0]
    if not depths:
        raise ValueError(f"{folder} does not say how many blocks its base has: export it again.")
    if any(base != bases[0] for base in bases):
        raise ValueError(
            f"The adapters in {folder} are of bases of unlike depth or width: name each by itself."
        )
    points = [
        Configuration.load(adapter / CONFIGURATION_FILE)
        if manifest.trained is None
        else Configuration.from_dict(manifest.trained)
        for adapter, manifest in zip(exported, manifests, strict=True)
    ]
    named = zip((adapter.resolve().name for adapter in exported), points, strict=True)
    members = [Member(name, point, 1 / len(points)) for name, point in named if point.adapters]
    if not members:
        raise ValueError(f"What was exported to {folder} has no adapters: leave it out of the prior.")
    return EarlierFront(
        name=folder.resolve().name,
        depths=depths,
        members=members,
        tried=frozenset(site for member in members for site in member.configuration.adapters),
        hidden_size=hidden_size,
    )
