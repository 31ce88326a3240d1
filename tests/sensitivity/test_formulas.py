"""Every score against a slow and direct computation."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from autopeft.core.configuration import Configuration, Site
from autopeft.models.backbone import Backbone
from autopeft.sensitivity import (
    CHEAP_SCORES,
    SCORES,
    SiteScores,
    computation,
    compute_scores,
)
from autopeft.sensitivity.activation_variance import IncrementalVariance
from autopeft.sensitivity.curvature_scores import curvature
from autopeft.sensitivity.scored_matrices import Subject, matrix_sites, undisturbed
from autopeft.sensitivity.weight_scores import singular_values
from tests.loss_task import CROSS_ENTROPY
from tests.sensitivity import references
from tests.sensitivity.references import labelled_batches, scored
from tests.tiny_models import HEADS, draw_parameters, tiny_backbone, tiny_classifier, tiny_tokenizer

FAMILIES = ("tiny_bert", "tiny_llama", "tiny_gpt2")


def backbone_of(model: Any) -> Backbone:
    head = "classifier" if hasattr(model, "classifier") else "score"
    return Backbone(model, tiny_tokenizer(), name="tiny", head=[head])


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    model = request.getfixturevalue(request.param)()
    draw_parameters(model.parameters(), std=0.1)
    return backbone_of(model)


def assert_close(found: Mapping[Site, float], expected: Mapping[Site, float]) -> None:
    assert list(found) == list(expected)
    # What is zero but for rounding is measured by the largest.
    tolerance = 1e-6 * max(map(abs, expected.values()))
    for site, value in expected.items():
        assert found[site] == pytest.approx(value, rel=2e-4, abs=tolerance), site


def test_there_is_a_test_for_every_score() -> None:
    others = {"hessian", "leave_one_out", "random", "uniform"}
    assert references.EXACT.keys() | others == SCORES.keys()
    assert set(CHEAP_SCORES) == SCORES.keys() - {"hessian", "leave_one_out", "grasp"}


@pytest.mark.parametrize("name", references.EXACT)
def test_exact_scores(backbone: Backbone, name: str) -> None:
    batches = labelled_batches()
    found = compute_scores(backbone, batches, CROSS_ENTROPY, [name])[name]
    assert found.name == name
    assert_close(found.values, references.EXACT[name](backbone, batches))


def test_scores_are_the_same_together_and_alone(backbone: Backbone) -> None:
    batches = labelled_batches(2)
    names = [name for name in SCORES if name != "leave_one_out"]
    together = compute_scores(backbone, batches, CROSS_ENTROPY, names)
    assert list(together) == names
    for name in names:
        assert compute_scores(backbone, batches, CROSS_ENTROPY, [name])[name] == together[name]


@pytest.mark.parametrize("architecture", [*HEADS, "albert", "opt"])
def test_gradients_of_many_architectures(architecture: str) -> None:
    # ALBERT runs one block several times, T5 two stacks; OPT has biases everywhere and odd shapes.
    model = tiny_classifier(architecture)
    head = HEADS.get(architecture, ("classifier",) if hasattr(model, "classifier") else ("score",))
    backbone = Backbone(model, tiny_tokenizer(), name=architecture, head=head)
    batches = labelled_batches(2)
    found = compute_scores(backbone, batches, CROSS_ENTROPY, ["fisher"])["fisher"]
    assert_close(found.values, references.fisher(backbone, batches))


def test_sites_without_influence_score_nothing() -> None:
    backbone, batches = tiny_backbone("bert"), labelled_batches(2)
    before = backbone.model.get_submodule(backbone.shape(Site(1, "ffn_down")).module)
    handle = before.register_forward_pre_hook(lambda _, given: (given[0].detach(),))
    names = ("gradient_norm", "fisher", "gora", "gradient_spectrum", "grasp", "hessian")
    for name, scores in compute_scores(backbone, batches, CROSS_ENTROPY, names).items():
        assert scores.values[Site(1, "ffn_up")] == 0, name
        assert scores.values[Site(1, "ffn_down")] != 0, name
    handle.remove()


def test_calls_without_influence_are_left_out() -> None:
    """A shared module, of whose two calls in a forward pass one does not reach the loss."""
    model = tiny_classifier("albert")
    backbone = Backbone(model, tiny_tokenizer(), name="albert", head=["classifier"])
    module = model.get_submodule(backbone.shape(Site(0, "ffn_down")).module)
    calls = itertools.count()
    handle = module.register_forward_pre_hook(
        lambda _, given: (given[0].detach(),) if next(calls) % 2 else None
    )
    batches = labelled_batches(2)
    found = compute_scores(backbone, batches, CROSS_ENTROPY, ["gradient_norm"])["gradient_norm"]
    assert_close(found.values, references.gradient_norm(backbone, batches))
    handle.remove()


def test_spectra(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = labelled_batches()
    names = ("gradient_spectrum", "explained_variance")
    found = compute_scores(backbone, batches, CROSS_ENTROPY, names, rank=2)
    references_ = references.spectra(backbone, batches), references.variance_ratios(backbone, batches)
    for name, expected in zip(names, references_, strict=True):
        for site, spectrum in found[name].spectra.items():
            assert list(spectrum) == sorted(spectrum, reverse=True)
            torch.testing.assert_close(
                torch.tensor(spectrum, dtype=torch.float64)[: len(expected[site])],
                expected[site][: len(spectrum)],
                rtol=1e-3,
                atol=1e-5 * float(expected[site][0]),
            )
    monkeypatch.setattr(computation, "_COMPONENTS", 5)
    monkeypatch.setattr(computation, "_CONVERGENCE", None)
    short = compute_scores(backbone, batches, CROSS_ENTROPY, names, rank=2)
    assert {len(spectrum) for scores in short.values() for spectrum in scores.spectra.values()} == {5}
    assert short["gradient_spectrum"].values == found["gradient_spectrum"].values
    # What the incremental SVD cut off is small, and it never invents variance.
    for site, ratio in short["explained_variance"].values.items():
        exact = found["explained_variance"].values[site]
        assert 0.8 * exact < ratio <= exact * (1 + 1e-5)


@pytest.mark.parametrize(("width", "parts"), [(12, [400, 1, 499]), (300, [400, 1, 499]), (300, [30] * 30)])
def test_incremental_variance_is_exact_up_to_its_rank(width: int, parts: list[int]) -> None:
    """By covariances, by randomised and by plain decompositions, and also if the scales lie far apart."""
    scales = torch.tensor([100.0, 1.0, 1.0, 0.5])
    vectors = torch.randn(900, 4) * scales @ torch.randn(4, width) + 3 * torch.randn(width)
    state = IncrementalVariance(6)
    for part in vectors.split(parts):
        before = copy.copy(state)
        old = before.ratios()
        state.add(part)
        assert before.ratios() == old != state.ratios()
    state.add(vectors[:0])
    squares = torch.linalg.svdvals((vectors - vectors.mean(0)).double()).square()
    expected = (squares / squares.sum())[:6]
    torch.testing.assert_close(torch.tensor(state.ratios()), expected.float(), rtol=1e-4, atol=1e-6)


def test_wide_inputs_are_ignored_once_components_converged() -> None:
    directions = torch.linalg.qr(torch.randn(300, 3)).Q.mT
    vectors = torch.randn(4000, 3) * torch.tensor([9.0, 3.0, 1.0]) @ directions
    vectors = vectors + 0.01 * torch.randn(4000, 300)
    careful, quick = (
        IncrementalVariance(6, leading=3, convergence=convergence) for convergence in (None, 0.99)
    )
    for index, part in enumerate(vectors.split(100)):
        careful.add(part)
        before = quick.ratios()
        quick.add(part)
        if index < 2:  # nothing to compare with, and then once
            assert quick.ratios() != before
    assert quick.ratios() == before != careful.ratios()
    assert quick.ratios() == pytest.approx(careful.ratios(), abs=0.05)


def test_sites_share_what_they_read_together(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each block: attention and its output, the feed-forward layer and its output."""
    added: list[Tensor] = []
    add = IncrementalVariance.add

    def count(state: IncrementalVariance, vectors: Tensor) -> None:
        added.append(vectors)
        add(state, vectors)

    monkeypatch.setattr(IncrementalVariance, "add", count)
    compute_scores(backbone, labelled_batches(3), CROSS_ENTROPY, ["explained_variance"])
    assert len(added) == 3 * 4 * len(backbone.blocks)


