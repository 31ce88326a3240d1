"""Trials that begin from an elastic adapter's weights: alone, in packs, paused, resumed, trained again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from autopeft import Elastic, ParetoFront, Search, SuccessiveHalving
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import CurvePoint, Evaluation, TrialRecord
from autopeft.core.seeding import training_seed
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.packing.trainer import PackedTrainer
from autopeft.evaluation.run import Trained
from autopeft.evaluation.supernet.supernet import ElasticAdapter
from autopeft.evaluation.supernet.warm_start import ElasticError, ElasticWeights, first_weights
from autopeft.methods import count_parameters
from autopeft.optimization.learning_curve_forecast import Forecast
from autopeft.search_spaces import PerLayer, Uniform
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.training.settings import Training
from autopeft.training.training_checkpoint import TrainingCheckpoints
from autopeft.trial_runner import TrialRunner
from tests.learnable import outcomes, tiny_evaluator, tiny_search
from tests.packed import assert_alike, packing_evaluator
from tests.tiny_models import everywhere

SPACE = PerLayer(methods=("lora",), ranks=(1, 4), roles=("query", "ffn_up"), learning_rate=(1e-3, 3e-2))
TRAINING = Training(epochs=4, batch_size=8, device="cpu", precision="32-true")
ELASTIC = Elastic(candidates=12, share=0.5, warm_start=True)
WEIGHTS_ALONE = Elastic(candidates=12, share=0, warm_start=True)


def warm_search(folder: Path, **settings: Any) -> Search:
    defaults = {
        "space": SPACE,
        "objectives": ("accuracy", "trainable_parameters"),
        "training": TRAINING,
        "elastic": ELASTIC,
        "score_check": False,
    }
    return tiny_search(folder, **(defaults | settings))


def elastic_of(evaluator: Evaluator) -> ElasticAdapter:
    largest = everywhere(evaluator.backbone, "lora", 4).replace(learning_rate=1e-2)
    return ElasticAdapter.train(evaluator, largest)


def of_top_block(elastic: ElasticAdapter, rate: float) -> Configuration:
    top = max(site.block for site in elastic.largest.adapters)
    adapters = {site: one for site, one in elastic.largest.adapters.items() if site.block == top}
    return Configuration(adapters, learning_rate=rate)


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    torch.testing.assert_close(dict(one), dict(other), rtol=0, atol=tolerance)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def state_of(trained: Trained) -> Mapping[str, Tensor]:
    assert trained.state is not None
    return trained.state


def test_a_training_begins_from_the_tensors_it_is_given() -> None:
    evaluator = tiny_evaluator()
    elastic = elastic_of(evaluator)
    still = of_top_block(elastic, rate=1e-9)
    weights = elastic.state(still)
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
    elastic = elastic_of(evaluator)
    others = elastic.state(of_top_block(elastic, 1e-2))
    failed = evaluator.train(elastic.largest, initial_weights=others).evaluation
    assert failed.status == "failed"
    assert not failed.warm_start
    assert "do not belong to this configuration" in str(failed.reason)
    assert evaluator.backbone.attached is None


def test_what_pauses_goes_on_as_if_it_had_not() -> None:
    evaluator = tiny_evaluator(training=TRAINING, rungs=(0.5,))
    elastic = elastic_of(evaluator)
    chosen = of_top_block(elastic, 1e-2)
    weights = elastic.state(chosen)
    paused = evaluator.train(chosen, rung=0, initial_weights=weights)
    assert paused.evaluation.warm_start
    assert paused.paused is not None
    whole = evaluator.train(chosen, paused=paused.paused)
    assert whole.evaluation.warm_start
    assert_same(state_of(whole), state_of(evaluator.train(chosen, initial_weights=weights)))


@pytest.mark.parametrize("rung", [None, 0])
def test_a_pack_begins_from_them_as_each_would_alone(rung: int | None) -> None:
    evaluator = packing_evaluator(training=TRAINING, rungs=(0.5,))
    elastic = elastic_of(evaluator)
    chosen = [of_top_block(elastic, rate) for rate in (1e-2, 3e-3)]
    weights = [elastic.state(chosen[0]), None]
    packed = PackedTrainer(evaluator).train(chosen, 5, rung=rung, initial_weights=weights)
    assert [one.evaluation.warm_start for one in packed] == [True, False]
    for configuration, own, trained in zip(chosen, weights, packed, strict=True):
        alone = evaluator.train(configuration, 5, rung=rung, initial_weights=own)
        assert_alike(trained, alone)
    with pytest.raises(ValueError, match="0 initial weights for 2 configurations"):
        PackedTrainer(evaluator).train(chosen, initial_weights=[])


def warm_starts(records: list[TrialRecord]) -> list[bool]:
    return [one.evaluation.warm_start for one in records]


def test_trials_but_reference_points_begin_from_the_elastic_adapter(tmp_path: Path) -> None:
    search = warm_search(tmp_path)
    records = list(search.run(trials=10, progress=False).records)
    assert warm_starts(records) == [one.baseline is None for one in records]
    assert any(warm_starts(records))
    assert list(search.front().to_frame(all_trials=True)["warm_start"]) == warm_starts(records)
    warm_alone = [one for one in records if one.evaluation.warm_start]
    shown = repr(ParetoFront(warm_alone, search.objectives, search.axes(), search))
    assert "begun from" in shown
    assert "elastic adapter's weights" in shown
    made = search.elastic_proposals()
    assert made is not None
    check = made.check(records)
    assert check is not None
    assert check.trials == len({one.evaluation.configuration for one in records if one.baseline is None})
    assert check.warm_start
    cold = warm_search(tmp_path, name="cold", elastic=Elastic(candidates=12)).run(trials=10, progress=False)
    assert not any(warm_starts(list(cold.records)))


def test_what_the_elastic_adapter_does_not_cover_begins_from_random_weights(tmp_path: Path) -> None:
    space = Uniform(methods=("lora", "series"), ranks=(1, 4), widths=(1, 4))
    search = warm_search(tmp_path, space=space, elastic=WEIGHTS_ALONE, baselines=False)
    records = list(search.run(trials=8, progress=False).records)
    covered = [set(one.evaluation.configuration.methods) <= {"lora"} for one in records]
    assert warm_starts(records) == covered
    assert len(set(covered)) == 2


def test_without_proposals_nothing_is_scored(tmp_path: Path) -> None:
    search = warm_search(tmp_path, elastic=WEIGHTS_ALONE)
    records = list(search.run(trials=8, progress=False).records)
    assert warm_starts(records) == [one.baseline is None for one in records]
    made = search.elastic_proposals()
    assert made is not None
    assert made._pool == []
    spent = made.cost
    assert spent == made.weights.cost
    assert spent.steps == search.evaluator.plan.total_steps
    assert "gives trials their first weights" in search.describe()
    assert "proposes" not in search.describe()


def test_a_search_that_is_resumed_begins_from_the_same_weights(tmp_path: Path) -> None:
    settings = {"seeds": 2, "fidelity": SuccessiveHalving(rungs=(0.5,))}
    whole = list(warm_search(tmp_path, name="whole", **settings).run(trials=12, progress=False).records)
    assert any(one.evaluation.warm_start and one.evaluation.trainings == 2 for one in whole)
    for trials in (5, 9):
        warm_search(tmp_path, name="parts", **settings).run(trials=trials, progress=False)
    (tmp_path / "parts" / "elastic" / "adapter.safetensors").unlink()  # it is trained again as it was
    parts = list(warm_search(tmp_path, name="parts", **settings).run(trials=12, progress=False).records)
    assert outcomes(parts) == outcomes(whole)
    assert warm_starts(parts) == warm_starts(whole)


def test_in_packs_too_reference_points_begin_from_random_weights(tmp_path: Path) -> None:
    records = list(warm_search(tmp_path, pack_size=4).run(trials=8, progress=False).records)
    assert any(one.baseline for one in records)
    assert warm_starts(records) == [one.baseline is None for one in records]


def trial_training(folder: Path, elastic: Elastic = WEIGHTS_ALONE) -> tuple[TrialRunner, ElasticWeights]:
    evaluator = tiny_evaluator(
        training=TRAINING, rungs=(0.5,), objectives=("accuracy", "trainable_parameters")
    )
    weights = ElasticWeights(elastic, evaluator, SPACE, folder / "elastic")
    training = TrialRunner(
        evaluator,
        AdapterCheckpoints(folder / "adapters"),
        TrainingCheckpoints(folder / "paused"),
        seed=0,
        seeds=3,
        elastic=weights,
    )
    return training, weights


def empty_front(folder: Path) -> ParetoFront:
    search = warm_search(folder)
    return ParetoFront([], search.objectives, search.axes(), search)


def chosen_of(weights: ElasticWeights, rate: float = 1e-2) -> Configuration:
    adapter = weights.adapter()
    assert adapter is not None
    return of_top_block(adapter, rate)


def test_each_training_of_a_trial_begins_from_an_adapter_of_its_own(tmp_path: Path) -> None:
    training, weights = trial_training(tmp_path)
    configuration = chosen_of(weights, rate=1e-9)
    front = empty_front(tmp_path)
    record = training.begin({7: configuration}, front, rung=None)[7]
    assert record.evaluation.warm_start
    again = training.repeat(training.repeat(record))
    assert again.evaluation.trainings == 3
    states = [first_weights(weights, record.evaluation, number) for number in range(3)]
    for number, state in enumerate(states):
        assert state is not None
        # A rate of next to nothing: what was trained is what it began from.
        known = training._evaluator.train(configuration, 0, initial_weights=state).evaluation.values
        seed = training_seed(0, 7, number)
        assert again.evaluation.by_seed[seed]["accuracy"] == pytest.approx(known["accuracy"])
        assert again.evaluation.by_seed[seed]["validation_loss"] == pytest.approx(
            known["validation_loss"], abs=1e-5
        )
    assert distance(states[0] or {}, states[1] or {}) > 1e-3
    assert distance(states[1] or {}, states[2] or {}) > 1e-3
    files = sorted(path.name for path in (tmp_path / "elastic").iterdir())
    assert files == ["adapter-1.safetensors", "adapter-2.safetensors", "adapter.safetensors"]
    read = ElasticWeights(WEIGHTS_ALONE, training._evaluator, SPACE, tmp_path / "elastic")
    assert read.cost == weights.cost
    assert read.cost.steps == 3 * training._evaluator.plan.total_steps


def test_a_paused_trial_whose_file_is_gone_begins_anew_as_it_began(tmp_path: Path) -> None:
    front = empty_front(tmp_path)
    training, weights = trial_training(tmp_path)
    paused = training.begin({3: chosen_of(weights)}, front, rung=0)[3]
    assert paused.evaluation.status == "paused"
    expected = training.go_on(paused, front, 1).evaluation
    for path in (tmp_path / "paused").iterdir():
        path.unlink()
    found = training.go_on(paused, front, 1).evaluation
    assert found.warm_start
    assert found.values["validation_loss"] == expected.values["validation_loss"]


def test_a_training_left_behind_by_a_killed_process_goes_on(tmp_path: Path) -> None:
    front = empty_front(tmp_path)
    training, weights = trial_training(tmp_path)
    configuration = chosen_of(weights)
    first = training.begin({3: configuration}, front, rung=0)[3].evaluation  # and was never recorded
    again = training.begin({3: configuration}, front, rung=0)[3].evaluation
    assert again.warm_start
    assert again.curves == first.curves
    assert again.cost == first.cost  # nothing was trained a second time


def test_an_elastic_training_that_fails_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fail(*_: Any, **__: Any) -> None:
        tried.append(1)
        raise MemoryError("no room")

    monkeypatch.setattr(ElasticAdapter, "save", fail)
    whole = warm_search(tmp_path, name="whole").run(trials=10, progress=False)
    assert not any(warm_starts(list(whole.records)))
    assert len(tried) == 1
    warm_search(tmp_path, name="parts").run(trials=8, progress=False)
    assert len(tried) == 2
    monkeypatch.undo()  # there is room now, but trials of one search are to be of one kind
    search = warm_search(tmp_path, name="parts")
    parts = search.run(trials=10, progress=False)
    assert outcomes(parts.records) == outcomes(whole.records)
    made = search.elastic_proposals()
    assert made is not None
    assert made.weights.obstacle == "the elastic adapter's training failed: out of memory: no room"
    assert made.cost.cpu_seconds > 0
    assert not (search.folder / "elastic" / "adapter.safetensors").exists()


def test_where_a_further_adapter_fails_the_first_gives_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    front = empty_front(tmp_path)
    training, weights = trial_training(tmp_path)
    record = training.begin({3: chosen_of(weights)}, front, rung=None)[3]
    assert weights.cost_to_come([record.evaluation], 3).steps == 2 * weights.cost.steps
    train = ElasticAdapter.train
    monkeypatch.setattr(ElasticAdapter, "train", lambda *_, **__: 1 / 0)
    again = training.repeat(record)
    assert again.evaluation.trainings == 2
    assert not again.evaluation.failures
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.setattr(ElasticAdapter, "train", train)
    training.repeat(again)  # from the third adapter
    resumed = ElasticWeights(WEIGHTS_ALONE, training._evaluator, SPACE, tmp_path / "elastic")
    assert resumed.cost == weights.cost
    assert sorted(resumed._adapters) == [0, 2]
    assert sorted(resumed._failures) == [1]
    assert resumed.cost_to_come([record.evaluation], 3).steps == 0


def test_who_began_from_what_is_gone_cannot_be_trained_again(tmp_path: Path) -> None:
    front = empty_front(tmp_path)
    training, weights = trial_training(tmp_path)
    record = training.begin({3: chosen_of(weights)}, front, rung=None)[3]
    with pytest.raises(ElasticError, match="give the search the elastic="):
        first_weights(None, record.evaluation)
    (tmp_path / "elastic" / "adapter.safetensors").unlink()
    gone = ElasticWeights(WEIGHTS_ALONE, training._evaluator, SPACE, tmp_path / "elastic", trains=False)
    with pytest.raises(ElasticError, match=r"there is no file adapter\.safetensors in"):
        first_weights(gone, record.evaluation)
    training._elastic = gone
    again = training.repeat(record).evaluation
    (reason,) = again.failures.values()
    assert "The elastic adapter that the trial began from is gone" in reason
    assert again.values["accuracy"] < record.evaluation.values["accuracy"]
    paused = replace(record, evaluation=replace(record.evaluation, status="paused", reason="paused"))
    lost = training.go_on(paused, front, 1).evaluation
    assert lost.status == "failed"
    assert lost.cost == record.evaluation.cost


def test_training_again_for_an_export_begins_where_the_trial_did(tmp_path: Path) -> None:
    search = warm_search(tmp_path, baselines=False)
    front = search.run(trials=4, progress=False)
    number = front.best().number
    assert front.trial(number).record.evaluation.warm_start
    search.export(number, tmp_path / "kept")
    search.export(number, tmp_path / "again", retrain=True)
    kept, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("kept", "again"))
    assert_same(kept, again)
    card = (tmp_path / "again" / "README.md").read_text()
    assert "elastic adapter's weights" in card
    cold = warm_search(tmp_path, elastic=None, baselines=False, name=search.name)
    with pytest.raises(ValueError, match="give the search the elastic="):
        cold.export(number, tmp_path / "cold", retrain=True)


def test_what_warm_trainings_gain_is_not_expected_of_cold_ones(tmp_path: Path) -> None:
    search = warm_search(tmp_path)
    backbone = search.backbone
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
    made = Forecast([*cold, *warm], search.objectives, search.axes(), "accuracy")
    expected, _ = made.beyond(evaluation(0.7, 0.7, warm=True, whole=False), 1, 0.7)
    assert expected == pytest.approx(0.8)
    expected, _ = made.beyond(evaluation(0.2, 0.2, warm=False, whole=False), 1, 0.2)
    assert expected == pytest.approx(0.8)
    first = Forecast(cold, search.objectives, search.axes(), "accuracy")
    assert first.beyond(evaluation(0.7, 0.7, warm=True, whole=False), 1, 0.7) == (0.7, None)
