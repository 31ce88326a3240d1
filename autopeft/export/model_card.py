"""The model card of an export: figures, picture, how to load it, which servers can take it, limits."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load, try_to_load_from_cache
from transformers.pipelines import SUPPORTED_TASKS
from yaml import YAMLError

from autopeft.core.configuration import Configuration
from autopeft.core.export_report import Conversion
from autopeft.core.objectives import COST_OBJECTIVES, GENERATION_SPEEDS
from autopeft.core.tables import markdown_text
from autopeft.export.folder_format import Manifest
from autopeft.export.serving import SERVERS, how_to_serve
from autopeft.export.targets import COMPARISON

_TAGS = {"AutoModelForSeq2SeqLM": "text2text-generation"}
"""The Hub's tags of what transformers has no pipeline for any more."""
_LIBRARIES = {"peft": "peft", "mixed": "autopeft", "merged": "transformers"}
"""What loads each layout."""
_TEST = "test_"
_NOT_OF_A_SPLIT = ("examples_per_second",)
LAYOUTS = {
    "peft": "a plain PEFT folder",
    "mixed": "a folder of autopeft: one folder a method",
    "merged": "a whole transformers model, the adapters merged into its weights",
}
"""What kind of folder each layout is, as a phrase."""


def kind_of(manifest: Manifest) -> str:
    """Return what kind of folder an export is, as a phrase."""
    has_head = manifest.head.modules and manifest.layout != "merged"
    return LAYOUTS[manifest.layout] + (", the trained head included" if has_head else "")


def how_to_load(manifest: Manifest, folder: str, options: Mapping[str, object]) -> str:
    """Return a Python snippet that loads an export; for the options see `verification.base_options`."""
    auto_class = manifest.head.auto_class
    processor = manifest.head.processor_class
    imported = f"{auto_class}, {processor}"
    base = "# base: the model that was in memory, loaded again"
    if manifest.layout == "merged":
        lines = [
            f"from transformers import {imported}\n",
            f"model = {auto_class}.from_pretrained({folder!r})",
        ]
    elif manifest.layout == "mixed":
        base = f"base = {manifest.base!r}" if manifest.base else base
        lines = ["import autopeft", f"from transformers import {processor}\n", base]
        lines.append(f"model = autopeft.load_adapter(base, {folder!r})")
    else:
        if manifest.base:
            base = _load_base(manifest, options)
        else:
            imported = processor
        lines = ["from peft import PeftModel", f"from transformers import {imported}\n", base]
        lines.append(f"model = PeftModel.from_pretrained(base, {folder!r}).eval()")
    made = "tokenizer" if processor == "AutoTokenizer" else "processor"
    return "\n".join([*lines, f"{made} = {processor}.from_pretrained({folder!r})"])


def _load_base(manifest: Manifest, options: Mapping[str, object]) -> str:
    """Return the lines that load the base model of a plain PEFT folder, with labels where they have names."""
    arguments = [repr(manifest.base), *(f"{name}={value!r}" for name, value in options.items())]
    labels = ""
    if manifest.head.labels and manifest.head.labels != tuple(
        f"LABEL_{index}" for index in range(len(manifest.head.labels))
    ):
        labels = f"labels = {list(manifest.head.labels)!r}\n"
        arguments.append("id2label=dict(enumerate(labels))")
        arguments.append("label2id={label: index for index, label in enumerate(labels)}")
    return (
        f"{labels}base = {manifest.head.auto_class}.from_pretrained(\n    "
        + ",\n    ".join(arguments)
        + ",\n)"
    )


def servers(
    target: str, manifest: Manifest, folder: str, configuration: Configuration, possible: Sequence[str]
) -> str:
    """Say which servers can take an export and how they are started, and which other targets there are."""
    if manifest.layout == "merged":
        text = (
            "Whatever runs transformers models of this architecture; in vLLM as a pooling model where "
            "it has the architecture."
        )
    elif target in SERVERS:
        commands = how_to_serve(target, manifest, folder, configuration)
        return f"{target}, and whatever loads adapters with peft. In a shell:\n\n{commands}"
    elif manifest.layout == "peft":
        text = "Whatever loads adapters with peft. Others read LoRA by rules of their own."
    else:
        text = "None as it is: load it with autopeft.load_adapter."
    others = ", ".join(repr(other) for other in possible if other not in (target, COMPARISON))
    return text + (f" Other targets of an export that take it: {others}." if others else "")


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
    conversion: Conversion | None,
    target: str,
    possible: Sequence[str],
) -> ModelCard:
    """Return the README.md of an export, with the metadata block of the Hugging Face hub.

    Values, those of the test split with "test_" in front, details and trainings are those of
    `export_adapter`; `check` says how the export was checked, and `possible` which targets there are.
    """
    methods = ", ".join(configuration.methods) or "the head alone"
    name = markdown_text(Path(manifest.base).name or "base model")
    base, source = markdown_text(manifest.base) or "a model that was in memory", manifest.base
    if _is_local(manifest.base):  # a card is published: no path of this machine
        base, source = f"{name}, a local folder", f"path/to/{Path(manifest.base).name}"
    published = dataclasses.replace(manifest, base=source)
    snippet = how_to_load(published, folder, options)
    if manifest.layout == "peft":
        load = f"autopeft.load_adapter({repr(source) if source else 'base'}, {folder!r})"
        snippet += f"\n```\n\nOr, with autopeft:\n\n```python\nmodel = {load}"
    details = {key: Path(text).name if _is_local(text) else text for key, text in details.items()}
    sections = [
        f"# {name}, fine-tuned with {methods}",
        f"Found by autopeft. This is {kind_of(manifest)}. Base model: {base}.",
        "## Figures",
        _figures(values),
        "## Configuration",
        f"Learning rate {configuration.learning_rate:g}, weight decay {configuration.weight_decay:g}; "
        f"{len(configuration)} adapters. Blocks down, roles across:",
        f"```\n{configuration.grid()}\n```",
        "## How to load it",
        f"```python\n{snippet}\n```",
        *_labels(manifest),
        check,
        *_conversion(conversion, configuration),
        "## Servers",
        servers(target, published, folder, configuration, possible),
        "## Where it comes from",
        _table(("", ""), [*details.items(), ("base fingerprint", manifest.base_fingerprint)]),
        _table(("package", "version"), list(manifest.versions.items())),
        "## Limits",
        _limits(values, trainings),
    ]
    metadata = _metadata(manifest, configuration, values, details, folder)
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _labels(manifest: Manifest) -> list[str]:
    names = ", ".join(map(markdown_text, manifest.head.labels))
    return [f"Labels in the order of the logits: {names}."] if names else []


