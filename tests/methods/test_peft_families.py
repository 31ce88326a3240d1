"""What `autopeft.methods.Method` guarantees, for every family of peft's that is a row of `PEFT_FAMILIES`."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PeftType
from torch import Tensor
from transformers import AutoModelForImageClassification

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.peft_families import LEFT_OUT, PEFT_FAMILIES
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.export.export import export_adapter
from autopeft.export.merging import merged_model
from autopeft.export.verification import trained_logits
from autopeft.methods import METHODS, attach, count_parameters, count_site, obstacle
from autopeft.models.backbone import Backbone
from autopeft.models.head_spec import HeadSpec
from tests.exports import difference, trained
from tests.loss_task import CROSS_ENTROPY
from tests.tiny_models import LABELS, fingerprint, logits_of, tiny_backbone, tiny_batch, tiny_headed

ROWS = {row.name: row for row in PEFT_FAMILIES}
ARCHITECTURES = ("bert", "gpt2", "llama", "t5", "vit")
NOT_ON_CONV1D = {"c3a", "delora", "glora", "hra", "loha", "lokr", "miss", "oft", "olora", "osf"} | {
    "peanut",
    "psoft",
    "road",
}
"""Families that peft has for `nn.Linear` alone, or that fail on GPT-2's Conv1D."""

PAIRS = [
    pytest.param(name, architecture, marks=() if architecture == "bert" else pytest.mark.slow)
    for name in ROWS
    for architecture in ARCHITECTURES
    if architecture != "gpt2" or name not in NOT_ON_CONV1D
]
every_pair = pytest.mark.parametrize(("name", "architecture"), PAIRS)


@cache
def backbone_of(architecture: str) -> Backbone:
    """One backbone an architecture: tests detach what they attach."""
    if architecture != "vit":
        return tiny_backbone(architecture)
    head = HeadSpec(auto_class=AutoModelForImageClassification, config={"num_labels": LABELS})
    return Backbone(
        tiny_headed(head, "vit"),
        None,
        name="tiny-vit",
        head=("classifier",),
        new_head=False,
        auto_class=head.auto_class,
    )


def batch_of(architecture: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    return pixels if architecture == "vit" else tiny_batch()


def everywhere(backbone: Backbone, name: str) -> Configuration:
    """Return a family on all linear layers, of two sizes where it has sizes."""
    row = ROWS[name]
    low = 4 if row.sizes[0] == 1 else row.sizes[0]
    sizes = [None] if row.size_name is None else [low, 2 * low]
    sites = [site for site, shape in backbone.sites.items() if shape.kind == "linear"]
    return Configuration(
        {site: Adapter(name, sizes[index % len(sizes)]) for index, site in enumerate(sites)},
        learning_rate=3e-3,
    )


@pytest.mark.parametrize("name", sorted(NOT_ON_CONV1D))
def test_says_why_it_cannot_sit_on_conv1d(name: str) -> None:
    backbone = backbone_of("gpt2")
    site, adapter = next(iter(everywhere(backbone, name)))
    assert obstacle(backbone, site, adapter)
    with pytest.raises(ValueError, match=f"'{name}' cannot sit on {site} of tiny-gpt2: "):
        attach(backbone, Configuration({site: adapter}))


def test_every_type_of_the_installed_peft_is_known() -> None:
    """A new one wants a row of `PEFT_FAMILIES` or a reason in `LEFT_OUT`."""
    others = {PeftType.LORA, PeftType.IA3, PeftType.LN_TUNING}  # methods with a file of their own
    known = (
        {PeftType[row.peft_type] for row in PEFT_FAMILIES} | others | {PeftType[name] for name in LEFT_OUT}
    )
    assert known == set(PEFT_TYPE_TO_CONFIG_MAPPING)


@every_pair
def test_is_counted_trained_and_taken_out(name: str, architecture: str) -> None:
    backbone, batch = backbone_of(architecture), batch_of(architecture)
    configuration = everywhere(backbone, name)
    before, plain = fingerprint(backbone.model), logits_of(backbone, batch)
    labels = torch.arange(LABELS)

    def loss() -> Tensor:
        return torch.nn.functional.cross_entropy(backbone.model.eval()(**batch).logits, labels)

    with attach(backbone, configuration) as attachment:
        if METHODS[name].starts_at_base:
            torch.testing.assert_close(logits_of(backbone, batch), plain, rtol=0, atol=1e-4)
        own = {
            key: parameter for key, parameter in attachment.parameters.items() if not key.startswith("head.")
        }
        counted = count_parameters(backbone, configuration) - backbone.head_parameters
        assert sum(map(Tensor.numel, own.values())) == counted
        for site, adapter in configuration:
            here = [parameter for key, parameter in own.items() if key.startswith(f"{site}.{name}.")]
            assert sum(map(Tensor.numel, here)) == count_site(backbone, site, adapter)
            assert here or METHODS[name].shares_state
        backbone.model.train()
        if architecture != "t5":  # whose classifier looks for the end of a text among its numbers
            assert MemoryCounter(backbone.model).count(batch | {"labels": labels}, CROSS_ENTROPY) > 0
        optimizer = torch.optim.AdamW(own.values(), configuration.learning_rate * ROWS[name].rate)
        start = loss().item()
        for _ in range(10):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        assert loss().item() < start - 1e-3
        assert all(parameter.grad is not None for parameter in own.values())
        assert all(
            parameter.grad is None for parameter in backbone.model.parameters() if not parameter.requires_grad
        )
    assert fingerprint(backbone.model) == before
    assert torch.equal(logits_of(backbone, batch), plain)


@every_pair
def test_sizes_that_differ_are_exported_and_merged(name: str, architecture: str, tmp_path: Path) -> None:
    backbone, batch = backbone_of(architecture), batch_of(architecture)
    configuration = everywhere(backbone, name)
    before = fingerprint(backbone.model)
    state = trained(backbone, configuration, std=0.03)
    # Loads it on a copy of the base, by peft where one config holds all, and compares logits.
    report = export_adapter(backbone, configuration, state, tmp_path / "out", probe=batch, fresh=False)
    assert report.max_logit_difference is not None
    if METHODS[name].is_mergeable:
        expected = trained_logits(backbone, configuration, state, batch)
        merged = merged_model(backbone, configuration, state).eval()
        assert difference(merged, batch, expected) <= 1e-3
    assert fingerprint(backbone.model) == before


@pytest.mark.filterwarnings("ignore:Specified to not", "ignore:Found missing adapter keys")
@pytest.mark.parametrize("name", ROWS)
def test_one_size_is_a_folder_that_peft_loads(name: str, tmp_path: Path) -> None:
    backbone = backbone_of("bert")
    _, adapter = next(iter(everywhere(backbone, name)))
    configuration = Configuration({Site(0, "ffn_down"): adapter, Site(1, "query"): adapter})
    state = trained(backbone, configuration, std=0.03)
    export_adapter(backbone, configuration, state, tmp_path / "out", probe=tiny_batch(), verify=False)
    model = PeftModel.from_pretrained(copy.deepcopy(backbone.model), tmp_path / "out").eval()
    expected = trained_logits(backbone, configuration, state, tiny_batch())
    assert difference(model, tiny_batch(), expected) <= 1e-4
