from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autopeft.evaluation.memory import available
from autopeft.evaluation.memory.available import available_bytes

CPU = torch.device("cpu")


def test_what_others_hold_is_not_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_bytes(CPU) > 0
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 300 kB\n")
    monkeypatch.setattr(available, "_MEMINFO", meminfo)
    assert available_bytes(CPU) == 300 * 1024
    monkeypatch.setattr(available, "_MEMINFO", tmp_path / "missing")
    assert available_bytes(CPU) > 2**20


def test_on_cuda_the_own_reserve_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert available_bytes(torch.device("cuda")) == 700
