"""A study's file: one writer, and what damage to it costs."""

from __future__ import annotations

import errno
import fcntl
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname

import pytest

from autopeft.optimization.study_store import STUDY_FILE, load_study
from tests.studies import filled, opened, opened_records, optunas, told

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("garbage", [b'{"op_code": 4, "wor', b"\0\0\0", b"{"])
def test_half_a_line_is_cut_and_everything_before_kept(tmp_path: Path, garbage: bytes) -> None:
    records = filled(tmp_path)
    journal = tmp_path / STUDY_FILE
    whole = journal.read_bytes()
    journal.write_bytes(whole + garbage)
    assert load_study(tmp_path)[1] == records
    assert journal.read_bytes() == whole + garbage, "reading changes nothing"
    store = opened(tmp_path)
    assert store.records == records
    assert journal.read_bytes() == whole
    records.append(told(store, 4))
    store.close()
    assert load_study(tmp_path)[1] == records
    assert len(optunas(tmp_path).trials) == 5


def test_a_lock_that_a_killed_process_left_is_taken_over(tmp_path: Path) -> None:
    records = filled(tmp_path)
    (tmp_path / f"{STUDY_FILE}.lock").write_text("of a process that was killed")
    assert load_study(tmp_path)[1] == records
    assert opened_records(tmp_path) == records
    assert not (tmp_path / f"{STUDY_FILE}.lock").exists()


@pytest.mark.parametrize("place", [0, 3, -1])
def test_a_blank_line_is_harmless(tmp_path: Path, place: int) -> None:
    records = filled(tmp_path)
    journal = tmp_path / STUDY_FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    lines.insert(place if place >= 0 else len(lines), b" \n\n")
    journal.write_bytes(b"".join(lines))
    assert load_study(tmp_path)[1] == records
    store = opened(tmp_path)
    assert store.records == records
    told(store, 4)
    store.close()
    assert len(optunas(tmp_path).trials) == 5, "for plain Optuna too"


@pytest.mark.parametrize("garbage", [b'{"op_code": 4, "wor\n', b"\0\xff\0\n", b"7\n", b"[" * 2000 + b"\n"])
def test_a_damaged_line_is_named_with_its_mend(tmp_path: Path, garbage: bytes) -> None:
    records = filled(tmp_path)
    journal = tmp_path / STUDY_FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:-2], garbage, *lines[-1:]])
    journal.write_bytes(damaged)
    message = rf"Line {len(lines) - 1} of .*{STUDY_FILE} is damaged.*`head -n {len(lines) - 2} "
    for read in (opened, load_study):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)
    assert journal.read_bytes() == damaged
    mend = f"head -n {len(lines) - 2} {STUDY_FILE} > mended && mv mended {STUDY_FILE}"
    subprocess.run(mend, shell=True, check=True, cwd=tmp_path)
    assert opened_records(tmp_path) == records[:2]


def test_a_date_that_is_none_is_said_of_the_file(tmp_path: Path) -> None:
    filled(tmp_path)
    journal = tmp_path / STUDY_FILE
    damaged = journal.read_bytes().replace(b'"datetime_complete":"2', b'"datetime_complete":"x')
    assert damaged != journal.read_bytes()
    journal.write_bytes(damaged)
    for read in (opened, load_study):
        with pytest.raises(ValueError, match=rf"{STUDY_FILE} is damaged .*isoformat"):
            read(tmp_path)


def test_a_journal_cut_anywhere_keeps_the_whole_trials(tmp_path: Path) -> None:
    records = filled(tmp_path / "whole")
    content = (tmp_path / "whole" / STUDY_FILE).read_bytes()
    draw = random.Random(0)
    for case in range(12):
        folder = tmp_path / str(case)
        folder.mkdir()
        (folder / STUDY_FILE).write_bytes(content[: draw.randrange(len(content))])
        store = opened(folder)
        known = len(store.records)
        assert store.records == records[:known]
        told(store, known)
        store.close()
        assert len(load_study(folder)[1]) == known + 1


@pytest.mark.slow
def test_a_second_process_is_refused_with_the_first_ones_id(tmp_path: Path) -> None:
    script = "\n".join(
        [
            "import sys, time",
            "from pathlib import Path",
            "from tests.optimization.test_study_store import opened",
            "store = opened(Path(sys.argv[1]))",
            "print('open', flush=True)",
            "sys.stdin.read()",
        ]
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(
            ValueError, match=f"'questions' is being run by process {other.pid} on {gethostname()}"
        ):
            opened(tmp_path)
        other.kill()
        other.wait()
        opened(tmp_path).close()  # the lock dies with its process


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def not_there(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", not_there)
    assert filled(tmp_path) == opened_records(tmp_path)
    assert f"files in {tmp_path} cannot be locked (Function not implemented)" in caplog.text


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def test_a_full_disk_is_named_with_the_file(tmp_path: Path) -> None:
    store = opened(tmp_path)
    told(store, 0)
    size = (tmp_path / STUDY_FILE).stat().st_size
    refused = rf"{tmp_path}/{STUDY_FILE} cannot be written: File too large"
    with no_file_beyond(size + 100), pytest.raises(OSError, match=refused):
        told(store, 1)
    store.close()
    assert len(opened_records(tmp_path)) == 1


def test_a_disk_that_is_full_when_a_search_is_opened_is_named_with_the_lock(tmp_path: Path) -> None:
    records = filled(tmp_path)
    refused = rf"{tmp_path}/lock cannot be written: File too large"
    with no_file_beyond(0), pytest.raises(OSError, match=refused):
        opened(tmp_path)
    assert opened_records(tmp_path) == records


def test_a_store_that_could_not_be_opened_is_not_held(tmp_path: Path) -> None:
    (tmp_path / STUDY_FILE).write_bytes(b"not a journal\n")
    with pytest.raises(ValueError, match="Line 1 of"):
        opened(tmp_path)
    (tmp_path / STUDY_FILE).unlink()
    opened(tmp_path).close()
