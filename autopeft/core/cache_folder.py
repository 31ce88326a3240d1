"""Where autopeft keeps what it can compute again: tokenised texts and hidden states."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder that the environment variable AUTOPEFT_CACHE names.

    By default it is `autopeft` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache).
    """
    if named := os.environ.get("AUTOPEFT_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autopeft"
