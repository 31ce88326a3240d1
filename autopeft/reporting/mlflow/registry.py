"""An exported model in MLflow's model registry."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import mlflow.transformers
from huggingface_hub import ModelCard
from mlflow.exceptions import MlflowException
from transformers import pipeline
from transformers.pipelines import SUPPORTED_TASKS

from autopeft.reporting.mlflow.store import checked_store, open_experiment, unusable_store
from autopeft.tasks import Task

_PACKAGES = ("torch", "transformers")


def register_model(
    uri: str, experiment: str, name: str, folder: Path, tags: Mapping[str, str], task: Task
) -> str:
    """Log a merged model to a run of its own, and register it there as a new version of a name.

    Args:
        uri: MLflow tracking URI, whose store has the registry too.
        experiment: MLflow experiment.
        name: Name in the registry.
        folder: The model, as an export writes it.
        tags: Tags of the run and of the version.
        task: What it was trained for; it says how the model is called, and what it can be asked.

    Returns:
        Its URI, as "models:/reviews/1", for `mlflow.pyfunc.load_model` or `mlflow.transformers.load_model`.

    Raises:
        ValueError: MLflow cannot use the store, or serve such a model.
    """
    store, artifacts = checked_store(uri)
    card = ModelCard.load(folder / "README.md")
    kind = card.data.get("pipeline_tag")
    if kind not in SUPPORTED_TASKS:
        raise ValueError(
            f"transformers has no pipeline for a model of {type(task).__name__}, and MLflow serves models by "
            'pipelines alone: use search.export(..., target="merged"), and load the folder yourself.'
        )
    needs = [f"{package}=={version(package)}" for package in _PACKAGES]
    try:
        client, experiment_id = open_experiment(store, artifacts, experiment)
        run = client.create_run(experiment_id, run_name=f"model {name}", tags=dict(tags)).info
        with tempfile.TemporaryDirectory() as scratch:
            saved = Path(scratch, "model")
            # By the client, and not by `log_model`: that works on the process's own store and run.
            # Of a folder alone MLflow asks the table of pipelines as transformers 4 has it.
            loaded = pipeline(kind, model=str(folder))
            options = task.serve(loaded)
            mlflow.transformers.save_model(
                loaded,
                str(saved),
                model_card=card,
                pip_requirements=needs,
                model_config=options or None,
                input_example=task.served_example,
            )
            client.log_artifacts(run.run_id, str(saved), "model")
        client.set_terminated(run.run_id)
        with suppress(MlflowException):  # it is there
            client.create_registered_model(name)
        made = client.create_model_version(name, f"{run.artifact_uri}/model", run.run_id, tags=dict(tags))
    except Exception as error:  # of MLflow, its database driver or the network
        raise unusable_store(uri, error) from None  # whose text may have a password
    return f"models:/{name}/{made.version}"
