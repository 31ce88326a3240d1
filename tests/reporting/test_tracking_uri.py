"""No password in what is printed or kept."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from typer.testing import CliRunner

from autopeft.cli import app
from autopeft.reporting.mlflow.saved_view import save_view
from autopeft.reporting.mlflow.server import serve
from autopeft.reporting.mlflow.tracking_uri import redact, redact_in
from tests.learnable import save_learnable_csv, save_tiny_model

NOWHERE = "http://someone:opensesame@127.0.0.1:1"

PLAIN = (
    "sqlite:///mlflow.db",
    "sqlite:////home/me@work/a:b@c.db",
    "http://127.0.0.1:5000",
    "databricks",
    "./x",
)


@pytest.mark.parametrize("uri", PLAIN)
def test_a_uri_without_a_password_stays_as_it_is(uri: str) -> None:
    assert redact(uri) == uri


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:opensesame@mlflow.example.com:8443/a", "https://mlflow.example.com:8443/a"),
        ("http://opensesame@host", "http://host"),  # a token
        ("http://me:open@sesame@host", "http://host"),
        ("http://me:open/sesame@host", "http://host"),
        ("postgresql://me:opensesame@db:5432/mlflow", "postgresql://me@db:5432/mlflow"),
        ("mysql+pymysql://me:open/s:esame@db/mlflow", "mysql+pymysql://me@db/mlflow"),
        ("postgresql://db/x?user=me&password=opensesame", "postgresql://db/x?user=me&password=***"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dopensesame", "mssql+pyodbc:///?odbc_connect=***"),
    ],
)
def test_a_password_is_taken_out(uri: str, shown: str) -> None:
    assert redact(uri) == shown
    assert redact(shown) == shown
    assert redact_in(f"API request to {uri}/api/2.0 failed", uri) == f"API request to {shown}/api/2.0 failed"
    message = redact_in(f"request to {uri.rstrip('/')}/api failed", f"{uri}/")
    assert "sesame" not in message


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://me:open%40ses%3Aame@db/x",
        "https://me:open%40ses%3Aame@host",
        "http://open%40ses%3Aame@host",
    ],
)
def test_a_password_is_taken_out_of_what_drivers_say_of_it(uri: str) -> None:
    for said in ("could not resolve open@ses:ame@db", "Authorization open%40ses%3Aame was refused"):
        assert "ses" not in redact_in(said, uri)


def test_a_view_that_is_refused_costs_a_warning_without_the_password(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = MlflowClient(tracking_uri=NOWHERE)

    def refused(*_: object) -> None:
        raise MlflowException(f"API request to {NOWHERE}/api/2.0 failed")

    monkeypatch.setattr(client, "set_experiment_tag", refused)
    with caplog.at_level(logging.DEBUG):
        assert save_view(client, "1", "{}") is None
    assert "could not be saved in MLflow: API request to http://127.0.0.1:1" in caplog.text
    assert "opensesame" not in caplog.text


def test_a_search_neither_prints_nor_keeps_a_password(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {
        "backbone": str(save_tiny_model(tmp_path / "model")),
        "task": {"type": "TextClassification", "dataset": str(save_learnable_csv(tmp_path / "data.csv"))},
        "space": {"type": "Uniform", "sizes": {"rank": [1, 8]}},
        "objectives": ["accuracy", "trainable_parameters"],
        "training": {"epochs": 1, "batch_size": 8, "device": "cpu"},
        "tracking": NOWHERE,
        "name": "tiny",
        "folder": str(tmp_path / "runs"),
        "run": {"trials": 1},
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(settings))
    with caplog.at_level(logging.DEBUG):
        result = CliRunner().invoke(app, ["search", str(tmp_path / "search.yaml")])
    assert result.exit_code == 0, result.output
    assert "MLflow: http://127.0.0.1:1\n" in result.output
    assert "not recorded in MLflow" in caplog.text
    kept = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert yaml.safe_load((tmp_path / "runs" / "tiny" / "search.yaml").read_text())["tracking"] == (
        "http://127.0.0.1:1"
    )
    for said in (result.output, caplog.text, *(path.read_bytes().decode("latin-1") for path in kept)):
        assert "opensesame" not in said


@pytest.mark.parametrize("uri", [NOWHERE, "postgresql://someone:opensesame@127.0.0.1:1/x"])
def test_errors_have_no_password(uri: str) -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1") as found:
        serve(uri)
    assert "opensesame" not in str(found.value)
    assert found.value.__suppress_context__ or "opensesame" not in str(found.value.__cause__)
