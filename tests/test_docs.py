"""What README and documentation say can be typed: commands, settings, Python, and the site as a whole."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pandas
import pytest
import typer
import yaml

from autopeft.cli import app
from autopeft.yaml_config import build_config
from tests.learnable import learnable_rows, save_tiny_model
from tests.tiny_models import tiny_chat_tokenizer, tiny_language_model

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))

TESTED_ELSEWHERE = ("from peft import", "calls.csv")
"""What marks blocks that tests/export and tests/tasks/test_audio.py have the like of."""
AS_RUN = {
    '"FacebookAI/roberta-base"': '"model"',
    '"HuggingFaceTB/SmolLM2-135M-Instruct"': '"language"',
    '"glue", subset="rte"': '"reviews.csv"',
    r"run\((trials|hours)=\d+\)": "run(trials=2)",
}
"""What of a block is put for what it shows: a tiny model, data, two trials."""


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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", ["README.md", "docs/start.md", "docs/how-to/search-your-model.md"])
def test_python_on_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page's blocks in turn, as they stand but for the names of models and data and the budget."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    tiny_language_model("llama").save_pretrained(tmp_path / "language")
    tiny_chat_tokenizer().save_pretrained(tmp_path / "language")
    rows = learnable_rows(90)
    texts = {name: rows["text"] for name in ("review", "sentence1", "sentence2")}
    pandas.DataFrame({**texts, "stars": rows["label"], "label": rows["label"]}).to_csv("reviews.csv")
    pairs = [{"prompt": text, "completion": label} for text, label in zip(*rows.values(), strict=True)]
    pandas.DataFrame(pairs).to_json("chat.jsonl", orient="records", lines=True)
    names: dict[str, Any] = {}
    for block in blocks(ROOT / page, "python"):
        if any(other in block for other in TESTED_ELSEWHERE):
            continue
        for shown, run in AS_RUN.items():
            block = re.sub(shown, run, block)
        exec(block, names)
    assert len(names["front"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Links are checked, and the tutorials are run."""
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
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
