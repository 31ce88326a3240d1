"""The head that configurations train, all or its last layer: in a copy, so that the backbone's own stays."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autopeft.methods.base import swap
from autopeft.models.backbone import Backbone

_NORMAL = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, Conv1D)


def copy_head(backbone: Backbone, undo: ExitStack) -> dict[str, nn.Parameter]:
    """Put copies in the place of the head's parameters, drawn anew where the head is a new one.

    Weights are drawn on the CPU from torch's global generator, wherever the head lies: a seed means the same
    weights on every device. The copies are returned under "head.<module>.<parameter>", and `undo` is given
    what puts the head's own parameters back.
    """
    trained: dict[str, nn.Parameter] = {}
    std = float(getattr(backbone.model.config, "initializer_range", None) or 0.02)
    for head in backbone.head:
        for path, module in backbone.model.get_submodule(head).named_modules(prefix=head):
            own = dict(module.named_parameters(recurse=False))
            values: dict[str, Tensor] = _drawn(module, own, std) if backbone.new_head else {**own}
            for local, original in own.items():
                copied = nn.Parameter(values[local].detach().to(original.device, copy=True))
                swap(module, local, copied, undo)
                trained[f"head.{path}.{local}"] = copied
    return trained


def _drawn(module: nn.Module, own: dict[str, nn.Parameter], std: float) -> dict[str, Tensor]:
    """Return initial values of a module's own parameters, as transformers' models draw theirs.

    That is N(0, std) for weights and 0 for biases; the module's own rule where it is of another kind and has
    one. Of a module without a rule, matrices are drawn and vectors (scales and shifts) kept.
    """
    drawn: dict[str, Tensor] = {name: parameter.detach().cpu().clone() for name, parameter in own.items()}
    reset = getattr(module, "reset_parameters", None)
    if isinstance(module, _NORMAL) or reset is None:
        for values in drawn.values():
            if values.ndim > 1:
                nn.init.normal_(values, std=std)
            elif isinstance(module, _NORMAL):
                nn.init.zeros_(values)
        return drawn
    fresh = copy.deepcopy(module)
    for name, values in drawn.items():
        setattr(fresh, name, nn.Parameter(values))
    with torch.no_grad():
        fresh.reset_parameters()  # type: ignore[operator]
    return dict(fresh.named_parameters(recurse=False))
