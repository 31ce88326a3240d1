"""Scores of weights in 4 and 8 bits are those of the numbers that these stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autopeft.models.loading import Quantization
from autopeft.models.quantized_layers import full_weight
from autopeft.sensitivity import compute_scores
from autopeft.sensitivity.registry import SCORES
from tests.quantized import QUANTIZATIONS, quantized, quiet, save_base
from tests.tasks.test_causal_lm import task_of

pytestmark = quiet
NAMES = [name for name in SCORES if name != "leave_one_out"]
# All in bfloat16, and 8-bit layers round what they are given, too.
TOLERANCES = dict.fromkeys(NAMES, 0.05) | {"grasp": 0.15, "condition_number": 0.1, "synflow": 0.1}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_quantised_weights_are_scored_as_the_numbers_they_stand_for(
    architecture: str, quantization: Quantization, tmp_path: Path
) -> None:
    task = task_of(24)
    base = save_base(tmp_path / "base", architecture)
    packed, plain = quantized(base, quantization, task), quantized(base, None, task)
    before = {name: tensor.clone() for name, tensor in packed.model.state_dict().items()}
    with torch.no_grad():
        for name in packed.quantized:
            weight = plain.model.get_submodule(name).get_parameter("weight")
            numbers = full_weight(packed.model.get_submodule(name))
            weight.copy_(numbers.mT if architecture == "gpt2" else numbers)  # GPT-2's lie transposed
    loader = task.data(packed.processor, batch_size=4, seed=0).train_dataloader(0)
    batches = [batch for batch, _ in zip(loader, range(2), strict=False)]
    found = compute_scores(packed, batches, task, NAMES)
    for name, expected in compute_scores(plain, batches, task, NAMES).items():
        pairs = torch.tensor([(found[name].values[site], value) for site, value in expected.values.items()])
        if name == "hessian":  # near 0 for a few sites
            assert float(torch.corrcoef(pairs.mT)[0, 1]) > 0.99, name
        else:
            nearly = (
                0.01 * float(pairs.abs().max()) if name == "grasp" else 0.0
            )  # of both signs, near 0 for one
            torch.testing.assert_close(*pairs.unbind(1), rtol=TOLERANCES[name], atol=nearly, msg=name)
    after = packed.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
