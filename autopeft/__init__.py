"""autopeft finds the PEFT configurations that trade accuracy, parameters and memory best."""

from autopeft import search_spaces, tasks
from autopeft.backbone import Backbone
from autopeft.configuration import Adapter, Configuration, Site
from autopeft.elastic import ElasticAdapter
from autopeft.elastic_settings import Elastic
from autopeft.evaluation import Evaluation, TrialRecord
from autopeft.evaluator import Evaluator
from autopeft.export import ExportReport, load_adapter
from autopeft.fidelity import SuccessiveHalving
from autopeft.front import FrontPoint, ParetoFront
from autopeft.methods import attach, count_parameters
from autopeft.search import Search
from autopeft.training import Training

__all__ = [
    "Adapter",
    "Backbone",
    "Configuration",
    "Elastic",
    "ElasticAdapter",
    "Evaluation",
    "Evaluator",
    "ExportReport",
    "FrontPoint",
    "ParetoFront",
    "Search",
    "Site",
    "SuccessiveHalving",
    "Training",
    "TrialRecord",
    "attach",
    "count_parameters",
    "load_adapter",
    "search_spaces",
    "tasks",
]
