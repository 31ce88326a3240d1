"""Load what an export wrote, as its user will, and compare its logits with the trained model's.

The trained model computes where it was trained, and what is loaded again on the CPU, so that no device has to
hold the model twice.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from autopeft.core.configuration import Configuration
from autopeft.core.precision import autocast
from autopeft.export.folder_format import CONFIGURATION_FILE, Manifest
from autopeft.export.loading import load_adapter
from autopeft.export.merging import shared_copy
from autopeft.export.serving import as_served
from autopeft.methods import METHODS, attach, is_found_elsewhere
from autopeft.methods.peft_base import quiet_peft
from autopeft.models.backbone import Backbone
from autopeft.models.quantized_layers import quantization_of

_SCRIPT = Path(__file__).resolve().with_name("load_script.py")
PROBE_ROWS = 8
"""Rows of a batch on which logits are compared."""
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""What rounding may make of logits, by the type of the weights, as a share of the logits' spread."""
_OTHER_KERNELS = 1e-3
"""The same in float32, where one side was computed on a GPU."""
_MERGING = 10
"""(W + sBA)x and Wx + sB(Ax) round differently, in every layer."""
_CHANGE = 1 / 3
"""How much of what adapters change may be missing, in root mean square over logits.

Of four exports on SmolLM2 in bfloat16 rounding left out 0.26 at most, half of an adapter 0.42 at least.
"""
_NOISE = 3e-2
"""The same as a share of the logits' standard deviation, for adapters that change little: 0.023 there."""
_UNPACKED = 0.2
"""The same where a model in 8 bits, which rounds its activations too, was merged: 0.14 on SmolLM2."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of loading an export again."""

    difference: float  # largest absolute difference of the logits
    tolerance: float  # the largest difference that is taken for rounding
    how: str  # where it was loaded, as a phrase

    def __str__(self) -> str:
        return (
            f"Checked: loaded {self.how}, the largest difference of its logits on a batch was "
            f"{self.difference:.1e} (rounding explains {self.tolerance:.0e})."
        )


def trained_logits(
    backbone: Backbone,
    configuration: Configuration,
    state: Mapping[str, Tensor],
    probe: Mapping[str, Tensor],
    prediction: str = "logits",
) -> Tensor:
    """Return the logits of the trained configuration on a batch, in float32 on the CPU.

    Adapters and head are in float32, whatever the base model is in; a base in less computes under autocast,
    as in training.
    """
    model = backbone.model
    training = model.training
    with attach(backbone, configuration) as attachment, backbone.computing_in(backbone.own_precision):
        attachment.load_state_dict(state)
        try:
            return _predicted(model.eval(), probe, prediction)
        finally:
            model.train(training)


def check_export(
    folder: Path,
    manifest: Manifest,
    backbone: Backbone,
    probe: Mapping[str, Tensor],
    expected: Tensor,
    prediction: str = "logits",
    *,
    without: Tensor | None = None,
    server: str | None = None,
    fresh: bool = True,
) -> Check:
    """Load an exported folder and compare its logits with the expected ones.

    This happens in a fresh Python process, without autopeft where the layout does not need it. Where that is
    not wanted, the base model cannot be loaded again, or no other process would know a method, a copy of the
    base model in this process stands for it. A merged model always has a process of its own. With the name of
    a server, what it makes of the folder by its own rule is compared as well.

    Below single precision, what was loaded computes under autocast too, so that both sides round alike. As
    rounding may still move a logit as far as some adapters do, the export must also have most of what these
    change, in root mean square, where the logits `without` them are given.
    """
    methods = Configuration.load(folder / CONFIGURATION_FILE).methods
    unknown = [name for name in methods if not is_found_elsewhere(name)] if manifest.layout == "mixed" else []
    obstacle = ""
    if stored_config(backbone.origin) is None:
        obstacle = ", which cannot be loaded from anywhere"
    elif unknown:
        obstacle = f": another process would find {unknown[0]!r} by an entry point alone"
    if manifest.layout == "merged" or (fresh and not obstacle):
        how = "in a fresh process" + (" that never imported autopeft" if manifest.layout != "mixed" else "")
        found = _predicted_by_fresh_process(folder, manifest, backbone, probe, prediction)
    else:
        how = f"in this process, on a copy of the base model{obstacle if fresh else ''}"
        changed = [shape.module for shape in manifest.sites.values()]
        own = changed if any(METHODS[name].changes_weights for name in methods) else ()
        copied = shared_copy(backbone.model, own)
        if manifest.layout == "peft":  # as its users load it, who do without autopeft
            with torch.random.fork_rng(devices=[]), quiet_peft():
                place = str(folder.absolute())
                loaded: Any = PeftModel.from_pretrained(copied, place, local_files_only=True).eval()
        else:
            loaded = load_adapter(copied, folder)
        with autocast(backbone.own_precision, backbone.model.device.type):
            found = _predicted(loaded, probe, prediction)
    if server is not None:
        how += f", and as {server} reads it"
        as_there = as_served(server, folder, manifest)
        found = torch.stack([found, trained_logits(backbone, *as_there, probe, prediction)])
    difference = float((found - expected).abs().max())
    check = Check(difference=difference, tolerance=_tolerance(manifest, backbone.model, expected), how=how)
    mean, most = _distance(found, expected), math.inf
    if without is not None:
        is_unpacked = manifest.layout == "merged" and 8 in backbone.quantized.values()
        noise = (_UNPACKED if is_unpacked else _NOISE) * max(1.0, float(expected.std(correction=0)))
        most = max(_CHANGE * _distance(expected, without), noise)
    if not (difference <= check.tolerance and mean <= most):  # so that NaN is an error
        raise RuntimeError(
            f"The export does not reproduce the trained model: loaded {how}, its logits differ by up to "
            f"{difference:.1e} and by {mean:.1e} in root mean square, expected at most {check.tolerance:.0e} "
            f"and {most:.0e}. If the base model was changed after it was loaded from {backbone.origin!r}, "
            "save it to a folder and use that as the backbone."
        )
    return check


