"""The verdict of a whole search: a sweep beside it, fresh trainings, and where the sentence is shown."""

from __future__ import annotations

import html
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from mlflow import MlflowClient
from torch.utils.data import DataLoader

from autopeft import Search
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Cost
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.executor import LocalExecutor
from autopeft.evaluation.resampled_test import DRAWS, FEWEST_BATCHES, in_small_batches, resampled_test
from autopeft.methods import FullFineTuning
from autopeft.models.backbone import Backbone
from autopeft.models.loading import LoadOptions
from autopeft.optimization.study_store import SETTINGS_FILE
from autopeft.reporting.mlflow.run_content import SEARCH_TAG, VERDICT_TAG
from autopeft.reporting.verdict import UNKNOWN
from autopeft.search_spaces import PerLayer, Uniform
from autopeft.search_spaces.method_choice import Slot
from autopeft.search_verdict import expected_tests, sweep_settings
from autopeft.tasks import TextClassification
from autopeft.training.settings import Training
from tests.learnable import learnable_task, learner, tiny_evaluator, tiny_search

FEW_DRAWS = 10


def changed_rows(change: Callable[[str, str], str], **options: Any) -> TextClassification:
    """Return the learnable task with other texts, made of text and label."""
    task = learnable_task(**options)
    assert isinstance(task.dataset, DatasetDict)
    splits = {
        name: Dataset.from_dict(
            {"text": [change(row["text"], row["label"]) for row in split], "label": [*split["label"]]}
        )
        for name, split in task.dataset.items()
    }
    return TextClassification(dataset=DatasetDict(splits))


def random_labels() -> TextClassification:
    """Return the learnable task with labels that nothing tells."""
    task, draw = learnable_task(), random.Random(0)
    assert isinstance(task.dataset, DatasetDict)
    shuffled = {
        name: Dataset.from_dict({"text": split["text"], "label": draw.sample([*split["label"]], len(split))})
        for name, split in task.dataset.items()
    }
    return TextClassification(dataset=DatasetDict(shuffled))


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests of the sentence take a moment."""
    for module in ("evaluation.resampled_test", "search_verdict"):
        monkeypatch.setattr(f"autopeft.{module}.DRAWS", FEW_DRAWS)
    monkeypatch.setattr("autopeft.evaluation.resampled_test.FEWEST_BATCHES", FEW_DRAWS)


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Seeds of all trainings."""
    found: list[Any] = []
    train = Evaluator.train

    def noted(evaluator: Evaluator, configuration: Any, seed: Any = None, **options: Any) -> Any:
        found.append(seed)
        return train(evaluator, configuration, seed, **options)

    monkeypatch.setattr(Evaluator, "train", noted)
    return found


