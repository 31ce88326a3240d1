"""One training gives every sub-configuration its weights; inference scores it as an attachment would."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autopeft.callbacks import DivergenceError
from autopeft.callbacks.lora_modules import find_lora_modules
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import Cost
from autopeft.evaluation.supernet.block_output_reuse import BlockOutputReuse
from autopeft.evaluation.supernet.nested_ranks import SandwichRankSampler, rank_masks
from autopeft.evaluation.supernet.supernet import ElasticAdapter
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


def drawn_weights(backbone: Backbone, **options: object) -> ElasticAdapter:
    """Return an elastic adapter whose every number is drawn."""
    whole = largest(backbone, **options)
    with attach(backbone, whole) as attachment:
        draw_parameters(attachment.parameters.values(), std=0.2)
        tensors = attachment.state_dict()
    return ElasticAdapter(largest=whole, tensors=tensors, cost=Cost())


def standalone_logits(
    elastic: ElasticAdapter, backbone: Backbone, configuration: Configuration, batch: dict[str, Tensor]
) -> Tensor:
    with attach(backbone, configuration) as attachment:
        attachment.load_state_dict(elastic.state(configuration))
        return logits_of(backbone, batch)


@pytest.mark.parametrize("options", [{}, {"rslora": False, "alpha": 3}], ids=("rslora", "alpha/r"))
def test_a_sub_configuration_scores_as_an_attachment_with_its_weights(options: dict[str, object]) -> None:
    evaluator = tiny_evaluator(learner(num_hidden_layers=3))
    backbone = evaluator.backbone
    elastic = drawn_weights(backbone, **options)
    points = [sub(elastic.largest, seed, lowest_block=seed % 3) for seed in range(9)]
    points += [Configuration({}), elastic.largest, points[0]]
    scoring = elastic.score(evaluator, points)
    assert len({round(one.loss, 6) for one in scoring.scores}) > len(points) // 2
    for point, score in zip(points, scoring.scores, strict=True):
        logits, labels = [], []
        for batch in evaluator.data.val_dataloader():
            labels.append(batch[LABELS])
            logits.append(standalone_logits(elastic, backbone, point, model_inputs(batch)))
        loss = float(evaluator.task.loss(torch.cat(logits), torch.cat(labels)))
        assert score.loss == pytest.approx(loss, rel=1e-6)
        hits = (torch.cat(logits).argmax(1) == torch.cat(labels)).float().mean()
        assert score.metrics["accuracy"] == pytest.approx(float(hits))
    whole = len(points) * 3 * len(list(evaluator.data.val_dataloader()))
    assert scoring.passes < 0.8 * whole  # some begin in the second block or the third
    assert scoring.cost.cpu_seconds > 0


@pytest.mark.parametrize("architecture", ["bert", "deberta-v2", "gpt2", "llama", "modernbert", "t5"])
def test_blocks_that_stay_the_same_are_left_out(architecture: str) -> None:
    backbone = tiny_backbone(architecture)
    batch = tiny_batch()
    blocks = backbone.blocks
    cut = len(blocks) // 2
    sites = [site for site in everywhere(backbone, "lora").adapters if site.block >= cut]
    expected = logits_of(backbone, batch)
    with attach(backbone, Configuration({site: Adapter("lora", 2) for site in sites})) as attachment:
        with torch.no_grad(), BlockOutputReuse(backbone.model, blocks) as prefix:
            backbone.model.eval()
            first = prefix.logits(batch, 0)
            draw_parameters(attachment.parameters.values(), std=0.3)
            second = prefix.logits(batch, cut)
        changed = logits_of(backbone, batch)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-6)
    assert torch.equal(second, changed)
    assert not torch.allclose(second, first, atol=1e-3)
    assert prefix.passes == 2 * len(blocks) - cut
    assert torch.equal(logits_of(backbone, batch), expected)  # nothing is left behind


def test_a_block_that_runs_twice_is_run_again() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(3, 3)

        def forward(self, given: Tensor) -> object:
            return type("Output", (), {"logits": self.block(self.block(given))})

    model, given = Repeated(), {"given": torch.randn(2, 3)}
    with torch.no_grad(), BlockOutputReuse(model, [model.block]) as prefix:
        first = prefix.logits(given, 0)
        model.block.weight.mul_(2)
        second = prefix.logits(given, 1)
    assert not torch.equal(first, second)
    assert torch.equal(second, model(**given).logits)


def test_one_training_teaches_every_sub_configuration() -> None:
    evaluator = tiny_evaluator(learner(num_hidden_layers=1), training=TRAINING, rows=96)
    backbone = evaluator.backbone
    before = {name: one.clone() for name, one in backbone.model.state_dict().items()}
    whole = largest(backbone)
    elastic = ElasticAdapter.train(evaluator, whole)
    assert all(torch.equal(one, before[name]) for name, one in backbone.model.state_dict().items())
    assert elastic.cost.steps == evaluator.plan.total_steps
    assert elastic.cost.cpu_seconds > 0
    with attach(backbone, whole) as attachment:
        start = ElasticAdapter(largest=whole, tensors=attachment.state_dict(), cost=Cost())
    points = [everywhere(backbone, "lora", rank) for rank in (1, 4, LARGEST_RANK)]
    points += [sub(whole, seed) for seed in range(4)]
    (untrained,) = start.score(evaluator, [whole]).scores
    for score in elastic.score(evaluator, points).scores:
        assert score.loss < untrained.loss - 0.1
        assert score.metrics["accuracy"] > 0.5  # of three classes


def test_the_same_seed_gives_the_same_adapter_and_it_survives_a_file(tmp_path: Path) -> None:
    tensors = []
    for draws in (3, 5):
        torch.rand(draws)  # random numbers of others do not matter
        evaluator = tiny_evaluator()
        elastic = ElasticAdapter.train(evaluator, largest(evaluator.backbone), trainings=0.5)
        assert elastic.cost.steps == evaluator.plan.total_steps // 2
        tensors.append(elastic.tensors)
    other = ElasticAdapter.train(evaluator, elastic.largest, trainings=0.5, seed=1)
    assert all(torch.equal(one, tensors[1][name]) for name, one in tensors[0].items())
    assert any(not torch.equal(one, other.tensors[name]) for name, one in tensors[0].items())
    elastic.save(tmp_path / "folder" / "elastic.safetensors")
    again = ElasticAdapter.load(tmp_path / "folder" / "elastic.safetensors")
    assert again is not None
    assert (again.largest, again.cost) == (elastic.largest, elastic.cost)
    assert all(torch.equal(one, again.tensors[name]) for name, one in elastic.tensors.items())
    assert ElasticAdapter.load(tmp_path / "none.safetensors") is None


def test_a_row_with_a_rank_trains_what_a_lora_of_that_rank_does() -> None:
    backbone = tiny_backbone("bert")
    elastic = drawn_weights(backbone, rslora=False)
    batch = tiny_batch(rows=4)
    points = [sub(elastic.largest, seed) for seed in range(4)]
    expected = [standalone_logits(elastic, backbone, point, batch) for point in points]
    with attach(backbone, elastic.largest) as attachment:
        attachment.load_state_dict(elastic.tensors)
        modules = find_lora_modules(backbone.model)
        for site in elastic.largest.adapters:
            module = modules[backbone.shape(site).module]
            sizes = [point.adapters[site][0].size if site in point.adapters else 0 for point in points]
            gate = rank_masks(module)[torch.tensor(sizes)]
            module.down.register_forward_hook(
                lambda _module, _inputs, output, gate=gate: output * gate[:, None]
            )
        logits = logits_of(backbone, batch)
    for row, alone in enumerate(expected):
        torch.testing.assert_close(logits[row], alone[row], rtol=1e-5, atol=1e-6)


def test_a_batch_is_a_sandwich() -> None:
    blocks, ranks = np.array([0, 0, 1, 1, 2]), np.array([8, 8, 8, 4, 8])
    draw = SandwichRankSampler(blocks, ranks, smallest=2, seed=0)
    seen = set()
    for rows in (1, 2, 3, 16):
        for _ in range(40):
            drawn = draw.sandwich(rows)
            assert drawn.shape == (rows, 5)
            assert (drawn == ranks).all(1).any()
            assert rows == 1 or (drawn == 2).all(1).any()
            assert np.isin(drawn, (0, 2, 4, 8)).all()
            assert (drawn <= ranks).all()
            seen |= {tuple(row) for row in drawn}
    drawn = np.array(sorted(seen))
    assert {0, 2, 4, 8} <= {*drawn[:, 0]}
    assert {0, 2, 4} <= {*drawn[:, 3]}
    assert any((row[:4] == 0).all() and row[4] for row in drawn)  # the top block alone


def test_what_is_no_sub_configuration_is_refused() -> None:
    evaluator = tiny_evaluator()
    site = Site(0, "query")
    elastic = ElasticAdapter(largest=Configuration({site: Adapter("lora", 4)}), tensors={}, cost=Cost())
    cases = {
        "rank 8 at 0.query is above 4": Configuration({site: Adapter("lora", 8)}),
        "1.query has no elastic adapter": Configuration({Site(1, "query"): Adapter("lora", 2)}),
        "the options at 0.query differ": Configuration({site: Adapter("lora", 4, {"alpha": 16})}),
        "0.ffn has series, not lora": Configuration({Site(0, "ffn"): Adapter("series", 4)}),
    }
    for words, configuration in cases.items():
        assert elastic.obstacle(configuration) is not None
        with pytest.raises(ValueError, match=words):
            elastic.score(evaluator, [configuration])
        with pytest.raises(ValueError, match=words):
            elastic.state(configuration)
    mixed = Configuration({Site(0, "ffn"): Adapter("series", 4)})
    for whole, words in ((mixed, "got series"), (Configuration({}), "got no adapters")):
        with pytest.raises(ValueError, match=f"is lora at one or more sites, {words}"):
            ElasticAdapter.train(evaluator, whole)
    for name in ("trainings", "smallest_rank"):
        with pytest.raises(ValueError, match=f"{name} is a number above 0"):
            ElasticAdapter.train(evaluator, elastic.largest, **{name: 0})


def test_a_training_that_diverges_leaves_the_backbone_as_it_was() -> None:
    evaluator = tiny_evaluator()
    batch = tiny_batch()
    before = logits_of(evaluator.backbone, batch)
    with pytest.raises(DivergenceError):
        ElasticAdapter.train(evaluator, largest(evaluator.backbone).replace(learning_rate=1e30), trainings=3)
    assert evaluator.backbone.attached is None
    assert torch.equal(logits_of(evaluator.backbone, batch), before)
