"""optuna-dashboard on the study of a search, over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from autopeft.optimization.study_store import STUDY_FILE
from tests.records import OBJECTIVES
from tests.studies import filled, values_of

dashboard = pytest.importorskip("optuna_dashboard", reason="needs the extra autopeft[test]")


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Serve the study below a folder, as `optuna-dashboard study.log` does."""
    storage = JournalStorage(JournalFileBackend(str(tmp_path / STUDY_FILE)))
    with make_server("127.0.0.1", 0, dashboard.wsgi(storage), handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/api/studies"
        server.shutdown()
        thread.join()


def read(address: str) -> Any:
    with urlopen(address) as answer:
        return json.load(answer)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_dashboard_shows_the_study(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    records = filled(tmp_path)
    address = request.getfixturevalue("address")
    (study,) = read(address)["study_summaries"]
    assert study["study_name"] == "questions"
    shown = read(f"{address}/{study['study_id']}?after=0")
    assert shown["directions"] == ["maximize", "minimize", "minimize"]
    assert shown["objective_names"] == [objective.name for objective in OBJECTIVES]
    states = ["Complete" if record.evaluation.status == "complete" else "Fail" for record in records]
    assert [trial["state"] for trial in shown["trials"]] == states
    assert shown["trials"][0]["values"] == values_of(records[0])
