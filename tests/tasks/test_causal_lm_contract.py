"""What language models of many kinds have in common when they are searched."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from autopeft import Adapter, Configuration, Site, Training
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.export.export import export_adapter
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.models.loading import LoadOptions
from autopeft.tasks import Task
from autopeft.tasks.batch import model_inputs
from benchmarks.memory import measure_live_storage
from tests.quantized import QUANTIZATIONS, bytes_of_scales, quantized, quiet, save_base
from tests.slow_cases import slow_unless
from tests.tasks.test_causal_lm import check_loss, task_of
from tests.tiny_models import tiny_chat_tokenizer, tiny_language_model

pytestmark = quiet
ARCHITECTURES = ("gpt2", "llama", "gemma2", "qwen3", "mixtral", "qwen3_moe")
PRECISIONS = ("float32", "bfloat16")
QUANTIZED = list(itertools.product(ARCHITECTURES, QUANTIZATIONS))
CASES = [*itertools.product(ARCHITECTURES, PRECISIONS), *QUANTIZED]
LOW = [(architecture, precision) for architecture, precision in CASES if precision != "float32"]
TOLERANCES = {"bfloat16": 3e-3, "nf4": 3e-3, "int8": 3e-2}
"""Of mean losses: the reference computes rows one by one, and 8-bit layers round by the whole batch."""
TRAINING = Training(epochs=3, batch_size=8, device="cpu")


def backbone_of(architecture: str, precision: str, task: Task, folder: Path) -> Backbone:
    """Write a tiny model to a folder, and load it."""
    if precision in QUANTIZATIONS:
        return quantized(save_base(folder, architecture), precision, task)
    dtype: Any = getattr(torch, precision)
    tiny_language_model(architecture).to(dtype).save_pretrained(folder)
    tiny_chat_tokenizer().save_pretrained(folder)
    return Backbone.load(folder, task.head, options=LoadOptions(dtype=precision))  # type: ignore[arg-type]


def evaluator_of(architecture: str, precision: str, folder: Path, training: Training = TRAINING) -> Evaluator:
    task = task_of(48)
    objectives = resolve_objectives(("loss", "trainable_parameters", "peak_memory"), task.metrics)
    backbone = backbone_of(architecture, precision, task, folder)
    return Evaluator(backbone, task, training, objectives, rungs=(0.5,))


def has_tied_embeddings(backbone: Backbone) -> bool:
    inputs, outputs = backbone.model.get_input_embeddings(), backbone.model.get_output_embeddings()
    return inputs.weight is outputs.weight


def lora(backbone: Backbone, rank: int = 4) -> Configuration:
    sites = {site: Adapter("lora", rank) for site, shape in backbone.sites.items() if shape.kind == "linear"}
    return Configuration(sites, learning_rate=1e-2)


@pytest.mark.parametrize(
    ("architecture", "precision"),
    slow_unless(lambda architecture, precision: precision == "float32" or architecture == "llama", CASES),
)
def test_the_loss_falls_and_a_seed_and_a_pause_give_the_same(
    architecture: str, precision: str, tmp_path: Path
) -> None:
    evaluator = evaluator_of(architecture, precision, tmp_path)
    assert evaluator.backbone.head == ()
    was_tied = has_tied_embeddings(evaluator.backbone)
    assert was_tied == evaluator.backbone.model.config.tie_word_embeddings
    weights = {name: tensor.clone() for name, tensor in evaluator.backbone.model.state_dict().items()}
    configuration = lora(evaluator.backbone)
    untrained = evaluator.evaluate(Configuration()).values["loss"]
    whole = evaluator.train(configuration)
    assert whole.evaluation.status == "complete", whole.evaluation.reason
    assert whole.evaluation.values["loss"] < untrained
    paused = evaluator.train(configuration, rung=0)
    assert paused.paused is not None
    resumed = evaluator.train(configuration, paused=paused.paused)
    assert resumed.evaluation.values["loss"] == whole.evaluation.values["loss"]
    assert whole.state is not None
    assert resumed.state is not None
    for name, tensor in whole.state.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, resumed.state[name])
    after = evaluator.backbone.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())
    assert has_tied_embeddings(evaluator.backbone) == was_tied


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("architecture", "precision"),
    slow_unless(lambda architecture, precision: architecture == "llama" and precision != "bfloat16", CASES),
)
def test_memory_is_counted_as_it_is(
    architecture: str, precision: str, checkpointing: bool, tmp_path: Path
) -> None:
    training = Training(device="cpu", gradient_checkpointing=checkpointing)
    evaluator = evaluator_of(architecture, precision, tmp_path, training)
    backbone, batch = evaluator.backbone, evaluator.data.largest_batch()
    with attach(backbone, lora(backbone)) as attachment:
        backbone.model.train()
        try:
            counted = evaluator.peak_bytes(attachment)
            computed = evaluator.training.resolved_precision()
            real = measure_live_storage(backbone.model, batch, evaluator.task, precision=computed)
            real += bytes_of_scales(backbone.model)
        finally:
            backbone.model.eval()
    assert counted == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("architecture", "precision"),
    slow_unless(lambda architecture, precision: (architecture, precision) == ("llama", "bfloat16"), LOW),
)
def test_loss_in_low_precision_equals_a_slow_reference(
    architecture: str, precision: str, packing: bool, tmp_path: Path
) -> None:
    backbone = backbone_of(architecture, precision, task_of(24), tmp_path)
    with backbone.computing_in("bf16-mixed"):
        check_loss(backbone.model, packing=packing, tolerance=TOLERANCES[precision])


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("architecture", "precision"), CASES)
@pytest.mark.slow
def test_exports_load_without_autopeft(
    architecture: str, precision: str, merged: bool, tmp_path: Path
) -> None:
    task = task_of(24)
    backbone = backbone_of(architecture, precision, task, tmp_path / "base")
    configuration = lora(backbone)
    with attach(backbone, configuration) as attachment:
        for parameter in attachment.parameters.values():
            torch.nn.init.normal_(parameter, std=0.1)
        state = attachment.state_dict()
    data = task.data(backbone.processor, batch_size=4, seed=0)
    probe = model_inputs(data.largest_batch())
    report = export_adapter(
        backbone, configuration, state, tmp_path / "out", probe=probe, target="merged" if merged else None
    )
    assert "in a fresh process that never imported autopeft" in report.checked
    assert "AutoModelForCausalLM" in report.how_to_load
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert "Labels" not in card


def test_sites_of_a_language_model_are_the_classifiers(tmp_path: Path) -> None:
    backbone = backbone_of("llama", "float32", task_of(24), tmp_path)
    assert {site.block for site in backbone.sites} == {0, 1}
    assert Site(0, "query") in backbone.sites
    assert backbone.head_parameters == 0