def test_sites_part_where_their_inputs_do() -> None:
    backbone, batches = tiny_backbone("bert"), labelled_batches(2)
    key = backbone.model.get_submodule(backbone.shape(Site(1, "key")).module)
    calls = itertools.count()
    bend = key.register_forward_pre_hook(lambda _, given: (given[0].exp(),) if next(calls) % 2 else None)
    found = compute_scores(backbone, batches, CROSS_ENTROPY, ["explained_variance"])
    values = found["explained_variance"].values
    assert_close(values, references.explained_variance(backbone, batches))
    assert values[Site(1, "query")] == values[Site(1, "value")] != values[Site(1, "key")]
    bend.remove()


def test_a_tensor_that_was_changed_in_place_is_another_input() -> None:
    backbone = tiny_backbone("bert")
    key = backbone.model.get_submodule(backbone.shape(Site(1, "key")).module)
    bend = key.register_forward_pre_hook(lambda _, given: given[0].exp_())
    values = compute_scores(backbone, labelled_batches(2), CROSS_ENTROPY, ["explained_variance"])[
        "explained_variance"
    ].values
    bend.remove()
    assert values[Site(1, "query")] != values[Site(1, "key")] == values[Site(1, "value")]


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (20, 21)])
def test_singular_values_are_exact_in_single_precision(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, -6, shape[1]))
    exact = torch.linalg.svdvals(matrix.double())
    for dtype in (torch.float32, torch.float64):
        found = singular_values(matrix.to(dtype))
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-7 * float(exact[0]))


