"""How much adapting each site of a backbone promises, before anything is trained."""

from autopeft.sensitivity.computation import compute_scores
from autopeft.sensitivity.registry import CHEAP_SCORES, SCORES, ScoreSpec
from autopeft.sensitivity.site_scores import SiteScores

__all__ = ["CHEAP_SCORES", "SCORES", "ScoreSpec", "SiteScores", "compute_scores"]
