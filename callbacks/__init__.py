"""Lightning callbacks of autopeft, each useful in any Trainer."""

from autopeft.callbacks.adalora import AdaLoRA
from autopeft.callbacks.ard_lora import ARDLoRA
from autopeft.callbacks.best_weights import BestWeights
from autopeft.callbacks.divergence import DivergenceError, StopOnDivergence
from autopeft.callbacks.elalora import ElaLoRA
from autopeft.callbacks.increlora import IncreLoRA
from autopeft.callbacks.ist import IST
from autopeft.callbacks.lisa import LISA
from autopeft.callbacks.lora_modules import LoraModule, find_lora_modules
from autopeft.callbacks.measuring import LearningCurve, PeakMemory, Throughput
from autopeft.callbacks.rank_gates import RankGates
from autopeft.callbacks.sora import SoRA

__all__ = [
    "IST",
    "LISA",
    "ARDLoRA",
    "AdaLoRA",
    "BestWeights",
    "DivergenceError",
    "ElaLoRA",
    "IncreLoRA",
    "LearningCurve",
    "LoraModule",
    "PeakMemory",
    "RankGates",
    "SoRA",
    "StopOnDivergence",
    "Throughput",
    "find_lora_modules",
]
