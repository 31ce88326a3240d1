"""A search in a process of its own, and the memory that it holds (Linux).

    export MALLOC_MMAP_THRESHOLD_=262144 THP_MEM_ALLOC_ENABLE=1
    python -m benchmarks.resident CONFIG FOLDER [SETTING ...]

Printed, and kept in the folder, is how much was resident when the libraries were imported, before anything
was loaded, and the most that was in each section of `autopeft.core.profiling`, beside the bounds of training
and of scoring: 2.5 times the weights, and the counted peak without them. Scoring differentiates through all
blocks. Pages of mapped files count too. Settings are those of `autopeft search`. One trial of LoRA
everywhere, with a batch of training rows, comes to the peak that was counted; in a few steps of many rows the
longest may be missing.
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
from benchmarks.uniform_lora import uniform

ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "THP_MEM_ALLOC_ENABLE": "1"}
"""Settings of glibc and torch by which freed tensors leave the process; see `docs/how-it-works/memory.md`."""
_RECORD = "resident.json"
_SCORING = "score"
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
        counted_in_scoring: The `peak_memory` of LoRA of rank 1 on all linear layers, through which scores
            differentiate.
        peaks: The most that was resident, by section.
    """

    libraries: int
    weights: int
    counted: float
    counted_in_scoring: float
    peaks: dict[str, int]

    def record(self) -> dict[str, Any]:
        """Return the peaks of scoring and of all else, their bounds, and what those are made of."""
        others = (peak for section, peak in self.peaks.items() if section != _SCORING)
        beside_counted = (_WEIGHTS - 1) * self.weights
        return {
            "peak_resident_bytes": max(others),
            "bound_without_libraries_bytes": beside_counted + self.counted,
            "peak_resident_in_scoring_bytes": self.peaks.get(_SCORING, 0),
            "bound_in_scoring_without_libraries_bytes": beside_counted + self.counted_in_scoring,
            "library_bytes": self.libraries,
            "weight_bytes": self.weights,
            "largest_counted_bytes": self.counted,
            "counted_in_scoring_bytes": self.counted_in_scoring,
            "peak_resident_bytes_by_section": self.peaks,
        }

    def __str__(self) -> str:
        sizes = self.record()
        by_section = sizes.pop("peak_resident_bytes_by_section")
        lines = [f"{size / 2**30:6.2f} GiB  {name.replace('_', ' ')}" for name, size in sizes.items()]
        sections = sorted(by_section, key=lambda name: -by_section[name])
        by_section = ", ".join(f"{name} {by_section[name] / 2**30:.2f}" for name in sections)
        return "\n".join([*lines, f"Peaks by section, in GiB: {by_section}"])


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
        opened = loaded.search.open()
        weights = sum(tensor.nbytes for tensor in opened.backbone.model.parameters())
        in_scoring = opened.evaluator.costs(uniform(opened.backbone, rank=1, rate=1e-3))["peak_memory"]
        counted = max(
            record.evaluation.values.get("peak_memory", 0.0)
            for record in front.records
            if record.evaluation.status != "infeasible"
        )
        resident = Resident(libraries, weights, counted, in_scoring, dict(profile.peaks))
        print(resident)
        Path(folder, _RECORD).write_text(json.dumps(asdict(resident)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
