"""The model card of an export: figures, picture, how to load it, which servers can take it, limits."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from autopeft.core.configuration import Configuration
from autopeft.core.objectives import COST_OBJECTIVES
from autopeft.export.folder_format import Manifest, peft_groups, placements
from autopeft.export.merging import is_mergeable

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values vLLM accepts as --max-lora-rank."""
_TEST = "test_"
_OF_NO_SPLIT = ("examples_per_second",)
_LAYOUTS = {
    "peft": "a plain PEFT folder, classification head included",
    "mixed": "a folder of autopeft: one folder a method, the classification head beside them",
    "merged": "a whole transformers model, the adapters merged into its weights",
}


def describe_layout(manifest: Manifest) -> str:
    """Say what kind of folder an export is."""
    return _LAYOUTS[manifest.layout]


def how_to_load(manifest: Manifest, folder: str, options: Mapping[str, object]) -> str:
    """Return a Python snippet that loads an export.

    Args:
        manifest: What was exported.
        folder: The folder, as it is to be written in the snippet.
        options: What the base model has to be told; see `verification.base_options`.
    """
    auto = "AutoModelForSequenceClassification"
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({folder!r})"
    if manifest.layout == "merged":
        return (
            f"from transformers import {auto}, AutoTokenizer\n\n"
            f"model = {auto}.from_pretrained({folder!r})\n{tokenizer}"
        )
    unnamed = "# base: the model that was in memory, loaded again"
    if manifest.layout == "mixed":
        first = f"base = {manifest.base!r}" if manifest.base else unnamed
        return (
            f"import autopeft\nfrom transformers import AutoTokenizer\n\n{first}\n"
            f"model = autopeft.load_adapter(base, {folder!r})\n{tokenizer}"
        )
    imported = f"{auto}, AutoTokenizer" if manifest.base else "AutoTokenizer"
    first = _load_base(manifest, auto, options) if manifest.base else unnamed
    return (
        f"from peft import PeftModel\nfrom transformers import {imported}\n\n{first}\n"
        f"model = PeftModel.from_pretrained(base, {folder!r}).eval()\n{tokenizer}"
    )


def _load_base(manifest: Manifest, auto: str, options: Mapping[str, object]) -> str:
    """Return the lines that load the base model of a plain PEFT folder, with the names of the labels."""
    arguments = {name: repr(value) for name, value in options.items()}
    labels = ""
    if not manifest.head.has_numbered_labels:
        labels = f"labels = {list(manifest.head.labels)!r}\n"
        arguments |= {
            "id2label": "dict(enumerate(labels))",
            "label2id": "{label: index for index, label in enumerate(labels)}",
        }
    lines = [repr(manifest.base), *(f"{name}={value}" for name, value in arguments.items())]
    return f"{labels}base = {auto}.from_pretrained(\n    " + ",\n    ".join(lines) + ",\n)"


def _autopeft_snippet(manifest: Manifest, folder: str) -> list[str]:
    """Return the other way to load a plain PEFT folder."""
    if manifest.layout != "peft":
        return []
    base = repr(manifest.base) if manifest.base else "base"
    return ["Or, with autopeft:", f"```python\nmodel = autopeft.load_adapter({base}, {folder!r})\n```"]


def servers(manifest: Manifest, configuration: Configuration) -> str:
    """Say which servers can take an export.

    vLLM's rules are those of its `PEFTHelper`: LoRA alone, no `modules_to_save`, one rank and one alpha
    for the scaling of all modules (patterns are not read), and a largest rank out of `VLLM_RANKS`.
    """
    if manifest.layout == "merged":
        return (
            "Whatever runs transformers models of this architecture; in vLLM as a pooling model where "
            "it has the architecture."
        )
    reasons = [f"it takes no classification head ({', '.join(manifest.head.modules)}) with an adapter"]
    if configuration.methods != ("lora",):
        reasons.append(f"it takes LoRA alone, not {', '.join(configuration.methods) or 'a head alone'}")
    else:
        reasons += _lora_obstacles(manifest, configuration)
    here = (
        "Whatever loads adapters with peft."
        if manifest.layout == "peft"
        else "None as it is: load it with autopeft.load_adapter."
    )
    text = f"{here} vLLM cannot take the adapter: {'; '.join(reasons)}."
    if is_mergeable(configuration):
        text += " Export it with merged=True for a model that needs no support for adapters."
    return text


def _lora_obstacles(manifest: Manifest, configuration: Configuration) -> list[str]:
    obstacles = []
    ranks = sorted({adapter.size for _, adapter in configuration if adapter.size is not None})
    room = next((rank for rank in VLLM_RANKS if rank >= ranks[-1]), None)
    scalings = {
        (adapter.size, adapter.option("alpha"), adapter.option("rslora")) for _, adapter in configuration
    }
    if len(peft_groups(placements(configuration, manifest.sites))) > 1:
        obstacles.append("it takes one LoRA config, not several")
    if len(scalings) > 1:
        obstacles.append(
            f"it scales all modules by one rank and alpha, these have ranks {ranks[0]} to {ranks[-1]}"
            if len(ranks) > 1
            else "it scales all modules by one alpha"
        )
    if room is None:
        obstacles.append(f"its largest rank is {VLLM_RANKS[-1]}, this has {ranks[-1]}")
    else:
        obstacles.append(f"otherwise max_lora_rank={room} would do")
    return obstacles


