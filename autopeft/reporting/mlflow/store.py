"""Whether MLflow can use a store, and how a local one is made so that no kill breaks it."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from autopeft.core.tables import markdown_text
from autopeft.reporting.mlflow.run_content import FRONT_PAGE, NOTE_TAG, SEARCH_TAG, STUDY_TAG, VERDICT_TAG
from autopeft.reporting.mlflow.tracking_uri import redact, redact_in

_VERDICT = "\n\n**Verdict**: "


def checked_store(uri: str) -> tuple[str, str | None]:
    """Return a tracking URI that does not depend on the current folder, and where its artifacts go.

    Artifacts of a local store go beside the database, by absolute path: a server that is started in
    another folder then finds them too. None leaves the place to the server.
    """
    if uri.startswith(("http://", "https://", "postgresql", "mysql", "mssql", "databricks")):
        return uri, None
    name = uri.removeprefix("sqlite:///")
    if name in (uri, "", ":memory:"):
        raise ValueError(
            f"The tracking store {redact(uri)!r} is not one MLflow 3 can write: use a database such as "
            "'sqlite:///mlflow.db', or a server's address such as 'http://127.0.0.1:5000'."
        )
    path = Path(name).resolve()
    if "%" in str(path) or "?" in str(path):
        raise ValueError(f"The tracking store {path} has % or ? in its path, which a URI cannot carry.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            _check_database(path)
    except OSError as error:
        raise ValueError(
            f"The tracking store {redact(uri)!r} cannot be written in {path.parent}: {error.strerror}."
        ) from error
    return f"sqlite:///{path}", (path.parent / "mlartifacts").as_uri()


def open_experiment(uri: str, artifacts: str | None, name: str) -> tuple[MlflowClient, str]:
    """Return a client of a store, and the id of the experiment of a name, which is made or restored.

    URI and artifacts are what `checked_store` returned.

    Raises:
        ValueError: No server answers at the URI.
    """
    if uri.startswith("http"):
        check_server(uri)
        # Else MLflow prints two lines a run, with the password in them.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    _make_database(uri)
    client = MlflowClient(tracking_uri=uri)
    try:
        return client, str(client.create_experiment(name, artifact_location=artifacts))
    except MlflowException:  # it is there, perhaps since a moment ago
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return client, str(found.experiment_id)


def log_report_run(uri: str, experiment: str, name: str, save: Callable[[Path], object], place: str) -> str:
    """Write the files that `save` puts into a folder to a run of their own, and return its id."""
    store, artifacts = checked_store(uri)
    try:
        client, experiment_id = open_experiment(store, artifacts, experiment)
        run_id = str(client.create_run(experiment_id, run_name=name).info.run_id)
        log_folder(client, run_id, save, place)
        client.set_terminated(run_id)
    except Exception as error:  # of MLflow, its database driver or the network
        raise unusable_store(uri, error) from None  # whose text may have a password
    return run_id


def note_verdict(uri: str, experiment: str, study_id: str, verdict: str, *, page: str) -> None:
    """Put a verdict at the end of the note on the search whose study has an id, and into a tag.

    Args:
        uri: The tracking store.
        experiment: The search's experiment.
        study_id: The study.
        verdict: A sentence.
        page: The front's page with the verdict, which takes the place of the one without.
    """
    try:
        client, experiment_id = open_experiment(*checked_store(uri), experiment)
        of_the_study = f"tags.`{STUDY_TAG}` = '{study_id}' AND tags.`{SEARCH_TAG}` LIKE '%'"
        for run in client.search_runs([experiment_id], of_the_study):
            note, *_ = run.data.tags.get(NOTE_TAG, "").partition(_VERDICT)
            client.set_tag(run.info.run_id, NOTE_TAG, f"{note}{_VERDICT}{markdown_text(verdict)}")
            client.set_tag(run.info.run_id, VERDICT_TAG, verdict)
            client.log_text(run.info.run_id, page, FRONT_PAGE)
    except Exception as error:  # see `log_report_run`
        raise unusable_store(uri, error) from None


def log_folder(client: MlflowClient, run_id: str, save: Callable[[Path], object], place: str) -> None:
    """Write the files that `save` puts into a folder to a run, below `place`."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        client.log_artifacts(run_id, folder, place)


def unusable_store(uri: str, error: Exception) -> ValueError:
    """Return the error that says, without credentials, why MLflow cannot use a store."""
    return ValueError(f"MLflow cannot use the tracking store {redact(uri)!r}: {redact_in(error, uri)}")


def check_server(url: str) -> None:
    """Raise ValueError where no server is: MLflow's client would try again for minutes, and say nothing."""
    address = redact(url)
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=10):
            pass
    except urllib.error.HTTPError:
        pass  # a server that refuses this page may yet answer the client, which sends its password
    except OSError as error:
        raise ValueError(f"No MLflow server answers at {address}: {error}.") from error


def _check_database(path: Path) -> None:
    """Raise where a file is no SQLite database, or one of Optuna's: both count their versions in it."""
    with path.open("r+b"):
        pass  # may be written
    try:
        with closing(sqlite3.connect(path, timeout=20)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    except sqlite3.Error as error:
        raise ValueError(f"The tracking store {path} is no SQLite database: {error}.") from error
    if "study_directions" in tables:
        raise ValueError(f"{path} holds Optuna studies: MLflow needs a database of its own.")


def _make_database(uri: str) -> None:
    """Make a local store in one piece: MLflow cannot open one that it was killed in making."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="mlflow-new-") as folder:
        new = Path(folder) / path.name
        MlflowClient(tracking_uri=f"sqlite:///{new}").search_experiments(max_results=1)
        try:
            os.link(new, path)
        except OSError:  # another search made it in the meantime, or the file system has no links
            if not path.exists():
                new.replace(path)
