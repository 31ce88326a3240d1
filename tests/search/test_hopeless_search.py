"""A search that cannot find anything ends by itself, and says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from autopeft.optimization.study_store import load_study
from autopeft.search_spaces import PerLayer
from tests.learnable import tiny_search


@pytest.mark.slow
def test_a_search_in_which_all_fails_alike_stops_and_says_why(tmp_path: Path) -> None:
    search = tiny_search(tmp_path, space=PerLayer(methods=("lora",), sizes={"rank": (1, 4)}), baselines=False)

    def fail(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if module.training and type(output.logits) is torch.Tensor and not output.logits.is_meta:
            raise RuntimeError("no such kernel")

    hook = search.open().backbone.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match=r"All 5 candidates so far failed alike: .*no such kernel"):
        search.run(trials=100, progress=False)
    hook.remove()
    _, records = load_study(search.folder)
    assert [record.evaluation.status for record in records] == ["failed"] * 5
