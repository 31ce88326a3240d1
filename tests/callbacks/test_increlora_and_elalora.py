"""Ranks that are switched on and off by sensitivity: IncreLoRA and ElaLoRA."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from autopeft.callbacks import (
    ElaLoRA,
    IncreLoRA,
    find_lora_modules,
)
from autopeft.callbacks.elalora import choose_moves, spread_evenly
from autopeft.callbacks.smoothed_sensitivity import SmoothedSensitivity
from tests.callbacks.lora_fits import (
    RANK,
    ROWS,
    Classifier,
    Probe,
    examples,
    fit,
    gated_loss,
    lora,
)
from tests.conftest import ModelFactory


def one_step_score(sensitivity: Tensor, beta: float = 0.85) -> Tensor:
    mean = (1 - beta) * sensitivity
    return mean * (1 - beta) * (sensitivity - mean).abs()


def first(count: int, classifier: Classifier) -> dict[str, Tensor]:
    mask = (torch.arange(RANK) < count).float()
    return dict.fromkeys(find_lora_modules(classifier), mask)


def test_sensitivities_are_smoothed() -> None:
    averages = SmoothedSensitivity((0.8, 0.6))
    mean = uncertainty = 0.0
    for value in (1.0, 3.0, 0.5):
        averages.update("x", torch.tensor(value))
        mean = 0.8 * mean + 0.2 * value
        uncertainty = 0.6 * uncertainty + 0.4 * abs(value - mean)
    assert float(averages.score("x")) == pytest.approx(mean * uncertainty)
    with pytest.raises(ValueError, match=r"lie in \(0, 1\)"):
        SmoothedSensitivity((0.8, 1.0))


# IncrementalRanks


@pytest.mark.parametrize("accumulate", [1, 2])
def test_incremental_scores_are_those_of_the_full_gradient(tiny_gpt2: ModelFactory, accumulate: int) -> None:
    classifier = lora(tiny_gpt2(), RANK, lora_alpha=6)
    reference = copy.deepcopy(classifier)
    callback = IncreLoRA(12, initial_rank=2, every_n_steps=1, modules_per_growth=4)
    probe = Probe(callback.scores)
    fit(classifier, callback, probe, steps=1, accumulate_grad_batches=accumulate)

    modules = find_lora_modules(reference)
    sensitivities = dict.fromkeys(modules, torch.zeros(()))
    for index in range(accumulate):
        rows = examples()[ROWS * index : ROWS * (index + 1)]
        # The gradient with respect to ΔW is that with respect to W.
        weights = [
            cast(Tensor, module.layer.get_base_layer().weight).requires_grad_(True)
            for module in modules.values()
        ]
        loss = gated_loss(reference, first(2, reference), rows) / accumulate
        slopes = torch.autograd.grad(loss, weights)
        for (name, module), slope in zip(modules.items(), slopes, strict=True):
            update = 6 / RANK * module.up.weight[:, :2] @ module.down.weight[:2]
            value = (update.T * slope).abs().sum() / math.sqrt(slope.numel())  # Conv1D is transposed
            sensitivities[name] = sensitivities[name] + value / accumulate
    for name, sensitivity in sensitivities.items():
        expected = float(one_step_score(sensitivity.detach()))
        assert probe.notes[-1][name] == pytest.approx(expected, rel=1e-3, abs=0)


class Growth(Probe):
    """Notes ranks and scores after each step, after the callback (which comes first)."""

    def __init__(self, callback: IncreLoRA) -> None:
        super().__init__(lambda: (dict(callback.ranks()), callback.scores()))


def test_incremental_ranks_keep_to_the_budget_and_grow_where_the_score_is_highest(
    tiny_bert: ModelFactory,
) -> None:
    classifier = lora(tiny_bert(), RANK, drawn=False)
    modules = len(find_lora_modules(classifier))
    callback = IncreLoRA(modules + 5, every_n_steps=3, modules_per_growth=2, warmup_steps=3)
    growth = Growth(callback)
    fit(classifier, callback, growth, steps=16)
    totals = [sum(ranks.values()) - modules for ranks, _ in growth.notes]
    assert totals == [0] * 5 + [2] * 3 + [4] * 3 + [5] * 5
    for (before, _), (after, scores) in zip(growth.notes, growth.notes[1:], strict=False):
        grown = {name for name in after if after[name] > before[name]}
        free = [name for name in scores if before[name] < RANK]
        assert grown == set(sorted(free, key=scores.__getitem__, reverse=True)[: len(grown)])
    assert sum(callback.ranks().values()) == callback.budget


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 1000}, r"cannot hold a budget of 1000"),
        ({"budget": 3}, r"ranks from 1 to .* cannot hold a budget of 3"),
        ({"initial_rank": 5}, r"ranks from 5 to 4\.\.4"),
        ({"every_n_steps": 4}, r"reached after step 16 at the earliest, but the trainer takes 8"),
        ({"warmup_steps": 6}, r"after step 10 at the earliest"),
    ],
)
def test_incremental_plans_that_cannot_work_are_refused(
    arguments: dict[str, Any], message: str, tiny_llama: ModelFactory
) -> None:
    settings: dict[str, Any] = {"budget": 14, "every_n_steps": 1, "modules_per_growth": 2} | arguments
    with pytest.raises(ValueError, match=message):
        fit(lora(tiny_llama(), RANK), IncreLoRA(**settings), steps=8)


@pytest.mark.parametrize("name", ["budget", "every_n_steps", "modules_per_growth", "initial_rank"])
def test_incremental_arguments_out_of_range_are_refused(name: str) -> None:
    settings: dict[str, Any] = {"budget": 8, "every_n_steps": 1, "modules_per_growth": 2, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 1, got 0"):
        IncreLoRA(**settings)


# ElasticRanks


def test_elastic_importance_is_that_of_the_gradients(tiny_bert: ModelFactory) -> None:
    classifier = lora(tiny_bert(), RANK)
    reference = copy.deepcopy(classifier)
    modules = find_lora_modules(reference)
    callback = ElaLoRA(3 * len(modules), every_n_steps=100, moves=1)
    fit(classifier, callback, steps=1)
    gated_loss(reference, first(3, reference)).backward()
    importance = callback.importance()
    for name, module in modules.items():
        down, up = module.down.weight, module.up.weight
        assert down.grad is not None
        assert up.grad is not None
        expected = one_step_score((down * down.grad).abs()).mean(1)
        expected = expected + one_step_score((up * up.grad).abs()).mean(0)
        torch.testing.assert_close(importance[name], expected.detach())
        assert importance[name][3] == 0


def test_elastic_ranks_move_within_the_budget(tiny_bert: ModelFactory) -> None:
    classifier = lora(tiny_bert(), RANK)
    modules = len(find_lora_modules(classifier))
    callback = ElaLoRA(2 * modules + 1, every_n_steps=3, moves=2, warmup_steps=3, stop_step=10, seed=7)
    probe = Probe(lambda: dict(callback.ranks()))
    fit(classifier, callback, probe, steps=16)
    for ranks in probe.notes:
        assert sum(ranks.values()) == callback.budget
        assert min(ranks.values()) >= 1
    changes = [a != b for a, b in zip(probe.notes, probe.notes[1:], strict=False)]
    # Steps are counted from 1: the change between the fifth and the sixth note is that of step 6.
    assert [index + 2 for index, changed in enumerate(changes) if changed] == [6, 9]


class Added(Probe):
    """Looks at the loss before and after ranks move, through its own forward pass."""

    def __init__(self, callback: ElaLoRA) -> None:
        super().__init__()
        self.callback = callback

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for name, index in self.callback._added:
            module = find_lora_modules(pl_module)[name]
            self.notes.append((module.down.weight[index].detach(), module.up.weight[:, index].detach()))


def test_an_added_rank_starts_with_a_drawn_row_and_a_column_of_zeros(tiny_llama: ModelFactory) -> None:
    classifier = lora(tiny_llama(), RANK)
    callback = ElaLoRA(12, every_n_steps=3, moves=2)
    added = Added(callback)
    fit(classifier, callback, added, steps=3)
    assert added.notes
    for row, column in added.notes:
        assert 0.7 < float(row.abs().max()) * len(row) ** 0.5 <= 1
        assert not column.any()


@given(
    importance=st.lists(st.lists(st.floats(0, 1, width=16), min_size=3, max_size=3), min_size=1, max_size=5),
    active=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=5, max_size=5),
    most=st.integers(1, 6),
)
def test_moves_keep_their_promises(
    importance: list[list[float]], active: list[list[bool]], most: int
) -> None:
    names = [f"m{index}" for index in range(len(importance))]
    scores = {name: torch.tensor(values) for name, values in zip(names, importance, strict=True)}
    masks = {name: torch.tensor([True, *flags[1:]]) for name, flags in zip(names, active, strict=False)}
    spared = [(names[0], 0)]
    moves = choose_moves(scores, masks, most=most, minimum_rank=1, spared=spared)
    assert len(moves) <= most
    givers, takers = {giver for giver, _, _ in moves}, [taker for _, _, taker in moves]
    assert not givers & set(takers)
    assert len(set(takers)) == len(takers)
    means = {name: float(scores[name][masks[name]].mean()) for name in names}
    for giver, index, taker in moves:
        assert masks[giver][index]
        assert (giver, index) not in spared
        assert not masks[taker].all()
        assert float(scores[giver][index]) < means[taker]
    for name in names:
        assert int(masks[name].sum()) - sum(giver == name for giver, _, _ in moves) >= 1


def test_the_least_important_rank_goes_to_the_most_important_module() -> None:
    scores = {"a": torch.tensor([0.5, 0.1]), "b": torch.tensor([0.9, 0.0]), "c": torch.tensor([0.2, 0.3])}
    masks = {"a": torch.tensor([True, True]), "b": torch.tensor([True, False]), "c": torch.ones(2) > 0}
    assert choose_moves(scores, masks, most=3, minimum_rank=1) == [("a", 1, "b")]
    assert choose_moves(scores, masks, most=3, minimum_rank=1, spared=[("a", 1)]) == [("c", 0, "b")]
    assert choose_moves(scores, masks, most=3, minimum_rank=2) == []


def test_ranks_are_spread_evenly() -> None:
    assert spread_evenly(7, {"a": 4, "b": 2, "c": 4}, 1) == {"a": 3, "b": 2, "c": 2}
    assert spread_evenly(9, {"a": 4, "b": 2, "c": 4}, 1) == {"a": 4, "b": 2, "c": 3}


@pytest.mark.parametrize(("budget", "least"), [(2, 1), (1000, 1), (100, 5)])
def test_a_budget_that_the_layers_cannot_hold_is_refused(
    budget: int, least: int, tiny_llama: ModelFactory
) -> None:
    callback = ElaLoRA(budget=budget, every_n_steps=1, moves=1, minimum_rank=least)
    with pytest.raises(ValueError, match=f"cannot hold a budget of {budget}"):
        fit(lora(tiny_llama(), RANK), callback, steps=1)


def test_elastic_arguments_out_of_range_are_refused() -> None:
    settings = {"budget": 8, "every_n_steps": 1, "moves": 2}
    for name in (*settings, "minimum_rank"):
        with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 1"):
            ElaLoRA(**(settings | {name: 0}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stop_step must be a finite number of at least 5"):
        ElaLoRA(8, every_n_steps=1, moves=1, warmup_steps=5, stop_step=4)
