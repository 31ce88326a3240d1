"""`autopeft init`: every task is recognised by its columns, and what is written can be searched."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from typer.testing import CliRunner, Result

from autopeft.cli import app
from autopeft.config_template import recognise
from tests.learnable import save_learnable_csv, save_tiny_model
from tests.task_cases import (
    answered_rows,
    compared_rows,
    dictated_rows,
    drawn_rows,
    scored_rows,
    spelt_rows,
    sung_rows,
    tagged_rows,
)
from tests.tiny_models import tiny_chat_tokenizer, tiny_language_model


def init(*arguments: object, answers: str | None = None) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, arguments)], input=answers)


def init_error(*arguments: object) -> str:
    result = init(*arguments)
    assert isinstance(result.exception, ValueError), result.output
    return str(result.exception)


def saved(folder: Path, rows: Mapping[str, list[Any]]) -> str:
    path = folder / "rows.parquet"
    Dataset.from_dict(dict(rows)).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder, a tiny language model and a CSV."""
    folder = tmp_path_factory.mktemp("init")
    save_tiny_model(folder / "model")
    tiny_language_model("llama").save_pretrained(folder / "language")
    tiny_chat_tokenizer().save_pretrained(folder / "language")
    save_learnable_csv(folder / "data.csv")
    return folder


@pytest.mark.parametrize(
    ("rows", "task", "columns"),
    [
        (drawn_rows, "ImageClassification", {"image": "image", "label": "label"}),
        (compared_rows, "PreferenceOptimization", {}),
        (sung_rows, "AudioClassification", {"audio": "audio", "label": "label"}),
        (dictated_rows, "SpeechRecognition", {"audio": "audio", "target": "text"}),
        (answered_rows, "Seq2Seq", {"source": "source", "target": "target"}),
        (spelt_rows, "TokenClassification", {"text": "tokens", "label": "labels"}),
        (tagged_rows, "MultiLabelClassification", {"text": "text", "label": "label"}),
        (scored_rows, "Regression", {"text": "text", "label": "label"}),
    ],
)
def test_every_task_is_recognised_by_its_columns(
    rows: Callable[[int, int], Mapping[str, list[Any]]], task: str, columns: object, tmp_path: Path
) -> None:
    found, settings, _ = recognise(saved(tmp_path, rows(48, 0)))
    assert (type(found).__name__, settings) == (task, columns)


def test_preferences_are_recognised_before_their_chats(tmp_path: Path) -> None:
    """The layout of UltraFeedback, which has the chosen chats in "messages" as well."""
    chats = [
        [{"role": "user", "content": f"w{row}"}, {"role": "assistant", "content": f"w{row}"}]
        for row in range(40)
    ]
    prompts = [f"w{row}" for row in range(40)]
    rows: dict[str, list[Any]] = {"prompt": prompts, "messages": chats, "chosen": chats}
    found, settings, _ = recognise(saved(tmp_path, rows | {"rejected": chats[1:] + chats[:1]}))
    assert (type(found).__name__, settings) == ("PreferenceOptimization", {})
    assert type(recognise(saved(tmp_path, rows))[0]).__name__ == "CausalLM"


def reviews(count: int = 40) -> dict[str, list[Any]]:
    return {
        "review": [f"what guest {row} thinks of it" for row in range(count)],
        "stars": [row % 5 for row in range(count)],
    }


def distinct(name: str, count: int = 40) -> dict[str, list[Any]]:
    return {name: [f"2024-01-{row}" for row in range(count)]}


@pytest.mark.parametrize("aside", ["id", "date", "Review_ID", "url"])
def test_what_tells_rows_apart_is_no_text(aside: str, tmp_path: Path) -> None:
    found, settings, _ = recognise(saved(tmp_path, {**distinct(aside), **reviews()}))
    assert (type(found).__name__, settings) == ("TextClassification", {"text": "review", "label": "stars"})


def test_texts_have_words_unless_none_does(tmp_path: Path) -> None:
    named: dict[str, list[Any]] = {"user": [f"guest{row}" for row in range(40)], **reviews()}
    assert recognise(saved(tmp_path, named))[1]["text"] == "review"
    rows: dict[str, list[Any]] = {
        "review": [f"好吃{row}" for row in range(40)],
        "stars": [row % 5 for row in range(40)],
    }
    assert recognise(saved(tmp_path, rows))[1]["text"] == "review"


