"""Run every benchmark of minutes; each prints a table and writes JSON to benchmarks/results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_APART = (
    "run",
    "export_targets",
    "family_fronts",
    "gpu",
    "first_front",
    "front_per_compute",
    "transfer",
    "week",
    "worker_faults",
    "workers",
)
"""These but the first need a GPU, Ray, hours or days, or install everything anew."""


def main() -> None:
    """Run the benchmarks one after another."""
    folder = Path(__file__).parent
    for script in sorted(folder.glob("*.py")):
        if script.stem not in _APART and "def main(" in script.read_text():
            print(f"== {script.stem}", flush=True)
            subprocess.run([sys.executable, "-m", f"benchmarks.{script.stem}"], check=True)


if __name__ == "__main__":
    main()
