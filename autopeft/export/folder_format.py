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

import contextlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import transformers
from peft import PeftConfig, TaskType
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import BaseImageProcessor, FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin

from autopeft.core.adapter import MOST_BLOCKS
from autopeft.core.configuration import Site
from autopeft.core.documents import parse_json, read_text
from autopeft.core.errors import shown
from autopeft.methods import METHODS, PeftMethod, Placement
from autopeft.methods.peft_base import stored_names
from autopeft.models.backbone import Backbone
from autopeft.models.head_spec import HeadSpec
from autopeft.models.site_shapes import SiteShape

Layout = Literal["peft", "mixed", "merged"]

MANIFEST_FILE = "autopeft.json"
CONFIGURATION_FILE = "autopeft_configuration.yaml"
CARD_FILE = "README.md"
HEAD_FILE = "head.safetensors"
OWN_METHOD_FILE = "adapter.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 1
PEFT_PREFIX = "base_model.model."
_SHARED_PREFIX = "base_model."  # of what all sites of a peft adapter share
_HEAD_PREFIX = "head."
_TASK_TYPES = {
    "AutoModelForSequenceClassification": TaskType.SEQ_CLS,
    "AutoModelForCausalLM": TaskType.CAUSAL_LM,
    "AutoModelForSeq2SeqLM": TaskType.SEQ_2_SEQ_LM,
    "AutoModelForTokenClassification": TaskType.TOKEN_CLS,
    "AutoModelForQuestionAnswering": TaskType.QUESTION_ANS,
}
"""peft's name of a kind of task; it has none for the others."""
_PROCESSORS = {
    PreTrainedTokenizerBase: "AutoTokenizer",
    BaseImageProcessor: "AutoImageProcessor",
    FeatureExtractionMixin: "AutoFeatureExtractor",
    ProcessorMixin: "AutoProcessor",
}
_PACKAGES = ("autopeft", "torch", "transformers", "peft")


@dataclass(frozen=True, kw_only=True)
class TaskHead:
    """What a base model has to be told so that it gets the head an adapter was trained with."""

    # Qualified names of the modules that were trained with the adapters; none where the base's own head
    # stayed frozen.
    modules: tuple[str, ...]
    labels: tuple[str, ...]  # name of every label, in the order of the logits; none for a language model
    problem_type: str | None  # transformers' name for the loss; None where the model did not fix it
    pad_token_id: int | None  # the padding token the model was used with; None where it has none
    dtype: str  # the weights' type, as in "float32"
    # The transformers class that loads the base, one of its auto classes.
    auto_class: str = "AutoModelForSequenceClassification"
    processor_class: str = "AutoTokenizer"  # that which loads what makes its inputs

    def __post_init__(self) -> None:
        if not self.auto_class.startswith("AutoModel") or not hasattr(transformers, self.auto_class):
            raise ValueError(
                f"{self.auto_class!r} is no auto class of transformers {transformers.__version__}, such as "
                "AutoModelForCausalLM: it could not be loaded again."
            )

    @classmethod
    def of(cls, backbone: Backbone) -> TaskHead:
        """Read the head off a backbone."""
        model = backbone.model
        auto_class = backbone.auto_class.__name__
        labels: Any = model.config.id2label if auto_class.endswith("Classification") else {}
        return cls(
            auto_class=auto_class,
            processor_class=next(
                (name for kind, name in _PROCESSORS.items() if isinstance(backbone.processor, kind)),
                cls.processor_class,
            ),
            modules=backbone.head,
            labels=tuple(str(labels[index]) for index in range(len(labels))),
            problem_type=getattr(model.config, "problem_type", None),
            pad_token_id=getattr(model.config, "pad_token_id", None),
            dtype=str(model.dtype).removeprefix("torch."),
        )

    def spec(self) -> HeadSpec:
        """Return what gives a base model this head."""
        options: dict[str, Any] = {} if self.pad_token_id is None else {"pad_token_id": self.pad_token_id}
        if self.labels:
            labelled = HeadSpec.of_labels(None, self.labels)
            options |= {**labelled.config, "problem_type": self.problem_type}
        auto_class = getattr(transformers, self.auto_class)
        return HeadSpec(auto_class=auto_class, config=options, is_trained=bool(self.modules))


def _versions() -> dict[str, str]:
    versions = dict.fromkeys(_PACKAGES, "not installed")  # autopeft itself, run from a clone
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `load_adapter` has to know beyond the configuration; kept in `autopeft.json`."""

    layout: Layout  # "peft", "mixed" or "merged"
    base: str  # Hub name or folder of the base model; empty where it was only in memory
    base_fingerprint: str  # `Backbone.fingerprint` of the base, for the record
    head: TaskHead
    sites: Mapping[Site, SiteShape]  # the modules that stand for each site of the configuration
    blocks: Mapping[str, Annotated[int, Field(ge=1, le=MOST_BLOCKS)]]  # in each of the base's stacks
    # Width of the base; None in folders of 0.1.0, which did not note it.
    hidden_size: Annotated[int, Field(ge=1)] | None = None
    # How the base was quantised, as arguments of transformers' `BitsAndBytesConfig`; None where it was not.
    quantization: Mapping[str, Any] | None = None
    # The configuration that was trained, as plain data, where a target wanted another; None where it is that.
    trained: Mapping[str, Any] | None = None
    # Versions of the packages that wrote the folder.
    versions: Mapping[str, str] = field(default_factory=_versions)

    def save(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        sites = {str(site): asdict(shape) for site, shape in self.sites.items()}
        for shape in sites.values():
            del shape["site"]
        data = {"format_version": FORMAT_VERSION, **vars(self), "head": asdict(self.head), "sites": sites}
        (folder / MANIFEST_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a folder's manifest."""
        file = folder / MANIFEST_FILE
        if not file.is_file():
            raise ValueError(
                f"{folder} has no {MANIFEST_FILE}: expected a folder written by autopeft's export. "
                "A PEFT folder from elsewhere loads with peft.PeftModel.from_pretrained."
            )
        data = parse_json(read_text(file), str(file))
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{file} has the format version {version}, this autopeft reads {FORMAT_VERSION}: "
                "it was written by another autopeft."
            )
        try:
            sites = {
                site: SiteShape(site=site, **shape)
                for text, shape in data["sites"].items()
                for site in [Site.parse(text)]
            }
            return _MANIFEST.validate_python({**data, "sites": sites})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is damaged: {shown(error)}. Export it again.") from error


