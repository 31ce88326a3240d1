"""Models of several stacks of blocks: encoder and decoder, or towers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, PreTrainedModel

from autopeft.core.adapter import Adapter, Site, block_ranges, parse_sites
from autopeft.core.configuration import Configuration
from autopeft.evaluation.estimate import estimate
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.methods import attach, count_site
from autopeft.models.backbone import Backbone
from autopeft.reporting.configuration_image import configuration_svg
from autopeft.search_spaces import AutoPEFTPaper, PerLayer, ScoreGuided, Uniform
from autopeft.search_spaces.score_allocation import Allocation
from autopeft.sensitivity.computation import uniform_scores
from autopeft.tasks import Seq2Seq
from tests.tiny_models import OPTIONS, tiny_backbone, tiny_tokenizer

LORA = Adapter("lora", 4)


def encoder_decoder(architecture: str = "t5", **options: int) -> Backbone:
    config = AutoConfig.for_model(architecture, **{**OPTIONS[architecture], **options})
    model = AutoModelForSeq2SeqLM.from_config(config)
    return Backbone(model, tiny_tokenizer(), name=f"tiny-{architecture}", head=(), new_head=False)


@pytest.fixture(scope="module")
def t5() -> Backbone:
    """Two encoder and four decoder blocks."""
    return encoder_decoder(num_decoder_layers=4)


def clip() -> Backbone:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = tower | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = tower | {"image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model("clip", text_config=text, vision_config=vision, projection_dim=16)
    model = AutoModel.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return Backbone(model, None, name="tiny-clip", head=(), new_head=False)


class TestSites:
    def test_name_their_stack(self, t5: Backbone) -> None:
        assert t5.places == (
            *(("encoder", block) for block in range(2)),
            *(("decoder", block) for block in range(4)),
        )
        shape = t5.shape(Site.parse("decoder.3.query"))
        assert shape.module == "decoder.block.3.layer.0.SelfAttention.q"
        assert Site(0, "cross_query", "encoder") not in t5.sites
        assert sorted(t5.sites)[0].place == ("encoder", 0)

    def test_of_one_stack_are_written_as_ever(self) -> None:
        backbone = tiny_backbone("bert")
        assert set(backbone.stacks) == {""}
        assert {str(site) for site in backbone.sites if site.role == "query"} == {"0.query", "1.query"}

    def test_are_read_back(self) -> None:
        for text in ("3.query", "decoder.3.query", "2.mixer.in_proj", "audio_tower.0.mixer.in_proj"):
            assert str(Site.parse(text)) == text
        assert parse_sites("encoder.0-1.key") == (Site(0, "key", "encoder"), Site(1, "key", "encoder"))

    def test_come_in_the_order_in_which_models_run_them(self) -> None:
        texts = ["decoder.0.key", "encoder.1.key", "1.key", "vision.3.key", "decoder.0.query", "zoo.0.key"]
        expected = ["vision.3.key", "encoder.1.key", "decoder.0.query", "decoder.0.key", "1.key", "zoo.0.key"]
        assert list(map(str, sorted(map(Site.parse, texts)))) == expected

    def test_ranges_of_blocks(self) -> None:
        assert block_ranges([("", 7), ("", 0), ("", 1)]) == "0-1, 7"
        places = [("decoder", 0), ("encoder", 1), ("encoder", 0), ("decoder", 3)]
        assert block_ranges(places) == "encoder.0-1, decoder.0, decoder.3"

    def test_that_are_not_there_are_said(self, t5: Backbone) -> None:
        with pytest.raises(
            ValueError, match=r"no block 3 .* its 6 blocks are numbered encoder.0-1, decoder.0-3"
        ):
            t5.shape(Site(3, "query"))
        with pytest.raises(ValueError, match=r"'cross_query' in block encoder.1; it has query, key"):
            t5.shape(Site(1, "cross_query", "encoder"))
        with pytest.raises(ValueError, match=r"'qery'.*'query'"):
            Site(0, "qery", "decoder")

    def test_survive_yaml_and_json(self, t5: Backbone) -> None:
        configuration = Configuration({Site(3, "query", "decoder"): LORA, Site(0, "key", "encoder"): LORA})
        assert Configuration.from_yaml(configuration.to_yaml()) == configuration
        assert Configuration.from_dict(json.loads(json.dumps(configuration.to_dict()))) == configuration
        t5.check(configuration)


class TestBackbone:
    def test_says_its_stacks(self, t5: Backbone) -> None:
        assert "2 encoder and 4 decoder blocks" in repr(t5)
        row = next(line for line in t5.summary().splitlines() if "ffn_up" in line)
        assert "encoder.0-1" in row
        assert "without sites" not in repr(t5)

    def test_a_second_tower_is_a_stack_and_what_lies_between_is_left_out(self) -> None:
        backbone = clip()
        assert list(backbone.stacks) == ["vision", "text"]
        assert backbone.shape(Site(1, "query", "text")).module.startswith("text_model.")
        assert "2 vision and 2 text blocks" in repr(backbone)
        assert "without sites: visual_projection, text_projection" in repr(backbone)

    def test_counts_blocks_before_a_place(self, t5: Backbone) -> None:
        assert [t5.blocks_below(place) for place in (("encoder", 1), ("decoder", 0), None)] == [1, 2, 6]

    def test_gradients_flow_from_the_decoder_into_the_encoder(self, t5: Backbone) -> None:
        """An adapter in the encoder keeps the decoder's activations alive too."""
        counter, task = MemoryCounter(t5.model), Seq2Seq("unused")
        ids = torch.ones(4, 16, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
        peaks = {}
        for text in ("encoder.1.ffn_down", "decoder.0.ffn_down", "decoder.3.ffn_down"):
            with attach(t5, Configuration({Site.parse(text): LORA})) as attachment:
                peaks[text] = counter.count(batch, task)
                assert attachment.cut == t5.blocks_below(Site.parse(text).place)
                task.loss(task.forward(t5.model, batch), batch).backward()
                assert any(each.grad is not None for each in attachment.parameters.values())
        assert peaks["encoder.1.ffn_down"] > peaks["decoder.0.ffn_down"] > peaks["decoder.3.ffn_down"]


@pytest.mark.slow
def test_an_estimate_places_adapters_in_the_top_half_of_each_stack(t5: Backbone, tmp_path: Path) -> None:
    t5.model.config.save_pretrained(tmp_path)
    found = estimate(tmp_path, Seq2Seq("unused"), rank=4, methods=("lora",), batch_size=1, length=8)
    trained = {row.placement: row.trainable_parameters for row in found.rows}
    top = {("encoder", 1), ("decoder", 2), ("decoder", 3)}
    sites = [site for site, shape in t5.sites.items() if shape.kind == "linear"]
    below = sum(count_site(t5, site, LORA) for site in sites if site.place not in top)
    assert trained["everywhere"] - trained["top half"] == below
    peaks = [row.peak_memory for row in found.rows]
    assert peaks == sorted(peaks, reverse=True)


class TestPictures:
    CONFIGURATION = Configuration(
        {Site(1, "query", "encoder"): LORA, Site(0, "ffn", "decoder"): Adapter("series", 2)}
    )

    def test_of_text(self) -> None:
        assert self.CONFIGURATION.grid().splitlines()[:4] == [
            "    block  query  ffn",
            "decoder.0    ·     S2",
            "encoder.1    L4    ·",
            "encoder.0    ·     ·",
        ]

    def test_drawn(self) -> None:
        texts = set(ElementTree.fromstring(configuration_svg(self.CONFIGURATION)).itertext())
        assert {"encoder block 0", "encoder block 1", "decoder block 0", "L4", "S2"} <= texts
        assert "decoder block 1" not in texts


class TestSpaces:
    def test_the_top_half_is_of_each_stack(self, t5: Backbone) -> None:
        space = PerLayer(methods=("lora",), roles=("query",), learning_rate=1e-3)
        top = next(base for base in space.all_baselines(t5) if "top half" in base.name)
        assert set(map(str, top.configuration.adapters)) == {
            "encoder.1.query",
            "decoder.2.query",
            "decoder.3.query",
        }

    def test_groups_are_of_each_stack(self, t5: Backbone) -> None:
        space = PerLayer(methods=("lora",), roles=("query",), groups=2)
        assert list(space.groups_of_slots(t5)) == ["encoder.0", "encoder.1", "decoder.0-1", "decoder.2-3"]
        with pytest.raises(ValueError, match="groups=3, but tiny-t5 has only 2 encoder blocks"):
            PerLayer(groups=3).block_groups(t5)

    def test_guided_configurations_choose_stacks(self, t5: Backbone) -> None:
        space = ScoreGuided(scores=("uniform",), learning_rate=1e-3)
        space = space.with_scores({"uniform": uniform_scores(t5.sites)})
        drawn = [space.draw(random.Random(seed), t5) for seed in range(40)]
        found = {frozenset(site.stack for site in configuration.adapters) for configuration in drawn}
        assert found == {frozenset(["encoder"]), frozenset(["decoder"]), frozenset(["encoder", "decoder"])}
        assert "lowest block 0 to 3, in encoder, decoder or all;" in space.summary(t5)

    def test_the_lowest_block_counts_in_the_longest_stack(self, t5: Backbone) -> None:
        scores = uniform_scores(site for site, shape in t5.sites.items() if shape.kind == "linear")
        adapters = Allocation(budget=10**6, lowest_block=2).adapters(t5, scores)
        assert {site.place for site in adapters} == {("encoder", 1), ("decoder", 2), ("decoder", 3)}
        adapters = Allocation(budget=10**6, stacks=("encoder",)).adapters(t5, scores)
        assert {site.stack for site in adapters} == {"encoder"}

    @pytest.mark.parametrize(
        "space", [Uniform(), PerLayer(methods=("lora", "series")), ScoreGuided(scores=("uniform",))]
    )
    def test_hold_their_promises(self, space: Uniform | PerLayer | ScoreGuided, t5: Backbone) -> None:
        space = space.with_scores({"uniform": uniform_scores(t5.sites)}).with_learning_rates(t5, 100)
        space.validate(t5)
        generator = random.Random(0)
        for _ in range(5):
            point = space.draw(generator, t5)
            child = space.mutator(t5)({point: 1.0}, generator)
            for each in (point, child):
                t5.check(each)
                parameters = space.encode(each, t5)
                assert space.encode(each, t5) == parameters

    def test_the_papers_needs_every_block_of_every_stack(self) -> None:
        backbone = encoder_decoder("bart")
        space = AutoPEFTPaper()
        largest = space.extremes(backbone)[1]
        assert {site.place for site in largest.adapters} == set(backbone.places)
        assert space.encode(largest, backbone)["decoder.1.on"] is True
