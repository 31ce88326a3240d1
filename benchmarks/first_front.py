"""From nothing to a front on one's own data: what the README says, typed in an empty environment.

    python -m benchmarks.first_front [--hours 0.06]

Once, a checkout is made and installed by pip into a new virtual environment; nothing of this one is seen
there: no variables but those of pip and the machine, an empty home. Then, for texts with classes, texts
with 0 or 1, and images, a person with a model and a file types the rest. Shown are the lines, the minutes
until there is a front and an exported adapter, installation included, and the front's size.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.table import Table

from assets.prepare import prepare
from autopeft.reporting.console import wide_console
from benchmarks.machine import this_machine

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "first_front.json"
INSTALLATION = (
    "git clone --quiet {repository} autopeft && cd autopeft",
    "python3 -m venv ../own && . ../own/bin/activate && pip install --quiet -c constraints.txt .",
)
KINDS = {
    "texts and classes": ("minilm", "questions", "questions.csv"),
    "texts and 0 or 1": ("minilm", "snippets", "snippets.csv"),
    "images": ("dinov2", "cifar10", "cifar10.parquet"),
}
LINES = (
    "autopeft init --model {model} --data {data} --to mine.yaml",
    "autopeft validate mine.yaml",
    "autopeft search mine.yaml run.hours={hours} task.train_examples=512",
    "autopeft front",
    "autopeft export --knee --to adapter",
)


def typed(line: str, folder: Path, home: Path) -> str:
    """Run a line in a shell that knows nothing of this environment; return what it printed."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    kept |= {"HOME": str(home), "PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin", "COLUMNS": "150"}
    activate = home / "own" / "bin" / "activate"
    shell = f"set -e; test ! -e {activate} || . {activate}; {line}"
    done = subprocess.run(
        ["bash", "-c", shell],
        cwd=folder,
        env=kept,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(f"$ {line}\n{done.stdout}", flush=True)
    done.check_returncode()
    return done.stdout


def main() -> None:
    """Install, type, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=0.06, help="Budget of each search.")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        started = time.monotonic()
        for line in INSTALLATION:
            typed(line.format(repository=ROOT), home if "clone" in line else home / "autopeft", home)
        installation = time.monotonic() - started
        for kind, (model, data, file) in KINDS.items():
            folder = home / kind.replace(" ", "_")
            folder.mkdir()
            words = {"model": prepare(model), "data": prepare(data) / file, "hours": arguments.hours}
            started = time.monotonic()
            said = [typed(line.format(**words), folder, home) for line in LINES]
            (size, trials) = re.findall(r"(\d+) of (\d+) trials", said[3])[0]
            rows.append(
                {
                    "data": kind,
                    "lines": len(INSTALLATION) + len(LINES),
                    "minutes": (installation + time.monotonic() - started) / 60,
                    "trials": int(trials),
                    "front": int(size),
                }
            )
    table = Table(title=f"Installation took {installation / 60:.1f} of the minutes")
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    wide_console().print(table)
    record = {
        "command": f"python -m benchmarks.first_front --hours {arguments.hours:g}",
        "machine": this_machine(),
        "installation_minutes": installation / 60,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
