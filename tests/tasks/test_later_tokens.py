"""Language modelling refuses a model that sees what it is to predict."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autopeft.tasks import PreferenceOptimization
from tests.task_cases import compared_rows, splits_of
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import tiny_chat_tokenizer, tiny_language_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["bert", "electra", "roberta"])
@pytest.mark.parametrize("task", [task_of(), PreferenceOptimization(splits_of(compared_rows))])
def test_encoders_are_refused_and_decoders_are_not(task: Any, architecture: str, dtype: torch.dtype) -> None:
    data = task.data(tiny_chat_tokenizer(), batch_size=2, seed=0)
    for is_decoder in (False, True):
        model = tiny_language_model(architecture, is_decoder=is_decoder).to(dtype)  # type: ignore[arg-type]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            if is_decoder:
                task.check_model(model, data)
            else:
                with pytest.raises(ValueError, match=r"reads later tokens .* such as TextClassification"):
                    task.check_model(model, data)
