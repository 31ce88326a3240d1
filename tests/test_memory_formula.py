"""Memory as a formula in the adapters' sizes, against counts that follow a step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autopeft.backbone import Backbone
from autopeft.configuration import Adapter, Configuration
from autopeft.frozen_prefix import FrozenPrefix
from autopeft.memory import MemoryCounter, Step
from autopeft.methods import Attachment, FullFineTuning, attach
from autopeft.modes import in_mode
from autopeft.precision import Precision
from autopeft.search_spaces import PerLayer
from autopeft.tasks import TextClassification
from tests.test_memory import SITES, backbone_of, batch_of

LOSS = functional.cross_entropy
SIZES = (1, 2, 3, 16, 64)


def resized(configuration: Configuration, generator: random.Random) -> Configuration:
    adapters = {
        site: tuple(
            one if one.size is None else Adapter(one.method, generator.choice(SIZES), dict(one.options))
            for one in several
        )
        for site, several in configuration.adapters.items()
    }
    return configuration.replace(adapters=adapters)


def followed(counter: MemoryCounter, batch: dict[str, Tensor], precision: Precision = "32-true") -> Any:
    with in_mode(counter._model, training=True):
        return counter.count_on_fake(Step(batch, LOSS, precision))


def count(
    counter: MemoryCounter,
    batch: dict[str, Tensor],
    attachment: Attachment,
    precision: Precision = "32-true",
) -> Any:
    return counter.count(batch, LOSS, precision=precision, adapters=attachment.sized)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("family", ["tiny_bert", "tiny_llama", "tiny_gpt2"])
def test_one_formula_serves_all_sizes(
    family: str, precision: Precision, request: pytest.FixtureRequest
) -> None:
    backbone, batch = backbone_of(request.getfixturevalue(family)()), batch_of()
    counter, generator = MemoryCounter(backbone.model), random.Random(0)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    kinds = [Configuration.from_dict({"sites": sites}) for sites in SITES.values()]
    kinds += [PerLayer().suggest(study.ask(), backbone) for _ in range(6)]
    known = set()
    for kind in kinds:
        for configuration in (kind, resized(kind, generator), resized(kind, generator)):
            with attach(backbone, configuration) as attachment:
                assert count(counter, batch, attachment, precision) == followed(counter, batch, precision)
                known.add(attachment.sized.kind)
    assert len(counter._formulas) == len(known) > 10
    if (family, precision) != ("tiny_gpt2", "bf16-mixed"):
        # There, IA3 differs by 4 bytes between meta tensors and others, is found out, and is followed.
        assert all(counter._formula.seen.values())
        assert None not in counter._formulas.values()


def test_nothing_is_run_for_another_size(minilm_folder: Path, questions_csv: Path) -> None:
    backbone = Backbone.load(str(minilm_folder), TextClassification(dataset=str(questions_csv)))
    counter, batch = MemoryCounter(backbone.model), batch_of(8, 24)
    peaks: list[int] = []
    for size in (8, 4, 64):
        lora = {"method": "lora", "size": size}
        sites = {"0-5.query": lora, "2-5.ffn_up": lora, "5.attention": {"method": "prefix", "size": size}}
        with attach(backbone, Configuration.from_dict({"sites": sites})) as attachment:
            expected = followed(counter, batch)
            with _not_run(backbone.model) if peaks else nullcontext():
                peaks.append(count(counter, batch, attachment).peak_bytes)
            assert peaks[-1] == expected.peak_bytes
    assert peaks[1] < peaks[0] < peaks[2]


@contextmanager
def _not_run(model: nn.Module) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was run")

    vars(model)["forward"] = refuse
    try:
        yield
    finally:
        del vars(model)["forward"]


@pytest.mark.parametrize(
    "other",
    [
        {"0-1.ffn_down": {"method": "lora", "size": 4, "dropout": 0.1}},
        {"0.ffn_down": {"method": "lora", "size": 4}},
        {"0-1.ffn_up": {"method": "lora", "size": 4}},
    ],
)
def test_other_options_and_places_have_formulas_of_their_own(tiny_bert: Any, other: dict[str, Any]) -> None:
    backbone, batch = backbone_of(tiny_bert()), batch_of()
    counter = MemoryCounter(backbone.model)
    for sites in ({"0-1.ffn_down": {"method": "lora", "size": 4}}, other):
        with attach(backbone, Configuration.from_dict({"sites": sites})) as attachment:
            assert count(counter, batch, attachment) == followed(counter, batch)
    assert len(counter._formulas) == 2


def test_what_is_run_around_the_adapters_has_a_formula_of_its_own(tiny_bert: Any) -> None:
    backbone = backbone_of(tiny_bert(hidden_dropout_prob=0.1))
    counter, batch = MemoryCounter(backbone.model), batch_of()
    configuration = Configuration.from_dict({"sites": SITES["lora on top"]})
    for larger in (batch, batch_of(12, 20)):
        with attach(backbone, configuration) as attachment:
            assert count(counter, larger, attachment) == followed(counter, larger)
            with FrozenPrefix(backbone.model, backbone.blocks, 1):
                assert count(counter, larger, attachment) == followed(counter, larger)
    with FullFineTuning(backbone, Configuration()) as attachment:
        assert count(counter, batch, attachment) == followed(counter, batch)
    with attach(backbone, Configuration()) as attachment:
        assert count(counter, batch, attachment) == followed(counter, batch)
    assert len(counter._formulas) == 6


def _squared(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output @ (output.transpose(-1, -2) @ output)


def _cubed_where_large(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output**3 if isinstance(module, nn.Linear) and module.weight.shape[0] > 100 else output


@pytest.mark.parametrize("hook", [_squared, _cubed_where_large])
def test_what_no_formula_fits_is_followed(tiny_bert: Any, hook: Callable[..., Tensor]) -> None:
    """Bytes that are quadratic in a size, and a step that takes another path by a size."""
    backbone, batch = backbone_of(tiny_bert()), batch_of()
    counter = MemoryCounter(backbone.model)
    for size in (4, 32, 16):
        sites = {"0.ffn_down": {"method": "lora", "size": size}}
        with attach(backbone, Configuration.from_dict({"sites": sites})) as attachment:
            inner = next(one for name, one in backbone.model.named_modules() if "lora_A." in name)
            inner.register_forward_hook(hook)
            assert count(counter, batch, attachment) == followed(counter, batch)
    assert [*counter._formulas.values()] == [None]
    assert [*counter._formula.seen.values()] == [False]


def test_a_count_by_formula_leaves_the_generator_alone(tiny_bert: Any) -> None:
    backbone, batch = backbone_of(tiny_bert()), batch_of()
    counter = MemoryCounter(backbone.model)
    with attach(backbone, Configuration.from_dict({"sites": SITES["mixed"]})) as attachment:
        state, was_training = torch.get_rng_state(), backbone.model.training
        first = count(counter, batch, attachment)
        assert count(counter, batch, attachment) == first
        assert torch.equal(torch.get_rng_state(), state)
        assert backbone.model.training == was_training
        assert all(one.device.type == "cpu" for one in backbone.model.parameters())
