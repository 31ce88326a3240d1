from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedModel,
)

from autopeft.models import loading
from autopeft.models.backbone import Backbone
from autopeft.models.head_spec import HeadSpec
from autopeft.models.loading import LoadOptions
from tests.learnable import learnable_task
from tests.tiny_models import (
    HEADS,
    OPTIONS,
    head_spec,
    logits_of,
    tiny_backbone,
    tiny_batch,
    tiny_classifier,
    tiny_language_model,
    tiny_model,
    tiny_tokenizer,
)


def _saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class TestFolder:
    def test_a_model_without_a_head_gets_a_new_one(self, tmp_path: Path) -> None:
        base = tiny_model("bert")
        backbone = Backbone.load(_saved(base, tmp_path / "tiny-bert"), head_spec(labels=5))
        assert (backbone.name, backbone.head, backbone.new_head) == ("tiny-bert", ("classifier",), True)
        assert backbone.origin == str(tmp_path / "tiny-bert")
        assert logits_of(backbone).shape == (3, 5)
        for name, parameter in base.named_parameters():
            assert torch.equal(backbone.model.get_parameter(f"bert.{name}"), parameter)

    def test_a_models_own_head_is_kept(self, tmp_path: Path) -> None:
        model = tiny_classifier("bert")
        backbone = Backbone.load(_saved(model, tmp_path), head_spec())
        assert (backbone.head, backbone.new_head) == (("classifier",), False)
        torch.testing.assert_close(logits_of(backbone), model(**tiny_batch()).logits)

    @pytest.mark.parametrize("architecture", sorted(HEADS))
    def test_finds_the_head_of_each_architecture(self, architecture: str, tmp_path: Path) -> None:
        folder = _saved(tiny_model(architecture), tmp_path)
        backbone = Backbone.load(folder, head_spec())
        assert set(backbone.head) == set(HEADS[architecture])
        assert backbone.new_head

    def test_modules_missing_inside_the_base_are_trained_with_the_head(self, tmp_path: Path) -> None:
        """Checkpoints of masked language models come without BERT's pooler."""
        unpooled = BertModel(BertConfig(**OPTIONS["bert"]), add_pooling_layer=False)
        backbone = Backbone.load(_saved(unpooled, tmp_path), head_spec())
        assert backbone.head == ("classifier", "bert.pooler.dense")
        assert backbone.head_parameters == 3 * 32 + 3 + 32 * 32 + 32

    @pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("quickest", ["32-true", "bf16-mixed"])
    def test_weights_stay_as_saved_where_the_processor_multiplies_them(
        self, saved: torch.dtype, quickest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loading, "quickest_precision", lambda device: quickest)
        model = tiny_model("llama")
        nn.Module.to(model, saved)
        backbone = Backbone.load(_saved(model, tmp_path), head_spec())
        expected = saved if quickest == "bf16-mixed" else torch.float32
        assert {parameter.dtype for parameter in backbone.model.parameters()} == {expected}

    @pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
    def test_weights_have_the_precision_that_is_asked_for(
        self, saved: torch.dtype, wanted: Literal["float32", "bfloat16"], tmp_path: Path
    ) -> None:
        model = tiny_model("llama")
        nn.Module.to(model, saved)
        options = LoadOptions(dtype=wanted)
        backbone = Backbone.load(_saved(model, tmp_path), head_spec(), options=options)
        assert {parameter.dtype for parameter in backbone.model.parameters()} == {getattr(torch, wanted)}

    def test_on_a_gpu_weights_stay_as_saved(self) -> None:
        config = BertConfig(dtype=torch.bfloat16)
        assert LoadOptions().arguments(config, torch.device("cuda")) == {"dtype": "auto"}

    def test_attention_is_the_one_that_is_asked_for(self, tmp_path: Path) -> None:
        folder = _saved(tiny_model("llama"), tmp_path)
        for attention in ("eager", "sdpa"):
            backbone = Backbone.load(folder, head_spec(), options=LoadOptions(attention=attention))
            assert backbone.model.config._attn_implementation == attention

    @pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash attention is installed")
    def test_an_attention_whose_package_is_missing_is_said(self, tmp_path: Path) -> None:
        folder = _saved(tiny_model("llama"), tmp_path)
        with pytest.raises(ValueError, match=r"Cannot load the backbone.*[Ff]lash"):
            Backbone.load(folder, head_spec(), options=LoadOptions(attention="flash_attention_2"))

    def test_unknown_options_are_told_the_nearest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"dtype 'float23'.*did you mean 'float32'"):
            LoadOptions(dtype="float23")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"quantization 'nf3'.*did you mean 'nf4'"):
            LoadOptions(quantization="nf3")  # type: ignore[arg-type]
        monkeypatch.setattr(loading, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"'int8' needs bitsandbytes: pip install 'autopeft"):
            LoadOptions(quantization="int8")

    def test_they_are_refused_for_what_is_loaded_already(self) -> None:
        options = LoadOptions(dtype="bfloat16", attention="eager")
        for source in (tiny_classifier("bert"), tiny_backbone("bert")):
            with pytest.raises(
                ValueError, match=r"dtype='bfloat16', attention='eager' is for .* taken as it is"
            ):
                Backbone.load(source, head_spec(), tiny_tokenizer(), options=options)
            Backbone.load(source, head_spec(), tiny_tokenizer(), options=LoadOptions())

    def test_the_new_head_is_the_same_in_every_process(self, tmp_path: Path) -> None:
        folder = _saved(tiny_model("bert"), tmp_path)
        torch.manual_seed(1)
        backbone = Backbone.load(folder, head_spec())
        state = torch.get_rng_state()
        torch.manual_seed(2)
        other = Backbone.load(folder, head_spec())
        assert torch.equal(logits_of(backbone), logits_of(other))
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_real_model(self, minilm_folder: Path) -> None:
        backbone = Backbone.load(minilm_folder, head_spec())
        assert len(backbone.blocks) == 6
        assert backbone.head == ("classifier",)
        assert backbone.processor("What is it?")["input_ids"][0] == 101

    def test_refuses_a_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"expected a folder with a config\.json"):
            Backbone.load(tmp_path, head_spec())

    @pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
    def test_refuses_a_path_that_is_not_there(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"expected a folder with a config\.json"):
            Backbone.load(name, head_spec())

    def test_refuses_pickled_weights(self, tmp_path: Path) -> None:
        folder = _saved(tiny_model("bert"), tmp_path)
        weights = folder / "model.safetensors"
        weights.unlink()
        torch.save(tiny_model("bert").state_dict(), folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"Cannot load the backbone.*safetensors"):
            Backbone.load(folder, head_spec())

    def test_refuses_a_folder_without_a_tokenizer(self, tmp_path: Path) -> None:
        tiny_model("bert").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"No tokenizer was found.*pass one as tokenizer"):
            Backbone.load(tmp_path, head_spec())
        backbone = Backbone.load(tmp_path, head_spec(), tiny_tokenizer())
        assert backbone.processor.pad_token == "[PAD]"

    def test_refuses_an_architecture_without_the_tasks_head(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="Cannot load the backbone"):
            Backbone.load(_saved(tiny_model("cohere"), tmp_path), head_spec())


