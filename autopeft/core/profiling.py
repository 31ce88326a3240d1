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
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

SECTIONS: Mapping[str, str] = MappingProxyType(
    {
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
        "other": "everything else, the progress bar for one",
    }
)
"""What the time of a search is split into, and what each section is."""

_WIDTH = 130
_SHORTEST = 0.005


@dataclass
class TimeSpan:
    """Time spent in one place.

    Attributes:
        seconds: Wall time.
        processor_seconds: Processor time of the thread.
        calls: How often the place was entered.
    """

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
        self.spells = {name: TimeSpan() for name in SECTIONS}
        self._stack: list[tuple[object, TimeSpan]] = []
        self._wall = self._processor = 0.0
        self._all_threads = 0.0

    def __enter__(self) -> Profile:
        if current_profile() is not None:
            raise RuntimeError("This thread is being profiled already.")
        self._token = _current.set(self)
        self._wall, self._processor = time.perf_counter(), time.thread_time()
        self._all_threads = time.process_time()
        self.enter(self, "other")
        return self

    def __exit__(self, *error: object) -> None:
        self.leave(self)
        _current.reset(self._token)

    def enter(self, key: object, name: str) -> None:
        """Count to a section from now on, until `leave` is called with the same key."""
        self._count()
        spell = self.spells[name]
        spell.calls += 1
        self._stack.append((key, spell))

    def leave(self, key: object) -> None:
        """End what was entered with a key, and whatever was entered since and not ended."""
        self._count()
        keys = [one for one, _ in self._stack]
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
        """Return what was counted up to now.

        Args:
            trainings: How many there were, parts of trainings between two rungs among them.
            mlflow: What the thread that writes to MLflow has spent; None without one.
        """
        self._count()
        main = sum(spell.processor_seconds for spell in self.spells.values())
        beside = 0.0 if mlflow is None else mlflow.processor_seconds
        return ProfileReport(
            sections={name: TimeSpan(**asdict(spell)) for name, spell in self.spells.items()},
            trainings=trainings,
            mlflow=mlflow,
            other_threads=max(0.0, time.process_time() - self._all_threads - main - beside),
        )


_current: ContextVar[Profile | None] = ContextVar("autopeft_profile", default=None)


def current_profile() -> Profile | None:
    """Return the profile that this thread counts to; None where none is running."""
    return _current.get()


class section(ContextDecorator):  # noqa: N801 - reads as a statement, as contextlib's own do
    """Count a block, or the calls of a function, to a section of the running profile, if there is one.

    Args:
        name: One of `SECTIONS`.
    """

    def __init__(self, name: str) -> None:
        if name not in SECTIONS:
            raise ValueError(f"There is no section {name!r}: expected one of {', '.join(SECTIONS)}.")
        self._name = name

    def __enter__(self) -> None:
        profile = _current.get()
        if profile is not None:
            profile.enter(self, self._name)

    def __exit__(self, *error: object) -> None:
        profile = _current.get()
        if profile is not None:
            profile.leave(self)


@dataclass(frozen=True, kw_only=True)
class ProfileReport:
    """Where the time of one call of `Search.run` went.

    Attributes:
        sections: Time of the main thread, by name of `SECTIONS`; none is counted twice.
        trainings: How many there were, parts of trainings between two rungs among them.
        mlflow: Time of the thread that writes to MLflow while trials are trained; None without one.
        other_threads: Processor seconds of all further threads: torch's workers, the progress bar.
    """

    sections: Mapping[str, TimeSpan]
    trainings: int
    mlflow: TimeSpan | None
    other_threads: float

    @property
    def seconds(self) -> float:
        """Wall seconds of the call, up to the report."""
        return sum(spell.seconds for spell in self.sections.values())

    def table(self) -> Table:
        """Return the sections that took time, in the order of a search, and the threads beside it."""
        table = Table(
            title=f"Where {self.seconds:.1f} s went: {self.trainings} trainings", title_justify="left"
        )
        for heading in ("section", "share", "seconds", "ms a training", "processor", "calls", "what"):
            table.add_column(heading, justify="left" if heading in ("section", "what") else "right")
        for name, spell in self.sections.items():
            if spell.seconds >= _SHORTEST:
                share = spell.seconds / self.seconds if self.seconds else 0.0
                table.add_row(
                    name,
                    f"{share:.1%}",
                    f"{spell.seconds:.2f}",
                    f"{1000 * spell.seconds / max(1, self.trainings):.1f}",
                    f"{spell.processor_seconds:.2f}",
                    str(spell.calls),
                    SECTIONS[name],
                )
        table.add_section()
        if self.mlflow is not None:
            spell = self.mlflow
            seconds, processor = f"{spell.seconds:.2f}", f"{spell.processor_seconds:.2f}"
            each = f"{1000 * spell.seconds / max(1, self.trainings):.1f}"
            table.add_row("MLflow", "", seconds, each, processor, str(spell.calls), "its thread, beside")
        others = f"{self.other_threads:.2f}"
        table.add_row("threads", "", "", "", others, "", "torch's workers, the progress bar")
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data (for JSON)."""
        return {
            "seconds": self.seconds,
            "trainings": self.trainings,
            "sections": {name: asdict(spell) for name, spell in self.sections.items()},
            "mlflow": None if self.mlflow is None else asdict(self.mlflow),
            "other_threads_processor_seconds": self.other_threads,
        }

    def save(self, folder: Path) -> list[Path]:
        """Write profile.json and profile.txt into a folder, in place of earlier ones; return the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        screen = io.StringIO()
        Console(width=_WIDTH, file=screen).print(self.table())
        texts = {
            "profile.json": json.dumps(self.to_dict(), indent=1) + "\n",
            "profile.txt": screen.getvalue(),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [folder / name for name in texts]
