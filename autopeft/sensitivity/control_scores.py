"""What the other scores are compared with: controls, and the expensive truth."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

from autopeft.core.adapter import Adapter, Site
from autopeft.core.configuration import Configuration
from autopeft.sensitivity.scored_matrices import MatrixSite
from autopeft.sensitivity.site_scores import SiteScores

TrainOne = Callable[[Configuration], float]
"""Trains a configuration and returns its validation score, better when larger (a loss: its negative)."""


def random_scores(sites: Iterable[Site], seed: int) -> SiteScores:
    """Return uniform random numbers in [0, 1): a control. Does not touch the global generators."""
    generator = random.Random(seed)
    return SiteScores(name="random", values={site: generator.random() for site in sites})


def uniform_scores(sites: Iterable[Site]) -> SiteScores:
    """Return 1 for every site: a control, which leads to the same rank everywhere."""
    return SiteScores(name="uniform", values={site: 1.0 for site in sites})


def leave_one_out_scores(sites: Sequence[MatrixSite], train_one: TrainOne, rank: int) -> SiteScores:
    """Return the validation score after training LoRA of a rank on one site alone, for every site.

    Costs one training a site: a reference to check the cheap scores against.
    """
    values = {matrix.site: train_one(Configuration({matrix.site: Adapter("lora", rank)})) for matrix in sites}
    return SiteScores(name="leave_one_out", values=values)
