"""Exports of adapters on bases in 4 and 8 bits, loaded again in a fresh process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import autopeft
from autopeft import Adapter, Configuration, Site
from autopeft.core.export_report import ExportReport
from autopeft.core.precision import quickest_precision
from autopeft.export.export import export_adapter
from autopeft.models.loading import Quantization
from autopeft.models.quantized_layers import quantization_of
from autopeft.tasks.batch import model_inputs
from tests.exports import trained
from tests.quantized import quantized, quiet, save_base
from tests.tasks.test_causal_lm import task_of

pytestmark = quiet


def export(
    folder: Path,
    quantization: Quantization,
    architecture: str = "llama",
    *,
    series: bool = False,
    target: str | None = None,
) -> ExportReport:
    """Export LoRA everywhere, perhaps with a series adapter on top, on a base that lies beside it."""
    task = task_of(24)
    backbone = quantized(save_base(folder / "base", architecture), quantization, task)
    sites = {site: [Adapter("lora", 4)] for site, shape in backbone.sites.items() if shape.kind == "linear"}
    configuration = Configuration(sites | ({Site(1, "ffn"): [Adapter("series", 4)]} if series else {}))
    probe = model_inputs(task.data(backbone.processor, batch_size=4, seed=0).largest_batch())
    state = trained(backbone, configuration)
    return export_adapter(backbone, configuration, state, folder / "out", probe=probe, target=target)


@pytest.mark.slow
def test_a_plain_folder_says_how_its_base_was_quantised(tmp_path: Path) -> None:
    report = export(tmp_path, "nf4")
    assert "in a fresh process that never imported autopeft" in report.checked
    assert "'bnb_4bit_quant_type': 'nf4'" in report.how_to_load
    loaded: Any = autopeft.load_adapter(tmp_path / "base", tmp_path / "out")
    assert (quantization_of(loaded.get_base_model()) or {})["load_in_4bit"]


@pytest.mark.slow
def test_a_folder_of_several_methods_loads_its_base_quantised(tmp_path: Path) -> None:
    report = export(tmp_path, "int8", series=True)
    assert "in a fresh process" in report.checked
    loaded: Any = autopeft.load_adapter(tmp_path / "base", tmp_path / "out")
    assert quantization_of(loaded) == {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}


@pytest.mark.parametrize(
    ("quantization", "architecture"), [("nf4", "llama"), pytest.param("int8", "gpt2", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_a_merged_model_is_not_quantised(
    quantization: Quantization, architecture: str, tmp_path: Path
) -> None:
    report = export(tmp_path, quantization, architecture, target="merged")
    assert "in a fresh process" in report.checked
    assert "quantization_config" not in report.how_to_load
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    is_quick = quickest_precision(torch.device("cpu")) == "bf16-mixed"  # else float32 is kept
    assert {parameter.dtype for parameter in model.parameters()} == {
        torch.bfloat16 if is_quick else torch.float32
    }
    assert quantization_of(model) is None
