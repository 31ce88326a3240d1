"""Rows of a language model's data as tokens: which column layout they have, and which tokens are learnt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from autopeft.tasks.batch import IGNORED
from autopeft.tasks.tokenization import Arrays, content_path, kept, tokenizer_key

_FORMAT = "token rows, 1"
"""Of the files that rows are kept in: another number for whatever reads rows in another way."""

Layout = str
"""A name of `_LAYOUTS`."""
_LAYOUTS: Mapping[Layout, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
    "conversations": ("conversations",),
    "prompt/response": ("prompt", "response"),
    "question/answer": ("question", "answer"),
}
LAYOUTS = "; ".join(" and ".join(map(repr, needed)) for needed in _LAYOUTS.values())
"""The columns of each layout, for people."""
_CHATS: tuple[Layout, ...] = ("messages", "conversations")
_INSTRUCTIONS: tuple[Layout, ...] = ("instruction", "prompt/response", "question/answer")
_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles that are not those of chat templates."""
_ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


@dataclass(frozen=True)
class TokenRow:
    """One row.

    Attributes:
        tokens: All token ids, the end token included.
        labels: The id of each token that is learnt, `IGNORED` for the others.
        prompt: Number of tokens before the last completion; 0 for plain text.
        reply: Token ids of the last completion and its end, whole where the row is cut; none for plain text.
    """

    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    prompt: int
    reply: tuple[int, ...]

    @property
    def is_learnt(self) -> bool:
        """Whether it has a token that is learnt; the first is not predicted."""
        return any(label != IGNORED for label in self.labels[1:])

    def cut(self, length: int) -> TokenRow:
        """Return the row with so many tokens at most."""
        if len(self.tokens) <= length:
            return self
        return replace(self, tokens=self.tokens[:length], labels=self.labels[:length])


def layout_of(columns: Sequence[str]) -> Layout:
    """Return the layout that a data set's columns have; the first that fits.

    Raises:
        ValueError: None fits.
    """
    for layout, needed in _LAYOUTS.items():
        if set(needed) <= set(columns):
            return layout
    raise ValueError(
        f"The columns {', '.join(map(repr, columns))} are no layout of a language model's data: expected "
        f"{LAYOUTS}. Rename columns with `datasets.Dataset.rename_column`."
    )


def learnt_column(layout: Layout) -> str:
    """Return the column that holds what is learnt."""
    return _LAYOUTS[layout][-1]


def example_key(row: Mapping[str, Any], layout: Layout) -> str:
    """Return what rows of one prompt have in common, so that they stay in one split; of text all of it."""
    prompt = _LAYOUTS[layout][0]
    if layout in _CHATS:
        return json.dumps(row[prompt][:-1] if isinstance(row[prompt], list) else str(row[prompt]))
    names = (prompt, "input") if layout == "instruction" else (prompt,)
    return json.dumps([row.get(name) for name in names])


@dataclass(frozen=True)
class _Part:
    """A piece of a row's text, and whether it is learnt."""

    text: str
    is_completion: bool


