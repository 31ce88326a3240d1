"""The GPU checks, run on the CPU with tiny models."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu


def test_without_a_gpu_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "No CUDA device was found; on a CPU: python -m benchmarks.gpu --device cpu --quick"
    ]


def test_all_checks_together_take_eight_minutes_at_most() -> None:
    assert sum(seconds for _, seconds in gpu.CHECKS.values()) <= gpu.SECONDS == 8 * 60


def test_a_check_that_fails_or_takes_too_long_is_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = iter(gpu.CHECKS)
    outcomes = {next(names): True, next(names): None, next(names): False}

    def run_check(name: str, **given: Any) -> dict[str, Any]:
        return {
            "check": name,
            "seconds": 1.0,
            "passed": outcomes.get(name, True),
            "result": "",
            "figures": {},
        }

    monkeypatch.setattr(gpu, "run_check", run_check)
    arguments = ["--device", "cpu", "--quick", "--to", str(tmp_path / "gpu.json")]
    assert gpu.main(arguments) == 1
    rows = json.loads((tmp_path / "gpu.json").read_text())["checks"]
    assert [row["check"] for row in rows] == list(gpu.CHECKS)
    assert "failed" in capsys.readouterr().out
    outcomes.clear()
    assert gpu.main(arguments) == 0


def test_a_check_is_ended_when_its_time_is_up() -> None:
    started = time.monotonic()
    row = gpu.run_check("search", device="cpu", quick=True, seconds=0.6)
    assert (row["passed"], row["result"]) == (False, "took more than 1 s")
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_a_check_runs_in_a_process_of_its_own() -> None:
    row = gpu.run_check("GPU tests", device="cpu", quick=True, seconds=200)
    expected = "passed" if torch.cuda.is_available() else "skipped"
    assert expected in row["result"], row
    assert row["passed"] is not False


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in gpu.CHECKS if name != "GPU tests"])
@pytest.mark.filterwarnings("ignore")  # bitsandbytes says what its CPU kernels lack
def test_every_check_runs_on_a_cpu(name: str, tmp_path: Path) -> None:
    check, seconds = gpu.CHECKS[name]
    found = check(gpu.Setting(device="cpu", quick=True, folder=tmp_path, seconds=seconds))
    assert found.passed is not False, found.result
    assert all(isinstance(figure, float | int) for figure in found.figures.values())
    assert found.result