class TestLoadedModel:
    def test_a_model_without_a_head_gets_a_new_one(self) -> None:
        base = tiny_model("llama")
        backbone = Backbone.load(base, head_spec(labels=5), tiny_tokenizer())
        assert (backbone.head, backbone.new_head) == (("score",), True)
        assert backbone.model.base_model is base
        assert logits_of(backbone).shape == (3, 5)
        assert base.config.num_labels != 5

    def test_a_models_own_head_is_kept(self) -> None:
        model = tiny_classifier("gpt2")
        backbone = Backbone.load(model, head_spec(), tiny_tokenizer())
        assert backbone.model is model
        assert (backbone.head, backbone.new_head) == (("score",), False)

    def test_the_head_follows_the_models_precision(self) -> None:
        base = tiny_model("bert").bfloat16()
        backbone = Backbone.load(base, head_spec(), tiny_tokenizer())
        assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.bfloat16}
        assert logits_of(backbone).dtype == torch.bfloat16

    @pytest.mark.parametrize("training", [False, True])
    def test_the_mode_stays(self, training: bool) -> None:
        base = tiny_model("bert").train(training)
        assert Backbone.load(base, head_spec(), tiny_tokenizer()).model.training is training

    def test_a_backbone_is_returned_as_it_is(self) -> None:
        backbone = tiny_backbone("bert")
        assert Backbone.load(backbone, head_spec()) is backbone

    def test_a_padding_token_is_found(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = None
        tokenizer.eos_token = "w5"
        model = tiny_classifier("gpt2")
        model.config.pad_token_id = None
        backbone = Backbone.load(model, head_spec(), tokenizer)
        assert backbone.processor.pad_token == "w5"
        assert backbone.model.config.pad_token_id == tokenizer.eos_token_id

    def test_refuses_a_tokenizer_that_cannot_pad(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = None
        with pytest.raises(ValueError, match="no padding token"):
            Backbone.load(tiny_classifier("bert"), head_spec(), tokenizer)

    def test_refuses_a_head_with_other_labels(self) -> None:
        with pytest.raises(ValueError, match="has 3 labels, the task has 4"):
            Backbone.load(tiny_classifier("bert"), head_spec(labels=4), tiny_tokenizer())

    def test_refuses_a_head_for_another_task(self) -> None:
        model = BertForMaskedLM(BertConfig(**OPTIONS["bert"]))
        with pytest.raises(ValueError, match="needs a BertForSequenceClassification, got a BertForMasked"):
            Backbone.load(model, head_spec(), tiny_tokenizer())

    def test_refuses_a_model_without_a_module_the_head_needs(self) -> None:
        unpooled = BertModel(BertConfig(**OPTIONS["bert"]), add_pooling_layer=False)
        with pytest.raises(ValueError, match=r"needs bert\.pooler\.dense\.bias.*loaded without"):
            Backbone.load(unpooled, head_spec(), tiny_tokenizer())

    def test_needs_a_tokenizer_where_the_model_does_not_say(self) -> None:
        with pytest.raises(ValueError, match="No tokenizer was found"):
            Backbone.load(tiny_model("bert"), head_spec())


class TestFrozenHead:
    """A language model's own head, which is not trained."""

    spec = HeadSpec(auto_class=AutoModelForCausalLM, is_trained=False)

    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_the_whole_model_is_loaded_as_it_was_saved(self, architecture: str, tmp_path: Path) -> None:
        model = tiny_language_model(architecture)
        for source in (_saved(model, tmp_path), model):
            backbone = Backbone.load(source, self.spec, tiny_tokenizer())
            assert (backbone.head, backbone.head_parameters, backbone.new_head) == ((), 0, False)
            torch.testing.assert_close(logits_of(backbone), model(**tiny_batch()).logits)

    def test_a_checkpoint_without_it_is_refused(self, tmp_path: Path) -> None:
        base = tiny_model("llama")
        for source in (_saved(base, tmp_path), base):
            with pytest.raises(ValueError, match=r"no lm_head\.weight, which LlamaForCausalLM needs"):
                Backbone.load(source, self.spec, tiny_tokenizer())


def test_reports_what_was_loaded(tmp_path: Path) -> None:
    loaded = Backbone.load(_saved(tiny_model("bert"), tmp_path), head_spec())
    assert (loaded.head, loaded.new_head, loaded.origin) == (("classifier",), True, str(tmp_path))


def test_names_the_hub_where_it_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/nothing'.*no local folder, and the hub gave: "):
        Backbone.load("nobody/nothing", head_spec())


def weight_of_head(model: PreTrainedModel) -> torch.Tensor:
    return model.get_parameter("classifier.weight")


class TestLabels:
    NAMES = ("a", "b", "c")

    def named(self, names: tuple[str, ...], **options: Any) -> PreTrainedModel:
        model = tiny_classifier("bert", id2label=dict(enumerate(names)), **options)
        model.config.label2id = {name: index for index, name in enumerate(names)}
        return model

    def test_numbered_labels_get_the_tasks_names(self) -> None:
        backbone = Backbone.load(tiny_classifier("bert"), learnable_task().head, tiny_tokenizer())
        assert backbone.model.config.id2label == dict(enumerate(self.NAMES))
        assert not backbone.new_head

    @pytest.mark.parametrize("saved", [False, True])
    def test_a_head_in_another_order_is_put_in_the_tasks(self, saved: bool, tmp_path: Path) -> None:
        model = self.named(("c", "a", "b"))
        before = weight_of_head(model).detach().clone()
        source = _saved(model, tmp_path) if saved else model
        backbone = Backbone.load(source, learnable_task().head, tiny_tokenizer())
        assert backbone.model.config.id2label == dict(enumerate(self.NAMES))
        assert torch.equal(weight_of_head(backbone.model), before[[1, 2, 0]])
        assert not backbone.new_head

    def test_rows_follow_the_numbers_of_labels_and_not_their_place_in_the_file(self) -> None:
        model = self.named(self.NAMES)
        model.config.id2label = {2: "c", 0: "a", 1: "b"}
        before = weight_of_head(model).detach().clone()
        backbone = Backbone.load(model, learnable_task().head, tiny_tokenizer())
        assert torch.equal(weight_of_head(backbone.model), before)

    def test_a_head_of_other_labels_is_new(self) -> None:
        backbone = Backbone.load(self.named(("x", "y", "z")), learnable_task().head, tiny_tokenizer())
        assert backbone.new_head
        assert backbone.model.config.id2label == dict(enumerate(self.NAMES))

    def test_a_checkpoint_with_a_head_of_another_size_gets_a_new_one(self, tmp_path: Path) -> None:
        source = _saved(tiny_classifier("bert", num_labels=5), tmp_path)
        backbone = Backbone.load(source, learnable_task().head, tiny_tokenizer())
        assert (backbone.head, backbone.new_head) == (("classifier",), True)
        assert logits_of(backbone).shape == (3, 3)


def test_a_fresh_head_of_a_loaded_model_does_not_make_another_backbone(tmp_path: Path) -> None:
    source = _saved(tiny_model("bert"), tmp_path)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
        found.append(Backbone.load(model, learnable_task().head, tiny_tokenizer()))
    assert not torch.equal(*(weight_of_head(backbone.model) for backbone in found))
    assert found[0].identity() == found[1].identity()


def test_the_models_padding_token_is_the_tokenizers() -> None:
    backbone = Backbone.load(
        tiny_classifier("llama", pad_token_id=7), learnable_task().head, tiny_tokenizer()
    )
    assert backbone.model.config.pad_token_id == backbone.processor.pad_token_id == 0


def test_the_padding_token_is_set_where_a_composite_models_head_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_classifier("llama", pad_token_id=7)
    inner = copy.deepcopy(model.config)
    monkeypatch.setattr(type(model.config), "get_text_config", lambda *_, **__: inner)
    Backbone.load(model, learnable_task().head, tiny_tokenizer())
    assert (model.config.pad_token_id, inner.pad_token_id) == (0, 0)


def test_what_is_no_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="got a dict"):
        Backbone.load({}, learnable_task().head)  # type: ignore[arg-type]
    adapted: Any = get_peft_model(tiny_classifier("bert"), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="got a PeftModel"):
        Backbone.load(adapted, learnable_task().head)


def test_the_users_home_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _saved(tiny_model("bert"), tmp_path / "models")
    monkeypatch.setenv("HOME", str(tmp_path))
    backbone = Backbone.load("~/models", learnable_task().head)
    assert (backbone.name, backbone.origin) == ("models", str(tmp_path / "models"))
