"""What only a CUDA device can show: training, costs and export there."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopeft import PackedExecutor
from autopeft.core.configuration import Configuration
from autopeft.methods import attach
from autopeft.models.spread import keep_spread
from autopeft.training.settings import Training
from tests.learnable import learner, tiny_evaluator, tiny_search
from tests.tiny_models import fingerprint

pytestmark = pytest.mark.gpu
LORA = Configuration.from_dict(
    {"sites": {"0-1.query": {"method": "lora", "size": 4}, "1.ffn": {"method": "series", "size": 4}}}
)
ON_GPU = Training(epochs=1, batch_size=8, device="auto")  # the tests are skipped without a GPU


def test_a_candidate_is_trained_measured_and_taken_out() -> None:
    backbone = learner()
    evaluator = tiny_evaluator(
        backbone, training=ON_GPU, objectives=("accuracy", "peak_memory", "forward_flops")
    )
    before = fingerprint(backbone.model)
    trained = evaluator.train(LORA)
    assert trained.evaluation.status == "complete", trained.evaluation.reason
    assert trained.state is not None
    assert trained.evaluation.cost.gpu_seconds > 0
    assert trained.evaluation.values["peak_memory_measured"] > 0
    assert 0 <= evaluator.test(LORA, trained.state)["accuracy"] <= 1
    assert fingerprint(backbone.model) == before
    assert next(backbone.model.parameters()).device.type == "cuda"


def test_a_model_on_two_devices_is_trained_as_on_one() -> None:
    spread = learner()
    last = next(name for name, module in spread.model.named_modules() if module is spread.blocks[-1])
    nn.Module.to(spread.model, torch.device("cuda"))
    spread.blocks[-1].to("cpu")
    keep_spread(spread.model, [last])
    assert [device.type for device in spread.devices] == ["cuda", "cpu"]
    training = replace(ON_GPU, precision="32-true")
    found, expected = (tiny_evaluator(each, training=training).train(LORA) for each in (spread, learner()))
    assert found.evaluation.status == "complete", found.evaluation.reason
    loss = expected.evaluation.values["validation_loss"]
    assert found.evaluation.values["validation_loss"] == pytest.approx(loss, rel=1e-3)
    assert found.state is not None
    assert tiny_evaluator(spread, training=training).test(LORA, found.state).keys() >= {"accuracy"}


def test_a_seed_means_the_same_initial_weights_as_on_the_cpu() -> None:
    backbones = learner(), learner()
    nn.Module.to(backbones[1].model, torch.device("cuda"))
    state = torch.cuda.get_rng_state()
    on_cpu, on_gpu = (attach(backbone, LORA, seed=3).state_dict() for backbone in backbones)
    assert on_cpu.keys() == on_gpu.keys()
    assert all(torch.equal(values, on_gpu[name]) for name, values in on_cpu.items())
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_costs_do_not_depend_on_the_device() -> None:
    on_gpu = tiny_evaluator(training=ON_GPU, objectives=("accuracy", "peak_memory", "forward_flops"))
    on_cpu = tiny_evaluator(objectives=("accuracy", "peak_memory", "forward_flops"))
    if on_gpu.training.resolved_precision() == "32-true":
        assert on_gpu.costs(LORA) == on_cpu.costs(LORA)
    else:
        assert on_gpu.costs(LORA)["forward_flops"] == on_cpu.costs(LORA)["forward_flops"]


@pytest.mark.parametrize("executor", ["local", PackedExecutor(size=4)])
def test_a_search_on_the_gpu_gives_a_front_that_exports(executor: Any, tmp_path: Path) -> None:
    search = tiny_search(tmp_path, training=ON_GPU, executor=executor)
    front = search.run(trials=4, progress=False)
    assert len(front) > 0
    report = front.best().export(tmp_path / "adapter")
    assert report.max_logit_difference is not None
    assert report.max_logit_difference < 1e-3
    with attach(search.open().backbone, LORA):
        assert {parameter.device.type for parameter in search.open().backbone.model.parameters()} == {"cuda"}
    torch.cuda.synchronize()


def test_allocated_memory_returns_to_the_backbones_after_each_trial() -> None:
    evaluator = tiny_evaluator(learner(), training=ON_GPU)
    evaluator.evaluate(LORA)  # moves the backbone, and makes what is made once
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        assert evaluator.evaluate(LORA).status == "complete"
        # A few counts of torchmetrics and Lightning refer to themselves.
        assert torch.cuda.memory_allocated() <= before + 64 * 1024
        gc.collect()
        assert torch.cuda.memory_allocated() == before
