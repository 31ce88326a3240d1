"""autopeft itself, whole and with parts switched off."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from autopeft import PackedExecutor, ParetoFront, Search, SuccessiveHalving
from autopeft.core.evaluation import TrialRecord
from autopeft.optimization.ehvi_sampler import EhviSampler
from autopeft.search_spaces import ScoreGuided
from benchmarks.rivals.setting import RANKS, RATE, TRAINING, Entry, Setting, per_layer

GUIDED = ScoreGuided(methods=("lora",), sizes={"rank": RANKS}, learning_rate=RATE)
_RUNGS = SuccessiveHalving(rungs=(1 / 3,), reduction_factor=3)
_WHOLE: Mapping[str, Any] = {"space": GUIDED, "halving": _RUNGS, "seeds": 3}
_LOADED_AGAIN = "autopeft, backbone loaded again"
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "autopeft": _WHOLE,
    "autopeft, one seed": {**_WHOLE, "seeds": 1},
    "autopeft, no rungs": {**_WHOLE, "halving": None},
    "autopeft, no scores": {**_WHOLE, "space": per_layer()},
    "autopeft, no single-adapter probes": {**_WHOLE, "probe_share": 0.0},
    "autopeft, no prefix cache": {**_WHOLE, "training": replace(TRAINING, frozen_blocks="eval")},
    "autopeft, single precision": {**_WHOLE, "training": replace(TRAINING, precision="32-true")},
    "autopeft, warm starts as well": {**_WHOLE, "warm_start": True},
    "autopeft, packs of four": {**_WHOLE, "executor": PackedExecutor(size=4)},
    _LOADED_AGAIN: _WHOLE,
    "autopeft, PerLayer and TPE alone": {
        "space": per_layer(),
        "sampler": "tpe",
        "training": replace(TRAINING, frozen_blocks="train", precision="32-true"),
    },
}
"""By name, the arguments of `Search`, or one of `EhviSampler`.

Each technique of the whole is switched off alone, or one added.
"""


def run(setting: Setting, variant: str) -> list[Entry]:
    """Run a search with one of `VARIANTS`; the log has its completed trials.

    A replicated trial is there again with its mean. To measure what reloading costs, one variant loads the
    backbone after every trial and does not use it.
    """
    log: list[Entry] = []

    def note(record: TrialRecord, front: ParetoFront) -> None:
        if variant == _LOADED_AGAIN:
            setting.load()
        evaluation = record.evaluation
        if evaluation.status == "complete" and record.duplicate_of is None:
            score = evaluation.values[setting.metric]
            warm_start = evaluation.warm_start
            log.append(
                setting.entry(search.open().backbone, evaluation.configuration, score, warm_start=warm_start)
            )

    options = {"training": TRAINING, **VARIANTS[variant]}
    if "probe_share" in options:
        options["sampler"] = EhviSampler(seed=setting.seed, probe_share=options.pop("probe_share"))
    with tempfile.TemporaryDirectory() as folder:
        search = Search(
            setting.model,
            setting.task,
            objectives=(setting.metric, "trainable_parameters"),
            seed=setting.seed,
            folder=folder,
            tracking=None,
            **options,
        )
        search.run(trials=setting.trials, progress=False, callbacks=[note])
    return log
