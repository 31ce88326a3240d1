"""Where the time of a search goes: a nested timer that costs next to nothing while it is off."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

SECTIONS: Mapping[str, str] = {
    "load": "read the backbone",
    "tokenise": "read and tokenise the data",
    "score": "score the sites without training",
    "ask": "choose the next configuration, or the paused trial that goes on",
    "attach": "put adapters in and take them out",
    "count": "count peak memory and FLOPs before training",
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
"""What the time of a search is split into, and what each section is."""

_SHORTEST = 0.005


@dataclass
class TimeSpan:
    """Time spent in one place: wall time, processor time of the thread, and how often it was entered."""

    seconds: float = 0.0
    processor_seconds: float = 0.0
    calls: int = 0

    def add(self, seconds: float, processor_seconds: float) -> None:
        """Add time."""
        self.seconds += seconds
        self.processor_seconds += processor_seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time until the end of the block, in this thread."""
        wall, processor = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.add(time.perf_counter() - wall, time.thread_time() - processor)
            self.calls += 1


class Profile:
    """Split the time of the thread that enters it into sections; what a section calls counts there alone.

    Use it in a `with` block: until its end, `section` and Lightning's actions count to it. CUDA kernels are
    waited for at every boundary, so that they count where they were launched; this makes a search on a GPU
    slower while it is profiled.
    """

    def __init__(self) -> None:
        self.spans = {name: TimeSpan() for name in SECTIONS}
        self._stack: list[tuple[object, TimeSpan]] = []
        self._wall = self._processor = 0.0

    def __enter__(self) -> Profile:
        if current_profile() is not None:
            raise RuntimeError("This thread is being profiled already.")
        self._token = _current.set(self)
        self.enter(self, "other")
        return self

    def __exit__(self, *error: object) -> None:
        self.leave(self)
        _current.reset(self._token)

    def enter(self, key: object, name: str) -> None:
        """Count to a section from now on, until `leave` is called with the same key."""
        self._count()
        self.spans[name].calls += 1
        self._stack.append((key, self.spans[name]))

    def leave(self, key: object) -> None:
        """End what was entered with a key, and whatever was entered since and not ended."""
        self._count()
        keys = [entered for entered, _ in self._stack]
        if key in keys:
            del self._stack[len(keys) - 1 - keys[::-1].index(key) :]

    def _count(self) -> None:
        import torch  # here, so that reading a search's front does without it

        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        wall, processor = time.perf_counter(), time.thread_time()
        if self._stack:
            self._stack[-1][1].add(wall - self._wall, processor - self._processor)
        self._wall, self._processor = wall, processor

    def report(self, *, trainings: int, mlflow: TimeSpan | None = None) -> ProfileReport:
        """Return what was counted up to now; see `ProfileReport`."""
        self._count()
        sections = {name: TimeSpan(**asdict(span)) for name, span in self.spans.items()}
        return ProfileReport(sections=sections, trainings=trainings, mlflow=mlflow)


_current: ContextVar[Profile | None] = ContextVar("autopeft_profile", default=None)


def current_profile() -> Profile | None:
    """Return the profile that this thread counts to; None where none is running."""
    return _current.get()


class section(ContextDecorator):  # noqa: N801 - reads as a statement, as contextlib's own do
    """Count a block, or the calls of a function, to a section of the running profile, if there is one.

    Raises:
        ValueError: The name is none of `SECTIONS`.
    """

    def __init__(self, name: str) -> None:
        if name not in SECTIONS:
            raise ValueError(f"There is no section {name!r}: expected one of {', '.join(SECTIONS)}.")
        self._name = name

    def __enter__(self) -> None:
        if profile := current_profile():
            profile.enter(self, self._name)

    def __exit__(self, *error: object) -> None:
        if profile := current_profile():
            profile.leave(self)


@dataclass(frozen=True, kw_only=True)
class ProfileReport:
    """Where the time of one call of `Search.run` went.

    Attributes:
        sections: Time of the main thread, by name of `SECTIONS`; none is counted twice.
        trainings: How many there were, parts of trainings between two rungs among them.
        mlflow: Time of the thread that writes to MLflow while trials are trained; None without one.
    """

    sections: Mapping[str, TimeSpan]
    trainings: int
    mlflow: TimeSpan | None

    @property
    def seconds(self) -> float:
        """Wall seconds of the call, up to the report."""
        return sum(span.seconds for span in self.sections.values())

    def table(self) -> Table:
        """Return the sections that took time, in the order of a search, and the MLflow thread beside them."""
        title = f"Where {self.seconds:.1f} s went: {self.trainings} trainings"
        table = Table(title=title, title_justify="left")
        for heading in ("section", "share", "seconds", "ms a training", "processor", "calls", "what"):
            table.add_column(heading, justify="left" if heading in ("section", "what") else "right")
        rows = [(name, span, SECTIONS[name]) for name, span in self.sections.items()]
        if self.mlflow is not None:
            rows.append(("MLflow", self.mlflow, "its thread, beside"))
        for name, span, what in rows:
            if span.seconds >= _SHORTEST:
                share = f"{span.seconds / self.seconds:.1%}" if name in SECTIONS else ""
                each = f"{1000 * span.seconds / max(1, self.trainings):.1f}"
                seconds, processor = f"{span.seconds:.2f}", f"{span.processor_seconds:.2f}"
                table.add_row(name, share, seconds, each, processor, str(span.calls), what)
        return table

    def save(self, folder: Path) -> list[Path]:
        """Write profile.json and profile.txt into a folder, in place of earlier ones; return the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        screen = io.StringIO()
        Console(width=130, file=screen).print(self.table())
        plain = json.dumps({"seconds": self.seconds, **asdict(self)}, indent=1)
        paths = [folder / "profile.json", folder / "profile.txt"]
        for path, text in zip(paths, (plain + "\n", screen.getvalue()), strict=True):
            path.write_text(text, encoding="utf-8")
        return paths
