"""The files of an exported folder: what they are called, what is in them, how they are written and read.

Three layouts:

* "peft": one peft config holds every adapter. A plain PEFT folder, the head in `modules_to_save`.
* "mixed": anything else, a trained head alone included. A PEFT folder for each group of adapters that
  peft has a format for, `<method>/adapter.safetensors` for each method it has none for, and
  `head.safetensors`.
* "merged": a whole transformers model with the adapters merged into its weights.

Every layout has the tokenizer, the configuration (`autopeft_configuration.yaml`), a manifest
(`autopeft.json`) and a model card (`README.md`) beside it.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as SEQUENCE_CLASSIFIERS,
)

from autopeft.core.configuration import Configuration, Site
from autopeft.methods import METHODS, PeftMethod, Placement
from autopeft.models.backbone import Backbone, SiteShape

Layout = Literal["peft", "mixed", "merged"]

MANIFEST_FILE = "autopeft.json"
CONFIGURATION_FILE = "autopeft_configuration.yaml"
CARD_FILE = "README.md"
HEAD_FILE = "head.safetensors"
OWN_METHOD_FILE = "adapter.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 1
_PEFT_PREFIX = "base_model.model."
_TASK_TYPE = "SEQ_CLS"
_PACKAGES = ("autopeft", "torch", "transformers", "peft")


@dataclass(frozen=True, kw_only=True)
class TaskHead:
    """What a base model has to be told so that it gets the head an adapter was trained with.

    Attributes:
        modules: Qualified names of the modules that were trained with the adapters.
        labels: Name of every label, in the order of the logits.
        problem_type: transformers' name for the loss; None where the model did not fix it.
        pad_token_id: The padding token the model was used with; None where it has none.
        dtype: The weights' type, as in "float32".
    """

    modules: tuple[str, ...]
    labels: tuple[str, ...]
    problem_type: str | None
    pad_token_id: int | None
    dtype: str

    @classmethod
    def of(cls, backbone: Backbone) -> TaskHead:
        """Read the head off a backbone.

        Raises:
            ValueError: The model is no sequence classifier, which is all this format knows.
        """
        model = backbone.model
        if type(model).__name__ not in SEQUENCE_CLASSIFIERS.values():
            raise ValueError(
                f"Cannot export a {type(model).__name__}: expected one of transformers' "
                "...ForSequenceClassification models."
            )
        labels: Any = model.config.id2label
        return cls(
            modules=backbone.head,
            labels=tuple(str(labels[index]) for index in range(len(labels))),
            problem_type=model.config.problem_type,
            pad_token_id=getattr(model.config, "pad_token_id", None),
            dtype=str(model.dtype).removeprefix("torch."),
        )

    @property
    def has_numbered_labels(self) -> bool:
        """Whether the labels have the names that transformers gives to labels without a name."""
        return self.labels == tuple(f"LABEL_{index}" for index in range(len(self.labels)))

    def config_options(self) -> dict[str, Any]:
        """Return what to set in the base model's config."""
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "problem_type": self.problem_type,
            "pad_token_id": self.pad_token_id,
        }


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `load_adapter` has to know beyond the configuration; kept in `autopeft.json`.

    Attributes:
        layout: "peft", "mixed" or "merged".
        base: Hub name or folder of the base model; empty where it was only in memory.
        base_fingerprint: `Backbone.fingerprint` of the base, for the record.
        head: The head.
        sites: The modules that stand for each site of the configuration.
        versions: Versions of the packages that wrote the folder.
    """

    layout: Layout
    base: str
    base_fingerprint: str
    head: TaskHead
    sites: Mapping[Site, SiteShape]
    versions: Mapping[str, str]

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        configuration: Configuration,
        *,
        layout: Layout,
        base: str,
        head: TaskHead,
    ) -> Manifest:
        """Describe an export."""
        return cls(
            layout=layout,
            base=base,
            base_fingerprint=backbone.fingerprint,
            head=head,
            sites={site: backbone.shape(site) for site in configuration.adapters},
            versions={package: _version(package) for package in _PACKAGES},
        )

    def save(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        data = {
            "format_version": FORMAT_VERSION,
            **vars(self),
            "head": asdict(self.head),
            "sites": {
                str(site): {name: value for name, value in vars(shape).items() if name != "site"}
                for site, shape in self.sites.items()
            },
        }
        (folder / MANIFEST_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises:
            ValueError: The folder was not written by an export, or by a newer version of one.
        """
        file = folder / MANIFEST_FILE
        if not file.is_file():
            raise ValueError(
                f"{folder} has no {MANIFEST_FILE}: expected a folder written by autopeft's export. "
                "A PEFT folder from elsewhere loads with peft.PeftModel.from_pretrained."
            )
        data = json.loads(file.read_text(encoding="utf-8"))
        version = data.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{file} has the format version {version}, this autopeft reads {FORMAT_VERSION}: "
                f"it was written by autopeft {data['versions']['autopeft']}."
            )
        head = data.pop("head")
        sites = {
            site: SiteShape(site=site, **shape)
            for text, shape in data.pop("sites").items()
            for site in [Site.parse(text)]
        }
        names = {key: tuple(head[key]) for key in ("modules", "labels")}
        return cls(**data, head=TaskHead(**{**head, **names}), sites=sites)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # autopeft itself, run from a clone