_MANIFEST = TypeAdapter(Manifest)


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


def _tensor_files(by_method: Mapping[str, Placement], layout: Layout) -> dict[str, dict[str, str]]:
    """Return, by file, how names in it begin, and how `Attachment.state_dict` begins those names."""
    files = {
        f"{folder}/{PEFT_FILE}": {
            PEFT_PREFIX + stored: f"{site}.{method.name}." for site, stored in stored_names(group).items()
        }
        | {_SHARED_PREFIX: f"{folder}.shared."}
        for folder, (method, group) in peft_groups(by_method).items()
    }
    if layout == "peft":
        (prefixes,) = files.values()
        return {PEFT_FILE: prefixes | {PEFT_PREFIX: _HEAD_PREFIX}}
    files[HEAD_FILE] = {"": _HEAD_PREFIX}
    for name, placement in by_method.items():
        if not isinstance(METHODS[name], PeftMethod):
            sites = {f"{site}.": f"{site}.{name}." for site in placement}
            files[f"{name}/{OWN_METHOD_FILE}"] = {**sites, "shared.": f"{name}.shared."}
    return files


def write_adapters(
    folder: Path,
    by_method: Mapping[str, Placement],
    state: Mapping[str, Tensor],
    *,
    layout: Layout,
    base: str,
    head: TaskHead,
) -> None:
    """Write trained tensors, as `Attachment.state_dict` names them, into an empty folder.

    The layout is "mixed", or "peft" where that is what `adapter_layout` says. The base, which may be empty,
    is what peft's configs say of the base model.
    """
    # Written by key rather than through a PeftModel: that would have to wrap (and so copy or change) the
    # resident model. What was written is then loaded by peft itself and compared, see verification.py.
    for file, prefixes in _tensor_files(by_method, layout).items():
        tensors = {
            stored + name.removeprefix(trained): tensor.contiguous()
            for stored, trained in prefixes.items()
            for name, tensor in state.items()
            if name.startswith(trained)
        }
        (folder / file).parent.mkdir(exist_ok=True)
        # Not save_file, which makes files that only their owner can read: a server may be someone else.
        (folder / file).write_bytes(save(tensors, {"format": "pt"}))
    is_plain = layout == "peft"
    for name, (method, group) in peft_groups(by_method).items():
        config: Any = plain_config(by_method, head) if is_plain else method.peft_config(group)
        config.base_model_name_or_path = base or None
        config.inference_mode = True
        save_config(config, folder if is_plain else folder / name)


def save_config(config: Any, folder: Path) -> None:
    """Write a peft config, which is the same every time."""
    for option in ("target_modules", "target_parameters", "feedforward_modules"):
        if isinstance(getattr(config, option, None), set):
            setattr(config, option, sorted(getattr(config, option)))  # a set's order differs between runs
    config.save_pretrained(str(folder))


def plain_config(by_method: Mapping[str, Placement], head: TaskHead) -> PeftConfig:
    """Return the one peft config of the layout "peft"."""
    ((method, group),) = peft_groups(by_method).values()
    config: Any = method.peft_config(group)
    config.task_type = _TASK_TYPES.get(head.auto_class)
    config.modules_to_save = list(head.modules) or None
    return cast(PeftConfig, config)


class AdapterFiles:
    """The tensors that `write_adapters` wrote, under the names it was given.

    Only headers are read, until `load` is called.

    Attributes:
        shapes: The tensors' shapes by name.

    Raises:
        ValueError: A file is missing or damaged, or holds what the configuration does not name.
    """

    def __init__(self, folder: Path, by_method: Mapping[str, Placement], layout: Layout) -> None:
        self._names: dict[Path, dict[str, str]] = {}  # of each file, by how its tensors are stored
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, prefixes in _tensor_files(by_method, layout).items():
            path = folder / name
            names = self._names[path] = {}
            with _opened(path) as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    fitting = (prefix for prefix in prefixes if key.startswith(prefix))
                    stored = max(fitting, key=len, default=None)
                    if stored is None:
                        raise ValueError(f"{path} holds {key}, which the configuration does not name.")
                    names[key] = prefixes[stored] + key.removeprefix(stored)
                    self.shapes[names[key]] = tuple(file.get_slice(key).get_shape())

    def load(self) -> dict[str, Tensor]:
        """Read the tensors."""
        state: dict[str, Tensor] = {}
        for path, names in self._names.items():
            with _opened(path) as file:
                state |= {name: file.get_tensor(key) for key, name in names.items()}
        return state


def elements(path: Path) -> int:
    """Return how many numbers a safetensors file holds."""
    with _opened(path) as file:
        return sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 - no mapping


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; what is wrong with it is a ValueError."""
    require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): export it again.") from error


def require_file(file: Path) -> None:
    """Raise a ValueError where a file of an exported folder is missing."""
    if not file.is_file():
        raise ValueError(f"{file} is missing: the exported folder is not complete.")
