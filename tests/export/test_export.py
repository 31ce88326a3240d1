"""Export: what is written, that it loads without us where it can, and that nothing is left changed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.export.export import export_adapter, load_adapter
from autopeft.export.folder_format import Manifest
from autopeft.export.verification import check_export, trained_logits
from autopeft.models.backbone import Backbone
from tests.exports import (
    TOLERANCE,
    all_methods,
    difference,
    expected_logits,
    export,
    lora_of_many_ranks,
    trained,
)
from tests.learnable import learnable_task, learner, tiny_evaluator
from tests.tiny_models import (
    everywhere,
    fingerprint,
    logits_of,
    places,
    tiny_backbone,
    tiny_batch,
    tiny_classifier,
    tiny_language_model,
    tiny_tokenizer,
)

QUESTIONS = ["How far is it from Denver to Aspen ?", "Who was Galileo ?", "What is an atom ?"]
LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


@pytest.fixture(scope="module")
def minilm(minilm_folder: Path) -> Backbone:
    """A real backbone with a new head of six labels."""
    names = dict(enumerate(LABELS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            minilm_folder, id2label=names, label2id={name: index for index, name in names.items()}
        )
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    origin = str(minilm_folder)
    return Backbone(model, tokenizer, name="minilm", head=("classifier",), origin=origin)


@pytest.fixture(scope="module")
def question_batch(minilm: Backbone) -> dict[str, Tensor]:
    return dict(minilm.processor(QUESTIONS, padding=True, return_tensors="pt"))


def test_there_is_nothing_to_export_of_the_untrained_model(tmp_path: Path) -> None:
    model, tokenizer = tiny_language_model("llama"), tiny_tokenizer()
    backbone = Backbone(model, tokenizer, name="tiny", head=())
    for target in (None, "merged"):
        with pytest.raises(ValueError, match="Nothing was trained: the untrained model is the base model"):
            export_adapter(backbone, Configuration(), {}, tmp_path / "out", probe=tiny_batch(), target=target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("methods", [("lora",), ("lora", "series", "layernorm")])
def test_adapter_bytes_are_those_of_the_tensors_on_disk(methods: tuple[str, ...], tmp_path: Path) -> None:
    evaluator = tiny_evaluator(learner())
    adapters: dict[Site, Any] = {}
    for method in methods:
        adapters |= everywhere(evaluator.backbone, method).adapters
    configuration = Configuration(adapters)
    state = trained(evaluator.backbone, configuration)
    export_adapter(
        evaluator.backbone, configuration, state, tmp_path / "out", probe=tiny_batch(), verify=False
    )
    files = (tmp_path / "out").rglob("*.safetensors")
    on_disk = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert evaluator.costs(configuration)["adapter_bytes"] == on_disk


@pytest.mark.slow
def test_lora_with_a_rank_a_layer_loads_with_plain_peft_in_a_fresh_process(
    minilm: Backbone, question_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    configuration = lora_of_many_ranks(minilm)
    state = trained(minilm, configuration, std=0.05)
    before = fingerprint(minilm.model)
    report = export_adapter(
        minilm, configuration, state, tmp_path / "lora", probe=question_batch, verify=False
    )
    assert fingerprint(minilm.model) == before

    expected = trained_logits(minilm, configuration, state, question_batch)
    untrained = logits_of(minilm, question_batch)
    assert float((expected - untrained).abs().max()) > 0.1

    save_file(question_batch, tmp_path / "batch.safetensors")
    script = "\n".join(
        [
            "import sys, torch",
            "from safetensors.torch import load_file, save_file",
            report.how_to_load,
            "assert 'autopeft' not in sys.modules",
            "with torch.no_grad():",
            "    logits = model(**load_file('batch.safetensors')).logits",
            f"assert tuple(model.config.id2label.values()) == {LABELS}",
            f"assert tokenizer('Who ?')['input_ids'] == {minilm.processor('Who ?')['input_ids']}",
            "save_file({'logits': logits}, 'logits.safetensors')",
        ]
    )
    run_python(script, tmp_path)
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    assert float((found - expected).abs().max()) <= TOLERANCE


def run_python(script: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_export_checks_itself_in_a_fresh_process(
    minilm: Backbone, question_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    configuration = everywhere(minilm, "ia3")
    state = trained(minilm, configuration)
    report = export_adapter(minilm, configuration, state, tmp_path / "ia3", probe=question_batch)
    assert report.max_logit_difference is not None
    assert report.max_logit_difference <= TOLERANCE
    assert "fresh process that never imported autopeft" in report.checked
    assert "PeftModel.from_pretrained" in str(report)
    assert os.listdir(tmp_path) == ["ia3"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["autopeft", "merged"])
def test_other_layouts_check_themselves_in_a_fresh_process(
    minilm: Backbone, question_batch: dict[str, Tensor], tmp_path: Path, target: str
) -> None:
    if target == "merged":
        linears = places(minilm, "lora")
        configuration = Configuration(
            {
                **{site: [Adapter("lora", 4), Adapter("bitfit")] for site in linears[::2]},
                **{site: [Adapter("ia3"), Adapter("bitfit")] for site in linears[1::2]},
                **dict.fromkeys(places(minilm, "layernorm"), Adapter("layernorm")),
            }
        )
    else:
        configuration = all_methods(minilm)
    state = trained(minilm, configuration, std=0.05)
    before = fingerprint(minilm.model)
    report = export_adapter(
        minilm, configuration, state, tmp_path / "out", probe=question_batch, target=target
    )
    assert fingerprint(minilm.model) == before
    assert report.max_logit_difference is not None
    assert report.max_logit_difference <= TOLERANCE
    assert "fresh process" in report.checked


@pytest.mark.slow
def test_a_base_that_changed_since_it_was_loaded_is_found_out(
    minilm_folder: Path, question_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder, num_labels=6)
    with torch.no_grad():
        model.base_model.embeddings.word_embeddings.weight.mul_(1.5)
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    backbone = Backbone(model, tokenizer, name="changed", head=("classifier",), origin=str(minilm_folder))
    configuration = lora_of_many_ranks(backbone)
    state = trained(backbone, configuration)
    with pytest.raises(RuntimeError, match="changed after it was loaded"):
        export_adapter(backbone, configuration, state, tmp_path / "out", probe=question_batch)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # peft, of every norm
@pytest.mark.parametrize("method", ["lora", "ia3", "layernorm"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "modernbert", "roberta"])
def test_one_method_is_a_folder_as_peft_writes_it(architecture: str, method: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(architecture)
    one_method = everywhere(backbone, method)
    configuration = lora_of_many_ranks(backbone) if method == "lora" else one_method
    before = fingerprint(backbone.model)
    folder = tmp_path / "ours"
    report = export(backbone, configuration, folder)
    assert report.max_logit_difference is not None
    assert report.max_logit_difference <= TOLERANCE
    assert fingerprint(backbone.model) == before
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(report.files)

    # peft, given the same config, writes the same keys; given our file, computes the same.
    config = PeftConfig.from_pretrained(str(folder))
    assert config.inference_mode
    assert set(config.modules_to_save or ()) == set(backbone.head)
    theirs = get_peft_model(tiny_classifier(architecture), config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    keys = [set(load_file(tmp_path / who / "adapter_model.safetensors")) for who in ("ours", "theirs")]
    assert keys[0] == keys[1]
    loaded = PeftModel.from_pretrained(tiny_classifier(architecture), str(folder)).eval()
    assert difference(loaded, tiny_batch(), expected_logits(backbone, configuration)) <= TOLERANCE


def test_files_of_one_configuration_are_the_same_every_time(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    for name in ("first", "second"):
        export(backbone, lora_of_many_ranks(backbone), tmp_path / name, verify=False)
    for file in ("adapter_config.json", "adapter_model.safetensors", "autopeft.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_only_safetensors_are_written(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    export(backbone, all_methods(backbone), tmp_path / "mixed", verify=False)
    export(backbone, everywhere(backbone, "lora"), tmp_path / "merged", target="merged", verify=False)
    suffixes = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert suffixes == {".safetensors", ".json", ".yaml", ".md"}


def test_weights_can_be_read_by_whoever_can_read_the_folder(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    configuration = everywhere(backbone, "lora")
    for target in ("peft", "merged"):
        folder = tmp_path / target
        export(backbone, configuration, folder, target=target, verify=False)
        modes = {file.stat().st_mode for file in folder.rglob("*") if file.is_file()}
        assert len(modes) == 1


def test_a_full_folder_is_left_alone(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    configuration = everywhere(backbone, "lora")
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        export(backbone, configuration, tmp_path)
    with pytest.raises(ValueError, match="other than an earlier export"):
        export(backbone, configuration, tmp_path, overwrite=True)
    assert (tmp_path / "diary.txt").read_text() == "mine"


def test_an_earlier_export_is_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    folder = tmp_path / "out"
    folder.mkdir()  # empty is as good as missing
    export(backbone, all_methods(backbone), folder, verify=False)
    with pytest.raises(ValueError, match="overwrite=True"):
        export(backbone, everywhere(backbone, "lora"), folder, verify=False)
    report = export(backbone, everywhere(backbone, "lora"), folder, overwrite=True, verify=False)
    assert set(report.files) == {str(file.relative_to(folder)) for file in folder.rglob("*")}
    assert "head.safetensors" not in report.files
    assert list(tmp_path.iterdir()) == [folder]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    configuration = everywhere(backbone, "ia3")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        export(backbone, configuration, file)
    with pytest.raises(ValueError, match="Cannot write in"):
        export(backbone, configuration, file / "out")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("autopeft.export.export.write_adapters", full)
    backbone = tiny_backbone("bert")
    with pytest.raises(ValueError, match=f"Cannot write in {tmp_path}: No space left on device"):
        export(backbone, everywhere(backbone, "lora"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_tensors_of_another_configuration_are_refused(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    state = trained(backbone, everywhere(backbone, "ia3"))
    with pytest.raises(ValueError, match="do not belong to this configuration"):
        export_adapter(backbone, everywhere(backbone, "lora"), state, tmp_path / "out", probe=tiny_batch())
    assert backbone.attached is None
    assert not list(tmp_path.iterdir())


def test_an_export_that_does_not_reproduce_the_model_leaves_nothing(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    configuration = everywhere(backbone, "lora")
    state = trained(backbone, configuration)
    state["head.classifier.bias"][0] = float("nan")
    with pytest.raises(RuntimeError, match="does not reproduce"):
        export_adapter(backbone, configuration, state, tmp_path / "out", probe=tiny_batch())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_the_check_notices_one_wrong_number(method: str, tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    configuration = everywhere(backbone, method)
    folder = tmp_path / "out"
    export(backbone, configuration, folder, verify=False)
    expected = expected_logits(backbone, configuration)
    manifest = Manifest.load(folder)
    check = check_export(folder, manifest, backbone, tiny_batch(), expected)
    assert check.difference <= TOLERANCE
    file = next(iter(folder.rglob("adapter*.safetensors")))
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1.0
    save_file(tensors, file)
    with pytest.raises(RuntimeError, match="does not reproduce"):
        check_export(folder, manifest, backbone, tiny_batch(), expected)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
def test_patterns_that_match_nothing_do_not_pass(tmp_path: Path) -> None:
    """Guard against what peft, by its version, ignores silently or with a warning."""
    backbone = tiny_backbone("bert")
    configuration = lora_of_many_ranks(backbone)
    folder = tmp_path / "out"
    export(backbone, configuration, folder, verify=False)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["alpha_pattern"] = {f"x{name}": alpha for name, alpha in config["alpha_pattern"].items()}
    file.write_text(json.dumps(config))
    expected = expected_logits(backbone, configuration)
    with pytest.raises(RuntimeError, match="does not reproduce"):
        check_export(folder, Manifest.load(folder), backbone, tiny_batch(), expected)


def test_a_stored_base_with_a_head_of_another_size_takes_the_saved_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored = tiny_classifier("bert", num_labels=5)
    stored.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    backbone = Backbone.load(tmp_path / "base", learnable_task().head)
    configuration = everywhere(backbone, "lora")
    export(backbone, configuration, tmp_path / "out", verify=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = load_adapter("~/base", "~/out")
    assert difference(loaded, tiny_batch(), expected_logits(backbone, configuration)) <= TOLERANCE
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_base_of_another_kind_is_refused(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    export(backbone, everywhere(backbone, "lora"), tmp_path / "out", verify=False)
    with pytest.raises(ValueError, match="got a dict"):
        load_adapter({}, tmp_path / "out")  # type: ignore[arg-type]
