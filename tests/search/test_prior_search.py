"""Searches that begin from earlier ones: what is read from disk, tried, kept, shown and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest

from autopeft import Search
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.reporting.tracker import Tracker
from autopeft.search_prior import PRIOR_FILE, earlier_fronts
from autopeft.search_spaces import PerLayer, ScoreGuided
from autopeft.yaml_config import build_config
from tests.exports import export
from tests.learnable import learner, outcomes, tiny_search
from tests.tiny_models import tiny_backbone

SPACE = PerLayer(
    methods=("lora",), sizes={"rank": (1, 8)}, roles=("query", "value"), learning_rate=(1e-3, 3e-2)
)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Search:
    """A search on two blocks."""
    objectives = ("accuracy", "trainable_parameters", "peak_memory")
    folder = tmp_path_factory.mktemp("earlier")
    search = tiny_search(folder, space=SPACE, objectives=objectives, name="shallow")
    search.run(trials=6, progress=False)
    return search


def deeper(folder: Path, **settings: Any) -> Search:
    """Return a search on four blocks."""
    defaults = {"backbone": learner(num_hidden_layers=4), "space": SPACE, "sampler": "ehvi"}
    return tiny_search(folder, **(defaults | settings))


class Reports(Tracker):
    """Keeps the sites of the reports that a search logs."""

    seen: ClassVar[dict[str, list[str]]] = {}

    def __init__(self, **_: Any) -> None:
        pass

    def log_report(self, save: Callable[[Path], object], place: str) -> None:
        with TemporaryDirectory() as folder:
            save(Path(folder))
            rows = json.loads(Path(folder, "layers.json").read_text())
        self.seen[place] = [row["site"] for row in rows]


def exported(folder: Path, *configurations: Configuration) -> Path:
    for number, configuration in enumerate(configurations):
        export(tiny_backbone("bert"), configuration, folder / f"point-{number}", fresh=False)
    return folder


def test_a_front_is_read_from_disk_as_the_search_has_it(earlier: Search, tmp_path: Path) -> None:
    (read,) = earlier_fronts([earlier.folder], tmp_path)
    front = earlier.front()
    points = [point for point in front if point.configuration.adapters]
    assert [member.name for member in read.members] == [f"trial {point.number}" for point in points]
    assert [member.configuration for member in read.members] == [point.configuration for point in points]
    assert (read.name, read.depths) == ("shallow", {"": 2})
    assert (read.hidden_size, read.steps) == (32, 6), "48 rows of one epoch in batches of 8"
    tried = [record.evaluation.configuration.adapters for record in front.records]
    assert read.tried == {site for adapters in tried for site in adapters}
    assert sum(front.shares()) == pytest.approx(1)
    assert [member.worth for member in read.members] == [
        share for share, point in zip(front.shares(), front, strict=True) if point.configuration.adapters
    ]


def test_a_search_begins_from_an_earlier_one_and_goes_on_without_it(earlier: Search, tmp_path: Path) -> None:
    source = shutil.copytree(earlier.folder, tmp_path / "runs" / "shallow")
    search = deeper(tmp_path, prior=source, tracking=Reports)
    prior = search.open().prior
    assert "prior shallow: " in search.describe()
    assert search.identity()["search"]["prior"] == "runs/shallow"
    front = search.run(trials=4, progress=False)
    head, smallest, *_ = SPACE.baselines(search.open().backbone)
    names = [record.baseline for record in front.records]
    assert names[:3] == [head.name, smallest.name, prior.baselines[0].name]
    assert prior.baselines[0].name.endswith(" of shallow")
    assert Reports.seen == {"layers": search.layer_card().to_frame()["site"].tolist()}
    assert front.trial(2).configuration == prior.baselines[0].configuration
    other = deeper(tmp_path / "other", prior=[source]).run(trials=4, progress=False)
    assert outcomes(other.records) == outcomes(front.records)

    shutil.rmtree(source)
    again = deeper(tmp_path, prior=source)
    assert again.open().prior == prior, "what was read is kept"
    assert outcomes(again.run(trials=5, progress=False).records)[:4] == outcomes(front.records)
    (tmp_path / "tiny" / PRIOR_FILE).unlink()
    with pytest.raises(ValueError, match="There is nothing for the prior in"):
        deeper(tmp_path, prior=source).open()


def test_scores_are_weighted_by_what_earlier_searches_tell(tmp_path: Path) -> None:
    upper, lower = ({Site(block, "query"): Adapter("lora", 2)} for block in (1, 0))
    adapters = exported(tmp_path / "adapters", Configuration(upper), Configuration(upper | lower))
    space = deeper(tmp_path, space=ScoreGuided(scores=("uniform",)), prior=adapters).open().space
    assert isinstance(space, ScoreGuided)
    values = space.scores_of("uniform").values
    assert [values[Site(block, "query")] for block in range(4)] == [0.75, 0.75, 1.25, 1.25]
    assert {values[Site(block, "key")] for block in range(4)} == {1.0}


def test_exported_adapters_are_a_front(tmp_path: Path) -> None:
    points = [Configuration({Site(1, "query"): Adapter("lora", size)}, learning_rate=1e-2) for size in (1, 4)]
    folder = exported(tmp_path / "adapters", *points)
    (front,) = earlier_fronts([folder], tmp_path)
    assert [(member.name, member.configuration) for member in front.members] == [
        ("point-0", points[0]),
        ("point-1", points[1]),
    ]
    assert (front.depths, front.hidden_size, front.steps) == ({"": 2}, 32, None)
    (single,) = earlier_fronts([str(folder / "point-1")], tmp_path)
    assert single.members[0].configuration == points[1]
    manifest = folder / "point-0" / "autopeft.json"
    kept = json.loads(manifest.read_text())
    assert kept.pop("blocks") == {"": 2}
    manifest.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"(?s)is damaged: .*blocks.* Export it again"):
        earlier_fronts([folder], tmp_path)
    manifest.write_text(json.dumps(kept | {"blocks": {}}))
    with pytest.raises(ValueError, match="does not say how many blocks its base has"):
        earlier_fronts([folder], tmp_path)
    manifest.write_text(json.dumps(kept | {"blocks": {"": 3}}))
    with pytest.raises(ValueError, match="of bases of unlike depth"):
        earlier_fronts([folder], tmp_path)


def test_what_is_no_search_is_refused_with_the_nearest(earlier: Search, tmp_path: Path) -> None:
    root = earlier.folder.parent
    with pytest.raises(
        ValueError, match=rf"expected the folder of a search .* Did you mean {root}/shallow\?"
    ):
        deeper(tmp_path, prior=root / "shalow").validate()
    with pytest.raises(ValueError, match=r"It holds the searches shallow: name one\."):
        earlier_fronts([root], tmp_path)
    alone = tiny_search(tmp_path, space=SPACE, name="alone")
    alone.run(trials=1, progress=False)
    with pytest.raises(ValueError, match=r"has no adapters \(1 trials\): run it on"):
        earlier_fronts([alone.folder], tmp_path)
    elsewhere = PerLayer(methods=("series",), roles=("ffn",))
    with pytest.raises(
        ValueError, match=r"\(shallow\) can be placed on tiny-bert: it has lora on .*; the space"
    ):
        deeper(tmp_path, space=elsewhere, prior=earlier.folder).validate()


def test_yaml_names_folders(tmp_path: Path) -> None:
    task = {"type": "TextClassification", "dataset": "data.csv"}
    for given, expected in (("runs/a", ("runs/a",)), (["runs/a", "adapters"], ("runs/a", "adapters"))):
        assert build_config({"backbone": "model", "task": task, "prior": given}).search.prior == expected
    with pytest.raises(ValueError, match=r"prior should be .* got 3"):
        build_config({"backbone": "model", "task": task, "prior": 3})


def test_the_layer_card_says_what_sites_cost_and_gave(earlier: Search, tmp_path: Path) -> None:
    card, front = earlier.layer_card(), earlier.front()
    rows = card.to_frame().set_index("site")
    assert [*rows.index] == [f"{block}.{role}" for block in range(2) for role in ("query", "value")]
    assert card.trials == len(front.records)
    for name, row in rows.iterrows():
        site = Site.parse(str(name))
        having = [record for record in front.records if site in record.evaluation.configuration.adapters]
        assert row["trials"] == len(having)
        assert row["front"] == sum(record.number in front.members for record in having)
        assert (row["inputs"], row["outputs"], row["lora"]) == (32, 32, 64)
    with_adapters = sum(
        share for share, point in zip(front.shares(), front, strict=True) if point.configuration.adapters
    )
    assert rows["credit"].sum() == pytest.approx(with_adapters)
    assert rows["weight"].isna().all()
    assert "peak_memory" not in rows
    counted = earlier.layer_card(memory=True).to_frame().set_index("site")["peak_memory"]
    alone = {site: SPACE.point({Site.parse(site): Adapter("lora", 1)}) for site in rows.index}
    costs = earlier.open().evaluator.costs
    assert counted.to_dict() == {site: costs(point)["peak_memory"] for site, point in alone.items()}
    assert counted["0.value"] > counted["1.value"], "the graph is longer"
    assert "1.query" in repr(card)
    card.save(str(tmp_path))
    plain = json.loads((tmp_path / "layers.json").read_text())
    assert [row["site"] for row in plain] == [*rows.index]
    texts = set(ElementTree.parse(tmp_path / "layers.svg").getroot().itertext())
    assert {"query", "value", "block 0", "block 1"} <= texts
    assert {f"{credit:.1%}" for credit in rows["credit"]} <= texts
