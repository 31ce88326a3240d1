"""An adapter folder from a stranger executes nothing, takes no memory out of proportion, and is refused."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.export.folder_format import AdapterFiles
from autopeft.export.loading import load_adapter
from tests.exports import all_methods, export
from tests.tiny_models import everywhere, fingerprint, logits_of, tiny_backbone, tiny_batch, tiny_classifier

Attack = Callable[[Path], object]
GIB = 2**30


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return folders: "peft" of LoRA, "drawn" and "hadamard" of one adapter, "mixed" of every method."""
    root = tmp_path_factory.mktemp("exports")
    backbone = tiny_backbone("bert")
    export(backbone, everywhere(backbone, "lora"), root / "peft", verify=False)
    export(backbone, all_methods(backbone), root / "mixed", verify=False)
    for name, adapter in {"drawn": Adapter("vera", 16), "hadamard": Adapter("loha", 2)}.items():
        export(backbone, Configuration({Site(0, "query"): adapter}), root / name, verify=False)
    return root


def manifest(**changes: Any) -> Attack:
    """Change fields of the manifest; those of the head by "head.…"."""

    def attack(folder: Path) -> None:
        file = folder / "autopeft.json"
        data = json.loads(file.read_text())
        for name, value in changes.items():
            place = data["head"] if name.startswith("head_") else data
            place[name.removeprefix("head_")] = value
        file.write_text(json.dumps(data))

    return attack


def shape(**changes: Any) -> Attack:
    """Change what the manifest says of every site."""

    def attack(folder: Path) -> None:
        file = folder / "autopeft.json"
        data = json.loads(file.read_text())
        for of_site in data["sites"].values():
            of_site.update(changes)
        file.write_text(json.dumps(data))

    return attack


def configuration(text: str) -> Attack:
    return lambda folder: (folder / "autopeft_configuration.yaml").write_text(text)


def resized(size: int) -> Attack:
    """Make every adapter that large."""

    def attack(folder: Path) -> None:
        file = folder / "autopeft_configuration.yaml"
        known = Configuration.load(file)
        grown = {
            site: [
                Adapter(adapter.method, adapter.size and size, dict(adapter.options)) for adapter in several
            ]
            for site, several in known.adapters.items()
        }
        known.replace(adapters=grown).save(file)

    return attack


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Attack:
    def attack(folder: Path) -> None:
        known = load_file(folder / file)
        change(known)
        save_file(known, folder / file)

    return attack


