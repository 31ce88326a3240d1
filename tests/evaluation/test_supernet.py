"""One training gives every sub-configuration its weights."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from autopeft.callbacks import DivergenceError
from autopeft.callbacks.lora_modules import find_lora_modules
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import Cost
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.supernet.nested_ranks import SandwichRankSampler, rank_gates
from autopeft.evaluation.supernet.supernet import LoraSupernet
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.tasks.batch import LABELS, model_inputs
from autopeft.training.settings import Training
from tests.learnable import learner, tiny_evaluator
from tests.tiny_models import draw_parameters, everywhere, logits_of, tiny_backbone, tiny_batch

TRAINING = Training(epochs=12, batch_size=8, device="cpu", precision="32-true")
LARGEST_RANK = 8


def largest(backbone: Backbone, **options: object) -> Configuration:
    return everywhere(backbone, "lora", LARGEST_RANK, **options).replace(learning_rate=1e-2)


def sub(whole: Configuration, seed: int, lowest_block: int = 0) -> Configuration:
    """Return a sub-configuration with about half of the sites."""
    draw = random.Random(seed)
    adapters = {
        site: Adapter("lora", draw.choice((1, 2, 3, 8)), dict(several[0].options))
        for site, several in whole.adapters.items()
        if site.block >= lowest_block and draw.random() < 0.5
    }
    return Configuration(adapters)


def drawn_weights(backbone: Backbone, **options: object) -> LoraSupernet:
    """Return a supernet with random weights."""
    whole = largest(backbone, **options)
    with attach(backbone, whole) as attachment:
        draw_parameters(attachment.parameters.values(), std=0.2)
        tensors = attachment.state_dict()
    return LoraSupernet(largest=whole, tensors=tensors, cost=Cost())


def standalone_logits(
    supernet: LoraSupernet, backbone: Backbone, configuration: Configuration, batch: dict[str, Tensor]
) -> Tensor:
    with attach(backbone, configuration) as attachment:
        attachment.load_state_dict(supernet.state(configuration))
        return logits_of(backbone, batch)


@pytest.mark.slow
def test_one_training_teaches_every_sub_configuration() -> None:
    evaluator = tiny_evaluator(learner(num_hidden_layers=1), training=TRAINING, rows=96)
    backbone = evaluator.backbone
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    whole = largest(backbone)
    supernet = LoraSupernet.train(evaluator, whole, trainings=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items())
    assert supernet.cost.steps == 2 * evaluator.plan.total_steps
    assert supernet.cost.cpu_seconds > 0
    with attach(backbone, whole) as attachment:
        untrained = LoraSupernet(largest=whole, tensors=attachment.state_dict(), cost=Cost())
    points = [everywhere(backbone, "lora", rank) for rank in (1, 4, LARGEST_RANK)]
    points += [sub(whole, seed) for seed in range(4)]
    loss_before, _ = validation(evaluator, untrained, whole)
    for point in points:
        loss, accuracy = validation(evaluator, supernet, point)
        assert loss < loss_before - 0.1
        assert accuracy > 0.45  # of three classes


def validation(
    evaluator: Evaluator, supernet: LoraSupernet, configuration: Configuration
) -> tuple[float, float]:
    """Return loss and accuracy on the validation split with the supernet's weights."""
    logits, labels = [], []
    for batch in evaluator.data.val_dataloader():
        labels.append(batch[LABELS])
        inputs = dict(model_inputs(batch))
        logits.append(standalone_logits(supernet, evaluator.backbone, configuration, inputs))
    all_logits, all_labels = torch.cat(logits), torch.cat(labels)
    hits = (all_logits.argmax(1) == all_labels).float().mean()
    return float(functional.cross_entropy(all_logits, all_labels)), float(hits)


def test_the_same_seed_gives_the_same_adapter_and_it_survives_a_file(tmp_path: Path) -> None:
    tensors = []
    for draws in (3, 5):
        torch.rand(draws)  # random numbers of others do not matter
        evaluator = tiny_evaluator()
        supernet = LoraSupernet.train(evaluator, largest(evaluator.backbone), trainings=0.5)
        assert supernet.cost.steps == evaluator.plan.total_steps // 2
        tensors.append(supernet.tensors)
    other = LoraSupernet.train(evaluator, supernet.largest, trainings=0.5, seed=1)
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    assert any(not torch.equal(tensor, other.tensors[name]) for name, tensor in tensors[0].items())
    supernet.save(tmp_path / "folder" / "supernet.safetensors")
    again = LoraSupernet.load(tmp_path / "folder" / "supernet.safetensors")
    assert again is not None
    assert (again.largest, again.cost) == (supernet.largest, supernet.cost)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in supernet.tensors.items())
    assert LoraSupernet.load(tmp_path / "none.safetensors") is None


