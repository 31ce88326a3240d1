"""One trained LoRA gives every smaller one its initial weights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import Cost
from autopeft.evaluation.largest_lora import LargestLora, largest_lora
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import PerLayer, SearchSpace, Uniform
from tests.learnable import learner
from tests.tiny_models import draw_parameters, everywhere, logits_of, tiny_backbone, tiny_batch

SPACE = PerLayer(
    methods=("lora",), sizes={"rank": (1, 4)}, roles=("query", "ffn_up"), learning_rate=(1e-3, 3e-2)
)


def drawn_weights(backbone: Backbone) -> LargestLora:
    """Return LoRA of rank 8 at all sites, with random weights."""
    whole = everywhere(backbone, "lora", 8)
    with attach(backbone, whole) as attachment:
        draw_parameters(attachment.parameters.values(), std=0.2)
        return LargestLora(configuration=whole, tensors=attachment.state_dict(), cost=Cost(steps=3))


def of_rank(largest: LargestLora, rank: int) -> Configuration:
    return Configuration({site: Adapter("lora", rank) for site in largest.configuration.adapters})


def test_the_whole_computes_the_same_and_a_smaller_one_something_near() -> None:
    backbone = tiny_backbone("bert", new_head=True)
    largest, batch = drawn_weights(backbone), tiny_batch(rows=6)

    def logits(configuration: Configuration, state: dict[str, torch.Tensor]) -> torch.Tensor:
        with attach(backbone, configuration) as attachment:
            attachment.load_state_dict(state)
            return logits_of(backbone, batch)

    whole = logits(largest.configuration, dict(largest.tensors))
    again = logits(largest.configuration, largest.state(largest.configuration))
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-5)
    untrained = logits(
        Configuration(), {name: value for name, value in largest.tensors.items() if "head" in name}
    )
    near, far = (logits(of_rank(largest, rank), largest.state(of_rank(largest, rank))) for rank in (7, 1))
    distances = [float((other - whole).norm()) for other in (near, far, untrained)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_it_survives_a_file(tmp_path: Path) -> None:
    largest = drawn_weights(tiny_backbone("bert"))
    largest.save(tmp_path / "folder" / "largest.safetensors")
    again = LargestLora.load(tmp_path / "folder" / "largest.safetensors")
    assert again is not None
    assert (again.configuration, again.cost) == (largest.configuration, largest.cost)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in largest.tensors.items())
    assert LargestLora.load(tmp_path / "none.safetensors") is None


def test_what_it_does_not_contain_is_refused() -> None:
    site = Site(0, "query")
    largest = LargestLora(configuration=Configuration({site: Adapter("lora", 4)}), tensors={}, cost=Cost())
    for place, adapter in (
        (site, Adapter("lora", 8)),
        (Site(1, "query"), Adapter("lora", 2)),
        (site, Adapter("lora", 4, {"alpha": 16})),
        (Site(0, "ffn"), Adapter("series", 4)),
    ):
        assert not largest.contains(Configuration({place: adapter}))
        with pytest.raises(ValueError, match="cannot be cut from the largest"):
            largest.state(Configuration({place: adapter}))
    assert largest.contains(Configuration({site: Adapter("lora", 2)}))


def test_fused_experts_are_not_inherited() -> None:
    experts = Configuration({Site(0, "ffn_experts_up"): Adapter("lora", 4)})
    assert not LargestLora(configuration=experts, tensors={}, cost=Cost()).contains(experts)


@pytest.mark.parametrize(
    "space",
    [
        SPACE,
        Uniform(sizes={"rank": (1, 8)}, learning_rate=1e-3),
        PerLayer(methods=("series", "lora"), groups=2, sizes={"rank": (2, 8)}, learning_rate=1e-3),
    ],
)
def test_it_contains_every_lora_configuration_of_the_space(space: SearchSpace) -> None:
    backbone = learner()
    configuration = largest_lora(space, backbone)
    assert configuration is not None
    largest = LargestLora(configuration=configuration, tensors={}, cost=Cost())
    generator = random.Random(3)
    drawn = [space.draw(generator, backbone) for _ in range(30)]
    lora = [configuration for configuration in drawn if set(configuration.methods) <= {"lora"}]
    assert lora
    assert all(largest.contains(configuration) for configuration in lora)
