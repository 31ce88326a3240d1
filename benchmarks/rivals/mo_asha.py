"""Syne Tune's MO-ASHA around the hand-written training: random candidates, stopped at epochs.

Schmucker et al., "Multi-objective Asynchronous Successive Halving", 2021. Needs `pip install syne-tune`
(written against 0.16), of which the scheduler alone is used: which candidates it stops.
"""

from __future__ import annotations

import datetime
from typing import Any

import optuna
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from autopeft.methods import count_parameters
from benchmarks.rivals.handwritten import Fitting, quiet
from benchmarks.rivals.setting import TRAINING, Entry, Setting, per_layer


class _Rungs(TrainerCallback):
    """Report every epoch's score to the scheduler, and stop the training where it says so."""

    def __init__(self, scheduler: Any, trial: Any, parameters: int) -> None:
        self.scheduler = scheduler
        self.trial = trial
        self.parameters = parameters
        self.stopped = False

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask whether to go on after an epoch."""
        epoch = round(state.epoch or 0)
        if epoch >= TRAINING.epochs or self.stopped:
            return
        result = {
            "epoch": epoch,
            "loss": -kwargs["metrics"]["eval_score"],
            "parameters": float(self.parameters),
        }
        if self.scheduler.on_trial_result(self.trial, result) == "STOP":
            self.stopped = control.should_training_stop = True


def run(setting: Setting) -> list[Entry]:
    """Search; the log has those that were trained to the end."""
    from syne_tune.backend.trial_status import Trial
    from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA

    quiet()
    space = per_layer()
    backbone = setting.load()
    fitting = Fitting(setting)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=setting.seed))
    scheduler = MOASHA(
        {}, metrics=["loss", "parameters"], time_attr="epoch", max_t=TRAINING.epochs, random_seed=setting.seed
    )
    log: list[Entry] = []
    for number in range(setting.trials):
        configuration = space.suggest(study.ask(), backbone)
        trial = Trial(trial_id=number, config={}, creation_time=datetime.datetime.now())
        scheduler.on_trial_add(trial)
        rungs = _Rungs(scheduler, trial, count_parameters(backbone, configuration))
        score = fitting.fit(backbone, configuration, [rungs])
        if not rungs.stopped:
            log.append(setting.entry(backbone, configuration, score))
    return log
