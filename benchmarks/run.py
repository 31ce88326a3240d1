"""Run every benchmark; each prints a table and writes JSON to benchmarks/results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run the benchmarks one after another."""
    folder = Path(__file__).parent
    for script in sorted(folder.glob("*.py")):
        is_benchmark = script.stem not in ("run", "gpu") and "def main(" in script.read_text()
        if is_benchmark:  # those of a GPU have a command of their own
            print(f"== {script.stem}", flush=True)
            subprocess.run([sys.executable, "-m", f"benchmarks.{script.stem}"], check=True)


if __name__ == "__main__":
    main()
