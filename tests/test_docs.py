"""What README and documentation say can be typed: commands and settings; and the site as a whole.

tests/test_docs_examples.py runs Python.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer
import yaml
from transformers import RobertaConfig, RobertaForSequenceClassification

from autopeft.cli import app
from autopeft.core.objectives import parse_quantity
from autopeft.yaml_config import build_config
from benchmarks.first_front import INSTALLATION, LINES

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the fenced blocks of a page in some languages; those that the site runs are left out."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def commands() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for block in blocks(page, "sh", "bash"):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["autopeft"]:
                    yield f"{page.name}: {line}", words[1:]


def test_every_command_has_the_arguments_it_is_shown_with() -> None:
    group: Any = typer.main.get_command(app)
    shown = list(commands())
    assert len(shown) > 15
    for place, (name, *arguments) in shown:
        try:
            group.commands[name].make_context(name, list(arguments))
        except (KeyError, click.UsageError) as error:
            pytest.fail(f"{place}: {error!r}")


def test_every_setting_in_yaml_is_one() -> None:
    found = [(page.name, text) for page in PAGES for text in blocks(page, "yaml")]
    shown = [(name, text) for name, text in found if "apiVersion" not in text]  # that is Kubernetes' own
    assert shown
    task = {"type": "TextClassification", "dataset": "data.csv"}
    for name, text in shown:
        settings = {"backbone": "model", "task": task} | yaml.safe_load(text)
        if ":" not in settings["task"]["type"]:  # tests/tasks/test_own_task.py runs the page with its module
            assert build_config(settings).search is not None, name


def test_every_entry_point_in_toml_is_of_a_kind_that_is_looked_for() -> None:
    shown = [tomllib.loads(text) for page in PAGES for text in blocks(page, "toml")]
    groups = {group for text in shown for group in text["project"]["entry-points"]}
    kinds = ("methods", "tasks", "spaces", "samplers", "executors")  # of `load_entry_point`
    assert groups == {f"autopeft.{kind}" for kind in kinds}


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_what_a_newcomer_types_is_what_the_benchmark_types(page: str) -> None:
    words = {
        "repository": "<address of this repository>",
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "data": "reviews.csv",
        "hours": "0.06",
    }
    lines = [line.format(**words).replace(" --quiet", "") for line in (*INSTALLATION, *LINES)]
    shown = [line for text in blocks(ROOT / page, "sh") for line in text.splitlines()]
    assert shown[: len(lines)] == lines
    assert len(lines) <= 8


def test_everything_public_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (autopeft\.\S+)$", page, re.MULTILINE)
    for path in shown:
        where, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(where), name), path
    rooms = {"search_spaces", "tasks"}  # in `autopeft.__all__`
    names = {path.rpartition(".")[2] for path in shown}
    for module in ("autopeft", *(f"autopeft.{room}" for room in (*rooms, "callbacks", "methods"))):
        assert {*importlib.import_module(module).__all__} - rooms <= names, module


def test_a_bound_of_the_readme_leaves_room_for_the_head() -> None:
    """RoBERTa's head, which is trained too, has two layers."""
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(num_hidden_layers=1, vocab_size=8))
    head = sum(parameter.numel() for parameter in model.classifier.parameters())
    (page,) = (page for page in PAGES if page.name == "README.md")
    (bound,) = re.findall(r'best\(trainable_parameters="(\w+)"\)', page.read_text(encoding="utf-8"))
    assert parse_quantity(bound, "parameters") > head


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Links are checked, and the tutorials are run."""
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
    nbformat = pytest.importorskip("nbformat", reason="`make docs` installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    exported = {
        "classification": "adapter_config.json",
        "images": "that never imported autopeft",
        "language-model": "a plain PEFT folder",
        "own-parts": "a whole transformers model",
    }
    for tutorial, said in exported.items():
        page = (tmp_path / "tutorials" / tutorial / "index.html").read_text(encoding="utf-8")
        assert "hypervolume 0." in page, tutorial
        assert said in page, tutorial
        notebook = nbformat.read(tmp_path / "tutorials" / f"{tutorial}.ipynb", as_version=4)
        nbformat.validate(notebook)
        assert f'href="../{tutorial}.ipynb"' in page, tutorial
        for cell in notebook.cells:
            if cell.cell_type == "code":
                compile(cell.source, tutorial, "exec")
