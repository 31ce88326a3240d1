"""What tasks have in common whose model reads something and writes a text for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from autopeft.tasks.base import SplitName
from autopeft.tasks.batch import IGNORED, LABELS, model_inputs
from autopeft.tasks.dataset_loading import check_columns, check_text
from autopeft.tasks.label_column import labelled_rows
from autopeft.tasks.language_task import LanguageTask

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class EncoderDecoderTask(LanguageTask):
    """A task whose model has an encoder, and a decoder that writes a text.

    The attributes and errors of `LanguageTask`, and:

    Attributes:
        target: The column with the text that is written. Rows without one are left out.
    """

    _: KW_ONLY
    target: str = "target"

    def _usable(self, split: Dataset, name: str) -> Sequence[int]:
        if name != "test":
            check_columns(split, name, self.target)
        if self.target in split.column_names:
            check_text(split, name, self.target)
        return labelled_rows(split, name, (self.target,), (None, ""))

    def _targets(self, name: SplitName) -> list[str]:
        source, rows = self._drawn(name)
        texts: list[str] = self._sources[source].select(rows)[self.target][:]
        return texts

    def _labels(self, tokens: Sequence[Sequence[int]], name: SplitName, setting: str) -> NDArray[np.int64]:
        """Return the tokens of targets as labels, of shape (rows, longest), cut at a setting's length."""
        length: int = getattr(self, setting)
        if cut := sum(len(ids) > length for ids in tokens):
            _logger.warning(
                f"{cut:,} of the {len(tokens):,} targets of the {name} split are cut at {setting}={length} "
                "tokens."
            )
        labels = np.full((len(tokens), min(length, max(map(len, tokens)))), IGNORED)
        for row, ids in zip(labels, tokens, strict=True):
            row[: len(ids)] = ids[:length]
        return labels

    @staticmethod
    def _ended(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return a target's tokens with the end token, which not every tokenizer writes."""
        end = tokenizer.eos_token_id
        return [*ids] if end is None or end in ids[-1:] else [*ids, end]

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        """Return a model's output for a batch, given what was written before each label."""
        written = self._written(model, batch[LABELS])
        return model(**model_inputs(batch), decoder_input_ids=written, use_cache=False)

    def _written(self, model: nn.Module, labels: Tensor) -> Tensor:
        """Return what was written before each label."""
        before: Any = model.prepare_decoder_input_ids_from_labels
        found: Tensor = before(labels=labels)
        return found

    def _predicted_labels(self, labels: Tensor) -> Tensor:
        return labels
