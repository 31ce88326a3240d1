"""The output layer that a language model came with, which stays frozen unless it is asked for."""

from __future__ import annotations

from collections.abc import Container, Sequence

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
