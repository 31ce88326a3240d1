"""Whether a language model sees the tokens that it predicts, as encoders do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autopeft.tasks.base import Batch
from autopeft.tasks.batch import LABELS

_ROUNDING = 0.05
"""Change of earlier logits that is taken for rounding, as a share of that where the token changed."""
_TOKENS = 3
"""Of a row that are read: of few, one changes the others' logits much (0.14 to 0.25 in random encoders)."""


def check_reads_no_later_tokens(
    model_name: str, logits: Callable[[Batch], Tensor], tokens: Sequence[int]
) -> None:
    """Raise ValueError where a model's logits change with a token behind them.

    Args:
        model_name: What the error calls the model.
        logits: Gives its logits of a batch, of shape (rows, tokens, vocabulary).
        tokens: Of a row.
    """
    ids = torch.tensor([tokens[:_TOKENS]])
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] == 0).long()  # another token that every vocabulary has
    before, after = (
        logits({"input_ids": read, "attention_mask": torch.ones_like(read), LABELS: read})
        for read in (ids, changed)
    )
    change = (after - before).abs()[0]
    if len(change) > 1 and change[:-1].max() > _ROUNDING * change[-1].max():
        raise ValueError(
            f"{model_name} reads later tokens (it is an encoder), so that it would see what it is "
            "to predict: expected a decoder, or a task for encoders such as TextClassification."
        )
