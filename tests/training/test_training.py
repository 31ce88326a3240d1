"""Training settings, the schedule, and the Trainer around a candidate."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from autopeft.core.evaluation import VALIDATION_LOSS
from autopeft.core.objectives import Direction, Objective
from autopeft.tasks.batch import rows_key, rows_of
from autopeft.training.module import FineTuning
from autopeft.training.settings import Training
from autopeft.training.trainer import ResidentStrategy, build_trainer, quiet_lightning

DIRECTIONS: tuple[Direction, ...] = ("maximize", "minimize")


class Model(nn.Module):
    """Two classes from two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(inputs))


class Task:
    """Enough of a task for the module."""

    weights = torch.ones(2)

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(batch["inputs"])

    def loss(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(output.logits, batch["labels"], weight=self.weights)

    def weight(self, batch: dict[str, Tensor]) -> Tensor:
        return self.weights[batch["labels"]].sum()

    def metric_collection(self) -> MetricCollection:
        return MetricCollection({"accuracy": MulticlassAccuracy(2, average="micro")})

    def update_metrics(
        self, metrics: MetricCollection, output: Any, batch: dict[str, Tensor], loss: Tensor
    ) -> None:
        metrics.update(output.logits, batch["labels"])


def batches(count: int = 8) -> DataLoader[Any]:
    inputs = torch.randn(count * 4, 2)
    rows = [{"inputs": row, "labels": (row.sum() > 0).long()} for row in inputs]
    return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


def module(total_steps: int = 20, rate: float = 0.1) -> FineTuning:
    return FineTuning(
        Model(),
        Task(),  # type: ignore[arg-type]
        learning_rate=rate,
        weight_decay=0.0,
        warmup_share=0.2,
        total_steps=total_steps,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is a whole number from 1 up"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"accumulate": 0}, "accumulate is a whole number from 1 up"),
        ({"accumulate": 5}, "accumulate=5 does not cut batch_size=32 .* nearest number that does is 4"),
        ({"max_steps": -1}, "max_steps"),
        ({"patience": True}, "patience"),
        ({"warmup_share": 1.5}, r"share in \[0, 1\]"),
        ({"gradient_clip": 0}, "above 0"),
        ({"validate_every": 9}, "never be validated"),
        ({"device": "cpuu"}, "did you mean 'cpu'"),
        ({"precision": "bf16"}, "did you mean 'bf16-mixed'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_said() -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        Training(device="cuda")
    assert Training().resolved_device().type == "cpu"


def test_total_steps() -> None:
    assert Training(epochs=3).total_steps(10) == 30
    assert Training(epochs=3, max_steps=7).total_steps(10) == 7
    assert Training(accumulate=4).steps_per_epoch(10) == 3


def test_the_learning_rate_rises_and_falls() -> None:
    schedule = module().configure_optimizers()["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert schedule.get_last_lr()[0] == 0


def test_frozen_parameters_are_not_optimised() -> None:
    trained = module()
    trained.model.layer.weight.requires_grad_(False)  # type: ignore[union-attr]
    (group,) = trained.configure_optimizers()["optimizer"].param_groups
    assert [parameter.shape for parameter in group["params"]] == [torch.Size([2])]


def test_a_fit_learns_and_leaves_the_module_where_it_is() -> None:
    training = Training(epochs=4, device="cpu")
    trained = module(total_steps=32)
    with quiet_lightning():
        trainer = build_trainer(training, [], monitor=Objective.score("accuracy"))
        assert isinstance(trainer.strategy, ResidentStrategy)
        trainer.fit(trained, batches(), batches(2))
    assert trainer.global_step == 32
    assert float(trainer.callback_metrics["accuracy"]) > 0.8


class WeightedTask(Task):
    """The second class counts nine times."""

    weights = torch.tensor([1.0, 9.0])


@pytest.mark.parametrize("task", [Task(), WeightedTask()])
def test_the_validation_loss_is_that_of_all_rows_at_once(task: Task) -> None:
    trained = module()
    trained.task = task  # type: ignore[assignment]
    rows = next(iter(DataLoader(batches(5).dataset, batch_size=20)))
    parts = [{name: tensor[start : start + 8] for name, tensor in rows.items()} for start in (0, 8, 16)]
    with torch.no_grad():
        for _ in range(2):  # the second validation knows nothing of the first
            for index, part in enumerate(parts):
                trained.validation_step(part, index)
            found = trained.take_validated()
            assert set(found) == {"accuracy", VALIDATION_LOSS}
            expected = task.loss(trained(rows), rows)
            assert float(found[VALIDATION_LOSS]) == pytest.approx(float(expected))


def test_patience_stops_early_and_max_steps_bounds() -> None:
    training = Training(epochs=30, patience=1, device="cpu")
    with quiet_lightning():
        trainer = build_trainer(training, [], monitor=Objective.score("accuracy"))
        assert any(isinstance(callback, EarlyStopping) for callback in getattr(trainer, "callbacks", []))
        trainer.fit(module(rate=1e-9), batches(), batches(2))
        assert trainer.current_epoch < 30
        bounded = build_trainer(Training(max_steps=3, device="cpu"), [], monitor=Objective.score("accuracy"))
        bounded.fit(module(), batches(), batches(2))
    assert bounded.global_step == 3


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_early_stopping_waits_for_has_the_metrics_direction(direction: Direction) -> None:
    monitor = Objective(name="accuracy", direction=direction, unit="score", is_metric=True)
    trainer = build_trainer(Training(patience=2, device="cpu"), [], monitor=monitor)
    (stopping,) = (
        callback for callback in getattr(trainer, "callbacks", []) if isinstance(callback, EarlyStopping)
    )
    assert (stopping.monitor, stopping.patience) == ("accuracy", 2)
    assert stopping.mode == {"maximize": "max", "minimize": "min"}[direction]


def test_a_loss_that_falls_does_not_stop_a_training() -> None:
    training = Training(epochs=6, patience=1, device="cpu")
    torch.manual_seed(0)
    stopped = {}
    with quiet_lightning():
        for direction in DIRECTIONS:
            loss = Objective(name=VALIDATION_LOSS, direction=direction, unit="nats", is_metric=True)
            trainer = build_trainer(training, [], monitor=loss)
            trainer.fit(module(total_steps=48), batches(), batches(2))
            stopped[direction] = trainer.current_epoch
    assert stopped == {"minimize": 6, "maximize": 2}


def test_quiet_lightning_gives_the_level_back() -> None:
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    with quiet_lightning():
        assert logger.level == logging.WARNING
    assert logger.level == before


def test_metrics_that_are_used_again_forget_the_training_before() -> None:
    metrics = Task().metric_collection()
    metrics.update(torch.tensor([[0.0, 1.0]] * 3), torch.tensor([0, 0, 0]))  # of one that failed on the way
    again = FineTuning(
        Model(),
        Task(),  # type: ignore[arg-type]
        learning_rate=0.1,
        weight_decay=0.0,
        warmup_share=0.2,
        total_steps=20,
        metrics=metrics,
    )
    output = SimpleNamespace(logits=torch.tensor([[0.0, 1.0]]))
    again.add_validated(output, {"labels": torch.tensor([1])})
    assert again.take_validated()["accuracy"] == 1.0


def test_row_numbers_stay_on_the_cpu() -> None:
    part = {"inputs": torch.ones(1, 2), rows_key("train"): torch.tensor([3])}
    moved = module().transfer_batch_to_device([part, part], torch.device("meta"), 0)
    assert [(other["inputs"].device.type, rows_of(other)) for other in moved] == [
        ("meta", ("train", torch.tensor([3])))
    ] * 2
