"""Were the scores right? The correlations by hand, their intervals, and the report of a real search."""

from __future__ import annotations

import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from scipy import stats

from autopeft.core.adapter import Adapter, Site
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective
from autopeft.reporting.score_validation import ScoreCheck, check_scores, implied_quality
from autopeft.search_spaces import PerLayer
from autopeft.sensitivity import SiteScores
from tests.learnable import tiny_search
from tests.records import OBJECTIVES, completed

SITES = [Site(block, role) for block in range(4) for role in ("query", "value")]
RISING = SiteScores(name="gora", values={site: 1.0 + site.block for site in SITES})
FLAT = SiteScores(name="uniform", values=dict.fromkeys(SITES, 1.0))


def rows(check: ScoreCheck) -> dict[str, Any]:
    """Return the rows of a check by score, best first."""
    return {str(row.score): row for row in check.frame.itertuples()}


def trials(count: int, seed: int = 0) -> list[TrialRecord]:
    """Return trials whose accuracy follows `RISING`, with a little noise."""
    generator = random.Random(seed)
    records = []
    for number in range(count):
        chosen = generator.sample(SITES, 3)
        configuration = Configuration(
            {site: Adapter("lora", generator.choice((1, 4, 16))) for site in chosen}
        )
        record = completed(number, configuration, generator)
        accuracy = 0.5 + implied_quality(configuration, RISING) / 100 + generator.gauss(0, 0.02)
        values = {**record.evaluation.values, "accuracy": accuracy}
        records.append(replace(record, evaluation=replace(record.evaluation, values=values)))
    return records


def test_implied_quality_is_the_sum_over_adapters() -> None:
    configuration = Configuration({Site(1, "query"): Adapter("lora", 3), Site(3, "value"): Adapter("ia3")})
    assert implied_quality(configuration, RISING) == pytest.approx(2 * 2 + 4 * 1)
    assert implied_quality(Configuration(), RISING) == 0


def test_the_score_that_decides_comes_first_with_honest_intervals() -> None:
    records = trials(40)
    check = check_scores(records, {"gora": RISING, "uniform": FLAT}, OBJECTIVES[0])
    assert check.trials == 40
    best = next(iter(rows(check).values()))
    assert (best.score, best.control) == ("gora", False)
    controls = {name for name, row in rows(check).items() if row.control}
    assert controls == {"random", "uniform", "trainable_parameters"}
    implied = [implied_quality(record.evaluation.configuration, RISING) for record in records]
    trained = [record.evaluation.values["accuracy"] for record in records]
    assert best.spearman == pytest.approx(stats.spearmanr(implied, trained).statistic)
    assert best.kendall == pytest.approx(stats.kendalltau(implied, trained).statistic)
    for row in rows(check).values():
        assert -1 <= row.spearman_low < row.spearman < row.spearman_high <= 1
        assert -1 <= row.kendall_low < row.kendall < row.kendall_high <= 1


def test_a_score_that_only_counts_parameters_adds_nothing_to_their_number() -> None:
    """Random scores rank trials well where only size matters; given the number of parameters they do not."""
    generator = random.Random(1)
    records = []
    for number in range(200):
        chosen = generator.sample(SITES, generator.randint(1, len(SITES)))
        size = generator.choice((1, 4, 16))
        configuration = Configuration({site: Adapter("lora", size) for site in chosen})
        record = completed(number, configuration, generator)
        parameters = float(size * len(chosen))
        values = {
            **record.evaluation.values,
            "trainable_parameters": parameters,
            "accuracy": math.log(parameters) / 9 + generator.gauss(0, 0.05),
        }
        records.append(replace(record, evaluation=replace(record.evaluation, values=values)))
    found = rows(check_scores(records, {"gora": RISING}, OBJECTIVES[0]))
    assert found["random"].control
    assert found["uniform"].control
    for name in ("gora", "random", "uniform"):
        assert found[name].spearman > 0.6
        assert abs(found[name].partial) < 0.35
        assert found[name].partial_low < found[name].partial < found[name].partial_high
    assert found["trainable_parameters"].partial == 0
    assert found["trainable_parameters"].spearman == max(row.spearman for row in found.values())
    assert [row.partial for row in found.values()] == sorted(
        (row.partial for row in found.values()), reverse=True
    )
    # The correlation of what the ranks have left once those of the number of parameters are taken out.
    columns = [
        [implied_quality(record.evaluation.configuration, RISING) for record in records],
        [record.evaluation.values["accuracy"] for record in records],
    ]
    given = stats.rankdata([record.evaluation.values["trainable_parameters"] for record in records])
    left = []
    for column in columns:
        ranks = stats.rankdata(column)
        line = stats.linregress(given, ranks)
        left.append(ranks - line.slope * given)
    assert found["gora"].partial == pytest.approx(stats.pearsonr(*left).statistic)


