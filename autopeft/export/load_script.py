"""Load an exported folder in a process of its own and write what it predicts for a probe.

`verification.py` runs this file as a script. A layout that needs no autopeft is loaded without it:
this file imports nothing of autopeft at the top, and makes sure that nothing else did.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file


def load(job: dict[str, Any]) -> Any:
    """Return the model of a job, the way a user of its layout would load it."""
    if job["layout"] == "mixed":
        from autopeft.export.loading import load_adapter

        return load_adapter(job["base"], job["folder"])
    source = job["folder"] if job["layout"] == "merged" else job["base"]
    model: Any = getattr(transformers, job["auto_class"]).from_pretrained(
        source, use_safetensors=True, trust_remote_code=False, **job["options"]
    )
    if job["layout"] == "peft":
        model = PeftModel.from_pretrained(model, job["folder"])
    if "autopeft" in sys.modules:
        raise RuntimeError(f"autopeft was imported to load a {job['layout']} folder.")
    return model


def main(scratch: Path) -> None:
    """Do the job that lies in a folder, and put what was predicted beside it."""
    job = json.loads((scratch / "job.json").read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=job["autocast"]):
        output = load(job).eval()(**load_file(scratch / "probe.safetensors"))
    predicted = getattr(output, job["prediction"]).float().cpu().contiguous()
    save_file({"predicted": predicted}, scratch / "predicted.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
