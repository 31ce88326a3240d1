"""The backbone stays where it is: nothing is loaded again, and a trial leaves nothing behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autopeft.core.configuration import Configuration
from autopeft.search_spaces import PerLayer
from benchmarks.leak import WARM_UP, WINDOW, growth, measure
from tests.evaluation.test_hidden_state_cache import above, backbone_of, evaluator_of, served_cuts
from tests.learnable import TRAINING, learner, tiny_evaluator, tiny_search
from tests.tiny_models import everywhere

SMALL_BYTES = 4096
"""What may wait for Python to look for circles: counts that torchmetrics and Lightning keep."""


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Let objects go only by their references, so that what refers to itself is seen to stay."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def live_bytes() -> int:
    return sum(
        thing.nbytes for thing in gc.get_objects() if issubclass(type(thing), Tensor) and not thing.is_meta
    )


def test_a_search_never_touches_the_tensors_of_its_backbone(tmp_path: Path) -> None:
    backbone = learner()
    modules = [id(module) for module in backbone.model.modules()]
    tensors = {name: tensor.data_ptr() for name, tensor in backbone.model.state_dict().items()}
    space = PerLayer(methods=("lora", "ia3", "series", "parallel", "prefix", "bitfit", "layernorm"))
    front = tiny_search(tmp_path, backbone=backbone, space=space).run(trials=6, progress=False)
    assert {record.evaluation.status for record in front.records} == {"complete"}
    assert [id(module) for module in backbone.model.modules()] == modules
    assert {name: tensor.data_ptr() for name, tensor in backbone.model.state_dict().items()} == tensors


@pytest.mark.parametrize("method", ["lora", "series", "parallel", "prefix"])
@pytest.mark.usefixtures("no_collection")
@pytest.mark.slow
def test_what_a_trial_allocated_is_gone_when_it_ends(method: str) -> None:
    evaluator = tiny_evaluator()
    configuration = Configuration(everywhere(evaluator.backbone, method, 4).adapters)
    evaluator.evaluate(configuration)  # what is made once, and kept
    gc.collect()
    before = live_bytes()
    for _ in range(3):
        assert evaluator.evaluate(configuration).status == "complete"
    assert live_bytes() <= before + 3 * SMALL_BYTES


@pytest.mark.usefixtures("no_collection")
@pytest.mark.slow
def test_what_a_failed_trial_allocated_is_gone_too() -> None:
    evaluator = tiny_evaluator(training=replace(TRAINING, epochs=2))
    configuration = Configuration(everywhere(evaluator.backbone, "lora", 4).adapters, learning_rate=1e9)
    evaluator.evaluate(configuration)
    gc.collect()
    before = live_bytes()
    assert evaluator.evaluate(configuration).status == "failed"
    assert live_bytes() <= before + SMALL_BYTES


@pytest.mark.usefixtures("no_collection")
@pytest.mark.slow
def test_no_file_of_hidden_states_stays_mapped(tmp_path: Path) -> None:
    evaluator = evaluator_of(backbone_of(), tmp_path)
    evaluator.evaluate(above(evaluator.backbone, 2))
    assert served_cuts(evaluator) == [2]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_growth_is_that_after_the_first_trials() -> None:
    trials = WARM_UP + 2 * WINDOW
    flat = growth([2**20] * WARM_UP + [2**30] * (trials - WARM_UP))
    assert flat["growth"] == 0
    assert flat["slope_mib_a_100_trials"] == pytest.approx(0)
    growing = growth([2**30 + index * 2**20 for index in range(trials)])
    assert growing["slope_mib_a_100_trials"] == pytest.approx(100)
    assert growing["growth"] == pytest.approx(WINDOW / (1024 + WARM_UP + (WINDOW - 1) / 2))
    with pytest.raises(ValueError, match=f"At least {trials} trials"):
        growth([2**30] * (trials - 1))


@pytest.mark.slow
def test_two_hundred_trials_in_one_process_do_not_grow() -> None:
    torch.set_num_threads(1)
    assert growth(measure(200))["growth"] < 0.02
