"""What can be searched: spaces that turn the parameters of a trial into a configuration."""

from autopeft.search_spaces.autopeft_paper import AutoPEFTPaper
from autopeft.search_spaces.base import SearchSpace
from autopeft.search_spaces.baselines import Baseline
from autopeft.search_spaces.per_layer import PerLayer
from autopeft.search_spaces.score_guided import ScoreGuided
from autopeft.search_spaces.uniform import Uniform

__all__ = ["AutoPEFTPaper", "Baseline", "PerLayer", "ScoreGuided", "SearchSpace", "Uniform"]
