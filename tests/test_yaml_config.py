"""YAML gives the objects that Python gives, and every wrong key is named with the nearest valid one."""

from __future__ import annotations

import inspect
import re
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from autopeft import Search
from autopeft.optimization.budget import Budget
from autopeft.search_spaces import AutoPEFTPaper, PerLayer, ScoreGuided, Uniform
from autopeft.tasks import TextClassification
from autopeft.training.settings import Training
from autopeft.yaml_config import build_config, load_config
from tests.learnable import save_learnable_csv, save_tiny_model

SETTINGS: dict[str, Any] = {
    "backbone": "model",
    "task": {"type": "TextClassification", "dataset": "data.csv", "text": ["question", "answer"]},
    "space": {
        "type": "PerLayer",
        "methods": ["lora", "prefix"],
        "sizes": {"rank": [1, 16]},
        "learning_rate": [1e-3, 1e-2],
        "options": {"lora": {"alpha": 8}},
    },
    "objectives": ["accuracy", "peak_memory"],
    "constraints": {"peak_memory": "2 GiB"},
    "training": {"epochs": 2, "batch_size": 16},
    "sampler": "nsga2",
    "seed": 3,
    "tracking": None,
    "run": {"trials": 8, "hours": 0.5},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    settings = deepcopy(SETTINGS)
    *parents, last = path.split(".")
    place = settings
    for parent in parents:
        place = place[parent]
    place[last] = value
    return settings


def written(folder: Path, settings: Any = SETTINGS) -> Path:
    path = folder / "search.yaml"
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return path


def test_yaml_gives_what_python_gives(tmp_path: Path) -> None:
    config = load_config(written(tmp_path))
    expected = Search(
        "model",
        TextClassification(dataset="data.csv", text=("question", "answer")),
        PerLayer(
            methods=("lora", "prefix"),
            sizes={"rank": (1, 16)},
            learning_rate=(1e-3, 1e-2),
            options={"lora": {"alpha": 8}},
        ),
        objectives=("accuracy", "peak_memory"),
        constraints={"peak_memory": "2 GiB"},
        training=Training(epochs=2, batch_size=16),
        sampler="nsga2",
        seed=3,
        tracking=None,
    )
    found = config.search
    assert found.space == expected.space
    assert isinstance(found.space, PerLayer)
    assert found.space.sizes == {"rank": (1, 16)}
    assert isinstance(found.task, TextClassification)
    assert isinstance(expected.task, TextClassification)
    assert found.task.columns == expected.task.columns == ("question", "answer")
    assert found.task.dataset == expected.task.dataset
    assert found.arguments() == expected.arguments() | {"task": found.task}
    assert (found.seed, found.tracking) == (3, None)
    assert repr(found) == repr(expected)
    assert config.run == {"trials": 8, "hours": 0.5}


def test_yaml_gives_the_same_search_on_disk(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    data = save_learnable_csv(tmp_path / "data.csv")
    settings = {
        "backbone": str(model),
        "task": {"type": "TextClassification", "dataset": str(data)},
        "space": {"type": "Uniform", "sizes": {"rank": [1, 8]}},
        "tracking": None,
    }
    found = load_config(written(tmp_path, settings)).search
    expected = Search(model, TextClassification(dataset=data), Uniform(sizes={"rank": (1, 8)}), tracking=None)
    assert found.identity() == expected.identity()
    assert found.name == expected.name


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ({"type": "Uniform"}, Uniform()),
        ({"type": "AutoPEFTPaper"}, AutoPEFTPaper()),
        ({"type": "PerLayer", "roles": ["query"]}, PerLayer(roles=("query",))),
        ({"type": "PerLayer", "learning_rate": None}, PerLayer()),
        ({"type": "PerLayer", "learning_rate": [0.001, 0.01]}, PerLayer(learning_rate=(1e-3, 1e-2))),
    ],
)
def test_every_space_has_its_name(space: dict[str, Any], expected: Any) -> None:
    assert build_config(changed("space", space)).search.space == expected


