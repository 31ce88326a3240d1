"""Causal language modelling: plain text, prompts with completions, or chats."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric, MetricCollection
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from autopeft.core.errors import check_whole, unknown_choice
from autopeft.core.objectives import GENERATION_SPEEDS, Objective
from autopeft.models.head_spec import HeadSpec
from autopeft.tasks.base import Batch, SplitName, TaskData
from autopeft.tasks.batch import IGNORED, LABELS, model_inputs
from autopeft.tasks.dataset_task import SPLITS, DatasetTask
from autopeft.tasks.generation import TEXT_METRICS, TextMetric, continue_prompts, generate_texts
from autopeft.tasks.language_data import LanguageData
from autopeft.tasks.language_rows import Layout, RowReader, TokenRow, example_key, layout_of
from autopeft.tasks.splits import split_groups

_logger = logging.getLogger(__name__)
_GENERATION_BATCH = 16
_TIMED_ROWS = 8
_AT_ONCE = 128  # tokens whose cross entropy is taken together


class _Perplexity(MeanMetric):
    """Exponential of the mean loss a token."""

    def compute(self) -> Tensor:
        """Return the perplexity, a scalar."""
        mean: Tensor = super().compute()
        return mean.exp()


@dataclass(frozen=True, eq=False)
class CausalLM(DatasetTask):
    """Fine-tune a language model on text, on prompts with completions, or on chats.

    The columns say which: `messages` (chats, written by the tokenizer's chat template), `prompt` and
    `completion`, `instruction` and `output` (with `input` or without), or `text`. The loss counts completions
    alone; of plain text all tokens. The language model's own head is used and stays frozen.

    Metrics: loss, the mean cross entropy a token in nats; perplexity; and those of `generate`.

    The attributes of `DatasetTask` (rows with the same prompt stay in one split), and:

    Attributes:
        max_length: Tokens a row at most; longer ones are cut at their end.
        all_tokens: Whether prompts count in the loss too.
        packing: Whether short rows share a sequence of `max_length` tokens. They do not see each other.
        generate: Metrics of text that is generated for prompts when a training has ended: "exact_match",
            "rouge_l", "bleu", "chrf"; or by name, functions of the generated texts and the references that
            return a score, better when larger.
        generated_rows: Rows of a split that text is generated for, drawn by seed.
        new_tokens: Tokens that are generated for a row at most.

    Raises:
        ValueError: A setting is out of its range; the data are checked by `validate`.
    """

    _: KW_ONLY
    max_length: int = 512
    all_tokens: bool = False
    packing: bool = False
    generate: Sequence[str] | Mapping[str, TextMetric] = ()
    generated_rows: int = 64
    new_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_length", "generated_rows", "new_tokens"):
            check_whole(name, getattr(self, name), least=1)
        for name in () if isinstance(self.generate, Mapping) else self._generated:
            if name not in TEXT_METRICS:
                raise unknown_choice("metric of generated text", name, TEXT_METRICS)

    @property
    def _generated(self) -> tuple[str, ...]:
        return (self.generate,) if isinstance(self.generate, str) else tuple(self.generate)

    @property
    def metrics(self) -> tuple[Objective, ...]:
        """The metrics, the default one first."""
        loss = Objective(name="loss", direction="minimize", unit="nats", is_metric=True)
        perplexity = Objective(
            name="perplexity", direction="minimize", unit="perplexity", is_metric=True, log_scale=True
        )
        return loss, perplexity, *(Objective.score(name, at_end=True) for name in self._generated)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The metrics, and how fast text is generated."""
        return *self.metrics, *GENERATION_SPEEDS.values()

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

    def _cut(self, rows: Sequence[int], share: float) -> tuple[Sequence[int], Sequence[int]]:
        keys = [self._keys[row] for row in rows]
        return split_groups(keys, max(1, round(share * len(rows))), self.seed)

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

    def data(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        seed: int,
        cache: Path | None = None,
    ) -> LanguageData:
        """Return the tokenised splits; see `Task.data`.

        Raises:
            ValueError: A row is not of the data's layout, the tokenizer lacks what the layout needs, or no
                completion is left of a split after rows were cut.
        """
        reader = RowReader(tokenizer, self.layout, all_tokens=self.all_tokens)
        data = LanguageData(
            lambda name: self._read(reader, name),
            tokenizer,
            batch_size=batch_size,
            seed=seed,
            length=self.max_length if self.packing else None,
        )
        for name in SPLITS[:2]:
            data.rows(name)  # what is wrong with them is said now
        return data

    def _read(self, reader: RowReader, name: SplitName) -> tuple[TokenRow, ...]:
        source, numbers = self._drawn(name)
        read = [
            reader.read(row, f"Row {number} of the {source} split")
            for number, row in zip(numbers, self._sources[source].select(numbers), strict=True)
        ]
        cut = [row.cut(self.max_length) for row in read]
        rows = tuple(row for row in cut if any(label != IGNORED for label in row.labels[1:]))
        shortened = sum(len(row.tokens) > self.max_length for row in read)
        if not rows:
            longest = max(len(row.tokens) for row in read)
            raise ValueError(
                f"No row of the {name} split has a completion within max_length={self.max_length} tokens "
                f"(the longest row has {longest}): raise max_length, or shorten the prompts."
            )
        if shortened:
            _logger.warning(
                "%s of the %s rows of the %s split are cut at %s tokens; %s have nothing left to learn and "
                "are left out.",
                f"{shortened:,}",
                f"{len(read):,}",
                name,
                self.max_length,
                f"{len(read) - len(rows):,}",
            )
        return rows

    def example_batch(self, rows: int, length: int) -> Batch:
        """Return a batch of full rows; see `Task.example_batch`."""
        ids = torch.ones(rows, length, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": ids.clone(), LABELS: ids.clone()}

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        """Return a model's output for a batch."""
        # Also: transformers takes packed rows apart by their positions only where there is no cache of keys.
        return model(**model_inputs(batch), use_cache=False)

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean cross entropy of the learnt tokens, a scalar.

        Args:
            output: Has logits of shape (rows, tokens, vocabulary).
            batch: Has labels of shape (rows, tokens).
        """
        labels = functional.pad(batch[LABELS][:, 1:], (0, 1), value=IGNORED).flatten()
        parts = zip(output.logits.flatten(0, 1).split(_AT_ONCE), labels.split(_AT_ONCE), strict=True)
        # A vocabulary's logits in single precision are most of a training's memory: a few at a time, and
        # again in the backward pass.
        sums = [
            checkpoint(_summed_cross_entropy, *part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
        return torch.stack(sums).sum() / self.weight(batch)

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the number of learnt tokens in a batch."""
        return (batch[LABELS][:, 1:] != IGNORED).sum().clamp(min=1)

    def metric_collection(self) -> MetricCollection:
        """Return loss and perplexity."""
        return MetricCollection(
            {"loss": MeanMetric(nan_strategy="disable"), "perplexity": _Perplexity(nan_strategy="disable")},
            compute_groups=False,
        )

    def update_metrics(
        self, metrics: MetricCollection, output: Any, batch: Mapping[str, Tensor], loss: Tensor
    ) -> None:
        """Add a batch to the metrics."""
        metrics.update(loss, self.weight(batch))

    def measure_at_end(self, model: nn.Module, data: TaskData, split: SplitName) -> dict[str, float]:
        """Return the metrics of generated text, by name."""
        if not self._generated:
            return {}
        assert isinstance(data, LanguageData)
        rows = data.rows(split)
        generator = np.random.default_rng(self.seed)
        chosen = generator.permutation(len(rows))[: self.generated_rows]
        texts = generate_texts(
            model,
            data.tokenizer,
            [rows[index].tokens[: rows[index].prompt] for index in chosen],
            new_tokens=self.new_tokens,
            batch_size=_GENERATION_BATCH,
        )
        references = [rows[index].completion for index in chosen]
        functions = self.generate if isinstance(self.generate, Mapping) else TEXT_METRICS
        return {name: float(functions[name](texts, references)) for name in self._generated}

    def generate_tokens(self, model: nn.Module, data: TaskData, tokens: int) -> int:
        """Continue the first validation rows; see `Task.generate_tokens`."""
        assert isinstance(data, LanguageData)
        rows = data.rows("validation")[:_TIMED_ROWS]
        prompts = [row.tokens[: row.prompt or len(row.tokens) // 2 or 1] for row in rows]
        exactly = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        return continue_prompts(model, data.tokenizer, prompts, **exactly).numel()

    def trivial_score(self, metric: str, data: TaskData) -> float:
        """Return what predicting each token by its frequency in training scores; 0 for generated text."""
        if self.metric(metric).at_end:
            return 0.0
        assert isinstance(data, LanguageData)
        train, validation = (data.learnt(name) for name in SPLITS[:2])
        words = 1 + int(max(train.max(), validation.max()))
        counts = 1 + np.bincount(train, minlength=words)
        loss = -float(np.log(counts / counts.sum())[validation].mean())
        return loss if metric == "loss" else math.exp(loss)

    def best_score(self, metric: str) -> float:
        """Return the best value a metric can take."""
        return {"loss": 0.0}.get(metric, 1.0)

    def describe(self) -> str:
        """Return the settings, and the layout that was recognised."""
        return f"{self!r}; rows of the layout {self.layout!r}"

    def _columns(self, name: SplitName) -> Sequence[Sequence[object]]:
        source, rows = self._drawn(name)
        split = self._sources[source].select(rows)
        return [split[column][:] for column in split.column_names]

    def _settings(self) -> dict[str, str]:
        return {
            "layout": self.layout,
            "all_tokens": str(self.all_tokens),
            "packing": str(self.packing),
            "generate": ", ".join(self._generated),
            "generated_rows": str(self.generated_rows) if self._generated else "",
            "new_tokens": str(self.new_tokens) if self._generated else "",
            "max_length": str(self.max_length),
        }


def _summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
