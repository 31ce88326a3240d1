"""Preference optimisation on many bases: dropout, gradients, checkpointing, precisions and memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from autopeft import Training
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.methods import attach
from benchmarks.memory import measure_live_storage
from tests.quantized import bytes_of_scales, quiet
from tests.slow_cases import slow_unless
from tests.task_cases import TASK_CASES
from tests.tasks.test_causal_lm_contract import backbone_of, lora
from tests.tiny_models import draw_parameters

pytestmark = quiet
CASES = [
    (architecture, base, checkpointing)
    for architecture in ("gpt2", "llama")  # of which the first has dropout
    for base in ("float32", "bfloat16", "nf4")
    for checkpointing in (False, True)
]
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05, "nf4": 0.05}  # of norms


def evaluator_of(architecture: str, base: str, checkpointing: bool, folder: Path) -> Evaluator:
    task = TASK_CASES["PreferenceOptimization"].make()
    training = Training(batch_size=4, device="cpu", gradient_checkpointing=checkpointing)
    objectives = resolve_objectives(("loss", "trainable_parameters", "peak_memory"), task.metrics)
    return Evaluator(backbone_of(architecture, base, task, folder), task, training, objectives)


def likelihoods(evaluator: Evaluator, batch: dict[str, Tensor]) -> Tensor:
    """Return the log-likelihood of each reply, of shape (pairs, 2), each run alone and without padding."""
    found = []
    for tokens, mask, labels in zip(
        *(batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        length = int(mask.sum())
        logits = evaluator.backbone.model(tokens[None, :length]).logits[0].float().log_softmax(-1)
        learnt = [place for place in range(1, length) if labels[place] != -100]
        found.append(torch.stack([logits[place - 1, tokens[place]] for place in learnt]).sum())
    return torch.stack(found).view(-1, 2)


def gradients_of(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Return copies of the gradients there are."""
    return {own: own.grad.clone() for own in model.parameters() if own.grad is not None}


@pytest.mark.parametrize(
    ("architecture", "base", "checkpointing"),
    slow_unless(lambda *case: case in [("gpt2", "float32", True), ("llama", "nf4", True)], CASES),
)
def test_a_training_step_is_that_of_a_slow_reference(
    architecture: str, base: str, checkpointing: bool, tmp_path: Path
) -> None:
    evaluator = evaluator_of(architecture, base, checkpointing, tmp_path)
    backbone, task, batch = evaluator.backbone, evaluator.task, evaluator.data.largest_batch()
    model: Any = backbone.model
    with backbone.computing_in(evaluator.training.resolved_precision()):
        with torch.no_grad():
            reference = likelihoods(evaluator, batch)
        with evaluator.own_dropout(), attach(backbone, lora(backbone)) as attachment:
            parameters = attachment.parameters
            draw_parameters(parameters.values(), std=0.1)
            loss = task.loss(task.forward(model.train(), batch), batch)
            loss.backward()
            gradients = gradients_of(model)
            assert gradients.keys() == set(parameters.values())
            model.eval().zero_grad()
            gains = likelihoods(evaluator, batch) - reference
            slow = -logsigmoid(gains[:, 0] - gains[:, 1]).mean()  # beta is 1
            slow.backward()
            assert loss.item() == pytest.approx(slow.item(), rel=TOLERANCES[base])
            assert loss.item() != pytest.approx(math.log(2), rel=0.01)
            for parameter, expected in gradients_of(model).items():
                difference = (gradients[parameter] - expected).norm() / expected.norm()
                assert float(difference) < TOLERANCES[base]


@pytest.mark.parametrize(("base", "checkpointing"), [("float32", False), ("bfloat16", True)])
def test_before_a_step_the_model_in_training_is_its_reference(
    base: str, checkpointing: bool, tmp_path: Path
) -> None:
    evaluator = evaluator_of("gpt2", base, checkpointing, tmp_path)
    backbone, task, batch = evaluator.backbone, evaluator.task, evaluator.data.largest_batch()
    with (
        backbone.computing_in(evaluator.training.resolved_precision()),
        evaluator.own_dropout(),
        attach(backbone, lora(backbone)),
    ):
        output = task.forward(backbone.model.train(), batch)
        backbone.model.eval()
    assert not output.margins.any()
    assert task.loss(output, batch).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("architecture", "base", "checkpointing"),
    slow_unless(lambda *case: case == ("llama", "float32", False), CASES),
)
def test_memory_is_counted_with_both_passes(
    architecture: str, base: str, checkpointing: bool, tmp_path: Path
) -> None:
    evaluator = evaluator_of(architecture, base, checkpointing, tmp_path)
    backbone, batch = evaluator.backbone, evaluator.data.largest_batch()
    with evaluator.own_dropout(), attach(backbone, lora(backbone)) as attachment:
        counted = evaluator.peak_bytes(attachment)
        precision = evaluator.training.resolved_precision()
        real = measure_live_storage(backbone.model.train(), batch, evaluator.task, precision=precision)
        backbone.model.eval()
        real += bytes_of_scales(backbone.model)
    assert counted == pytest.approx(real, rel=0.02)
