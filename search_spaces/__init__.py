"""What can be searched: spaces that turn the parameters of a trial into a configuration."""

from autopeft.search_spaces.autopeft_paper import AutoPEFTPaper
from autopeft.search_spaces.base import Baseline, SearchSpace
from autopeft.search_spaces.method_space import MethodSpace, SlotSpace
from autopeft.search_spaces.per_layer import PerLayer
from autopeft.search_spaces.presets import (
    Everything,
    LowMemory,
    Mergeable,
    NASPEFTPaper,
    Servable,
    ShearsPaper,
    Stratified,
    Tiny,
)
from autopeft.search_spaces.score_guided import ScoreGuided
from autopeft.search_spaces.uniform import Uniform

__all__ = [
    "AutoPEFTPaper",
    "Baseline",
    "Everything",
    "LowMemory",
    "Mergeable",
    "MethodSpace",
    "NASPEFTPaper",
    "PerLayer",
    "ScoreGuided",
    "SearchSpace",
    "Servable",
    "ShearsPaper",
    "SlotSpace",
    "Stratified",
    "Tiny",
    "Uniform",
]
