"""`autopeft.load_adapter`: everything that was exported comes back, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from autopeft.core.configuration import Configuration
from autopeft.export.folder_format import Manifest
from autopeft.export.loading import load_adapter
from autopeft.export.verification import base_options
from autopeft.models.backbone import Backbone
from tests.exports import (
    TOLERANCE,
    all_methods,
    difference,
    expected_logits,
    export,
)
from tests.tiny_models import (
    everywhere,
    fingerprint,
    logits_of,
    tiny_backbone,
    tiny_batch,
    tiny_classifier,
    tiny_model,
    tiny_tokenizer,
)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # peft, of every norm
def test_each_group_of_a_mixed_folder_loads_with_peft_alone(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    export(backbone, all_methods(backbone), tmp_path / "mixed", verify=False)
    for group in ("lora", "lora_2", "ia3", "layernorm"):
        folder = tmp_path / "mixed" / group
        saved = load_file(folder / "adapter_model.safetensors")
        loaded = PeftModel.from_pretrained(tiny_classifier("bert"), str(folder))
        parameters = dict(loaded.named_parameters())
        for key, tensor in saved.items():
            candidates = [key.replace(".weight", ".default.weight"), f"{key}.default"]
            candidates.append(key.replace(".bias", ".default.bias"))
            found = next(parameters[name] for name in candidates if name in parameters)
            assert torch.equal(found, tensor)


def test_a_head_alone_comes_back(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    configuration = Configuration()
    report = export(backbone, configuration, tmp_path / "head")
    assert "head.safetensors" in report.files
    model = load_adapter(tiny_classifier("bert", seed=0), tmp_path / "head")
    expected = expected_logits(backbone, configuration)
    assert difference(model, tiny_batch(), expected) <= TOLERANCE
    assert float((expected - logits_of(backbone)).abs().max()) > 0.01


@pytest.mark.parametrize("methods", [("lora",), ("lora", "prefix")])
def test_a_base_without_a_head_gets_the_saved_one(methods: tuple[str, ...], tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    adapters = {
        site: adapter
        for method in methods
        for site, several in everywhere(backbone, method).adapters.items()
        for adapter in several
    }
    configuration = Configuration(adapters)
    export(backbone, configuration, tmp_path / "out", verify=False)
    bare: Any = tiny_model("bert")
    bare.load_state_dict(backbone.model.base_model.state_dict(), strict=False)
    state = torch.get_rng_state()
    model: Any = load_adapter(bare, tmp_path / "out")
    assert torch.equal(state, torch.get_rng_state())
    assert difference(model, tiny_batch(), expected_logits(backbone, configuration)) <= TOLERANCE
    assert model.config.id2label == backbone.model.config.id2label


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_all_methods_at_once_come_back(architecture: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(architecture)
    configuration = all_methods(backbone)
    before = fingerprint(backbone.model)
    report = export(backbone, configuration, tmp_path / "mixed")
    assert report.max_logit_difference is not None
    assert report.max_logit_difference <= TOLERANCE
    assert fingerprint(backbone.model) == before
    names = {name.partition("/")[0] for name in report.files}
    assert {"lora", "lora_2", "ia3", "layernorm", "series", "parallel", "prefix"} <= names
    assert {"head.safetensors", "autopeft.json", "autopeft_configuration.yaml", "README.md"} <= names
    assert Configuration.load(tmp_path / "mixed" / "autopeft_configuration.yaml") == configuration

    expected = expected_logits(backbone, configuration)
    model = load_adapter(tiny_classifier(architecture), tmp_path / "mixed")
    assert difference(model, tiny_batch(), expected) <= TOLERANCE
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("method", "size"), [("unilora", 4096), ("vera", 1024)])
def test_sizes_beyond_a_layers_widths_come_back(method: str, size: int, tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    configuration = everywhere(backbone, method, size)
    export(backbone, configuration, tmp_path / "out", verify=False)
    model = load_adapter(tiny_classifier("bert"), tmp_path / "out")
    assert difference(model, tiny_batch(), expected_logits(backbone, configuration)) < TOLERANCE


def test_loading_says_what_does_not_fit(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    folder = tmp_path / "out"
    export(backbone, all_methods(backbone), folder, verify=False)
    with pytest.raises(ValueError, match=r"no autopeft\.json"):
        load_adapter(tiny_classifier("bert"), tmp_path)
    with pytest.raises(ValueError, match="load it with num_labels=3"):
        load_adapter(tiny_classifier("bert", num_labels=5), folder)
    with pytest.raises(ValueError, match="not the base the adapter was trained on"):
        load_adapter(tiny_classifier("llama"), folder)
    with pytest.raises(ValueError, match="not the base the adapter was trained on"):
        load_adapter(tiny_classifier("bert", hidden_size=64), folder)
    with pytest.raises(ValueError, match="Cannot load the backbone"):
        load_adapter(tmp_path / "nothing", folder)
    twice: Any = load_adapter(tiny_classifier("bert"), folder)
    with pytest.raises(ValueError, match="already carries adapters"):
        load_adapter(twice, folder)
    (folder / "head.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"head\.safetensors is damaged"):
        load_adapter(tiny_classifier("bert"), folder)
    (folder / "head.safetensors").unlink()
    with pytest.raises(ValueError, match="is not complete"):
        load_adapter(tiny_classifier("bert"), folder)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_that_is_missing_is_never_asked_of_the_hub(
    file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder such as "adapters/rte" has the form of a name on the hub: anyone could have taken it."""
    monkeypatch.chdir(tmp_path)
    backbone = tiny_backbone("bert")
    export(backbone, everywhere(backbone, "lora"), Path("adapters/rte"), verify=False)
    Path("adapters/rte", file).unlink()

    def asked(*_: object, **__: object) -> None:
        pytest.fail("The hub was asked.")

    for name in ("huggingface_hub.hf_hub_download", "peft.utils.save_and_load.hf_hub_download"):
        monkeypatch.setattr(name, asked)
    with pytest.raises(ValueError, match=f"{file} is missing: the exported folder is not complete"):
        load_adapter(tiny_classifier("bert"), "adapters/rte")


