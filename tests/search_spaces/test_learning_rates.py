"""Learning rates that fit a model and a training, where a space has none of its own."""

from __future__ import annotations

import random

import pytest

from autopeft.search_spaces import PerLayer, ScoreGuided, Uniform
from autopeft.search_spaces.learning_rates import fitting_learning_rates, learning_rate_at
from tests.tiny_models import tiny_backbone

BERT = tiny_backbone("bert")


@pytest.mark.parametrize(
    ("hidden_size", "steps", "expected"),
    [
        (384, 100, (3e-4, 1.1e-2)),
        (384, 99, (4.5e-4, 1.6e-2)),
        (128, 99, (4.5e-4, 1.6e-2)),
        (576, 1000, (2.2e-4, 7.9e-3)),
        (4096, 100, (4.8e-5, 1.7e-3)),
        (4096, 10_000, (4.8e-5, 1.7e-3)),
    ],
)
def test_the_range_falls_with_the_width_and_rises_where_trainings_are_short(
    hidden_size: int, steps: int, expected: tuple[float, float]
) -> None:
    assert fitting_learning_rates(hidden_size, steps) == expected


def test_the_middle_is_the_published_rate() -> None:
    """2.86e-4 for LoRA on Llama 8B, as `get_lr` of tinker-cookbook has it."""
    assert learning_rate_at(0.5, fitting_learning_rates(4096, 1000)) == pytest.approx(2.86e-4, rel=0.02)


def test_baselines_of_a_model_of_8_billion_parameters_have_rates_of_the_sweeps() -> None:
    rates = [learning_rate_at(place, fitting_learning_rates(4096, 10_000)) for place in (0.5, 0.6, 0.8)]
    assert all(2e-4 < rate <= 1e-3 for rate in rates)


@pytest.mark.parametrize("space", [PerLayer(), Uniform(), ScoreGuided()])
def test_without_a_training_there_is_none(space: PerLayer | Uniform | ScoreGuided) -> None:
    with pytest.raises(ValueError, match=r"no learning rates yet: use it in a Search.*with_learning_rates"):
        space.extremes(BERT)
    assert space.with_learning_rates(BERT, 96).learning_rate == fitting_learning_rates(32, 96)


def test_those_of_the_user_stay() -> None:
    for given in (2e-3, (1e-4, 1e-2)):
        space = PerLayer(learning_rate=given)
        assert space.with_learning_rates(BERT, 96) is space
        space.draw(random.Random(0), BERT)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5", "llama"])
def test_the_width_is_that_of_the_hidden_states(architecture: str) -> None:
    backbone = tiny_backbone(architecture)
    assert backbone.hidden_size == backbone.model.config.hidden_size
