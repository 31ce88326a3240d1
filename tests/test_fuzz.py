"""What reads a file says of damaged content what is wrong with it, and never crashes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import Reader, readers


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return dict(readers(tmp_path_factory.mktemp("fuzz")))


def test_what_is_not_damaged_is_read(known: dict[str, Reader]) -> None:
    for reader in known.values():
        for sample in reader.samples:
            reader.read(sample)


@settings(max_examples=40, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_damaged_content_is_read_or_refused_with_a_sentence(known: dict[str, Reader], seed: int) -> None:
    for name, reader in known.items():
        assert reader.outcome(seed) in ("read", "ValueError"), name
