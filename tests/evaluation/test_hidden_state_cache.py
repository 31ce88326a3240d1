"""Hidden states kept below the lowest adapter: they change what a trial costs, never what it gives."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autopeft.core.configuration import Configuration
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.evaluation.run import Trained
from autopeft.methods import FullFineTuning, attach
from autopeft.models.backbone import Backbone
from autopeft.tasks import TextClassification
from autopeft.tasks.batch import rows_of
from autopeft.training.settings import Training
from benchmarks.memory import measure_live_storage
from tests.every_method import EVERY_METHOD, architecture_for
from tests.learnable import OBJECTIVES, learnable_task
from tests.slow_cases import slow_unless
from tests.tiny_models import everywhere, fingerprint, logits_of, tiny_backbone

TRAINING = Training(epochs=2, batch_size=8, device="cpu", precision="32-true", frozen_blocks="eval")
BLOCKS = 3
DEPTH = {"gpt2": "n_layer", "distilbert": "n_layers"}


def backbone_of(architecture: str = "bert", side: str = "right") -> Backbone:
    depth = {DEPTH.get(architecture, "num_hidden_layers"): BLOCKS}
    backbone = tiny_backbone(architecture, new_head=True, **depth)
    backbone.processor.padding_side = side
    return backbone


def evaluator_of(
    backbone: Backbone, folder: Path | None, *, mode: str = "cached", **settings: Any
) -> Evaluator:
    task = settings.pop("task", None) or learnable_task(rows=40)
    objectives = resolve_objectives(OBJECTIVES, task.metrics)
    training = replace(TRAINING, **{"frozen_blocks": mode, **settings})
    return Evaluator(backbone, task, training, objectives, cache=folder)


def above(backbone: Backbone, cut: int, method: str = "lora") -> Configuration:
    """Return one method everywhere from a block up; at the cut above all blocks, the head alone."""
    adapters = everywhere(backbone, method).adapters
    kept = {site: several for site, several in adapters.items() if site.block >= cut}
    return Configuration(kept, learning_rate=1e-2)


def assert_alike(trained: Trained, other: Trained, tolerance: float = 1e-5) -> None:
    """Compare loss curves, metrics and trained tensors.

    Adam takes a step of the learning rate (0.01) however small the gradient: where it is next to nothing,
    its rounding is a good share of it. Tensors may differ by a hundredth of a step.
    """
    assert trained.state is not None
    assert other.state is not None
    for name, tensor in trained.state.items():
        torch.testing.assert_close(tensor, other.state[name], rtol=tolerance, atol=max(1e-4, tolerance))
    curves = [[(point.metric, point.step) for point in run.evaluation.curves] for run in (trained, other)]
    assert curves[0] == curves[1]
    for here, there in zip(trained.evaluation.curves, other.evaluation.curves, strict=True):
        assert here.value == pytest.approx(there.value, abs=10 * tolerance)


def served_cuts(evaluator: Evaluator) -> list[int]:
    return [use.cut for use in evaluator.hidden_states.uses]


@pytest.mark.parametrize(
    ("architecture", "side", "cut"),
    slow_unless(
        lambda architecture, side, cut: cut == (1 if side == "left" else 2),
        [
            *((name, "right", cut) for name in ("bert", "llama", "gpt2") for cut in range(BLOCKS + 1)),
            ("llama", "left", 1),
            ("llama", "left", BLOCKS),
            *((name, "right", 2) for name in ("deberta-v2", "distilbert", "modernbert", "roberta")),
        ],
    ),
)
def test_served_trials_equal_computed_ones(architecture: str, side: str, cut: int, tmp_path: Path) -> None:
    backbone = backbone_of(architecture, side)
    configuration = above(backbone, cut)
    before = fingerprint(backbone.model)
    cached = evaluator_of(backbone, tmp_path)
    first, second = cached.train(configuration), cached.train(configuration)
    assert served_cuts(cached) == ([cut, cut] if cut else [])
    assert fingerprint(backbone.model) == before
    assert_alike(first, evaluator_of(backbone, None, mode="eval").train(configuration))
    assert_alike(second, first, tolerance=0)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_states_of_a_bf16_base_with_a_new_head_are_served(architecture: str, tmp_path: Path) -> None:
    backbone = backbone_of(architecture)
    backbone.model.bfloat16()
    cached = evaluator_of(backbone, tmp_path)
    trained = cached.train(above(backbone, 2))
    assert (trained.evaluation.status, served_cuts(cached)) == ("complete", [2])
    assert cached.hidden_states.training.precision == "bf16-mixed"
    computed = evaluator_of(backbone, None, mode="eval").train(above(backbone, 2))
    assert trained.evaluation.values["accuracy"] == pytest.approx(
        computed.evaluation.values["accuracy"], abs=0.2
    )


@pytest.mark.parametrize(
    ("architecture", "side", "reason"),
    [
        ("gpt2", "left", "depend on the padding"),
        ("bert", "left", "depend on the padding"),
        ("modernbert", "left", "depend on the padding"),
    ],
)
def test_what_cannot_be_served_is_computed(
    architecture: str, side: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = backbone_of(architecture, side)
    configuration = above(backbone, 2)
    before = fingerprint(backbone.model)
    cached = evaluator_of(backbone, tmp_path)
    trained = cached.train(configuration)
    assert served_cuts(cached) == []
    assert reason in caplog.text
    assert not list((tmp_path / "hidden_states").glob("*"))
    assert fingerprint(backbone.model) == before
    expected = evaluator_of(backbone, None, mode="eval").train(configuration)
    assert_alike(trained, expected, tolerance=0)
    caplog.clear()
    cached.train(configuration)
    assert reason not in caplog.text  # said once


@pytest.mark.slow
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_every_method_is_served(method: str, tmp_path: Path) -> None:
    trains_key_biases = method in ("bitfit", "full", "ssf")
    backbone = backbone_of("gpt2" if trains_key_biases else architecture_for(method))
    configuration = above(backbone, 2, method)
    cached = evaluator_of(backbone, tmp_path)
    before = fingerprint(backbone.model)
    trained = cached.train(configuration)
    assert served_cuts(cached) == [2]
    assert fingerprint(backbone.model) == before
    computed = evaluator_of(backbone, None, mode="eval").train(configuration)
    if trains_key_biases:
        trained, computed = without_key_biases(trained), without_key_biases(computed)
    assert_alike(trained, computed)


def without_key_biases(trained: Trained) -> Trained:
    """Put zeros in the place of GPT-2's biases of keys.

    They have no gradient, as softmax does not change when all keys move: Adam follows its rounding.
    """
    assert trained.state is not None
    state = {name: tensor.clone() for name, tensor in trained.state.items()}
    names = ("qkv.bitfit.bias", "qkv.full.bias", "qkv.ssf.shift")
    fused = [tensor for name, tensor in state.items() if name.endswith(names)]
    assert fused
    for tensor in fused:
        tensor.chunk(3)[1].zero_()
    return replace(trained, state=state)


@pytest.mark.slow
def test_on_real_weights(minilm_folder: Path, questions_csv: Path, tmp_path: Path) -> None:
    task = TextClassification(
        dataset=str(questions_csv), train_examples=96, validation_examples=60, test_examples=20
    )
    backbone = Backbone.load(str(minilm_folder), task.head)
    before = fingerprint(backbone.model)
    cached = evaluator_of(backbone, tmp_path, task=task, epochs=1)
    for cut in (3, 6):
        configuration = above(backbone, cut)
        trained = cached.train(configuration)
        computed = evaluator_of(backbone, None, mode="eval", task=task, epochs=1)
        # 2e-4: rounding, through twelve steps of Adam, which divides by gradients that are almost 0.
        assert_alike(trained, computed.train(configuration), tolerance=2e-4)
    assert served_cuts(cached) == [3, 6]
    assert fingerprint(backbone.model) == before


@pytest.mark.slow
def test_results_do_not_depend_on_what_was_there(tmp_path: Path) -> None:
    """Filled, found, filled after a lower cut, filled under another method: the same to the last bit."""
    backbone = backbone_of("deberta-v2")  # served and computed differ in rounding here
    configuration = above(backbone, 2)
    alone = evaluator_of(backbone, tmp_path / "alone").train(configuration)
    chained = evaluator_of(backbone, tmp_path / "chained")
    chained.train(above(backbone, 1))
    found = evaluator_of(backbone, tmp_path / "chained")
    by_ia3 = evaluator_of(backbone, tmp_path / "ia3")
    by_ia3.train(above(backbone, 2, "ia3"))
    for evaluator in (chained, found, by_ia3):
        assert_alike(evaluator.train(configuration), alone, tolerance=0)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of hidden states without their headers."""
    return {path.name: path.read_bytes()[1024:] for path in (folder / "hidden_states").iterdir()}


