"""The folder that peft's public comparison of methods trains anew: a config and training settings.

The folder goes to `experiments/<method>/<name>` of `method_comparison/MetaMathQA` in peft's repository.
"""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftConfig, get_peft_model

from autopeft.core.configuration import Configuration
from autopeft.core.method_specs import method_spec
from autopeft.export.folder_format import TaskHead, peft_groups, save_config
from autopeft.export.merging import shared_copy
from autopeft.methods import count_parameters, placements
from autopeft.methods.peft_base import quiet_peft
from autopeft.models.backbone import Backbone
from autopeft.models.quantized_layers import quantization_of

TRAINING_FILE = "training_params.json"


def write_comparison(folder: Path, backbone: Backbone, configuration: Configuration) -> None:
    """Write an experiment of the comparison: what is not said is its default, as the 5,000 steps."""
    ((method, group),) = peft_groups(placements(configuration, backbone.sites)).values()
    config = method.peft_config(group)
    config.task_type = "CAUSAL_LM"
    save_config(config, folder)
    quantization = quantization_of(backbone.model) or {}
    bits = "int4" if quantization.get("load_in_4bit") else "int8"
    settings = {
        **({"model_id": backbone.origin} if backbone.origin else {}),
        "dtype": bits if quantization else TaskHead.of(backbone).dtype,
        "optimizer_kwargs": {
            "lr": configuration.learning_rate * method_spec(method.name).rate,
            "weight_decay": configuration.weight_decay,
        },
    }
    (folder / TRAINING_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def check_comparison(folder: Path, backbone: Backbone, configuration: Configuration) -> str:
    """Have peft make the model that the comparison trains, and count its parameters.

    Raises:
        RuntimeError: There are more or fewer than the configuration has.
    """
    own = [backbone.shape(site).module for site in configuration.adapters]
    with quiet_peft():
        config = PeftConfig.from_pretrained(str(folder))
        found, _ = get_peft_model(shared_copy(backbone.model, own), config).get_nb_trainable_parameters()
    if found != (expected := count_parameters(backbone, configuration)):
        raise RuntimeError(f"peft trains {found:,} parameters by this config, the trial has {expected:,}.")
    return f"Checked: peft trains {found:,} parameters by this config, as the trial did."
