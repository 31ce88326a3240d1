from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.core.objectives import (
    COST_OBJECTIVES,
    GENERATION_SPEEDS,
    Constraint,
    Objective,
    parse_quantity,
    resolve_constraints,
    resolve_objectives,
)

METRICS = (Objective.score("accuracy"), Objective.score("f1_macro"))
LOSS = Objective(name="loss", direction="minimize", unit="nats", is_metric=True)


class TestObjectives:
    def test_metrics_are_maximised_and_costs_minimised(self) -> None:
        names = ("f1_macro", "peak_memory", "trainable_parameters")
        found = resolve_objectives(names, METRICS)
        assert tuple(objective.name for objective in found) == names
        assert [objective.direction for objective in found] == ["maximize", "minimize", "minimize"]
        assert [objective.unit for objective in found] == ["score", "bytes", "parameters"]
        assert [objective.before_training for objective in found] == [False, True, True]
        assert [objective.log_scale for objective in found] == [False, True, True]

    def test_reads_iterators_once(self) -> None:
        found = resolve_objectives(iter(("accuracy", "peak_memory")), iter(METRICS))
        assert len(found) == 2

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (("acuracy", "peak_memory"), "did you mean 'accuracy'"),
            (("accuracy", "memory"), "Unknown objective 'memory': expected one of accuracy, f1_macro"),
            (("accuracy", "accuracy"), "named twice"),
            (("accuracy",), r"at least two objectives, got \['accuracy'\]"),
            ("accuracy", r"at least two objectives, got \['accuracy'\]"),
            ((), "at least two"),
            (("peak_memory", "forward_flops"), "a metric that every validation measures: accuracy, f1_macro"),
        ],
    )
    def test_refuses(self, names: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            resolve_objectives(names, iter(METRICS))

    def test_a_metric_that_is_measured_at_the_end_alone_does_not_choose_weights(self) -> None:
        metrics = (LOSS, Objective.score("bleu", at_end=True))
        names = ("bleu", "trainable_parameters")
        with pytest.raises(ValueError, match=r"must be a metric that every validation measures: loss\."):
            resolve_objectives(names, metrics)
        assert [objective.name for objective in resolve_objectives((*names, "loss"), metrics)] == [
            *names,
            "loss",
        ]

    def test_a_score_is_better_when_larger(self) -> None:
        score = Objective.score("accuracy")
        assert score.sign == 1
        assert score.best([0.2, 0.9, -1.0]) == 0.9
        assert score.is_better(0.9, 0.2)
        assert not score.is_better(0.2, 0.9)

    def test_a_loss_is_better_when_smaller(self) -> None:
        assert LOSS.sign == -1
        assert LOSS.best(iter([0.2, 0.9, -1.0])) == -1.0
        assert LOSS.is_better(0.2, 0.9)
        assert not LOSS.is_better(0.9, 0.2)

    @pytest.mark.parametrize("objective", [METRICS[0], LOSS])
    def test_no_value_is_better_than_itself(self, objective: Objective) -> None:
        assert not objective.is_better(0.5, 0.5)

    def test_every_cost_is_minimised_on_a_log_scale(self) -> None:
        for name, objective in COST_OBJECTIVES.items():
            assert objective.name == name
            assert (objective.direction, objective.log_scale) == ("minimize", True)

    def test_speeds_are_maximised_where_a_task_has_them(self) -> None:
        found = resolve_objectives(("loss", "tokens_per_second"), (LOSS, *GENERATION_SPEEDS.values()))
        assert (found[1].direction, found[1].log_scale, found[1].is_metric) == ("maximize", True, False)
        with pytest.raises(ValueError, match="Unknown objective 'tokens_per_second'"):
            resolve_objectives(("loss", "tokens_per_second"), (LOSS,))
        with pytest.raises(ValueError, match="tokens_per_second is only known after training"):
            resolve_constraints({"tokens_per_second": 10}, (LOSS, *GENERATION_SPEEDS.values()))


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        ("score", 0.87654, "0.8765"),
        ("bytes", 122_900_000, "117.2 MiB"),
        ("bytes", 12 * 2**30, "12,288.0 MiB"),
        ("parameters", 334_000, "334.0 k"),
        ("parameters", 2_500_000, "2.5 M"),
        ("parameters", 7e9, "7.0 G"),
        ("parameters", 999, "999"),
        ("FLOPs", 3.2e12, "3.2 T"),
        ("FLOPs", 1e9, "1.0 G"),
        ("seconds", 12.34, "12.3 s"),
        ("seconds", 1.0, "1.0 s"),
        ("seconds", 0.0123, "12.30 ms"),
        ("tokens/s", 1234.56, "1,234.6 tokens/s"),
        ("score", math.nan, "–"),
        ("bytes", math.nan, "–"),
    ],
)
def test_values_for_people(unit: str, value: float, text: str) -> None:
    assert Objective(name="any", direction="minimize", unit=unit).format(value) == text


