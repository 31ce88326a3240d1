"""Ladder side-tuning: a small network beside the blocks, through which alone gradients go.

Nothing before it is trained, so that no activations of the blocks are kept: peak memory is about that of a
forward pass. What is added comes behind the whole stack, outside of what gradient checkpointing runs again.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.core.configuration import Adapter, Site
from autopeft.methods.base import Method, Placement, Switchable, Trainable, hang
from autopeft.methods.layer_adapter import in_type_of
from autopeft.models.site_shapes import SiteShape


class Rung(nn.Module):
    """What one block adds to the side state, of which it takes the first `width` numbers."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.down = nn.Linear(features, width)
        self.mix = nn.Linear(width, width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, state: Tensor, weights: Tensor | None) -> Tensor:
        """Return the next state.

        Args:
            hidden: Hidden states of shape (rows, tokens, features).
            state: The state so far, of shape (rows, tokens, width of the state).
            weights: Of each token in the mean that all tokens are given, of shape (rows, tokens, 1); None
                where tokens must not see later ones.
        """
        hidden = in_type_of(self, hidden)
        share = self.gate.sigmoid()
        # Hidden states of some models have a few numbers that are larger than all others by far.
        read = self.down(nn.functional.layer_norm(hidden, hidden.shape[-1:]))
        own = share * read + (1 - share) * state[..., : self.width]
        found = nn.functional.gelu(self.mix(own))
        if weights is not None:
            found = found + (weights * found).sum(dim=1, keepdim=True)
        own = own + found
        return torch.cat([own, state[..., self.width :]], dim=-1)


class SideNetwork(Switchable):
    """The rungs at a stack's blocks, and the projection of the last state to the width of the stack."""

    def __init__(self, rungs: dict[str, Rung], features: int, has_means: bool) -> None:
        super().__init__()
        self.rungs = nn.ModuleDict(rungs)
        self.up = nn.Linear(max(rung.width for rung in rungs.values()), features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.has_means = has_means
        self._seen: dict[str, Tensor] = {}

    def remember(self, block: str, _block: nn.Module, _inputs: Any, output: Any) -> None:
        """Keep what a block returns until the stack has run."""
        if self.is_on:
            self._seen[block] = _hidden_of(output).detach()

    def add(self, stack: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> Any:
        """Add what the rungs make of the blocks' hidden states to what the stack returns."""
        if not self.is_on:
            return output
        hidden, place = _hidden_of(output), self.up.weight.device  # a model's blocks may lie on several
        state = hidden.new_zeros(*hidden.shape[:-1], self.up.in_features, device=place)
        given = named | inspect.signature(stack.forward).bind_partial(*inputs).arguments
        has_means = self.has_means and not given.get("is_causal")  # CLIP's text model says it in the call
        weights = _weights(given.get("attention_mask"), hidden).to(place) if has_means else None
        for block, rung in self.rungs.items():
            if (found := self._seen[block].shape) != hidden.shape:
                raise ValueError(
                    f"A ladder cannot stand beside {type(stack).__name__}: its blocks return the shape "
                    f"{tuple(found)}, and it returns {tuple(hidden.shape)}."
                )
            state = rung(self._seen.pop(block).to(place), state, weights)
        return _replaced(output, hidden, hidden + self.up(state).to(hidden))


class Ladder(Method):
    """Ladder side-tuning.

    Sung, Cho and Bansal, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning",
    2022. A rung mixes the block's hidden state, normalised and projected down, with the side state by a
    learned gate; the last state, projected up, is added to what the stack of blocks returns. Where the paper
    has attention, a rung adds the mean over a row's tokens if the model's attention says that it is not
    causal, and is not called as causal. Rungs may be of different widths: each changes the first numbers of
    the state.
    """

    name = "ladder"
    shares_state = True

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return w·d + w² weights, 2·w biases and a gate."""
        return adapter.size_or_zero * (shape.in_features + adapter.size_or_zero + 2) + 1

    def count_shared(self, placement: Placement) -> int:
        """Return w·d + d a stack, of its widest rung."""
        return sum(
            (1 + max(adapter.size_or_zero for _, adapter in rungs.values()))
            * next(iter(rungs.values()))[0].in_features
            for rungs in _stacks(placement).values()
        )

    def attach(self, model: nn.Module, placement: Placement, undo: ExitStack) -> Trainable:
        """Put a ladder beside each stack; see `Method.attach`."""
        parameters: Trainable = {}
        shared: dict[str, nn.Parameter] = {}
        for stack, rungs in _stacks(placement).items():
            shape, _ = next(iter(rungs.values()))
            host = model.get_submodule(shape.module.rpartition(".")[0].rpartition(".")[0])
            ladder = SideNetwork(
                {
                    str(site.block): Rung(shape.in_features, adapter.size_or_zero)
                    for site, (shape, adapter) in rungs.items()
                },
                shape.in_features,
                has_means=_is_bidirectional(model.get_submodule(shape.module)),
            )
            hang(host, "autopeft_ladder", ladder, undo)
            undo.callback(host.register_forward_hook(ladder.add, with_kwargs=True).remove)
            for site, (shape, _) in rungs.items():
                block, name = model.get_submodule(shape.module), str(site.block)
                undo.callback(block.register_forward_hook(partial(ladder.remember, name)).remove)
                parameters[site] = dict(ladder.rungs[name].named_parameters())
            prefix = f"{stack}." if stack else ""
            shared |= {f"{prefix}up.{name}": value for name, value in ladder.up.named_parameters()}
        parameters[self.name] = shared
        return parameters


def _stacks(placement: Placement) -> dict[str, dict[Site, tuple[SiteShape, Adapter]]]:
    """Return the rungs of each stack, from the lowest to the highest."""
    ordered = sorted(placement.items())
    return {stack: dict(rungs) for stack, rungs in groupby(ordered, key=lambda item: item[0].stack)}


def _is_bidirectional(block: nn.Module) -> bool:
    """Whether a block says that its tokens see later ones; attention that says nothing may be causal."""
    said = [bool(module.is_causal) for module in block.modules() if hasattr(module, "is_causal")]
    return bool(said) and not any(said)


def _weights(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """Return the weights of a mean over a row's tokens, padding left out, of shape (rows, tokens, 1).

    Args:
        mask: As the stack is given it: of shape (rows, tokens), or for attention (rows, ., queries, keys),
            with 0 or True at what is seen.
        hidden: Hidden states of shape (rows, tokens, features).
    """
    if mask is not None and mask.ndim == 4:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = seen.any(dim=2).any(dim=1)
    if mask is None or mask.shape != hidden.shape[:2]:  # Whisper is given one that it has no use for
        mask = hidden.new_ones(hidden.shape[:2])
    inside = mask.to(torch.float32).unsqueeze(-1)
    return inside / inside.sum(dim=1, keepdim=True)


def _hidden_of(output: Any) -> Any:
    return output if isinstance(output, Tensor) else output[0]


def _replaced(output: Any, hidden: Tensor, value: Tensor) -> Any:
    """Return what a module returned, with others in the place of hidden states wherever they are in it."""
    if output is hidden:
        return value
    if isinstance(output, list | tuple):
        return tuple(_replaced(part, hidden, value) for part in output)
    if isinstance(output, dict):  # as transformers' `ModelOutput` is
        for name, part in list(output.items()):
            output[name] = _replaced(part, hidden, value)
    return output
