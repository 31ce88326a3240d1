"""The memory count against live storages of real steps, and the quick way against the plain one."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autopeft.core.configuration import Configuration
from autopeft.evaluation.memory.counter import MemoryCounter, Step, count_flops
from autopeft.evaluation.memory.meta_autocast import MetaAutocast
from autopeft.evaluation.memory.storage_tracker import measure_live_storage
from autopeft.methods import Attachment, FullFineTuning, attach
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import PerLayer
from autopeft.tasks import TextClassification
from tests.learnable import learnable_task

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
        return measure_live_storage(backbone.model, batch, functional.cross_entropy)
    finally:
        backbone.model.eval()


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("family", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
def test_the_count_is_what_real_steps_hold(family: str, name: str, request: pytest.FixtureRequest) -> None:
    backbone = backbone_of(request.getfixturevalue(family)())
    batch = batch_of()
    counter = MemoryCounter(backbone.model)
    with attach(backbone, Configuration.from_dict({"sites": SITES[name]})):
        first = counter.count(batch, functional.cross_entropy)
        again = counter.count(batch, functional.cross_entropy)
        assert first == again
        assert first.peak_bytes == pytest.approx(real(backbone, batch), rel=0.01)


def test_full_fine_tuning_is_counted(tiny_bert: Any) -> None:
    backbone, batch = backbone_of(tiny_bert()), batch_of()
    with FullFineTuning(backbone, Configuration()):
        count = MemoryCounter(backbone.model).count(batch, functional.cross_entropy)
        assert count.peak_bytes == pytest.approx(real(backbone, batch), rel=0.01)
        assert count.gradient_bytes == 4 * backbone.parameters


def test_on_real_weights(minilm_folder: Path, questions_csv: Path) -> None:
    backbone = Backbone.load(str(minilm_folder), TextClassification(dataset=str(questions_csv)).head)
    counter = MemoryCounter(backbone.model)
    batch = batch_of(8, 24)
    peaks = []
    for blocks in ("0-5", "3-5", "5"):
        sites = {f"{blocks}.{role}": LORA for role in ("query", "value", "ffn_up")}
        with attach(backbone, Configuration.from_dict({"sites": sites})):
            count = counter.count(batch, functional.cross_entropy)
            assert count.peak_bytes == pytest.approx(real(backbone, batch), rel=0.001)
            peaks.append(count.peak_bytes)
            parts = count.parameter_bytes + count.gradient_bytes + count.optimizer_bytes
            assert count.activation_bytes == count.peak_bytes - parts
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
def test_the_quick_way_agrees_whatever_was_counted_before(
    family: str, dropout: float, request: pytest.FixtureRequest
) -> None:
    options = {
        "tiny_bert": {"attention_probs_dropout_prob": dropout},
        "tiny_gpt2": {"attn_pdrop": dropout},
        "tiny_llama": {"attention_dropout": dropout},
    }
    backbone, batch = backbone_of(request.getfixturevalue(family)(**options[family])), batch_of()
    counter = MemoryCounter(backbone.model)
    space = PerLayer()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    configurations = [Configuration.from_dict({"sites": sites}) for sites in SITES.values()]
    configurations += [space.suggest(study.ask(), backbone) for _ in range(8)]
    candidates = [(FullFineTuning, Configuration()), *((Attachment, one) for one in configurations)]
    for kind, configuration in candidates:
        with kind(backbone, configuration):
            quick = counter.count_on_meta(Step(batch, functional.cross_entropy))
            assert quick == counter.count_on_fake(Step(batch, functional.cross_entropy))
            assert quick == counter.count(batch, functional.cross_entropy)
    assert counter._meta.seen
    assert all(counter._meta.seen.values())


def test_a_count_leaves_everything_as_it_was(tiny_bert: Any) -> None:
    backbone = backbone_of(tiny_bert())
    with attach(backbone, Configuration.from_dict({"sites": SITES["mixed"]})):
        before = {name: one.detach().clone() for name, one in backbone.model.named_parameters()}
        batch, was_training = batch_of(), backbone.model.training
        state = torch.get_rng_state()
        MemoryCounter(backbone.model).count(batch, functional.cross_entropy)
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
        full = counter.count(batch, functional.cross_entropy)
        mixed = counter.count(batch, functional.cross_entropy, precision="bf16-mixed")
    assert mixed.activation_bytes < full.activation_bytes
    assert mixed.parameter_bytes == full.parameter_bytes


def test_flops_of_a_linear_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, inputs: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.layer(inputs))

    batch = {"inputs": torch.zeros(4, 16), "labels": torch.zeros(4, dtype=torch.long)}
    assert count_flops(Model(), batch) == 2 * 4 * 16 * 8


def test_an_adapter_costs_flops(tiny_bert: Any) -> None:
    backbone, batch = backbone_of(tiny_bert()), batch_of()
    plain = count_flops(backbone.model, batch)
    with attach(backbone, Configuration.from_dict({"sites": SITES["series"]})):
        assert count_flops(backbone.model, batch) > plain


@pytest.mark.parametrize("fails", [False, True])
def test_replaced_functions_are_put_back(fails: bool) -> None:
    owners = (torch, torch.nn.functional, Tensor)
    before = [{name: one for name, one in vars(owner).items() if callable(one)} for owner in owners]
    mixed = MetaAutocast()
    with suppress(KeyError), mixed.casting():
        assert (torch.ones(2, 2, device="meta") @ torch.ones(2, 2, device="meta")).dtype == torch.bfloat16
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        if fails:
            raise KeyError
    assert [{name: one for name, one in vars(owner).items() if callable(one)} for owner in owners] == before
    assert (torch.ones(2, 2, device="meta") @ torch.ones(2, 2, device="meta")).dtype == torch.float32


def test_weighted_losses_are_counted(tiny_bert: Any) -> None:
    task = learnable_task(class_weights={"a": 3.0})
    backbone, batch = backbone_of(tiny_bert()), batch_of()
    counter = MemoryCounter(backbone.model)
    with attach(backbone, Configuration.from_dict({"sites": SITES["lora"]})):
        assert counter.count(batch, task.loss) == counter.count(batch, task.loss)
        counter.count(batch, task.loss, precision="bf16-mixed")
    assert counter._meta.seen
    assert all(counter._meta.seen.values())


def test_what_takes_data_is_refused_in_words(tiny_bert: Any) -> None:
    backbone, batch = backbone_of(tiny_bert()), batch_of()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels) * len(torch.unique_consecutive(labels))

    with (
        attach(backbone, Configuration.from_dict({"sites": SITES["lora"]})),
        pytest.raises(ValueError, match="leave peak_memory out of objectives"),
    ):
        MemoryCounter(backbone.model).count(batch, loss)


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
    counter = MemoryCounter(Scaled(shifted=shifted))
    batch = {"inputs": torch.zeros(64, 16), "labels": torch.zeros(64, dtype=torch.long)}
    slow = counter.count_on_fake(Step(batch, functional.cross_entropy))
    for _ in range(2):
        assert counter.count(batch, functional.cross_entropy) == slow
    # A meta tensor takes no vector from the CPU: such a model is counted on fake tensors.
    assert [*counter._meta.seen.values()] == [not shifted]
