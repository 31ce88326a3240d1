"""One adapter alone at every site: what is left to try."""

from __future__ import annotations

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.optimization.candidates import single_adapter_probes
from autopeft.search_spaces.method_choice import MethodChoice

QUERY, VALUE, FFN = Site(0, "query"), Site(0, "value"), Site(1, "ffn")


def test_what_is_left_is_every_method_alone_at_every_site_where_it_was_not_tried_alone() -> None:
    sized = {name: MethodChoice(method=name, sizes=range(2, 9)) for name in ("lora", "series", "parallel")}
    lora = {"lora": sized["lora"]}
    choices = {QUERY: lora, VALUE: lora, FFN: {name: sized[name] for name in ("series", "parallel")}}
    tried = [
        Configuration({}, learning_rate=1e-3),
        Configuration({QUERY: Adapter("lora", 8)}, learning_rate=1e-4),
        Configuration({VALUE: Adapter("lora", 2), FFN: Adapter("parallel", 2)}, learning_rate=1e-3),
        Configuration({FFN: Adapter("series", 2)}, learning_rate=1e-3),
    ]
    expected = [
        Configuration({VALUE: Adapter("lora", 2)}, learning_rate=1e-2),
        Configuration({FFN: Adapter("parallel", 2)}, learning_rate=1e-2),
    ]
    assert single_adapter_probes(choices, tried, 1e-2) == expected
