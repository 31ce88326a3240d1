"""What tasks have in common whose model writes text: loss a token, perplexity, metrics of generated text."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric, MetricCollection

from autopeft.core.errors import check_choice, check_whole
from autopeft.core.objectives import GENERATION_SPEEDS, Direction, Objective
from autopeft.tasks.base import Batch, SplitName, TaskData
from autopeft.tasks.batch import IGNORED, LABELS
from autopeft.tasks.dataset_task import SPLITS, GroupedTask
from autopeft.tasks.generation import ERROR_RATES, TEXT_METRICS, TextMetric, generate_texts, new_ids, padded
from autopeft.tasks.token_loss import summed_cross_entropy

_GENERATION_BATCH = 16
_TIMED_ROWS = 8
_DIRECTIONS: tuple[Direction, Direction] = ("maximize", "minimize")


class _MeanLoss(Metric):
    """Mean loss a token; torchmetrics' own mean leaves NaN out, or the weights."""

    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "tokens"):
            self.add_state(name, default=torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, tokens: Tensor) -> None:
        """Add the mean loss of so many tokens."""
        self.total += loss * tokens
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Return the mean, a scalar."""
        return self.total / self.tokens


class _Perplexity(_MeanLoss):
    """Exponential of the mean loss a token."""

    def compute(self) -> Tensor:
        """Return the perplexity, a scalar."""
        return super().compute().exp()


@dataclass(frozen=True, eq=False)
class LanguageTask(GroupedTask):
    """A task whose model writes text. Its own head is used and stays frozen.

    Metrics: loss, the mean cross entropy a token in nats; perplexity; and those of `generate`.

    The attributes and errors of `DatasetTask` (rows with the same prompt stay in one split), and:

    Attributes:
        max_length: Tokens of a row at most, or of its prompt; longer ones are cut at their end.
        generate: Metrics of text that is generated for prompts when a training has ended: "exact_match",
            "rouge_l", "bleu", "chrf", "word_error_rate"; or by name, functions of the generated texts and
            the references that return a score, better when larger.
        generated_rows: Rows of a split that text is generated for, drawn by seed.
        new_tokens: Tokens that are generated for a row at most.
    """

    _: KW_ONLY
    max_length: int = 512
    generate: Sequence[str] | Mapping[str, TextMetric] = ()
    generated_rows: int = 64
    new_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_length", "generated_rows", "new_tokens"):
            check_whole(name, getattr(self, name), least=1)
        if not isinstance(self.generate, Mapping):
            check_choice("metric of generated text", TEXT_METRICS, *self._generated)

    def validate(self) -> None:
        """Raise ValueError for whatever is wrong with data or settings; functions are tried on a word."""
        super().validate()
        for name, function in self.generate.items() if isinstance(self.generate, Mapping) else ():
            try:
                found = float(function(["word"], ["word"]))
            except Exception as error:
                raise ValueError(
                    f"The metric {name!r} fails for the texts ['word'] and ['word']: "
                    f"{type(error).__name__}: {error}"
                ) from error
            if not math.isfinite(found):
                raise ValueError(f"The metric {name!r} of two equal texts is {found!r}, expected a number.")

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
        generated = (
            replace(Objective.score(name, at_end=True), direction=_DIRECTIONS[name in ERROR_RATES])
            for name in self._generated
        )
        return loss, perplexity, *generated

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The metrics, and how fast text is generated."""
        return *self.metrics, *GENERATION_SPEEDS.values()

    @abstractmethod
    def _predicted_labels(self, labels: Tensor) -> Tensor:
        """Return what the first logits of each row predict, of labels (rows, tokens)."""

    @abstractmethod
    def _learnt(self, data: Any, name: SplitName) -> NDArray[np.int64]:
        """Return the tokens of a split that are predicted."""

    @abstractmethod
    def _examples(self, data: Any, name: SplitName) -> tuple[Sequence[Any], Sequence[str]]:
        """Return what text is generated from, and what it is compared with, of each row."""

    def _ends(self, data: Any) -> Sequence[int]:
        """Return tokens that a text ends with, beside the model's own."""
        return ()

    def _inputs(
        self, model: nn.Module, data: Any, name: SplitName, examples: Sequence[Any]
    ) -> Mapping[str, Tensor]:
        """Return what a model is given of such examples of a split; here they are tokens."""
        return padded(model, data.tokenizer, examples)

    def example_batch(self, rows: int, length: int) -> Batch:
        """Return a batch of full rows; see `Task.example_batch`."""
        ids = torch.ones(rows, length, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": ids.clone(), LABELS: ids.clone()}

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean cross entropy of the learnt tokens, a scalar.

        Args:
            output: Has logits of shape (rows, tokens, vocabulary).
            batch: Has labels of shape (rows, tokens).
        """
        labels = self._predicted_labels(batch[LABELS])
        labels = functional.pad(labels, (0, output.logits.shape[1] - labels.shape[1]), value=IGNORED)
        return summed_cross_entropy(output.logits.flatten(0, 1), labels.flatten()) / self.weight(batch)

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the number of learnt tokens in a batch."""
        return (self._predicted_labels(batch[LABELS]) != IGNORED).sum().clamp(min=1)

    def metric_collection(self) -> MetricCollection:
        """Return loss and perplexity."""
        return MetricCollection({"loss": _MeanLoss(), "perplexity": _Perplexity()}, compute_groups=False)

    def update_metrics(
        self, metrics: MetricCollection, output: Any, batch: Mapping[str, Tensor], loss: Tensor
    ) -> None:
        """Add a batch to the metrics."""
        metrics.update(loss, self.weight(batch))

    def measure_at_end(self, model: nn.Module, data: Any, split: SplitName) -> dict[str, float]:
        """Return the metrics of generated text, by name."""
        if not self._generated:
            return {}
        examples, references = self._examples(data, split)
        generator = np.random.default_rng(self.seed)
        chosen = generator.permutation(len(examples))[: self.generated_rows]
        texts = generate_texts(
            model,
            data.tokenizer,
            [examples[index] for index in chosen],
            lambda rows: self._inputs(model, data, split, rows),
            new_tokens=self.new_tokens,
            batch_size=_GENERATION_BATCH,
            ends=self._ends(data),
        )
        expected = [references[index] for index in chosen]
        functions = self.generate if isinstance(self.generate, Mapping) else TEXT_METRICS
        return {name: float(functions[name](texts, expected)) for name in self._generated}

    def generate_tokens(self, model: nn.Module, data: Any, tokens: int) -> int:
        """Continue the first validation rows; see `Task.generate_tokens`."""
        examples = self._examples(data, "validation")[0][:_TIMED_ROWS]
        given = self._inputs(model, data, "validation", examples)
        found = new_ids(model, data.tokenizer, given, min_new_tokens=tokens, max_new_tokens=tokens)
        return found.numel()

    def trivial_score(self, metric: str, data: TaskData) -> float:
        """Return what predicting each token by its frequency in training scores; without a text, 0 or 1."""
        if self.metric(metric).at_end:
            return float(metric in ERROR_RATES)
        train, validation = (self._learnt(data, name) for name in SPLITS[:2])
        words = 1 + int(max(train.max(), validation.max()))
        counts = 1 + np.bincount(train, minlength=words)
        loss = -float(np.log(counts / counts.sum())[validation].mean())
        return loss if metric == "loss" else math.exp(loss)

    def best_score(self, metric: str) -> float:
        """Return the best value a metric can take."""
        return 0.0 if metric in ("loss", *ERROR_RATES) else 1.0

    def _settings(self) -> dict[str, str]:
        return {
            "generate": ", ".join(self._generated),
            "generated_rows": str(self.generated_rows) if self._generated else "",
            "new_tokens": str(self.new_tokens) if self._generated else "",
            "max_length": str(self.max_length),
        }