class RowReader:
    """Turns rows of one layout into tokens.

    Args:
        tokenizer: The backbone's. Messages need its chat template.
        layout: The rows' layout.
        all_tokens: Whether prompts are learnt as well.

    Raises:
        ValueError: The tokenizer cannot do what the layout needs.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, layout: Layout, *, all_tokens: bool = False
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say which characters a token stands for: expected a "
                "fast tokenizer (one with a tokenizer.json)."
            )
        if layout in _CHATS and tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path or 'this backbone'} has no chat template, which "
                f"the column {layout!r} needs: set tokenizer.chat_template, take an instruction-tuned "
                "backbone, or give columns 'prompt' and 'completion'."
            )
        self._tokenizer = tokenizer
        self._layout = layout
        self._all_tokens = all_tokens

    def read(self, row: Mapping[str, Any], place: str) -> TokenRow:
        """Return a row as tokens.

        Args:
            row: Its columns.
            place: Where it stands, for errors, as in "Row 3 of the train split".

        Raises:
            ValueError: The row is not of the layout.
        """
        parts = self._parts(row, place)
        text = "".join(part.text for part in parts)
        # A chat template writes its special tokens itself.
        encoded = self._tokenizer(text, add_special_tokens=not self._is_chat, return_offsets_mapping=True)
        tokens: list[int] = list(encoded["input_ids"])
        spans: list[tuple[int, int]] = list(encoded["offset_mapping"])
        completions, position = [], 0
        for part in parts:
            if part.is_completion:
                completions.append((position, position + len(part.text)))
            position += len(part.text)
        end = self._tokenizer.eos_token_id
        if not self._is_chat and end is not None:
            before = len(tokens) - (tokens[-1:] == [end])  # some write it, as standing for no character
            tokens[before:], spans[before:] = [end], [(position - 1, position)]
        if self._layout == "text" or self._all_tokens:
            is_learnt = [True] * len(tokens)
        else:
            is_learnt = [
                any(first < stop and last > start for start, stop in completions) and last > first
                for first, last in spans
            ]
        labels = (token if learnt else IGNORED for token, learnt in zip(tokens, is_learnt, strict=True))
        if not completions:
            return TokenRow(tuple(tokens), tuple(labels), 0, ())
        start, stop = completions[-1]
        prompt = next((index for index, (_, last) in enumerate(spans) if last > start), len(tokens))
        behind = next((index for index, (first, _) in enumerate(spans) if first >= stop), len(tokens))
        return TokenRow(tuple(tokens), tuple(labels), prompt, tuple(tokens[prompt:behind]))

    def read_all(
        self, rows: Sequence[Mapping[str, Any]], places: Sequence[str], cache: Path | None
    ) -> list[TokenRow]:
        """Return rows as tokens, from a folder where it has them.

        Args:
            rows: Their columns.
            places: Where each stands.
            cache: Folder with one file a (rows, tokenizer, settings); None for no file.

        Raises:
            ValueError: A row is not of the layout, or the folder cannot be written.
        """
        path = None if cache is None else content_path(cache, self._settings, [rows])

        def read() -> Arrays:
            found = [self.read(row, place) for row, place in zip(rows, places, strict=True)]
            labels = np.array([label for row in found for label in row.labels], np.int32)
            return {
                "tokens": np.array([token for row in found for token in row.tokens], np.int32),
                "is_learnt": labels != IGNORED,
                "counts": np.array([(len(row.tokens), row.prompt, len(row.reply)) for row in found]),
            }

        arrays, found, start = kept(path, read), [], 0
        for length, prompt, reply in arrays["counts"].tolist():
            here, start = slice(start, start + length), start + length
            ids, is_learnt = arrays["tokens"][here], arrays["is_learnt"][here]
            tokens, labels = tuple(ids.tolist()), tuple(np.where(is_learnt, ids, IGNORED).tolist())
            found.append(TokenRow(tokens, labels, prompt, tokens[prompt : prompt + reply]))
        return found

    @cached_property
    def _settings(self) -> list[str]:
        own = [_FORMAT, self._layout, str(self._all_tokens), str(self._tokenizer.chat_template)]
        return [tokenizer_key(self._tokenizer), *own]

    @property
    def _is_chat(self) -> bool:
        has_template = self._tokenizer.chat_template is not None
        return self._layout in _CHATS or (self._layout in _INSTRUCTIONS and has_template)

    def _parts(self, row: Mapping[str, Any], place: str) -> list[_Part]:
        columns = _LAYOUTS[self._layout]
        if self._layout in _CHATS:
            return self._chat(_messages(row[columns[0]], columns[0], place), place)
        names = (*columns, "input") if self._layout == "instruction" else columns
        texts = {name: _text(row.get(name), name, place) for name in names}
        if self._layout == "text":
            return [_Part(texts["text"], is_completion=False)]
        prompt, completion = columns
        instruction, output = texts[prompt], texts[completion]
        if self._layout == "prompt/completion":
            return [_Part(instruction, False), _Part(output, True)]
        given = texts.get("input", "")
        if self._is_chat:
            question = f"{instruction}\n\n{given}" if given else instruction
            return self._chat(
                [{"role": "user", "content": question}, {"role": "assistant", "content": output}], place
            )
        written = _ALPACA.format(
            instruction=instruction,
            with_input=", paired with an input that provides further context" if given else "",
            input=f"### Input:\n{given}\n\n" if given else "",
        )
        return [_Part(written, False), _Part(output, True)]

    def _chat(self, messages: Sequence[Mapping[str, Any]], place: str) -> list[_Part]:
        """Return a conversation in parts: what the assistant says is a completion, its end token included.

        What a template writes up to a reply is compared with what it writes of the whole. Some (Qwen 3) leave
        parts of earlier replies out of the whole: of these rows the last reply alone is learnt.
        """
        whole = self._render(messages)
        parts: list[_Part] = []
        position = 0
        replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        for index in replies:
            before = self._render(messages[:index], add_generation_prompt=True)
            through = whole if index == len(messages) - 1 else self._render(messages[: index + 1])
            if not (whole.startswith(before) and whole.startswith(through) and len(before) >= position):
                if index == replies[-1]:
                    raise ValueError(
                        f"{place}: the chat template does not write a conversation as its beginning and the "
                        "assistant's reply, so that the reply cannot be found: give columns 'prompt' and "
                        "'completion'."
                    )
                continue
            reply = through[len(before) :].rstrip("\n")  # what a template writes behind the end token
            parts += [_Part(whole[position : len(before)], False), _Part(reply, True)]
            position = len(before) + len(reply)
        return [*parts, _Part(whole[position:], False)]

    def _render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )


def is_chat(value: Any) -> bool:
    """Return whether a value is a list of messages."""
    return isinstance(value, list) and all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    )


def _messages(value: Any, column: str, place: str) -> list[Mapping[str, Any]]:
    """Return messages with a role and a content; those of ShareGPT have "from" and "value" in their place."""
    messages = [_renamed(message) for message in value] if isinstance(value, list) else value
    if not is_chat(messages):
        raise ValueError(
            f"{place} has {str(value)[:80]!r} in {column!r}, expected a list of messages such as "
            '{"role": "user", "content": "Hello"} or {"from": "human", "value": "Hello"}.'
        )
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            f"{place} has no message of the role 'assistant' in {column!r}: nothing can be learnt."
        )
    return list(messages)


def _renamed(message: Any) -> Any:
    if not isinstance(message, Mapping) or message.get("from") is None:
        return message
    role = message["from"]
    return {"role": _ROLES.get(str(role), role), "content": message.get("value")}


def _text(value: Any, name: str, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{place} has {str(value)[:80]!r} in {name!r}, expected text.")
    return value