def test_the_acquisition_is_told_what_is_served(tmp_path: Path) -> None:
    backbone = backbone_of()
    cached = evaluator_of(backbone, tmp_path)
    cached.train(above(backbone, 2))
    assert [cached.hidden_states.is_served(cut) for cut in (0, 1, 2)] == [False, True, True]
    assert not evaluator_of(backbone, tmp_path, mode="eval").hidden_states.is_served(2)
    assert not evaluator_of(backbone, None).hidden_states.is_served(2)
    assert not evaluator_of(backbone, tmp_path, hidden_state_cache="1 KiB").hidden_states.is_served(2)


def test_their_size_is_said_beforehand(tmp_path: Path) -> None:
    cached = evaluator_of(backbone_of(), tmp_path)
    said = cached.hidden_states.describe()
    assert said is not None
    assert str(tmp_path) in said
    assert "GiB at most" in said
    assert not (tmp_path / "hidden_states").exists()
    assert evaluator_of(backbone_of(), None).hidden_states.describe() is None


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_prefix_tuning_fills_the_same_states(architecture: str, tmp_path: Path) -> None:
    """It routes the attention of all blocks through another function."""
    backbone = backbone_of(architecture)
    for name, method in (("prefix", "prefix"), ("lora", "lora")):
        evaluator_of(backbone, tmp_path / name).train(above(backbone, 2, method))
    assert contents(tmp_path / "prefix") == contents(tmp_path / "lora")


