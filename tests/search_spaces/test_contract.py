"""The guarantees in the docstring of `SearchSpace`, for every space, encoding and backbone."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.samplers import BaseSampler, BruteForceSampler, RandomSampler
from optuna.trial import FixedTrial, Trial

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.methods import attach, count_parameters
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import (
    AutoPEFTPaper,
    Baseline,
    PerLayer,
    ScoreGuided,
    SearchSpace,
    SlotSpace,
    Uniform,
)
from autopeft.search_spaces.suggest_trial import SuggestTrial
from autopeft.sensitivity import compute_scores
from tests.loss_task import CROSS_ENTROPY
from tests.tiny_models import tiny_backbone, tiny_language_model, tiny_tokenizer

BACKBONES: Mapping[str, Backbone] = MappingProxyType(
    {
        "bert": tiny_backbone("bert"),
        "gpt2": tiny_backbone("gpt2", n_layer=3),
        "llama": tiny_backbone("llama"),
        "modernbert": tiny_backbone("modernbert", num_hidden_layers=3),
    }
)


@dataclass(frozen=True, kw_only=True)
class EverySlot(SlotSpace):
    """A space as users write one: all that `SlotSpace` leaves to do."""

    def suggest_adapters(self, trial: SuggestTrial, backbone: Backbone) -> dict[Site, Adapter]:
        adapters: dict[Site, Adapter] = {}
        for slot in self.slots(backbone):
            if (adapter := slot.suggest(trial, "fixed")) is not None:
                adapters |= dict.fromkeys(slot.sites, adapter)
        return adapters

    def encode_adapters(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        encoded = (slot.encode(configuration) for slot in self.slots(backbone))
        return {name: value for parameters in encoded for name, value in parameters.items()}

    def all_baselines(self, backbone: Backbone) -> tuple[Baseline, ...]:
        return (Baseline(name="head alone", configuration=self.point()),)

    def summary(self, backbone: Backbone) -> str:
        return "every slot for itself"


SPACES: Mapping[str, SearchSpace] = MappingProxyType(
    {
        "per-layer": PerLayer(),
        "per-layer-conditional": PerLayer(encoding="conditional"),
        "per-layer-groups": PerLayer(groups=2, sizes={"rank": (2, 12)}, encoding="conditional"),
        "per-layer-one-group": PerLayer(groups=1, methods=("series",), sizes={"bottleneck width": (3, 3)}),
        "per-layer-without-sizes": PerLayer(
            methods=("ia3", "layernorm"), roles=("ffn_down", "ffn_norm", "attention_norm")
        ),
        "per-layer-options": PerLayer(
            methods=("lora", "parallel"),
            learning_rate=2e-3,
            options={"lora": {"alpha": 16, "rslora": False}, "parallel": {"scaling": 1.0}},
        ),
        "per-layer-shared": PerLayer(methods=("lora", "unilora"), sizes={"rank": (1, 1)}),
        "per-layer-tinylora": PerLayer(methods=("tinylora",)),
        "uniform": Uniform(),
        "uniform-several": Uniform(
            methods=("lora", "prefix", "ia3"), sizes={"rank": (3, 9)}, learning_rate=1e-3
        ),
        "uniform-places": Uniform(
            methods=("lora", "series"), places=("all", "query and value", "top half", "MLP")
        ),
        "uniform-allocations": Uniform(methods=("lora", "adalora"), allocations=("adalora", "ist")),
        "paper": AutoPEFTPaper(),
        "paper-learning-rate": AutoPEFTPaper(learning_rate=(1e-5, 1e-2)),
        "own": EverySlot(methods=("lora", "ia3"), sizes={"rank": (2, 4)}),
    }
)

PAIRS = [
    pytest.param(space.with_learning_rates(backbone, 100), backbone, id=f"{name}-{architecture}")
    for name, space in SPACES.items()
    for architecture, backbone in BACKBONES.items()
]


def guided(backbone: Backbone, **options: Any) -> ScoreGuided:
    """Return a score-guided space with scores that need no data."""
    space = ScoreGuided(scores=("condition_number", "random"), **options).with_learning_rates(backbone, 100)
    return space.with_scores(compute_scores(backbone, (), CROSS_ENTROPY, space.scores))


_GUIDED: dict[str, dict[str, Any]] = {
    "guided": {},
    "guided-gora": {"allocator": "gora"},
    "guided-allocations": {"allocations": ("sora", "elalora")},
    "guided-mixed": {
        "methods": ("lora", "series", "prefix"),
        "sizes": {"rank": (2, 9)},
        "learning_rate": 1e-3,
    },
}
PAIRS += [
    pytest.param(guided(backbone, **options), backbone, id=f"{name}-{architecture}")
    for name, options in _GUIDED.items()
    for architecture, backbone in BACKBONES.items()
]

TINY: Mapping[str, SearchSpace] = MappingProxyType(
    {
        "per-layer": PerLayer(
            methods=("lora",), roles=("ffn_up",), sizes={"rank": (1, 3)}, learning_rate=1e-3
        ),
        "per-layer-conditional": PerLayer(
            methods=("ia3", "lora"),
            roles=("ffn_up", "ffn_down"),
            sizes={"rank": (2, 2)},
            learning_rate=1e-3,
            encoding="conditional",
        ),
        "per-layer-two-methods": PerLayer(
            methods=("series", "prefix"),
            roles=("attention",),
            sizes={"bottleneck width": (1, 2), "prefix length": (4, 4)},
            learning_rate=1e-3,
        ),
        "per-layer-group": PerLayer(
            methods=("lora",), roles=("ffn_up",), sizes={"rank": (1, 4)}, groups=1, learning_rate=1e-3
        ),
        "per-layer-shared": PerLayer(
            methods=("lora", "unilora"),
            roles=("ffn_up",),
            sizes={"rank": (1, 2), "unilora": (64, 128)},
            learning_rate=1e-3,
            encoding="conditional",
        ),
        "per-layer-tinylora": PerLayer(
            methods=("tinylora",),
            roles=("ffn_up",),
            sizes={"tinylora": (4, 16)},
            learning_rate=1e-3,
            encoding="conditional",
        ),
        "uniform": Uniform(
            methods=("lora", "series"), sizes={"rank": (1, 8), "bottleneck width": (2, 3)}, learning_rate=1e-3
        ),
        "uniform-places": Uniform(
            methods=("lora", "prefix"),
            places=("all", "query and value", "top half", "MLP"),
            learning_rate=1e-3,
        ),
    }
)


def _drawn_and_changed(space: SearchSpace, backbone: Backbone, seed: int) -> list[Configuration]:
    """Return points that were drawn, and points near them and the largest."""
    generator, mutator = random.Random(seed), space.mutator(backbone)
    drawn = [space.draw(generator, backbone) for _ in range(3)]
    parents = {**dict.fromkeys(drawn, 0.1), space.extremes(backbone)[1]: 0.2}
    return drawn + [mutator(parents, generator) for _ in range(12)]


def _study(sampler: BaseSampler) -> optuna.Study:
    return optuna.create_study(sampler=sampler)


def _sampled(space: SearchSpace, backbone: Backbone, seed: int) -> tuple[Trial, Configuration]:
    trial = _study(RandomSampler(seed=seed)).ask()
    return trial, space.suggest(trial, backbone)


@pytest.mark.parametrize(("space", "backbone"), PAIRS)
class TestSpace:
    def test_fits(self, space: SearchSpace, backbone: Backbone) -> None:
        space.validate(backbone)

    @settings(max_examples=8)
    @given(seed=st.integers(0, 2**31))
    def test_every_point_can_be_carried_and_is_within_the_extremes(
        self, space: SearchSpace, backbone: Backbone, seed: int
    ) -> None:
        _, configuration = _sampled(space, backbone, seed)
        backbone.check(configuration)
        low, high = (count_parameters(backbone, end) for end in space.extremes(backbone))
        assert low <= count_parameters(backbone, configuration) <= high

    @settings(max_examples=8)
    @given(seed=st.integers(0, 2**31))
    def test_every_point_is_encoded_back(self, space: SearchSpace, backbone: Backbone, seed: int) -> None:
        _, configuration = _sampled(space, backbone, seed)
        parameters = space.encode(configuration, backbone)
        assert space.suggest(FixedTrial(parameters), backbone) == configuration

    @settings(max_examples=5)
    @given(seed=st.integers(0, 2**31))
    def test_suggestions_depend_on_the_trial_alone(
        self, space: SearchSpace, backbone: Backbone, seed: int
    ) -> None:
        trial, configuration = _sampled(space, backbone, seed)
        assert space.suggest(FixedTrial(trial.params), backbone) == configuration
        assert space.suggest(trial, backbone) == configuration, "asking again changes nothing"
        again, same = _sampled(space, backbone, seed)
        assert again.params == trial.params
        assert same == configuration

    @settings(max_examples=5)
    @given(seed=st.integers(0, 2**31))
    def test_an_enqueued_point_comes_out_with_nothing_left_to_sample(
        self, space: SearchSpace, backbone: Backbone, seed: int
    ) -> None:
        _, configuration = _sampled(space, backbone, seed)
        parameters = space.encode(configuration, backbone)
        study = _study(RandomSampler(seed=seed + 1))
        study.enqueue_trial(parameters)
        trial = study.ask()
        assert space.suggest(trial, backbone) == configuration
        assert trial.params == parameters

    @settings(max_examples=4)
    @given(seed=st.integers(0, 2**31))
    def test_what_is_drawn_and_what_is_near_it_are_points_and_follow_from_the_generator(
        self, space: SearchSpace, backbone: Backbone, seed: int
    ) -> None:
        found = _drawn_and_changed(space, backbone, seed)
        assert found == _drawn_and_changed(space, backbone, seed)
        for configuration in found:
            backbone.check(configuration)
            parameters = space.encode(configuration, backbone)
            assert space.suggest(FixedTrial(parameters), backbone) == configuration

    def test_choices_say_what_sites_may_carry(self, space: SearchSpace, backbone: Backbone) -> None:
        choices = space.choices(backbone)
        assert list(choices) == sorted(choices)
        for configuration in (*space.extremes(backbone), *_drawn_and_changed(space, backbone, 0)):
            for site, several in configuration.adapters.items():
                for adapter in several if site in choices else ():
                    assert adapter in choices[site][adapter.method].adapters

    def test_baselines_go_by_the_budget(self, space: SearchSpace, backbone: Backbone) -> None:
        every = space.baselines(backbone)
        for trials in (1, 5, 8, 100):
            assert space.baselines(backbone, trials) == every[: max(2, trials // 4)]
        methods = {method for baseline in every for method in baseline.configuration.methods}
        first = [baseline.configuration for baseline in every if baseline.configuration.adapters]
        assert {method for point in first[: len(methods)] for method in point.methods} == methods

    def test_baselines_are_points(self, space: SearchSpace, backbone: Backbone) -> None:
        baselines = space.baselines(backbone)
        assert baselines
        assert len({baseline.name for baseline in baselines}) == len(baselines)
        assert len({baseline.configuration for baseline in baselines}) == len(baselines)
        for baseline in baselines:
            parameters = space.encode(baseline.configuration, backbone)
            assert space.suggest(FixedTrial(parameters), backbone) == baseline.configuration

    def test_extremes_are_points(self, space: SearchSpace, backbone: Backbone) -> None:
        smallest, largest = space.extremes(backbone)
        assert count_parameters(backbone, smallest) < count_parameters(backbone, largest) or (
            smallest == largest
        )
        for end in (smallest, largest):
            parameters = space.encode(end, backbone)
            assert space.suggest(FixedTrial(parameters), backbone) == end

    def test_the_largest_point_can_be_attached(self, space: SearchSpace, backbone: Backbone) -> None:
        _, largest = space.extremes(backbone)
        with attach(backbone, largest):
            parameters = backbone.model.parameters()
            trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        assert trained == count_parameters(backbone, largest)

    def test_other_points_have_no_encoding(self, space: SearchSpace, backbone: Backbone) -> None:
        _, largest = space.extremes(backbone)
        two = [Adapter("lora", 5), Adapter("bitfit")]
        attention = [Adapter("series", 2), Adapter("parallel", 2), Adapter("prefix", 2)]
        outside = [
            largest.replace(learning_rate=0.9),
            largest.replace(weight_decay=0.01),
            # No power of two; a score-guided space has every size up to its largest.
            Configuration({Site(0, "ffn_up"): Adapter("lora", 65 if isinstance(space, ScoreGuided) else 63)}),
            Configuration({Site(0, "ffn_down"): two}),
            Configuration({Site(0, "attention"): attention}),
            Configuration({Site(7, "ffn"): Adapter("series", 1)}),
            Configuration({Site(0, "attention"): Adapter("series", 1, {"activation": "tanh"})}),
        ]
        for configuration in outside:
            with pytest.raises(ValueError, match=r"\w"):
                space.encode(configuration, backbone)

    def test_description(self, space: SearchSpace, backbone: Backbone) -> None:
        text = space.describe(backbone)
        low, high = (count_parameters(backbone, end) for end in space.extremes(backbone))
        assert text.startswith(type(space).__name__)
        assert f"{low:,} to {high:,} trainable parameters" in text
        assert "learning rate" in text


@pytest.mark.filterwarnings("ignore:BruteForceSampler is experimental")
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_count_is_the_number_of_different_points(name: str, architecture: str) -> None:
    space, backbone = TINY[name], BACKBONES[architecture]
    points: set[Configuration] = set()

    def visit(trial: Trial) -> float:
        points.add(space.suggest(trial, backbone))
        return 0.0

    _study(BruteForceSampler(seed=0)).optimize(visit)
    assert len(points) == space.count(backbone)
    smallest, largest = space.extremes(backbone)
    assert {smallest, largest} <= points
    sizes = [count_parameters(backbone, point) for point in points]
    assert min(sizes) == count_parameters(backbone, smallest)
    assert max(sizes) == count_parameters(backbone, largest)
    for point in points:
        assert space.suggest(FixedTrial(space.encode(point, backbone)), backbone) == point


@pytest.mark.parametrize("space", [PerLayer(), ScoreGuided(scores=("random",))])
def test_a_space_with_more_points_than_a_float_holds_is_described(space: SearchSpace) -> None:
    deep = tiny_backbone("bert", num_hidden_layers=80)
    count = space.count(deep)
    assert count > 10**400
    described = re.search(
        r"(\d\.\d\d)e\+(\d+) configurations", space.with_learning_rates(deep, 100).describe(deep)
    )
    assert described is not None
    digits = int(described[2])
    assert abs(count // 10 ** (digits - 2) - 100 * float(described[1])) <= 1


def test_allocations_are_among_what_is_drawn_and_what_is_near_it() -> None:
    space, backbone = PerLayer(methods=("lora",), allocations=("sora", "ist")), BACKBONES["bert"]
    space = space.with_learning_rates(backbone, 100)
    found = [
        configuration for seed in range(8) for configuration in _drawn_and_changed(space, backbone, seed)
    ]
    assert {configuration.allocation for configuration in found} == {None, "sora", "ist"}
    assert "ranks that stay, or sora, ist" in space.describe(backbone)


def test_an_allocation_without_a_method_to_act_on_is_named() -> None:
    with pytest.raises(ValueError, match="'adalora' decides about the ranks of 'adalora', which is none"):
        PerLayer(methods=("lora",), allocations=("adalora",)).validate(BACKBONES["bert"])
    with pytest.raises(ValueError, match=r"allocation 'sorra'.*did you mean 'sora'"):
        PerLayer(allocations=("sorra",))


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize("name", SPACES)
def test_where_no_head_is_trained_the_head_alone_is_the_untrained_model(name: str) -> None:
    backbone = Backbone(tiny_language_model("llama"), tiny_tokenizer(), name="tiny", head=())
    space = SPACES[name].with_learning_rates(backbone, 100)
    baselines = space.baselines(backbone)
    untrained = [baseline.name for baseline in baselines if not len(baseline.configuration)]
    assert untrained in ([], ["untrained model"])
    assert "head alone" not in {baseline.name for baseline in baselines}
    fewest, most = (count_parameters(backbone, end) for end in space.ends(backbone))
    assert 0 < fewest <= most
    smallest, _ = space.extremes(backbone)
    assert (space.ends(backbone) == space.extremes(backbone)) == (len(smallest) > 0)
