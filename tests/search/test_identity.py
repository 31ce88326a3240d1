"""What makes two searches the same."""

from __future__ import annotations

from transformers import AutoModelForAudioClassification, AutoModelForCausalLM

from autopeft.models.backbone import Backbone
from autopeft.models.head_spec import HeadSpec
from autopeft.search_identity import source_settings
from tests.tiny_models import tiny_chat_tokenizer, tiny_headed


def test_a_second_search_with_a_loaded_speech_model_is_the_first() -> None:
    head = HeadSpec(auto_class=AutoModelForAudioClassification, config={"num_labels": 3})
    model = tiny_headed(head, "wav2vec2")
    model.config.layerdrop, model.config.apply_spec_augment = 0.1, True
    first = source_settings(model)
    Backbone(model, None, name="wav2vec2", head=("classifier",))
    assert model.config.layerdrop == 0.0
    assert source_settings(model) == first


def test_a_second_search_with_a_loaded_model_that_had_no_padding_is_the_first() -> None:
    head = HeadSpec(auto_class=AutoModelForCausalLM, is_trained=False)
    model = tiny_headed(head, "gpt2")
    model.config.pad_token_id = None
    first = source_settings(model)
    Backbone.load(model, head, tiny_chat_tokenizer())
    assert model.config.pad_token_id is not None
    assert source_settings(model) == first
