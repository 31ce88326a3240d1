"""An export for llama.cpp through its own converter, out of the source distribution of llama-cpp-python."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from autopeft.methods.lora import lora_scaling
from tests.export.test_targets import language_backbone
from tests.exports import export, lora_of_many_ranks, trained
from tests.tiny_models import tiny_chat_tokenizer

NAMES = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "attention_output": "attn_output",
    "ffn_gate": "ffn_gate",
    "ffn_up": "ffn_up",
    "ffn_down": "ffn_down",
    "qkv": "attn_qkv",
    "ffn_gate_up": "ffn_up",
}
"""What llama.cpp calls the roles of a Llama and of a Phi-3."""


@pytest.fixture(scope="module")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the converter's script, with what it imports beside it."""
    place = tmp_path_factory.mktemp("llama")
    package = "llama-cpp-python"
    how = ("download", "--quiet", "--no-deps", "--no-binary", package, package)
    done = subprocess.run([sys.executable, "-m", "pip", *how], cwd=place, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the package index does not give {package}: {done.stderr.strip().splitlines()[-1:]}")
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        wanted = [member for member in file.getmembers() if "/vendor/llama.cpp/" in member.name]
        file.extractall(place, [member for member in wanted if member.name.endswith(".py")], filter="data")
    (script,) = place.glob("*/vendor/llama.cpp/convert_lora_to_gguf.py")
    return script


def in_pairs(rows: Tensor, heads: int) -> Tensor:
    """Return a query's or key's rows as llama.cpp has them: of each head, in turn of either half."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3", "qwen3"])
def test_llama_cpp_reads_what_was_trained(architecture: str, converter: Path, tmp_path: Path) -> None:
    backbone = language_backbone(architecture)
    backbone.model.save_pretrained(tmp_path / "base")
    tiny_chat_tokenizer().save_pretrained(tmp_path / "base")
    configuration = lora_of_many_ranks(backbone)
    state = trained(backbone, configuration)
    folder = tmp_path / "adapter"
    report = export(backbone, configuration, folder, target="llama.cpp", base=str(tmp_path / "base"))
    printed = next(line for line in report.servers.splitlines() if "convert_lora_to_gguf.py" in line)
    python, script, *arguments = printed.split()
    assert (python, script) == ("python", converter.name)
    done = subprocess.run(
        [sys.executable, str(converter), *arguments, "--outtype", "f32"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    read = gguf.GGUFReader(tmp_path / "adapter.gguf")
    alpha = float(read.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in read.tensors}
    config: Any = backbone.model.config
    assert len(tensors) == 2 * len(configuration)
    for site, adapter in configuration:
        name = f"blk.{site.block}.{NAMES[site.role]}.weight"
        down, up = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        served = alpha / len(down) * up @ down  # as llama.cpp computes it
        trained_down, trained_up = (state[f"{site}.lora.lora_{letter}.weight"] for letter in "AB")
        expected = lora_scaling(adapter) * trained_up @ trained_down
        heads = {"query": config.num_attention_heads, "key": config.num_key_value_heads}.get(site.role)
        if architecture == "llama" and heads is not None:
            expected = in_pairs(expected, heads)
        torch.testing.assert_close(served, expected)
