"""What can be searched: spaces that turn the parameters of a trial into a configuration."""

from autopeft.search_spaces.autopeft_paper import AutoPEFTPaper
from autopeft.search_spaces.base import Baseline, SearchSpace
from autopeft.search_spaces.method_space import MethodSpace, SlotSpace
from autopeft.search_spaces.per_layer import PerLayer
from autopeft.search_spaces.score_guided import ScoreGuided
from autopeft.search_spaces.uniform import Uniform

__all__ = [
    "AutoPEFTPaper",
    "Baseline",
    "MethodSpace",
    "PerLayer",
    "ScoreGuided",
    "SearchSpace",
    "SlotSpace",
    "Uniform",
]
