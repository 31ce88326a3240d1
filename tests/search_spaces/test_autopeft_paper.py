from __future__ import annotations

import pytest
from optuna.samplers import RandomSampler
from optuna.study import create_study
from optuna.trial import FixedTrial

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.search_spaces import AutoPEFTPaper
from tests.tiny_models import tiny_backbone

BERT = tiny_backbone("bert")
SPACE = AutoPEFTPaper()


def test_sizes_are_the_papers_for_bert_base() -> None:
    base = tiny_backbone("bert", hidden_size=768, intermediate_size=64, num_attention_heads=12, vocab_size=8)
    assert SPACE.sizes(base) == (0, 1, 3, 6, 12, 24, 48, 96, 192, 384, 768)


def test_count_is_the_papers_for_bert_base() -> None:
    """Eleven sizes of three modules and twelve blocks, all points without an adapter counted once."""
    deep = tiny_backbone(
        "bert",
        hidden_size=768,
        intermediate_size=8,
        num_attention_heads=12,
        num_hidden_layers=12,
        vocab_size=8,
    )
    assert SPACE.count(deep) == (11**3 - 1) * (2**12 - 1) + 1


def test_ten_halvings_are_the_limit() -> None:
    wide = tiny_backbone("bert", hidden_size=1024, intermediate_size=8, vocab_size=8)
    assert SPACE.sizes(wide)[:3] == (0, 2, 4)


def test_small_widths_have_fewer_sizes() -> None:
    assert SPACE.sizes(BERT) == (0, 1, 2, 4, 8, 16, 32)


def test_count_is_the_number_of_different_points() -> None:
    ladder = SPACE.sizes(BERT)
    points = {
        SPACE.suggest(
            FixedTrial(
                {
                    "series.size": series,
                    "parallel.size": parallel,
                    "prefix.size": prefix,
                    "0.on": first,
                    "1.on": second,
                }
            ),
            BERT,
        )
        for series in ladder
        for parallel in ladder
        for prefix in ladder
        for first in (False, True)
        for second in (False, True)
    }
    assert len(points) == SPACE.count(BERT) == (7**3 - 1) * 3 + 1


def test_sizes_are_shared_by_all_blocks_that_are_on() -> None:
    parameters = {"series.size": 4, "parallel.size": 0, "prefix.size": 16, "0.on": False, "1.on": True}
    assert SPACE.suggest(FixedTrial(parameters), BERT) == Configuration(
        {Site(1, "ffn"): Adapter("series", 4), Site(1, "attention"): Adapter("prefix", 16)},
        learning_rate=1e-4,
    )


def test_serial_and_parallel_share_the_ffn() -> None:
    parameters = {"series.size": 1, "parallel.size": 2, "prefix.size": 0, "0.on": True, "1.on": False}
    configuration = SPACE.suggest(FixedTrial(parameters), BERT)
    assert dict(configuration.adapters) == {Site(0, "ffn"): (Adapter("series", 1), Adapter("parallel", 2))}


def test_always_asks_for_the_same() -> None:
    asked = []
    for seed in range(6):
        trial = create_study(sampler=RandomSampler(seed=seed)).ask()
        SPACE.suggest(trial, BERT)
        asked.append(trial.distributions)
    assert all(distributions == asked[0] for distributions in asked)
    assert set(asked[0]) == {"series.size", "parallel.size", "prefix.size", "0.on", "1.on"}


@pytest.mark.parametrize(
    "adapters",
    [
        {Site(0, "ffn"): Adapter("series", 4), Site(1, "ffn"): Adapter("series", 2)},
        {Site(0, "ffn"): Adapter("series", 3)},
        {Site(0, "attention"): Adapter("series", 4)},
        {Site(0, "query"): Adapter("lora", 4)},
        {Site(0, "ffn"): Adapter("series", 4), Site(1, "attention"): Adapter("prefix", 4)},
        {Site(5, "ffn"): Adapter("series", 4)},
    ],
)
def test_other_points_have_no_encoding(adapters: dict[Site, Adapter]) -> None:
    with pytest.raises(ValueError, match="no point of AutoPEFTPaper; one near it is"):
        SPACE.encode(Configuration(adapters, learning_rate=1e-4), BERT)


def test_baselines() -> None:
    names = [baseline.name for baseline in SPACE.baselines(BERT)]
    assert names == [
        "head alone",
        "series(4) everywhere",
        "parallel(4) everywhere",
        "prefix(4) everywhere",
    ]
    assert [baseline.name for baseline in SPACE.baselines(BERT, trials=12)] == names[:3]


@pytest.mark.parametrize("architecture", ["deberta-v2", "t5"])
def test_needs_all_three_methods_in_every_block(architecture: str) -> None:
    with pytest.raises(
        ValueError, match=r"AutoPEFTPaper needs 'prefix' on (encoder.)?0\.attention.*PerLayer"
    ):
        SPACE.validate(tiny_backbone(architecture))


def test_learning_rate() -> None:
    assert AutoPEFTPaper(learning_rate=(1e-4, 1e-4)) == SPACE
    with pytest.raises(ValueError, match="the lowest first"):
        AutoPEFTPaper(learning_rate=(1e-3, 1e-4))
