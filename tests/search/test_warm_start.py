"""Trials that inherit from the largest LoRA: alone, in packs, paused, resumed, replicated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from autopeft import ParetoFront, Search, SuccessiveHalving
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Cost, CurvePoint, Evaluation, TrialRecord
from autopeft.core.jobs import New, Resume
from autopeft.core.objectives import Objective
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.largest_lora import LargestLora
from autopeft.evaluation.packing.trainer import PackedTrainer
from autopeft.evaluation.run import Trained
from autopeft.evaluation.trial_runner import TrialRunner
from autopeft.evaluation.warm_start import WarmStarts
from autopeft.methods import count_parameters
from autopeft.optimization.learning_curve_forecast import Forecast
from autopeft.search_loop import TrialListener
from autopeft.search_spaces import PerLayer, Uniform
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.training.settings import Training
from autopeft.training.training_checkpoint import TrainingCheckpoints
from autopeft.yaml_config import build_config
from tests.learnable import outcomes, tiny_evaluator, tiny_search
from tests.packed import assert_alike, packing_evaluator
from tests.tiny_models import everywhere

SPACE = PerLayer(
    methods=("lora",), sizes={"rank": (1, 4)}, roles=("query", "ffn_up"), learning_rate=(1e-3, 3e-2)
)
TRAINING = Training(epochs=4, batch_size=8, device="cpu", precision="32-true")


def warm_search(folder: Path, **settings: Any) -> Search:
    defaults = {
        "space": SPACE,
        "objectives": ("accuracy", "trainable_parameters"),
        "training": TRAINING,
        "warm_start": True,
        "score_check": False,
    }
    return tiny_search(folder, **(defaults | settings))


def largest_of(evaluator: Evaluator) -> LargestLora:
    configuration = everywhere(evaluator.backbone, "lora", 4).replace(learning_rate=1e-2)
    trained = evaluator.train(configuration)
    return LargestLora(configuration=configuration, tensors=state_of(trained), cost=trained.evaluation.cost)


def of_top_block(largest: LargestLora, rate: float) -> Configuration:
    whole = largest.configuration.adapters
    top = max(site.block for site in whole)
    return Configuration({site: whole[site] for site in whole if site.block == top}, learning_rate=rate)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=tolerance)


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def state_of(trained: Trained) -> Mapping[str, Tensor]:
    assert trained.state is not None
    return trained.state


def test_a_training_is_initialised_from_the_tensors_it_is_given() -> None:
    evaluator = tiny_evaluator()
    largest = largest_of(evaluator)
    still = of_top_block(largest, rate=1e-9)
    weights = largest.state(still)
    trained = evaluator.train(still, initial_weights=weights)
    assert trained.evaluation.warm_start
    assert_same(state_of(trained), weights, 1e-6)
    cold = evaluator.train(still)
    assert not cold.evaluation.warm_start
    assert distance(state_of(cold), weights) > 1e-3
    assert Evaluation.from_dict(trained.evaluation.to_dict()) == trained.evaluation
    moved = evaluator.train(still.replace(learning_rate=1e-2), initial_weights=weights)
    assert distance(state_of(moved), weights) > 1e-3


def test_tensors_of_another_configuration_are_a_failure_that_says_so() -> None:
    evaluator = tiny_evaluator()
    largest = largest_of(evaluator)
    others = largest.state(of_top_block(largest, 1e-2))
    failed = evaluator.train(largest.configuration, initial_weights=others).evaluation
    assert failed.status == "failed"
    assert not failed.warm_start
    assert "do not belong to this configuration" in str(failed.reason)
    assert evaluator.backbone.attached is None


@pytest.mark.slow
def test_what_pauses_goes_on_as_if_it_had_not() -> None:
    evaluator = tiny_evaluator(training=TRAINING, rungs=(0.5,))
    largest = largest_of(evaluator)
    chosen = of_top_block(largest, 1e-2)
    weights = largest.state(chosen)
    paused = evaluator.train(chosen, rung=0, initial_weights=weights)
    assert paused.evaluation.warm_start
    assert paused.paused is not None
    whole = evaluator.train(chosen, paused=paused.paused)
    assert whole.evaluation.warm_start
    assert_same(state_of(whole), state_of(evaluator.train(chosen, initial_weights=weights)))


@pytest.mark.parametrize("rung", [None, 0])
@pytest.mark.slow
def test_a_pack_is_initialised_from_them_as_each_trial_would_be_alone(rung: int | None) -> None:
    evaluator = packing_evaluator(training=TRAINING, rungs=(0.5,))
    largest = largest_of(evaluator)
    chosen = [of_top_block(largest, rate) for rate in (1e-2, 3e-3)]
    weights = [largest.state(chosen[0]), None]
    packed = PackedTrainer(evaluator).train(chosen, 5, rung=rung, initial_weights=weights)
    assert [trained.evaluation.warm_start for trained in packed] == [True, False]
    for configuration, own, trained in zip(chosen, weights, packed, strict=True):
        alone = evaluator.train(configuration, 5, rung=rung, initial_weights=own)
        assert_alike(trained, alone)


def warm_starts(records: list[TrialRecord]) -> list[bool]:
    return [record.evaluation.warm_start for record in records]


@pytest.mark.slow
def test_trials_but_baselines_are_initialised_from_the_largest_lora(tmp_path: Path) -> None:
    search = warm_search(tmp_path)
    records = list(search.run(trials=10, progress=False).records)
    assert warm_starts(records) == [record.baseline is None for record in records]
    assert any(warm_starts(records))
    assert list(search.front().to_frame(all_trials=True)["warm_start"]) == warm_starts(records)
    warm_alone = [record for record in records if record.evaluation.warm_start]
    shown = repr(ParetoFront(warm_alone, search.objectives, search.open().axes, search.export))
    assert "initialised from" in shown
    assert "the largest LoRA" in shown
    assert warm_starts_of(search).cost.steps == search.open().evaluator.plan.total_steps
    assert "LoRA trials are initialised from the largest LoRA" in search.describe()
    cold = warm_search(tmp_path, name="cold", warm_start=False).run(trials=10, progress=False)
    assert not any(warm_starts(list(cold.records)))
    assert outcomes(cold.records) != outcomes(records)


def warm_starts_of(search: Search) -> WarmStarts:
    found = search.open().warm_starts(search.warm_start, search.folder, trains=False)
    assert found is not None
    return found


def largest_configuration(search: Search) -> Configuration:
    largest = warm_starts_of(search).largest()
    assert largest is not None
    return largest.configuration


@pytest.mark.slow
def test_the_largest_lora_is_paid_for_out_of_the_budget(tmp_path: Path) -> None:
    search = warm_search(tmp_path, baselines=False)
    records = search.run(trials=6, progress=False).records
    spent = sum(record.evaluation.cost.cpu_seconds for record in records)
    largest_seconds = warm_starts_of(search).cost.cpu_seconds
    bounded = warm_search(tmp_path, name="bounded", baselines=False)
    short = bounded.run(cpu_seconds=spent / 6 + largest_seconds / 2, progress=False)
    assert len(short.records) < 6


@pytest.mark.slow
def test_what_has_other_methods_starts_from_random_weights(tmp_path: Path) -> None:
    space = Uniform(methods=("lora", "series"), sizes={"rank": (1, 4), "bottleneck width": (1, 4)})
    search = warm_search(tmp_path, space=space, baselines=False)
    records = list(search.run(trials=8, progress=False).records)
    covered = [set(record.evaluation.configuration.methods) <= {"lora"} for record in records]
    assert warm_starts(records) == covered
    assert len(set(covered)) == 2


def test_a_space_without_lora_has_no_warm_starts(tmp_path: Path) -> None:
    search = warm_search(tmp_path, space=Uniform(methods=("series",), sizes={"bottleneck width": (1, 4)}))
    records = list(search.run(trials=3, progress=False).records)
    assert warm_starts(records) == [False] * 3
    found = WarmStarts(search.open().evaluator, search.open().space, tmp_path / "none")
    assert found.largest() is None
    assert found.obstacle == "the space has no LoRA on a linear layer"
    assert found.cost == Cost()


@pytest.mark.slow
def test_trials_inherit_also_where_the_largest_lora_breaks_a_bound(tmp_path: Path) -> None:
    search = warm_search(tmp_path, constraints={"trainable_parameters": 600}, baselines=False)
    records = list(search.run(trials=6, progress=False).records)
    kept = [record.evaluation.status == "complete" for record in records]
    assert any(kept)
    assert warm_starts(records) == kept
    costs = search.open().evaluator.costs(largest_configuration(search))
    assert costs["trainable_parameters"] > 600


def test_warm_starts_can_be_asked_for_in_a_file() -> None:
    settings = {
        "backbone": "model",
        "task": {"type": "TextClassification", "dataset": "data.csv", "text": "question"},
        "space": {"type": "PerLayer", "methods": ["lora"]},
        "warm_start": True,
    }
    assert build_config(settings).search.warm_start is True
    with pytest.raises(ValueError, match="warm_start"):
        build_config(settings | {"warm_start": {"trainings": 2}})


@pytest.mark.slow
def test_a_search_that_is_resumed_inherits_from_the_same_weights(tmp_path: Path) -> None:
    def stop_at(count: int) -> TrialListener:
        def stop(record: TrialRecord, front: ParetoFront) -> None:
            if len(front.records) == count:
                raise KeyboardInterrupt

        return stop

    settings = {"seeds": 2, "halving": SuccessiveHalving(rungs=(0.5,))}
    whole = list(warm_search(tmp_path, name="whole", **settings).run(trials=12, progress=False).records)
    assert any(record.evaluation.warm_start and record.evaluation.trainings == 2 for record in whole)
    for count in (5, 9):
        search = warm_search(tmp_path, name="parts", **settings)
        search.run(trials=12, progress=False, callbacks=[stop_at(count)])
    path = tmp_path / "parts" / "warm_starts" / "largest-0.safetensors"
    path.unlink(missing_ok=True)  # is trained again as before
    search = warm_search(tmp_path, name="parts", **settings)
    search.run(trials=12, progress=False, callbacks=[stop_at(11)])
    written = path.stat().st_mtime_ns
    parts = list(warm_search(tmp_path, name="parts", **settings).run(trials=12, progress=False).records)
    assert path.stat().st_mtime_ns == written
    assert outcomes(parts) == outcomes(whole)
    assert warm_starts(parts) == warm_starts(whole)
    with pytest.raises(ValueError, match="warm_start"):
        warm_search(tmp_path, name="parts", warm_start=False, **settings).run(trials=14)


def warm_runner(folder: Path) -> tuple[TrialRunner, WarmStarts]:
    evaluator = tiny_evaluator(
        training=TRAINING, rungs=(0.5,), objectives=("accuracy", "trainable_parameters")
    )
    weights = WarmStarts(evaluator, SPACE, folder / "warm_starts")
    return runner_of(evaluator, folder, weights), weights


def runner_of(evaluator: Evaluator, folder: Path, weights: WarmStarts) -> TrialRunner:
    checkpoints, paused = AdapterCheckpoints(folder / "adapters"), TrainingCheckpoints(folder / "paused")
    return TrialRunner(evaluator, checkpoints, paused, seed=0, warm_starts=weights)


def chosen_of(weights: WarmStarts, rate: float = 1e-2) -> Configuration:
    largest = weights.largest()
    assert largest is not None
    return of_top_block(largest, rate)


def test_a_paused_trial_whose_file_is_gone_starts_anew_from_the_same_weights(tmp_path: Path) -> None:
    runner, weights = warm_runner(tmp_path)
    paused = runner.run(New(number=3, configuration=chosen_of(weights), rung=0))
    assert paused.evaluation.status == "paused"
    expected = runner.run(Resume(record=paused, rung=1)).evaluation
    for path in (tmp_path / "paused").iterdir():
        path.unlink()
    found = runner.run(Resume(record=paused, rung=1)).evaluation
    assert found.warm_start
    assert found.values["validation_loss"] == expected.values["validation_loss"]


def test_a_training_left_behind_by_a_killed_process_goes_on(tmp_path: Path) -> None:
    runner, weights = warm_runner(tmp_path)
    configuration = chosen_of(weights)
    job = New(number=3, configuration=configuration, rung=0)
    first = runner.run(job).evaluation  # and was never recorded
    again = runner.run(job).evaluation
    assert again.warm_start
    assert again.curves == first.curves
    assert again.cost == first.cost  # nothing was trained a second time


def test_what_a_failed_attempt_took_is_counted_once(tmp_path: Path) -> None:
    runner, weights = warm_runner(tmp_path)
    took = Cost(cpu_seconds=1000.0)
    failed = Evaluation(configuration=chosen_of(weights), status="failed", reason="a mistake", cost=took)
    job = New(
        number=3, configuration=chosen_of(weights), rung=0, failed=TrialRecord(number=3, evaluation=failed)
    )
    assert runner.run(job).evaluation.cost.cpu_seconds > 1000  # and was never recorded
    assert runner.run(job).evaluation.cost.cpu_seconds < 2000


@pytest.mark.slow
def test_what_failed_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fail(*_: Any, **__: Any) -> None:
        tried.append(1)
        raise MemoryError("no room")

    monkeypatch.setattr(LargestLora, "save", fail)
    whole = warm_search(tmp_path, name="whole").run(trials=10, progress=False)
    assert not any(warm_starts(list(whole.records)))
    assert len(tried) == 1

    def stop(record: TrialRecord, front: ParetoFront) -> None:
        if len(front.records) == 8:
            raise KeyboardInterrupt

    warm_search(tmp_path, name="parts").run(trials=10, progress=False, callbacks=[stop])
    assert len(tried) == 2
    monkeypatch.undo()  # there is room now, but trials of one search are to be of one kind
    search = warm_search(tmp_path, name="parts")
    parts = search.run(trials=10, progress=False)
    assert outcomes(parts.records) == outcomes(whole.records)
    found = warm_starts_of(search)
    assert found.obstacle == "the training of the largest LoRA failed: out of memory: no room"
    assert found.cost.cpu_seconds > 0
    assert not (search.folder / "warm_starts" / "largest-0.safetensors").exists()


@pytest.mark.slow
def test_training_again_for_an_export_starts_from_the_same_weights(tmp_path: Path) -> None:
    search = warm_search(tmp_path, baselines=False)
    front = search.run(trials=4, progress=False)
    number = next(point.number for point in front if len(point.configuration))
    assert front.trial(number).record.evaluation.warm_start
    search.export(number, tmp_path / "kept")
    search.export(number, tmp_path / "again", retrain=True)
    kept, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("kept", "again"))
    assert_same(kept, again)
    card = (tmp_path / "again" / "README.md").read_text()
    assert "the largest LoRA" in card
    cold = warm_search(tmp_path, warm_start=False, baselines=False, name=search.name)
    with pytest.raises(ValueError, match="give the search warm_start=True"):
        cold.export(number, tmp_path / "cold", retrain=True)


def test_what_warm_trainings_gain_is_not_expected_of_cold_ones(tmp_path: Path) -> None:
    search = warm_search(tmp_path)
    backbone = search.open().backbone
    (point, *_) = (baseline.configuration for baseline in SPACE.baselines(backbone))

    def evaluation(early: float, late: float, *, warm: bool, whole: bool = True) -> Evaluation:
        values = {"accuracy": late, "trainable_parameters": float(count_parameters(backbone, point))}
        return Evaluation(
            configuration=point,
            status="complete" if whole else "paused",
            reason=None if whole else "paused",
            values={**values, "training_seconds": 1.0},
            curves=tuple(
                CurvePoint(metric="accuracy", step=step, value=value)
                for step, value in ((1, early), (2, late))
            ),
            warm_start=warm,
        )

    cold = [evaluation(0.2, 0.8, warm=False)] * 4
    warm = [evaluation(0.7, 0.8, warm=True)] * 4
    made = Forecast([*cold, *warm], search.objectives, search.open().axes, Objective.score("accuracy"))
    expected, _ = made.beyond(evaluation(0.7, 0.7, warm=True, whole=False), 1, 0.7)
    assert expected == pytest.approx(0.8)
    expected, _ = made.beyond(evaluation(0.2, 0.2, warm=False, whole=False), 1, 0.2)
    assert expected == pytest.approx(0.8)
    first = Forecast(cold, search.objectives, search.open().axes, Objective.score("accuracy"))
    assert first.beyond(evaluation(0.7, 0.7, warm=True, whole=False), 1, 0.7) == (0.7, None)
