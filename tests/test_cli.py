"""The command line: every command once, and errors without a traceback."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.samplers import RandomSampler
from typer.testing import CliRunner, Result

from autopeft import Search
from autopeft.callbacks import Throughput
from autopeft.cli import app, main
from autopeft.core.configuration import Configuration
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.run import Trained
from autopeft.optimization.study_store import StudyStore, load_study
from autopeft.reporting.front import ParetoFront
from autopeft.tasks import TextClassification
from autopeft.yaml_config import build_config, load_config
from tests.learnable import TRAINING, learner, save_learnable_csv, save_tiny_model, tiny_search
from tests.records import METRICS


def settings_of(folder: Path) -> dict[str, Any]:
    return {
        "backbone": str(folder / "model"),
        "task": {
            "type": "TextClassification",
            "dataset": str(folder / "data.csv"),
            "test_share": 0.2,
            "validation_share": 0.2,
        },
        "space": {"type": "Uniform", "sizes": {"rank": [1, 8]}},
        "objectives": ["accuracy", "trainable_parameters"],
        "training": {"epochs": 1, "batch_size": 8, "device": "cpu"},
        "tracking": None,
        "name": "tiny",
        "folder": str(folder / "runs"),
        "run": {"trials": 3},
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, settings, and a search of three trials."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_model(folder / "model")
    save_learnable_csv(folder / "data.csv")
    (folder / "search.yaml").write_text(yaml.safe_dump(settings_of(folder)))
    result = CliRunner().invoke(app, ["search", str(folder / "search.yaml")])
    assert result.exit_code == 0, result.output
    assert "Pareto front" in result.output
    return folder


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error(*arguments: str | Path) -> str:
    result = call(*arguments)
    assert isinstance(result.exception, ValueError), result.output
    return str(result.exception)


def test_search_keeps_its_settings_and_resumes(place: Path) -> None:
    kept = place / "runs" / "tiny" / "search.yaml"
    again, first = load_config(kept), load_config(place / "search.yaml")
    assert again.search.identity() == first.search.identity()
    assert (again.search.folder, again.run) == (first.search.folder, {"trials": 3})
    result = call("search", place / "search.yaml")
    assert result.exit_code == 0
    assert "Resuming with 3 trials: " in result.output
    assert len(load_study(place / "runs" / "tiny")[1]) == 3


def test_search_with_other_settings_leaves_those_of_the_search_alone(place: Path) -> None:
    kept = place / "runs" / "tiny" / "search.yaml"
    before = kept.read_text()
    assert "training.epochs: '1' there, '2' here" in error(
        "search", place / "search.yaml", "training.epochs=2"
    )
    assert kept.read_text() == before


def test_search_says_where_the_time_went(place: Path, tmp_path: Path) -> None:
    assert call("search", place / "search.yaml", f"folder={tmp_path}", "--profile").exit_code == 0
    kept = json.loads((tmp_path / "tiny" / "profile" / "profile.json").read_text())
    assert kept["trainings"] >= 3
    assert all(kept["sections"][name]["seconds"] > 0 for name in ("load", "tokenise", "forward"))


def test_says_its_versions() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert f"torch {version('torch')}" in result.output


def test_search_needs_a_budget(place: Path) -> None:
    assert "no budget" in error("search", place / "search.yaml", "run=null")


def test_validate_trains_nothing(place: Path) -> None:
    result = call("validate", place / "search.yaml", "name=other", "space.sizes.rank=[1, 4]")
    assert result.exit_code == 0
    assert "Uniform: one of lora(1), lora(2), lora(4) everywhere" in result.output
    assert "attention_output" in result.output
    assert not (place / "runs" / "other").exists()


def test_validate_finds_what_is_wrong(place: Path) -> None:
    yaml_file = place / "search.yaml"
    assert "did you mean 'text'" in error("validate", yaml_file, "task.text=txt")
    assert "No candidate" in error("validate", yaml_file, "constraints={trainable_parameters: 5}")
    assert "did you mean 'training'" in error("validate", yaml_file, "trainin.epochs=1")
    assert error("validate", yaml_file, f"backbone={place / 'nowhere'}")


def test_sensitivity_scores_without_training(place: Path) -> None:
    report = place / "report"
    options = ("--score", "gora", "--score", "uniform", "--batches", "2", "--to", report)
    result = call("sensitivity", place / "search.yaml", *options)
    assert result.exit_code == 0, result.output
    assert "ffn_up" in result.output
    assert {path.name for path in report.iterdir()} == {
        "heatmap.html",
        "scores.csv",
        "scores.json",
    }
    assert "did you mean 'gora'" in error("sensitivity", place / "search.yaml", "--score", "gorra")
    assert "cannot be written" in error("sensitivity", place / "search.yaml", "--to", "/proc/none")


@pytest.mark.slow
def test_a_moved_search_exports(place: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(place / "runs", moved)
    (moved / "tiny").rename(moved / "renamed")
    # Neither where the search was nor a name made from its settings leads to it now.
    settings = settings_of(place) | {"folder": str(tmp_path / "gone"), "name": None}
    (moved / "renamed" / "search.yaml").write_text(yaml.safe_dump(settings))
    result = call("export", "--knee", "--to", tmp_path / "adapter", "--folder", moved)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "adapter").is_dir()


@pytest.mark.parametrize(
    "override",
    [
        "space.groups=abc",
        "training.warmup_share=abc",
        "task.validation_share=abc",
        "objectives=5",
        "constraints=[1]",
        "tokenizer=gpt2",
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(place: Path, override: str) -> None:
    name = override.partition("=")[0].rpartition(".")[2]
    assert name in error("validate", place / "search.yaml", "space.type=PerLayer", override)


@pytest.mark.parametrize(
    "command", [["front"], ["report"], ["show", "0"], ["export", "--knee", "--to", "out"]]
)
def test_a_search_killed_at_its_start_has_no_finished_trial(command: list[str], tmp_path: Path) -> None:
    objectives = resolve_objectives(["accuracy", "trainable_parameters"], METRICS)
    StudyStore(tmp_path / "killed", "killed", objectives).close()
    assert "has no finished trial yet" in error(*command, "--folder", tmp_path)


def test_an_interrupted_search_exits_with_130(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Evaluator.train

    def interrupted(self: Evaluator, *arguments: Any, **options: Any) -> Trained:
        if load_study(tmp_path / "tiny")[1]:
            raise KeyboardInterrupt
        return train(self, *arguments, **options)

    command = ("search", place / "search.yaml", f"folder={tmp_path}")
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "train", interrupted)
        for budget in (["run.trials=2"], ["run={hours: 9}"]):
            result = call(*command, *budget)
            assert result.exit_code == 130, result.output
            assert "Interrupted" in result.output
    assert call(*command, "run.trials=2").exit_code == 0


def test_a_budget_of_words_is_refused(place: Path) -> None:
    assert "trials must be a finite number" in error("validate", place / "search.yaml", "run.trials=abc")


def test_front_prints_the_front(place: Path) -> None:
    result = call("front", "--folder", place / "runs")
    assert result.exit_code == 0
    assert "Pareto front" in result.output
    assert "trainable_parameters" in result.output
    assert call("front", "--folder", place / "runs", "--search", "tiny").output == result.output
    assert "Pareto front: 1 of " in call("front", "--folder", place / "runs", "--points", "1").output


def test_report_writes_a_page_without_loading_a_model(place: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from autopeft.cli import app; app(standalone_mode=False); "
        "assert not {'torch', 'mlflow', 'lightning', 'transformers', 'peft', 'datasets'} & sys.modules.keys()"
    )
    where = ["report", "--folder", str(place / "runs"), "--points", "1", "--to", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", script, *where], check=True, capture_output=True, text=True)
    assert done.stdout == f"Written: {tmp_path / 'report.html'}\n"
    assert "--search tiny --to adapters/" in (tmp_path / "report.html").read_text()
    assert "cannot be written" in error("report", "--folder", place / "runs", "--to", "/proc/none")


def test_front_names_the_searches_there_are(place: Path, tmp_path: Path) -> None:
    assert "did you mean 'tiny'" in error("front", "--folder", place / "runs", "--search", "tyny")
    assert "There is no search in" in error("front", "--folder", tmp_path)
    assert "There is no search in" in error("front", "--folder", tmp_path / "missing")


def test_show_names_every_training_of_a_trial(place: Path, tmp_path: Path) -> None:
    assert call("search", place / "search.yaml", f"folder={tmp_path}", "seeds=2").exit_code == 0
    _, records = load_study(tmp_path / "tiny")
    record = next(candidate for candidate in records if candidate.evaluation.by_seed)
    shown = call("show", str(record.number), "--folder", tmp_path).output
    for seed, values in record.evaluation.by_seed.items():
        assert f"training with seed {seed}: accuracy {values['accuracy']:.4f}" in shown
    assert "±" in call("front", "--folder", tmp_path).output


def test_show_prints_a_trial_whose_configuration_reads_back(place: Path) -> None:
    _, records = load_study(place / "runs" / "tiny")
    result = call("show", "1", "--folder", place / "runs")
    assert result.exit_code == 0
    assert "trial 1" in result.output
    assert "complete" in result.output
    assert "CPU-seconds" in result.output
    expected = records[1].evaluation.configuration
    assert expected.to_yaml().strip() in result.output
    assert Configuration.from_yaml(expected.to_yaml()) == expected
    assert "no trial 7" in error("show", "7", "--folder", place / "runs")


@pytest.mark.slow
def test_export_writes_an_adapter(place: Path, tmp_path: Path) -> None:
    where = ("--to", tmp_path / "out", "--folder", place / "runs")
    result = call("export", "--best", "trainable_parameters=1M", *where)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert "PeftModel.from_pretrained" in result.output
    assert "overwrite" in error("export", "--knee", *where)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Say which trial"),
        (["1", "--knee"], "Say which trial"),
        (["--best", "trainable_parameters"], "A bound reads name=value"),
        (["--best", "trainable_params=500k"], "did you mean 'trainable_parameters'"),
        (["--best", "trainable_parameters=1"], "the closest is trial"),
        (["7"], "no trial 7"),
    ],
)
def test_export_says_what_is_wrong(arguments: list[str], message: str, place: Path, tmp_path: Path) -> None:
    assert message in error("export", *arguments, "--to", tmp_path / "out", "--folder", place / "runs")
    assert not (tmp_path / "out").exists()


def python_search(place: Path, folder: Path, **changes: Any) -> Search:
    """Return the search of the settings, as made from Python."""
    task = TextClassification(dataset=place / "data.csv", test_share=0.2, validation_share=0.2)
    settings: dict[str, Any] = {"backbone": place / "model", "task": task}
    return tiny_search(folder, **(settings | changes))


@pytest.mark.slow
def test_a_search_from_python_is_exported_from_the_command_line(place: Path, tmp_path: Path) -> None:
    search = python_search(
        place, tmp_path, sampler=RandomSampler(seed=1), seeds=2, constraints={"peak_memory": "1 GiB"}
    )
    search.run(trials=1, progress=False)
    kept = yaml.safe_load((tmp_path / "tiny" / "search.yaml").read_text())
    assert kept.pop("only_in_python") == {"sampler": "optuna.samplers._random.RandomSampler"}
    again = build_config(kept)
    assert again.run == {"trials": 1}
    given = {"backbone": search.backbone, "sampler": search.sampler, "task": search.task}
    assert again.search.arguments() | given == search.arguments()
    result = call("export", "0", "--to", tmp_path / "out", "--folder", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_what_only_python_has_is_named_at_the_export(place: Path, tmp_path: Path) -> None:
    class OwnTask(TextClassification):
        """A user's task that cannot be imported."""

    search = python_search(
        place,
        tmp_path,
        backbone=learner(),
        task=OwnTask(dataset=place / "data.csv"),
        training=replace(TRAINING, callbacks=(Throughput(),)),
    )
    search.run(trials=1, progress=False)
    assert call("front", "--folder", tmp_path).exit_code == 0
    message = error("export", "0", "--to", tmp_path / "out", "--folder", tmp_path)
    parts = (
        "backbone (autopeft.models.backbone.Backbone)",
        f"task ({__name__}.{OwnTask.__qualname__})",
        "training.callbacks (autopeft.callbacks.measuring.Throughput)",
    )
    assert all(part in message for part in parts)
    assert "search.export(number, folder)" in message
    (tmp_path / "tiny" / "search.yaml").unlink()
    assert "use the search from Python" in error(
        "export", "0", "--to", tmp_path / "out", "--folder", tmp_path
    )