def _distance(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference."""
    return float(torch.dist(found, expected)) / math.sqrt(found.numel())


@torch.no_grad()
def _predicted(model: Any, batch: Mapping[str, Tensor], prediction: str) -> Tensor:
    output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    found: Tensor = getattr(output, prediction)
    return found.float().cpu()


def stored_config(origin: str) -> Any:
    """Return the config a base model is stored with, or None where it cannot be loaded from anywhere."""
    try:
        return AutoConfig.from_pretrained(origin, trust_remote_code=False) if origin else None
    except (OSError, ValueError):
        return None


def base_options(manifest: Manifest, origin: str) -> dict[str, object]:
    """Return what `from_pretrained` must be told to load the base model as it was trained.

    Labels' names make no difference to the logits and are left out; padding token and type are given
    only where the base model's own config says otherwise.
    """
    head = manifest.head
    options: dict[str, object] = {"num_labels": len(head.labels)} if head.labels else {}
    config = stored_config(origin)
    if config is None:
        return options
    headed = any("Classification" in name for name in config.architectures or ())
    if headed and head.labels and config.num_labels != len(head.labels):
        options["ignore_mismatched_sizes"] = True  # all of the head comes from the export
    if head.pad_token_id != getattr(config, "pad_token_id", None):
        options["pad_token_id"] = head.pad_token_id
    if str(config.dtype or torch.float32).removeprefix("torch.") != head.dtype:
        options["dtype"] = head.dtype
    if manifest.quantization is not None and getattr(config, "quantization_config", None) is None:
        options["quantization_config"] = dict(manifest.quantization)
    return options


def _tolerance(manifest: Manifest, model: PreTrainedModel, logits: Tensor) -> float:
    # Products with weights in 4 and 8 bits are formed in less, whatever the other weights are in.
    dtype = model.dtype if quantization_of(model) is None else torch.bfloat16
    share = _ROUNDING[dtype]
    if model.device.type != "cpu":
        share = max(share, _OTHER_KERNELS)
    elif manifest.layout == "merged" and dtype.itemsize >= 4:
        share *= _MERGING
    # Small logits are differences of large numbers, and no more exact for being small.
    return share * max(1.0, float(logits.max() - logits.min()))


def _predicted_by_fresh_process(
    folder: Path, manifest: Manifest, backbone: Backbone, probe: Mapping[str, Tensor], prediction: str
) -> Tensor:
    with tempfile.TemporaryDirectory(prefix="autopeft-check-") as scratch:
        options = base_options(manifest, backbone.origin) if manifest.layout == "peft" else {}
        if manifest.quantization is not None:
            options["device_map"] = {"": "cpu"}  # else bitsandbytes takes the first GPU there is
        job = {
            "layout": manifest.layout,
            "auto_class": manifest.head.auto_class,
            "prediction": prediction,
            "base": backbone.origin,
            "folder": str(folder.resolve()),
            "options": options,
            "threads": torch.get_num_threads(),
            "autocast": backbone.own_precision == "bf16-mixed",
        }
        Path(scratch, "job.json").write_text(json.dumps(job), encoding="utf-8")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in probe.items()}
        save_file(tensors, Path(scratch, "probe.safetensors"))
        environment = dict(os.environ)
        if manifest.layout == "mixed":  # this very autopeft, installed or not
            paths = [str(_SCRIPT.parents[2]), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        done = subprocess.run(
            # -P: else the script's folder would be searched first, and our module names found there.
            [sys.executable, "-P", str(_SCRIPT), scratch],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise RuntimeError(f"The export does not load in a fresh process:\n{last}")
        return load_file(Path(scratch, "predicted.safetensors"))["predicted"]