def test_a_shallower_base_is_refused_where_peft_would_skip_layers(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    export(backbone, everywhere(backbone, "lora"), tmp_path / "out", verify=False)
    with pytest.raises(ValueError, match="has no module"):
        load_adapter(tiny_classifier("bert", num_hidden_layers=1), tmp_path / "out")


def test_a_merged_folder_says_how_to_load_it(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    export(backbone, everywhere(backbone, "lora"), tmp_path / "out", target="merged", verify=False)
    with pytest.raises(ValueError, match="AutoModelForSequenceClassification"):
        load_adapter(tiny_classifier("bert"), tmp_path / "out")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    export(backbone, everywhere(backbone, "lora"), tmp_path / "out", verify=False)
    file = tmp_path / "out" / "autopeft.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        load_adapter(tiny_classifier("bert"), tmp_path / "out")


def test_manifest_comes_back(tmp_path: Path) -> None:
    backbone = tiny_backbone("gpt2")
    configuration = everywhere(backbone, "lora")
    export(backbone, configuration, tmp_path / "out", verify=False, base="somebody/model")
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.base == "somebody/model"
    assert manifest.sites == {site: backbone.shape(site) for site in configuration.adapters}
    assert manifest.head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options_name_what_the_stored_base_does_not_say(dtype: torch.dtype, tmp_path: Path) -> None:
    stored: Any = tiny_classifier("llama", pad_token_id=None)
    stored.to(dtype).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model.config.pad_token_id = 0
    origin = str(tmp_path / "base")
    backbone = Backbone(model, tiny_tokenizer(), name="tiny", head=("score",), origin=origin)
    export(backbone, everywhere(backbone, "lora"), tmp_path / "out", verify=False)
    options = base_options(Manifest.load(tmp_path / "out"), origin)
    expected = {"num_labels": 3, "pad_token_id": 0}
    assert options == expected | ({} if dtype == torch.float32 else {"dtype": "float32"})
    loaded = load_adapter(origin, tmp_path / "out")
    assert loaded.dtype == torch.float32
    assert loaded.config.pad_token_id == 0
