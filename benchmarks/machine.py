"""What a result was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        said = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return "unknown"
    return said.stdout.strip()


_COMMIT = _commit()  # when a benchmark begins: it may take days


def this_machine(*more: str) -> str:
    """Return platform, cores and commit in words, with what else there is to say."""
    return ", ".join([platform.platform(), f"{os.cpu_count()} cores", *more, f"commit {_COMMIT}"])
