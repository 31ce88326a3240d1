"""Sequence to sequence: pairs of texts as tokens, generated text, what is wrong with columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

import autopeft
from autopeft import Training
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.packing.trainer import PackedTrainer
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import Uniform
from autopeft.tasks import Seq2Seq
from autopeft.tasks.batch import IGNORED, LABELS
from autopeft.tasks.generation import generate_texts, padded
from tests.task_cases import answered_rows, splits_of
from tests.tiny_models import everywhere, tiny_chat_tokenizer, tiny_headed

ARCHITECTURES = ("t5", "bart")
SOURCES = [f"w{row}" if row % 2 else f"w{row} w1 w2" for row in range(40)]


def task(rows: dict[str, list[Any]] | None = None, **settings: Any) -> Seq2Seq:
    return Seq2Seq(Dataset.from_dict(answered_rows(60, 0) if rows is None else rows), **settings)


def test_rows_of_one_source_stay_together() -> None:
    rows = {"source": [f"w{row % 7}" for row in range(60)], "target": [f"w{row}" for row in range(60)]}
    loaded = task(rows, validation_share=0.2, test_share=0.2)
    loaded.validate()
    data = loaded.data(tiny_chat_tokenizer(), batch_size=4, seed=0)
    sources = [set(map(tuple, np.split(*_tokens(data, name)))) for name in ("train", "validation", "test")]
    assert sum(map(len, sources)) == len(set.union(*sources)) == 7


def _tokens(data: Any, name: str) -> tuple[Any, Any]:
    split = data.split(name)
    return split.tokens["input_ids"], split.offsets[1:-1]


def test_targets_end_and_are_padded_to_the_longest_of_a_batch() -> None:
    tokenizer = tiny_chat_tokenizer()
    rows = {"source": SOURCES, "target": ["w4", "w5 w6 w7"] * 20}
    data = task(rows, prefix="w9 ").data(tokenizer, batch_size=8, seed=0)
    known = tokenizer.get_vocab()
    texts = (f"w9 {source} {target} <end>" for source, target in zip(*rows.values(), strict=True))
    expected = {tuple(known[word] for word in text.split()) for text in texts}
    found = set()
    for batch in data.train_dataloader(0):
        assert (batch[LABELS] != IGNORED).any(dim=0).all()
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch[LABELS], strict=True):
            kept = labels != IGNORED
            assert kept[: int(kept.sum())].all()
            found.add((*ids[mask == 1].tolist(), *labels[kept].tolist()))
    assert found < expected
    assert len(found) == len(data.split("train"))


def test_the_largest_batch_has_the_longest_sources_and_the_longest_targets() -> None:
    rows = {"source": SOURCES, "target": ["w4 w5 w6 w7 w8", "w5"] * 20}
    data = task(rows).data(tiny_chat_tokenizer(), batch_size=4, seed=0)
    largest = data.largest_batch()
    assert largest["input_ids"].shape == (4, 3)
    assert largest[LABELS].shape == (4, 6)


def test_long_targets_are_cut_aloud(caplog: pytest.LogCaptureFixture) -> None:
    rows = {"source": SOURCES, "target": ["w4 w5 w6 w7 w8", "w5"] * 20}
    data = task(rows, target_length=3).data(tiny_chat_tokenizer(), batch_size=4, seed=0)
    assert data.largest_batch()[LABELS].shape == (4, 3)
    assert "targets of the train split are cut at target_length=3 tokens" in caplog.text


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_is_that_of_each_source_alone(architecture: str) -> None:
    model, tokenizer = tiny_headed(task().head, architecture), tiny_chat_tokenizer()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    given = partial(generate_texts, model, tokenizer, inputs=partial(padded, model, tokenizer), new_tokens=6)
    together = given(prompts, batch_size=3)
    alone = [given([prompt], batch_size=1)[0] for prompt in prompts]
    assert together == alone
    with torch.no_grad():
        ids = torch.tensor([[8]])
        start = torch.tensor([[model.config.decoder_start_token_id]])
        first = model(input_ids=ids, decoder_input_ids=start).logits[0, -1].argmax()
    assert together[1].startswith(str(tokenizer.decode([first], skip_special_tokens=True)))


def test_trials_are_not_packed() -> None:
    pairs = Seq2Seq(splits_of(answered_rows))
    backbone = Backbone.load(tiny_headed(pairs.head, "t5"), pairs.head, tiny_chat_tokenizer())
    objectives = resolve_objectives(("loss", "trainable_parameters"), pairs.metrics)
    evaluator = Evaluator(backbone, pairs, Training(device="cpu"), objectives)
    assert not PackedTrainer(evaluator).can_pack(everywhere(backbone, "lora"))


@pytest.mark.slow
def test_a_search_generates_and_exports(tmp_path: Path) -> None:
    seen: list[Sequence[str]] = []

    def right(texts: Sequence[str], references: Sequence[str]) -> float:
        seen.append(references)
        return float(np.mean([text == reference for text, reference in zip(texts, references, strict=True)]))

    pairs = Seq2Seq(splits_of(answered_rows), generate={"right": right}, generated_rows=5, new_tokens=4)
    model = tiny_headed(pairs.head, "t5")
    model.save_pretrained(tmp_path / "base")
    search = autopeft.Search(
        tmp_path / "base",
        pairs,
        Uniform(sizes={"rank": (1, 8)}),
        objectives=("loss", "trainable_parameters", "right"),
        tokenizer=tiny_chat_tokenizer(),
        training=Training(epochs=1, batch_size=8, device="cpu"),
        folder=tmp_path,
        halving=None,
        sampler="tpe",
        tracking=None,
        seeds=1,
    )
    front = search.run(trials=2, progress=False)
    assert set(seen[-1]) <= {"w5 w6 w7", "w8 w9"}
    best = max(front, key=lambda point: point.values["trainable_parameters"])
    report = search.export(best.number, tmp_path / "adapter")
    assert report.max_logit_difference is not None
    assert report.max_logit_difference < 1e-3
    assert "AutoModelForSeq2SeqLM" in report.how_to_load


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: task(source="sauce"), "column of the train split 'sauce'.*did you mean 'source'"),
        (lambda: task(source="target"), "source and target are two columns"),
        (lambda: task(target_length=0), "target_length is a whole number"),
        (lambda: task(generate="rouge"), "metric of generated text 'rouge'.*rouge_l"),
        (
            lambda: task({"source": [1, 2], "target": ["a", "b"]}),
            "Row 0 of the train split has 1 in 'source'",
        ),
        (lambda: task({"source": ["a"] * 9, "target": [""] * 9}), "The training split has no rows"),
    ],
)
def test_what_is_wrong_is_said(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().validate()


def test_rows_without_a_target_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = answered_rows(40, 0)
    rows["target"][3], rows["target"][5] = None, ""
    test = Dataset.from_dict({"source": ["w1"]})
    loaded = Seq2Seq(DatasetDict(train=Dataset.from_dict(rows), test=test))
    loaded.validate()
    assert "2 of the 40 rows of the train split have no label" in caplog.text
    assert loaded.identity()["target_length"] == "128"
