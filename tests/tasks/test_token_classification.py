"""Token classification: labels at first tokens, entities, what is wrong with rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from autopeft.tasks import TokenClassification
from autopeft.tasks.batch import IGNORED, LABELS
from autopeft.tasks.word_metrics import EntityF1
from tests.task_cases import entity_f1, spelt_rows

TAGS = ("O", *(f"{prefix}-{kind}" for kind in ("PER", "LOC") for prefix in "BIES"))
ROWS = st.lists(
    st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), max_size=7), min_size=1, max_size=4
)


def task(rows: dict[str, list[Any]] | None = None, **settings: Any) -> TokenClassification:
    return TokenClassification(Dataset.from_dict(spelt_rows(60, 0) if rows is None else rows), **settings)


def pieces(side: str = "right") -> PreTrainedTokenizerFast:
    """Return a tokenizer that splits "ab" in two tokens."""
    tokens = ["[PAD]", "[UNK]", "a", "##b", "c"]
    model = WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", padding_side=side
    )


@given(ROWS, st.integers(0, 99))
def test_f1_of_entities_equals_a_slow_reference(rows: list[list[tuple[str, str]]], seed: int) -> None:
    """Also with tokens in between that do not count."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(rows), 9
    predicted = torch.randint(len(TAGS), shape, generator=generator)
    labels = torch.full(shape, IGNORED)
    for row, tags in enumerate(rows):
        places = torch.randperm(9, generator=generator)[: len(tags)].sort().values
        for place, (left, right) in zip(places, tags, strict=True):
            predicted[row, place], labels[row, place] = TAGS.index(left), TAGS.index(right)
    metric = EntityF1(TAGS)
    metric.update(predicted, labels)
    expected = entity_f1(
        [[left for left, _ in row] for row in rows], [[right for _, right in row] for row in rows]
    )
    assert float(metric.compute()) == pytest.approx(expected)


def test_runs_of_labels_without_a_prefix_are_entities() -> None:
    metric = EntityF1(("O", "LOC", "PER"))
    metric.update(torch.tensor([[1, 1, 0, 2, 1]]), torch.tensor([[1, 1, 0, 2, 2]]))
    assert float(metric.compute()) == pytest.approx(2 * 1 / (3 + 2))


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_first_token_of_a_word_carries_its_label(side: str) -> None:
    rows = {"tokens": [["ab", "c"], ["c", "ab", "ab"]] * 20, "labels": [["x", "y"], ["y", "x", "y"]] * 20}
    data = task(rows).data(pieces(side), batch_size=40, seed=0)
    batch = data.largest_batch()
    kept = batch["attention_mask"] == 1
    found = {
        (tuple(ids[mask].tolist()), tuple(labels[mask].tolist()))
        for ids, labels, mask in zip(batch["input_ids"], batch[LABELS], kept, strict=True)
    }
    assert found == {((2, 3, 4), (0, IGNORED, 1)), ((4, 2, 3, 2, 3), (1, 0, IGNORED, 1, IGNORED))}
    assert (batch[LABELS][~kept] == IGNORED).all()


def test_a_lone_word_of_two_tokens_has_its_label() -> None:
    single = Dataset.from_dict({"tokens": [["ab"]], "labels": [["x"]]})
    double = Dataset.from_dict({"tokens": [["ab"], ["c"]], "labels": [["x"], ["y"]]})
    data = TokenClassification(DatasetDict(train=double, validation=single, test=single)).data(
        pieces(), batch_size=4, seed=0
    )
    assert next(iter(data.val_dataloader()))[LABELS].tolist() == [[0, IGNORED]]


def test_words_that_are_cut_or_do_not_count_have_no_label(caplog: pytest.LogCaptureFixture) -> None:
    features = Features({"tokens": List(Value("string")), "labels": List(ClassLabel(names=["x", "y"]))})
    rows = {"tokens": [["c", "c", "ab", "c"]] * 40, "labels": [[1, -100, 0, 1]] * 40}
    source = Dataset.from_dict(rows, features=features)
    data = TokenClassification(source, max_length=3).data(pieces(), batch_size=4, seed=0)
    assert data.largest_batch()[LABELS][0].tolist() == [1, IGNORED, 0]
    assert "32 of the 128 words of the train split lie behind max_length=3 tokens" in caplog.text


def test_tokens_are_kept_with_their_words(tmp_path: Any) -> None:
    batches = [task().data(pieces(), batch_size=4, seed=0, cache=tmp_path).largest_batch() for _ in range(2)]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_the_trivial_score_is_that_of_the_most_frequent_label() -> None:
    rows = {"tokens": [["a", "b", "c", "c"]] * 40, "labels": [["B-X", "I-X", "O", "O"]] * 40}
    assert task(rows).trivial_score("accuracy") == 0.5
    assert task(rows).trivial_score("f1") == 0
    rows["labels"] = [["B-X", "O", "B-X", "B-X"]] * 40
    assert task(rows).trivial_score("f1") == pytest.approx(2 * 3 / (3 + 4))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"tokens": [["a"], ["b", "c"]] * 9, "labels": [["x"], ["x", "y", "y"]] * 9},
            "Row 1 of the train split has 3 labels in 'labels' for 2 words in 'tokens'",
        ),
        ({"tokens": ["a b"] * 9, "labels": [["x", "y"]] * 9}, "'a b' in 'tokens', expected a list of words"),
        (
            {"tokens": [[1, 2]] * 9, "labels": [["x", "y"]] * 9},
            r"\[1, 2\] in 'tokens', expected a list of words",
        ),
        ({"tokens": [["a", "b"]] * 9, "labels": ["x"] * 9}, "'x' in 'labels', expected a list of labels"),
        (
            {"tokens": [["a", None]] * 9, "labels": [["x", "y"]] * 9},
            "Row 0 of the train split has None for a word",
        ),
        (
            {"tokens": [["a", "b"]] * 30, "labels": [["x", "x"]] * 30},
            "words of the train split have one label",
        ),
        ({"words": [["a", "b"]], "labels": [["x", "x"]]}, "column of the train split 'tokens'"),
    ],
)
def test_what_is_wrong_is_said(rows: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(rows).validate()


def test_a_label_that_training_lacks_is_said_with_its_row() -> None:
    strange = Dataset.from_dict({"tokens": [["a"], ["b"]], "labels": [["O"], ["B-LC"]]})
    source = DatasetDict(train=Dataset.from_dict(spelt_rows(60, 0)), test=strange)
    with pytest.raises(ValueError, match=r"Row 1 of the test split has the label 'B-LC'.*'B-LOC'"):
        TokenClassification(source).validate()


def test_two_columns_of_words_are_refused() -> None:
    with pytest.raises(ValueError, match="text is one column with lists of words"):
        task(text=("tokens", "more"))