def placements(configuration: Configuration, shapes: Mapping[Site, SiteShape]) -> dict[str, Placement]:
    """Return the placement of each method of a configuration, in the order methods attach in."""
    return {
        method: {site: (shapes[site], adapter) for site, adapter in configuration if adapter.method == method}
        for method in configuration.methods
    }


def peft_groups(by_method: Mapping[str, Placement]) -> dict[str, tuple[PeftMethod, Placement]]:
    """Return, by folder name, the groups of adapters that share one peft config."""
    return {
        name: (method, group)
        for method_name, placement in by_method.items()
        for method in [METHODS[method_name]]
        if isinstance(method, PeftMethod)
        for name, group in method.groups(placement).items()
    }


def adapter_layout(by_method: Mapping[str, Placement]) -> Layout:
    """Return "peft" where one peft config holds every adapter, and "mixed" otherwise."""
    groups = peft_groups(by_method)
    held = sum(len(group) for _, group in groups.values())
    everything = sum(len(placement) for placement in by_method.values())
    return "peft" if len(groups) == 1 and held == everything else "mixed"


def write_adapters(
    folder: Path,
    by_method: Mapping[str, Placement],
    state: Mapping[str, Tensor],
    *,
    base: str,
    head: TaskHead,
) -> None:
    """Write trained tensors, as `Attachment.state_dict` names them, into an empty folder.

    Args:
        folder: Where to write.
        by_method: The placement of each method.
        state: The trained tensors of adapters and head.
        base: What peft's configs say of the base model; may be empty.
        head: The head.
    """
    groups = peft_groups(by_method)
    head_tensors = {
        name.removeprefix("head."): tensor for name, tensor in state.items() if name.startswith("head.")
    }
    if adapter_layout(by_method) == "peft":
        ((method, group),) = groups.values()
        _write_peft(folder, method, group, state, base, head.modules, head_tensors)
        return
    for name, (method, group) in groups.items():
        _write_peft(folder / name, method, group, state, base, (), {})
    for name, placement in by_method.items():
        if not isinstance(METHODS[name], PeftMethod):
            tensors = {
                f"{site}.{local}": tensor
                for site in placement
                for local, tensor in _local_tensors(state, site, name)
            }
            _save(tensors, folder / name / OWN_METHOD_FILE)
    _save(head_tensors, folder / HEAD_FILE)


def read_adapters(folder: Path, by_method: Mapping[str, Placement]) -> dict[str, Tensor]:
    """Read what `write_adapters` wrote in the layout "mixed", under the names it was given.

    Raises:
        ValueError: A file is missing.
    """
    state = {f"head.{name}": tensor for name, tensor in _load(folder / HEAD_FILE).items()}
    for name, (method, group) in peft_groups(by_method).items():
        modules = {
            f"{_PEFT_PREFIX}{shape.module}.": f"{site}.{method.name}." for site, (shape, _) in group.items()
        }
        for key, tensor in _load(folder / name / PEFT_FILE).items():
            module = next((module for module in modules if key.startswith(module)), None)
            if module is None:
                raise ValueError(f"{folder / name} holds {key}, which the configuration does not name.")
            state[modules[module] + key.removeprefix(module)] = tensor
    for name in by_method:
        if not isinstance(METHODS[name], PeftMethod):
            for key, tensor in _load(folder / name / OWN_METHOD_FILE).items():
                block, role, local = key.split(".", 2)
                state[f"{block}.{role}.{name}.{local}"] = tensor
    return state


def _write_peft(
    folder: Path,
    method: PeftMethod,
    group: Placement,
    state: Mapping[str, Tensor],
    base: str,
    head: Iterable[str],
    head_tensors: Mapping[str, Tensor],
) -> None:
    # Written by key rather than through a PeftModel: that would have to wrap (and so copy or change) the
    # resident model. What was written is then loaded by peft itself and compared, see verification.py.
    config: Any = method.peft_config(group)
    config.base_model_name_or_path = base or None
    config.inference_mode = True
    for name in ("target_modules", "feedforward_modules"):
        if isinstance(getattr(config, name, None), set):
            setattr(config, name, sorted(getattr(config, name)))  # a set's order differs between runs
    modules = list(head)
    if modules:
        config.task_type = _TASK_TYPE
        config.modules_to_save = modules
    tensors = {
        f"{_PEFT_PREFIX}{shape.module}.{local}": tensor
        for site, (shape, _) in group.items()
        for local, tensor in _local_tensors(state, site, method.name)
    }
    tensors |= {f"{_PEFT_PREFIX}{name}": tensor for name, tensor in head_tensors.items()}
    _save(tensors, folder / PEFT_FILE)
    config.save_pretrained(str(folder))


def _local_tensors(state: Mapping[str, Tensor], site: Site, method: str) -> Iterable[tuple[str, Tensor]]:
    start = f"{site}.{method}."
    return [(name.removeprefix(start), tensor) for name, tensor in state.items() if name.startswith(start)]


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Not save_file, which makes files that only their owner can read: a server may be someone else.
    file.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"}))


def check_peft_folder(folder: Path) -> None:
    """Raise where a PEFT folder lacks a file: peft would ask the hub for it, under the folder's name.

    Raises:
        ValueError: Names the file.
    """
    for name in (PEFT_CONFIG_FILE, PEFT_FILE):
        _require(folder / name)


def _require(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{file} is missing: the exported folder is not complete.")


def _load(file: Path) -> dict[str, Tensor]:
    _require(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): export it again.") from error
