"""autopeft finds the PEFT configurations that trade accuracy, parameters and memory best."""

from autopeft import search_spaces, tasks
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import Evaluation, TrialRecord
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.supernet.settings import WarmStart
from autopeft.evaluation.supernet.supernet import LoraSupernet
from autopeft.export.export import ExportReport, load_adapter
from autopeft.methods import attach, count_parameters
from autopeft.models.backbone import Backbone
from autopeft.optimization.successive_halving import SuccessiveHalving
from autopeft.reporting.front import FrontPoint, ParetoFront
from autopeft.search import Search
from autopeft.training.settings import Training

__all__ = [
    "Adapter",
    "Backbone",
    "Configuration",
    "Evaluation",
    "Evaluator",
    "ExportReport",
    "FrontPoint",
    "LoraSupernet",
    "ParetoFront",
    "Search",
    "Site",
    "SuccessiveHalving",
    "Training",
    "TrialRecord",
    "WarmStart",
    "attach",
    "count_parameters",
    "load_adapter",
    "search_spaces",
    "tasks",
]
