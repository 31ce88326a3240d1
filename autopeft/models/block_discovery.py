"""Find the blocks of a model and the role of each module in them, from structure and naming habits.

No list of models: a block list is a `ModuleList` in which every element holds exactly one
self-attention, or some do and the others have a mixer (a state space, a convolution) in its place; where no
block has attention, one whose elements all have mixers. Inside a block, modules are told apart by where they
stand (inside attention or not), by their shape and, where shapes cannot tell (query from key), by the names
that transformers' models share. Linear layers of a mixer are called by their names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from autopeft.core.adapter import Place, is_module_name, stack_order

LinearLike = nn.Linear | Conv1D
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)
_NORM = re.compile(r"norm", re.IGNORECASE)
_LEAF_ROLES = (
    ("qkv", re.compile(r"w?qkv(_proj)?|c_attn|query_key_value|in_proj", re.IGNORECASE)),
    ("query", re.compile(r"w?q(uery)?(_(proj|lin))?", re.IGNORECASE)),
    ("key", re.compile(r"w?k(ey)?(_(proj|lin))?", re.IGNORECASE)),
    ("value", re.compile(r"w?v(alue)?(_(proj|lin))?", re.IGNORECASE)),
)
_POSITION = re.compile(r"(^|_)pos(_|$)", re.IGNORECASE)
_NORM_ORDER: Mapping[int, tuple[str, ...]] = {
    2: ("attention_norm", "ffn_norm"),
    3: ("attention_norm", "cross_attention_norm", "ffn_norm"),
    4: ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm"),
}
"""Roles of a block's norms in order, by how many it has; three where it attends to an encoder."""
_GATE = re.compile(r"gate|wi_0|w1", re.IGNORECASE)
_FFN = re.compile(r"(^|_)(mlp|ffn?|feed|pw)", re.IGNORECASE)
_EXPERTS = re.compile(r"expert", re.IGNORECASE)
_EXPERT_ROLES = (
    ("ffn_experts_down", re.compile(r"down|w2|output", re.IGNORECASE)),
    ("ffn_experts_gate_up", re.compile(r"gate_(and_)?up|w13|input", re.IGNORECASE)),
    ("ffn_experts_up", re.compile(r"up|w1", re.IGNORECASE)),
)
_STACKS = (
    ("vision", re.compile(r"vision|visual|image|pixel", re.IGNORECASE)),
    ("audio", re.compile(r"audio|speech", re.IGNORECASE)),
    ("text", re.compile(r"text|language", re.IGNORECASE)),
    ("encoder", re.compile(r"encoder", re.IGNORECASE)),
    ("decoder", re.compile(r"decoder", re.IGNORECASE)),
)
"""Names of stacks, by what the names of their modules have in them."""


@dataclass(frozen=True)
class BlockModules:
    """The modules (of experts, the parameters) of one block by role; names are relative to the block."""

    name: str
    roles: Mapping[str, str]
    unrecognised: tuple[str, ...]
    has_attention: bool
    width: int  # of its hidden states
    place: Place = ("", 0)


