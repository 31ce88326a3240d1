"""Load an exported folder onto a base model: `autopeft.load_adapter`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from autopeft.core.configuration import Configuration
from autopeft.export.folder_checks import (
    check_finite,
    check_head,
    check_labels,
    check_quantization,
    check_sizes,
    checked_sites,
)
from autopeft.export.folder_format import (
    CONFIGURATION_FILE,
    PEFT_CONFIG_FILE,
    AdapterFiles,
    Manifest,
    adapter_layout,
    plain_config,
    require_file,
)
from autopeft.methods import Placement, carries_adapters, placements
from autopeft.methods.attachment import attach_methods, check_tensors, load_tensors
from autopeft.methods.peft_base import quiet_peft
from autopeft.models.loading import LoadOptions, from_pretrained, with_head


def load_adapter(base: str | Path | PreTrainedModel, folder: str | Path) -> PreTrainedModel | PeftModel:
    """Put an exported adapter, head included, on a base model, ready for inference.

    The folder may be a stranger's: nothing in it is executed, and what it holds is compared with the base
    before it takes memory. An adapter still decides what the model says.

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
    configuration = Configuration.load(folder / CONFIGURATION_FILE)
    check_labels(folder, manifest)
    check_quantization(manifest)
    with torch.random.fork_rng(devices=[]):
        model = _with_head(base, manifest)
        sites = checked_sites(model, configuration, manifest)
        by_method = placements(configuration, sites)
        if manifest.layout == "peft" != adapter_layout(by_method):
            raise ValueError(f"{folder} is no folder of the layout {manifest.layout!r}.")
        files = AdapterFiles(folder, by_method, manifest.layout)
        check_head(model, manifest.head.modules, files.shapes)
        check_sizes(by_method, files.shapes)
        with ExitStack() as undo:
            with _doubting_the_base():
                # peft reads all that there is and ignores what it does not know: attached here first.
                tensors = _attached(model, by_method, files.shapes, undo)
                check_tensors(tensors, files.shapes)
            state = files.load()
            check_finite(state)
            if manifest.layout == "mixed":
                load_tensors(tensors, state)
                undo.pop_all()  # they stay
        if manifest.layout == "peft":
            require_file(folder / PEFT_CONFIG_FILE)  # complete for peft alone; what is in it is not read
            with _doubting_the_base(), quiet_peft():
                # The folder's own could name regular expressions, modules to import, other files.
                config, place = plain_config(by_method, manifest.head), str(folder.absolute())
                loaded = PeftModel.from_pretrained(model, place, config=config, local_files_only=True)
            loaded.eval()
            return loaded
    model.requires_grad_(False)
    model.eval()
    return model


def attach_tensors(
    model: PreTrainedModel, by_method: Mapping[str, Placement], state: Mapping[str, Tensor]
) -> None:
    """Attach adapters for good, with trained tensors in them, and replace the head's parameters."""
    load_tensors(_attached(model, by_method, state, ExitStack()), state)  # they stay


@contextmanager
def _doubting_the_base() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{error} Is this not the base the adapter was trained on?") from error


def _attached(
    model: PreTrainedModel, by_method: Mapping[str, Placement], names: Iterable[str], undo: ExitStack
) -> dict[str, Tensor]:
    """Attach adapters, and return what of theirs, and of the head by these names, is to be loaded."""
    for parameter in model.parameters():  # peft freezes them
        undo.callback(parameter.requires_grad_, parameter.requires_grad)
    trained, kept = attach_methods(model, by_method, undo)
    tensors: dict[str, Tensor] = {**trained, **kept}
    for name in names:
        if name.startswith("head."):
            module_name, _, local = name.removeprefix("head.").rpartition(".")
            module = model.get_submodule(module_name)
            original = getattr(module, local)
            undo.callback(setattr, module, local, original)
            # A new parameter: the one that is there may belong to another model as well.
            tensors[name] = nn.Parameter(original.detach().clone())
            setattr(module, local, tensors[name])
    return tensors


def _with_head(base: str | Path | PreTrainedModel, manifest: Manifest) -> PreTrainedModel:
    head, spec = manifest.head, manifest.head.spec()
    if isinstance(base, str | Path):
        dtype: Any = head.dtype
        options = LoadOptions(dtype=dtype, quantization=manifest.quantization)
        try:
            model, _, _ = from_pretrained(os.path.expanduser(base), spec, options, torch.device("cpu"))
        except (TypeError, AssertionError, KeyError, AttributeError) as error:  # of transformers
            raise ValueError(
                f"The base {str(base)!r} cannot have the head of the folder: {error!r}."
            ) from error
        return model
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"The base is a transformers model or its name, got a {type(base).__name__}.")
    if carries_adapters(base):
        raise ValueError(f"{type(base).__name__} already carries adapters: load the base model again.")
    model, missing = with_head(base, spec)
    if missing and not spec.is_trained:
        raise ValueError(
            f"{type(base).__name__} has no head, and the adapter brings none: load the base with "
            f"{head.auto_class}."
        )
    for name, value in spec.config.items():
        setattr(model.config, name, value)
    return model
