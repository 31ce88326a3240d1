"""Load an exported folder onto a base model: `autopeft.load_adapter`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from autopeft.core.configuration import Configuration
from autopeft.export.folder_format import (
    CONFIGURATION_FILE,
    PEFT_CONFIG_FILE,
    PEFT_FILE,
    Manifest,
    TaskHead,
    placements,
    read_adapters,
    require_file,
)
from autopeft.methods import METHODS, Placement, carries_adapters


def load_adapter(base: str | Path | PreTrainedModel, folder: str | Path) -> PreTrainedModel | PeftModel:
    """Put an exported adapter, head included, on a base model, ready for inference.

    Args:
        base: Hub name, local folder, or a loaded transformers model, for a task with a new head also without
            one. A loaded model is changed in place, as peft does it.
        folder: A folder written by an export that was not merged.

    Returns:
        The model in eval mode with all parameters frozen: a `peft.PeftModel` where the folder is a plain
        PEFT folder, else the transformers model with the adapters in it.

    Raises:
        ValueError: The folder is not complete or not an adapter's, the base cannot be loaded, already
            carries adapters, or does not have the modules the adapter was trained on.
    """
    folder = Path(folder).expanduser()
    manifest = Manifest.load(folder)
    if manifest.layout == "merged":
        raise ValueError(
            f"{folder} is a whole model, not an adapter: load it with "
            f"{manifest.head.auto_class}.from_pretrained({str(folder)!r})."
        )
    with torch.random.fork_rng(devices=[]):
        model = _with_head(base, manifest.head)
        for shape in manifest.sites.values():
            _require_module(model, shape.module)  # peft skips what it does not find
        with warnings.catch_warnings():
            # peft's LayerNorm tuning says so of every norm.
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            if manifest.layout == "peft":
                for file in (PEFT_CONFIG_FILE, PEFT_FILE):
                    require_file(folder / file)  # peft would ask the hub for it, under the folder's name
                loaded = PeftModel.from_pretrained(model, str(folder.absolute()), local_files_only=True)
                loaded.eval()
                return loaded
        by_method = placements(Configuration.load(folder / CONFIGURATION_FILE), manifest.sites)
        attach_tensors(model, by_method, read_adapters(folder, by_method))
    model.requires_grad_(False)
    model.eval()
    return model


def attach_tensors(
    model: PreTrainedModel, by_method: Mapping[str, Placement], state: Mapping[str, Tensor]
) -> None:
    """Attach adapters for good, with trained tensors in them, and replace the head's parameters.

    Args:
        model: The task's model; changed in place.
        by_method: The placement of each method.
        state: Trained tensors as `Attachment.state_dict` names them.

    Raises:
        ValueError: The model has no such module, or a tensor is missing, left over or of another shape.
    """
    parameters: dict[str, nn.Parameter] = {}
    for method, placement in by_method.items():
        trainable = METHODS[method].attach(model, placement, ExitStack())  # they stay
        parameters |= {
            f"{site}.{method}.{local}": parameter
            for site, found in trainable.items()
            for local, parameter in found.items()
        }
    for name in state:
        if name.startswith("head."):
            module_name, _, local = name.removeprefix("head.").rpartition(".")
            module = _require_module(model, module_name)
            # A new parameter: the one that is there may belong to another model as well.
            parameters[name] = nn.Parameter(getattr(module, local).detach().clone())
            setattr(module, local, parameters[name])
    if parameters.keys() != state.keys():
        difference = sorted(parameters.keys() ^ state.keys())
        raise ValueError(
            f"The saved tensors do not fit the configuration: {len(difference)} names differ, the first "
            f"is {difference[0]}."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != state[name].shape:
                raise ValueError(
                    f"{name} has the shape {tuple(state[name].shape)}, the base model needs "
                    f"{tuple(parameter.shape)}: this is not the base the adapter was trained on."
                )
            parameter.copy_(state[name])


def _require_module(model: PreTrainedModel, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"{type(model).__name__} has no module {name}: this is not the base the adapter was trained on."
        ) from error


def _with_head(base: str | Path | PreTrainedModel, head: TaskHead) -> PreTrainedModel:
    if isinstance(base, str | Path):
        return _from_pretrained(str(base), head)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"The base is a transformers model or its name, got a {type(base).__name__}.")
    if carries_adapters(base):
        raise ValueError(f"{type(base).__name__} already carries adapters: load the base model again.")
    if base.base_model is base:
        if not head.modules:
            raise ValueError(
                f"{type(base).__name__} has no head, and the adapter brings none: load the base with "
                f"{head.auto_class}."
            )
        config = type(base.config).from_dict({**base.config.to_dict(), **head.config_options()})
        config.name_or_path = base.config.name_or_path
        headed: Any = head.loader.from_config(config, dtype=base.dtype)
        headed.to(base.device)
        setattr(headed, headed.base_model_prefix, base)
        assert isinstance(headed, PreTrainedModel)
        return headed
    if head.labels and base.config.num_labels != len(head.labels):
        raise ValueError(
            f"The head of {type(base).__name__} has {base.config.num_labels} labels, the adapter's has "
            f"{len(head.labels)}: load the base with num_labels={len(head.labels)}."
        )
    for name, value in head.config_options().items():
        setattr(base.config, name, value)
    return base


def _from_pretrained(base: str, head: TaskHead) -> PreTrainedModel:
    if base.startswith("~"):  # which transformers does not know; a hub name never starts with it
        base = str(Path(base).expanduser())
    try:
        model = head.loader.from_pretrained(
            base,
            dtype=head.dtype,
            use_safetensors=True,
            trust_remote_code=False,
            # The stored head may be one of other labels: all of the head comes from the adapter's folder.
            ignore_mismatched_sizes=True,
            **head.config_options(),
        )
    except OSError as error:
        raise ValueError(f"Cannot load the base model {base!r}: {error}") from error
    assert isinstance(model, PreTrainedModel)
    return model
