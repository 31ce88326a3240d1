"""Text classification from every kind of source."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from autopeft.core.objectives import Objective
from autopeft.tasks import TextClassification, dataset_task
from autopeft.tasks.tokenization import tokenise

WORDS = ["good", "bad", "very", "film", "dog"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(
        WordLevel({word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}, "[UNK]")
    )
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]")


def rows(count: int = 60) -> dict[str, list[Any]]:
    return {
        "text": [f"{WORDS[row % 2]} {'very ' * (row % 5)}film {row}" for row in range(count)],
        "label": [("positive", "negative")[row % 2] for row in range(count)],
    }


def task(**settings: Any) -> TextClassification:
    return TextClassification(**{"dataset": Dataset.from_dict(rows()), **settings})


def written(folder: Path, suffix: str) -> Path:
    data = Dataset.from_dict(rows())
    path = folder / f"data{suffix}"
    if suffix == ".parquet":
        data.to_parquet(str(path))
    elif suffix in (".json", ".jsonl"):
        data.to_json(str(path))
    else:
        data.to_csv(str(path), sep="\t" if suffix == ".tsv" else ",")
    return path


def test_a_csv_file_has_one_type_in_all_its_parts(tmp_path: Path) -> None:
    labels = [*["True", "False"] * 10_000, *["Neither"] * 10]
    texts = [f"text {number}" for number in range(len(labels))]
    pandas.DataFrame({"text": texts, "label": labels}).to_csv(tmp_path / "claims.csv", index=False)
    assert set(task(dataset=str(tmp_path / "claims.csv")).labels) == {"True", "False", "Neither"}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_local_files(tmp_path: Path, suffix: str) -> None:
    loaded = task(dataset=written(tmp_path, suffix))
    loaded.validate()
    assert loaded.labels == ("negative", "positive")
    assert loaded.split("train") == task().split("train")
    assert [len(loaded.split(name).labels) for name in ("train", "validation", "test")] == [48, 6, 6]


def test_a_folder_with_a_file_a_split(tmp_path: Path) -> None:
    for name, count in (("train", 20), ("dev", 8), ("test", 4)):
        Dataset.from_dict(rows(count)).to_csv(str(tmp_path / f"{name}.csv"))
    loaded = task(dataset=tmp_path)
    assert [len(loaded.split(name).labels) for name in ("train", "validation", "test")] == [20, 8, 4]


def test_splits_are_disjoint_and_depend_on_the_seed_alone() -> None:
    texts = [set(task().split(name).columns[0]) for name in ("train", "validation", "test")]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 60
    assert task().split("test") == task().split("test")
    assert task().split("test") != task(seed=1).split("test")


def test_names_of_class_labels_and_order_of_numbers() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    named = Dataset.from_dict({"text": ["a", "b"] * 20, "label": [0, 1] * 20}, features=features)
    assert task(dataset=named).labels == ("no", "yes")
    numbered = Dataset.from_dict({"text": ["a", "b", "c"] * 20, "label": [10, 9, 2] * 20})
    assert task(dataset=numbered).labels == ("2", "9", "10")
    assert task(dataset=numbered).head.config["label2id"] == {"2": 0, "9": 1, "10": 2}


def test_unlabelled_test_rows_and_held_out_validation(caplog: pytest.LogCaptureFixture) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})

    def labelled(*labels: int) -> Dataset:
        data = {"text": [f"row {row}" for row in range(len(labels))], "label": list(labels)}
        return Dataset.from_dict(data, features=features)

    source = DatasetDict(train=labelled(*[0, 1] * 20), validation=labelled(1, 0, 1), test=labelled(-1, -1))
    with caplog.at_level(logging.INFO):
        glue = task(dataset=source)
        glue.validate()
    assert len(glue.split("test").labels) == 3
    assert "held out as test" in caplog.text


def test_the_search_never_reads_the_test_split(tokenizer: PreTrainedTokenizerFast) -> None:
    loaded = task(dataset=DatasetDict(train=Dataset.from_dict(rows()), test=Dataset.from_dict(rows(4))))
    loaded.validate()
    loaded.identity()
    loaded.trivial_score("accuracy")
    data = loaded.data(tokenizer, batch_size=8, seed=0)
    assert len(list(data.train_dataloader())) == data.batches_per_epoch
    list(data.val_dataloader())
    data.largest_batch()
    assert set(loaded.__dict__["_read_splits"]) == {"train", "validation"}
    assert len(data.test_dataloader()) == 1
    assert "test" in loaded.__dict__["_read_splits"]


def test_batches_of_single_texts_and_pairs(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = rows() | {"other": ["dog"] * 60}
    single = task().data(tokenizer, batch_size=8, seed=0)
    double = task(dataset=Dataset.from_dict(pairs), text=("text", "other")).data(
        tokenizer, batch_size=8, seed=0
    )
    alone, paired = (next(iter(data.train_dataloader())) for data in (single, double))
    assert paired["attention_mask"].sum() == alone["attention_mask"].sum() + 8
    again = task().data(tokenizer, batch_size=8, seed=0)
    for left, right in zip(single.train_dataloader(), again.train_dataloader(), strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)
    shapes = [tuple(batch["input_ids"].shape) for batch in single.train_dataloader()]
    largest = single.largest_batch()["input_ids"].shape
    assert largest[0] == 8
    assert largest[1] == max(width for _, width in shapes)


def test_limits_are_stratified() -> None:
    limited = task(train_examples=10, validation_examples=2, test_examples=4)
    assert sorted(limited.split("train").labels) == [0] * 5 + [1] * 5
    assert len(limited.split("validation").labels) == 2
    assert len(limited.split("test").labels) == 4


def test_class_weights_weigh_the_loss() -> None:
    logits, labels = torch.randn(6, 2), torch.tensor([0, 1, 1, 1, 0, 1])
    output, batch = SimpleNamespace(logits=logits), {"labels": labels}
    plain = functional.cross_entropy(logits, labels)
    assert torch.equal(task().loss(output, batch), plain)
    weighs = task(class_weights={"positive": 3.0})
    expected = functional.cross_entropy(logits, labels, weight=torch.tensor([1.0, 3.0]))
    assert torch.equal(weighs.loss(output, batch), expected)
    assert (float(task().weight(batch)), float(weighs.weight(batch))) == (6, 2 + 4 * 3)
    uneven = Dataset.from_dict({"text": ["a"] * 80, "label": ["n"] * 60 + ["p"] * 20})
    balanced = task(dataset=uneven, class_weights="balanced").loss(output, batch)
    weight = torch.tensor([80 / 2 / 60, 80 / 2 / 20])
    assert torch.allclose(balanced, functional.cross_entropy(logits, labels, weight=weight))


def test_a_metric_is_found_by_name_and_an_unknown_one_is_told_the_nearest() -> None:
    task = TextClassification(dataset=Dataset.from_dict(rows()))
    assert task.metric("f1") == Objective.score("f1") == task.metrics[1]
    with pytest.raises(ValueError, match=r"Unknown metric 'acuracy'.*did you mean 'accuracy'"):
        task.metric("acuracy")
    with pytest.raises(ValueError, match=r"Unknown metric 'trainable_parameters'.*accuracy, f1, matthews"):
        task.metric("trainable_parameters")


def test_metrics_and_what_the_majority_scores() -> None:
    uneven = Dataset.from_dict({"text": ["a"] * 80, "label": ["n"] * 60 + ["p"] * 20})
    loaded = task(dataset=uneven)
    assert loaded.trivial_score("accuracy") == pytest.approx(0.75)
    assert loaded.trivial_score("f1") == pytest.approx((2 * 0.75 / 1.75) / 2)
    assert loaded.trivial_score("matthews") == 0
    metrics = loaded.metric_collection()
    output = SimpleNamespace(logits=torch.tensor([[2.0, 1.0], [0.0, 1.0]]))
    loaded.update_metrics(metrics, output, {"labels": torch.tensor([0, 0])}, torch.tensor(0.0))
    assert set(metrics.compute()) == {metric.name for metric in loaded.metrics}
    assert float(metrics.compute()["accuracy"]) == 0.5
    assert loaded.best_score("f1") == 1


def test_identity_follows_the_content() -> None:
    changed = rows()
    changed["text"][0] += " indeed"
    assert task().identity() == task().identity()
    assert task().identity()["content"] != task(dataset=Dataset.from_dict(changed)).identity()["content"]


def mapped(**columns: list[Any]) -> Callable[[], TextClassification]:
    return lambda: task(dataset=Dataset.from_dict(columns))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: task(text="txt"), r"column of the train split 'txt'.*did you mean 'text'"),
        (lambda: task(label="lable"), r"did you mean 'label'"),
        (lambda: task(text=("text", "text")), "two different ones"),
        (lambda: task(validation_share=0.6, test_share=0.6), "together below 1"),
        (lambda: task(max_length=0), "whole number from 1 up"),
        (lambda: task(train_examples=True), "train_examples is a whole number from 1 up, got True"),
        (lambda: task(class_weights="balance"), "did you mean 'balanced'"),
        (lambda: task(class_weights={"positiv": 1.0}), "did you mean 'positive'"),
        (lambda: task(class_weights={"positive": -1.0}), "at least 0"),
        (lambda: task(dataset="./nowhere.csv"), "no data set file"),
        (lambda: task(dataset="no-such-data-set"), "Cannot load the data set 'no-such-data-set'"),
        (lambda: task(dataset=__file__), r"data set suffix '\.py'"),
        (lambda: task(dataset="./data.csv", subset="rte"), "for hub data sets|no data set file"),
        (mapped(text=["a"] * 4, label=["x"] * 4), "one class only"),
        (
            mapped(text=["a"] * 4, label=[1.0, 1.5, 2.5, 0.5]),
            r"1\.5 \(row 1 of the train split\).*Regression",
        ),
        (mapped(text=["a"] * 4, label=[-1, 1, 1, -1]), r"one class only: '1' \(rows with the label -1"),
        (mapped(text=["a"] * 4, label=[None, -1, -1, None]), "no labels in the training split"),
        (
            mapped(text=["a"] * 40, label=["x"] * 39 + ["y"]),
            "validation split has rows of one class only, 'x'",
        ),
        (lambda: task(validation_examples=1), "validation split has rows of one class only"),
        (lambda: task(train_examples=1), "train split has rows of one class only"),
        (
            mapped(text=[1, 2] * 20, label=["x", "y"] * 20),
            "Row 0 of the train split has 1 in 'text', expected text",
        ),
        (mapped(text=["", None] * 20, label=["x", "y"] * 20), "no rows with text in text"),
        (
            mapped(text=["a"] * 4, label=[0.0, math.inf, 1.0, 0.0]),
            "Row 1 of the train split has inf in 'label'",
        ),
        (
            mapped(text=["a"] * 4, label=[[0, 1], [1], [0], [0]]),
            "several labels a text are for MultiLabelClassification",
        ),
        (
            lambda: task(label="text"),
            "label names the column of labels, got 'text', which is read",
        ),
        (
            mapped(text=["a"] * 9, label=list("abcdefghi")),
            "Every row of the column 'label' has a value of its own",
        ),
        (lambda: task(dataset=DatasetDict(other=Dataset.from_dict(rows()))), "expected one called 'train'"),
        (mapped(text=["a", "b"], label=["x", "x"]), "one class only"),
    ],
)
def test_what_is_wrong_is_said(make: Callable[[], TextClassification], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().validate()


def test_an_unknown_label_in_another_split_is_said() -> None:
    strange = Dataset.from_dict({"text": ["", "a", "b"], "label": [None, "positve", "negative"]})
    for name in ("validation", "test"):
        with pytest.raises(ValueError, match=rf"Row 1 of the {name} split .* 'positve'.*'positive'"):
            task(dataset=DatasetDict({"train": Dataset.from_dict(rows()), name: strange})).validate()


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_fraction_among_the_labels_of_another_split_is_said(name: str) -> None:
    train = Dataset.from_dict({"text": ["a", "b"] * 20, "label": [0, 1] * 20})
    strange = Dataset.from_dict({"text": ["a", "b"], "label": [0.5, 1.0]})
    with pytest.raises(ValueError, match=rf"Row 0 of the {name} split has the label '0\.5'"):
        task(dataset=DatasetDict({"train": train, name: strange})).validate()


def test_a_column_without_text_in_the_test_split_is_said() -> None:
    strange = Dataset.from_dict({"text": [1, 2], "label": ["positive", "negative"]})
    with pytest.raises(ValueError, match="Row 0 of the test split has 1 in 'text', expected text"):
        task(dataset=DatasetDict(train=Dataset.from_dict(rows()), test=strange)).validate()


def test_names_of_class_labels_count_and_not_their_order() -> None:
    def named(*names: str) -> Dataset:
        features = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
        return Dataset.from_dict({"text": ["a", "b"] * 20, "label": [0, 0, 0, 1] * 10}, features=features)

    mixed = task(dataset=DatasetDict(train=named("no", "yes"), test=named("yes", "no")))
    mixed.validate()
    assert mixed.split("test").labels.count(mixed.labels.index("yes")) == 30


@pytest.mark.parametrize(
    ("missing", "feature", "names"),
    [
        (-1, Value("int64"), ("0", "1")),
        (None, Value("int64"), ("0", "1")),
        (math.nan, Value("float64"), ("0", "1")),
        (-1, ClassLabel(names=["no", "yes"]), ("no", "yes")),
        (None, ClassLabel(names=["no", "yes"]), ("no", "yes")),
    ],
)
def test_rows_without_a_label_are_left_out(
    missing: float | None, feature: Any, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    def labelled(*labels: float | None) -> Dataset:
        data = {"text": [f"row {row}" for row in range(len(labels))], "label": list(labels)}
        return Dataset.from_dict(data, features=Features({"text": Value("string"), "label": feature}))

    source = DatasetDict(
        train=labelled(missing, *[0, 1] * 20), validation=labelled(1, 0, 1), test=labelled(1, missing, 0)
    )
    loaded = task(dataset=source)
    loaded.validate()
    assert loaded.labels == names
    assert len(loaded.split("train").labels) == 40
    assert "1 of the 41 rows of the train split have no label" in caplog.text
    test = loaded.split("test")
    assert (test.columns, test.labels) == ((("row 0", "row 2"),), (1, 0))
    unlabelled = DatasetDict(train=labelled(*[0, 1] * 20), test=labelled(missing, missing))
    assert len(task(dataset=unlabelled).split("test").labels) == 4


def test_rows_without_text_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    source = rows()
    source["text"][3], source["text"][8], source["text"][11] = None, "", "  "
    loaded = task(dataset=Dataset.from_dict(source), validation_share=0.2)
    loaded.validate()
    splits = [loaded.split(name) for name in ("train", "validation", "test")]
    assert sum(len(split.labels) for split in splits) == 57
    assert all(text.strip() for split in splits for text in split.columns[0])
    assert "have no text and are left out" in caplog.text
    pairs = task(dataset=Dataset.from_dict(source | {"other": ["dog"] * 60}), text=("text", "other"))
    assert sum(len(pairs.split(name).labels) for name in ("train", "validation", "test")) == 60


def test_content_is_read_for_the_identity_but_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter(["fingerprint"])
    monkeypatch.setattr(dataset_task, "fingerprint", lambda _: next(reads))
    loaded = task()
    assert loaded.identity() == loaded.identity()


def test_a_tokenizer_without_padding_is_said(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        task().data(tokenizer, batch_size=8, seed=0)


def test_texts_are_tokenised_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    columns = [["good film", "bad very dog"]]
    tokens, offsets = tokenise(tokenizer, columns, 8, tmp_path)
    (file,) = tmp_path.iterdir()
    written_at = file.stat().st_mtime_ns
    again, again_offsets = tokenise(tokenizer, columns, 8, tmp_path)
    assert file.stat().st_mtime_ns == written_at
    assert all((tokens[name] == again[name]).all() for name in tokens)
    assert (offsets == again_offsets).all()
    assert offsets.tolist() == [0, 2, 5]
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:-8] + b"\x07" * 8, json.dumps({"no": "safetensors"}).encode()):
        caplog.clear()
        file.write_bytes(damaged)
        repaired, repaired_offsets = tokenise(tokenizer, columns, 8, tmp_path)
        assert f"{file} is damaged" in caplog.text
        assert (repaired["input_ids"] == tokens["input_ids"]).all()
        assert (repaired_offsets == offsets).all()
        assert file.read_bytes() == whole
    tokenise(tokenizer, columns, 2, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot be written: Not a directory: make room there, or choose"):
        tokenise(tokenizer, [["good"]], 8, tmp_path / "file" / "cache")
