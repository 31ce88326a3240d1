"""Models whose blocks lie on several devices."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate import dispatch_model

from autopeft.core.configuration import Configuration
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.methods import Attachment, FullFineTuning
from autopeft.models.backbone import Backbone
from autopeft.models.loading import LoadOptions
from autopeft.models.spread import keep_spread
from autopeft.sensitivity import compute_scores
from autopeft.sensitivity.gradient_scores import BATCH_SCORES
from autopeft.sensitivity.scored_matrices import Subject
from tests.evaluation.test_fake_device import DECOMPOSED, LAZY, faked, trial
from tests.every_method import architecture_for
from tests.learnable import learnable_task, save_tiny_model, tiny_evaluator
from tests.tiny_models import everywhere, tiny_backbone

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
CPU = torch.device("cpu")
OBJECTIVES = ("accuracy", "trainable_parameters", "peak_memory", "forward_flops")


def last_block(backbone: Backbone) -> str:
    names = (name for name, module in backbone.model.named_modules() if module is backbone.blocks[-1])
    return str(next(names))


@pytest.mark.parametrize(
    "method",
    [
        name if name == "lora" else pytest.param(name, marks=pytest.mark.slow)
        for name in (*METHOD_SPECS, FullFineTuning.__name__)
    ],
)
def test_a_trial_of_a_spread_model_mixes_no_devices(method: str) -> None:
    backbone = tiny_backbone(architecture_for(method), new_head=True)
    if method in DECOMPOSED:
        pytest.skip(f"{method} replaces the data of parameters")
    is_whole = method == FullFineTuning.__name__
    kind = FullFineTuning if is_whole else Attachment
    configuration = Configuration() if is_whole else everywhere(backbone, method)
    evaluator = tiny_evaluator(backbone)
    evaluator.costs(configuration)
    block = last_block(backbone)
    with faked(backbone.model, LAZY, places={block: CPU}) as (batch, _):
        keep_spread(backbone.model, [block])
        assert backbone.devices == (LAZY, CPU)
        trial(evaluator, kind, configuration, batch)


def test_scoring_a_spread_model_mixes_no_devices() -> None:
    backbone = tiny_backbone("llama")
    evaluator = tiny_evaluator(backbone)
    block = last_block(backbone)
    # torch knows no autocast for "lazy", not even one that is switched off.
    with (
        faked(backbone.model, LAZY, places={block: CPU}) as (batch, _),
        patch.object(Subject, "autocast", nullcontext),
    ):
        keep_spread(backbone.model, [block])
        scores = compute_scores(backbone, [batch, batch], evaluator.task, [*BATCH_SCORES])
    assert scores.keys() == set(BATCH_SCORES)


def test_what_is_given_to_a_spread_model_has_to_follow() -> None:
    backbone = tiny_backbone("llama")
    with faked(backbone.model, LAZY, places={last_block(backbone): CPU}) as (batch, _):
        with pytest.raises(RuntimeError, match="device"):
            backbone.model(**batch)
        keep_spread(backbone.model, [last_block(backbone)])
        assert backbone.model(**batch).logits.device == LAZY


def test_costs_are_counted_alike_however_a_model_is_spread() -> None:
    backbone, alone = tiny_backbone("llama"), tiny_backbone("llama")
    evaluator, other = (tiny_evaluator(each, objectives=OBJECTIVES) for each in (backbone, alone))
    # Hooks as of a spread model, which ask a module where it lies.
    with patch("autopeft.models.spread.devices_of", side_effect=[(LAZY, CPU), (CPU,)]):
        keep_spread(backbone.model, [last_block(backbone)])
    configuration = everywhere(backbone, "lora")
    assert evaluator.costs(configuration) == other.costs(configuration)
    trained, expected = evaluator.train(configuration), other.train(configuration)
    assert trained.evaluation.values["accuracy"] == expected.evaluation.values["accuracy"]


def test_a_block_on_two_devices_is_refused() -> None:
    backbone = tiny_backbone("llama")
    block = last_block(backbone)
    with (
        faked(backbone.model, LAZY, places={f"{block}.mlp": CPU}),
        pytest.raises(
            ValueError, match=r"spreads the block .* over lazy:0 and cpu: give each block one device"
        ),
    ):
        keep_spread(backbone.model, [block])


def test_offloaded_weights_are_refused(tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    block = last_block(backbone)
    names = [name for name, module in backbone.model.named_modules() if not [*module.children()]]
    where = {name: "disk" if name.startswith(block) else "cpu" for name in names}
    dispatch_model(backbone.model, where, offload_dir=str(tmp_path))
    with pytest.raises(ValueError, match="weights on the CPU or on disk"):
        keep_spread(backbone.model, [block])


def test_a_map_is_told_to_transformers(tmp_path: Path) -> None:
    folder, head = save_tiny_model(tmp_path / "model"), learnable_task().head
    options = LoadOptions(device_map="auto")
    backbone = Backbone.load(folder, head, options=options)
    assert backbone.devices == (CPU,)
    assert options.arguments(backbone.model.config, CPU)["device_map"] == "auto"
    assert options == LoadOptions(), "where a model lies tells no searches apart"
    with pytest.raises(ValueError, match="Unknown device_map 'balanced'"):
        LoadOptions(device_map="balanced")  # type: ignore[arg-type]
