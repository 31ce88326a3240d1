"""The memory count against live storages of real steps, and counts that are kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.precision import Precision
from autopeft.evaluation.memory import counter as counter_module
from autopeft.evaluation.memory.counter import MemoryCounter, count_flops
from autopeft.methods import Attachment, FullFineTuning, attach
from autopeft.models.backbone import Backbone
from autopeft.tasks import TextClassification
from benchmarks.memory import measure_live_storage
from tests.learnable import learnable_task
from tests.loss_task import CROSS_ENTROPY, LossTask
from tests.slow_cases import slow_cases
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import tiny_language_model

LORA = {"method": "lora", "size": 4}
SITES: dict[str, dict[str, Any]] = {
    "head alone": {},
    "lora": {"0-1.attention_output": LORA, "0-1.ffn_down": LORA},
    "lora on top": {"1.attention_output": LORA},
    "ia3": {"0-1.ffn_down": {"method": "ia3"}},
    "layernorm": {"0-1.ffn_norm": {"method": "layernorm"}},
    "series": {"0-1.ffn": {"method": "series", "size": 8}},
    "parallel": {"0-1.attention": {"method": "parallel", "size": 8}},
    "prefix": {"0-1.attention": {"method": "prefix", "size": 3}},
    "full": {"0-1.ffn_down": {"method": "full"}},
    "ssf": {"0-1.ffn_down": {"method": "ssf"}},
    "sparse": {"0-1.ffn_down": {"method": "sparse", "size": 64}},
    "lora_sparse": {"0-1.ffn_down": {"method": "lora_sparse", "size": 4}},
    "lora_fa": {"0-1.ffn_down": {"method": "lora_fa", "size": 4}},
    "lora_ga": {"0-1.ffn_down": {"method": "lora_ga", "size": 4}},
    "lora_xs": {"0-1.ffn_down": {"method": "lora_xs", "size": 4}},
    "compacter": {"0-1.ffn": {"method": "compacter", "size": 2}},
    "loreft": {"0-1.ffn": {"method": "loreft", "size": 2}},
    "loreft at two tokens": {"0-1.ffn": {"method": "loreft", "size": 2, "positions": 2}},
    "mixed": {
        "0.ffn_down": LORA,
        "1.ffn_down": {"method": "ia3"},
        "0-1.ffn": [{"method": "series", "size": 8}, {"method": "parallel", "size": 4}],
        "1.attention": {"method": "prefix", "size": 3},
    },
}


def batch_of(rows: int = 6, width: int = 14) -> dict[str, Tensor]:
    tokens = torch.randint(5, 100, (rows, width))
    mask = torch.ones_like(tokens)
    mask[1:, width - 5 :] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": torch.zeros(rows, dtype=torch.long)}


def backbone_of(model: Any) -> Backbone:
    head = "classifier" if hasattr(model, "classifier") else "score"
    return Backbone(model, SimpleNamespace(), name="tiny", head=[head])  # type: ignore[arg-type]


def real(backbone: Backbone, batch: dict[str, Tensor]) -> int:
    backbone.model.train()
    try:
        return measure_live_storage(backbone.model, batch, CROSS_ENTROPY)
    finally:
        backbone.model.eval()


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("family", ["tiny_bert", *slow_cases("tiny_llama", "tiny_gpt2")])
def test_the_count_is_what_real_steps_hold(family: str, name: str, request: pytest.FixtureRequest) -> None:
    backbone = backbone_of(request.getfixturevalue(family)())
    batch = batch_of()
    counter = MemoryCounter(backbone.model)
    with attach(backbone, Configuration.from_dict({"sites": SITES[name]})):
        first = counter.count(batch, CROSS_ENTROPY)
        again = counter.count(batch, CROSS_ENTROPY)
        assert first == again
        assert first == pytest.approx(real(backbone, batch), rel=0.01)


def test_full_fine_tuning_is_counted(tiny_bert: Any) -> None:
    backbone, batch = backbone_of(tiny_bert()), batch_of()
    with FullFineTuning(backbone, Configuration()):
        count = MemoryCounter(backbone.model).count(batch, CROSS_ENTROPY)
        assert count == pytest.approx(real(backbone, batch), rel=0.01)


@pytest.mark.slow
def test_on_real_weights(minilm_folder: Path, questions_csv: Path) -> None:
    backbone = Backbone.load(str(minilm_folder), TextClassification(dataset=str(questions_csv)).head)
    counter = MemoryCounter(backbone.model)
    batch = batch_of(8, 24)
    peaks = []
    for blocks in ("0-5", "3-5", "5"):
        sites = {f"{blocks}.{role}": LORA for role in ("query", "value", "ffn_up")}
        with attach(backbone, Configuration.from_dict({"sites": sites})):
            count = counter.count(batch, CROSS_ENTROPY)
            assert count == pytest.approx(real(backbone, batch), rel=0.001)
            peaks.append(count)
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("precision", ["32-true", *slow_cases("bf16-mixed")])
def test_a_count_is_kept_by_what_is_attached(tiny_bert: Any, precision: Precision) -> None:
    backbone, batch = backbone_of(tiny_bert()), batch_of(32, 40)
    counter = MemoryCounter(backbone.model)
    configuration = Configuration.from_dict({"sites": SITES["mixed"]})
    larger = configuration.replace(
        adapters={**configuration.adapters, Site(0, "ffn_down"): Adapter("lora", 9)}
    )
    shorter = {
        name: tensor.to(torch.int32) if name == "input_ids" else tensor for name, tensor in batch.items()
    }
    follow = counter_module._follow_step
    with patch.object(counter_module, "_follow_step", side_effect=follow) as followed:

        def count(attachment: Attachment, batch: dict[str, Tensor], precision: Precision) -> int:
            kept = counter.count(batch, CROSS_ENTROPY, precision=precision, attached=attachment.structure)
            calls = followed.call_count
            assert kept == counter.count(batch, CROSS_ENTROPY, precision=precision)
            followed.call_count = calls
            return kept

        with attach(backbone, configuration) as attachment:
            first = count(attachment, batch, precision)
        with attach(backbone, configuration.replace(learning_rate=0.5), seed=3) as attachment:
            assert count(attachment, batch, precision) == first
            assert followed.call_count == 1, "only hyper-parameters differ"
        with attach(backbone, larger) as attachment:
            assert count(attachment, batch, precision) > first
            assert followed.call_count == 2
        with attach(backbone, configuration) as attachment:
            assert count(attachment, shorter, precision) != first
            other: Precision = "32-true" if precision == "bf16-mixed" else "bf16-mixed"
            assert count(attachment, batch, other) != first
            for parameter in [*attachment.parameters.values()][1:]:
                parameter.requires_grad_(False)
            assert count(attachment, batch, precision) != first
            assert followed.call_count == 5


def test_full_fine_tuning_is_not_taken_for_the_head_alone(tiny_bert: Any) -> None:
    backbone, batch = backbone_of(tiny_bert()), batch_of()
    counter = MemoryCounter(backbone.model)
    peaks = []
    for kind in (Attachment, FullFineTuning):
        with kind(backbone, Configuration()) as attachment:
            count = counter.count(batch, CROSS_ENTROPY, attached=attachment.structure)
            peaks.append(count)
    assert peaks[1] > peaks[0]


def test_kept_counts_are_bounded(tiny_bert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counter_module, "_MOST_COUNTS", 2)
    backbone, batch = backbone_of(tiny_bert()), batch_of()
    counter = MemoryCounter(backbone.model)
    for name in ("lora", "series", "prefix", "lora"):
        with attach(backbone, Configuration.from_dict({"sites": SITES[name]})) as attachment:
            kept = counter.count(batch, CROSS_ENTROPY, attached=attachment.structure)
            assert kept == counter.count(batch, CROSS_ENTROPY)
        assert len(counter._counts) <= 2


def test_a_count_leaves_everything_as_it_was(tiny_bert: Any) -> None:
    backbone = backbone_of(tiny_bert())
    with attach(backbone, Configuration.from_dict({"sites": SITES["mixed"]})):
        before = {name: tensor.detach().clone() for name, tensor in backbone.model.named_parameters()}
        batch, was_training = batch_of(), backbone.model.training
        state = torch.get_rng_state()
        MemoryCounter(backbone.model).count(batch, CROSS_ENTROPY)
        assert torch.equal(torch.get_rng_state(), state)
        assert backbone.model.training == was_training
        for name, parameter in backbone.model.named_parameters():
            assert torch.equal(parameter, before[name])
            assert parameter.grad is None
            assert parameter.device.type == "cpu"


def test_bf16_activations_take_less(tiny_bert: Any) -> None:
    backbone, batch = backbone_of(tiny_bert()), batch_of(32, 40)
    with attach(backbone, Configuration.from_dict({"sites": SITES["lora"]})):
        counter = MemoryCounter(backbone.model)
        full = counter.count(batch, CROSS_ENTROPY)
        mixed = counter.count(batch, CROSS_ENTROPY, precision="bf16-mixed")
    assert mixed < full


def test_flops_of_a_linear_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, inputs: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.layer(inputs))

    batch = {"inputs": torch.zeros(4, 16), "labels": torch.zeros(4, dtype=torch.long)}
    assert count_flops(Model(), batch, CROSS_ENTROPY) == 2 * 4 * 16 * 8


def test_an_adapter_costs_flops(tiny_bert: Any) -> None:
    backbone, batch = backbone_of(tiny_bert()), batch_of()
    plain = count_flops(backbone.model, batch, CROSS_ENTROPY)
    with attach(backbone, Configuration.from_dict({"sites": SITES["series"]})):
        assert count_flops(backbone.model, batch, CROSS_ENTROPY) > plain


def test_flops_of_experts_are_those_of_the_tokens_that_go_through_them() -> None:
    task, model = task_of(24), tiny_language_model("mixtral")
    batch = task.example_batch(3, 7)
    config: Any = model.config
    before = count_flops(model, batch, task)
    config.num_experts_per_tok += 1
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = config.num_experts_per_tok
    products = 3 * config.hidden_size * config.intermediate_size  # gate, up and down
    assert count_flops(model, batch, task) - before == 2 * 3 * 7 * products * config.num_hidden_layers


def test_weighted_losses_are_counted(tiny_bert: Any) -> None:
    task = learnable_task(class_weights={"a": 3.0})
    backbone, batch = backbone_of(tiny_bert()), batch_of()
    counter = MemoryCounter(backbone.model)
    with attach(backbone, Configuration.from_dict({"sites": SITES["lora"]})):
        assert counter.count(batch, task) == counter.count(batch, task)
        counter.count(batch, task, precision="bf16-mixed")


def test_what_takes_data_is_refused_in_words(tiny_bert: Any) -> None:
    backbone, batch = backbone_of(tiny_bert()), batch_of()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels) * len(torch.unique_consecutive(labels))

    with (
        attach(backbone, Configuration.from_dict({"sites": SITES["lora"]})),
        pytest.raises(ValueError, match="leave peak_memory out of objectives"),
    ):
        MemoryCounter(backbone.model).count(batch, LossTask(loss))


class Scaled(nn.Module):
    """A layer between products with a number, and perhaps a sum with several, that are made at each pass."""

    def __init__(self, *, shifted: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 3)
        self.shifted = shifted

    def forward(self, inputs: Tensor) -> SimpleNamespace:
        scale = torch.tensor(2.0)
        hidden = inputs + torch.tensor([0.5] * 16) if self.shifted else inputs
        return SimpleNamespace(logits=self.layer(hidden * scale) * scale)


@pytest.mark.parametrize("shifted", [False, True])
def test_tensors_made_of_numbers_in_a_forward_pass_are_counted(shifted: bool) -> None:
    model = Scaled(shifted=shifted)
    batch = {"inputs": torch.zeros(64, 16), "labels": torch.zeros(64, dtype=torch.long)}
    count = MemoryCounter(model).count(batch, CROSS_ENTROPY)
    # To the two numbers that a pass makes and nobody sees afterwards.
    assert count == pytest.approx(measure_live_storage(model, batch, CROSS_ENTROPY), abs=16)
