"""Metrics of generated text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.text import BLEUScore, CHRFScore
from torchmetrics.text.rouge import ROUGEScore
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

TextMetric = Callable[[Sequence[str], Sequence[str]], float]
"""Maps generated texts and references to a score that is better when larger."""


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


TEXT_METRICS: Mapping[str, TextMetric] = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "bleu": bleu,
    "chrf": chrf,
}


def generate_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Write on from prompts greedily.

    Args:
        model: A language model in evaluation mode, with an encoder or without.
        tokenizer: Its tokenizer; says with what shorter prompts are padded, for an encoder on their right.
        prompts: Token ids.
        new_tokens: Tokens to generate at most.
        batch_size: Prompts at once.

    Returns:
        The new text of each prompt, special tokens left out.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        found = continue_prompts(model, tokenizer, [prompts[row] for row in rows], max_new_tokens=new_tokens)
        for row, text in zip(rows, tokenizer.batch_decode(found, skip_special_tokens=True), strict=True):
            texts[row] = text.strip()
    return texts


def continue_prompts(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], **options: int
) -> Tensor:
    """Return the new tokens of each prompt, a row each, decoded greedily; options are `generate`'s."""
    encodes = model.config.is_encoder_decoder
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = "right" if encodes else "left"
    given = DataCollatorWithPadding(tokenizer)([{"input_ids": list(prompt)} for prompt in prompts])
    with torch.inference_mode():
        found: Tensor = model.generate(
            **{name: tensor.to(model.device) for name, tensor in given.items()},
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    return found[:, 1 if encodes else given["input_ids"].shape[1] :]