@pytest.mark.usefixtures("few_draws")
def test_what_the_head_alone_solves_has_no_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    told = changed_rows(lambda text, label: " ".join([f"w{20 * 'abc'.index(label)}"] * len(text.split())))
    training = Training(epochs=3, batch_size=8, device="cpu", precision="32-true")
    space = Uniform(sizes={"rank": (1, 8)}, learning_rate=3e-2)
    bound = {"trainable_parameters": 2000}  # which all weights break
    search = tiny_search(tmp_path, task=told, training=training, space=space, constraints=bound)
    search.run(trials=1, progress=False)
    used = {*seeds}

    def killed(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            search.verdict(0.1, progress=False)
    assert search.front().verdict == UNKNOWN
    found = search.verdict(0.1)
    assert not found.beats
    assert "; accuracy 1.0000 of the head alone; 3 fresh seeds, a sweep of " in str(found)
    assert str(found).endswith("take the head alone.")
    assert found.share > 0.1, "a training takes more"
    assert search.front().verdict == str(found)
    assert search.run(trials=1, progress=False).verdict == str(found), "nothing was trained since"
    lines = capsys.readouterr().out
    assert len(re.findall(r"fresh training \d of 3: accuracy \d\.\d+ on the test split", lines)) % 3 == 0
    assert "The head alone, fresh training 3 of 3: accuracy 1.0000 on the test split" in lines
    assert len({*seeds} - used) >= 3, "fresh ones"
    trained = len(seeds)
    assert search.verdict(0.01, progress=False) == found, "the sweep has taken what it has taken"
    assert len(seeds) == trained, "what was done is kept"
    beside = search.verdict(0.01, full_fine_tuning=True, progress=False)
    assert re.search(r"; accuracy \d\.\d+ of full fine-tuning at rate [\d.e-]+; 3 fresh seeds", str(beside))
    assert len(seeds) == trained + 5, "three rates, and two further seeds at the best"
    assert search.front().verdict == str(beside)
    with pytest.raises(ValueError, match="seeds is a number of trainings from 3 up, got 2"):
        search.verdict(seeds=2)


@pytest.mark.slow
@pytest.mark.usefixtures("few_draws")
def test_full_fine_tuning_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    space = Uniform(sizes={"rank": (1, 8)}, learning_rate=3e-2)
    search = tiny_search(tmp_path, space=space, tracking=f"sqlite:///{tmp_path / 'mlflow.db'}")
    search.run(trials=1, progress=False)

    def too_large(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(FullFineTuning, "_attach_methods", too_large)
    found = search.verdict(0.1, full_fine_tuning=True, progress=False)
    assert "; full fine-tuning failed: " in str(found)
    (page,) = tmp_path.glob("mlartifacts/*/artifacts/pareto/front.html")
    with page.open() as file:
        assert html.escape(str(found)) in file.read()
    search.tracking = "http://127.0.0.1:1"
    assert search.verdict(0.1, full_fine_tuning=True, progress=False) == found
    assert re.search(
        "The verdict is not in MLflow: .*No MLflow server answers at http://127.0.0.1:1", caplog.text
    )


@pytest.mark.usefixtures("few_draws")
def test_where_no_uniform_lora_keeps_the_constraints_the_head_alone_is_the_sweep(tmp_path: Path) -> None:
    space = PerLayer(methods=("lora",), roles=("value",), sizes={"rank": (1, 2)})
    search = tiny_search(tmp_path, space=space, constraints={"adapter_parameters": 200})
    search.run(trials=2, progress=False)
    found = search.verdict(progress=False)
    assert found.share == 0
    assert "the head alone in its place, as no uniform LoRA could be trained" in str(found)
    assert found.beats or str(found).endswith("take the head alone.")


class TopValue(Uniform):
    """LoRA of one rank on the value of the highest block alone."""

    def slots(self, backbone: Backbone) -> list[Slot]:
        return [slot for slot in super().slots(backbone) if slot.sites[0].role == "value"][-1:]


@pytest.mark.slow
@pytest.mark.usefixtures("few_draws")
def test_a_planted_difference_is_found(tmp_path: Path) -> None:
    """The head sees the first word, which is always the same, until a value tells it of the others."""
    blind = learner()
    with torch.no_grad():
        for site, shape in blind.sites.items():
            if site.role == "value":
                blind.model.get_parameter(f"{shape.module}.weight").zero_()
    search = tiny_search(
        tmp_path,
        backbone=blind,
        task=changed_rows(lambda text, label: f"w0 {text}", rows=96),
        space=TopValue(sizes={"rank": (2, 4)}, learning_rate=3e-2),
        objectives=("accuracy", "adapter_parameters"),
        training=Training(epochs=6, batch_size=8, device="cpu", precision="32-true"),
    )
    search.run(trials=2, progress=False)
    found = search.verdict()
    assert found.beats
    assert str(found).startswith("The front beats a uniform LoRA sweep: +0.")
    assert "accuracy 0.3333 of the head alone" in str(found)


@pytest.mark.slow
@pytest.mark.usefixtures("few_draws")
def test_random_labels_have_no_winner(tmp_path: Path, seeds: list[Any]) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    search = tiny_search(tmp_path, task=random_labels(), tracking=store, derive=True)
    front = search.run(trials=2, progress=False)
    assert front.verdict == UNKNOWN
    found = search.verdict(0.1, progress=False)
    assert not found.beats
    assert search.front().verdict == str(found)
    trained = len(seeds)
    assert search.verdict(0.1, progress=False) == found
    assert len(seeds) == trained, "what was done is kept"
    (run,) = MlflowClient(store).search_runs(["1"], f"tags.`{SEARCH_TAG}` = 'tiny'")
    assert run.data.tags[VERDICT_TAG] == str(found)
    again = search.run(trials=3, progress=False)
    assert again.verdict == UNKNOWN, "there are other trials"


@pytest.mark.slow
@pytest.mark.usefixtures("few_draws")
def test_a_share_of_the_compute_is_for_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = tiny_search(tmp_path)
    front = search.run(trials=4, verdict=0.25)
    assert "uniform LoRA sweep" in front.verdict != UNKNOWN
    spent = sum(record.evaluation.cost.cpu_seconds for record in front.records)
    for_tests = expected_tests(front, 3).cpu_seconds
    assert for_tests > spent / 3, "more than all of the share"
    said = re.search(
        r"sweep takes (\d+) cpu_seconds; then both fronts are tested in about (\d+) cpu",
        capsys.readouterr().out,
    )
    assert said is not None
    assert "verdict: 0.25" in (search.folder / SETTINGS_FILE).read_text()
    assert [*map(int, said.groups())] == [round(spent / 3 / 2), round(for_tests)]
    with pytest.raises(ValueError, match=r"verdict is a share of the compute, .* got 1"):
        search.run(trials=2, verdict=1)

    def killed(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("autopeft.search_verdict.resampled_test", killed)
    other = tiny_search(tmp_path, name="other")
    assert other.run(trials=2, verdict=0.25, progress=False).verdict == UNKNOWN
    assert other.interrupted


@pytest.mark.slow
@pytest.mark.usefixtures("few_draws")
def test_warm_starts_count_and_each_fresh_training_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = PerLayer(methods=("lora",), sizes={"rank": (1, 4)})
    search = tiny_search(tmp_path, warm_start=True, space=space, baselines=False)
    front = search.run(trials=4, progress=False)
    assert any(point.record.evaluation.warm_start for point in front)
    warm_starts = search.open().warm_starts(True, search.folder, trains=False)
    assert warm_starts is not None
    assert warm_starts.cost.cpu_seconds > 0
    spent = sum((record.evaluation.cost for record in front.records), warm_starts.cost).cpu_seconds
    budgets: list[float] = []
    places: set[int] = set()
    run, largest = Search.run, type(warm_starts).largest

    def noted(sweep: Search, **options: Any) -> Any:
        budgets.append(options["cpu_seconds"])
        return run(sweep, **options)

    def asked(self: Any, number: int = 0) -> Any:
        places.add(number)
        return largest(self, number)

    monkeypatch.setattr(Search, "run", noted)
    monkeypatch.setattr(type(warm_starts), "largest", asked)
    search.verdict(0.5, progress=False)
    assert budgets == [pytest.approx(spent / 2)]
    assert places == {0, 1, 2}


def test_a_sweep_takes_the_loaded_backbone_as_it_is() -> None:
    search = Search("folder", learnable_task(), dtype="float32", attention="eager", head="last")
    sweep = Search(**search.arguments() | sweep_settings(search, learner()))
    assert sweep.loading == LoadOptions()
    assert (sweep.head, sweep.task) == (search.head, search.task)


def test_few_trainings_do_not_say_what_tests_take(tmp_path: Path) -> None:
    search = tiny_search(tmp_path)
    assert expected_tests(search.run(trials=2, progress=False), 3) == Cost()


class OtherMachines(LocalExecutor):
    """Stands for an executor whose workers have GPUs that this process lacks."""

    alters_trials = False
    trains_here = False


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_seconds_need_a_gpu_where_trials_are_trained(tmp_path: Path) -> None:
    search = tiny_search(tmp_path)
    with pytest.raises(ValueError, match="gpu_seconds is given, but trials are trained on the cpu"):
        search.run(gpu_seconds=5, progress=False)
    assert len(tiny_search(tmp_path, executor=OtherMachines).run(1, gpu_seconds=5, progress=False)) == 1


@pytest.mark.slow
def test_the_test_split_is_resampled_alike_for_all_models() -> None:
    evaluator = tiny_evaluator()
    trained = evaluator.train(Configuration(learning_rate=1e-2))
    assert trained.state is not None
    found = resampled_test(evaluator, trained.evaluation.configuration, trained.state)
    assert found[0] == evaluator.test(trained.evaluation.configuration, trained.state)["accuracy"]
    assert found == resampled_test(evaluator, trained.evaluation.configuration, trained.state)
    assert len(found) == 1 + DRAWS
    rows = sum(len(batch["labels"]) for batch in evaluator.data.test_dataloader())
    noise = np.sqrt(found[0] * (1 - found[0]) / rows)
    assert np.std(found[1:]) == pytest.approx(noise, rel=0.25), "rows are drawn, not batches of 8"
    assert np.mean(found[1:]) == pytest.approx(found[0], abs=0.05)


def loader_of(rows: Any, *, batch_size: int | None) -> DataLoader[Any]:
    return DataLoader(rows, batch_size=batch_size)


@pytest.mark.parametrize(("rows", "size", "expected"), [(30, 8, [1] * 30), (1010, 256, [20] * 50 + [10])])
def test_samples_are_drawn_of_many_small_batches(rows: int, size: int, expected: list[int]) -> None:
    batches: list[Any] = [*in_small_batches(loader_of(range(rows), batch_size=size))]
    assert [len(batch) for batch in batches] == expected
    assert torch.cat(batches).tolist() == [*range(rows)]


def test_what_has_many_batches_or_makes_its_own_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    many = loader_of(range(2 * FEWEST_BATCHES), batch_size=2)
    assert in_small_batches(many) is many
    assert not caplog.records
    own = loader_of([torch.arange(8), torch.arange(8)], batch_size=None)
    with caplog.at_level(logging.WARNING):
        assert in_small_batches(own) is own
    assert "The test split comes in 2 batches that cannot be made smaller" in caplog.text
