"""Lightning callbacks of autopeft, each useful in anybody's Trainer."""

from autopeft.callbacks.best_weights import BestWeights
from autopeft.callbacks.divergence import DivergenceError, StopOnDivergence
from autopeft.callbacks.learning_curve import LearningCurve
from autopeft.callbacks.peak_memory import PeakMemory
from autopeft.callbacks.throughput import Throughput

__all__ = [
    "BestWeights",
    "DivergenceError",
    "LearningCurve",
    "PeakMemory",
    "StopOnDivergence",
    "Throughput",
]
