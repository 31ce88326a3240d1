"""Causal language modelling: plain text, prompts with completions, or chats."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from autopeft.models.head_spec import HeadSpec
from autopeft.models.positions import check_positions
from autopeft.tasks.base import Batch, SplitName, TaskData
from autopeft.tasks.batch import IGNORED, model_inputs
from autopeft.tasks.dataset_task import SPLITS
from autopeft.tasks.grouped_data import RowData
from autopeft.tasks.language_rows import Layout, RowReader, TokenRow, example_key, layout_of, learnt_column
from autopeft.tasks.language_task import LanguageTask
from autopeft.tasks.later_tokens import check_reads_no_later_tokens
from autopeft.tasks.length_bucketing import TokenisedSplit
from autopeft.tasks.packing import do_rows_mix, pack

_logger = logging.getLogger(__name__)


class LanguageData(RowData):
    """Batches of token rows, and the rows that texts are generated for.

    Args:
        rows: Gives the token rows of a split; called once a split, when it is first needed.
        tokenizer: The backbone's.
        batch_size: Rows a training batch; with packing, packs.
        seed: Seed of shuffling.
        length: Tokens of a pack; None to leave each row alone.

    Attributes:
        rows: Returns the token rows of a split.
    """

    def __init__(
        self,
        rows: Callable[[SplitName], tuple[TokenRow, ...]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        seed: int,
        length: int | None,
    ) -> None:
        # Padding goes behind: not every model counts positions from the first token that is none of it.
        tokenizer = copy.copy(tokenizer)
        tokenizer.padding_side = "right"
        super().__init__(self._tokenised, tokenizer, batch_size=batch_size, seed=seed)
        self.rows = cache(rows)
        self._length = length

    def _tokenised(self, name: SplitName) -> TokenisedSplit:
        rows = self.rows(name)
        if self._length is not None:
            return pack(rows, self._length)
        return TokenisedSplit(
            tokens={"input_ids": np.concatenate([np.array(row.tokens) for row in rows])},
            offsets=np.cumsum([0, *(len(row.tokens) for row in rows)]),
            labels=np.concatenate([np.array(row.labels) for row in rows]),
            token_labels=True,
        )


@dataclass(frozen=True, eq=False)
class CausalLM(LanguageTask):
    """Fine-tune a language model on text, on prompts with completions, or on chats.

    The columns say which: `messages` or `conversations` (chats, written by the tokenizer's chat template),
    `prompt` and `completion` (texts as they are), `instruction` and `output` (with `input` or without),
    `prompt` and `response`, `question` and `answer` (instructions all three), or `text`. The loss counts
    completions alone; of plain text all tokens. Metrics are those of `LanguageTask`.

    The attributes and errors of `LanguageTask`, and:

    Attributes:
        all_tokens: Whether prompts count in the loss too.
        packing: Whether short rows share a sequence of `max_length` tokens. They do not see each other: a
            model that lets them is refused before a search.
    """

    _: KW_ONLY
    all_tokens: bool = False
    packing: bool = False

    @property
    def head(self) -> HeadSpec:
        """The language model's own, which is not trained."""
        return HeadSpec(auto_class=AutoModelForCausalLM, is_trained=False)

    @cached_property
    def layout(self) -> Layout:
        """Which columns the data have."""
        layouts = {name: layout_of(split.column_names) for name, split in self._sources.items()}
        different = next((name for name, found in layouts.items() if found != layouts["train"]), None)
        if different is not None:
            raise ValueError(
                f"The {different} split has the layout {layouts[different]!r}, the train split "
                f"{layouts['train']!r}: expected the same columns in both."
            )
        return layouts["train"]

    @cached_property
    def _keys(self) -> list[str]:
        """What tells examples of the training split apart: rows of one prompt are one example."""
        return [example_key(row, self.layout) for row in self._sources["train"]]

    def validate(self) -> None:
        """Raise ValueError for whatever is wrong with data or settings."""
        if self._generated and self.layout == "text":
            raise ValueError(
                f"{', '.join(self._generated)} compares generated text with a reply, which plain text does "
                "not have: give columns 'prompt' and 'completion', or 'messages'."
            )
        super().validate()

    def reader(self, tokenizer: PreTrainedTokenizerBase) -> RowReader:
        """Return what reads a row.

        Raises:
            ValueError: The tokenizer lacks what the layout needs.
        """
        return RowReader(tokenizer, self.layout, all_tokens=self.all_tokens)

    def data(
        self, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, seed: int, cache: Path | None = None
    ) -> LanguageData:
        """Return the tokenised splits; see `Task.data`.

        Raises:
            ValueError: A row is not of the data's layout, the tokenizer lacks what the layout needs, or no
                completion is left of a split after rows were cut.
        """
        reader = self.reader(tokenizer)
        data = LanguageData(
            lambda name: self._read(reader, name, cache),
            tokenizer,
            batch_size=batch_size,
            seed=seed,
            length=self.max_length if self.packing else None,
        )
        for name in SPLITS[:2]:
            data.rows(name)  # what is wrong with them is said now
        if self._generated and not self._examples(data, "validation")[0]:
            raise ValueError(
                f"No row of the validation split has a prompt and the beginning of its reply within "
                f"max_length={self.max_length} tokens: {', '.join(self._generated)} "
                "would have nothing to compare."
            )
        return data

    def check_model(self, model: Any, data: TaskData) -> None:
        """Raise ValueError where a model reads later tokens, rows are too long, or packed ones are mixed."""
        assert isinstance(data, LanguageData)
        rows = [row for name in SPLITS[:2] for row in data.rows(name)]
        lengths = [len(row.tokens) for row in rows]
        if self._generated:
            prompts, _ = self._examples(data, "validation")
            lengths += [len(prompt) + self.new_tokens for prompt in prompts]
        check_positions(model, max(lengths))
        model_name = type(model).__name__

        def logits(batch: Batch) -> Tensor:
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            return self.predicted(self.forward(model, on_device)).float().cpu()

        check_reads_no_later_tokens(model_name, logits, max(rows, key=lambda row: len(row.tokens)).tokens)
        if self.packing and do_rows_mix(logits, rows, data.tokenizer, min(2, data.batch_size)):
            raise ValueError(
                f"Packed rows see each other in {model_name}: expected packing=False, or with "
                "attention='flash_attention_2' another attention or one pack a batch."
            )

    def _read(self, reader: RowReader, name: SplitName, cache: Path | None) -> tuple[TokenRow, ...]:
        source, numbers = self._drawn(name)
        places = [f"Row {number} of the {source} split" for number in numbers]
        read = reader.read_all(list(self._sources[source].select(numbers)), places, cache)
        cut = [row.cut(self.max_length) for row in read]
        rows = tuple(row for row in cut if row.is_learnt)
        shortened = sum(len(row.tokens) > self.max_length for row in read)
        if not rows:
            column, empty = learnt_column(self.layout), sum(not row.is_learnt for row in read)
            if empty == len(read):
                raise ValueError(
                    f"No row of the {name} split has anything to learn: {column!r} is empty in all {empty:,}."
                )
            longest = max(len(row.tokens) for row in read)
            raise ValueError(
                f"No row of the {name} split has a completion within max_length={self.max_length} tokens "
                f"(the longest row has {longest}): raise max_length, or shorten the prompts."
                + (f" In {empty:,} of its {len(read):,} rows {column!r} is empty." if empty else "")
            )
        if shortened or len(rows) < len(read):
            _logger.warning(
                f"{shortened:,} of the {len(read):,} rows of the {name} split are cut at {self.max_length} "
                f"tokens; {len(read) - len(rows):,}, cut or not, have nothing to learn and are left out."
            )
        return rows

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        """Return a model's output for a batch."""
        # Also: transformers takes packed rows apart by their positions only where there is no cache of keys.
        return model(**model_inputs(batch), use_cache=False)

    @property
    def is_one_pass(self) -> bool:
        """Whether `forward` is one pass of the model over `model_inputs`: unless a subclass has its own."""
        return type(self).forward is CausalLM.forward

    def _predicted_labels(self, labels: Tensor) -> Tensor:
        return labels[:, 1:]

    def _learnt(self, data: LanguageData, name: SplitName) -> NDArray[np.int64]:
        # The first token of a row is never predicted.
        labels: NDArray[np.int64] = np.concatenate([np.array(row.labels[1:]) for row in data.rows(name)])
        found: NDArray[np.int64] = labels[labels != IGNORED]
        return found

    def _examples(self, data: LanguageData, name: SplitName) -> tuple[list[tuple[int, ...]], list[str]]:
        rows = data.rows(name)
        if self.layout == "text":  # without prompts: how fast text is generated is measured from half of each
            return [row.tokens[: len(row.tokens) // 2 or 1] for row in rows], [""] * len(rows)
        whole = [row for row in rows if 0 < row.prompt < len(row.tokens)]  # the last reply may be cut away
        replies = data.tokenizer.batch_decode([[*row.reply] for row in whole], skip_special_tokens=True)
        return [row.tokens[: row.prompt] for row in whole], [reply.strip() for reply in replies]

    def _ends(self, data: LanguageData) -> Sequence[int]:
        """Return what every reply ends with, which a chat template may have chosen and the model not know."""
        ends = {row.reply[-1] for row in data.rows("train") if row.reply}
        return [*ends] if len(ends) == 1 else []

    def describe(self) -> str:
        """Return the settings, and the layout that was recognised."""
        return f"{self!r}; rows of the layout {self.layout!r}"

    def _settings(self) -> dict[str, str]:
        own = {"layout": self.layout, "all_tokens": str(self.all_tokens), "packing": str(self.packing)}
        return own | super()._settings()
