"""Memory that is free goes back to the system: C libraries keep it for the next allocation."""

from __future__ import annotations

import ctypes


def return_free_memory() -> None:
    """Give back the pages of this process that hold nothing any more; does nothing without glibc.

    glibc keeps freed blocks of up to 32 MiB, as activations are, while anything above them on its heap is in
    use: between trials that would be a gibibyte and more that other processes cannot have.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
