"""Where the time of a search goes: a nested timer that costs next to nothing while it is off."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Self

SECTIONS = {
    "load": "read the backbone",
    "tokenise": "read and tokenise the data",
    "score": "score the sites without training",
    "rehearse": "run one batch through all that a trial does, before the first",
    "ask": "choose the next configuration, or the paused trial that goes on",
    "attach": "put adapters in and take them out",
    "count": "count peak memory and FLOPs before training",
    "initialise": "make initial weights of the first training batches, for methods that want it",
    "set-up": "make the module, the Trainer and the optimizer, and end them",
    "data": "make training batches and move them to the device",
    "forward": "forward passes of training steps",
    "backward": "backward passes",
    "optimizer": "clip gradients, step, free gradients, learning rate",
    "evaluate": "validation, latency",
    "trainer": "Lightning's loops and callbacks between all that",
    "record": "write study, checkpoints and paused trials; bring the front up to date",
    "log": "hand over to the thread that writes to MLflow, and wait for it at the end",
    "callbacks": "the caller's own",
    "other": "everything else, such as the progress bar",
}
"""What the time of a search is split into."""


@dataclass
class TimeSpan:
    """Wall time and processor time of a thread in one place, and how often it was entered."""

    seconds: float = 0.0
    processor_seconds: float = 0.0
    calls: int = 0

    def add_since(self, start: tuple[float, float]) -> tuple[float, float]:
        """Add this thread's time since a moment that `now` gave; return the new moment."""
        wall, processor = now()
        self.seconds += wall - start[0]
        self.processor_seconds += processor - start[1]
        return wall, processor


def now() -> tuple[float, float]:
    """Return the wall time and this thread's processor time."""
    return time.perf_counter(), time.thread_time()


class Profile:
    """Split the time of the thread that enters it into sections; what a section calls counts there alone.

    `section` and Lightning's actions count to it within its `with` block. CUDA kernels are waited for at each
    boundary, so that they count where they were launched, which makes a search on a GPU slower.
    """

    def __init__(self) -> None:
        self.spans = {name: TimeSpan() for name in SECTIONS}
        self._stack: list[TimeSpan] = []
        self._since = now()

    def __enter__(self) -> Self:
        if current_profile.get() is not None:
            raise RuntimeError("This thread is being profiled already.")
        self._token = current_profile.set(self)
        self.enter("other")
        return self

    def __exit__(self, *error: object) -> None:
        self.leave(0)
        current_profile.reset(self._token)

    def enter(self, name: str) -> int:
        """Count to a section from now on; return the depth with which `leave` ends it."""
        self.count()
        self.spans[name].calls += 1
        self._stack.append(self.spans[name])
        return len(self._stack) - 1

    def leave(self, depth: int) -> None:
        """End the section of a depth, and whatever was entered since and not ended."""
        self.count()
        del self._stack[depth:]

    def count(self) -> None:
        """Bring the spans up to now."""
        import torch  # here, so that reading a search's front does without it

        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._since = self._stack[-1].add_since(self._since) if self._stack else now()


current_profile: ContextVar[Profile | None] = ContextVar("autopeft_profile", default=None)
"""The profile that this thread counts to."""


@contextmanager
def section(name: str) -> Iterator[None]:
    """Count a block, or the calls of a function, to one of `SECTIONS` in the running profile, if any."""
    assert name in SECTIONS, name
    if (profile := current_profile.get()) is None:
        yield
        return
    depth = profile.enter(name)
    try:
        yield
    finally:
        profile.leave(depth)


@contextmanager
def whole_section(name: str) -> Iterator[None]:
    """Count a block, or the calls of a function, to one section with all sections in it."""
    with section(name):
        token = current_profile.set(None)
        try:
            yield
        finally:
            current_profile.reset(token)
