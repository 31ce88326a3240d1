"""The house rules that a tool or a look at the disk can check."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.learnable import save_learnable_csv, save_tiny_model

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("callbacks", "search_spaces")
ROOMS = ("autopeft", *LINKED, "assets", "benchmarks", "examples", "tests")
LONGEST_MODULE = 400
FIVE_LINES = """
import autopeft
assert "environment" in autopeft.__file__, autopeft.__file__
task = autopeft.tasks.TextClassification("data.csv", validation_share=0.2, test_share=0.2)
space = autopeft.search_spaces.Uniform(sizes={"rank": (1, 2)})
front = autopeft.Search("model", task, space, tracking=None, halving=None, seeds=1).run(trials=2)
print(front.best())
"""
TYPED_USE = """
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
from typing import assert_type
import autopeft
from autopeft.search_spaces import PerLayer

task = autopeft.tasks.TextClassification("reviews.csv", label="stars")
search = autopeft.Search(
    "FacebookAI/roberta-base",
    task,
    PerLayer(methods=("lora", "series")),
    objectives=("accuracy", "trainable_parameters"),
    training=autopeft.Training(epochs=2),
    halving=autopeft.SuccessiveHalving(rungs=(0.25,)),
)
front = assert_type(search.run(trials=200), autopeft.ParetoFront)
point = front.best(trainable_parameters="500k")
assert_type(point.configuration, autopeft.Configuration)
assert_type(point.values["accuracy"], float)
assert_type([point.number for point in front], list[int])
assert_type(point.export("adapters/reviews", target="vllm").folder.name, str)
assert_type(search.verdict().margin, float)
search.run(trials="ten")  # pyright: ignore[reportArgumentType]
"""


@pytest.fixture(scope="module")
def setuptools_settings() -> dict[str, Any]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return dict(settings["tool"]["setuptools"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an sdist beside it, both made of a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    copy.mkdir()
    for name in ("autopeft", *LINKED):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build = "import setuptools.build_meta as backend; backend.build_sdist('..')"
    run(sys.executable, "-c", build, folder=copy)
    (sdist,) = folder.glob("*.tar.gz")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    run(sys.executable, "-m", "pip", "wheel", *options, str(sdist))
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed; dependencies are this environment's, by a path without its editable autopeft."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    install = ("-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--quiet")
    run(sys.executable, *install, "--no-deps", "--no-index", str(wheel))
    return environment


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> list[str]:
    """Names of the files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def run(*command: str, folder: Path = ROOT) -> None:
    """Run a tool in a folder; its output is the failure's message."""
    done = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"


def run_five_lines(environment: Path, folder: Path) -> None:
    """Search with a tiny model in an environment, where only its own autopeft is found."""
    save_tiny_model(folder / "model")
    save_learnable_csv(folder / "data.csv")
    (folder / "five_lines.py").write_text(FIVE_LINES)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        run(str(environment / "bin" / "python"), "five_lines.py", folder=folder)


def packages_on_disk() -> Iterator[str]:
    """Dotted names of the importable folders, the two linked ones counted where they stand."""
    for start in ("autopeft", *LINKED):
        prefix = "autopeft." if start in LINKED else ""
        for file in (ROOT / start).rglob("__init__.py"):
            yield prefix + ".".join(file.parent.relative_to(ROOT).parts)


def modules() -> list[Path]:
    return [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


def test_package_list_matches_the_disk(setuptools_settings: dict[str, Any]) -> None:
    assert sorted(setuptools_settings["packages"]) == sorted(packages_on_disk())


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders(name: str, setuptools_settings: dict[str, Any]) -> None:
    link = ROOT / "autopeft" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert setuptools_settings["package-dir"][f"autopeft.{name}"] == name


def test_wheel_claims_autopeft_alone(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top.partition("-")[0] for top in tops} == {"autopeft"}


def test_wheel_ships_every_module_and_the_type_marker(wheel_names: list[str]) -> None:
    shipped = {name for name in wheel_names if name.endswith((".py", "py.typed"))}
    expected = {"autopeft/py.typed"}
    for file in modules():
        parts = file.relative_to(ROOT).parts
        if parts[0] in LINKED:
            parts = ("autopeft", *parts)
        if parts[0] == "autopeft":
            expected.add("/".join(parts))
    assert shipped == expected


def test_wheel_ships_the_licence(wheel_names: list[str]) -> None:
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in wheel_names)


@pytest.mark.slow
def test_twine_takes_wheel_and_sdist(wheel: Path) -> None:
    (sdist,) = wheel.parent.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_searches_in_an_environment_of_its_own(environment: Path, tmp_path: Path) -> None:
    run_five_lines(environment, tmp_path)
    options = ("--model", "model", "--data", "data.csv")
    run(str(environment / "bin" / "autopeft"), "init", *options, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_five_lines_run_where_pip_has_installed_the_wheel(version: str, wheel: Path, tmp_path: Path) -> None:
    interpreter = shutil.which(f"python{version}") or ""
    if not interpreter or subprocess.run([interpreter, "-c", ""], check=False).returncode:
        pytest.skip(f"needs python{version}")
    environment = tmp_path / "environment"
    run(interpreter, "-m", "venv", str(environment))
    install = (str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet")
    run(*install, "-c", str(ROOT / "constraints.txt"), str(wheel))
    run_five_lines(environment, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_users_type_checker_knows_the_types(environment: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyright", reason="pip install pyright[nodejs]")
    (tmp_path / "use.py").write_text(TYPED_USE)
    checker = Path(sysconfig.get_path("scripts"), "pyright")
    run(str(checker), "--pythonpath", str(environment / "bin" / "python"), "use.py", folder=tmp_path)


def test_modules_are_short() -> None:
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in modules()}
    long = {str(file): lines for file, lines in lengths.items() if lines > LONGEST_MODULE}
    assert not long


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    tools = (extras[extra] for extra in ("dev", "docs", "ray", "test", "typecheck"))
    wanted = {name_of(line) for line in (*project["dependencies"], *chain.from_iterable(tools))}
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {name_of(line) for line in constraints if "==" in line}
    assert wanted == pinned


def test_a_version_with_unreleased_changes_is_none_of_the_changelog() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased = changelog.partition("## [Unreleased]")[2].partition("\n## [")[0]
    assert (f"## [{version}]" in changelog) != bool(unreleased.strip())


def name_of(requirement: str) -> str:
    return requirement.partition("==")[0].partition(">=")[0].partition("[")[0].lower()


def test_ruff_check() -> None:
    run(sys.executable, "-m", "ruff", "check", ".")


def test_ruff_format() -> None:
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


@pytest.mark.slow
def test_mypy_strict() -> None:
    run(sys.executable, "-m", "mypy")


def test_import_directions() -> None:
    run(str(Path(sys.executable).with_name("lint-imports")))


@pytest.mark.parametrize("module", ["autopeft", "autopeft.cli"])
def test_what_needs_no_mlflow_does_not_import_it(module: str) -> None:
    run(sys.executable, "-c", f"import sys, {module}; sys.exit('mlflow' in sys.modules)")
