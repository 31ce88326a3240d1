"""Methods that look for a front, each one run until so much compute is spent, and resumable at any moment.

What they train themselves counts, with loading and whatever prepares it; choosing what to try next does not,
for any of them: real trainings are longer, and it stays as it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from optuna import create_study
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from autopeft import ParetoFront, Search
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Evaluation, TrialRecord
from autopeft.core.pareto import Axis, Values, contributions, non_dominated_sort
from autopeft.core.seeding import training_seed
from autopeft.evaluation.evaluator import Evaluator
from autopeft.models.backbone import Backbone
from autopeft.optimization.ehvi_sampler import EhviSampler, encoded
from autopeft.optimization.samplers import make_sampler
from autopeft.optimization.study_store import quiet_optuna
from autopeft.optimization.trial_records import Spent
from autopeft.search_spaces import AutoPEFTPaper, PerLayer, SearchSpace, Uniform
from autopeft.search_spaces.uniform import PLACES
from autopeft.training.compute_meter import ComputeMeter
from benchmarks.uniform_lora import uniform
from benchmarks.yardstick.runs import Outcome, RunLog, seconds_of
from benchmarks.yardstick.tasks import FrontTask

RANKS = (8, 2, 32, 1, 16, 4, 64)
RATES = (1e-3, 3e-3, 3e-4, 1e-2)
RUNGS = (1 / 9, 1 / 3)
_RANGE = min(RATES), max(RATES)
_REDUCTION = 3


@dataclass(frozen=True, kw_only=True)
class Run:
    """One method with one seed.

    Attributes:
        task: What is fine-tuned.
        seed: Of the method and its trainings.
        budget: When it ends, in plain trainings.
        axes: Of the hypervolume.
        log: What it has found.
        folder: Where it may keep files.
    """

    task: FrontTask
    seed: int
    budget: float
    axes: Sequence[Axis]
    log: RunLog
    folder: Path


Method = Callable[[Run], None]
Propose = Callable[[Run, Backbone], Configuration | None]
"""Says what is tried next, by what the run's log has; None where there is nothing left."""


def sweep(run: Run, backbone: Backbone) -> Configuration | None:
    """Propose the head alone, then ranks, places and rates, the most usual first.

    A combination's turn is the sum of its places in `RANKS`, `PLACES` and `RATES`.
    """
    turns = product(enumerate(RANKS), enumerate(PLACES), enumerate(RATES))
    ranked = sorted(turns, key=lambda turn: sum(place for place, _ in turn))
    several = (uniform(backbone, rank, rate, where) for (_, rank), (_, where), (_, rate) in ranked)
    grid = [Configuration(learning_rate=max(RATES)), *dict.fromkeys(each for each in several if len(each))]
    number = len(run.log.tried)
    return grid[number] if number < len(grid) else None


def asked(
    run: Run, backbone: Backbone, *, space: SearchSpace, sampler: str, random_share: float = 0.0
) -> Configuration:
    """Propose what an Optuna sampler asks for, drawn at random in the first share of the budget.

    The study is made anew from the log, the sampler from seed and number: a run may be interrupted.
    """
    space.validate(backbone)
    name = "random" if run.log.units < random_share * run.budget else sampler
    directions = [axis.objective.direction for axis in run.axes]
    made = make_sampler(name, run.seed, len(run.log.tried))
    assert isinstance(made, BaseSampler)
    with quiet_optuna():
        study = create_study(directions=directions, sampler=made)
        study.add_trials([_told(outcome, space, backbone, run.axes) for outcome in run.log.tried])
        return space.suggest(study.ask(), backbone)


def _told(outcome: Outcome, space: SearchSpace, backbone: Backbone, axes: Sequence[Axis]) -> FrozenTrial:
    values = outcome.values
    params, distributions = encoded(space, outcome.trained, backbone)
    return create_trial(
        state=TrialState.FAIL if values is None else TrialState.COMPLETE,
        params=params,
        distributions=distributions,
        values=None if values is None else [values[axis.objective.name] for axis in axes],
    )


def drawn(run: Run, backbone: Backbone, *, space: SearchSpace) -> Configuration:
    """Propose a point of a space at random."""
    return space.draw(random.Random(f"{run.seed}:{len(run.log.tried)}"), backbone)


def trained_in_turn(run: Run, *, propose: Propose, rungs: Sequence[float] = ()) -> None:
    """Train what is proposed, one after another; with rungs, MO-ASHA says who goes on at each."""
    meter = ComputeMeter(run.task.search().training.resolved_device())
    evaluator = run.task.evaluator(rungs)
    if not run.log.outcomes:
        run.log.spend(seconds_of(meter.read()))
    while run.log.units < run.budget:
        configuration = propose(run, evaluator.backbone)
        if configuration is None:
            break
        evaluation, reached = _halved(run, evaluator, configuration)
        run.log.spend(seconds_of(evaluation.cost))
        is_whole = evaluation.status == "complete"
        run.log.add(configuration, values=_of(run, evaluation) if is_whole else None, rungs=tuple(reached))
    run.log.end(run.budget)