@pytest.mark.slow
def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    truth = rows(check_scores(trials(3000, seed=9), {"gora": RISING}, OBJECTIVES[0]))["gora"].spearman
    checks = [check_scores(trials(40, seed), {"gora": RISING}, OBJECTIVES[0]) for seed in range(200)]
    found = [rows(check)["gora"] for check in checks]
    covered = sum(row.spearman_low <= truth <= row.spearman_high for row in found)
    assert 0.88 <= covered / 200 <= 0.99


def test_a_score_is_as_right_of_a_metric_that_is_minimised() -> None:
    error = Objective(name="error", direction="minimize", unit="nats", is_metric=True)
    records = trials(20)
    mirrored = [
        replace(
            record, evaluation=replace(record.evaluation, values={**values, "error": -values["accuracy"]})
        )
        for record in records
        for values in [record.evaluation.values]
    ]
    found = check_scores(mirrored, {"gora": RISING}, error)
    assert found.metric == "error"
    assert found.frame.equals(check_scores(records, {"gora": RISING}, OBJECTIVES[0]).frame)


def test_duplicates_do_not_count_and_few_trials_are_refused() -> None:
    records = trials(11)
    again = [replace(record, number=20 + record.number, duplicate_of=record.number) for record in records]
    assert check_scores([*records, *again], {"gora": RISING}, OBJECTIVES[0]).trials == 11
    with pytest.raises(ValueError, match="10 trials or more, got 9"):
        check_scores(records[:9], {"gora": RISING}, OBJECTIVES[0])


def test_a_constant_score_correlates_with_nothing() -> None:
    configuration = Configuration({SITES[0]: Adapter("lora", 2)})
    records = [completed(number, configuration, random.Random(number)) for number in range(12)]
    check = check_scores(records, {"gora": RISING}, OBJECTIVES[0])
    assert rows(check)["gora"].spearman == 0
    assert not check.frame.isna().any(axis=None)


@pytest.mark.slow
def test_a_search_ends_with_it_and_writes_it_to_mlflow(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    space = PerLayer(methods=("lora", "series"), sizes={"rank": (1, 8), "bottleneck width": (1, 8)})
    search = tiny_search(tmp_path / "runs", space=space, tracking=uri, score_check=True)
    search.run(trials=11, progress=False)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("autopeft")
    assert experiment is not None
    parents = client.search_runs([experiment.experiment_id], "tags.`autopeft.search` = 'tiny'")
    paths = {
        list_artifact.path for list_artifact in client.list_artifacts(parents[0].info.run_id, "sensitivity")
    }
    names = ("heatmap.html", "scores.csv", "score_check.html", "score_check.csv")
    assert paths >= {f"sensitivity/{name}" for name in names}
    check = search.check_scores(("gora", "uniform"))
    assert set(check.to_frame()["score"]) == {
        "gora",
        "uniform",
        "random",
        "trainable_parameters",
    }
    assert "95 % intervals" in repr(check)
    saved = check.save(tmp_path / "check")
    assert "gora" in saved[0].read_text(encoding="utf-8")


def test_what_goes_wrong_in_it_does_not_end_a_search(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = tiny_search(
        tmp_path, space=PerLayer(methods=("lora",), sizes={"rank": (1, 8)}), score_check=True
    )
    (tmp_path / "scores").write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="autopeft"):
        front = search.run(trials=10, progress=False)
    assert len(front.records) == 10
    assert "could not be checked" in caplog.text
