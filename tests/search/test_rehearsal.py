"""What is wrong with a task of a user's own is found by `validate`, and named, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.samplers import CmaEsSampler, GridSampler
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from transformers import BertConfig, BertForMaskedLM

from autopeft import Search
from autopeft.methods.lora_ga import LoraGA
from autopeft.models.backbone import Backbone
from autopeft.models.head_spec import HeadSpec
from autopeft.opened_search import rehearse_export
from autopeft.search_spaces import Uniform
from autopeft.search_spaces.suggest_trial import SuggestTrial
from tests.learnable import learner, tiny_evaluator, tiny_search
from tests.own_tasks import OwnTask
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import (
    everywhere,
    fingerprint,
    tiny_chat_tokenizer,
    tiny_classifier,
    tiny_language_model,
    tiny_model,
    tiny_tokenizer,
)

GIVEN = r", given input_ids \(8, 8\), attention_mask \(8, 8\), labels \(8,\): "


def own(**members: Any) -> OwnTask:
    """Return the task with some members replaced, under the name Own."""
    made: OwnTask = type("Own", (OwnTask,), members)()
    return made


def search_for(task: OwnTask, folder: Path, **settings: Any) -> Search:
    model = settings.pop("backbone", None) or tiny_classifier("bert")
    return tiny_search(folder, task=task, backbone=model, tokenizer=tiny_tokenizer(), **settings)


def batch_with(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Any]:
    return {"batch": lambda task, batch: change(batch)}


def loss_of(change: Callable[[Tensor], Any]) -> dict[str, Any]:
    return {"loss": lambda task, output, batch: change(OwnTask.loss(task, output, batch))}


def no_validation(task: OwnTask, tokenizer: Any, **settings: Any) -> Any:
    data: Any = OwnTask.data(task, tokenizer, **settings)
    nothing: Any = []
    data.val_dataloader = lambda: DataLoader(nothing)
    return data


def plain_training(task: OwnTask, tokenizer: Any, **settings: Any) -> Any:
    data: Any = OwnTask.data(task, tokenizer, **settings)
    data.train_dataloader = lambda seed=None: data.val_dataloader()
    return data


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"data": lambda *_, **__: [1]}, "Own.data returned a list, expected a TaskData such as LoaderData"),
        ({"data": no_validation}, "Own's validation data: expected at least one batch, got none"),
        ({"data": plain_training}, "Own's training data: expected a batch sampler with set_epoch"),
        (batch_with(lambda batch: tuple(batch.values())), "Own's training data: .* got a batch as a tuple"),
        (batch_with(lambda batch: batch | {"ids": ["a"]}), "Own's training data: .* got ids as a list"),
        (batch_with(lambda batch: batch | {"labels": batch["labels"] + 5}), f"Own.loss{GIVEN}IndexError: "),
        ({"forward": lambda task, model, batch: batch["tokens"]}, f"Own.forward{GIVEN}KeyError: 'tokens'"),
        ({"prediction": "logit"}, "Own.predicted: Unknown field .* 'logit': .* did you mean 'logits'"),
        (loss_of(lambda loss: loss.repeat(8)), rf"Own.loss{GIVEN}expected the mean loss .* got shape \(8,\)"),
        (loss_of(lambda loss: loss.item()), r"Own.loss.* as a tensor of one number, got \d"),
        (loss_of(lambda loss: None), r"Own.loss.* as a tensor of one number, got None"),
        (loss_of(lambda loss: loss * torch.nan), "Own.loss.* to be finite, got nan"),
        (loss_of(lambda loss: loss.detach()), "Own.loss.*expected a gradient"),
        ({"weight": lambda task, batch: 8.0}, f"Own.weight{GIVEN}.* as a tensor of one number, got 8.0"),
        ({"weight": lambda task, batch: batch["labels"]}, r"Own.weight.* got shape \(8,\)"),
        ({"weight": lambda task, batch: torch.tensor(0)}, "Own.weight.* expected a number above 0, got 0"),
        (
            {"metric_collection": lambda task: {"accuracy": MeanMetric()}},
            "Own.metric_collection: expected a MetricCollection, got a dict",
        ),
        (
            {
                "metric_collection": lambda task: MetricCollection({"acc": MeanMetric()}),
                "update_metrics": lambda task, metrics, output, batch, loss: metrics["acc"].update(loss),
            },
            "Own.metric_collection: expected the keys accuracy of `metrics`, got acc",
        ),
        ({"update_metrics": lambda *_: None}, f"Own.update_metrics{GIVEN}.* got none of accuracy"),
        (
            {"update_metrics": lambda task, metrics, *_: metrics["acuracy"].update(1)},
            "Own.update_metrics.*'acuracy'",
        ),
        ({"identity": lambda task: None}, "Own.identity: "),
        (
            {"identity": lambda task: {"rows": 48}},
            r"Own.identity: expected texts by name, got \{'rows': 48\}",
        ),
        ({"trivial_score": lambda *_: None}, "Own.trivial_score, given accuracy: TypeError"),
        ({"trivial_score": lambda *_: torch.nan}, "Own.trivial_score.* a finite number, got nan"),
    ],
)
def test_a_mistake_in_a_task_is_named(members: dict[str, Any], message: str, tmp_path: Path) -> None:
    search = search_for(own(**members), tmp_path)
    with pytest.raises(ValueError, match=f"^{message}"):
        search.validate()
    assert not search.folder.exists()
    assert search.backbone.training is False  # type: ignore[union-attr]


def test_what_is_right_passes_and_leaves_no_trace(tmp_path: Path) -> None:
    def data(task: OwnTask, tokenizer: Any, **settings: Any) -> Any:
        found: Any = OwnTask.data(task, tokenizer, **settings)
        found.test_dataloader = lambda: pytest.fail("the test split was read")
        return found

    backbone = learner()
    backbone.model.eval()
    before = fingerprint(backbone.model)
    search_for(own(data=data), tmp_path, backbone=backbone).validate()
    assert fingerprint(backbone.model) == before
    assert not any(tmp_path.iterdir())


def test_a_validation_batch_that_fails_is_named(tmp_path: Path) -> None:
    def data(task: OwnTask, tokenizer: Any, **settings: Any) -> Any:
        found: Any = OwnTask.data(task, tokenizer, **settings)
        batch = next(iter(found.val_dataloader()))
        del batch["labels"]
        found.val_dataloader = lambda: DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
        return found

    with pytest.raises(ValueError, match=r"^A training step of Own: KeyError: 'labels'"):
        search_for(own(data=data), tmp_path).validate()


def test_a_model_that_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    class OwnModel(BertForMaskedLM):
        """It is loaded by itself, not by an auto class."""

        @classmethod
        def from_config(cls, config: BertConfig, **_: Any) -> OwnModel:
            return cls(config)

    config = tiny_model("bert").config
    assert isinstance(config, BertConfig)
    model = OwnModel(config)
    task = own(
        head=HeadSpec(auto_class=OwnModel, is_trained=False),
        loss=lambda task, output, batch: output.logits.mean(),
        update_metrics=lambda task, metrics, output, batch, loss: metrics["accuracy"].update(loss),
    )
    with pytest.raises(ValueError, match=r"^Exporting Own: 'OwnModel' is no auto class of transformers"):
        search_for(task, tmp_path, backbone=model).validate()


def test_a_task_that_leaves_the_model_alone_is_refused(tmp_path: Path) -> None:
    def forward(task: OwnTask, model: Any, batch: Any) -> Any:
        inner = model.bert(batch["input_ids"], batch["attention_mask"])
        inner.logits = model.classifier(inner.pooler_output)
        return inner

    with pytest.raises(ValueError, match=r"^Exporting Own: Own\.forward does not call the model"):
        search_for(own(forward=forward), tmp_path).validate()


def test_an_export_that_loses_an_adapter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of LoRA-GA, which adds nothing where all its tensors change alike."""
    evaluator = tiny_evaluator()
    configuration = everywhere(evaluator.backbone, "lora_ga", 4)
    rehearse_export(evaluator, [configuration])
    factors = LoraGA.lora_factors

    def lost(method: LoraGA, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        down, up = factors(method, tensors)
        return down, torch.zeros_like(up)

    monkeypatch.setattr(LoraGA, "lora_factors", lost)
    with pytest.raises(ValueError, match=r"^Exporting TextClassification: RuntimeError: "):
        rehearse_export(evaluator, [configuration])


@pytest.mark.parametrize("positional", [True, False])
def test_a_batch_may_have_names_of_its_own(positional: bool, tmp_path: Path) -> None:
    def forward(task: OwnTask, model: Any, batch: Any) -> Any:
        if positional:
            return model(batch["tokens"], batch["mask"])
        return model(input_ids=batch["tokens"], attention_mask=batch["mask"], return_dict=True)

    named = batch_with(
        lambda batch: {
            "tokens": batch["input_ids"],
            "mask": batch["attention_mask"],
            "labels": batch["labels"],
        }
    )
    search = search_for(own(forward=forward, **named), tmp_path / "runs")
    search.run(trials=1, progress=False)
    report = search.export(0, tmp_path / "adapter")
    assert report.max_logit_difference is not None
    assert {"input_ids", "attention_mask"} == search.open().evaluator.model_call().keys()


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (CmaEsSampler(), r"^Sampling Uniform by optuna\.samplers.*CmaEsSampler"),
        (GridSampler({"rank": [1]}), "^Sampling Uniform by optuna"),
    ],
    ids=("one objective alone", "a grid of other parameters"),
)
def test_a_sampler_that_does_not_fit_is_refused(sampler: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        search_for(OwnTask(), tmp_path, sampler=sampler).validate()


class ChoosesTypes(Uniform):
    def suggest_adapters(self, trial: SuggestTrial, backbone: Backbone) -> Any:
        trial.suggest_categorical("type", (int, float))
        return super().suggest_adapters(trial, backbone)


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
def test_a_parameter_that_no_study_can_keep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^Sampling ChoosesTypes by tpe: TypeError: .*not JSON"):
        search_for(OwnTask(), tmp_path, space=ChoosesTypes()).validate()


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("gpt2", {"n_positions": 8}, r"GPT2LMHeadModel has learnt 8 positions, and rows have up to"),
        ("mpt", {}, r"Packed rows see each other in MptForCausalLM: expected packing=False"),
    ],
)
def test_a_model_that_cannot_compute_the_batches_is_refused(
    architecture: str, options: dict[str, int], message: str, tmp_path: Path
) -> None:
    model = tiny_language_model(architecture, **options)
    settings: dict[str, Any] = {"backbone": model, "tokenizer": tiny_chat_tokenizer()}
    settings |= {"objectives": ("loss", "trainable_parameters")}
    with pytest.raises(ValueError, match=f"^CausalLM: {message}"):
        tiny_search(tmp_path, task=task_of(24, packing=architecture == "mpt"), **settings).validate()


def test_a_classifier_with_too_few_positions_is_refused(tmp_path: Path) -> None:
    model = tiny_classifier("bert", max_position_embeddings=4)
    with pytest.raises(ValueError, match=r"^TextClassification: .* has learnt 4 positions"):
        tiny_search(tmp_path, backbone=model, tokenizer=tiny_tokenizer()).validate()


def test_a_model_that_cannot_generate_is_refused_where_text_is_measured(tmp_path: Path) -> None:
    model = tiny_language_model("llama")
    assert model.generation_config is not None
    model.generation_config.cache_implementation = "unheard of"
    task = task_of(24, generate=["exact_match"])

    def search_for_best(*metrics: str) -> Search:
        tokenizer = tiny_chat_tokenizer()
        objectives = (*metrics, "trainable_parameters")
        return tiny_search(tmp_path, task=task, backbone=model, tokenizer=tokenizer, objectives=objectives)

    search_for_best("loss").validate()  # nothing is generated
    with pytest.raises(ValueError, match=r"Generating with .*unheard of"):
        search_for_best("loss", "exact_match").validate()
