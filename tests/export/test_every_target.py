"""Every point of a front, written for every target that takes it, loads again and agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from autopeft import Search
from autopeft.export.targets import COMPARISON, LORA_TARGETS, TARGETS, possible_targets
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import PerLayer, SearchSpace, Uniform
from tests.learnable import TRAINING, learnable_task, learner
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import tiny_chat_tokenizer, tiny_language_model


def language_model() -> Backbone:
    model, auto_class = tiny_language_model("llama"), AutoModelForCausalLM
    return Backbone(model, tiny_chat_tokenizer(), name="tiny", head=(), auto_class=auto_class)


FRONTS: dict[str, tuple[Any, Any, SearchSpace, set[str]]] = {
    "LoRA of a classifier": (
        learner,
        learnable_task,
        Uniform(sizes={"rank": (1, 8)}),
        {"peft", "autopeft", "merged", "lora"},
    ),
    "mixed, of a classifier": (
        learner,
        learnable_task,
        PerLayer(methods=("lora", "series", "layernorm")),
        {"autopeft"},
    ),
    "mixed, of a language model": (
        language_model,
        task_of,
        PerLayer(methods=("lora", "hira", "ia3")),
        {"autopeft", "merged", *LORA_TARGETS},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("front", FRONTS)
def test_points_agree_wherever_they_can_go(front: str, tmp_path: Path) -> None:
    backbone, task, space, expected = FRONTS[front]
    search = Search(
        backbone(),
        task(),
        space=space,
        training=TRAINING,
        halving=None,
        sampler="random",
        seeds=1,
        tracking=None,
        baselines=False,
        folder=tmp_path,
    )
    claimed = set()
    for point in search.run(trials=2, progress=False):
        possible = possible_targets(search.open().backbone, point.configuration)
        for target in possible:
            report = search.export(point.number, tmp_path / f"{point.number}-{target}", target=target)
            assert report.max_logit_difference is not None or target == COMPARISON
            assert (report.conversion is not None) == (
                target in LORA_TARGETS and point.configuration.methods != ("lora",)
            )
        for target in TARGETS.keys() - {*possible, *LORA_TARGETS}:
            with pytest.raises(ValueError, match="Targets that take it"):
                search.export(point.number, tmp_path / "refused", target=target)
        claimed |= set(possible)
    assert expected <= claimed
