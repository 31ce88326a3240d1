"""What a search is made from, and as plain text: for resuming the right one and for the record."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from autopeft.core.errors import check_choice, check_flags, check_whole
from autopeft.core.objectives import resolve_constraints, resolve_objectives
from autopeft.evaluation.executor import ExecutorFactory
from autopeft.models.backbone import Backbone
from autopeft.models.head_spec import HeadPart, Processor
from autopeft.models.loading import DeviceMap, Dtype, LoadOptions, Quantization
from autopeft.optimization.proposal import Sampler
from autopeft.optimization.samplers import make_sampler, reads_study
from autopeft.optimization.study_store import StudyStore
from autopeft.optimization.successive_halving import SuccessiveHalving
from autopeft.reporting.mlflow.tracking_uri import redact
from autopeft.reporting.tracker import TrackerFactory
from autopeft.search_spaces import ScoreGuided, SearchSpace
from autopeft.search_spaces.prior import Prior
from autopeft.tasks import Task
from autopeft.training.settings import Training

BackboneSource = str | Path | PreTrainedModel | Backbone
"""A hub name, a local folder, a loaded transformers model, or a backbone."""

_HALVING = SuccessiveHalving()
# Of a model's config: a task's head changes the former, and a `Backbone` the last three.
_CHANGED = frozenset(
    {"id2label", "label2id", "num_labels", "problem_type", "architectures", "_name_or_path"}
    | {"pad_token_id", "apply_spec_augment", "layerdrop"}
)
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


class SearchSettings:
    """What a `Search` is made from, and what follows from that before anything is loaded."""

    def __init__(
        self,
        backbone: BackboneSource,
        task: Task,
        space: SearchSpace | None = None,
        *,
        objectives: Sequence[str] | None = None,
        constraints: Mapping[str, float | str] | None = None,
        training: Training | None = None,
        halving: SuccessiveHalving | None = _HALVING,
        warm_start: bool = False,
        sampler: str | Sampler = "ehvi",
        seed: int = 0,
        seeds: int = 3,
        derive: bool = False,
        executor: str | ExecutorFactory = "local",
        baselines: bool = True,
        prior: str | Path | Sequence[str | Path] = (),
        score_check: bool = False,
        name: str | None = None,
        folder: str | Path = "autopeft_runs",
        tracking: str | TrackerFactory | None = "sqlite:///mlflow.db",
        experiment: str = "autopeft",
        tokenizer: Processor | None = None,
        dtype: Dtype = "auto",
        quantization: Quantization | None = None,
        attention: str | None = None,
        device_map: DeviceMap | None = None,
        head: HeadPart = "whole",
    ) -> None:
        make_sampler(sampler, seed)  # a name that is none shows before anything is loaded
        check_whole("seed", seed, least=0)
        check_whole("seeds", seeds, what="a number of trainings", least=1)
        check_flags(warm_start=warm_start, derive=derive, baselines=baselines, score_check=score_check)
        if isinstance(executor, str):
            check_choice("executor", ("local",), executor)
        if not (tracking is None or isinstance(tracking, str) or callable(tracking)):
            raise ValueError(
                f"tracking is an MLflow tracking URI, None, or what makes a tracker, got {tracking!r}: "
                "give a class of trackers and not one of them."
            )
        priors = (prior,) if isinstance(prior, str | Path) else tuple(prior or ())
        if wrong := [source for source in priors if not isinstance(source, str | Path)]:
            raise ValueError(
                f"prior names folders, got {wrong[0]!r}: for a search, give its folder, search.folder."
            )
        check_choice("head", get_args(HeadPart), head)
        self.backbone = backbone
        self.task = task
        self.space = ScoreGuided() if space is None else space
        if objectives is None:
            objectives = (task.metrics[0].name, "trainable_parameters", "peak_memory")
        self.objectives = resolve_objectives(objectives, task.objectives)
        self.constraints = resolve_constraints(
            {**self.space.constraints, **(constraints or {})}, task.objectives
        )
        self.training = Training() if training is None else training
        self.halving = halving
        self.warm_start = warm_start
        self.sampler = sampler
        self.seed = seed
        self.seeds = seeds
        self.derive = derive
        self.executor = executor
        self.baselines = baselines
        self.prior = priors
        self.score_check = score_check
        self.tracking = tracking
        self.experiment = experiment
        self.tokenizer = tokenizer
        self.head = head
        self.dtype, self.quantization, self.attention = dtype, quantization, attention
        self.device_map = device_map
        self.loading = LoadOptions(
            dtype=dtype, quantization=quantization, attention=attention, device_map=device_map
        )
        self._name = name
        self._root = Path(folder)
        valid_name = name is None or (isinstance(name, str) and re.fullmatch(r"\w[\w.\- ]{0,119}", name))
        if not valid_name:
            raise ValueError(
                "A search's name is a folder's name: a letter or digit, then letters, digits, '.', '-', '_' "
                f"or spaces, got {name!r}."
            )

    @property
    def name(self) -> str:
        """The search's name."""
        if self._name is None:
            backbone = source_settings(self.backbone)
            identity = self._identity(backbone, task_settings(self.task), self.space)
            digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
            stem = re.sub(r"[^\w.\-]+", "-", f"{self.task.name}-{backbone['name']}")
            self._name = f"{stem}-{digest}"
        return self._name

    @property
    def folder(self) -> Path:
        """Where this search is kept."""
        return self._root / self.name

    def arguments(self) -> dict[str, Any]:
        """Return what this search can be made from again; nothing that is made from that needs a password."""
        return {
            **{name: getattr(self, name) for name in signature(SearchSettings).parameters},
            "objectives": [objective.name for objective in self.objectives],
            "constraints": {constraint.objective.name: constraint.bound for constraint in self.constraints},
            "folder": self._root,
            "tracking": redact(self.tracking) if isinstance(self.tracking, str) else self.tracking,
        }

    def _identity(
        self, backbone: Mapping[str, str], task: Mapping[str, str], space: SearchSpace
    ) -> dict[str, dict[str, str]]:
        """Return the settings as text, with what tells backbone and task from others."""
        bounds = [f"{constraint.objective.name}={constraint.bound:g}" for constraint in self.constraints]
        return {
            "backbone": dict(backbone),
            "task": dict(task),
            "space": _fields(space),
            "training": self.training.identity(),
            **({} if self.loading == LoadOptions() else {"loading": _fields(self.loading)}),
            "halving": {"class": "none"} if self.halving is None else _fields(self.halving),
            "search": {
                "objectives": ", ".join(objective.name for objective in self.objectives),
                "constraints": ", ".join(bounds),
                "sampler": describe_sampler(self.sampler),
                "seed": str(self.seed),
                **({} if self.seeds == 1 else {"seeds": str(self.seeds)}),
                **({"derive": "True"} if self.derive else {}),
                **({"executor": str(self.executor)} if alters_trials(self.executor) else {}),
                "baselines": str(self.baselines),
                **({"prior": ", ".join(map(_with_parent, self.prior))} if self.prior else {}),
                **({"warm_start": "True"} if self.warm_start else {}),
                **({} if self.head == "whole" else {"head": self.head}),
            },
        }

    def _describe(self, backbone: Backbone, space: SearchSpace, prior: Prior) -> str:
        """Say in a few lines what is searched for and how; the space has its scores."""
        names = ", ".join(objective.name for objective in self.objectives)
        bounds = "; ".join(
            f"{constraint.objective.name} ≤ {constraint.objective.format(constraint.bound)}"
            for constraint in self.constraints
        )
        training = self.training
        return "\n".join(
            [
                f"backbone {backbone!r}",
                f"task {self.task.describe()}",
                f"objectives {names}" + (f"; constraints {bounds}" if bounds else ""),
                f"training {training.epochs} epochs, batch size {training.batch_size}"
                + (f" in {training.accumulate} parts, " if training.accumulate > 1 else ", ")
                + f"{training.resolved_device()}, {training.resolved_precision()}"
                + ("" if self.halving is None else f"; {self.halving.describe()}")
                + ("; LoRA trials are initialised from the largest LoRA" if self.warm_start else ""),
                f"sampler {describe_sampler(self.sampler)}, seed {self.seed}"
                + ("" if self.seeds == 1 else f"; the front is trained with {self.seeds} seeds")
                + ("; smaller points are cut from whole trainings" if self.derive else "")
                + ("" if self.executor == "local" else f"; trials are trained by {self.executor}"),
                *([prior.describe()] if prior.fronts else []),
                space.describe(backbone),
            ]
        )


