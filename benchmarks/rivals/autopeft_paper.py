"""The AutoPEFT paper's protocol: its space, half of the candidates random, then Bayesian, all trained fully.

Zhou et al., "AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning", TACL 2024, whose
optimizer is a Gaussian process with the noisy expected hypervolume improvement of botorch; here Optuna's
`BoTorchSampler` with as many random trials (`pip install 'autopeft[botorch]'`). The learning rate is searched
as in the other methods: the paper's is for trainings a hundred times as long. The adapters are autopeft's, as
peft has none of the three, and the model is loaded anew for each candidate, as in the paper's code.
"""

from __future__ import annotations

import warnings

import optuna
from optuna_integration import BoTorchSampler

from autopeft.search_spaces import AutoPEFTPaper
from benchmarks.rivals.handwritten import quiet
from benchmarks.rivals.setting import RATE, Entry, Setting


def run(setting: Setting) -> list[Entry]:
    """Search; every candidate is trained to the end."""
    quiet()
    space = AutoPEFTPaper(learning_rate=RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = BoTorchSampler(seed=setting.seed, n_startup_trials=setting.trials // 2)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    log: list[Entry] = []
    for _ in range(setting.trials):
        trial = study.ask()
        evaluator = setting.evaluator(setting.load())
        configuration = space.suggest(trial, evaluator.backbone)
        evaluation = evaluator.evaluate(configuration)
        score = evaluation.values.get(setting.metric) if evaluation.status == "complete" else None
        log.append(setting.entry(evaluator.backbone, configuration, score))
        if score is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, [score, log[-1].parameters])
    return log
