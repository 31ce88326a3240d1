"""Whether a language model sees the tokens that it predicts, as encoders do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_ROUNDING = 0.05
"""Change of earlier logits that is taken for rounding, as a share of that where the token changed."""
_TOKENS = 3
"""Of a row that are read: of few, one changes the others' logits much (0.14 to 0.25 in random encoders)."""


def check_reads_no_later_tokens(model: Any, tokens: Sequence[int]) -> None:
    """Raise ValueError where a model's logits change with a token behind them.

    Args:
        model: A language model.
        tokens: Of a row.
    """
    ids = torch.tensor([tokens[:_TOKENS]], device=model.device)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] == 0).long()  # another token that every vocabulary has
    before, after = (
        model(input_ids=read, attention_mask=torch.ones_like(read), use_cache=False).logits.float()
        for read in (ids, changed)
    )
    change = (after - before).abs()[0]
    if len(change) > 1 and change[:-1].max() > _ROUNDING * change[-1].max():
        raise ValueError(
            f"{type(model).__name__} reads later tokens (it is an encoder), so that it would see what it is "
            "to predict: expected a decoder, or a task for encoders such as TextClassification."
        )
