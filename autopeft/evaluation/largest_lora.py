"""The largest LoRA of a space: one training that gives every smaller LoRA its initial weights."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Self

from torch import Tensor

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.durable_files import load_tensors, save_tensors, unless_damaged
from autopeft.core.evaluation import Cost
from autopeft.evaluation.derived import cut_state
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import SearchSpace

METHOD = "lora"
_DRAWS = 32
_METADATA_KEY = "autopeft"


@dataclass(frozen=True, kw_only=True)
class LargestLora:
    """LoRA of a trained configuration, cut at every site to smaller ranks.

    Attributes:
        configuration: LoRA at one or more sites, of the largest ranks.
        tensors: Its trained tensors, as its `Attachment` names them.
        cost: What the training cost.
    """

    configuration: Configuration
    tensors: Mapping[str, Tensor]
    cost: Cost

    def contains(self, configuration: Configuration) -> bool:
        """Say whether a configuration has at each site a LoRA of at most its rank, with the same options."""
        whole = self.configuration.adapters
        return all(
            site in whole
            and site.kind == "linear"  # fused experts have one update for each, which stay whole
            and (adapter.method, adapter.options) == (METHOD, whole[site][0].options)
            and adapter.size_or_zero <= whole[site][0].size_or_zero
            for site, adapter in configuration
        )

    def state(self, configuration: Configuration) -> dict[str, Tensor]:
        """Return a smaller configuration's tensors: the largest singular values at its sites, and the head.

        Raises:
            ValueError: The configuration is not contained.
        """
        if not self.contains(configuration):
            raise ValueError(f"{configuration!r} has LoRA that cannot be cut from the largest.")
        return cut_state(self.configuration, self.tensors, configuration)

    def save(self, path: Path) -> None:
        """Write it to a safetensors file.

        Raises:
            OSError: The file cannot be written.
        """
        metadata = {"configuration": self.configuration.to_dict(), "cost": asdict(self.cost)}
        save_tensors(path, self.tensors, {_METADATA_KEY: json.dumps(metadata)})

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read what `save` wrote; None if the file is missing or damaged."""
        return unless_damaged(path, partial(cls._read, path))

    @classmethod
    def _read(cls, path: Path) -> Self | None:
        if (found := load_tensors(path)) is None:
            return None
        tensors, texts = found
        metadata = json.loads(texts[_METADATA_KEY])
        configuration = Configuration.from_dict(metadata["configuration"])
        return cls(configuration=configuration, tensors=tensors, cost=Cost(**metadata["cost"]))


def largest_lora(space: SearchSpace, backbone: Backbone, seed: int = 0) -> Configuration | None:
    """Return LoRA of the largest rank at every site where the space has any; None without one.

    The space's extremes, baselines and some draws are searched, also where LoRA stands beside other methods.
    """
    points = [*space.extremes(backbone), *(baseline.configuration for baseline in space.baselines(backbone))]
    generator = random.Random(f"largest LoRA:{seed}")
    points += [space.draw(generator, backbone) for _ in range(_DRAWS)]
    largest: dict[Site, Adapter] = {}
    for site, adapter in chain.from_iterable(points):
        if adapter.method == METHOD and site.kind == "linear":
            known = largest.get(site)
            if known is None or adapter.size_or_zero > known.size_or_zero:
                largest[site] = adapter
    return Configuration(largest, learning_rate=points[0].learning_rate) if largest else None
