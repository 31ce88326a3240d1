"""A search in a process of its own, and the memory that it holds (Linux).

    export MALLOC_MMAP_THRESHOLD_=262144 THP_MEM_ALLOC_ENABLE=1
    python -m benchmarks.resident CONFIG FOLDER [SETTING ...]

Printed, and kept in the folder, is how much was resident when the libraries were imported, before anything
was loaded, and the most that was in each section of `autopeft.core.profiling`, beside its bound. Pages of
mapped files count too. Settings are those of `autopeft search`. One trial of LoRA everywhere, with a batch of
training rows, comes to the peak that was counted; in a few steps of many rows the longest may be missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from autopeft.core.profiling import Profile
from autopeft.yaml_config import load_config
from benchmarks.leak import resident_bytes

ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "THP_MEM_ALLOC_ENABLE": "1"}
"""Settings of glibc and torch by which freed tensors leave the process; see `docs/how-it-works/memory.md`."""
_RECORD = "resident.json"
_WEIGHTS = 2.5  # sizes of the weights, in the bound
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
    """Resident memory of a search's process, in bytes.

    Attributes:
        libraries: Held once they are imported.
        weights: Of the backbone.
        counted: The largest `peak_memory` of what was trained, also in part; it has the weights in it.
        peaks: The most that was resident, by section.
    """

    libraries: int
    weights: int
    counted: float
    peaks: dict[str, int]

    def record(self) -> dict[str, Any]:
        """Return the peak, its bounds with and without what the libraries hold, and what they are made of."""
        bound = (_WEIGHTS - 1) * self.weights + self.counted
        return {
            "peak_resident_bytes": max(self.peaks.values()),
            "bound_bytes": self.libraries + bound,
            "bound_without_libraries_bytes": bound,
            "library_bytes": self.libraries,
            "weight_bytes": self.weights,
            "largest_counted_bytes": self.counted,
            "peak_resident_bytes_by_section": self.peaks,
        }

    def __str__(self) -> str:
        def gibibytes(size: float) -> str:
            return f"{size / 2**30:.2f} GiB"

        found = self.record()
        sections = sorted(self.peaks, key=lambda name: -self.peaks[name])
        return (
            f"Peak resident memory of the search: {gibibytes(found['peak_resident_bytes'])}; bound: "
            f"{gibibytes(found['bound_bytes'])},\nthat is libraries {gibibytes(self.libraries)}, {_WEIGHTS} "
            f"times the weights of {gibibytes(self.weights)}, and the largest counted peak of "
            f"{gibibytes(self.counted)} without them;\nwithout libraries "
            f"{gibibytes(found['bound_without_libraries_bytes'])}.\n"
            f"By section in GiB: {', '.join(f'{name} {self.peaks[name] / 2**30:.2f}' for name in sections)}."
        )


def searched(config: Path, folder: Path) -> Resident | None:
    """Run a search in a process of its own; return the memory that it held, if it was run in one call."""
    command = [sys.executable, "-m", "benchmarks.resident", str(config), str(folder)]
    subprocess.run(command, check=True, env=os.environ | ALLOCATION)
    record = folder / _RECORD
    return Resident(**json.loads(record.read_text())) if record.exists() else None


def main(config: str, folder: str, *settings: str) -> None:
    """Search; print and write the record."""
    was_begun = Path(folder).exists()
    loaded = load_config(config, [f"folder={folder}", "tracking=null", *settings])
    libraries = resident_bytes()
    with MemoryProfile() as profile:
        front = loaded.search.run(**loaded.run)
    if not was_begun:
        weights = sum(tensor.nbytes for tensor in loaded.search.open().backbone.model.parameters())
        counted = max(
            record.evaluation.values.get("peak_memory", 0.0)
            for record in front.records
            if record.evaluation.status != "infeasible"
        )
        resident = Resident(libraries, weights, counted, dict(profile.peaks))
        print(resident)
        Path(folder, _RECORD).write_text(json.dumps(asdict(resident)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
