"""Adapter methods: their sizes, how they are attached to a backbone, and how they come out again."""

from autopeft.methods.attachment import Attachment, attach, count_parameters, count_site, obstacle, placements
from autopeft.methods.base import Method, Placement
from autopeft.methods.full_fine_tuning import FullFineTuning
from autopeft.methods.peft_base import PeftMethod
from autopeft.methods.registry import METHODS, carries_adapters, is_found_elsewhere, register, unmergeable
from autopeft.methods.switch import adapters_off

__all__ = [
    "METHODS",
    "Attachment",
    "FullFineTuning",
    "Method",
    "PeftMethod",
    "Placement",
    "adapters_off",
    "attach",
    "carries_adapters",
    "count_parameters",
    "count_site",
    "is_found_elsewhere",
    "obstacle",
    "placements",
    "register",
    "unmergeable",
]
