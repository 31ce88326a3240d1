"""Files of hidden states: whole or not there, bounded, the least recently used go first."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from autopeft.evaluation.frozen_blocks.cost_model import Estimate, Passes, estimate, expected_trainings
from autopeft.evaluation.frozen_blocks.store import HiddenStateFiles

SIZE = 1024 + 10 * 4 * 4  # of a file with ten positions of four float32


def write(files: HiddenStateFiles, key: str, states: torch.Tensor | None = None) -> torch.Tensor:
    states = torch.randn(10, 4) if states is None else states
    files.write(key, [states[:3], states[3:]])
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_written_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    files = HiddenStateFiles(tmp_path / "new", 10**6)
    assert files.open("a") is None
    states = write(files, "a", torch.randn(10, 4).to(dtype))
    opened = HiddenStateFiles(tmp_path / "new", 10**6).open("a")
    assert opened is not None
    assert torch.equal(opened, states)
    assert opened.dtype == dtype


def test_states_are_mapped_not_loaded(tmp_path: Path) -> None:
    files = HiddenStateFiles(tmp_path, 10**9)
    write(files, "a", torch.ones(2**21, 4))

    def resident() -> int:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    assert files.open("a") is not None  # reads it once, for its checksum
    before = resident()
    opened = files.open("a")
    assert opened is not None
    assert resident() - before < 2**22
    assert float(opened[-1].sum()) == 4


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    files = HiddenStateFiles(tmp_path, 10**6)
    with pytest.raises(AttributeError):
        write(files, "a", "no states")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_a_killed_process_is_never_used(tmp_path: Path) -> None:
    program = f"""
        import os, signal, torch
        from pathlib import Path
        from autopeft.evaluation.frozen_blocks.store import HiddenStateFiles
        def pieces():
            yield torch.zeros(10**4, 4)
            os.kill(os.getpid(), signal.SIGKILL)
        HiddenStateFiles(Path({str(tmp_path)!r}), 10**6).write("a", pieces())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".part"
    files = HiddenStateFiles(tmp_path, 10**6)
    assert files.open("a") is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    def pieces() -> Iterator[torch.Tensor]:
        HiddenStateFiles(tmp_path, 10**6)
        yield torch.zeros(1, 4)

    files = HiddenStateFiles(tmp_path, 10**6)
    files.write("a", pieces())
    assert files.open("a") is not None


@pytest.mark.parametrize("before", ["fcntl.flock", "os.replace"])
def test_a_file_is_left_alone_from_the_moment_it_is_made_until_it_is_in_its_place(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = before.split(".")
    call = getattr(sys.modules[module], name)
    looked: list[HiddenStateFiles] = []

    def look_first(*arguments: Any) -> None:
        if arguments[-1] != fcntl.LOCK_EX | fcntl.LOCK_NB:  # not what the other one does
            assert len(list(tmp_path.glob("*.part"))) == 1
            looked.append(HiddenStateFiles(tmp_path, 10**6))
        call(*arguments)

    monkeypatch.setattr(before, look_first)
    files = HiddenStateFiles(tmp_path, 10**6)
    states = write(files, "a")
    assert looked
    opened = files.open("a")
    assert opened is not None
    assert torch.equal(opened, states)


def test_states_are_kept_where_files_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    files = HiddenStateFiles(tmp_path, 10**6)
    write(files, "a")
    assert files.open("a") is not None


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0no json", None])
def test_a_damaged_file_is_not_read(
    damage: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = HiddenStateFiles(tmp_path, 10**6)
    write(files, "a")
    path = tmp_path / "a.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage)
    files = HiddenStateFiles(tmp_path, 10**6)
    assert files.open("a") is None
    assert "cannot be read" in caplog.text


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    files = HiddenStateFiles(tmp_path, 3 * SIZE)
    for age, key in enumerate("abc"):
        write(files, key)
        os.utime(tmp_path / f"{key}.safetensors", (age, age))
    assert files.open("a") is not None  # used just now
    assert files.make_room(SIZE)
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "c"}
    assert files.make_room(2 * SIZE, keep=frozenset("c"))
    assert {path.stem for path in tmp_path.iterdir()} == {"c"}
    assert not files.make_room(3 * SIZE, keep=frozenset("c"))


def test_a_removed_file_stays_mapped(tmp_path: Path) -> None:
    files = HiddenStateFiles(tmp_path, SIZE)
    states = write(files, "a")
    opened = files.open("a")
    assert opened is not None
    assert files.make_room(SIZE)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(opened, states)


def test_a_file_that_another_process_removes_is_no_error(tmp_path: Path) -> None:
    files = HiddenStateFiles(tmp_path, 2 * SIZE)
    write(files, "a")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")  # listed, and not there when looked at
    assert files.make_room(SIZE)


def expected(cut: int, *, epochs: float = 3.0) -> Estimate:
    train = Passes(batches=100, tokens=40_000, times=epochs, block_cost=2)
    validation = Passes(batches=10, tokens=4_000, times=epochs, block_cost=1)
    return estimate(
        [train, validation],
        cut=cut,
        blocks=6,
        block_parameters=1.8e6,
        token_bytes=1536,
        device="cpu",
    )


def test_more_blocks_left_out_save_more() -> None:
    shares = [expected(cut).share for cut in range(1, 7)]
    assert shares == sorted(shares)
    assert all(expected(cut).pays(4) for cut in range(1, 7))
    assert expected(3).bytes == 44_000 * 1536


@pytest.mark.parametrize("cut", [3, 4, 5])
def test_with_large_blocks_the_estimate_is_the_theoretical_one(cut: int) -> None:
    train = Passes(batches=1, tokens=1000, times=1, block_cost=2)
    large = estimate([train], cut=cut, blocks=6, block_parameters=1e12, token_bytes=8, device="cpu")
    assert 1 / (1 - large.share) == pytest.approx((12 - cut) / (12 - 2 * cut), rel=1e-6)


def test_it_does_not_pay_where_reading_takes_longer_or_little_is_trained() -> None:
    slow = Passes(batches=100, tokens=40_000, times=3.0, block_cost=2)
    wide = {"block_parameters": 10.0, "token_bytes": 10**6, "device": "cpu"}
    assert not estimate([slow], cut=1, blocks=6, **wide).pays(4)  # type: ignore[arg-type]
    assert not expected(3, epochs=0.1).pays(4)
    assert expected(3, epochs=0.5).pays(4)
    assert not expected(3, epochs=0.5).pays(0.5)


def test_a_small_budget_keeps_states_only_where_one_training_gains() -> None:
    assert expected_trainings(None, 6) == expected_trainings(1000, 6) > expected_trainings(12, 6)
    assert expected_trainings(3, 6) == 1
