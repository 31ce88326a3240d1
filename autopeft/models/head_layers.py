"""Which layers of a head are trained."""

from __future__ import annotations

from collections.abc import Container, Sequence

from torch import nn
from transformers import PreTrainedModel


def output_layer(model: PreTrainedModel, head: Sequence[str], packed: Container[str]) -> str:
    """Return the name of a language model's output layer.

    Args:
        model: The model.
        head: Modules that a task trains already.
        packed: Layers whose weights are quantised.

    Raises:
        ValueError: There is none that can be trained apart from all other weights.
    """
    layer = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is layer), "")
    own: set[int] = set() if layer is None else set(map(id, layer.parameters()))
    tied = [
        path
        for path, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in own and not path.startswith(f"{name}.")
    ]
    if head:
        why = f"the head of this task ({', '.join(head)}) is trained by head='whole'"
    elif not name:
        why = f"{type(model).__name__} has none"
    elif name in packed:
        why = f"{name} is quantised, and cannot be trained"
    elif tied:
        why = f"{name} is tied to {tied[0]}, which stays frozen"
    else:
        return name
    raise ValueError(f"head='pretrained' trains a language model's own output layer: {why}.")


def last_layer(model: PreTrainedModel, head: Sequence[str]) -> str:
    """Return the name of the layer of a task's head that has an output a label.

    Raises:
        ValueError: There is none.
    """
    labels = getattr(model.config, "num_labels", None)
    layers: list[str] = [
        name
        for part in head
        for name, module in model.get_submodule(part).named_modules(prefix=part)
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and len(weight) == labels
    ]
    if not layers:
        other = "whole" if head else "pretrained"
        raise ValueError(
            f"head='last' needs a trained head with a layer of {labels} outputs, which "
            f"{type(model).__name__} does not have here: use head={other!r}."
        )
    return layers[-1]
