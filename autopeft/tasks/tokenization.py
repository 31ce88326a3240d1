"""Tokenise texts once, and keep the result on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)
_OFFSETS = "offsets"

Tokens = tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[Sequence[str]],
    max_length: int,
    cache: Path | None,
) -> Tokens:
    """Return token values by input name, concatenated, and the rows' offsets.

    Args:
        tokenizer: The backbone's.
        columns: One column of texts, or two for pairs.
        max_length: Longer rows are cut; of a pair, the longer text first.
        cache: Folder with one file a (texts, tokenizer, length); None for no file.
    """
    path = None if cache is None else cache / f"{_key(tokenizer, columns, max_length)}.safetensors"
    if path is not None and path.is_file():
        try:
            arrays = {name: tensor.numpy() for name, tensor in load_file(path).items()}
            return arrays, arrays.pop(_OFFSETS)
        except (SafetensorError, OSError, KeyError):
            _logger.warning("The tokenised texts in %s cannot be read and are made again.", path)
    encoded = tokenizer(*(list(column) for column in columns), truncation=True, max_length=max_length)
    rows = encoded["input_ids"]
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    tokens = {
        name: np.fromiter((token for row in encoded[name] for token in row), np.int64, offsets[-1])
        for name in encoded
        if name != "attention_mask"
    }
    if path is not None:
        _save(path, {**tokens, _OFFSETS: offsets})
    return tokens, offsets


def fingerprint(columns: Iterable[Sequence[object]]) -> str:
    """Return a SHA-256 (hex) over columns of values, in order."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(f"column {len(column)}".encode())
        for value in column:
            text = str(value).encode()
            digest.update(len(text).to_bytes(8, "big") + text)
    return digest.hexdigest()


def _key(tokenizer: PreTrainedTokenizerBase, columns: Sequence[Sequence[str]], max_length: int) -> str:
    words = sorted(tokenizer.get_vocab().items())
    settings = [type(tokenizer).__name__, str(max_length), repr(tokenizer.special_tokens_map)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # A tokenizer keeps the truncation and padding of its last call.
        rules |= {"truncation": None, "padding": None}
        settings.append(json.dumps(rules, sort_keys=True))
    return fingerprint([settings, words, *columns])


def _save(path: Path, arrays: dict[str, NDArray[np.int64]]) -> None:
    """Write the file whole or not at all; several processes may write the same one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        raise ValueError(
            f"Tokenised texts cannot be kept in {path.parent}: {error.strerror}. "
            "Choose a folder that can be written."
        ) from error
