"""The journal of a sole writer: there at once, and a failure of the disk is heard of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from optuna.storages.journal import JournalFileBackend

from autopeft.optimization.journal import SoleWriterJournal

LOGS = [{"op_code": 0, "name": "one"}, {"op_code": 1, "name": "zwei ü"}]


def test_what_was_appended_is_there_at_once_as_optuna_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    path.write_bytes(b'{"op_code":0}\n{"op_co')
    journal = SoleWriterJournal(path)
    journal.append_logs(LOGS)
    assert list(JournalFileBackend(str(path)).read_logs(0)) == [{"op_code": 0}, *LOGS]
    journal.append_logs(LOGS[:1])
    assert list(journal.read_logs(3)) == LOGS[:1]
    assert [one.name for one in tmp_path.iterdir()] == ["study.log"], "no lock"
    journal.close()


def test_what_is_written_in_one_piece_is_read_before_and_there_after(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    path.write_bytes(b'{"op_code":0}\n')
    journal = SoleWriterJournal(path)
    with journal.in_one_piece():
        for log in LOGS:
            journal.append_logs([log])
        assert list(journal.read_logs(0)) == [{"op_code": 0}, *LOGS]
        assert list(journal.read_logs(2)) == LOGS[1:]
        assert list(JournalFileBackend(str(path)).read_logs(0)) == [{"op_code": 0}]
    journal.append_logs(LOGS[:1])
    assert list(journal.read_logs(1)) == [*LOGS, LOGS[0]]
    assert list(JournalFileBackend(str(path)).read_logs(1)) == [*LOGS, LOGS[0]]
    journal.close()


def test_a_disk_that_does_not_take_it_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    journal = SoleWriterJournal(tmp_path / "study.log")
    monkeypatch.setattr(os, "fsync", refuse)
    journal.append_logs(LOGS)
    with pytest.raises(OSError, match="Input/output"):
        journal.append_logs(LOGS)
    with pytest.raises(OSError, match="Input/output"):
        journal.close()
