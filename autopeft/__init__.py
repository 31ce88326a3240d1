"""autopeft finds the PEFT configurations that trade accuracy, parameters and memory best."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopeft import search_spaces, tasks
    from autopeft.core.configuration import Adapter, Configuration, Site
    from autopeft.core.evaluation import Evaluation, TrialRecord
    from autopeft.core.export_report import ExportReport
    from autopeft.evaluation.estimate import estimate
    from autopeft.evaluation.evaluator import Evaluator
    from autopeft.evaluation.packing.executor import PackedExecutor
    from autopeft.evaluation.ray_executor import RayExecutor
    from autopeft.export.export import load_adapter
    from autopeft.methods import adapters_off, attach, count_parameters
    from autopeft.models.backbone import Backbone
    from autopeft.optimization.successive_halving import SuccessiveHalving
    from autopeft.reporting.front import FrontPoint, ParetoFront
    from autopeft.search import Search
    from autopeft.training.settings import Training

# Of each cast of an 8-bit layer's inputs, and on some CPUs of kernels that it would take from a hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Imported when first used: torch, transformers and peft take seconds, which `autopeft --help` can do without.
_HOMES = {
    "Adapter": "core.configuration",
    "Backbone": "models.backbone",
    "Configuration": "core.configuration",
    "Evaluation": "core.evaluation",
    "Evaluator": "evaluation.evaluator",
    "ExportReport": "core.export_report",
    "FrontPoint": "reporting.front",
    "PackedExecutor": "evaluation.packing.executor",
    "RayExecutor": "evaluation.ray_executor",
    "ParetoFront": "reporting.front",
    "Search": "search",
    "Site": "core.configuration",
    "SuccessiveHalving": "optimization.successive_halving",
    "Training": "training.settings",
    "TrialRecord": "core.evaluation",
    "adapters_off": "methods",
    "attach": "methods",
    "count_parameters": "methods",
    "estimate": "evaluation.estimate",
    "load_adapter": "export.export",
}

__all__ = [
    "Adapter",
    "Backbone",
    "Configuration",
    "Evaluation",
    "Evaluator",
    "ExportReport",
    "FrontPoint",
    "PackedExecutor",
    "ParetoFront",
    "RayExecutor",
    "Search",
    "Site",
    "SuccessiveHalving",
    "Training",
    "TrialRecord",
    "adapters_off",
    "attach",
    "count_parameters",
    "estimate",
    "load_adapter",
    "search_spaces",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in ("search_spaces", "tasks"):
        return import_module(f"autopeft.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'autopeft' has no attribute {name!r}")
    return getattr(import_module(f"autopeft.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
