"""Preference optimisation: to prefer the chosen of two replies, by DPO."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, Value
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from autopeft.core.errors import check_numbers, check_whole
from autopeft.core.objectives import Objective
from autopeft.methods import adapters_off
from autopeft.models.head_spec import HeadSpec
from autopeft.tasks.base import Batch, SplitName, TaskData
from autopeft.tasks.batch import IGNORED, LABELS, model_inputs
from autopeft.tasks.dataset_loading import check_columns
from autopeft.tasks.dataset_task import GroupedTask
from autopeft.tasks.language_rows import RowReader, TokenRow, is_chat
from autopeft.tasks.later_tokens import check_reads_no_later_tokens
from autopeft.tasks.loader_data import LoaderData

_logger = logging.getLogger(__name__)
_REPLIES = ("chosen", "rejected")
_Pair = tuple[TokenRow, TokenRow]


@dataclass(frozen=True, eq=False)
class PreferenceOptimization(GroupedTask):
    """Teach a language model to prefer the chosen of two replies.

    The loss is that of DPO (Rafailov et al., "Direct Preference Optimization", 2023). Its reference is the
    same backbone with the adapters turned off, so that the weights are in memory once. As in TRL, the
    backbone's dropout is off in both passes; adapters keep what a configuration gives them.

    Columns: `chosen` and `rejected`, and `prompt` unless they begin with it. All are texts, or lists of
    messages, which the tokenizer's chat template writes; the prompt of these may also be a text, the user's,
    whether the chats begin with it or not. Pairs of equal replies, also once they are cut, are left out.
    Metrics: the share of pairs whose chosen reply gained more over the reference than the rejected one (ties
    count half), and the loss.

    The attributes and errors of `DatasetTask` (rows with the same prompt stay in one split: where there is no
    column of prompts, with the same words or messages in front of both replies. Of texts that is a guess, as
    replies may begin alike too; with a column of prompts it is exact), and:

    Attributes:
        beta: How strongly the model is held to the reference.
        max_length: Tokens of a prompt with a reply at most; longer ones are cut at their end.
    """

    recognised_by: ClassVar[frozenset[str]] = frozenset(_REPLIES)
    trains_with_dropout: ClassVar[bool] = False

    _: KW_ONLY
    beta: float = 0.1
    max_length: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(above=0, beta=self.beta)
        check_whole("max_length", self.max_length, least=1)

    @property
    def metrics(self) -> tuple[Objective, ...]:
        """The metrics, the default one first."""
        loss = Objective(name="loss", direction="minimize", unit="nats", is_metric=True)
        return Objective.score("accuracy"), loss

    @property
    def head(self) -> HeadSpec:
        """The language model's own, which is not trained."""
        return HeadSpec(auto_class=AutoModelForCausalLM, is_trained=False)

    def _usable(self, split: Dataset, name: str) -> Sequence[int]:
        check_columns(split, name, *_REPLIES)
        return super()._usable(split, name)

    @cached_property
    def _keys(self) -> list[str]:
        """What tells examples of the training split apart: rows of one prompt are one example."""
        rows = enumerate(self._sources["train"])
        return [_key(*self._columns_of(row, f"Row {number} of the train split")) for number, row in rows]

    @cached_property
    def _is_chat(self) -> bool:
        return not isinstance(self._sources["train"].features["chosen"], Value)

    def reader(self, tokenizer: PreTrainedTokenizerBase) -> RowReader:
        """Return what reads a prompt with a reply.

        Raises:
            ValueError: The tokenizer lacks what chats need.
        """
        return RowReader(tokenizer, "messages" if self._is_chat else "prompt/completion")

    def data(
        self, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, seed: int, cache: Path | None = None
    ) -> LoaderData:
        """Return the tokenised splits; see `Task.data`. A batch has the shape (pairs, 2, tokens).

        Raises:
            ValueError: A row has no two replies of one kind, the tokenizer lacks what they need, or no two
                different replies are left of a split after rows were cut.
        """
        reader = self.reader(tokenizer)
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        collate = partial(_padded, padding=padding or 0)

        @lru_cache
        def loader(name: SplitName) -> DataLoader[Any]:
            pairs: Any = self._pairs(reader, name, cache)
            return DataLoader(pairs, batch_size, collate_fn=collate)

        loader("validation")  # what is wrong with its rows is said now
        return LoaderData(loader, seed=seed)

    def _pairs(self, reader: RowReader, name: SplitName, cache: Path | None) -> list[_Pair]:
        source, numbers = self._drawn(name)
        places = [f"Row {number} of the {source} split" for number in numbers]
        rows = zip(self._sources[source].select(numbers), places, strict=True)
        replies = [reply for row, place in rows for reply in self._replies(row, place)]
        each = reader.read_all(replies, [place for place in places for _ in _REPLIES], cache)
        read = list(zip(each[::2], each[1::2], strict=True))
        pairs = [(chosen.cut(self.max_length), rejected.cut(self.max_length)) for chosen, rejected in read]
        kept = [
            (chosen, rejected)
            for chosen, rejected in pairs
            if chosen.is_learnt and rejected.is_learnt and chosen.tokens != rejected.tokens
        ]
        if not kept:
            longest = max(len(row.tokens) for pair in read for row in pair)
            raise ValueError(
                f"No pair of the {name} split has two different replies within "
                f"max_length={self.max_length} tokens (the longest with its prompt has {longest}): raise "
                "max_length, or shorten the prompts."
            )
        shortened = sum(pair != whole for pair, whole in zip(pairs, read, strict=True))
        if shortened or len(kept) < len(read):
            _logger.warning(
                f"{shortened:,} of the {len(read):,} pairs of the {name} split are cut at {self.max_length} "
                f"tokens; {len(read) - len(kept):,}, cut or not, have no two different replies and are left "
                "out."
            )
        return kept

    def _replies(self, row: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
        """Return the prompt with either reply."""
        prompt, *replies = self._columns_of(row, place)
        if self._is_chat:
            return [{"messages": _with_prompt(prompt, reply)} for reply in replies]
        return [{"prompt": prompt, "completion": reply} for reply in replies]

    def _columns_of(self, row: Mapping[str, Any], place: str) -> tuple[Any, Any, Any]:
        """Return a row's prompt, which may be empty, and its replies: all of them texts, or messages."""
        for column in ("prompt", *_REPLIES):
            value, is_prompt = row.get(column), column == "prompt"
            may_be_text = is_prompt or not self._is_chat
            fits = (may_be_text and isinstance(value, str)) or (self._is_chat and is_chat(value))
            if not fits and not (is_prompt and value is None):
                expected = ["a text"] * may_be_text + ["a list of messages"] * self._is_chat
                raise ValueError(
                    f"{place} has {str(value)[:80]!r} in {column!r}, expected {' or '.join(expected)}."
                )
        prompt = row.get("prompt") or ([] if self._is_chat else "")
        if self._is_chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return prompt, row["chosen"], row["rejected"]

    def check_model(self, model: Any, data: TaskData) -> None:
        """Raise ValueError where rows are too long for a model, or it reads later tokens."""
        super().check_model(model, data)
        batch = next(iter(data.val_dataloader()))
        length = int(batch["attention_mask"][0, 0].sum())
        tokens = batch["input_ids"][0, 0, :length].tolist()

        def logits(row: Batch) -> Tensor:
            inputs = {name: tensor.to(model.device) for name, tensor in model_inputs(row).items()}
            found: Tensor = model(**inputs, use_cache=False).logits
            return found.float().cpu()

        check_reads_no_later_tokens(type(model).__name__, logits, tokens)

    def example_batch(self, rows: int, length: int) -> Batch:
        """Return a batch of full pairs; see `Task.example_batch`."""
        ids = torch.ones(rows, 2, length, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": ids.clone(), LABELS: ids.clone()}

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        """Return a model's output for a batch, with logits of shape (pairs, 2, tokens, vocabulary).

        Its `margins`, of shape (pairs,), are beta times what the chosen reply gained over the rejected one. A
        reply gains the logarithm of how much likelier it is than without adapters.
        """
        inputs = {name: values.flatten(0, 1) for name, values in model_inputs(batch).items()}
        output = model(**inputs, use_cache=False)
        with torch.no_grad(), adapters_off(model):
            reference = _log_likelihoods(model(**inputs, use_cache=False).logits, batch[LABELS])
        gains = _log_likelihoods(output.logits, batch[LABELS]) - reference
        output.margins = self.beta * (gains[:, 0] - gains[:, 1])
        output.logits = output.logits.unflatten(0, (-1, len(_REPLIES)))
        return output

    def mask(self, batch: Mapping[str, Tensor], *, is_decoder: bool = False) -> Tensor | None:
        """Return which positions count, of shape (replies, tokens)."""
        return batch["attention_mask"].flatten(0, 1)

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss of the pairs, a scalar."""
        return -functional.logsigmoid(output.margins).mean()

    def metric_collection(self) -> MetricCollection:
        """Return accuracy and loss."""
        return MetricCollection({name: MeanMetric() for name in ("accuracy", "loss")}, compute_groups=False)

    def update_metrics(
        self, metrics: MetricCollection, output: Any, batch: Mapping[str, Tensor], loss: Tensor
    ) -> None:
        """Add a batch to the metrics."""
        metrics["accuracy"].update((output.margins.sign() + 1) / 2)
        metrics["loss"].update(-functional.logsigmoid(output.margins))

    def trivial_score(self, metric: str, data: Any) -> float:
        """Return what the reference scores."""
        return 0.5 if self.metric(metric).name == "accuracy" else math.log(2)

    def _settings(self) -> dict[str, str]:
        return {"beta": str(self.beta), "max_length": str(self.max_length)}


def _key(prompt: Any, chosen: Any, rejected: Any) -> str:
    """Return a row's prompt as text; where it has none, what both replies begin with: words, or messages."""
    words = (reply.split() if isinstance(reply, str) else reply for reply in (chosen, rejected))
    common = takewhile(lambda both: both[0] == both[1], zip(*words, strict=False))
    return str(prompt or [left for left, _ in common] or chosen)


def _with_prompt(prompt: list[Any], reply: list[Any]) -> list[Any]:
    """Return a reply with its prompt in front, where it does not begin with it.

    A system's message of either comes first, that of the reply where both have one.
    """
    (system, asked), (own_system, said) = map(_system_apart, (prompt, reply))
    both = asked, said[: len(asked)]
    expected, found = ([(message["role"], message["content"]) for message in chat] for chat in both)
    return [*(own_system or system), *([] if found == expected else asked), *said]


def _system_apart(chat: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return the system's message that a chat begins with, if it does, and the rest."""
    count = sum(message["role"] == "system" for message in chat[:1])
    return chat[:count], chat[count:]


def _padded(pairs: Sequence[_Pair], padding: int) -> Batch:
    """Return pairs as a batch, with padding behind each reply."""
    length = max(len(row.tokens) for pair in pairs for row in pair)
    empty = {"input_ids": padding, "attention_mask": 0, LABELS: IGNORED}
    batch = {name: torch.full((len(pairs), len(_REPLIES), length), value) for name, value in empty.items()}
    for index, pair in enumerate(pairs):
        for place, row in enumerate(pair):
            batch["input_ids"][index, place, : len(row.tokens)] = torch.tensor(row.tokens)
            batch["attention_mask"][index, place, : len(row.tokens)] = 1
            batch[LABELS][index, place, : len(row.tokens)] = torch.tensor(row.labels)
    return batch


def _log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logarithm of each reply's likelihood, of shape (pairs, 2).

    Args:
        logits: Of shape (replies, tokens, vocabulary).
        labels: Of shape (pairs, 2, tokens).
    """
    losses = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[..., 1:].flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    return -losses.view(*labels.shape[:2], -1).sum(-1)
