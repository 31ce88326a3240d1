"""Tokenise texts once, and keep the result on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from autopeft.core.durable_files import load_tensors, save_tensors

WORDS = "words"
_OFFSETS = "offsets"

Arrays = dict[str, NDArray[Any]]
Tokens = tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[Sequence[Any]],
    max_length: int,
    cache: Path | None,
    *,
    words: bool = False,
) -> Tokens:
    """Return token values by input name, concatenated, and the rows' offsets.

    Args:
        tokenizer: The backbone's.
        columns: One column of texts, or two for pairs.
        max_length: Longer rows are cut; of a pair, the longer text first.
        cache: Folder with one file a (texts, tokenizer, length); None for no file. A damaged one is
            made again.
        words: Whether rows are lists of words; then there is also, under `WORDS`, the word that a token
            belongs to, -1 of special ones.

    Raises:
        ValueError: The folder cannot be written, or the tokenizer takes no words.
    """
    path = None
    if cache is not None:
        settings = [tokenizer_key(tokenizer), str(max_length), *([WORDS] if words else [])]
        path = content_path(cache, settings, columns)

    def read() -> Arrays:
        if words and not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say which word a token belongs to: expected a fast "
                "tokenizer (one with a tokenizer.json)."
            )
        encoded = tokenizer(
            *(list(column) for column in columns),
            truncation=True,
            max_length=max_length,
            is_split_into_words=words,
        )
        rows = encoded["input_ids"]
        offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
        tokens = {
            name: np.fromiter((token for row in encoded[name] for token in row), np.int64, offsets[-1])
            for name in encoded
            if name != "attention_mask"
        }
        if words:
            places = (place for row in range(len(rows)) for place in encoded.word_ids(row))
            tokens[WORDS] = np.fromiter(
                (-1 if place is None else place for place in places), np.int64, offsets[-1]
            )
        return {**tokens, _OFFSETS: offsets}

    tokens = kept(path, read)
    return tokens, tokens.pop(_OFFSETS)


def kept(path: Path | None, make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays of a file, which is made where it is missing or damaged; of None without a file.

    Raises:
        ValueError: The file cannot be written.
    """
    found = None if path is None else load_tensors(path)
    if found is not None:
        return {name: tensor.numpy() for name, tensor in found[0].items()}
    arrays = make()
    if path is not None:
        try:
            save_tensors(path, {name: torch.from_numpy(array) for name, array in arrays.items()}, {})
        except OSError as error:
            raise ValueError(f"{error.strerror}: make room there, or choose another folder.") from error
    return arrays


def fingerprint(columns: Iterable[Sequence[object]]) -> str:
    """Return a SHA-256 (hex) over columns of values, in order."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(f"column {len(column)}".encode())
        for value in column:
            text = str(value).encode()
            digest.update(len(text).to_bytes(8, "big") + text)
    return digest.hexdigest()


def content_path(cache: Path, settings: Sequence[str], columns: Sequence[Sequence[Any]]) -> Path:
    """Return the file in a folder for what is made of columns with settings."""
    return cache / f"{fingerprint([settings, *columns])}.safetensors"


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what tells apart what tokenizers make of texts, a SHA-256 (hex)."""
    settings = [type(tokenizer).__name__, repr(tokenizer.special_tokens_map), tokenizer.truncation_side]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return fingerprint([settings, sorted(tokenizer.get_vocab().items())])
    # A tokenizer keeps the truncation and padding of its last call; each call sets its own.
    backend.no_truncation()
    backend.no_padding()
    return fingerprint([settings, [backend.to_str()]])