class TestQuantities:
    @pytest.mark.parametrize(
        ("given", "unit", "expected"),
        [
            (2_000_000, "parameters", 2e6),
            (1.5, "seconds", 1.5),
            ("2M", "parameters", 2e6),
            ("2_000_000", "parameters", 2e6),
            ("500 k", "parameters", 5e5),
            ("500K", "parameters", 5e5),
            ("1.5B", "parameters", 1.5e9),
            (".5M", "parameters", 5e5),
            ("2e6", "parameters", 2e6),
            ("+3", "parameters", 3.0),
            ("12 GiB", "bytes", 12 * 2**30),
            (" 12GiB ", "bytes", 12 * 2**30),
            ("1.5 GB", "bytes", 1.5e9),
            ("10 MiB", "bytes", 10 * 2**20),
            ("10MB", "bytes", 1e7),
            ("4 KiB", "bytes", 4096),
            ("4 kB", "bytes", 4000),
            ("1 TiB", "bytes", 2**40),
            ("12345", "bytes", 12345),
            ("12345 B", "bytes", 12345),
            ("1.5", "seconds", 1.5),
            ("3 G", "FLOPs", 3e9),
        ],
    )
    def test_reads(self, given: float | str, unit: str, expected: float) -> None:
        found = parse_quantity(given, unit)
        assert found == expected
        assert type(found) is float

    @pytest.mark.parametrize(
        ("given", "unit", "message"),
        [
            ("12 Gib", "bytes", "Unknown unit of bytes 'Gib'.*did you mean 'GiB'"),
            ("2M", "bytes", "Unknown unit of bytes 'M'"),
            ("2 GiB", "parameters", "Unknown unit of parameters 'GiB'"),
            ("much", "bytes", "Cannot read 'much' as an amount of bytes"),
            ("90%", "", "Cannot read '90%' as a number, as in '0.9'"),
            ("8x!", "bytes", "as in '12 GiB'"),
            ("8x!", "parameters", "as in '500k'"),
            (8, "bytes", "8 bytes is too small; did you mean '8 GiB'"),
            ("8", "bytes", "did you mean '8 GiB'"),
            ("", "parameters", "Cannot read ''"),
            ("1,000", "parameters", "Cannot read '1,000'"),
            ("1.2.3", "parameters", "Cannot read"),
            ("_", "parameters", "Cannot read"),
            ("-2M", "parameters", "above 0, got -2000000.0"),
            (0, "parameters", "above 0, got 0"),
            (-1, "bytes", "above 0, got -1"),
            (math.inf, "bytes", "finite number"),
            (math.nan, "bytes", "finite number"),
            (True, "parameters", "finite number above 0, got True"),
            (None, "bytes", "finite number above 0, got None"),
            ([1], "bytes", r"finite number above 0, got \[1\]"),
        ],
    )
    def test_refuses(self, given: Any, unit: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse_quantity(given, unit)

    @given(st.integers(1, 10**15), st.sampled_from(("", "k", "M", "B")))
    def test_text_and_number_agree(self, number: int, suffix: str) -> None:
        size = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}[suffix]
        assert parse_quantity(f"{number}{suffix}", "parameters") == float(number) * size


class TestConstraints:
    def test_bounds_of_costs(self) -> None:
        first, second = resolve_constraints({"trainable_parameters": "2M", "peak_memory": "1 GiB"}, METRICS)
        assert (first.objective.name, first.bound) == ("trainable_parameters", 2e6)
        assert (second.objective.name, second.bound) == ("peak_memory", 2**30)
        assert resolve_constraints({}, METRICS) == ()

    @pytest.mark.parametrize(
        ("bounds", "message"),
        [
            ({"peak_memry": 1}, "Unknown constraint 'peak_memry'.*did you mean 'peak_memory'"),
            ({"training_seconds": 1}, "training_seconds is only known after training.*peak_memory"),
            ({"accuracy": 0.9}, "accuracy is only known after training"),
            ({"peak_memory": "12 GB per GPU"}, "Cannot read"),
            ({"peak_memory": None}, "above 0, got None"),
        ],
    )
    def test_refuses(self, bounds: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            resolve_constraints(bounds, METRICS)

    @pytest.mark.parametrize(("found", "violation"), [(50.0, -0.5), (100.0, 0.0), (150.0, 0.5), (300.0, 2.0)])
    def test_violation_of_an_upper_bound(self, found: float, violation: float) -> None:
        constraint = Constraint(objective=COST_OBJECTIVES["trainable_parameters"], bound=100.0)
        assert constraint.violation({"trainable_parameters": found}) == pytest.approx(violation)

    @pytest.mark.parametrize(("found", "violation"), [(0.9, -0.125), (0.8, 0.0), (0.6, 0.25)])
    def test_violation_of_a_lower_bound(self, found: float, violation: float) -> None:
        accuracy = Objective(name="accuracy", direction="maximize", unit="score")
        constraint = Constraint(objective=accuracy, bound=0.8)
        assert constraint.violation({"accuracy": found}) == pytest.approx(violation)

    def test_description(self) -> None:
        memory = Constraint(objective=COST_OBJECTIVES["peak_memory"], bound=2**30)
        assert memory.describe({"peak_memory": 3 * 2**29}) == (
            "peak_memory 1,536.0 MiB, allowed ≤ 1,024.0 MiB"
        )
        accuracy = Objective(name="accuracy", direction="maximize", unit="score")
        constraint = Constraint(objective=accuracy, bound=0.8)
        assert constraint.describe({"accuracy": 0.7}) == "accuracy 0.7000, allowed ≥ 0.8000"
