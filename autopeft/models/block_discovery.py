"""Find transformer blocks and the role of each module in them, from structure and naming habits.

No list of models: a block list is a `ModuleList` in which every element holds exactly one
self-attention; inside a block, modules are told apart by where they stand (inside attention or
not), by their shape and, where shapes cannot tell (query from key), by the names that transformers'
models share.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import nn
from transformers.pytorch_utils import Conv1D

from autopeft.core.adapter import Place, stack_order

LinearLike = nn.Linear | Conv1D

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
    """The modules of one block by role; names are relative to the block."""

    name: str
    roles: Mapping[str, str]
    unrecognised: tuple[str, ...]
    place: Place = ("", 0)


def linear_sizes(module: LinearLike) -> tuple[int, int]:
    """Return (input features, output features) of a linear layer or a GPT-2 style Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    rows, columns = module.weight.shape
    return int(rows), int(columns)


def find_blocks(model: nn.Module) -> tuple[BlockModules, ...]:
    """Return every transformer block of a model, stack after stack, from the input to the output."""
    found: list[BlockModules] = []
    roots: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(f"{root}.") for root in roots):
            continue
        blocks = [block_modules(f"{name}.{index}", block) for index, block in enumerate(module)]
        if all(block is not None for block in blocks):
            roots.append(name)
            found += [block for block in blocks if block is not None]
    if not found:
        raise ValueError(_nothing_found(model))
    return _in_stacks(found)


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
        f"No transformer block was found in {type(model).__name__}. Expected a ModuleList whose "
        "elements each hold one self-attention with query, key and value (or fused qkv) linear "
        f"layers. Module lists: {', '.join(lists) or 'none'}. "
        f"Linear layers are named: {', '.join(leaves) or 'none'}."
    )


def _linears(module: nn.Module) -> list[tuple[str, LinearLike]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)]


def block_modules(name: str, block: nn.Module) -> BlockModules | None:
    """Assign roles inside a module, or return None where it is no block with one self-attention."""
    linears = _linears(block)
    inside = [(path, module) for path, module in linears if _in_attention(path)]
    outside = [(path, module) for path, module in linears if not _in_attention(path)]
    attention = _attention_roles(inside)
    if attention is None:
        return None
    crossed = "cross_query" in attention
    roles = attention | _ffn_roles(outside, dict(linears), attention) | _norm_roles(block, crossed)
    taken = set(roles.values())
    unrecognised = tuple(path for path, _ in linears if path not in taken)
    return BlockModules(name=name, roles=roles, unrecognised=unrecognised)


def _in_attention(path: str) -> bool:
    return any(_ATTENTION.search(part) and not _NORM.search(part) for part in path.split("."))


def _attention_roles(linears: Iterable[tuple[str, LinearLike]]) -> dict[str, str] | None:
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
        return None
    for prefix, paths in outputs.items():
        if len(paths) == 1:
            roles[f"{prefix}attention_output"] = paths[0]
    return roles


def _ffn_roles(
    outside: list[tuple[str, LinearLike]],
    linears: Mapping[str, LinearLike],
    attention: Mapping[str, str],
) -> dict[str, str]:
    source = linears[attention.get("query", attention.get("qkv", ""))]
    hidden = linear_sizes(source)[0]
    downs = [path for path, module in outside if linear_sizes(module)[1] == hidden]
    if not downs:
        return {}
    down = downs[-1]
    width = linear_sizes(linears[down])[0]
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


def _norm_roles(block: nn.Module, crossed: bool) -> dict[str, str]:
    norms = [
        name
        for name, module in block.named_modules()
        if _NORM.search(type(module).__name__) and not list(module.children())
        if any(True for _ in module.parameters(recurse=False))
    ]
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
