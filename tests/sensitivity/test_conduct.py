"""What scoring costs, what it leaves behind, and what it refuses."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import resource
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.precision import Precision
from autopeft.evaluation.memory.storage_tracker import StorageCounter
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.sensitivity import CHEAP_SCORES, SCORES, SiteScores, computation, compute_scores
from autopeft.sensitivity.weight_scores import absolute_parameters
from benchmarks.memory import measure_live_storage
from tests.loss_task import CROSS_ENTROPY, LossTask
from tests.sensitivity.references import labelled_batches, scored
from tests.tiny_models import fingerprint, tiny_backbone, tiny_batch

FAMILIES = ("bert", "llama", "gpt2")
WITHOUT_TRAINING = tuple(name for name in SCORES if name != "leave_one_out")
FIRST_ORDER = ("gradient_norm", "fisher", "snip", "taylor2", "gora", "gradient_spectrum")


class _CountBackward(torch.autograd.Function):
    passes = 0

    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:
        return given.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        _CountBackward.passes += 1
        return gradients[0]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_one_pass_a_batch_with_frozen_weights(architecture: str) -> None:
    backbone, batches = tiny_backbone(architecture), labelled_batches(3)
    forwards = []
    handle = backbone.model.register_forward_hook(lambda *_: forwards.append(1))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
        assert not any(module.training for module in backbone.model.modules())
        value: Tensor = _CountBackward.apply(cross_entropy(logits, labels))  # type: ignore[no-untyped-call]
        return value

    _CountBackward.passes = 0
    compute_scores(backbone, batches, LossTask(loss), [*FIRST_ORDER, "explained_variance"])
    handle.remove()
    assert _CountBackward.passes == len(forwards) == 3
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


class _WithReference(LossTask):
    """A task whose forward pass runs the model without a gradient too, as preferences have a reference."""

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        with torch.no_grad():
            super().forward(model, batch)
        output = super().forward(model, batch)
        with torch.no_grad():
            super().forward(model, batch)
        return output


@pytest.mark.parametrize("architecture", FAMILIES)
def test_passes_without_a_gradient_have_none(architecture: str) -> None:
    backbone, batches = tiny_backbone(architecture), labelled_batches(2)
    expected = compute_scores(backbone, batches, CROSS_ENTROPY, FIRST_ORDER)
    assert compute_scores(backbone, batches, _WithReference(cross_entropy), FIRST_ORDER) == expected


def peak_of_scoring(backbone: Backbone, batches: list[dict[str, Tensor]], names: tuple[str, ...]) -> int:
    tensors = [*backbone.model.parameters(), *backbone.model.buffers()]
    counter = StorageCounter()
    base = counter.exclude((*tensors, *(tensor for batch in batches for tensor in batch.values())))
    with counter:
        compute_scores(backbone, batches, CROSS_ENTROPY, names)
    return base + counter.peak_bytes


@pytest.mark.parametrize("architecture", FAMILIES)
def test_scoring_fits_where_lora_trains(architecture: str) -> None:
    """With one row more a batch; both on every linear layer."""
    backbone = tiny_backbone(architecture)
    (batch,) = labelled_batches(1, rows=12)
    (larger,) = labelled_batches(1, rows=13)
    backbone.model.train()
    with attach(backbone, Configuration({site: Adapter("lora", 4) for site in scored(backbone)})):
        lora = measure_live_storage(backbone.model, larger, CROSS_ENTROPY)
    assert peak_of_scoring(backbone, [batch], CHEAP_SCORES) <= lora


def test_synflow_takes_less_than_gradients_and_leaves_unused_embeddings_alone() -> None:
    backbone = tiny_backbone("bert", vocab_size=20_000)
    (batch,) = labelled_batches(1, rows=12)
    embeddings = backbone.model.get_input_embeddings().weight
    before = embeddings._version
    synflow, gradients = (peak_of_scoring(backbone, [batch], (name,)) for name in ("synflow", "snip"))
    assert synflow < gradients
    assert embeddings._version == before


def test_one_weight_gradient_is_alive_at_a_time() -> None:
    """Where weights are all there is: hardly any activations, many layers."""
    backbone = tiny_backbone("llama", hidden_size=128, intermediate_size=512, num_hidden_layers=6)
    label = {"labels": torch.tensor([1])}
    batches = [tiny_batch(rows=1, tokens=3, padding=0, seed=seed) | label for seed in range(2)]
    sizes = [4 * shape.in_features * shape.out_features for shape in map(backbone.shape, scored(backbone))]
    before = sum(4 * parameter.numel() for parameter in backbone.model.parameters())
    extra = peak_of_scoring(backbone, batches, FIRST_ORDER) - before
    # The gradient, its product with the weight, and activations.
    assert extra < 4 * max(sizes) < sum(sizes) / 4


@pytest.mark.parametrize("architecture", FAMILIES)
def test_nothing_is_changed(architecture: str) -> None:
    backbone = tiny_backbone(architecture)
    model = backbone.model
    model.train()
    backbone.blocks[0].eval()
    for parameter in itertools.islice(model.parameters(), 3):
        parameter.requires_grad_(True)
    batches = labelled_batches(2)
    copies = [{name: tensor.clone() for name, tensor in batch.items()} for batch in batches]
    modes = [module.training for module in model.modules()]
    before = fingerprint(model)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    with torch.no_grad():
        compute_scores(backbone, batches, CROSS_ENTROPY, WITHOUT_TRAINING)
        assert not torch.is_grad_enabled()
    assert fingerprint(model) == before
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(np.random.get_state()) == states[2]
    for batch, copy in zip(batches, copies, strict=True):
        assert all(torch.equal(batch[name], copy[name]) for name in copy)


@pytest.mark.parametrize("names", [["snip", "gora"], ["grasp"], ["hessian"], ["synflow"]])
def test_nothing_is_changed_by_a_failure(names: list[str]) -> None:
    backbone = tiny_backbone("bert")
    before, state = fingerprint(backbone.model), torch.get_rng_state()

    def fail(module: nn.Module, gradients: Any) -> None:
        raise MemoryError("as if out of memory")

    handle = backbone.blocks[0].register_full_backward_pre_hook(fail)
    with pytest.raises(MemoryError):
        compute_scores(backbone, labelled_batches(1), CROSS_ENTROPY, names)
    handle.remove()
    assert fingerprint(backbone.model) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signs_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    numbers = torch.tensor([-0.0, 0.0, -1.5, 2.0, -float("inf"), -1e-40, -float("nan")], dtype=dtype)
    model = nn.Linear(7, 1).to(dtype).requires_grad_(False)
    model.weight.copy_(numbers)
    # A second parameter on the same memory.
    model.register_parameter("alias", nn.Parameter(model.weight.view(7), requires_grad=False))
    before = model.weight.clone().view(torch.uint8)
    with absolute_parameters(model):
        assert not torch.signbit(model.weight).any()
    assert torch.equal(model.weight.clone().view(torch.uint8), before)


def test_half_precision() -> None:
    backbone, batches = tiny_backbone("llama"), labelled_batches(2)
    exact = compute_scores(backbone, batches, CROSS_ENTROPY, ["gradient_norm", "gora"])
    nn.Module.to(backbone.model, torch.bfloat16)
    rough = compute_scores(backbone, batches, CROSS_ENTROPY, WITHOUT_TRAINING)
    for name, scores in exact.items():
        for site, value in scores.values.items():
            assert rough[name].values[site] == pytest.approx(value, rel=0.2)


def test_mixed_precision_moves_scores_little_and_is_used() -> None:
    backbone, batches = tiny_backbone("bert"), labelled_batches(2)
    names = [*FIRST_ORDER, "explained_variance"]
    exact = compute_scores(backbone, batches, CROSS_ENTROPY, names)
    mixed = compute_scores(backbone, batches, CROSS_ENTROPY, names, precision="bf16-mixed")
    for name, scores in exact.items():
        tolerance = 0.02 * max(scores.values.values())
        for site, value in scores.values.items():
            assert mixed[name].values[site] == pytest.approx(value, rel=0.1, abs=tolerance)
    assert mixed["gradient_norm"] != exact["gradient_norm"]
    assert mixed["explained_variance"] != exact["explained_variance"]


@pytest.mark.parametrize(
    ("precision", "tokens", "flash"),
    [("bf16-mixed", 9, False), ("bf16-mixed", 140, True), ("32-true", 9, True)],
)
def test_short_rows_in_bfloat16_take_attention_step_by_step(
    precision: Precision, tokens: int, flash: bool
) -> None:
    backbone = tiny_backbone("bert", max_position_embeddings=160)
    batches = [{**tiny_batch(tokens=tokens), "labels": torch.tensor([0, 1, 2])}]
    seen: list[bool] = []
    handle = backbone.model.register_forward_hook(
        lambda *_: seen.append(torch.backends.cuda.flash_sdp_enabled())
    )
    compute_scores(backbone, batches, CROSS_ENTROPY, ["snip"], precision=precision)
    handle.remove()
    assert seen == [flash]
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_disk_without_room_for_mean_gradients_is_named() -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match=f"{tempfile.gettempdir()} cannot be written: File too large"):
            compute_scores(tiny_backbone("bert"), labelled_batches(1), CROSS_ENTROPY, ["gora"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_mean_gradients_keep_within_their_budget(
    architecture: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backbone, batches = tiny_backbone(architecture), labelled_batches(2)
    names = ["gora", "gradient_norm", "gradient_spectrum", "explained_variance"]
    whole = compute_scores(backbone, batches, CROSS_ENTROPY, names)
    written: list[int] = []

    @contextmanager
    def watched() -> Iterator[IO[bytes]]:
        with TemporaryFile() as file:
            yield file
            written.append(os.fstat(file.fileno()).st_size)

    monkeypatch.setattr(computation, "TemporaryFile", watched)
    sizes = [4 * shape.in_features * shape.out_features for shape in map(backbone.shape, scored(backbone))]
    budget = max(sizes) + min(sizes)
    with caplog.at_level(logging.INFO, logger="autopeft"):
        found = compute_scores(backbone, batches, CROSS_ENTROPY, names, mean_gradient_budget=budget)
    assert found == whole
    assert max(written) <= budget < sum(sizes) == sum(written)
    assert f"{len(written)} passes over the batches" in caplog.text
    with pytest.raises(ValueError, match=r"'grasp' needs the mean gradients of all sites at once, .* MiB"):
        compute_scores(backbone, batches, CROSS_ENTROPY, ["grasp"], mean_gradient_budget=budget)
    with pytest.raises(ValueError, match="GiX"):
        compute_scores(backbone, batches, CROSS_ENTROPY, names, mean_gradient_budget="2 GiX")


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match=r"precision .bf16.*bf16-mixed"):
        compute_scores(tiny_backbone("bert"), [], CROSS_ENTROPY, ["uniform"], precision="bf16")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu() -> None:
    backbone, batches = tiny_backbone("bert"), labelled_batches(2)
    names = [name for name in WITHOUT_TRAINING if name != "hessian"]  # which draws other numbers there
    expected = compute_scores(backbone, batches, CROSS_ENTROPY, names)
    nn.Module.cuda(backbone.model)
    state = torch.cuda.get_rng_state()
    found = compute_scores(backbone, batches, CROSS_ENTROPY, [*names, "hessian"])
    assert torch.equal(torch.cuda.get_rng_state(), state)
    for name in names:
        tolerance = 1e-3 * max(map(abs, expected[name].values.values()))
        for site, value in expected[name].values.items():
            assert found[name].values[site] == pytest.approx(value, rel=1e-2, abs=tolerance), name


def test_unknown_scores_are_told_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'gradient_norm'"):
        compute_scores(tiny_backbone("bert"), labelled_batches(1), CROSS_ENTROPY, ["gradientnorm"])


def test_batches_have_to_be_there_with_what_the_task_takes() -> None:
    backbone, batches = tiny_backbone("bert"), labelled_batches(2)
    with pytest.raises(ValueError, match="at least one batch"):
        compute_scores(backbone, [], CROSS_ENTROPY)
    without = [batches[0], {name: tensor for name, tensor in batches[1].items() if name != "labels"}]
    with pytest.raises(KeyError, match="labels"):
        compute_scores(backbone, without, CROSS_ENTROPY)
    assert compute_scores(backbone, without, CROSS_ENTROPY, ["explained_variance", "synflow"])
    assert compute_scores(backbone, [], CROSS_ENTROPY, ["random", "uniform", "condition_number"])


def test_a_loss_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels) * (float("nan") if next(calls) else 1.0)

    monkeypatch.setattr(computation, "_HESSIAN_PROBES", 1)
    for name in ("snip", "hessian"):
        calls = itertools.count()
        with pytest.raises(ValueError, match="The loss of batch 1 is nan"):
            compute_scores(tiny_backbone("bert"), labelled_batches(2), LossTask(loss), [name])


def test_other_refusals() -> None:
    backbone, batches = tiny_backbone("bert"), labelled_batches(1)
    with pytest.raises(ValueError, match="pass train_one"):
        compute_scores(backbone, batches, CROSS_ENTROPY, ["snip", "leave_one_out"])
    with pytest.raises(ValueError, match=r"leave_one_out' of 0\.query is not finite"):
        compute_scores(backbone, [], CROSS_ENTROPY, ["leave_one_out"], train_one=lambda _: float("nan"))
    with pytest.raises(ValueError, match="rank is a whole number from 1 up, got 0"):
        compute_scores(backbone, batches, CROSS_ENTROPY, rank=0)
    site = scored(backbone)[0]
    with (
        attach(backbone, Configuration({site: Adapter("lora", 2)})),
        pytest.raises(ValueError, match="detach it before scoring"),
    ):
        compute_scores(backbone, batches, CROSS_ENTROPY)


def test_quantised_weights_are_refused() -> None:
    backbone = tiny_backbone("bert")
    module: Any = backbone.model.get_submodule(backbone.shape(Site(0, "key")).module)
    module.weight = nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"0\.key .*int8.*without quantisation"):
        compute_scores(backbone, labelled_batches(1), CROSS_ENTROPY)


def test_site_scores_rank_print_and_travel_as_json() -> None:
    value, query, upper = Site(0, "value"), Site(0, "query"), Site(1, "query")
    scores = SiteScores(name="x", values={upper: 0.5, value: 0.5, query: 2}, spectra={value: (3.0, 1.0)})
    assert scores.ranking() == (query, value, upper)
    assert list(scores.values) == [query, value, upper]
    assert repr(scores) == "SiteScores(x; 3 sites; best 0.query 2)"
    many = SiteScores(name="y", values={Site(block, "query"): -block for block in range(9)})
    for given in (scores, many):
        assert SiteScores.from_dict(json.loads(json.dumps(given.to_dict()))) == given


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "x", "values": {}}, "no values"),
        ({"name": "x", "values": {"0.query": float("inf")}}, "0.query is not finite"),
        ({"name": "x", "values": {"query": 1}}, "Cannot read the site"),
    ],
)
def test_broken_scores_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SiteScores.from_dict(data)
