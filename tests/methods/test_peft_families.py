"""What `autopeft.methods.Method` guarantees, for every family of peft's that is a row of `PEFT_FAMILIES`."""

from __future__ import annotations

import copy
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PeftType
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.peft_families import LEFT_OUT, PEFT_FAMILIES
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.export.export import export_adapter
from autopeft.export.merging import merged_model
from autopeft.export.verification import trained_logits
from autopeft.methods import METHODS, attach, count_parameters, count_site, obstacle
from autopeft.models.backbone import Backbone
from autopeft.models.head_spec import HeadSpec
from benchmarks.memory import measure_live_storage
from tests.exports import difference, export, trained
from tests.loss_task import CROSS_ENTROPY
from tests.slow_cases import slow_unless
from tests.tiny_models import (
    LABELS,
    batch_of,
    fingerprint,
    logits_of,
    tiny_backbone,
    tiny_batch,
    tiny_headed,
)

ROWS = {row.name: row for row in PEFT_FAMILIES}
NOT_ON_CONV1D = {"c3a", "delora", "glora", "hra", "loha", "lokr", "miss", "oft", "olora", "osf"} | {
    "peanut",
    "psoft",
    "road",
}
"""Families that peft has for `nn.Linear` alone, or that fail on GPT-2's Conv1D."""
DISTINCT = ("dora", "vera", "tinylora", "osf", "fourierft")
"""Families that differ in how state is kept: alone, shared or drawn again, from the weights."""


def pairs(*architectures: str, quick: Collection[str] = ROWS) -> list[Any]:
    """Return every family on architectures that it can sit on; quick ones run on BERT by default."""
    cases = [
        (name, architecture)
        for name in ROWS
        for architecture in architectures
        if architecture != "gpt2" or name not in NOT_ON_CONV1D
    ]
    return slow_unless(lambda name, architecture: architecture == "bert" and name in quick, cases)


every_pair = pytest.mark.parametrize(
    ("name", "architecture"), pairs("bert", "gpt2", "llama", "mamba", "t5", "vit")
)


@cache
def backbone_of(architecture: str) -> Backbone:
    """One backbone an architecture: tests detach what they attach."""
    if architecture == "t5-lm":
        head = HeadSpec(auto_class=AutoModelForSeq2SeqLM)
        return Backbone(tiny_headed(head, "t5"), None, name="tiny-t5-lm", head=(), auto_class=head.auto_class)
    return tiny_backbone(architecture)


def everywhere(backbone: Backbone, name: str) -> Configuration:
    """Return a family on all linear layers, of two sizes where it has sizes."""
    row = ROWS[name]
    low = 4 if row.sizes[0] == 1 else row.sizes[0]
    sizes = [None] if row.size_name is None else [low, 2 * low]
    sites = [site for site, shape in backbone.sites.items() if shape.kind == "linear"]
    sites = [site for site in sites if backbone.obstacle(backbone.shape(site), name) is None]
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
        logits = backbone.model.eval()(**batch).logits
        return torch.nn.functional.cross_entropy(logits.flatten(1), labels)

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
        optimizer = torch.optim.AdamW(own.values(), configuration.learning_rate * ROWS[name].rate)
        start = loss().item()
        for _ in range(10):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        assert loss().item() < start - 1e-3
        trained = {id(parameter) for parameter in attachment.parameters.values()}
        assert {id(each) for each in backbone.model.parameters() if each.grad is not None} == trained
    assert fingerprint(backbone.model) == before
    assert torch.equal(logits_of(backbone, batch), plain)


# T5's classifier looks for the end of a text among its numbers, which are not known beforehand.
@pytest.mark.parametrize(
    ("name", "architecture"), pairs("bert", "gpt2", "llama", "mamba", "t5-lm", "vit", quick=DISTINCT)
)
def test_memory_is_counted(name: str, architecture: str) -> None:
    backbone, batch = backbone_of(architecture), batch_of(architecture) | {"labels": torch.arange(LABELS)}
    if architecture == "t5-lm":
        batch["decoder_input_ids"] = batch["input_ids"]
    with attach(backbone, everywhere(backbone, name)):
        counted = MemoryCounter(backbone.model).count(batch, CROSS_ENTROPY)
        backbone.model.train()
        live = measure_live_storage(backbone.model, batch, CROSS_ENTROPY)
        backbone.model.eval()
    assert counted == pytest.approx(live, rel=0.01)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTINCT)
def test_loads_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    backbone.model.save_pretrained(tmp_path / "base")
    backbone.origin = str(tmp_path / "base")
    assert "fresh process" in export(backbone, everywhere(backbone, name), tmp_path / "out").checked


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