def replaces(name: str, like: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """Put a tensor of ones under a name in the place of another."""
    return lambda known: known.update({name: torch.ones_like(known.pop(like))})


def put(name: str, tensor: torch.Tensor) -> Attack:
    """Put a tensor of a peft adapter into a folder, at the query of the first block."""
    full = f"base_model.model.bert.encoder.layer.0.attention.self.query.{name}"

    def attack(folder: Path) -> None:
        (file,) = {*folder.glob("adapter_model.safetensors"), *folder.glob("lora/adapter_model.safetensors")}
        tensors(str(file.relative_to(folder)), lambda known: known.update({full: tensor}))(folder)

    return attack


def both(*attacks: Attack) -> Attack:
    return lambda folder: [attack(folder) for attack in attacks]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{after}: &{after} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
SEEN: dict[str, Attack] = {
    "a tensor below a site": put("zzz", torch.ones(32)),
    "a tensor below an adapter": put("lora_A.zzz.weight", torch.ones(32)),
    "a tensor of another shape": put("lora_A.weight", torch.ones(32, 3)),
}
"""What the headers of files show."""
ATTACKS: dict[str, tuple[str, Attack]] = {
    "no JSON": ("peft", lambda folder: (folder / "autopeft.json").write_text("{")),
    "JSON that is a list": ("peft", lambda folder: (folder / "autopeft.json").write_text("[]")),
    "deep JSON": ("peft", lambda folder: (folder / "autopeft.json").write_text("[" * 10**6)),
    "large JSON": ("peft", lambda folder: (folder / "autopeft.json").write_text(" " * 10**7)),
    "no head": ("peft", manifest(head=None)),
    "a head without fields": ("peft", manifest(head={})),
    "sites as a list": ("peft", manifest(sites=[])),
    "no site": ("peft", manifest(sites={})),
    "a stack of a billion blocks": ("peft", manifest(blocks={"": 10**9})),
    "a stack of fewer than no blocks": ("peft", manifest(blocks={"": -1})),
    "unknown layout": ("mixed", manifest(layout="anything")),
    "another layout": ("mixed", manifest(layout="peft")),
    "labels that are numbers": ("peft", manifest(head_labels=[1, 2, 3])),
    "a million labels": ("peft", manifest(head_labels=[str(n) for n in range(300_000)])),
    "a million labels, no head": (
        "peft",
        manifest(head_labels=[str(n) for n in range(300_000)], head_modules=[]),
    ),
    "a head that is the whole model": ("mixed", manifest(head_modules=[""])),
    "a head that is a block": ("mixed", manifest(head_modules=["bert.encoder.layer.0"])),
    "a head that holds the blocks": ("mixed", manifest(head_modules=["bert"])),
    "a head that is not there": ("mixed", manifest(head_modules=["nothing"])),
    "code as the auto class": ("peft", manifest(head_auto_class="pipeline")),
    "sites that are wider": ("mixed", shape(in_features=10**12)),
    "sites elsewhere": ("mixed", shape(module="classifier")),
    "a shape without fields": ("mixed", manifest(sites={"0.query": {}})),
    "bombs of aliases": ("peft", configuration(f"{BOMB}sites: *i\n")),
    "bombs of merged keys": ("peft", configuration(f"{MERGED_BOMB}sites: *i\n")),
    "aliases to itself": ("peft", configuration("sites: &a [*a]\n")),
    "deep YAML": ("peft", configuration("[" * 10_000)),
    "a YAML object": ("peft", configuration("!!python/object/apply:os.system [touch executed]\n")),
    "a YAML timestamp": ("peft", configuration("sites: 99-99-99\n")),
    "billions of sites": (
        "peft",
        configuration("sites:\n" + "".join(f"  s{n}.0-4095.query: {{method: ia3}}\n" for n in range(10_000))),
    ),
    "huge ranks of LoRA alone": ("peft", resized(10**9)),
    "huge sizes of all methods": ("mixed", resized(10**9)),
    "somewhat larger sizes": ("mixed", resized(1000)),
    "small vectors between huge matrices that are drawn": (
        "drawn",
        both(resized(600_000), put("vera_lambda_d", torch.ones(600_000))),
    ),
    "a vector for huge matrices that peft would make to count them": (
        "hadamard",
        both(resized(4_000_000), put("zzz", torch.ones(4_000_000))),
    ),
    **{
        f"{name}, {layout}": (layout, attack) for name, attack in SEEN.items() for layout in ("peft", "mixed")
    },
    "a missing head": ("mixed", lambda folder: (folder / "head.safetensors").unlink()),
    "a tensor too much": ("mixed", tensors("head.safetensors", replaces("pooler.x", "classifier.bias"))),
    "weights of the base": (
        "mixed",
        tensors("head.safetensors", lambda known: known.update({"bert.pooler.dense.bias": torch.ones(32)})),
    ),
    "weights below an adapter": (
        "peft",
        tensors(
            "adapter_model.safetensors",
            replaces(
                "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight",
                "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight",
            ),
        ),
    ),
    "weights beside an adapter": (
        "peft",
        tensors(
            "adapter_model.safetensors",
            lambda known: known.update({"base_model.model.bert.pooler.dense.bias": torch.ones(32)}),
        ),
    ),
    "NaN": (
        "peft",
        tensors("adapter_model.safetensors", lambda known: next(iter(known.values())).fill_(torch.nan)),
    ),
    "a header that lies": (
        "mixed",
        lambda folder: (folder / "head.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}"),
    ),
    "a pipe": ("peft", lambda folder: as_pipe(folder / "autopeft_configuration.yaml")),
    "a device": ("peft", lambda folder: as_link(folder / "autopeft_configuration.yaml", "/dev/zero")),
    "a device of tensors": ("mixed", lambda folder: as_link(folder / "head.safetensors", "/dev/zero")),
    "pickled tensors alone": ("peft", lambda folder: as_pickle(folder)),
}


def as_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def as_link(file: Path, target: str) -> None:
    file.unlink()
    file.symlink_to(target)


class Executed:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Executed()))


