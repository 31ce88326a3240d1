"""Metrics of labels of words: their accuracy, and F1 of entities, as in the shared tasks of CoNLL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from autopeft.tasks.batch import IGNORED

_FIRST, _LAST = "BSU", "ESLU"
_NONE = -1


def _prefix_and_kind(label: str) -> tuple[str, str]:
    """Split "B-PER" in two; a label without a prefix is a kind of its own."""
    prefix, dash, kind = label.partition("-")
    return (prefix, kind) if dash and prefix in (*"BIESLU",) else ("I", label)


class WordAccuracy(Metric):
    """Share of words with the right label."""

    # torchmetrics picks out the words that count, which tensors without data cannot; its `MeanMetric` checks
    # values, or forgets weights (nan_strategy="disable", 1.9).
    right: Tensor
    words: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("right", "words"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add label numbers of one shape; words whose target is `IGNORED` are left out."""
        self.right += (preds == target).sum()
        self.words += (target != IGNORED).sum()

    def compute(self) -> Tensor:
        """Return the accuracy, a scalar in [0, 1]."""
        return self.right / self.words.clamp(min=1)


class EntityF1(Metric):
    """F1 of entities over all rows: one counts as found where its first word, last word and kind are right.

    Labels are read as seqeval does by default: IOB1, IOB2, IOBES and BILOU alike, an I that follows nothing
    begins an entity. Labels without a prefix make an entity of each run of one label; "O" makes none.

    Args:
        labels: The names of the labels.
    """

    found: Tensor
    predicted: Tensor
    present: Tensor

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        parts = [_prefix_and_kind(label) for label in labels]
        kinds = list(dict.fromkeys(kind for _, kind in parts))
        self._kinds = [
            _NONE if label == "O" else kinds.index(kind)
            for label, (_, kind) in zip(labels, parts, strict=True)
        ]
        self._first = [prefix in _FIRST for prefix, _ in parts]
        self._last = [prefix in _LAST for prefix, _ in parts]
        for state in ("found", "predicted", "present"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add label numbers of shape (rows, tokens); tokens whose target is `IGNORED` are left out."""
        # Words alone, in order: those that are left out go behind.
        counted = target != IGNORED
        order = (~counted).to(torch.uint8).argsort(dim=1, stable=True)
        counted = counted.gather(1, order)
        ours, theirs = (self._spans(labels.gather(1, order), counted) for labels in (preds, target))
        same = [left == right for left, right in zip(ours, theirs, strict=True)]
        self.found += (ours[0] & torch.stack(same).all(dim=0)).sum()
        self.predicted += ours[0].sum()
        self.present += theirs[0].sum()

    def _spans(self, labels: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return where entities start, where each one ends, and its kind; each of shape (rows, tokens)."""
        labels = labels.clamp(min=0)
        kind = labels.new_tensor(self._kinds)[labels].masked_fill(~counted, _NONE)
        first, last = (
            torch.tensor(flags, device=labels.device)[labels] for flags in (self._first, self._last)
        )
        before = functional.pad(kind[:, :-1], (1, 0), value=_NONE)
        after_last = functional.pad(last[:, :-1], (1, 0), value=False)
        starts = (kind != _NONE) & (first | after_last | (before != kind))
        goes_on = functional.pad((kind != _NONE)[:, 1:] & ~starts[:, 1:], (0, 1), value=False)
        places = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
        ends = places.masked_fill(goes_on, labels.shape[1]).flip(1).cummin(dim=1).values.flip(1)
        return starts, ends, kind

    def compute(self) -> Tensor:
        """Return F1, a scalar in [0, 1]; 0 where there are no entities."""
        return 2 * self.found / (self.predicted + self.present).clamp(min=1)
