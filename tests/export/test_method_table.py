"""`autopeft methods`: what the installed peft makes of every method."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from autopeft.cli import app
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.export.method_table import method_table
from autopeft.export.serving import SERVERS
from autopeft.export.targets import becomes_lora, possible_targets
from autopeft.methods import METHODS, PeftMethod
from autopeft.methods.abilities import abilities
from autopeft.models.backbone import Backbone
from tests.quantized import require_bitsandbytes
from tests.tiny_models import tiny_language_model, tiny_model


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
    assert {name for name, row in rows.items() if not row["starts_at_base"]} == {"unilora", "prefix"}
    assert rows["sparse"]["servers"] == list(SERVERS)
    assert {row["name"] for row in found["rows"] if not row["to_lora"]} == SERVED_BY_NONE
    assert "scikit-learn" in found["left_out"]["ADAMSS"]


SERVED_BY_NONE = {"layernorm", "bitfit", "series", "parallel", "prefix", "compacter", "loreft", "ladder"} | {
    "sdt",
    "state_offset",
}

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


def test_abilities_are_those_that_were_found_with_peft_0_21() -> None:
    table = method_table()
    probed = {
        name: abilities(method)
        for name, method in METHODS.items()
        if isinstance(method, PeftMethod) and "linear" in METHOD_SPECS[name].kinds
    }
    assert {name for name, found in probed.items() if found.changes_weights} == CHANGES_WEIGHTS
    assert {name for name, found in probed.items() if not found.starts_at_base} == STARTS_ELSEWHERE
    assert {row.name for row in table.rows if row.size_pattern} == HEEDS_PATTERNS
    assert all(found.merges for found in probed.values())
    assert "No method: BOFT" in repr(table)


NOT_IN_4_BITS = {"full", "bitfit", "pissa", "olora", "loha", "lokr", "delora", "tinylora", "hra", "psoft"} | {
    "osf",
    "peanut",
    "deft",
    "glora",
}


def test_what_trains_on_packed_weights_was_found_out() -> None:
    """LoRA-FA, whose A is frozen and gets no gradient, among them."""
    require_bitsandbytes()
    rows = {row.name: row for row in method_table().rows}
    assert {name for name, row in rows.items() if not row.takes_4_bits} == NOT_IN_4_BITS
    # peft moves 8-bit weights that lie on the CPU in DoRA's forward pass, which loses their scales.
    assert {name for name, row in rows.items() if not row.takes_8_bits} == NOT_IN_4_BITS | {"dora"}


def test_without_bitsandbytes_it_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    found = abilities.__wrapped__(METHODS["vera"])
    assert (found.takes_4_bits, found.takes_8_bits) == (None, None)
    assert found.merges


def test_servers_are_those_that_exports_are_written_for() -> None:
    model = tiny_language_model("llama")
    backbone = Backbone(model, None, name="tiny", head=(), auto_class=AutoModelForCausalLM)
    site = Site(0, "query")
    asked = {name: row for name, row in METHOD_SPECS.items() if "linear" in row.kinds and not row.needs_bias}
    for name, row in asked.items():
        adapter = Adapter(name, row.sizes[0] if row.size_name else None)
        targets = possible_targets(backbone, Configuration({site: adapter}))
        assert set(SERVERS) <= set(targets) if becomes_lora(name) else set(SERVERS).isdisjoint(targets), name
