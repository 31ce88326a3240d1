"""Which layers are trained, and that the others are not touched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from autopeft.callbacks import (
    IST,
    LISA,
    BestWeights,
    LoraModule,
    find_lora_modules,
)
from autopeft.callbacks.ist import score_change
from autopeft.callbacks.lisa import LayerSampling, find_layers
from tests.callbacks.lora_fits import ROWS, Classifier, Probe, batch_of, examples, fit, lora
from tests.conftest import ModelFactory

BLOCKS = 4


def blocks(tiny: ModelFactory) -> Classifier:
    """Return LoRA on four blocks, with a trained head."""
    overrides = {"n_layer": BLOCKS} if tiny.__qualname__.startswith("tiny_gpt2") else {}
    model = tiny(**(overrides or {"num_hidden_layers": BLOCKS}))
    classifier = lora(model)
    for name, parameter in classifier.named_parameters():
        if name.endswith(("score.weight", "classifier.weight")):
            parameter.requires_grad_(True)
    return classifier


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


class Watch(Callback):
    """Notes, at each batch, which parameters moved; sees what is trainable in validation."""

    def __init__(self, sampling: LayerSampling) -> None:
        self.sampling = sampling
        self.moves: list[tuple[tuple[str, ...], set[str]]] = []
        self.trainable_in_validation: list[int] = []
        self._before: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._before = values(pl_module)
        layers = find_layers(pl_module)
        assert tuple(layers) == self.sampling.active

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        after = values(pl_module)
        moved = {name for name, tensor in self._before.items() if not torch.equal(tensor, after[name])}
        self.moves.append((self.sampling.active, moved))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainable_in_validation.append(
            sum(parameter.requires_grad for parameter in pl_module.parameters())
        )


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("kind", ["random", "importance"])
def test_active_layers_and_the_head_alone_are_trained(
    kind: str, architecture: str, request: pytest.FixtureRequest
) -> None:
    classifier = blocks(request.getfixturevalue(f"tiny_{architecture}"))
    trainable = {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    sampling: LayerSampling = (
        LISA(2, every_n_steps=3) if kind == "random" else IST(trained_share=0.5, every_n_steps=3)
    )
    watch = Watch(sampling)
    fit(classifier, sampling, watch, epochs=3)
    assert len(sampling.layers) == BLOCKS
    for active, moved in watch.moves:
        assert len(active) == 2
        expected = {
            name
            for name in trainable
            if name.startswith(tuple(f"{layer}." for layer in active))
            or not name.startswith(tuple(f"{layer}." for layer in sampling.layers))
        }
        assert moved == expected
    # In validation and afterwards all is as it was.
    assert watch.trainable_in_validation == [len(trainable)] * 3
    assert {name for name, parameter in classifier.named_parameters() if parameter.requires_grad} == trainable


@pytest.mark.slow
def test_random_layers_change_as_often_as_asked_and_are_seeded(tiny_llama: ModelFactory) -> None:
    def chosen(seed: int, accumulate: int = 1) -> list[tuple[str, ...]]:
        sampling = LISA(1, every_n_steps=4, seed=seed)
        probe = Probe(lambda: sampling.active)
        fit(blocks(tiny_llama), sampling, probe, steps=24, accumulate_grad_batches=accumulate)
        return probe.notes

    first = chosen(1)
    assert all(len(set(first[start : start + 4])) == 1 for start in range(0, 24, 4))
    assert len(set(first)) > 1
    assert chosen(1) == first
    assert chosen(2) != first
    assert chosen(1, accumulate=2)[::2] == chosen(1, accumulate=2)[1::2] == first


def test_random_layers_work_for_full_fine_tuning(tiny_bert: ModelFactory) -> None:
    sampling = LISA(1, every_n_steps=1)
    watch = Watch(sampling)
    fit(Classifier(tiny_bert(num_hidden_layers=BLOCKS)), sampling, watch, steps=3)
    for active, moved in watch.moves:
        assert any("word_embeddings" in name for name in moved)
        assert any("classifier" in name for name in moved)
        assert {name.split(".layer.")[1][0] for name in moved if ".layer." in name} == {active[0][-1]}


def test_best_weights_are_whole(tiny_llama: ModelFactory) -> None:
    """A callback that copies what requires gradients must see frozen layers too."""
    classifier = blocks(tiny_llama)
    best = BestWeights("loss", "min")

    class Snapshot(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            snapshots[float(trainer.callback_metrics["loss"])] = values(pl_module)

    snapshots: dict[float, dict[str, Tensor]] = {}
    fit(classifier, LISA(1, every_n_steps=1), best, Snapshot(), epochs=4)
    for name, tensor in snapshots[best.best].items():
        assert torch.equal(values(classifier)[name], tensor)


def test_score_change() -> None:
    scores, losses = torch.tensor([0.0, 1.0, -2.0, 0.5]), [0.3, 1.1, 0.7]
    draws = [[0, 1], [1, 2], [0, 3]]
    rewards = [math.exp(-loss) for loss in losses]
    expected = [0.0] * 4
    for draw, reward in zip(draws, rewards, strict=True):
        for layer in draw:
            p = 1 / (1 + math.exp(-float(scores[layer])))
            expected[layer] += 10 * (reward - sum(rewards) / 3) * p * (1 - p)
    found = score_change(scores, draws, losses, learning_rate=10.0)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_scores_come_from_the_losses_under_suppression(tiny_llama: ModelFactory) -> None:
    """One update, against trials made by hand on the model as it was before that step."""
    sampling = IST(every_n_steps=2, seed=5, trained_share=0.5)
    rows = examples()[2 * ROWS : 3 * ROWS]

    class Trials(Callback):
        """Comes first, so that it sees the generator and the weights before the update."""

        expected = torch.zeros(BLOCKS)

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step != 2:
                return
            assert isinstance(pl_module, Classifier)
            generator = torch.Generator()
            generator.set_state(sampling.state_dict()["generator"])
            half = torch.full((BLOCKS,), 0.5)
            draws = [
                sorted(torch.multinomial(half, BLOCKS // 2, generator=generator).tolist()) for _ in range(3)
            ]
            losses = [suppressed_loss(pl_module, draw, rows, modules) for draw in draws]
            self.expected = score_change(torch.zeros(BLOCKS), draws, losses, learning_rate=10.0)

    trials = Trials()
    classifier = blocks(tiny_llama)
    modules = find_lora_modules(classifier)
    scalings = {name: dict(module.layer.scaling) for name, module in modules.items()}
    fit(classifier, trials, sampling, steps=3)
    assert {name: dict(module.layer.scaling) for name, module in modules.items()} == scalings
    assert trials.expected.abs().max() > 0
    importance = torch.tensor(list(sampling.importance().values()))
    torch.testing.assert_close(importance, torch.sigmoid(-trials.expected))


@torch.no_grad()
def suppressed_loss(
    classifier: Classifier, draw: list[int], rows: list[dict[str, Tensor]], modules: dict[str, LoraModule]
) -> float:
    """Return the loss with a quarter of B in some blocks: the update is linear in B."""
    saved = values(classifier)
    for name, module in modules.items():
        if int(name.split("layers.")[1][0]) in draw:
            module.up.weight.mul_(0.25)
    loss = float(classifier.loss(batch_of(rows)))
    classifier.load_state_dict(saved, strict=False)
    return loss


@pytest.mark.slow
def test_importance_is_what_suppression_costs(tiny_llama: ModelFactory) -> None:
    """One block alone has an update: the others cost nothing when suppressed."""
    classifier = blocks(tiny_llama)
    classifier.rate = 0.0
    sampling = IST(every_n_steps=1, learning_rate=200.0, trials=6)
    modules = find_lora_modules(classifier)
    with torch.no_grad():
        for name, module in modules.items():
            module.up.weight.zero_()
            if "layers.2.mlp.down_proj" in name:
                module.up.weight.normal_(0, 3.0)
    batch = batch_of(examples())
    cost = suppressed_loss(classifier, [2], examples(), modules) - float(classifier.loss(batch).detach())
    fit(classifier, sampling, steps=40)
    importance = list(sampling.importance().values())
    rest = (importance[0], importance[1], importance[3])
    assert importance[2] > max(rest) if cost > 0 else importance[2] < min(rest)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("kind", ["random", "importance"])
def test_a_resumed_fit_goes_on_as_if_nothing_had_happened(
    kind: str, tiny_llama: ModelFactory, tmp_path: Path
) -> None:
    def run(checkpoint: Path | None = None) -> tuple[Classifier, list[Any]]:
        classifier = blocks(tiny_llama)
        sampling: LayerSampling = LISA(2, every_n_steps=3) if kind == "random" else IST(every_n_steps=3)
        probe = Probe(lambda: sampling.active)
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
        fit(classifier, sampling, probe, saving, epochs=3, checkpoint=checkpoint, enable_checkpointing=True)
        return classifier, probe.notes

    whole, expected = run()
    resumed, found = run(tmp_path / "epoch=1.ckpt")
    assert found == expected[8:]
    for name, tensor in values(whole).items():
        torch.testing.assert_close(values(resumed)[name], tensor, msg=name)


def test_an_exception_leaves_nothing_frozen(tiny_llama: ModelFactory) -> None:
    class Failing(Classifier):
        def training_step(self, batch: Any, batch_index: int) -> Tensor:
            raise RuntimeError("out of luck")

    failing = Failing(blocks(tiny_llama).model)
    before = sum(parameter.requires_grad for parameter in failing.parameters())
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(failing, LISA(1, every_n_steps=1), steps=1)
    assert sum(parameter.requires_grad for parameter in failing.parameters()) == before


def test_plans_that_cannot_work_are_refused(tiny_llama: ModelFactory) -> None:
    with pytest.raises(ValueError, match=r"has 4 layers .* expected at least 5"):
        fit(blocks(tiny_llama), LISA(5, every_n_steps=1), steps=1)
    single = lora(tiny_llama(), target_modules=["layers.0.self_attn.q_proj"])
    with pytest.raises(ValueError, match="has 1 layers with trainable parameters"):
        fit(single, LISA(1, every_n_steps=1), steps=1)
    with pytest.raises(ValueError, match="no trainable LoRA layer"):
        fit(Classifier(tiny_llama()), IST(), steps=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trained_share": 0}, r"trained_share lies in \(0, 1\]"),
        ({"suppressed_share": 1.0}, r"suppressed_share in \(0, 1\)"),
        ({"trials": 1}, "trials must be a finite number of at least 2"),
        ({"every_n_steps": 0}, "every_n_steps must be a finite number of at least 1"),
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IST(**arguments)


def test_random_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="count must be a finite number of at least 1"):
        LISA(0, every_n_steps=1)
    with pytest.raises(ValueError, match="every_n_steps must be a finite number of at least 1"):
        LISA(1, every_n_steps=0)
