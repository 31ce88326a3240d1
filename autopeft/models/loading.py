"""Load a pretrained model with the head a task needs, and find out which modules are that head."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from autopeft.core.errors import check_choice
from autopeft.core.precision import quickest_precision
from autopeft.models.block_discovery import find_blocks
from autopeft.models.head_spec import HeadSpec, Processor
from autopeft.models.processors import load_processor

_logger = logging.getLogger(__name__)
_HEAD_SEED = 0

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Quantization = Literal["nf4", "int8"]
DeviceMap = Literal["auto"] | Mapping[str, int | str]
_QUANTIZATIONS: Mapping[str, Mapping[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    },
    "int8": {"load_in_8bit": True},
}
"""Arguments of transformers' `BitsAndBytesConfig`."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a checkpoint's weights are loaded.

    Attributes:
        dtype: Of the frozen weights. "auto" is the checkpoint's own; on a CPU that does not multiply it in
            hardware, single precision.
        quantization: "nf4" packs the linear layers in 4 bits as QLoRA does (Dettmers et al., 2023), "int8" in
            8 bits (Dettmers et al., 2022), both by bitsandbytes; None leaves them. Arguments of transformers'
            `BitsAndBytesConfig` give any other.
        attention: transformers' name of an implementation of attention, such as "sdpa", "eager" or
            "flash_attention_2"; None for its own choice.
        device_map: "auto" to spread the model over all GPUs there are, or the device of each module by its
            name, as transformers' `device_map`: each block is to have one device. None for a single device.
    """

    dtype: Dtype = "auto"
    quantization: Quantization | Mapping[str, Any] | None = None
    attention: str | None = None
    device_map: DeviceMap | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.device_map, str):
            check_choice("device_map", ("auto",), self.device_map)
        check_choice("dtype", get_args(Dtype), self.dtype)
        if self.quantization is None:
            return
        if not isinstance(self.quantization, Mapping):
            check_choice("quantization", get_args(Quantization), self.quantization)
        if find_spec("bitsandbytes") is None:
            raise ValueError(
                f"quantization={self.quantization!r} needs bitsandbytes: "
                "pip install 'autopeft[quantization]'."
            )

    def check_for(self, source: object) -> None:
        """Raise a ValueError where an option is set for a model that is loaded already."""
        default = LoadOptions()
        given = [f"{name}={value!r}" for name, value in vars(self).items() if value != getattr(default, name)]
        if given and not isinstance(source, str | Path):
            raise ValueError(
                f"{', '.join(given)} is for loading a checkpoint, and a {type(source).__name__} is taken as "
                "it is: give its folder or hub name, or load it as you want it."
            )

    def arguments(self, config: Any, device: torch.device) -> dict[str, Any]:
        """Return what `from_pretrained` is told."""
        dtype: Any = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        if self.dtype == "auto" and device.type == "cpu":
            is_quick = config.dtype == torch.bfloat16 and quickest_precision(device) == "bf16-mixed"
            dtype = torch.bfloat16 if is_quick else torch.float32
        found = {"dtype": dtype}
        if self.attention is not None:
            found["attn_implementation"] = self.attention
        if self.quantization is not None:
            given = self.quantization
            packed = given if isinstance(given, Mapping) else _QUANTIZATIONS[given]
            found |= {"quantization_config": BitsAndBytesConfig(**packed), "device_map": {"": str(device)}}
        if self.device_map is not None:
            found["device_map"] = self.device_map
        return found


def load_model(
    source: str | Path | PreTrainedModel,
    head: HeadSpec,
    processor: Processor | None = None,
    options: LoadOptions | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Load or wrap a model for a task, and return the arguments of its `Backbone`."""
    with torch.random.fork_rng(devices=[]), _quiet_transformers():
        torch.manual_seed(_HEAD_SEED)
        if isinstance(source, PreTrainedModel):
            names = _names(source.config)
            model, missing = with_head(source, head)
            origin = source.config.name_or_path or ""
        elif isinstance(source, str | Path):
            origin = os.path.expanduser(source)
            device = torch.device("cpu") if device is None else device
            model, missing, names = from_pretrained(origin, head, options or LoadOptions(), device)
        else:
            raise ValueError(
                f"A backbone is a hub name, a folder or a transformers model, got a {type(source).__name__}."
            )
        missing = _name_labels(model, head.labels, names, missing)
    if processor is None and head.processor_class is not None:
        processor = load_processor(origin, head.processor_class)
    if isinstance(processor, PreTrainedTokenizerBase):
        _pad_alike(model, processor)
    name = Path(origin).name if Path(origin).is_dir() else origin or type(model).__name__
    return dict(
        model=model,
        processor=processor,
        name=name,
        head=head_modules(model, head, missing),
        auto_class=head.auto_class,
        new_head=bool(missing),
        origin=origin,
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the load report: that the head is new is what we ask for."""
    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()


def from_pretrained(
    source: str, head: HeadSpec, options: LoadOptions, device: torch.device
) -> tuple[PreTrainedModel, set[str], dict[int, Any]]:
    """Return the model, the parameters that were not in the checkpoint, and the checkpoint's label names.

    A ValueError is raised where the source cannot be loaded.
    """
    looks_local = _looks_local(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        names = _names(config)
        arguments = options.arguments(config, device)
        if packed := arguments.get("quantization_config"):
            packed.llm_int8_skip_modules = packed.llm_int8_skip_modules or _outside_blocks(source, head)
        model, info = head.auto_class.from_pretrained(
            source,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            trust_remote_code=False,
            **arguments,
            **head.config,
        )
    except (OSError, ValueError, ImportError) as error:  # the last: a package for `attention` is missing
        raise ValueError(
            f"Cannot load the backbone {source!r}: it is no local folder, and the hub gave: "
            f"{str(error).strip().splitlines()[0]}"
            if not (looks_local or isinstance(error, ImportError))
            else f"Cannot load the backbone {source!r}: {error}"
        ) from error
    mismatched = {str(key) for key, *_ in info["mismatched_keys"]}
    pretrained = sorted(key for key in mismatched if key.startswith(f"{model.base_model_prefix}."))
    if pretrained:
        raise ValueError(f"Cannot load the backbone {source!r}: {pretrained[0]} has another shape there.")
    return model, {str(key) for key in info["missing_keys"]} | mismatched, names


def _looks_local(source: str) -> bool:
    """Return whether a source is a folder and no hub name; raise ValueError for one without a model."""
    looks_local = source.startswith((".", "/")) or Path(source).exists()
    if looks_local and not (Path(source) / "config.json").is_file():
        raise ValueError(
            f"Cannot load the backbone {source!r}: expected a folder with a config.json and "
            "safetensors weights, as save_pretrained writes it."
        )
    return looks_local


def _outside_blocks(source: str, head: HeadSpec) -> list[str]:
    """Return the linear layers outside the blocks, as of heads and poolers, which may have to be trained."""
    model, _ = empty_model(source, head, torch.float32)
    inside = tuple(f"{block.name}." for block in find_blocks(model))
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return [name for name in linear if not name.startswith(inside)]


def _names(config: Any) -> dict[int, Any]:
    """Return a config's label names by the head's rows: files may hold them as 0, 1, 10, 2."""
    return dict(sorted((config.id2label or {}).items()))


def _name_labels(
    model: PreTrainedModel, labels: Sequence[str], names: Mapping[int, Any], missing: set[str]
) -> set[str]:
    """Give the model the task's label names, and say which parameters are then to be trained from scratch.

    A head whose labels are the task's in another order has its rows put in the task's order; one of other
    labels is trained from scratch. "LABEL_0" and so on are no names: such a head is kept as it is.
    """
    if not labels:
        return missing
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {name: index for index, name in enumerate(labels)}
    known = list(map(str, names.values()))
    if missing or known == list(labels) or all(re.fullmatch(r"LABEL_\d+", name) for name in known):
        return missing
    modules = tuple(f"{name}." for name in _outside(model))
    head = {name: parameter for name, parameter in model.named_parameters() if name.startswith(modules)}
    if sorted(known) != sorted(labels):
        return set(head)
    order = [known.index(label) for label in labels]
    with torch.no_grad():
        for parameter in list(head.values())[-2:]:  # of the last layer: weight, and bias where it has one
            if len(parameter) == len(labels):
                parameter.copy_(parameter[order].clone())
    return missing


def with_head(model: PreTrainedModel, head: HeadSpec) -> tuple[PreTrainedModel, set[str]]:
    """Use a loaded model's head where it fits the task (else a ValueError); give a bare model a new one.

    Also returned are the names of the parameters that are new.
    """
    with torch.device("meta"):
        expected = type(head.auto_class.from_config(copy.deepcopy(model.config)))
    has_head = isinstance(model, expected)
    if model.base_model is model and not has_head:  # T5 is its own base model with its head
        return _give_head(model, head)
    if not has_head:
        raise ValueError(
            f"The task needs a {expected.__name__}, got a {type(model).__name__}: pass its base "
            "model (model.base_model) to get a new head."
        )
    if head.num_labels is not None and model.config.num_labels != head.num_labels:
        raise ValueError(
            f"The head of {type(model).__name__} has {model.config.num_labels} labels, the task has "
            f"{head.num_labels}: load it with num_labels={head.num_labels}, or pass the model without a head."
        )
    return model, set()


def _give_head(model: PreTrainedModel, head: HeadSpec) -> tuple[PreTrainedModel, set[str]]:
    config = copy.deepcopy(model.config)  # the way attention is computed included, which `to_dict` leaves out
    config.update(dict(head.config))
    headed: PreTrainedModel = head.auto_class.from_config(config, dtype=model.dtype)
    prefix = headed.base_model_prefix
    if not hasattr(headed, prefix):
        raise ValueError(
            f"A {type(model).__name__} cannot be put into a {type(headed).__name__}: name its folder instead."
        )
    expected = {name for name, _ in headed.named_parameters()}
    setattr(headed, prefix, nn.Identity())
    nn.Module.to(headed, model.device)  # without the model, which may lie on several devices
    setattr(headed, prefix, model)
    headed.train(model.training)
    pretrained = {f"{prefix}.{name}" for name, _ in model.named_parameters()}
    absent = sorted(name for name in expected - pretrained if name.startswith(f"{prefix}."))
    if absent:
        raise ValueError(
            f"{type(headed).__name__} needs {absent[0]}, which this {type(model).__name__} was "
            "loaded without: load it with all its modules, or name its folder instead."
        )
    return headed, expected - pretrained


def _pad_alike(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokenizer and model the same padding token."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has no padding token and no end token to pad with.")
        tokenizer.pad_token = tokenizer.eos_token
    # Decoders look for the last token that is not padding: with another id they would pool elsewhere.
    for config in (model.config, model.config.get_text_config()):  # two configs in composite models alone
        config.pad_token_id = tokenizer.pad_token_id


def empty_model(source: str | Path, head: HeadSpec, dtype: torch.dtype) -> tuple[PreTrainedModel, str]:
    """Build a model from its config on the meta device; return it with its name."""
    place = os.path.expanduser(source)
    _looks_local(place)
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        config.update(dict(head.config))
        with torch.device("meta"):
            model: PreTrainedModel = head.auto_class.from_config(config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot build {place!r} from its config: {_first_line(error)}") from error
    model.tie_weights()
    return model, Path(place).name if Path(place).is_dir() else place


def head_modules(model: PreTrainedModel, head: HeadSpec, missing: Collection[str] = ()) -> tuple[str, ...]:
    """Return the modules that a task trains whole: those outside the base model, and new ones inside it.

    New ones have parameters that were `missing` in the checkpoint.
    """
    prefix = model.base_model_prefix
    outside = _outside(model)
    if not head.is_trained:
        if missing:
            raise ValueError(
                f"The checkpoint has no {sorted(missing)[0]}, which {type(model).__name__} needs and which "
                "is not trained: load a checkpoint of the whole model."
            )
        return ()
    if not outside:
        raise ValueError(
            f"{type(model).__name__} has no head at all: pass a model with a task head, or the name of one "
            "that autopeft can load."
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = {key.rpartition(".")[0] for key in missing if key.startswith(f"{prefix}.")}
    inside = sorted(owners & modules.keys())
    if inside:
        _logger.info("Not in the checkpoint, trained with the head: %s", ", ".join(inside))
    return (*outside, *inside)


def _outside(model: PreTrainedModel) -> list[str]:
    """Return the modules beside the base model, or beside those that hold its blocks (Whisper's encoder)."""
    blocks = [block.name for block in find_blocks(model)]
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix
        and any(True for _ in child.parameters())
        and not any(block.startswith(f"{name}.") for block in blocks)
    ]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
