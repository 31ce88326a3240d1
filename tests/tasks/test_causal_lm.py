"""Causal language modelling: splits, batches, loss and metrics."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional

from autopeft import Search
from autopeft.search_identity import task_settings
from autopeft.search_spaces import Uniform
from autopeft.tasks import CausalLM
from autopeft.tasks.batch import IGNORED, LABELS
from autopeft.tasks.generation import bleu, chrf, exact_match, generate_texts, padded, rouge_l
from tests.tiny_models import tiny_chat_tokenizer, tiny_language_model

ARCHITECTURES = ("gpt2", "llama", "gemma2", "qwen3", "mixtral", "qwen3_moe")


def rows(count: int, *, seed: int = 0) -> Dataset:
    generator = np.random.default_rng(seed)

    def words(most: int) -> str:
        return " ".join(f"w{index}" for index in generator.integers(0, 100, generator.integers(1, most)))

    return Dataset.from_list([{"prompt": words(9), "completion": f" {words(6)}"} for _ in range(count)])


def task_of(count: int = 40, **options: Any) -> CausalLM:
    return CausalLM(**{"dataset": rows(count), "max_length": 32, **options})


def slow_loss(
    model: Any, tokens: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> tuple[float, int]:
    """Return the mean loss a learnt token, row by row and token by token, and the number of these."""
    losses = []
    with torch.no_grad():
        for row, wanted in zip(tokens, labels, strict=True):
            logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()
            scores = functional.log_softmax(logits, dim=-1)
            losses += [
                -float(scores[place - 1, label])
                for place, label in enumerate(wanted)
                if place and label != IGNORED
            ]
    return sum(losses) / len(losses), len(losses)


def test_rows_of_one_prompt_stay_together() -> None:
    data = Dataset.from_list(
        [{"prompt": f"w{number % 7}", "completion": f" w{number}"} for number in range(60)]
    )
    task = CausalLM(dataset=data, validation_share=0.2, test_share=0.2)
    loaded = task.data(tiny_chat_tokenizer(), batch_size=4, seed=0)
    prompts = [
        {row.tokens[: row.prompt] for row in loaded.rows(name)} for name in ("train", "validation", "test")
    ]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 7
    assert all(prompts)


def test_limits_and_splits_depend_on_the_seed_alone() -> None:
    def read(seed: int) -> list[tuple[int, ...]]:
        data = task_of(seed=seed, train_examples=10).data(tiny_chat_tokenizer(), batch_size=4, seed=0)
        assert len(data.rows("train")) == 10
        return [row.tokens for row in data.rows("train")]

    assert read(0) == read(0) != read(1)


def test_an_epoch_has_every_row_padded_behind() -> None:
    data = task_of().data(tiny_chat_tokenizer(), batch_size=4, seed=0)
    found = set()
    for batch in data.train_dataloader(0):
        for ids, mask, labels in zip(
            *(batch[name] for name in ("input_ids", "attention_mask", LABELS)), strict=True
        ):
            length = int(mask.sum())
            assert mask[:length].all()
            assert (labels[length:] == IGNORED).all()
            found.add((tuple(ids[:length].tolist()), tuple(labels[:length].tolist())))
    assert found == {(row.tokens, row.labels) for row in data.rows("train")}


def check_loss(model: Any, *, packing: bool, tolerance: float) -> None:
    """Compare loss and perplexity with those of the slow reference."""
    task = task_of(packing=packing)
    data = task.data(tiny_chat_tokenizer(), batch_size=3, seed=0)
    if packing:
        assert len(data.split("validation")) < len(data.rows("validation"))
    metrics = task.metric_collection()
    with torch.no_grad():
        for batch in data.val_dataloader():
            output = task.forward(model, batch)
            task.update_metrics(metrics, output, batch, task.loss(output, batch))
    kept = data.rows("validation")
    expected, _ = slow_loss(model, [row.tokens for row in kept], [row.labels for row in kept])
    found = metrics.compute()
    assert float(found["loss"]) == pytest.approx(expected, rel=tolerance)
    assert math.log(found["perplexity"]) == pytest.approx(expected, rel=tolerance)
    assert set(found) == {metric.name for metric in task.metrics}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_equals_a_slow_reference(architecture: str, packing: bool) -> None:
    check_loss(tiny_language_model(architecture), packing=packing, tolerance=1e-4)


def test_weight_counts_the_tokens_that_are_predicted() -> None:
    task, labels = task_of(), torch.tensor([[5, IGNORED, 6, 7], [IGNORED, 8, IGNORED, IGNORED]])
    output = SimpleNamespace(logits=torch.zeros(2, 4, 128))
    assert int(task.weight({LABELS: labels})) == 3
    assert float(task.loss(output, {LABELS: labels})) == pytest.approx(math.log(128))


def test_a_batch_without_a_learnt_token_has_no_loss() -> None:
    labels: Tensor = torch.full((1, 3), IGNORED)
    assert float(task_of().loss(SimpleNamespace(logits=torch.ones(1, 3, 128)), {LABELS: labels})) == 0


def test_the_trivial_score_is_that_of_frequencies() -> None:
    task = task_of(80)
    data = task.data(tiny_chat_tokenizer(), batch_size=4, seed=0)
    loss = task.trivial_score("loss", data)
    assert 2 < loss < math.log(128)
    assert task.trivial_score("perplexity", data) == pytest.approx(math.exp(loss))
    assert (task.best_score("loss"), task.best_score("perplexity")) == (0, 1)


def test_cut_rows_are_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    task = task_of(max_length=7)
    with caplog.at_level(logging.WARNING, "autopeft"):
        data = task.data(tiny_chat_tokenizer(), batch_size=4, seed=0)
    assert "rows of the train split are cut at 7 tokens" in caplog.text
    assert max(len(row.tokens) for row in data.rows("train")) == 7
    assert all(any(label != IGNORED for label in row.labels[1:]) for row in data.rows("train"))


def test_completions_that_are_all_cut_away_are_refused() -> None:
    data = Dataset.from_list([{"prompt": "w1 w2 w3 w4", "completion": " w5"} for _ in range(9)])
    data = data.map(lambda row, index: {"prompt": f"{row['prompt']} w{index}"}, with_indices=True)
    task = CausalLM(dataset=data, max_length=4)
    with pytest.raises(ValueError, match=r"No row of the train split has a completion within max_length=4"):
        task.data(tiny_chat_tokenizer(), batch_size=4, seed=0)


@pytest.mark.parametrize("nothing", ["", None])
def test_empty_completions_are_named(nothing: str | None) -> None:
    rows = [{"prompt": f"w{row}", "completion": nothing} for row in range(30)]
    with pytest.raises(ValueError, match="anything to learn: 'completion' is empty in all 24"):
        CausalLM(dataset=Dataset.from_list(rows)).data(tiny_chat_tokenizer(), batch_size=4, seed=0)
    rows[::2] = [{"prompt": f"w{row} w1 w2", "completion": " w3"} for row in range(15)]
    task = CausalLM(dataset=Dataset.from_list(rows), max_length=3)
    with pytest.raises(
        ValueError, match=r"within max_length=3 .* In \d+ of its 24 rows 'completion' is empty"
    ):
        task.data(tiny_chat_tokenizer(), batch_size=4, seed=0)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    for suffix in ("jsonl", "csv"):
        path = tmp_path / f"chat.{suffix}"
        path.touch()
        with pytest.raises(ValueError, match=rf"Cannot read .*chat\.{suffix}: "):
            CausalLM(dataset=path).validate()


def test_chats_are_read_from_a_file(tmp_path: Path) -> None:
    lines = [
        {"messages": [{"role": "user", "content": f"w{n}"}, {"role": "assistant", "content": f"w{n + 1}"}]}
        for n in range(30)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = CausalLM(dataset=path)
    task.validate()
    assert (task.name, task.layout, task.identity()["layout"]) == ("chat", "messages", "messages")
    search = Search(
        tiny_language_model("llama"),
        task,
        Uniform(sizes={"rank": (1, 2)}),
        objectives=("loss", "trainable_parameters"),
        tokenizer=tiny_chat_tokenizer(),
        folder=tmp_path,
        tracking=None,
    )
    assert "; rows of the layout 'messages'\n" in search.describe()
    data = task.data(tiny_chat_tokenizer(), batch_size=4, seed=0)
    assert len(data.rows("train")) == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length"),
        ({"validation_share": 1.5}, "validation_share and test_share"),
        ({"generate": "rouge"}, "metric of generated text 'rouge'.*rouge_l"),
        ({"train_examples": 0}, "train_examples"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(**options)


def test_generated_metrics_need_replies() -> None:
    task = CausalLM(dataset=Dataset.from_dict({"text": ["w1"] * 9}), generate="bleu")
    with pytest.raises(ValueError, match="bleu compares generated text with a reply"):
        task.validate()


def test_metrics_say_their_direction() -> None:
    task = task_of(generate={"length": lambda texts, references: float(len(texts))})
    loss, perplexity, length = task.metrics
    assert (loss.direction, perplexity.direction, length.direction) == ("minimize", "minimize", "maximize")
    assert (loss.at_end, length.at_end, perplexity.log_scale) == (False, True, True)


def test_generation_is_that_of_each_prompt_alone() -> None:
    model, tokenizer = tiny_language_model("llama"), tiny_chat_tokenizer()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    given = partial(generate_texts, model, tokenizer, inputs=partial(padded, model, tokenizer), new_tokens=6)
    together = given(prompts, batch_size=3)
    alone = [given([prompt], batch_size=1)[0] for prompt in prompts]
    assert together == alone
    assert all(len(text.split()) <= 6 for text in together)
    assert len(set(together)) == 3


def test_text_ends_with_the_models_token_or_one_that_is_named() -> None:
    model, tokenizer = tiny_language_model("llama"), tiny_chat_tokenizer()
    given = partial(generate_texts, model, tokenizer, [[5, 6, 7]], partial(padded, model, tokenizer))
    (whole,) = given(new_tokens=6, batch_size=1)
    words = whole.split()
    assert len(words) == 6
    end = tokenizer.convert_tokens_to_ids(words[2])
    assert isinstance(end, int)
    (text,) = given(new_tokens=6, batch_size=1, ends=[end])
    assert text == " ".join(words[: words.index(words[2]) + 1])
    model.generation_config.eos_token_id = end
    assert given(new_tokens=6, batch_size=1, ends=[tokenizer.pad_token_id]) == [text]


def test_text_ends_as_replies_do() -> None:
    """A base model's own end token need not be the one that its chat template writes."""
    tokenizer = tiny_chat_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.eos_token = "w100"
    chats = [
        {"messages": [{"role": "user", "content": f"w{n}"}, {"role": "assistant", "content": f"w7 w{n}"}]}
        for n in range(40)
    ]
    task = CausalLM(Dataset.from_list(chats), max_length=5)  # of each reply, the end is cut away
    data = task.data(tokenizer, batch_size=4, seed=0)
    assert {row.tokens[-1] for row in data.rows("train")} == {tokenizer.convert_tokens_to_ids("w7")}
    assert task._ends(data) == [end]
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    assert task._ends(task.data(tokenizer, batch_size=4, seed=0)) == []


