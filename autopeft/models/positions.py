"""How long rows may be for a model that has learnt a vector for each position."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

_MOST_IN_FRONT = 2
"""Rows of a table that some models, as OPT and BART, have in front of the first position."""


def learnt_positions(model: PreTrainedModel) -> int | None:
    """Return for how many positions a model has learnt a vector; None where it computes positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    for name, table in model.named_modules():
        leaf = name.rpartition(".")[2]
        if not isinstance(table, nn.Embedding) or not ("pos" in leaf or leaf == "wpe"):
            continue
        if positions <= table.num_embeddings <= positions + _MOST_IN_FRONT:
            # Those of RoBERTa's kind count from behind the row of padding.
            return positions if table.padding_idx is None else positions - table.padding_idx - 1
    return None


def check_positions(model: PreTrainedModel, tokens: int) -> None:
    """Raise a ValueError where a model has learnt fewer positions than a row has tokens."""
    most = learnt_positions(model)
    if most is not None and tokens > most:
        raise ValueError(
            f"{type(model).__name__} has learnt {most} positions, and rows have up to {tokens} tokens: "
            "shorten them."
        )