def _conversion(conversion: Conversion | None, configuration: Configuration) -> list[str]:
    if conversion is None:
        return []
    ranks = {site: adapter.size for site, adapter in configuration}
    rows = [(str(site), str(ranks[site]), f"{kept:.4f}") for site, kept in conversion.energy_kept.items()]
    return ["## Made LoRA", markdown_text(str(conversion)), _table(("site", "rank", "share kept"), rows)]


def _metadata(
    manifest: Manifest,
    configuration: Configuration,
    values: Mapping[str, float],
    details: Mapping[str, str],
    folder: str,
) -> ModelCardData:
    """Return the hub's metadata; figures of the test split are its evaluation results."""
    merged, dataset = manifest.layout == "merged", details.get("task dataset")
    auto_class = manifest.head.auto_class
    pipelines: Mapping[str, Any] = SUPPORTED_TASKS
    loaded_by = ((tag, {known.__name__ for known in task["pt"]}) for tag, task in pipelines.items())
    pipeline_tag = next((tag for tag, known in loaded_by if auto_class in known), _TAGS.get(auto_class))
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_config=details.get("task subset") or None,
            dataset_split="test",
            metric_type=name.removeprefix(_TEST),
            metric_value=value,
        )
        for name, value in values.items()
        if pipeline_tag is not None and dataset is not None and name.startswith(_TEST)
    ]
    named: dict[str, Any] = {}
    if manifest.base and not _is_local(manifest.base):  # the hub takes names alone
        named = {"base_model": manifest.base, "base_model_relation": "finetune" if merged else "adapter"}
    if dataset is not None and "/" in dataset:  # else a file, data in memory, or a name without an owner
        named["datasets"] = [dataset]
    return ModelCardData(
        license=_license(manifest.base),
        library_name=_LIBRARIES[manifest.layout],
        pipeline_tag=pipeline_tag,
        tags=["autopeft", *configuration.methods],
        metrics=[result.metric_type for result in results] or None,
        model_name=folder,
        eval_results=results or None,
        **named,
    )


def _license(base: str) -> str | None:
    """Return the license in a base's card, if there is one in its folder or in the hub's cache."""
    with suppress(ValueError, YAMLError):  # no name of the hub, or a card that cannot be read
        card = Path(base, "README.md") if _is_local(base) else try_to_load_from_cache(base, "README.md")
        if isinstance(card, str | Path) and Path(card).is_file():
            return (metadata_load(card) or {}).get("license")
    return None


def _figures(values: Mapping[str, float]) -> str:
    if not values:
        return "None were given."
    rows = []
    for name, value in sorted(values.items(), key=lambda item: item[0].startswith(_TEST)):
        cost = COST_OBJECTIVES.get(name) or GENERATION_SPEEDS.get(name)
        split = "test" if name.startswith(_TEST) else "validation"
        if cost is not None or name in _NOT_OF_A_SPLIT:
            split = "–"
        text = f"{value:.4f}" if cost is None else cost.format(value)
        rows.append((name.removeprefix(_TEST), split, text))
    return _table(("figure", "split", "value"), rows)


def _limits(values: Mapping[str, float], trainings: int) -> str:
    is_tested = any(name.startswith(_TEST) for name in values)
    lines = [
        "Figures on the validation split are those the search chose by: they are optimistic.",
        "The test split was not used in the search." if is_tested else "It was not scored on a test split.",
        "Figures are those of one training with one seed; another seed gives other ones."
        if trainings == 1
        else f"Validation figures are means over {trainings} trainings, each with a seed of its own.",
        "Use it with the very base model named above: peft does not check that, and `autopeft.load_adapter` "
        "compares shapes alone.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    cells = [heading, tuple("---" for _ in heading), *rows]
    return "\n".join(f"| {' | '.join(map(markdown_text, row))} |" for row in cells)


def _is_local(source: str) -> bool:
    """Say whether a model or a data set is named by its place on this machine."""
    return source.startswith(("/", "~", "./", "../")) or os.path.exists(source)
