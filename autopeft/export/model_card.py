"""The model card of an export: figures, picture, how to load it, which servers can take it, limits."""

from __future__ import annotations

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
    if manifest.layout == "merged":
        return (
            f"from transformers import {auto}, AutoTokenizer\n\n"
            f"model = {auto}.from_pretrained({folder!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({folder!r})"
        )
    named = repr(manifest.base)
    unnamed = "# base: the model that was in memory, loaded again"
    if manifest.layout == "mixed":
        first = f"base = {named}" if manifest.base else unnamed
        return f"import autopeft\n\n{first}\nmodel = autopeft.load_adapter(base, {folder!r})"
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    first = f"base = {auto}.from_pretrained({named}, {arguments})" if manifest.base else unnamed
    imported = f"from transformers import {auto}\n" if manifest.base else ""
    return (
        f"from peft import PeftModel\n{imported}\n{first}\n"
        f"model = PeftModel.from_pretrained(base, {folder!r}).eval()"
    )


def _autopeft_snippet(manifest: Manifest, folder: str) -> list[str]:
    """Return the other way to load a plain PEFT folder, which sets the labels' names as well."""
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
    ranks = sorted({one.size for _, one in configuration if one.size is not None})
    room = next((one for one in VLLM_RANKS if one >= ranks[-1]), None)
    scalings = {(one.size, one.option("alpha"), one.option("rslora")) for _, one in configuration}
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
    """
    base = manifest.base or "a model that was in memory"
    methods = ", ".join(configuration.methods) or "the head alone"
    name = Path(manifest.base).name or "base model"
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
        f"```python\n{how_to_load(manifest, folder, options)}\n```",
        *_autopeft_snippet(manifest, folder),
        f"Labels in the order of the logits: {', '.join(manifest.head.labels)}.",
        check,
        "## Servers",
        servers(manifest, configuration),
        "## Where it comes from",
        _table(("", ""), [*details.items(), ("base fingerprint", manifest.base_fingerprint)]),
        _table(("package", "version"), list(manifest.versions.items())),
        "## Limits",
        _limits(values),
    ]
    return f"{_front_matter(manifest, configuration)}\n" + "\n\n".join(sections) + "\n"


def _front_matter(manifest: Manifest, configuration: Configuration) -> str:
    merged = manifest.layout == "merged"
    data: dict[str, object] = {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-classification",
        "tags": ["autopeft", *configuration.methods],
    }
    if manifest.base and not Path(manifest.base).exists():  # the hub takes names alone
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
        split = "–" if cost is not None else "test" if name.startswith(_TEST) else "validation"
        rows.append((name.removeprefix(_TEST), split, text))
    return _table(("figure", "split", "value"), rows)


def _limits(values: Mapping[str, float]) -> str:
    lines = [
        "Figures on the validation split are those the search chose by: they are optimistic.",
        "One training run with one seed; another seed gives other figures.",
        "Use it with the very base model named above: nothing checks that at loading.",
    ]
    if any(name.startswith(_TEST) for name in values):
        lines.insert(1, "The test split was not used in the search.")
    else:
        lines.insert(1, "It was not scored on a test split.")
    return "\n".join(f"- {line}" for line in lines)


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    cells = [heading, tuple("---" for _ in heading), *rows]
    escaped = [[one.replace("|", "\\|").replace("\n", " ") for one in row] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)
