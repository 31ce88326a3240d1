"""A search that is killed at any moment and started again ends as if it had never been killed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from autopeft.optimization.study_store import load_study
from autopeft.reporting.mlflow.run_content import PARENT_TAG, SEARCH_TAG, TRIAL_TAG
from tests.learnable import outcomes, save_learnable_csv, save_tiny_model
from tests.tiny_models import tiny_chat_tokenizer, tiny_language_model

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from autopeft import Search, SuccessiveHalving, Training
from autopeft.search_spaces import PerLayer
from autopeft.tasks import CausalLM, TextClassification

place, folder, trials = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
halving = SuccessiveHalving(rungs=(0.25, 0.5), reduction_factor=2)
is_language = "language" in sys.argv[4]
search = Search(
    place / ("language" if is_language else "model"),
    CausalLM(place / "data.csv", packing="packed" in sys.argv[4], max_length=16) if is_language
    else TextClassification(place / "data.csv"),
    PerLayer(methods=("lora", "prefix"), roles=("query", "value", "attention"), sizes={"rank": (1, 4)}),
    training=Training(epochs=2, batch_size=8, device="cpu", precision="32-true"),
    halving=halving if "rungs" in sys.argv[4] else None,
    warm_start="warm" in sys.argv[4],
    sampler="tpe",
    seed=3,
    seeds=2,
    name="killed",
    folder=folder,
    tracking=f"sqlite:///{folder}/mlflow.db",
)
search.validate()
print("ready", flush=True)
search.run(trials=trials, progress=False)
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data."""
    folder = tmp_path_factory.mktemp("kill")
    save_tiny_model(folder / "model")
    tiny_language_model("llama").save_pretrained(folder / "language")
    tiny_chat_tokenizer().save_pretrained(folder / "language")
    save_learnable_csv(folder / "data.csv", rows=120)
    return folder


def run(
    place: Path, folder: Path, trials: int, fidelity: str, *, kill_at: tuple[float, float] | None = None
) -> tuple[bool, float]:
    """Run the search in a process of its own; say whether it ended by itself, and how long it searched.

    Args:
        place: Has model and data.
        folder: Of the search.
        trials: Trials.
        fidelity: "rungs" or "whole", each also "with warm starts" or "of a (packed) language model".
        kill_at: Bytes of the study after which it is killed, and seconds from then on.
    """
    with (folder / "stderr.txt").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(place), str(folder), str(trials), fidelity],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", (folder / "stderr.txt").read_text()
        started = time.monotonic()
        if kill_at is not None:
            while process.poll() is None and study_bytes(folder) < kill_at[0]:
                time.sleep(0.002)
            time.sleep(kill_at[1])
            process.kill()
        ended = process.stdout.readline() == "done\n"
        seconds = time.monotonic() - started
        process.wait()
    assert ended or kill_at is not None, (folder / "stderr.txt").read_text()
    return ended, seconds


def study_bytes(folder: Path) -> int:
    """Return how large the study's file is."""
    path = folder / "killed" / "study.log"
    return path.stat().st_size if path.is_file() else 0


def finished_runs(folder: Path) -> Counter[int]:
    """Count the search's finished child runs by trial number."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("autopeft")
    assert experiment is not None
    identifiers = [experiment.experiment_id]
    (parent,) = client.search_runs(identifiers, f"tags.`{SEARCH_TAG}` = 'killed'")
    assert parent.info.status == "FINISHED"
    children = client.search_runs(identifiers, f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'")
    assert {run.info.status for run in children} <= {"FINISHED", "FAILED", "SCHEDULED"}
    return Counter(int(run.data.tags[TRIAL_TAG]) for run in children)


def check_kills(place: Path, folder: Path, *, trials: int, kills: int, seed: int, fidelity: str) -> None:
    whole, cut = folder / "whole", folder / "cut"
    whole.mkdir()
    cut.mkdir()
    _, seconds = run(place, whole, trials, fidelity)
    draw = random.Random(seed)
    hits = 0
    progress = []
    for kill in range(kills):
        # By what is done, not by time, which other work on the machine stretches; then any part of a trial.
        share = (kill + draw.random()) / (kills + 1)
        moment = share * study_bytes(whole), draw.random() * seconds / trials
        ended, _ = run(place, cut, trials, fidelity, kill_at=moment)
        if ended:
            break
        hits += 1
        if (cut / "killed" / "study.log").is_file():
            progress.append(len(load_study(cut / "killed")[1]))
    assert hits >= kills / 2
    assert progress == sorted(progress)  # nothing finished is lost
    ended, _ = run(place, cut, trials, fidelity)
    assert ended
    expected, found = (load_study(directory / "killed")[1] for directory in (whole, cut))
    assert [record.number for record in found] == list(range(trials))
    assert outcomes(found) == outcomes(expected)
    adapters = [
        sorted(path.name for path in (directory / "killed" / "adapters").iterdir())
        for directory in (whole, cut)
    ]
    assert adapters[0] == adapters[1]
    assert finished_runs(cut) == finished_runs(whole) == Counter(range(trials))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fidelity", ["rungs", "rungs of a language model", "rungs of a packed language model"]
)
def test_a_search_killed_twice_is_the_search_never_killed(place: Path, tmp_path: Path, fidelity: str) -> None:
    check_kills(place, tmp_path, trials=8, kills=2, seed=0, fidelity=fidelity)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fidelity", ["whole", "rungs", "rungs with warm starts"])
def test_a_search_killed_ten_times_is_the_search_never_killed(
    place: Path, tmp_path: Path, fidelity: str
) -> None:
    check_kills(place, tmp_path, trials=30, kills=10, seed=1, fidelity=fidelity)
