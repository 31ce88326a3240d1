"""Preference optimisation: the loss of DPO, its columns, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict

from autopeft import Adapter, Configuration
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.tasks import PreferenceOptimization
from autopeft.tasks.batch import LABELS
from autopeft.tasks.language_rows import RowReader
from tests.task_cases import compared_rows, splits_of
from tests.tiny_models import tiny_chat_tokenizer, tiny_language_model

CHAT = [{"role": "user", "content": "w1 w2"}]


def task_of(rows: dict[str, list[Any]], **settings: Any) -> PreferenceOptimization:
    splits = {name: Dataset.from_dict(rows) for name in ("train", "validation", "test")}
    return PreferenceOptimization(DatasetDict(splits), **settings)


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def first_batch(task: PreferenceOptimization, size: int = 4) -> dict[str, torch.Tensor]:
    batch: dict[str, torch.Tensor] = next(
        iter(task.data(tiny_chat_tokenizer(), batch_size=size, seed=0).val_dataloader())
    )
    return batch


def test_the_loss_is_that_of_the_formula() -> None:
    task = PreferenceOptimization(splits_of(compared_rows), beta=0.3)
    backbone = Backbone.load(tiny_language_model("llama"), task.head, tiny_chat_tokenizer())
    batch = first_batch(task)
    site = next(site for site, shape in backbone.sites.items() if shape.kind == "linear")

    def likelihood(pair: int, which: int) -> torch.Tensor:
        """Of a reply, token by token, without padding."""
        length = int(batch["attention_mask"][pair, which].sum())
        tokens, labels = (batch[name][pair, which, :length] for name in ("input_ids", LABELS))
        logits = backbone.model(tokens[None]).logits[0].double().log_softmax(-1)
        learnt = (place for place in range(1, length) if labels[place] != -100)
        return torch.stack([logits[place - 1, tokens[place]] for place in learnt]).sum()

    def likelihoods() -> torch.Tensor:
        return torch.stack([torch.stack([likelihood(pair, which) for which in (0, 1)]) for pair in range(4)])

    with torch.no_grad():
        reference = likelihoods()
        with attach(backbone, Configuration({site: Adapter("lora", 2)}, learning_rate=1e-3)) as attachment:
            for parameter in attachment.parameters.values():
                torch.nn.init.normal_(parameter, std=0.5)
            gains = likelihoods() - reference
            output = task.forward(backbone.model, batch)
            metrics = task.metric_collection()
            task.update_metrics(metrics, output, batch, task.loss(output, batch))
    margins = 0.3 * (gains[:, 0] - gains[:, 1])
    assert margins.abs().min() > 1e-3
    expected = torch.log1p(torch.exp(-margins)).mean()
    assert float(task.loss(output, batch)) == pytest.approx(float(expected), rel=1e-4)
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert found["accuracy"] == float((margins > 0).double().mean())


def test_replies_alone_are_learnt_however_the_prompt_is_given() -> None:
    chats = {"prompt": [CHAT], "chosen": [reply("w5 w6")], "rejected": [reply("w7")]}
    whole = {"chosen": [CHAT + reply("w5 w6")], "rejected": [CHAT + reply("w7")]}
    batches = [first_batch(task_of(rows)) for rows in (chats, whole)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    learnt = batches[0][LABELS][0]
    tokenizer = tiny_chat_tokenizer()
    texts = [tokenizer.decode(row[row != -100]) for row in learnt]
    assert texts == ["w5 w6 <end>", "w7 <end>"]


def test_prompts_stay_in_one_split() -> None:
    rows = compared_rows(12, 0)
    rows["prompt"] = [f"w{row // 3} " for row in range(12)]
    for column in ("chosen", "rejected"):  # whatever replies begin with
        rows[column][::3] = [f"w9 {text}" for text in rows[column][::3]]
    task = PreferenceOptimization(Dataset.from_dict(rows), test_share=0.25, validation_share=0.25)
    prompts = [set(task._columns(name)[0]) for name in ("train", "validation", "test")]
    assert [len(each) for each in prompts] == [2, 1, 1]
    assert len(set.union(*prompts)) == 4


def test_without_a_column_of_prompts_rows_that_begin_alike_stay_in_one_split() -> None:
    texts = {
        "chosen": [f"q{row // 3} is w{row}" for row in range(12)],
        "rejected": [f"q{row // 3} is w{row}{row}" for row in range(12)],  # the last word begins alike
    }
    chats = {
        column: [
            [{"role": "user", "content": f"q{row // 3}"}, *reply(f"{column} {row}")] for row in range(12)
        ]
        for column in ("chosen", "rejected")
    }
    for rows in (texts, chats):
        task = PreferenceOptimization(Dataset.from_dict(rows), test_share=0.25, validation_share=0.25)
        found = [
            re.findall("q[0-9]", str(task._columns(name)[0])) for name in ("train", "validation", "test")
        ]
        assert [len(set(questions)) for questions in found] == [2, 1, 1]
        assert len({question for questions in found for question in questions}) == 4


def test_rows_that_have_no_prompt_are_examples_of_their_own() -> None:
    rows = {"chosen": [f"w{row}" for row in range(12)], "rejected": [f"w{row + 20}" for row in range(12)]}
    task = PreferenceOptimization(Dataset.from_dict(rows), test_share=0.25, validation_share=0.25)
    task.validate()
    assert [len(task._columns(name)[0]) for name in ("train", "validation", "test")] == [6, 3, 3]


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "w9"}]])
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_prompt_may_be_the_users_text_in_front_of_chats(
    system: list[dict[str, str]], is_whole: bool
) -> None:
    """The layout of UltraFeedback: a text, and the whole chats, which begin with it."""
    chats = {
        "chosen": [[*system, *CHAT, *reply("w5 w6")]],
        "rejected": [[*system, *CHAT, *reply("w7")]],
    }
    expected = first_batch(task_of(chats))
    if not is_whole and not system:
        chats = {"chosen": [reply("w5 w6")], "rejected": [reply("w7")]}
    found = first_batch(task_of({"prompt": [CHAT[0]["content"]], "messages": chats["chosen"], **chats}))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


SYSTEM = [{"role": "system", "content": "w9"}]


@pytest.mark.parametrize(
    ("prompt", "before", "expected"),
    [
        (CHAT, SYSTEM, [*SYSTEM, *CHAT]),
        ([*SYSTEM, *CHAT], CHAT, [*SYSTEM, *CHAT]),
        ([*SYSTEM, *CHAT], SYSTEM, [*SYSTEM, *CHAT]),
        ([*SYSTEM, *CHAT], [], [*SYSTEM, *CHAT]),
        (SYSTEM, CHAT, [*SYSTEM, *CHAT]),
        (CHAT, [*reply("w3"), *CHAT], [*CHAT, *reply("w3"), *CHAT]),  # no system's message before the prompt
    ],
)
def test_a_systems_message_comes_first_and_a_prompt_once(
    prompt: list[Any], before: list[Any], expected: list[Any]
) -> None:
    given = {"prompt": [prompt], "chosen": [before + reply("w5 w6")], "rejected": [before + reply("w7")]}
    whole = {"chosen": [expected + reply("w5 w6")], "rejected": [expected + reply("w7")]}
    found, wanted = first_batch(task_of(given)), first_batch(task_of(whole))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize("is_chat", [False, True])
def test_replies_are_read_once(is_chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"prompt": CHAT, "chosen": reply("w5 w6"), "rejected": reply("w7")}
    texts = {"prompt": "w1 ", "chosen": "w5 w6", "rejected": "w7"}
    task = task_of({name: [value] for name, value in (given if is_chat else texts).items()})

    def batch(cache: Path | None = tmp_path) -> dict[str, torch.Tensor]:
        return task.data(tiny_chat_tokenizer(), batch_size=2, seed=0, cache=cache).largest_batch()

    expected = batch(None)
    assert not any(tmp_path.iterdir())
    batch()
    monkeypatch.setattr(RowReader, "read", lambda *_: pytest.fail("a reply was read again"))
    found = batch()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_pairs_of_equal_replies_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = {"prompt": ["w1 "] * 3, "chosen": ["w5 w6", "w5", "w5"], "rejected": ["w5 w7", "w5", "w6"]}
    assert len(first_batch(task_of(rows))["input_ids"]) == 2
    assert "0 of the 3 pairs of the validation split are cut at 512 tokens; 1, cut or not" in caplog.text
    assert len(first_batch(task_of(rows, max_length=2))["input_ids"]) == 1
    assert "3 of the 3 pairs of the validation split are cut at 2 tokens; 2, cut or not" in caplog.text


def test_pairs_that_lose_a_reply_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = {"prompt": ["w1 ", "w1 w2 w3 w4 "], "chosen": ["w5", "w5"], "rejected": ["w6", "w6"]}
    batch = first_batch(task_of(rows, max_length=3))
    assert len(batch["input_ids"]) == 1
    assert "1 of the 2 pairs of the validation split are cut at 3 tokens; 1, cut or not, have" in caplog.text
    with pytest.raises(ValueError, match=r"No pair of the validation split .*max_length=1.*has 6"):
        first_batch(task_of(rows, max_length=1))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"chosen": ["w1"]}, "column of the train split 'rejected'"),
        ({"chosen": ["w1"], "rejected": ["w1"]}, "No pair of the validation split has two different"),
        ({"chosen": ["w1"], "rejected": [None]}, "Row 0 of the validation split has 'None' in 'rejected'"),
        ({"chosen": [reply("w1")], "rejected": ["w2"]}, "'w2' in 'rejected', expected a list of messages"),
        ({"chosen": [["w1"]], "rejected": [["w2"]]}, r"in 'chosen', expected a list of messages"),
        ({"prompt": [CHAT], "chosen": ["w1"], "rejected": ["w2"]}, "in 'prompt', expected a text\\."),
        (
            {"prompt": [3], "chosen": [reply("w1")], "rejected": [reply("w2")]},
            "'3' in 'prompt', expected a text or a list of messages",
        ),
        ({"chosen": [CHAT], "rejected": [reply("w2")]}, "no message of the role 'assistant'"),
    ],
)
def test_bad_rows_are_named(rows: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(rows).data(tiny_chat_tokenizer(), batch_size=2, seed=0)


@pytest.mark.parametrize(
    "rows",
    [
        {"chosen": ["w1 w5", None], "rejected": ["w1 w6", "w2"]},
        {"chosen": [CHAT + reply("w5"), None], "rejected": [CHAT + reply("w6")] * 2},
        {"chosen": [None, None], "rejected": ["w1", "w2"]},
    ],
)
def test_bad_rows_are_named_before_a_single_split_is_cut(rows: dict[str, list[Any]]) -> None:
    with pytest.raises(ValueError, match=r"Row . of the train split has 'None' in 'chosen', expected a "):
        PreferenceOptimization(Dataset.from_dict(rows)).validate()


@pytest.mark.parametrize("setting", [{"beta": 0.0}, {"max_length": 0}])
def test_bad_settings_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        task_of(compared_rows(4, 0), **setting)
