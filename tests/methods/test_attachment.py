"""What `attach` promises whatever the configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.methods import METHODS, attach, count_parameters
from autopeft.models.backbone import Backbone
from tests.every_method import EVERY_METHOD, architecture_for
from tests.strategies import configurations_of
from tests.tiny_models import (
    LABELS,
    draw_parameters,
    everywhere,
    fingerprint,
    logits_of,
    tiny_backbone,
    tiny_batch,
    tiny_classifier,
    tiny_tokenizer,
)

ARCHITECTURES = ("bert", "distilbert", "gpt2", "llama", "modernbert")
BACKBONES = {architecture: tiny_backbone(architecture) for architecture in ARCHITECTURES}
"""One backbone an architecture for all examples: attaching leaves no trace, which is what is tested."""

TOO_LARGE = 2**50
"""No machine has the memory for an adapter of this size: attaching fails where it is built."""

property_test = settings(max_examples=25)


@st.composite
def placements(draw: st.DrawFn) -> tuple[Backbone, Configuration]:
    """Draw a backbone and a configuration for it."""
    backbone = BACKBONES[draw(st.sampled_from(ARCHITECTURES))]
    return backbone, draw(configurations_of(backbone))


@pytest.fixture
def backbone() -> Backbone:
    return tiny_backbone("bert")


MIXED = Configuration(
    {
        Site(0, "query"): Adapter("lora", 2),
        Site(0, "key"): [Adapter("ia3"), Adapter("bitfit")],
        Site(0, "attention"): [Adapter("series", 3), Adapter("parallel", 2), Adapter("prefix", 4)],
        Site(1, "value"): Adapter("lora", 5, {"rslora": False, "dropout": 0.1}),
        Site(1, "ffn_norm"): Adapter("layernorm"),
        Site(1, "ffn"): Adapter("series", 1),
    }
)


@property_test
@given(placements())
def test_the_predicted_count_is_what_torch_counts(drawn: tuple[Backbone, Configuration]) -> None:
    backbone, configuration = drawn
    predicted = count_parameters(backbone, configuration)
    total = backbone.parameters
    with attach(backbone, configuration) as attachment:
        trained = [parameter for parameter in backbone.model.parameters() if parameter.requires_grad]
        assert sum(parameter.numel() for parameter in trained) == predicted
        assert {id(parameter) for parameter in trained} == {
            id(parameter) for parameter in attachment.parameters.values()
        }
        for site, adapter in configuration:
            prefix = f"{site}.{adapter.method}."
            here = [parameter for name, parameter in attachment.parameters.items() if name.startswith(prefix)]
            assert sum(parameter.numel() for parameter in here) == (
                METHODS[adapter.method].count(backbone.shape(site), adapter)
            )
    assert sum(parameter.numel() for parameter in backbone.model.parameters()) == total


@property_test
@given(placements(), st.integers(0, 3))
def test_detaching_leaves_the_backbone_bit_identical(
    drawn: tuple[Backbone, Configuration], seed: int
) -> None:
    backbone, configuration = drawn
    before, logits = fingerprint(backbone.model), logits_of(backbone)
    with attach(backbone, configuration, seed) as attachment:
        draw_parameters(attachment.parameters.values(), std=0.5, seed=seed)
        loss = nn.functional.cross_entropy(backbone.model(**tiny_batch()).logits, torch.arange(LABELS))
        loss.backward()
        torch.optim.AdamW(attachment.parameters.values(), lr=0.1).step()
        assert not torch.equal(logits_of(backbone), logits)
    assert backbone.attached is None
    assert fingerprint(backbone.model) == before
    assert torch.equal(logits_of(backbone), logits)


@property_test
@given(placements())
def test_trained_tensors_read_back(drawn: tuple[Backbone, Configuration]) -> None:
    backbone, configuration = drawn
    with attach(backbone, configuration, seed=0) as attachment:
        draw_parameters(attachment.parameters.values(), std=0.5)
        trained, state = logits_of(backbone), attachment.state_dict()
    with attach(backbone, configuration, seed=1) as attachment:
        assert not torch.equal(logits_of(backbone), trained)
        attachment.load_state_dict(state)
        assert torch.equal(logits_of(backbone), trained)


@property_test
@given(placements())
def test_the_seed_decides_the_initial_weights(drawn: tuple[Backbone, Configuration]) -> None:
    backbone, configuration = drawn
    states = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(noise)  # the global generator must not matter
        expected_next = torch.rand(1)
        torch.manual_seed(noise)
        with attach(backbone, configuration, seed) as attachment:
            states.append(attachment.state_dict())
        assert torch.equal(torch.rand(1), expected_next)
    state, again, other = states
    assert state.keys() == again.keys() == other.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    random_methods = {"lora", "series", "parallel", "prefix"}
    if random_methods & set(configuration.methods):
        assert any(not torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("new_head", [False, True])
def test_a_new_head_is_drawn_for_every_seed(new_head: bool) -> None:
    backbone = tiny_backbone("distilbert", new_head=new_head)
    own = {name: parameter.detach().clone() for name, parameter in backbone.model.named_parameters()}
    heads = []
    for seed in (0, 0, 1):
        with attach(backbone, Configuration(), seed) as attachment:
            heads.append(attachment.state_dict())
    names = {f"head.{head}.{part}" for head in backbone.head for part in ("weight", "bias")}
    assert heads[0].keys() == names
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in names)
    weight = "head.classifier.weight"
    assert torch.equal(heads[0][weight], heads[2][weight]) is not new_head
    assert torch.equal(heads[0][weight], own["classifier.weight"]) is not new_head
    if new_head:
        assert heads[0]["head.classifier.bias"].abs().max() == 0
        std = float(backbone.model.config.initializer_range)
        assert float(heads[0]["head.pre_classifier.weight"].std()) == pytest.approx(std, rel=0.1)


def test_the_head_alone_is_trained_without_adapters(backbone: Backbone) -> None:
    with attach(backbone, Configuration()) as attachment:
        assert set(attachment.parameters) == {"head.classifier.weight", "head.classifier.bias"}
        trained = [name for name, parameter in backbone.model.named_parameters() if parameter.requires_grad]
        assert trained == ["classifier.weight", "classifier.bias"]


def test_training_the_head_leaves_the_backbones_own_alone(backbone: Backbone) -> None:
    before = fingerprint(backbone.model)
    with attach(backbone, Configuration()) as attachment:
        backbone.model(**tiny_batch()).logits.sum().backward()
        torch.optim.SGD(attachment.parameters.values(), lr=1.0).step()
    assert fingerprint(backbone.model) == before


@pytest.mark.parametrize("training", [False, True])
def test_adapters_take_over_the_models_mode(backbone: Backbone, training: bool) -> None:
    """Else dropout would be on in a model that is being evaluated."""
    backbone.model.train(training)
    before = {name for name, module in backbone.model.named_modules() if module.training}
    with attach(backbone, MIXED):
        modes = {module.training for module in backbone.model.modules()}
        assert modes == {training}
    assert {name for name, module in backbone.model.named_modules() if module.training} == before


def test_head_modules_may_lie_inside_each_other() -> None:
    model = tiny_classifier("deberta-v2")
    head = ("pooler", "pooler.dense", "classifier")
    backbone = Backbone(model, tiny_tokenizer(), name="nested", head=head)
    before = fingerprint(model)
    with attach(backbone, Configuration()) as attachment:
        found = sum(parameter.numel() for parameter in attachment.parameters.values())
        assert found == count_parameters(backbone, Configuration())
    assert fingerprint(model) == before


def test_names_of_trained_tensors_are_sites(backbone: Backbone) -> None:
    with attach(backbone, MIXED) as attachment:
        for name in attachment.parameters:
            place = name.split(".")
            assert place[0] == "head" or (
                Site(int(place[0]), place[1]) in MIXED.adapters and place[2] in METHODS
            )
        state = attachment.state_dict()
        assert list(state) == list(attachment.parameters)
        before = state["0.query.lora.lora_A.weight"].clone()
        draw_parameters(attachment.parameters.values(), std=1.0)
        assert torch.equal(state["0.query.lora.lora_A.weight"], before), "a copy, not a view"


def test_only_one_configuration_at_a_time(backbone: Backbone) -> None:
    with attach(backbone, MIXED):
        during = fingerprint(backbone.model)
        with pytest.raises(ValueError, match=r"tiny-bert already carries Configuration.*detach that one"):
            attach(backbone, Configuration())
        assert fingerprint(backbone.model) == during
        assert backbone.attached == MIXED
    with attach(backbone, Configuration()):
        assert backbone.attached == Configuration()


def test_detaching_twice_does_no_harm(backbone: Backbone) -> None:
    before = fingerprint(backbone.model)
    attachment = attach(backbone, MIXED)
    attachment.detach()
    attachment.detach()
    assert fingerprint(backbone.model) == before
    # Nor does detaching an old attachment while another one stands.
    with attach(backbone, MIXED):
        attachment.detach()
        assert backbone.attached == MIXED
        assert any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert fingerprint(backbone.model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_the_block_detaches(backbone: Backbone, error: type[BaseException]) -> None:
    before = fingerprint(backbone.model)
    with pytest.raises(error), attach(backbone, MIXED):
        raise error
    assert backbone.attached is None
    assert fingerprint(backbone.model) == before


@pytest.mark.parametrize(
    ("site", "method"),
    [
        (Site(1, "value"), "lora"),
        (Site(1, "ffn"), "series"),
        (Site(1, "ffn"), "parallel"),
        (Site(1, "attention"), "prefix"),
    ],
)
def test_an_error_while_attaching_leaves_nothing_behind(backbone: Backbone, site: Site, method: str) -> None:
    before, logits = fingerprint(backbone.model), logits_of(backbone)
    rivals = {site: [Adapter(method, TOO_LARGE)]}
    configuration = MIXED.replace(adapters={**MIXED.adapters, **rivals})
    with pytest.raises(RuntimeError):
        attach(backbone, configuration)
    assert backbone.attached is None
    assert fingerprint(backbone.model) == before
    assert torch.equal(logits_of(backbone), logits)
    with attach(backbone, MIXED):
        pass


@pytest.mark.parametrize(
    ("architecture", "site", "adapter", "message"),
    [
        ("bert", Site(2, "query"), Adapter("lora", 2), "no block 2.*its 2 blocks are numbered 0-1"),
        ("bert", Site(0, "ffn_gate"), Adapter("lora", 2), "nothing in the role 'ffn_gate' in block 0"),
        ("gpt2", Site(1, "query"), Adapter("lora", 2), "it has qkv, attention_output, ffn_up"),
        ("modernbert", Site(0, "attention_norm"), Adapter("layernorm"), "'attention_norm' in block 0"),
        ("llama", Site(0, "query"), Adapter("bitfit"), "'bitfit' cannot sit on 0.query.*has no bias"),
        (
            "deberta-v2",
            Site(0, "attention"),
            Adapter("prefix", 2),
            "'prefix' cannot sit on 0.attention.*does not compute attention through",
        ),
    ],
)
def test_sites_that_are_not_there_are_named(
    architecture: str, site: Site, adapter: Adapter, message: str
) -> None:
    backbone = tiny_backbone(architecture)
    before = fingerprint(backbone.model)
    configuration = Configuration({site: adapter})
    with pytest.raises(ValueError, match=message):
        attach(backbone, configuration)
    assert backbone.attached is None
    assert fingerprint(backbone.model) == before


def test_counting_a_site_that_is_not_there(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="no block 9"):
        count_parameters(backbone, Configuration({Site(9, "query"): Adapter("lora", 2)}))


def _without(state: dict[str, torch.Tensor]) -> None:
    del state["0.query.lora.lora_A.weight"]


def _with_another(state: dict[str, torch.Tensor]) -> None:
    state["0.value.lora.lora_A.weight"] = torch.zeros(2, 32)


def _of_another_shape(state: dict[str, torch.Tensor]) -> None:
    state["0.query.lora.lora_A.weight"] += 1  # must not be taken over either
    state["1.ffn.series.up.bias"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, "1 names differ, the first is 0.query.lora.lora_A.weight"),
        (_with_another, "1 names differ, the first is 0.value.lora.lora_A.weight"),
        (_of_another_shape, r"1.ffn.series.up.bias has the shape \(3,\), expected \(32,\)"),
    ],
)
def test_tensors_of_another_configuration_are_refused(
    backbone: Backbone, change: Callable[[Any], None], message: str
) -> None:
    with attach(backbone, MIXED) as attachment:
        state = attachment.state_dict()
        change(state)
        before = attachment.state_dict()
        with pytest.raises(ValueError, match=message):
            attachment.load_state_dict(state)
        after = attachment.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


@cache
def deep_backbone(architecture: str) -> Backbone:
    return tiny_backbone(architecture, num_hidden_layers=12)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_deep_networks(method: str) -> None:
    """Names of blocks 1 and 11 overlap; more than 20 target modules make peft shorten its patterns."""
    deep = deep_backbone(architecture_for(method))
    before = fingerprint(deep.model)
    configuration = everywhere(deep, method, size=2)
    chosen = {site: several for site, several in configuration.adapters.items() if site.block in (1, 10)}
    for part in (configuration, configuration.replace(adapters=chosen)):
        with attach(deep, part) as attachment:
            trained = sum(
                parameter.numel() for parameter in deep.model.parameters() if parameter.requires_grad
            )
            assert trained == count_parameters(deep, part)
            names = {name.rpartition(f".{method}.")[0] for name in attachment.parameters}
            if not METHODS[method].shares_state:  # else its sites may have nothing of their own
                assert names - {""} == {str(site) for site in part.adapters}
    assert fingerprint(deep.model) == before
