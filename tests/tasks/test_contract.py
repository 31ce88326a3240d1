"""What all tasks of a data set have in common when they are searched."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchmetrics import MeanMetric

from autopeft import Adapter, Configuration, Training
from autopeft.core.objectives import Objective, resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.export import load_script
from autopeft.export.export import export_adapter
from autopeft.export.folder_format import TaskHead
from autopeft.export.verification import trained_logits
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.tasks import TASKS, CausalLM
from autopeft.tasks.batch import LABELS
from autopeft.tasks.dataset_task import DatasetTask
from benchmarks.memory import measure_live_storage
from tests.evaluation.test_fake_device import LAZY, faked, optimizer_step
from tests.slow_cases import slow_unless
from tests.task_cases import TASK_CASES
from tests.tiny_models import tiny_headed
from tests.tiny_processors import tiny_processor

TRAINING = Training(epochs=4, batch_size=8, device="cpu", precision="32-true")

MODELS = [(name, architecture) for name, case in TASK_CASES.items() for architecture in case.architectures]
LONG = ("AudioClassification", "Seq2Seq", "SpeechRecognition")  # whose trainings take ten seconds


def is_first(name: str, architecture: str) -> bool:
    return architecture == TASK_CASES[name].architectures[0]


every_model = pytest.mark.parametrize(("name", "architecture"), slow_unless(is_first, MODELS))


def evaluator_of(name: str, architecture: str) -> Evaluator:
    task = TASK_CASES[name].make()
    processor = tiny_processor(task.head, architecture)
    backbone = Backbone.load(tiny_headed(task.head, architecture), task.head, processor)
    names = (task.metrics[0].name, "trainable_parameters", "peak_memory")
    objectives = resolve_objectives(names, task.metrics)
    return Evaluator(backbone, task, TRAINING, objectives, rungs=(0.5,))


def validated_metrics(evaluator: Evaluator) -> list[Objective]:
    return [metric for metric in evaluator.task.metrics if not metric.at_end]


def lora(backbone: Backbone) -> Configuration:
    sites = {site: Adapter("lora", 4) for site, shape in backbone.sites.items() if shape.kind == "linear"}
    return Configuration(sites, learning_rate=1e-2)


@torch.no_grad()
def validated(evaluator: Evaluator, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, float]:
    """Return the loss and the metrics of adapters with the given or their initial tensors."""
    configuration = lora(evaluator.backbone)
    with attach(evaluator.backbone, configuration) as attachment:
        if state is not None:
            attachment.load_state_dict(state)
        module = evaluator.module(configuration).eval()
        for index, batch in enumerate(evaluator.data.val_dataloader()):
            module.validation_step(batch, index)
        return {name: float(value) for name, value in module.take_validated().items()}


def test_every_task_of_a_data_set_has_a_case() -> None:
    of_data_sets = {task.__name__ for task in TASKS if issubclass(task, DatasetTask)}
    assert of_data_sets - {CausalLM.__name__} == set(TASK_CASES)  # which has a contract of its own


@pytest.mark.parametrize(
    ("name", "architecture"),
    slow_unless(lambda name, architecture: is_first(name, architecture) and name not in LONG, MODELS),
)
def test_the_loss_falls_and_a_seed_and_a_pause_give_the_same(name: str, architecture: str) -> None:
    evaluator = evaluator_of(name, architecture)
    evaluator.task.validate()
    configuration = lora(evaluator.backbone)
    whole = evaluator.train(configuration)
    assert whole.evaluation.status == "complete", whole.evaluation.reason
    assert whole.state is not None
    trained, untrained = validated(evaluator, whole.state), validated(evaluator)
    assert trained["validation_loss"] < 0.9 * untrained["validation_loss"]
    metric = evaluator.task.metrics[0]
    assert trained[metric.name] == pytest.approx(whole.evaluation.values[metric.name])
    trivial = evaluator.task.trivial_score(metric.name, evaluator.data)
    assert metric.is_better(
        trained[metric.name], trivial if evaluator.backbone.head else untrained[metric.name]
    )
    paused = evaluator.train(configuration, rung=0)
    resumed = evaluator.train(configuration, paused=paused.paused)
    for measured in validated_metrics(evaluator):
        assert resumed.evaluation.values[measured.name] == whole.evaluation.values[measured.name]
    assert resumed.state is not None
    assert all(torch.equal(tensor, resumed.state[key]) for key, tensor in whole.state.items())


@every_model
def test_loss_and_metrics_equal_a_slow_reference(name: str, architecture: str) -> None:
    evaluator = evaluator_of(name, architecture)
    rows = []
    with torch.no_grad():
        for batch in evaluator.data.val_dataloader():
            logits = evaluator.task.forward(evaluator.backbone.model, batch).logits
            rows += [*zip(logits.double().numpy(), batch[LABELS].numpy(), strict=True)]
    found = validated(evaluator)
    expected = TASK_CASES[name].reference(rows)
    assert found.pop("validation_loss") == pytest.approx(expected["loss"], rel=1e-5)
    assert set(found) == {metric.name for metric in validated_metrics(evaluator)}
    for metric, value in found.items():
        assert value == pytest.approx(expected[metric], rel=1e-5, abs=1e-5), metric


@every_model
def test_memory_is_counted_as_it_is(name: str, architecture: str) -> None:
    evaluator = evaluator_of(name, architecture)
    batch = evaluator.data.largest_batch()
    if "input_ids" in batch:  # how many pixels an image has, only its processor says
        example = evaluator.task.example_batch(len(batch["input_ids"]), batch["input_ids"].shape[-1])
        assert {key: (value.dtype, len(value)) for key, value in example.items()} == {
            key: (value.dtype, len(value)) for key, value in batch.items()
        }
    # Where no row is padded, Llama does without a mask, which no count can know.
    if "attention_mask" in batch:
        batch["attention_mask"][..., -1, -1] = 0
    with attach(evaluator.backbone, lora(evaluator.backbone)) as attachment:
        model = evaluator.backbone.model.train()
        real = measure_live_storage(model, batch, evaluator.task)
        assert evaluator.peak_bytes(attachment) == pytest.approx(real, rel=0.02)


@every_model
def test_a_step_keeps_to_the_models_device(name: str, architecture: str) -> None:
    evaluator = evaluator_of(name, architecture)
    configuration, batch = lora(evaluator.backbone), evaluator.data.largest_batch()
    module = evaluator.module(configuration)
    with (
        faked(evaluator.backbone.model, LAZY, batch) as (fake, _),
        attach(evaluator.backbone, configuration),
    ):
        optimizer_step(module, fake)
        for metric in module.metrics.values():
            if isinstance(metric, MeanMetric):
                metric.nan_strategy = "disable"  # it would look at values
            for state, value in metric.metric_state.items():
                if isinstance(value, torch.Tensor):
                    setattr(metric, state, torch.empty(value.shape, dtype=value.dtype, device=LAZY))
        module.eval().validation_step(fake, 0)


@pytest.mark.slow
def test_exports_load_in_plain_peft(tmp_path: Path) -> None:
    """One fresh process, which never imports autopeft, loads the exports of all tasks and models."""
    expected = {}
    for name, architecture in MODELS:
        evaluator = evaluator_of(name, architecture)
        backbone, folder = evaluator.backbone, tmp_path / f"{name}-{architecture}"
        configuration = lora(backbone)
        with attach(backbone, configuration) as attachment:
            for parameter in attachment.parameters.values():
                torch.nn.init.normal_(parameter, std=0.1)
            state = attachment.state_dict()
        probe = evaluator.model_call()
        expected[folder] = trained_logits(backbone, configuration, state, probe)
        export_adapter(backbone, configuration, state, folder / "adapter", probe=probe)
        head = TaskHead.of(backbone)
        base: Any = backbone.model.base_model if head.modules else backbone.model
        base.save_pretrained(folder / "base")  # without a head that was trained
        job = {
            "layout": "peft",
            "auto_class": head.auto_class,
            "prediction": "logits",
            "base": str(folder / "base"),
            "folder": str(folder / "adapter"),
            "options": {"num_labels": len(head.labels)} if head.labels else {},
            "threads": torch.get_num_threads(),
            "autocast": False,
        }
        (folder / "job.json").write_text(json.dumps(job))
        save_file(probe, folder / "probe.safetensors")
    code = "import sys, pathlib, load_script\nfor job in sys.argv[1:]: load_script.main(pathlib.Path(job))"
    subprocess.run(
        [sys.executable, "-c", code, *map(str, expected)],
        cwd=Path(load_script.__file__).parent,
        check=True,
        capture_output=True,
    )
    for folder, logits in expected.items():
        found = load_file(folder / "predicted.safetensors")["predicted"]
        assert torch.allclose(found, logits, atol=1e-5), folder.name