def held_study(settings: SearchSettings) -> StudyStore:
    """Return the study of a search, held by this process until it is closed."""
    of_the_search = settings.folder, settings.name, settings.objectives, settings.constraints
    return StudyStore(*of_the_search, keeps_parameters=reads_study(settings.sampler))


def alters_trials(executor: str | ExecutorFactory) -> bool:
    """Whether a trial is another one for the executor that trains it."""
    return not isinstance(executor, str) and getattr(executor, "alters_trials", True)


def source_settings(source: BackboneSource) -> dict[str, str]:
    """Return what is known of a backbone before it is loaded: its name, and of a model its architecture."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        return {"name": path.resolve().name if path.is_dir() else str(source)}
    model = source.model if isinstance(source, Backbone) else source
    origin = str(model.config.name_or_path or "")
    name = Path(origin).name if Path(origin).is_dir() else origin or type(model).__name__
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _CHANGED}
    text = json.dumps(settings, sort_keys=True, default=str)
    return {
        "name": source.name if isinstance(source, Backbone) else name,
        "class": type(model).__name__,
        "config": hashlib.sha256(text.encode()).hexdigest(),
    }


def task_settings(task: Task) -> dict[str, str]:
    """Return a task's settings; its data are not read."""
    settings = {"name": task.name, "class": type(task).__name__}
    if dataclasses.is_dataclass(task):
        settings |= {name: _without_folder(value) for name, value in _fields(task).items()}
    return settings