@pytest.mark.parametrize("aside", ["split", "fold", "user_id"])
def test_what_parts_rows_is_no_label(aside: str, tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {**reviews(), aside: [row % 2 for row in range(40)]}
    assert recognise(saved(tmp_path, rows))[1]["label"] == "stars"


def test_several_columns_are_a_question(tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {**reviews(), "verified": [row % 2 == 0 for row in range(40)]}
    data = saved(tmp_path, rows)
    with pytest.raises(ValueError, match=r"may be the label: 'stars', 'verified'. Say which with --label\."):
        recognise(data)
    assert recognise(data, label="verified")[1] == {"text": "review", "label": "verified"}
    rows["title"] = [f"of guest {row}" for row in range(40)]
    data = saved(tmp_path, rows)
    with pytest.raises(ValueError, match=r"may be the text: 'review', 'title'. Say which with --text \(two"):
        recognise(data, label="stars")
    assert recognise(data, text=["title", "review"], label="stars")[1]["text"] == ["title", "review"]
    answers = {"label": ("stars",), "text": ("review", "title")}
    assert recognise(data, choose=lambda setting, columns: answers[setting])[1] == {
        "text": ["review", "title"],
        "label": "stars",
    }
    with pytest.raises(ValueError, match="did you mean 'review'"):
        recognise(data, text=["reviews"])


def test_a_label_of_another_task_may_be_meant(tmp_path: Path) -> None:
    data = saved(tmp_path, {**reviews(), "price": [row + 0.5 for row in range(40)]})
    with pytest.raises(ValueError, match="may be the label: 'price', 'stars'"):
        recognise(data)
    for label, task in (("price", "Regression"), ("stars", "TextClassification")):
        assert type(recognise(data, label=label)[0]).__name__ == task
    assert recognise(data, "Regression")[1]["label"] == "price"
    with pytest.raises(ValueError, match="CausalLM has no 'label': leave out --label"):
        recognise(data, "CausalLM", label="stars")


@pytest.mark.parametrize(
    "pair", [("evidence", "claim"), ("premise", "hypothesis"), ("Question", "Passage"), ("text_a", "text_b")]
)
def test_texts_are_read_together_where_their_names_say_so(pair: tuple[str, str], tmp_path: Path) -> None:
    texts = {name: [f"what {name} {row} says" for row in range(40)] for name in pair}
    rows: dict[str, list[Any]] = {**distinct("title"), **texts, "label": [row % 2 for row in range(40)]}
    assert recognise(saved(tmp_path, rows))[1]["text"] == [*pair]
    rows |= {name: [f"what {name} {row} says" for row in range(40)] for name in ("sentence1", "sentence2")}
    with pytest.raises(ValueError, match="may be the text: "):
        recognise(saved(tmp_path, rows))


def test_scores_of_many_values_are_numbers(tmp_path: Path) -> None:
    """Whole numbers too, beside a text that a language model could learn."""
    rows: dict[str, list[Any]] = {
        "text": [f"what guest {row} thinks" for row in range(300)],
        "score": [(7 * row) % 101 for row in range(300)],
    }
    for numbered in (
        rows,
        {"Unnamed: 0": [*range(300)], **rows},
        {"guestId": [3 * n for n in range(300)], **rows},
    ):
        found, settings, _ = recognise(saved(tmp_path, numbered))
        assert (type(found).__name__, settings) == ("Regression", {"text": "text", "label": "score"})
        found.validate()
    alone = {"n": [*range(300)], "text": rows["text"]}
    assert type(recognise(saved(tmp_path, alone))[0]).__name__ == "CausalLM"


@pytest.mark.parametrize(("mark", "named"), [(";", "';'"), ("\t", "tabs")])
def test_a_file_of_another_separator_is_said(mark: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([f"review{mark}stars", *(f"good {row}{mark}{row % 5}" for row in range(40))]))
    for task in (None, "Regression"):
        with pytest.raises(ValueError, match=f"seems to be separated by {named}: .*Save it with commas"):
            recognise(str(path), task)


def test_a_named_task_says_how_columns_are_named(tmp_path: Path) -> None:
    data = saved(tmp_path, reviews())
    with pytest.raises(ValueError, match="name them, as in --text review --label stars, or"):
        recognise(data, "Regression")
    assert recognise(data, "Regression", text=["review"], label="stars")[1]["label"] == "stars"


def test_tags_of_several_kinds_are_a_question(tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {
        "tokens": [["a", "b"]] * 20,
        "pos_tags": [[0, 1]] * 20,
        "ner_tags": [[0, 0]] * 20,
    }
    data = saved(tmp_path, rows)
    with pytest.raises(ValueError, match="may be the label: 'pos_tags', 'ner_tags'"):
        recognise(data)
    assert recognise(data, label="ner_tags")[1] == {"text": "tokens", "label": "ner_tags"}


def test_twenty_rows_of_five_classes_are_enough(tmp_path: Path) -> None:
    found, settings, _ = recognise(saved(tmp_path, reviews(20)))
    assert (type(found).__name__, settings["label"]) == ("TextClassification", "stars")
    found.validate()


def test_what_is_written_for_texts_is_valid(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    result = init("--model", "model", "--data", "data.csv", "--to", "texts.yaml", "--text", "text")
    assert (
        "Recognised: type: TextClassification, dataset: data.csv, text: text, label: label" in result.output
    )
    result = CliRunner().invoke(app, ["validate", "texts.yaml", "space={type: Uniform}"])
    assert result.exit_code == 0, result.output
    assert "is there already" in init_error("--model", "model", "--data", "data.csv", "--to", "texts.yaml")


def test_what_is_written_for_chats_is_valid(place: Path) -> None:
    chats = [
        [{"role": "user", "content": f"w{row} w3"}, {"role": "assistant", "content": f"w{row + 1}"}]
        for row in range(60)
    ]
    data, to = place / "chats.jsonl", place / "chats.yaml"
    data.write_text("\n".join(json.dumps({"messages": messages}) for messages in chats))
    assert "CausalLM" in init("--model", place / "language", "--data", data, "--to", to).output
    result = CliRunner().invoke(app, ["validate", str(to), "space={type: Uniform}"])
    assert result.exit_code == 0, result.output


def test_chats_need_a_template(tmp_path: Path) -> None:
    tiny_language_model("llama").save_pretrained(tmp_path / "plain")
    tiny_chat_tokenizer(template=None).save_pretrained(tmp_path / "plain")
    chats = [[{"from": "human", "value": f"w{row}"}, {"from": "gpt", "value": "w1"}] for row in range(30)]
    data, to = saved(tmp_path, {"conversations": chats}), tmp_path / "chats.yaml"
    found = init_error("--model", tmp_path / "plain", "--data", data, "--to", to)
    assert "has no chat template, which the column 'conversations' needs" in found
    assert not to.exists()


def test_answers_are_learnt_unless_they_are_labelled(tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {
        "question": [f"w{row} w1" for row in range(40)],
        "answer": [f"w{row}" for row in range(40)],
        "subject": [f"s{row % 4}" for row in range(40)],
    }
    assert type(recognise(saved(tmp_path, rows))[0]).__name__ == "CausalLM"
    labelled = rows | {"label": [row % 2 for row in range(40)]}
    found, settings, _ = recognise(saved(tmp_path, labelled))
    assert (type(found).__name__, settings["label"]) == ("TextClassification", "label")


def test_a_terminal_is_asked_for_what_is_missing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--model is missing" in init_error("--data", place / "data.csv")
    monkeypatch.setattr("autopeft.reporting.terminal_questions.is_terminal", lambda: True)
    to = place / "asked.yaml"
    result = init("--model", place / "model", "--to", to, answers=f"{place / 'data.csv'}\n")
    assert result.exit_code == 0, result.output
    assert "Data" in result.output
    assert "Model" not in result.output
    assert str(place / "data.csv") in to.read_text()
    data, to = (
        saved(place, {**reviews(), "title": [f"of guest {row}" for row in range(40)]}),
        place / "b.yaml",
    )
    result = init("--model", place / "model", "--data", data, "--to", to, answers="review, title\n")
    assert "Column of the text: review, title, or two with a comma between" in result.output
    assert "  text:\n  - review\n  - title\n  label: stars\n" in to.read_text()
    odd = init("--model", place / "model", "--data", data, "--to", place / "c.yaml", answers="revew\n")
    assert "did you mean 'review'" in str(odd.exception)


def test_errors_name_the_mend(place: Path, tmp_path: Path) -> None:
    model, data, to = place / "model", place / "data.csv", tmp_path / "search.yaml"
    assert "did you mean 'TextClassification'" in init_error(
        "--model", model, "--data", data, "--to", to, "--task", "TextClassificaton"
    )
    found = init_error("--model", model, "--data", data, "--to", to, "--task", "ImageClassification")
    assert found.startswith("ImageClassification needs columns 'image' (image) and 'label' (class), and the")
    assert "expected a folder with a config.json" in init_error(
        "--model", tmp_path / "nowhere", "--data", data, "--to", to
    )
    odd = saved(tmp_path, {"a": [f"text {row}" for row in range(20)], "b": list(range(20))})
    found = init_error("--model", model, "--data", odd, "--to", to)
    assert "with --text and --label, for a language model name columns 'messages'; " in found
    assert not to.exists()
