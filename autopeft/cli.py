"""The command line: run a search, look at its front, and export or register what was chosen.

What loads models, trains or serves MLflow takes seconds to import; the commands that need it import it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from autopeft.core.errors import check_choice
from autopeft.optimization.study_store import SETTINGS_FILE, STUDY_FILE, load_study
from autopeft.reporting.console import wide_console
from autopeft.reporting.front import SHOWN_POINTS, ParetoFront
from autopeft.reporting.terminal_questions import asked, column_question
from autopeft.reporting.versions import print_versions

if TYPE_CHECKING:
    from autopeft.search import Search

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_NOT_FOR_EXPORT = ("sampler", "executor")  # they choose and train trials; an adapter does without
_INTERRUPTED = 130  # what a shell makes of Ctrl-C: a command after && is not run

Config = Annotated[Path, typer.Argument(help="YAML file of a search.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes, as in training.epochs=5.")]
Folder = Annotated[Path, typer.Option(help="Where searches are kept.")]
Name = Annotated[str | None, typer.Option("--search", help="Name of the search; default: the latest.")]
Trial = Annotated[int | None, typer.Argument(help="Number of the trial.")]
Best = Annotated[
    list[str] | None, typer.Option(help="Take the best within a bound: trainable_parameters=500k.")
]
Knee = Annotated[bool, typer.Option("--knee", help="Take the knee point.")]
Retrain = Annotated[bool, typer.Option("--retrain", help="Train the configuration again first.")]


@app.callback(help="Find the PEFT configurations that trade accuracy, parameters and memory best.")
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_versions, is_eager=True, help="Show versions.")
    ] = False,
) -> None:
    """Take what is given before a command."""


@app.command()
def init(
    model: Annotated[str | None, typer.Option(help="Hub name, or a folder with a config.json.")] = None,
    data: Annotated[
        str | None, typer.Option(help="CSV, JSON lines or Parquet file, a folder, or a hub name.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="A task's class; default: by the columns.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Column of texts; twice for pairs.")] = None,
    label: Annotated[str | None, typer.Option(help="Column to predict.")] = None,
    to: Annotated[Path, typer.Option(help="YAML file to write.")] = Path("search.yaml"),
) -> None:
    """Write the YAML of a first search; what is not given is asked for."""
    model = asked(model, "--model", "Model (hub name or folder)")
    data = asked(data, "--data", "Data (file, folder or hub name)")
    from autopeft.config_template import write_template

    settings = write_template(to, model, data, task, text=text or (), label=label, choose=column_question())
    print("Recognised: " + ", ".join(f"{name}: {value}" for name, value in settings.items()))
    print(f"Written: {to}. Next: autopeft validate {to}")


@app.command()
def search(
    config: Config,
    overrides: Overrides = None,
    profile: Annotated[bool, typer.Option("--profile", help="Say where the time went.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(help="Train on the workers of a Ray cluster: its address, auto, or local to start one."),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try failed trials again, each once.")
    ] = False,
) -> None:
    """Run a search, or resume it. After Ctrl-C the exit code is 130."""
    from autopeft.core.profiling import Profile
    from autopeft.yaml_config import load_config

    changes = [*(overrides or ())]
    if ray is not None:
        if _executor_type(config) not in (None, "RayExecutor"):
            changes.insert(0, "executor=null")  # with settings that a RayExecutor does not have
        changes += ["executor.type=RayExecutor", f"executor.address={'null' if ray == 'local' else ray}"]
    loaded = load_config(config, changes)
    if not loaded.run:
        raise ValueError("The settings have no budget: add for example run.trials=50.")
    settings = dict(loaded.run)
    retry_failed |= settings.pop("retry_failed", False)
    with Profile() if profile else nullcontext():  # here, so that it also has what is loaded for the name
        loaded.search.validate()
        loaded.search.run(**settings, retry_failed=retry_failed)
    if loaded.search.interrupted:
        raise typer.Exit(_INTERRUPTED)


@app.command()
def validate(config: Config, overrides: Overrides = None) -> None:
    """Find what is wrong with a search without training anything, and say what it would do."""
    from autopeft.yaml_config import load_config

    loaded = load_config(config, overrides or ())
    loaded.search.validate()
    print(loaded.search.describe())
    print(loaded.search.open().backbone.summary())


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="Hub name, or a folder with a config.json.")],
    task: Annotated[str, typer.Option(help="causal-lm or text-classification.")] = "causal-lm",
    rank: Annotated[int, typer.Option(help="Rank of LoRA, width of other adapters.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Batch size.")] = 4,
    length: Annotated[int, typer.Option(help="Sequence length in tokens.")] = 512,
    accumulate: Annotated[int, typer.Option(help="Gradient accumulation steps: parts of a batch.")] = 1,
    nf4: Annotated[bool, typer.Option("--nf4", help="Quantise linear layers to 4 bits (NF4).")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise linear layers to 8 bits.")] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Use gradient checkpointing.")
    ] = False,
) -> None:
    """Count trainable parameters and peak memory of a training from a model's config alone."""
    from autopeft.evaluation.estimate import estimate as counted

    found = counted(
        model,
        task,
        rank=rank,
        batch_size=batch_size,
        length=length,
        accumulate=accumulate,
        nf4=nf4,
        int8=int8,
        checkpointing=checkpointing,
    )
    wide_console().print(found.table())


