"""Load a model's processor: a tokenizer, an image processor or a feature extractor."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoImageProcessor, PreTrainedTokenizerBase

from autopeft.models.head_spec import Processor

_FEWEST_WORDS = 10
_KINDS = {
    "AutoTokenizer": "tokenizer",
    "AutoImageProcessor": "image processor",
    "AutoFeatureExtractor": "feature extractor",
}


def load_processor(origin: str, processor_class: Any) -> Processor:
    """Load what makes a model's inputs of data; raise a ValueError where there is none."""
    origin = os.path.expanduser(origin)
    kind = _KINDS.get(processor_class.__name__, "processor")
    # Images are processed alike with and without torchvision.
    options = {"backend": "pil"} if processor_class is AutoImageProcessor else {}
    try:
        loaded: Processor = processor_class.from_pretrained(origin, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No {kind} was found for the backbone {origin!r}: pass one as tokenizer=..."
        ) from error
    # Where there is no vocabulary, transformers hands out a tokenizer of special tokens (and a blank
    # or two), for which every text reads alike.
    if not isinstance(loaded, PreTrainedTokenizerBase):
        return loaded
    if len(loaded) - len(loaded.all_special_tokens) < _FEWEST_WORDS:
        raise ValueError(
            f"No tokenizer was found for the backbone {origin!r} (there is no vocabulary): "
            "pass one as tokenizer=..."
        )
    return loaded
