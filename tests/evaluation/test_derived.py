"""Points cut from one training: which ranks stay, what they compute, and which of them are measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import Evaluation, TrialRecord, with_replicate
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.derived import cut_configuration, cut_state, derive, derive_again, measured_cut
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.run import Trained
from autopeft.methods import attach, count_parameters
from autopeft.methods.lora import lora_scaling
from tests.learnable import tiny_evaluator
from tests.records import METRICS

QUERY, UP = Site(0, "query"), Site(1, "ffn_up")
MIXED = Configuration(
    {
        QUERY: Adapter("lora", 4),
        UP: Adapter("lora", 6, {"alpha": 16, "rslora": False}),
        Site(1, "attention"): Adapter("prefix", 2),
    },
    learning_rate=1e-2,
)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return tiny_evaluator()


@pytest.fixture(scope="module")
def state(evaluator: Evaluator) -> dict[str, Tensor]:
    """Tensors as after a training: none is zero."""
    generator = torch.Generator().manual_seed(0)
    with attach(evaluator.backbone, MIXED) as attachment:
        return {
            name: torch.randn(tensor.shape, generator=generator) / 8
            for name, tensor in attachment.state_dict().items()
        }


def update(state: dict[str, Tensor], site: Site, adapter: Adapter) -> Tensor:
    up, down = (state[f"{site}.lora.{name}.weight"].double() for name in ("lora_B", "lora_A"))
    return lora_scaling(adapter) * up @ down


def test_a_site_keeps_the_best_update_of_its_rank(state: dict[str, Tensor]) -> None:
    cut = Configuration({UP: Adapter("lora", 2, {"alpha": 16, "rslora": False})}, learning_rate=1e-2)
    left, sigma, right = torch.linalg.svd(update(state, UP, MIXED.adapters[UP][0]))
    expected = left[:, :2] * sigma[:2] @ right[:2]
    found = cut_state(MIXED, state, cut)
    torch.testing.assert_close(update(found, UP, cut.adapters[UP][0]), expected, rtol=0, atol=1e-6)
    assert not any(name.startswith(str(QUERY)) for name in found), "a site that was dropped"


def test_one_threshold_says_over_all_sites_which_ranks_stay(
    evaluator: Evaluator, state: dict[str, Tensor]
) -> None:
    backbone = evaluator.backbone
    loras = {site: adapters[0] for site, adapters in MIXED.adapters.items() if site in (QUERY, UP)}
    costs = {QUERY: 32 + 32, UP: 32 + 64}
    worth = sorted(
        (float(sigma) ** 2 / costs[site], site)
        for site, adapter in loras.items()
        for sigma in torch.linalg.svdvals(update(state, site, adapter))[: adapter.size]
    )
    expected = [site for _, site in worth[-4:]]
    share = (sum(costs[site] for site in expected) + 1) / (4 * costs[QUERY] + 6 * costs[UP])
    cut = cut_configuration(backbone, MIXED, state, share)
    ranks = {site: adapters[0].size for site, adapters in cut.adapters.items() if site in loras}
    assert ranks == {site: expected.count(site) for site in expected}
    assert cut.adapters[Site(1, "attention")] == MIXED.adapters[Site(1, "attention")]
    assert cut_configuration(backbone, MIXED, state, 1.0) == MIXED


def test_nothing_is_lost_where_nothing_is_cut(evaluator: Evaluator, state: dict[str, Tensor]) -> None:
    batch = evaluator.model_call()

    def logits(tensors: dict[str, Tensor]) -> Tensor:
        with attach(evaluator.backbone, MIXED) as attachment, torch.no_grad():
            attachment.load_state_dict(tensors)
            found: Tensor = evaluator.backbone.model.eval()(**batch).logits
            return found

    found = logits(cut_state(MIXED, state, MIXED))
    torch.testing.assert_close(found, logits(state))
    torch.testing.assert_close(cut_state(MIXED, state, MIXED), cut_state(MIXED, state, MIXED), rtol=0, atol=0)


def trained(state: dict[str, Tensor], seed: int = 7, values: Mapping[str, float] | None = None) -> Trained:
    known = {"accuracy": 0.9, "trainable_parameters": 2000.0, "peak_memory": 1e6, "training_seconds": 3.0}
    evaluation = Evaluation(
        configuration=MIXED, status="complete", values={**known, **(values or {})}, seed=seed
    )
    return Trained(evaluation, state)


def test_a_cut_has_its_own_size_and_metrics_and_the_cost_of_its_training(
    evaluator: Evaluator, state: dict[str, Tensor]
) -> None:
    cut = cut_configuration(evaluator.backbone, MIXED, state, 0.5)
    found = measured_cut(evaluator, trained(state), cut)
    values = found.evaluation.values
    assert found.state is not None
    assert values["trainable_parameters"] == count_parameters(evaluator.backbone, cut)
    assert values["peak_memory"] == 1e6
    assert values["training_seconds"] == 3.0
    assert values["accuracy"] == evaluator.measure(cut, found.state, 0)["accuracy"] != 0.9
    assert (found.evaluation.seed, found.evaluation.status) == (7, "complete")
    broken = {name: tensor * torch.nan for name, tensor in state.items()} | {
        name: tensor for name, tensor in state.items() if ".lora." in name
    }
    failed = measured_cut(evaluator, trained(broken), cut)
    assert failed.state is None
    assert str(failed.evaluation.reason).startswith("diverged: validation_loss is nan")


def test_only_what_may_come_onto_the_front_is_measured(
    evaluator: Evaluator, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {0.5: 0.8, 0.25: 0.85, 0.125: 0.3}
    measured: list[float] = []

    def measure(cut: Configuration, tensors: Any, lowest: Any) -> dict[str, float]:
        measured.append(scores[[*scores][len(measured)]])
        return {"accuracy": measured[-1], "trainable_parameters": count_parameters(evaluator.backbone, cut)}

    monkeypatch.setattr(evaluator, "measure", measure)
    worse = {"accuracy": 0.2, "trainable_parameters": 99.0, "peak_memory": 1.0}
    whole, *cuts = derive(evaluator, trained(state), (worse, {**worse, "accuracy": 0.4}))
    assert measured == [0.8, 0.85, 0.3], "the last share could not be better than the cheaper one"
    assert [cut.evaluation.values["accuracy"] for cut in cuts] == [0.8, 0.85]
    assert whole.evaluation.derived == tuple(cut.evaluation for cut in cuts)
    assert whole.evaluation.cost.wall_seconds >= sum(cut.evaluation.cost.wall_seconds for cut in cuts) > 0
    measured.clear()
    as_good = {"accuracy": 0.9, "trainable_parameters": 9.0, "peak_memory": 1e6}
    assert len(derive(evaluator, trained(state), (as_good,))) == 1
    assert not measured


@pytest.mark.parametrize("size", ["adapter_parameters", "adapter_bytes", "forward_flops"])
def test_a_cut_may_be_smaller_in_any_exact_size(
    size: str, evaluator: Evaluator, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "objectives", resolve_objectives(("accuracy", size), METRICS))
    monkeypatch.setattr(evaluator, "needed", frozenset(("accuracy", size)))
    with attach(evaluator.backbone, MIXED) as attachment:
        whole = evaluator.sizes(attachment)
    cuts = derive(evaluator, trained(state, values=whole), ())[1:]
    assert cuts
    assert all(cut.evaluation.values[size] < whole[size] for cut in cuts)


def test_another_training_is_cut_to_the_same_configurations(
    evaluator: Evaluator, state: dict[str, Tensor]
) -> None:
    first = derive(evaluator, trained(state), ())
    other = {name: tensor.flip(0) for name, tensor in state.items()}
    cuts = [cut.evaluation.configuration for cut in first[1:]]
    again = derive_again(evaluator, trained(other, seed=8, values={"accuracy": 0.7}), cuts)
    assert [cut.evaluation.configuration for cut in again[1:]] == cuts
    replicate = again[0].evaluation
    whole = with_replicate(first[0].evaluation, replicate, {"accuracy": 0.1})
    for mean, first_cut, second_cut in zip(whole.derived, first[1:], again[1:], strict=True):
        both = [cut.evaluation.values["accuracy"] for cut in (first_cut, second_cut)]
        assert mean.values["accuracy"] == pytest.approx(sum(both) / 2)
    failed = replace(replicate, status="failed", reason="out of memory", derived=(), seed=9)
    (point, *_) = with_replicate(whole, failed, {"accuracy": 0.1}).derived
    assert point.trainings == 3
    assert point.by_seed[9] == {"accuracy": 0.1}
    assert point.values["trainable_parameters"] == whole.derived[0].values["trainable_parameters"]


def test_points_have_numbers_of_their_own(evaluator: Evaluator, state: dict[str, Tensor]) -> None:
    (whole, *_) = derive(evaluator, trained(state), ())
    record = TrialRecord(number=17, evaluation=whole.evaluation)
    found = [(point.number, point.derived_from) for point in record.points]
    assert found[:2] == [(17, None), (100_017, 17)]
    assert TrialRecord.from_dict(record.to_dict()) == record
    duplicate = replace(record, number=18, duplicate_of=17)
    assert duplicate.points == [duplicate]
