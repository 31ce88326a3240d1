"""Every point of some fronts, exported for every target that takes it: does it agree, and what is lost?

    python -m benchmarks.export_targets configs/demo.yaml configs/families.yaml configs/dialogue.yaml \
        [--folder autopeft_runs]

The searches of the configs must have run, in the folder. Each point is asked for with each target; one that
cannot take it says why. What is written is loaded again, by plain peft or transformers where its layout lets
that, and its logits are compared; for servers also by their own rules. Where methods are made LoRA, the
validation split is scored before and after.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from autopeft import Search
from autopeft.export.targets import TARGETS
from autopeft.yaml_config import load_config
from benchmarks.machine import this_machine

RESULTS = Path(__file__).parent / "results" / "export_targets.json"


def exported(name: str, search: Search) -> list[dict[str, Any]]:
    """Export every point of a front for every target; return a row a point and target."""
    rows = []
    front = search.front()
    for point in front:
        for target in TARGETS:
            row: dict[str, Any] = {
                "front": name,
                "trial": point.number,
                "methods": point.configuration.methods,
                "parameters": point.values["trainable_parameters"],
                "target": target,
            }
            try:
                with tempfile.TemporaryDirectory() as folder:
                    report = search.export(point.number, Path(folder, "out"), target=target)
            except (ValueError, RuntimeError) as error:
                rows.append(row | {"refused" if isinstance(error, ValueError) else "failed": str(error)})
                continue
            print(f"{name}, trial {point.number}, {target}: {report.checked}", flush=True)
            row |= {
                "difference": report.max_logit_difference,
                "checked": report.checked,
                "bytes": report.bytes,
            }
            if report.conversion is not None:
                row["least_energy_kept"] = min(report.conversion.energy_kept.values())
                row["metric"] = front.metric.name
                for state in ("trained", "as_lora"):
                    row[state] = getattr(report.conversion, state)[front.metric.name]
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Return a row a front and target."""
    shown = Table(
        "front", "target", "written", "refused", "failed", "largest difference", "least energy kept",
        "metric, trained → LoRA",
    )  # fmt: skip
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["front"], row["target"]].append(row)
    for (front, target), group in groups.items():
        written = [row for row in group if "checked" in row]
        differences = [row["difference"] for row in written if row["difference"] is not None]
        made = [row for row in written if "as_lora" in row]
        shown.add_row(
            front,
            target,
            str(len(written)),
            *(str(sum(outcome in row for row in group)) for outcome in ("refused", "failed")),
            f"{max(differences):.1e}" if differences else "–",
            f"{min(row['least_energy_kept'] for row in made):.3f}" if made else "–",
            ", ".join(f"{row['trained']:.3f} → {row['as_lora']:.3f}" for row in made) or "–",
        )
    return shown


def main() -> None:
    """Export the fronts, print the table, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("autopeft_runs"))
    arguments = parser.parse_args()
    rows = []
    for config in arguments.configs:
        search = load_config(config, ["tracking=null", f"folder={arguments.folder}"]).search
        rows += exported(config.stem, search)
    Console(width=140).print(table(rows))
    result = {
        "command": "python -m benchmarks.export_targets " + " ".join(map(str, arguments.configs)),
        "machine": this_machine(),
        "torch": torch.__version__,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
