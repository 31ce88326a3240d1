"""Adapters that begin from training data: their initial values, and the trainings that begin so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.data_initialisation import initialise_from_data
from autopeft.evaluation.evaluator import Evaluator
from autopeft.export.export import export_adapter
from autopeft.methods import Attachment, attach, obstacle
from autopeft.search_spaces import PerLayer
from autopeft.training.settings import Training
from autopeft.training.training_checkpoint import TrainingCheckpoints
from tests.learnable import run, tiny_evaluator, tiny_search
from tests.quantized import quantized, quiet, save_base
from tests.slow_cases import slow_cases
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import (
    draw_parameters,
    everywhere,
    fingerprint,
    logits_of,
    tiny_backbone,
    tiny_batch,
)

SITES = (Site(0, "query"), Site(1, "ffn_up"))
FROM_DATA = ("eva", "lora_ga", "corda")
RANK = 4
SEED = 3


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    """One whose head is not drawn anew, which gradients depend on."""
    objectives = ("accuracy", "trainable_parameters")
    return tiny_evaluator(tiny_backbone("bert"), rungs=(0.5,), objectives=objectives)


@contextmanager
def initialised(evaluator: Evaluator, method: str, rank: int = RANK, **options: Any) -> Iterator[Attachment]:
    configuration = Configuration(dict.fromkeys(SITES, Adapter(method, rank, options)))
    with attach(evaluator.backbone, configuration, SEED) as attachment:
        initialise_from_data(evaluator, attachment, SEED)
        yield attachment


def factors(attachment: Attachment, site: Site) -> tuple[Tensor, Tensor]:
    """Return what A and B of a site begin with, in double precision."""
    own = {name: tensor for name, tensor in attachment.state_dict().items() if name.startswith(f"{site}.")}
    first = {name: tensor for name, tensor in own.items() if "first_" in name} or own
    down, up = first.values()
    return down.double(), up.double()


def weight_of(evaluator: Evaluator, site: Site) -> torch.nn.Parameter:
    return evaluator.backbone.model.get_submodule(evaluator.backbone.shape(site).module).get_parameter(
        "weight"
    )


@pytest.fixture(scope="module")
def seen(evaluator: Evaluator) -> dict[Site, tuple[Tensor, Tensor]]:
    """The tokens that sites are given in the first four batches, and mean gradients, by torch alone."""
    backbone, task = evaluator.backbone, evaluator.task
    weights = [weight_of(evaluator, site).requires_grad_() for site in SITES]
    tokens: list[list[Tensor]] = [[] for _ in SITES]
    gradients: list[list[Tensor]] = [[] for _ in SITES]
    with ExitStack() as hooks:
        for site, found in zip(SITES, tokens, strict=True):
            layer = backbone.model.get_submodule(backbone.shape(site).module)
            hooks.enter_context(
                layer.register_forward_pre_hook(lambda _, given, found=found: found.append(given[0].detach()))
            )
        for batch in islice(evaluator.data.train_dataloader(SEED), 4):
            loss = task.loss(task.forward(backbone.model, batch), batch)
            for of_site, gradient in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
                of_site.append(gradient)
            for found in tokens:
                found[-1] = found[-1][batch["attention_mask"].bool()]
    backbone.model.requires_grad_(False)
    return {
        site: (torch.cat(tokens[index]).double(), torch.stack(gradients[index]).mean(0).double())
        for index, site in enumerate(SITES)
    }


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.double(), atol=1e-3, rtol=1e-3)


def test_eva_begins_in_the_directions_in_which_inputs_vary(
    evaluator: Evaluator, seen: dict[Site, tuple[Tensor, Tensor]]
) -> None:
    with initialised(evaluator, "eva") as attachment:
        for site, (tokens, _) in seen.items():
            down, up = factors(attachment, site)
            _, _, right = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
            assert_near((down @ right[:RANK].mT).abs(), torch.eye(RANK))
            assert not up.any()


def test_lora_ga_begins_with_singular_vectors_of_the_mean_gradient(
    evaluator: Evaluator, seen: dict[Site, tuple[Tensor, Tensor]]
) -> None:
    with initialised(evaluator, "lora_ga") as attachment:
        for site, (_, gradient) in seen.items():
            down, up = factors(attachment, site)
            left, _, right = torch.linalg.svd(gradient)
            expected = len(left) ** 0.25 / 4 * torch.eye(RANK)
            assert_near((down @ right[:RANK].mT).abs(), expected)
            assert_near((left[:, RANK : 2 * RANK].mT @ up).abs(), expected)


def test_corda_begins_with_what_a_weight_does_on_its_inputs(
    evaluator: Evaluator, seen: dict[Site, tuple[Tensor, Tensor]]
) -> None:
    with initialised(evaluator, "corda") as attachment:
        for site, (tokens, _) in seen.items():
            down, up = factors(attachment, site)
            moment = tokens.mT @ tokens
            moment = moment / moment.diagonal().mean() + 0.01 * torch.eye(len(moment))
            left, sigma, right = torch.linalg.svd(weight_of(evaluator, site).detach().double() @ moment)
            best = left[:, :RANK] * sigma[:RANK] @ right[:RANK]
            assert_near(8 / RANK**0.5 * up @ down @ moment, best)
    whole = 32
    with initialised(evaluator, "corda", whole) as attachment:
        down, up = factors(attachment, SITES[0])
        assert_near(8 / whole**0.5 * up @ down, weight_of(evaluator, SITES[0]).detach())


@pytest.mark.parametrize(
    ("method", "places", "options"),
    [("sparse", "indices", {}), ("lora_sparse", "sparse.indices", {"density": 0.02})],
)
def test_the_gradient_chooses_numbers_which_are_loaded_without_data(
    method: str,
    places: str,
    options: dict[str, Any],
    evaluator: Evaluator,
    seen: dict[Site, tuple[Tensor, Tensor]],
    tmp_path: Path,
) -> None:
    with initialised(evaluator, method, choice="magnitude", **options) as attachment:
        before = attachment.state_dict()
    with initialised(evaluator, method, choice="gradient", **options) as attachment:
        configuration = attachment.configuration
        draw_parameters(attachment.parameters.values(), std=0.1)
        state = attachment.state_dict()
    for site, (_, gradient) in seen.items():
        chosen = state[f"{site}.{method}.{places}"]
        assert len(chosen.unique()) == len(chosen) > 1
        sizes = gradient.abs().flatten()
        assert sizes[chosen.long()].min() >= 0.999 * sizes.topk(len(chosen)).values[-1]
        assert not torch.equal(chosen, before[f"{site}.{method}.{places}"])
    # Loads it on a copy of the base, to which no data were given, and compares logits.
    out, probe = tmp_path / "out", tiny_batch()
    report = export_adapter(evaluator.backbone, configuration, state, out, probe=probe, fresh=False)
    assert report.max_logit_difference is not None


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("eva", r"^The input of 0\.query \(.*query\) is not finite"),
        ("corda", r"^The input of 0\.query \(.*query\) is not finite"),
        ("lora_ga", "^The loss of batch 0 is nan, expected a finite number"),
    ],
)
def test_hidden_states_that_are_not_finite_are_named(method: str, message: str, evaluator: Evaluator) -> None:
    embeddings = evaluator.backbone.model.get_submodule("bert.embeddings")
    spoiled = embeddings.register_forward_hook(lambda _, given, output: output * torch.nan)
    with spoiled, pytest.raises(ValueError, match=message), initialised(evaluator, method):
        pass


def test_gradients_that_are_not_finite_are_named(evaluator: Evaluator) -> None:
    def spoil(_: torch.nn.Module, given: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * torch.nan)

    spoiled = evaluator.backbone.model.get_submodule("bert.pooler").register_forward_hook(spoil)
    message = r"^The mean gradient of 0\.query is not finite"
    with spoiled, pytest.raises(ValueError, match=message), initialised(evaluator, "lora_ga"):
        pass


@pytest.mark.parametrize("method", FROM_DATA)
def test_what_other_adapters_compute_has_no_part_in_it(method: str, evaluator: Evaluator) -> None:
    own: dict[Site, Adapter] = dict.fromkeys(SITES, Adapter(method, RANK))
    prefix = {Site(0, "attention"): Adapter("prefix", 8, {"initial_std": 1.0})}
    found = []
    for adapters in (own, own | prefix):
        with attach(evaluator.backbone, Configuration(adapters), SEED) as attachment:
            initialise_from_data(evaluator, attachment, SEED)
            found.append(factors(attachment, SITES[1]))
    torch.testing.assert_close(found[1], found[0])


def test_gradients_are_those_of_the_head_that_is_trained() -> None:
    evaluator = tiny_evaluator(tiny_backbone("bert", new_head=True))
    found = []
    for seed in (SEED, SEED + 1):
        configuration = Configuration({SITES[1]: Adapter("lora_ga", RANK)})
        with attach(evaluator.backbone, configuration, seed) as attachment:
            initialise_from_data(evaluator, attachment, SEED)
            found.append(factors(attachment, SITES[1])[0])
    assert not torch.allclose(found[1], found[0], atol=1e-3)


@pytest.mark.parametrize("method", FROM_DATA)
def test_the_model_computes_what_it_did_and_nothing_is_left_of_it(method: str, evaluator: Evaluator) -> None:
    backbone = evaluator.backbone
    before, state, plain = fingerprint(backbone.model), torch.get_rng_state(), logits_of(backbone)
    with initialised(evaluator, method) as attachment:
        assert torch.equal(logits_of(backbone), plain)
        assert all(parameter.grad is None for parameter in backbone.model.parameters())
        assert all(parameter.requires_grad for parameter in attachment.parameters.values())
    assert fingerprint(backbone.model) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["lora_ga", *slow_cases("eva", "corda", "sparse")])
def test_a_training_pauses_and_goes_on_as_if_it_had_not(
    method: str, evaluator: Evaluator, tmp_path: Path
) -> None:
    options = {"choice": "gradient"} if method == "sparse" else {}
    adapters = everywhere(evaluator.backbone, method, RANK, **options).adapters
    configuration = Configuration(adapters, learning_rate=1e-2)
    whole = evaluator.train(configuration, SEED)
    store = TrainingCheckpoints(tmp_path)
    paused = evaluator.train(configuration, SEED, rung=0).paused
    assert paused is not None
    store.save(1, paused)
    resumed = evaluator.train(configuration, SEED, paused=store.load(1))
    assert whole.state is not None
    assert resumed.state is not None
    assert whole.state.keys() == resumed.state.keys()
    assert all(torch.equal(resumed.state[name], tensor) for name, tensor in whole.state.items())
    scored = evaluator.score(configuration, whole.state, "validation")
    values = whole.evaluation.values
    assert scored["accuracy"] == values["accuracy"] == resumed.evaluation.values["accuracy"]


@pytest.mark.parametrize(
    ("method", "most", "why"),
    [
        ("lora_ga", 16, "its gradient has 32 singular vectors, and each rank takes two"),
        ("corda", 32, "its weight has 32 singular values"),
    ],
)
def test_ranks_beyond_the_singular_values_are_refused(
    method: str, most: int, why: str, evaluator: Evaluator
) -> None:
    found = [obstacle(evaluator.backbone, SITES[0], Adapter(method, rank)) for rank in (most, most + 1)]
    assert found == [None, why]


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("method", FROM_DATA)
def test_packed_weights_of_a_language_model_are_no_obstacle(method: str, tmp_path: Path) -> None:
    task = task_of(24)
    backbone = quantized(save_base(tmp_path), "nf4", task)
    training = Training(epochs=2, batch_size=8, accumulate=2, device="cpu")
    objectives = resolve_objectives(("loss", "trainable_parameters"), task.objectives)
    evaluator = Evaluator(backbone, task, training, objectives)
    evaluation = evaluator.evaluate(everywhere(backbone, method, RANK))
    assert evaluation.status == "complete", evaluation.reason


@pytest.mark.slow
def test_a_search_chooses_among_them_and_exports_plain_folders(tmp_path: Path) -> None:
    space = PerLayer(methods=("lora", *FROM_DATA), sizes={"rank": (2, 4)})
    search = tiny_search(tmp_path, space=space, sampler="random", baselines=False)
    front = run(search, 4)
    evaluations = [record.evaluation for record in front.records]
    assert all(evaluation.status == "complete" for evaluation in evaluations)
    assert {name for each in evaluations for name in each.configuration.methods} >= {*FROM_DATA}
    for point in front:
        report = search.export(point.number, tmp_path / str(point.number), target="peft")
        assert report.max_logit_difference is not None
