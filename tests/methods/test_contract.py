"""The guarantees in the docstring of `autopeft.methods.Method`, for every method and architecture."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.methods import METHODS, Method, attach, count_parameters, count_site, placements
from autopeft.methods.base import Trainable
from autopeft.methods.layer_adapter import LayerMethod
from autopeft.methods.peft_family import PeftFamily
from autopeft.models.backbone import Backbone
from tests.every_method import METHODS_BY_DEFAULT, ON_STATE_SPACES, architecture_for
from tests.slow_cases import slow_cases
from tests.tiny_models import (
    LABELS,
    batch_of,
    draw_parameters,
    everywhere,
    fingerprint,
    logits_of,
    places,
    tiny_backbone,
)

ARCHITECTURES = (
    *("bert", "deberta-v2", "distilbert", "gpt2", "llama", "mamba", "modernbert", "roberta", "t5", "vit"),
)
IMPOSSIBLE = {
    ("bitfit", "llama"),
    ("bitfit", "modernbert"),
    ("bitfit", "t5"),
    ("prefix", "deberta-v2"),
    ("prefix", "t5"),
    *((method, "mamba") for method in ("compacter", "loreft", "parallel", "prefix", "series")),
}
"""No biases; no attention through transformers' interface; no attention and no ffn."""

ALONE = [name for name, method in METHODS.items() if not isinstance(method, PeftFamily)]
"""Methods with a file of their own; `test_peft_families.py` has those that are a row of `PEFT_FAMILIES`."""

LAYERS = ("bert", "gpt2", "llama")
"""Linear layers of both ways to store a weight, with and without biases: all that `LayerMethod` sees."""


def _by_default(method: str) -> tuple[str, ...]:
    """Return the architectures that a method is tried on without `make test-all`."""
    if method not in METHODS_BY_DEFAULT:
        return (architecture_for(method),)
    # DistilBERT, ModernBERT and RoBERTa are built as BERT is.
    return LAYERS if isinstance(METHODS[method], LayerMethod) else (*LAYERS, "deberta-v2", "t5")


PAIRS = [
    pytest.param(
        method,
        architecture,
        id=f"{method}-{architecture}",
        marks=pytest.mark.slow if architecture not in _by_default(method) else (),
    )
    for method in ALONE
    for architecture in (("jamba",) if method in ON_STATE_SPACES else ARCHITECTURES)
    if (method, architecture) not in IMPOSSIBLE
]


@pytest.fixture(scope="module")
def backbones() -> dict[str, Backbone]:
    """One backbone an architecture: tests detach what they attach."""
    return {architecture: tiny_backbone(architecture) for architecture in (*ARCHITECTURES, "jamba")}


def _attach_alone(
    backbone: Backbone, method: str, configuration: Configuration, undo: ExitStack
) -> Trainable:
    placement = placements(configuration, backbone.sites)[method]
    return METHODS[method].attach(backbone.model, placement, undo)


def test_every_specification_has_its_method() -> None:
    assert METHODS.keys() == METHOD_SPECS.keys()
    assert all(isinstance(method, Method) and method.name == name for name, method in METHODS.items())


@pytest.mark.parametrize(("method", "architecture"), sorted(IMPOSSIBLE))
def test_is_refused_where_it_cannot_sit(
    method: str, architecture: str, backbones: dict[str, Backbone]
) -> None:
    backbone = backbones[architecture]
    assert places(backbone, method) == []


