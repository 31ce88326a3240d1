"""The loss of an exported language model on batches, computed in a process that loads it as its user does."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

_IGNORED = -100


@dataclass(frozen=True)
class LossJob:
    """What to load: a base model, the dtype of its weights ("float32"), and the folder of its adapter."""

    base: str
    dtype: str
    folder: str


def fresh_loss(job: LossJob, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Return the mean loss a token in a fresh process, by plain peft where the folder is a plain one."""
    with tempfile.TemporaryDirectory() as scratch:
        named = {
            f"{index}.{name}": tensor
            for index, batch in enumerate(batches)
            for name, tensor in batch.items()
            if name in ("input_ids", "attention_mask", "labels")
        }
        save_file(named, Path(scratch) / "batches.safetensors")
        Path(scratch, "job.json").write_text(json.dumps(asdict(job)))
        command = [sys.executable, "-m", "benchmarks.fresh_loss", scratch]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(done.stdout.split()[-1])


def _loaded(job: LossJob) -> torch.nn.Module:
    base = AutoModelForCausalLM.from_pretrained(job.base, dtype=job.dtype)
    if not Path(job.folder, "adapter_config.json").exists():
        from autopeft import load_adapter

        return load_adapter(base, job.folder)
    from peft import PeftModel

    model: torch.nn.Module = PeftModel.from_pretrained(base, job.folder)
    assert "autopeft" not in sys.modules
    return model


@torch.no_grad()
def main(scratch: Path) -> None:
    """Load, and print the loss."""
    torch.set_num_threads(1)
    model = _loaded(LossJob(**json.loads((scratch / "job.json").read_text()))).eval()
    batches: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(scratch / "batches.safetensors").items():
        index, _, key = name.partition(".")
        batches.setdefault(index, {})[key] = tensor
    total, count = 0.0, 0
    for batch in batches.values():
        labels = batch.pop("labels")[:, 1:].flatten()
        logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        total += float(functional.cross_entropy(logits, labels, ignore_index=_IGNORED, reduction="sum"))
        count += int((labels != _IGNORED).sum())
    print(total / count)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
