"""Metrics of generated text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.text import BLEUScore, CHRFScore, WordErrorRate
from torchmetrics.text.rouge import ROUGEScore
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

TextMetric = Callable[[Sequence[str], Sequence[str]], float]
"""Maps generated texts and references to a score that is better when larger; an error rate, when smaller."""


def exact_match(generated: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of texts that are their reference, blanks around them left out."""
    pairs = zip(generated, references, strict=True)
    return sum(text.strip() == reference.strip() for text, reference in pairs) / len(references)


def rouge_l(generated: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F-measure of ROUGE-L (Lin, 2004)."""
    metric = ROUGEScore(rouge_keys="rougeL")
    return float(metric(list(generated), list(references))["rougeL_fmeasure"])


def bleu(generated: Sequence[str], references: Sequence[str]) -> float:
    """Return the corpus's BLEU of up to four words (Papineni et al., 2002), in [0, 1]."""
    return float(BLEUScore()(list(generated), [[reference] for reference in references]))


def chrf(generated: Sequence[str], references: Sequence[str]) -> float:
    """Return the corpus's chrF++ (Popović, 2017), in [0, 1]."""
    return float(CHRFScore()(list(generated), [[reference] for reference in references]))


def word_error_rate(generated: Sequence[str], references: Sequence[str]) -> float:
    """Return the words to be changed, left out or put in, by the words of the references."""
    return float(WordErrorRate()(list(generated), list(references)))


TEXT_METRICS: Mapping[str, TextMetric] = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "bleu": bleu,
    "chrf": chrf,
    "word_error_rate": word_error_rate,
}
ERROR_RATES = ("word_error_rate",)
"""Metrics that are better when smaller: 1 of a model that writes nothing."""


def generate_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Any],
    inputs: Callable[[Sequence[Any]], Mapping[str, Tensor]],
    *,
    new_tokens: int,
    batch_size: int,
    ends: Sequence[int] = (),
) -> list[str]:
    """Write on from prompts, or for what an encoder reads, greedily.

    Args:
        model: A language model in evaluation mode, with an encoder or without.
        tokenizer: Its tokenizer.
        examples: Token ids of prompts, or row numbers.
        inputs: Gives what the model is given of examples.
        new_tokens: Tokens to generate at most.
        batch_size: Examples at once.
        ends: Tokens that a text ends with, beside the model's own.

    Returns:
        The new text of each example, special tokens left out.
    """
    order = sorted(range(len(examples)), key=lambda index: np.size(examples[index]))
    texts = [""] * len(examples)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        given = inputs([examples[row] for row in rows])
        found = new_ids(model, tokenizer, given, ends=ends, max_new_tokens=new_tokens)
        for row, text in zip(rows, tokenizer.batch_decode(found, skip_special_tokens=True), strict=True):
            texts[row] = text.strip()
    return texts


def padded(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]
) -> Mapping[str, Tensor]:
    """Return prompts as a batch, padded where the model generates from: an encoder's on the right."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = "right" if model.config.is_encoder_decoder else "left"
    batch: Mapping[str, Tensor] = DataCollatorWithPadding(tokenizer)(
        [{"input_ids": list(prompt)} for prompt in prompts]
    )
    return batch


def new_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    given: Mapping[str, Tensor],
    ends: Sequence[int] = (),
    **options: Any,
) -> Tensor:
    """Return the new tokens of each row, decoded greedily; options are `generate`'s."""
    if ends:
        own = model.generation_config.eos_token_id
        options["eos_token_id"] = [*([own] if isinstance(own, int) else own or []), *ends]
    with torch.inference_mode():
        found: Tensor = model.generate(
            **{name: tensor.to(model.device) for name, tensor in given.items()},
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    if not model.config.is_encoder_decoder:
        return found[:, given["input_ids"].shape[1] :]
    has_start = (found[:, 0] == model.config.decoder_start_token_id).all()  # Whisper's have not
    return found[:, int(has_start) :]
