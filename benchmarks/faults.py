"""What becomes of a search when things go wrong at random moments: is a trial lost, or counted twice?

    python -m benchmarks.faults [--faults 200] [--seed 0] [--kinds "MLflow read-only" "damaged scores"]

A tiny random model is searched, again and again in processes that are forked from this one, each with one
fault. A third of the studies has rungs, replicates, derived points and, every other one, warm starts, and
faults that end or hinder the call: kill -9, SIGTERM, Ctrl-C at a random moment, a disk that is full after a
random number of bytes, a damaged or lost checkpoint, half a line or a damaged line in the journal (refused,
and restored from a copy), a clock set back, an MLflow server that is gone, or keeps its connections and does
not answer for up to 70 seconds, an MLflow database and artifacts that are read-only from the start or from a
random moment on, or that cannot be reached for a while. Another third has whole trainings, of which one fails
at a random step: an exception, NaN or lack of memory; failed trials are tried again. The last reads scores,
tokens and hidden states from files, of which one is cut, changed, emptied or deleted, or all are made again
on a full disk. So that a study sees many faults, calls that go on are ended by kill -9 at a random moment.
The same call then resumes. When the trials are done, they are compared with those of an undisturbed search,
and the next study begins. Each kind's latest run is kept.

A fault counts as injected where it came in time, as recovered where the call goes on or ends with a clear
error, the next call resumes and no trial that had finished is another one afterwards. In the column "front
equal" stand the faults of studies that end with the undisturbed search's trials and front.

Faults of Ray's workers: `benchmarks/worker_faults.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch

from autopeft import Search
from autopeft.core.evaluation import TrialRecord
from autopeft.optimization.study_store import STUDY_FILE
from autopeft.reporting.mlflow import tracker as _imported_once  # noqa: F401 - not by every child
from autopeft.search_spaces import ScoreGuided
from autopeft.training.module import FineTuning
from benchmarks.fault_studies import COLUMNS, TRIALS, counted_twice, records_in, show, small_search
from benchmarks.machine import this_machine
from benchmarks.mlflow_faults import (
    LONGEST_FREEZE,
    STRUCK,
    Fault,
    a_server,
    clock_set_back,
    empty_store,
    mlflow_away,
    mlflow_frozen,
    mlflow_gone,
    mlflow_read_only,
    place_of,
    strike,
)
from tests.learnable import learner, outcomes

RESULTS = Path(__file__).parent / "results" / "faults.json"
CALLS_A_STUDY = 18
_REFUSED = 2  # how a child ends that was told clearly what is wrong

EACH = (*COLUMNS, "front equal")


def _in_a_step(spoil: Callable[[Any], Any]) -> Fault:
    """Spoil the loss of one of the next steps of a training."""

    def fault(draw: random.Random, search: Search) -> None:
        step, left = FineTuning.training_step, 1 + draw.randrange(60)

        def spoilt(module: FineTuning, *arguments: Any) -> Any:
            nonlocal left
            left -= 1
            loss = step(module, *arguments)
            if left:
                return loss
            strike()
            return spoil(loss)

        patch.object(FineTuning, "training_step", spoilt).start()

    return fault


def _raise(error: Exception) -> NoReturn:
    raise error


def _full_disk(draw: random.Random, search: Search) -> None:
    """Let no file grow beyond a size: of the journal, or of a checkpoint."""
    journal = search.folder / STUDY_FILE
    size = journal.stat().st_size if journal.exists() else 0
    most = size + draw.randrange(20_000) if draw.random() < 0.7 else draw.randrange(20_000)
    signal.signal(signal.SIGXFSZ, strike)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def _full_disk_of_caches(draw: random.Random, search: Search) -> None:
    for name in ("cache", "disturbed/scores"):
        shutil.rmtree(place_of(search) / name, ignore_errors=True)
    _full_disk(draw, search)


def _damaged(pattern: str) -> Fault:
    """Cut one of a study's files, change a byte of it, empty it, or delete it."""

    def fault(draw: random.Random, search: Search) -> None:
        files = sorted(path for path in place_of(search).glob(pattern) if path.is_file())
        if not files:
            return
        strike()
        path = draw.choice(files)
        content = bytearray(path.read_bytes())
        kind = draw.choice(("cut", "changed", "empty", "gone"))
        if kind == "changed" and content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes({"cut": content[: len(content) // 2], "changed": content}.get(kind, b""))
        if kind == "gone":
            path.unlink()

    return fault


def _half_a_line(draw: random.Random, search: Search) -> None:
    with (search.folder / STUDY_FILE).open("ab") as file:
        strike()
        file.write(b'{"op_code": 4, "study_id": 0, "state'[: draw.randrange(1, 36)])


def _nothing(draw: random.Random, search: Search) -> None:
    pass


KILLS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
OF_CALLS: Mapping[str, Fault] = {
    **dict.fromkeys(KILLS, _nothing),
    "full disk": _full_disk,
    "clock set back": clock_set_back,
    "damaged checkpoint": _damaged("disturbed/faults/**/*.safetensors"),
    "half a line in the journal": _half_a_line,
    "damaged line in the journal": _nothing,  # see `Study.disturb`
    "MLflow gone": mlflow_gone,
    "MLflow read-only": mlflow_read_only,
    "MLflow away for a while": mlflow_away,
    "MLflow frozen": mlflow_frozen,
}
OF_TRAININGS: Mapping[str, Fault] = {
    "exception in a model": _in_a_step(lambda _: _raise(RuntimeError("a mistake"))),
    "out of memory": _in_a_step(lambda _: _raise(torch.OutOfMemoryError("CUDA out of memory"))),
    "NaN": _in_a_step(lambda loss: loss * torch.nan),
}
OF_CACHES: Mapping[str, Fault] = {
    "damaged hidden states": _damaged("cache/hidden_states/*.safetensors"),
    "damaged scores": _damaged("disturbed/scores/*.json"),
    "damaged tokens": _damaged("cache/*.safetensors"),
    "full disk of caches and scores": _full_disk_of_caches,
}
STUDIES = (OF_CALLS, OF_TRAININGS, OF_CACHES)
_WRITING_TO_MLFLOW = (mlflow_read_only, mlflow_away, mlflow_frozen, clock_set_back)
FAULTS = {**OF_CALLS, **OF_TRAININGS, **OF_CACHES}


class Study:
    """A search that is disturbed until its trials are done, and the same undisturbed.

    Args:
        place: Folder in which both keep their files, MLflow's store, and the cache.
        faults: One of `STUDIES`.
        seed: Of the search.
        draw: Draws moments and places.
    """

    def __init__(self, place: Path, faults: Mapping[str, Fault], seed: int, draw: random.Random) -> None:
        self.draw = draw
        self.faults = faults
        self._was_killed = False  # the latest call, before it ended
        os.environ["AUTOPEFT_CACHE"] = str(place / "cache")
        (place / "mlflow").mkdir()
        (place / "mlflow" / "mlflow.db").write_bytes(empty_store())
        self.search = self._search(place / "disturbed", seed)
        if faults is not OF_CACHES:  # a search that is open has read scores and tokens
            self.search.open()
        started = time.monotonic()
        front = self._search(place / "whole", seed).run(trials=TRIALS, progress=False)
        self.seconds = time.monotonic() - started
        self.expected = [record for record in front.records if record.derived_from is None]
        self.members = front.members

    def _search(self, folder: Path, seed: int) -> Search:
        has_rungs = self.faults is OF_CALLS
        settings: dict[str, Any] = {"derive": has_rungs, "warm_start": has_rungs and seed % 2 == 1}
        if self.faults is OF_CACHES:
            settings |= {"backbone": learner(num_hidden_layers=3), "space": ScoreGuided()}
        return small_search(folder, seed, has_rungs=has_rungs, **settings)

    @property
    def records(self) -> list[TrialRecord]:
        """What the disturbed search has on disk."""
        return records_in(self.search.folder)

    def disturb(self, kind: str) -> dict[str, int]:
        """Search with a fault; return what came of it, by column."""
        before = {record.number: record for record in self.records}
        journal = self.search.folder / STUDY_FILE
        is_clear = True
        STRUCK[0] = 0
        if kind == "damaged line in the journal" and journal.exists():
            strike()
            whole = journal.read_bytes()
            lines = whole.splitlines(keepends=True)
            lines[self.draw.randrange(len(lines))] = b'{"op_code": 4, "stu\\xff"\n'
            journal.write_bytes(b"".join(lines))
            is_clear = self._run(_nothing) == _REFUSED
            journal.write_bytes(whole)
        else:
            # Until MLflow is written to takes a while.
            longest = self.seconds * (5 if FAULTS[kind] in _WRITING_TO_MLFLOW else 1)
            longest += 2 * LONGEST_FREEZE if kind == "MLflow frozen" else 0  # half see it answer again
            is_clear = self._run(FAULTS[kind], KILLS.get(kind, signal.SIGKILL), longest) != 1
            if kind in KILLS and self._was_killed:
                strike()
        after = {record.number: record for record in self.records}
        finished = [record for record in before.values() if record.evaluation.status == "complete"]
        lost = sum(not self._is_kept(record, after.get(record.number)) for record in finished)
        twice = counted_twice(self.search.folder)
        is_recovered = int(STRUCK[0] and is_clear and not lost and not twice)
        return dict(zip(COLUMNS, (STRUCK[0], is_recovered, lost, twice), strict=True))

    def _is_kept(self, known: TrialRecord, now: TrialRecord | None) -> bool:
        if now is None or now.evaluation.status != "complete":
            return False
        is_same = now.evaluation.configuration == known.evaluation.configuration
        return is_same and known.evaluation.each_training().items() <= now.evaluation.each_training().items()

    def _run(self, fault: Fault, kill: int | None = None, longest: float = 0.0) -> int:
        """Search in a process of its own, and return how that ended: 1 is an error that is not clear."""
        seed = self.draw.random()
        sys.stdout.flush()
        if not (child := os.fork()):
            code = 1
            try:
                errors = os.open(os.devnull, os.O_WRONLY)
                os.dup2(errors, 2)
                fault(random.Random(seed), self.search)
                self.search.run(trials=TRIALS, progress=False, retry_failed=True)
                code = 0
            except (ValueError, KeyboardInterrupt, SystemExit):  # the last by Lightning, on SIGTERM
                code = _REFUSED
            except OSError as error:
                code = _REFUSED if "/" in str(error) else 1  # it has to name the file
            finally:
                os._exit(code)
        if kill is not None:
            handle = os.pidfd_open(child)
            ended, _, _ = select.select([handle], [], [], self.draw.random() * longest)
            self._was_killed = not ended
            os.close(handle)
            os.kill(child, kill)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    @property
    def is_done(self) -> bool:
        """Whether the disturbed search has what the undisturbed one has."""
        return outcomes(self.records) == outcomes(self.expected)

    def end(self) -> dict[str, int]:
        """Finish the search; return what is lost, and whether the front is the undisturbed one's."""
        for _ in range(3):  # trials that failed in the last call are tried again by the next
            self._run(_nothing)
        found = {record.number for record in self.records}
        lost = sum(record.number not in found for record in self.expected)
        is_equal = self.is_done and self.search.front().members == self.members
        twice = counted_twice(self.search.folder)
        return {"trials lost": lost, "counted twice": twice, "front equal": int(is_equal)}


def main() -> None:
    """Disturb studies until there were so many faults, print a table, write JSON by kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="KIND")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(arguments.seed)
    kinds = {kind: Counter[str]() for kind in arguments.kinds}
    groups = [faults for faults in STUDIES if faults.keys() & kinds.keys()]
    injected = 0
    studies: list[dict[str, int]] = []
    while injected < arguments.faults:
        queue: list[str] = []
        faults, seed = groups[len(studies) % len(groups)], arguments.seed + len(studies)
        mine = Counter({kind: 0 for kind in faults if kind in kinds})
        with tempfile.TemporaryDirectory() as place:
            if "MLflow frozen" in mine:
                a_server()  # before a child is forked, which would start its own
            study = Study(Path(place), faults, seed, draw)
            for _ in range(CALLS_A_STUDY):
                if injected == arguments.faults or study.is_done:
                    break
                queue = queue or draw.sample([*mine], len(mine))
                kind = queue.pop()
                came = study.disturb(kind)
                kinds[kind].update(came)
                mine[kind] += came["injected"]
                injected += came["injected"]
                print(f"{injected} {kind}: {len(study.records)} trials", flush=True)
            studies.append(study.end())
        for kind, count in mine.items():
            kinds[kind]["front equal"] += count * studies[-1]["front equal"]
    show(f"{injected} faults in {len(studies)} studies of {TRIALS} trials", kinds, EACH)
    equal = sum(study["front equal"] for study in studies)
    print(f"{equal} of {len(studies)} studies ended with the trials and the front of an undisturbed one.")
    command = ["python", "-m", "benchmarks.faults", *sys.argv[1:]]
    run = {"command": shlex.join(command), "machine": this_machine()}
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known |= {kind: {**run, **counts} for kind, counts in kinds.items()}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