@pytest.mark.parametrize(("method", "architecture"), PAIRS)
class TestMethod:
    def test_can_sit_in_every_block(
        self, method: str, architecture: str, backbones: dict[str, Backbone]
    ) -> None:
        backbone = backbones[architecture]
        # Jamba's second block has attention in the place of a state space.
        blocks = backbone.places[:1] if architecture == "jamba" else backbone.places
        assert {site.place for site in places(backbone, method)} == set(blocks)

    def test_count_is_what_torch_counts(
        self, method: str, architecture: str, backbones: dict[str, Backbone]
    ) -> None:
        backbone = backbones[architecture]
        configuration = everywhere(backbone, method, size=3)
        with ExitStack() as undo:
            trainable = _attach_alone(backbone, method, configuration, undo)
            assert {key for key in trainable if isinstance(key, Site)} == configuration.adapters.keys()
            for site, adapter in configuration:
                found = sum(
                    parameter.numel() for parameter in trainable[site].values() if parameter.requires_grad
                )
                assert count_site(backbone, site, adapter) == found > 0
            distinct = {
                id(tensor): tensor.numel()
                for named in trainable.values()
                for tensor in named.values()
                if tensor.requires_grad
            }
            assert sum(distinct.values()) == (
                count_parameters(backbone, configuration) - backbone.head_parameters
            )
            in_model = {id(parameter) for parameter in backbone.model.parameters()}
            assert distinct.keys() <= in_model

    def test_computes_the_same_right_after_attaching(
        self, method: str, architecture: str, backbones: dict[str, Backbone]
    ) -> None:
        backbone = backbones[architecture]
        before = logits_of(backbone)
        assert len(before) == LABELS
        configuration = everywhere(backbone, method, size=3)
        with ExitStack() as undo:
            _attach_alone(backbone, method, configuration, undo)
            after = logits_of(backbone)
        if not METHODS[method].starts_at_base:
            assert not torch.equal(after, before)
            assert (after - before).abs().max() < 1.0
        else:
            torch.testing.assert_close(after, before, rtol=0, atol=1e-6)

    def test_undo_leaves_what_was_there(self, method: str, architecture: str) -> None:
        backbone = tiny_backbone(architecture)  # fresh: no other test has left a trace in it
        before, logits = fingerprint(backbone.model), logits_of(backbone)
        undo = ExitStack()
        trainable = _attach_alone(backbone, method, everywhere(backbone, method), undo)
        assert fingerprint(backbone.model) != before
        for named in trainable.values():
            draw_parameters(
                (tensor for tensor in named.values() if isinstance(tensor, nn.Parameter)), std=1.0
            )
        assert not torch.equal(logits_of(backbone), logits)
        undo.close()
        backbone.model.requires_grad_(False)
        assert fingerprint(backbone.model) == before
        assert torch.equal(logits_of(backbone), logits)

    def test_every_site_takes_part(
        self, method: str, architecture: str, backbones: dict[str, Backbone]
    ) -> None:
        """Drawing the parameters of any one site alone changes what the model computes."""
        backbone = backbones[architecture]
        with attach(backbone, everywhere(backbone, method)) as attachment:
            shared = [parameter for name, parameter in attachment.parameters.items() if ".shared." in name]
            draw_parameters(shared, std=1.0)
            before = logits_of(backbone)
            for site in places(backbone, method):
                prefix = f"{site}.{method}."
                here = [
                    parameter for name, parameter in attachment.parameters.items() if name.startswith(prefix)
                ]
                kept = [parameter.detach().clone() for parameter in here]
                draw_parameters(here, std=1.0)
                # A bias on the keys shifts all scores of a query alike, which softmax takes out.
                if (method, site.role) not in {("bitfit", "key"), ("bitfit", "cross_key")}:
                    assert not torch.allclose(logits_of(backbone), before, rtol=0, atol=1e-6), site
                with torch.no_grad():
                    for parameter, value in zip(here, kept, strict=True):
                        parameter.copy_(value)
            torch.testing.assert_close(logits_of(backbone), before)

    def test_every_parameter_gets_a_gradient(
        self, method: str, architecture: str, backbones: dict[str, Backbone]
    ) -> None:
        backbone = backbones[architecture]
        with attach(backbone, everywhere(backbone, method)) as attachment:
            draw_parameters(attachment.parameters.values(), std=0.2)
            logits = backbone.model(**batch_of(architecture)).logits
            torch.nn.functional.cross_entropy(logits.flatten(1), torch.arange(LABELS)).backward()
            for name, parameter in attachment.parameters.items():
                assert parameter.grad is not None, name
                if "key.bitfit" not in name:
                    assert parameter.grad.abs().max() > 0, name
            trained = {id(parameter) for parameter in attachment.parameters.values()}
            assert {id(each) for each in backbone.model.parameters() if each.grad is not None} == trained


@pytest.mark.parametrize(
    "architecture", ["bert", "jamba", "llama", *slow_cases("gpt2", "mamba", "modernbert", "t5", "vit")]
)
def test_methods_attach_one_after_another(architecture: str, backbones: dict[str, Backbone]) -> None:
    """All methods that can share a site do, wrapping ones first, and come out again."""
    backbone = backbones[architecture]
    before, logits = fingerprint(backbone.model), logits_of(backbone)
    wrapping = {name for name in ALONE if METHOD_SPECS[name].wraps}
    for wrapper in sorted(wrapping):
        rivals = {"layernorm"} | METHOD_SPECS[wrapper].excludes | wrapping - {wrapper}
        placed: dict[Site, list[Adapter]] = {}
        for name in (name for name in ALONE if name not in rivals and places(backbone, name)):
            for site, adapter in everywhere(backbone, name, size=2):
                placed.setdefault(site, []).append(adapter)
        configuration = Configuration(placed)
        with attach(backbone, configuration) as attachment:
            found = sum(
                parameter.numel() for parameter in backbone.model.parameters() if parameter.requires_grad
            )
            assert found == count_parameters(backbone, configuration)
            draw_parameters(attachment.parameters.values(), std=0.2)
            backbone.model(**batch_of(architecture)).logits.sum().backward()
            assert all(parameter.grad is not None for parameter in attachment.parameters.values())
        assert fingerprint(backbone.model) == before
        assert torch.equal(logits_of(backbone), logits)
