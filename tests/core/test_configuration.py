from __future__ import annotations

import copy
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.core.adapter import parse_sites
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import KIND_OF_ROLE, METHOD_SPECS, ROLES
from tests.strategies import adapters, configurations

ROOT = Path(__file__).parents[2]


class TestSite:
    def test_reads_what_it_writes(self) -> None:
        for role in ROLES:
            assert Site.parse(str(Site(3, role))) == Site(3, role)
        assert str(Site(12, "query")) == "12.query"

    def test_orders_by_block_then_role(self) -> None:
        shuffled = [Site(1, "query"), Site(0, "ffn"), Site(10, "query"), Site(0, "query")]
        assert [str(site) for site in sorted(shuffled)] == ["0.query", "0.ffn", "1.query", "10.query"]

    def test_ranges_include_both_ends(self) -> None:
        assert [str(site) for site in parse_sites("2-4.ffn_down")] == [
            "2.ffn_down",
            "3.ffn_down",
            "4.ffn_down",
        ]
        assert parse_sites(" 7-7.key ") == (Site(7, "key"),)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("query", "'block.role'"),
            ("3", "'block.role'"),
            ("-1.query", "'block.role'"),
            ("3.query.weight", "did you mean 'query'"),
            ("5-2.query", "backwards: 5 > 2"),
            ("0-999999999.attention", "expected blocks from 0 to 4095"),
            ("0-99999999999.attention", "'block.role'"),
            ("0.quary", "did you mean 'query'"),
        ],
    )
    def test_refuses_what_it_cannot_read(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse_sites(text)

    def test_one_site_is_no_range(self) -> None:
        with pytest.raises(ValueError, match="Expected one site"):
            Site.parse("0-1.query")

    def test_refuses_negative_blocks_and_unknown_roles(self) -> None:
        with pytest.raises(ValueError, match="counts from 0, got -1"):
            Site(-1, "query")
        with pytest.raises(ValueError, match="did you mean 'value'"):
            Site(0, "valeu")


class TestAdapter:
    def test_default_options_are_dropped(self) -> None:
        spelled_out = Adapter("lora", 8, {"alpha": 8, "rslora": True, "dropout": 0})
        assert spelled_out == Adapter("lora", 8)
        assert hash(spelled_out) == hash(Adapter("lora", 8))
        assert spelled_out.options == ()

    def test_options_have_one_order_and_one_type(self) -> None:
        adapter = Adapter("lora", 8, {"dropout": 0.1, "alpha": 16.0})
        other = Adapter("lora", 8, {"alpha": 16, "dropout": 0.1})
        assert adapter == other
        assert adapter.to_dict() == {"method": "lora", "size": 8, "alpha": 16, "dropout": 0.1}
        assert type(adapter.option("alpha")) is int
        assert type(Adapter("parallel", 2, {"scaling": 2}).option("scaling")) is float

    def test_an_option_left_out_has_its_default(self) -> None:
        assert Adapter("parallel", 4).option("scaling") == 4.0
        assert Adapter("parallel", 4, {"scaling": 1.5}).option("scaling") == 1.5

    def test_text(self) -> None:
        assert str(Adapter("ia3")) == "ia3()"
        assert str(Adapter("lora", 8, {"alpha": 16})) == "lora(8, alpha=16)"

    def test_rank_is_taken_for_size(self) -> None:
        assert Adapter.from_dict({"method": "lora", "rank": 8}) == Adapter("lora", 8)

    @given(adapters())
    def test_plain_data_reads_back(self, adapter: Adapter) -> None:
        assert Adapter.from_dict(json.loads(json.dumps(adapter.to_dict()))) == adapter

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({"method": "lara", "size": 8}, "did you mean 'lora'"),
            ({"size": 8}, "needs a 'method'"),
            ({"method": "lora", "size": 8, "rank": 8}, "not both"),
            ({"method": "lora"}, "needs a rank of at least 1 .a whole number., got None"),
            ({"method": "lora", "size": 0}, "got 0; leave the site out"),
            ({"method": "series", "size": -2}, "bottleneck width of at least 1 .a whole number., got -2"),
            ({"method": "prefix", "size": 2.0}, "a whole number., got 2.0"),
            ({"method": "lora", "size": True}, "a whole number., got True"),
            ({"method": "lora", "size": "8"}, "a whole number., got '8'"),
            ({"method": "ia3", "size": 4}, "'ia3' has no size"),
            ({"method": "lora", "size": 8, "alfa": 8}, "did you mean 'alpha'"),
            ({"method": "lora", "size": 8, "alpha": 0}, "must be above 0"),
            ({"method": "lora", "size": 8, "alpha": 1.5}, "a whole number, got 1.5"),
            ({"method": "lora", "size": 8, "alpha": "16"}, "a finite number, got '16'"),
            ({"method": "lora", "size": 8, "alpha": True}, "a finite number, got True"),
            ({"method": "lora", "size": 8, "alpha": float("nan")}, "a finite number"),
            ({"method": "lora", "size": 8, "rslora": 1}, "is a bool, got 1"),
            ({"method": "lora", "size": 8, "dropout": 1.0}, r"probability in \[0, 1\)"),
            ({"method": "lora", "size": 8, "dropout": -0.1}, r"probability in \[0, 1\)"),
            ({"method": "series", "size": 8, "activation": "rely"}, "did you mean 'relu'"),
            ({"method": "parallel", "size": 8, "scaling": 0.0}, "must be above 0"),
            ({"method": "prefix", "size": 8, "initial_std": float("inf")}, "a finite number"),
        ],
    )
    def test_refuses(self, data: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Adapter.from_dict(data)


class TestCanonicalForm:
    def test_equal_however_written(self) -> None:
        configuration = Configuration(
            {
                Site(1, "query"): Adapter("lora", 8, {"alpha": 8}),
                Site(0, "ffn"): [Adapter("parallel", 4), Adapter("series", 2)],
                Site(0, "key"): [],
            }
        )
        other = Configuration(
            {
                Site(0, "ffn"): (Adapter("series", 2), Adapter("parallel", 4)),
                Site(1, "query"): [Adapter("lora", 8)],
            }
        )
        assert configuration == other
        assert hash(configuration) == hash(other)
        assert configuration.key == other.key
        assert list(configuration.adapters) == [Site(0, "ffn"), Site(1, "query")]

    @pytest.mark.parametrize(
        "changed",
        [
            Configuration({Site(0, "query"): Adapter("lora", 4)}),
            Configuration({Site(1, "query"): Adapter("lora", 8)}),
            Configuration({Site(0, "key"): Adapter("lora", 8)}),
            Configuration({Site(0, "query"): Adapter("lora", 8, {"rslora": False})}),
            Configuration({Site(0, "query"): Adapter("lora", 8)}, learning_rate=2e-3),
            Configuration({Site(0, "query"): Adapter("lora", 8)}, weight_decay=0.1),
            Configuration({Site(0, "query"): Adapter("lora", 8)}, allocation="sora"),
            Configuration(),
        ],
    )
    def test_every_difference_counts(self, changed: Configuration) -> None:
        assert changed != Configuration({Site(0, "query"): Adapter("lora", 8)})

    def test_is_no_other_type(self) -> None:
        assert Configuration() != Configuration().to_dict()

    def test_key_never_changes(self) -> None:
        """Studies, runs and exports name configurations by it, over processes and releases."""
        configuration = Configuration(
            {Site(0, "query"): Adapter("lora", 8, {"alpha": 16}), Site(1, "key"): Adapter("ia3")},
            learning_rate=3e-4,
        )
        assert configuration.key == "0861a8a3124a196caf7322634bca8a0d8aaecbd5da2e9601088d0b8e5f2905e4"

    def test_cannot_be_changed(self) -> None:
        configuration = Configuration({Site(0, "query"): Adapter("lora", 8)})
        changes: Any = configuration.adapters
        with pytest.raises(TypeError, match="immutable"):
            changes[Site(1, "query")] = (Adapter("lora", 8),)
        with pytest.raises(TypeError, match="immutable"):
            del changes[Site(0, "query")]
        with pytest.raises(TypeError, match="immutable"):
            changes.clear()
        with pytest.raises(AttributeError):
            configuration.learning_rate = 1.0  # type: ignore[misc]
        assert len(configuration) == 1

    def test_replace_changes_a_copy(self) -> None:
        configuration = Configuration({Site(0, "query"): Adapter("lora", 8)}, weight_decay=0.1)
        faster = configuration.replace(learning_rate=1e-2)
        assert (faster.learning_rate, faster.weight_decay) == (1e-2, 0.1)
        assert faster.adapters == configuration.adapters
        assert configuration.learning_rate == 1e-3
        assert configuration.replace(adapters={}) == Configuration(weight_decay=0.1)

    @given(configurations())
    def test_copies_and_pickles_are_equal(self, configuration: Configuration) -> None:
        assert copy.deepcopy(configuration) == configuration
        # Data loader workers and process pools pickle; files never hold pickles.
        again = pickle.loads(pickle.dumps(configuration))
        assert again == configuration
        with pytest.raises(TypeError, match="immutable"):
            again.adapters.clear()

    def test_a_pickled_one_is_found_in_a_process_with_other_hashes(self) -> None:
        configuration = Configuration({Site(0, "query"): Adapter("lora", 8)})
        hash(configuration)
        code = (
            "import pickle, sys; one = pickle.load(sys.stdin.buffer); "
            "assert one in {type(one).from_dict(one.to_dict())}"
        )
        environment = os.environ | {"PYTHONHASHSEED": "1"}
        given = pickle.dumps(configuration)
        subprocess.run([sys.executable, "-c", code], input=given, env=environment, cwd=ROOT, check=True)


class TestReading:
    @given(configurations())
    def test_yaml_and_json_read_back(self, configuration: Configuration) -> None:
        assert Configuration.from_yaml(configuration.to_yaml()) == configuration
        text = json.dumps(configuration.to_dict())
        assert Configuration.from_dict(json.loads(text)) == configuration

    @pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
    def test_files_read_back(self, suffix: str, tmp_path: Path) -> None:
        configuration = Configuration(
            {Site(0, "query"): Adapter("lora", 8), Site(3, "attention"): Adapter("prefix", 5)},
            learning_rate=1e-5,
        )
        path = tmp_path / f"configuration{suffix}"
        configuration.save(path)
        assert Configuration.load(path) == configuration

    def test_refuses_other_files(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"Unknown configuration suffix '.yamll'.*'.yaml'\?"):
            Configuration().save(tmp_path / "configuration.yamll")

    def test_reads_ranges_and_single_adapters(self) -> None:
        text = """
        learning_rate: 0.002
        sites:
          0-2.query: {method: lora, rank: 4}
          2.ffn: [{method: series, size: 2}, {method: parallel, size: 3}]
        """
        configuration = Configuration.from_yaml(text)
        assert configuration.learning_rate == 0.002
        assert [str(site) for site, _ in configuration] == [
            "0.query",
            "1.query",
            "2.query",
            "2.ffn",
            "2.ffn",
        ]

    def test_an_empty_configuration_trains_the_head_alone(self) -> None:
        assert Configuration.from_dict({}) == Configuration()
        assert Configuration.from_yaml("sites:") == Configuration()
        assert not Configuration().methods
        assert Configuration().lowest_block is None

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("learningrate: 0.1", "did you mean 'learning_rate'"),
            ("- a list", "A configuration is a mapping, got list"),
            ("", "A configuration is a mapping, got NoneType"),
            ("learning_rate: 0", "learning_rate must be .*above 0"),
            ("learning_rate: .nan", "learning_rate must be a finite number .*, got nan"),
            ("learning_rate: fast", "learning_rate must be a finite number .*, got 'fast'.$"),
            # YAML 1.1 reads this as text.
            ("learning_rate: 1e-3", "write 0.001"),
            ("learning_rate: true", "learning_rate must be a finite number .*, got True"),
            ("weight_decay: -0.1", "weight_decay must be .*at least 0"),
            ("weight_decay: .inf", "weight_decay must be a finite number .*, got inf"),
            ("sites: [0.query]", "sites is a mapping"),
            ("sites: {0.query: lora}", "0.query.*expected an adapter"),
            ("sites: {0.query: }", "0.query.*expected an adapter"),
            ("sites: {0.query: [lora]}", "0.query.*expected an adapter"),
            ("sites: {0: {method: ia3}}", "Cannot read the site '0'"),
            ("sites: {0.query: {method: ia3}, 0-1.query: {method: ia3}}", "0.query is named twice"),
            ("sites: {0.query: [{method: ia3}, {method: ia3}]}", "a method twice: ia3, ia3"),
            ("sites: {0.query: [{method: ia3}, {method: lora, size: 2}]}", "take the same place"),
            ("sites: {0.ffn_norm: [{method: bitfit}, {method: layernorm}]}", "take the same place"),
            ("sites: {0.ffn: {method: lora, size: 2}}", r"on 0.ffn \(a ffn site\).*query"),
            ("sites: {0.ffn: {method: prefix, size: 2}}", "takes the roles attention"),
            ("sites: {0.query: {method: layernorm}}", "takes the roles attention_norm"),
        ],
    )
    def test_refuses(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Configuration.from_yaml(text)

    def test_yaml_is_data_alone(self) -> None:
        with pytest.raises(ValueError, match="not valid YAML"):
            Configuration.from_yaml("!!python/object/apply:os.getcwd []")


class TestPictures:
    before = Configuration(
        {
            Site(0, "query"): Adapter("lora", 8),
            Site(1, "query"): Adapter("lora", 8),
            Site(1, "ffn"): Adapter("series", 4),
        }
    )

    def test_representation(self) -> None:
        text = repr(self.before)
        assert text.startswith("Configuration(lora, series; 3 adapters; learning_rate=0.001; ")
        assert self.before.key[:8] in text
        assert "head only" in repr(Configuration())
        html = self.before._repr_html_()
        assert self.before.grid() in html

    def test_what_it_consists_of(self) -> None:
        assert self.before.methods == ("lora", "series")
        assert self.before.lowest_block == ("", 0)
        assert len(self.before) == 3
        assert self.before.cells()[("", 1), "ffn"] == "S4"


@given(st.data())
def test_methods_sit_where_their_specification_says(data: st.DataObject) -> None:
    adapter = data.draw(adapters())
    role = data.draw(st.sampled_from(ROLES))
    fits = KIND_OF_ROLE[role] in METHOD_SPECS[adapter.method].kinds
    if fits:
        assert Configuration({Site(0, role): adapter}).adapters == {Site(0, role): (adapter,)}
    else:
        with pytest.raises(ValueError, match=f"'{adapter.method}' cannot sit on 0.{role}"):
            Configuration({Site(0, role): adapter})


def test_exclusions_are_mutual() -> None:
    for name, specification in METHOD_SPECS.items():
        for rival in specification.excludes:
            assert name in METHOD_SPECS[rival].excludes


def test_order_of_writing_does_not_matter() -> None:
    sites = [Site(block, role) for block in range(3) for role in ("query", "value", "ffn_up")]
    shuffled = random.Random(0).sample(sites, len(sites))
    ordered, other = (
        Configuration({site: Adapter("lora", site.block + 1) for site in order})
        for order in (sites, shuffled)
    )
    assert ordered.to_yaml() == other.to_yaml()