def test_variance_of_nothing_and_of_constants() -> None:
    state = IncrementalVariance(2)
    assert state.ratios() == (0.0,)
    state.add(torch.ones(5, 3))
    assert state.ratios() == (0.0, 0.0)


def _flat(matrices: Mapping[Site, Tensor]) -> Tensor:
    return torch.cat([matrix.reshape(-1) for matrix in matrices.values()])


def _exact_hessian(backbone: Backbone, batches: list[dict[str, Tensor]]) -> Tensor:
    shapes = {site: weight.shape for site, weight in references.weights(backbone).items()}
    sizes = [shape.numel() for shape in shapes.values()]
    rows = []
    for unit in torch.eye(sum(sizes)):
        parts = unit.split(sizes)
        direction = {
            site: part.reshape(shape) for (site, shape), part in zip(shapes.items(), parts, strict=True)
        }
        rows.append(_flat(references.hessian_product(backbone, batches, direction)))
    return torch.stack(rows).double()


@pytest.mark.slow
def test_hutchinson_within_its_statistical_error(tiny_bert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert(hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    draw_parameters(model.parameters(), std=0.3)
    backbone = backbone_of(model)
    batches = labelled_batches(2)
    hessian = _exact_hessian(backbone, batches)
    # Each batch has its own Hessian and its own probes: the variances are of the batches' own forms.
    own = [_exact_hessian(backbone, [batch]) for batch in batches]
    probes = 150
    monkeypatch.setattr(computation, "_HESSIAN_PROBES", probes)
    found = compute_scores(backbone, batches, CROSS_ENTROPY, ["hessian"])["hessian"]
    weights = references.weights(backbone)
    start = 0
    for site, weight in weights.items():
        scale = torch.zeros(len(hessian), dtype=torch.float64)
        scale[start : start + weight.numel()] = weight.reshape(-1).double().square() / 2
        start += weight.numel()
        exact = float(scale @ hessian.diagonal())
        variance = 0.0
        for batch_hessian in own:
            form = scale[:, None] * batch_hessian
            symmetric = (form + form.T) / 2
            symmetric.fill_diagonal_(0)
            variance += 2 * float(symmetric.square().sum()) / probes / len(batches) ** 2
        assert abs(found.values[site] - exact) < 4 * math.sqrt(variance), site
    strongest = max(found.values, key=lambda site: abs(found.values[site]))
    other = compute_scores(backbone, batches, CROSS_ENTROPY, ["hessian"], seed=1)["hessian"]
    assert other.values[strongest] == pytest.approx(found.values[strongest], rel=0.5)
    assert other != found


def test_curvature_is_the_hessian_vector_product(backbone: Backbone) -> None:
    batches = labelled_batches(2)
    sites = matrix_sites(backbone)
    shapes = {matrix.site: matrix.weight.shape for matrix in sites}
    direction = {site: torch.randn(shape) for site, shape in shapes.items()}
    functional = {site: torch.randn(shape) for site, shape in shapes.items()}
    subject = Subject(model=backbone.model, sites=sites, batches=batches, task=CROSS_ENTROPY, seed=0)
    with undisturbed(backbone.model, 0):
        found = curvature(
            subject,
            1,
            direction=lambda matrix: direction[matrix.site],
            functional=lambda matrix: functional[matrix.site],
        )
    product = references.hessian_product(backbone, batches[1:], direction)
    assert_close(found, {site: float((functional[site] * product[site]).sum()) for site in found})


def test_leave_one_out_trains_every_site_alone(backbone: Backbone) -> None:
    trained: list[Configuration] = []

    def train_one(configuration: Configuration) -> float:
        trained.append(configuration)
        return float(len(trained))

    names = ("leave_one_out", "uniform")
    found = compute_scores(backbone, [], CROSS_ENTROPY, names, rank=3, train_one=train_one)
    sites = scored(backbone)
    assert [list(configuration.adapters) for configuration in trained] == [[site] for site in sites]
    assert {(adapter.method, adapter.size) for configuration in trained for _, adapter in configuration} == {
        ("lora", 3)
    }
    assert found["leave_one_out"].ranking() == tuple(reversed(sites))
    assert found["uniform"].values == dict.fromkeys(sites, 1.0)


def test_the_seed_decides(backbone: Backbone) -> None:
    batches = labelled_batches(1)

    def score(seed: int) -> dict[str, SiteScores]:
        torch.manual_seed(17 + seed)  # the global generator does not matter
        return compute_scores(backbone, batches, CROSS_ENTROPY, ["random", "hessian", "snip"], seed=seed)

    first, again, other = score(0), score(0), score(1)
    assert first == again
    assert first["random"] != other["random"]
    assert first["hessian"] != other["hessian"]
    assert first["snip"] == other["snip"]