@app.command()
def methods(
    model: Annotated[
        str | None, typer.Argument(help="Hub name, or a folder with a config.json, to count on.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the adapter methods with what they can do, found out on the installed peft."""
    from autopeft.export.method_table import method_table

    found = method_table(model)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        wide_console().print(found.table())


@app.command()
def sensitivity(
    config: Config,
    overrides: Overrides = None,
    scores: Annotated[
        list[str] | None,
        typer.Option("--score", help="A score; give it again for another. Default: the cheap ones."),
    ] = None,
    batches: Annotated[int | None, typer.Option(help="Training batches to score on.")] = None,
    to: Annotated[Path, typer.Option(help="Folder for heat maps, table and scores.")] = Path("sensitivity"),
) -> None:
    """Score the sites of the backbone on the task before anything is trained."""
    from autopeft.evaluation.site_scoring import SCORE_BATCHES
    from autopeft.sensitivity import CHEAP_SCORES
    from autopeft.yaml_config import load_config

    search = load_config(config, overrides or ()).search
    report = search.sensitivity(scores or CHEAP_SCORES, batches=SCORE_BATCHES if batches is None else batches)
    wide_console().print(report.table())
    with _written(to):
        paths = report.save(to)
    if isinstance(search.tracking, str):
        from autopeft.reporting.mlflow.store import log_report_run

        name = f"sensitivity {search.name}"
        run = log_report_run(search.tracking, search.experiment, name, report.save, "sensitivity")
        print(f"MLflow: run {name!r} ({run}) in the experiment {search.experiment!r}")
    print(f"{len(report.sites)} sites, {report.batches} batches. Written: {', '.join(map(str, paths))}")


@app.command()
def front(
    folder: Folder = Path("autopeft_runs"),
    name: Name = None,
    points: Annotated[
        int | None, typer.Option(help="Show at most this many points, chosen to keep the hypervolume.")
    ] = None,
) -> None:
    """Print the Pareto front of a search."""
    found = _read_front(_search_folder(folder, name))
    wide_console().print((found if points is None else found.thinned(points)).table())


@app.command()
def report(
    to: Annotated[Path, typer.Option(help="Folder to write report.html to.")] = Path("report"),
    points: Annotated[int, typer.Option(help="Show at most this many points in full.")] = SHOWN_POINTS,
    folder: Folder = Path("autopeft_runs"),
    name: Name = None,
) -> None:
    """Write a page: verdict, front, its points and how to load them, learning curves, what was spent."""
    found = _read_front(_search_folder(folder, name))
    with _written(to):
        print(f"Written: {found.report(to, points=points)}")


@app.command()
def show(
    trial: Annotated[int, typer.Argument(help="Number of the trial.")],
    folder: Folder = Path("autopeft_runs"),
    name: Name = None,
) -> None:
    """Show one trial: its values, its cost, its configuration."""
    found = _read_front(_search_folder(folder, name))
    record = found.trial(trial).record
    evaluation = record.evaluation
    marks = " ●" if trial in found.members else ""
    print(f"trial {trial}{marks}: {evaluation.status}" + f" ({evaluation.reason})" * bool(evaluation.reason))
    known = {objective.name: objective for objective in found.objectives}
    for key, value in evaluation.values.items():
        print(f"  {key}: {known[key].format(value) if key in known else f'{value:g}'}")
    for seed, values in evaluation.by_seed.items():
        outcome = evaluation.failures.get(
            seed, f"{found.metric.name} {found.metric.format(values[found.metric.name])}"
        )
        print(f"  training with seed {seed}: {outcome}")
    if record.derived_from is not None:
        print(f"  cut from: trial {record.derived_from}")
    if evaluation.status in ("complete", "paused"):
        print(f"  initialised from: {evaluation.initialised_from}")
    cost = evaluation.cost
    print(f"  cost: {cost.wall_seconds:.1f} s, {cost.cpu_seconds:.1f} CPU-seconds, {cost.steps} steps")
    print(evaluation.configuration.grid())
    print(evaluation.configuration.to_yaml())


@app.command()
def export(
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    trial: Trial = None,
    best: Best = None,
    knee: Knee = False,
    target: Annotated[
        str | None,
        typer.Option(
            help="What it is for: peft, autopeft, merged, lora, vllm, sglang, llama.cpp or "
            "peft-method-comparison."
        ),
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of each update to keep where other methods are made LoRA.")
    ] = None,
    retrain: Retrain = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in the folder.")] = False,
    folder: Folder = Path("autopeft_runs"),
    name: Name = None,
) -> None:
    """Write a trial's adapter: a number, the best within bounds, or the knee point."""
    place = _search_folder(folder, name)
    number = _chosen(place, trial, best, knee)
    how: dict[str, Any] = {"target": target, "retrain": retrain, "overwrite": overwrite}
    how |= {} if energy is None else {"energy": energy}
    print(_stored_search(place).export(number, to, **how))


@app.command()
def register(
    model: Annotated[str, typer.Option("--name", help="Name of the model in the registry.")],
    trial: Trial = None,
    best: Best = None,
    knee: Knee = False,
    retrain: Retrain = False,
    folder: Folder = Path("autopeft_runs"),
    name: Name = None,
) -> None:
    """Put a trial, merged into a whole model, into MLflow's model registry."""
    place = _search_folder(folder, name)
    number = _chosen(place, trial, best, knee)
    print(f"Registered: {_stored_search(place).register(number, model, retrain=retrain)}")


@app.command()
def verdict(
    share: Annotated[float, typer.Option(help="Compute for the sweep, as a share of the search's.")] = 1.0,
    seeds: Annotated[int, typer.Option(help="Fresh trainings of each point, 3 or more.")] = 3,
    full: Annotated[bool, typer.Option("--full-fine-tuning", help="Train all weights, to compare.")] = False,
    folder: Folder = Path("autopeft_runs"),
    name: Name = None,
) -> None:
    """Say whether the front beats a uniform LoRA sweep, which is trained beside it, on the test split."""
    _stored_search(_search_folder(folder, name)).verdict(share, seeds=seeds, full_fine_tuning=full)


@app.command()
def ui(
    tracking: Annotated[str, typer.Option(help="MLflow tracking URI.")] = "sqlite:///mlflow.db",
    port: Annotated[int, typer.Option(help="Port on the loopback interface.")] = 5000,
) -> None:
    """Start the MLflow UI on the loopback interface and print the links to the fronts."""
    from autopeft.reporting.mlflow.server import serve

    serve(tracking, port=port)


def main() -> None:
    """Run the command line; errors a user can mend are printed without a traceback."""
    sys.path.append(str(Path.cwd()))  # last: a task of one's own there hides no module
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _executor_type(config: Path) -> Any:
    """Return the executor's type in a YAML file, None without one; loading says what is wrong with a file."""
    try:
        return yaml.safe_load(config.read_text(encoding="utf-8"))["executor"]["type"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None


@contextmanager
def _written(to: Path) -> Iterator[None]:
    """Say what a user can mend where a report cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"The report cannot be written to {to}: {error.strerror}.") from error


def _search_folder(folder: Path, name: str | None) -> Path:
    searches = sorted(folder.glob(f"*/{STUDY_FILE}"), key=lambda path: path.stat().st_mtime)
    if not searches:
        raise ValueError(f"There is no search in {folder}; `autopeft search CONFIG.yaml` makes one.")
    if name is None:
        return searches[-1].parent
    names = [path.parent.name for path in searches]
    check_choice("search", names, name)
    return folder / name


def _stored_search(place: Path) -> Search:
    """Make the search in a folder again."""
    kept = place / SETTINGS_FILE
    if not kept.is_file():
        raise ValueError(f"{place} has no {SETTINGS_FILE}: use the search from Python.")
    from autopeft.search_document import LOST
    from autopeft.yaml_config import build_config

    settings = yaml.safe_load(kept.read_text())
    lost = {name: given for name, given in settings.pop(LOST, {}).items() if name not in _NOT_FOR_EXPORT}
    # The folder may have been moved, and a name made from the data's content may come out another today.
    found_here = {"folder": str(place.parent), "name": place.name, LOST: lost}
    return build_config({**settings, **found_here}).search


def _read_front(place: Path) -> ParetoFront:
    attributes, records = load_study(place)
    return ParetoFront.stored(attributes, records)


def _chosen(place: Path, trial: int | None, best: list[str] | None, knee: bool) -> int:
    """Return the number of the trial that a command was told to take."""
    if (trial is not None) + bool(best) + knee != 1:
        raise ValueError("Say which trial: its number, --best BOUND, or --knee.")
    if trial is not None:
        return trial
    found = _read_front(place)
    return found.best(**_bounds(best)).number if best else found.knee().number


def _bounds(texts: list[str]) -> dict[str, Any]:
    bounds = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"A bound reads name=value, as in trainable_parameters=500k; got {text!r}.")
        bounds[key] = value
    return bounds
