"""A search in a process of its own, and the memory that it holds (Linux).

    python -m benchmarks.resident CONFIG FOLDER

Kept in the folder is how much was resident when the libraries were imported, before anything was loaded, and
the most that was in each section of `autopeft.core.profiling`. Pages of mapped files count too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from autopeft.core.profiling import Profile
from autopeft.yaml_config import load_config
from benchmarks.leak import resident_bytes

ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": str(8 * 2**20), "THP_MEM_ALLOC_ENABLE": "1"}
"""Settings of glibc and torch by which freed tensors leave the process; see `docs/how-it-works/memory.md`."""
_RECORD = "resident.json"
_PROCESS = Path("/proc/self")
_RESTART_PEAK = "5"  # proc(5), clear_refs


class MemoryProfile(Profile):
    """Note the most resident bytes in each section, beside its time.

    Attributes:
        peaks: Bytes by section.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, int] = defaultdict(int)
        self._names: list[str] = []

    def enter(self, name: str) -> int:
        """Count to a section from now on."""
        self._note()
        self._names.append(name)
        return super().enter(name)

    def leave(self, depth: int) -> None:
        """End the section of a depth."""
        self._note()
        del self._names[depth:]
        super().leave(depth)

    def _note(self) -> None:
        status = dict(line.split(":", 1) for line in (_PROCESS / "status").read_text().splitlines())
        if self._names:
            name, peak = self._names[-1], 1024 * int(status["VmHWM"].split()[0])
            self.peaks[name] = max(self.peaks[name], peak)
        (_PROCESS / "clear_refs").write_text(_RESTART_PEAK)


@dataclass(frozen=True)
class Resident:
    """Resident memory of a search's process, in bytes."""

    libraries: int
    peaks: dict[str, int]

    @property
    def peak(self) -> int:
        """The most at any time."""
        return max(self.peaks.values())


def searched(config: Path, folder: Path) -> Resident | None:
    """Run a search in a process of its own; return the memory that it held, if it was run in one call."""
    command = [sys.executable, "-m", "benchmarks.resident", str(config), str(folder)]
    subprocess.run(command, check=True, env=os.environ | ALLOCATION)
    record = folder / _RECORD
    return Resident(**json.loads(record.read_text())) if record.exists() else None


def main(config: str, folder: str) -> None:
    """Search, and write the record."""
    was_begun = Path(folder).exists()
    loaded = load_config(config, [f"folder={folder}", "tracking=null"])
    libraries = resident_bytes()
    with MemoryProfile() as profile:
        loaded.search.run(**loaded.run)
    if not was_begun:
        resident = Resident(libraries, dict(profile.peaks))
        Path(folder, _RECORD).write_text(json.dumps(asdict(resident)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