@contextmanager
def memory_within(more: int) -> Iterator[None]:
    """Let this process have so many bytes of addresses more than it has now: an excess is a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_folder_is_refused_with_one_sentence(
    name: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, attack = ATTACKS[name]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders / layout, "folder")
    attack(Path("folder"))
    before = sorted(Path().rglob("*"))
    base: Any = tiny_classifier("bert")
    weights = fingerprint(base)
    with memory_within(GIB), pytest.raises(ValueError, match=r".") as found:
        load_adapter(base, "folder")
    assert len(str(found.value)) < 1000
    assert sorted(Path().rglob("*")) == before, "something was executed or written"
    assert fingerprint(base) == weights


@pytest.mark.parametrize("layout", ["peft", "mixed"])
@pytest.mark.parametrize("name", SEEN)
def test_tensors_that_the_headers_show_to_be_foreign_are_not_read(
    name: str, layout: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(folders / layout, tmp_path / "folder")
    SEEN[name](folder)
    monkeypatch.setattr(AdapterFiles, "load", lambda _: pytest.fail("they were read"))
    with pytest.raises(ValueError, match=r"names differ|has the shape"):
        load_adapter(tiny_classifier("bert"), folder)


LOADED: dict[str, Attack] = {
    "a type that is a function": manifest(head_dtype="load"),
    "a type that is none": manifest(head_dtype="float128"),
    "a type that is a list": manifest(head_dtype=["float32"]),
    "a quantisation that is a list": manifest(quantization=["nf4"]),
    "a quantisation by other arguments": manifest(quantization={"load_in_4bit": True, "device_map": "disk"}),
    "a quantisation by words": manifest(quantization={"load_in_4bit": "yes"}),
    "a quantisation to 4 and 8 bits": manifest(quantization={"load_in_4bit": True, "load_in_8bit": True}),
    "a quantisation of a type that is none": manifest(
        quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "fp3"}
    ),
    "a quantisation that computes in a function": manifest(
        quantization={"load_in_4bit": True, "bnb_4bit_compute_dtype": "load"}
    ),
    "a quantisation that is stored in nothing": manifest(
        quantization={"load_in_4bit": True, "bnb_4bit_quant_storage": "nothing"}
    ),
    "modules by patterns that take forever": manifest(
        quantization={"load_in_4bit": True, "llm_int8_skip_modules": ["(.*)*" * 20 + "x"]}
    ),
    "modules that are a number": manifest(quantization={"load_in_4bit": True, "llm_int8_skip_modules": 3}),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", LOADED)
def test_a_hostile_folder_does_not_say_how_a_base_is_loaded(
    name: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_classifier("bert").save_pretrained("base")
    shutil.copytree(folders / "peft", "folder")
    load_adapter("base", "folder")
    LOADED[name](Path("folder"))
    before = sorted(Path().rglob("*"))
    with pytest.raises(ValueError, match=r".") as found:
        load_adapter("base", "folder")
    assert len(str(found.value)) < 1000
    assert sorted(Path().rglob("*")) == before, "something was executed or written"


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "(.*)*" * 20 + "x"},
        {"modules_to_save": ["bert"]},
        {"auto_mapping": {"base_model_class": "x", "parent_library": "antigravity"}},
        {"megatron_config": {}, "megatron_core": "antigravity"},
        {"r": 10**9},
        {"peft_type": "XLORA"},
        {"base_model_name_or_path": "/etc", "revision": "main", "trust_remote_code": True},
    ],
)
def test_what_a_strangers_peft_config_says_is_not_read(
    config: dict[str, Any], folders: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders / "peft", tmp_path / "folder")
    expected = logits(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    assert torch.equal(logits(folder), expected)


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model: Any = load_adapter(tiny_classifier("bert"), folder)
    found: torch.Tensor = model(**tiny_batch()).logits
    return found


def test_labels_cannot_write_a_model_card(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    before = logits_of(backbone)
    hostile = ["<script>alert(1)</script>", "a\n# Owned\n", "```\n<img src=x>\n[x](javascript:y)|"]
    backbone.model.config.id2label = dict(enumerate(hostile))
    details = {"task name": hostile[0], "task dataset": hostile[2], "search": hostile[1]}
    export(backbone, everywhere(backbone, "lora"), tmp_path / "out", verify=False, details=details)
    card = (tmp_path / "out" / "README.md").read_text()
    _, front_matter, text = card.split("---\n", 2)
    assert yaml.safe_load(front_matter)["library_name"] == "peft"
    code, prose = text.split("```")[1::2], text.split("```")[::2]
    assert len(code) == len(prose) - 1
    for part in prose:
        assert "<script" not in part.replace(r"\<", "")
        assert "<img" not in part.replace(r"\<", "")
        assert "](" not in part.replace(r"\]", "")
    assert "# Owned" not in text.splitlines()
    assert torch.equal(before, logits_of(backbone))
