"""What becomes of a search when things go wrong at random moments: is a trial lost, or counted twice?

    python -m benchmarks.faults [--faults 200] [--seed 0]

A tiny random model is searched, again and again in processes that are forked from this one, each with one
fault. Every other study has rungs and replicates, and faults that end or hinder the call: kill -9, SIGTERM,
Ctrl-C at a random moment, a disk that is full after a random number of bytes, a damaged or lost checkpoint,
half a line or a damaged line in the journal (refused, and restored from a copy), a clock set back, an MLflow
server that is gone. The others have whole trainings, of which one fails at a random step: an exception, NaN
or lack of memory; failed trials are tried again. So that a study sees many faults, calls that go on are ended
by kill -9 at a random moment. The same call then resumes. When the trials are done, they are compared with
those of an undisturbed search, and the next study begins.

A fault is recovered where the next call resumes and no trial that had finished is another one afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.table import Table

from autopeft import Search, SuccessiveHalving
from autopeft.core.evaluation import TrialRecord
from autopeft.optimization.study_file import read_journal
from autopeft.optimization.study_store import STUDY_FILE, load_study
from autopeft.reporting.console import wide_console
from autopeft.reporting.mlflow import tracker as _imported_once  # noqa: F401 - not by every child
from autopeft.training.module import FineTuning
from tests.learnable import learnable_task, outcomes, tiny_search

RESULTS = Path(__file__).parent / "results" / "faults.json"
TRIALS = 8
FAULTS_A_STUDY = 18
_DAY = 86_400.0

Fault = Callable[[random.Random, Path], object]
"""What a child does before it searches; it is given the search's folder."""


