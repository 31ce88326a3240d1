"""Memory that is free goes back to the system."""

from __future__ import annotations

import platform

import pytest

from autopeft.training.free_memory import return_free_memory
from benchmarks.leak import resident_bytes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="Other C libraries have no malloc_trim.")
def test_what_glibc_keeps_is_given_back() -> None:
    size = 2**16  # below what glibc maps on its own
    blocks = [bytearray(size) for _ in range(2**10)]
    last = bytearray(size)
    del blocks
    kept = resident_bytes()
    return_free_memory()
    assert kept - resident_bytes() > 2**9 * size
    del last
