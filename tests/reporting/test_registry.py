"""MLflow's model registry."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.learnable import learnable_rows, tiny_search
from tests.tiny_models import LABELS

SCRIPT = """
import json, sys
import mlflow

mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
print(json.dumps(model.predict(sys.argv[3:])["label"].tolist()))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")  # of MLflow, as it is imported
def test_a_registered_model_labels_texts_in_a_fresh_process(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    search = tiny_search(tmp_path, tracking=uri)
    best = search.run(trials=2, progress=False).best()
    assert search.register(best.number, "reviews") == "models:/reviews/1"
    (model,) = MlflowClient(tracking_uri=uri).search_model_versions("name = 'reviews'")
    assert model.tags["autopeft.registered_trial"] == str(best.number)
    texts = learnable_rows(3)["text"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, uri, "models:/reviews/1", *texts],
        capture_output=True,
        text=True,
        check=True,
    )
    labels = json.loads(done.stdout.splitlines()[-1])
    assert len(labels) == LABELS
    assert set(labels) <= {"a", "b", "c"}


def test_a_search_without_tracking_has_no_registry(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tracking=None"):
        tiny_search(tmp_path).register(0, "reviews")