def _raises_in_a_step(make: Callable[[], Exception]) -> Fault:
    """Fail in one of the next steps of a training."""

    def fault(draw: random.Random, folder: Path) -> None:
        step, left = FineTuning.training_step, 1 + draw.randrange(60)

        def failing(module: FineTuning, *arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise make()
            return step(module, *arguments)

        patch.object(FineTuning, "training_step", failing).start()

    return fault


def _nan_in_a_step(draw: random.Random, folder: Path) -> None:
    step, left = FineTuning.training_step, 1 + draw.randrange(60)

    def failing(module: FineTuning, *arguments: Any) -> Any:
        nonlocal left
        left -= 1
        return step(module, *arguments) * (torch.nan if left == 0 else 1)

    patch.object(FineTuning, "training_step", failing).start()


def _full_disk(draw: random.Random, folder: Path) -> None:
    """Let no file grow beyond a size: of the journal, or of a checkpoint."""
    journal = folder / STUDY_FILE
    size = journal.stat().st_size if journal.exists() else 0
    most = size + draw.randrange(20_000) if draw.random() < 0.7 else draw.randrange(20_000)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def _clock_set_back(draw: random.Random, folder: Path) -> None:
    now, back = time.time, draw.random() * _DAY
    patch("time.time", lambda: now() - back).start()


def _some_file(draw: random.Random, folder: Path) -> Path | None:
    files = sorted(path for path in folder.rglob("*.safetensors") if path.is_file())
    return draw.choice(files) if files else None


def _damaged_file(draw: random.Random, folder: Path) -> None:
    """Cut a checkpoint's file, change a byte of it, empty it, or delete it."""
    if (path := _some_file(draw, folder)) is None:
        return
    content = bytearray(path.read_bytes())
    kind = draw.choice(("cut", "changed", "empty", "gone"))
    if kind == "changed" and content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes({"cut": content[: len(content) // 2], "changed": content}.get(kind, b""))
    if kind == "gone":
        path.unlink()


def _half_a_line(draw: random.Random, folder: Path) -> None:
    with (folder / STUDY_FILE).open("ab") as file:
        file.write(b'{"op_code": 4, "study_id": 0, "state'[: draw.randrange(1, 36)])


def _nothing(draw: random.Random, folder: Path) -> None:
    pass


KILLS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
OF_CALLS: Mapping[str, Fault] = {
    **dict.fromkeys(KILLS, _nothing),
    "full disk": _full_disk,
    "clock set back": _clock_set_back,
    "damaged checkpoint": _damaged_file,
    "half a line in the journal": _half_a_line,
    "damaged line in the journal": _nothing,  # see `Study.disturb`
    "MLflow gone": _nothing,
}
OF_TRAININGS: Mapping[str, Fault] = {
    "exception in a model": _raises_in_a_step(lambda: RuntimeError("a mistake")),
    "out of memory": _raises_in_a_step(lambda: torch.OutOfMemoryError("CUDA out of memory")),
    "NaN": _nan_in_a_step,
}
FAULTS = {**OF_CALLS, **OF_TRAININGS}
COLUMNS = ("injected", "recovered", "trials lost", "counted twice")


class Study:
    """A search that is disturbed until its trials are done, and the same undisturbed."""

    def __init__(self, place: Path, seed: int, draw: random.Random) -> None:
        self.draw = draw
        self.has_rungs = seed % 2 == 0
        self.faults = list(OF_CALLS if self.has_rungs else OF_TRAININGS)
        self.search = self._search(place / "disturbed", seed)
        self.search.open()
        started = time.monotonic()
        front = self._search(place / "whole", seed).run(trials=TRIALS, progress=False)
        self.seconds = time.monotonic() - started
        self.expected = [record for record in front.records if record.derived_from is None]
        self.members = front.members

    def _search(self, folder: Path, seed: int) -> Search:
        return tiny_search(
            folder,
            task=learnable_task(rows=96),
            halving=SuccessiveHalving(rungs=(0.25, 0.5), reduction_factor=2) if self.has_rungs else None,
            seeds=2 if self.has_rungs else 1,
            seed=seed,
            sampler="random",
            name="faults",
        )

    @property
    def records(self) -> list[TrialRecord]:
        """What the disturbed search has on disk."""
        if not (self.search.folder / STUDY_FILE).exists():
            return []
        try:
            return load_study(self.search.folder)[1]
        except ValueError as error:
            if "is empty" in str(error):  # killed before the study was made
                return []
            raise

    def disturb(self, kind: str) -> dict[str, int]:
        """Search with a fault; return what came of it, by column."""
        before = {record.number: record for record in self.records}
        journal = self.search.folder / STUDY_FILE
        refused = True
        if kind == "damaged line in the journal" and journal.exists():
            whole = journal.read_bytes()
            lines = whole.splitlines(keepends=True)
            lines[self.draw.randrange(len(lines))] = b'{"op_code": 4, "stu\\xff"\n'
            journal.write_bytes(b"".join(lines))
            refused = self._run(_nothing, None, kind) != 0
            journal.write_bytes(whole)
        else:
            self._run(FAULTS[kind], KILLS.get(kind, signal.SIGKILL), kind)
        after = {record.number: record for record in self.records}
        finished = [record for record in before.values() if record.evaluation.status == "complete"]
        lost = sum(not self._is_kept(record, after.get(record.number)) for record in finished)
        twice = self._twice()
        return dict(zip(COLUMNS, (1, int(refused and not lost and not twice), lost, twice), strict=True))

    def _is_kept(self, known: TrialRecord, now: TrialRecord | None) -> bool:
        if now is None or now.evaluation.status != "complete":
            return False
        first = now.evaluation.each_training()
        return all(seed in first for seed in known.evaluation.each_training())

    def _twice(self) -> int:
        """Return how many trials stand in the journal more than once."""
        journal = self.search.folder / STUDY_FILE
        if not journal.exists():
            return 0
        storage = read_journal(journal)
        names = [study.study_name for study in storage.get_all_studies()]
        trials = [
            trial
            for study_id in map(storage.get_study_id_from_name, names)
            for trial in storage.get_all_trials(study_id)
        ]
        numbers = Counter(json.loads(trial.user_attrs["autopeft:record"])["number"] for trial in trials)
        return sum(count - 1 for count in numbers.values())

    def _run(self, fault: Fault, kill: int | None, kind: str) -> int:
        """Search in a process of its own, and return how that ended."""
        seed = self.draw.random()
        sys.stdout.flush()
        if not (child := os.fork()):
            code = 1
            try:
                errors = os.open(os.devnull, os.O_WRONLY)
                os.dup2(errors, 2)
                fault(random.Random(seed), self.search.folder)
                if kind == "MLflow gone":
                    self.search.tracking = "http://127.0.0.1:1"
                self.search.run(trials=TRIALS, progress=False, retry_failed=True)
                code = 0
            finally:
                os._exit(code)
        if kill is not None:
            time.sleep(self.draw.random() * self.seconds)
            os.kill(child, kill)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    @property
    def is_done(self) -> bool:
        """Whether the disturbed search has what the undisturbed one has."""
        return outcomes(self.records) == outcomes(self.expected)

    def end(self) -> dict[str, int]:
        """Finish the search; return what is lost, and whether the front is the undisturbed one's."""
        for _ in range(3):  # trials that failed in the last call are tried again by the next
            self._run(_nothing, None, "")
        found = {record.number for record in self.records}
        lost = sum(record.number not in found for record in self.expected)
        is_equal = self.is_done and self.search.front().members == self.members
        return {"trials lost": lost, "counted twice": self._twice(), "front equal": int(is_equal)}


def main() -> None:
    """Disturb studies until there were so many faults, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(arguments.seed)
    kinds = {kind: Counter[str]() for kind in FAULTS}
    injected = 0
    studies: list[dict[str, int]] = []
    while injected < arguments.faults:
        queue: list[str] = []
        most = injected + FAULTS_A_STUDY
        with tempfile.TemporaryDirectory() as place:
            study = Study(Path(place), arguments.seed + len(studies), draw)
            while injected < min(arguments.faults, most) and not study.is_done:
                queue = queue or draw.sample(study.faults, len(study.faults))
                kind = queue.pop()
                kinds[kind].update(study.disturb(kind))
                injected += 1
                print(f"{injected} {kind}: {len(study.records)} trials", flush=True)
            studies.append(study.end())
    table = Table(title=f"{injected} faults in {len(studies)} studies of {TRIALS} trials")
    for heading in ("fault", *COLUMNS):
        table.add_column(heading, justify="left" if heading == "fault" else "right")
    for kind, counts in kinds.items():
        table.add_row(kind, *(str(counts[column]) for column in COLUMNS))
    console = wide_console()
    console.print(table)
    equal = sum(study["front equal"] for study in studies)
    console.print(
        f"{equal} of {len(studies)} studies ended with the trials and the front of an undisturbed one."
    )
    record = {
        "command": f"python -m benchmarks.faults --faults {arguments.faults} --seed {arguments.seed}",
        "machine": platform.platform(),
        "faults": kinds,
        "studies": len(studies),
        "studies equal to an undisturbed one": equal,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
