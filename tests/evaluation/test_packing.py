"""Packed trials: several configurations in one pass, each with the outcome it has alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autopeft.core.configuration import Configuration, Site
from autopeft.evaluation.frozen_blocks.block_skipping import Structure
from autopeft.evaluation.packing.member import MemberRun
from autopeft.evaluation.packing.model import PackedModel
from autopeft.evaluation.packing.trainer import PackedTrainer
from autopeft.methods import attach
from autopeft.training.settings import Training
from tests.packed import (
    LORAS,
    OTHER_METHODS,
    assert_alike,
    compare,
    lora,
    minilm_evaluator,
    of,
    packing_evaluator,
)
from tests.tiny_models import draw_parameters, tiny_batch

pytestmark = pytest.mark.slow  # `test_packed_executor` tries the executor in `make test`


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_loras_of_other_ranks_sites_and_rates_train_as_they_do_alone(architecture: str) -> None:
    evaluator = packing_evaluator(architecture)
    # 5e-5: rounding, which differs between processors and which Adam does not make smaller.
    for trained in compare(evaluator, LORAS, seed=3, tolerance=5e-5):
        with attach(evaluator.backbone, trained.evaluation.configuration, 3) as attachment:
            initial = attachment.state_dict()
        assert trained.state is not None
        assert all(not torch.equal(trained.state[name], tensor) for name, tensor in initial.items())


@pytest.mark.parametrize("architecture", ["deberta-v2", "roberta"])
def test_other_architectures_train_as_they_do_alone(architecture: str) -> None:
    compare(packing_evaluator(architecture), (LORAS[0], LORAS[2], LORAS[1]))


def test_what_has_other_methods_is_trained_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = packing_evaluator()
    alone: list[Configuration] = []
    train = evaluator.train

    def counted(configuration: Configuration, *arguments: Any, **options: Any) -> Any:
        alone.append(configuration)
        return train(configuration, *arguments, **options)

    monkeypatch.setattr(evaluator, "train", counted)
    packed = PackedTrainer(evaluator).train((LORAS[0], *OTHER_METHODS, LORAS[2]))
    assert alone == list(OTHER_METHODS)
    for configuration, trained in zip((LORAS[0], *OTHER_METHODS, LORAS[2]), packed, strict=True):
        assert_alike(trained, train(configuration))


@pytest.mark.parametrize("shares_blocks", [False, True])
@pytest.mark.parametrize("members", [(LORAS[0],), LORAS, (LORAS[3], LORAS[2], LORAS[1])])
def test_logits_are_those_of_the_members_alone(
    members: tuple[Configuration, ...], shares_blocks: bool
) -> None:
    """With random parameters: as they are initialised, adapters change nothing."""
    evaluator, batch = packing_evaluator(), tiny_batch()
    backbone = evaluator.backbone
    runs = [MemberRun(evaluator, configuration, seed, 1) for seed, configuration in enumerate(members)]
    runs.sort(key=lambda run: run.cut)
    alone: list[Tensor] = []
    for run in runs:
        draw_parameters(run.parameters.values(), 0.1, run.seed)
        with attach(backbone, run.configuration) as attachment, torch.no_grad():
            attachment.load_state_dict(run.parameters)
            alone.append(backbone.model(**batch).logits)
    with torch.no_grad():
        structure = Structure(backbone, evaluator.task, batch) if shares_blocks else None
        model = PackedModel(backbone, runs, structure)
        model.train(False)
        packed = model(batch)
        model.remove()
        frozen = backbone.model(**batch).logits
    assert backbone.attached is None
    for own, logits in zip(packed, alone, strict=True):
        assert float((logits - frozen).abs().max()) > 1e-3
        torch.testing.assert_close(own.logits, logits, rtol=0, atol=1e-5)


def test_blocks_below_the_cuts_run_once_for_all() -> None:
    evaluator = packing_evaluator()
    backbone = evaluator.backbone
    rows: dict[int, list[int]] = {}
    for block in range(4):
        query = backbone.model.get_submodule(backbone.sites[Site(block, "query")].module)
        query.register_forward_hook(
            lambda _module, inputs, _output, block=block: rows.setdefault(block, []).append(len(inputs[0]))
        )
    configurations = (lora("2.query"), lora("2.ffn_down", 4), lora("3.query", 1))
    runs = [MemberRun(evaluator, configuration, 0, 1) for configuration in configurations]
    with torch.no_grad():
        structure = Structure(backbone, evaluator.task, tiny_batch(rows=3))
    rows.clear()
    model = PackedModel(backbone, runs, structure)
    model(tiny_batch(rows=3))
    model.remove()
    assert rows == {0: [3], 1: [3], 2: [3, 6], 3: [9]}


@pytest.mark.slow
def test_a_real_model_trains_as_it_does_alone(minilm_folder: Path, questions_csv: Path) -> None:
    evaluator = minilm_evaluator(minilm_folder, questions_csv)
    compare(
        evaluator,
        (
            lora("0-5.query 0-5.value", 8, 1e-3),
            lora("4-5.query 4-5.ffn_up", 3, 5e-3),
            of({}),
        ),
        tolerance=1e-4,  # a fiftieth of a step; with one thread or two, sums differ in their last digits
    )


@pytest.mark.parametrize(
    "training",
    [
        {"epochs": 3, "max_steps": 9},
        {"epochs": 2, "max_steps": 6},
        {"epochs": 3, "validate_every": 2},
        {"epochs": 6, "patience": 1},
        {"epochs": 1, "gradient_clip": None, "warmup_share": 0.5},
        {"epochs": 1, "gradient_clip": 0.01, "precision": "bf16-mixed"},
    ],
)
def test_every_setting_of_a_training_holds(training: dict[str, Any]) -> None:
    evaluator = packing_evaluator(
        training=Training(**{"batch_size": 8, "device": "cpu", "precision": "32-true", **training})
    )
    if training.get("precision") == "bf16-mixed":  # rounding to 8 bits: alike, not equal
        several = LORAS[:3]
        packed = PackedTrainer(evaluator).train(several)
        for configuration, trained in zip(several, packed, strict=True):
            assert_alike(trained, evaluator.train(configuration), tolerance=3e-2)
        return
    packed = compare(evaluator, LORAS)
    if "patience" in training:
        assert len({trained.evaluation.cost.steps for trained in packed}) > 1