def test_defaults_are_those_of_python() -> None:
    task = {"type": "TextClassification", "dataset": "data.csv"}
    config = build_config({"backbone": SETTINGS["backbone"], "task": task})
    expected = Search("model", TextClassification(dataset="data.csv"))
    assert config.search.arguments() == expected.arguments() | {"task": config.search.task}
    assert config.run == {}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bakcbone", r"key of the settings 'bakcbone'.*did you mean 'backbone'"),
        ("task.datset", r"key of 'task' 'datset'.*did you mean 'dataset'"),
        ("space.size", r"key of 'space' 'size'.*did you mean 'sizes'"),
        ("training.epoch", r"key of 'training' 'epoch'.*did you mean 'epochs'"),
        ("run.trial", r"key of 'run' 'trial'.*did you mean 'trials'"),
        ("space.scores", r"key of 'space' 'scores': expected one of learning_rate, "),
        ("constraints.peak_memry", r"'peak_memry'.*did you mean 'peak_memory'"),
    ],
)
def test_an_unknown_key_names_the_nearest(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(changed(path, 1))


@pytest.mark.parametrize(
    ("path", "places"),
    [
        ("device", "training.device"),
        ("trials", "run.trials"),
        ("methods", "space.methods"),
        ("rungs", "halving.rungs"),
        ("cpus_per_worker", "executor.cpus_per_worker"),
        ("text", "task.text"),
        ("training.learning_rate", "space.learning_rate"),
        ("training.trials", "run.trials"),
        ("training.seed", "seed or task.seed"),
        ("training.seeds", "seeds"),
        ("space.constraints", "constraints"),
        ("run.epochs", "training.epochs"),
    ],
)
def test_a_key_of_another_section_says_where_it_belongs(path: str, places: str) -> None:
    *_, key = path.split(".")
    with pytest.raises(ValueError, match=rf"^Unknown key of .* '{key}': set it as {places}\.$"):
        build_config(changed(path, 1))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("space.type", "PerLayr", r"space type 'PerLayr'.*did you mean 'PerLayer'"),
        ("task.type", "TextClasification", r"did you mean 'TextClassification'"),
        ("sampler", "tp", r"did you mean 'tpe'"),
        ("space.methods", ["lorra"], r"did you mean 'lora'"),
        ("objectives", ["acuracy", "peak_memory"], r"did you mean 'accuracy'"),
        ("training.device", "gpu", r"training.device should be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ("training.epochs", "two", r"epochs should be a whole number"),
        ("constraints.peak_memory", "2 GiBi", r"unit of bytes 'GiBi'"),
        ("space", "PerLayer", r"'space' is a mapping with a 'type', got 'PerLayer'"),
        (
            "space",
            {"sizes": {"rank": [1, 2]}},
            r"'space' needs a 'type': one of PerLayer, ScoreGuided, Uniform, AutoPEFTPaper",
        ),
        ("task", {"type": "TextClassification", "text": "text"}, r"'task' needs 'dataset'; given: text"),
        ("task", {"text": "text"}, r"'task' needs a 'type': one of ImageClassification, "),
        ("training", [1], r"'training' is a mapping"),
        ("run", 50, r"'run' is a mapping with a budget"),
        ("space.options.lorra", {}, r"'lorra'.*did you mean 'lora'"),
        ("space.type", ["PerLayer"], r"Unknown space type"),
        ("name", ".hidden", r"name is a folder's name"),
        ("seed", -1, r"seed is a whole number"),
        ("run.trials", 0, r"'run': trials must be a finite number above 0, got 0"),
        ("run.trials", "abc", r"'run': trials must be a finite number above 0, got 'abc'"),
        ("run", {"retry_failed": True}, r"'run': A search needs a budget"),
        ("run.retry_failed", 1, r"run\.retry_failed should be true or false, got 1"),
        ("only_in_python", {"task": "own.Task"}, r"cannot hold: task \(own\.Task\)"),
    ],
)
def test_a_wrong_value_says_what_was_expected(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("space.groups", "abc", "space.groups should be a whole number, got 'abc'."),
        ("space.sizes.rank", [1, "a"], "space.sizes.rank should be a whole number, got [1, 'a']."),
        ("space.learning_rate", "a", "space.learning_rate should be a number or a list, got 'a'."),
        (
            "space.options",
            [1],
            "space.options should be a mapping, got [1].",
        ),
        ("space.options.lora", 5, "space.options.lora should be a mapping, got 5."),
        ("training.warmup_share", "abc", "training.warmup_share should be a number, got 'abc'."),
        ("training.epochs", True, "training.epochs should be a whole number, got True."),
        ("training.device", 5, "training.device should be 'auto', 'cpu' or 'cuda', got 5."),
        ("task.validation_share", "abc", "task.validation_share should be a number, got 'abc'."),
        ("task.dataset", {"train": "a.csv"}, "task.dataset should be text, got {'train': 'a.csv'}."),
        (
            "task.class_weights",
            {"no": "a"},
            "task.class_weights.no should be 'balanced' or a number, got 'a'.",
        ),
        (
            "task.class_weights",
            {0: 1.0},
            "task.class_weights should be 'balanced' or text, got {0: 1.0}.",
        ),
        ("objectives", 5, "objectives should be a list, got 5."),
        ("constraints", [1], "constraints should be a mapping, got [1]."),
        ("constraints.peak_memory", [1], "constraints.peak_memory should be a number or text, got [1]."),
        ("baselines", "perhaps", "baselines should be true or false, got 'perhaps'."),
        ("name", 2024, "name should be text, got 2024."),
    ],
)
def test_a_wrong_type_is_named_with_its_key(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_config(changed(path, value))


@pytest.mark.parametrize(
    "section",
    [
        {"type": "PerLayer"},
        {"type": "ScoreGuided"},
        {"type": "Uniform"},
        {"type": "AutoPEFTPaper"},
        "task",
        "training",
        "run",
        "",
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [None, True, -1, 2.5, "abc", [], [1], [[1], "a"], {}, {"a": 1}, {1: [2]}])
def test_no_value_gives_anything_but_a_clear_error(section: dict[str, str] | str, value: Any) -> None:
    space = section if isinstance(section, dict) else SETTINGS["space"]
    settings = changed("space", space)
    prefix = "space." if isinstance(section, dict) else section and f"{section}."
    made: dict[str, Any] = {"task.": TextClassification, "training.": Training, "run.": Budget, "": Search}
    spaces = {kind.__name__: kind for kind in (PerLayer, ScoreGuided, Uniform, AutoPEFTPaper)}
    keys = inspect.signature(made.get(prefix, spaces[space["type"]])).parameters
    for key in (*keys, "type"):
        trial = deepcopy(settings)
        (trial[prefix[:-1]] if prefix else trial)[key] = value
        with suppress(ValueError):
            build_config(trial)


@pytest.mark.parametrize("path", ["tokenizer", "space.site_scores"])
def test_what_python_alone_can_give_is_no_key(path: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown key of .* {path.split('.')[-1]!r}"):
        build_config(changed(path, None))


def test_one_text_is_a_list_of_one_and_a_whole_number_is_a_number() -> None:
    settings = changed("space", {"type": "PerLayer", "methods": "lora", "learning_rate": 1})
    space = build_config(settings | {"training": {"gradient_clip": 1}}).search.space
    assert space == PerLayer(methods=("lora",), learning_rate=1.0)


@pytest.mark.parametrize("missing", ["backbone", "task"])
def test_what_is_needed_is_named(missing: str) -> None:
    settings = {key: value for key, value in SETTINGS.items() if key != missing}
    with pytest.raises(ValueError, match=f"settings need '{missing}'"):
        build_config(settings)


def test_overrides_are_yaml(tmp_path: Path) -> None:
    path = written(tmp_path)
    overrides = (
        "training.epochs=5",
        "space.sizes.rank=[2, 4]",
        "name=again",
        "run.hours=null",
        "constraints={}",
    )
    config = load_config(path, overrides)
    assert config.search.training == Training(epochs=5, batch_size=16)
    assert isinstance(config.search.space, PerLayer)
    assert config.search.space.sizes == {"rank": (2, 4)}
    assert config.search.constraints == ()
    assert config.search.name == "again"
    assert config.run == {"trials": 8, "hours": None}
    assert load_config(path).search.training.epochs == 2


def test_overrides_may_add_what_the_file_leaves_empty(tmp_path: Path) -> None:
    path = written(tmp_path, changed("training", None) | {"run": None})
    config = load_config(path, ("training.epochs=4", "run.trials=2"))
    assert config.search.training.epochs == 4
    assert config.run == {"trials": 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs", r"reads key=value.*got 'training\.epochs'"),
        ("=3", "reads key=value"),
        ("backbone.name=3", r"'backbone' holds 'model', not further keys"),
        ("space.sizes.rank=[1", "value is not valid YAML"),
        ("trainin.epochs=3", "did you mean 'training'"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(written(tmp_path), (override,))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Cannot read .*missing\.yaml: No such file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(written(tmp_path, "space: [1"))
    with pytest.raises(ValueError, match="holds a list"):
        load_config(written(tmp_path, "- 1"))
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(written(tmp_path, "backbone: !!python/object/apply:os.getcwd []"))


def test_the_demo_is_valid() -> None:
    config = load_config(Path(__file__).parents[1] / "configs" / "demo.yaml")
    assert isinstance(config.search.space, ScoreGuided)
    assert config.run
