"""From scores to ranks: how a budget is divided among the sites.

Every allocator keeps the same promises:

* no rank lies outside [`smallest`, `largest`], and what the ranks cost never exceeds the budget;
* the budget is spent: what is left buys no further rank at any site below its cap, so it is less than one
  rank costs at the cheapest of them. Where costs differ, that may take a rank at a site that the rule
  alone would have left out. Once every site is at its cap, the rest stays unspent;
* where `smallest` is 0, a site may get rank 0: no adapter there;
* the same input gives the same ranks, in whatever order its sites are given. Ties go to the earlier site.
"""

from autopeft.sensitivity.allocation import rules
from autopeft.sensitivity.allocation.rank_budget import RankBudget, Ranks
from autopeft.sensitivity.allocation.registry import ALLOCATORS, Allocator

__all__ = ["ALLOCATORS", "Allocator", "RankBudget", "Ranks", "rules"]
