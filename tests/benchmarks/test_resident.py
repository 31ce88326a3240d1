"""The memory of a search's process, by section."""

from __future__ import annotations

import numpy as np

from autopeft.core.profiling import section
from benchmarks.leak import resident_bytes
from benchmarks.resident import MemoryProfile, Resident


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


def test_the_bound_leaves_out_the_weights_that_were_counted_already() -> None:
    peaks = {"score": 340, "backward": 320, "forward": 310}
    resident = Resident(libraries=10, weights=100, counted=180.0, counted_in_scoring=190.0, peaks=peaks)
    found = resident.record()
    assert found["peak_resident_bytes"] == 320
    assert found["bound_without_libraries_bytes"] == 2.5 * 100 + 80
    assert found["peak_resident_in_scoring_bytes"] == 340
    assert found["bound_in_scoring_without_libraries_bytes"] == 2.5 * 100 + 90
    assert "score 0.00, backward 0.00, forward 0.00" in str(resident)