def _without_folder(text: str) -> str:
    """Return a file's name without its folder: a search is the same wherever it is called from."""
    return Path(text).resolve().name if os.path.exists(text) else text


def _with_parent(folder: str | Path) -> str:
    """Return the last two names of a folder's path: folders in several others may be namesakes."""
    return "/".join(Path(folder).expanduser().resolve().parts[-2:])


def describe_sampler(sampler: str | Sampler) -> str:
    """Return a sampler's name; of a user's own its import path and what can be read of its arguments.

    An argument is read from the attribute of its name, with or without an underscore before it. Of functions
    and objects there stands the import path.
    """
    if isinstance(sampler, str):
        return sampler
    known = vars(sampler)
    arguments = {
        name: known.get(name, known.get(f"_{name}", ...)) for name in signature(type(sampler)).parameters
    }
    texts = [f"{name}={_described(value)}" for name, value in arguments.items() if value is not ...]
    return f"{import_path(sampler)}({', '.join(texts)})"


def _described(value: Any) -> str:
    text = repr(value)
    return import_path(value) if callable(value) or " at 0x" in text else text


def import_path(value: Any) -> str:
    """Return where a class or a function is found, or the class of another object."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


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
    """Return a dataclass's class name and fields as text.

    A field that came later, which has "unset" in its metadata, stands there only where it is set: searches
    from before it go on.
    """
    fields = [field for field in dataclasses.fields(settings) if field.compare]
    names = [
        field.name
        for field in fields
        if "unset" not in field.metadata or getattr(settings, field.name) != field.metadata["unset"]
    ]
    return {"class": type(settings).__name__, **{name: _plain(getattr(settings, name)) for name in names}}


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return str({key: _comparable(item) for key, item in value.items()})
    return str(value)


def _comparable(item: Any) -> Any:
    """Return an item as what has the same text in every process; a function's has its address in it."""
    if isinstance(item, Mapping):
        return dict(item)
    return import_path(item) if callable(item) else item
