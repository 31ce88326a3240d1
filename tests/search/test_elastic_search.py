"""An elastic adapter proposes trials, is compared with what they give, and is not listened to when wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from optuna.trial import FixedTrial

from autopeft import Elastic
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Cost, Evaluation, TrialRecord
from autopeft.core.pareto import Values
from autopeft.evaluation.supernet.candidates import crossed, drawn, largest_lora
from autopeft.evaluation.supernet.proposer import ElasticProposals
from autopeft.evaluation.supernet.ranking_check import FEWEST_TRIALS, check_elastic
from autopeft.evaluation.supernet.supernet import ElasticAdapter
from autopeft.methods import count_parameters
from autopeft.search_spaces import PerLayer, SearchSpace, Uniform
from autopeft.training.settings import Training
from autopeft.yaml_config import build_config
from tests.learnable import learner, outcomes, tiny_search

SPACE = PerLayer(
    methods=("lora",), ranks=(1, 4), roles=("query", "value", "ffn_up"), learning_rate=(1e-3, 3e-2)
)
OBJECTIVES = ("accuracy", "trainable_parameters")
ELASTIC = Elastic(candidates=24, share=1.0)


def elastic_search(folder: Path, **settings: Any) -> Any:
    defaults = {"space": SPACE, "objectives": OBJECTIVES, "elastic": ELASTIC, "score_check": False}
    return tiny_search(folder, **(defaults | settings))


def proposals(folder: Path, elastic: Elastic = ELASTIC) -> ElasticProposals:
    training = Training(epochs=8, batch_size=8, device="cpu", precision="32-true")
    made = elastic_search(folder, elastic=elastic, training=training).elastic_proposals()
    assert isinstance(made, ElasticProposals)
    return made


def trained(points: Sequence[Configuration], accuracies: Sequence[float], backbone: Any) -> list[TrialRecord]:
    return [
        TrialRecord(
            number=number,
            evaluation=Evaluation(
                configuration=point,
                status="complete",
                values={
                    "accuracy": accuracy,
                    "trainable_parameters": float(count_parameters(backbone, point)),
                },
            ),
        )
        for number, (point, accuracy) in enumerate(zip(points, accuracies, strict=True))
    ]


def ask(made: ElasticProposals, records: Sequence[TrialRecord], seed: int = 0) -> dict[str, Any] | None:
    front: dict[Configuration, Values] = {
        one.evaluation.configuration: one.evaluation.values for one in records[:1]
    }
    return made.propose(seed, records, front)


def test_a_search_tries_what_the_elastic_adapter_proposes_and_pays_for_it(tmp_path: Path) -> None:
    search = elastic_search(tmp_path, baselines=False)
    front = search.run(trials=6, progress=False)
    made = search.elastic_proposals()
    assert made is not None
    assert made.cost.steps == search.evaluator.plan.total_steps  # from the search's folder
    check = made.check(front.records)
    assert check is not None
    assert check.trials == len({one.evaluation.configuration for one in front.records})
    again = elastic_search(tmp_path, baselines=False, name="without", elastic=None).run(
        trials=6, progress=False
    )
    assert outcomes(again.records) != outcomes(front.records)
    spent = sum(one.evaluation.cost.cpu_seconds for one in front.records)
    bounded = elastic_search(tmp_path, name="bounded", baselines=False)
    short = bounded.run(cpu_seconds=spent / 6 + made.cost.cpu_seconds / 2, progress=False)
    assert len(short.records) < 6


def test_a_search_that_is_resumed_goes_on_with_the_same_adapter(tmp_path: Path) -> None:
    whole = elastic_search(tmp_path, name="whole").run(trials=10, progress=False)
    elastic_search(tmp_path, name="parts").run(trials=8, progress=False)
    path = tmp_path / "parts" / "elastic" / "adapter.safetensors"
    before = path.stat().st_mtime_ns
    parts = elastic_search(tmp_path, name="parts").run(trials=10, progress=False)
    assert outcomes(parts.records) == outcomes(whole.records)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="elastic"):
        elastic_search(tmp_path, name="parts", elastic=Elastic(candidates=30)).run(trials=11, progress=False)


def test_proposals_are_points_of_the_space_that_were_not_tried(tmp_path: Path) -> None:
    made = proposals(tmp_path)
    backbone = made.evaluator.backbone
    records: list[TrialRecord] = []
    seen = set()
    for seed in range(6):
        proposal = made.propose(seed, records, {})
        assert proposal is not None
        point = SPACE.suggest(FixedTrial(proposal), backbone)
        assert Configuration(point.adapters) not in seen
        seen.add(Configuration(point.adapters))
        records += trained([point], [0.6], backbone)
    together: list[Configuration] = []  # as for a pack
    for number in range(6, 9):
        proposal = made.propose(number, records, {}, together)
        assert proposal is not None
        together.append(SPACE.suggest(FixedTrial(proposal), backbone))
    assert len({Configuration(one.adapters) for one in together} - seen) == 3
    nothing = Configuration({}, learning_rate=1e-2)
    best: dict[Configuration, Values] = {nothing: {"accuracy": 1.0, "trainable_parameters": 1.0}}
    assert made.propose(0, records, best) is None  # nothing can add to this front
    assert (
        proposals(tmp_path, Elastic(candidates=24, share=0.0, warm_start=True)).propose(0, records, {})
        is None
    )


def test_it_has_no_say_while_its_ranking_is_poor(tmp_path: Path) -> None:
    made = proposals(tmp_path)
    backbone = made.evaluator.backbone
    head_alone = Configuration({}, learning_rate=1e-2)
    assert ask(made, trained([head_alone], [0.0], backbone)) is not None
    adapter = made.weights.trained
    assert adapter is not None
    points = [one for one in drawn(SPACE, backbone, 30, random.Random(3)) if len(one)][: 2 * FEWEST_TRIALS]
    points = list({Configuration(one.adapters): one for one in points}.values())[:FEWEST_TRIALS]
    losses = [one.loss for one in adapter.score(made.evaluator, points).scores]
    order = sorted(losses)
    right = [0.5 - 0.01 * order.index(one) for one in losses]
    wrong = [0.3 + 0.01 * order.index(one) for one in losses]
    for accuracies, spearman in ((right, 1.0), (wrong, -1.0)):
        records = trained([head_alone, *points], [0.0, *accuracies], backbone)
        check = made.check(records[1:])
        assert check is not None
        assert check.spearman == pytest.approx(spearman, abs=0.02)
        assert check.trusted == (spearman > 0)
    assert ask(made, trained([head_alone, *points], [0.0, *right], backbone)) is not None
    assert ask(made, trained([head_alone, *points], [0.9, *wrong], backbone)) is None
    check = made.check(records[1:])
    assert check is not None
    assert "it proposes nothing" in check.describe()
    (path,) = check.save(tmp_path / "kept")
    kept = pd.read_csv(path).iloc[0]
    assert kept["spearman"] == pytest.approx(check.spearman)
    assert not kept["trusted"]
    assert not kept["warm_start"]


def test_few_trials_do_not_condemn_it() -> None:
    few = check_elastic(
        "accuracy", scores=[1, 2], trained=[2, 1], parameters=[1, 1], warm_start=False, lowest=0.3
    )
    assert few.trusted
    assert few.spearman == pytest.approx(-1)
    assert few.spearman_parameters == 0
    assert "too few to tell" in few.describe()


def test_a_space_without_lora_has_no_elastic_adapter(tmp_path: Path) -> None:
    space = Uniform(methods=("series",), widths=(1, 4))
    search = elastic_search(tmp_path, space=space)
    assert len(search.run(trials=3, progress=False).records) == 3
    made = search.elastic_proposals()
    assert made is not None
    assert ask(made, []) is None
    assert made.weights.obstacle == "the space has no configuration of LoRA alone"
    assert made.cost == Cost()


@pytest.mark.parametrize(
    "space", [SPACE, Uniform(ranks=(1, 8)), PerLayer(methods=("series", "lora"), groups=2, ranks=(2, 8))]
)
def test_the_pool_has_points_of_the_space_alone(space: SearchSpace) -> None:
    backbone = learner()
    points = drawn(space, backbone, 12, random.Random(0))
    largest = largest_lora(space, backbone, points)
    assert largest is not None
    elastic = ElasticAdapter(largest=largest, tensors={}, cost=Cost())
    assert all(elastic.obstacle(one) is None for one in points)
    bare = [Configuration(one.adapters) for one in points]
    children = crossed(space, backbone, bare, bare, 8, random.Random(1))
    assert not set(children) & set(bare)
    for child in children:
        assert elastic.obstacle(child) is None
        rate = space.learning_rate
        space.encode(child.replace(learning_rate=rate if isinstance(rate, float) else rate[0]), backbone)
    if space is SPACE:
        assert len(children) == 8


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"trainings": 0}, "trainings is a number above 0"),
        ({"candidates": 2}, "candidates is a whole number from 3 up"),
        ({"candidates": 96.5}, "candidates is a whole number from 3 up, got 96.5"),
        ({"share": 1.5}, "share is a share of the trials"),
        ({"warm_start": "no"}, "warm_start is True or False, got 'no'"),
        ({"share": 0}, "With share=0 and warm_start=False an elastic adapter does nothing"),
        ({"lowest_correlation": -2}, r"lowest_correlation is in \[-1, 1\]"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Elastic(**setting)


def test_it_can_be_asked_for_in_a_file() -> None:
    settings = {
        "backbone": "model",
        "task": {"type": "TextClassification", "dataset": "data.csv", "text": "question"},
        "space": {"type": "PerLayer", "methods": ["lora"]},
        "elastic": {"trainings": 2.0, "candidates": 50, "warm_start": True},
    }
    expected = Elastic(trainings=2.0, candidates=50, warm_start=True)
    assert build_config(settings).search.elastic == expected
    with pytest.raises(ValueError, match="candidates"):
        build_config(settings | {"elastic": {"candidate": 50}})
