"""Packed trials: several candidates in one pass, each with the outcome it has alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from autopeft.core.configuration import Configuration, Site
from autopeft.evaluation.packing.adapters import Member
from autopeft.evaluation.packing.forward import PackedModel
from autopeft.evaluation.packing.trainer import PackedTrainer
from autopeft.methods import attach
from autopeft.training.settings import Training
from tests.packed import (
    BITFIT,
    LORAS,
    MIXED,
    assert_alike,
    compare,
    lora,
    minilm_evaluator,
    of,
    packing_backbone,
    packing_evaluator,
)
from tests.tiny_models import draw_parameters, tiny_batch


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_loras_of_other_ranks_sites_and_rates_train_as_they_do_alone(architecture: str) -> None:
    evaluator = packing_evaluator(architecture)
    # 5e-5: rounding, which differs between processors and which Adam does not make smaller.
    for trained in compare(evaluator, LORAS, seed=3, tolerance=5e-5):
        with attach(evaluator.backbone, trained.evaluation.configuration, 3) as attachment:
            initial = attachment.state_dict()
        assert trained.state is not None
        assert all(not torch.equal(trained.state[name], one) for name, one in initial.items())


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_mixed_methods_train_as_they_do_alone(architecture: str) -> None:
    candidates = MIXED if architecture == "llama" else (*MIXED, BITFIT)  # Llama has no biases
    compare(packing_evaluator(architecture), candidates)


@pytest.mark.parametrize("architecture", ["deberta-v2", "roberta"])
def test_other_architectures_train_as_they_do_alone(architecture: str) -> None:
    compare(packing_evaluator(architecture), (LORAS[0], LORAS[2], BITFIT))


@pytest.mark.parametrize("candidates", [(LORAS[0],), LORAS, MIXED, (LORAS[3], BITFIT, MIXED[2])])
def test_logits_are_those_of_the_candidates_alone(candidates: tuple[Configuration, ...]) -> None:
    """With every parameter drawn: right after attaching, most adapters change nothing."""
    backbone, batch = packing_backbone(), tiny_batch()
    members, alone = [], []
    for seed, configuration in enumerate(candidates):
        with attach(backbone, configuration, seed) as attachment, torch.no_grad():
            draw_parameters(attachment.parameters.values(), 0.1, seed)
            alone.append(backbone.model(**batch).logits)
            members.append(Member(configuration, dict(attachment.parameters)))
    with PackedModel(backbone, members) as model, torch.no_grad():
        model.train(False)
        packed = model(batch)
    frozen = backbone.model(**batch).logits
    assert all(bool((one - frozen).abs().max() > 1e-3) for one in alone)
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_blocks_below_the_cut_run_once_for_all() -> None:
    backbone = packing_backbone()
    rows: list[int] = []
    query = backbone.model.get_submodule(backbone.sites[Site(0, "query")].module)
    handle = query.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    members = []
    for configuration in (LORAS[2], MIXED[5], MIXED[4]):
        with attach(backbone, configuration) as attachment:
            members.append(Member(configuration, dict(attachment.parameters)))
    with PackedModel(backbone, members) as model:
        model(tiny_batch(rows=3))
    handle.remove()
    assert rows == [3]


@pytest.mark.slow
def test_a_real_model_trains_as_it_does_alone(minilm_folder: Path, questions_csv: Path) -> None:
    evaluator = minilm_evaluator(minilm_folder, questions_csv)
    compare(
        evaluator,
        (
            lora("0-5.query 0-5.value", 8, 1e-3),
            lora("4-5.query 4-5.ffn_up", 3, 5e-3),
            of({"3.ffn": {"method": "parallel", "size": 8}, "5.attention": {"method": "prefix", "size": 4}}),
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
        several = (*LORAS[:2], BITFIT)
        packed = PackedTrainer(evaluator).train(several)
        for configuration, trained in zip(several, packed, strict=True):
            assert_alike(trained, evaluator.train(configuration), tolerance=3e-2)
        return
    packed = compare(evaluator, LORAS)
    if "patience" in training:
        assert len({one.evaluation.cost.steps for one in packed}) > 1
