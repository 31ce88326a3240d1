"""Each callback in a plain Trainer on a tiny module of somebody else's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from autopeft.callbacks import (
    BestWeights,
    DivergenceError,
    LearningCurve,
    PeakMemory,
    StopOnDivergence,
    Throughput,
)


class Scripted(LightningModule):
    """A module whose losses and scores are given; its weight counts the steps."""

    def __init__(self, losses: Sequence[float] = (), scores: Sequence[float] = (0.1,)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.losses = list(losses)
        self.scores = list(scores)

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        given = self.losses[self.global_step] if self.losses else 1.0
        return given + self.weight.sum() * 0

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        with torch.no_grad():
            self.weight.add_(1)

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        return None

    def on_validation_epoch_end(self) -> None:
        self.log("score", self.scores[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.1)


def fit(module: LightningModule, *callbacks: Callback, epochs: int = 1, accelerator: str = "cpu") -> None:
    trainer = Trainer(
        accelerator=accelerator,
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.zeros(6, 3)
    trainer.fit(module, DataLoader(data, batch_size=2), DataLoader(data, batch_size=6))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "scores", "best", "weight"),
    [("max", (0.2, 0.9, 0.9, 0.5), 0.9, 6.0), ("min", (0.2, 0.9, 0.1, 0.5), 0.1, 9.0)],
)
def test_best_weights_come_back(mode: Any, scores: tuple[float, ...], best: float, weight: float) -> None:
    callback = BestWeights("score", mode)
    module = Scripted(scores=scores)
    assert math.isnan(callback.best)
    fit(module, callback, epochs=4)
    assert callback.best == pytest.approx(best)
    assert callback.metrics["score"] == pytest.approx(best)
    assert float(module.weight.detach()) == weight


def test_a_metric_that_is_not_logged_is_said() -> None:
    with pytest.raises(ValueError, match=r"No metric 'accuracy' was logged; logged were: score"):
        fit(Scripted(), BestWeights("accuracy"))


@pytest.mark.parametrize("loss", [math.nan, math.inf, 2e3])
def test_divergence_stops(loss: float) -> None:
    with pytest.raises(DivergenceError, match=r"training loss was .* at step 2"):
        fit(Scripted(losses=[1.0, loss, 1.0]), StopOnDivergence())


def test_divergence_is_looked_for_as_often_as_asked() -> None:
    module = Scripted(losses=[1.0, math.nan, 1.0])
    fit(module, StopOnDivergence(every_n_steps=3))
    with pytest.raises(ValueError, match="every_n_steps"):
        StopOnDivergence(every_n_steps=0)


def test_broken_weights_are_divergence() -> None:
    module = Scripted()
    with torch.no_grad():
        module.weight.fill_(math.nan)
    with pytest.raises(DivergenceError, match="weight is not finite"):
        fit(module, StopOnDivergence(every_n_steps=100))


def test_learning_curves_are_recorded() -> None:
    curve = LearningCurve()
    fit(Scripted(losses=[3.0, 2.0, 1.0, 1.0, 1.0, 0.4], scores=(0.5, 0.7)), curve, epochs=2)
    assert [(name, step) for name, step, _ in curve.points] == [
        ("training_loss", 3),
        ("score", 3),
        ("training_loss", 6),
        ("score", 6),
    ]
    assert [value for *_, value in curve.points] == pytest.approx([2.0, 0.5, 0.8, 0.7])


def test_throughput_counts() -> None:
    throughput = Throughput()
    assert throughput.examples_per_second == 0
    fit(Scripted(scores=(0.1, 0.2)), throughput, epochs=2)
    assert throughput.steps == 6
    assert throughput.training_seconds > 0
    assert throughput.examples_per_second > 0


def test_peak_memory_is_unknown_on_the_cpu() -> None:
    memory = PeakMemory()
    fit(Scripted(), memory)
    assert memory.peak_bytes is None


@pytest.mark.gpu
def test_peak_memory_on_cuda() -> None:
    memory = PeakMemory()
    fit(Scripted(), memory, accelerator="cuda")
    assert memory.peak_bytes is not None
    assert memory.peak_bytes > 0