def test_failed_trials_are_tried_again_where_the_settings_or_the_option_say_so(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def run(search: Search, *, retry_failed: bool, **bounds: Any) -> ParetoFront:
        asked.append(retry_failed)
        return search.front()

    monkeypatch.setattr(Search, "run", run)
    for arguments in ([], ["run.retry_failed=true"], ["--retry-failed"]):
        assert call("search", place / "search.yaml", *arguments).exit_code == 0
    assert asked == [False, True, True]


def test_errors_are_one_line_and_exit_code_two(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["autopeft", "front", "--folder", str(place / "runs"), "--search", "tyny"]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("Error: Unknown search 'tyny'")
    assert "Traceback" not in shown.err + shown.out


def test_a_disk_that_is_full_is_one_line_too(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "study.log cannot be written: No space left on device")

    monkeypatch.setattr(Search, "run", full)
    monkeypatch.setattr(sys, "argv", ["autopeft", "search", str(place / "search.yaml")])
    with pytest.raises(SystemExit):
        main()
    assert "study.log cannot be written: No space left on device\n" in capsys.readouterr().err


@pytest.mark.slow
def test_the_installed_command_prints_errors_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from autopeft.cli import main; main()", "validate", "missing.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Error: Cannot read missing.yaml: No such file or directory." in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_the_commands() -> None:
    output = call("--help").output
    for command in ("search", "validate", "front", "report", "show", "export", "ui"):
        assert command in output
