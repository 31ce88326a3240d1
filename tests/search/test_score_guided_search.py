"""A score-guided search end to end on a tiny model, and the report of its scores."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from autopeft.core.adapter import Adapter, Site
from autopeft.core.configuration import Configuration
from autopeft.evaluation import site_scoring
from autopeft.evaluation.packing.executor import PackedExecutor
from autopeft.optimization.ehvi_sampler import EhviSampler
from autopeft.optimization.proposal import History
from autopeft.optimization.successive_halving import SuccessiveHalving
from autopeft.search import Search
from autopeft.search_spaces import PerLayer, ScoreGuided, SearchSpace
from autopeft.search_spaces.method_choice import MethodChoice
from autopeft.search_spaces.mutation import SiteMutator
from autopeft.search_spaces.score_allocation import Allocation, site_values
from autopeft.sensitivity import SiteScores
from autopeft.sensitivity.allocation import ALLOCATORS
from tests.learnable import TRAINING, outcomes, tiny_search
from tests.tiny_models import tiny_backbone

SPACE = ScoreGuided(scores=("gradient_norm", "gora"), sizes={"rank": (1, 8)}, learning_rate=(1e-3, 1e-2))


def parameters_of(search: Search) -> list[dict[str, Any]]:
    storage = JournalStorage(JournalFileBackend(str(search.folder / "study.log")))
    study = optuna.load_study(study_name=search.name, storage=storage)
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize(
    "space",
    [
        SPACE,
        pytest.param(
            PerLayer(methods=("lora", "series"), sizes={"rank": (1, 8), "bottleneck width": (1, 8)}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_it_draws_then_chooses_by_gain_and_resumes_as_if_uninterrupted(
    space: SearchSpace, tmp_path: Path
) -> None:
    settings = {
        "space": space,
        "sampler": EhviSampler(startup_trials=5),
        "baselines": False,
        "score_check": False,
    }
    whole = tiny_search(tmp_path / "whole", **settings)
    front = whole.run(trials=13, progress=False)
    found = [record.evaluation.configuration for record in front.records]
    assert len({*found}) > 10
    generator = random.Random("0:0")
    assert found[0] == whole.open().space.draw(generator, whole.open().backbone)
    encoded = [whole.open().space.encode(configuration, whole.open().backbone) for configuration in found]
    assert parameters_of(whole) == encoded
    tiny_search(tmp_path / "cut", **settings).run(trials=8, progress=False)
    resumed = tiny_search(tmp_path / "cut", **settings).run(trials=13, progress=False)
    assert outcomes(resumed.records) == outcomes(front.records)


def test_five_trials_try_every_method_and_have_few_baselines(tmp_path: Path) -> None:
    space = PerLayer(methods=("lora", "ia3", "layernorm"))
    records = tiny_search(tmp_path, space=space).run(trials=5, progress=False).records
    assert [record.baseline for record in records[:3]] == ["head alone", "lora(1) everywhere", None]
    methods = {method for record in records for method in record.evaluation.configuration.methods}
    assert methods == {"lora", "ia3", "layernorm"}
    baselines = [record.evaluation.configuration for record in records if record.baseline]
    assert max(adapter.size or 1 for configuration in baselines for _, adapter in configuration) == 1


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.slow
def test_every_allocator_of_scores_can_be_searched_with(allocator: str, tmp_path: Path) -> None:
    is_spectral = ALLOCATORS[allocator].evidence == "spectra"
    score = "gradient_spectrum" if is_spectral else "gradient_norm"
    space = ScoreGuided(scores=(score,), sizes={"rank": (1, 8)}, allocator=allocator)
    search = tiny_search(tmp_path, space=space, score_check=False)
    records = search.run(trials=5, progress=False).records
    assert {record.evaluation.status for record in records} == {"complete"}
    assert f"({allocator})" in search.describe()
    assert ("temperature" in search.describe()) == (allocator == "proportional")
    generator = random.Random(0)
    drawn = {search.open().space.draw(generator, search.open().backbone) for _ in range(6)}
    assert len(drawn) > 3
    assert all(configuration.adapters for configuration in drawn)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allocator": "proportionl"}, "did you mean 'proportional'"),
        ({"allocator": "water_filling"}, "score with spectra, which the allocator 'water_filling' reads"),
        ({"sizes": {"rank": (16, 24, 32)}}, r"all sizes between two bounds, got \(16, 24, 32\)"),
    ],
)
def test_what_cannot_be_guided_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreGuided(**settings)


@pytest.mark.parametrize("ranks", [(1, 8), (16, 64), (32, 32)])
def test_only_the_first_baseline_is_the_head_alone(ranks: tuple[int, int], tmp_path: Path) -> None:
    """Also where the smallest size is more than a site's share of the smallest budget."""
    space = ScoreGuided(scores=("gradient_norm",), sizes={"rank": ranks}, learning_rate=(1e-3, 1e-2))
    search = tiny_search(tmp_path, space=space)
    search.validate()
    baselines = search.open().space.baselines(search.open().backbone)
    sizes = [len(baseline.configuration) for baseline in baselines]
    assert sizes[0] == 0
    assert all(sizes[1:])
    assert len(baselines) > 1


