"""Python in README and documentation is run, page by page, in a process of its own.

A page's blocks are run as they stand, but for the names of models of the hub, which nothing asks here, and of
data, in whose place there are tiny ones, and for the budget. The site runs the blocks with exec="on" itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas
import pytest

from autopeft.tasks import Seq2Seq, SpeechRecognition
from tests.learnable import learnable_rows, save_tiny_model
from tests.quantized import save_base
from tests.task_cases import dictated_rows
from tests.test_docs import PAGES, ROOT, blocks
from tests.tiny_models import tiny_chat_tokenizer, tiny_headed
from tests.tiny_processors import tiny_processor

AS_RUN: Mapping[str, str] = {
    '"FacebookAI/roberta-base"': '"classifier"',
    r'"HuggingFaceTB/SmolLM2-135M-Instruct"': '"language"',
    '"meta-llama/Llama-3.1-8B-Instruct"': '"language"',
    '"google-t5/t5-small"': '"translator"',
    '"openai/whisper-small"': '"listener"',
    '"glue", subset="rte"': '"reviews.csv"',
    r"num_labels=\d": "num_labels=3",
    r"run\((trials|hours)=\d+\)": "run(trials=3, progress=False)",
    "resample=True": "resample=True, new_tokens=8",
    r"register\(17,": "register(front.knee().number,",
}
"""What of a block is put for what it shows."""
_TASK = """
import autopeft
task = autopeft.tasks.TextClassification("reviews.csv", text="review", label="stars")
"""
BEFORE: Mapping[str, str] = {
    "README.md": "",
    "docs/start.md": "",
    "docs/how-it-works/scores.md": f"""{_TASK}
search = autopeft.Search("classifier", task, halving=None, seeds=1)
search.run(trials=14, progress=False)
""",
    "docs/how-to/language-models.md": 'model = "language"',
    "docs/how-to/own-method.md": "",
    "docs/how-to/own-task.md": "",
    "docs/how-to/own-tracker.md": f'{_TASK}model = "classifier"',
    "docs/how-to/read-and-export.md": f"""{_TASK}
space = autopeft.search_spaces.Uniform(sizes={{"rank": (1, 4)}})
search = autopeft.Search("classifier", task, space, baselines=False)
front = search.run(trials=4, progress=False)
""",
    "docs/how-to/search-your-model.md": "",
    "docs/how-to/transfer.md": f"""{_TASK}
earlier = autopeft.Search("classifier", task, name="questions", seeds=1).run(trials=4, progress=False)
max(earlier, key=lambda point: len(point.configuration)).export("adapters/spam")
""",
}
"""The pages that are run, and what their blocks take to be there."""
NOT_RUN = {
    "docs/how-to/cluster.md": "takes two GPUs; tests/evaluation/test_ray_executor.py has workers without one"
}
MODULES = {"own-method.md": "propulsion", "own-task.md": "my_tasks", "own-tracker.md": "json_lines"}
"""The file that a page's first block is."""


def test_every_page_with_python_is_run_or_says_why_not() -> None:
    with_python = {str(page.relative_to(ROOT)) for page in PAGES if blocks(page, "python")}
    assert with_python == {*BEFORE, *NOT_RUN}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models and data that pages name."""
    place = tmp_path_factory.mktemp("pages")
    save_tiny_model(place / "classifier")
    save_base(place / "language")
    summed_up, heard = Seq2Seq("news.jsonl").head, SpeechRecognition("calls.csv").head
    tiny_headed(summed_up, "t5").save_pretrained(place / "translator")
    tiny_chat_tokenizer().save_pretrained(place / "translator")
    tiny_headed(heard, "whisper").save_pretrained(place / "listener")
    tiny_processor(heard).save_pretrained(place / "listener")
    rows = learnable_rows(90)
    texts, classes = rows["text"], rows["label"]
    columns = dict.fromkeys(("review", "sentence1", "sentence2"), texts)
    pandas.DataFrame({**columns, "stars": classes, "label": classes}).to_csv(place / "reviews.csv")
    replies = [{"prompt": text, "completion": f" w{row % 3}"} for row, text in enumerate(texts)]
    pairs = [{"prompt": text, "chosen": " w1", "rejected": " w2"} for text in texts]
    news = [{"article": text, "summary": text.split()[0]} for text in texts]
    for name, made in {"chat": replies, "e2e": replies, "pairs": pairs, "news": news}.items():
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)))
    (place / "pairs").mkdir()
    for split in ("train", "validation", "test"):
        whole = [{"chosen": f"{text} w1", "rejected": f"{text} w2"} for text in texts[:40]]
        (place / "pairs" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, whole)))
    spoken = dictated_rows(30, seed=0)
    for row, recording in enumerate(spoken["audio"]):
        (place / f"{row}.wav").write_bytes(recording["bytes"])
    files = [str(place / f"{row}.wav") for row in range(30)]
    pandas.DataFrame({"file": files, "transcript": spoken["text"]}).to_csv(place / "calls.csv")
    return place


def script_of(page: str, place: Path) -> str:
    """Return a page's blocks as one script; a search that a block makes and does not run is validated."""
    return "\n".join([BEFORE[page], *_parts(page, place)])


def _parts(page: str, place: Path) -> Iterator[str]:
    for number, block in enumerate(blocks(ROOT / page, "python")):
        for shown, run in AS_RUN.items():
            block = re.sub(shown, run, block)
        module = MODULES.get(Path(page).name)
        if number == 0 and module is not None:
            (place / f"{module}.py").write_text(block)
            yield f"from {module} import *"
        else:
            yield block
            if re.search(r"^search = ", block, re.MULTILINE) and ".run(" not in block:
                yield "search.validate()"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", BEFORE)
def test_python_on_a_page_runs(page: str, place: Path, tmp_path: Path) -> None:
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "script.py").write_text(script_of(page, tmp_path))
    modules = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": modules, "AUTOPEFT_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