def model_card(
    *,
    manifest: Manifest,
    configuration: Configuration,
    values: Mapping[str, float],
    details: Mapping[str, str],
    folder: str,
    options: Mapping[str, object],
    check: str,
    trainings: int,
) -> str:
    """Return the README.md of an export, with the metadata block of the Hugging Face hub.

    Args:
        manifest: What was exported.
        configuration: What was trained.
        values: Figures by name; those of the test split begin with "test_".
        details: Task, data set, search, trial and so on, by name.
        folder: Name of the folder, as snippets call it.
        options: What the base model has to be told; see `verification.base_options`.
        check: How the export was checked.
        trainings: Number of trainings behind the figures, each with a seed of its own.
    """
    methods = ", ".join(configuration.methods) or "the head alone"
    name = _escaped(Path(manifest.base).name or "base model")
    base, source = "a model that was in memory", manifest
    if manifest.base:
        base = name if _is_local(manifest.base) else _escaped(manifest.base)
    if manifest.base and _is_local(manifest.base):  # a card is published: no path of this machine
        base += ", a local folder"
        source = dataclasses.replace(manifest, base=f"path/to/{Path(manifest.base).name}")
    details = {key: Path(text).name if _is_local(text) else text for key, text in details.items()}
    sections = [
        f"# {name}, fine-tuned with {methods}",
        f"Found by autopeft. This is {describe_layout(manifest)}. Base model: {base}.",
        "## Figures",
        _figures(values),
        "## Configuration",
        f"Learning rate {configuration.learning_rate:g}, weight decay {configuration.weight_decay:g}; "
        f"{len(configuration)} adapters. Blocks down, roles across:",
        f"```\n{configuration.grid()}\n```",
        "## How to load it",
        f"```python\n{how_to_load(source, folder, options)}\n```",
        *_autopeft_snippet(source, folder),
        f"Labels in the order of the logits: {', '.join(map(_escaped, manifest.head.labels))}.",
        check,
        "## Servers",
        servers(manifest, configuration),
        "## Where it comes from",
        _table(("", ""), [*details.items(), ("base fingerprint", manifest.base_fingerprint)]),
        _table(("package", "version"), list(manifest.versions.items())),
        "## Limits",
        _limits(values, trainings),
    ]
    return f"{_front_matter(manifest, configuration)}\n" + "\n\n".join(sections) + "\n"


def _front_matter(manifest: Manifest, configuration: Configuration) -> str:
    merged = manifest.layout == "merged"
    data: dict[str, object] = {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-classification",
        "tags": ["autopeft", *configuration.methods],
    }
    if manifest.base and not _is_local(manifest.base):  # the hub takes names alone
        data["base_model"] = manifest.base
        data["base_model_relation"] = "finetune" if merged else "adapter"
    return f"---\n{yaml.safe_dump(data, sort_keys=True)}---\n"


def _figures(values: Mapping[str, float]) -> str:
    if not values:
        return "None were given."
    rows = []
    for name, value in sorted(values.items(), key=lambda item: item[0].startswith(_TEST)):
        cost = COST_OBJECTIVES.get(name)
        text = f"{value:.4f}" if cost is None else cost.format(value)
        split = (
            "–"
            if cost is not None or name in _OF_NO_SPLIT
            else "test"
            if name.startswith(_TEST)
            else "validation"
        )
        rows.append((name.removeprefix(_TEST), split, text))
    return _table(("figure", "split", "value"), rows)


def _limits(values: Mapping[str, float], trainings: int) -> str:
    lines = [
        "Figures on the validation split are those the search chose by: they are optimistic.",
        "Figures are those of one training with one seed; another seed gives other ones."
        if trainings == 1
        else f"Validation figures are means over {trainings} trainings, each with a seed of its own.",
        "Use it with the very base model named above: nothing checks that at loading.",
    ]
    if any(name.startswith(_TEST) for name in values):
        lines.insert(1, "The test split was not used in the search.")
    else:
        lines.insert(1, "It was not scored on a test split.")
    return "\n".join(f"- {line}" for line in lines)


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    cells = [heading, tuple("---" for _ in heading), *rows]
    return "\n".join(f"| {' | '.join(map(_escaped, row))} |" for row in cells)


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is, on a single line."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


def _is_local(source: str) -> bool:
    """Say whether a model or a data set is named by its place on this machine."""
    return source.startswith(("/", "~", "./", "../")) or os.path.exists(source)