def linear_sizes(module: LinearLike) -> tuple[int, int]:
    """Return (input features, output features) of a linear layer or a GPT-2 style Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    rows, columns = module.weight.shape
    return int(rows), int(columns)


def find_blocks(model: nn.Module) -> tuple[BlockModules, ...]:
    """Return every block of a model, stack after stack, from the input to the output."""
    found: list[list[BlockModules]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{blocks[0].name.rpartition('.')[0]}.") for blocks in found)
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or inside:
            continue
        blocks = [block_modules(f"{name}.{index}", block) for index, block in enumerate(module)]
        known = [block for block in blocks if block is not None]
        if len(known) == len(blocks):
            found.append(known)
    with_attention = [blocks for blocks in found if any(block.has_attention for block in blocks)]
    if not found:
        raise ValueError(_nothing_found(model))
    return _in_stacks([block for blocks in with_attention or found for block in blocks])


def _in_stacks(blocks: Sequence[BlockModules]) -> tuple[BlockModules, ...]:
    """Give blocks their places: a stack is named by where the names of lists first differ, numbers apart."""
    paths = [[part for part in block.name.split(".") if not part.isdigit()] for block in blocks]
    columns = zip(*paths, strict=False)
    shared = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, columns))
    is_one = all(len(path) == shared for path in paths)
    stacks = ["" if is_one else _stack_name((path[shared:] or path)[0]) for path in paths]
    seen: Counter[str] = Counter()
    placed = []
    for stack, block in zip(stacks, blocks, strict=True):
        placed.append(replace(block, place=(stack, seen[stack])))
        seen[stack] += 1
    return tuple(sorted(placed, key=lambda block: stack_order(block.place[0])))


def _stack_name(part: str) -> str:
    return next((name for name, pattern in _STACKS if pattern.search(part)), part)


def _nothing_found(model: nn.Module) -> str:
    lists = [
        f"{name} ({len(module)} × {type(module[0]).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    leaves = sorted({name.rpartition(".")[2] for name, _ in _linears(model)})
    return (
        f"No block was found in {type(model).__name__}. Expected a ModuleList whose elements each hold one "
        "self-attention with query, key and value (or fused qkv) linear layers, or a norm and another mixer "
        f"with linear layers. Module lists: {', '.join(lists) or 'none'}. "
        f"Linear layers are named: {', '.join(leaves) or 'none'}."
    )


def _linears(module: nn.Module) -> list[tuple[str, LinearLike]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)]


def block_modules(name: str, block: nn.Module) -> BlockModules | None:
    """Assign roles inside a module, or return None where it is no block."""
    linears = _linears(block)
    inside = [(path, module) for path, module in linears if _in_attention(path)]
    beside = [path for path, _ in linears if _in_state_space(block, path)]  # of attention, as in Falcon-H1
    outside = [(path, module) for path, module in linears if not _in_attention(path) and path not in beside]
    attention = _attention_roles(inside)
    if attention is None:
        return None
    if not attention:
        return _mixer_modules(name, block, linears)
    hidden = linear_sizes(dict(linears)[attention.get("query", attention.get("qkv", ""))])[0]
    norms = _norm_roles(_norms(block), "cross_query" in attention)
    roles = attention | _ffn_roles(outside, hidden) | _expert_roles(block) | norms
    roles |= {path: path for path in beside if not _is_read_past(block, path)}
    return _block(name, roles | _state_space_role(block), linears, has_attention=True, width=hidden)


def _block(
    name: str, roles: Mapping[str, str], linears: Sequence[tuple[str, LinearLike]], **found: Any
) -> BlockModules:
    taken = set(roles.values())
    unrecognised = tuple(path for path, _ in linears if path not in taken)
    return BlockModules(name=name, roles=roles, unrecognised=unrecognised, **found)


def _mixer_modules(
    name: str, block: nn.Module, linears: Sequence[tuple[str, LinearLike]]
) -> BlockModules | None:
    """Assign roles inside a block without attention; None where it is a stage of such blocks, or no block."""
    norms = _norms(block)
    outer = [path for path in norms if "." not in path or _in_attention(path) or _FFN.match(path)]
    norms = outer or norms  # without those that are part of a mixer
    if not linears or not norms or isinstance(block, nn.ModuleList) or _is_stage(block):
        return None
    outermost = min(norms, key=lambda path: path.count("."))
    hidden = next(block.get_submodule(outermost).parameters()).numel()
    within = [(path, module) for path, module in linears if any(map(_FFN.search, path.split(".")))]
    roles = _ffn_roles(within, hidden) | _expert_roles(block) | _norm_roles(norms, crossed=False)
    convolutions = [path for path, module in block.named_modules() if isinstance(module, _CONVOLUTIONS)]
    if len(convolutions) == 1:
        roles["convolution"] = convolutions[0]
    roles |= _state_space_role(block)
    taken = set(roles.values())
    for path, _ in linears:
        if path not in taken and is_module_name(path) and not _is_read_past(block, path):
            roles[path] = path
    return _block(name, roles, linears, has_attention=False, width=hidden)


def _is_stage(block: nn.Module) -> bool:
    lists = (module for module in block.modules() if isinstance(module, nn.ModuleList) and len(module))
    return any(all(_linears(child) and _norms(child) for child in children) for children in lists)


def _is_read_past(block: nn.Module, path: str) -> bool:
    """Whether kernels of a state space take a layer's weight past the layer, as they do behind the input's.

    transformers' Mamba multiplies by `dt_proj.weight` itself, and with its kernels by those of `x_proj` and
    `out_proj` too: an adapter there would be passed over.
    """
    return _in_state_space(block, path) and not path.rpartition(".")[2].startswith("in_proj")


def _in_state_space(block: nn.Module, path: str) -> bool:
    return hasattr(block.get_submodule(path.rpartition(".")[0]), "conv1d")


def _state_space_role(block: nn.Module) -> dict[str, str]:
    """Return the state space of a block, which has A_log and D; none where it has several."""
    paths = [
        path
        for path, module in block.named_modules()
        if path and {"A_log", "D"} <= dict(module.named_parameters(recurse=False)).keys()
    ]
    return {"state_space": paths[0]} if len(paths) == 1 else {}


def _expert_roles(block: nn.Module) -> dict[str, str]:
    """Return the parameters that hold a matrix for each of several experts, of shape (experts, ., .)."""
    roles: dict[str, str] = {}
    for path, parameter in block.named_parameters():
        if parameter.ndim == 3 and _EXPERTS.search(path):
            leaf = path.rpartition(".")[2]
            role = next((role for role, pattern in _EXPERT_ROLES if pattern.search(leaf)), None)
            if role is not None:
                roles.setdefault(role, path)
    return roles


def _in_attention(path: str) -> bool:
    return any(_ATTENTION.search(part) and not _NORM.search(part) for part in path.split("."))


def _attention_roles(linears: Iterable[tuple[str, LinearLike]]) -> dict[str, str] | None:
    """Return the roles in a block's attention; none where it has none, None where it has more than one."""
    roles: dict[str, str] = {}
    outputs: dict[str, list[str]] = {"": [], "cross_": []}
    for path, _ in linears:
        prefix = "cross_" if _CROSS.search(path) else ""
        leaf = path.rpartition(".")[2]
        role = next((role for role, pattern in _LEAF_ROLES if pattern.fullmatch(leaf)), None)
        if role is None:
            if not _POSITION.search(leaf):  # DeBERTa projects relative positions too
                outputs[prefix].append(path)
        elif prefix + role in roles:
            return None  # two self-attentions: a stage of blocks, not a block
        else:
            roles[prefix + role] = path
    if not ({"query", "key", "value"} <= roles.keys() or "qkv" in roles):
        return {}
    for prefix, paths in outputs.items():
        if len(paths) == 1:
            roles[f"{prefix}attention_output"] = paths[0]
    return roles


