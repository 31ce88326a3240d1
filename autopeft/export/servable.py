"""One rank and one scale for a whole LoRA, which is what servers read the same way."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import pad

from autopeft.core.configuration import Adapter, Configuration
from autopeft.methods.lora import lora_scaling, lora_tensors


def uniform_lora(
    configuration: Configuration, state: Mapping[str, Tensor]
) -> tuple[Configuration, dict[str, Tensor]]:
    """Return the same function with one rank for all modules and a scale of 1.

    peft scales each module by its own α/r. vLLM and SGLang read one rank and one α for all modules and drop
    the patterns; llama.cpp divides one α by the rank of each tensor. With each scale folded into B, A and B
    padded with zeros to the largest rank R, and α = R, all of them compute what was trained.

    Args:
        configuration: Where there is an adapter, it is a LoRA.
        state: The trained tensors, as `Attachment.state_dict` gives them.

    Raises:
        ValueError: There is another method than LoRA, or none.
    """
    methods = ", ".join(configuration.methods) or "a head alone"
    if any(site.kind == "experts" for site, _ in configuration):
        methods = "LoRA on experts"
    if methods != "lora":
        raise ValueError(f"Servers take LoRA on linear layers alone, this is {methods}: use merged=True.")
    rank = max(adapter.size or 0 for _, adapter in configuration)
    folded = dict(state)
    for site, adapter in configuration:
        assert adapter.size is not None
        missing = rank - adapter.size
        down, up = lora_tensors(site)
        folded[down] = pad(state[down], (0, 0, 0, missing))
        folded[up] = pad(state[up] * lora_scaling(adapter), (0, missing))
    plain = Adapter("lora", rank, {"alpha": rank, "rslora": False})
    return configuration.replace(adapters={site: plain for site, _ in configuration}), folded
