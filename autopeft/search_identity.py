"""What a search is, as plain text: for resuming the right one and for the record."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from autopeft.models.backbone import Backbone
from autopeft.optimization.successive_halving import SuccessiveHalving
from autopeft.search_spaces import SearchSpace
from autopeft.tasks import Task
from autopeft.training.settings import Training

if TYPE_CHECKING:
    from autopeft.evaluation.supernet.settings import WarmStart
    from autopeft.search import Search

_PACKAGES = (
    "autopeft",
    "torch",
    "transformers",
    "peft",
    "lightning",
    "optuna",
    "mlflow",
    "datasets",
    "torchmetrics",
)


def search_identity(
    *,
    backbone: Backbone,
    task: Task,
    space: SearchSpace,
    training: Training,
    fidelity: SuccessiveHalving | None,
    warm_start: WarmStart | None,
    objectives: Sequence[str],
    constraints: Mapping[str, float],
    sampler: str,
    seed: int,
    seeds: int,
    baselines: bool,
) -> dict[str, dict[str, str]]:
    """Return every setting that decides what a search's trials are."""
    return {
        "backbone": backbone.identity(),
        "task": dict(task.identity()),
        "space": _fields(space),
        "training": training.identity(),
        "fidelity": {"class": "none"} if fidelity is None else _fields(fidelity),
        **({} if warm_start is None else {"warm_start": _fields(warm_start)}),
        "search": {
            "objectives": ", ".join(objectives),
            "constraints": ", ".join(f"{name}={bound:g}" for name, bound in constraints.items()),
            "sampler": sampler,
            "seed": str(seed),
            **({} if seeds == 1 else {"seeds": str(seeds)}),
            "baselines": str(baselines),
        },
    }


def describe_search(search: Search) -> str:
    """Say in a few lines what is searched for and how."""
    names = ", ".join(objective.name for objective in search.objectives)
    bounds = "; ".join(
        f"{one.objective.name} ≤ {one.objective.format(one.bound)}" for one in search.constraints
    )
    training = search.training
    return "\n".join(
        [
            f"backbone {search.backbone!r}",
            f"task {search.task!r}",
            f"objectives {names}" + (f"; constraints {bounds}" if bounds else ""),
            f"training {training.epochs} epochs, batch size {training.batch_size}, "
            f"{training.resolved_device()}, {training.resolved_precision()}"
            + ("" if search.fidelity is None else f"; {search.fidelity.describe()}")
            + ("" if search.warm_start is None else f"; {search.warm_start.describe()}"),
            f"sampler {search.sampler_name}, seed {search.seed}"
            + ("" if search.seeds == 1 else f"; the front is trained with {search.seeds} seeds"),
            search.space.describe(search.backbone),
        ]
    )


def environment() -> dict[str, str]:
    """Return versions and hardware, which may differ between calls of one search."""
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda_device": cuda,
        "threads": str(torch.get_num_threads()),
    }


def _fields(settings: Any) -> dict[str, str]:
    """Return a dataclass's class name and fields as text."""
    names = [field.name for field in dataclasses.fields(settings) if field.compare]
    return {"class": type(settings).__name__, **{name: _plain(getattr(settings, name)) for name in names}}


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return str({key: dict(one) if isinstance(one, Mapping) else one for key, one in value.items()})
    return str(value)
