"""Search end to end on a tiny model: repeatable, resumable, bounded by constraints, hard to break."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autopeft.export.loading import load_adapter
from autopeft.methods import attach, count_parameters
from autopeft.models.backbone import Backbone
from autopeft.optimization.study_store import load_study
from autopeft.reporting.front import ParetoFront
from autopeft.search_spaces import AutoPEFTPaper, PerLayer, SearchSpace, Uniform
from autopeft.search_spaces.learning_rates import fitting_learning_rates
from autopeft.search_verdict import sweep_settings
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from tests.learnable import TRAINING, learnable_task, learner, outcomes, run, save_tiny_model, tiny_search
from tests.records import front_of
from tests.tiny_models import fingerprint, logits_of, tiny_batch, tiny_classifier, tiny_tokenizer

SPACES = (
    PerLayer(
        methods=("lora", "prefix"),
        sizes={"rank": (1, 4), "prefix length": (1, 4)},
        roles=("query", "attention"),
    ),
    PerLayer(
        methods=("lora", "layernorm", "series"),
        sizes={"rank": (1, 4), "bottleneck width": (2, 4)},
        encoding="conditional",
    ),
    Uniform(methods=("lora", "ia3"), sizes={"rank": (1, 4)}),
    AutoPEFTPaper(),
)


def act_in_training(backbone: Backbone, passes: Callable[[int], Callable[[], None] | None]) -> Any:
    """Do something in the n-th training forward pass of the whole search; returns the hook's handle."""
    count = 0

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        nonlocal count
        if module.training and type(output.logits) is torch.Tensor and not output.logits.is_meta:
            count += 1
            act = passes(count)
            if act is not None:
                act()

    return backbone.model.register_forward_hook(hook)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("space", SPACES, ids=("PerLayer", "conditional", "Uniform", "AutoPEFTPaper"))
def test_a_search_gives_a_front(space: SearchSpace, tmp_path: Path) -> None:
    search = tiny_search(tmp_path, space=space)
    before = fingerprint(search.open().backbone.model)
    front = run(search, 6)
    assert [record.number for record in front.records] == list(range(6))
    assert front.members == front_of(front.records, search.objectives)
    assert 0 <= front.hypervolume <= 1
    for point in front:
        assert point.values["trainable_parameters"] == count_parameters(
            search.open().backbone, point.configuration
        )
    kept = sorted((search.folder / "adapters").iterdir())
    assert [int(path.stem.removeprefix("trial-")) for path in kept] == sorted(front.members)
    assert fingerprint(search.open().backbone.model) == before
    assert search.front().members == front.members


