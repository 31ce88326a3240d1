"""`autopeft methods`: what the installed peft makes of every method."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from autopeft.cli import app
from tests.tiny_models import tiny_model


def test_lists_methods_with_abilities_and_counts(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["methods", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) >= 40
    assert rows["lora"]["smallest"] == 2 * (4 * (32 + 32) + 2 * (32 + 64))
    assert rows["lora"]["middle"] == 8 * rows["lora"]["smallest"]
    assert rows["unilora"]["shares_state"]
    assert rows["unilora"]["smallest"] == 64
    assert rows["layernorm"]["abilities"] is None
    assert "scikit-learn" in found["left_out"]["ADAMSS"]


# What the installed peft can do, by ability: what changes when peft does shows here.
CHANGES_WEIGHTS = {"pissa", "olora"}
STARTS_ELSEWHERE = {"unilora"}
HEEDS_PATTERNS = {
    "lora",
    "lora_fa",
    "eva",
    "dora",
    "pissa",
    "olora",
    "loha",
    "lokr",
    "delora",
    "osf",
    "fourierft",
    "c3a",
}
CONVERTS = HEEDS_PATTERNS - {"osf"} | {
    "lora_ga",
    "corda",
    "gralora",
    "randlora",
    "vera",
    "unilora",
    "tinylora",
    "psoft",
    "miss",
}


def test_abilities_are_those_that_were_found_with_peft_0_21() -> None:
    from autopeft.evaluation.method_table import method_table

    table = method_table()
    probed = {row.name: row.abilities for row in table.rows if row.abilities}
    assert {name for name, found in probed.items() if found.changes_weights} == CHANGES_WEIGHTS
    assert {name for name, found in probed.items() if not found.starts_at_base} == STARTS_ELSEWHERE
    assert {name for name, found in probed.items() if found.converts} == CONVERTS
    assert {row.name for row in table.rows if row.size_pattern} == HEEDS_PATTERNS
    assert all(found.merges for found in probed.values())
    assert "No method: BOFT" in repr(table)