def gated_logits(
    supernet: LoraSupernet, backbone: Backbone, configurations: list[Configuration], batch: dict[str, Tensor]
) -> Tensor:
    """Return the logits of the whole supernet, with one sub-configuration switched on for each row."""
    with attach(backbone, supernet.largest) as attachment:
        attachment.load_state_dict(supernet.tensors)
        modules = find_lora_modules(backbone.model)
        for site in supernet.largest.adapters:
            module = modules[backbone.shape(site).module]
            adapters = [configuration.adapters.get(site) for configuration in configurations]
            ranks = [0 if adapter is None else adapter[0].size for adapter in adapters]
            gate = rank_gates(torch.tensor(ranks), module)
            module.down.register_forward_hook(
                lambda _module, _inputs, output, gate=gate: output * gate[:, None]
            )
        return logits_of(backbone, batch)


@pytest.mark.parametrize("options", [{}, {"rslora": False, "alpha": 3}], ids=("rslora", "alpha/r"))
def test_a_row_with_a_rank_trains_what_a_lora_of_that_rank_does(options: dict[str, object]) -> None:
    backbone = tiny_backbone("bert")
    supernet = drawn_weights(backbone, **options)
    batch = tiny_batch(rows=6)
    points = [*(sub(supernet.largest, seed) for seed in range(4)), supernet.largest, Configuration({})]
    expected = [standalone_logits(supernet, backbone, point, batch) for point in points]
    logits = gated_logits(supernet, backbone, points, batch)
    for row, alone in enumerate(expected):
        torch.testing.assert_close(logits[row], alone[row], rtol=1e-5, atol=1e-6)


def test_a_batch_is_a_sandwich() -> None:
    blocks, ranks = np.array([0, 0, 1, 1, 2]), np.array([8, 8, 8, 4, 8])
    draw = SandwichRankSampler(blocks, ranks, seed=0)
    seen = set()
    for rows in (1, 2, 3, 16):
        for _ in range(40):
            drawn = draw.sandwich(rows)
            assert drawn.shape == (rows, 5)
            assert (drawn == ranks).all(1).any()
            assert rows == 1 or (drawn == 1).all(1).any()
            assert np.isin(drawn, (0, 1, 2, 4, 8)).all()
            assert (drawn <= ranks).all()
            seen |= {tuple(row) for row in drawn}
    drawn = np.array(sorted(seen))
    assert {0, 1, 2, 4, 8} <= {*drawn[:, 0]}
    assert {0, 1, 2, 4} <= {*drawn[:, 3]}
    assert any((row[:4] == 0).all() and row[4] for row in drawn)  # the top block alone


def test_what_is_no_sub_configuration_is_refused() -> None:
    evaluator = tiny_evaluator()
    site = Site(0, "query")
    supernet = LoraSupernet(largest=Configuration({site: Adapter("lora", 4)}), tensors={}, cost=Cost())
    for place, adapter in (
        (site, Adapter("lora", 8)),
        (Site(1, "query"), Adapter("lora", 2)),
        (site, Adapter("lora", 4, {"alpha": 16})),
        (Site(0, "ffn"), Adapter("series", 4)),
    ):
        assert not supernet.contains(Configuration({place: adapter}))
        with pytest.raises(ValueError, match="is no sub-configuration of the supernet"):
            supernet.state(Configuration({place: adapter}))
    assert supernet.contains(Configuration({site: Adapter("lora", 2)}))
    mixed = Configuration({Site(0, "ffn"): Adapter("series", 4)})
    for whole, words in ((mixed, "got series"), (Configuration({}), "got no adapters")):
        with pytest.raises(ValueError, match=f"is lora at one or more sites, {words}"):
            LoraSupernet.train(evaluator, whole)
    with pytest.raises(ValueError, match="trainings must be a finite number above 0"):
        LoraSupernet.train(evaluator, supernet.largest, trainings=0)


def test_a_training_that_diverges_leaves_the_backbone_as_it_was() -> None:
    evaluator = tiny_evaluator()
    batch = tiny_batch()
    before = logits_of(evaluator.backbone, batch)
    with pytest.raises(DivergenceError):
        LoraSupernet.train(evaluator, largest(evaluator.backbone).replace(learning_rate=1e30), trainings=3)
    assert evaluator.backbone.attached is None
    assert torch.equal(logits_of(evaluator.backbone, batch), before)
