"""Packed trials: several candidates in one pass, each with the outcome it has alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopeft.backbone import Backbone
from autopeft.configuration import Configuration, Site
from autopeft.evaluator import Evaluator, Trained
from autopeft.live_storage import StorageCounter
from autopeft.methods import attach
from autopeft.objectives import resolve_objectives
from autopeft.packed_model import PackedModel
from autopeft.packed_modules import Member
from autopeft.packed_training import shares
from autopeft.packing import PackedTrainer, PackingError, packing_gain, worthwhile_packs
from autopeft.tasks import TextClassification
from autopeft.training import Training
from tests.learnable import tiny_evaluator
from tests.models import LABELS, draw_parameters, fingerprint, tiny_backbone, tiny_batch
from tests.test_evaluator import in_training_forward

TRAINING = Training(epochs=2, batch_size=8, device="cpu")
WITHOUT_DROPOUT: dict[str, dict[str, float]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "deberta-v2": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_dropout": 0.0},
    "llama": {},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def packing_backbone(architecture: str = "bert") -> Backbone:
    options: dict[str, Any] = {"num_hidden_layers": 4, **WITHOUT_DROPOUT[architecture]}
    return tiny_backbone(architecture, new_head=True, **options)


def packing_evaluator(architecture: str = "bert", **settings: Any) -> Evaluator:
    return tiny_evaluator(packing_backbone(architecture), **({"training": TRAINING} | settings))


def of(sites: dict[str, Any], learning_rate: float = 1e-2, weight_decay: float = 0.0) -> Configuration:
    return Configuration.from_dict(
        {"sites": sites, "learning_rate": learning_rate, "weight_decay": weight_decay}
    )


def lora(sites: str, size: int = 2, learning_rate: float = 1e-2, **options: Any) -> Configuration:
    adapter = {"method": "lora", "size": size, **options}
    return of(dict.fromkeys(sites.split(), adapter), learning_rate, 0.01)


LORAS = (
    lora("0-3.query 0-3.value", 3),
    lora("2-3.query 2-3.value 1.ffn_up", 8, 3e-3, rslora=False, alpha=16),
    lora("3.query", 1, 5e-2),
    of({}),
    lora("0.ffn_down 3.query", 2, 2e-2),
)
MIXED = (
    of({"1-3.query": {"method": "ia3"}, "2.ffn_down": {"method": "ia3"}}),
    of({"2.attention_norm": {"method": "layernorm"}, "2.query": {"method": "lora", "size": 2}}),
    of(
        {
            "1.ffn": {"method": "series", "size": 4},
            "2.ffn": {"method": "parallel", "size": 3},
            "3.attention": [{"method": "parallel", "size": 2}, {"method": "series", "size": 2}],
        }
    ),
    of({"2.attention": {"method": "prefix", "size": 3}, "3.query": {"method": "lora", "size": 2}}),
    of({"2-3.attention": {"method": "prefix", "size": 5}}, 5e-2),
    lora("2.ffn_down", 4),
)
BITFIT = of(
    {
        "2.value": [{"method": "bitfit"}, {"method": "lora", "size": 2}],
        "3.ffn_norm": {"method": "bitfit"},
        "1.ffn_down": {"method": "bitfit"},
    }
)


def assert_alike(packed: Trained, alone: Trained, tolerance: float = 1e-5) -> None:
    """Compare all of two outcomes but times."""
    one, other = packed.evaluation, alone.evaluation
    assert (one.status, one.reason, one.seed) == (other.status, other.reason, other.seed)
    assert one.configuration == other.configuration
    assert [(point.metric, point.step) for point in one.curves] == [
        (point.metric, point.step) for point in other.curves
    ]
    for point, expected in zip(one.curves, other.curves, strict=True):
        assert point.value == pytest.approx(expected.value, abs=tolerance), point
    assert one.values.keys() == other.values.keys()
    for name in one.values.keys() - {"training_seconds", "examples_per_second", "inference_latency"}:
        assert one.values[name] == pytest.approx(other.values[name]), name
    if one.status == "complete":  # alone, the step at which the loss broke is not counted
        assert one.cost.steps == other.cost.steps
    assert (packed.state is None) == (alone.state is None)
    if packed.state is not None and alone.state is not None:
        assert packed.state.keys() == alone.state.keys()
        for name, tensor in packed.state.items():
            torch.testing.assert_close(tensor, alone.state[name], rtol=0, atol=tolerance, msg=name)


def compare(evaluator: Evaluator, configurations: tuple[Configuration, ...], **how: Any) -> list[Trained]:
    """Train together and one by one; the backbone must stay what it was."""
    before = fingerprint(evaluator.backbone.model)
    packed = PackedTrainer(evaluator).train(configurations, **how)
    assert fingerprint(evaluator.backbone.model) == before
    assert evaluator.backbone.attached is None
    for configuration, trained in zip(configurations, packed, strict=True):
        assert_alike(trained, evaluator.train(configuration, **how))
    return packed


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_loras_of_other_ranks_sites_and_rates_train_as_they_do_alone(architecture: str) -> None:
    evaluator = packing_evaluator(architecture)
    for trained in compare(evaluator, LORAS, seed=3):
        with attach(evaluator.backbone, trained.evaluation.configuration, 3) as attachment:
            initial = attachment.state_dict()
        assert trained.state is not None
        assert all(not torch.equal(trained.state[name], one) for name, one in initial.items())


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_mixed_methods_train_as_they_do_alone(architecture: str) -> None:
    candidates = MIXED if architecture == "llama" else (*MIXED, BITFIT)  # Llama has no biases
    compare(packing_evaluator(architecture), candidates)


@pytest.mark.parametrize("architecture", ["deberta-v2", "roberta"])
def test_other_architectures_train_as_they_do_alone(architecture: str) -> None:
    compare(packing_evaluator(architecture), (LORAS[0], LORAS[2], BITFIT))


@pytest.mark.parametrize("candidates", [(LORAS[0],), LORAS, MIXED, (LORAS[3], BITFIT, MIXED[2])])
def test_logits_are_those_of_the_candidates_alone(candidates: tuple[Configuration, ...]) -> None:
    """With every parameter drawn: right after attaching, most adapters change nothing."""
    backbone, batch = packing_backbone(), tiny_batch()
    members, alone = [], []
    for seed, configuration in enumerate(candidates):
        with attach(backbone, configuration, seed) as attachment, torch.no_grad():
            draw_parameters(attachment.parameters.values(), 0.1, seed)
            alone.append(backbone.model(**batch).logits)
            members.append(Member(configuration, dict(attachment.parameters)))
    with PackedModel(backbone, members) as model, torch.no_grad():
        model.train(False)
        packed = model(batch)
    frozen = backbone.model(**batch).logits
    assert all(bool((one - frozen).abs().max() > 1e-3) for one in alone)
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_blocks_below_the_cut_run_once_for_all() -> None:
    backbone = packing_backbone()
    rows: list[int] = []
    query = backbone.model.get_submodule(backbone.sites[Site(0, "query")].module)
    handle = query.register_forward_hook(
        lambda _module, inputs, _output: rows.append(len(inputs[0]))
    )
    members = []
    for configuration in (LORAS[2], MIXED[5], MIXED[4]):
        with attach(backbone, configuration) as attachment:
            members.append(Member(configuration, dict(attachment.parameters)))
    with PackedModel(backbone, members) as model:
        model(tiny_batch(rows=3))
    handle.remove()
    assert rows == [3]


@pytest.mark.slow
def test_a_real_model_trains_as_it_does_alone(minilm_folder: Path, questions_csv: Path) -> None:
    task = TextClassification(
        dataset=str(questions_csv), train_examples=96, validation_examples=64, test_examples=50
    )
    backbone = Backbone.load(str(minilm_folder), task)
    for module in backbone.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    objectives = resolve_objectives(("accuracy", "trainable_parameters"), task.metrics)
    evaluator = Evaluator(backbone, task, Training(epochs=2, batch_size=16, device="cpu"), objectives)
    compare(
        evaluator,
        (
            lora("0-5.query 0-5.value", 8, 1e-3),
            lora("4-5.query 4-5.ffn_up", 3, 5e-3),
            of({"3.ffn": {"method": "parallel", "size": 8}, "5.attention": {"method": "prefix", "size": 4}}),
        ),
    )


@pytest.mark.parametrize(
    "training",
    [
        {"epochs": 3, "max_steps": 9},
        {"epochs": 2, "max_steps": 6},
        {"epochs": 3, "validate_every": 2},
        {"epochs": 6, "patience": 1},
        {"epochs": 1, "gradient_clip": None, "warmup_share": 0.5},
        {"epochs": 1, "gradient_clip": 0.01, "precision": "bf16-mixed"},
    ],
)
def test_every_setting_of_a_training_holds(training: dict[str, Any]) -> None:
    evaluator = packing_evaluator(training=Training(batch_size=8, device="cpu", **training))
    if training.get("precision") == "bf16-mixed":  # rounding to 8 bits: alike, not equal
        packed = PackedTrainer(evaluator).train(LORAS[:2])
        for configuration, trained in zip(LORAS, packed, strict=False):
            assert_alike(trained, evaluator.train(configuration), tolerance=3e-2)
        return
    packed = compare(evaluator, LORAS)
    if "patience" in training:
        assert len({one.evaluation.cost.steps for one in packed}) > 1


def test_a_candidate_that_diverges_leaves_and_the_others_go_on() -> None:
    evaluator = packing_evaluator()
    wild = lora("1-3.query 1-3.value", 3, 1e30)
    packed = compare(evaluator, (LORAS[0], wild, LORAS[2], MIXED[2]))
    assert [one.evaluation.status for one in packed] == ["complete", "failed", "complete", "complete"]
    assert packed[1].state is None
    assert str(packed[1].evaluation.reason).startswith("diverged: the training loss was")
    assert "accuracy" not in packed[1].evaluation.values


def test_all_candidates_may_diverge() -> None:
    packed = compare(packing_evaluator(), (lora("1.query", 2, 1e30), lora("2.query", 2, 1e32)))
    assert {one.evaluation.status for one in packed} == {"failed"}


def test_an_infeasible_candidate_is_not_trained() -> None:
    evaluator = packing_evaluator(constraints={"trainable_parameters": 300})
    packed = compare(evaluator, (lora("3.query", 1), LORAS[0], lora("3.value", 1)))
    assert [one.evaluation.status for one in packed] == ["complete", "infeasible", "complete"]


def test_latency_is_measured_for_each_candidate() -> None:
    names = ("accuracy", "trainable_parameters", "inference_latency", "training_seconds")
    for trained in compare(packing_evaluator(objectives=names), LORAS[:2]):
        assert trained.evaluation.values["inference_latency"] > 0


def interrupted(act: Callable[[], None], expected: type[BaseException]) -> None:
    evaluator = packing_evaluator()
    before = fingerprint(evaluator.backbone.model)
    with in_training_forward(evaluator, 3, act), pytest.raises(expected):
        PackedTrainer(evaluator).train(MIXED)
    assert fingerprint(evaluator.backbone.model) == before
    assert evaluator.backbone.attached is None
    assert not evaluator.backbone.model.training
    compare(evaluator, LORAS[:2])


def test_ctrl_c_leaves_the_backbone_as_it_was() -> None:
    def act() -> None:
        raise KeyboardInterrupt

    interrupted(act, KeyboardInterrupt)


def test_a_pack_that_fails_is_halved_and_nobody_fails_for_it(caplog: pytest.LogCaptureFixture) -> None:
    def act() -> None:
        raise torch.OutOfMemoryError("no room")

    evaluator = packing_evaluator()
    before = fingerprint(evaluator.backbone.model)
    with in_training_forward(evaluator, 3, act):
        packed = PackedTrainer(evaluator).train(LORAS)
    assert "A pack of 5 failed and is halved (OutOfMemoryError: no room)" in caplog.text
    assert fingerprint(evaluator.backbone.model) == before
    for configuration, trained in zip(LORAS, packed, strict=True):
        assert_alike(trained, evaluator.train(configuration))


def test_a_failure_that_stays_is_the_candidates_own_outcome() -> None:
    evaluator = packing_evaluator()

    def act(_module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled() and type(output) is torch.Tensor and not output.is_meta:
            raise RuntimeError("the wire came loose")

    handle = evaluator.backbone.model.get_submodule("classifier").register_forward_hook(act)
    packed = PackedTrainer(evaluator).train(LORAS[:2])
    handle.remove()
    assert [one.evaluation.status for one in packed] == ["failed", "failed"]
    assert packed[0].evaluation.reason == "RuntimeError: the wire came loose"


def test_a_model_that_mixes_rows_is_refused() -> None:
    evaluator = packing_evaluator()
    block = evaluator.backbone.blocks[3]
    handle = block.register_forward_hook(lambda _module, _inputs, output: output + output.mean(0))
    before = fingerprint(evaluator.backbone.model)
    with pytest.raises(PackingError, match="gives other logits in a pack than alone"):
        PackedTrainer(evaluator).train((LORAS[0], MIXED[2]))
    assert fingerprint(evaluator.backbone.model) == before
    handle.remove()


def test_lora_where_deberta_projects_positions_for_all_rows_is_refused() -> None:
    backbone = tiny_backbone(
        "deberta-v2", new_head=True, share_att_key=True, num_hidden_layers=4, **WITHOUT_DROPOUT["deberta-v2"]
    )
    evaluator = tiny_evaluator(backbone, objectives=("accuracy", "trainable_parameters"))
    before = fingerprint(backbone.model)
    with pytest.raises(PackingError, match="the model cannot be packed"):
        PackedTrainer(evaluator).train((lora("2.query"), lora("3.query")))
    assert fingerprint(backbone.model) == before


def test_a_configuration_the_backbone_cannot_carry_is_an_error() -> None:
    with pytest.raises(ValueError, match="no block 7"):
        PackedTrainer(packing_evaluator()).train((LORAS[0], lora("7.query")))
    assert PackedTrainer(packing_evaluator()).train(()) == []


def test_dropout_trains_too_and_is_off_in_validation() -> None:
    backbone = tiny_backbone("bert", new_head=True, num_hidden_layers=4)
    evaluator = tiny_evaluator(backbone, rows=96, training=Training(epochs=6, batch_size=8, device="cpu"))
    candidates = (
        lora("0-3.query 0-3.value 0-3.ffn_up", 8, dropout=0.2),
        lora("0-3.query 0-3.value 0-3.ffn_up", 8),
        lora("2-3.query 2-3.ffn_down", 4, dropout=0.1),
    )
    packed, again = (PackedTrainer(evaluator).train(candidates) for _ in range(2))
    assert [one.evaluation.curves for one in packed] == [one.evaluation.curves for one in again]
    assert packed[0].evaluation.values["accuracy"] > 0.6
    for trained in packed:
        assert trained.state is not None
        with attach(backbone, trained.evaluation.configuration) as attachment:
            attachment.load_state_dict(trained.state)
            accuracy = _validation_accuracy(evaluator)
        assert accuracy == pytest.approx(trained.evaluation.values["accuracy"])


@torch.no_grad()
def _validation_accuracy(evaluator: Evaluator) -> float:
    evaluator.backbone.model.eval()
    right = total = 0
    for batch in evaluator.data.val_dataloader():
        labels = batch.pop("labels")
        right += int((evaluator.backbone.model(**batch).logits.argmax(-1) == labels).sum())
        total += len(labels)
    return right / total


def test_packing_leaves_the_random_generator_alone() -> None:
    state = torch.get_rng_state()
    PackedTrainer(packing_evaluator()).train(LORAS[:2])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_memory_bound_splits_a_pack_and_what_is_trained_keeps_to_it() -> None:
    evaluator = packing_evaluator()
    peaks = [evaluator.costs(one)["peak_memory"] for one in LORAS]
    frozen = sum(one.numel() * one.element_size() for one in evaluator.backbone.model.state_dict().values())
    bound = int(frozen + 0.6 * sum(peak - frozen for peak in peaks))
    counter = StorageCounter()
    counter.exclude((*evaluator.backbone.model.parameters(), *evaluator.backbone.model.buffers()))
    sizes: list[int] = []
    evaluator.backbone.model.register_forward_hook(
        lambda module, _inputs, output: sizes.append(len(output.logits)) if module.training else None
    )
    with counter:
        packed = PackedTrainer(evaluator, max_bytes=bound).train(LORAS)
    assert frozen + counter.peak_bytes <= bound
    assert 8 < max(sizes) < 8 * len(LORAS)
    for configuration, trained in zip(LORAS, packed, strict=True):
        assert_alike(trained, evaluator.train(configuration))
    with pytest.raises(ValueError, match="max_bytes"):
        PackedTrainer(evaluator, max_bytes=0)


def test_costs_add_up_to_what_was_spent_and_higher_cuts_pay_less() -> None:
    import time

    evaluator = packing_evaluator(rows=240)
    PackedTrainer(evaluator).train(LORAS[:2])
    started = time.process_time()
    packed = PackedTrainer(evaluator).train(LORAS)
    spent = time.process_time() - started
    costs = [one.evaluation.cost for one in packed]
    assert sum(cost.cpu_seconds for cost in costs) == pytest.approx(spent, rel=0.1)
    assert costs[0].cpu_seconds > costs[2].cpu_seconds
    assert packed[0].evaluation.values["training_seconds"] > packed[2].evaluation.values["training_seconds"]


def test_shares_are_of_the_work_and_add_up() -> None:
    assert shares([2, 2], 4) == [0.5, 0.5]
    assert shares([4, 4], 4) == [0.5, 0.5]  # two heads: the frozen forward is all there is
    assert shares([0, 4], 4) == pytest.approx([8 / 12, 4 / 12])
    assert shares([1, 3, 3], 4)[0] == pytest.approx((6 + 1 / 3) / (6 + 2 + 2 + 1 + 2))
    assert sum(shares([0, 1, 2, 3, 4], 4)) == pytest.approx(1.0)


def test_gain_by_work() -> None:
    assert packing_gain([0] * 8, 6) == 1.0
    assert packing_gain([4], 6) == 1.0
    assert packing_gain([4] * 8, 6) == pytest.approx(64 / 36)
    assert math.isclose(packing_gain([0, 3], 6), 1.0)


def test_configurations_are_grouped_by_their_cuts() -> None:
    backbone = packing_backbone()
    high, higher, low, head = lora("2.query"), lora("3.query"), lora("0.query"), of({})
    packs = worthwhile_packs(backbone, (higher, low, high, head, high, low), max_size=3)
    assert packs == [[high, high, higher], [head], [low], [low]]
    assert worthwhile_packs(backbone, ()) == []
    with pytest.raises(ValueError, match="max_size"):
        worthwhile_packs(backbone, (low,), max_size=0)
    assert LABELS == 3
