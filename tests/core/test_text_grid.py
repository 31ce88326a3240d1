from __future__ import annotations

from autopeft.core.configuration import Adapter, Configuration, Site, text_grid
from autopeft.core.method_specs import METHOD_SPECS


def test_draws_blocks_down_and_roles_across() -> None:
    configuration = Configuration(
        {
            Site(2, "ffn"): [Adapter("parallel", 16), Adapter("series", 4)],
            Site(0, "query"): Adapter("lora", 8),
            Site(2, "query"): Adapter("ia3"),
            Site(2, "attention_norm"): Adapter("layernorm"),
        }
    )
    assert configuration.grid().splitlines() == [
        "block  query  attention_norm   ffn",
        "    2    I          N         S4+P16",
        "    1    ·          ·           ·",
        "    0    L8         ·           ·",
        "L lora (rank), I ia3, N layernorm, S series (bottleneck width), P parallel (bottleneck width)",
    ]


def test_columns_line_up_in_networks_of_many_blocks() -> None:
    grid = text_grid({(("", 11), "query"): "L64", (("", 0), "ffn_down"): "L1"})
    heading, *rows = grid.splitlines()[:-1]
    assert len(rows) == 12
    assert [row.split()[0] for row in rows] == [str(block) for block in range(11, -1, -1)]
    assert "L64" in rows[0][heading.index("query") - 1 : heading.index("query") + 6]
    assert "L1" in rows[-1][heading.index("ffn_down") :]


def test_says_so_when_there_are_no_adapters() -> None:
    assert text_grid({}) == "(no adapters)"
    assert Configuration().grid() == text_grid({})


def test_labels() -> None:
    adapters = {Site(0, "query"): Adapter("lora", 8), Site(1, "key"): Adapter("ia3")}
    assert Configuration(adapters).cells() == {(("", 0), "query"): "L8", (("", 1), "key"): "I"}


def test_every_method_has_its_own_symbol() -> None:
    symbols = [method.symbol for method in METHOD_SPECS.values()]
    assert len(set(symbols)) == len(symbols)
    assert all(symbol.isalpha() for symbol in symbols)