def test_a_file_of_something_else_is_made_again(tmp_path: Path) -> None:
    backbone = backbone_of()
    configuration = above(backbone, 2)
    expected = evaluator_of(backbone, tmp_path).train(configuration)
    for damage in (b"\0" * 4096, None):
        for path in (tmp_path / "hidden_states").iterdir():
            with path.open("r+b") as file:
                if damage is None:
                    file.truncate(2000)
                else:
                    file.seek(1024)
                    file.write(damage)
        again = evaluator_of(backbone, tmp_path)
        assert_alike(again.train(configuration), expected, tolerance=0)
        assert again.hidden_states.uses[0].fill_seconds > 0


def test_another_model_s_states_are_not_taken(tmp_path: Path) -> None:
    evaluator_of(backbone_of(), tmp_path).train(above(backbone_of(), 2))
    others = [
        tiny_backbone("bert", new_head=True, num_hidden_layers=BLOCKS, seed=1),
        tiny_backbone("bert", new_head=True, num_hidden_layers=BLOCKS, hidden_act="relu"),
    ]
    for other in others:
        cached = evaluator_of(other, tmp_path)
        trained = cached.train(above(other, 2))
        assert cached.hidden_states.uses[0].fill_seconds > 0
        assert_alike(trained, evaluator_of(other, None, mode="eval").train(above(other, 2)))


def test_full_fine_tuning_is_trained_as_ever(tmp_path: Path) -> None:
    backbone = backbone_of()
    configuration = Configuration(learning_rate=1e-3)
    cached = evaluator_of(backbone, tmp_path)
    trained = cached.train(configuration, attachment=FullFineTuning)
    assert served_cuts(cached) == []
    plain = evaluator_of(backbone, None, mode="train").train(configuration, attachment=FullFineTuning)
    assert_alike(trained, plain, tolerance=0)


