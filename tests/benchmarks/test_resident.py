"""The memory of a search's process, by section."""

from __future__ import annotations

import numpy as np

from autopeft.core.profiling import section
from benchmarks.leak import resident_bytes
from benchmarks.resident import MemoryProfile


def test_peaks_are_those_of_their_section() -> None:
    size = 2**26
    with MemoryProfile() as profile:
        before = resident_bytes()
        with section("score"):
            held = np.ones(size, dtype=np.uint8)
            with section("forward"):
                more = np.ones(size, dtype=np.uint8)
            del held, more
        with section("evaluate"):
            pass
    assert profile.peaks["score"] > before + 1.9 * size  # the kernel counts pages in batches
    assert profile.peaks["evaluate"] < before + size
