"""Spelling to sound: a pronouncing dictionary of English, and a small T5 that is trained on it here.

No encoder-decoder with weights for text is in a package index. This one learns American pronunciations in
minutes; the data set holds the British pronunciations of words that it has not seen.
"""

from __future__ import annotations

import csv
import json
import random
import zipfile
from pathlib import Path

from assets.packages import Asset, Package

_MISAKI = Package(
    name="misaki",
    version="0.9.4",
    sha256="90e2eeb169786c014c429e5058d2ea6bcd02d651f2a24450ba6c9ffc0f8da15a",
    licence="Apache-2.0",
)
_HELD_OUT = 8_000  # words of the data set, which the model never sees
_TRAINED = 30_000  # words that the model is trained on
_EPOCHS, _BATCH, _RATE = 3, 128, 3e-3


def _extract_pronunciations(archive: zipfile.ZipFile, folder: Path) -> None:
    held_out, _ = _split(archive)
    with (folder / "pronunciations.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("word", "american", "british"))
        writer.writerows(held_out)


def _split(archive: zipfile.ZipFile) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Return words with their two pronunciations: those of the data set, and those of the training."""
    american, british = (
        json.loads(archive.read(f"misaki/data/{variety}_gold.json")) for variety in ("us", "gb")
    )
    words = sorted(
        (word, american[word], british[word])
        for word in american.keys() & british.keys()
        # Words of several pronunciations have a mapping; names and abbreviations have rules of their own.
        if isinstance(american[word], str)
        and isinstance(british[word], str)
        and word.isascii()
        and word.isalpha()
        and word.islower()
        and len(word) > 3
    )
    random.Random(0).shuffle(words)
    return words[:_HELD_OUT], words[_HELD_OUT : _HELD_OUT + _TRAINED]


def _extract_speller(archive: zipfile.ZipFile, folder: Path) -> None:
    # Here, so that the other assets do without these packages.
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from torch.nn.utils import clip_grad_norm_
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    held_out, words = _split(archive)
    special = ["<pad>", "</s>", "<unk>"]
    letters = sorted({letter for row in (*held_out, *words) for text in row for letter in text})
    vocabulary = {token: index for index, token in enumerate((*special, *letters))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    config.update({"decoder_start_token_id": 0})
    model = T5ForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    steps = _EPOCHS * (len(words) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    order = random.Random(0)
    for _ in range(_EPOCHS):
        order.shuffle(words)
        for start in range(0, len(words) - _BATCH + 1, _BATCH):
            spelt, american, _ = zip(*words[start : start + _BATCH], strict=True)
            batch = tokenizer(list(spelt), text_target=list(american), padding=True, return_tensors="pt")
            labels = batch.pop("labels")
            model(**batch, labels=labels.masked_fill(labels == 0, -100)).loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


PRONUNCIATION: dict[str, Asset] = {
    "pronunciations": Asset(folder="data/pronunciations", package=_MISAKI, extract=_extract_pronunciations),
    "speller": Asset(folder="models/speller-american", package=_MISAKI, extract=_extract_speller),
}