def _halved(
    run: Run, evaluator: Evaluator, configuration: Configuration
) -> tuple[Evaluation, Sequence[Values]]:
    """Train to one rung after another while the configuration goes on; return its objectives there too."""
    seed = training_seed(run.seed, len(run.log.tried))
    paused, reached = None, list[Values]()
    for rung in range(len(evaluator.plan.rungs)):
        trained = evaluator.train(configuration, seed, rung=rung, paused=paused)
        paused = trained.paused
        if paused is None:
            break
        others = [outcome.rungs[rung] for outcome in run.log.tried if len(outcome.rungs) > rung]
        reached.append(_of(run, trained.evaluation))
        if not goes_on(reached[-1], others, run.axes):
            break
    return trained.evaluation, reached


def goes_on(values: Values, others: Sequence[Values], axes: Sequence[Axis]) -> bool:
    """Whether one of three at a rung is trained on: by layers of dominance, then by hypervolume.

    Schmucker et al., "Multi-objective Asynchronous Successive Halving", 2021, which ends a training that is
    not among the best of those that were there before it. The first goes on.
    """
    points = [*others, values]
    ahead = 0
    for layer in non_dominated_sort(points, [axis.objective for axis in axes]):
        if len(others) in layer:
            shares = dict(zip(layer, contributions([points[place] for place in layer], axes), strict=True))
            ahead += sum(share > shares[len(others)] for share in shares.values())
            break
        ahead += len(layer)
    return ahead < max(1, len(points) // _REDUCTION)


def _of(run: Run, evaluation: Evaluation) -> dict[str, float]:
    return {axis.objective.name: evaluation.values[axis.objective.name] for axis in run.axes}


def searched(run: Run, *, options: Callable[[Search], dict[str, Any]]) -> None:
    """Run autopeft's search with other arguments than the default, or with none."""
    default = run.task.search(folder=run.folder, name="search", seed=run.seed)
    search = Search(**default.arguments() | options(default))
    device = search.training.resolved_device()
    meter = ComputeMeter(device)
    search.open()
    before = 0.0
    if run.log.outcomes:
        before = seconds_of(Spent.of(search.front().records).cost)
    else:
        run.log.spend(seconds_of(meter.read()))

    def note(record: TrialRecord, front: ParetoFront) -> None:
        nonlocal before
        spent = seconds_of(Spent.of(front.records).cost)
        run.log.spend(spent - before)
        before = spent
        if record.duplicate_of is not None:
            return
        for point in record.points:
            is_whole = point.evaluation.status == "complete"
            run.log.add(
                point.evaluation.configuration,
                values=_of(run, point.evaluation) if is_whole else None,
                cut_from=None if point.derived_from is None else record.evaluation.configuration,
            )

    seconds = before + (run.budget - run.log.units) * run.log.unit_seconds
    budget: dict[str, Any] = {"gpu_seconds" if device.type == "cuda" else "cpu_seconds": seconds}
    search.run(progress=False, callbacks=[note], **budget)
    if search.interrupted:
        raise KeyboardInterrupt
    run.log.end(run.budget)


SWEEP, OURS, PROTOCOL = "uniform rsLoRA sweep", "autopeft", "AutoPEFT's protocol"
_ASKED: Mapping[str, Propose] = {
    "Optuna TPE over one rank": partial(asked, space=Uniform(learning_rate=_RANGE), sampler="tpe"),
    PROTOCOL: partial(asked, space=AutoPEFTPaper(learning_rate=_RANGE), sampler="gp", random_share=0.5),
}
_VARIANTS: Mapping[str, Callable[[Search], dict[str, Any]]] = {
    OURS: lambda search: {},
    "autopeft, derived points": lambda search: {"derive": True},
    "autopeft, no scores": lambda search: {"space": PerLayer(methods=("lora",))},
    "autopeft, no rungs": lambda search: {"halving": None},
    "autopeft, one seed": lambda search: {"seeds": 1},
    "autopeft, no baselines": lambda search: {"baselines": False},
    "autopeft, no probes": lambda search: {"sampler": EhviSampler(seed=search.seed, probe_share=0.0)},
    "autopeft, TPE": lambda search: {"sampler": "tpe"},
    "autopeft, no hidden states": lambda search: {"training": replace(search.training, frozen_blocks="eval")},
}
METHODS: Mapping[str, Method] = {
    SWEEP: partial(trained_in_turn, propose=sweep),
    **{name: partial(trained_in_turn, propose=propose) for name, propose in _ASKED.items()},
    "MO-ASHA": partial(
        trained_in_turn,
        propose=partial(drawn, space=PerLayer(methods=("lora",), learning_rate=_RANGE)),
        rungs=RUNGS,
    ),
    **{name: partial(searched, options=options) for name, options in _VARIANTS.items()},
}
"""By name. AutoPEFT's protocol is the paper's space, half of the compute at random and half by a Gaussian
process with expected hypervolume improvement (Optuna's, as neither botorch nor the paper's is a dependency).
MO-ASHA is Syne Tune's rule, written here, as Syne Tune is no dependency. Of autopeft, each technique of the
default is switched off alone, or one added."""
