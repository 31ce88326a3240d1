"""What a search is told: settings belong to its name; what cannot be is refused before training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.samplers import RandomSampler

from autopeft.reporting.front import ParetoFront
from autopeft.reporting.tracker import Tracker
from autopeft.search_spaces import Uniform
from autopeft.training.settings import Training
from tests.learnable import TRAINING, outcomes, run, tiny_search


@pytest.fixture(scope="module")
def of_one_trial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ParetoFront]:
    folder = tmp_path_factory.mktemp("search")
    return folder, run(tiny_search(folder), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"search\.seed: '0' there, '1' here"),
        ({"space": Uniform(sizes={"rank": (1, 16)})}, r"space\.sizes"),
        ({"training": replace(TRAINING, epochs=2)}, r"training\.epochs: '1' there, '2' here"),
        ({"sampler": RandomSampler()}, r"search\.sampler: 'tpe' there, 'optuna\.samplers\._random"),
        ({"sampler": "random"}, r"search\.sampler: 'tpe' there, 'random' here"),
        ({"objectives": ("accuracy", "peak_memory")}, "objectives"),
        ({"constraints": {"peak_memory": "1 GiB"}}, r"search\.constraints"),
    ],
)
def test_a_name_belongs_to_its_settings(
    change: dict[str, Any], message: str, of_one_trial: tuple[Path, ParetoFront]
) -> None:
    folder, front = of_one_trial
    with pytest.raises(ValueError, match=f"'tiny' in .*other settings .*{message}.*another name"):
        run(tiny_search(folder, **change), 2)
    assert outcomes(tiny_search(folder).front().records) == outcomes(front.records)


def test_a_search_goes_on_after_other_settings_were_refused(tmp_path: Path) -> None:
    run(tiny_search(tmp_path), 1)
    with pytest.raises(ValueError, match="other settings"):
        run(tiny_search(tmp_path, seed=1), 2)
    assert len(run(tiny_search(tmp_path), 2).records) == 2


def test_without_a_name_settings_make_one(tmp_path: Path) -> None:
    names = {
        tiny_search(tmp_path, name=None, seed=seed, training=Training(epochs=epochs, device="cpu")).name
        for seed, epochs in ((0, 1), (0, 1), (1, 1), (0, 2))
    }
    assert len(names) == 3
    assert all(name.startswith("text-classification-tiny-bert-") for name in names)


@pytest.mark.parametrize("name", ["../away", "a/b", "", "..", ".", ".hidden", "x" * 200, 7])
def test_a_name_must_be_a_folders_name(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name is a folder's name"):
        tiny_search(tmp_path, name=name)


@pytest.mark.parametrize("seed", [1.5, "0", True, -1])
def test_a_seed_is_a_whole_number(seed: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed is a whole number"):
        tiny_search(tmp_path, seed=seed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "tpee"}, "did you mean 'tpe'"),
        ({"objectives": ("acuracy", "peak_memory")}, "did you mean 'accuracy'"),
        ({"constraints": {"peak_memry": "1 GiB"}}, "did you mean 'peak_memory'"),
        ({"constraints": {"accuracy": 0.5}}, "only known after training"),
        ({"tracking": Tracker()}, "give a class of trackers and not one of them"),
        ({"prior": [Path("runs"), 3]}, "prior names folders, got 3: for a search, give its folder"),
        ({"warm_start": "yes"}, "warm_start is True or False, got 'yes'"),
        ({"warm_start": 0.5}, "warm_start is True or False, got 0.5"),
        ({"derive": None}, "derive is True or False, got None"),
    ],
)
def test_wrong_names_are_found_at_once(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_search(tmp_path, **change)


def test_what_the_backbone_lacks_is_found_by_validate(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ffn_gate"):
        tiny_search(tmp_path, space=Uniform(roles=("ffn_gate",))).validate()
    with pytest.raises(ValueError, match="budget"):
        tiny_search(tmp_path).run(progress=False)


def test_a_search_not_started_has_no_front(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no search in"):
        tiny_search(tmp_path).front()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be kept in"):
        run(tiny_search(tmp_path / "file"), 1)