@pytest.mark.parametrize(
    "settings",
    [{"hidden_state_cache": "1 KiB"}, {"max_steps": 1, "epochs": 1}],
    ids=["does not fit", "too short"],
)
def test_what_does_not_pay_or_fit_is_not_kept(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "autopeft")
    backbone = backbone_of()
    task = learnable_task(rows=400)
    cached = evaluator_of(backbone, tmp_path, task=task, **settings)
    trained = cached.train(above(backbone, 2))
    assert "are not kept" in caplog.text
    assert served_cuts(cached) == []
    computed = evaluator_of(backbone, None, mode="eval", task=task, **settings)
    assert_alike(trained, computed.train(above(backbone, 2)), tolerance=0)


def test_what_is_served_is_noted(tmp_path: Path) -> None:
    cached = evaluator_of(backbone_of(), tmp_path)
    for _ in range(2):
        assert cached.evaluate(above(cached.backbone, 2)).status == "complete"
    first, second = cached.hidden_states.uses
    assert first.cut == second.cut == 2
    assert 0 < first.estimated_share == second.estimated_share < 1
    assert first.fill_seconds > second.fill_seconds == 0


@pytest.mark.parametrize("act", ["raise", "unwritable"])
def test_trouble_leaves_the_backbone_as_it_was(
    act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = backbone_of()
    before, logits = fingerprint(backbone.model), logits_of(backbone)
    cached = evaluator_of(backbone, tmp_path)
    if act == "raise":
        handle = backbone.blocks[2].register_forward_hook(_raise_in_training)
        assert cached.evaluate(above(backbone, 2)).status == "failed"
        handle.remove()
    else:
        (tmp_path / "hidden_states").write_text("a file, not a folder")
        assert cached.evaluate(above(backbone, 2)).status == "complete"
        assert "cannot be kept" in caplog.text
    assert fingerprint(backbone.model) == before
    assert torch.equal(logits_of(backbone), logits)


def _raise_in_training(module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
    if module.training and not output.is_meta and type(output) is torch.Tensor:
        raise RuntimeError("the wire came loose")


@pytest.mark.slow
def test_peak_memory_is_that_with_frozen_blocks_in_evaluation_mode(tmp_path: Path) -> None:
    backbone = backbone_of()
    evaluators: dict[str, Callable[[Configuration], dict[str, float]]] = {
        mode: evaluator_of(backbone, tmp_path / mode, mode=mode).costs for mode in ("train", "eval", "cached")
    }
    counter = MemoryCounter(backbone.model)
    for cut in (0, 2, BLOCKS):
        configuration = above(backbone, cut)
        peaks = {mode: costs(configuration)["peak_memory"] for mode, costs in evaluators.items()}
        assert peaks["cached"] == peaks["eval"] <= peaks["train"]
        evaluator = evaluator_of(backbone, None, mode="eval")
        batch = evaluator.data.largest_batch()
        with attach(backbone, configuration) as attachment, evaluator.hidden_states.below(attachment):
            count = counter.count(batch, evaluator.task)
            backbone.model.train()
            assert count == peaks["eval"]
            real = measure_live_storage(backbone.model, batch, evaluator.task)
            backbone.model.eval()
        assert count == pytest.approx(real, rel=0.01)


def test_batches_say_which_rows_they_hold() -> None:
    data = evaluator_of(backbone_of(), None).data
    for name, batches in (("train", data.train_dataloader()), ("validation", data.val_dataloader())):
        collator = data.collator(name)  # type: ignore[arg-type]
        assert collator is not None
        for batch in batches:
            found = rows_of(batch)
            assert found is not None
            assert found[0] == name
            assert torch.equal(collator(found[1].tolist())["input_ids"], batch["input_ids"])
    assert rows_of(data.largest_batch()) is None
    assert rows_of(next(iter(data.test_dataloader()))) is None


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="'cached'"):
        Training(frozen_blocks="cache")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="GiX"):
        Training(hidden_state_cache="8 GiX")
    assert Training(hidden_state_cache="8 GiB") == Training(
        hidden_state_cache="1 GiB"
    )  # nothing a result depends on