@pytest.mark.slow
def test_the_sampler_is_told_what_paused_and_infeasible_trials_are_worth(tmp_path: Path) -> None:
    told: list[History] = []

    class Watching(EhviSampler):
        def choose(self, *arguments: Any) -> Configuration:
            told.append(arguments[-1])
            return super().choose(*arguments)

    search = tiny_search(
        tmp_path,
        space=ScoreGuided(scores=("gradient_norm",), sizes={"rank": (1, 8)}),
        sampler=Watching(startup_trials=6),
        halving=SuccessiveHalving(rungs=(0.5,)),
        constraints={"trainable_parameters": "2k"},
    )
    records = search.run(trials=14, progress=False).records
    statuses = {record.evaluation.configuration: record.evaluation.status for record in records}
    assert {"paused", "infeasible", "complete"} <= {*statuses.values()}
    assert {known.constraints[0].objective.name for known in told} == {"trainable_parameters"}
    for configuration, values in told[-1].trials:
        assert values["trainable_parameters"] > 0
        assert ("accuracy" in values) == (statuses[configuration] != "infeasible")
    chosen = [record.evaluation for record in records[6:]]
    assert sum(evaluation.status == "infeasible" for evaluation in chosen) <= len(chosen) / 3


@pytest.mark.parametrize(
    ("frozen_blocks", "executor", "is_known"),
    [("cached", "local", True), ("eval", "local", False), ("cached", PackedExecutor(size=2), False)],
)
def test_the_sampler_is_told_whether_hidden_states_are_really_served(
    frozen_blocks: Literal["cached", "eval"],
    executor: str | PackedExecutor,
    is_known: bool,
    tmp_path: Path,
) -> None:
    """Not by the setting: of rows as short as these, keeping hidden states does not pay."""
    told: list[History] = []

    class Watching(EhviSampler):
        def choose(self, *arguments: Any) -> Configuration:
            told.append(arguments[-1])
            return super().choose(*arguments)

    search = tiny_search(
        tmp_path,
        space=ScoreGuided(scores=("gradient_norm",), sizes={"rank": (1, 8)}),
        sampler=Watching(startup_trials=2),
        training=replace(TRAINING, frozen_blocks=frozen_blocks),
        executor=executor,
        score_check=False,
    )
    records = search.run(trials=8, progress=False).records
    cuts = range(len(search.open().backbone.blocks) + 1)
    served = {cut for cut in cuts if told[-1].are_states_served(cut)}
    used = {use.cut for use in search.open().evaluator.hidden_states.uses}
    configurations = [record.evaluation.configuration for record in records]
    possible = {search.open().backbone.blocks_below(each.lowest_block) for each in configurations}
    if executor == "local":
        assert used == possible & served
    assert is_known or not served


def test_scores_are_computed_once_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = tiny_search(tmp_path)
    report = search.sensitivity(("gradient_norm", "uniform"), batches=2)
    again = search.sensitivity(("uniform", "gradient_norm", "random"), batches=2)
    assert again.scores["gradient_norm"].values == report.scores["gradient_norm"].values
    with monkeypatch.context() as patch:
        patch.setattr(site_scoring, "compute_scores", None)  # nothing is missing
        assert search.sensitivity("random", batches=2).scores["random"] == again.scores["random"]
    frame = report.to_frame()
    assert list(frame.columns) == ["block", "role", "gradient_norm", "uniform"]
    assert len(frame) == len(report.sites) == len(report.scores["uniform"].values)
    paths = report.save(tmp_path / "report")
    assert "gradient_norm" in paths[0].read_text(encoding="utf-8")
    assert [load["name"] for load in json.loads(paths[2].read_text())] == ["gradient_norm", "uniform"]
    assert "ffn_up" in repr(report)


