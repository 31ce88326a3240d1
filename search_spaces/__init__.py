"""What can be searched: spaces that turn an Optuna trial into a configuration."""

from autopeft.search_spaces.autopeft_paper import AutoPEFTPaper
from autopeft.search_spaces.base import Baseline, History, SearchSpace
from autopeft.search_spaces.per_layer import PerLayer
from autopeft.search_spaces.score_guided import ScoreGuided
from autopeft.search_spaces.uniform import Uniform

__all__ = ["AutoPEFTPaper", "Baseline", "History", "PerLayer", "ScoreGuided", "SearchSpace", "Uniform"]