def test_the_same_seed_gives_the_same_search_and_another_does_not(tmp_path: Path) -> None:
    fronts = [
        run(tiny_search(tmp_path / folder, space=SPACES[0], baselines=False, seed=seed), 5)
        for folder, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, again, other = (outcomes(front.records) for front in fronts)
    assert first == again
    assert first != other


def test_learning_rates_follow_from_the_model_and_the_steps_and_are_part_of_the_identity(
    tmp_path: Path,
) -> None:
    space = PerLayer(methods=("lora",), sizes={"rank": (1, 4)})
    search = tiny_search(tmp_path, space=space)
    rates = fitting_learning_rates(32, search.open().evaluator.plan.total_steps)
    assert search.open().space.learning_rate == rates
    assert search.identity()["space"]["learning_rate"] == str(rates)
    assert f"log-uniform in [{rates[0]:g}, {rates[1]:g}]" in search.describe()
    given = tiny_search(tmp_path, space=replace(space, learning_rate=rates))
    assert given.identity() == search.identity()
    assert search.arguments()["space"] == space, "its document leaves them open"
    assert sweep_settings(search, search.open().backbone)["space"].learning_rate is None
    longer = tiny_search(tmp_path, space=space, training=replace(TRAINING, epochs=20))
    assert longer.open().space.learning_rate == fitting_learning_rates(32, 120) != rates


def test_baselines_come_first_and_can_be_left_out(tmp_path: Path) -> None:
    """At most a quarter of the budget's trials are baselines, but two at least."""
    search = tiny_search(tmp_path / "with")
    baselines = [baseline.name for baseline in search.open().space.baselines(search.open().backbone)]
    names = [record.baseline for record in run(search, 4 * len(baselines)).records]
    assert names[: len(baselines) + 1] == [*baselines, None]
    small = tiny_search(tmp_path / "small")
    assert [record.baseline for record in run(small, 4).records] == [*baselines[:2], None, None]
    without = tiny_search(tmp_path / "without", baselines=False)
    assert [record.baseline for record in run(without, 2).records] == [None, None]


def test_duplicates_are_not_trained_twice(tmp_path: Path) -> None:
    space = Uniform(sizes={"rank": (1, 2)}, learning_rate=1e-2)
    search = tiny_search(tmp_path, space=space)
    trained: list[str] = []
    train = search.open().evaluator.train

    def counted(configuration: Any, *arguments: Any, **options: Any) -> Any:
        trained.append(configuration.key)
        return train(configuration, *arguments, **options)

    search.open().evaluator.train = counted  # type: ignore[method-assign]
    front = run(search, 6)
    assert len(trained) == len(set(trained)) == 2
    assert [record.duplicate_of is None for record in front.records].count(True) == 2
    originals = {record.number: record for record in front.records}
    for record in front.records:
        if record.duplicate_of is not None:
            assert record.evaluation == originals[record.duplicate_of].evaluation
    assert len(front.records) == 6


def test_a_budget_of_compute_ends_when_the_space_is_used_up(tmp_path: Path) -> None:
    search = tiny_search(tmp_path, space=Uniform(sizes={"rank": (1, 2)}, learning_rate=1e-2))
    front = search.run(cpu_seconds=3600, progress=False)
    assert {record.evaluation.configuration.key for record in front.records} == {
        record.evaluation.configuration.key for record in front.records[:2]
    }


def test_candidates_that_break_a_constraint_are_not_trained(tmp_path: Path) -> None:
    space = Uniform(sizes={"rank": (1, 16)})
    search = tiny_search(tmp_path, space=space)
    small, large = search.open().space.extremes(search.open().backbone)
    bound = count_parameters(search.open().backbone, large) // 6
    assert count_parameters(search.open().backbone, small) < bound
    constraints = {"trainable_parameters": bound}
    search = tiny_search(tmp_path, space=space, constraints=constraints, baselines=False, sampler="random")
    front = run(search, 8)
    infeasible = [record for record in front.records if record.evaluation.status == "infeasible"]
    assert infeasible
    assert len(front.records) == 8 + len(infeasible)
    for record in infeasible:
        assert record.evaluation.cost.steps == 0
        assert record.evaluation.values["trainable_parameters"] > bound
        assert record.number not in front.members
    assert all(point.values["trainable_parameters"] <= bound for point in front)


def test_a_hopeless_constraint_is_found_before_training(tmp_path: Path) -> None:
    search = tiny_search(tmp_path, constraints={"trainable_parameters": 10})
    with pytest.raises(ValueError, match=r"No candidate can keep the constraint.*trainable_parameters"):
        run(search, 2)
    assert not search.folder.exists()


def test_failed_trials_are_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    search = tiny_search(tmp_path)
    logging.getLogger("autopeft.evaluation.run").setLevel(logging.ERROR)

    def act() -> None:
        raise RuntimeError("a bad day")

    handle = act_in_training(search.open().backbone, lambda count: act if count in (2, 9) else None)
    try:
        front = run(search, 5)
    finally:
        handle.remove()
        logging.getLogger("autopeft.evaluation.run").setLevel(logging.NOTSET)
    statuses = [record.evaluation.status for record in front.records]
    assert statuses.count("failed") == 2
    assert statuses.count("complete") == 3
    assert {record.evaluation.reason for record in front.records} == {None, "RuntimeError: a bad day"}
    _, kept = load_study(search.folder)
    assert outcomes(kept) == outcomes(front.records)


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("nsga2", marks=pytest.mark.slow)])
def test_after_ctrl_c_the_same_call_resumes(tmp_path: Path, sampler: str) -> None:
    settings = {"space": SPACES[0], "baselines": False, "sampler": sampler}
    whole = run(tiny_search(tmp_path / "whole", **settings), 13)
    search = tiny_search(tmp_path / "cut", **settings)
    handle = act_in_training(search.open().backbone, lambda count: interrupt if count == 4 * 6 + 3 else None)
    front = run(search, 13)
    handle.remove()
    assert 0 < len(front.records) < 13
    assert outcomes(front.records) == outcomes(whole.records)[: len(front.records)]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # First in the same object, then, cut again, as a new process would.
    handle = act_in_training(search.open().backbone, lambda count: interrupt if count == 4 * 6 + 2 else None)
    run(search, 13)
    handle.remove()
    resumed = tiny_search(tmp_path / "cut", **settings)
    again = run(resumed, 13)
    assert outcomes(again.records) == outcomes(whole.records)
    assert again.members == whole.members
    for point in whole:
        state = AdapterCheckpoints(resumed.folder / "adapters").load(point.record)
        expected = AdapterCheckpoints(tmp_path / "whole" / "tiny" / "adapters").load(point.record)
        assert state is not None
        assert expected is not None
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_baselines_survive_an_interruption(tmp_path: Path) -> None:
    whole = run(tiny_search(tmp_path / "whole"), 5)
    cut = tiny_search(tmp_path / "cut")
    handle = act_in_training(cut.open().backbone, lambda count: interrupt if count == 6 + 1 else None)
    run(cut, 5)
    handle.remove()
    assert outcomes(run(tiny_search(tmp_path / "cut"), 5).records) == outcomes(whole.records)


