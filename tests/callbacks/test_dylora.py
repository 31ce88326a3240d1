"""DyLoRA: which ranks are drawn, and that every truncation works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from autopeft.callbacks import (
    DyLoRA,
    find_lora_modules,
)
from tests.callbacks.lora_fits import (
    RANK,
    Classifier,
    Probe,
    batch_of,
    examples,
    fit,
    logits_of,
    lora,
    truncated_classifier,
)
from tests.conftest import ModelFactory


class Outputs(Probe):
    """Notes the drawn rank and the logits as they are in training."""

    def __init__(self, callback: DyLoRA) -> None:
        super().__init__()
        self.callback = callback

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Classifier)
        assert self.callback.drawn_rank is not None
        state = self.callback.truncated_state(self.callback.drawn_rank)
        self.notes.append((self.callback.drawn_rank, logits_of(pl_module), state))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_drawn_rank_trains_the_lora_of_that_rank(tiny_bert: ModelFactory, use_rslora: bool) -> None:
    options: dict[str, Any] = {"use_rslora": use_rslora, "lora_alpha": 5}
    classifier = lora(tiny_bert(), RANK, **options)
    callback = DyLoRA(seed=3)
    outputs = Outputs(callback)
    fit(classifier, callback, outputs, steps=8)
    assert {rank for rank, _, _ in outputs.notes} == {1, 2, 3, 4}
    for rank, logits, state in outputs.notes:
        ranks = dict.fromkeys(find_lora_modules(classifier), rank)
        truncated = truncated_classifier(tiny_bert(), ranks, state, **options)
        torch.testing.assert_close(logits_of(truncated), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_truncation_works(tiny_llama: ModelFactory) -> None:
    classifier = lora(tiny_llama(), RANK, drawn=False)
    batch = batch_of(examples())
    start = float(classifier.loss(batch).detach())
    callback = DyLoRA(seed=1)
    fit(classifier, callback, steps=200)
    losses = []
    for rank in range(1, RANK + 1):
        ranks = dict.fromkeys(find_lora_modules(classifier), rank)
        truncated = truncated_classifier(tiny_llama(), ranks, callback.truncated_state(rank))
        losses.append(float(nn.functional.cross_entropy(logits_of(truncated), batch["labels"])))
    assert max(losses) < 0.7 * start
    assert max(losses) - min(losses) < 0.05
    assert set(callback.ranks().values()) == {RANK}


def test_draws_are_seeded_bounded_and_one_an_optimizer_step(tiny_llama: ModelFactory) -> None:
    def drawn(seed: int, accumulate: int = 1) -> list[int | None]:
        callback = DyLoRA(minimum_rank=2, maximum_rank=3, seed=seed)
        probe = Probe(lambda: callback.drawn_rank)
        fit(lora(tiny_llama(), RANK), callback, probe, steps=12, accumulate_grad_batches=accumulate)
        return probe.notes

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert set(drawn(1)) == {2, 3}
    assert drawn(1, accumulate=2)[::2] == drawn(1, accumulate=2)[1::2] == drawn(1)


def test_ranks_that_cannot_be_drawn_are_refused(tiny_llama: ModelFactory) -> None:
    with pytest.raises(ValueError, match="Ranks from 1 to 5 cannot be drawn: the LoRA layers have 4"):
        fit(lora(tiny_llama(), RANK), DyLoRA(maximum_rank=5), steps=1)
    with pytest.raises(ValueError, match="maximum_rank must be a finite number of at least 3"):
        DyLoRA(minimum_rank=3, maximum_rank=2)
    with pytest.raises(ValueError, match="rank must be a finite number of at least 1"):
        DyLoRA().truncated_state(0)