def test_a_users_metric_is_given_texts_and_references() -> None:
    seen: dict[str, Any] = {}

    def metric(texts: Sequence[str], references: Sequence[str]) -> float:
        seen.update(texts=texts, references=references)
        return 0.5

    task = task_of(60, generate={"mine": metric}, generated_rows=4, new_tokens=3)
    data = task.data(tiny_chat_tokenizer(), batch_size=4, seed=0)
    found = task.measure_at_end(tiny_language_model("gpt2"), data, "validation")
    assert found == {"mine": 0.5}
    assert len(seen["texts"]) == len(seen["references"]) == 4
    replies = [[*row.reply] for row in data.rows("validation")]
    assert set(seen["references"]) <= {*data.tokenizer.batch_decode(replies, skip_special_tokens=True)}
    again = dict(seen)
    task.measure_at_end(tiny_language_model("gpt2"), data, "validation")
    assert seen == again


def test_text_metrics_know_equal_and_different_texts() -> None:
    same, other = ["the cat sat on the mat"], ["a dog ran"]
    for metric in (exact_match, rouge_l, bleu, chrf):
        assert metric(same, same) == pytest.approx(1)
        assert metric(same, other) < 0.3


def broken(texts: Sequence[str], references: Sequence[str]) -> float:
    """A user's metric that fails."""
    raise KeyError("reference")


