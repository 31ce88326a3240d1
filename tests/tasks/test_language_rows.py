"""Rows of a language model's data as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from autopeft.tasks.batch import IGNORED
from autopeft.tasks.language_rows import Layout, RowReader, TokenRow, example_key, layout_of
from tests.tiny_models import CHAT_TEMPLATE, tiny_chat_tokenizer

CHAT = {
    "messages": [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5 w6"},
    ]
}


def read(row: dict[str, Any], layout: Layout, **options: Any) -> TokenRow:
    tokenizer = tiny_chat_tokenizer(**{"template": options.pop("template")} if "template" in options else {})
    return RowReader(tokenizer, layout, **options).read(row, "Row 7 of the train split")


def words(ids: Any) -> str:
    return str(tiny_chat_tokenizer().decode(list(ids)))


def learnt(row: TokenRow) -> str:
    return words(label for label in row.labels if label != IGNORED)


@pytest.mark.parametrize(
    ("columns", "layout"),
    [
        (["id", "messages"], "messages"),
        (["prompt", "completion"], "prompt/completion"),
        (["instruction", "input", "output"], "instruction"),
        (["output", "instruction"], "instruction"),
        (["text", "source"], "text"),
        (["id", "conversations"], "conversations"),
        (["prompt", "response"], "prompt/response"),
        (["question", "answer"], "question/answer"),
        (["question", "answer", "text"], "text"),
    ],
)
def test_layouts_are_recognised(columns: list[str], layout: Layout) -> None:
    assert layout_of(columns) == layout


def test_unknown_columns_are_named() -> None:
    with pytest.raises(ValueError, match=r"'query', 'reply' are no layout.*'prompt' and 'completion'"):
        layout_of(["query", "reply"])


def test_every_reply_of_a_chat_is_learnt_with_its_end() -> None:
    row = read(CHAT, "messages")
    assert (
        words(row.tokens) == "<user> w1 w2 <end> <assistant> w3 <end> <user> w4 <end> <assistant> w5 w6 <end>"
    )
    assert learnt(row) == "w3 <end> w5 w6 <end>"
    assert words(row.tokens[: row.prompt]).endswith("w4 <end> <assistant>")
    assert words(row.reply) == "w5 w6 <end>"


@pytest.mark.parametrize("layout", ["messages", "conversations"])
def test_chats_of_sharegpt_are_read_as_others(layout: Layout) -> None:
    names = {"user": "human", "assistant": "gpt"}
    chat = [{"from": names[each["role"]], "value": each["content"]} for each in CHAT["messages"]]
    assert read({layout: chat}, layout) == read(CHAT, "messages")
    assert read({layout: CHAT["messages"]}, layout) == read(CHAT, "messages")


def test_all_tokens_are_learnt_where_asked_for() -> None:
    row = read(CHAT, "messages", all_tokens=True)
    assert row.labels == row.tokens
    assert words(row.reply) == "w5 w6 <end>"


def test_of_a_template_that_forgets_earlier_replies_the_last_is_learnt() -> None:
    forgets = (
        "{% for message in messages %}<{{ message.role }}> "
        "{% if message.role == 'user' or loop.last %}{{ message.content }}{% endif %} <end>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert learnt(read(CHAT, "messages", template=forgets)) == "w5 w6 <end>"


def test_a_template_that_rewrites_the_beginning_is_refused() -> None:
    rewrites = "{{ messages | length }} {% for message in messages %}{{ message.content }} {% endfor %}"
    with pytest.raises(ValueError, match="Row 7 of the train split: the chat template does not write"):
        read(CHAT, "messages", template=rewrites)


def test_prompts_and_completions_end_with_the_end_token() -> None:
    row = read({"prompt": "w1 w2", "completion": " w3 w4"}, "prompt/completion")
    assert words(row.tokens) == "w1 w2 w3 w4 <end>"
    assert learnt(row) == "w3 w4 <end>"
    assert (row.prompt, words(row.reply)) == (2, "w3 w4 <end>")


def test_an_end_that_the_tokenizer_writes_itself_is_learnt() -> None:
    tokenizer = tiny_chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", tokenizer.eos_token_id)]
    )
    row = RowReader(tokenizer, "prompt/completion").read({"prompt": "w1", "completion": " w2"}, "Row 7")
    assert words(row.tokens) == "w1 w2 <end>"
    assert learnt(row) == words(row.reply) == "w2 <end>"


def test_plain_text_is_learnt_whole() -> None:
    row = read({"text": "w1 w2"}, "text")
    assert row.labels == row.tokens
    assert words(row.tokens) == "w1 w2 <end>"
    assert (row.prompt, row.reply) == (0, ())


@pytest.mark.parametrize("given", ["w9", "", None])
def test_instructions_are_written_as_chats_where_there_is_a_template(given: str | None) -> None:
    row = read({"instruction": "w1", "input": given, "output": "w2"}, "instruction")
    assert words(row.tokens) == f"<user> w1 {'w9 ' if given else ''}<end> <assistant> w2 <end>"
    assert learnt(row) == "w2 <end>"


def test_instructions_without_a_template_are_written_as_alpaca_has_them() -> None:
    row = read({"instruction": "w1", "input": "w9", "output": "w2"}, "instruction", template=None)
    assert "w1" in words(row.tokens)
    assert "w9" in words(row.tokens)
    assert learnt(row) == "w2 <end>"


@pytest.mark.parametrize("layout", ["prompt/response", "question/answer"])
def test_questions_are_written_as_instructions(layout: Layout) -> None:
    prompt, completion = layout.split("/")
    row = {prompt: "w1 w2", completion: "w3"}
    for options in ({}, {"template": None}):
        expected = read({"instruction": "w1 w2", "output": "w3"}, "instruction", **options)
        assert read(row, layout, **options) == expected
    assert example_key(row, layout) == example_key({"prompt": "w1 w2"}, "prompt/completion")


def test_rows_are_cut_at_their_end() -> None:
    row = read(CHAT, "messages")
    cut = row.cut(6)
    assert (cut.tokens, cut.labels, cut.reply) == (row.tokens[:6], row.labels[:6], row.reply)
    assert row.cut(100) is row


@pytest.mark.parametrize(
    ("row", "layout", "message"),
    [
        ({"messages": "w1"}, "messages", "Row 7 of the train split has 'w1' in 'messages', expected a list"),
        ({"messages": [{"role": "user"}]}, "messages", "expected a list of messages"),
        ({"messages": [{"role": "user", "content": "w1"}]}, "messages", "no message of the role 'assistant'"),
        ({"prompt": 3, "completion": "w1"}, "prompt/completion", "has '3' in 'prompt', expected text"),
        ({"conversations": [{"from": "gpt"}]}, "conversations", "in 'conversations', expected a list of mes"),
    ],
)
def test_rows_of_another_kind_are_named(row: dict[str, Any], layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(row, layout)


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(ValueError, match=r"has no chat template.*'prompt' and 'completion'"):
        RowReader(tiny_chat_tokenizer(template=None), "messages")


def test_examples_of_one_prompt_have_one_key() -> None:
    other = {"messages": [*CHAT["messages"][:-1], {"role": "assistant", "content": "w8"}]}
    assert example_key(CHAT, "messages") == example_key(other, "messages")
    assert example_key({"prompt": "a", "completion": "b"}, "prompt/completion") == example_key(
        {"prompt": "a", "completion": "c"}, "prompt/completion"
    )
    assert example_key({"text": "a"}, "text") != example_key({"text": "b"}, "text")


@pytest.mark.parametrize("all_tokens", [False, True])
def test_rows_are_read_once(all_tokens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [CHAT, {"messages": CHAT["messages"][:2]}]

    def read_all(template: str = CHAT_TEMPLATE, rows: Sequence[Any] = rows) -> list[TokenRow]:
        reader = RowReader(tiny_chat_tokenizer(template=template), "messages", all_tokens=all_tokens)
        return reader.read_all(rows, ["Row 0", "Row 1"][: len(rows)], tmp_path)

    expected = [read(row, "messages", all_tokens=all_tokens) for row in rows]
    assert read_all() == expected
    others = [read_all(rows=rows[:1]), read_all(template=f"w9 {CHAT_TEMPLATE}")]
    assert len([*tmp_path.iterdir()]) == 1 + len(others)
    monkeypatch.setattr(RowReader, "read", lambda *_: pytest.fail("a row was read again"))
    assert read_all() == expected
