from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution
from optuna.samplers import RandomSampler
from optuna.study import create_study
from optuna.trial import FixedTrial

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import method_spec
from autopeft.methods.bitfit import BitFit
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import LowMemory, NASPEFTPaper, PerLayer, Uniform
from autopeft.search_spaces.method_space import size_ladder
from tests.tiny_models import tiny_backbone

BERT = tiny_backbone("bert")
RATE = (3e-4, 1e-2)


@pytest.fixture(scope="module")
def deep() -> Backbone:
    return tiny_backbone("bert", num_hidden_layers=7)


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"methods": ()}, "Expected a method"),
            ({"methods": ("lara",)}, "did you mean 'lora'"),
            ({"methods": ("lora", "lora")}, "A method is named twice: lora, lora"),
            ({"methods": ("lora", BitFit())}, "got BitFit: call autopeft.methods.register and give its name"),
            ({"methods": method_spec("ia3")}, "are names, got MethodSpec: call"),
            ({"roles": ("querry",)}, "did you mean 'query'"),
            ({"roles": ("query", "query")}, "A role is named twice"),
            ({"roles": ()}, "Expected a role"),
            ({"options": {"lora": {"alfa": 2}}}, "did you mean 'alpha'"),
            ({"methods": ("lora",), "options": {"series": {"activation": "relu"}}}, "method in options"),
            ({"encoding": "conditionl"}, "did you mean 'conditional'"),
            ({"groups": 0}, "from 1 up, got 0"),
            ({"groups": 1.5}, "from 1 up, got 1.5"),
            ({"sizes": {"rank": (0, 8)}}, r"sizes\['rank'\] is \(smallest, largest\).*got \(0, 8\)"),
            ({"sizes": {"lora": (8, 4)}}, r"sizes\['lora'\] is .*got \(8, 4\)"),
            ({"sizes": {"bottleneck width": 8}}, r"width'\] is .*got 8"),
            ({"sizes": {"prefix length": (1.0, 8)}}, "is .*two whole numbers"),
            ({"sizes": {"rank": (4, 16, 8)}}, r"rank'\] is .*three and more, rising, got \(4, 16, 8\)"),
            ({"sizes": {"rank": ()}}, r"rank'\] is .*got \(\)"),
            ({"sizes": {"ranks": (1, 8)}}, "size or method in sizes 'ranks'.*did you mean 'rank'"),
            ({"methods": ("ia3", "lora"), "sizes": {"ia3": (1, 8)}}, "size or method in sizes 'ia3'"),
            ({"learning_rate": 0}, "above 0"),
            ({"learning_rate": (1e-2, 1e-4)}, "the lowest first"),
            ({"learning_rate": (1e-4, 1e-3, 1e-2)}, "is a number, or"),
            ({"learning_rate": True}, "is a number, or"),
            ({"learning_rate": (1e-4, float("inf"))}, "above 0"),
        ],
    )
    def test_refuses(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            PerLayer(**settings)

    def test_one_name_is_a_list_of_one(self) -> None:
        assert PerLayer(methods="lora", roles="query") == PerLayer(methods=["lora"], roles=["query"])

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"roles": ("qkv",)}, "Unknown role in tiny-bert 'qkv': expected one of query, key"),
            ({"methods": ("lora",), "roles": ("ffn",)}, "'lora' can sit on none of the roles ffn"),
            ({"methods": ("lora", "prefix"), "roles": ("query",)}, "'prefix' can sit on none"),
            ({"groups": 3}, "groups=3, but tiny-bert has only 2 blocks"),
        ],
    )
    def test_must_fit_the_backbone(self, settings: dict[str, Any], message: str) -> None:
        space = PerLayer(**settings)
        with pytest.raises(ValueError, match=message):
            space.validate(BERT)

    def test_a_method_without_a_place_is_left_out_of_a_default_with_a_note(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        deberta = tiny_backbone("deberta-v2")
        PerLayer().validate(deberta)
        assert "'prefix' can sit on none of the roles" in caplog.text
        assert "it is left out of the search" in caplog.text
        space = PerLayer(learning_rate=RATE)
        assert space.methods_on(deberta) == ("lora", "series", "parallel")
        baselines = [baseline.configuration for baseline in space.baselines(deberta)]
        for configuration in (*space.extremes(deberta), *baselines):
            deberta.check(configuration)
        caplog.clear()
        PerLayer().validate(BERT)
        assert not caplog.text

    @pytest.mark.parametrize("methods", [("lora", "prefix"), ("lora", "series", "parallel", "prefix")])
    def test_a_named_method_without_a_place_is_refused(self, methods: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match=r"'prefix' can sit on none of the roles.*leave it out"):
            PerLayer(methods=methods).validate(tiny_backbone("deberta-v2"))

    def test_a_default_without_any_method_is_refused(self) -> None:
        with pytest.raises(ValueError, match="'lora' can sit on none of the roles ffn_norm"):
            PerLayer(roles=("ffn_norm",)).validate(BERT)


class TestLadders:
    @pytest.mark.parametrize(
        ("bounds", "expected"),
        [
            ((1, 64), (1, 2, 4, 8, 16, 32, 64)),
            ((3, 20), (3, 4, 8, 16, 20)),
            ((5, 5), (5,)),
            ((5, 6), (5, 6)),
            ([2, 4], (2, 4)),
            ((16, 24, 32), (16, 24, 32)),
            ([7], (7,)),
        ],
    )
    def test_powers_of_two_and_both_ends_of_two_sizes_and_others_as_given(
        self, bounds: Any, expected: tuple[int, ...]
    ) -> None:
        assert size_ladder(bounds, "sizes") == expected

    def test_bounds_hold_for_all_sizes_of_a_name_or_for_one_method(self) -> None:
        methods = ("lora", "vera", "gralora", "loreft", "lora_xs", "oft", "prefix")
        space = PerLayer(methods=methods, sizes={"rank": (2, 8), "vera": (32, 32)})
        found = {method: tuple(space.choice_of(method).sizes) for method in methods}
        assert found.pop("vera") == (32,)
        assert found.pop("oft") == (2, 4, 8, 16, 32)
        assert found.pop("prefix") == (1, 2, 4, 8, 16, 32)
        assert set(found.values()) == {(2, 4, 8)}
        assert NASPEFTPaper().choice_of("lora").largest.size == 16
        assert NASPEFTPaper(sizes={"rank": (1, 2)}).choice_of("lora").largest.size == 2

    def test_sizes_and_options_of_each_method(self) -> None:
        space = PerLayer(
            methods=("lora", "series", "prefix", "ia3"),
            sizes={"rank": (4, 8), "bottleneck width": (16, 16), "prefix length": (3, 3)},
            options={"lora": {"alpha": 2}},
        )
        assert space.choice_of("lora").adapters == tuple(Adapter("lora", r, {"alpha": 2}) for r in (4, 8))
        assert space.choice_of("series").adapters == (Adapter("series", 16),)
        assert space.choice_of("prefix").adapters == (Adapter("prefix", 3),)
        assert space.choice_of("ia3").adapters == (Adapter("ia3"),)

    @pytest.mark.parametrize(
        ("given", "middle"), [((1e-4, 1e-2), 1e-3), ((3e-4, 1e-2), 1.7e-3), (5e-4, 5e-4)]
    )
    def test_the_middle_learning_rate_is_geometric(self, given: Any, middle: float) -> None:
        assert PerLayer(learning_rate=given).point().learning_rate == pytest.approx(middle)


class TestGroups:
    @pytest.mark.parametrize(
        ("groups", "expected"),
        [
            (None, [[0], [1], [2], [3], [4], [5], [6]]),
            (7, [[0], [1], [2], [3], [4], [5], [6]]),
            (1, [[0, 1, 2, 3, 4, 5, 6]]),
            (2, [[0, 1, 2, 3], [4, 5, 6]]),
            (3, [[0, 1], [2, 3, 4], [5, 6]]),
        ],
    )
    def test_are_consecutive_and_even(
        self, groups: int | None, expected: list[list[int]], deep: Backbone
    ) -> None:
        found = PerLayer(groups=groups).block_groups(deep)
        assert [[block for _, block in group] for group in found] == expected

    def test_every_number_of_groups_covers_each_block_once(self, deep: Backbone) -> None:
        for groups in range(1, 8):
            found = PerLayer(groups=groups).block_groups(deep)
            assert len(found) == groups
            assert [block for group in found for _, block in group] == list(range(7))
            sizes = {len(group) for group in found}
            assert max(sizes) - min(sizes) <= 1

    def test_share_their_choices(self, deep: Backbone) -> None:
        space = PerLayer(methods=("lora",), roles=("query",), groups=2, learning_rate=1e-3)
        parameters = {
            "0-3.on": True,
            "0-3.query.method": "lora",
            "0-3.query.lora_rank": 8,
            "4-6.on": False,
            "4-6.query.method": "lora",
            "4-6.query.lora_rank": 64,
        }
        expected = Configuration({Site(block, "query"): Adapter("lora", 8) for block in range(4)})
        assert space.suggest(FixedTrial(parameters), deep) == expected

    def test_a_part_of_a_group_is_no_point(self, deep: Backbone) -> None:
        space = PerLayer(methods=("lora",), roles=("query",), groups=2, learning_rate=1e-3)
        part = Configuration({Site(block, "query"): Adapter("lora", 8) for block in range(3)})
        with pytest.raises(ValueError, match=r"one near it is Configuration\(lora; 4 adapters"):
            space.encode(part, deep)

    def test_a_role_that_only_some_blocks_have_sits_where_it_is(self) -> None:
        backbone = tiny_backbone("modernbert", num_hidden_layers=3)
        space = PerLayer(methods=("layernorm",), roles=("attention_norm",), groups=1)
        (slot,) = space.slots(backbone)
        assert slot.sites == (Site(1, "attention_norm"), Site(2, "attention_norm"))


class TestEncodings:
    @staticmethod
    def _asked(space: PerLayer, seed: int) -> dict[str, Any]:
        trial = create_study(sampler=RandomSampler(seed=seed)).ask()
        space.suggest(trial, BERT)
        return dict(trial.distributions)

    def test_fixed_asks_for_the_same_every_time(self) -> None:
        asked = [self._asked(PerLayer(encoding="fixed", learning_rate=RATE), seed) for seed in range(12)]
        assert all(distributions == asked[0] for distributions in asked)
        assert asked[0]["0.on"] == CategoricalDistribution((True, False))
        assert asked[0]["0.query.method"] == CategoricalDistribution(("off", "lora"))
        assert asked[0]["1.ffn.method"] == CategoricalDistribution(("off", "series", "parallel"))
        assert asked[0]["1.attention.prefix_prefix_length"] == CategoricalDistribution((1, 2, 4, 8, 16, 32))

    @pytest.mark.parametrize("encoding", ["fixed", "conditional"])
    def test_a_parameter_is_the_size_itself(self, encoding: Any) -> None:
        space = PerLayer(methods=("lora",), roles=("query",), learning_rate=1e-3, encoding=encoding)
        parameters = space.encode(Configuration({Site(0, "query"): Adapter("lora", 16)}), BERT)
        assert parameters["0.query.lora_rank"] == 16
        of_the_other_block = {name for name in parameters if name.startswith("1.")}
        assert of_the_other_block == (
            {"1.on"} if encoding == "conditional" else {"1.on", "1.query.method", "1.query.lora_rank"}
        )

    def test_conditional_asks_for_what_matters(self) -> None:
        every = self._asked(PerLayer(encoding="fixed", learning_rate=RATE), 0)
        for seed in range(12):
            space = PerLayer(encoding="conditional", learning_rate=RATE)
            trial = create_study(sampler=RandomSampler(seed=seed)).ask()
            configuration = space.suggest(trial, BERT)
            assert trial.distributions.items() <= every.items()
            for name, value in trial.params.items():
                if name.endswith(".on") and not value:
                    block = name.removesuffix("on")
                    inside = [param for param in trial.params if param.startswith(block)]
                    assert inside == [name]
            sizes = [name for name in trial.params if "method" not in name and not name.endswith(".on")]
            assert len(sizes) == len(configuration) + 1, "a size an adapter, and the learning rate"

    def test_both_hold_the_same_points(self) -> None:
        fixed, conditional = (
            PerLayer(encoding=encoding, learning_rate=RATE) for encoding in ("fixed", "conditional")
        )
        assert fixed.count(BERT) == conditional.count(BERT)
        for seed in range(10):
            trial = create_study(sampler=RandomSampler(seed=seed)).ask()
            configuration = fixed.suggest(trial, BERT)
            encoded = conditional.encode(configuration, BERT)
            assert conditional.suggest(FixedTrial(encoded), BERT) == configuration

    def test_one_size_needs_no_question(self) -> None:
        space = PerLayer(
            methods=("lora", "ia3"), roles=("query",), sizes={"rank": (8, 8)}, learning_rate=1e-3
        )
        assert set(self._asked(space, 0)) == {"0.on", "0.query.method", "1.on", "1.query.method"}


class TestLearningRate:
    space = PerLayer(methods=("lora",), roles=("query",), learning_rate=RATE)

    def test_is_rounded_to_three_digits_within_the_range(self) -> None:
        for seed in range(20):
            trial = create_study(sampler=RandomSampler(seed=seed)).ask()
            rate = self.space.suggest(trial, BERT).learning_rate
            assert rate == float(f"{rate:.3g}")
            assert 3e-4 <= rate <= 1e-2

    def test_never_leaves_a_range_of_more_digits(self) -> None:
        space = PerLayer(methods=("lora",), learning_rate=(1.23456e-3, 1.23464e-3))
        trial = create_study(sampler=RandomSampler(seed=0)).ask()
        assert 1.23456e-3 <= space.suggest(trial, BERT).learning_rate <= 1.23464e-3

    @pytest.mark.parametrize("bounds", [(1e-4, 1 / 300), (3.1266e-4, 1e-2), (3e-4, 0.01264)])
    def test_bounds_of_more_digits_are_rates_themselves(self, bounds: tuple[float, float]) -> None:
        space = PerLayer(methods=("lora",), learning_rate=bounds)
        for rate in bounds:
            parameters = space.encode(Configuration(learning_rate=rate), BERT)
            assert space.suggest(FixedTrial(parameters), BERT).learning_rate == rate
        for baseline in space.baselines(BERT):
            space.encode(baseline.configuration, BERT)

    @pytest.mark.parametrize(
        ("rate", "message"),
        [(1e-4, r"near it is .*learning_rate=0.0003"), (0.00123456, r"near it is .*learning_rate=0.00123;")],
    )
    def test_others_have_no_encoding(self, rate: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.space.encode(Configuration(learning_rate=rate), BERT)

    def test_a_fixed_one_is_not_asked_for(self) -> None:
        space = PerLayer(methods=("lora",), learning_rate=2e-3)
        assert space.suggest(FixedTrial(space.encode(Configuration(learning_rate=2e-3), BERT)), BERT) == (
            Configuration(learning_rate=2e-3)
        )
        with pytest.raises(ValueError, match=r"near it is .*learning_rate=0.002"):
            space.encode(Configuration(learning_rate=1e-3), BERT)


class TestWhatToTryFirst:
    def test_baselines(self) -> None:
        roles = ("query", "ffn_up", "ffn")
        space = PerLayer(methods=("lora", "series"), sizes={"rank": (1, 16)}, roles=roles, learning_rate=RATE)
        baselines = {baseline.name: baseline.configuration for baseline in space.baselines(BERT)}
        assert list(baselines) == [
            "head alone",
            "lora(1) everywhere",
            "series(1) everywhere",
            "lora(1) in the top half",
            "lora(1) in the MLPs",
            "lora(4) in the top half",
            "lora(4) in the MLPs",
            "lora(4) everywhere",
            "lora(16) in the top half",
            "lora(16) in the MLPs",
            "lora(16) everywhere",
        ]
        assert len(baselines["head alone"]) == 0
        top = baselines["lora(4) in the top half"]
        assert dict(top.adapters) == dict.fromkeys(
            (Site(1, "query"), Site(1, "ffn_up")), (Adapter("lora", 4),)
        )
        assert set(baselines["lora(4) in the MLPs"].adapters) == {Site(0, "ffn_up"), Site(1, "ffn_up")}
        assert len(baselines["lora(4) everywhere"]) == 4

    def test_the_top_half_is_the_same_in_every_space(self, deep: Backbone) -> None:
        space = PerLayer(methods=("lora",), learning_rate=RATE)
        baselines = {baseline.name: baseline.configuration for baseline in space.baselines(deep)}
        people_place = Uniform(places=("top half",), learning_rate=RATE).extremes(deep)[0]
        for configuration in (baselines["lora(1) in the top half"], people_place):
            assert {site.block for site in configuration.adapters} == {3, 4, 5, 6}
        assert LowMemory().block_groups(deep) == tuple((("", block),) for block in (3, 4, 5, 6))

    def test_one_group_has_no_top_half(self) -> None:
        space = PerLayer(methods=("lora",), groups=1, sizes={"rank": (4, 4)}, learning_rate=RATE)
        assert [baseline.name for baseline in space.baselines(BERT)] == [
            "head alone",
            "lora(4) everywhere",
            "lora(4) in the MLPs",
        ]

    @pytest.mark.parametrize(("trials", "count"), [(1, 2), (5, 2), (8, 2), (12, 3), (40, 10), (None, 13)])
    def test_a_small_budget_has_few(self, trials: int | None, count: int) -> None:
        space = PerLayer(learning_rate=RATE)
        baselines = space.baselines(BERT, trials)
        assert len(baselines) == count
        assert baselines == space.baselines(BERT)[:count]
        assert [len(baseline.configuration) for baseline in baselines[:2]] == [0, 12]
        sizes = {adapter.size for _, adapter in baselines[1].configuration}
        assert sizes == {1}, "the smallest"

    def test_the_largest_point_takes_the_method_with_most_parameters_at_each_slot(self) -> None:
        space = PerLayer(
            methods=("series", "prefix"),
            sizes={"bottleneck width": (1, 4), "prefix length": (1, 32)},
            learning_rate=RATE,
        )
        _, largest = space.extremes(BERT)
        chosen = {site.role: several[0].method for site, several in largest.adapters.items()}
        assert chosen == {"attention": "prefix", "ffn": "series"}

    def test_count_of_the_default_space(self) -> None:
        # Six linear roles with 7 ranks or none; attention 7 + 7 + 6 or none; ffn 7 + 7 or none.
        assert PerLayer().count(BERT) == (8**6 * 21 * 15) ** 2

    def test_description_lists_the_choices(self) -> None:
        space = PerLayer(
            methods=("lora", "ia3"), sizes={"rank": (2, 8)}, roles=("query",), learning_rate=RATE
        )
        text = space.describe(BERT)
        assert "2 groups of blocks (0, 1)" in text
        assert "  query: off, lora 2|4|8, ia3" in text
        assert "log-uniform in [0.0003, 0.01]" in text
        assert "25 configurations" in text


def test_a_space_that_knows_its_slots_is_pickled_and_copied_without_them(deep: Backbone) -> None:
    space = PerLayer(groups=2, learning_rate=RATE)
    slots, ends = space.groups_of_slots(deep), space.extremes(deep)
    assert space.groups_of_slots(deep) is slots
    assert space.groups_of_slots(BERT) != slots
    for other in (pickle.loads(pickle.dumps(space)), copy.deepcopy(space)):
        assert other == space
        assert other.groups_of_slots(deep) == slots
        assert other.extremes(deep) == ends