def test_bad_arguments_are_refused_before_anything_is_scored(tmp_path: Path) -> None:
    search = tiny_search(tmp_path)
    with pytest.raises(ValueError, match="gradient_norm"):
        search.sensitivity(("gradient_nrm",))
    with pytest.raises(ValueError, match="batches is a number"):
        search.sensitivity(batches=0)
    with pytest.raises(ValueError, match="gora"):
        ScoreGuided(scores=("gorra",))
    with pytest.raises(ValueError, match="ia3"):
        ScoreGuided(methods=("ia3",))
    with pytest.raises(ValueError, match="placement"):
        ScoreGuided(placement=(0.0, 1.0))
    with pytest.raises(ValueError, match="has no 'gora' scores yet"):
        ScoreGuided(scores=("gora",), learning_rate=1e-3).baselines(search.open().backbone)


def rising_scores() -> SiteScores:
    sites = [site for site, shape in tiny_backbone("bert").sites.items() if shape.kind == "linear"]
    return SiteScores(name="uniform", values={site: 1.0 + 3 * site.block for site in sites})


def test_an_allocation_keeps_budget_placement_and_lowest_block() -> None:
    backbone, scores = tiny_backbone("bert"), rising_scores()
    everywhere = Allocation(budget=4000).adapters(backbone, scores)
    cost = sum(
        (adapter.size or 0) * (backbone.sites[site].in_features + backbone.sites[site].out_features)
        for site, adapter in everywhere.items()
    )
    assert 4000 - 96 < cost <= 4000
    by_block = [
        sum(adapter.size or 0 for site, adapter in everywhere.items() if site.block == b) for b in (0, 1)
    ]
    assert by_block[1] > 2 * by_block[0]
    top = Allocation(budget=4000, lowest_block=1, placement=0.5).adapters(backbone, scores)
    assert len(top) == 3
    assert {site.block for site in top} == {1}
    with pytest.raises(ValueError, match="can sit on no site"):
        Allocation(budget=10, roles=("ffn_norm",)).adapters(backbone, scores)


def test_a_sublayer_is_worth_the_sum_of_its_matrices() -> None:
    scores = rising_scores()
    values = site_values(scores, [Site(1, "ffn"), Site(1, "attention"), Site(1, "ffn_norm")])
    assert values == {Site(1, "ffn"): 8.0, Site(1, "attention"): 16.0, Site(1, "ffn_norm"): 4.0}


def test_a_refined_child_stays_in_the_space_and_near_its_parent() -> None:
    lora = MethodChoice(method="lora", sizes=range(1, 9))
    series = MethodChoice(method="series", sizes=range(2, 5))
    choices = {Site(block, role): {"lora": lora} for block in range(4) for role in ("query", "value")}
    full = {**choices, **{Site(block, "ffn"): {"series": series} for block in range(4)}}
    mutator = SiteMutator(
        choices=full, values={site: float(site.block) for site in full}, learning_rate=(1e-3, 1e-2)
    )
    parents = [
        Configuration(),
        Configuration({Site(2, "query"): Adapter("lora", 8)}, learning_rate=5e-3),
        Configuration({Site(1, "value"): Adapter("lora", 1), Site(3, "ffn"): Adapter("series", 3)}),
    ]
    generator = random.Random(0)
    children = {mutator(dict.fromkeys(parents, 0.1), generator) for _ in range(300)}
    assert len(children) > 60
    weighted = [mutator({parents[0]: 1.0, parents[1]: 0.9, parents[2]: 0.0}, generator) for _ in range(200)]
    near = [
        sum(bool(site in child.adapters) for child in weighted)
        for site in (Site(2, "query"), Site(1, "value"))
    ]
    assert near[0] > 2 * near[1]
    for child in children:
        assert 1e-3 <= child.learning_rate <= 1e-2
        for site, (adapter,) in child.adapters.items():
            assert adapter in full[site][adapter.method].adapters
