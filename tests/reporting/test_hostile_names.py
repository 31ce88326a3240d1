"""Names and labels, which a stranger's data may bring, cannot write HTML or Markdown into what is shown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pandas
import pytest

from autopeft.core.adapter import Site
from autopeft.core.objectives import Objective, resolve_objectives
from autopeft.core.pareto import Axis
from autopeft.core.tables import as_text, markdown_block, markdown_text, titled_table
from autopeft.reporting.console import SearchProgress
from autopeft.reporting.formats import html_page
from autopeft.reporting.front import ParetoFront
from autopeft.reporting.front_page import curves_figure
from autopeft.reporting.front_plots import front_figure
from autopeft.reporting.layer_card import LayerCard
from autopeft.reporting.mlflow.run_content import NOTE_TAG, VERDICT_TAG, front_markdown
from autopeft.reporting.mlflow.store import note_verdict
from autopeft.reporting.score_validation import ScoreCheck
from autopeft.reporting.sensitivity_report import SensitivityReport
from autopeft.sensitivity import SiteScores
from tests.records import front_of, synthetic_records
from tests.reporting.test_tracker import make, parent_run

HOSTILE = "</script><img src=x onerror=alert(1)>"
ENDS = ("", "_low", "_high")
OBJECTIVES = resolve_objectives((HOSTILE, "trainable_parameters"), (Objective.score(HOSTILE),))
RECORDS = [
    replace(
        record,
        baseline=HOSTILE,
        evaluation=replace(
            record.evaluation,
            status="complete",
            values={HOSTILE: 0.1 * record.number, "trainable_parameters": float(record.number)},
        ),
    )
    for record in synthetic_records(4)
]


def test_a_page_of_the_front_holds_them_as_text() -> None:
    figure = front_figure(RECORDS, front_of(RECORDS, OBJECTIVES), OBJECTIVES)
    texts = [figure.layout.yaxis.title.text, *(trace.name or "" for trace in figure.data)]
    texts += [text for trace in figure.data for text in trace.text or ()]
    assert_is_text(html_page(figure, title=HOSTILE), texts)


def test_a_report_holds_them_as_text() -> None:
    axes = [Axis(objective=OBJECTIVES[0], worst=0.0, best=1.0)]
    names = {"verdict": HOSTILE, "search": f"\udcff{HOSTILE}", "backbone": f"\udcff{HOSTILE}"}
    figure = curves_figure(RECORDS, OBJECTIVES[0])
    page = ParetoFront(RECORDS, OBJECTIVES, axes, None, **names).to_html()
    assert_is_text(page, [figure.layout.yaxis.title.text, *(trace.name for trace in figure.data)])
    assert page.count("&lt;img src=x") > len(names)
    assert page.encode(), "no half of a character, which a name of a folder may hold"


def test_a_page_of_scores_holds_them_as_text() -> None:
    scores = SiteScores(name=HOSTILE, values={Site(0, "query"): 1.0, Site(1, "query"): 0.5})
    report = SensitivityReport(scores={HOSTILE: scores}, batches=1)
    figure = report.plot()
    texts = [figure.layout.annotations[0].text, figure.data[0].hovertemplate]
    assert_is_text(html_page(figure, title=HOSTILE), texts)


def test_a_page_of_the_check_of_scores_holds_them_as_text() -> None:
    numbers = {f"{name}{end}": [0.1] for name in ("spearman", "partial", "kendall") for end in ENDS}
    frame = pandas.DataFrame({"score": [HOSTILE], "control": [False], **numbers})
    figure = ScoreCheck(metric=HOSTILE, trials=10, frame=frame).plot()
    assert_is_text(html_page(figure, title=HOSTILE), [figure.layout.title.text, *figure.data[0].y])


def test_the_layer_card_holds_them_as_text() -> None:
    site = {"site": "0.query", "trials": 1, "credit": 0.5}
    card = LayerCard(backbone=HOSTILE, trials=1, frame=pandas.DataFrame([site]))
    assert "<img" not in card.picture()


def assert_is_text(page: str, texts: Iterable[str]) -> None:
    """No tag stands in a page, nor in what plotly would read as one in a text."""
    assert "<img" not in page
    assert page.count("</script>") == page.count("<script")
    for text in texts:
        assert not re.search(r"<(?!/?b>|br>|/?extra>)", text), text


def test_a_notebook_shows_them_as_text() -> None:
    axes = [Axis(objective=OBJECTIVES[0], worst=0.0, best=1.0)]
    front = ParetoFront(RECORDS, OBJECTIVES, axes)
    for page in (front[0]._repr_html_(), front._repr_html_()):
        assert "<img" not in page


def test_a_terminal_shows_them_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    table = titled_table("acc[/b]", ["[link=file:///etc]x", "[bold]y"], words=())
    SearchProgress().show(table)
    for shown in (as_text(table), capsys.readouterr().out):
        assert all(text in shown for text in ("acc[/b]", "[link=file:///etc]x", "[bold]y"))


def test_the_note_holds_them_as_text() -> None:
    table = front_markdown(RECORDS, front_of(RECORDS, OBJECTIVES), OBJECTIVES)
    assert "<img" not in table.replace(r"\<", "")
    assert {line.count("|") for line in table.splitlines()[2:]} == {5}


@pytest.mark.parametrize("text", ["a\n# b", "x | y", "[a](javascript:b)", "`code`", "<b>"])
def test_markdown_shows_a_text_as_it_is(text: str) -> None:
    shown = markdown_text(text)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)[`\[\]<>|]", shown)
    assert re.sub(r"\\(.)", r"\1", shown) == " ".join(text.split())


@pytest.mark.parametrize("text", ["plain", "```\n# b\n```", "````\n<b>"])
def test_no_line_of_a_block_ends_it(text: str) -> None:
    first, *lines, last = markdown_block(text).splitlines()
    assert first == last
    assert "\n".join(lines) == text
    assert first not in text


@pytest.mark.slow
def test_a_search_with_quotes_in_its_name_is_found_by_its_study(tmp_path: Path) -> None:
    uri, name = f"sqlite:///{tmp_path / 'mlflow.db'}", 'it\'s "one"'
    tracker = make(uri, name, study_id="0123")
    tracker.start(note="what", identity={}, records=())
    tracker.finish("FINISHED")
    before = parent_run(uri, name).data.tags[NOTE_TAG]
    for verdict in ("better", "*no* better"):
        note_verdict(uri, "autopeft", "0123", verdict, page=f"<p>{verdict}</p>")
        tags = parent_run(uri, name).data.tags
        assert tags[VERDICT_TAG] == verdict
        assert tags[NOTE_TAG] == f"{before}\n\n**Verdict**: {markdown_text(verdict)}"
