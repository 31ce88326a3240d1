"""Fixtures for all tests: real assets, tiny random models, and a guard against leaking tests."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from assets.prepare import prepare

# On a busy machine an example may take seconds. The same examples are drawn each time.
too_slow = [HealthCheck.too_slow]
settings.register_profile("any machine", deadline=None, derandomize=True, suppress_health_check=too_slow)
settings.load_profile("any machine")

# What libraries set on purpose when they are first imported or used, for the whole process.
ALLOWED_VARIABLES = frozenset(
    {
        "KMP_DUPLICATE_LIB_OK",  # scikit-learn, through datasets
        "KMP_INIT_AT_FORK",  # scikit-learn
        "PYTEST_CURRENT_TEST",
        "_MLFLOW_TELEMETRY_SESSION_ID",  # mlflow, also where telemetry is off
        "PYTORCH_NVML_BASED_CUDA_CHECK",  # lightning
    }
)
# Threads a library starts once and keeps.
ALLOWED_THREADS = ("tqdm_monitor",)
# Of every tiny model. A padding token is what sequence classification with a decoder needs.
COMMON = {"num_labels": 3, "pad_token_id": 0, "vocab_size": 128}

ModelFactory = Callable[..., PreTrainedModel]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("browser") and not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Chromium and chromedriver")


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    # Beyond two threads the tiny models of the tests only get slower; fewer asked for stays fewer.
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_works() -> None:
    # A shell's background jobs, and some CI runners, start with SIGINT ignored, which children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache out of tests, and one test's out of another's."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AUTOPEFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _leaves_no_trace(_cache_of_its_own: None) -> Iterator[None]:
    """Seed every test alike; fail one that leaks variables or threads; restore the RNG states."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    variables, threads = dict(os.environ), set(threading.enumerate())
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    changed = _changed_variables(variables)
    assert not changed, f"The test leaks environment variables: {sorted(changed)}"
    leaked = _new_threads(threads)
    assert not leaked, f"The test leaks threads: {leaked}"


def _changed_variables(before: dict[str, str]) -> set[str]:
    after = dict(os.environ)
    names = (before.keys() | after.keys()) - ALLOWED_VARIABLES
    return {name for name in names if before.get(name) != after.get(name)}


def _new_threads(before: set[threading.Thread], patience_seconds: float = 2.0) -> list[str]:
    """Names of threads that are still there after a moment to finish in."""
    deadline = time.monotonic() + patience_seconds
    while True:
        names = [
            thread.name
            for thread in set(threading.enumerate()) - before
            if not thread.name.startswith(ALLOWED_THREADS)
        ]
        if not names or time.monotonic() > deadline:
            return names
        time.sleep(0.05)


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """A real pretrained model: all-MiniLM-L6-v2, 6 blocks of width 384."""
    return prepare("minilm")


@pytest.fixture(scope="session")
def questions_csv() -> Path:
    """A real task: 5,382 questions with columns text, label (6 kinds), fine_label (50 kinds)."""
    return prepare("questions") / "questions.csv"


def _factory(
    architecture: type[PreTrainedModel], configured: type[PreTrainedConfig], **defaults: Any
) -> ModelFactory:
    def build(*, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return architecture(configured(**COMMON | defaults | overrides))

    return build


_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture
def tiny_bert() -> ModelFactory:
    """Makes fresh random encoders with 3 labels: 2 blocks of width 32, biases everywhere."""
    return _factory(BertForSequenceClassification, BertConfig, **_SIZES)


@pytest.fixture
def tiny_llama() -> ModelFactory:
    """Makes fresh random decoders with 3 labels: grouped queries, gated FFN, RMS norms."""
    return _factory(LlamaForSequenceClassification, LlamaConfig, **_SIZES, num_key_value_heads=2)


@pytest.fixture
def tiny_gpt2() -> ModelFactory:
    """Makes fresh random decoders with 3 labels: one Conv1D for query, key and value."""
    # The defaults of both tokens lie outside the tiny vocabulary.
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return _factory(GPT2ForSequenceClassification, GPT2Config, **sizes, bos_token_id=1, eos_token_id=2)
