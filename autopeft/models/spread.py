"""Models whose blocks lie on several devices, as transformers' `device_map` spreads them.

accelerate's hooks are taken off: they send what a module is given to a device that is fixed when the model is
loaded, also where tensors without data stand in for the model's to be counted. The hooks here ask a module
where it lies.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import find_device, send_to_device
from torch import nn


def devices_of(module: nn.Module) -> tuple[torch.device, ...]:
    """Return the devices that a module's parameters lie on, in the order in which they come."""
    return tuple(dict.fromkeys(parameter.device for parameter in module.parameters()))


def keep_spread(model: nn.Module, blocks: Iterable[str]) -> None:
    """Have what is given to the parts of a model that lies on several devices sent to where they lie.

    What the model returns comes back to the device of what it was given. Does nothing on a single device.

    Args:
        model: The model.
        blocks: Qualified names of its blocks. What is outside of them may lie anywhere.

    Raises:
        ValueError: A block lies on two devices, or weights were offloaded.
    """
    devices = devices_of(model)
    has_no_weights = torch.device("meta") in devices
    if has_no_weights and hasattr(model, "hf_device_map"):
        raise ValueError(
            "device_map leaves weights on the CPU or on disk, beside the GPUs, where they cannot be trained "
            'with: use more GPUs, or fewer bits as by quantization="nf4".'
        )
    if has_no_weights or len(devices) < 2:  # some models make parameters on the CPU all the same
        return
    inside = {name: model.get_submodule(name) for name in blocks}
    for name, block in inside.items():
        if len(places := devices_of(block)) > 1:
            raise ValueError(
                f"device_map spreads the block {name} over {' and '.join(map(str, places))}: give each block "
                'one device, as device_map="auto" does.'
            )
    remove_hook_from_module(model, recurse=True)
    model.register_forward_hook(_bring_back, with_kwargs=True)
    in_blocks = set(chain.from_iterable(block.modules() for block in inside.values()))
    outside = [module for module in model.modules() if module not in in_blocks]
    with_tensors = [module for module in outside if [*module.parameters(False), *module.buffers(False)]]
    for module in (*inside.values(), *with_tensors):
        module.register_forward_pre_hook(_send, with_kwargs=True)


def _send(module: nn.Module, inputs: Any, keywords: Any) -> Any:
    device = next(chain(module.parameters(), module.buffers())).device
    return send_to_device(inputs, device), send_to_device(keywords, device)


def _bring_back(model: nn.Module, inputs: Any, keywords: Any, output: Any) -> Any:
    return send_to_device(output, find_device([inputs, keywords]))
