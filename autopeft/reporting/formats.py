"""Trials as text, and figures as pages of their own."""

from __future__ import annotations

import html
import itertools
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def methods_label(configuration: Configuration, values: Mapping[str, float] | None = None) -> str:
    """Return the methods of a configuration, as in "lora+prefix"; its values tell of a trained head."""
    alone = "head alone" if (values or {}).get("trainable_parameters") else "no adapter"
    how = "" if configuration.allocation is None else f" by {configuration.allocation}"
    return ("+".join(configuration.methods) or alone) + how


def outcome_line(record: TrialRecord, objectives: Sequence[Objective]) -> str:
    """Return a trial's objectives and time, as in "accuracy 0.8312 ± 0.0104, 9.2 s in 3 trainings"."""
    evaluation, trainings = record.evaluation, record.evaluation.trainings
    known = [objective for objective in objectives if objective.name in evaluation.values]
    values = [f"{objective.name} {evaluation.format(objective)}" for objective in known]
    time = f"{evaluation.cost.wall_seconds:.1f} s" + (f" in {trainings} trainings" if trainings > 1 else "")
    return ", ".join([*values, time])


def how_to_load(number: int, search: str, backbone: str) -> tuple[str, str]:
    """Return the command that exports a trial of a search, and the Python that loads what it wrote.

    The backbone's name is its hub name, or that of its folder.
    """
    folder = f"adapters/{number}"
    shell = f"autopeft export {number} --search {shlex.quote(search)} --to {folder}"
    # Only some old names on the hub have no owner; what is known of a folder is its name.
    base = repr(backbone)
    if "/" not in backbone:
        base = f"{'path/to/' + backbone!r}  # or its name on the hub"
    python = f"import autopeft\n\nbase = {base}\nmodel = autopeft.load_adapter(base, {folder!r})"
    return shell, python


def html_page(*parts: Figure | str, title: str, style: str = "") -> str:
    """Return plotly figures and HTML, one below the other, as a page with nothing from the network.

    It takes about 5 MB, for plotly. Halves of characters, which names of folders may hold, are written out.
    """
    from plotly.offline import get_plotlyjs  # takes long to import, and is often not needed

    options: dict[str, Any] = {"include_plotlyjs": False, "full_html": False, "config": {"responsive": True}}
    names = (f"figure-{number}" for number in itertools.count())  # else they are random
    body = [part if isinstance(part, str) else part.to_html(**options, div_id=next(names)) for part in parts]
    head = f'<meta charset="utf-8"/><title>{html.escape(title)}</title><style>{style}</style>'
    top = f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n<script>{get_plotlyjs()}</script>'
    page = "\n".join([top, *body, "</body>\n</html>\n"])
    return page.encode("utf-8", "backslashreplace").decode("utf-8")
