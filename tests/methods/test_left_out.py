"""Why types of peft's are no method here: each reason is tried, to notice when it holds no longer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PeftType,
    PromptLearningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn

from autopeft.core.peft_families import LEFT_OUT
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.methods.abilities import PROBED_SHAPE
from autopeft.methods.sparse import SparseUpdate
from tests.loss_task import CROSS_ENTROPY
from tests.slow_cases import slow_cases
from tests.tiny_models import LABELS, tiny_backbone, tiny_batch, tiny_classifier

WIDTH = PROBED_SHAPE.in_features


def config_of(peft_type: str, **options: Any) -> Any:
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[peft_type]](**options)


def injected(peft_type: str, model: nn.Module, targets: tuple[str, ...], **options: Any) -> nn.Module:
    config = config_of(peft_type, target_modules=list(targets), **options)
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType[peft_type]](model, config, "x")
    return model


def layer_with(peft_type: str, *, seed: int = 0, **options: Any) -> Any:
    """Return a linear layer with an adapter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.ModuleDict({"layer": nn.Linear(WIDTH, WIDTH)})
        return injected(peft_type, model, ("layer",), **options).get_submodule("layer")


def trained_shapes(layer: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in layer.parameters() if parameter.requires_grad]


def memory(peft_type: str, **options: Any) -> int:
    """Count the memory of a training step on a BERT with adapters."""
    model = injected(peft_type, tiny_classifier("bert"), ("query", "value"), **options).train()
    return MemoryCounter(model).count(tiny_batch() | {"labels": torch.arange(LABELS)}, CROSS_ENTROPY)


def is_a_prompt(peft_type: str) -> None:
    assert issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[peft_type]], PromptLearningConfig)


def sizes_follow_clusters(peft_type: str) -> None:
    options = {"r": 16, "num_subspaces": 3, "subspace_rank": 3}
    first, second = (trained_shapes(layer_with(peft_type, seed=seed, **options)) for seed in (0, 1))
    assert first != second


def takes_few_models(peft_type: str) -> None:
    config = config_of(peft_type, adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="Unsupported model type"):
        get_peft_model(tiny_classifier("bert"), config)


def trains_a_bias(peft_type: str) -> None:
    assert trained_shapes(layer_with(peft_type)) == [(1, WIDTH)]


def sets_compilers(peft_type: str) -> None:
    with patch.dict(os.environ):
        os.environ.pop("CC", None)
        layer_with(peft_type, boft_block_size=4)
        assert os.environ["CC"] == "gcc"


def decomposes_each_time(peft_type: str) -> None:
    with patch.object(torch.linalg, "eigh", wraps=torch.linalg.eigh) as decompose:
        for _ in range(2):
            layer_with(peft_type, progressbar=False)
    assert decompose.call_count == 2


def reads_other_rows(peft_type: str) -> None:
    layer = layer_with(peft_type, r=4, num_B=2, stride_A=1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter.data)
    rows = torch.randn(2, 3, WIDTH)
    assert not torch.allclose(layer(rows)[:1], layer(rows[:1]))
    assert not torch.allclose(layer(rows)[:, :1], layer(rows[:, :1])), "tokens to come, too"


def wants_a_task(peft_type: str) -> None:
    layer = layer_with(peft_type)
    with pytest.raises(ValueError, match="task_ids should not be None"):
        layer(torch.randn(2, WIDTH))


def cannot_be_injected(peft_type: str) -> None:
    config = config_of(peft_type)
    with pytest.raises(ValueError, match=r"does not support .*shadow"):
        inject_adapter_in_model(config, tiny_classifier("bert"))


def trains_the_numbers_of_sparse(peft_type: str) -> None:
    layer = layer_with(peft_type, sparsity=0.99)
    found = layer.supertuning_indices["x"].sort().values
    ours = SparseUpdate(layer.base_layer, PROBED_SHAPE, len(found), "magnitude")
    assert torch.equal(found, ours.indices)


def sits_below_the_blocks(peft_type: str) -> None:
    backbone = tiny_backbone("bert")
    embedding = "bert.embeddings.word_embeddings"
    config = config_of(peft_type, token_indices=[5, 7], target_modules=[embedding])
    model = get_peft_model(backbone.model, config)
    assert trained_shapes(model) == [(2, backbone.hidden_size)]
    assert all(embedding not in shape.module for shape in backbone.sites.values())


def mixes_trained_adapters(peft_type: str) -> None:
    assert "adapters" in {each.name for each in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[peft_type]])}


def memory_is_not_counted(message: str, **options: Any) -> Callable[[str], None]:
    def check(peft_type: str) -> None:
        assert memory("LORA", r=2) > 0
        with pytest.raises(ValueError, match=f"cannot be counted.*{message}"):
            memory(peft_type, **options)

    return check


CHECKS: Mapping[str, Callable[[str], None]] = {
    "ADAMSS": sizes_follow_clusters,
    "ADAPTION_PROMPT": takes_few_models,
    "BEFT": trains_a_bias,
    "BOFT": sets_compilers,
    "CARTRIDGE": is_a_prompt,
    "CPT": is_a_prompt,
    "FROD": decomposes_each_time,
    "LILY": reads_other_rows,
    "MULTITASK_PROMPT_TUNING": is_a_prompt,
    "POLY": wants_a_task,
    "PREFIX_TUNING": is_a_prompt,
    "PROMPT_TUNING": is_a_prompt,
    "P_TUNING": is_a_prompt,
    "SHADOW": cannot_be_injected,
    "SHIRA": memory_is_not_counted("Sparse", r=2),
    "SUPERTUNING": trains_the_numbers_of_sparse,
    "TRAINABLE_TOKENS": sits_below_the_blocks,
    "VBLORA": memory_is_not_counted("_local_scalar_dense", num_vectors=16, vector_length=8, topk=2),
    "WAVEFT": memory_is_not_counted("nonzero", n_frequency=64),
    "XLORA": mixes_trained_adapters,
}


SECONDS = ("ADAMSS", "SHIRA", "VBLORA", "WAVEFT")


def test_every_reason_has_its_check() -> None:
    assert CHECKS.keys() == LEFT_OUT.keys()


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly")
@pytest.mark.parametrize(
    "peft_type", [name for name in LEFT_OUT if name not in SECONDS] + slow_cases(*SECONDS)
)
def test_reason_holds(peft_type: str) -> None:
    CHECKS[peft_type](peft_type)
