"""The loop that people write today: load, `get_peft_model`, `transformers.Trainer`, tell Optuna.

Every candidate loads the model anew and is trained to the end. Optuna's samplers are as they come. The space
(a LoRA rank or none at every linear module, and the learning rate) is autopeft's `PerLayer`, so that all
methods choose from the same configurations.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
import torch
from datasets import Dataset
from optuna.samplers import BaseSampler
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from autopeft.core.configuration import Configuration
from autopeft.models.backbone import Backbone
from benchmarks.rivals.setting import TRAINING, Entry, Setting, per_layer

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


def lora_config(backbone: Backbone, configuration: Configuration) -> LoraConfig:
    """Return peft's config of a configuration of LoRA adapters."""
    adapters = {backbone.shape(site).module: adapter for site, adapter in configuration}
    first = next(iter(adapters.values()))
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        target_modules=list(adapters),
        rank_pattern={name: adapter.size for name, adapter in adapters.items()},
        lora_alpha=first.option("alpha"),
        use_rslora=bool(first.option("rslora")),
    )


class Fitting:
    """Trains one candidate after another, each on a model that is loaded anew.

    Args:
        setting: Data, seed and training.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(setting.model)
        self.train = self._tokenised("train")
        self.validation = self._tokenised("validation")
        task = setting.task
        self._metric = task.metric_collection()[setting.metric]

    def _tokenised(self, split: Any) -> Dataset:
        texts = self.setting.task.split(split)
        tokens = self.tokenizer(*map(list, texts.columns), truncation=True)
        return Dataset.from_dict({**tokens, "labels": list(texts.labels)})

    def _compute(self, prediction: EvalPrediction) -> dict[str, float]:
        self._metric.reset()
        logits, labels = (
            torch.from_numpy(np.asarray(array)) for array in (prediction.predictions, prediction.label_ids)
        )
        return {"score": float(self._metric(logits, labels))}

    def fit(
        self, backbone: Backbone, configuration: Configuration, callbacks: Sequence[TrainerCallback] = ()
    ) -> float | None:
        """Train a candidate and return its score on the validation split; None where it failed."""
        setting = self.setting
        set_seed(setting.seed)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            setting.model, num_labels=len(setting.task.labels)
        )
        if len(configuration):
            model = get_peft_model(model, lora_config(backbone, configuration))
        else:
            model.base_model.requires_grad_(False)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model=model,
                args=TrainingArguments(
                    folder,
                    num_train_epochs=TRAINING.epochs,
                    per_device_train_batch_size=TRAINING.batch_size,
                    per_device_eval_batch_size=TRAINING.batch_size,
                    learning_rate=configuration.learning_rate,
                    lr_scheduler_type="linear",
                    warmup_steps=TRAINING.warmup_share,
                    max_grad_norm=TRAINING.gradient_clip or 0.0,
                    weight_decay=configuration.weight_decay,
                    seed=setting.seed,
                    save_strategy="no",
                    logging_strategy="no",
                    eval_strategy="epoch" if callbacks else "no",
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=True,
                    label_names=["labels"],
                ),
                train_dataset=self.train,
                eval_dataset=self.validation,
                data_collator=DataCollatorWithPadding(self.tokenizer),
                compute_metrics=self._compute,
                callbacks=list(callbacks),
            )
            trainer.train()
            score = trainer.evaluate()["eval_score"]
        return float(score) if np.isfinite(score) else None


def quiet() -> None:
    """Silence what the libraries say of each of many models."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def run(setting: Setting, sampler: str) -> list[Entry]:
    """Search with one of `SAMPLERS`; every candidate is trained to the end."""
    quiet()
    space = per_layer()
    backbone = setting.load()  # names and sizes of the modules
    fitting = Fitting(setting)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=SAMPLERS[sampler](setting.seed))
    log: list[Entry] = []
    for _ in range(setting.trials):
        trial = study.ask()
        configuration = space.suggest(trial, backbone)
        score = fitting.fit(backbone, configuration)
        log.append(setting.entry(backbone, configuration, score))
        if score is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, [score, log[-1].parameters])
    return log
