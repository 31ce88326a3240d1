"""Objectives: what a search trades off, in which direction, in which unit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Self

from autopeft.core.errors import check_choice, unknown_choice

Direction = Literal["maximize", "minimize"]
_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_BYTES |= {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_COUNTS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_QUANTITY = re.compile(r"(?P<number>[-+]?[\d_]*\.?\d+(?:e[-+]?\d+)?)\s*(?P<unit>[A-Za-z]*)")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A quantity the search trades off.

    Attributes:
        name: The name in values, tables, MLflow metrics and constraints.
        direction: Whether more or less of it is better.
        unit: "score", "nats", "parameters", "bytes", "seconds", "FLOPs", "tokens/s" or one of a task's own.
        before_training: Whether its value is exact before anything is trained.
        log_scale: Whether ratios matter rather than differences (plots, hypervolume).
        is_metric: Whether it says how good a model is, and not what it costs.
        at_end: Whether it is only measured when a training has ended, and not in each validation.
    """

    name: str
    direction: Direction
    unit: str
    before_training: bool = False
    log_scale: bool = False
    is_metric: bool = False
    at_end: bool = False

    @classmethod
    def score(cls, name: str, *, at_end: bool = False) -> Self:
        """Return a metric that is better when larger."""
        return cls(name=name, direction="maximize", unit="score", is_metric=True, at_end=at_end)

    @property
    def sign(self) -> int:
        """1 where more of it is better, -1 where less is."""
        return 1 if self.direction == "maximize" else -1

    @property
    def mode(self) -> Literal["max", "min"]:
        """The direction as Lightning's callbacks call it."""
        return "max" if self.direction == "maximize" else "min"

    def best(self, values: Iterable[float]) -> float:
        """Return the best of several values."""
        return max(values, key=lambda value: self.sign * value)

    def is_better(self, value: float, other: float) -> bool:
        """Return whether a value is better than another."""
        return self.sign * value > self.sign * other

    def format(self, value: float) -> str:
        """Write a value for people, as in "334.0 k" or "117.2 MiB"."""
        if math.isnan(value):
            return "–"
        if self.unit == "bytes":
            return f"{value / 2**20:,.1f} MiB"
        if self.unit == "seconds":
            return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.2f} ms"
        if self.unit in ("parameters", "FLOPs"):
            return _with_prefix(value)
        if self.unit == "tokens/s":
            return f"{value:,.1f} tokens/s"
        return f"{value:.4f}"


def _with_prefix(value: float) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f} {prefix}"
    return f"{value:g}"


COST_OBJECTIVES: Mapping[str, Objective] = {
    name: Objective(
        name=name, direction="minimize", unit=unit, before_training=before_training, log_scale=True
    )
    for name, unit, before_training in (
        ("trainable_parameters", "parameters", True),
        ("adapter_parameters", "parameters", True),
        ("adapter_bytes", "bytes", True),
        ("peak_memory", "bytes", True),
        ("forward_flops", "FLOPs", True),
        ("training_seconds", "seconds", False),
        ("inference_latency", "seconds", False),
    )
}
"""Objectives every task has. Adapter parameters are the trainable ones without the head's; adapter bytes are
those of the tensors that an export writes, the head's included; forward FLOPs are those of the largest batch
that runs at once in training; inference latency is the median time of one forward pass over it."""

GENERATION_SPEEDS: Mapping[str, Objective] = {
    name: Objective(name=name, direction="maximize", unit="tokens/s", log_scale=True)
    for name in ("tokens_per_second", "tokens_per_second_merged")
}
"""Objectives of tasks that generate text: tokens a second with the adapters attached, and with those merged
into the weights that weights can take in."""


def resolve_objectives(names: Iterable[str], metrics: Iterable[Objective]) -> tuple[Objective, ...]:
    """Turn names into objectives.

    Args:
        names: The objectives in order; the first is the one tables sort by.
        metrics: The task's metrics, and other objectives of its own.

    Raises:
        ValueError: A name is unknown or given twice, or there are fewer than two.
    """
    available = _available(metrics)
    wanted = [names] if isinstance(names, str) else list(names)
    check_choice("objective", available, *wanted)
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"An objective is named twice: {', '.join(wanted)}.")
    if len(wanted) < 2:
        raise ValueError(
            f"A front needs at least two objectives, got {wanted}; "
            "for example ('accuracy', 'trainable_parameters')."
        )
    monitors = [name for name, objective in available.items() if objective.is_metric and not objective.at_end]
    if not set(monitors) & set(wanted):
        raise ValueError(
            f"At least one objective must be a metric that every validation measures: {', '.join(monitors)}."
        )
    return tuple(available[name] for name in wanted)


def _available(metrics: Iterable[Objective]) -> dict[str, Objective]:
    return {**{metric.name: metric for metric in metrics}, **COST_OBJECTIVES}


def parse_quantity(value: float | str, unit: str) -> float:
    """Read a bound: 2_000_000, "2M" (parameters), "12 GiB" (bytes), "1.5" (others).

    Raises:
        ValueError: The text is no number, its unit is unknown, or the value is not finite and positive.
    """
    units = _BYTES if unit == "bytes" else _COUNTS
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value.strip())
        if match is None:
            amounts = {"bytes": "12 GiB", "parameters": "500k", "FLOPs": "3G"}
            kind = f"an amount of {unit}" if unit in amounts else "a number"
            raise ValueError(f"Cannot read {value!r} as {kind}, as in {amounts.get(unit, '0.9')!r}.")
        suffix = match["unit"] or ("B" if unit == "bytes" else "")
        check_choice(f"unit of {unit}", units, suffix)
        value = float(match["number"].replace("_", "")) * units[suffix]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"A bound in {unit} must be a finite number above 0, got {value!r}.")
    if unit == "bytes" and value < _BYTES["KiB"]:
        raise ValueError(f"An amount of {value:g} bytes is too small; did you mean '{value:g} GiB'?")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A bound a candidate must keep: at most `bound` of a cost, or at least `bound` of a metric.

    Attributes:
        objective: What is bounded.
        bound: The bound, in the objective's unit; itself allowed.
    """

    objective: Objective
    bound: float

    def violation(self, values: Mapping[str, float]) -> float:
        """Return by how much, relative to the bound, it is broken; at most 0 when it is kept."""
        excess = values[self.objective.name] - self.bound
        return (excess if self.objective.direction == "minimize" else -excess) / self.bound

    def describe(self, values: Mapping[str, float]) -> str:
        """Say what was found against what was allowed."""
        sign = "≤" if self.objective.direction == "minimize" else "≥"
        found = self.objective.format(values[self.objective.name])
        return f"{self.objective.name} {found}, allowed {sign} {self.objective.format(self.bound)}"


def resolve_constraints(
    bounds: Mapping[str, float | str], metrics: Iterable[Objective]
) -> tuple[Constraint, ...]:
    """Turn `{"trainable_parameters": "2M"}` into constraints.

    Raises:
        ValueError: A name is unknown, a bound cannot be read, or a bound needs training to be known.
    """
    known = _available(metrics)
    exact = [name for name, objective in known.items() if objective.before_training]
    constraints = []
    for name, bound in bounds.items():
        if name not in known:
            raise unknown_choice("constraint", name, exact)
        objective = known[name]
        if not objective.before_training:
            raise ValueError(
                f"{name} is only known after training, so it cannot be a constraint: "
                f"make it an objective, or constrain one of {', '.join(exact)}."
            )
        constraints.append(Constraint(objective=objective, bound=parse_quantity(bound, objective.unit)))
    return tuple(constraints)