@pytest.mark.parametrize(
    ("function", "message"),
    [(broken, "metric 'own' fails for .*KeyError"), (lambda *_: math.nan, "metric 'own' .* is nan")],
)
def test_a_users_metric_is_tried_before_training(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(generate={"own": function}).validate()


def test_the_same_function_makes_the_same_search() -> None:
    (text,) = {str(task_settings(task_of(generate={"own": exact_match}))) for _ in range(2)}
    assert "autopeft.tasks.generation.exact_match" in text
    assert " at 0x" not in text


def test_replies_that_were_cut_away_are_not_generated() -> None:
    def chat(number: int, exchanges: int) -> list[dict[str, str]]:
        return [
            {"role": role, "content": f"w{number}"}
            for _ in range(exchanges)
            for role in ("user", "assistant")
        ]

    tokenizer = tiny_chat_tokenizer()
    rows = [{"messages": chat(number, 1 + number % 2)} for number in range(60)]
    (longest,) = {
        row.prompt
        for row in CausalLM(Dataset.from_list(rows[1::2])).data(tokenizer, batch_size=4, seed=0).rows("train")
    }
    task = CausalLM(Dataset.from_list(rows), max_length=longest, generate="exact_match")
    data = task.data(tokenizer, batch_size=4, seed=0)
    prompts, replies = task._examples(data, "validation")
    assert 0 < len(prompts) == len(replies) < len(data.rows("validation"))
    cut = CausalLM(Dataset.from_list(rows[1::2]), max_length=longest, generate="exact_match")
    with pytest.raises(ValueError, match="a prompt and the beginning of its reply"):
        cut.data(tokenizer, batch_size=4, seed=0)