def test_a_search_that_is_done_returns_its_front_at_once(tmp_path: Path) -> None:
    first = run(tiny_search(tmp_path), 3)
    search = tiny_search(tmp_path)
    search.open().evaluator.train = None  # type: ignore[method-assign, assignment]
    again = run(search, 3)
    assert outcomes(again.records) == outcomes(first.records)
    assert again.members == first.members


def test_more_trials_go_on_from_there(tmp_path: Path) -> None:
    whole = run(tiny_search(tmp_path / "whole"), 5)
    run(tiny_search(tmp_path / "parts"), 2)
    assert outcomes(run(tiny_search(tmp_path / "parts"), 5).records) == outcomes(whole.records)


def test_times_can_be_objectives(tmp_path: Path) -> None:
    objectives = ("accuracy", "training_seconds", "inference_latency", "forward_flops")
    front = run(tiny_search(tmp_path, objectives=objectives), 3)
    assert len(front) >= 1
    assert {axis.objective.name for axis in front.axes} == {"accuracy", "forward_flops"}
    assert front.members == front_of(front.records, front.objectives)


def test_hypervolume_never_falls(tmp_path: Path) -> None:
    search = tiny_search(tmp_path, space=SPACES[0])
    front = run(search, 6)
    volumes = [
        ParetoFront(front.records[:count], search.objectives, search.open().axes).hypervolume
        for count in range(7)
    ]
    assert volumes == sorted(volumes)
    assert volumes[0] == 0


def test_the_screen_shows_trials_and_front(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_search(tmp_path).run(trials=2)
    shown = capsys.readouterr().out
    assert "backbone Backbone('tiny-bert'" in shown
    assert "trial   0" in shown
    assert "trial   1" in shown
    assert "Pareto front" in shown
    tiny_search(tmp_path).run(trials=3)
    assert "Resuming with 2 trials: 2 complete." in capsys.readouterr().out


def test_loaded_models_and_folders_are_backbones_too(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    front = run(tiny_search(tmp_path / "runs", backbone=folder), 1)
    assert len(front) == 1
    model = tiny_classifier("bert")
    front = run(tiny_search(tmp_path / "runs", backbone=model, tokenizer=tiny_tokenizer(), name="loaded"), 1)
    assert len(front) == 1


@pytest.mark.slow
def test_a_point_of_the_front_is_exported_and_loads_again(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    search = tiny_search(tmp_path / "runs", backbone=folder, task=learnable_task(), space=SPACES[2])
    front = run(search, 3)
    bound = max(point.values["trainable_parameters"] for point in front)
    point = front.best(trainable_parameters=bound)
    before = fingerprint(search.open().backbone.model)
    report = point.export(tmp_path / "adapter")
    assert fingerprint(search.open().backbone.model) == before
    assert report.max_logit_difference is not None
    assert report.max_logit_difference <= 1e-5
    state = AdapterCheckpoints(search.folder / "adapters").load(point.record)
    assert state is not None
    with attach(search.open().backbone, point.configuration) as attachment:
        attachment.load_state_dict(state)
        expected = logits_of(search.open().backbone)
    loaded = load_adapter(tiny_classifier("bert"), tmp_path / "adapter")
    with torch.no_grad():
        found = loaded(**tiny_batch()).logits
    assert float((found - expected).abs().max()) <= 1e-5


def test_two_searches_share_one_backbone(tmp_path: Path) -> None:
    backbone = learner()
    before = fingerprint(backbone.model)
    fronts = [run(tiny_search(tmp_path, backbone=backbone, name=name), 2) for name in ("a", "b")]
    assert outcomes(fronts[0].records) == outcomes(fronts[1].records)
    assert fingerprint(backbone.model) == before


def test_a_second_run_of_a_running_search_is_refused(tmp_path: Path) -> None:
    search = tiny_search(tmp_path)
    messages: list[str] = []

    def act() -> None:
        try:
            run(tiny_search(tmp_path), 2)
        except ValueError as error:
            messages.append(str(error))

    handle = act_in_training(search.open().backbone, lambda count: act if count == 1 else None)
    with suppress(KeyboardInterrupt):
        run(search, 1)
    handle.remove()
    assert len(messages) == 1
    assert "is being run by process" in messages[0]
