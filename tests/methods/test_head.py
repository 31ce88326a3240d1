"""A new head is drawn anew for every seed, whatever it consists of."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from autopeft.core.configuration import Configuration
from autopeft.methods import FullFineTuning, attach
from autopeft.models.backbone import Backbone
from tests.tiny_models import (
    LABELS,
    draw_parameters,
    everywhere,
    fingerprint,
    tiny_backbone,
    tiny_classifier,
    tiny_language_model,
    tiny_tokenizer,
)


class Scaled(nn.Module):
    """A module with parameters of its own and no rule to draw them by."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, 4, 32))
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.scale + self.tokens.mean()


class Twice(nn.Bilinear):
    """A module whose own rule is not that of a linear layer."""

    def __init__(self) -> None:
        super().__init__(32, 32, 32)

    def forward(self, hidden: Tensor, _: Tensor | None = None) -> Tensor:
        return super().forward(hidden, hidden)


def backbone_with(head: nn.Module, *, new_head: bool) -> Backbone:
    model = tiny_classifier("bert")
    model.classifier = head
    draw_parameters(head.parameters(), std=0.5, seed=7)  # as a head that somebody has trained
    return Backbone(model, tiny_tokenizer(), name="tiny", head=["classifier"], new_head=new_head)


def head_of(backbone: Backbone, seed: int) -> Mapping[str, Tensor]:
    with attach(backbone, Configuration(), seed=seed) as attachment:
        return attachment.state_dict()


def test_every_module_of_a_new_head_is_drawn_for_every_seed() -> None:
    head = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), Scaled(), Twice(), nn.Linear(32, LABELS))
    backbone = backbone_with(head, new_head=True)
    before = fingerprint(backbone.model)
    first, again, other = (head_of(backbone, seed) for seed in (0, 0, 1))
    assert fingerprint(backbone.model) == before
    assert all(torch.equal(values, again[name]) for name, values in first.items())
    differing = {
        name.removeprefix("head.classifier.") for name in first if not first[name].equal(other[name])
    }
    assert differing == {"0.weight", "2.tokens", "3.weight", "3.bias", "4.weight"}
    std = float(backbone.model.config.initializer_range)
    for name in ("0.weight", "2.tokens", "4.weight"):
        assert 0.5 * std < first[f"head.classifier.{name}"].std() < 1.5 * std
    for name, value in (("0.bias", 0), ("1.weight", 1), ("1.bias", 0), ("4.bias", 0)):
        assert first[f"head.classifier.{name}"].unique().tolist() == [value]
    assert torch.equal(first["head.classifier.2.scale"], head.get_parameter("2.scale"))
    bound = 1 / 32**0.5
    assert 0.9 * bound < first["head.classifier.3.weight"].abs().max() <= bound


def test_a_head_that_was_trained_is_left_as_it_is() -> None:
    backbone = backbone_with(nn.Sequential(nn.Linear(32, 32), Twice(), nn.Linear(32, LABELS)), new_head=False)
    own = backbone.model.get_submodule("classifier").state_dict()
    for name, values in head_of(backbone, 3).items():
        assert torch.equal(values, own[name.removeprefix("head.classifier.")])


@pytest.mark.parametrize(
    ("architecture", "last"),
    [
        ("bert", "classifier"),
        ("deberta-v2", "classifier"),
        ("distilbert", "classifier"),
        ("llama", "score"),
        ("modernbert", "classifier"),
        ("roberta", "classifier.out_proj"),
        ("t5", "classification_head.out_proj"),
    ],
)
def test_the_last_layer_can_be_trained_alone(architecture: str, last: str) -> None:
    backbone = tiny_backbone(architecture, new_head=True)
    whole = head_of(backbone, 5)
    backbone.train_head("last")
    before = fingerprint(backbone.model)
    layer = {f"{last}.{name}": each for name, each in backbone.model.get_submodule(last).named_parameters()}
    assert backbone.trained_head == (last,)
    assert backbone.head_parameters == sum(parameter.numel() for parameter in layer.values())
    with attach(backbone, everywhere(backbone, "layernorm"), seed=5) as attachment:
        trained = {name for name, each in backbone.model.named_parameters() if each.requires_grad}
        heads = tuple(f"{head}." for head in backbone.head)
        assert {name for name in trained if name.startswith(heads)} == layer.keys()
        assert sum(each.requires_grad for each in attachment.parameters.values()) == len(trained)
        state = attachment.state_dict()
    for name, values in whole.items():
        assert torch.equal(state[name], values), (
            "what is trained of a head changes nothing in how it is drawn"
        )
    with FullFineTuning(backbone, Configuration()) as attachment:
        assert attachment.trainable_parameters == backbone.parameters
        assert all(parameter.requires_grad for parameter in backbone.model.parameters())
    assert fingerprint(backbone.model) == before
    backbone.train_head("whole")
    assert backbone.head_parameters == sum(values.numel() for values in whole.values())


def test_a_head_without_a_layer_of_labels_is_refused() -> None:
    backbone = backbone_with(nn.Sequential(nn.Linear(32, LABELS + 1)), new_head=True)
    with pytest.raises(ValueError, match=rf"with a layer of {LABELS} outputs, which Bert.* use head='whole'"):
        backbone.train_head("last")
    language_model = Backbone(tiny_language_model("llama"), tiny_tokenizer(), name="tiny", head=())
    with pytest.raises(ValueError, match=r"needs a trained head .*Llama.* use head='pretrained'"):
        language_model.train_head("last")
