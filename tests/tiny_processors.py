"""Small processors, for the inputs of tiny models."""

from __future__ import annotations

from transformers import (
    ASTFeatureExtractor,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperProcessor,
    WhisperTokenizer,
)

from autopeft.models.head_spec import HeadSpec, Processor
from tests.tiny_models import tiny_tokenizer


def tiny_processor(head: HeadSpec, architecture: str = "") -> Processor:
    """Return the processor that a task's head needs: of words, of 16 pixels a side, or of 16 mel bins."""
    if head.processor_class is AutoImageProcessor:
        return ViTImageProcessorPil(size={"height": 16, "width": 16})
    if head.processor_class is AutoProcessor:
        return WhisperProcessor(_whisper_features(), _whisper_tokenizer())
    if head.processor_class is AutoFeatureExtractor:
        if architecture == "wav2vec2":
            return Wav2Vec2FeatureExtractor()
        is_whisper = architecture == "whisper"
        return _whisper_features() if is_whisper else ASTFeatureExtractor(num_mel_bins=16, max_length=64)
    return tiny_tokenizer()


def _whisper_features() -> WhisperFeatureExtractor:
    """Return log-mel features of 50 frames of a second."""
    return WhisperFeatureExtractor(feature_size=16, hop_length=320, chunk_length=1)


def _whisper_tokenizer() -> WhisperTokenizer:
    """Return a tokenizer of digits, "w" and blanks, which begins and ends texts as Whisper's does."""
    special = ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>")
    words = {word: index for index, word in enumerate([*"w0123456789\u0120", *special])}
    return WhisperTokenizer(vocab=words, merges=[], pad_token=special[0])