def _ffn_roles(outside: Sequence[tuple[str, LinearLike]], hidden: int) -> dict[str, str]:
    downs = [path for path, module in outside if linear_sizes(module)[1] == hidden]
    if not downs:
        return {}
    down = downs[-1]
    width = linear_sizes(dict(outside)[down])[0]
    roles = {"ffn_down": down}
    for path, module in outside:
        features, out = linear_sizes(module)
        if path == down or features != hidden:
            continue
        if out == 2 * width:
            roles["ffn_gate_up"] = path
        elif out == width and _GATE.search(path.rpartition(".")[2]):
            roles["ffn_gate"] = path
        elif out == width:
            roles["ffn_up"] = path
    return roles if len(roles) > 1 else {}


def _norms(block: nn.Module) -> list[str]:
    return [
        name
        for name, module in block.named_modules()
        if _NORM.search(type(module).__name__) and not list(module.children())
        if any(True for _ in module.parameters(recurse=False))
    ]


def _norm_roles(norms: Iterable[str], crossed: bool) -> dict[str, str]:
    roles: dict[str, str] = {}
    plain: list[str] = []
    for name in norms:
        leaf = name.rpartition(".")[2].lower()
        if leaf.startswith(("q_", "query_")):
            roles["query_norm"] = name
        elif leaf.startswith(("k_", "key_")):
            roles["key_norm"] = name
        elif _CROSS.search(name):
            roles["cross_attention_norm"] = name
        else:
            plain.append(name)
    plain.sort(key=lambda name: not _in_attention(name))  # ALBERT defines its ffn norm first
    if len(plain) == 1:
        is_ffn = re.search(r"mlp|ffn|feed", plain[0], re.IGNORECASE)
        roles["ffn_norm" if is_ffn else "attention_norm"] = plain[0]
    elif len(plain) != 3 or crossed:
        roles |= zip(_NORM_ORDER.get(len(plain), ()), plain, strict=False)
    return roles
